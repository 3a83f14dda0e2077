"""``seedvc-ckpt prune``."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from datetime import timedelta

import click

from seedvc_ckpt.checkpoint import CheckpointInfo
from seedvc_ckpt.cli.output import as_json, columns, info_fields, json_option, readable_size
from seedvc_ckpt.cli.target import pattern_option, run_at
from seedvc_ckpt.naming import NamePattern
from seedvc_ckpt.retention import Plan, Rule, keep_best_of, keep_every, keep_last, keep_within

__all__ = ["command"]

_AGE = re.compile(r"([0-9]+)([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@click.command("prune", epilog="Example: seedvc-ckpt prune runs/my_run --keep-last 3 --keep-best loss:2 --dry-run")
@click.argument("run")
@pattern_option
@click.option("--keep-last", type=click.IntRange(min=1), metavar="N", help="Keep the N newest.")
@click.option("--keep-every", type=click.IntRange(min=1), metavar="STEPS", help="Keep multiples of STEPS.")
@click.option("--keep-within", metavar="AGE", help="Keep what is at most AGE older than the newest: 90m, 12h, 7d.")
@click.option("--keep-best", metavar="METRIC[:N[:max]]", help="Keep the N with the smallest (largest) METRIC.")
@click.option("--dry-run", is_flag=True, help="Print the plan and delete nothing.")
@json_option
def command(
    run: str,
    pattern: NamePattern,
    keep_last: int | None,
    keep_every: int | None,
    keep_within: str | None,
    keep_best: str | None,
    dry_run: bool,  # noqa: FBT001
    as_json_: bool,  # noqa: FBT001
) -> None:
    """Delete the checkpoints of a RUN that no rule keeps, and say why each other one stays.

    A checkpoint stays if any of the rules keeps it. The newest and the pinned ones always stay.
    """
    rules = _rules(keep_last, keep_every, keep_within, keep_best)
    if not rules:
        raise click.UsageError("give at least one rule, such as --keep-last 3; without one nothing would be deleted")
    store = run_at(run, pattern=pattern, retention=rules)
    plan = store.prune(dry_run=dry_run)
    left = set() if dry_run else {info.name for info in store.list()}
    stuck = [info for info in plan.remove if info.name in left]
    if as_json_:
        kept = [{**info_fields(info), "reasons": reasons} for info, reasons in plan.keep.items()]
        removed = [info_fields(info) for info in plan.remove]
        as_json({"dry_run": dry_run, "keep": kept, "remove": removed, "not_removed": [info.name for info in stuck]})
    elif plan.keep:
        _print(plan, stuck, "would go" if dry_run else "removed")
    else:
        click.echo(f"no checkpoints named like {pattern.template} in {store.location}")
    sys.exit(1 if stuck else 0)


def _print(plan: Plan, stuck: Sequence[CheckpointInfo], verb: str) -> None:
    rows = []
    for info in sorted([*plan.keep, *plan.remove], key=lambda info: (info.step, info.epoch)):
        why = ", ".join(plan.keep.get(info, ())) or ("NOT REMOVED" if info in stuck else verb)
        rows.append((str(info.step), readable_size(info.size), "keep" if info in plan.keep else "-", why))
    columns(rows, ["step", "size", "", "why"], "step size")
    gone = [info for info in plan.remove if info not in stuck]
    click.echo(f"{len(plan.keep) + len(stuck)} kept, {len(gone)} {verb} ({readable_size(sum(i.size for i in gone))})")


def _rules(last: int | None, every: int | None, within: str | None, best: str | None) -> list[Rule]:
    rules: list[Rule] = []
    if last:
        rules.append(keep_last(last))
    if every:
        rules.append(keep_every(every))
    if within:
        rules.append(keep_within(_age(within)))
    if best:
        rules.append(_best(best))
    return rules


def _age(text: str) -> timedelta:
    match = _AGE.fullmatch(text)
    if match is None:
        raise click.BadParameter(f"{text!r} is no age: write 90m, 12h, 7d or 2w", param_hint="--keep-within")
    try:
        return timedelta(**{_UNITS[match[2]]: int(match[1])})
    except (OverflowError, ValueError):
        return timedelta.max


def _best(text: str) -> Rule:
    try:
        return keep_best_of(text)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--keep-best") from None
