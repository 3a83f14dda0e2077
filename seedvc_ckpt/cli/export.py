"""``seedvc-ckpt export``."""

from __future__ import annotations

import os
import shlex
import shutil

import click

from seedvc_ckpt.cli.target import checkpoint_at, is_url, pattern_option, step_option
from seedvc_ckpt.export import export
from seedvc_ckpt.naming import NamePattern

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
    step: int | None,
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
    if out is None:
        out = f"{file.storage.location.rstrip('/')}/ft_model.pth"
        if os.path.basename(run_or_file) == "ft_model.pth":
            raise click.UsageError(f"{run_or_file} is an export already: say where to write with --out")
    expected = None if config is None else _expected(config)
    written = export(
        file,
        out,
        expected=expected,
        dtype=dtype,
        weights="ema" if weights == "ema" else "net",
        overwrite=force,
        allow_non_finite=allow_non_finite,
    )
    click.echo(f"wrote {written} from {file.name}")
    if config is None:
        click.echo("names and shapes were not checked against a model: use --config for that")
        return
    beside = _copy_config(config, written)
    if written.endswith(".pth"):
        line = f"python app_svc.py --checkpoint {shlex.quote(written)} --config {shlex.quote(beside)}"
        click.echo(f"start the service with\n  {line}")


def _expected(config: str) -> dict[str, tuple[int, ...]]:
    # the one place where the library asks the trainer: what a YAML's model holds
    from seedvc_train.config import ConfigError
    from seedvc_train.model import expected_tensors

    try:
        return expected_tensors(config)
    except ConfigError as error:
        raise click.UsageError(str(error)) from None


def _copy_config(config: str, written: str) -> str:
    """Put the YAML beside the export and return its path; an other file of that name stays."""
    if is_url(written):
        return config
    target = os.path.join(os.path.dirname(written), os.path.basename(config))
    if os.path.exists(target):
        if not os.path.samefile(config, target) and _content(config) != _content(target):
            click.echo(f"kept {target}, which differs from {config}", err=True)
            return config
        return target
    shutil.copyfile(config, target)
    return target


def _content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
