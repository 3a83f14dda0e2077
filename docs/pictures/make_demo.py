"""Draw docs/pictures/demo.svg: what `make demo` shows on a terminal. Needs rich. Run it from an empty folder.

python docs/pictures/make_demo.py
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS = 110


def run_on_a_terminal(words: list[str]) -> str:
    """What a command writes to a terminal, bars in their last state."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 60, COLUMNS, 0, 0))
    with subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):
            while read := os.read(ours, 4096):
                shown += read
    if process.returncode:
        raise SystemExit(shown.decode())
    lines = shown.decode().replace("\r\n", "\n").split("\n")
    return "\n".join(
        [part for part in line.split("\r") if part.strip()][-1:][0] if line.strip() else "" for line in lines
    )


def main() -> None:
    """Draw the picture."""
    text = run_on_a_terminal([sys.executable, "-m", "seedvc_train", "--demo"])
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text.from_ansi("$ make demo\n" + text.strip("\n")), soft_wrap=True)
    target = Path(__file__).with_name("demo.svg")
    console.save_svg(str(target), title="seedvc-train", font_aspect_ratio=0.6)
    # any monospaced font will do: a picture must not fetch one
    plain = re.sub(r"@font-face\s*{.*?}", "", target.read_text(), flags=re.DOTALL)
    target.write_text(plain.replace("Fira Code", "DejaVu Sans Mono"))


if __name__ == "__main__":
    main()
