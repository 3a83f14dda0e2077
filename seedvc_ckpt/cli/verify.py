"""``seedvc-ckpt verify``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from seedvc_ckpt.cli.output import as_json, json_option, progress_bar
from seedvc_ckpt.cli.target import Which, checkpoint_at, pattern_option, run_at, step_option
from seedvc_ckpt.errors import CheckpointError, CorruptCheckpointError
from seedvc_ckpt.file import CheckpointFile
from seedvc_ckpt.naming import NamePattern

__all__ = ["command"]


@click.command("verify", epilog="Example: seedvc-ckpt verify runs/my_run --all")
@click.argument("run_or_file")
@step_option
@pattern_option
@click.option("--all", "all_", is_flag=True, help="Every checkpoint of the RUN.")
@json_option
def command(
    run_or_file: str,
    step: Which,
    pattern: NamePattern,
    all_: bool,  # noqa: FBT001
    as_json_: bool,  # noqa: FBT001
) -> None:
    """Check every byte of a checkpoint; exit 1 and name the tensor when one is damaged."""
    if all_:
        if step is not None:
            raise click.UsageError("--all means every step: leave out --step and --best")
        store = run_at(run_or_file, pattern=pattern, read_only=True)
        files = [store.file(info) for info in store.list()]
    else:
        files = [checkpoint_at(run_or_file, step, pattern)]
    results = []
    for number, file in enumerate(files, start=1):
        error, warnings = _verify(file, f"{number} of {len(files)}: {file.name}" if all_ else file.name)
        results.append(
            {"name": file.name, "intact": error is None, "problem": error and str(error), "warnings": warnings}
        )
        if not as_json_:
            mark = click.style("intact ", fg="green") if error is None else click.style("DAMAGED", fg="red")
            if error is not None and not isinstance(error, CorruptCheckpointError):
                mark = click.style("REFUSED", fg="red")
            click.echo(f"{mark}  {file.name if error is None else error}")
            for warning in warnings:
                click.echo(f"{click.style('warning', fg='yellow')}  {file.name} {warning}")
    if as_json_:
        as_json(results)
    elif not files:
        click.echo(f"no checkpoints named like {pattern.template} in {run_or_file}")
    sys.exit(0 if all(result["intact"] for result in results) else 1)


def _verify(file: CheckpointFile, label: str) -> tuple[CheckpointError | None, Sequence[str]]:
    try:
        found = file.storage.stat(file.name)
        with progress_bar(found.size if found else 0, label) as bar:
            return None, file.verify(bar.update)
    except CheckpointError as error:
        return error, ()
