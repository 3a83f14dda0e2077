"""What a store on a server promises, found out by trying when it is first written to, and kept beside the run."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from seedvc_ckpt.errors import StorageError
from seedvc_ckpt.storage.bucket import ABSENT, ANY, Bucket, ConditionFailedError
from seedvc_ckpt.storage.condition import Finding, note
from seedvc_ckpt.storage.remote import Client, failure_of, in_words

__all__ = ["Promises", "SmallFiles", "examine_store", "known_promises", "probe_bucket", "probed"]

_log = logging.getLogger(__name__)

NAME = ".seedvc_ckpt.storage.json"
_ROUNDS = 3  # of two uploads that race for one name


class SmallFiles(Protocol):
    """What leases and promises need of a storage."""

    @property
    def location(self) -> str:
        """Where it is, for people."""

    def names(self, prefix: str) -> Sequence[str]:
        """The names that begin with `prefix`."""

    def read_small(self, name: str) -> bytes | None:
        """The contents of a file, None where there is none."""

    def put_small(self, name: str, content: bytes, *, create: bool) -> None:
        """Write a file whole; with `create` only where there is none. Raises FileExistsError."""

    def delete(self, name: str) -> None:
        """Delete a file. Raises FileNotFoundError if told that it is gone."""


@dataclass(frozen=True)
class Promises:
    """What a store was seen to do.

    Attributes:
        create: A small file is refused where its name is taken.
        create_large: So is a large one, sent in parts, and of two in the same moment one.
        update: A file is replaced only if it is still the one that was seen; None where no write depends on that.
        durable: What was written was synced to the server's disk; None where the service says so of all it answers.
    """

    create: bool
    create_large: bool
    update: bool | None
    durable: bool | None = None

    @property
    def many_writers(self) -> bool:
        """Whether two writers can be kept from each other's files."""
        return self.create and self.update is not False


def known_promises(store: SmallFiles) -> Promises | None:
    """What was found out before; None if the store was never written to."""
    content = store.read_small(NAME)
    if content is None:
        return None
    try:
        found = json.loads(content)
        return Promises(**{name: found[name] for name in ("create", "create_large", "update", "durable")})
    except (ValueError, KeyError, TypeError):
        return None


def probed(store: SmallFiles, probe: Callable[[], Promises]) -> Promises:
    """What the store promises, found out now if it was never written to."""
    promises = known_promises(store)
    if promises is None:
        promises = probe()
        store.put_small(NAME, (json.dumps(asdict(promises)) + "\n").encode(), create=False)
    if not promises.create:
        _log.warning(
            "%s does not refuse to write where a name is taken, so it can't keep two writers apart: make sure that "
            "only one is started",
            store.location,
        )
    return promises


def probe_bucket(client: Client, bucket: Bucket, prefix: str) -> Promises:
    """Try what a bucket does, on an object that is removed again.

    Raises:
        StorageError: if it can't be written.
    """
    key = f"{prefix}.seedvc_ckpt.probe-{uuid.uuid4().hex}"
    try:
        return client.run(_probe(bucket, key))
    except Exception as error:  # noqa: BLE001 - whatever a client library raises
        raise StorageError(f"can't write to it: {in_words(error, client.redact)}") from None


async def _probe(bucket: Bucket, key: str) -> Promises:
    written = []
    try:
        await bucket.put(key, b"1", "1", ANY)
        written.append(key)
        create = await _refused(bucket.put(key, b"2", "2", ABSENT))
        first = await bucket.head(key)
        await bucket.put(key, b"3 ", "3", ANY)
        update = first is not None and await _refused(bucket.put(key, b"4", "4", first.tag))
        large = await _refused(_upload(bucket, key))
        for number in range(_ROUNDS if large else 0):
            written.append(f"{key}-{number}")
            winners = await asyncio.gather(*(_refused(_upload(bucket, written[-1])) for _ in range(2)))
            large = large and sum(not refused for refused in winners) == 1
        return Promises(create, large, update)
    finally:
        for name in written:
            with suppress(FileNotFoundError, ConditionFailedError):
                await bucket.delete(name)


async def _upload(bucket: Bucket, key: str) -> None:
    upload = await bucket.begin(key, 1, "5", ABSENT)
    try:
        await upload.part(0, b"5", last=True)
        await upload.complete()
    except BaseException:
        await upload.abort()
        raise


async def _refused(call: Coroutine[Any, Any, None]) -> bool:
    try:
        await call
    except ConditionFailedError:
        return True
    except Exception as error:
        if not failure_of(error).unsupported:
            raise
    return False


def examine_store(store: SmallFiles) -> Iterator[Finding]:
    """What a store can't promise, for people."""
    promises = known_promises(store)
    if promises is None:
        yield note(
            store.location,
            "was not written to yet by this version, so what it promises is not known",
            "nothing: the first save finds out",
        )
        return
    if not promises.many_writers:
        missing = [
            words
            for kept, words in (
                (promises.create, "writes over a name that is taken, though asked not to"),
                (promises.update is not False, "replaces a file that is another by now, though asked not to"),
            )
            if not kept
        ]
        yield note(
            store.location,
            f"is unsafe for two writers: it {' and '.join(missing)}",
            "start one trainer only; a second one is not kept out reliably",
        )
    elif not promises.create_large:
        yield note(
            store.location,
            "accepts two large files of one name in the same moment; the lease alone keeps writers apart",
            "nothing, if one trainer is started at a time",
        )
    if promises.durable is False:
        yield note(
            store.location,
            "can't be told to sync what was written, so the server's power cut may take the newest checkpoint",
            "use a server with the extension fsync@openssh.com, or accept it",
        )
