"""``seedvc-ckpt latest``."""

from __future__ import annotations

import sys

import click

from seedvc_ckpt.cli.output import as_json, info_fields, json_option
from seedvc_ckpt.cli.target import is_url, pattern_option, run_at
from seedvc_ckpt.naming import NamePattern

__all__ = ["command"]


@click.command("latest", epilog='Example: python inference.py --checkpoint "$(seedvc-ckpt latest runs/my_run)" …')
@click.argument("run")
@pattern_option
@json_option
def command(run: str, pattern: NamePattern, as_json_: bool) -> None:  # noqa: FBT001
    """Print the path of the checkpoint with the largest step of a RUN; exit 1 when there is none."""
    store = run_at(run, pattern=pattern, read_only=True)
    info = store.latest()
    if as_json_:
        as_json(info_fields(info) if info else None)
    elif info:
        click.echo(f"{store.location.rstrip('/') if is_url(run) else run.rstrip('/')}/{info.name}")
    else:
        click.echo(f"no checkpoint named like {pattern.template} in {store.location}", err=True)
    sys.exit(0 if info else 1)
