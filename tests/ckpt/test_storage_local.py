"""A local folder: published whole, durable, and nobody's links followed."""

import errno
import itertools
import multiprocessing
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import warnings

import pytest
import torch

from seedvc_ckpt import (
    SEED_VC,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CheckpointStore,
    LeaseHeldError,
    SaveFailedError,
    StorageError,
    keep_last,
)
from seedvc_ckpt.storage import local, open_parent, open_storage
from seedvc_ckpt.storage.lease import LOCK_NAME
from seedvc_ckpt.storage.local import LocalStorage, temporary_name


def publish(folder, name="a.pth", content=b"content", **options):
    return LocalStorage(str(folder)).publish(name, len(content), [memoryview(content)], **options)


def files(folder):
    return sorted(name for name in os.listdir(folder) if name != LOCK_NAME) if os.path.isdir(folder) else []


# --- what publish promises ------------------------------------------------------------------------------------------


def test_publishing_makes_folders_and_one_file(run):
    """The file is there, complete, alone, in folders made on the way."""
    found = publish(run / "deep" / "er")
    assert files(run / "deep" / "er") == ["a.pth"]
    assert (run / "deep" / "er" / "a.pth").read_bytes() == b"content"
    assert (found.size, found.modified.utcoffset().total_seconds()) == (7, 0)
    assert LocalStorage(str(run / "deep" / "er")).stat("a.pth") == found


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_umask_decides_who_may_read(mask, run):
    """Files have the permissions that any new file of this user has."""
    before = os.umask(mask)
    try:
        publish(run)
    finally:
        os.umask(before)
    assert stat.S_IMODE((run / "a.pth").stat().st_mode) == 0o666 & ~mask


def test_taken_names_are_left_as_they_are(run):
    """Without overwrite an existing file, folder or dangling link stays, and no temporary file is left."""
    run.mkdir()
    (run / "file").write_text("old")
    (run / "folder").mkdir()
    (run / "dangling").symlink_to("nowhere")
    (run / "link").symlink_to("file")
    before = files(run)
    for name in before:
        with pytest.raises(FileExistsError):
            publish(run, name)
    assert files(run) == before
    assert (run / "file").read_text() == "old"


def test_a_link_whose_answer_was_lost_is_our_own(run, monkeypatch):
    """Where a repeated link says that the name is taken, and it is by the very file, the publish has succeeded."""
    link = os.link

    def link_twice(source, target):
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", link_twice)
    publish(run)
    assert files(run) == ["a.pth"]


def test_planted_links_are_replaced_never_followed(run, tmp_path):
    """With overwrite a link is replaced itself; what it points to is not written."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    run.mkdir()
    (run / "a.pth").symlink_to(victim)
    publish(run, overwrite=True)
    assert victim.read_text() == "precious"
    assert not (run / "a.pth").is_symlink()


@pytest.mark.parametrize("plant", [os.symlink, os.link])
def test_temporary_files_are_made_new(plant, run, monkeypatch):
    """A link or file planted under the temporary name makes the save fail and is not written to (O_EXCL)."""
    victim = run.parent / "victim"
    victim.write_text("precious")
    run.mkdir()
    plant(victim, run / ".tmp-planted")
    monkeypatch.setattr("seedvc_ckpt.storage.local.temporary_name", lambda: ".tmp-planted")
    with pytest.raises(SaveFailedError):
        publish(run)
    assert victim.read_text() == "precious"
    assert files(run) == [".tmp-planted"]


def test_temporary_names_cannot_be_guessed_or_listed():
    """Each temporary name is new, hidden, and no checkpoint's."""
    names = {temporary_name() for _ in range(100)}
    assert len(names) == 100
    assert all(name.startswith(".tmp-") and str(os.getpid()) in name and len(name) < 200 for name in names)
    assert not any(SEED_VC.parse(name) for name in names)


@pytest.mark.parametrize(
    ("chunks", "kind"),
    [([b"short"], SaveFailedError), ([b"much too", b" long"], SaveFailedError), ([], SaveFailedError)],
)
def test_a_wrong_length_publishes_nothing(chunks, kind, run):
    """Bytes that don't add up to the size announced are no file."""
    with pytest.raises(kind, match="announced"):
        LocalStorage(str(run)).publish("a.pth", 7, map(memoryview, chunks))
    assert files(run) == []


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), MemoryError(), OSError(errno.EIO, "I/O")])
def test_an_interrupted_publish_leaves_nothing(error, run):
    """Whatever stops the bytes half-way, no file is left, neither under the name nor a temporary one."""

    def chunks():
        yield memoryview(b"abc")
        raise error

    with pytest.raises(SaveFailedError if isinstance(error, OSError) else type(error)):
        LocalStorage(str(run)).publish("a.pth", 7, chunks())
    assert files(run) == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    """A file where a folder is needed makes the publish fail as a whole."""
    (tmp_path / "file").touch()
    for folder in ("file", "file/deeper"):
        with pytest.raises(SaveFailedError, match="nothing was published"):
            publish(tmp_path / folder)
    with pytest.raises(SaveFailedError):
        publish(tmp_path / "run", "x" * 300)


def test_everything_is_synced_in_order(run, tmp_path):
    """The file is synced before it gets its name, its folder after; new folders are synced into theirs."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    trace = tmp_path / "trace"
    code = f"from seedvc_ckpt.storage.local import LocalStorage as L; L({str(run / 'sub')!r}).publish('a', 1, [b'x'])"
    calls = "trace=openat,fsync,link,linkat,write,rename,unlink"
    subprocess.run(["strace", "-y", "-e", calls, "-o", trace, sys.executable, "-c", code], check=False)
    if not trace.exists() or "fsync" not in trace.read_text():
        pytest.skip("strace may not trace here")
    place = re.escape(str(run / "sub"))
    events = []
    for line in trace.read_text().splitlines():
        if re.match(rf"write\(\d+<{place}/\.tmp", line):
            events.append("write")
        elif re.match(rf"fsync\(\d+<{place}/\.tmp", line):
            events.append("sync file")
        elif line.startswith("link"):
            events.append("name")
        elif found := re.match(r"fsync\(\d+<([^>]*)>", line):
            events.append(os.path.relpath(found[1], tmp_path))
    assert events == ["write", "sync file", "name", "run/sub", "run", "."]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of half a megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=512k", "none", place], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("file systems can't be mounted here")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_is_found_before_writing(small_disk, state, snapshot):
    """A save larger than the room left says what it needs and what is free; everything is as it was."""
    store = CheckpointStore(small_disk / "run", retention=keep_last(1))
    store.save(state(1), 1)
    before = snapshot(small_disk)
    with pytest.raises(SaveFailedError) as caught:
        store.save({"x": torch.zeros(200_000)}, 2)
    assert caught.value.needed > 800_000 > 512 * 1024 > caught.value.free > 0
    assert f"{caught.value.needed:,}" in str(caught.value)
    assert snapshot(small_disk) == before
    store.save(state(2), 2)
    store.close()


def test_a_disk_that_fills_during_the_save(small_disk, state, snapshot):
    """Running out of room half-way (real ENOSPC) leaves no temporary file and every older checkpoint."""
    store = CheckpointStore(small_disk / "run")
    store.save(state(1), 1)
    before = snapshot(small_disk)

    def chunks():
        yield memoryview(bytes(100_000))
        (small_disk / "other").write_bytes(bytes(380_000))  # somebody else's file, meanwhile
        yield memoryview(bytes(200_000))

    with pytest.raises(SaveFailedError, match="No space left") as caught:
        LocalStorage(str(small_disk / "run")).publish(SEED_VC.format(2), 300_000, chunks())
    assert (caught.value.needed, caught.value.free < 300_000) == (300_000, True)
    (small_disk / "other").unlink()
    after = snapshot(small_disk)
    assert after.pop("run")[0] == before.pop("run")[0]  # its time has changed
    assert after == before
    store.verify(1)
    store.close()


def test_disks_that_refuse_to_sync_fail_the_save(run, monkeypatch, state):
    """A folder whose sync fails may lose the name at a power cut: it is taken back, the save has failed."""
    store = CheckpointStore(run)
    store.save(state(1), 1)
    sync = os.fsync

    def failing(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(SaveFailedError):
        store.save(state(2), 2)
    monkeypatch.undo()
    assert files(run) == [SEED_VC.format(1)]


@pytest.mark.parametrize("error", [errno.EPERM, errno.EOPNOTSUPP])
def test_file_systems_without_hard_links(error, run, monkeypatch):
    """Where links are refused the file is renamed into place, and a taken name is still refused."""

    def refuse(*_arguments, **_options):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "link", refuse)
    publish(run)
    with pytest.raises(FileExistsError):
        publish(run, content=b"other")
    assert files(run) == ["a.pth"]
    assert (run / "a.pth").read_bytes() == b"content"


# --- several processes ----------------------------------------------------------------------------------------------


def save_at_once(folder, barrier, results, number):
    store = CheckpointStore(folder)
    for step in range(20):
        barrier.wait()
        try:
            store.save({"x": torch.full((2000,), number)}, step)
            results.put((step, number))
        except (CheckpointExistsError, LeaseHeldError):
            results.put((step, None))


def test_of_two_writers_of_one_step_one_wins(run):
    """Two processes save the same step at the same time, 20 times: one succeeds, the other is told who has the run."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    both = [context.Process(target=save_at_once, args=(str(run), barrier, results, number)) for number in (1, 2)]
    for process in both:
        process.start()
    answers = [results.get(timeout=60) for _ in range(40)]
    for process in both:
        process.join(60)
    store = CheckpointStore(run)
    for step in range(20):
        winners = [number for at, number in answers if at == step and number]
        assert len(winners) == 1
        assert store.load(step)["x"][0] == winners[0]
    assert len(files(run)) == 20


SAVER = """
import sys, torch
import seedvc_ckpt.format.torchzip, seedvc_ckpt.manifest, seedvc_ckpt.storage.lease
from seedvc_ckpt import CheckpointStore, keep_last
store = CheckpointStore(sys.argv[1], retention=keep_last(3))
step = (store.latest().step if store.latest() else 0) + 1
print("ready", flush=True)
while True:
    store.save({"x": torch.full((300_000,), step)}, step)
    step += 1
"""


def test_a_killed_save_leaves_complete_files_only(run):
    """Killed at any moment of saving: what is listed verifies, the newest never goes back, the next save works."""
    chance, newest, left = random.Random(5), 0, 0
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", SAVER, str(run)], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.02 + 0.08 * chance.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        store = CheckpointStore(run)
        for info in store.list():
            store.verify(info)
            assert store.load(info)["x"].unique().tolist() == [info.step]
        assert store.latest() is None or store.latest().step >= newest
        newest = store.latest().step if store.latest() else newest
        left += sum(name.startswith(".tmp-") for name in files(run))
    assert newest > 0
    assert left > 0, "no kill hit a save: the test has shown nothing"
    store.save({"x": torch.zeros(1)}, newest + 1, verify=True)


# --- reading, deleting, setting aside -------------------------------------------------------------------------------


def test_opening_tells_absent_from_unreadable(run):
    """No file is not found; a folder or a pipe is a storage error, and a pipe is not waited for."""
    run.mkdir()
    (run / "folder").mkdir()
    os.mkfifo(run / "pipe")
    storage = LocalStorage(str(run))
    with pytest.raises(CheckpointNotFoundError):
        storage.open("nothing")
    for name in ("folder", "pipe"):
        with pytest.raises(StorageError, match="not a file"):
            storage.open(name)
    with pytest.raises(StorageError):
        storage.open("x" * 300)
    with pytest.raises(StorageError):
        storage.stat("x" * 300)


def test_deleting_tells_absent_from_refused(run):
    """A file that is gone is FileNotFoundError; one that can't be deleted is a StorageError."""
    publish(run)
    (run / "folder").mkdir()
    storage = LocalStorage(str(run))
    storage.delete("a.pth")
    with pytest.raises(FileNotFoundError):
        storage.delete("a.pth")
    with pytest.raises(StorageError):
        storage.delete("folder")


def test_setting_aside_never_replaces(run):
    """The same name set aside again gets a number; each has its own reason."""
    storage = LocalStorage(str(run))
    for number in range(3):
        publish(run, content=b"%d" % number)
        assert storage.set_aside("a.pth", f"why {number}") == "aside/a.pth" + (f".{number}" if number else "")
    assert [(run / "aside" / f"a.pth{end}").read_bytes() for end in ("", ".1", ".2")] == [b"0", b"1", b"2"]
    assert (run / "aside" / "a.pth.2.reason.txt").read_text() == "why 2\n"
    assert files(run) == ["aside"]


def test_setting_aside_where_it_cannot_be_done(run):
    """A file in place of aside/ is a storage error, and the checkpoint stays."""
    publish(run)
    (run / "aside").touch()
    with pytest.raises(StorageError, match="aside"):
        LocalStorage(str(run)).set_aside("a.pth", "why")
    assert files(run) == ["a.pth", "aside"]


@pytest.mark.parametrize(
    ("location", "folder", "name"),
    [
        ("a.pth", ".", "a.pth"),
        ("run/a.pth", "run/", "a.pth"),
        ("/a.pth", "/", "a.pth"),
        ("x:/a", "x:/", "a"),
        ("memory://run/a.pth", "memory://run/", "a.pth"),
        ("file:///run/a.pth", "/run/", "a.pth"),
    ],
)
def test_a_file_is_in_the_folder_that_its_path_says(location, folder, name):
    """Paths and URLs of files are split at the last slash; only scheme:// is a URL."""
    storage, found = open_parent(location)
    assert (storage.location, found) == (folder, name)


@pytest.mark.parametrize("location", ["run/", "run/..", "run/.", ".", "", "memory://run/"])
def test_a_folder_is_no_file(location):
    """Where a file is meant, a path that can only be a folder is refused."""
    with pytest.raises(StorageError):
        open_parent(location)


@pytest.mark.parametrize("location", ["file://", "memory:/run", "a::b", "http:", "C:\\run"])
def test_only_a_scheme_and_two_slashes_make_a_url(location, tmp_path, monkeypatch):
    """Everything else is a path as it stands; a URL without a path is refused."""
    monkeypatch.chdir(tmp_path)
    if location == "file://":
        with pytest.raises(StorageError):
            open_storage(location)
        return
    open_storage(location).publish("a", 1, [memoryview(b"a")])
    assert (tmp_path / location / "a").is_file()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="there is no /proc")
def test_a_forked_child_does_not_hold_the_file(run):
    """A process forked during a save keeps neither the file's blocks nor its lock."""
    found = []

    def chunks():
        yield memoryview(b"half")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            opened = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
            os._exit(any(".tmp-" in path for path in opened))
        found.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        yield memoryview(b"half")

    LocalStorage(str(run)).publish("a.pth", 8, chunks())
    assert found == [0]
    assert (run / "a.pth").read_bytes() == b"halfhalf"


def test_the_disk_begins_before_the_end(run, monkeypatch):
    """Every 32 MB the kernel is asked to write back what came since, gapless; the file is as it was given."""
    asked, ask = [], local._begin_write_back

    def noting(descriptor, start, size):
        asked.append((start, size))
        ask(descriptor, start, size)

    monkeypatch.setattr(local, "_begin_write_back", noting)
    chunks = [os.urandom(70 << 20), b"x", os.urandom(30 << 20)]
    LocalStorage(str(run)).publish("a.pth", sum(map(len, chunks)), map(memoryview, chunks))
    assert (run / "a.pth").read_bytes() == b"".join(chunks)
    assert len(asked) == 3
    assert all(size >= 32 << 20 for _, size in asked)
    assert [start for start, _ in asked] == [0, *itertools.accumulate(size for _, size in asked[:-1])]
