"""Objects under a prefix of a bucket, each made to appear by one request."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

from seedvc_ckpt.errors import CheckpointError, CheckpointNotFoundError, LeaseHeldError, SaveFailedError, StorageError
from seedvc_ckpt.storage import Lease, Stat, numbered
from seedvc_ckpt.storage.bucket import ABSENT, ANY, Bucket, Bytes, ConditionFailedError, Found, Upload
from seedvc_ckpt.storage.condition import Finding, note
from seedvc_ckpt.storage.leftovers import Leftover, is_temporary, temporary_name, this_machine, why_dead
from seedvc_ckpt.storage.promises import examine_store, probe_bucket, probed
from seedvc_ckpt.storage.ranges import RemoteBlob
from seedvc_ckpt.storage.remote import DEADLINE, Client, InDoubtError, failure_of, in_words
from seedvc_ckpt.storage.shared_lease import SharedLease, current_holder

__all__ = ["MemoryStorage", "ObjectStorage"]

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

_PART = 16 << 20  # bytes; so many times `Bucket.parallel` are in memory, and once more in the client library
_UNIT = 256 << 10  # bytes; Google takes only multiples
_ATTEMPTS = 3  # at a request that was refused for what is not so: a conflict of two requests, not of two objects
_MAX_PARTS = 10_000  # what S3 takes; the others take more


class ObjectStorage:
    """A prefix in a bucket.

    Args:
        client: The connection.
        bucket: The objects, by the calls of their service.
        prefix: What all names begin with: "" or something that ends in "/".
        location: The URL, for people.
        lease_seconds: How long a lease outlives its writer.
    """

    def __init__(self, client: Client, bucket: Bucket, prefix: str, location: str, lease_seconds: float) -> None:
        self._client = client
        self._bucket = bucket
        self._prefix = prefix
        self._location = location
        self._lease_seconds = lease_seconds

    @property
    def location(self) -> str:
        """The URL, without name and password."""
        return self._location

    def below(self, folder: str) -> ObjectStorage:
        """The objects whose names begin with that of the folder."""
        prefix = f"{self._prefix}{folder}/"
        return type(self)(self._client, self._bucket, prefix, self._url(folder), self._lease_seconds)

    def list(self) -> Iterator[_ObjectEntry]:
        """The objects directly under the prefix, asked for anew each time."""
        for found in self._ask("list", self._bucket.list(self._prefix)):
            name = found.key[len(self._prefix) :]
            if name and "/" not in name:
                yield _ObjectEntry(name, _stat(found))

    def stat(self, name: str) -> Stat | None:
        """Size and time of an object, None where there is none."""
        found = self._head(name)
        return _stat(found) if found else None

    def open(self, name: str) -> RemoteBlob:
        """Open an object for reading."""
        found = self._head(name)
        if found is None:
            raise CheckpointNotFoundError(f"there is no file {name} in {self._location}")

        def fetch(offset: int, size: int) -> Future[Bytes]:
            return self._client.start(self._bucket.read(found.key, offset, size, found.tag))

        receiving = self._bucket.receiving(found.key, found.tag)
        further = (receiving.close, receiving.begin) if receiving is not None else ()
        return RemoteBlob(self._url(name), found.size, fetch, self._client.wait, self._words, *further)

    def lease(self) -> Lease:
        """Take the right to write; what the store can promise is found out first, once."""
        probed(self, lambda: probe_bucket(self._client, self._bucket, self._prefix))
        return SharedLease.take(self, self._lease_seconds)

    def leftovers(self) -> Sequence[Leftover]:
        """Uploads of writers that died: they cost money, and no listing shows them.

        Each upload is announced by an object that names its writer, as a temporary file on a disk does.
        """
        if not self._bucket.lists_uploads:
            return ()
        found = self._ask("list", self._bucket.list(self._prefix))
        temporary = [(entry.key[len(self._prefix) :], entry) for entry in found]
        names = [
            (name, why_dead(name, entry.modified.timestamp(), host=this_machine()))
            for name, entry in temporary
            if is_temporary(name)
        ]
        return [Leftover(name, 0, why) for name, why in names if why]

    def remove_leftover(self, leftover: Leftover) -> None:
        """Abort such an upload, and remove its announcement."""
        announced = self.read_small(leftover.name)
        if announced is None:
            return
        with suppress(ValueError, KeyError, TypeError):  # cut short, so that its upload was not begun
            record = json.loads(announced)
            key, upload = str(record["key"]), str(record["upload"])
            if key.startswith(self._prefix):  # whoever may write there says so, and may not reach further with us
                self._ask("abort an upload to", self._bucket.abort(key, upload))
        with suppress(FileNotFoundError):
            self.delete(leftover.name)

    def holder(self) -> str:
        """Who has the lease now."""
        return current_holder(self)

    def free(self) -> int | None:
        """Not known."""
        return None

    def examine(self) -> Sequence[Finding]:
        """What the store can't promise."""
        return list(examine_store(self))

    def publish(
        self,
        name: str,
        size: int,
        chunks: Iterable[memoryview],
        *,
        overwrite: bool = False,
        before: Callable[[], None] = lambda: None,
        cleared: Callable[[], bool] = lambda: False,
    ) -> Stat:
        """Make the object appear, whole, or nothing.

        Small ones go in one request; larger ones in parts, several at a time, which nobody sees until the last
        request joins them. If its answer is lost, the object is looked at: it carries the id of the write.
        """
        with self._saving(name, size):
            there = self._head(name)
        if there is not None and not overwrite and not cleared():
            raise FileExistsError(name)
        condition = there.tag if there is not None and overwrite else ABSENT
        write = _Write(self._prefix + name, uuid.uuid4().hex, condition, before, cleared)
        if size <= self._bucket.largest_put:
            self._put(write, _joined(name, size, chunks))
        else:
            self._upload(write, name, size, chunks)
        found = self._head(name)
        if found is None:
            raise StorageError(f"{name} was written to {self._location}, and is not there now")
        if found.size != size:
            self.delete(name, seen=_stat(found))
            raise self._failed(
                name, size, f"the service kept {found.size:,} bytes of {size:,}, which were deleted again"
            )
        return _stat(found)

    def delete(self, name: str, *, seen: Stat | None = None) -> None:
        """Delete an object, where the service can only if it is still the one that was seen."""
        tag = str(seen.identity[0]) if seen is not None and seen.identity else None
        self._ask("delete from", self._bucket.delete(self._prefix + name, tag))

    def set_aside(self, name: str, reason: str) -> str:
        """Move an object to ``aside/``, under its name or, where that is taken, with a number added."""
        below = f"{self._prefix}aside/"
        taken = {found.key for found in self._ask("list", self._bucket.list(below))}
        target = next(candidate for candidate in numbered(name) if below + candidate not in taken)
        there = self._head(name)
        if there is None:
            raise CheckpointNotFoundError(f"there is no file {name} in {self._location} to set aside")
        note = f"{reason}\n".encode()
        self._ask("write to", self._bucket.put(f"{below}{target}.reason.txt", note, uuid.uuid4().hex, ANY))
        self._ask("copy in", self._bucket.copy(there.key, below + target))
        copied = self._ask("look into", self._bucket.head(below + target))
        if copied is None or copied.size != there.size:
            raise StorageError(f"can't set {self._url(name)} aside: its copy is not complete, so it was left there")
        self.delete(name, seen=_stat(there))
        return f"aside/{target}"

    def read_small(self, name: str) -> bytes | None:
        """The contents of a small object, None where there is none."""
        found = self._head(name)
        if found is None or not found.size:
            return None if found is None else b""
        try:
            return bytes(self._ask("read from", self._bucket.read(found.key, 0, found.size, found.tag)))
        except FileNotFoundError:
            return None

    def names(self, prefix: str) -> Sequence[str]:
        """The names that begin with `prefix`."""
        found = self._ask("list", self._bucket.list(self._prefix + prefix))
        return [entry.key[len(self._prefix) :] for entry in found]

    def put_small(self, name: str, content: bytes, *, create: bool) -> None:
        """Write a small object; with `create` only where there is none. Raises FileExistsError."""
        try:
            write = _Write(self._prefix + name, uuid.uuid4().hex, ABSENT if create else ANY)
            self._put(write, content)
        except SaveFailedError as error:
            raise StorageError(str(error)) from None

    def _put(self, write: _Write, content: bytes) -> None:
        write.before()
        self._settle(write, lambda: self._bucket.put(write.key, content, write.id, write.condition))

    def _upload(self, write: _Write, name: str, size: int, chunks: Iterable[memoryview]) -> None:
        with self._saving(name, size):
            upload = self._ask("write to", self._bucket.begin(write.key, size, write.id, write.condition))
        pending: set[Future[None]] = set()
        announcement, left = "", False
        try:
            with self._saving(name, size):
                announcement = self._announce(write.key, upload)
            for number, (part, last) in enumerate(_parts(name, size, chunks)):
                if len(pending) == self._bucket.parallel:
                    self._sent(pending, name, size)
                pending.add(self._client.start(upload.part(number, part, last=last)))
            while pending:
                self._sent(pending, name, size)
            write.before()
            if write.condition == ABSENT and self._head(name) is not None and not write.cleared():
                raise FileExistsError(name)  # not every service refuses it when a large object is completed
            self._settle(write, upload.complete)
        except BaseException:
            left = not self._abandoned(upload, pending)
            raise
        finally:
            if announcement and not left:
                with suppress(StorageError, FileNotFoundError):  # the next writer finds it
                    self.delete(announcement)

    def _sent(self, pending: set[Future[None]], name: str, size: int) -> None:
        """Wait until one part more has arrived."""
        sent = next(iter(wait(pending, DEADLINE, FIRST_COMPLETED).done), None)
        with self._saving(name, size):
            if sent is None:
                raise StorageError(f"the server took no part within {DEADLINE:.0f} s: try again")
            pending.discard(sent)
            sent.result()

    @contextmanager
    def _saving(self, name: str, size: int | None) -> Iterator[None]:
        """What a client library raises inside is a save that failed."""
        try:
            yield
        except SaveFailedError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a client library raises
            raise self._failed(name, size, self._words(error)) from None

    def _announce(self, key: str, upload: Upload) -> str:
        if not (self._bucket.lists_uploads and upload.id):
            return ""
        name = temporary_name(this_machine())
        self.put_small(name, json.dumps({"key": key, "upload": upload.id}).encode(), create=False)
        return name

    def _abandoned(self, upload: Upload, pending: Iterable[Future[None]]) -> bool:
        """Give an upload up; whether the service knows it."""
        for future in pending:
            future.cancel()
        try:
            self._client.run(upload.abort())
        except Exception as error:  # noqa: BLE001 - whatever a client library raises; the first failure is the news
            _log.warning("an upload to %s could not be aborted, gc will: %s", self._location, self._words(error))
            return False
        return True

    def _settle(self, write: _Write, last_request: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Make the last request of a write; where its answer leaves doubt, look whether the object is ours."""
        for attempt in range(_ATTEMPTS):
            try:
                self._client.run(last_request())
                break
            except Exception as error:  # noqa: BLE001 - whatever a client library raises
                name = write.key[len(self._prefix) :]
                refused = isinstance(error, ConditionFailedError)
                found = self._look_after(write, name, error) if _in_doubt(error) else None
                if found is not None and found.write_id == write.id:
                    break
                if found is not None and refused and write.condition is not ANY:
                    if write.condition != ABSENT or not write.cleared():
                        raise FileExistsError(write.key) from None
                elif not refused or attempt == _ATTEMPTS - 1:
                    raise self._failed(name, None, self._words(error)) from None
                time.sleep(0.2 * attempt)
        else:
            raise self._failed(write.key[len(self._prefix) :], None, "its name was taken again and again")

    def _look_after(self, write: _Write, name: str, error: Exception) -> Found | None:
        try:
            return self._ask("look into", self._bucket.head(write.key))
        except StorageError as second:
            why = f"{self._words(error)}, and so is the connection: {second}"
            raise InDoubtError.of(name, self._location, why) from None

    def _head(self, name: str) -> Found | None:
        return self._ask(f"look at {name!r} in", self._bucket.head(self._prefix + name))

    def _ask(self, what: str, call: Coroutine[Any, Any, _T]) -> _T:
        """Make a call whose failure is a `StorageError`."""
        try:
            return self._client.run(call)
        except (CheckpointError, FileNotFoundError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever a client library raises
            raise StorageError(f"can't {what} {self._location}: {self._words(error)}") from None

    def _words(self, error: BaseException) -> str:
        if isinstance(error, ConditionFailedError):
            return "it was changed by another writer in the meantime, and left as it is: look again"
        return in_words(error, self._client.redact)

    def _failed(self, name: str, size: int | None, reason: str) -> SaveFailedError:
        return SaveFailedError(
            f"saving {name} in {self._location} failed: {reason}. Older checkpoints are as they were", needed=size
        )

    def _url(self, name: str) -> str:
        return f"{self._location.rstrip('/')}/{name}"


class MemoryStorage(ObjectStorage):
    """Objects in this process's memory, which has no other writer and ends with it."""

    def lease(self) -> Lease:
        """Nothing to take."""
        return _NoLease()

    def holder(self) -> str:
        """Nobody."""
        return ""

    def examine(self) -> Sequence[Finding]:
        """What is in memory ends with the process."""
        return (note(self._location, "lies in this process's memory", "save to a disk to keep it"),)


class _NoLease:
    epoch = None
    _released = False

    def check(self) -> None:
        if self._released:
            raise LeaseHeldError("this process has no lease on the run: it was released")

    def release(self) -> None:
        self._released = True

    close = release


class _Write(NamedTuple):
    """What the last request of a write needs to know.

    Attributes:
        key: The object.
        id: By which it is recognised as ours.
        condition: Under which it may be written.
        before: Called before the object appears.
        cleared: Called when the name is taken; whether it is free now.
    """

    key: str
    id: str
    condition: str | None
    before: Callable[[], None] = lambda: None
    cleared: Callable[[], bool] = lambda: False


class _ObjectEntry(NamedTuple):
    name: str
    found: Stat

    def stat(self) -> Stat:
        return self.found


def _stat(found: Found) -> Stat:
    return Stat(found.size, found.modified, (found.tag,))


def _in_doubt(error: Exception) -> bool:
    """Whether the object may be there although the request failed: no answer, or one to a repetition of it."""
    if isinstance(error, (ConditionFailedError, FileNotFoundError, StorageError)):
        return True
    status = failure_of(error).status
    return status == 0 or status >= 500


def _joined(name: str, size: int, chunks: Iterable[memoryview]) -> bytes:
    content = b"".join(chunks)
    _check_size(name, size, len(content))
    return content


def _parts(name: str, size: int, chunks: Iterable[memoryview]) -> Iterator[tuple[bytes, bool]]:
    """The bytes in parts of equal size, each with whether it is the last."""
    limit = -(-max(_PART, -(-size // _MAX_PARTS)) // _UNIT) * _UNIT
    pieces: list[memoryview] = []
    held = done = 0
    for chunk in chunks:
        rest = chunk
        while rest:
            pieces.append(rest[: limit - held])
            rest = rest[len(pieces[-1]) :]
            held += len(pieces[-1])
            done += len(pieces[-1])
            if held == limit and done < size:
                yield b"".join(pieces), False
                pieces, held = [], 0
    _check_size(name, size, done)
    yield b"".join(pieces), True


def _check_size(name: str, size: int, found: int) -> None:
    if found != size:
        raise SaveFailedError(f"{name}: {found} bytes were to be written, {size} announced", needed=size)
