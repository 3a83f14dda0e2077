"""Large requests to S3: s3fs says how and signs them, others make them.

Ranges that are read into memory of the reader's own go over connections of the standard library; other ranges, and the
parts of uploads, through obstore, which is compiled.
"""

from __future__ import annotations

import base64
import logging
import os
import ssl
import time
import zlib
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from seedvc_ckpt.storage.buckets.receiving import Receiver, Target
from seedvc_ckpt.storage.remote import Client, in_words

__all__ = ["Transfers"]

_log = logging.getLogger(__name__)

_LEAST = 1 << 20  # bytes; with fewer, the request takes longer than the bytes
_EXPIRES = 900  # seconds
_SIGNED_ANEW = 300  # seconds; botocore renews credentials that would expire within ten minutes
_AUTHORITIES = "AWS_CA_BUNDLE"  # the variable with which botocore trusts others than the usual ones
_FAILURES = 3  # one after the other; then s3fs does it all for a while
_WHILE = 300  # seconds
_CLIENT_OPTIONS = {
    "endpoint_url", "region_name", "use_ssl", "aws_access_key_id", "aws_secret_access_key", "aws_session_token",
}  # fmt: skip
_CONFIG_OPTIONS = {"connect_timeout", "read_timeout", "retries", "max_pool_connections", "region_name"}

_runs_in = 0  # the process in which obstore started its threads, which don't survive a fork


class Transfers:
    """Ranges and parts of a bucket's objects.

    What can't be done this way, or fails, gives None: s3fs does it then, with all of its options, its retries and its
    words for what is wrong. obstore sees no credentials, only URLs that are good for some minutes.

    Args:
        client: Of an s3fs filesystem.
        bucket: Its name.
    """

    def __init__(self, client: Client, bucket: str) -> None:
        self._client = client
        self._bucket = bucket
        self._failures = 0
        self._not_before = 0.0
        self._last_read: tuple[str, float, Any] = ("", 0.0, None)

    def receiver(self, key: str, tag: str) -> Receiver:
        """For ranges of an object that are received into the reader's memory."""
        return Receiver(
            lambda: self._client.run(self._target(key)), tag, _SIGNED_ANEW, lambda error: self._came(key, error), _LEAST
        )

    async def read(self, key: str, start: int, size: int, tag: str) -> memoryview | None:
        """Bytes of an object, if it still has this tag."""
        if not self._worth_it(size):
            return None
        try:
            store = await self._store_of(key)
            if store is None:
                return None
            import obstore

            answer = await obstore.get_async(store, "", options={"range": (start, start + size), "if_match": tag})
            content = memoryview(await answer.bytes_async())
        except Exception as error:  # noqa: BLE001 - whatever it is, s3fs meets it too or does without
            self._failed("read", key, error)
            return None
        self._failures = 0
        return content if len(content) == size else None

    async def send(self, key: str, upload: str, number: int, content: bytes) -> str | None:
        """Send a part of an upload, numbered from 1, with its CRC-32, which the service compares; the part's tag."""
        if not self._worth_it(len(content)):
            return None
        try:
            s3 = await self._signing_client()
            if s3 is None or _private(s3) or s3.meta.config.request_checksum_calculation != "when_supported":
                return None
            import obstore

            checksum = {"x-amz-checksum-crc32": _crc32(content)}
            query = {"uploadId": upload, "partNumber": str(number)}
            part = {"UploadId": upload, "PartNumber": number}
            url = await self._sign(s3, "PUT", "upload_part", {"Key": key, **part}, query, checksum)
            answer = await obstore.put_async(_store(s3, url, checksum), "", content, use_multipart=False)
        except Exception as error:  # noqa: BLE001 - whatever it is, s3fs meets it too or does without
            self._failed("write", key, error)
            return None
        self._failures = 0
        return answer["e_tag"]

    def _worth_it(self, size: int) -> bool:
        return size >= _LEAST and self._trusted() and _runs_in in (0, os.getpid()) and _installed()

    def _trusted(self) -> bool:
        return time.monotonic() >= self._not_before

    async def _target(self, key: str) -> Target | None:
        s3 = await self._signing_client()
        if s3 is None or not self._trusted():
            return None
        url = await self._sign(s3, "GET", "get_object", {"Key": key})
        scheme, config = url.partition("://")[0], s3.meta.config
        if {scheme, "all"} & {*getproxies()} and not proxy_bypass(urlsplit(url).netloc):
            return None
        trusted = _context(os.environ.get(_AUTHORITIES, "")) if scheme == "https" else None
        return Target(url, config.connect_timeout, config.read_timeout, trusted)

    def _came(self, key: str, error: Exception | None) -> None:
        if error is None:
            self._failures = 0
        else:
            self._failed("read", key, error)

    async def _store_of(self, key: str) -> Any:
        last, signed, store = self._last_read
        if last != key or time.monotonic() - signed > _SIGNED_ANEW:
            s3 = await self._signing_client()
            usable = s3 is not None and not _private(s3)
            store = _store(s3, await self._sign(s3, "GET", "get_object", {"Key": key})) if usable else None
            self._last_read = (key, time.monotonic(), store)
        return store

    async def _signing_client(self) -> Any:
        """The client below s3fs; None where its options ask for more than a URL says."""
        fs = self._client.fs
        s3 = await fs.get_s3(self._bucket)
        plain = (
            s3.meta.config.signature_version == "s3v4"
            and {*fs.client_kwargs} <= _CLIENT_OPTIONS
            and {*fs.config_kwargs} <= _CONFIG_OPTIONS
            and {*fs.s3_additional_kwargs} <= {"Metadata"}
            and not (fs.req_kw or fs.kwargs)
        )
        return s3 if plain else None

    async def _sign(
        self,
        s3: Any,
        method: str,
        operation: str,
        arguments: Mapping[str, object],
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> str:
        """The URL of a request, with a signature that expires."""
        from botocore.awsrequest import AWSRequest

        asked = await s3.generate_presigned_url(operation, Params={"Bucket": self._bucket, **arguments})
        # that one is signed in the older way, which covers no headers and which newer regions refuse
        signer = await s3._request_signer.get_auth_instance(  # noqa: SLF001 - has no public name
            signing_name="s3", region_name=s3.meta.region_name, signature_version="s3v4-query", expires=_EXPIRES
        )
        request = AWSRequest(method=method, url=asked.partition("?")[0], params=query or {}, headers=headers)
        signer.add_auth(request)
        return str(request.prepare().url)

    def _failed(self, what: str, key: str, error: Exception) -> None:
        self._failures += 1
        if self._failures >= _FAILURES:
            self._failures, self._not_before = 0, time.monotonic() + _WHILE
        _log.info("can't %s %s by a signed URL, so s3fs does: %s", what, key, in_words(error, self._client.redact))


def _private(s3: Any) -> bool:
    """Whether obstore would not know who vouches for the server."""
    return bool(os.environ.get(_AUTHORITIES)) and s3.meta.endpoint_url.startswith("https")


def _crc32(content: bytes) -> str:
    """As the service writes it."""
    return base64.b64encode(zlib.crc32(content).to_bytes(4, "big")).decode()


@cache
def _context(authorities: str) -> ssl.SSLContext:
    """Trusts whom botocore trusts."""
    from botocore.httpsession import get_cert_path

    return ssl.create_default_context(cafile=authorities or get_cert_path(verify=True))


@cache
def _installed() -> bool:
    return find_spec("obstore") is not None


def _store(s3: Any, url: str, headers: Mapping[str, str] | None = None) -> Any:
    """One object for obstore: nothing but its URL, and headers of every request to it."""
    from obstore.store import HTTPStore

    global _runs_in  # noqa: PLW0603
    _runs_in = os.getpid()
    config = s3.meta.config
    return HTTPStore(
        url,
        client_options={
            "allow_http": True,
            "connect_timeout": f"{config.connect_timeout}s",
            "timeout": f"{2 * config.read_timeout}s",  # of the whole request, where botocore means each read
            "default_headers": dict(headers or {}),
        },
        retry_config={"max_retries": 0},
    )
