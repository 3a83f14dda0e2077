"""Processes that write to one run at the same moment: one of them does, nothing is lost, the others are told."""

from __future__ import annotations

import mmap
import os
import random
import select
import signal
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import runs
import torch
from mutants import BY_CONTEST, Mutant, living_writers_cleaned_up, name_taken_from_others, no_lease
from tally import Tally
from zygote import Child, be_command

from seedvc_ckpt import CheckpointStore, keep_last
from seedvc_ckpt.errors import CheckpointError, LeaseHeldError
from seedvc_ckpt.storage import lease  # noqa: F401  # slow to import: done before the forks
from seedvc_ckpt.storage.local import LocalStorage
from seedvc_train import cli

PATIENCE = 60.0  # seconds; far more than anything here takes
DISK = "local file system"


def unbroken() -> None:
    """The library as it is."""


def state_of(writer: int, step: int) -> dict:
    """A state that tells who saved it, and when."""
    return {"net": torch.full((500,), float(step)), "writer": writer, "iters": step}


class Reporting:
    """A child that sends lines to this process and waits for a word before it goes on."""

    def __init__(self, act: Callable[[Reporting], None]) -> None:
        self._report, reported = os.pipe()
        asked, self._answer = os.pipe()
        self._reported, self._asked = reported, asked
        self.child = Child(lambda: act(self))
        os.close(reported)
        os.close(asked)

    def say(self, what: str) -> None:
        """In the child: send a line."""
        os.write(self._reported, f"{what}\n".encode())

    def pause(self) -> None:
        """In the child: wait for `proceed`."""
        os.read(self._asked, 1)

    def heard(self) -> str:
        """The next line of the child, "" when it ended without one."""
        line = b""
        while not line.endswith(b"\n"):
            if not select.select([self._report], [], [], PATIENCE)[0]:
                self.child.kill()
                return "nothing was heard"
            got = os.read(self._report, 1)
            if not got:
                return ""
            line += got
        return line.decode().rstrip()

    def proceed(self) -> None:
        """Let the child go on after its `pause`."""
        os.write(self._answer, b"g")

    def wait(self) -> int:
        """Its exit code."""
        code = self.child.wait()
        os.close(self._report)
        os.close(self._answer)
        return code


def write_both(run: Path, mutant: Mutant, *, killed: bool) -> Iterator[str]:
    """What goes wrong when two processes begin to save at one moment; the winner then ends by itself or is killed."""

    def write(link: Reporting) -> None:
        mutant()
        store = CheckpointStore(run, retention=keep_last(3))
        try:
            for step in range(1, 6):
                store.save(state_of(os.getpid(), step), step)
            link.say("wrote")
        except Exception as error:
            link.say(f"{type(error).__name__}: {error}")
        link.pause()
        store.save(state_of(os.getpid(), 6), 6)
        link.say("wrote")

    writers = [Reporting(write), Reporting(write)]
    for writer in writers:
        writer.child.go()
    heard = [writer.heard() for writer in writers]
    if sorted(word == "wrote" for word in heard) != [False, True]:
        yield f"not exactly one wrote: {heard}"
    first = heard.index("wrote") if "wrote" in heard else 0
    winner, loser = writers[first], writers[1 - first]
    if not heard[1 - first].startswith("LeaseHeldError") or f"process {winner.child.pid} " not in heard[1 - first]:
        yield f"the one that was refused is not told that process {winner.child.pid} has the lease: {heard[1 - first]}"
    yield from lost(run, dict.fromkeys((3, 4, 5), winner.child.pid))
    winner.child.kill() if killed else winner.proceed()
    winner.wait()
    if not killed:
        yield from lost(run, dict.fromkeys((4, 5, 6), winner.child.pid))
    else:
        loser.proceed()
        if loser.heard() != "wrote":
            yield "the other one can't write after the first was killed"
        yield from lost(run, {4: winner.child.pid, 5: winner.child.pid, 6: loser.child.pid})
    loser.child.kill()
    loser.wait()
    with CheckpointStore(run) as store:
        store.save(state_of(0, 7), 7)
    if list(run.glob(".tmp-*")):
        yield "temporary files are left"


def lost(run: Path, expected: dict[int, int]) -> Iterator[str]:
    """What is not in a run as it should be: each step with its writer."""
    store = CheckpointStore(run, read_only=True)
    found = [info.step for info in store.list()]
    if found != sorted(expected):
        yield f"there are {found}, not {sorted(expected)}"
    for step in found:
        try:
            state = store.load(step)
        except Exception as error:
            yield f"step {step}: {error}"
            continue
        if state["iters"] != step or (step in expected and state["writer"] != expected[step]):
            yield f"step {step} was written by {state['writer']}, not {expected.get(step)}"


def test_one_of_two_writers_writes(tmp_path: Path, full: bool, tally: Tally) -> None:
    """Of two processes that begin to save at one moment one does, the other is told who; nothing is lost."""
    rounds = 200 if full else 20
    faults = [
        f"round {number}: {fault}"
        for number in range(rounds)
        for fault in write_both(tmp_path / str(number), unbroken, killed=bool(number % 2))
    ]
    tally.record("8", DISK, "two processes begin to save at one moment", rounds, len(faults))
    assert faults == []


class Publishing:
    """Memory that two processes share: who has reached which round, and what came of it."""

    def __init__(self, rounds: int) -> None:
        self._memory = mmap.mmap(-1, 16 + 2 * rounds)
        self._rounds = rounds

    def meet(self, who: int, number: int) -> None:
        """Wait for the other one to be as far."""
        struct.pack_into("q", self._memory, 8 * who, number + 1)
        deadline = time.monotonic() + PATIENCE
        while struct.unpack_from("q", self._memory, 8 * (1 - who))[0] <= number:
            if time.monotonic() > deadline:
                raise TimeoutError("the other process does not come")
            os.sched_yield()

    def note(self, who: int, number: int, outcome: bytes) -> None:
        """Write down what came of a round."""
        self._memory[16 + who * self._rounds + number] = outcome[0]

    def outcomes(self, number: int) -> bytes:
        """What came of a round for both."""
        return bytes(self._memory[16 + who * self._rounds + number] for who in (0, 1))


def publish_both(folder: Path, mutant: Mutant, rounds: int) -> Iterator[str]:
    """What goes wrong when two processes give different bytes the same name, each time at one moment."""
    shared = Publishing(rounds)

    def publish(who: int) -> None:
        mutant()
        storage = LocalStorage(str(folder))
        for number in range(rounds):
            content = memoryview(bytes([who + 65]) * (1000 + who))
            try:
                storage.publish(
                    f"{number}.pth", len(content), [content], before=lambda number=number: shared.meet(who, number)
                )
                shared.note(who, number, b"w")
            except FileExistsError:
                shared.note(who, number, b"x")

    children = [Child(lambda who=who: publish(who)) for who in (0, 1)]
    for child in children:
        child.go()
    if [child.wait() for child in children] != [0, 0]:
        yield "a process raised what it should not"
    for number in range(rounds):
        outcomes = shared.outcomes(number)
        if outcomes not in (b"wx", b"xw"):
            yield f"round {number}: {outcomes!r}, not exactly one got the name"
            continue
        who = outcomes.index(b"w")
        if (folder / f"{number}.pth").read_bytes() != bytes([who + 65]) * (1000 + who):
            yield f"round {number}: the name does not hold what its writer wrote"
    if len(list(folder.iterdir())) != rounds:
        yield "other files are left"


def test_a_name_goes_to_one_writer(tmp_path: Path, full: bool, tally: Tally) -> None:
    """Of two files that are published under one name at one moment exactly one appears, and stays as it is."""
    rounds = 2000 if full else 200
    faults = [*publish_both(tmp_path / "run", unbroken, rounds)]
    tally.record("8", DISK, "two processes publish under one name at one moment", rounds, len(faults))
    assert faults == []


MOMENTS = ("before the first byte", "between two writes", "after the last byte", "before it gets its name")
COLLECTORS = ("gc", "a new writer")


def collect_during_publish(folder: Path, mutant: Mutant, moment: str, collector: str) -> Iterator[str]:
    """What goes wrong when a process cleans up while another is in the middle of a publish."""
    content = memoryview(os.urandom(3000))

    def publish(link: Reporting) -> None:
        mutant()

        def pause(now: str) -> None:
            if now == moment:
                link.say("here")
                link.pause()

        def chunks() -> Iterator[memoryview]:
            pause(MOMENTS[0])
            yield content[:1000]
            pause(MOMENTS[1])
            yield content[1000:]
            pause(MOMENTS[2])

        LocalStorage(str(folder)).publish("a.pth", len(content), chunks(), before=lambda: pause(MOMENTS[3]))

    def collect() -> None:
        mutant()
        with CheckpointStore(folder) as store:
            if collector == "gc":
                store.collect_garbage()
            else:
                store.save(state_of(0, 1), 1)

    writer = Reporting(publish)
    writer.child.go()
    if writer.heard() != "here":
        yield "the writer did not come to that moment"
    if Child(collect).go().wait() != 0:
        yield "cleaning up raised"
    if len(list(folder.glob(".tmp-*"))) != 1:
        yield "a living writer's file was removed"
    writer.proceed()
    if writer.wait() != 0:
        yield "the writer failed"
    elif (folder / "a.pth").read_bytes() != content:
        yield "the file is not what was written"


def test_living_writers_are_not_cleaned_up(tmp_path: Path, full: bool, tally: Tally) -> None:
    """No gc and no new writer removes the file of a process that is in the middle of a publish."""
    rounds = 25 if full else 1
    cases = [(f"{number}", moment, way) for number in range(rounds) for moment in MOMENTS for way in COLLECTORS]
    faults = [
        f"{moment}, {way}: {fault}"
        for number, moment, way in cases
        for fault in collect_during_publish(tmp_path / f"{number} {moment} {way}", unbroken, moment, way)
    ]
    tally.record("8", DISK, "leftovers are collected during a publish", len(cases), len(faults))
    assert faults == []


def crowd(folder: Path, mutant: Mutant, processes: int, saves: int, chance: random.Random) -> Iterator[str]:
    """What goes wrong when many processes take turns at a run and some are killed, until all saves are done."""
    run, acknowledged, killed = folder / "run", folder / "acknowledged", folder / "killed"
    acknowledged.mkdir(parents=True)

    def write() -> None:
        mutant()
        take_turns(run, acknowledged, saves, killed)

    def done() -> int:
        return max((int(path.stem.rpartition("_")[2]) for path in run.glob("DiT_*.pth")), default=0)

    writers = [Child(write).go() for _ in range(processes)]
    codes: list[int] = []
    deadline = time.monotonic() + 4 * PATIENCE
    while done() < saves and time.monotonic() < deadline:
        time.sleep(chance.uniform(0.0, 0.04))
        place = chance.randrange(processes)
        writers[place].kill()
        code = writers[place].wait()
        if code == -signal.SIGKILL:
            killed.touch()
        codes.append(code)
        writers[place] = Child(write).go()
        if code == 70:
            break
    if done() < saves:
        for child in writers:
            child.kill()
    codes += [child.wait() for child in writers]
    if set(codes) - {0, -signal.SIGKILL}:
        yield f"processes ended with {Counter(codes)}"
    if not killed.exists():
        yield "none was killed"
    yield from not_as_acknowledged(run, acknowledged, saves)


def take_turns(run: Path, acknowledged: Path, saves: int, killed: Path) -> None:
    """Save the next step whenever the lease is free, until all are saved, the last one when somebody was killed."""
    journal = os.open(acknowledged / f"{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    while True:
        with CheckpointStore(run) as store:
            try:
                store.acquire()
            except LeaseHeldError:
                time.sleep(0.001)
                continue
            latest = store.latest()
            step = latest.step + 1 if latest else 1
            if step > saves:
                return
            if (
                step < saves or killed.exists()
            ):  # where the machine is busy, all could be saved before anybody is killed
                store.save(state_of(os.getpid(), step), step)
                os.write(journal, f"{step}\n".encode())


def not_as_acknowledged(run: Path, acknowledged: Path, saves: int) -> Iterator[str]:
    """What differs between a run and what its writers wrote down, once leftovers are collected."""
    with CheckpointStore(run) as store:
        store.collect_garbage()
    if list(run.glob(".tmp-*")):
        yield "leftovers of the dead are there after a gc"
    claims = [(int(step), int(path.name)) for path in acknowledged.iterdir() for step in path.read_text().split()]
    yield from (f"step {step} was acknowledged {n} times" for step, n in Counter(s for s, _ in claims).items() if n > 1)
    store = CheckpointStore(run, read_only=True)
    listed = [info.step for info in store.list()]
    if listed != list(range(1, saves + 1)):
        yield f"{len(listed)} steps are there, up to {max(listed, default=0)}, not each up to {saves}"
    for info in store.list():
        try:
            state = store.load(info)
        except Exception as error:
            yield f"{info.name}: {error}"
            continue
        if state["iters"] != info.step or any(s == info.step and w != state["writer"] for s, w in claims):
            yield f"{info.name} is not what its writer acknowledged"
    yield from (f"step {step} was acknowledged and is gone" for step, _ in claims if step not in listed)


def test_no_acknowledged_save_is_lost_in_a_crowd(
    tmp_path: Path, full: bool, tally: Tally, chance: random.Random
) -> None:
    """Where many processes take turns at a run and some are killed, every save that returned is there, once."""
    processes, saves = (8, 1600) if full else (4, 60)
    faults = [*crowd(tmp_path, unbroken, processes, saves, chance)]
    tally.record("1, 8", DISK, f"{processes} processes take turns at a run, random ones killed", saves, len(faults))
    assert faults == []


def train_both(recordings: Path, logs: Path) -> Iterator[str]:
    """What goes wrong when two trainers are started on one run at one moment."""
    logs.mkdir()

    arguments = runs.arguments(recordings, logs, max_steps=8, save_every=2, lr=None)

    def train(who: int) -> None:
        be_command(cli.main, ["seedvc-train", *arguments], logs / f"{who}.txt")

    children = [Child(lambda who=who: train(who)) for who in (0, 1)]
    for child in children:
        child.go()
    codes = [child.wait() for child in children]
    said = [(logs / f"{who}.txt").read_text() for who in (0, 1)]
    if sorted(codes) != [0, 1]:
        yield f"they ended with {codes}: {said}"
        return
    winner = codes.index(0)
    if f"process {children[winner].pid} " not in said[1 - winner] or "Traceback" in "".join(said):
        yield f"the one that was refused does not say that process {children[winner].pid} trains: {said[1 - winner]}"
    if "done at step 8" not in said[winner]:
        yield f"the other one did not train to its end: {said[winner]}"
    store = CheckpointStore(logs / "run", read_only=True)
    if [info.step for info in store.list()] != [6, 8]:
        yield f"there are {store.list()}"
    for info in store.list():
        try:
            store.verify(info)
        except CheckpointError as error:
            yield f"{info.name}: {error}"


def test_one_of_two_trainers_trains(recordings: Path, tmp_path: Path, full: bool, tally: Tally) -> None:
    """Of two trainers that are started on one run at one moment one trains to its end, the other says who does."""
    rounds = 20 if full else 1
    faults = [
        f"round {number}: {fault}"
        for number in range(rounds)
        for fault in train_both(recordings, tmp_path / f"{number}")
    ]
    tally.record("8", DISK, "two trainers are started at one moment", rounds, len(faults))
    assert faults == []


def faults_of(mutant: Mutant, folder: Path, chance: random.Random) -> Iterator[str]:
    if mutant is no_lease:
        yield from write_both(folder / "run", mutant, killed=True)
        yield from crowd(folder / "crowd", mutant, 4, 60, chance)
    elif mutant is name_taken_from_others:
        yield from publish_both(folder, mutant, 50)
    elif mutant is living_writers_cleaned_up:
        for moment in MOMENTS:
            for collector in COLLECTORS:
                yield from collect_during_publish(folder / f"{moment} {collector}", mutant, moment, collector)


@pytest.mark.parametrize("mutant", BY_CONTEST, ids=lambda mutant: mutant.__name__)
def test_a_broken_contest_is_caught(mutant: Mutant, tmp_path: Path, chance: random.Random) -> None:
    """Each way of keeping writers apart that only looks right is caught by the functions above."""
    assert [*faults_of(mutant, tmp_path, chance)] != []
