"""``seedvc-ckpt rewind``."""

from __future__ import annotations

import click

from seedvc_ckpt.cli.output import as_json, info_fields, json_option
from seedvc_ckpt.cli.target import pattern_option, run_at
from seedvc_ckpt.naming import NamePattern

__all__ = ["command"]


@click.command("rewind", epilog="Example: seedvc-ckpt rewind runs/my_run 1500 --dry-run")
@click.argument("run")
@click.argument("step", type=click.IntRange(min=0))
@pattern_option
@click.option("--dry-run", is_flag=True, help="Print what would be set aside and move nothing.")
@json_option
def command(
    run: str,
    step: int,
    pattern: NamePattern,
    dry_run: bool,  # noqa: FBT001
    as_json_: bool,  # noqa: FBT001
) -> None:
    """Set the checkpoints of a RUN after STEP aside, so that training goes on from there.

    They are moved to RUN/aside, each with the reason beside it; nothing is deleted.
    """
    store = run_at(run, pattern=pattern)
    later = store.rewind(step, dry_run=dry_run)
    if as_json_:
        as_json({"dry_run": dry_run, "set_aside": [info_fields(info) for info in later]})
        return
    for info in later:
        click.echo(f"{'would set aside' if dry_run else 'set aside'}  {info.name}")
    latest = store.latest()
    if latest and not dry_run:
        click.echo(f"training goes on from {latest.name}")
    elif not later:
        click.echo(f"nothing is later than step {step}")
