"""``seedvc-ckpt unpin``."""

from __future__ import annotations

import click

from seedvc_ckpt.cli.target import pattern_option, run_at
from seedvc_ckpt.naming import NamePattern

__all__ = ["command"]


@click.command("unpin", epilog="Example: seedvc-ckpt unpin runs/my_run 4000")
@click.argument("run")
@click.argument("step", type=click.IntRange(min=0))
@pattern_option
def command(run: str, step: int, pattern: NamePattern) -> None:
    """Let the checkpoint of a STEP be pruned again."""
    info = run_at(run, pattern=pattern).unpin(step)
    click.echo(f"unpinned {info.name}")
