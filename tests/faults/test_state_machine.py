"""Random sequences of everything a store does, against a plain dictionary, with faults, crashes, damage and readers."""

from __future__ import annotations

import io
import math
import os
import random
import shutil
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import pytest
import torch
from zygote import run_in_child

from seedvc_ckpt import (
    SEED_VC,
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CheckpointStore,
    CorruptCheckpointError,
    LeaseHeldError,
    MissingMetricError,
    SaveFailedError,
    StaleStepError,
    StorageError,
    keep_best,
    keep_every,
    keep_last,
)
from seedvc_ckpt.storage import lease, local, open_storage  # slow to import: done before the forks
from seedvc_ckpt.testing import FaultyStorage

FAST, FULL = 30, 1200  # sequences on each kind of storage
LENGTH = 15
OPERATIONS = {
    "save": 30, "load": 6, "verify": 5, "resume": 8, "prune": 6, "pin": 6, "unpin": 4, "rewind": 5, "export": 3,
    "inspect": 2, "garbage": 2, "reopen": 5, "damage": 7, "crash": 9, "rival": 2, "read_only": 3,
}  # fmt: skip
_numbers = count()


class ViolationError(AssertionError):
    """A promise did not hold."""


class Death(BaseException):
    """The end of a process whose memory must outlive it."""


def demand(holds: object, *what: object) -> None:
    if not holds:
        raise ViolationError(" ".join(map(str, what)))


class _Chaos:
    """Fails one call, or all from one on, once it is armed."""

    def __init__(self) -> None:
        self.calls, self.fault, self.only, self.lasting, self.fired = -1, None, None, False, False

    def arm(self, draw: random.Random) -> str:
        changing = draw.random() < 0.6
        self.only = ("publish", "delete", "set_aside") if changing else None
        self.calls = draw.choice([0, 0, 0, 1, 2]) if changing else draw.randrange(14)
        self.fault, self.lasting, self.fired = draw.choice(["before", "midway", "after"]), draw.random() < 0.2, False
        return f"{self.fault} {self.calls} {'changing' if changing else 'any'}{' lasting' if self.lasting else ''}"

    def disarm(self) -> None:
        self.fired, self.fault = False, None

    def __call__(self, call: Any) -> Any:
        if self.fault is None or (self.only and call.operation not in self.only):
            return None
        self.calls -= 1
        if self.calls == -1 or (self.lasting and self.calls < 0):
            self.fired = True
            return self.fault
        return None


class _Dying:
    """A storage whose user dies at one of the points of what it changes: between any two chunks, before, after."""

    def __init__(self, inner: Any, points: int, die: Callable[[], None]) -> None:
        self._inner, self._points, self._die = inner, points, die

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def point(self) -> None:
        self._points -= 1
        if self._points < 0:
            self._die()

    def around(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def acted(*args: Any, **options: Any) -> Any:
            self.point()
            result = act(*args, **options)
            self.point()
            return result

        return acted

    def publish(self, name: str, size: int, chunks: Any, *, before: Any = lambda: None, **options: Any) -> Any:
        def pointed() -> Iterator[memoryview]:
            for chunk in chunks:
                yield chunk[: len(chunk) // 2]
                self.point()
                yield chunk[len(chunk) // 2 :]

        return self.around(self._inner.publish)(name, size, pointed(), before=self.around(before), **options)

    def delete(self, name: str, **options: Any) -> None:
        self.around(self._inner.delete)(name, **options)

    def set_aside(self, name: str, reason: str) -> str:
        return self.around(self._inner.set_aside)(name, reason)


class _Place:
    """A run's folder or prefix, looked at without the library."""

    def __init__(self, kind: str, folder: str) -> None:
        self.kind = kind
        self.folder = os.path.join(folder, str(next(_numbers)))
        self.inner = open_storage(self.folder if kind == "local" else f"memory://{self.folder}")

    def files(self, below: str = "") -> dict[str, bytes]:
        folder = os.path.join(self.folder, below)
        if self.kind == "local":
            if not os.path.isdir(folder):
                return {}
            found = {}
            for entry in os.scandir(folder):
                if entry.is_file():
                    with open(entry.path, "rb") as file:
                        found[entry.name] = file.read()
            return found
        prefix = f"{folder.rstrip('/')}/"
        stored = self.inner._client.fs.store
        return {
            path[len(prefix) :]: file.getvalue()
            for path, file in list(stored.items())
            if path.startswith(prefix) and "/" not in path[len(prefix) :]
        }

    def put(self, name: str, content: bytes) -> None:
        if self.kind == "local":
            with open(os.path.join(self.folder, name), "r+b") as file:
                file.write(content)
        else:
            self.inner._client.fs.pipe_file(f"{self.folder}/{name}", content, mode="overwrite")

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(f"{self.folder}-exports", ignore_errors=True)
        if self.kind == "memory":
            for path in [path for path in self.inner._client.fs.store if path.startswith(f"{self.folder}/")]:
                del self.inner._client.fs.store[path]


class Seen(NamedTuple):
    """What is there: contents by step, pinned steps, contents set aside, temporary files."""

    files: dict[int, bytes]
    pins: frozenset[int]
    aside: Counter[bytes]
    temporary: int


class Kept(NamedTuple):
    """What was saved at a step."""

    tag: int
    loss: float
    content: bytes


@dataclass
class Expect:
    """What an operation does when nothing goes wrong; `gone` and `perhaps` are what pruning deletes, or may delete."""

    error: type[CheckpointError] | None = None
    saved: Kept | None = None
    step: int | None = None
    gone: frozenset[int] = frozenset()
    perhaps: frozenset[int] = frozenset()
    moved: frozenset[int] = frozenset()
    pins: frozenset[int] | None = None
    answer: Callable[[Any], bool] = lambda _: True
    touched: frozenset[int] = field(default=frozenset())  # read whole, if it succeeds


def name_of(step: int) -> str:
    return SEED_VC.format(step, step % 3)


def state_of(step: int, tag: int) -> dict:
    return {"net": {"m": {"w": torch.full((1 + tag % 37,), tag, dtype=torch.float64)}}, "iters": step}


def is_state(state: Any, step: int, tag: int) -> bool:
    weight = state["net"]["m"]["w"]
    return state["iters"] == step and weight.shape == (1 + tag % 37,) and bool((weight == tag).all())


class _World:
    """One sequence: a store, the dictionary that it should agree with, and what was done."""

    def __init__(self, kind: str, seed: int, folder: str, *, threaded: bool = False) -> None:
        self.draw = random.Random(seed)
        self.place = _Place(kind, folder)
        self.chaos = _Chaos()
        self.threaded = threaded
        self.tags = count(1)
        self.written: set[tuple[int, int]] = set()
        self.trace: list[str] = []
        self.kept: dict[int, Kept] = {}
        self.exported: dict[str, int] = {}
        self.crashed = False
        self.seen = self.look()
        self.open()

    # the store and its dictionary

    def open(self) -> None:
        """A new store, as a new process has it."""
        some = [
            ("last", self.draw.randint(1, 3)),
            ("every", self.draw.choice([2, 5])),
            ("best", self.draw.randint(1, 2)),
        ]
        self.rules = self.draw.sample(some, self.draw.choice([0, 1, 1, 2]))
        self.trace.append(f"open with {self.rules}")
        self.store = CheckpointStore(FaultyStorage(self.place.inner, self.chaos), retention=self.retention())
        self.known: set[int] = set()  # proven to be intact in this store's life
        self.uncertain: set[int] = set()  # perhaps proven, by a call that failed later
        self.resumed: int | None = None

    def retention(self) -> list:
        make = {"last": keep_last, "every": keep_every, "best": lambda n: keep_best("loss", n)}
        return [make[kind](number) for kind, number in self.rules]

    def look(self) -> Seen:
        files, pins, temporary = {}, set(), 0
        for name, content in self.place.files().items():
            parsed = SEED_VC.parse(name.removesuffix(".pin"))
            if parsed and name.endswith(".pin"):
                pins.add(parsed.step)
            elif parsed:
                demand(parsed.step not in files, "two files of step", parsed.step)
                files[parsed.step] = content
            elif name.startswith(".tmp-"):
                temporary += 1
            else:
                demand(name == lease.LOCK_NAME, "unknown file", name)
        found = self.place.files("aside")
        notes = {name for name in found if name.endswith(".reason.txt")}
        moved = {name: content for name, content in found.items() if name not in notes and not name.startswith(".tmp-")}
        demand(all(f"{name}.reason.txt" in notes for name in moved), "set aside without a reason", sorted(found))
        return Seen(files, frozenset(pins), Counter(moved.values()), temporary)

    def damaged(self) -> set[int]:
        return {step for step, content in self.seen.files.items() if content != self.kept[step].content}

    def pruned(self, losses: dict[int, float], pins: frozenset[int], known: set[int]) -> tuple[set[int], set[int]]:
        """What must and what may be deleted of these steps."""
        steps = sorted(losses)
        if not self.rules or not steps:
            return set(), set()
        keep = {steps[-1]} | (pins & set(steps))
        damaged = self.damaged() & set(steps)
        vague = False
        for kind, number in self.rules:
            if kind == "last":
                keep |= set(steps[-number:])
            elif kind == "every":
                keep |= {step for step in steps if step % number == 0}
            elif damaged:
                vague = True  # whether a damaged manifest can still be read is not for the dictionary to say
            else:
                keep |= set(sorted(steps, key=lambda step: (math.isnan(losses[step]), losses[step], -step))[:number])
        gone = set(steps) - keep
        must, may = (set(), gone) if vague else (gone, set())
        if self.resumed in gone and not known & keep:
            must.discard(self.resumed)
            may.discard(self.resumed)
            if self.uncertain & keep or (self.uncertain | known) & may:
                may.add(self.resumed)
        return must, may

    # doing and checking

    def attempt(self, what: str, expect: Expect, act: Callable[[CheckpointStore], Any]) -> None:
        """Do it, perhaps with a fault, and compare."""
        armed = f", fault {self.chaos.arm(self.draw)}" if self.draw.random() < 0.3 else ""
        self.trace.append(what + armed)
        answer, error = None, None
        try:
            answer = act(self.store)
        except CheckpointError as raised:
            error = raised
        fired = self.chaos.fired
        self.trace[-1] += f" -> {type(error).__name__ if error else 'done'}{' (fired)' if fired else ''}"
        if error is None:
            demand(expect.error is None, what, "should have raised", expect.error)
            demand(expect.answer(answer), what, "answered", answer)
        elif type(error) is MissingMetricError:  # damage can hide that a file has a manifest; then nothing is pruned
            demand(self.damaged() and any(kind == "best" for kind, _ in self.rules), what, "raised", repr(error))
        elif not fired:
            demand(type(error) is expect.error, what, "raised", repr(error), "instead of", expect.error)
        else:
            demand(type(error) in (expect.error, StorageError, SaveFailedError), what, "raised", repr(error))
        self.chaos.disarm()
        unchanged = error is not None and (
            not fired or type(error) in (expect.error, SaveFailedError, MissingMetricError)
        )
        self.compare(what, expect, complete=error is None, unchanged=unchanged, lenient=fired)
        if fired:  # even a save that returned may have failed to look at its file again
            self.uncertain |= expect.touched - self.known
        elif error is None:
            self.known |= expect.touched
            self.uncertain -= expect.touched

    def compare(self, what: str, expect: Expect, *, complete: bool, unchanged: bool, lenient: bool) -> None:
        """What is there must be old or new, file by file, and nothing else; then the dictionary follows it."""
        was, now = self.seen, self.look()
        new = expect.saved
        is_new = False
        if expect.step is not None and now.files.get(expect.step) != was.files.get(expect.step):
            content = now.files.get(expect.step)
            demand(new and content is not None and not unchanged, what, "changed step", expect.step)
            demand(
                is_state(torch.load(io.BytesIO(content), weights_only=True), expect.step, new.tag), what, "is not it"
            )
            is_new = True
            self.kept[expect.step] = new._replace(content=content)
            self.written.add((expect.step, new.tag))
        demand(not complete or is_new == (new is not None), what, "left no new file")
        missing = {step for step in was.files if step not in now.files}
        surprising = {step for step in now.files if step not in was.files and step != expect.step}
        demand(not surprising, what, "made", surprising)
        for step in was.files.keys() & now.files.keys():
            demand(step == expect.step or was.files[step] == now.files[step], what, "changed step", step)
        deletable = set() if unchanged or (new and not is_new) else expect.gone | expect.perhaps
        movable = set() if unchanged else expect.moved
        demand(missing <= deletable | movable, what, "lost", missing - deletable - movable)
        if complete:
            demand(movable <= missing, what, "left in place", movable - missing)
            demand(lenient or expect.gone <= missing, what, "did not prune", expect.gone - missing)
        aside = was.aside + Counter(was.files[step] for step in missing & movable)
        demand(now.aside == aside, what, "set aside", sum(now.aside.values()), "instead of", sum(aside.values()))
        after = (was.pins if expect.pins is None else expect.pins) - expect.moved
        allowed = was.pins ^ after if not complete and not unchanged else frozenset()
        wanted = was.pins if unchanged else after
        demand((now.pins ^ wanted) <= allowed, what, "pins", set(now.pins), "instead of", set(wanted))
        demand(self.crashed or not now.temporary, what, "left a temporary file")
        for step in missing:
            del self.kept[step]
            self.known.discard(step)
            self.uncertain.discard(step)
        if is_new and not complete:
            self.known.discard(expect.step)
            self.uncertain.add(expect.step)
        self.seen = now
        if self.resumed in missing:
            self.resumed = None
        self.read(what)

    def read(self, after: str) -> None:
        """A reader without faults sees what is there, with a store of its own."""
        with CheckpointStore(self.place.inner, read_only=True) as reader:
            infos = reader.list()
            steps = sorted(self.seen.files)
            demand([info.step for info in infos] == steps, "after", after, "a reader lists", infos)
            demand({info.step for info in infos if info.pinned} == self.seen.pins & set(steps), "after", after, infos)
            newest = reader.latest()
            demand((newest.step if newest else None) == (steps[-1] if steps else None), after, "latest is", newest)
            if steps and self.draw.random() < 0.4:
                step = self.draw.choice(steps)
                if step in self.damaged():
                    with pytest.raises(CorruptCheckpointError):
                        reader.load(step)
                else:
                    demand(is_state(reader.load(step), step, self.kept[step].tag), "after", after, "misread", step)

    # the operations

    def some_step(self) -> int:
        steps = sorted(self.seen.files)
        return self.draw.choice(steps) if steps and self.draw.random() < 0.85 else self.draw.randint(1, 40)

    def saving(self) -> tuple[str, Expect, Callable[[CheckpointStore], Any]]:
        steps = sorted(self.seen.files)
        newest = steps[-1] if steps else 0
        step = newest + self.draw.randint(1, 3) if self.draw.random() < 0.75 else self.draw.randint(1, newest + 1)
        step = newest if newest and self.draw.random() < 0.12 else step
        overwrite, verify = self.draw.random() < 0.35, self.draw.random() < 0.3
        loss = math.nan if self.draw.random() < 0.1 else float(self.draw.randint(1, 6))
        tag = next(self.tags)
        expect = Expect()
        if newest > step:
            expect.error = StaleStepError
        elif newest == step and not overwrite:
            expect.error = CheckpointExistsError
        else:
            self.written.add((step, tag))
            expect.saved, expect.step = Kept(tag, loss, b""), step
            losses = {other: kept.loss for other, kept in self.kept.items()} | {step: loss}
            must, may = self.pruned(losses, self.seen.pins, self.known | {step})
            expect.gone, expect.perhaps = frozenset(must), frozenset(may)
            expect.touched = frozenset([step])
            pinned = step in self.seen.pins
            expect.answer = lambda info: (info.step, info.epoch, info.pinned) == (step, step % 3, pinned)
        state = state_of(step, tag)
        return (
            f"save {step} tag {tag} loss {loss} overwrite={overwrite}",
            expect,
            lambda store: store.save(state, step, step % 3, metrics={"loss": loss}, overwrite=overwrite, verify=verify),
        )

    def save(self) -> None:
        self.attempt(*self.saving())

    def reading(self, step: int) -> Expect:
        if step not in self.seen.files:
            return Expect(CheckpointNotFoundError)
        if step in self.damaged():
            return Expect(CorruptCheckpointError)
        return Expect(touched=frozenset([step]))

    def load(self) -> None:
        newest = max(self.seen.files, default=0)
        step = newest if self.draw.random() < 0.3 else self.some_step()
        which = None if step == newest and self.draw.random() < 0.5 else step
        expect, mapped = self.reading(step), self.draw.random() < 0.3
        if expect.error is None:
            tag = self.kept[step].tag
            expect.answer = lambda state: is_state(state, step, tag)
        self.attempt(f"load {which}", expect, lambda store: store.load(which, mmap=mapped))
        self.disproved(step, expect)

    def verify(self) -> None:
        step = self.some_step()
        expect = self.reading(step)
        self.attempt(f"verify {step}", expect, lambda store: store.verify(step))
        self.disproved(step, expect)

    def disproved(self, step: int, expect: Expect) -> None:
        if expect.error is CorruptCheckpointError and self.trace[-1].split(" -> ")[1].startswith("Corrupt"):
            self.known.discard(step)
            self.uncertain.discard(step)

    def inspect(self) -> None:
        step = self.some_step()
        if step not in self.damaged():
            expect = self.reading(step)
            expect.touched = frozenset()
            expect.answer = lambda found: found.manifest.step == step
            self.attempt(f"inspect {step}", expect, lambda store: store.inspect(step))

    def resuming(self) -> tuple[Expect, int | None]:
        damaged, steps = self.damaged(), sorted(self.seen.files, reverse=True)
        found = next((step for step in steps if step not in damaged), None)
        if not steps:
            return Expect(answer=lambda resumed: resumed is None), None
        if found is None:
            return Expect(CorruptCheckpointError), None
        worse = [step for step in steps if step > found]
        tag = self.kept[found].tag
        return Expect(
            moved=frozenset(worse),
            touched=frozenset([found]),
            answer=lambda resumed: (
                resumed.info.step == found
                and is_state(resumed.state, found, tag)
                and [info.step for info, _ in resumed.rejected] == worse
            ),
        ), found

    def resume(self) -> None:
        expect, found = self.resuming()
        damaged = self.damaged()
        self.attempt("resume", expect, lambda store: store.resume())
        if self.trace[-1].split(" -> ")[1].startswith(("done", "Corrupt")):
            self.known -= damaged
            self.uncertain -= damaged
        if found is not None and " -> done" in self.trace[-1]:
            self.resumed = found

    def pruning(self) -> Expect:
        must, may = self.pruned({step: kept.loss for step, kept in self.kept.items()}, self.seen.pins, self.known)
        return Expect(gone=frozenset(must), perhaps=frozenset(may))

    def prune(self) -> None:
        dry, expect = self.draw.random() < 0.2, self.pruning()
        must, all_of_them = expect.gone, expect.gone | expect.perhaps
        # a manifest that a fault keeps from being read spares its checkpoint
        expect.answer = lambda plan: (
            (self.chaos.fired or must <= {info.step for info in plan.remove})
            and {info.step for info in plan.remove} <= all_of_them
        )
        if dry:
            expect.gone = expect.perhaps = frozenset()
        self.attempt(f"prune dry_run={dry}", expect, lambda store: store.prune(dry_run=dry))

    def pin(self) -> None:
        step = self.some_step()
        expect = Expect(None if step in self.seen.files else CheckpointNotFoundError)
        expect.pins = self.seen.pins | {step}
        self.attempt(f"pin {step}", expect, lambda store: store.pin(step))

    def unpin(self) -> None:
        step = self.some_step()
        expect = Expect(None if step in self.seen.files else CheckpointNotFoundError)
        expect.pins = self.seen.pins - {step}
        self.attempt(f"unpin {step}", expect, lambda store: store.unpin(step))

    def rewinding(self, step: int) -> Expect:
        if step not in self.seen.files:
            return Expect(CheckpointNotFoundError)
        later = sorted(other for other in self.seen.files if other > step)
        return Expect(moved=frozenset(later), answer=lambda infos: [info.step for info in infos] == later)

    def rewind(self) -> None:
        step = self.some_step()
        self.attempt(f"rewind {step}", self.rewinding(step), lambda store: store.rewind(step))

    def export(self) -> None:
        step = self.some_step()
        folder = f"{self.place.folder}-exports"
        target = os.path.join(folder, self.draw.choice(["one.pth", "two.pth"]))
        overwrite = self.draw.random() < 0.5
        if step in self.damaged():
            return
        expect = self.reading(step)
        expect.touched = frozenset()
        if expect.error is None and target in self.exported and not overwrite:
            expect.error = CheckpointExistsError
        what = f"export {step} to {os.path.basename(target)} overwrite={overwrite}"
        self.attempt(what, expect, lambda store: store.export(target, step, overwrite=overwrite))
        if " -> done" in self.trace[-1]:
            self.exported[target] = self.kept[step].tag
        names = {os.path.join(folder, name) for name in (os.listdir(folder) if os.path.isdir(folder) else [])}
        demand(names == set(self.exported), what, "left", names)
        for path, tag in self.exported.items():
            weight = torch.load(path, weights_only=True)["net"]["m"]["w"]
            demand(bool((weight == tag).all()), what, "changed", path)

    def garbage(self) -> None:
        self.attempt("collect garbage", Expect(), lambda store: store.collect_garbage())

    def reopen(self) -> None:
        self.store.close()
        if self.draw.random() < 0.5:
            self.open()

    def damage(self) -> None:
        if not self.seen.files or self.threaded:
            return
        step = max(self.seen.files) if self.draw.random() < 0.6 else self.some_step()
        if step in self.seen.files:
            content = bytearray(self.seen.files[step])
            at = self.draw.randrange(len(content))
            content[at] ^= self.draw.randint(1, 255)
            self.trace.append(f"damage {step} at byte {at} of {len(content)}")
            self.place.put(name_of(step), bytes(content))
            self.seen = self.look()

    def crash(self) -> None:
        """Another process takes over and dies at some point of what it does; on memory, the code that runs stops."""
        if self.threaded:
            return
        self.store.close()
        self.open()
        kind = self.draw.choice(["save", "save", "save", "rewind", "resume", "prune", "pin"])
        step = self.some_step()
        act: Callable[[CheckpointStore], Any]
        if kind == "save":
            what, expect, act = self.saving()
        elif kind == "rewind":
            what, expect, act = f"rewind {step}", self.rewinding(step), lambda store: store.rewind(step)
        elif kind == "resume":
            what, expect, act = "resume", self.resuming()[0], lambda store: store.resume()
        elif kind == "prune":
            what, expect, act = "prune", self.pruning(), lambda store: store.prune()
        else:
            what, act = f"pin {step}", lambda store: store.pin(step)
            pins = self.seen.pins | {step} if step in self.seen.files else None
            expect = Expect(pins=pins)
        points = self.draw.randrange(40) if kind == "save" else self.draw.randrange(8)
        self.trace.append(f"die at point {points} of {what}")
        self.die(points, act)
        self.compare(f"dying in {what}", expect, complete=False, unchanged=expect.error is not None, lenient=True)
        self.open()
        self.store.acquire()
        self.crashed = False
        self.seen = self.look()
        demand(not self.seen.temporary, "a dead writer's temporary file outlived the next writer's start")

    def die(self, points: int, act: Callable[[CheckpointStore], Any]) -> None:
        rules, inner = self.retention(), self.place.inner
        if self.place.kind == "memory":

            def stop() -> None:
                raise Death

            with suppress(Death, CheckpointError):
                act(CheckpointStore(_Dying(inner, points, stop), retention=rules))
            return

        def live() -> None:
            dying = _Dying(inner, points, lambda: os.kill(os.getpid(), signal.SIGKILL))
            for name in ("_lock", "_sync", "_give_name", "_sync_folder"):
                setattr(local, name, dying.around(getattr(local, name)))
            with suppress(CheckpointError):
                act(CheckpointStore(dying, retention=rules))

        self.crashed = True
        code = run_in_child(live)
        self.trace[-1] += f" -> exit {code}"
        demand(code in (0, -signal.SIGKILL), "the child ended with", code)

    def rival(self) -> None:
        """Another process that writes while this one has the lease is refused, and changes nothing."""
        if self.threaded or self.place.kind == "memory":
            return
        self.store.acquire()
        _, expect, act = self.saving()
        inner = self.place.inner
        ahead = expect.error in (CheckpointExistsError, StaleStepError)
        refused = LeaseHeldError if ahead or not expect.error else expect.error

        def live() -> None:
            with pytest.raises(refused):
                act(CheckpointStore(inner))

        self.trace.append("a rival saves")
        demand(run_in_child(live) == 0, "a rival was not refused with", refused)
        self.compare("a rival", Expect(), complete=True, unchanged=True, lenient=False)

    def read_only(self) -> None:
        """A read-only store resumes as well, and leaves damaged files where they are."""
        expect, _ = self.resuming()
        self.trace.append("resume read-only")
        with CheckpointStore(self.place.inner, read_only=True) as reader:
            if expect.error:
                with pytest.raises(expect.error):
                    reader.resume()
            else:
                demand(expect.answer(reader.resume()), "a reader resumed from another")
            with pytest.raises(StorageError, match="read-only"):
                reader.save({}, 1000)
        self.compare("resume read-only", Expect(), complete=True, unchanged=True, lenient=False)

    def run(self) -> None:
        for name in self.draw.choices([*OPERATIONS], [*OPERATIONS.values()], k=LENGTH):
            getattr(self, name)()
        self.store.close()
        self.open()
        self.store.acquire()
        self.seen = self.look()
        demand(not self.seen.temporary, "temporary files at the end")
        self.store.close()


class _Reader(threading.Thread):
    """Lists and loads all the time, while the world changes."""

    def __init__(self, world: _World) -> None:
        super().__init__()
        self.world, self.stopped, self.violation, self.loads = world, threading.Event(), "", 0

    def run(self) -> None:
        try:
            while not self.stopped.is_set():
                self.look()
        except BaseException:
            self.violation = traceback.format_exc()

    def look(self) -> None:
        with CheckpointStore(self.world.place.inner, read_only=True) as reader:
            steps = [info.step for info in reader.list()]
            demand(steps == sorted(set(steps)), "a reader lists", steps)
            # it may be pruned or set aside once it is listed; an object even while it is read, or be replaced then
            in_memory = self.world.place.kind == "memory"
            gone = (CheckpointNotFoundError, *([StorageError, CorruptCheckpointError] if in_memory else []))
            with suppress(*gone):
                state = reader.load()
                step, tag = state["iters"], int(state["net"]["m"]["w"][0])
                demand((step, tag) in self.world.written, "a reader loaded", step, tag)
                demand(is_state(state, step, tag), "a reader loaded half of", step, tag)
                self.loads += 1


def broken_by(kind: str, seed: int, folder: str, *, threaded: bool) -> str:
    """What went wrong in the sequence of a seed, with everything that was done; "" when nothing did."""
    world = _World(kind, seed, folder, threaded=threaded)
    reader = _Reader(world) if threaded else None
    violation = ""
    try:
        if reader:
            reader.start()
        world.run()
    except (Exception, Death, pytest.fail.Exception):
        violation = traceback.format_exc()
    finally:
        if reader:
            reader.stopped.set()
            reader.join()
            violation = violation or reader.violation
        world.store.close()
        world.place.remove()
    if not violation:
        return ""
    steps = "\n  ".join(world.trace)
    return f"{kind}, seed {seed}, threaded={threaded}:\n  {steps}\n{violation}"


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_a_store_agrees_with_a_dictionary(kind, tmp_path, chance, full, tally):
    """After any operation, failed, killed or not, each checkpoint is the old or the new one, and nothing else is."""
    sequences = FULL if full else FAST
    ran = (
        broken_by(kind, chance.getrandbits(48), str(tmp_path), threaded=number % 8 == 0) for number in range(sequences)
    )
    broken = [text for text in ran if text]
    how = "random sequences against a dictionary, with faults, crashes, readers"
    tally.record("1, 2, 4, 5, 6", kind, how, sequences, len(broken))
    assert not broken, f"{len(broken)} of {sequences} sequences; the first: {broken[0]}"
