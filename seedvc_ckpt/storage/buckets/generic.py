"""Any filesystem of fsspec's: what its own calls promise is found out, not assumed."""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from seedvc_ckpt.storage.bucket import ABSENT, ConditionFailedError, Found, Upload
from seedvc_ckpt.storage.remote import Client

__all__ = ["GenericBucket", "MemoryBucket"]


class GenericBucket:
    """Files on a filesystem of fsspec's; only its calls that end in ``_file``, ``info`` and ``ls`` are used.

    The others expand globs in names, and what is written through ``open`` is published even when writing failed.
    Objects carry no write id, and of the conditions only "absent" is asked for, as ``mode="create"``.
    """

    parallel = 1
    largest_put = 16 << 20
    lists_uploads = False

    def __init__(self, client: Client, name: str) -> None:
        self._client = client
        self._name = name

    async def list(self, prefix: str) -> Sequence[Found]:
        """The listing of a folder, past any cache."""
        above = prefix.rpartition("/")[0]
        folder = self._path(above).rstrip("/") or "/"
        try:
            self._forget(folder)
            infos = await self._ask("ls", folder, detail=True)
        except FileNotFoundError:
            return ()
        inside = folder.strip("/")
        files = [(info["name"].rpartition("/"), info) for info in infos if info["type"] == "file"]
        keys = [(f"{above}/{name}".lstrip("/"), info) for (place, _, name), info in files if place.strip("/") == inside]
        return [_found(key, info) for key, info in keys if key.startswith(prefix)]

    async def head(self, key: str) -> Found | None:
        """``info``."""
        self._forget(self._path(key).rpartition("/")[0])
        try:
            info = await self._ask("info", self._path(key))
        except FileNotFoundError:
            return None
        return _found(key, info) if info["type"] == "file" else None

    async def read(self, key: str, start: int, size: int, tag: str) -> bytes:
        """``cat_file``, after a look whether it is still the one with this tag."""
        found = await self.head(key)
        if found is None or found.tag != tag:
            raise FileNotFoundError(key)
        content: bytes = await self._ask("cat_file", self._path(key), start=start, end=start + size)
        return content

    def receiving(self, key: str, tag: str) -> None:
        """Its library hands over what it received."""

    async def put(self, key: str, content: bytes, write_id: str, condition: str | None) -> None:  # noqa: ARG002
        """``pipe_file``."""
        mode = {"mode": "create"} if condition == ABSENT else {}
        try:
            await self._in_folder(key, "pipe_file", self._path(key), content, **mode)
        except FileExistsError:
            raise ConditionFailedError(key) from None

    async def begin(self, key: str, size: int, write_id: str, condition: str | None) -> Upload:  # noqa: ARG002
        """A temporary file on this machine, put in one call when it is complete."""
        return _TemporaryFile(self, key, condition)

    async def delete(self, key: str, tag: str | None = None) -> None:  # noqa: ARG002
        """``rm_file``."""
        await self._ask("rm_file", self._path(key))

    async def copy(self, source: str, target: str) -> None:
        """``cp_file``."""
        await self._in_folder(target, "cp_file", self._path(source), self._path(target))

    async def abort(self, key: str, upload: str) -> None:
        """Nothing is left by others."""

    def _path(self, key: str) -> str:
        return f"{self._name}/{key}"

    def _forget(self, folder: str) -> None:
        """Past what a listing cache remembers."""
        self._client.fs.invalidate_cache(folder)

    async def _in_folder(self, key: str, method: str, *arguments: Any, **options: Any) -> None:
        """Ask for a change, once more with the folder made where that is what was missing."""
        try:
            await self._ask(method, *arguments, **options)
        except FileNotFoundError:
            await self._ask("makedirs", self._path(key).rpartition("/")[0], exist_ok=True)
            await self._ask(method, *arguments, **options)

    async def _ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        return await asyncio.to_thread(getattr(self._client.fs, method), *arguments, **options)


class _TemporaryFile:
    id = ""

    def __init__(self, bucket: GenericBucket, key: str, condition: str | None) -> None:
        self._bucket = bucket
        self._key = key
        self._condition = condition
        self._file = tempfile.NamedTemporaryFile(delete=False)  # noqa: SIM115 - closed by complete and abort

    async def part(self, number: int, content: bytes, *, last: bool) -> None:  # noqa: ARG002
        await asyncio.to_thread(self._file.write, content)

    async def complete(self) -> None:
        self._file.close()
        if self._condition == ABSENT and await self._bucket.head(self._key) is not None:
            raise ConditionFailedError(self._key)
        path = self._bucket._path(self._key)  # noqa: SLF001
        await self._bucket._in_folder(self._key, "put_file", self._file.name, path)  # noqa: SLF001
        os.unlink(self._file.name)

    async def abort(self) -> None:
        self._file.close()
        if os.path.exists(self._file.name):
            os.unlink(self._file.name)


class MemoryBucket(GenericBucket):
    """fsspec's store in this process's memory: a lock makes its check-then-write one step."""

    _guard = threading.Lock()

    async def _ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        def one_at_a_time() -> Any:
            with self._guard:
                return getattr(self._client.fs, method)(*arguments, **options)

        return await asyncio.to_thread(one_at_a_time)

    async def begin(self, key: str, size: int, write_id: str, condition: str | None) -> Upload:  # noqa: ARG002
        """Parts in memory, put in one call when it is complete."""
        return _InMemory(self, key, write_id, condition)


class _InMemory:
    id = ""

    def __init__(self, bucket: MemoryBucket, key: str, write_id: str, condition: str | None) -> None:
        self._bucket = bucket
        self._how = write_id, condition
        self._key = key
        self._content = bytearray()

    async def part(self, number: int, content: bytes, *, last: bool) -> None:  # noqa: ARG002
        self._content += content

    async def complete(self) -> None:
        await self._bucket.put(self._key, bytes(self._content), *self._how)

    async def abort(self) -> None:
        self._content.clear()


_TIMES = ("mtime", "LastModified", "last_modified", "updated", "created", "time")


def _found(key: str, info: Mapping[str, Any]) -> Found:
    time: Any = next((info[name] for name in _TIMES if info.get(name) is not None), 0.0)
    if isinstance(time, (int, float)):
        time = datetime.fromtimestamp(time, timezone.utc)
    elif isinstance(time, str):
        time = datetime.fromisoformat(time.replace("Z", "+00:00"))
    time = time if time.tzinfo else time.replace(tzinfo=timezone.utc)
    tag = str(info.get("ETag") or info.get("e_tag") or info.get("etag") or info.get("generation") or time.isoformat())
    return Found(key, int(info["size"]), time.astimezone(timezone.utc).replace(microsecond=0), tag)
