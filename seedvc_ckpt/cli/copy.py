"""``seedvc-ckpt copy``."""

from __future__ import annotations

from dataclasses import asdict

import click

from seedvc_ckpt.cli.output import as_json, columns, json_option, progress_bar, readable_size
from seedvc_ckpt.cli.target import pattern_option, run_at
from seedvc_ckpt.naming import NamePattern
from seedvc_ckpt.store import CheckpointStore

__all__ = ["command"]


@click.command("copy", epilog="Example: seedvc-ckpt copy runs/my_run s3://bucket/runs/my_run")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@pattern_option
@click.option("--no-verify", is_flag=True, help="Don't read each checkpoint back to check every byte.")
@click.option("--dry-run", is_flag=True, help="Say what would be copied and copy nothing.")
@json_option
def command(
    source: str,
    target: str,
    pattern: NamePattern,
    no_verify: bool,  # noqa: FBT001
    dry_run: bool,  # noqa: FBT001
    as_json_: bool,  # noqa: FBT001
) -> None:
    """Copy the run SRC to DST, both folders or URLs: checkpoints, pins, logs, configs and exports.

    What is there already is not sent again, so a copy that was interrupted goes on where it was. Nothing in DST is
    overwritten: another checkpoint of the same name stops the copy, an older log or export there is set aside.
    """
    from seedvc_ckpt.copying import copy_run, plan_copy  # listing has no use for it

    with run_at(source, pattern=pattern, read_only=True) as one, CheckpointStore(target, pattern=pattern) as other:
        plan = plan_copy(one, other)
        files = [*plan.checkpoints, *plan.others]
        if dry_run:
            if as_json_:
                as_json({"copied": [name for name, _ in files], "there": plan.there, "aside": [], "dry_run": True})
                return
            if files:
                columns([(readable_size(size), name) for name, size in files], ["size", "name"], "size")
            click.echo(f"{len(files)} would be copied, {len(plan.there)} are there already")
            return
        with progress_bar(plan.work(verify=not no_verify), f"copying {len(files)} files") as bar:
            done = copy_run(one, other, plan=plan, verify=not no_verify, progress=bar.update)
    if as_json_:
        as_json({**asdict(done), "dry_run": False})
        return
    for name in done.aside:
        click.echo(f"an older file was kept as {name}")
    checked = "not checked" if no_verify else "checked byte for byte"
    click.echo(f"{len(done.copied)} copied to {other.location}, {checked}; {len(done.there)} were there already")
