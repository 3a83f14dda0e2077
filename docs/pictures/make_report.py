"""Draw docs/pictures/report.png: the report of a run that was killed, damaged, stopped and scored. Needs chromium.

Run it from an empty folder: python docs/pictures/make_report.py
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from seedvc_ckpt import CheckpointStore
from seedvc_train.corpus import write_demo_corpus
from seedvc_train.report import write_report

RUN = Path("runs/my_run")
OPTIONS = "--dataset-dir recordings --log-dir runs --lr 1e-3 --keep-last 3 --keep-every 100 --save-every 25 "
OPTIONS += "--val-split 0.2 --keep-best val_loss:2"
WIDTH, HEIGHT = 1160, 2630


def train_until(step: int, end: signal.Signals | None = None) -> None:
    """Train to a step, or beyond it until a signal comes."""
    words = [sys.executable, "-m", "seedvc_train", *shlex.split(OPTIONS), "--max-steps", str(9999 if end else step)]
    with subprocess.Popen(words) as process:
        while end and process.poll() is None:
            if (last := last_step()) is not None and last >= step:
                process.send_signal(end)
                break
            time.sleep(0.02)


def last_step() -> int | None:
    """The last step that was logged, as far as its line is whole."""
    log = RUN / "metrics.jsonl"
    lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")] if log.exists() else []
    return json.loads(lines[-1])["step"] if lines else None


def main() -> None:
    """Train, and draw the picture."""
    write_demo_corpus("recordings")
    train_until(220, signal.SIGKILL)
    train_until(400, signal.SIGTERM)
    newest = CheckpointStore(RUN).list()[-1]
    os.truncate(RUN / newest.name, newest.size // 2)
    train_until(600)
    words = ["evaluate", str(RUN), "--every", "--dataset-dir", "recordings", "--pictures", "1"]
    subprocess.run([sys.executable, "-m", "seedvc_train", *words], check=True)
    page = write_report(CheckpointStore(RUN, read_only=True), "report")[0]
    window = f"--window-size={WIDTH},{HEIGHT}"
    picture = Path(__file__).resolve().with_name("report.png")
    words = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", window]
    subprocess.run([*words, f"--screenshot={picture}", f"file://{os.path.abspath(page)}"], check=True)


if __name__ == "__main__":
    main()
