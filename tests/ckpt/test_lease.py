"""One writer a run."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from seedvc_ckpt import (
    CheckpointExistsError,
    CheckpointStore,
    LeaseHeldError,
    NamePattern,
    StaleStepError,
    keep_last,
)
from seedvc_ckpt.storage.lease import LOCK_NAME

STATE = {"x": torch.ones(3)}
HOLDER = """
import sys, time, torch
from seedvc_ckpt import CheckpointStore
store = CheckpointStore(sys.argv[1])
store.save({"x": torch.ones(3)}, 1)
print("holds", flush=True)
time.sleep(100)
"""


@pytest.fixture
def holder(run):
    """Another process that has saved step 1 and lives on."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"holds\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_told_who_writes(run, holder):
    """Every write of another process is refused, naming host, process and since when; nothing has changed."""
    store = CheckpointStore(run, retention=keep_last(1))
    before = sorted(os.listdir(run))
    writes = (
        lambda: store.save(STATE, 2),
        lambda: store.set_aside(store.latest(), "why not"),
        store.acquire,
    )
    for write in writes:
        with pytest.raises(LeaseHeldError, match=rf"process {holder.pid} on .+, since 20\d\d-"):
            write()
    assert sorted(os.listdir(run)) == before


def test_who_is_ahead_is_news_before_the_step_is(run, holder):
    """A save at a step that another living process has saved names that process; once it is gone, the step."""
    store = CheckpointStore(run)
    for step in (0, 1):
        with pytest.raises(LeaseHeldError, match=rf"process {holder.pid} "):
            store.save(STATE, step)
    holder.kill()
    holder.wait()
    with pytest.raises(CheckpointExistsError):
        store.save(STATE, 1)
    with pytest.raises(StaleStepError):
        store.save(STATE, 0)


def test_a_holder_that_has_not_told_its_name_yet_is_waited_for(run):
    """Between taking the lock and recording who has it pass moments; whoever is refused then still learns who."""
    script = (
        "import sys, time; from seedvc_ckpt.storage import lease; from seedvc_ckpt import CheckpointStore\n"
        "record = lease._record\n"
        "def late(path, content):\n"
        "    print('holds', flush=True); time.sleep(0.3); record(path, content)\n"
        "lease._record = late; store = CheckpointStore(sys.argv[1]); store.acquire(); time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(run)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"holds\n"
            with pytest.raises(LeaseHeldError, match=rf"process {process.pid} on .+, since 20\d\d-"):
                CheckpointStore(run).acquire()
        finally:
            process.kill()


def test_a_released_lease_names_nobody(run):
    """After `close` the lock file holds no name, which a later holder could be mistaken for."""
    store = CheckpointStore(run)
    store.acquire()
    assert f'"process": {os.getpid()}' in (run / LOCK_NAME).read_text()
    store.close()
    assert (run / LOCK_NAME).read_text() == ""


def test_readers_need_nothing(run, holder):
    """While another process writes, everything that reads works."""
    store = CheckpointStore(run)
    assert store.latest().step == 1
    store.verify(1)
    assert torch.equal(store.load()["x"], STATE["x"])
    assert store.resume().info.step == 1
    assert store.prune(dry_run=True).remove == ()


def test_a_dead_holder_frees_the_run_at_once(run, holder):
    """A killed writer's lease is free without waiting."""
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert CheckpointStore(run).save(STATE, 2).step == 2


def test_pins_need_no_lease(run, holder):
    """A checkpoint can be pinned while its run is training."""
    store = CheckpointStore(run)
    assert store.pin(1).pinned
    assert store.latest().pinned
    assert not store.unpin(1).pinned


def test_stores_of_one_process_share_it(run):
    """Two stores with two patterns write side by side; the lease ends with the last of them."""
    first = CheckpointStore(run, pattern="CFM_{step:05d}.pth")
    second = CheckpointStore(run, pattern=NamePattern("AR_{step:05d}.pth"))
    first.save(STATE, 1)
    second.save(STATE, 1)
    first.close()
    assert _other_process(run).returncode == 1
    second.close()
    assert _other_process(run).returncode == 0


def test_a_store_that_is_gone_holds_nothing(run):
    """A store that was dropped without close gives its lease back."""
    CheckpointStore(run).save(STATE, 1)
    assert _other_process(run).returncode == 0


def test_stores_may_be_collected_at_any_moment(tmp_path):
    """Stores that the garbage collector finds while another takes a lease neither block it nor keep theirs."""
    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for number in range(300):
            store = CheckpointStore(tmp_path / str(number % 3))
            store.acquire()
            store.itself = store  # only the collector can find it
            del store
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert all(_other_process(tmp_path / str(number)).returncode == 0 for number in range(3))


def test_a_closed_store_can_write_again(run):
    """After close the next write takes the lease anew."""
    store = CheckpointStore(run)
    store.save(STATE, 1)
    store.close()
    store.close()
    assert store.save(STATE, 2).step == 2


def test_threads_share_it(run):
    """Any thread of the process may write."""
    store = CheckpointStore(run)
    store.save(STATE, 1)
    thread = threading.Thread(target=store.save, args=(STATE, 2))
    thread.start()
    thread.join()
    assert store.latest().step == 2


def test_a_replaced_lock_file_stops_the_writer(run):
    """Whoever deletes or replaces the lock file stops the save that is under way; nothing is published."""
    store = CheckpointStore(run)
    store.save(STATE, 1)
    (run / LOCK_NAME).unlink()
    with pytest.raises(LeaseHeldError, match="deleted or replaced"):
        store.save(STATE, 2)
    (run / LOCK_NAME).touch()
    with pytest.raises(LeaseHeldError, match="deleted or replaced"):
        store.save(STATE, 2)
    assert sorted(os.listdir(run)) == [LOCK_NAME, store.latest().name]
    assert store.latest().step == 1


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_fork_does_not_inherit_it(run):
    """A forked child can't write with its parent's lease; after the parent it can with its own."""
    script = f"""
import os, sys, torch
from seedvc_ckpt import CheckpointStore, LeaseHeldError
store = CheckpointStore({str(run)!r})
store.save({{"x": torch.ones(3)}}, 1)
child = os.fork()
if child == 0:
    try:
        store.save({{"x": torch.ones(3)}}, 2)
    except LeaseHeldError:
        os._exit(7)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
store.save({{"x": torch.ones(3)}}, 2)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_leftovers_of_the_dead_go_with_the_next_writer(run):
    """A killed save's temporary file is removed by the next process that writes, a living one's is not."""
    script = (
        "import sys, os, time\n"
        "from seedvc_ckpt.storage.local import LocalStorage\n"
        "def chunks():\n"
        "    yield memoryview(b'part')\n"
        "    print('writes', flush=True)\n"
        "    time.sleep(100)\n"
        "LocalStorage(sys.argv[1]).publish('a.pth', 8, chunks())\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, str(run)], stdout=subprocess.PIPE) for _ in range(2)]
    for writer in writers:
        assert writer.stdout.readline() == b"writes\n"
    dead, living = writers
    dead.kill()
    dead.wait()
    store = CheckpointStore(run)
    (leftover,) = store.collect_garbage(dry_run=True)
    assert (leftover.size, f"process {dead.pid} of this host is gone") == (4, leftover.why)
    assert len(list(run.glob(".tmp-*"))) == 2
    store.save(STATE, 1)
    (left,) = run.glob(".tmp-*")
    assert f"-{living.pid}-" in left.name
    living.kill()
    living.wait()
    for writer in writers:
        writer.stdout.close()


@pytest.mark.parametrize("kind", ["foreign host", "symlink", "three links", "other name", "locked"])
def test_what_is_not_a_leftover_stays(run, kind):
    """Only a regular file of our making, unlocked, whose writer is proven gone is ever collected."""
    run.mkdir()
    name = ".tmp-" + "0" * 16 + f"-999999999-1-{os.uname().nodename}"
    path = run / name
    held = None
    if kind == "foreign host":
        path = run / (".tmp-" + "0" * 16 + "-1-1-elsewhere")
        path.write_bytes(b"x")
    elif kind == "symlink":
        (run / "target").write_bytes(b"x")
        path.symlink_to(run / "target")
    elif kind == "three links":
        path.write_bytes(b"x")
        os.link(path, run / "one")
        os.link(path, run / "two")
    elif kind == "other name":
        path = run / ".tmp-0-1-2-3"
        path.write_bytes(b"x")
    else:
        import fcntl

        path.write_bytes(b"x")
        held = path.open("rb")
        fcntl.flock(held, fcntl.LOCK_EX)
    assert CheckpointStore(run).collect_garbage() == []
    assert path.exists()
    if held:
        held.close()
        assert len(CheckpointStore(run).collect_garbage()) == 1  # the same file without the lock goes


def test_old_files_of_other_hosts_go(run):
    """What another host left is removed when it is older than a day."""
    run.mkdir()
    path = run / (".tmp-" + "0" * 16 + "-1-1-elsewhere")
    path.write_bytes(b"x")
    old = time.time() - 25 * 3600
    os.utime(path, (old, old))
    (removed,) = CheckpointStore(run).collect_garbage()
    assert "from elsewhere" in removed.why
    assert not path.exists()


def _other_process(run):
    script = "import sys; from seedvc_ckpt import CheckpointStore; CheckpointStore(sys.argv[1]).acquire()"
    return subprocess.run([sys.executable, "-c", script, str(run)], capture_output=True, check=False)


def test_leftovers_in_aside_go_too(run):
    """A writer that died while it set a file aside leaves nothing there for good."""
    store = CheckpointStore(run)
    store.save(STATE, 1)
    store.set_aside(store.latest(), "why not")
    name = ".tmp-" + "0" * 16 + f"-999999999-1-{os.uname().nodename}"
    (run / "aside" / name).write_bytes(b"x")
    (removed,) = store.collect_garbage()
    assert removed.name == f"aside/{name}"
    assert not (run / "aside" / name).exists()
