"""Scores that come after their checkpoints."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta

import pytest
from click.testing import CliRunner

from seedvc_ckpt import (
    SEED_VC,
    AsyncSaver,
    CheckpointNotFoundError,
    CheckpointStore,
    CorruptCheckpointError,
    MissingMetricError,
    SaveFailedError,
    StorageError,
    keep_best,
    keep_last,
)
from seedvc_ckpt.cli import commands
from seedvc_ckpt.copying import copy_run
from seedvc_ckpt.storage import read_file


def steps(store):
    return [info.step for info in store.list()]


def by_step(store, metric="val"):
    return {info.step: found[metric] for info, found in store.scores().items() if metric in found}


def lines(store):
    return [json.loads(line) for line in read_file(store.storage, "scores.jsonl").splitlines()]


def invoke(*arguments):
    return CliRunner().invoke(commands, list(map(str, arguments)))


def test_scores_are_added_and_read(location, filled):
    """A score joins the metrics of the manifest, a later one replaces it, and a line tells what it belongs to."""
    store = filled(location, 1, 2)
    store.add_scores(1, {"val": 0.5, "wer": 3})
    store.add_scores(store.latest(), {"val": 0.25})
    store.add_scores(1, {"val": 0.75})
    assert [*store.scores().values()] == [{"loss": 1.0, "val": 0.75, "wer": 3.0}, {"loss": 1.0, "val": 0.25}]
    first = lines(store)[0]
    assert (first["name"], first["step"], first["epoch"]) == (SEED_VC.format(1), 1, 0)
    assert first["scores"] == {"val": 0.5, "wer": 3.0}
    assert len(lines(store)) == 3


def test_scores_outweigh_manifests(location, filled):
    """What was scored afterwards counts more than what was recorded at the save."""
    store = filled(location, 1, 2)
    store.add_scores(1, {"loss": 0.5})
    assert by_step(store, "loss") == {1: 0.5, 2: 1.0}
    assert store.best("loss").step == 1


def test_only_scores_on_the_newest_data_compare(location, filled):
    """Of a metric the numbers computed on something else than the newest are left aside, those of manifests too."""
    store = filled(location, 1, 2, 3)
    store.add_scores(1, {"loss": 0.1, "other": 5}, on="set A")
    store.add_scores(2, {"loss": 0.9}, on={"loss": "set B"})
    assert by_step(store, "loss") == {2: 0.9}
    assert by_step(store, "other") == {1: 5}
    store.add_scores(3, {"loss": 0.8}, on={"loss": "set A", "unknown": "x"})
    assert by_step(store, "loss") == {1: 0.1, 3: 0.8}
    store.add_scores(2, {"loss": 0.7})
    assert by_step(store, "loss") == {1: 1.0, 2: 0.7, 3: 1.0}


def test_what_is_gone_decides_nothing(run, filled):
    """The score of a checkpoint that is gone is ignored, and so is what it was computed on."""
    store = filled(run, 1, 2)
    store.add_scores(1, {"val": 0.1}, on="set A")
    store.add_scores(2, {"val": 0.2}, on="set B")
    (run / SEED_VC.format(2)).unlink()
    assert by_step(store) == {1: 0.1}


def test_another_file_of_the_name_inherits_nothing(location, filled, state):
    """A checkpoint that was replaced, even by one of the same size, is not scored yet."""
    store = filled(location, 1)
    before = store.latest()
    store.add_scores(before, {"val": 0.1})
    after = store.save(state(9), 1, metrics={"loss": 1.0}, overwrite=True)
    assert after.size == before.size
    assert by_step(store) == {}
    loaded = replace(before, modified=before.modified - timedelta(seconds=5))
    with pytest.raises(CheckpointNotFoundError, match="is another one by now"):
        store.add_scores(loaded, {"val": 0.2})
    store.add_scores(after, {"val": 0.3})
    assert by_step(store) == {1: 0.3}


def test_a_rewound_run_starts_unscored(run, filled, state):
    """The steps that are trained again after a rewind have no scores of the branch that was set aside."""
    store = filled(run, 1, 2)
    store.add_scores(2, {"val": 0.1})
    store.rewind(1)
    store.save(state(7), 2, metrics={"loss": 1.0})
    assert by_step(store) == {}


def test_scores_travel_with_a_copied_run(run, tmp_path, filled):
    """A copy knows its scores, on another storage and with other times."""
    store = filled(run, 1, 2)
    store.add_scores(2, {"val": 0.1})
    for place in (f"memory://{tmp_path.name}/copied", str(tmp_path / "copied")):
        with CheckpointStore(place) as target:
            copy_run(CheckpointStore(run, read_only=True), target)
            assert by_step(target) == {2: 0.1}
    shutil.copytree(run, tmp_path / "by hand", copy_function=shutil.copy)
    assert by_step(CheckpointStore(tmp_path / "by hand")) == {2: 0.1}


@pytest.mark.parametrize("tail", [b'{"name": "DiT_epoch', b"\0\0\0\0", b""])
def test_a_torn_last_line_is_ignored(tail, run, filled, caplog):
    """What a killed writer left of a line costs that line only, and the next one stands alone."""
    store = filled(run, 1)
    store.add_scores(1, {"val": 0.5})
    with open(run / "scores.jsonl", "ab") as file:
        file.write(tail)
    assert by_step(store) == {1: 0.5}
    store.add_scores(1, {"wer": 1})
    assert [line["scores"] for line in lines(store)] == [{"val": 0.5}, {"wer": 1.0}]
    assert not caplog.records


def test_a_last_line_without_its_end_counts(run, filled):
    """A line that only lacks its newline is whole."""
    store = filled(run, 1)
    store.add_scores(1, {"val": 0.5})
    path = run / "scores.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert by_step(store) == {1: 0.5}
    store.add_scores(1, {"wer": 1})
    assert len(lines(store)) == 2


@pytest.mark.parametrize("foreign", ["no json", "[]", '{"name": 3}', '{"scores": {"val": "low"}}', "\udcff"])
def test_a_foreign_line_is_left_out_and_kept(foreign, run, filled, caplog):
    """What is no score is told with its number, hides no other, and is not lost when a score is added."""
    store = filled(run, 1)
    store.add_scores(1, {"val": 0.5})
    path = run / "scores.jsonl"
    path.write_bytes(foreign.encode(errors="surrogateescape") + b"\n" + path.read_bytes())
    assert by_step(store) == {1: 0.5}
    assert "line 1 of scores.jsonl" in caplog.text
    store.add_scores(1, {"val": 0.25})
    assert by_step(store) == {1: 0.25}
    assert path.read_bytes().startswith(foreign.encode(errors="surrogateescape") + b"\n")


def test_numbers_that_json_lacks_are_scores(location, filled):
    """NaN and infinities are kept, are the worst, and every line is JSON to any reader."""
    store = filled(location, 1, 2, 3)
    for step, value in ((1, math.inf), (2, math.nan)):
        store.add_scores(step, {"val": value})
    text = read_file(store.storage, "scores.jsonl").decode()
    assert [json.loads(line, parse_constant=pytest.fail)["scores"]["val"] for line in text.splitlines()] == [
        "Infinity",
        "NaN",
    ]
    assert by_step(store)[1] == math.inf
    assert math.isnan(by_step(store)[2])
    assert store.best("val").step == 1
    assert store.best("val", "max").step == 1


def test_best_says_what_is_missing(location, filled):
    """Without a checkpoint, and without the metric, there is no best, in words."""
    store = CheckpointStore(location)
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint named like"):
        store.best("val")
    filled(location, 1)
    with pytest.raises(MissingMetricError, match=r"'val' \(they have: loss\)"):
        store.best("val")


def test_refused_scores_change_nothing(run, filled, damage, snapshot):
    """A read-only store, a missing or damaged checkpoint and a score that is no number are refused, in words."""
    store = filled(run, 1, 2)
    before = snapshot(run)
    with pytest.raises(StorageError, match="read-only"):
        CheckpointStore(run, read_only=True).add_scores(1, {"val": 1})
    with pytest.raises(ValueError, match="'val': 'low'"):
        store.add_scores(1, {"val": "low"})
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint of step 3"):
        store.add_scores(3, {"val": 1})
    gone = store.list()[0]
    (run / gone.name).unlink()
    with pytest.raises(CheckpointNotFoundError):
        store.add_scores(gone, {"val": 1})
    path = run / SEED_VC.format(2)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CorruptCheckpointError):
        store.add_scores(2, {"val": 1})
    assert snapshot(run).keys() == before.keys() - {gone.name}


def test_a_damaged_checkpoint_has_no_scores(run, filled):
    """It does not keep the others from being told apart."""
    store = filled(run, 1, 2)
    store.add_scores(1, {"val": 0.5})
    path = run / SEED_VC.format(2)
    path.write_bytes(path.read_bytes()[:-30])
    assert [*store.scores().values()] == [{"loss": 1.0, "val": 0.5}, {}]


def test_the_best_are_kept_by_their_scores(location, filled, state):
    """Pruning after a save, and by hand, goes by scores; what is not scored yet stays until it is."""
    store = filled(location, 1, 2, 3, 4)
    for step, value in ((1, 0.3), (2, 0.1), (3, 0.2)):
        store.add_scores(step, {"val": value})
    store.retention = (keep_best("val"), keep_last(1))
    assert steps(store) == [1, 2, 3, 4]
    store.save(state(), 5)
    assert steps(store) == [2, 4, 5]
    assert store.prune().keep[store.list()[1]] == ("no val yet",)
    store.add_scores(4, {"val": 0.4})
    store.save(state(), 6)
    assert steps(store) == [2, 5, 6]


def test_saves_go_on_while_nothing_is_scored(location, state):
    """With scores that come later the first saves have none, and none is removed."""
    store = CheckpointStore(location, retention=keep_best("val", scored_later=True))
    for step in (1, 2, 3):
        store.save(state(step), step)
    assert steps(store) == [1, 2, 3]
    store.add_scores(1, {"val": 1})
    store.add_scores(2, {"val": 2})
    with AsyncSaver(store) as saver:
        saver.save(state(4), 4)
    assert steps(store) == [1, 3, 4]


def test_scores_that_cannot_be_read_remove_nothing(run, filled, state):
    """Then nothing is pruned by them, and saving goes on."""
    store = filled(run, 1, 2)
    (run / "scores.jsonl").mkdir()
    store.retention = (keep_best("loss"),)
    store.save(state(), 3, metrics={"loss": 0.5})
    assert steps(store) == [1, 2, 3]
    assert set(store.prune().keep.values()) >= {("the scores can't be read",)}
    with pytest.raises(StorageError, match="is not a file"):
        store.scores()
    with pytest.raises((StorageError, SaveFailedError)):
        store.add_scores(1, {"val": 1})


_WRITER = """
import sys, time
from seedvc_ckpt import CheckpointStore, scores

def read_slowly(*arguments):
    content = read(*arguments)
    time.sleep(0.01)
    return content

read, scores.read_file = scores.read_file, read_slowly
store = CheckpointStore(sys.argv[1])
for number in range(12):
    store.add_scores(1, {f"{sys.argv[2]} {number}": number})
"""


def test_two_evaluators_lose_no_line_while_another_process_trains(run, filled):
    """Scoring needs no lease of the run, and waits for who else is scoring."""
    with filled(run, 1) as store:
        store.acquire()
        command = [sys.executable, "-c", _WRITER, str(run)]
        writers = [subprocess.Popen([*command, name]) for name in "ab"]
        for number in range(12):
            store.add_scores(1, {f"c {number}": number})
        assert [writer.wait(120) for writer in writers] == [0, 0]
        expected = {f"{name} {number}" for name in "abc" for number in range(12)}
        assert {metric for line in lines(store) for metric in line["scores"]} == expected
        assert store.scores()[store.latest()].keys() == expected | {"loss"}


def test_no_thread_loses_a_line(location, filled):
    """Nor do several threads of one process, which share a lease."""
    from concurrent.futures import ThreadPoolExecutor

    store = filled(location, 1)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: store.add_scores(1, {f"m{number}": number}), range(16)))
    assert store.scores()[store.latest()].keys() == {"loss", *(f"m{number}" for number in range(16))}


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def scored(run, filled):
    """A run with three checkpoints, of which two are scored."""
    store = filled(run, 100, 200, 300)
    store.add_scores(100, {"val": 0.25, "mos": 3})
    store.add_scores(200, {"val": 0.5, "mos": 4})
    return store


def test_ls_shows_metrics(scored, run):
    """A column for each metric that is asked for, the best marked, in the order of steps."""
    shown = invoke("ls", run, "--metric", "val", "--metric", "mos:max", "--metric", "loss").stdout.splitlines()
    assert shown[0].split() == ["step", "epoch", "size", "val", "mos", "loss", "saved", "name"]
    assert [line.split()[4:7] for line in shown[1:4]] == [["0.25*", "3", "1"], ["0.5", "4*", "1"], ["-", "-", "1*"]]
    assert shown[4].endswith("; *: best")
    assert "val" not in invoke("ls", run).stdout


def test_ls_as_json_adds_metrics(scored, run):
    """--json adds what was asked for to the fields, null where it is not known."""
    found = json.loads(invoke("ls", run, "--metric", "val", "--json").stdout)
    assert [entry["metrics"] for entry in found] == [{"val": 0.25}, {"val": 0.5}, {"val": None}]
    assert [entry["step"] for entry in found] == [100, 200, 300]


def test_ls_of_an_unknown_metric_says_what_there_is(scored, run):
    """The listing is given all the same."""
    result = invoke("ls", run, "--metric", "va")
    assert result.exit_code == 0
    assert "'va' (they have: loss, mos, val)" in result.stderr
    assert [line.split()[4] for line in result.stdout.splitlines()[1:4]] == ["-", "-", "-"]


@pytest.mark.parametrize(("best", "step"), [("val", 100), ("val:min", 100), ("val:max", 200), ("mos:max", 200)])
def test_the_best_can_be_exported_shown_and_verified(best, step, scored, run):
    """--best stands wherever --step does."""
    result = invoke("export", run, "--best", best)
    assert f"from {SEED_VC.format(step)}" in result.stdout, result.output
    assert (run / "ft_model.pth").exists()
    assert SEED_VC.format(step) in invoke("show", run, "--best", best).stdout.splitlines()[0]
    assert SEED_VC.format(step) in invoke("verify", run, "--best", best).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--best", "val", "--step", "100"], "give one of them"),
        (["--best", ""], "write val_loss or score:max"),
        (["--best", "val:best"], "write val_loss or score:max"),
    ],
)
def test_best_misused_is_wrong_usage(arguments, message, scored, run):
    """Exit 2 and what to write instead."""
    result = invoke("export", run, *arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_best_belongs_to_a_run(scored, run):
    """A file is one checkpoint already; so says the error."""
    result = invoke("show", run / SEED_VC.format(100), "--best", "val")
    assert result.exit_code == 2
    assert "--best belongs to a RUN" in result.output


def test_prune_goes_by_scores(scored, run):
    """`prune --keep-best` keeps the best scored, and what is not scored yet."""
    result = invoke("prune", run, "--keep-best", "val")
    assert result.exit_code == 0, result.output
    assert steps(scored) == [100, 300]
    scored.add_scores(300, {"val": 0.1})
    assert "best val (min), 0.1" in invoke("prune", run, "--keep-best", "val:1").stdout
    assert steps(scored) == [300]
