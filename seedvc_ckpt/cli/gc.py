"""``seedvc-ckpt gc``."""

from __future__ import annotations

from dataclasses import asdict

import click

from seedvc_ckpt.cli.output import as_json, columns, json_option, readable_size
from seedvc_ckpt.cli.target import pattern_option, run_at
from seedvc_ckpt.naming import NamePattern

__all__ = ["command"]


@click.command("gc", epilog="Example: seedvc-ckpt gc runs/my_run --dry-run")
@click.argument("run")
@pattern_option
@click.option("--dry-run", is_flag=True, help="Say what would be removed and remove nothing.")
@json_option
def command(run: str, pattern: NamePattern, dry_run: bool, as_json_: bool) -> None:  # noqa: FBT001
    """Remove the temporary files that killed writers left in a RUN; never those of a living one."""
    found = run_at(run, pattern=pattern).collect_garbage(dry_run=dry_run)
    if as_json_:
        as_json({"dry_run": dry_run, "removed": [asdict(leftover) for leftover in found]})
        return
    if found:
        columns([(readable_size(item.size), item.name, item.why) for item in found], ["size", "name", "why"], "size")
    verb = "would be removed" if dry_run else "removed"
    click.echo(f"{len(found)} {verb}" if found else "nothing left behind")
