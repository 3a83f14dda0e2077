"""What is special about SFTP: names that are given by a rename, connections that break, a server on a disk."""

import asyncio
import contextlib
import gc
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from urllib.parse import urlsplit

import asyncssh
import pytest
import torch
from asyncssh.sftp import SFTPClientHandler
from servers import HOST, Sshd, filesystem

from seedvc_ckpt import CheckpointNotFoundError, CheckpointStore, LeaseHeldError, SaveFailedError, StorageError
from seedvc_ckpt.doctor import diagnose
from seedvc_ckpt.storage import open_storage, read_file
from seedvc_ckpt.storage.leftovers import process_start, this_machine
from seedvc_ckpt.storage.remote import Client, Redactor
from seedvc_ckpt.testing import StorageContract

_numbers = itertools.count(1)
MIB = 1 << 20
_SFTP_SERVER = "/usr/lib/openssh/sftp-server"


@pytest.fixture
def place(sshd):
    """A URL that no other test uses, and the folder on this machine's disk that it means."""
    url = sshd.url(f"sftp_{next(_numbers)}/run")
    return url, Path(urlsplit(url).path)


@pytest.fixture
def storage(sshd, place):
    """The storage there."""
    return open_storage(place[0], storage_options=sshd.options)


@pytest.fixture
def folder(place):
    """Its folder on this machine's disk."""
    return place[1]


@pytest.fixture
def line(sshd):
    """A line to the server, that can be made slow and bad."""
    with Line(sshd.port) as made:
        yield made


@pytest.fixture
def over_line(sshd, line, folder):
    """The storage, reached through the line."""
    url = sshd.url_for(str(folder.relative_to(urlsplit(sshd.url("")).path)), line.port)
    return open_storage(url, storage_options=sshd.options_for(line.port))


class Line:
    """A port whose connections are passed on to another.

    Attributes:
        port: Where it listens.
        loses: "up" or "down": what is sent that way next is lost, and the connection with it.
        refuses: Whether new connections are closed.
        rate: Bytes a second upwards; 0 for no limit.
    """

    def __init__(self, port):
        self.loses, self.refuses, self.rate = "", False, 0
        self.on_loss = lambda: None
        self._target = port
        self._sockets = []
        self._listener = socket.create_server((HOST, 0))
        self.port = self._listener.getsockname()[1]
        self._begin(self._accept)

    def cut(self):
        """Break all connections."""
        doomed, self._sockets = self._sockets, []  # not those that are made anew meanwhile
        for end in doomed:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.refuses = True
        self.cut()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _begin(self, work, *arguments):
        threading.Thread(target=work, args=arguments, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self.refuses:
                    client.close()
                    continue
                server = socket.create_connection((HOST, self._target))
                for end in (client, server):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    self._sockets.append(end)
                self._begin(self._pass_on, client, server, "up")
                self._begin(self._pass_on, server, client, "down")

    def _pass_on(self, source, target, way):
        with source, contextlib.suppress(OSError):
            while found := source.recv(16384):
                if self.loses == way:
                    self.loses = ""
                    self.on_loss()
                    self.cut()
                    return
                if self.rate and way == "up":
                    time.sleep(len(found) / self.rate)
                target.sendall(found)
            target.shutdown(socket.SHUT_WR)


def publish(storage, name="a", content=b"content", **options):
    return storage.publish(name, len(content), [memoryview(content)], **options)


def names(folder):
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def state(step):
    return {"net": {"weight": torch.full((1000,), float(step))}}


def lacks(monkeypatch, *requests):
    """Let the server be one without these extensions; the library raises the same without asking it."""

    async def unsupported(*_arguments):
        raise asyncssh.SFTPOpUnsupported("not supported")

    for request in requests:
        monkeypatch.setattr(SFTPClientHandler, request, unsupported)


class TestContract(StorageContract):
    """What every storage has to do."""

    @pytest.fixture
    def open_place(self, sshd, place):
        return lambda: open_storage(place[0], storage_options=sshd.options)


# --- the name, which makes the file appear ---------------------------------------------------------------------------


def test_what_is_not_complete_has_a_name_that_nobody_takes_for_a_checkpoint(sshd, place, storage, folder):
    """Until the last byte is written there is one temporary file, which no store lists; then it is gone."""
    store = CheckpointStore(place[0], storage_options=sshd.options)
    seen = []

    def look():
        seen.append(names(folder))
        assert store.list() == []

    publish(storage, "DiT_epoch_00000_step_00001.pth", before=look)
    assert len(seen) == 1
    (temporary,) = seen[0]
    assert temporary.startswith(".tmp-")
    assert temporary.endswith(f"-{os.getpid()}-{process_start(os.getpid())}-{this_machine()}")
    assert names(folder) == ["DiT_epoch_00000_step_00001.pth"]


class RecordingSshd(Sshd):
    """A server that writes down what it was asked to do, in `transcript`."""

    @property
    def transcript(self):
        return Path(self.folder, "transcript")

    @property
    def _subsystem(self):
        return f"{_SFTP_SERVER} -e -l VERBOSE 2>>{self.transcript}"


@pytest.mark.skipif(not os.path.exists(_SFTP_SERVER), reason=f"there is no {_SFTP_SERVER}: install openssh-sftp-server")
def test_a_save_is_synced_before_its_name_appears_and_so_is_the_folder_after_it(tmp_path):
    """By the server's own record: fsync of the file, then the rename, then fsync of the folder, before save returns."""
    if reason := Sshd.missing():
        pytest.skip(reason)
    with RecordingSshd(tmp_path) as server, CheckpointStore(server.url("run"), storage_options=server.options) as store:
        store.acquire()  # what the lease is synced for is not what is looked at
        before = len(server.transcript.read_text())
        info = store.save({"a": torch.zeros(10)}, 1)
        asked = server.transcript.read_text()[before:].splitlines()
    folder = urlsplit(server.url("run")).path
    (rename,) = (i for i, line in enumerate(asked) if "rename old" in line and line.endswith(f'/{info.name}"'))
    temporary = asked[rename].split('"')[1]
    written = [line for line in asked[:rename] if temporary in line]
    assert [line.split()[0] for line in written] == ["open", "fsync", "close", "stat"]
    assert f'fsync "{folder}"' in asked[rename:]


def test_a_name_that_was_taken_during_the_upload_is_left_alone(storage, folder):
    """The rename does not replace: another's file stays as it is, unless it is cleared away."""
    taken = []

    def take():
        if not taken:
            taken.append((folder / "a").write_bytes(b"another's"))

    with pytest.raises(FileExistsError):
        publish(storage, before=take)
    assert (folder / "a").read_bytes() == b"another's"
    assert names(folder) == ["a"]
    (folder / "a").unlink()
    taken.clear()

    def clear():
        (folder / "a").rename(folder / "b")
        return True

    publish(storage, before=take, cleared=clear)
    assert (folder / "a").read_bytes() == b"content"
    assert names(folder) == ["a", "b"]


def test_a_server_whose_rename_replaces_is_asked_before(storage, folder, monkeypatch):
    """There a name that was taken during the upload is left alone too, but for the moment in between."""

    async def replacing(self, old, new, _flags):
        await self.posix_rename(old, new)

    def chunks():
        yield memoryview(b"cont")
        (folder / "a").write_bytes(b"another's")
        yield memoryview(b"ent")

    monkeypatch.setattr(SFTPClientHandler, "rename", replacing)
    with pytest.raises(FileExistsError):
        storage.publish("a", 7, chunks())
    assert (folder / "a").read_bytes() == b"another's"


@pytest.mark.parametrize("kind", ["file", "folder", "dangling"])
def test_whatever_has_the_name_is_left_alone(kind, storage, folder):
    """Files, folders and links that lead nowhere count as taken."""
    folder.mkdir(parents=True)
    target = folder / "a"
    {"file": target.touch, "folder": target.mkdir, "dangling": lambda: target.symlink_to("nowhere")}[kind]()
    with pytest.raises(FileExistsError):
        publish(storage)
    assert names(folder) == ["a"]


def test_links_to_files_are_listed_and_others_are_not(storage, folder):
    """Links that lead nowhere or in a circle, folders and pipes are not files; names in any encoding are."""
    folder.mkdir(parents=True)
    (folder / "file").write_bytes(b"123")
    for name, target in (("link", "file"), ("dangling", "nowhere"), ("circle", "circle"), ("to folder", ".")):
        (folder / name).symlink_to(target)
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    odd = os.fsencode(folder) + b"/caf\xe9"
    Path(os.fsdecode(odd)).touch()
    listed = {entry.name: entry.stat().size for entry in storage.list()}
    assert listed == {"file": 3, "link": 3, os.fsdecode(b"caf\xe9"): 0}
    assert storage.stat(os.fsdecode(b"caf\xe9")).size == 0
    for name in ("pipe", "folder"):
        with pytest.raises(StorageError, match="not a file"):
            storage.open(name)


def test_a_file_where_the_folder_should_be_is_told(storage, folder):
    """Neither listing nor saving takes it for an empty run."""
    folder.parent.mkdir(parents=True)
    folder.touch()
    with pytest.raises(StorageError, match="not a folder"):
        list(storage.list())
    with pytest.raises(SaveFailedError, match="not a folder"):
        publish(storage)


# --- lost answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("way", ["up", "down"])
def test_a_rename_whose_answer_is_lost_is_settled(way, overwrite, over_line, line, folder):
    """Whether the request or the answer is lost with the connection, the file is published once, and alone."""
    publish(over_line, content=b"old") if overwrite else None
    lost = []

    def lose():
        if not lost:
            line.on_loss = lambda: (time.sleep(0.3), lost.append(names(folder)))
            line.loses = way

    found = publish(over_line, overwrite=overwrite, before=lose)
    assert len(lost) == 1
    assert lost[0][0].startswith(".tmp-") == (way == "up")
    assert (folder / "a").read_bytes() == b"content"
    assert names(folder) == ["a"]
    assert over_line.stat("a") == found


def test_a_server_that_died_between_link_and_removal_has_published(over_line, line, folder):
    """OpenSSH renames by a link and a removal: with both names there, the file is there, and the other name goes."""

    def link():
        (temporary,) = names(folder)
        os.link(folder / temporary, folder / "a")

    def lose():
        line.on_loss = link
        line.loses = "up"

    publish(over_line, before=lose)
    assert names(folder) == ["a"]
    assert (folder / "a").read_bytes() == b"content"


def test_a_name_that_another_took_while_the_answer_was_lost_is_left_alone(over_line, line, folder):
    """A file that is not ours, though as large, is nobody's success."""

    def lose():
        line.on_loss = lambda: ((folder / "a").write_bytes(b"tnetnoc"), os.utime(folder / "a", (1, 1)))
        line.loses = "up"

    with pytest.raises(FileExistsError):
        publish(over_line, before=lose)
    assert names(folder) == ["a"]
    assert (folder / "a").read_bytes() == b"tnetnoc"


def test_what_can_not_be_known_is_said_so(over_line, line, folder):
    """With the answer lost, and the line too, it is not a save that failed: the file may be there, as here."""

    def lose():
        line.on_loss = lambda: time.sleep(0.3)
        line.refuses, line.loses = True, "down"

    with pytest.raises(StorageError, match="not known") as caught:
        publish(over_line, before=lose)
    assert not isinstance(caught.value, SaveFailedError)
    assert names(folder) == ["a"]


def test_the_lease_is_asked_for_again_before_a_second_rename(over_line, line, folder):
    """What `before` raises stops the second attempt as it would the first."""
    calls = []

    def before():
        calls.append(1)
        if len(calls) > 1:
            raise LeaseHeldError("taken meanwhile")
        line.loses = "up"

    with pytest.raises(LeaseHeldError):
        publish(over_line, before=before)
    assert names(folder) == []


def test_small_files_recognise_their_own_write(over_line, line, folder):
    """A small file that is created is not taken for another's when the connection breaks at any moment."""
    over_line.put_small("first", b"1", create=True)
    for number in range(12):
        threading.Timer(number * 0.002, lambda: setattr(line, "loses", "down")).start()
        with contextlib.suppress(SaveFailedError, StorageError):
            over_line.put_small(f"{number}", b"%d" % number, create=True)
            assert (folder / f"{number}").read_bytes() == b"%d" % number
        time.sleep(0.03)
        line.loses = ""


def test_a_deletion_whose_answer_is_lost_is_looked_after(over_line, line, folder):
    """It is not made twice: a file that came in between would go."""
    publish(over_line)
    line.loses = "down"
    line.on_loss = lambda: time.sleep(0.2)
    over_line.delete("a")
    assert names(folder) == []
    publish(over_line)
    line.loses = "up"
    with pytest.raises(StorageError):
        over_line.delete("a")
    assert names(folder) == ["a"]


def test_a_move_whose_answer_is_lost_is_looked_after(over_line, line, folder):
    """Wherever the connection breaks, the file is in one of both places, whole and with its reason."""
    left = 0
    for number in range(12):
        publish(over_line)
        threading.Timer(number * 0.003, lambda: setattr(line, "loses", "down")).start()
        with contextlib.suppress(StorageError):
            over_line.set_aside("a", "why")
        time.sleep(0.05)
        line.loses = ""
        moved = [name for name in names(folder / "aside") if not name.endswith(".txt")]
        assert {f"{name}.reason.txt" for name in moved} <= set(names(folder / "aside"))
        places = [folder / name for name in names(folder) if name == "a"] + [folder / "aside" / name for name in moved]
        assert [path.read_bytes() for path in places] == [b"content"] * (number + 1 - left)
        if (folder / "a").exists():
            (folder / "a").unlink()
            left += 1


# --- servers that end ------------------------------------------------------------------------------------------------


def test_a_server_that_is_killed_during_an_upload(sshd, storage, folder):
    """Nothing is published; once it is back the same storage goes on, and the rest of the first upload is gone."""
    publish(storage, "old")

    def chunks():
        for number in range(30):
            if number == 20:
                sshd.kill()
            yield memoryview(bytes(MIB))

    with pytest.raises(SaveFailedError, match="connect"):
        storage.publish("a", 30 * MIB, chunks())
    old, temporary = names(folder)[::-1]
    assert (old, temporary[:5]) == ("old", ".tmp-")
    with pytest.raises(StorageError, match="connect"):
        list(storage.list())
    sshd.restart()
    assert [leftover.why for leftover in storage.leftovers()] == ["its save failed"]
    publish(storage)
    assert names(folder) == ["a", "old"]


def test_a_run_goes_on_when_its_server_is_restarted(sshd, place):
    """Saving, listing, reading and the lease use a new connection where the old one is gone."""
    with CheckpointStore(place[0], storage_options=sshd.options) as store:
        for step in range(1, 4):
            store.save(state(step), step)
            sshd.restart()
        assert [info.step for info in store.list()] == [1, 2, 3]
        assert torch.equal(store.load(store.latest())["net"]["weight"], state(3)["net"]["weight"])


def test_reading_goes_on_when_the_server_is_restarted(sshd, storage, folder):
    """A file that is open is opened again, by the first of many readers; one that was replaced is not."""
    content = os.urandom(20 * MIB)
    publish(storage, content=content)
    buffer = memoryview(bytearray(len(content)))
    with storage.open("a") as blob:
        blob.announce([(0, len(content))])
        blob.read_into(0, buffer[:100])
        sshd.restart()
        blob.read_into(0, buffer)
        assert buffer == content
        sshd.restart()
        assert read_file(storage, "a") == content
        (folder / "a").unlink()
        publish(storage, content=content[:-1])
        sshd.restart()
        for _ in range(2):
            with pytest.raises(CheckpointNotFoundError, match="replaced"):
                blob.read_into(0, buffer)


def test_many_threads_survive_a_restart_together(sshd, storage):
    """Each call that can be repeated is; no thread closes the connection that another has just made."""
    publish(storage, content=os.urandom(MIB))
    failures = []
    end = time.monotonic() + 3

    def work():
        while time.monotonic() < end:
            try:
                assert len(read_file(storage, "a")) == MIB
                assert storage.stat("a").size == MIB
            except Exception as error:
                failures.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        time.sleep(0.5)
        sshd.stop()
        sshd.start()
    for thread in threads:
        thread.join()
    assert all("connect" in failure for failure in failures), failures
    assert len(read_file(storage, "a")) == MIB


def test_a_connection_that_is_being_made_keeps_no_other_store_waiting():
    """Others ask for their filesystem on the loop that connects: with one lock for all, both would wait."""
    other = Client(object, "a key of another's", Redactor())

    async def use_other():
        return other.fs

    connecting = Client(lambda: connecting.run(use_other(), 5.0), "a key of ours", Redactor())
    assert connecting.fs is other.fs


def test_a_call_that_was_given_up_fails_in_silence(caplog):
    """What it raises when it is cancelled, such as that its connection is closed, is printed by nobody."""
    begun, ended = threading.Event(), threading.Event()

    async def interrupted():
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()
            raise OSError("connection closed")

    client = Client(object, "", Redactor())
    future = client.start(interrupted())
    assert begun.wait(10)
    future.cancel()
    assert ended.wait(10)
    client.run(asyncio.sleep(0.1))
    del future
    gc.collect()
    assert caplog.text == ""


# --- leftovers -------------------------------------------------------------------------------------------------------


def test_leftovers_of_dead_writers_are_collected(sshd, place, folder):
    """Files of processes of this boot that are gone, and of others after a day by the server's clock; in aside/ too.

    The name of the host proves nothing: another machine may have it, and its process live.
    """
    store = CheckpointStore(place[0], storage_options=sshd.options)
    (folder / "aside").mkdir(parents=True)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead = f".tmp-{'0' * 16}-{gone.pid}-1-{this_machine()}"
    alive = f".tmp-{'1' * 16}-{os.getpid()}-{process_start(os.getpid())}-{this_machine()}"
    same_host_name = f".tmp-{'2' * 16}-{gone.pid}-1-{os.uname().nodename}"
    foreign = f".tmp-{'3' * 16}-1-1-{'f' * 16}"
    old = f".tmp-{'4' * 16}-1-1-{'f' * 16}"
    linked = f".tmp-{'5' * 16}-{gone.pid}-1-{this_machine()}"
    for name in (dead, alive, same_host_name, foreign, old, f"aside/{dead}", "mine"):
        (folder / name).write_bytes(b"1234")
    (folder / linked).symlink_to("mine")
    os.utime(folder / old, (time.time() - 25 * 3600,) * 2)
    store.collect_garbage()
    assert names(folder) == sorted([alive, same_host_name, foreign, linked, "aside", "mine"])
    assert names(folder / "aside") == []


def test_a_writer_that_is_killed_leaves_what_the_next_one_removes(sshd, place, folder):
    """Its temporary file goes when the next writer takes the lease, which the dead one does not keep."""
    script = f"""
import os, signal, sys
from seedvc_ckpt.storage import open_storage
storage = open_storage({place[0]!r}, storage_options={sshd.options!r})
storage.lease()
def chunks():
    for number in range(10):
        yield memoryview(bytes(1 << 20))
    os.kill(os.getpid(), signal.SIGKILL)
storage.publish("a", 20 << 20, chunks())
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert len([name for name in names(folder) if name.startswith(".tmp-")]) == 1
    with CheckpointStore(place[0], storage_options=sshd.options) as store:
        store.save(state(1), 1)
        assert [name for name in names(folder) if name.startswith(".tmp-")] == []


# --- what servers can and can't do -----------------------------------------------------------------------------------


def test_what_openssh_promises_is_found_out(sshd, place, folder):
    """Two writers are kept apart, what is written is synced, and nothing is left of the probes."""
    with CheckpointStore(place[0], storage_options=sshd.options) as store:
        store.save(state(1), 1)
        assert diagnose(store) == []
        assert (folder / ".seedvc_ckpt.storage.json").read_bytes() == (
            b'{"create": true, "create_large": true, "update": null, "durable": true}\n'
        )
        assert [name for name in names(folder) if name.startswith(".tmp-")] == []


def test_a_server_that_can_not_sync_is_told_of(sshd, place, monkeypatch):
    """Saving works; the doctor says what a power cut may take."""
    lacks(monkeypatch, "fsync")
    with CheckpointStore(place[0], storage_options=sshd.options) as store:
        store.save(state(1), 1)
        (finding,) = diagnose(store)
        assert "sync" in finding.what


@pytest.mark.parametrize("request_", ["link", "rename"])
def test_a_server_that_can_not_keep_writers_apart_is_told_of(request_, sshd, place, monkeypatch, caplog):
    """Where a rename replaces, or links can't be made (then OpenSSH looks first and renames after)."""

    async def refused(*_arguments):
        raise asyncssh.SFTPFailure("Failure")

    async def replacing(self, old, new, _flags):
        await self.posix_rename(old, new)

    monkeypatch.setattr(SFTPClientHandler, request_, refused if request_ == "link" else replacing)
    with CheckpointStore(place[0], storage_options=sshd.options) as store:
        store.save(state(1), 1)
        assert "can't keep two writers apart" in caplog.text
        (finding,) = diagnose(store)
        assert "unsafe for two writers" in finding.what
        with pytest.raises(FileExistsError):
            publish(store.storage, store.latest().name)


def test_a_server_that_can_not_replace_keeps_leases_and_refuses_to_overwrite(sshd, place, monkeypatch, folder):
    """Overwriting would leave a moment, or a crash, without either file; the lease is renewed in its place."""
    lacks(monkeypatch, "posix_rename")
    storage = open_storage(place[0], storage_options=sshd.options, lease_seconds=0.4)
    lease = storage.lease()
    (name,) = (name for name in names(folder) if ".lease." in name)
    before = (folder / name).read_bytes()
    time.sleep(0.5)
    lease.check()
    assert (folder / name).read_bytes() != before
    publish(storage, overwrite=True)
    with pytest.raises(SaveFailedError, match="posix-rename"):
        publish(storage, content=b"new", overwrite=True)
    assert (folder / "a").read_bytes() == b"content"
    lease.close()
    assert [name for name in names(folder) if name.startswith(".tmp-")] == []


def test_blocks_suit_servers_that_do_not_tell_what_they_take(sshd, place, monkeypatch):
    """Without limits@openssh.com requests are small, and files right; with it chunks of any size are."""
    content = os.urandom(9 * MIB + 5)
    pieces = [content[:1], b"", content[1 : 7 * MIB], content[7 * MIB : 7 * MIB + 3], content[7 * MIB + 3 :]]
    sizes = []
    write = SFTPClientHandler.write

    async def measured(self, handle, offset, data):
        sizes.append(len(data))
        return await write(self, handle, offset, data)

    monkeypatch.setattr(SFTPClientHandler, "write", measured)
    for limits, largest in ((True, 240 << 10), (False, 32 << 10)):
        if not limits:

            async def unknown(_self):
                return

            monkeypatch.setattr(SFTPClientHandler, "request_limits", unknown)
        options = {**sshd.options, "login_timeout": f"{100 + limits}s"}  # a connection of its own
        storage = open_storage(place[0], storage_options=options)
        storage.publish("a", len(content), map(memoryview, pieces), overwrite=True)
        assert read_file(storage, "a") == content
        assert max(sizes) == largest
        sizes.clear()


def test_what_does_not_fit_is_told_before_anything_is_written(storage, folder):
    """The error has the numbers."""
    folder.mkdir(parents=True)
    free = storage.free()
    with pytest.raises(SaveFailedError, match="no room") as caught:
        storage.publish("a", free * 2, [])
    assert caught.value.needed == free * 2
    assert abs(caught.value.free - free) < 1 << 30
    assert names(folder) == []


def test_a_full_disk_leaves_nothing(storage, folder, monkeypatch):
    """A server that runs out of space says no more than "Failure"; the numbers help."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs to mount a small file system")
    try:
        publish(storage, "old")
        space = storage.free
        monkeypatch.setattr(storage, "free", lambda: None)

        def chunks():
            for _ in range(16):
                yield memoryview(bytes(MIB))
            monkeypatch.setattr(storage, "free", space)

        with pytest.raises(SaveFailedError, match="full disk") as caught:
            storage.publish("a", 16 * MIB, chunks())
        assert caught.value.needed == 16 * MIB
        assert names(folder) == ["old"]
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


# --- connections -----------------------------------------------------------------------------------------------------


def test_a_filesystem_of_ones_own_is_used_and_left_open(sshd, place):
    """It serves as a URL would, and goes on serving its owner; when its connection is lost, the owner is asked."""
    fs, path = filesystem(place[0], sshd.options)
    with CheckpointStore(path, fs=fs) as store:
        store.save(state(1), 1)
        assert [info.step for info in store.list()] == [1]
        storage = store.storage
    publish(storage)
    assert fs.cat_file(f"{path}/a") == b"content"
    sshd.restart()
    with pytest.raises(StorageError, match="only who made it"):
        storage.stat("a")
    with pytest.raises(SaveFailedError, match="only who made it"):
        publish(storage, "b")


def test_a_filesystem_made_before_a_fork_is_refused_after_it(sshd, place):
    """The child would talk into its parent's connection."""
    fs, path = filesystem(place[0], sshd.options)
    storage = open_storage(path, fs=fs)
    publish(storage)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            storage.stat("a")
        except StorageError as error:
            code = 0 if "forked" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert storage.stat("a").size == 7


def test_handles_are_closed(sshd, storage):
    """A server has few: after many files were read and written, also by failures, none is open."""
    publish(storage, content=bytes(MIB))

    for number in range(200):
        with storage.open("a") as blob:
            blob.read_into(0, memoryview(bytearray(10)))
            blob.announce([(0, MIB)])
        with contextlib.suppress(SaveFailedError):
            storage.publish(f"{number}", 5, [])
    end = time.monotonic() + 10
    while opened(sshd) and time.monotonic() < end:
        time.sleep(0.05)
    assert opened(sshd) == []


def opened(sshd):
    """The files in its bucket that any process of the server has open."""
    bucket = urlsplit(sshd.url("")).path
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(link).startswith(bucket) and int(link.parts[2]) != os.getpid():
                found.append(os.readlink(link))
    return found


def test_a_slow_line_leaves_room_for_the_lease(over_line, line):
    """While a large file goes over a slow line, small requests are answered in seconds, not when it is there."""
    publish(over_line, "small")
    line.rate = 1_000_000
    took = []
    stop = threading.Event()

    def renew():
        while not stop.wait(0.5):
            begun = time.monotonic()
            over_line.put_small("lease", b"mine", create=False)
            took.append(time.monotonic() - begun)

    renewer = threading.Thread(target=renew)
    renewer.start()
    publish(over_line, "large", os.urandom(8 * MIB))
    line.rate = 0
    stop.set()
    renewer.join()
    assert len(took) >= 2
    assert max(took) < 6, took


def test_no_secret_is_told(sshd, place, caplog):
    """Neither errors with all that led to them nor the log have the password or the key's passphrase."""
    host = urlsplit(place[0]).netloc
    url = place[0].replace(host, f"someone:hunter2hunter2@{host}")
    options = {"known_hosts": None, "passphrase": "correct horse", "client_keys": [], "agent_path": None}
    storage = open_storage(url, storage_options=options)
    told = caplog.text + storage.location + repr(storage)
    for call in (lambda: publish(storage), lambda: list(storage.list()), storage.lease):
        with pytest.raises((SaveFailedError, StorageError), match="permissions") as caught:
            call()
        told += "".join(traceback.format_exception(caught.value))
    assert "hunter2hunter2" not in told
    assert "correct horse" not in told
    assert "Traceback" in told
