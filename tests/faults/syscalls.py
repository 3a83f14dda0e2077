"""Faults at the system calls of an operation: strace kills the process there, or makes the call fail or lie."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from zygote import Child

from seedvc_ckpt import CheckpointError

__all__ = ["REFUSED", "SHORT", "Fault", "can_trace", "operate", "points"]

REFUSED = 10
"""Exit code of an operation that raised an error of the library."""

SHORT = "retval=1"
"""A write that takes a byte, says so, and loses it: what a size check is for."""

_CALL = re.compile(r"(?:\d+ +)?(\w+)\((.*)")


@dataclass(frozen=True)
class Fault:
    """What happens at the `number`-th call of that name after strace has been attached."""

    call: str
    number: int
    action: str

    def __str__(self) -> str:
        return f"{self.action} at {self.call} {self.number}"


def can_trace() -> str:
    """Why processes can't be traced here; "" where they can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    probe = subprocess.run(["strace", "-e", "trace=none", "true"], capture_output=True, check=False)
    return "strace may not trace here" if probe.returncode else ""


def points(act: Callable[[], object], folder: Path, trace: Path) -> Iterator[tuple[str, int, bool]]:
    """(call, number, whether it is about `folder`) of every system call of `act`, which runs once for it."""
    code = operate(act, None, trace)
    assert code == 0, f"the operation itself failed: {code}"
    counted, begun = Counter(), False
    for line in trace.read_text(errors="replace").splitlines():
        found = _CALL.match(line)
        if found is None:
            continue
        call = found[1]
        counted[call] += 1
        if call == "sched_yield":  # `operate` marks the beginning and the end with it
            if begun:
                return
            begun = True
        elif begun:
            yield call, counted[call], str(folder) in found[2]
    raise AssertionError("the trace has no end")


def operate(act: Callable[[], object], fault: Fault | None, trace: Path, prepare: Callable[[], object] = int) -> int:
    """Run `act` in a process of its own with a fault in it, and return its exit code (`REFUSED`, 0, or a signal)."""

    def acting() -> None:
        prepare()
        os.sched_yield()
        try:
            act()
        except CheckpointError:
            os._exit(REFUSED)
        os.sched_yield()

    child = Child(acting)
    options = [f"trace={fault.call}", f"inject={fault.call}:{fault.action}:when={fault.number}"] if fault else []
    selected = [word for option in options for word in ("-e", option)]
    command = ["strace", "-f", "-y", "-qq", "-o", str(trace), *selected, "-p", str(child.pid)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as strace:
        _wait_until_traced(child.pid, strace)
        child.go()
        return child.wait()


def _wait_until_traced(process: int, strace: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 20
    status = Path(f"/proc/{process}/status")
    while "TracerPid:\t0\n" in status.read_text():
        assert strace.poll() is None, strace.stderr.read()
        assert time.monotonic() < deadline, "strace did not attach in 20 s"
        time.sleep(0.001)
