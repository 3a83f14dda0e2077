"""``seedvc-ckpt export``."""

from __future__ import annotations

import os
import shlex
from typing import Any

import click

from seedvc_ckpt.bundle import ServedConfig, write_bundle
from seedvc_ckpt.cli.model import described, read_config
from seedvc_ckpt.cli.target import Which, checkpoint_at, is_url, pattern_option, step_option
from seedvc_ckpt.export import export_to
from seedvc_ckpt.file import CheckpointFile
from seedvc_ckpt.naming import NamePattern
from seedvc_ckpt.storage import Storage, open_parent, open_storage, plain_location, read_file
from seedvc_ckpt.store import CheckpointStore

__all__ = ["command"]


@click.command(
    "export",
    epilog="Example: seedvc-ckpt export runs/my_run --config config_dit_mel_seed_uvit_whisper_base_f0_44k.yml",
)
@click.argument("run_or_file")
@step_option
@pattern_option
@click.option("--out", metavar="PATH", help="Target; .pth or .safetensors.  [default: RUN/ft_model.pth]")
@click.option("--bundle", metavar="DIR", help="Instead of one file, a folder with all that a service needs.")
@click.option(
    "--config",
    metavar="YAML",
    help="Check every name and shape against the model that it describes.  [--bundle: the copy in the RUN]",
)
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Convert the weights.")
@click.option("--weights", type=click.Choice(["net", "ema"]), default="net", help="Trained or averaged weights.")
@click.option("--allow-non-finite", is_flag=True, help="Export NaN and infinities too.")
@click.option("--force", is_flag=True, help="Replace an existing target.")
def command(
    run_or_file: str,
    step: Which,
    pattern: NamePattern,
    out: str | None,
    bundle: str | None,
    config: str | None,
    dtype: str | None,
    weights: str,
    allow_non_finite: bool,  # noqa: FBT001
    force: bool,  # noqa: FBT001
) -> None:
    """Write a checkpoint's weights as Seed-VC's ft_model.pth, which its services load.

    With --config, the copy of that YAML beside the file and the printed command are all that the service needs. With
    --bundle, DIR gets ft_model.pth, the YAML, a model card and SHA256SUMS, unless check-deploy finds a problem.
    """
    file = checkpoint_at(run_or_file, step, pattern)
    if bundle is not None:
        if out is not None:
            raise click.UsageError("--out and --bundle name one target each: give one of them")
        to_serve = described(_config_of(file) if config is None else read_config(config))
        options = {"dtype": dtype, "weights": weights, "overwrite": force, "allow_non_finite": allow_non_finite}
        _write_bundle(file, pattern, bundle, to_serve, options)
        return
    if out is not None:
        storage, name = open_parent(out)
    elif os.path.basename(run_or_file) == "ft_model.pth":
        raise click.UsageError(f"{run_or_file} is an export already: say where to write with --out")
    else:
        storage, name = file.storage, "ft_model.pth"
    served = None if config is None else described(read_config(config))
    export_to(
        file,
        storage,
        name,
        expected=served.expected if served else None,
        dtype=dtype,
        weights="ema" if weights == "ema" else "net",
        overwrite=force,
        allow_non_finite=allow_non_finite,
    )
    written = out or f"{storage.location.rstrip('/')}/{name}"
    click.echo(f"wrote {plain_location(written)} from {file.name}")
    if config is None or served is None:
        click.echo("names and shapes were not checked against a model: use --config for that")
        return
    beside = _copy_config(config, served, storage)
    if is_url(written):
        click.echo("download both files to start the service with them")
    elif written.endswith(".pth"):
        _echo_start(served.service, written, beside)


def _write_bundle(
    file: CheckpointFile, pattern: NamePattern, folder: str, served: ServedConfig, options: dict[str, Any]
) -> None:
    scores = None
    if pattern.parse(file.name):
        run = CheckpointStore(file.storage, pattern=pattern, read_only=True)
        scores = {info.name: known for info, known in run.scores().items()}.get(file.name)
    storage = open_storage(folder)
    names = write_bundle(file, storage, served, scores=scores, **options)
    click.echo(f"wrote {', '.join(names)} to {storage.location} from {file.name}")
    if is_url(folder):
        click.echo("download the folder to start the service with it")
    else:
        _echo_start(served.service, os.path.join(folder, names[0]), os.path.join(folder, served.name))


def _config_of(file: CheckpointFile) -> tuple[str, bytes]:
    """The copy of the YAML that the run's folder holds."""
    names = sorted(entry.name for entry in file.storage.list() if entry.name.endswith((".yml", ".yaml")))
    if len(names) != 1:
        found = f"several YAMLs ({', '.join(names)})" if names else "no YAML"
        raise click.UsageError(
            f"{file.storage.location} holds {found}: say with --config which the run was trained with"
        )
    return names[0], read_file(file.storage, names[0])


def _echo_start(service: str, weights: str, config: str) -> None:
    line = f"python {service} --checkpoint {shlex.quote(weights)} --config {shlex.quote(config)}"
    click.echo(f"start the service with\n  {line}")


def _copy_config(config: str, served: ServedConfig, storage: Storage) -> str:
    """Put the YAML beside the export and return its path; an other file of that name stays."""
    name, content = served.name, served.content
    target = f"{storage.location.rstrip('/')}/{name}"
    if storage.stat(name) is None:
        storage.publish(name, len(content), [memoryview(content)])
    elif read_file(storage, name) != content:
        click.echo(f"kept {target}, which differs from {plain_location(config)}", err=True)
        return config
    return target
