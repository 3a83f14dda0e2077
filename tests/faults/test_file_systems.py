"""Disks that are full, read-only or failing, that can't link, whose folder goes away or whose clock jumps."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import runs
import torch
from file_systems import filled, loop_mounted, missing, passing_through, remount
from mutants import BY_SHORT_WRITE, Mutant
from tally import Tally
from zygote import Child, be_command, run_in_child

from seedvc_ckpt import CheckpointStore, SaveFailedError, keep_last
from seedvc_ckpt.errors import CheckpointError, CheckpointExistsError
from seedvc_ckpt.export import export
from seedvc_ckpt.storage.local import LocalStorage
from seedvc_train import cli

reason_against = functools.cache(missing)
GRAIN = 64 << 10  # bytes


@pytest.fixture(params=["ext4", "xfs", "btrfs", "tmpfs"])
def kind(request: pytest.FixtureRequest) -> str:
    """A kind of file system that can be made and mounted here."""
    programs = [] if request.param == "tmpfs" else [f"mkfs.{request.param}"]
    if reason := reason_against(*programs):
        pytest.skip(reason)
    return request.param


def needs(*programs: str) -> None:
    if reason := reason_against(*programs):
        pytest.skip(reason)


def state_of(step: int) -> dict:
    """About a megabyte that does not compress, different for each step."""
    weight = torch.randn(256 << 10, generator=torch.Generator().manual_seed(step))
    return {"net": {"cfm": {"weight": weight}}, "iters": step}


def steps_in(folder: str) -> list[int]:
    """The steps of a run, each verified and compared with what was saved."""
    store = CheckpointStore(folder, read_only=True)
    steps = [info.step for info in store.list()]
    for step in steps:
        state = store.load(step)
        assert torch.equal(state["net"]["cfm"]["weight"], state_of(step)["net"]["cfm"]["weight"])
        assert state["iters"] == step
    return steps


def temporary_files(folder: str) -> list[Path]:
    return list(Path(folder).glob("**/.tmp-*"))


def fill_and_save(mount: str, leave: int, *, knowing: bool) -> Iterator[str]:
    """What goes wrong when a disk has about `leave` bytes for a second save; whether it says so can be hidden."""
    run = os.path.join(mount, "run")
    shutil.rmtree(run, ignore_errors=True)
    os.sync()
    store = CheckpointStore(run)
    store.save(state_of(1), 1)
    with filled(mount, leave) as free, pytest.MonkeyPatch.context() as patch:
        if not knowing:
            patch.setattr(LocalStorage, "free", lambda storage: None)
        try:
            store.save(state_of(2), 2)
            expected = [1, 2]
        except SaveFailedError as error:
            expected = [1]
            if error.needed is None or error.needed < 1 << 20:
                yield f"with {free:,} free: it does not say what was needed: {error}"
            if knowing and error.free is None:
                yield f"with {free:,} free: it does not say what is free: {error}"
        if steps_in(run) != expected:
            yield f"with {free:,} free: there are {steps_in(run)}, not {expected}"
        if temporary_files(run):
            yield f"with {free:,} free: a temporary file is left"
    store.save(state_of(3), 3)
    if steps_in(run) != [*expected, 3]:
        yield f"with room again: there are {steps_in(run)}"
    store.close()


def test_a_full_disk_loses_nothing(kind: str, full: bool, tally: Tally) -> None:
    """Wherever in a save the disk is full, the save says so, leaves nothing, and the older checkpoint is as it was."""
    room = range(0, (1 << 20) + 4 * GRAIN, GRAIN if full else 5 * GRAIN)
    cases = [(leave, knowing) for leave in room for knowing in (True, False)]
    with loop_mounted(kind) as mount:
        faults = [fault for leave, knowing in cases for fault in fill_and_save(mount, leave, knowing=knowing)]
        ends = refused(mount, 0), refused(mount, (1 << 20) + 40 * GRAIN)
    tally.record("4", kind, "the disk is full at every 64 KiB of a save", len(cases), len(faults))
    assert faults == []
    assert ends == (True, False), "the disk was never full, or always"


def refused(mount: str, leave: int) -> bool:
    """Whether a save is refused, given the room."""
    run = os.path.join(mount, "run")
    shutil.rmtree(run, ignore_errors=True)
    os.sync()
    with CheckpointStore(run) as store:
        store.save({"iters": 1}, 1)
        with filled(mount, leave):
            try:
                store.save(state_of(2), 2)
            except SaveFailedError:
                return True
    return False


def test_a_disk_that_became_read_only(kind: str, tally: Tally) -> None:
    """A file system that is mounted read-only under a store fails its saves, shows what it has, and heals."""
    if kind == "tmpfs":
        pytest.skip("a tmpfs does not turn read-only by itself")
    with loop_mounted(kind) as mount:
        run = os.path.join(mount, "run")
        store = CheckpointStore(run, retention=keep_last(2))
        for step in (1, 2):
            store.save(state_of(step), step)
        os.sync()
        # a file that is open for writing, as the lease's is, keeps the kernel from remounting
        store.close()
        remount(mount, "ro")
        for attempt in (store, CheckpointStore(run)):
            with pytest.raises(CheckpointError, match=r"[Rr]ead-only"):
                attempt.save(state_of(3), 3)
        assert CheckpointStore(run).resume().info.step == 2
        assert steps_in(run) == [1, 2]
        remount(mount, "rw")
        store.save(state_of(3), 3)
        assert steps_in(run) == [2, 3]
        store.close()
    tally.record("4", kind, "mounted read-only between saves", 1)


@pytest.mark.parametrize("fault", ["short writes", "no links", "links refused"])
def test_odd_file_systems(fault: str, tally: Tally) -> None:
    """Where writes are short, or there are no hard links, saves are whole and no name is taken twice."""
    needs("fusermount3")
    with passing_through(fault) as folder:
        run = os.path.join(folder, "run")
        with CheckpointStore(run, retention=keep_last(2)) as store:
            for step in (1, 2, 3):
                store.save(state_of(step), step)
            with pytest.raises(CheckpointExistsError):
                store.save(state_of(3), 3)
            store.save(state_of(3), 3, overwrite=True)
            with pytest.raises(FileExistsError):
                LocalStorage(run).publish("DiT_epoch_00000_step_00003.pth", 1, [memoryview(b"x")])
            export(store.file(), os.path.join(run, "ft_model.pth"))
        assert steps_in(run) == [2, 3]
        assert temporary_files(run) == []
        with pytest.raises(OSError, match=r".*") if fault != "short writes" else open(os.devnull):
            os.link(os.path.join(run, "ft_model.pth"), os.path.join(run, "linked"))
    tally.record("1, 4", f"FUSE, {fault}", "save, overwrite, prune, export", 7)


def saved_through_short_writes(mutant: Mutant) -> int:
    """The exit code of a process that saves where a write takes a third, with a way of saving that may be broken."""

    def act() -> None:
        mutant()
        with CheckpointStore(os.path.join(folder, "run")) as store:
            store.save(state_of(1), 1)
        assert steps_in(os.path.join(folder, "run")) == [1]

    with passing_through("short writes") as folder:
        return run_in_child(act)


@pytest.mark.parametrize("mutant", BY_SHORT_WRITE, ids=lambda mutant: mutant.__name__)
def test_broken_writing_is_caught(mutant: Mutant, capfd: pytest.CaptureFixture[str]) -> None:
    """A writer that takes every write for a whole one is caught where writes are short; ours is not."""
    needs("fusermount3")
    assert saved_through_short_writes(lambda: None) == 0
    assert saved_through_short_writes(mutant) != 0
    assert "SaveFailedError" in capfd.readouterr().err


def test_a_disk_that_fails_to_sync(tally: Tally) -> None:
    """When the disk answers a sync with an I/O error, the save fails and nothing is listed as saved."""
    needs("fusermount3")
    with passing_through("syncs fail") as folder:
        run = os.path.join(folder, "run")
        with CheckpointStore(run) as store, pytest.raises(SaveFailedError, match="Input/output error"):
            store.save(state_of(1), 1)
        assert steps_in(run) == []
        assert temporary_files(run) == []
    tally.record("4", "FUSE, syncs fail", "the disk refuses to sync the file", 1)


JUMPING = """
import os, sys
from datetime import datetime
import torch
from seedvc_ckpt import CheckpointStore, keep_last
from seedvc_ckpt.storage.local import LocalStorage

run, clock, jumps = sys.argv[1], os.environ["FAKETIME_TIMESTAMP_FILE"], sys.argv[2:]
living = iter([])
with CheckpointStore(run, retention=keep_last(3)) as store:
    for step, jump in enumerate(jumps, start=1):
        with open(clock, "w") as file:
            file.write(jump)
        store.save({"net": torch.full((1000,), float(step)), "iters": step}, step)
        print(datetime.now().year)
        assert store.latest().step == step
        assert store.collect_garbage() == []
"""


def test_a_clock_that_jumps(tmp_path: Path, full: bool, tally: Tally, chance) -> None:
    """Years forward or back between saves change nothing: order is by step, and living writers are seen to live."""
    if shutil.which("faketime") is None:
        pytest.skip("there is no faketime")
    clock, run = tmp_path / "clock", tmp_path / "run"
    clock.write_text("+0d")
    jumps = [f"{chance.choice('+-')}{chance.randrange(1, 7000)}d" for _ in range(60 if full else 12)]
    prefix = subprocess.run(
        ["faketime", "-f", "+0d", "printenv", "LD_PRELOAD"], capture_output=True, text=True, check=True
    )
    settings = {
        **os.environ,
        "LD_PRELOAD": prefix.stdout.strip(),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    living = LocalStorage(str(run))

    def chunks() -> Iterator[memoryview]:
        yield memoryview(b"half")
        done = subprocess.run(
            [sys.executable, "-c", JUMPING, str(run), *jumps], env=settings, capture_output=True, text=True, check=False
        )
        years.extend(int(line) for line in done.stdout.split())
        assert done.returncode == 0, done.stderr
        yield memoryview(b"half")

    years: list[int] = []
    living.publish("notes.bin", 8, chunks())  # another writer, which lives through all of it
    assert len(set(years)) > len(jumps) // 3, "the clock did not jump"
    store = CheckpointStore(run, read_only=True)
    last = len(jumps)
    assert [info.step for info in store.list()] == [last - 2, last - 1, last]
    assert store.resume().state["iters"] == last
    tally.record("2, 3", "local disk", "the clock jumps by years between saves", len(jumps))


def test_the_folder_goes_away_under_a_store(tmp_path: Path, tally: Tally) -> None:
    """A store whose folder was moved or deleted says so; it makes no second one, and what was moved is untouched."""
    run = tmp_path / "run"
    store = CheckpointStore(run)
    store.save(state_of(1), 1)
    run.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"lock file .* was deleted or replaced"):
        store.save(state_of(2), 2)
    assert not run.exists()
    assert steps_in(str(tmp_path / "moved")) == [1]
    (tmp_path / "moved").rename(run)
    store.save(state_of(2), 2)
    assert steps_in(str(run)) == [1, 2]
    shutil.rmtree(run)
    with pytest.raises(CheckpointError, match=r"lock file .* was deleted or replaced"):
        store.save(state_of(3), 3)
    store.close()
    tally.record("8", "local disk", "the run's folder is moved or deleted under a store", 2)


def test_the_folder_goes_away_under_the_trainer(recordings: Path, tmp_path: Path, tally: Tally) -> None:
    """The trainer ends in words that say what happened, and the moved run goes on where it was saved last."""
    output, run = tmp_path / "output.txt", tmp_path / "run"

    arguments = runs.arguments(recordings, tmp_path, max_steps=100_000, save_every=1, lr=None)
    trainer = Child(lambda: be_command(cli.main, ["seedvc-train", *arguments], output)).go()
    deadline = time.monotonic() + 60
    while not list(run.glob("DiT_*_step_0000[2-9].pth")) and time.monotonic() < deadline:
        time.sleep(0.01)
    moved = tmp_path / "moved"
    run.rename(moved)
    assert trainer.wait() == 1
    said = output.read_text()
    assert "Traceback" not in said
    assert str(run) in said
    assert not list(run.glob("*.pth"))
    resumed = CheckpointStore(moved).resume()
    assert resumed.info.step >= 2
    assert resumed.rejected == ()
    tally.record("8", "local disk", "the run's folder is moved under the trainer", 1)
