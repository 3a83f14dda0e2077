"""Killed, refused or lied to at any system call: nothing that was saved is lost, nothing half is ever listed."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mutants
import pytest
import syscalls
import torch
from syscalls import REFUSED, SHORT, Fault
from zygote import run_in_child

from seedvc_ckpt import SEED_VC, CheckpointStore, keep_last
from seedvc_ckpt.file import CheckpointFile

ERRORS = ["ENOSPC", "EIO", "EDQUOT", "EINTR", "ESTALE"]
NEXT = 9
_DEAD = ".tmp-" + "0" * 16 + f"-999999999-1-{os.uname().nodename}"
_reason = syscalls.can_trace()
pytestmark = pytest.mark.skipif(bool(_reason), reason=_reason)


def state(value: float) -> dict[str, object]:
    return {"net": {"cfm": {"weight": torch.full((5000,), value)}}, "iters": int(value)}


def saved(run: Path, *steps: int) -> None:
    with CheckpointStore(run) as store:
        for step in steps:
            store.save(state(step), step)


def value(file: CheckpointFile) -> float:
    file.verify()
    loaded = file.load()["net"]["cfm"]["weight"].unique().tolist()
    assert len(loaded) == 1, "two states in one file"
    return loaded[0]


def contents(run: Path) -> dict[int, float]:
    """Step and value of everything that is listed; fails where something is listed that is not complete."""
    store = CheckpointStore(run, read_only=True)
    return {info.step: value(store.file(info)) for info in store.list()}


def kept(run: Path, step: int) -> float:
    """The value of a checkpoint that is in the run or, complete, in aside/."""
    name = SEED_VC.format(step)
    return value(CheckpointFile.at(run / name if (run / name).exists() else run / "aside" / name))


@dataclass(frozen=True)
class Scenario:
    """An operation on a run, and what must hold of the run afterwards, given its exit code (0: it returned)."""

    prepare: Callable[[Path], object]
    act: Callable[[Path], object]
    holds: Callable[[Path, int], object]


def first_save(run: Path, code: int) -> None:
    allowed = {0: [{1: 1.0}], REFUSED: [{}]}
    assert contents(run) in allowed.get(code, [{1: 1.0}, {}])


def prepare_pruning(run: Path) -> None:
    saved(run, 1, 2, 3)
    CheckpointStore(run).pin(1)
    (run / _DEAD).write_bytes(b"part")


def save_and_prune(run: Path) -> None:
    CheckpointStore(run, retention=keep_last(2)).save(state(4), 4)


def pruned(run: Path, code: int) -> None:
    found = contents(run)
    assert all(number == step for step, number in found.items())
    assert set(found) >= {1, 3}
    assert 2 in found or 4 in found, "pruned before the new one was there"
    assert 4 in found or code
    assert 4 not in found or code != REFUSED


def overwritten(run: Path, code: int) -> None:
    found = contents(run)
    assert set(found) == {1, 2}
    assert found[2] == 2.5 or (found[2] == 2.0 and code)


def prepare_damage(run: Path) -> None:
    saved(run, 1, 2, 3)
    path = run / SEED_VC.format(3)
    content = bytearray(path.read_bytes())
    content[10_000] ^= 1
    path.write_bytes(content)


def resume(run: Path) -> None:
    found = CheckpointStore(run).resume()
    assert found is not None
    assert found.info.step == 2


def stepped_back(run: Path, code: int) -> None:
    damaged = [path for path in (run / SEED_VC.format(3), run / "aside" / SEED_VC.format(3)) if path.exists()]
    assert len(damaged) == 1, "the damaged one is lost"
    if code == 0:
        assert damaged[0].parent.name == "aside"
        assert "CRC-32" in damaged[0].with_name(f"{damaged[0].name}.reason.txt").read_text()
    store = CheckpointStore(run, read_only=True)
    assert [value(store.file(step)) for step in (1, 2)] == [1.0, 2.0]


def rewound(run: Path, code: int) -> None:
    assert [kept(run, step) for step in (1, 2, 3)] == [1.0, 2.0, 3.0]
    assert set(contents(run)) == {1} or code


def exported(*values: float) -> Callable[[Path, int], None]:
    """The target holds the new weights, or before the operation returned one of `values`, or is absent for none."""

    def holds(run: Path, code: int) -> None:
        target = run / "ft_model.pth"
        assert contents(run) == {1: 1.0}
        if target.exists():
            assert value(CheckpointFile.at(target)) in ((1.0, *values) if code else (1.0,))
        else:
            assert not values
            assert code

    return holds


def prepare_export(run: Path) -> None:
    saved(run, 1)
    with CheckpointStore(run.parent / "other") as other:
        other.save(state(7), 7)
        other.export(run / "ft_model.pth")


SCENARIOS = {
    "save": Scenario(lambda run: None, lambda run: CheckpointStore(run).save(state(1), 1), first_save),
    "save and prune": Scenario(prepare_pruning, save_and_prune, pruned),
    "overwrite": Scenario(
        lambda run: saved(run, 1, 2), lambda run: CheckpointStore(run).save(state(2.5), 2, overwrite=True), overwritten
    ),
    "resume": Scenario(prepare_damage, resume, stepped_back),
    "rewind": Scenario(lambda run: saved(run, 1, 2, 3), lambda run: CheckpointStore(run).rewind(1), rewound),
    "export": Scenario(
        lambda run: saved(run, 1), lambda run: CheckpointStore(run).export(run / "ft_model.pth"), exported()
    ),
    "export again": Scenario(
        prepare_export, lambda run: CheckpointStore(run).export(run / "ft_model.pth", overwrite=True), exported(7.0)
    ),
}


class Sweep:
    """One scenario, tried with a fault at one point after another, each in a fresh copy of the run."""

    def __init__(self, scenario: Scenario, folder: Path, mutant: Callable[[], object] = int) -> None:
        self._scenario = scenario
        self._mutant = mutant
        self._template, self._place = folder / "template", folder / "place"
        self._run = self._place / "logs" / "run"
        self._trace, self._answer = folder / "trace", folder / "answer"
        self._template.mkdir(parents=True)
        scenario.prepare(self._template / "logs" / "run")
        scenario.prepare(folder / "warm" / "run")
        scenario.act(folder / "warm" / "run")  # what is imported on the first use is imported now

    def faults(self) -> list[Fault]:
        """Every fault: killed at each call, refused or lied to at each that is about the run."""
        self._fresh()
        found = []
        act = self._acting()
        for call, number, ours in syscalls.points(act, self._place, self._trace):
            found.append(Fault(call, number, "signal=KILL"))
            if ours:
                found += [Fault(call, number, f"error={error}") for error in ERRORS]
                found += [Fault(call, number, SHORT)] if call in ("write", "pwrite64") else []
        return found

    def violations(self, fault: Fault) -> list[str]:
        """What a fresh process finds wrong after the operation with that fault."""
        self._fresh()
        code = syscalls.operate(self._acting(), fault, self._trace, self._mutant)
        problems = [] if code in (0, -9, REFUSED) else [f"raised something that is no error of ours (exit code {code})"]
        unsynced = (
            fault.call in ("fsync", "fdatasync") and fault.action.startswith("error") and "EINTR" not in str(fault)
        )
        if code == 0 and unsynced:
            problems.append("returned though a sync had failed")
        left = [path.name for path in self._run.glob("**/.tmp-*") if path.name != _DEAD]
        if code == REFUSED and left and not fault.call.startswith("unlink"):
            problems.append(f"left {left} though it had the time to clean up")
        answered = run_in_child(lambda: self._examine(code))
        problems += json.loads(self._answer.read_text()) if answered == 0 else ["the examination itself failed"]
        return [f"{fault}: {problem}" for problem in problems]

    def _acting(self) -> Callable[[], object]:
        return lambda: self._scenario.act(self._run)

    def _fresh(self) -> None:
        shutil.rmtree(self._place, ignore_errors=True)
        shutil.copytree(self._template, self._place)
        self._answer.unlink(missing_ok=True)

    def _examine(self, code: int) -> None:
        problems = []
        self._mutant()
        try:
            self._scenario.holds(self._run, code)
        except Exception as error:
            problems.append(f"afterwards {type(error).__name__}: {error}")
        try:
            # the damaged one may still be listed, and nothing else may be in the way
            with CheckpointStore(self._run) as store:
                store.save(state(NEXT), NEXT, verify=True)
        except Exception as error:
            problems.append(f"the next save: {type(error).__name__}: {error}")
        if left := list(self._run.glob("**/.tmp-*")):
            problems.append(f"the next save left {left}")
        self._answer.write_text(json.dumps(problems))


def kind(fault: Fault) -> str:
    if fault.action == SHORT:
        return "a write that lies"
    return (
        "SIGKILL at every system call" if "KILL" in fault.action else f"{', '.join(ERRORS)} at every call on its files"
    )


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_fault_at_any_system_call(name, tmp_path, full, chance, tally):
    """Whatever call is the last or fails: only complete files, none lost, a clear error, and the next save works."""
    sweep = Sweep(SCENARIOS[name], tmp_path)
    faults = sweep.faults()
    assert len(faults) > 100
    chosen = faults if full else chance.sample(faults, 40)
    problems: list[str] = []
    tried, failed = Counter(map(kind, chosen)), Counter()
    for fault in chosen:
        found = sweep.violations(fault)
        problems += found
        failed[kind(fault)] += bool(found)
    for how, cases in tried.items():
        tally.record("2, 4, 6", "local disk", f"{name}: {how}", cases, failed[how])
    assert not problems, "\n".join(problems)


def promising(sweep: Sweep) -> Iterator[Fault]:
    """The faults that most broken protocols can't stand, first."""
    order = {"fsync": 0, "write": 1, "link": 2, "linkat": 2, "rename": 2, "unlink": 3}
    faults = [fault for fault in sweep.faults() if fault.call in order]
    yield from sorted(faults, key=lambda fault: (order[fault.call], fault.action not in ("signal=KILL", "error=EIO")))


@pytest.mark.parametrize("mutant", mutants.BY_SYSTEM_CALL, ids=lambda mutant: mutant.__name__)
def test_broken_protocols_are_caught(mutant, tmp_path, tally):
    """Each way of saving that is wrong fails this sweep."""
    for name in ("save and prune", "overwrite"):
        sweep = Sweep(SCENARIOS[name], tmp_path / name, mutant)
        for tried, fault in enumerate(promising(sweep), 1):
            if sweep.violations(fault):
                tally.record("2, 4, 6", "local disk", f"broken on purpose, and caught: {mutant.__name__}", tried)
                return
    pytest.fail(f"nothing shows that {mutant.__name__} is wrong: {mutant.__doc__}")
