"""``seedvc-ckpt ls``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import click

from seedvc_ckpt.checkpoint import CheckpointInfo
from seedvc_ckpt.cli.output import as_json, columns, info_fields, json_option, readable_size, readable_time
from seedvc_ckpt.cli.target import Best, best_of, pattern_option, run_at
from seedvc_ckpt.errors import MissingMetricError
from seedvc_ckpt.naming import NamePattern
from seedvc_ckpt.retention import ranked

__all__ = ["command"]


@click.command("ls", epilog="Example: seedvc-ckpt ls runs/my_run --metric val_loss --metric loss")
@click.argument("run")
@pattern_option
@click.option(
    "--metric",
    "metrics",
    metavar="METRIC[:max]",
    multiple=True,
    callback=lambda _ctx, _parameter, values: tuple(map(best_of, values)),
    help="Show this metric, its smallest (largest) value marked; may be given again.",
)
@json_option
def command(run: str, pattern: NamePattern, metrics: tuple[Best, ...], as_json_: bool) -> None:  # noqa: FBT001
    """List the checkpoints of a RUN, oldest first."""
    store = run_at(run, pattern=pattern, read_only=True)
    known: Mapping[CheckpointInfo, Mapping[str, float]] = store.scores() if metrics else {}
    infos = list(known) if metrics else store.list()
    if as_json_:
        as_json([{**info_fields(info), **_shown(known.get(info), metrics)} for info in infos])
        return
    if not infos:
        click.echo(f"no checkpoints named like {pattern.template} in {store.location}")
        return
    shared = {step for step, count in Counter(info.step for info in infos).items() if count > 1}
    marks = ["P" * info.pinned + "=" * (info.step in shared) for info in infos]
    right = ["step", "epoch", "size", *(asked.metric for asked in metrics)]
    table = [
        ("step", [str(info.step) for info in infos]),
        ("epoch", [str(info.epoch) for info in infos]),
        ("size", [readable_size(info.size) for info in infos]),
        *((asked.metric, _column(infos, known, asked)) for asked in metrics),
        ("saved", [readable_time(info.modified) for info in infos]),
        *([("", marks)] if any(marks) else []),
        ("name", [info.name for info in infos]),
    ]
    columns(zip(*(column for _, column in table), strict=True), [title for title, _ in table], " ".join(right))
    total = readable_size(sum(info.size for info in infos))
    legend = "; P: pinned" * any(info.pinned for info in infos) + "; =: several of this step" * bool(shared)
    legend += "; *: best" * any(asked.metric in found for asked in metrics for found in known.values())
    click.echo(f"{len(infos)} checkpoint{'s' if len(infos) > 1 else ''}, {total}{legend}")


def _shown(known: Mapping[str, float] | None, metrics: Sequence[Best]) -> dict[str, dict[str, float | None]]:
    """What --json adds to a checkpoint's fields; None for a metric that it lacks."""
    return {"metrics": {asked.metric: (known or {}).get(asked.metric) for asked in metrics}} if metrics else {}


def _column(
    infos: Sequence[CheckpointInfo], known: Mapping[CheckpointInfo, Mapping[str, float]], asked: Best
) -> list[str]:
    """A metric of each checkpoint, "-" where it is not known, the best with a star."""
    try:
        best = ranked(infos, asked.metric, asked.mode, known)[:1]
    except MissingMetricError as error:
        click.echo(f"{click.style('note:', fg='yellow')} {error}", err=True)
        best = []
    return [
        f"{known[info][asked.metric]:.6g}{'*' if info in best else ' '}" if asked.metric in known[info] else "- "
        for info in infos
    ]
