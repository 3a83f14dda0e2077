"""Saving in the background: exactly the state at the moment of `save`, and every failure told once."""

import copy
import gc
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
import weakref

import pytest
import states
import torch
from hypothesis import HealthCheck, given, settings

from seedvc_ckpt import (
    SEED_VC,
    AsyncSaver,
    CheckpointError,
    CheckpointExistsError,
    CheckpointStore,
    LeaseHeldError,
    SaveFailedError,
    StaleStepError,
    UnsafeCheckpointError,
    keep_last,
)
from seedvc_ckpt.format import staging
from seedvc_ckpt.testing import FaultyStorage


class Trainer:
    """Changes everything that a trainer may change: weights, moments, buffers, averages, counters, lists."""

    def __init__(self, width=64):
        self.model = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.BatchNorm1d(width))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.average = copy.deepcopy(self.model)
        self.noise = torch.zeros(width, width)
        self.history, self.steps = [], 0
        self.step()

    def step(self):
        """One step, everything changed in place."""
        self.noise.normal_()
        self.model(self.noise).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for average, parameter in zip(self.average.parameters(), self.model.parameters(), strict=True):
                average.lerp_(parameter, 0.1)
        self.steps += 1
        self.history.append(self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.99

    def state(self):
        """Live tensors and containers."""
        return {
            "net": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
            "noise": self.noise,
            "history": self.history,
            "iters": self.steps,
        }


@pytest.fixture
def held(monkeypatch):
    """An event that copies in the background wait for; clear it to hold them up."""
    go, copied = threading.Event(), staging.make_copies
    go.set()

    def copy_when_told(copies, moments):
        if threading.current_thread() is not threading.main_thread():
            assert go.wait(30)
        copied(copies, moments)

    monkeypatch.setattr(staging, "make_copies", copy_when_told)
    yield go
    go.set()


def test_what_is_written_is_the_state_at_the_moment_of_save(location):
    """A trainer that changes everything as fast as it can finds each state as it was when it was saved."""
    trainer, store, expected = Trainer(), CheckpointStore(location), {}
    with AsyncSaver(store) as saver:
        saver.guard(trainer.optimizer)
        for step in range(1, 31):
            expected[step] = copy.deepcopy(trainer.state())
            saver.save(trainer.state(), step)
            for _ in range(3):
                trainer.step()
    assert [info.step for info in store.list()] == list(expected)
    for step, state in expected.items():
        assert states.difference(store.load(step), state) is None


def test_step_waits_for_what_it_changes(run, held):
    """With a guard, `save` returns while weights are still to be copied, and `step` waits; all else may change."""
    trainer, store = Trainer(), CheckpointStore(run)
    with AsyncSaver(store) as saver:
        saver.guard(trainer.optimizer)
        saver.guard(trainer.optimizer)  # twice is once
        expected = copy.deepcopy(trainer.state())
        held.clear()
        pending = saver.save(trainer.state(), 1)
        trainer.model[1].running_mean.fill_(7)
        trainer.noise.fill_(7)
        trainer.history.append("later")
        stepping = threading.Thread(target=trainer.optimizer.step)
        stepping.start()
        stepping.join(0.2)
        assert stepping.is_alive(), "step() did not wait"
        assert not pending.done
        held.set()
        stepping.join(30)
        pending.wait_staged()
        assert pending.result() == store.latest()
    assert states.difference(store.load(), expected) is None


def test_averages_guarded_with_an_optimizer_are_copied_before_its_step(run, held):
    """Averages given to `guard` are copied in the background, and those that a step brings up to date are whole."""
    trainer, store = Trainer(), CheckpointStore(run)
    averages = list(trainer.average.parameters())
    with AsyncSaver(store) as saver:
        saver.guard(trainer.optimizer)
        saver.guard(trainer.optimizer, averages)
        expected = copy.deepcopy(trainer.state())
        held.clear()
        pending = saver.save(trainer.state(), 1)
        stepping = threading.Thread(target=trainer.step)
        stepping.start()
        stepping.join(0.2)
        assert stepping.is_alive(), "step() did not wait"
        held.set()
        stepping.join()
        pending.result()
        assert states.difference(store.load(1), expected) is None
        held.clear()
        torn = saver.save(trainer.state(), 2)
        averages[0].data.fill_(7)  # too early: with neither a step nor wait_staged() before, nothing protects it
        held.set()
        torn.result()
    assert any(bool((value == 7).all()) for value in store.load(2)["average"].values())


def test_an_optimizer_waits_for_its_own_tensors_only(run, monkeypatch):
    """Of two optimizers, the one whose tensors are copied goes on while the other's are still to come."""
    models = [torch.nn.Linear(8, 8) for _ in range(2)]
    optimizers = [torch.optim.SGD(model.parameters(), momentum=0.9) for model in models]
    go, copied = threading.Event(), staging.make_copies
    later = {model.weight.data_ptr() for model in models[1:]}

    def hold_second(copies, moments):
        if any(copy.source.memory in later for copy in copies):
            assert go.wait(30)
        copied(copies, moments)

    monkeypatch.setattr(staging, "make_copies", hold_second)
    with AsyncSaver(CheckpointStore(run)) as saver:
        for model, optimizer in zip(models, optimizers, strict=True):
            saver.guard(optimizer)
            model(torch.ones(1, 8)).sum().backward()
        pending = saver.save({"models": [model.state_dict() for model in models]}, 1)
        optimizers[0].step()
        waiting = threading.Thread(target=optimizers[1].step)
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive()
        go.set()
        waiting.join(30)
        pending.result()


def test_without_a_guard_everything_is_copied_before_save_returns(run, held):
    """Nobody waits for anything then: the caller may change all tensors at once."""
    trainer, store = Trainer(), CheckpointStore(run)
    with AsyncSaver(store) as saver:
        expected = copy.deepcopy(trainer.state())
        held.clear()
        saver.save(trainer.state(), 1)
        trainer.step()
        held.set()
    assert states.difference(store.load(), expected) is None


def test_memory_that_is_only_partly_guarded_is_copied_at_once(run, held):
    """A buffer that shares its memory with a guarded parameter may be changed right after `save`."""
    memory = torch.arange(100.0)
    parameter, buffer = torch.nn.Parameter(memory[:50]), memory[40:]
    optimizer = torch.optim.SGD([parameter])
    store = CheckpointStore(run)
    with AsyncSaver(store) as saver:
        saver.guard(optimizer)
        held.clear()
        saver.save({"parameter": parameter, "buffer": buffer}, 1)
        buffer.zero_()
        held.set()
    assert torch.equal(store.load()["buffer"], torch.arange(40.0, 100.0))


def test_nested_optimizer_state_is_guarded(run, held):
    """Tensors in lists of an optimizer's state, as L-BFGS keeps them, wait for its `step` too."""
    parameter = torch.nn.Parameter(torch.ones(50))
    optimizer = torch.optim.LBFGS([parameter], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (parameter**4).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    changed = staging.spans_changed_by({1: (optimizer, ())})
    history = optimizer.state[parameter]["old_dirs"]
    assert history
    assert {tensor.data_ptr() for tensor in history} <= set(changed)


@pytest.mark.parametrize("second", [lambda p: p, lambda p: torch.nn.Parameter(p.data[10:])], ids=["same", "view"])
def test_what_two_optimizers_change_is_copied_at_once(run, held, second):
    """A parameter of two guarded optimizers is not torn by the step of either."""
    parameter = torch.nn.Parameter(torch.ones(50))
    other = second(parameter)
    optimizers = [torch.optim.SGD([parameter], lr=1.0), torch.optim.SGD([other], lr=1.0)]
    store = CheckpointStore(run)
    with AsyncSaver(store) as saver:
        for optimizer in optimizers:
            saver.guard(optimizer)
        held.clear()
        saver.save({"p": parameter}, 1)
        parameter.data.zero_()
        held.set()
    assert torch.equal(store.load()["p"], torch.ones(50))


@pytest.mark.parametrize("saved", [lambda base: base[:, 1], lambda base: base.flatten()[::50]], ids=["gap", "packed"])
def test_gaps_between_guarded_elements_are_not_guarded(run, held, saved):
    """What lies between the elements of a strided parameter, or reaches beyond it, is copied at once."""
    base = torch.ones(100, 2)
    optimizer = torch.optim.SGD([torch.nn.Parameter(base[:, ::2]), torch.nn.Parameter(base[:20])])
    store = CheckpointStore(run)
    with AsyncSaver(store) as saver:
        saver.guard(optimizer)
        held.clear()
        buffer = saved(base)
        saver.save({"buffer": buffer}, 1)
        expected = torch.ones_like(buffer)
        buffer.zero_()
        held.set()
    assert torch.equal(store.load()["buffer"], expected)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(state=states.states)
def test_the_file_is_the_one_that_a_plain_save_writes(state):
    """Whatever the state's views, strides and dtypes, copying it first changes no byte of the tensors."""
    from seedvc_ckpt import Manifest
    from seedvc_ckpt.format import torchzip

    direct = torchzip.encode(state, Manifest(step=1))
    staged = torchzip.encode(state, Manifest(step=1), check_later=True)
    records, copies = staging.StagingBuffer().place(staged.records)
    staging.make_copies(copies, {})
    assert b"".join(staged.with_records(records)) == b"".join(direct)


def test_errors_that_can_be_known_are_raised_at_once(run, state):
    """Order, foreign objects and a lease that another process holds are told by `save` itself, as by the store."""
    store, loop = CheckpointStore(run), []
    loop.append(loop)
    with AsyncSaver(store) as saver:
        saver.save(state(5), 5)
        with pytest.raises(StaleStepError):
            saver.save(state(4), 4)
        with pytest.raises(CheckpointExistsError):
            saver.save(state(5), 5)
        with pytest.raises(UnsafeCheckpointError, match=r"x.*can't be saved"):
            saver.save({"x": object()}, 6)
        with pytest.raises(UnsafeCheckpointError, match="contains itself"):
            saver.save(loop, 6)
        with pytest.raises(ValueError, match="loss"):
            saver.save(state(6), 6, metrics={"loss": "low"})
        assert saver.save(state(6), 6, epoch=2, metrics={"loss": 0.5}, settings={"sr": 16}).result().epoch == 2
    assert store.inspect().manifest.metrics == {"loss": 0.5}
    assert store.inspect().manifest.settings == {"sr": 16}
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer"):
        saver.guard("adam")
    with pytest.raises(ValueError, match="when_busy"):
        AsyncSaver(store, when_busy="never")


def test_another_process_that_has_the_lease_is_named_at_once(run, state):
    """A second trainer does not find out in the background that it can't save."""
    script = (
        "import sys\nfrom seedvc_ckpt import CheckpointStore\nstore = CheckpointStore(sys.argv[1])\n"
        "store.acquire()\nprint('held', flush=True)\nsys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", script, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        with AsyncSaver(CheckpointStore(run)) as saver, pytest.raises(LeaseHeldError, match=f"process {other.pid}"):
            saver.save(state(), 1)
    finally:
        other.communicate()


@pytest.fixture
def failing(run, state):
    """A saver whose publishing fails once, and its store."""
    faults = iter([None, "midway"])
    storage = FaultyStorage(
        CheckpointStore(run).storage, lambda call: next(faults, None) if call.operation == "publish" else None
    )
    store = CheckpointStore(storage)
    store.save(state(0), 0)
    return AsyncSaver(store), store


def test_a_failure_is_told_by_result_and_not_again(failing, state):
    """After `result` raised, the next save and close have nothing to tell, and later saves work."""
    saver, store = failing
    pending = saver.save(state(1), 1)
    with pytest.raises(SaveFailedError):
        pending.result()
    assert "failed" in repr(pending)
    assert saver.save(state(1), 1).result().step == 1
    saver.close()
    assert [info.step for info in store.list()] == [0, 1]


@pytest.mark.parametrize("finished", [False, True])
def test_a_failure_is_told_by_the_next_save_once(failing, state, finished):
    """Where nobody asked for the result, the next save raises it and saves nothing; the one after that works."""
    saver, store = failing
    pending = saver.save(state(1), 1)
    if finished:
        pending.wait()
    with pytest.raises(SaveFailedError):
        saver.save(state(2), 2)
    assert saver.save(state(2), 2).result().step == 2
    saver.close()
    assert [info.step for info in store.list()] == [0, 2]


def test_a_failure_is_told_by_close_once(failing, state):
    """`close`, also that of a with statement, raises what nobody was told; a second one does not."""
    saver, _ = failing
    with pytest.raises(SaveFailedError), saver:
        saver.save(state(1), 1)
    saver.close()


def test_an_error_in_the_block_is_not_masked(failing, state, caplog):
    """When the block raises, that is what comes out; the failed save is logged."""
    saver, _ = failing
    with caplog.at_level(logging.ERROR, "seedvc_ckpt"), pytest.raises(ZeroDivisionError), saver:  # noqa: PT012
        saver.save(state(1), 1)
        raise ZeroDivisionError
    assert "the save of DiT_epoch_00000_step_00001.pth failed" in caplog.text


def test_a_saver_that_is_dropped_logs_its_failure(failing, state, caplog):
    """A saver that nobody closes and nobody holds any more logs what it could not save."""
    saver, store = failing
    other = AsyncSaver(store)
    with caplog.at_level(logging.ERROR, "seedvc_ckpt"):
        other.save(state(1), 1).wait()
        del other
        gc.collect()
    assert "failed" in caplog.text
    saver.close()


def test_a_saver_that_is_dropped_first_logs_its_failure_later(run, state, caplog, monkeypatch):
    """A save whose saver is gone before it fails is logged all the same."""
    go = threading.Event()

    def fail(_self, _save, *, verify):
        assert go.wait(30), verify
        raise SaveFailedError("the disk is gone")

    monkeypatch.setattr(CheckpointStore, "_write", fail)
    saver = AsyncSaver(CheckpointStore(run))
    with caplog.at_level(logging.ERROR, "seedvc_ckpt"):
        pending = saver.save(state(1), 1)
        del saver
        gc.collect()
        assert caplog.text == ""
        go.set()
        pending.wait()
    assert "failed: the disk is gone" in caplog.text


def test_a_failed_save_lets_go_of_the_state(failing):
    """After a failure neither the error nor what is left of the save keeps tensors or the copies of them alive."""
    saver, _ = failing
    tensor = torch.ones(1000)
    pending = saver.save({"w": tensor}, 1)
    alive = [weakref.ref(tensor), weakref.ref(saver._buffer._memory)]
    with pytest.raises(SaveFailedError):
        pending.result()
    saver.close()
    del tensor
    gc.collect()
    assert [found() for found in alive] == [None, None]
    assert pending.info is None


def test_a_save_holds_no_live_tensor_once_it_is_copied(run, monkeypatch):
    """While the file is written, the trainer may already let go of what it saved."""
    go, write = threading.Event(), CheckpointStore._write

    def slowly(self, save, *, verify):
        assert go.wait(30)
        return write(self, save, verify=verify)

    monkeypatch.setattr(CheckpointStore, "_write", slowly)
    parameter = torch.nn.Parameter(torch.ones(1000))
    with AsyncSaver(CheckpointStore(run)) as saver:
        saver.guard(torch.optim.SGD([parameter]))
        tensors = [parameter.detach(), torch.ones(1000)]  # one that is copied later, one at once
        alive = [weakref.ref(tensor) for tensor in tensors]
        pending = saver.save({"w": [*tensors]}, 1)
        del tensors
        deadline = time.monotonic() + 10
        while any(found() is not None for found in alive) and time.monotonic() < deadline:
            gc.collect()
        assert [found() for found in alive] == [None, None]
        go.set()
        pending.result()


def test_an_interrupt_at_the_start_is_no_deadlock(run, state, monkeypatch):
    """Where an interrupt keeps the thread from starting, nothing waits for it, and the next save works."""

    def interrupted(_thread):
        raise KeyboardInterrupt

    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    store = CheckpointStore(run)
    with AsyncSaver(store) as saver:
        saver.guard(optimizer)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", interrupted)
            with pytest.raises(KeyboardInterrupt):
                saver.save({"net": model.state_dict()}, 1)
        optimizer.step()
        with pytest.raises(CheckpointError, match="interrupted before it began"):
            saver._pending.result()
        assert saver.save(state(2), 2).result().step == 2
    assert [info.step for info in store.list()] == [2]


def test_a_store_that_is_closed_meanwhile_writes_nothing_more(run, state, held):
    """A save in flight does not publish without the lease, nor takes it again; the caller is told."""
    store, model = CheckpointStore(run), torch.nn.Linear(2, 2)
    with AsyncSaver(store) as saver:
        saver.guard(torch.optim.SGD(model.parameters()))
        held.clear()
        pending = saver.save({"net": model.state_dict()}, 1)
        store.close()
        held.set()
        with pytest.raises(LeaseHeldError, match="it was released"):
            pending.result()
    assert store.list() == []
    assert store.storage.holder() == ""


def test_a_default_device_changes_nothing(run, state):
    """Copies are made in the CPU's memory whatever device torch makes new tensors on."""
    store = CheckpointStore(run)
    torch.set_default_device("meta")
    try:
        with AsyncSaver(store) as saver:
            saver.save({"w": torch.ones(1000, device="cpu")}, 1).result()
        assert store.load()["w"].device.type == "cpu"
    finally:
        torch.set_default_device(None)
    assert torch.equal(store.load()["w"], torch.ones(1000))


def test_what_only_reading_back_shows_is_told_later(run):
    """A plain number that torch could not load again fails in the background: nothing is listed, the caller is told."""
    store = CheckpointStore(run)
    with AsyncSaver(store) as saver:
        pending = saver.save({"iters": 1 << 3000}, 1)
        with pytest.raises(UnsafeCheckpointError):
            pending.result()
    assert store.list() == []


def test_a_second_save_waits_or_is_skipped(run, state, monkeypatch):
    """While one save is in flight, another waits for it, or with when_busy="skip" does not happen."""
    go, store = threading.Event(), CheckpointStore(run, retention=keep_last(5))
    write = CheckpointStore._write

    def slowly(self, save, *, verify):
        assert go.wait(30)
        return write(self, save, verify=verify)

    monkeypatch.setattr(CheckpointStore, "_write", slowly)
    with AsyncSaver(store, when_busy="skip") as saver:
        first = saver.save(state(1), 1)
        assert saver.save(state(2), 2) is None
        threading.Timer(0.1, go.set).start()
        began = time.monotonic()
        third = saver.save(state(3), 3, when_busy="wait")
        assert time.monotonic() - began > 0.05
        assert first.done
        assert third.result().step == 3
    assert [info.step for info in store.list()] == [1, 3]
    assert "done" in repr(third)


def test_the_copies_use_the_same_memory_again(run):
    """Save after save, the buffer is the one that was allocated first; it goes when the saver is closed."""
    trainer, seen = Trainer(), set()
    store = CheckpointStore(run, retention=keep_last(1))
    with AsyncSaver(store) as saver:
        saver.guard(trainer.optimizer)
        for step in range(1, 20):
            saver.save(trainer.state(), step).result()
            seen.add(saver._buffer._memory.data_ptr())
            trainer.step()
        size = store.inspect().manifest.tensor_bytes
        assert size <= saver._buffer._memory.nbytes < 1.01 * size + 64 * 40
    assert len(seen) == 1
    assert saver._buffer is None
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("seedvc-ckpt")]


def test_a_thousand_saves_need_no_more_memory_than_a_hundred(run):
    """Neither memory nor threads nor open files grow with the number of saves."""
    done = script(
        run,
        "from seedvc_ckpt import keep_last",
        "store.retention = (keep_last(2),)",
        "def used():",
        "    pages = int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGESIZE')",
        "    return pages, threading.active_count(), len(os.listdir('/proc/self/fd'))",
        "state = {'w': torch.ones(30_000), 'list': [{'n': n} for n in range(100)]}",
        "for step in range(1000):",
        "    saver.save(state, step)",
        "    if step in (100, 999): saver.save(state, step, overwrite=True).result(); print(*used())",
    )
    assert done.returncode == 0, done.stderr
    early, late = ([int(number) for number in line.split()] for line in done.stdout.splitlines())
    assert late[0] - early[0] < 4 << 20
    assert late[1:] == early[1:]


def test_no_memory_for_the_copies_is_an_error_of_the_save(run, state, monkeypatch):
    """The caller is told what is needed and what to use instead; nothing is written."""
    empty = torch.empty

    def refuse(size, **options):
        if size:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")
        return empty(size, **options)

    store = CheckpointStore(run)
    with AsyncSaver(store) as saver:
        saver.save(state(1), 1).result()
        monkeypatch.setattr(torch, "empty", refuse)
        with pytest.raises(SaveFailedError, match=r"no memory for a copy of the state.*CheckpointStore\.save"):
            saver.save({"large": torch.ones(5000)}, 2)
        monkeypatch.undo()
        assert saver.save(state(2), 2).result().step == 2


def script(run, *lines):
    """A program that saves in the background and then does something; run, and given back."""
    program = textwrap.dedent(
        f"""
        import os, signal, sys, threading, time, torch
        from seedvc_ckpt import AsyncSaver, CheckpointStore
        from seedvc_ckpt.testing import FaultyStorage
        store = CheckpointStore({str(run)!r})
        saver = AsyncSaver(store)
        state = {{"w": torch.ones(4_000_000), "iters": 1}}
        """
    ) + "\n".join(lines)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300)


def test_the_interpreters_exit_finishes_a_save(run):
    """A program that ends without closing anything has saved what it began to save."""
    done = script(run, "saver.save(state, 1)")
    assert done.returncode == 0, done.stderr
    store = CheckpointStore(run)
    assert [info.step for info in store.list()] == [1]
    store.verify()


def test_a_save_while_the_interpreter_exits_is_finished(run):
    """A save that an exit handler makes is written before the process ends."""
    done = script(run, "import atexit", "atexit.register(lambda: saver.save(state, 1))")
    assert done.returncode == 0, done.stderr
    CheckpointStore(run).verify(1)


def test_the_interpreters_exit_reports_a_failure(run):
    """A save that fails while the program ends is told on standard error."""
    done = script(
        run,
        "storage = FaultyStorage(store.storage, lambda call: 'midway' if call.operation == 'publish' else None)",
        "saver = AsyncSaver(CheckpointStore(storage))",
        "saver.save(state, 1)",
    )
    assert "the save of DiT_epoch_00000_step_00001.pth failed" in done.stderr
    assert CheckpointStore(run).list() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_during_a_save_leaves_nothing_half_done(run, number):
    """A process that is killed in a background save leaves the older checkpoint, and a next save works."""
    program = (
        "import os, sys, torch\nfrom seedvc_ckpt import AsyncSaver, CheckpointStore\n"
        "saver = AsyncSaver(CheckpointStore(sys.argv[1]))\n"
        "saver.save({'w': torch.ones(4_000_000)}, 1).result()\nprint('saving', flush=True)\n"
        "for step in range(2, 1000): saver.save({'w': torch.full((4_000_000,), float(step))}, step)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(run)], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"saving\n"
    time.sleep(0.05)
    child.send_signal(number)
    child.communicate()
    assert child.returncode == -number
    with CheckpointStore(run) as store:
        for info in store.list():
            state = store.load(info)
            assert info.step == 1 or (state["w"] == info.step).all()
        assert store.list()[0].step == 1
        store.save({"iters": 1000}, 1000)
    assert not list(run.glob(".tmp-*"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_has_no_part_in_it(run, held):
    """A child neither waits for copies that its parent makes, nor saves with its parent's threads."""
    trainer = Trainer()
    with AsyncSaver(CheckpointStore(run)) as saver:
        saver.guard(trainer.optimizer)
        held.clear()
        pending = saver.save(trainer.state(), 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            code = 1
            try:
                trainer.optimizer.step()
                with pytest.raises(CheckpointError, match="belongs to the parent process"):
                    saver.save(trainer.state(), 2)
                for wait in (pending.wait_staged, pending.result):
                    with pytest.raises(CheckpointError, match="in the parent process"):
                        wait()
                saver.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        held.set()
    assert SEED_VC.format(1) in os.listdir(run)
