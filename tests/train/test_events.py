"""events.jsonl: what happened to a run, written by the trainer as it happens."""

from __future__ import annotations

import json
import os
import signal
import time
from datetime import datetime
from pathlib import Path

import pytest
import runs
import torch

from seedvc_ckpt import AsyncSaver, CheckpointStore, LeaseHeldError, keep_last
from seedvc_ckpt.storage import read_file
from seedvc_train.corpus import write_demo_corpus
from seedvc_train.events import EventLog
from seedvc_train.loop import TrainingError
from seedvc_train.run import ChangedRunError


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips: two batches an epoch."""
    folder = tmp_path_factory.mktemp("recordings")
    write_demo_corpus(str(folder), clips=2)
    return folder


def events(run: Path) -> list[dict]:
    """The events of a run; each line has to be whole."""
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def told(run: Path) -> list[tuple[str, int | None]]:
    return [(event["event"], event.get("step")) for event in events(run)]


@pytest.mark.parametrize("sync_save", [True, False])
def test_saves_and_prunings_are_told(recordings: Path, tmp_path: Path, sync_save: bool) -> None:
    """Each save stands there with what it is and cost, and what was pruned after it; times never go back."""
    runs.train(recordings, tmp_path, max_steps=5, save_every=2, keep_last=2, sync_save=sync_save or None)
    found = events(tmp_path / "run")
    told = [(event["event"], event.get("step")) for event in found]
    assert told == [("started", 0), ("saved", 2), ("saved", 4), ("saved", 5), ("pruned", 2), ("ended", 5)]
    times = [datetime.fromisoformat(event["time"]) for event in found]
    assert times == sorted(times)
    for info in CheckpointStore(tmp_path / "run").list():
        (saved,) = (event for event in found if event["event"] == "saved" and event["step"] == info.step)
        assert (saved["name"], saved["epoch"], saved["bytes"]) == (info.name, info.epoch, info.size)
        assert 0 < saved["seconds_stalled"] < 10
        assert 0 < saved["seconds_until_durable"] < 10
        assert saved["seconds_stalled"] == saved["seconds_until_durable"] or not sync_save
    assert found[0]["options"]["save_every"] == 2
    assert found[0]["versions"]["torch"] == torch.__version__
    assert found[-2]["name"] == "DiT_epoch_00000_step_00002.pth"


def test_a_killed_run_keeps_its_events(recordings: Path, tmp_path: Path) -> None:
    """After SIGKILL the history stays, whole; the resume names its checkpoint and the step that had been reached."""
    run = tmp_path / "run"
    process = runs.start(recordings, tmp_path, max_steps=5000, save_every=15)
    deadline = time.monotonic() + 60
    while not (lines := runs.metrics(run)) or lines[-1]["step"] < 40:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    reached = runs.metrics(run)[-1]["step"]
    before = events(run)
    with (run / "events.jsonl").open("a") as file:
        file.write('{"time": "2026-01-01T')  # as a power cut may leave it
    newest = CheckpointStore(run).latest()
    runs.train(recordings, tmp_path, max_steps=newest.step + 1)
    assert events(run)[: len(before)] == before
    resumed = events(run)[len(before)]
    assert (resumed["event"], resumed["step"], resumed["name"]) == ("resumed", newest.step, newest.name)
    assert resumed["reached"] == max(reached, newest.step)
    assert told(run)[-1] == ("ended", newest.step + 1)


def test_damage_and_rewinds_are_told(recordings: Path, tmp_path: Path) -> None:
    """A checkpoint that is set aside stands there with the reason."""
    run = tmp_path / "run"
    runs.train(recordings, tmp_path, max_steps=6)
    newest = CheckpointStore(run).latest()
    (run / newest.name).write_bytes((run / newest.name).read_bytes()[:-100])
    runs.train(recordings, tmp_path, max_steps=6)
    runs.train(recordings, tmp_path, max_steps=4, resume=3)
    damaged, rewound = (event for event in events(run) if event["event"] == "set_aside")
    assert damaged["name"] == newest.name
    assert damaged["reason"] in (run / "aside" / f"{newest.name}.reason.txt").read_text()
    assert (rewound["step"], rewound["reason"]) == (6, "the run was rewound to step 3")
    assert [event["step"] for event in events(run) if event["event"] == "resumed"] == [3, 3]


def test_a_new_start_begins_a_new_history(recordings: Path, tmp_path: Path) -> None:
    """--resume never sets the events aside with the rest."""
    run = tmp_path / "run"
    runs.train(recordings, tmp_path, max_steps=3)
    before = (run / "events.jsonl").read_bytes()
    runs.train(recordings, tmp_path, max_steps=1, resume="never")
    assert (run / "aside" / "events.jsonl").read_bytes() == before
    assert told(run) == [("started", 0), ("saved", 1), ("ended", 1)]


def test_an_interruption_is_told(recordings: Path, tmp_path: Path) -> None:
    """A signal is named, at the step that it stopped at, after the save that it asked for."""
    process = runs.start(recordings, tmp_path, max_steps=5000, save_every=5000)
    while not runs.metrics(tmp_path / "run"):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    process.communicate()
    step = CheckpointStore(tmp_path / "run").latest().step
    assert told(tmp_path / "run") == [("started", 0), ("saved", step), ("interrupted", step)]
    assert events(tmp_path / "run")[-1]["signal"] == "SIGTERM"


def test_a_failure_is_told(recordings: Path, tmp_path: Path) -> None:
    """Training that ends by an error leaves its words."""
    result = runs.train(recordings, tmp_path, max_steps=400, save_every=500, lr=1e30)
    assert isinstance(result.exception, TrainingError)
    assert events(tmp_path / "run")[-1]["error"] == f"TrainingError: {result.exception}"


@pytest.mark.parametrize(
    ("error", "said"),
    [(SystemExit(143), "interrupted"), (KeyboardInterrupt(), "interrupted"), (ValueError("x"), "failed")],
)
def test_the_way_out_is_told(tmp_path: Path, error: BaseException, said: str) -> None:
    """What ends a process early is its last event: a second signal as an interruption, an error with its words."""

    def train() -> None:
        with CheckpointStore(tmp_path) as store, EventLog(store) as log:
            log.write("started", 0)
            raise error

    with pytest.raises(type(error)):
        train()
    assert told(tmp_path) == [("started", 0), (said, None)]


def test_who_does_not_hold_the_run_writes_nothing(recordings: Path, tmp_path: Path) -> None:
    """A trainer that is refused, by another's lease or by changed settings, leaves the events as they are."""
    first = runs.start(recordings, tmp_path, max_steps=5000, save_every=5000)
    try:
        while not runs.metrics(tmp_path / "run"):
            assert first.poll() is None
            time.sleep(0.01)
        assert isinstance(runs.train(recordings, tmp_path).exception, LeaseHeldError)
        assert told(tmp_path / "run") == [("started", 0)]
    finally:
        first.terminate()
        first.communicate()
    before = events(tmp_path / "run")
    assert isinstance(runs.train(recordings, tmp_path, seed=7).exception, ChangedRunError)
    assert events(tmp_path / "run") == before


def test_secrets_stay_out(recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL among the options, which may hold a password, is not written down; the events go where the run is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = runs.train(recordings, Path("x"), log_dir="memory://hush:secret@x", max_steps=1)
    assert result.return_value == 0, result.exception
    store = CheckpointStore("memory://hush:secret@x/run", read_only=True)
    with store.storage.open("events.jsonl") as blob:
        content = bytearray(blob.size)
        blob.read_into(0, memoryview(content))
    lines = [json.loads(line) for line in content.splitlines()]
    assert [line["event"] for line in lines] == ["started", "saved", "ended"]
    assert lines[0]["options"]["max_steps"] == 1
    assert b"secret" not in content


def test_events_of_one_moment_stay_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are joined by time, and a last save and the end that follows it are less than a millisecond apart."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = CheckpointStore("memory://moment/run")
    store.acquire()
    for _ in range(20):  # each opening joins what is here with what is there
        with EventLog(store) as log:
            for step in range(10):
                log.write("saved", step)
                log.write("ended", step)
    found = [json.loads(line) for line in read_file(store.storage, "events.jsonl").splitlines()]
    assert [(line["event"], line["step"]) for line in found] == [
        (event, step) for _ in range(20) for step in range(10) for event in ("saved", "ended")
    ]


def test_the_server_gets_what_a_killed_trainer_had_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events here and on the server are joined by time, none lost and none twice; those of another run are not."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = CheckpointStore("memory://events/run")
    store.acquire()

    def there() -> list[dict]:
        with store.storage.open("events.jsonl") as blob:
            content = bytearray(blob.size)
            blob.read_into(0, memoryview(content))
        return [json.loads(line) for line in content.splitlines()]

    with EventLog(store) as log:
        log.write("started", 0)
    sent = there()
    (path,) = (tmp_path / "seedvc-train").rglob("events.jsonl")
    with path.open("a") as file:
        file.write('{"time": "2999-01-01", "event": "saved", "step": 3}\n{"time": "2999')
    with EventLog(store) as log:
        log.write("resumed", 3)
    assert [event["step"] for event in there()] == [0, 3, 3]
    assert there()[0] == sent[0]
    other = b'{"time": "2026-01-01", "event": "started", "step": 0}\n'
    store.storage.publish("events.jsonl", len(other), [memoryview(other)], overwrite=True)
    with EventLog(store) as log:
        log.write("resumed", 7)
    assert [event["step"] for event in there()] == [0, 7]


def test_the_store_tells_what_it_pruned(tmp_path: Path) -> None:
    """What the rules of a store removed is listed in order, whether saves wait or go on in the background."""
    store = CheckpointStore(tmp_path / "run", retention=keep_last(1))
    infos = [store.save({"a": torch.ones(2)}, step) for step in (1, 2)]
    with AsyncSaver(store) as saver:
        pending = saver.save({"a": torch.ones(2)}, 3)
        infos.append(pending.result())
        assert 0 < pending.seconds < 10
    assert [info.name for info in store.pruned] == [info.name for info in infos[:2]]
    assert store.list() == infos[2:]
