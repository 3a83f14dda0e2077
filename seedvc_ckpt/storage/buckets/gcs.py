"""Google Cloud Storage, through gcsfs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from io import BytesIO
from typing import Any
from urllib.parse import quote

from seedvc_ckpt.storage.bucket import ABSENT, WRITE_ID, ConditionFailedError, Found, Upload
from seedvc_ckpt.storage.remote import Client, failure_of

__all__ = ["GcsBucket"]

_CANCELLED = 499  # what the service answers when an upload was given up


class GcsBucket:
    """A bucket behind a gcsfs filesystem, whose own calls of the JSON API are used: its retries and credentials.

    A large object goes through a resumable session, which takes its parts in order and expires after a week.
    """

    parallel = 1
    largest_put = 16 << 20
    lists_uploads = False

    def __init__(self, client: Client, name: str) -> None:
        self._client = client
        self._name = name

    async def list(self, prefix: str) -> Sequence[Found]:
        """By pages of 1,000."""
        found: list[Found] = []
        token: dict[str, str] = {}
        while True:
            page = await self._json("GET", self._objects(), prefix=prefix, delimiter="/", **token)
            found += [_found(entry) for entry in page.get("items", ())]
            if not page.get("nextPageToken"):
                return found
            token = {"pageToken": page["nextPageToken"]}

    async def head(self, key: str) -> Found | None:
        """The object's resource."""
        try:
            return _found(await self._json("GET", self._object(key)))
        except FileNotFoundError:
            return None

    async def read(self, key: str, start: int, size: int, tag: str) -> bytes:
        """The media of a range, of this generation."""
        headers = {"Range": f"bytes={start}-{start + size - 1}"}
        _, content = await self._call("GET", self._object(key), headers=headers, alt="media", generation=tag)
        return bytes(content)

    def receiving(self, key: str, tag: str) -> None:
        """Its library hands over what it received."""

    async def put(self, key: str, content: bytes, write_id: str, condition: str | None) -> None:
        """One request with the object's resource and its contents (uploadType=multipart)."""
        resource = json.dumps({"name": key, "metadata": {WRITE_ID: write_id}}).encode()
        boundary = f"seedvc-{write_id}"
        head = f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n".encode()
        middle = f"\r\n--{boundary}\r\nContent-Type: application/octet-stream\r\n\r\n".encode()
        await self._call(
            "POST",
            self._upload(),
            headers={"Content-Type": f"multipart/related; boundary={boundary}"},
            data=BytesIO(b"".join((head, resource, middle, content, f"\r\n--{boundary}--".encode()))),
            uploadType="multipart",
            **_if(condition),
        )

    async def begin(self, key: str, size: int, write_id: str, condition: str | None) -> Upload:
        """A resumable session."""
        headers, _ = await self._call(
            "POST",
            f"{self._upload()}?name={quote(key, safe='')}",
            headers={"X-Upload-Content-Type": "application/octet-stream"},
            json={"name": key, "metadata": {WRITE_ID: write_id}},
            uploadType="resumable",
            **_if(condition),
        )
        return _Session(self, headers["Location"], size)

    async def delete(self, key: str, tag: str | None = None) -> None:
        """Delete the object, or only this generation of it."""
        await self._call("DELETE", self._object(key), **_if(tag))

    async def copy(self, source: str, target: str) -> None:
        """Rewrite, in as many requests as the service wants."""
        path = f"{self._object(source)}/rewriteTo/b/{quote(self._name, safe='')}/o/{quote(target, safe='')}"
        token: dict[str, str] = {}
        while True:
            answer = await self._json("POST", path, headers={"Content-Type": "application/json"}, **token)
            if answer.get("done", True):
                return
            token = {"rewriteToken": answer["rewriteToken"]}

    async def abort(self, key: str, upload: str) -> None:
        """Nothing is left by others that costs anything."""

    def _objects(self) -> str:
        return f"b/{quote(self._name, safe='')}/o"

    def _object(self, key: str) -> str:
        return f"{self._objects()}/{quote(key, safe='')}"

    def _upload(self) -> str:
        fs = self._client.fs
        return f"{fs._location}/upload/storage/v1/{self._objects()}"  # noqa: SLF001 - has no public name

    async def _json(self, method: str, path: str, **arguments: Any) -> Any:
        return json.loads((await self._call(method, path, **arguments))[1])

    async def _call(self, method: str, path: str, **arguments: Any) -> tuple[Mapping[str, str], bytes]:
        try:
            headers, content = await self._client.fs._call(method, path, **arguments)  # noqa: SLF001 - of call
        except FileNotFoundError:
            if path.endswith("/o"):
                raise OSError(f"the specified bucket does not exist: {self._name}") from None
            raise
        except Exception as error:
            if failure_of(error).condition_failed:
                raise ConditionFailedError(path) from None
            raise
        return headers, content


class _Session:
    id = ""

    def __init__(self, bucket: GcsBucket, url: str, size: int) -> None:
        self._bucket = bucket
        self._url = url
        self._size = size
        self._sent = 0
        self._last = b""

    async def part(self, number: int, content: bytes, *, last: bool) -> None:  # noqa: ARG002
        if last:
            self._last = content  # with its last byte the object appears
        else:
            await self._send(content)

    async def complete(self) -> None:
        await self._send(self._last)

    async def abort(self) -> None:
        try:
            await self._bucket._call("DELETE", self._url)  # noqa: SLF001
        except FileNotFoundError:
            return

    async def _send(self, content: bytes) -> None:
        start, end = self._sent, self._sent + len(content)
        answer, _ = await self._bucket._call(  # noqa: SLF001
            "PUT",
            self._url,
            headers={"Content-Range": f"bytes {start}-{end - 1}/{self._size}", "Content-Length": str(len(content))},
            data=BytesIO(content),
        )
        kept = int(answer["Range"].rpartition("-")[2]) + 1 if "Range" in answer else end
        self._sent = kept
        if kept < end:
            await self._send(content[kept - start :])


def _if(condition: str | None) -> dict[str, str]:
    if condition is None:
        return {}
    return {"ifGenerationMatch": "0" if condition == ABSENT else condition}


def _found(resource: Mapping[str, Any]) -> Found:
    time = datetime.fromisoformat(resource["updated"].replace("Z", "+00:00")).replace(microsecond=0)
    write_id = (resource.get("metadata") or {}).get(WRITE_ID, "")
    return Found(resource["name"], int(resource["size"]), time, str(resource["generation"]), write_id)
