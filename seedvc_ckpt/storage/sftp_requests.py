"""What is asked of an SFTP server: coroutines over the channels of an sshfs filesystem.

Its own copying, moving and reading are not used: they write in place, replace what is there, and ignore ranges. Paths
are bytes, so that names in any encoding are names. What the server or the library says is raised as it comes.
"""

from __future__ import annotations

import time
from asyncio import Semaphore, gather
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import asyncssh
from asyncssh import SFTPAttrs, SFTPClient, SFTPClientFile

from seedvc_ckpt.errors import StorageError
from seedvc_ckpt.storage.leftovers import temporary_name, this_machine
from seedvc_ckpt.storage.promises import Promises

__all__ = [
    "CREATE",
    "FILES",
    "MISSING",
    "NoReplaceError",
    "OpenFile",
    "RefusedError",
    "contents",
    "is_lost",
    "listing",
    "look",
    "make_folder",
    "open_to_read",
    "rename",
    "replace",
    "space",
    "sync",
    "time_of_new_file",
    "try_renames",
    "unlink",
    "write_in_place",
]

READ = asyncssh.FXF_READ
CREATE = asyncssh.FXF_WRITE | asyncssh.FXF_CREAT | asyncssh.FXF_EXCL
OVERWRITE = asyncssh.FXF_WRITE | asyncssh.FXF_CREAT | asyncssh.FXF_TRUNC

FILES = (asyncssh.FILEXFER_TYPE_REGULAR, asyncssh.FILEXFER_TYPE_UNKNOWN)  # unknown where a server gives no modes
MISSING = (asyncssh.SFTPNoSuchFile, asyncssh.SFTPNoSuchPath)
_UNRESOLVED = (asyncssh.FILEXFER_TYPE_SYMLINK, asyncssh.FILEXFER_TYPE_UNKNOWN)
_TAKEN = (asyncssh.SFTPFailure, asyncssh.SFTPFileAlreadyExists)  # version 3 has no word of its own for it
_BROKEN = (asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection, asyncssh.SFTPBadMessage)

_BLOCK = 240 << 10  # bytes a request; OpenSSH drops the connection at 256 KB
_SAFE_BLOCK = 32 << 10  # what every server takes
_IN_FLIGHT = 4 << 20  # bytes of a file that may be on their way at once
_FIRST = 2  # blocks on their way at the beginning
_QUEUE = 0.5  # seconds that blocks may wait for those before them; more only keeps other requests waiting


class RefusedError(StorageError):
    """A request that was answered: no."""


class NoReplaceError(RefusedError):
    """The server can't put a file in another's place."""


def is_lost(error: Exception) -> bool:
    """Whether there was no answer, so that it is not known what the server did, and the connection is of no use."""
    if isinstance(error, asyncssh.SFTPError):
        return isinstance(error, _BROKEN)
    # OSError: from the network, since the server's own are SFTPErrors; StorageError, which is one: the deadline
    return isinstance(error, (asyncssh.Error, OSError, EOFError))


@asynccontextmanager
async def _channel(fs: Any) -> AsyncIterator[SFTPClient]:
    """A channel of the filesystem's pool, which counts who uses it."""
    async with AsyncExitStack() as stack:
        try:
            channel: SFTPClient = await stack.enter_async_context(fs._pool.get())  # noqa: SLF001 - has no public name
        except ValueError as error:  # the pool's word for a connection that opens no more channels
            raise ConnectionError(str(error)) from None
        yield channel


class OpenFile:
    """A file that is open on the server, whose requests are under way several at a time.

    Attributes:
        fs: The filesystem that it was opened with, which closes the connection when nobody has it any more.
    """

    def __init__(self, fs: Any, file: SFTPClientFile, stack: AsyncExitStack, block: int) -> None:
        self.fs = fs
        self._file = file
        self._stack = stack
        self._block = block
        self._widest = _IN_FLIGHT // block
        self._width = _FIRST
        self._fastest = float("inf")
        self._turns = Semaphore(self._width)

    @classmethod
    async def open(cls, fs: Any, path: bytes, flags: int) -> OpenFile:
        """Open a file; its channel counts as used until it is closed."""
        async with AsyncExitStack() as stack:
            channel = await stack.enter_async_context(_channel(fs))
            file = await channel.open(path, flags, encoding=None, block_size=0)
            limits = getattr(channel, "limits", None)  # since asyncssh 2.17; without the extension, 16 KB is assumed
            told = min(limits.max_read_len, limits.max_write_len) if limits else 0
            return cls(fs, file, stack.pop_all(), max(_SAFE_BLOCK, min(told, _BLOCK)))

    async def read(self, offset: int, size: int) -> bytes:
        """Bytes from `offset`; fewer where the file ends."""
        pieces = (self._read(offset + at, min(self._block, size - at)) for at in range(0, size, self._block))
        return b"".join(await gather(*pieces))

    async def write(self, offset: int, content: bytes) -> None:
        """Write all of it."""
        view = memoryview(content)
        await gather(
            *(self._write(offset + at, view[at : at + self._block]) for at in range(0, len(view), self._block))
        )

    async def stat(self) -> SFTPAttrs:
        """What the server tells of it."""
        return await self._file.stat()

    async def finish(self, *, durable: bool) -> None:
        """Close what was written; if `durable`, sync it before, where the server can."""
        if durable:
            with suppress(asyncssh.SFTPOpUnsupported):
                await self._file.fsync()
        await self.close()

    async def close(self) -> None:
        """Close it. Doing it twice does no harm."""
        try:
            await self._file.close()
        finally:
            await self._stack.aclose()

    async def close_quietly(self) -> None:
        """Close it, without a word if the connection is gone."""
        with suppress(Exception):
            await self.close()

    async def _read(self, offset: int, size: int) -> bytes:
        found = b""
        async with self._turn():
            while len(found) < size:  # servers may give less than they are asked for
                more: bytes = await self._file.read(size - len(found), offset + len(found))
                if not more:
                    break
                found = found + more if found else more
        return found

    async def _write(self, offset: int, block: memoryview) -> None:
        async with self._turn():
            await self._file.write(bytes(block), offset)

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """One of the requests under way: so many as keep the line busy, and no more.

        Else what waits for its turn behind them, like the renewal of a lease, would wait for minutes on a slow line.
        """
        await self._turns.acquire()
        begun = time.monotonic()
        try:
            yield
        finally:
            took = time.monotonic() - begun
            self._fastest = min(self._fastest, took)
            slow = took > self._fastest + _QUEUE
            if slow and self._width > 1:
                self._width -= 1
            else:
                self._turns.release()
                if not slow and self._width < self._widest:
                    self._width += 1
                    self._turns.release()


async def open_to_read(fs: Any, path: bytes) -> tuple[OpenFile, SFTPAttrs]:
    """A file, and what is told of it. Raises RefusedError if it is something else."""
    async with _channel(fs) as channel:
        if (await channel.stat(path)).type not in FILES:  # opening a pipe would stall the server
            raise RefusedError(f"{path.decode(errors='replace')} is not a file")
    file = await OpenFile.open(fs, path, READ)
    try:
        return file, await file.stat()
    except BaseException:
        await file.close()
        raise


async def look(fs: Any, path: bytes, *, follow: bool = True) -> SFTPAttrs | None:
    """What is told of a file or folder, None where there is none."""
    async with _channel(fs) as channel:
        return await _attributes(channel, path, follow=follow)


async def _attributes(channel: SFTPClient, path: bytes, *, follow: bool = True) -> SFTPAttrs | None:
    try:
        return await (channel.stat(path) if follow else channel.lstat(path))
    except MISSING:
        return None


async def listing(fs: Any, folder: bytes) -> Sequence[tuple[bytes, SFTPAttrs]]:
    """The files in a folder, links to files among them; none where there is no such folder."""
    files = []
    async with _channel(fs) as channel:
        try:
            entries = await channel.readdir(folder)
        except MISSING:
            if await _attributes(channel, folder) is not None:
                raise RefusedError(f"{folder.decode(errors='replace')} is not a folder") from None
            return []
        for entry in entries:
            name, found = bytes(entry.filename), entry.attrs  # type: ignore[arg-type]
            if found.type in _UNRESOLVED:
                target = await _attributes(channel, folder + b"/" + name)
                if target is None:
                    continue
                found = target
            if found.type in FILES and name not in (b".", b".."):
                files.append((name, found))
    return files


async def make_folder(fs: Any, folder: bytes) -> Sequence[bytes]:
    """Make a folder and those above it; returns the folders whose entries changed."""
    missing = []
    async with _channel(fs) as channel:
        while (found := await _attributes(channel, folder)) is None and folder not in (b"", b"/"):
            missing.append(folder)
            folder = folder.rpartition(b"/")[0] or b"/"
        if found is not None and found.type not in (*_UNRESOLVED, asyncssh.FILEXFER_TYPE_DIRECTORY):
            raise RefusedError(f"{folder.decode(errors='replace')} is not a folder")
        for path in reversed(missing):
            try:
                await channel.mkdir(path)
            except _TAKEN:
                if await _attributes(channel, path) is None:  # else another process was faster
                    raise
    return [path.rpartition(b"/")[0] or b"/" for path in missing]


async def unlink(fs: Any, path: bytes) -> None:
    """Delete a file."""
    async with _channel(fs) as channel:
        await channel.remove(path)


async def rename(fs: Any, old: bytes, new: bytes) -> None:
    """Rename a file. Raises FileExistsError if there is one of the new name, on servers that do as they should."""
    async with _channel(fs) as channel:
        try:
            await channel.rename(old, new)
        except _TAKEN:
            if await _attributes(channel, new, follow=False) is not None:
                raise FileExistsError(new) from None
            raise


async def replace(fs: Any, old: bytes, new: bytes) -> None:
    """Rename a file, in one step in place of the one that has the new name. Raises NoReplaceError."""
    async with _channel(fs) as channel:
        try:
            await channel.posix_rename(old, new)
        except asyncssh.SFTPOpUnsupported:
            if await _attributes(channel, new, follow=False) is not None:
                raise NoReplaceError(
                    "the server can't replace a file in one step (posix-rename@openssh.com): delete the old one first"
                ) from None
            await channel.rename(old, new)


async def sync(fs: Any, folder: bytes) -> bool:
    """Sync a folder's names to the server's disk; False where that can't be asked for."""
    try:
        async with _channel(fs) as channel, channel.open(folder, READ, encoding=None) as file:
            await file.fsync()
    except asyncssh.SFTPError as error:
        if is_lost(error):
            raise
        return False
    return True


async def space(fs: Any, folder: bytes) -> int | None:
    """Bytes that this user may still write; None where the server does not tell."""
    async with _channel(fs) as channel:
        try:
            found = await channel.statvfs(folder)
        except asyncssh.SFTPOpUnsupported:
            return None
    return found.bavail * (found.frsize or found.bsize)


async def contents(fs: Any, path: bytes) -> bytes:
    """All bytes of a small file."""
    found = b""
    async with _channel(fs) as channel, channel.open(path, READ, encoding=None, block_size=0) as file:
        more: bytes = await file.read(_SAFE_BLOCK)
        while more:
            found += more
            more = await file.read(_SAFE_BLOCK, len(found))
    return found


async def write_in_place(fs: Any, path: bytes, content: bytes) -> None:
    """Write a small file over the old one."""
    async with _channel(fs) as channel, channel.open(path, OVERWRITE, encoding=None, block_size=0) as file:
        await file.write(content, 0)


async def time_of_new_file(fs: Any, path: bytes) -> float:
    """The time, by the server's clock."""
    async with _channel(fs) as channel:
        async with channel.open(path, CREATE, encoding=None) as file:
            found = await file.stat()
        await channel.remove(path)
    return float(found.mtime or time.time())


async def try_renames(fs: Any, folder: bytes) -> Promises:
    """Try what a server promises, on files that are removed again."""
    first, second, target, link = (folder + b"/" + temporary_name(this_machine()).encode() for _ in range(4))
    async with _channel(fs) as channel:
        try:
            for path in (first, second):
                async with channel.open(path, CREATE, encoding=None) as file:
                    durable = await _done(file.fsync())
            await channel.rename(first, target)
            exclusive = not await _done(channel.rename(second, target))
            try:
                await channel.link(target, link)
            except asyncssh.SFTPOpUnsupported:
                pass  # not OpenSSH: what it does is what was seen
            except asyncssh.SFTPError:
                exclusive = False  # OpenSSH, where links can't be made, looks first and renames after
        finally:
            for path in (first, second, target, link):
                await _done(channel.remove(path))
    durable = await sync(fs, folder) and durable
    return Promises(create=exclusive, create_large=exclusive, update=None, durable=durable)


async def _done(request: Coroutine[Any, Any, object]) -> bool:
    """Whether the server does it."""
    try:
        await request
    except asyncssh.SFTPError as error:
        if is_lost(error):
            raise
        return False
    return True
