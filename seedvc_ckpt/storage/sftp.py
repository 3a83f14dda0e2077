"""A folder on an SFTP server: files are written under temporary names, and get theirs when they are complete."""

from __future__ import annotations

import os
import stat as statmodule
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from itertools import count
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import asyncssh
from asyncssh import SFTPAttrs

from seedvc_ckpt.errors import CheckpointNotFoundError, SaveFailedError, StorageError
from seedvc_ckpt.storage import Lease, Stat, numbered
from seedvc_ckpt.storage import sftp_requests as requests
from seedvc_ckpt.storage.bucket import Bytes
from seedvc_ckpt.storage.condition import Finding, problem
from seedvc_ckpt.storage.leftovers import Leftover, temporary_name, this_machine, why_dead
from seedvc_ckpt.storage.promises import Promises, examine_store, probed
from seedvc_ckpt.storage.ranges import RemoteBlob
from seedvc_ckpt.storage.remote import DEADLINE, Client, InDoubtError, in_words
from seedvc_ckpt.storage.sftp_requests import NoReplaceError, OpenFile, RefusedError
from seedvc_ckpt.storage.shared_lease import SharedLease, current_holder

__all__ = ["SftpStorage"]

_T = TypeVar("_T")

_PART = 960 << 10  # bytes handed over at once: some blocks of a request, see sftp_requests
_PARTS = 8  # in memory
_PATIENCE = 60.0  # seconds for the answer to a small request
_SLOWEST_DISK = 10e6  # bytes a second that a server writes at least
_CLEANUP = 10.0  # seconds to close and remove what will not be published
_LOOKS, _PAUSE = 5, 0.2  # seconds; a server that lives takes no longer between a link and the removal of the old name
_FULL = (asyncssh.SFTPNoSpaceOnFilesystem, asyncssh.SFTPQuotaExceeded)


class SftpStorage:
    """Files in a folder on a server, which is made at the first publish.

    Args:
        client: The connection.
        folder: The absolute path there.
        location: The URL, for people.
        lease_seconds: How long a lease outlives its writer.
    """

    def __init__(self, client: Client, folder: str, location: str, lease_seconds: float) -> None:
        self._client = client
        self._folder = folder.rstrip("/")
        self._location = location
        self._lease_seconds = lease_seconds
        self._given_up: set[str] = set()
        """Temporary files that could not be removed when their save failed."""

    @property
    def location(self) -> str:
        """The URL, without name and password."""
        return self._location

    def below(self, folder: str) -> SftpStorage:
        """The folder of that name in it."""
        return SftpStorage(self._client, f"{self._folder}/{folder}", self._url(folder), self._lease_seconds)

    def list(self) -> Iterator[_SftpEntry]:
        """The files in the folder; symlinks to files count, those that lead nowhere don't."""
        for name, attributes in self._files():
            yield _SftpEntry(name, _stat(attributes))

    def stat(self, name: str) -> Stat | None:
        """Size and time of a file, None where there is none. The time is in whole seconds: no more is told."""
        found = self._ask("look into", requests.look, self._path(name))
        return _stat(found) if found is not None else None

    def open(self, name: str) -> RemoteBlob:
        """Open a file for reading."""
        try:
            reading = _Reading(self._client, lambda: self._open(name))
        except FileNotFoundError:
            raise CheckpointNotFoundError(f"there is no file {name} in {self._location}") from None
        size = reading.found.size
        return RemoteBlob(self._url(name), size, reading.fetch, reading.wait, self._words, reading.close)

    def lease(self) -> Lease:
        """Take the right to write; what the server can promise is found out first, once."""
        probed(self, self._probe)
        return SharedLease.take(self, self._lease_seconds)

    def leftovers(self) -> Sequence[Leftover]:
        """The temporary files of writers that died, in the folder and its ``aside/``."""
        clock: list[float] = []

        def now() -> float:
            clock[:] = clock or [self._server_time()]
            return clock[0]

        found = []
        for name, attributes in sorted((*self._files(), *self._files("aside/")), key=lambda file: file[0]):
            why = self._why_dead(name, attributes, now)
            if why is not None:
                found.append(Leftover(name, attributes.size or 0, why))
        return found

    def remove_leftover(self, leftover: Leftover) -> None:
        """Remove such a file, unless it has come to life."""
        attributes = self._ask("look into", requests.look, self._path(leftover.name), follow=False)
        if attributes is not None and self._why_dead(leftover.name, attributes, self._server_time) is not None:
            self._remove(leftover.name)

    def holder(self) -> str:
        """Who has the lease now."""
        return current_holder(self)

    def free(self) -> int | None:
        """Bytes that this user may still write; None where the server does not tell."""
        try:
            return self._ask("look into", requests.space, self._path())
        except (StorageError, FileNotFoundError):
            return None

    def examine(self) -> Sequence[Finding]:
        """What the server can't promise, and who else may change the folder's files."""
        found = list(examine_store(self))
        attributes = self._ask("look into", requests.look, self._path())
        mode = attributes.permissions or 0 if attributes is not None else 0
        if mode & statmodule.S_IWOTH and not mode & statmodule.S_ISVTX:
            what = "any user of the server can delete and replace its files"
            found.append(problem(self._location, what, f"run there: chmod o-w {self._folder}"))
        return found

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
        """Make a complete, durable file appear under `name`, or nothing.

        It is written to a new file of an unpredictable name, several blocks at a time, synced, and looked at; then it
        is renamed, by the request that fails where the name is taken or, to overwrite, the one that replaces in one
        step. If the answer to that is lost, the names tell: nobody else renames our temporary file.
        """
        for forgotten in tuple(self._given_up):
            with suppress(StorageError):
                self._remove(forgotten)
        with self._saving(name, size):
            taken = not overwrite and self._is_taken(name)
            free = self.free()
        if taken and not cleared():
            raise FileExistsError(name)
        if free is not None and free < size:
            raise SaveFailedError(
                f"no room for {name} in {self._location}: it needs {size:,} bytes, {free:,} are free. Nothing was "
                "written; make room or keep fewer checkpoints",
                needed=size,
                free=free,
            )
        try:
            return self._publish(name, size, chunks, _Naming(overwrite, before, cleared), durable=True)
        except NoReplaceError as error:
            raise SaveFailedError(f"saving {name} in {self._location} failed: {error}", needed=size) from None

    def delete(self, name: str, *, seen: Stat | None = None) -> None:
        """Delete a file, unless it was replaced since it was seen: the server is asked just before."""
        if seen is not None:
            there = self.stat(name)
            if there is None:
                raise FileNotFoundError(name)
            if there != seen:
                raise StorageError(f"{self._url(name)} was replaced by another writer, and left as it is")
        try:
            self._ask("delete from", requests.unlink, self._path(name), again=False)
        except _LostError:
            if self._is_taken(name):
                raise

    def set_aside(self, name: str, reason: str) -> str:
        """Move a file to ``aside/``, under its name or, where that is taken, with a number added."""
        if not self._is_taken(name):
            raise CheckpointNotFoundError(f"there is no file {name} in {self._location} to set aside")
        changed = self._ask("make a folder in", requests.make_folder, self._path("aside"))
        taken = {other for other, _ in self._files("aside/")}
        for target in (candidate for candidate in numbered(f"aside/{name}") if candidate not in taken):
            self.put_small(f"{target}.reason.txt", os.fsencode(f"{reason}\n"), create=False)
            with suppress(FileExistsError):  # a folder, or a link that leads nowhere
                self._move(self._path(name), self._path(target))
                break
        for folder in {self._path("aside"), self._path(), *changed}:
            self._ask("sync", requests.sync, folder)
        return target

    def read_small(self, name: str) -> bytes | None:
        """The contents of a small file, None where there is none."""
        try:
            return self._ask("read from", requests.contents, self._path(name))
        except FileNotFoundError:
            return None

    def names(self, prefix: str) -> Sequence[str]:
        """The names that begin with `prefix`."""
        return [name for name, _ in self._files() if name.startswith(prefix)]

    def put_small(self, name: str, content: bytes, *, create: bool) -> None:
        """Write a small file; with `create` only where there is none. Raises FileExistsError."""
        if create and self._is_taken(name):
            raise FileExistsError(name)
        try:
            self._publish(name, len(content), [memoryview(content)], _Naming(overwrite=not create), durable=create)
        except NoReplaceError:
            # a reader who sees it half written takes it for a sign of life: see LeaseRecord
            self._ask("write to", requests.write_in_place, self._path(name), content)
        except SaveFailedError as error:
            raise StorageError(str(error)) from None

    def _publish(self, name: str, size: int, chunks: Iterable[memoryview], how: _Naming, *, durable: bool) -> Stat:
        temporary = temporary_name(this_machine())
        file: OpenFile | None = None
        try:
            with self._saving(name, size):
                file, changed = self._create(temporary)
            written = self._send(file, name, size, chunks)
            if written != size:
                raise SaveFailedError(f"{name}: {written} bytes were to be written, {size} announced", needed=size)
            with self._saving(name, size), self._asking("write to", file.fs):
                self._client.run(file.finish(durable=durable), DEADLINE + size / _SLOWEST_DISK)
            with self._saving(name, size):
                found = self.stat(temporary)
            if found is None or found.size != size:
                raise SaveFailedError(f"{name}: the server kept {found and found.size} of {size} bytes", needed=size)
            self._give_name(temporary, name, found, how)
        except BaseException:
            self._give_up(file, temporary)
            raise
        if durable:
            self._sync_folders(name, (self._path(), *changed))
        return found

    def _open(self, name: str) -> tuple[OpenFile, Stat]:
        file, attributes = self._ask("read from", requests.open_to_read, self._path(name))
        return file, _stat(attributes)

    def _create(self, temporary: str) -> tuple[OpenFile, Sequence[bytes]]:
        """A new file; also the folders that changed because its own was missing and was made."""
        path = self._path(temporary)
        try:
            return self._ask("write to", OpenFile.open, path, requests.CREATE), ()
        except FileNotFoundError:
            changed = self._ask("make", requests.make_folder, self._path())
            return self._ask("write to", OpenFile.open, path, requests.CREATE), changed

    def _send(self, file: OpenFile, name: str, size: int, chunks: Iterable[memoryview]) -> int:
        pending: deque[Future[None]] = deque()

        def wait_for_oldest() -> None:
            with self._saving(name, size), self._asking("write to", file.fs):
                self._client.wait(pending.popleft())

        offset = 0
        try:
            for part in _parts(chunks):
                if len(pending) == _PARTS:
                    wait_for_oldest()
                pending.append(self._client.start(file.write(offset, part)))
                offset += len(part)
            while pending:
                wait_for_oldest()
        except BaseException:
            for future in pending:
                future.cancel()
            raise
        return offset

    def _give_name(self, temporary: str, name: str, found: Stat, how: _Naming) -> None:
        """Rename the file, which makes it appear."""
        for attempt in count():
            try:
                with self._saving(name, found.size):
                    if not how.overwrite and self._is_taken(name):  # not every server refuses it
                        raise FileExistsError(name)
                how.before()
                with self._saving(name, found.size):
                    if self._is_named(temporary, name, found, how, last=attempt > 0):
                        return
            except FileExistsError:
                if how.overwrite or not how.cleared():
                    raise FileExistsError(name) from None

    def _is_named(self, temporary: str, name: str, found: Stat, how: _Naming, *, last: bool) -> bool:
        """Whether the file has its name now; False if the connection was lost before, which the last try raises."""
        rename = requests.replace if how.overwrite else requests.rename
        try:
            self._ask("write to", rename, self._path(temporary), self._path(name), again=False)
        except (_LostError, FileNotFoundError) as error:
            if not self._was_named(temporary, name, found, how, error):
                if last:
                    raise
                return False
        return True

    def _was_named(self, temporary: str, name: str, found: Stat, how: _Naming, error: Exception) -> bool:
        """Whether a rename whose answer was lost has happened. Raises FileExistsError if the name is another's."""
        for _ in range(_LOOKS):
            try:
                left = self._ask("look into", requests.look, self._path(temporary), follow=False)
                there = self._ask("look into", requests.look, self._path(name), follow=False)
            except StorageError as second:
                raise InDoubtError.of(
                    name, self._location, f"{self._words(error)}, and so is the connection: {second}"
                ) from None
            ours = there is not None and _stat(there) == found
            if left is None and not (ours or how.overwrite):
                raise InDoubtError.of(name, self._location, f"{self._words(error)}, and its temporary file is gone")
            if left is None:
                return True
            if how.overwrite or there is None:
                return False
            if not ours:
                raise FileExistsError(name)
            time.sleep(_PAUSE)  # both names: servers link first, and then remove the old one
        self._remove(temporary)  # that server died in between
        return True

    def _sync_folders(self, name: str, folders: Iterable[bytes]) -> None:
        try:
            for folder in folders:
                self._ask("sync", requests.sync, folder)
        except StorageError as error:
            raise InDoubtError(
                f"{name} is complete in {self._location}, but whether a power cut there would spare it is not known: "
                f"{error}"
            ) from None

    def _give_up(self, file: OpenFile | None, temporary: str) -> None:
        """Close and remove a temporary file; what can't be removed now is at the next publish, or by `leftovers`."""
        self._given_up.add(temporary)
        with suppress(Exception):
            if file is not None:
                self._client.run(file.close(), _CLEANUP)
        with suppress(StorageError):
            self._remove(temporary)

    def _remove(self, temporary: str) -> None:
        with suppress(FileNotFoundError):
            self._ask("delete from", requests.unlink, self._path(temporary), seconds=_CLEANUP)
        self._given_up.discard(temporary)

    def _move(self, old: bytes, new: bytes) -> None:
        try:
            self._ask("move a file in", requests.rename, old, new, again=False)
        except _LostError:
            left = self._ask("look into", requests.look, old, follow=False)
            if left is not None or self._ask("look into", requests.look, new, follow=False) is None:
                raise

    def _is_taken(self, name: str) -> bool:
        return self._ask("look into", requests.look, self._path(name), follow=False) is not None

    def _files(self, below: str = "") -> Sequence[tuple[str, SFTPAttrs]]:
        found = self._ask("list", requests.listing, self._path(below.rstrip("/")))
        return [(below + os.fsdecode(name), attributes) for name, attributes in found]

    def _why_dead(self, name: str, attributes: SFTPAttrs, now: Callable[[], float]) -> str | None:
        if attributes.type not in requests.FILES:
            return None
        if name in self._given_up:
            return "its save failed"
        return why_dead(name.rpartition("/")[2], attributes.mtime or 0, now, this_machine())

    def _server_time(self) -> float:
        """The time by the server's clock, which a new file shows; ours where none can be made."""
        probe = self._path(temporary_name(this_machine()))
        try:
            return self._ask("write to", requests.time_of_new_file, probe)
        except (StorageError, FileNotFoundError):
            return time.time()

    def _probe(self) -> Promises:
        self._ask("make", requests.make_folder, self._path())
        return self._ask("write to", requests.try_renames, self._path())

    def _ask(
        self,
        what: str,
        call: Callable[..., Coroutine[Any, Any, _T]],
        *arguments: Any,
        again: bool = True,
        seconds: float = _PATIENCE,
        **options: Any,
    ) -> _T:
        """Make a call; if the connection is lost, once more on a new one where `again` says that this does no harm.

        Raises:
            FileNotFoundError: if what it is about is not there.
            FileExistsError: if a name is taken.
            StorageError: for all else; `_LostError` if there was no answer.
        """
        while True:
            fs = self._filesystem()
            try:
                with self._asking(what, fs):
                    return self._client.run(call(fs, *arguments, **options), seconds)
            except _LostError:
                if not again:
                    raise
                again = False

    @contextmanager
    def _asking(self, what: str, fs: Any) -> Iterator[None]:
        """What the library raises inside is told as `_ask` tells it."""
        try:
            yield
        except (FileNotFoundError, FileExistsError, RefusedError):
            raise
        except requests.MISSING:
            raise FileNotFoundError(f"can't {what} {self._location}: it is not there") from None
        except Exception as error:  # noqa: BLE001 - whatever the library raises
            words = f"can't {what} {self._location}: {self._words(error)}"
            if not requests.is_lost(error):
                raise RefusedError(words) from None
            if not self._client.renew(fs):
                words += ". The filesystem was given, so that only who made it can connect it again"
            raise _LostError(words) from None

    @contextmanager
    def _saving(self, name: str, size: int) -> Iterator[None]:
        """What fails inside is a save that failed."""
        try:
            yield
        except (SaveFailedError, FileExistsError, InDoubtError, NoReplaceError):
            raise
        except (StorageError, FileNotFoundError) as error:
            free = self.free() if isinstance(error, RefusedError) else None  # a full disk is a refusal without a reason
            known = f", {free:,} are free" if free is not None else ""
            raise SaveFailedError(
                f"saving {name} failed: {error}. It needs {size:,} bytes{known}; nothing was published and older "
                "checkpoints are as they were",
                needed=size,
                free=free,
            ) from None

    def _filesystem(self) -> Any:
        fs = self._client.fs
        try:
            fs.loop  # noqa: B018 - the question is whether it raises
        except RuntimeError:
            raise StorageError(
                f"the filesystem given for {self._location} was made before this process was forked: make one in it"
            ) from None
        return fs

    def _words(self, error: BaseException) -> str:
        if isinstance(error, asyncssh.SFTPPermissionDenied):
            return "permission denied: check who may write to the folder and its files"
        if isinstance(error, _FULL):
            return "the disk or the quota there is full"
        if isinstance(error, asyncssh.SFTPFailure):
            return f"the server refused, and gives no reason as for a full disk: {self._client.redact(error.reason)}"
        if isinstance(error, FileNotFoundError):
            return str(error)
        return in_words(error, self._client.redact)

    def _path(self, name: str = "") -> bytes:
        # bytes, so that names in another encoding are names too
        return os.fsencode(f"{self._folder}/{name}" if name else self._folder or "/")

    def _url(self, name: str) -> str:
        return f"{self._location.rstrip('/')}/{name}"


class _LostError(StorageError):
    """A request that was not answered; it may have been carried out."""


class _Naming(NamedTuple):
    """How a file gets its name: see `Storage.publish`."""

    overwrite: bool
    before: Callable[[], None] = lambda: None
    cleared: Callable[[], bool] = lambda: False


class _Reading:
    """An open file, opened again if its connection is lost: by who waits, since connecting waits for the loop.

    Args:
        client: The connection.
        open_: Opens the file, on a new connection if need be.
    """

    def __init__(self, client: Client, open_: Callable[[], tuple[OpenFile, Stat]]) -> None:
        self._client = client
        self._open = open_
        self._file, self.found = open_()
        self._asked: WeakKeyDictionary[Future[Bytes], tuple[OpenFile, int, int]] = WeakKeyDictionary()
        self._guard = threading.Lock()

    def fetch(self, offset: int, size: int) -> Future[Bytes]:
        """Begin to read."""
        file = self._file
        future: Future[Bytes] = self._client.start(file.read(offset, size))
        self._asked[future] = file, offset, size
        return future

    def wait(self, future: Future[Bytes]) -> Bytes:
        """What was read, a second time if need be. Raises FileNotFoundError if the file is another by now."""
        try:
            return self._client.wait(future)
        except Exception as error:
            if not requests.is_lost(error):
                raise
        file, offset, size = self._asked[future]
        return self._client.run(self._opened_again(file).read(offset, size))

    def close(self) -> None:
        """Close it, without waiting for that."""
        self._client.start(self._file.close_quietly())

    def _opened_again(self, broken: OpenFile) -> OpenFile:
        with self._guard:
            if self._file is broken:
                self._client.renew(broken.fs)
                file, found = self._open()
                if found != self.found:  # and stays so: the broken one is not given up for it
                    self._client.start(file.close_quietly())
                    raise FileNotFoundError
                self._client.start(broken.close_quietly())
                self._file = file
            return self._file


class _SftpEntry(NamedTuple):
    name: str
    found: Stat

    def stat(self) -> Stat:
        return self.found


def _stat(found: SFTPAttrs) -> Stat:
    modified = found.mtime or 0
    return Stat(found.size or 0, datetime.fromtimestamp(modified, timezone.utc), (modified,))


def _parts(chunks: Iterable[memoryview]) -> Iterator[bytes]:
    """The bytes in parts of one size, but for the last: copies, since a chunk may be gone when the next is taken."""
    part = bytearray()
    for chunk in chunks:
        rest = chunk
        while rest:
            taken = rest[: _PART - len(part)]
            part += taken
            rest = rest[len(taken) :]
            if len(part) == _PART:
                yield bytes(part)
                part.clear()
    if part:
        yield bytes(part)
