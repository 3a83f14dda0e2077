"""All that a service needs, in one folder: weights, config, model card and checksums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

from seedvc_ckpt.deploy import check, flat, service_of
from seedvc_ckpt.errors import CheckpointExistsError, ExportError
from seedvc_ckpt.export import export_to
from seedvc_ckpt.file import CheckpointFile
from seedvc_ckpt.model_card import model_card
from seedvc_ckpt.storage import Storage, read_chunks, read_file

__all__ = ["CARD", "SUMS", "WEIGHTS", "ServedConfig", "write_bundle"]

WEIGHTS, CARD, SUMS = "ft_model.pth", "model_card.md", "SHA256SUMS"


@dataclass(frozen=True)
class ServedConfig:
    """The YAML that a service gets.

    Attributes:
        name: Its file name.
        content: Its bytes.
        values: What it says.
        expected: Shapes by name (``module.name``) of the tensors of its model.
    """

    name: str
    content: bytes
    values: Mapping[str, Any]
    expected: Mapping[str, Sequence[int]]

    @property
    def service(self) -> str:
        """The script of Seed-VC's that serves it."""
        return service_of(flat(self.values))


def write_bundle(
    source: CheckpointFile,
    storage: Storage,
    config: ServedConfig,
    *,
    dtype: str | None = None,
    weights: Literal["net", "ema"] = "net",
    scores: Mapping[str, float] | None = None,
    overwrite: bool = False,
    allow_non_finite: bool = False,
) -> list[str]:
    """Write a checkpoint's weights and its config to a folder, with a model card and ``SHA256SUMS``.

    The checksums come last and, where files are replaced, go first: a folder without them is not whole. The same input
    gives the same bytes.

    Args:
        source: The checkpoint.
        storage: The folder.
        config: What the weights are served with.
        dtype: Convert floating-point tensors to this.
        weights: "net", or "ema" for the averaged weights of a checkpoint that has them.
        scores: The numbers known of the checkpoint, for the card; None for those of its manifest.
        overwrite: Replace what is there.
        allow_non_finite: Let NaN and infinities through.

    Returns:
        The names of the files written.

    Raises:
        ExportError: if a service would not run with the config what was trained, naming each reason; see
            `deploy.check`. Nothing is written then.
        CheckpointExistsError: if one of the files is there and `overwrite` is false; nothing is written then.
        SaveFailedError: if one can't be written; the folder has no checksums then.
    """
    names = [WEIGHTS, config.name, CARD]
    _refuse_name(config.name)
    there = [name for name in (*names, SUMS) if storage.stat(name) is not None]
    if config.name in there and read_file(storage, config.name) == config.content:
        there.remove(config.name)
    if there and not overwrite:
        raise CheckpointExistsError(
            f"{', '.join(there)} exists already in {storage.location} and nothing was written: name another folder, or "
            "overwrite (--force)"
        )
    report = check(source, config.values, config.expected, values=not allow_non_finite)
    if report.problems:
        lines = tuple(finding.what for finding in report.problems)
        listed = "\n".join(f"  {line}" for line in lines)
        raise ExportError(
            f"a service would not run with {config.name} what {source.name} was trained to be; nothing was written\n"
            f"{listed}\nsee all with: seedvc-ckpt check-deploy FILE {config.name}",
            lines,
        )
    if SUMS in there:
        with suppress(FileNotFoundError):
            storage.delete(SUMS)
    export_to(
        source,
        storage,
        WEIGHTS,
        expected=config.expected,
        dtype=dtype,
        weights=weights,
        overwrite=overwrite,
        allow_non_finite=allow_non_finite,
    )
    _publish(storage, config.name, config.content)
    exported, said = CheckpointFile(storage, WEIGHTS).inspect(), source.manifest()
    known = scores if scores is not None else said.metrics if said else {}
    card = model_card(
        exported, said, file=WEIGHTS, config=config.name, service=config.service, weights=weights, scores=known
    )
    _publish(storage, CARD, card.encode())
    sums = "".join(f"{_digest(storage, name)}  {name}\n" for name in sorted(names))
    _publish(storage, SUMS, sums.encode())
    return [*names, SUMS]


def _refuse_name(name: str) -> None:
    if name in (WEIGHTS, CARD, SUMS) or set("\\\n\r") & set(name) or not name.isprintable():
        raise ExportError(f"{name!r} is no name for a config in a bundle: rename the YAML")


def _publish(storage: Storage, name: str, content: bytes) -> None:
    """Write a file; what stands there by now was not there before, or may be replaced."""
    storage.publish(name, len(content), [memoryview(content)], overwrite=True)


def _digest(storage: Storage, name: str) -> str:
    """SHA-256 of what was written, as it reads now."""
    digest = sha256()
    with storage.open(name) as blob:
        for chunk in read_chunks(blob):
            digest.update(chunk)
    return digest.hexdigest()
