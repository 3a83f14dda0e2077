"""Processes that start in milliseconds: forked from this one, which has torch and the library loaded."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

__all__ = ["Child", "be_command", "run_in_child"]


class Child:
    """A forked process that runs `act` once it is told to `go`, then ends; what it raises is printed, exit code 70.

    It is a process group of its own, so that whoever it starts can be killed with it.
    """

    def __init__(self, act: Callable[[], object]) -> None:
        ready, go = os.pipe()
        begun, begins = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's idle threads don't come along, nor do locks
            self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.close(go)
                os.close(begun)
                os.setpgid(0, 0)
                torch.set_num_threads(1)
                os.close(begins)
                if os.read(ready, 1):
                    act()
                    code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        os.close(ready)
        os.close(begins)
        os.read(begun, 1)  # ends when the child has come to its own waiting: from here on each of its calls is `act`'s
        os.close(begun)
        self._go = go

    def go(self) -> Child:
        """Let it begin."""
        os.write(self._go, b"g")
        return self

    def kill(self) -> None:
        """End it now, whatever it does."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Its exit code, negative for a signal."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self._go)
        return code


def run_in_child(act: Callable[[], object]) -> int:
    """Run `act` in a process of its own and return its exit code."""
    return Child(act).go().wait()


def be_command(main: Callable[[], object], arguments: Sequence[str], output: Path) -> None:
    """In a child: be a command from now on, both of whose outputs go to a file; does not return where it exits."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # pytest's own write elsewhere
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv = list(arguments)
    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code or 0)
