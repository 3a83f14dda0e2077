"""A storage that fails on purpose fails as a real one does."""

from itertools import count

import pytest

from seedvc_ckpt import CheckpointNotFoundError, CheckpointStore, SaveFailedError, StorageError
from seedvc_ckpt.storage import open_storage
from seedvc_ckpt.testing import FaultyStorage

_numbers = count()


@pytest.fixture(params=["local", "memory"])
def inner(request, tmp_path):
    return open_storage(tmp_path / "run" if request.param == "local" else f"memory://testing-{next(_numbers)}/run")


def publish(storage, name="a", content=b"content", **options):
    return storage.publish(name, len(content), iter([memoryview(content)]), **options)


def names(storage):
    """What is there, the lock file left out."""
    return sorted(entry.name for entry in storage.list() if not entry.name.startswith("."))


def failing(inner, operation, fault):
    return FaultyStorage(inner, lambda call: fault if call.operation == operation else None)


def test_without_faults_it_is_the_storage_inside(inner):
    """Calls that pass have the effect and the answer of the storage around which it is."""
    storage = FaultyStorage(inner, lambda call: None)
    assert publish(storage) == inner.stat("a") == storage.stat("a")
    with storage.open("a") as blob:
        buffer = bytearray(blob.size)
        blob.read_into(0, memoryview(buffer))
        mapped = blob.map()
    assert bytes(buffer) == b"content"
    assert mapped is None or bytes(mapped) == b"content"
    storage.lease().release()
    assert (storage.location, storage.holder(), storage.leftovers()) == (inner.location, "", inner.leftovers())
    assert (storage.free() is None) == (inner.free() is None)
    assert storage.examine() == inner.examine()
    assert storage.set_aside("a", "why") == "aside/a"
    publish(storage)
    storage.delete("a")
    assert names(storage) == []
    with pytest.raises(CheckpointNotFoundError):
        storage.open("a")
    with pytest.raises(FileNotFoundError):
        storage.delete("a")


@pytest.mark.parametrize("fault", ["before", "midway"])
def test_a_publish_that_fails_changes_nothing(inner, fault):
    """With the error that says so; what was there under the name stays."""
    storage = failing(inner, "publish", fault)
    with pytest.raises(SaveFailedError, match="on purpose") as caught:
        publish(storage)
    assert (names(inner), caught.value.needed) == ([], 7)
    found = publish(inner)
    with pytest.raises(SaveFailedError):
        publish(storage, content=b"other", overwrite=True)
    assert inner.stat("a") == found


def test_a_publish_can_lose_its_answer(inner):
    """Then the file is there, and the error is not the one that says that nothing has changed."""
    with pytest.raises(StorageError):
        publish(failing(inner, "publish", "after"))
    assert names(inner) == ["a"]


@pytest.mark.parametrize("operation", ["delete", "set_aside"])
def test_a_change_fails_before_or_after_it_is_made(inner, operation):
    """Before and midway the file is still there, after it is not."""

    def change(fault):
        storage = failing(inner, operation, fault)
        with pytest.raises(StorageError, match=f"on purpose: {operation} of a"):
            storage.delete("a") if operation == "delete" else storage.set_aside("a", "why")
        return names(inner)

    publish(inner)
    assert [change("before"), change("midway"), change("after")] == [["a"], ["a"], []]


@pytest.mark.parametrize("fault", ["before", "midway", "after"])
def test_reading_fails_as_a_storage_error(inner, fault):
    """Listing, looking, opening and reading: never a silent None, nothing left out without an error."""
    for name in "abcd":
        publish(inner, name)
    listed = []
    with pytest.raises(StorageError):
        listed.extend(entry.name for entry in failing(inner, "list", fault).list())
    calls = {
        "stat": lambda storage: storage.stat("a"),
        "open": lambda storage: storage.open("a"),
        "lease": lambda storage: storage.lease(),
    }
    for operation in ("stat", "open", "lease"):
        with pytest.raises(StorageError, match=operation):
            calls[operation](failing(inner, operation, fault))
    with failing(inner, "read", fault).open("a") as blob, pytest.raises(StorageError, match="read"):
        blob.read_into(0, memoryview(bytearray(2)))
    with failing(inner, "map", fault).open("a") as blob, pytest.raises(StorageError, match="map"):
        blob.map()
    with pytest.raises(StorageError, match="stat"):
        [entry.stat() for entry in failing(inner, "stat", fault).list()]
    assert inner.holder() == ""


def test_the_calls_are_told_in_order(inner):
    """Each with its number, operation and file, so that any single one can be made to fail."""
    calls = []
    storage = FaultyStorage(inner, calls.append)
    publish(storage)
    storage.stat("b")
    assert [(call.number, call.operation, call.name) for call in calls] == [(0, "publish", "a"), (1, "stat", "b")]


def test_a_store_works_on_it(inner):
    """A save on it that fails leaves the older checkpoint, and the next one succeeds."""
    full = []
    storage = FaultyStorage(inner, lambda call: full.pop() if full and call.operation == "publish" else None)
    with CheckpointStore(storage) as store:
        store.save({"n": 1}, 1)
        full.append("midway")
        with pytest.raises(SaveFailedError):
            store.save({"n": 2}, 2)
        assert store.load() == {"n": 1}
        store.save({"n": 2}, 2)
        assert store.load() == {"n": 2}
