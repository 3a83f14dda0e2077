"""``seedvc-ckpt check-deploy``."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from itertools import zip_longest
from typing import Any

import click

from seedvc_ckpt.cli.model import UnusableConfigError, describe, read_config
from seedvc_ckpt.cli.output import as_json, columns, json_option, progress_bar, wrapped
from seedvc_ckpt.cli.target import is_url
from seedvc_ckpt.deploy import Loading, Report, check
from seedvc_ckpt.file import CheckpointFile
from seedvc_ckpt.storage.condition import problem

__all__ = ["command"]

_SHOWN = 8
_NAME = 44


@click.command(
    "check-deploy",
    epilog="Example: seedvc-ckpt check-deploy ft_model.pth config_dit_mel_seed_uvit_whisper_base_f0_44k.yml",
)
@click.argument("location", metavar="FILE")
@click.argument("config", metavar="CONFIG")
@json_option
def command(location: str, config: str, as_json_: bool) -> None:  # noqa: FBT001
    """Tell how Seed-VC's services would run FILE with CONFIG; exit 1 unless it is the model that was trained.

    They leave random what differs in name or shape, and set sample rate, mels and pitch up as the config says, without
    a word. FILE is an ft_model.pth or a training checkpoint, CONFIG the YAML that the service gets.
    """
    if os.path.isdir(location):
        raise click.UsageError(f"{location!r} is a folder: FILE is one file in it, such as {location}/ft_model.pth")
    if not is_url(location) and not os.path.exists(location):
        raise click.UsageError(f"{location!r} does not exist")
    file, named = CheckpointFile.at(location), read_config(config)
    try:
        described = describe(*named)
    except UnusableConfigError as error:
        finding = problem(named[0], str(error), "correct it, or use the config that the run was trained with")
        report = Report(file.name, 0, Loading.of_nothing(), (finding,))
    else:
        size = file.storage.stat(file.name)
        with progress_bar(size.size if size else 0, file.name) as bar:
            report = check(file, described.values, described.expected, progress=bar.update)
    if as_json_:
        as_json(_document(report, named[0]))
    else:
        _print(report, named[0])
    sys.exit(1 if report.problems else 0)


def _print(report: Report, config: str) -> None:
    for finding, following in zip_longest(report.findings, report.findings[1:]):
        mark = click.style("problem", fg="red") if finding.problem else click.style("note   ", fg="cyan")
        click.echo(f"{mark}  {wrapped(finding.what, 9)}")
        if following is None or following.remedy != finding.remedy:
            click.echo(f"         {wrapped(f'→ {finding.remedy}', 11)}")
    rows = _rows(report.loading)
    if rows:
        click.echo()
        columns(rows[:_SHOWN], ["tensor", "in the file", "in the model"])
        if len(rows) > _SHOWN:
            click.echo(f"… and {len(rows) - _SHOWN} more (--json lists them all)")
        click.echo()
    loaded = f"{len(report.loading.loaded)} of {report.tensors} tensors loaded"
    verdict = f"{len(report.problems)} problem{'s' * (len(report.problems) != 1)}" if report.problems else "fine"
    click.echo(wrapped(f"{report.file} with {config}: {loaded}, {verdict}", 0))


def _rows(loading: Loading) -> list[tuple[str, str, str]]:
    rows = [(name, _shape(given), _shape(wanted)) for name, (given, wanted) in loading.mismatched.items()]
    rows += [(name, "missing", "random") for name in loading.left_random if name in loading.missing]
    rows += [(name, _shape(shape), "no such tensor") for name, shape in loading.ignored.items()]
    return [(_short(name), given, wanted) for name, given, wanted in rows]


def _short(name: str) -> str:
    return name if len(name) <= _NAME else f"…{name[1 - _NAME :]}"


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "one number"


def _document(report: Report, config: str) -> dict[str, Any]:
    loading = report.loading
    return {
        "file": report.file,
        "config": config,
        "fine": not report.problems,
        "tensors": report.tensors,
        "loaded": len(loading.loaded),
        "left_random": loading.left_random,
        "missing": loading.missing,
        "mismatched": {name: {"file": given, "model": wanted} for name, (given, wanted) in loading.mismatched.items()},
        "ignored": [*loading.ignored],
        "findings": [asdict(finding) for finding in report.findings],
    }
