"""Weights that a run starts from: Seed-VC's own files and runs, published averages, and what does not fit."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import torch

from seedvc_ckpt import CheckpointNotFoundError, CheckpointStore
from seedvc_train.corpus import write_demo_corpus
from seedvc_train.weights import StateError

NAMES = ("DiT_epoch_00001_step_00010.pth", "DiT_epoch_00002_step_00020.pth")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips."""
    folder = tmp_path_factory.mktemp("recordings")
    write_demo_corpus(str(folder), clips=1)
    return folder


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """A folder of runs with a genuine one in it, under the name "run"."""
    shutil.copytree(runs.GENUINE, tmp_path / "run")
    return tmp_path


def genuine(name: str) -> dict[str, Any]:
    return torch.load(runs.GENUINE / name, weights_only=True)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_pretrained_weights_start_a_run(recordings: Path, tmp_path: Path, prefix: str) -> None:
    """--pretrained-ckpt takes the weights of a checkpoint, with a report, and begins at step 0."""
    state = genuine("ft_model.pth")
    given = {
        module: {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
        for module, tensors in state["net"].items()
    }
    dropped = given["cfm"].pop(f"{prefix}estimator.cond_projection.bias")
    torch.save({"net": given}, tmp_path / "weights.pth")
    result = runs.train(recordings, tmp_path, max_steps=1, lr=1e-12, pretrained_ckpt=tmp_path / "weights.pth")
    assert "starting at step 0" in result.output
    assert "cfm.estimator.cond_projection.bias" in result.output
    net = CheckpointStore(tmp_path / "run").load()["net"]
    name = "estimator.cond_x_merge_linear.weight"
    assert torch.allclose(net["cfm"][name], state["net"]["cfm"][name], atol=1e-9)
    assert not torch.equal(net["cfm"]["estimator.cond_projection.bias"], dropped)


def test_pretrained_weights_that_fit_nothing_are_refused(recordings: Path, tmp_path: Path) -> None:
    """Weights of which no tensor fits are an error, not a fresh start."""
    torch.save({"net": {"cfm": {"w": torch.ones(3)}}}, tmp_path / "weights.pth")
    result = runs.train(recordings, tmp_path, pretrained_ckpt=tmp_path / "weights.pth")
    assert isinstance(result.exception, StateError)
    assert "no weights that fit" in str(result.exception)
    assert not CheckpointStore(tmp_path / "run").list()


@pytest.fixture(scope="module")
def averaged() -> dict[str, object]:
    """The genuine checkpoint with averages beside its weights, as published ones have: all of them 1 larger."""
    state = genuine(NAMES[1])
    state["ema"] = {
        module: [[tensor + 1 for name, tensor in tensors.items() if "input_pos" not in name]]
        for module, tensors in state["net"].items()
    }
    return state


@pytest.mark.parametrize(("which", "added"), [("net", 0.0), ("ema", 1.0)])
def test_pretrained_weights_are_the_trained_or_the_averaged(
    recordings: Path, tmp_path: Path, averaged: dict[str, object], which: str, added: float
) -> None:
    """--pretrained-weights ema takes the averages; without it a run takes `net` and is told that there are averages."""
    torch.save(averaged, tmp_path / "published.pth")
    options = {"pretrained_ckpt": tmp_path / "published.pth", "pretrained_weights": which, "ema": 0.5}
    result = runs.train(recordings, tmp_path, max_steps=1, lr=1e-12, **options)
    assert result.return_value == 0, result.exception
    assert f"weights ({which}) of {tmp_path}/published.pth" in result.output
    assert ("--pretrained-weights ema takes those" in result.output) == (which == "net")
    saved = CheckpointStore(tmp_path / "run").load()
    name = "estimator.cond_projection.weight"
    expected = averaged["net"]["cfm"][name] + added
    assert torch.allclose(saved["net"]["cfm"][name], expected, atol=1e-9)
    names = [key for key in saved["net"]["cfm"] if "input_pos" not in key]
    assert torch.allclose(saved["ema"]["cfm"][0][names.index(name)], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda ema: ema.pop("cfm"), "no averaged weights of cfm"),
        (lambda ema: ema.update(cfm=[]), "is no list that holds a list of tensors"),
        (lambda ema: ema["cfm"][0].pop(), "tensors, and net['cfm'] has"),
        (lambda ema: ema["cfm"][0].reverse(), "it is not in the order of net"),
        (lambda ema: ema["cfm"][0].__setitem__(0, "x"), "has str in the place of"),
    ],
    ids=["missing", "empty", "short", "reversed", "text"],
)
def test_averages_laid_out_otherwise_are_refused(
    recordings: Path, tmp_path: Path, averaged: dict[str, object], spoil: Callable[[Any], object], told: str
) -> None:
    """Averages that are not as Seed-VC lays them out are an error that says what is odd."""
    state = copy.deepcopy(averaged)
    spoil(state["ema"])
    torch.save(state, tmp_path / "odd.pth")
    result = runs.train(recordings, tmp_path, pretrained_ckpt=tmp_path / "odd.pth", pretrained_weights="ema")
    assert isinstance(result.exception, StateError)
    assert f"can't start from {tmp_path}/odd.pth: " in str(result.exception)
    assert told in str(result.exception)


@pytest.mark.parametrize("what", ["its export", "a checkpoint", "the run", "a run with a torn newest", "memory"])
def test_a_genuine_run_starts_another(recordings: Path, logs: Path, what: str) -> None:
    """--pretrained-ckpt takes its ft_model.pth, a checkpoint, or a run, on a server too: its newest intact one."""
    source, expected = str(logs / "run"), NAMES[1]
    if what in ("its export", "a checkpoint"):
        expected = "ft_model.pth" if what == "its export" else NAMES[0]
        source = str(logs / "run" / expected)
    elif what == "a run with a torn newest":
        (logs / "run" / NAMES[1]).write_bytes((runs.GENUINE / NAMES[1]).read_bytes()[:-1000])
        expected = NAMES[0]
    elif what == "memory":
        source = "memory://pretrained/run"
        CheckpointStore(source).save(genuine(NAMES[1]), 20, 2)
    result = runs.train(recordings, logs, run_name="new", max_steps=1, lr=1e-12, pretrained_ckpt=source)
    assert result.return_value == 0, result.exception
    assert "all of its weights" in result.output
    assert f"passed over {NAMES[1]}" in result.output or expected != NAMES[0] or what == "a checkpoint"
    net = CheckpointStore(logs / "new").load()["net"]["cfm"]
    wanted = genuine(expected)["net"]["cfm"]
    assert all(torch.allclose(net[name].double(), tensor.double(), atol=1e-8) for name, tensor in wanted.items())


def test_all_that_did_not_fit_is_counted_and_ten_are_shown(recordings: Path, tmp_path: Path) -> None:
    """The report is a table of 80 columns: loaded, missing, mismatched, unexpected, with ten names of each."""
    state = genuine("ft_model.pth")
    given = state["net"]["cfm"]
    names = [name for name, tensor in given.items() if tensor.ndim == 2]
    for name in names[:12]:
        given[name] = given[name][1:]
    for name in names[12:14]:
        del given[name]
    given["estimator.other.weight"] = torch.ones(3)
    torch.save(state, tmp_path / "weights.pth")
    result = runs.train(recordings, tmp_path, max_steps=1, pretrained_ckpt=tmp_path / "weights.pth")
    total = sum(map(len, genuine("ft_model.pth")["net"].values()))
    lines = result.output.splitlines()
    assert f"  loaded     {total - 14:>5}  of the model's {total} tensors: " in result.output
    assert "  missing        2  left at their initial values" in lines
    assert "  mismatched    12  of another shape, left at their initial values" in lines
    assert "  unexpected     1  not in the model, ignored" in lines
    report = lines[lines.index("  missing:") : lines.index("    cfm.estimator.other.weight") + 1]
    assert report[1:3] == [f"    cfm.{name}" for name in names[12:14]]
    assert report[3:5] == ["  mismatched:", f"    cfm.{names[0]}:"]
    assert sum("in the checkpoint" in line for line in report) == 10
    assert report[-3:-1] == ["    and 2 more", "  unexpected:"]
    assert max(map(len, report)) <= 80


def test_buffers_alone_are_no_pretrained_weights(recordings: Path, tmp_path: Path) -> None:
    """A model of which only tables fit, such as input_pos, which every config has, is refused."""
    state = genuine("ft_model.pth")
    for module, tensors in state["net"].items():
        for name, tensor in tensors.items():
            if not name.endswith(("input_pos", "freqs")):
                state["net"][module][name] = torch.ones(*tensor.shape, 2)
    torch.save(state, tmp_path / "weights.pth")
    result = runs.train(recordings, tmp_path, pretrained_ckpt=tmp_path / "weights.pth")
    assert isinstance(result.exception, StateError)
    assert "no weights that fit" in str(result.exception)


@pytest.mark.parametrize("net", [{"cfm": {"w": "text"}}, {"cfm": {1: torch.ones(3)}}, {"cfm": 3}, None])
def test_what_is_no_weights_is_named(recordings: Path, tmp_path: Path, net: object) -> None:
    """A file whose `net` is not modules of named tensors is an error in words."""
    torch.save({"net": net}, tmp_path / "weights.pth")
    result = runs.train(recordings, tmp_path, pretrained_ckpt=tmp_path / "weights.pth")
    assert isinstance(result.exception, StateError)
    assert f"can't start from {tmp_path}/weights.pth: it" in str(result.exception)


def test_a_folder_without_checkpoints_is_named(recordings: Path, tmp_path: Path) -> None:
    """An empty folder and a missing file are errors that say where was looked."""
    (tmp_path / "empty").mkdir()
    result = runs.train(recordings, tmp_path, pretrained_ckpt=tmp_path / "empty")
    assert f"there is no checkpoint in {tmp_path}/empty" in str(result.exception)
    result = runs.train(recordings, tmp_path, pretrained_ckpt=tmp_path / "none.pth")
    assert isinstance(result.exception, CheckpointNotFoundError)
