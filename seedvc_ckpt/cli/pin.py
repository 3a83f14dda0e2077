"""``seedvc-ckpt pin``."""

from __future__ import annotations

import click

from seedvc_ckpt.cli.target import pattern_option, run_at
from seedvc_ckpt.naming import NamePattern

__all__ = ["command"]


@click.command("pin", epilog="Example: seedvc-ckpt pin runs/my_run 4000")
@click.argument("run")
@click.argument("step", type=click.IntRange(min=0))
@pattern_option
def command(run: str, step: int, pattern: NamePattern) -> None:
    """Keep the checkpoint of a STEP from ever being pruned, also while the RUN is training."""
    info = run_at(run, pattern=pattern).pin(step)
    click.echo(f"pinned {info.name}")
