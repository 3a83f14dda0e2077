"""The store: list, save, load, resume, prune, rewind."""

import errno
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import zipfile
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest
import torch

from seedvc_ckpt import (
    SEED_VC,
    CheckpointError,
    CheckpointExistsError,
    CheckpointInfo,
    CheckpointNotFoundError,
    CheckpointStore,
    CorruptCheckpointError,
    MissingMetricError,
    PatternError,
    SaveFailedError,
    StaleStepError,
    StorageError,
    UnsafeCheckpointError,
    keep_best,
    keep_every,
    keep_last,
    keep_within,
)
from seedvc_ckpt.format import torchzip
from seedvc_ckpt.manifest import Manifest


def steps(store):
    return [info.step for info in store.list()]


def write(path, manifest, state=None):
    """A checkpoint with any manifest, intact byte for byte."""
    encoded = torchzip.encode(state or {"x": torch.zeros(3)}, manifest)
    path.write_bytes(b"".join(encoded))


def break_reading(monkeypatch, path):
    """Let the file open, and every read of it fail, as on a failing disk."""
    read, bad = os.preadv, os.stat(path).st_ino

    def failing(descriptor, *rest):
        if os.fstat(descriptor).st_ino == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(descriptor, *rest)

    monkeypatch.setattr(os, "preadv", failing)


# --- saving, listing, loading ---------------------------------------------------------------------------------------


def test_what_is_saved_is_listed_and_loaded(location, state, filled):
    """A checkpoint is found by step, by info, and as the newest, with the values that were saved."""
    store = filled(location, 500, 1000, 1500)
    assert steps(store) == [500, 1000, 1500]
    assert store.latest() == store.list()[-1]
    for which, step in [(500, 500), (np.int64(1000), 1000), (store.list()[0], 500), (None, 1500)]:
        assert torch.equal(store.load(which)["net"]["cfm"]["weight"], state(step)["net"]["cfm"]["weight"])


def test_save_returns_what_the_listing_says(location, state):
    """The info of a save is the one that list and latest give, under every pattern, pinned or not."""
    for pattern in (SEED_VC, "step_{step}.pth"):
        store = CheckpointStore(f"{location}{pattern == SEED_VC}", pattern=pattern)
        for _ in range(2):
            info = store.save(state(), 500, 3, overwrite=True)
            assert [info] == store.list() == [store.latest()]
            store._storage.publish(f"{info.name}.pin", 0, [], overwrite=True)
        assert info.pinned
        assert info.epoch == (3 if pattern == SEED_VC else 0)
        assert abs(info.modified - datetime.now(timezone.utc)) < timedelta(minutes=1)


def test_files_are_what_torch_loads(run, state, filled):
    """Stock torch.load, weights only, reads a checkpoint."""
    store = filled(run, 500)
    loaded = torch.load(run / store.latest().name, weights_only=True)
    assert torch.equal(loaded["net"]["cfm"]["weight"], state(500)["net"]["cfm"]["weight"])


def test_order_is_by_numbers_not_text(location, state):
    """Step 123456 comes after 99999, whatever their names sort like."""
    store = CheckpointStore(location)
    for step in (99999, 100000, 123456, 99999999):
        store.save(state(), step)
        assert store.latest().step == step
    assert steps(store) == [99999, 100000, 123456, 99999999]


def test_an_absent_run_is_empty(location):
    """A folder that does not exist is a store without checkpoints, and looking does not make it."""
    store = CheckpointStore(location)
    assert (store.list(), store.latest(), store.resume(), store.prune().keep) == ([], None, None, {})
    for ask in (store.load, store.inspect, store.verify):
        with pytest.raises(CheckpointNotFoundError, match="no checkpoint named like DiT"):
            ask()
    assert not os.path.exists(location)


def test_unknown_steps_are_answered_with_the_nearest(location, filled):
    """Asking for a step that is not there names those around it."""
    store = filled(location, *range(0, 2000, 100))
    with pytest.raises(CheckpointNotFoundError, match=r"step 777 .*: 600, 700, 800, 900, 1000$"):
        store.load(777)
    for bad in (-1, 2**60, "500", 5.0, True):
        with pytest.raises(PatternError):
            store.load(bad)


@pytest.mark.parametrize(
    "folder",
    [
        "my run",
        "[x]*?#%",
        "a::b",
        "~",
        "-rf",
        "模型 Ж é",
        "run.v2",
        "a=b&c;d",
        "'\"",
        "50%25",
        "x:/y",
        "http:",
        "{step}",
    ],
)
@pytest.mark.parametrize("kind", ["local", "memory"])
def test_any_name_makes_a_run(folder, kind, tmp_path, state, monkeypatch):
    """Names with spaces, globs, percent signs, colons, tildes and other scripts are only names."""
    monkeypatch.chdir(tmp_path)
    location = folder if kind == "local" else f"memory://{tmp_path.name}/{folder}"
    store = CheckpointStore(location, retention=keep_last(2))
    for step in (1, 2, 3):
        store.save(state(step), step)
    assert steps(store) == [2, 3]
    assert store.resume().state["iters"] == 3
    store.rewind(2)
    assert steps(store) == [2]
    assert store.inspect().manifest.run == folder.rpartition("/")[2]
    if kind == "local":
        assert os.listdir(folder)


def test_runs_whose_name_is_no_text_can_save(tmp_path, state, damage):
    """A folder whose name is not UTF-8 is used as it is."""
    store = CheckpointStore(os.fsdecode(os.fsencode(tmp_path) + b"/run\xff\xfe"))
    store.save(state(0), 1)
    last = store.save(state(0), 2)
    damage(os.path.join(store.location, last.name))
    assert store.resume().info.step == 1


def test_stray_files_are_never_checkpoints(run, filled, state):
    """Copies, leftovers, folders and links that lead nowhere neither show nor disturb."""
    store = filled(run, 500)
    name = SEED_VC.format(1000)
    for stray in [f"{name}.tmp", name.replace(".pth", "_copy.pth"), "DiT_epoch_00000_step_-0500.pth", f"{name}\n"]:
        (run / stray).write_bytes(b"stray")
    (run / "DiT_epoch_00000_step_\u0660\u0661\u0660\u0660\u0660.pth").touch()
    (run / os.fsdecode(b"\xff.pth")).touch()
    (run / SEED_VC.format(2000)).mkdir()
    (run / SEED_VC.format(3000)).symlink_to("nowhere")
    (run / SEED_VC.format(4000)).symlink_to(SEED_VC.format(4000))
    os.mkfifo(run / SEED_VC.format(5000))
    assert steps(store) == [500]
    assert store.latest().step == 500
    assert store.resume().info.step == 500
    store.save(state(), 600)
    assert steps(store) == [500, 600]


def test_links_to_files_are_checkpoints(run, tmp_path, filled):
    """A link to a checkpoint elsewhere counts, and pruning removes the link only."""
    store = filled(tmp_path / "else", 500)
    run.mkdir()
    (run / SEED_VC.format(500)).symlink_to(tmp_path / "else" / store.latest().name)
    linked = filled(run, 600)
    assert steps(linked) == [500, 600]
    linked.retention = (keep_last(1),)
    linked.prune()
    assert (steps(linked), steps(store)) == ([600], [500])


def test_two_epochs_of_one_step(location, state):
    """The larger epoch is the newest; a bare step names both and asks; an info is exact."""
    store = CheckpointStore(location)
    other = CheckpointStore(location + "x")
    store.save(state(1), 500, 1)
    other.save(state(2), 500, 2)
    twin = other.file().storage
    with twin.open(other.latest().name) as blob:
        content = bytearray(blob.size)
        blob.read_into(0, memoryview(content))
    store._storage.publish(other.latest().name, len(content), [memoryview(content)])
    assert [(info.step, info.epoch) for info in store.list()] == [(500, 1), (500, 2)]
    assert store.latest().epoch == store.resume().info.epoch == 2
    with pytest.raises(CheckpointError, match=r"epoch_00001_step_00500.*epoch_00002_step_00500.*info"):
        store.load(500)
    assert store.load(store.list()[0])["iters"] == 1
    with pytest.raises(CheckpointExistsError):
        store.save(state(3), 500, 3)
    with pytest.raises(CheckpointExistsError, match="epoch"):
        store.save(state(3), 500, 2, overwrite=True)


def test_two_patterns_share_a_folder(location, state):
    """Stores with different patterns see, judge and prune only their own files."""
    first = CheckpointStore(location, pattern="CFM_epoch_{epoch:05d}_step_{step:05d}.pth", retention=keep_last(1))
    second = CheckpointStore(location, pattern="AR_epoch_{epoch:05d}_step_{step:05d}.pth", retention=keep_last(2))
    for step in (30, 40, 50):
        first.save(state(), step)
    for step in (1, 2, 3):
        second.save(state(), step)
    assert (steps(first), steps(second)) == ([50], [2, 3])


# --- refusals -------------------------------------------------------------------------------------------------------


def refusals(state):
    unsafe = {"net": {"x": torch.zeros(2)}, "odd": object()}
    return {
        "taken": (CheckpointExistsError, "overwrite=True", lambda s: s.save(state(), 1000)),
        "taken by another epoch": (CheckpointExistsError, "epoch", lambda s: s.save(state(), 1000, 7, overwrite=True)),
        "backwards": (StaleStepError, r"rewind\(500\)", lambda s: s.save(state(), 999)),
        "before all": (StaleStepError, "rewind to a step that is there", lambda s: s.save(state(), 1)),
        "backwards with overwrite": (StaleStepError, "rewind", lambda s: s.save(state(), 500, overwrite=True)),
        "negative": (PatternError, "between 0", lambda s: s.save(state(), -1)),
        "fraction": (PatternError, "whole", lambda s: s.save(state(), 1500.0)),
        "huge": (PatternError, "between 0", lambda s: s.save(state(), 2**53 + 1)),
        "epoch": (PatternError, "epoch", lambda s: s.save(state(), 2000, -1)),
        "unsafe": (UnsafeCheckpointError, "odd", lambda s: s.save(unsafe, 2000)),
        "unsafe overwrite": (UnsafeCheckpointError, "odd", lambda s: s.save(unsafe, 1000, overwrite=True)),
        "metric": (ValueError, "'loss': 'low'", lambda s: s.save(state(), 2000, metrics={"loss": "low"})),
        "metrics": (ValueError, "'loss': tensor", lambda s: s.save(state(), 2000, metrics={"loss": torch.ones(2)})),
        "setting": (ValueError, "'sr': inf", lambda s: s.save(state(), 2000, settings={"sr": math.inf})),
        "setting's kind": (ValueError, "'sr': \\[1\\]", lambda s: s.save(state(), 2000, settings={"sr": [1]})),
        "setting's text": (ValueError, "settings map", lambda s: s.save(state(), 2000, settings={"run": "\udc80"})),
        "setting's size": (ValueError, "settings map", lambda s: s.save(state(), 2000, settings={"n": 1 << 64})),
        "metric's name": (ValueError, "got 3: 1", lambda s: s.save(state(), 2000, metrics={3: 1})),
        "rewind": (CheckpointNotFoundError, "nearest", lambda s: s.rewind(750)),
        "unknown file": (CheckpointNotFoundError, "set aside", lambda s: s.set_aside("nothing.pth", "why")),
    }


@pytest.mark.parametrize("case", refusals(None))
def test_refusals_change_nothing(case, run, filled, state, snapshot):
    """Whatever is refused, the folder stays as it was to the byte, and the message names the remedy."""
    kind, message, act = refusals(state)[case]
    store = filled(run, 500, 1000)
    before = snapshot(run)
    with pytest.raises(kind, match=message):
        act(store)
    assert snapshot(run) == before


@pytest.mark.parametrize(
    "act",
    [
        lambda store, state: store.save(state(), 1500),
        lambda store, _: store.prune(),
        lambda store, _: store.rewind(500),
        lambda store, _: store.set_aside(store.latest(), "why"),
    ],
)
def test_read_only_stores_change_nothing(act, run, filled, state, snapshot):
    """A read-only store lists, loads and plans, and refuses the rest."""
    filled(run, 500, 1000)
    store = CheckpointStore(run, read_only=True, retention=keep_last(1))
    before = snapshot(run)
    with pytest.raises(StorageError, match="read-only"):
        act(store, state)
    assert [info.step for info in store.prune(dry_run=True).remove] == [500]
    assert [info.step for info in store.rewind(500, dry_run=True)] == [1000]
    assert store.load(500)["iters"] == 500
    assert snapshot(run) == before


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_path_through_a_file_is_a_storage_error(below, tmp_path, state):
    """A file in place of the folder is told as such; no other error escapes."""
    (tmp_path / "file").write_text("text")
    store = CheckpointStore(tmp_path / "file" / below)
    for act in (store.list, store.latest, store.resume, store.prune, store.load, lambda: store.save(state(), 1)):
        with pytest.raises(StorageError, match="can't list"):
            act()
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.parametrize(
    "location", ["", "a\0b", b"bytes", "nosuch://x", "s3://", "s3://bucket/run?versionId=3", "sftp:///run"]
)
def test_locations_that_cannot_be_used(location):
    """A place that is no store is refused when the store is made."""
    with pytest.raises(StorageError):
        CheckpointStore(location)


def test_overwriting_replaces_the_file(location, state, filled):
    """With overwrite=True the newest step is replaced, and only that."""
    store = filled(location, 500, 1000)
    old = store.list()[0]
    store.save(state(7), 1000, overwrite=True)
    assert store.list()[0] == old
    assert store.load(1000)["iters"] == 7
    nameless = CheckpointStore(location, pattern="s{step}")
    nameless.save(state(1), 5, epoch=1)
    nameless.save(state(2), 5, epoch=2, overwrite=True)
    assert nameless.load()["iters"] == 2


def test_other_ranks_change_nothing(run, filled, damage):
    """In a process group of two, rank 1 can't save, prune or rewind, and its resume moves nothing; rank 0 can."""
    with filled(run, 0, 5) as store:
        damage(run / store.latest().name)
    script = f"""
import os, sys, torch, torch.distributed as dist
from seedvc_ckpt import CheckpointError, CheckpointStore, keep_last
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{run.parent}/group", rank=rank, world_size=2)
store = CheckpointStore({str(run)!r}, retention=keep_last(5))
if rank == 1:
    for act in (lambda: store.save({{"x": torch.ones(2)}}, 9), store.prune, lambda: store.rewind(0)):
        try:
            act()
        except CheckpointError as error:
            assert "rank 1" in str(error) and "rank == 0" in str(error), error
        else:
            raise AssertionError("not refused")
    found = store.resume()
    assert found.info.step == 0 and len(found.rejected) == 1
    assert not os.path.exists({str(run / "aside")!r})
dist.barrier()
if rank == 0:
    store.resume()
    store.save({{"x": torch.ones(2)}}, 9)
dist.barrier()
assert [info.step for info in store.list()] == [0, 9]
dist.destroy_process_group()
"""
    both = [subprocess.Popen([sys.executable, "-c", script, str(rank)]) for rank in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert len(list((run / "aside").iterdir())) == 2


# --- manifest and metrics -------------------------------------------------------------------------------------------


def test_the_manifest_tells_the_save(run, state, filled):
    """Inside the file stand run, step, epoch, time, versions, metrics, origin and sizes."""
    store = filled(run, 500)
    store.resume()
    before = datetime.now(timezone.utc)
    store.save(state(), 1000, 2, metrics={"loss": 0.25})
    manifest = store.inspect().manifest
    assert before <= manifest.created <= datetime.now(timezone.utc)
    assert (manifest.run, manifest.step, manifest.epoch) == ("run", 1000, 2)
    assert manifest.torch == torch.__version__
    assert manifest.library
    assert manifest.metrics == {"loss": 0.25}
    assert manifest.resumed_from == SEED_VC.format(500)
    assert (manifest.tensors, manifest.tensor_bytes) == (1, 2400)
    with zipfile.ZipFile(run / store.latest().name) as archive:
        (record,) = [name for name in archive.namelist() if name.endswith("/seedvc_ckpt.json")]
        assert json.loads(archive.read(record))["step"] == 1000


def test_settings_come_back_as_they_were(location, state):
    """Text, numbers, booleans and None stand in the manifest with their types; a file without them has none."""
    store = CheckpointStore(location)
    settings = {"name": "whisper ü", "sr": 44100, "fmin": 0.0, "f0": True, "fmax": None, "big": 2**63 - 1}
    store.save(state(), 1, settings=settings, verify=True)
    found = store.inspect().manifest.settings
    assert found == settings
    assert [type(value) for value in found.values()] == [type(value) for value in settings.values()]
    store.save(state(), 2)
    assert store.inspect().manifest.settings == {}


def test_what_other_versions_know_is_ignored():
    """A manifest may lack the newer fields and hold fields of later versions; a field of the wrong kind is damage."""
    assert Manifest.from_json(b'{"step": 3}', "x").settings == {}
    assert Manifest.from_json(b'{"settings": {"sr": 1}, "later": [1]}', "x").settings == {"sr": 1}
    with pytest.raises(CorruptCheckpointError, match=r"manifest.*settings\.sr"):
        Manifest.from_json(b'{"settings": {"sr": [1]}}', "x")


@pytest.mark.parametrize(
    "value",
    [0.5, 1, True, torch.tensor(0.25), torch.tensor([2.0]), np.float32(0.1), np.int64(3), 1e308, math.inf, -math.inf],
)
def test_numbers_of_every_kind_are_metrics(value, location, state):
    """Python's, torch's and numpy's single numbers are kept as floats, infinities included."""
    store = CheckpointStore(location)
    store.save(state(), 1, metrics={"loss": value})
    assert store.inspect().manifest.metrics == {"loss": float(value)}


def test_a_diverged_loss_does_not_stop_saving(location, state):
    """NaN is a metric: it is saved, verified, read back, and never the best."""
    store = CheckpointStore(location, retention=keep_best("loss"))
    for step, loss in enumerate([1.0, math.nan, torch.tensor(math.nan), 2.0]):
        store.save(state(), step, metrics={"loss": loss}, verify=True)
    assert steps(store) == [0, 3]
    store.save(state(), 4, metrics={"loss": math.nan})
    assert math.isnan(store.inspect().manifest.metrics["loss"])


# --- retention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "left"),
    [
        (None, [1, 2, 3, 4, 5]),
        ([], [1, 2, 3, 4, 5]),
        (keep_last(2), [4, 5]),
        ([keep_last(1), keep_every(2)], [2, 4, 5]),
        (keep_best("loss", 2), [1, 2, 5]),
        (keep_best("loss", 2, "max"), [4, 5]),
        (keep_within(timedelta(hours=1)), [1, 2, 3, 4, 5]),
        ((rule for rule in [keep_last(2)]), [4, 5]),
    ],
)
def test_each_save_is_followed_by_pruning(rules, left, tmp_path, state):
    """After a save what no rule keeps is gone; one rule, several, or a generator of them will do."""
    store = CheckpointStore(tmp_path / "run", retention=rules)
    for step in range(1, 6):
        store.save(state(), step, metrics={"loss": step})
    assert steps(store) == left


def test_nothing_is_pruned_before_the_new_one_is_there(run, filled, state, monkeypatch):
    """Deleting begins when the new checkpoint is published, synced and read back."""
    store = filled(run, 1, 2, retention=keep_last(2))
    seen = []
    unlink = os.unlink

    def watched(path, **options):
        if str(path).endswith(".pth"):
            seen.append(CheckpointStore(run).load(3)["iters"])
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", watched)
    store.save(state(3), 3)
    assert seen == [3]


def test_a_missing_metric_is_refused_before_writing(run, filled, state, snapshot):
    """A rule that could judge neither the new checkpoint nor an older one refuses the save."""
    store = filled(run, 1)
    store.retention = (keep_best("score"),)
    before = snapshot(run)
    with pytest.raises(MissingMetricError, match=r"the metric 'score' \(they have: loss\)"):
        store.save(state(), 2, metrics={"loss": 1})
    assert snapshot(run) == before
    store.save(state(), 2, metrics={"score": 1})
    assert store.prune().keep[store.list()[0]] == ("no score yet",)


@pytest.mark.parametrize("kind", ["damaged", "text", "newer", "unreadable"])
def test_an_older_file_that_cannot_be_judged_stays(kind, run, filled, state, monkeypatch):
    """A damaged, foreign or newer file does not stop saving under keep_best, and is not deleted for it."""
    filled(run, 1, 2)
    store = CheckpointStore(run, retention=[keep_best("loss"), keep_last(1)])
    path = run / SEED_VC.format(1)
    if kind == "damaged":
        path.write_bytes(path.read_bytes()[:-30])
    elif kind == "text":
        path.write_text("no checkpoint")
    elif kind == "newer":
        write(path, Manifest(schema_version=99, step=1))
    else:
        break_reading(monkeypatch, path)
    store.save(state(), 3, metrics={"loss": 0.5})
    assert steps(store) == [1, 3]
    assert store.prune().keep[store.list()[0]] == ("its manifest can't be read",)


def test_what_cannot_be_deleted_is_a_warning(run, filled, state, caplog, monkeypatch):
    """A checkpoint that vanishes, or whose deletion is refused, is logged; the save has succeeded."""
    store = filled(run, 1, 2, 3, retention=keep_last(3))
    unlink = os.unlink

    def refusing(path, **options):
        if str(path).endswith("step_00001.pth"):
            raise PermissionError(1, "Operation not permitted", path)
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", refusing)
    with caplog.at_level(logging.WARNING, "seedvc_ckpt"):
        store.save(state(), 4, metrics={"loss": 1})
    assert "not pruned: DiT_epoch_00000_step_00001.pth" in caplog.text
    assert "Operation not permitted" in caplog.text
    assert steps(store) == [1, 2, 3, 4]


def test_what_vanishes_meanwhile_is_a_warning(location, filled, state, caplog):
    """A checkpoint that another process deletes or replaces between listing and pruning is let go."""
    store = filled(location, 1, 2, 3)

    def racing(infos, _metrics):
        for info in infos:
            if info.step == 1:
                store._storage.delete(info.name)
            if info.step == 2:
                store._storage.publish(info.name, 3, [memoryview(b"new")], overwrite=True)
        return {}

    store.retention = (racing,)
    with caplog.at_level(logging.WARNING, "seedvc_ckpt"):
        store.prune()
    assert caplog.text.count("is gone or was replaced") == 2
    assert steps(store) == [2, 3]


def test_another_file_of_the_same_size_and_time_is_not_deleted(run, filled, caplog):
    """What took the place of a checkpoint since the plan was made is another file, whatever its size and time."""
    store = filled(run, 1, 2)
    path = run / store.list()[0].name

    def racing(_infos, _metrics):
        before = path.stat()
        other = path.with_name("other")
        other.write_bytes(path.read_bytes())
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        other.replace(path)
        return {}

    store.retention = (racing,)
    with caplog.at_level(logging.WARNING, "seedvc_ckpt"):
        store.prune()
    assert "is gone or was replaced" in caplog.text
    assert steps(store) == [1, 2]


@pytest.mark.parametrize("act", ["verify", "load", "resume"])
def test_a_foreign_file_under_another_step_is_a_warning(act, data, tmp_path, caplog):
    """A file without a manifest whose name contradicts the step inside is used, and the log says so."""
    name = SEED_VC.format(30, 2)
    shutil.copyfile(data / "run_from_seedvc" / SEED_VC.format(20, 2), tmp_path / name)
    store = CheckpointStore(tmp_path)
    with caplog.at_level(logging.WARNING, "seedvc_ckpt"):
        getattr(store, act)()
    (line,) = [record.getMessage() for record in caplog.records if "iters" in record.getMessage()]
    assert name in line
    assert "is named step 30 but holds step 20" in line


def test_resume_tells_the_steps_lost(run, filled, damage):
    """How far a resume stepped back is a number: 0 where nothing was damaged."""
    store = filled(run, 10, 20, 30)
    assert store.resume().steps_lost == 0
    damage(run / SEED_VC.format(30))
    damage(run / SEED_VC.format(20))
    assert store.resume().steps_lost == 20


def test_a_folder_that_fails_after_the_save_is_a_warning(location, filled, state, caplog):
    """When only the pruning after a save fails, the save still returns its checkpoint."""
    store = filled(location, 1, 2)
    calls = []

    def failing(infos, _metrics):
        calls.append(len(infos))
        if len(calls) == 2:
            raise StorageError("the listing failed")
        return {}

    store.retention = (failing,)
    with caplog.at_level(logging.WARNING, "seedvc_ckpt"):
        assert store.save(state(), 3).step == 3
    assert "the listing failed" in caplog.text
    assert steps(store) == [1, 2, 3]


def test_pinned_checkpoints_are_never_pruned(location, filled, state):
    """A `.pin` file beside a checkpoint outweighs the rules; without it the rules apply."""
    store = filled(location, 1, 2, retention=keep_last(5))
    store._storage.publish(f"{SEED_VC.format(1)}.pin", 0, [])
    store.retention = (keep_last(1),)
    assert [info.pinned for info in store.list()] == [True, False]
    assert store.prune().keep[store.list()[0]] == ("pinned",)
    assert steps(store) == [1, 2]
    store._storage.delete(f"{SEED_VC.format(1)}.pin")
    store.prune()
    assert steps(store) == [2]


def test_the_one_resumed_from_stays_while_no_other_is_proven(location, filled, state):
    """Until another checkpoint is known to be intact, pruning spares the one that training resumed from."""
    filled(location, 1)
    store = CheckpointStore(location, retention=keep_last(1))
    store.resume()
    filled(location, 2, 3)
    plan = store.prune()
    assert [(info.step, why) for info, why in plan.keep.items()] == [
        (1, ("resumed from, and the only one known to be intact",)),
        (3, ("newest", "one of the last 1")),
    ]
    store.verify(3)
    store.prune()
    assert steps(store) == [3]


def test_a_state_that_is_refused_leaves_no_trace(location, run):
    """A plain number that torch could not load again is refused before a folder is made or the lease is taken."""
    store = CheckpointStore(location)
    with pytest.raises(UnsafeCheckpointError, match="iters"):
        store.save({"iters": 1 << 3000}, 1)
    assert not run.exists()
    assert store.storage.holder() == ""
    assert store.list() == []


@pytest.mark.parametrize("look", ["load", "verify"])
def test_what_was_seen_to_be_damaged_counts_as_intact_no_more(run, filled, state, look):
    """A newest checkpoint that has rotted since it was saved does not cost the one that training resumed from."""
    filled(run, 1)
    store = CheckpointStore(run, retention=keep_last(2))
    store.resume()
    store.save(state(), 2)
    store.retention = (keep_last(1),)
    path = run / SEED_VC.format(2)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CorruptCheckpointError):
        getattr(store, look)(2)
    store.prune()
    assert steps(store) == [1, 2]


def test_a_dry_run_only_plans(run, filled, snapshot):
    """prune(dry_run=True) tells what would go and touches nothing."""
    store = filled(run, 1, 2, 3)
    store.retention = (keep_last(1),)
    before = snapshot(run)
    dry = store.prune(dry_run=True)
    assert snapshot(run) == before
    assert store.prune() == dry
    assert steps(store) == [3]


# --- resume, verify, rewind -----------------------------------------------------------------------------------------


def test_resume_steps_back_over_damage(run, filled, damage):
    """The newest intact checkpoint is loaded; the damaged ones above move to aside/, with the reason."""
    store = filled(run, 0, 1000, 2000)
    for step in (1000, 2000):
        damage(run / SEED_VC.format(step))
    found = CheckpointStore(run).resume()
    assert found.info.step == 0
    assert [info.step for info, _ in found.rejected] == [2000, 1000]
    assert all("weight" in reason for _, reason in found.rejected)
    assert steps(store) == [0]
    for step in (1000, 2000):
        assert "weight" in (run / "aside" / f"{SEED_VC.format(step)}.reason.txt").read_text()
        assert (run / "aside" / SEED_VC.format(step)).is_file()
    store.save({"x": torch.ones(1)}, 1000)


def test_a_read_only_resume_reports_only(run, filled, damage, snapshot):
    """A reader steps back too, tells what is damaged, and moves nothing."""
    filled(run, 0, 10)
    damage(run / SEED_VC.format(10))
    before = snapshot(run)
    found = CheckpointStore(run, read_only=True).resume()
    assert (found.info.step, [info.step for info, _ in found.rejected]) == (0, [10])
    assert snapshot(run) == before


@pytest.mark.parametrize("count", [1, 3])
def test_a_run_of_damage_alone_is_left_alone(count, run, filled, snapshot):
    """When no checkpoint is intact resume raises, names the newest, and moves nothing."""
    store = filled(run, *range(count))
    for info in store.list():
        path = run / info.name
        path.write_bytes(path.read_bytes()[: info.size // 2])
    before = snapshot(run)
    with pytest.raises(CorruptCheckpointError) as caught:
        store.resume()
    assert caught.value.name == SEED_VC.format(count - 1)
    assert ("the only one" if count == 1 else f"each of the {count}") in str(caught.value)
    assert snapshot(run) == before


@pytest.mark.parametrize("kind", ["newer", "unknown globals", "unreadable"])
def test_resume_steps_back_over_proven_damage_only(kind, run, filled, snapshot, monkeypatch):
    """A newer schema, unknown globals or a failed read raise: they prove nothing, so nothing is set aside."""
    store = filled(run, 1)
    path, expected = run / SEED_VC.format(2), UnsafeCheckpointError
    if kind == "newer":
        write(path, Manifest(schema_version=99, step=2))
    elif kind == "unknown globals":
        torch.save({"x": os.path.join, "y": torch.zeros(2)}, path)
    else:
        write(path, Manifest(step=2))
        break_reading(monkeypatch, path)
        expected = StorageError
    before = snapshot(run)
    with pytest.raises(expected):
        store.resume()
    assert snapshot(run) == before


@pytest.mark.parametrize("manifest", [{"step": 5}, {"step": 6, "epoch": 1}, {"step": 2**60}, {}])
def test_a_renamed_file_is_damage(manifest, run, filled):
    """A file whose manifest contradicts its name is refused by load and verify, and resume steps over it."""
    store = filled(run, 1)
    write(run / SEED_VC.format(6), Manifest(**manifest))
    for ask in (store.load, store.verify, store.inspect):
        with pytest.raises(CorruptCheckpointError, match="renamed"):
            ask(6)
    assert store.resume().info.step == 1
    assert (run / "aside" / SEED_VC.format(6)).is_file()


def test_files_of_seed_vc_are_full_citizens(data, tmp_path):
    """Checkpoints without a manifest are listed, verified, inspected and resumed from."""
    store = CheckpointStore(data / "run_from_seedvc", read_only=True)
    assert [(info.step, info.epoch) for info in store.list()] == [(10, 1), (20, 2)]
    store.verify(10)
    found = store.resume()
    assert (found.info.step, found.rejected) == (20, ())
    assert store.inspect().manifest is None
    assert "net" in store.inspect().keys


def test_inspect_reads_no_tensor_data(run, filled, damage):
    """Keys, shapes and dtypes are told even where a tensor is damaged; verify names that tensor."""
    store = filled(run, 0)
    damage(run / SEED_VC.format(0))
    found = store.inspect()
    assert found.keys == ["net", "iters"]
    (ref,) = found.tensors.values()
    assert (ref.shape, ref.dtype, ref.nbytes) == ((600,), "float32", 2400)
    with pytest.raises(CorruptCheckpointError, match="weight") as caught:
        store.verify(0)
    assert "weight" in caught.value.record


def test_verify_reports_progress(location, filled):
    """The progress adds up to the bytes of the file, nearly."""
    store, done = filled(location, 0), []
    store.verify(progress=done.append)
    assert 2400 <= sum(done) <= store.latest().size


def test_a_verified_save_that_does_not_read_back_is_set_aside(run, filled, state, damage, monkeypatch):
    """verify=True reads every byte; what the disk has changed is set aside, nothing is pruned, the save raises."""
    store = filled(run, 1, 2, retention=keep_last(2))
    sync = os.fsync

    def bad_disk(descriptor):
        sync(descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if "/.tmp-" in path and os.path.getsize(path) > 2400:
            damage(path)

    monkeypatch.setattr(os, "fsync", bad_disk)
    with pytest.raises(SaveFailedError, match="does not read back"):
        store.save(state(0), 3, metrics={"loss": 1}, verify=True)
    monkeypatch.undo()
    assert steps(store) == [1, 2]
    assert (run / "aside" / f"{SEED_VC.format(3)}.reason.txt").is_file()


def test_rewind_sets_the_later_ones_aside(location, filled, state):
    """After a rewind training goes on from that step; what came later is in aside/, none of it deleted."""
    store = filled(location, 1, 2, 3, 4)
    assert [info.step for info in store.rewind(2, dry_run=True)] == [3, 4]
    assert steps(store) == [1, 2, 3, 4]
    assert [info.step for info in store.rewind(2)] == [3, 4]
    assert steps(store) == [1, 2]
    store.save(state(30), 3)
    store.rewind(2)
    assert store.rewind(2) == ()
    aside = CheckpointStore(f"{location}/aside")
    assert [aside.load(step)["iters"] for step in (3, 4)] == [3, 4]
    assert aside._storage.stat(f"{SEED_VC.format(3)}.1") is not None
    assert aside._storage.stat(f"{SEED_VC.format(3)}.1.reason.txt") is not None


def test_a_vanished_info_is_not_found(location, filled):
    """Loading by an info whose file is gone says so."""
    store = filled(location, 1)
    gone = CheckpointInfo(SEED_VC.format(9), 9, 0, 1, datetime.now(timezone.utc))
    for ask in (store.load, store.inspect, store.verify):
        with pytest.raises(CheckpointNotFoundError):
            ask(gone)


def test_a_store_is_a_context_manager(location, filled):
    """`with` closes the store, and reading goes on to work."""
    with filled(location, 1) as store:
        assert steps(store) == [1]
    assert steps(store) == [1]
    assert location in repr(store)
