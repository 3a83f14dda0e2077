"""Azure Blob Storage, through adlfs."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from datetime import timezone
from io import BytesIO
from typing import Any

from seedvc_ckpt.storage.bucket import ABSENT, WRITE_ID, ConditionFailedError, Found, Upload
from seedvc_ckpt.storage.remote import Client, failure_of

__all__ = ["AzureBucket"]


class AzureBucket:
    """A container behind an adlfs filesystem, whose service client is used: its retries and credentials.

    A large object goes in blocks, which the service drops after a week if nobody commits them.
    """

    parallel = 4
    largest_put = 1 << 20  # its client warns of more in one piece
    lists_uploads = False

    def __init__(self, client: Client, name: str) -> None:
        self._client = client
        self._name = name

    async def list(self, prefix: str) -> Sequence[Found]:
        """By pages of 5,000."""
        async with self._container() as container:
            try:
                entries = container.walk_blobs(name_starts_with=prefix, delimiter="/")
                return [_found(entry) async for entry in entries if getattr(entry, "etag", None)]
            except Exception as error:  # noqa: BLE001 - whatever the client raises
                raise _plain(error, prefix) from None

    async def head(self, key: str) -> Found | None:
        """The blob's properties."""
        async with self._blob(key) as blob:
            try:
                return _found(await blob.get_blob_properties())
            except Exception as error:  # noqa: BLE001 - whatever the client raises
                plain = _plain(error, key)
                if isinstance(plain, FileNotFoundError):
                    return None
                raise plain from None

    async def read(self, key: str, start: int, size: int, tag: str) -> bytes:
        """A range of the blob, if it still has this tag."""
        async with self._blob(key) as blob:
            try:
                stream = await blob.download_blob(offset=start, length=size, max_concurrency=1, **_if(tag))
                content: bytes = await stream.readall()
            except Exception as error:  # noqa: BLE001 - whatever the client raises
                plain = _plain(error, key)
                raise FileNotFoundError(key) if isinstance(plain, ConditionFailedError) else plain from None
            return content

    def receiving(self, key: str, tag: str) -> None:
        """Its library hands over what it received."""

    async def put(self, key: str, content: bytes, write_id: str, condition: str | None) -> None:
        """Put Blob."""
        async with self._blob(key) as blob:
            options = {"overwrite": True} if condition is None else _if(condition)
            try:
                await blob.upload_blob(
                    BytesIO(content), length=len(content), metadata={WRITE_ID: write_id}, max_concurrency=1, **options
                )
            except Exception as error:  # noqa: BLE001 - whatever the client raises
                raise _plain(error, key) from None

    async def begin(self, key: str, size: int, write_id: str, condition: str | None) -> Upload:  # noqa: ARG002
        """Nothing to ask: blocks can be sent at once."""
        return _Blocks(self, key, write_id, condition)

    async def delete(self, key: str, tag: str | None = None) -> None:
        """Delete Blob."""
        async with self._blob(key) as blob:
            try:
                await blob.delete_blob(**_if(tag))
            except Exception as error:  # noqa: BLE001 - whatever the client raises
                raise _plain(error, key) from None

    async def copy(self, source: str, target: str) -> None:
        """Copy Blob within the account, waited for."""
        fs = self._client.fs
        await fs._cp_file(f"{self._name}/{source}", f"{self._name}/{target}")  # noqa: SLF001 - the coroutine of cp_file

    async def abort(self, key: str, upload: str) -> None:
        """Nothing is left by others that costs anything for long."""

    def _container(self) -> Any:
        return self._client.fs.service_client.get_container_client(self._name)

    def _blob(self, key: str) -> Any:
        return self._client.fs.service_client.get_blob_client(self._name, key)


class _Blocks:
    id = ""

    def __init__(self, bucket: AzureBucket, key: str, write_id: str, condition: str | None) -> None:
        self._bucket = bucket
        self._key = key
        self._write_id = write_id
        self._condition = condition
        self._ids: dict[int, str] = {}

    async def part(self, number: int, content: bytes, *, last: bool) -> None:  # noqa: ARG002
        # of one length for all blocks of a blob, and other than those of another writer
        block = base64.b64encode(f"{self._write_id}-{number:06d}".encode()).decode()
        async with self._bucket._blob(self._key) as blob:  # noqa: SLF001
            try:
                await blob.stage_block(block, BytesIO(content), length=len(content))
            except Exception as error:  # noqa: BLE001 - whatever the client raises
                raise _plain(error, self._key) from None
        self._ids[number] = block

    async def complete(self) -> None:
        from azure.storage.blob import BlobBlock

        blocks = [BlobBlock(self._ids[number]) for number in sorted(self._ids)]
        async with self._bucket._blob(self._key) as blob:  # noqa: SLF001
            try:
                await blob.commit_block_list(blocks, metadata={WRITE_ID: self._write_id}, **_if(self._condition))
            except Exception as error:  # noqa: BLE001 - whatever the client raises
                raise _plain(error, self._key) from None

    async def abort(self) -> None:
        self._ids.clear()


def _plain(error: Exception, key: str) -> Exception:
    """The error that the seam asks for, or the client's own."""
    failure = failure_of(error)
    if failure.condition_failed:
        return ConditionFailedError(key)
    return FileNotFoundError(key) if failure.missing else error


def _if(condition: str | None) -> dict[str, Any]:
    if condition is None:
        return {}
    from azure.core import MatchConditions

    if condition == ABSENT:
        return {"match_condition": MatchConditions.IfMissing}
    return {"etag": condition, "match_condition": MatchConditions.IfNotModified}


def _found(entry: Any) -> Found:
    metadata: Mapping[str, str] = entry.metadata or {}
    modified = entry.last_modified.astimezone(timezone.utc).replace(microsecond=0)
    # listings give the tag without the quotes that every other answer has
    return Found(entry.name, int(entry.size), modified, f'"{entry.etag.strip(chr(34))}"', metadata.get(WRITE_ID, ""))
