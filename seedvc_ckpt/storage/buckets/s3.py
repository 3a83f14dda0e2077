"""Amazon S3 and what speaks like it, through s3fs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timezone
from io import BytesIO
from typing import Any

from seedvc_ckpt.storage.bucket import ABSENT, WRITE_ID, Bytes, ConditionFailedError, Found, Upload
from seedvc_ckpt.storage.buckets.receiving import Receiver
from seedvc_ckpt.storage.buckets.s3_transfers import Transfers
from seedvc_ckpt.storage.remote import Client, failure_of

__all__ = ["S3Bucket"]


class S3Bucket:
    """A bucket behind an s3fs filesystem, whose own calls are used: its retries, credentials and extra arguments."""

    parallel = 4
    largest_put = 16 << 20
    lists_uploads = True

    def __init__(self, client: Client, name: str) -> None:
        self._client = client
        self._name = name
        self._transfers = Transfers(client, name)

    async def list(self, prefix: str) -> Sequence[Found]:
        """By pages of 1,000."""
        found: list[Found] = []
        token: dict[str, str] = {}
        while True:
            page = await self._call("list_objects_v2", Prefix=prefix, Delimiter="/", **token)
            found += [_found(entry["Key"], entry["Size"], entry) for entry in page.get("Contents", ())]
            if not page.get("IsTruncated"):
                return found
            token = {"ContinuationToken": page["NextContinuationToken"]}

    async def head(self, key: str) -> Found | None:
        """HeadObject."""
        try:
            answer = await self._call("head_object", Key=key)
        except FileNotFoundError:
            return None
        return _found(key, answer["ContentLength"], answer)

    async def read(self, key: str, start: int, size: int, tag: str) -> Bytes:
        """GetObject of a range, if the object still has this tag."""
        received = await self._transfers.read(key, start, size, tag)
        if received is not None:
            return received
        for attempt in range(_READ_ATTEMPTS):
            try:
                answer = await self._call("get_object", Key=key, Range=f"bytes={start}-{start + size - 1}", IfMatch=tag)
                async with answer["Body"] as body:
                    content: bytes = await body.read()
                if len(content) == size or attempt == _READ_ATTEMPTS - 1:
                    return content
            except ConditionFailedError:
                raise FileNotFoundError(key) from None
            except Exception as error:
                # the library retries requests, but not answers that break off
                if attempt == _READ_ATTEMPTS - 1 or not _broke_off(error):
                    raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    def receiving(self, key: str, tag: str) -> Receiver:
        """By a URL that s3fs signs."""
        return self._transfers.receiver(key, tag)

    async def put(self, key: str, content: bytes, write_id: str, condition: str | None) -> None:
        """PutObject."""
        metadata = {**self._client.fs.s3_additional_kwargs.get("Metadata", {}), WRITE_ID: write_id}
        await self._call("put_object", Key=key, Body=BytesIO(content), Metadata=metadata, **_if(condition))

    async def begin(self, key: str, size: int, write_id: str, condition: str | None) -> Upload:  # noqa: ARG002
        """CreateMultipartUpload."""
        metadata = {**self._client.fs.s3_additional_kwargs.get("Metadata", {}), WRITE_ID: write_id}
        answer = await self._call("create_multipart_upload", Key=key, Metadata=metadata)
        return _Multipart(self, key, answer["UploadId"], condition)

    async def send(self, key: str, upload: str, number: int, content: bytes) -> str:
        """UploadPart, numbered from 1; its tag."""
        tag = await self._transfers.send(key, upload, number, content)
        if tag is None:
            body = BytesIO(content)
            answer = await self._call("upload_part", Key=key, UploadId=upload, PartNumber=number, Body=body)
            tag = str(answer["ETag"])
        return tag

    async def delete(self, key: str, tag: str | None = None) -> None:
        """DeleteObject; without the condition where the server knows none."""
        condition = {"IfMatch": tag} if tag else {}
        try:
            await self._call("delete_object", Key=key, **condition)
        except OSError as error:
            if not condition or not failure_of(error).unsupported:
                raise
            await self._call("delete_object", Key=key)

    async def copy(self, source: str, target: str) -> None:
        """CopyObject, or its parts for an object of more than 5 GB."""
        fs = self._client.fs
        await fs._cp_file(f"{self._name}/{source}", f"{self._name}/{target}")  # noqa: SLF001 - the coroutine of cp_file

    async def abort(self, key: str, upload: str) -> None:
        """AbortMultipartUpload; no error if it is gone."""
        try:
            await self._call("abort_multipart_upload", Key=key, UploadId=upload)
        except FileNotFoundError:
            return

    async def _call(self, method: str, **arguments: Any) -> Any:
        try:
            return await self._client.fs._call_s3(method, Bucket=self._name, **arguments)  # noqa: SLF001 - of call_s3
        except Exception as error:
            failure = failure_of(error)
            if failure.condition_failed:
                raise ConditionFailedError(failure.code) from None
            if failure.no_bucket:  # for s3fs that is a file that is not there
                raise OSError(f"the specified bucket does not exist: {self._name}") from None
            if failure.missing:
                raise FileNotFoundError(arguments.get("Key", "")) from None
            raise


class _Multipart:
    def __init__(self, bucket: S3Bucket, key: str, upload: str, condition: str | None) -> None:
        self.id = upload
        self._bucket = bucket
        self._key = key
        self._condition = condition
        self._parts: dict[int, str] = {}

    async def part(self, number: int, content: bytes, *, last: bool) -> None:  # noqa: ARG002
        self._parts[number] = await self._bucket.send(self._key, self.id, number + 1, content)

    async def complete(self) -> None:
        parts = [{"PartNumber": number + 1, "ETag": self._parts[number]} for number in sorted(self._parts)]
        await self._bucket._call(  # noqa: SLF001
            "complete_multipart_upload",
            Key=self._key,
            UploadId=self.id,
            MultipartUpload={"Parts": parts},
            **_if(self._condition),
        )

    async def abort(self) -> None:
        await self._bucket.abort(self._key, self.id)


_READ_ATTEMPTS = 5


def _broke_off(error: Exception) -> bool:
    return type(error).__name__ in (
        "ClientPayloadError",
        "IncompleteReadError",
        "ResponseStreamingError",
        "ReadTimeoutError",
        "ServerDisconnectedError",
        "ClientOSError",
        "TimeoutError",
        "ConnectionResetError",
    )


def _if(condition: str | None) -> dict[str, str]:
    if condition is None:
        return {}
    return {"IfNoneMatch": "*"} if condition == ABSENT else {"IfMatch": condition}


def _found(key: str, size: int, answer: Mapping[str, Any]) -> Found:
    modified = answer["LastModified"].astimezone(timezone.utc).replace(microsecond=0)
    return Found(key, int(size), modified, answer["ETag"], answer.get("Metadata", {}).get(WRITE_ID, ""))
