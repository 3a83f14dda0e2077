"""Objects in memory: the same promises through fsspec."""

from itertools import count

import fsspec
import pytest

from seedvc_ckpt import CheckpointNotFoundError, CheckpointStore, CorruptCheckpointError, SaveFailedError
from seedvc_ckpt.storage import open_storage

_numbers = count()


@pytest.fixture
def storage():
    return open_storage(f"memory://storage-{next(_numbers)}/run")


def publish(storage, name="a", content=b"content", **options):
    return storage.publish(name, len(content), [memoryview(content)], **options)


def read(storage, name):
    with storage.open(name) as blob:
        buffer = bytearray(blob.size)
        blob.read_into(0, memoryview(buffer))
        return bytes(buffer)


def names(storage):
    return sorted(entry.name for entry in storage.list())


def test_objects_are_published_whole_under_their_name(storage):
    """A name holds all of its bytes, is not replaced unless asked, and is listed with size and time."""
    found = publish(storage)
    assert (read(storage, "a"), storage.stat("a"), names(storage)) == (b"content", found, ["a"])
    with pytest.raises(FileExistsError):
        publish(storage, content=b"other")
    assert read(storage, "a") == b"content"
    publish(storage, content=b"other", overwrite=True)
    assert read(storage, "a") == b"other"


def test_a_wrong_length_publishes_nothing(storage):
    """Bytes that don't add up, or stop half-way, leave no object."""

    def broken():
        yield memoryview(b"abc")
        raise ValueError("stopped")

    with pytest.raises(SaveFailedError, match="announced"):
        storage.publish("a", 7, [memoryview(b"short")])
    with pytest.raises(ValueError, match="stopped"):
        storage.publish("a", 7, broken())
    assert names(storage) == []


def test_only_direct_objects_are_listed(storage):
    """Folders, objects in them, and neighbours whose name begins alike are not in the listing."""
    publish(storage)
    publish(open_storage(f"{storage.location}/deeper"))
    publish(open_storage(f"{storage.location}2"), "b")
    assert names(storage) == ["a"]
    assert names(open_storage(f"{storage.location}/nothing")) == []
    assert names(open_storage(f"{storage.location}/a")) == []


@pytest.mark.parametrize("name", ["[x]*?#%", "a b", "a::b", "~", "Ж模", "a&b=c", "50%25"])
def test_names_are_never_patterns(name, storage):
    """Globs, percent signs and colons in names are only characters."""
    publish(storage, "other")
    publish(storage, name)
    assert names(storage) == sorted([name, "other"])
    assert storage.set_aside(name, "why") == f"aside/{name}"
    assert names(storage) == ["other"]


def test_absent_objects_are_told_apart(storage):
    """An object that is gone is not found: by stat, open, delete and set_aside."""
    assert storage.stat("a") is None
    with pytest.raises(CheckpointNotFoundError):
        storage.open("a")
    with pytest.raises(FileNotFoundError):
        storage.delete("a")
    with pytest.raises(FileNotFoundError):
        storage.set_aside("a", "why")
    publish(storage)
    storage.delete("a")
    assert storage.stat("a") is None


def test_setting_aside_never_replaces(storage):
    """The same name set aside again gets a number; each has its own reason."""
    for number in range(3):
        publish(storage, content=b"%d" % number)
        assert storage.set_aside("a", f"why {number}") == "aside/a" + (f".{number}" if number else "")
    aside = open_storage(f"{storage.location}/aside")
    assert [read(aside, name) for name in ("a", "a.1", "a.2", "a.2.reason.txt")] == [b"0", b"1", b"2", b"why 2\n"]


def test_reading_past_the_end_is_damage(storage):
    """An object shorter than it should be is corrupt, not padded."""
    publish(storage)
    with storage.open("a") as blob, pytest.raises(CorruptCheckpointError, match="ends at byte 7"):
        blob.read_into(5, memoryview(bytearray(5)))


def test_a_filesystem_can_be_given(state):
    """`fs=` is used as it is: in memory, or another that fsspec has."""
    fs = fsspec.filesystem("memory")
    CheckpointStore("given/run", fs=fs).save(state(3), 3)
    assert CheckpointStore("memory://given/run").latest().step == 3
    assert fs.ls("/given/run", detail=False) == ["/given/run/DiT_epoch_00000_step_00003.pth"]
    inside = fsspec.filesystem("dir", path="/given", fs=fs)
    assert CheckpointStore("run", fs=inside).latest().step == 3
    with CheckpointStore("other", fs=inside) as store:
        store.save(state(4), 4)
    assert CheckpointStore("memory://given/other").load(4)["iters"] == 4


def test_the_local_filesystem_is_a_folder(run, state):
    """Fsspec's local filesystem and file:// are the same folder as its path."""
    CheckpointStore(str(run), fs=fsspec.filesystem("file")).save(state(3), 3)
    assert CheckpointStore(f"file://{run}").latest() == CheckpointStore(run).latest() is not None
