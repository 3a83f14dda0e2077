"""``seedvc-ckpt diff``."""

from __future__ import annotations

import sys
from dataclasses import asdict
from itertools import islice

import click

from seedvc_ckpt.cli.output import as_json, json_option
from seedvc_ckpt.cli.target import checkpoint_at, pattern_option
from seedvc_ckpt.naming import NamePattern

__all__ = ["command"]

_SHOWN = 40


@click.command("diff", epilog="Example: seedvc-ckpt diff runs/a runs/b")
@click.argument("first")
@click.argument("second")
@pattern_option
@json_option
def command(first: str, second: str, pattern: NamePattern, as_json_: bool) -> None:  # noqa: FBT001
    """Compare two checkpoints value by value, bit for bit; exit 1 when they differ.

    FIRST and SECOND are a RUN (its latest checkpoint) or a FILE each. Manifests are left aside.
    """
    one, other = checkpoint_at(first, None, pattern), checkpoint_at(second, None, pattern)
    from seedvc_ckpt.format.compare import compare

    with one.opened() as left, other.opened() as right:
        differences = compare(left, right)
        if as_json_:
            found = [asdict(difference) for difference in differences]
            as_json({"first": left.source.name, "second": right.source.name, "differences": found})
            sys.exit(1 if found else 0)
        shown = list(islice(differences, _SHOWN))
        for difference in shown:
            click.echo(f"{difference.path}: {difference.what}")
        rest = sum(1 for _ in differences)
        if not shown:
            click.echo(f"no difference between {left.source.name} and {right.source.name}")
        elif rest:
            click.echo(f"… and {rest} more differences (--json lists them all)")
        sys.exit(1 if shown else 0)
