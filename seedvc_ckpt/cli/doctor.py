"""``seedvc-ckpt doctor``."""

from __future__ import annotations

import sys
from dataclasses import asdict

import click

from seedvc_ckpt.cli.output import as_json, json_option, progress_bar, wrapped
from seedvc_ckpt.cli.target import pattern_option, run_at
from seedvc_ckpt.doctor import diagnose
from seedvc_ckpt.naming import NamePattern

__all__ = ["command"]


@click.command("doctor", epilog="Example: seedvc-ckpt doctor runs/my_run")
@click.argument("run")
@pattern_option
@click.option("--quick", is_flag=True, help="Don't check every byte of every checkpoint.")
@json_option
def command(run: str, pattern: NamePattern, quick: bool, as_json_: bool) -> None:  # noqa: FBT001
    """Report everything unusual about a RUN and what to do about it; changes nothing.

    Damaged, temporary and foreign files, steps that contradict the files' times, who is writing, space, permissions.
    Exit code 1 when the run is in danger.
    """
    store = run_at(run, pattern=pattern, read_only=True)
    infos = store.list()
    with progress_bar(0 if quick else sum(info.size for info in infos), "checking") as bar:
        findings = diagnose(store, verify=not quick, progress=lambda _info, size: bar.update(size))
    problems = sum(finding.problem for finding in findings)
    if as_json_:
        as_json([asdict(finding) for finding in findings])
        sys.exit(1 if problems else 0)
    for finding in findings:
        mark = click.style("problem", fg="red") if finding.problem else click.style("note   ", fg="cyan")
        click.echo(f"{mark}  {wrapped(f'{finding.subject} {finding.what}', 9)}")
        click.echo(f"         {wrapped(f'→ {finding.remedy}', 11)}")
    checked = "not checked byte for byte" if quick else "every byte checked"
    counted = f"{len(infos)} checkpoint{'s' * (len(infos) != 1)}, {checked}"
    click.echo(f"{counted}: {problems or 'no'} problem{'s' * (problems != 1)}, {len(findings) - problems} notes")
    sys.exit(1 if problems else 0)
