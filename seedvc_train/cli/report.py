"""``seedvc-train report``."""

from __future__ import annotations

import os
from importlib.util import find_spec

import click

from seedvc_ckpt.cli.target import is_url, pattern_option, run_at
from seedvc_ckpt.naming import NamePattern

__all__ = ["command"]

_NEEDED = ("matplotlib", "jinja2")


@click.command("report")
@click.argument("run")
@click.option("--out", metavar="DIR", help="Where the page and its charts go.  [default: RUN/report]")
@pattern_option
def command(run: str, out: str | None, pattern: NamePattern) -> None:
    """Draw the history of RUN: one HTML page that needs nothing else, and its charts as PNGs.

    RUN is a run's folder or URL, also one that is training or one of Seed-VC's own trainer. What is not in it is said.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise click.UsageError(f"a report needs {', '.join(missing)}: run pip install 'seedvc-ckpt[report]'")
    if out is None and is_url(run):
        raise click.UsageError("RUN is on a server: say with --out which folder here the report goes to")
    store = run_at(run, pattern=pattern, read_only=True)
    from seedvc_train.report import write_report

    page, *charts = write_report(store, out or os.path.join(run, "report"))
    click.echo(page)
    for chart in charts:
        click.echo(f"  {chart}")
