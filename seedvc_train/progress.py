"""What a person watching sees of a run."""

from __future__ import annotations

import sys
import time
from types import TracebackType

import click
from tqdm import tqdm

__all__ = ["ClipProgress", "Progress"]

_SILENCE = 30.0  # seconds


class Progress:
    """A bar on a terminal, a line now and then where standard error is a file."""

    def __init__(self, step: int, max_steps: int) -> None:
        self._saved = str(step or "-")
        self._loss = float("nan")
        self._val_loss = ""
        self._first = step
        self._max_steps = max_steps
        self._began = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=max_steps,
            initial=step,
            unit="step",
            dynamic_ncols=True,
            disable=not self._terminal,
            bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{rate_fmt}, {remaining} left{postfix}]",
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def step(self, loss: float, saved: int | None) -> None:
        """A step is done; `saved` is the newest durable checkpoint of this process."""
        self._loss = loss
        self._saved = str(saved) if saved is not None else self._saved
        self._bar.set_postfix_str(self._postfix(), refresh=False)
        self._bar.update()

    def _postfix(self) -> str:
        return f"loss {self._loss:.4f}{self._val_loss}, saved {self._saved}"

    def validated(self, step: int, val_loss: float) -> None:
        """The model was validated after a step."""
        self._val_loss = f", val {val_loss:.4f}"
        self._bar.set_postfix_str(self._postfix())
        if not self._terminal:
            click.echo(f"step {step}/{self._max_steps}  val_loss {val_loss:.4f}", err=True)

    def logged(self, step: int, loss: float) -> None:
        """A line of the log was written."""
        if not self._terminal:
            rate = (step - self._first) / (time.monotonic() - self._began)
            click.echo(
                f"step {step}/{self._max_steps}  loss {loss:.4f}  {rate:.2f} steps/s  saved {self._saved}", err=True
            )


class ClipProgress:
    """What a person sees who waits for clips: a bar on a terminal, a line now and then where standard error is a file.

    Args:
        what: is done to the clips.
        total: how many they are.
    """

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._terminal = sys.stderr.isatty()
        self._told = time.monotonic()
        self._bar = tqdm(desc=what, total=total, unit="clip", dynamic_ncols=True, disable=not self._terminal)

    def __enter__(self) -> ClipProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def step(self) -> None:
        """A clip is done."""
        self._done += 1
        self._bar.update()
        if not self._terminal and time.monotonic() - self._told >= _SILENCE:
            click.echo(f"{self._what}: {self._done}/{self._total} clips", err=True)
            self._told = time.monotonic()
