"""What every storage has to do, as tests to run on one's own.

::

    class TestMyStorage(StorageContract):
        @pytest.fixture
        def open_place(self):
            place = f"s3://my-bucket/{uuid.uuid4()}"
            return lambda: open_storage(place, storage_options={…})
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from seedvc_ckpt.errors import CheckpointNotFoundError, CorruptCheckpointError, SaveFailedError, StorageError
from seedvc_ckpt.storage import Readable, Stat, Storage, read_file

__all__ = ["StorageContract"]

_SMALL = 1000
_LARGE = 40 << 20  # more than one part of an upload


class StorageContract:
    """Tests for pytest: a subclass gives the fixture `open_place`.

    `open_place` is a function that opens a storage on one place, which is new and empty for each test. Called twice it
    gives two storages on the same place.

    Attributes:
        exclusive: Whether the place refuses a name that is taken, of several at once all but one.
        fork: Whether a forked child may use it.
        clears: Whether `cleared` is asked where a name is taken; no lease of a local folder can be stale.
    """

    exclusive = True
    fork = True
    clears = True

    def test_a_new_place_is_empty(self, open_place: _Open) -> None:
        """There is nothing in it, and nothing to open, delete or set aside."""
        storage = open_place()
        assert list(storage.list()) == []
        assert storage.stat("a") is None
        for act in (lambda: storage.open("a"), lambda: storage.set_aside("a", "why")):
            assert isinstance(_raised(act), FileNotFoundError)
        assert list(storage.leftovers()) == []

    def test_what_is_published_is_there_whole(self, open_place: _Open) -> None:
        """Empty, small and large files have all their bytes, size and time, for whoever opens the place."""
        for name, size in (("empty", 0), ("small", _SMALL), ("large", _LARGE)):
            content = _content(size)
            found = _publish(open_place(), name, content)
            other = open_place()
            assert found.size == size
            assert other.stat(name) == found
            assert read_file(other, name) == content
        assert _names(open_place()) == {"empty": 0, "small": _SMALL, "large": _LARGE}

    def test_a_taken_name_is_refused(self, open_place: _Open) -> None:
        """A file stays as it is when its name is published again, unless that is asked for."""
        storage = open_place()
        for size in (_SMALL, _LARGE):
            content, other = _content(size), _content(size, seed=1)
            _publish(storage, f"of {size}", content)
            assert isinstance(_raised(partial(_publish, storage, f"of {size}", other)), FileExistsError)
            assert read_file(storage, f"of {size}") == content
            _publish(storage, f"of {size}", other, overwrite=True)
            assert read_file(open_place(), f"of {size}") == other

    def test_a_wrong_length_publishes_nothing(self, open_place: _Open) -> None:
        """Fewer or more bytes than were announced leave no file."""
        storage = open_place()
        for size in (_SMALL, _LARGE):
            for wrong in (size - 1, size + 1):
                content = _content(size)
                error = _raised(partial(storage.publish, "a", wrong, _chunks(content)))
                assert isinstance(error, SaveFailedError), error
        assert _names(open_place()) == {}

    def test_what_stops_half_way_publishes_nothing(self, open_place: _Open) -> None:
        """An error, and an interruption from the keyboard, leave neither a file nor a change of one."""
        storage = open_place()
        _publish(storage, "old", _content(_SMALL))
        for size in (_SMALL, _LARGE):
            for error in (ValueError("stopped"), KeyboardInterrupt()):
                for name, overwrite in (("new", False), ("old", True)):
                    chunks = _stopping(_content(size), error)
                    raised = _raised(partial(storage.publish, name, size, chunks, overwrite=overwrite))
                    assert raised is error
        assert _names(open_place()) == {"old": _SMALL}
        assert read_file(storage, "old") == _content(_SMALL)

    def test_before_is_called_when_all_is_written(self, open_place: _Open) -> None:
        """It is called once, when nobody sees the file yet; what it raises stops the file from appearing."""
        storage = open_place()
        for size in (_SMALL, _LARGE):
            seen: list[Stat | None] = []
            taken: list[int] = []

            def chunks(content: bytes, taken: list[int] = taken) -> Iterator[memoryview]:
                for chunk in _chunks(content):
                    taken.append(len(chunk))
                    yield chunk

            def before(seen: list[Stat | None] = seen, taken: list[int] = taken, size: int = size) -> None:
                assert sum(taken) == size
                seen.append(open_place().stat("a"))

            storage.publish("a", size, chunks(_content(size)), before=before)
            assert seen == [None]
            storage.delete("a")

            def refuse() -> None:
                raise StorageError("not any more")

            error = _raised(partial(storage.publish, "a", size, _chunks(_content(size)), before=refuse))
            assert isinstance(error, StorageError)
            assert "not any more" in str(error)
            assert storage.stat("a") is None

    def test_a_name_that_is_taken_meanwhile_is_refused(self, open_place: _Open) -> None:
        """A file that appears while another of its name is written stays, unless it is cleared away when asked."""
        storage = open_place()
        for size in (_SMALL, _LARGE) if self.exclusive else ():
            name = f"of {size}"

            def take(name: str = name, first: bytes = _content(size, seed=1)) -> None:
                _publish(open_place(), name, first)

            act = partial(storage.publish, name, size, _chunks(_content(size)), before=take)
            assert isinstance(_raised(act), FileExistsError)
            assert read_file(storage, name) == _content(size, seed=1)

            def clear(name: str = name) -> bool:
                storage.delete(name)
                return True

            storage.publish(name, size, _chunks(_content(size)), cleared=clear, overwrite=not self.clears)
            assert read_file(storage, name) == _content(size)

    def test_of_several_at_once_one_wins(self, open_place: _Open) -> None:
        """A name that several publish at once has the bytes of one of them, and only that one is told so."""
        storage = open_place()
        _publish(storage, "before", b"")
        for round_ in range(3):
            outcomes: list[object] = [None] * 6

            def publish(number: int, round_: int = round_, outcomes: list[object] = outcomes) -> None:
                content = bytes([number]) * _SMALL
                outcomes[number] = _raised(partial(_publish, open_place(), f"race {round_}", content))

            _together([partial(publish, number) for number in range(len(outcomes))])
            winners = [number for number, outcome in enumerate(outcomes) if outcome is None]
            assert all(isinstance(outcome, FileExistsError) for outcome in outcomes if outcome is not None), outcomes
            assert len(winners) == 1 or not self.exclusive
            assert read_file(storage, f"race {round_}") in [bytes([number]) * _SMALL for number in winners]

    def test_a_name_is_only_a_name(self, open_place: _Open) -> None:
        """Globs, spaces, percent signs, colons and letters of all scripts mean nothing, in any call."""
        storage = open_place()
        odd = ["[x]*", "a b", "a::b", "~", "Ж模", "a&b=c", "50%25", "#1", "-x", "{a,b}", "'q'"]
        for name in ("x", "a", *odd):
            _publish(storage, name, name.encode())
        assert set(_names(storage)) == {"x", "a", *odd}
        for name in odd:
            assert read_file(storage, name) == name.encode()
        assert storage.set_aside("[x]*", "why") == "aside/[x]*"
        for name in odd[1:]:
            storage.delete(name)
        assert set(_names(open_place())) == {"x", "a"}
        assert set(_names(open_place().below("aside"))) == {"[x]*", "[x]*.reason.txt"}

    def test_changes_are_seen_at_once(self, open_place: _Open) -> None:
        """Another storage on the place, which has listed it before, sees what is new, replaced and gone."""
        one, other = open_place(), open_place()
        for _ in range(3):
            assert (_names(other), other.stat("a")) == ({}, None)
            _publish(one, "a", b"1")
            assert (_names(other), read_file(other, "a")) == ({"a": 1}, b"1")
            found = _publish(one, "a", b"222", overwrite=True)
            assert (_names(other), read_file(other, "a"), other.stat("a")) == ({"a": 3}, b"222", found)
            one.delete("a", seen=found)

    def test_any_bytes_can_be_read(self, open_place: _Open) -> None:
        """Stretches anywhere, announced or not, in any order; reading past the end is damage."""
        storage, content, chance = open_place(), _content(_LARGE), random.Random(0)  # noqa: S311 - no secret
        _publish(storage, "a", content)
        with storage.open("a") as blob:
            for _ in range(20):
                start, end = sorted(chance.randrange(_LARGE + 1) for _ in range(2))
                end = min(end, start + (1 << 20))
                assert _read(blob, start, end) == content[start:end]
            cuts = sorted(chance.sample(range(_LARGE), 30))
            stretches = list(zip(cuts[::2], cuts[1::2], strict=True))
            blob.announce(stretches)
            chance.shuffle(stretches)
            for start, end in stretches:
                assert _read(blob, start, end) == content[start:end]
            assert _read(blob, 5, 5 + _SMALL) == content[5 : 5 + _SMALL]
            blob.announce([(0, _LARGE)])
            assert b"".join(_read(blob, at, min(at + 777_777, _LARGE)) for at in range(0, _LARGE, 777_777)) == content
            assert isinstance(_raised(lambda: _read(blob, _LARGE - 5, _LARGE + 5)), CorruptCheckpointError)

    def test_stretches_are_read_in_parallel(self, open_place: _Open) -> None:
        """Each from front to back, bytes in between left out; the first failure is raised."""
        storage, content = open_place(), _content(_LARGE)
        _publish(storage, "a", content)
        step, found = 3 << 20, {}
        stretches = [(start, min(start + step, _LARGE)) for start in range(5, _LARGE, step)]

        def read(stretch: Readable, number: int) -> None:
            start, end = stretches[number]
            middle = start + (end - start) // 2
            found[number] = _read(stretch, start, middle), _read(stretch, middle + 1000, end)

        def fail(stretch: Readable, number: int) -> None:
            read(stretch, number)
            if number % 2:
                raise ValueError(number)

        with storage.open("a") as blob:
            for _ in range(2):
                found.clear()
                blob.read_in_parallel(stretches, read)
                for number, (start, end) in enumerate(stretches):
                    middle = start + (end - start) // 2
                    assert found[number] == (content[start:middle], content[middle + 1000 : end])
            error = _raised(lambda: blob.read_in_parallel(stretches, fail))
            assert isinstance(error, ValueError)
            assert error.args == (1,)

    def test_what_is_set_aside_is_kept(self, open_place: _Open) -> None:
        """It lies in aside/ with the reason, under a number where the name is taken there."""
        storage = open_place()
        for number in range(3):
            _publish(storage, "a", b"%d" % number)
            assert storage.set_aside("a", f"why {number}") == "aside/a" + (f".{number}" if number else "")
        aside = open_place().below("aside")
        assert [read_file(aside, name) for name in ("a", "a.1", "a.2", "a.2.reason.txt")] == [
            b"0",
            b"1",
            b"2",
            b"why 2\n",
        ]
        assert _names(storage) == {}

    def test_other_places_are_not_touched(self, open_place: _Open) -> None:
        """What lies below, or beside under a name that begins alike, is in no listing."""
        storage = open_place()
        _publish(storage, "a", b"1")
        _publish(storage.below("deeper"), "b", b"22")
        assert _names(storage) == {"a": 1}
        assert _names(storage.below("deeper")) == {"b": 2}
        assert _names(storage.below("deep")) == {}

    def test_one_process_shares_the_lease(self, open_place: _Open) -> None:
        """Its storages on one place may all write; who gave the lease back may not."""
        one, other = open_place(), open_place()
        first, second = one.lease(), other.lease()
        first.check()
        first.close()
        second.check()
        assert isinstance(_raised(first.check), TimeoutError)
        second.close()
        again = open_place().lease()
        again.check()
        again.close()
        assert open_place().holder() == ""

    def test_it_serves_many_threads(self, open_place: _Open) -> None:
        """Each sees what it has just written, and nothing of another's."""
        storage = open_place()

        def work(number: int) -> None:
            for turn in range(3):
                name, content = f"{number}-{turn}", _content(_SMALL, seed=number)
                _publish(storage, name, content)
                assert read_file(storage, name) == content
                assert name in _names(storage)

        assert _together([partial(work, number) for number in range(16)]) == [None] * 16

    def test_it_serves_an_event_loop(self, open_place: _Open) -> None:
        """Calls from inside a running loop work as others do."""

        async def inside() -> bytes:
            storage = open_place()
            _publish(storage, "a", _content(_LARGE))
            return read_file(storage, "a")

        assert asyncio.run(inside()) == _content(_LARGE)

    def test_it_serves_a_forked_child(self, open_place: _Open) -> None:
        """A child reads and writes with the parent's object, and the parent goes on."""
        if not self.fork or not hasattr(os, "fork"):
            return
        storage = open_place()
        _publish(storage, "a", _content(_SMALL))
        child = os.fork()
        if child == 0:
            code = 1
            try:
                alike = read_file(storage, "a") == _content(_SMALL)
                _publish(storage, "b", _content(_LARGE))
                code = 0 if alike else 2
            finally:
                os._exit(code)
        assert read_file(storage, "a") == _content(_SMALL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert read_file(storage, "b") == _content(_LARGE)

    def test_a_file_that_vanishes_is_told(self, open_place: _Open) -> None:
        """Reading what was deleted meanwhile gives its bytes or says so, and never others."""
        storage, content = open_place(), _content(_LARGE)
        _publish(storage, "a", content)
        with storage.open("a") as blob:
            storage.delete("a")
            _publish(storage, "a", _content(_LARGE, seed=1))
            try:
                assert _read(blob, 1 << 20, 2 << 20) == content[1 << 20 : 2 << 20]
            except CheckpointNotFoundError:
                return


_Open = Callable[[], Storage]


def _content(size: int, seed: int = 0) -> bytes:
    return random.Random(f"{size} {seed}").randbytes(size)  # noqa: S311 - no secret


def _chunks(content: bytes, size: int = 3 << 20) -> Iterator[memoryview]:
    for start in range(0, len(content), size):
        yield memoryview(content)[start : start + size]


def _stopping(content: bytes, error: BaseException) -> Iterator[memoryview]:
    """Three quarters of the bytes, then the error."""
    yield from _chunks(content[: len(content) * 3 // 4])
    raise error


def _publish(storage: Storage, name: str, content: bytes, *, overwrite: bool = False) -> Stat:
    return storage.publish(name, len(content), _chunks(content), overwrite=overwrite)


def _names(storage: Storage) -> dict[str, int]:
    """Name and size of what is there, but for what storages keep for themselves."""
    return {entry.name: entry.stat().size for entry in storage.list() if not entry.name.startswith(".")}


def _read(blob: Any, start: int, end: int) -> bytes:
    buffer = bytearray(end - start)
    blob.read_into(start, memoryview(buffer))
    return bytes(buffer)


def _raised(act: Callable[[], object]) -> BaseException | None:
    try:
        act()
    except BaseException as error:  # noqa: BLE001 - the caller looks at it
        return error
    return None


def _together(jobs: list[Callable[[], object]]) -> list[BaseException | None]:
    """Do them all at once, and return what each raised."""
    start = threading.Barrier(len(jobs))
    outcomes: list[BaseException | None] = [None] * len(jobs)

    def run(number: int) -> None:
        start.wait()
        outcomes[number] = _raised(jobs[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes
