"""seedvc-train --tensorboard, read back as TensorBoard does."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import runs
from click.testing import CliRunner

import seedvc_train
import seedvc_train.cli
from seedvc_ckpt import CheckpointStore
from seedvc_ckpt.format.compare import compare
from seedvc_train.corpus import write_demo_corpus

pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from seedvc_train.tensorboard import TensorBoard


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips: two batches an epoch."""
    folder = tmp_path_factory.mktemp("recordings")
    write_demo_corpus(str(folder), clips=2)
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mini config, with every step logged."""
    path = tmp_path_factory.mktemp("config") / runs.CONFIG.name
    path.write_text(runs.CONFIG.read_text() + "log_interval: 1\n")
    return path


def read(folder: Path) -> EventAccumulator:
    """The scalars of a folder."""
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return found


def texts(folder: Path, tag: str) -> list[tuple[int, str]]:
    """Texts of a folder by step, by the reader of TensorBoard's server: the other leaves those of lost steps in."""
    found = plugin_event_accumulator.EventAccumulator(str(folder), size_guidance={"tensors": 0})
    found.Reload()
    return [(it.step, it.tensor_proto.string_val[0].decode()) for it in found.Tensors(f"{tag}/text_summary")]


def test_scalars_are_those_of_the_log(recordings: Path, config: Path, tmp_path: Path) -> None:
    """Each number of metrics.jsonl is a scalar at its step, each save has its costs and its words."""
    result = runs.train(recordings, tmp_path, config=config, tensorboard=True)
    assert result.return_value == 0, result.exception
    folder = tmp_path / "run" / "tensorboard"
    assert f"for TensorBoard: {folder}" in result.output
    found, lines = read(folder), runs.metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for key in set(lines[0]) - {"step"}:
        shown = [(it.step, it.value) for it in found.Scalars(f"train/{key}")]
        assert shown == [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines]
    assert [it.step for it in found.Scalars("saved/seconds_stalled")] == [3, 6]
    sizes = [info.size for info in CheckpointStore(tmp_path / "run").list()]
    assert [it.value for it in found.Scalars("saved/bytes")] == sizes
    saves = texts(folder, "events/saved")
    assert [step for step, _ in saves] == [3, 6]
    assert "name: DiT_epoch_00001_step_00003.pth" in saves[0][1]
    assert [step for step, _ in texts(folder, "events/ended")] == [6]


def test_a_resume_doubles_no_step(recordings: Path, config: Path, tmp_path: Path) -> None:
    """What was written of steps that are trained again is forgotten; the curve is that of the log."""
    options = {"config": config, "tensorboard": True, "keep_last": 9}
    runs.train(recordings, tmp_path, max_steps=7, save_every=2, **options)
    runs.train(recordings, tmp_path, max_steps=9, resume=4, **options)
    folder = tmp_path / "run" / "tensorboard"
    found, lines = read(folder), runs.metrics(tmp_path / "run")
    assert [it.step for it in found.Scalars("train/loss")] == [*range(1, 10)]
    assert [it.value for it in found.Scalars("train/lr")] == [pytest.approx(line["lr"], rel=1e-6) for line in lines]
    assert [step for step, _ in texts(folder, "events/saved")] == [2, 4, 6, 9]
    assert [step for step, _ in texts(folder, "events/resumed")] == [4]


def test_a_new_start_forgets_the_old_one(recordings: Path, config: Path, tmp_path: Path) -> None:
    """After --resume never the curve is that of the new run alone."""
    runs.train(recordings, tmp_path, max_steps=5, config=config, tensorboard=True)
    runs.train(recordings, tmp_path, max_steps=2, config=config, tensorboard=True, resume="never")
    found = read(tmp_path / "run" / "tensorboard")
    assert [it.step for it in found.Scalars("train/loss")] == [1, 2]


def test_it_changes_no_bit_of_the_run(recordings: Path, config: Path, tmp_path: Path) -> None:
    """With and without it the checkpoints are the same."""
    for logs, given in ((tmp_path / "with", True), (tmp_path / "without", None)):
        runs.train(recordings, logs, config=config, tensorboard=given)
    one, other = (CheckpointStore(tmp_path / name / "run").file(6) for name in ("with", "without"))
    with one.opened() as left, other.opened() as right:
        assert list(compare(left, right)) == []
    assert not (tmp_path / "without" / "run" / "tensorboard").exists()


def test_of_a_run_on_a_server_the_files_are_here(
    recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Event files can't be appended to on a server: they are kept in the working folder, which is named."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    result = runs.train(recordings, Path("x"), log_dir="memory://boards", max_steps=1, tensorboard=True)
    assert result.return_value == 0, result.exception
    (folder,) = (tmp_path / "cache" / "seedvc-train").rglob("tensorboard")
    assert f"for TensorBoard: {folder}" in result.output
    assert [step for step, _ in texts(folder, "events/ended")] == [1]


def test_lines_of_all_kinds_are_taken(tmp_path: Path) -> None:
    """NaN stays NaN; a failure, which has no step, stands at the last one; text is no number."""
    with TensorBoard(str(tmp_path), 0) as board:
        board.write({"step": 4, "loss": math.nan, "note": "none", "nothing": None})
        board.write({"time": "now", "event": "failed", "error": "it *broke*"})
    found = read(tmp_path)
    assert [(it.step, math.isnan(it.value)) for it in found.Scalars("train/loss")] == [(4, True)]
    assert found.Tags()["scalars"] == ["train/loss"]
    ((step, text),) = texts(tmp_path, "events/failed")
    assert step == 4
    assert "it *broke*" in text


def evaluate(run: Path, clips: Path, *words: object) -> str:
    """Score a run and show its scores; return what is printed."""
    given = [run, "--val-dir", clips, "--euler-steps", 1, "--pictures", 0, "--tensorboard", *words]
    shown = CliRunner().invoke(seedvc_train.cli.command, ["evaluate", *map(str, given)], standalone_mode=False)
    assert shown.return_value == 0, shown.exception
    return shown.output


def curve(run: Path, metric: str) -> list[tuple[int, float]]:
    return [(it.step, it.value) for it in read(run / "tensorboard" / "evaluate").Scalars(f"scores/{metric}")]


def test_scores_are_shown_at_their_steps(recordings: Path, tmp_path: Path) -> None:
    """In whatever order and however often checkpoints are scored, each step has its newest scores once."""
    runs.train(recordings, tmp_path, save_every=2, keep_last=9)
    run = tmp_path / "run"
    assert f"for TensorBoard: {run / 'tensorboard' / 'evaluate'}" in evaluate(run, recordings)
    assert [step for step, _ in curve(run, "val_loss")] == [6]
    evaluate(run, recordings, "--step", 4)
    evaluate(run, recordings, "--every")
    evaluate(run, recordings, "--step", 4)
    CheckpointStore(run).add_scores(2, {"val_loss": 9.0}, on=scored_on(run))
    (run / CheckpointStore(run).list()[1].name).unlink()
    evaluate(run, recordings, "--every")
    assert [step for step, _ in curve(run, "mel_distance")] == [2, 4, 6]
    lines = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
    newest = {line["step"]: line["scores"]["val_loss"] for line in lines}
    assert newest[2] == 9.0
    assert curve(run, "val_loss") == [(step, pytest.approx(newest[step], rel=1e-6)) for step in (2, 4, 6)]


def scored_on(run: Path) -> str:
    return json.loads((run / "scores.jsonl").read_text().splitlines()[0])["on"]["val_loss"]


def test_other_clips_make_another_curve(recordings: Path, tmp_path: Path) -> None:
    """What does not compare with the scores that were asked for is not among them, though it be newer."""
    runs.train(recordings, tmp_path / "logs", save_every=2, keep_last=9)
    run = tmp_path / "logs" / "run"
    write_demo_corpus(str(tmp_path / "others"), seed=9, clips=1)
    evaluate(run, recordings, "--every")
    before = curve(run, "val_loss")
    evaluate(run, tmp_path / "others", "--step", 4)
    assert [step for step, _ in curve(run, "val_loss")] == [4]
    evaluate(run, recordings, "--every")
    assert curve(run, "val_loss") == before
    assert len(list((run / "tensorboard" / "evaluate").iterdir())) == 1


def test_scores_of_a_run_that_trains_are_shown_beside_it(recordings: Path, config: Path, tmp_path: Path) -> None:
    """Nothing is written to the trainer's own event files, which it goes on with."""
    runs.train(recordings, tmp_path, config=config, tensorboard=True)
    folder = tmp_path / "run" / "tensorboard"
    with TensorBoard(str(folder), 6) as board:
        board.write({"step": 7, "loss": 0.5})
        before = {*folder.iterdir()}
        evaluate(tmp_path / "run", recordings)
        assert {path for path in folder.iterdir() if path.is_file()} == before
        board.write({"step": 8, "loss": 0.25})
    assert [it.step for it in read(folder).Scalars("train/loss")] == [*range(1, 9)]
    assert not [tag for tag in read(folder).Tags()["scalars"] if tag.startswith("scores/")]
    assert [step for step, _ in curve(tmp_path / "run", "val_loss")] == [6]


def test_a_new_start_forgets_old_scores(recordings: Path, config: Path, tmp_path: Path) -> None:
    """Those of steps that are trained again are shown no more, those of earlier ones are."""
    options = {"config": config, "tensorboard": True, "keep_last": 9, "save_every": 2}
    runs.train(recordings, tmp_path, **options)
    evaluate(tmp_path / "run", recordings, "--every")
    runs.train(recordings, tmp_path, **options, resume=4)
    assert [step for step, _ in curve(tmp_path / "run", "val_loss")] == [2, 4]
    runs.train(recordings, tmp_path, **options, resume="never")
    assert read(tmp_path / "run" / "tensorboard" / "evaluate").Tags()["scalars"] == []


@pytest.mark.parametrize("words", [["--dataset-dir"], ["evaluate", ".", "--val-dir"]], ids=["train", "evaluate"])
def test_without_the_extra_it_says_what_to_install(words: list[str], tmp_path: Path) -> None:
    """Where the package is missing the command names the extra that brings it."""
    packages = tmp_path / "packages"  # an installation like this one, without a package
    packages.mkdir()
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if package.suffix != ".pth" and not package.name.startswith("tensorboard"):
            (packages / package.name).symlink_to(package)
    project = Path(seedvc_train.__file__).parent.parent
    shown = subprocess.run(
        [sys.executable, "-S", "-m", "seedvc_train", *words, str(tmp_path), "--tensorboard"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (packages, project)))},
    )
    assert shown.returncode == 2, shown.stderr
    assert "--tensorboard needs tensorboard: run pip install 'seedvc-ckpt[tensorboard]'" in shown.stderr
