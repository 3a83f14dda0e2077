"""``seedvc-ckpt export``."""

from __future__ import annotations

import os
import shlex

import click

from seedvc_ckpt.cli.model import described_at
from seedvc_ckpt.cli.target import Which, checkpoint_at, is_url, pattern_option, step_option
from seedvc_ckpt.export import export_to
from seedvc_ckpt.naming import NamePattern
from seedvc_ckpt.storage import Storage, open_parent, plain_location, read_file

__all__ = ["command"]


@click.command(
    "export",
    epilog="Example: seedvc-ckpt export runs/my_run --config config_dit_mel_seed_uvit_whisper_base_f0_44k.yml",
)
@click.argument("run_or_file")
@step_option
@pattern_option
@click.option("--out", metavar="PATH", help="Target; .pth or .safetensors.  [default: RUN/ft_model.pth]")
@click.option("--config", metavar="YAML", help="Check every name and shape against the model that it describes.")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Convert the weights.")
@click.option("--weights", type=click.Choice(["net", "ema"]), default="net", help="Trained or averaged weights.")
@click.option("--allow-non-finite", is_flag=True, help="Export NaN and infinities too.")
@click.option("--force", is_flag=True, help="Replace an existing target.")
def command(
    run_or_file: str,
    step: Which,
    pattern: NamePattern,
    out: str | None,
    config: str | None,
    dtype: str | None,
    weights: str,
    allow_non_finite: bool,  # noqa: FBT001
    force: bool,  # noqa: FBT001
) -> None:
    """Write a checkpoint's weights as Seed-VC's ft_model.pth, which its services load.

    With --config, the copy of that YAML beside the file and the printed command are all that the service needs.
    """
    file = checkpoint_at(run_or_file, step, pattern)
    if out is not None:
        storage, name = open_parent(out)
    elif os.path.basename(run_or_file) == "ft_model.pth":
        raise click.UsageError(f"{run_or_file} is an export already: say where to write with --out")
    else:
        storage, name = file.storage, "ft_model.pth"
    described = None if config is None else described_at(config)
    export_to(
        file,
        storage,
        name,
        expected=described.expected if described else None,
        dtype=dtype,
        weights="ema" if weights == "ema" else "net",
        overwrite=force,
        allow_non_finite=allow_non_finite,
    )
    written = out or f"{storage.location.rstrip('/')}/{name}"
    click.echo(f"wrote {plain_location(written)} from {file.name}")
    if config is None:
        click.echo("names and shapes were not checked against a model: use --config for that")
        return
    beside = _copy_config(config, storage)
    if is_url(written):
        click.echo("download both files to start the service with them")
    elif written.endswith(".pth"):
        line = f"python app_svc.py --checkpoint {shlex.quote(written)} --config {shlex.quote(beside)}"
        click.echo(f"start the service with\n  {line}")


def _copy_config(config: str, storage: Storage) -> str:
    """Put the YAML beside the export and return its path; an other file of that name stays."""
    name = os.path.basename(config)
    target = f"{storage.location.rstrip('/')}/{name}"
    with open(config, "rb") as file:
        content = file.read()
    if storage.stat(name) is None:
        storage.publish(name, len(content), [memoryview(content)])
    elif read_file(storage, name) != content:
        click.echo(f"kept {target}, which differs from {config}", err=True)
        return config
    return target
