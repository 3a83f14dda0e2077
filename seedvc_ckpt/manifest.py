"""What a checkpoint's file says of itself."""

from __future__ import annotations

from datetime import datetime
from functools import lru_cache
from typing import Annotated, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from seedvc_ckpt.errors import CorruptCheckpointError, UnsafeCheckpointError

__all__ = ["SCHEMA_VERSION", "Manifest", "Setting", "library_version"]

SCHEMA_VERSION = 1

_Count = Annotated[int, Field(ge=0)]
Setting: TypeAlias = str | int | float | bool | None
"""A plain value that a run was made with."""


class Manifest(BaseModel):
    """What a checkpoint of this library says of itself, kept inside the file.

    Attributes:
        schema_version: Version of this record.
        requires: Abilities that a reader must have; one that it does not know makes it refuse the file.
        run: Name of the run's folder.
        step: Training steps done; None in an export from a file that does not tell.
        epoch: Epoch that was running.
        created: When the save began (UTC); None in exports, so that the same input gives the same bytes.
        torch: Version of torch that wrote the tensors; None where none was involved.
        library: Version of seedvc-ckpt.
        metrics: The numbers given to `save`.
        settings: What the run was made with, as given to `save`.
        lease_epoch: On a server, the epoch of the lease under which it was saved: larger for each writer.
        resumed_from: Name of the checkpoint that the run went on from.
        exported_from: Name of the checkpoint that an export was taken from.
        tensors: Number of tensors.
        tensor_bytes: Bytes of all tensor records.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", ser_json_inf_nan="strings")

    schema_version: int = SCHEMA_VERSION
    requires: tuple[str, ...] = ()
    run: str = ""
    step: _Count | None = None
    epoch: _Count = 0
    created: datetime | None = None
    torch: str | None = None
    library: str = ""
    metrics: dict[str, Annotated[float, Field(strict=False)]] = {}
    settings: dict[str, Setting] = {}
    lease_epoch: _Count | None = None
    resumed_from: str | None = None
    exported_from: str | None = None
    tensors: _Count = 0
    tensor_bytes: _Count = 0

    def to_json(self) -> bytes:
        """The record as it stands in the file: one line of UTF-8 JSON."""
        return self.model_dump_json(exclude_none=True).encode()

    @classmethod
    def from_json(cls, data: bytes, name: str) -> Manifest:
        """Read the record of the file `name`.

        Raises:
            CorruptCheckpointError: if it is not a manifest.
            UnsafeCheckpointError: if it is one of a newer version.
        """
        try:
            manifest = cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"]))[:100]
            raise CorruptCheckpointError(
                name, "the manifest", f"not readable: {place + ': ' if place else ''}{first['msg']}"
            ) from None
        if manifest.schema_version > SCHEMA_VERSION or manifest.requires:
            needs = ", ".join(manifest.requires)[:100] or f"schema {manifest.schema_version}"
            raise UnsafeCheckpointError(
                f"{name} was written by a newer seedvc-ckpt ({manifest.library or 'version unknown'}) and needs "
                f"{needs}, which this version does not know: upgrade with pip install -U seedvc-ckpt"
            )
        return manifest


@lru_cache
def library_version() -> str:
    """The installed version of this library; "unknown" where it is not installed, or that can't be read."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import, and listing has no use for it

    try:
        return version("seedvc-ckpt")
    except (PackageNotFoundError, OSError):
        return "unknown"
