"""``seedvc-ckpt ls``."""

from __future__ import annotations

from collections import Counter

import click

from seedvc_ckpt.cli.output import as_json, columns, info_fields, json_option, readable_size, readable_time
from seedvc_ckpt.cli.target import pattern_option, run_at
from seedvc_ckpt.naming import NamePattern

__all__ = ["command"]


@click.command("ls", epilog="Example: seedvc-ckpt ls runs/my_run")
@click.argument("run")
@pattern_option
@json_option
def command(run: str, pattern: NamePattern, as_json_: bool) -> None:  # noqa: FBT001
    """List the checkpoints of a RUN, oldest first."""
    store = run_at(run, pattern=pattern, read_only=True)
    infos = store.list()
    if as_json_:
        as_json([info_fields(info) for info in infos])
        return
    if not infos:
        click.echo(f"no checkpoints named like {pattern.template} in {store.location}")
        return
    shared = {step for step, count in Counter(info.step for info in infos).items() if count > 1}
    rows = [
        (
            str(info.step),
            str(info.epoch),
            readable_size(info.size),
            readable_time(info.modified),
            "P" * info.pinned + "=" * (info.step in shared),
            info.name,
        )
        for info in infos
    ]
    if not any(row[4] for row in rows):
        columns(
            [(*row[:4], row[5]) for row in rows],
            ["step", "epoch", "size", "saved", "name"],
            "step epoch size",
        )
    else:
        columns(rows, ["step", "epoch", "size", "saved", "", "name"], "step epoch size")
    total = readable_size(sum(info.size for info in infos))
    legend = "; P: pinned" * any(info.pinned for info in infos) + "; =: several of this step" * bool(shared)
    click.echo(f"{len(infos)} checkpoint{'s' if len(infos) > 1 else ''}, {total}{legend}")
