"""docs/how-to/seed-vc-train-py.md, applied to a trainer of the same structure and to the real one."""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from seedvc_ckpt import CheckpointStore
from seedvc_ckpt.file import CheckpointFile

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "how-to" / "seed-vc-train-py.md"
GENUINE = HERE.parent / "data" / "run_from_seedvc"
Edit = tuple[int, int, str]  # first line, line after the last, and what stands there instead


def applied(source: str) -> str:
    """A trainer with the changes that the page tells, found as it describes them."""
    imports, start, save, call, finish = re.findall(r"^```py\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (trainer,) = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Trainer"]
    methods = {node.name: node for node in trainer.body if isinstance(node, ast.FunctionDef)}
    edits: list[Edit] = []

    begin = methods["__init__"]
    (search,) = [node for node in begin.body if ast.unparse(node).startswith("if pretrained_ckpt_path is None:")]
    edits.append((search.lineno, end(begin), textwrap.indent(start, " " * 8)))

    epoch = methods["train_one_epoch"]
    (due,) = [node for node in ast.walk(epoch) if isinstance(node, ast.If)
              and ast.unparse(node.test) == "self.iters % self.save_interval == 0"]  # fmt: skip
    edits.append((due.body[0].lineno, end(due), textwrap.indent(call, " " * 16)))

    whole = methods["train"]
    (zero,) = [node for node in whole.body if ast.unparse(node) == "self.ema_loss = 0"]
    (loop,) = [node for node in whole.body if isinstance(node, ast.For)]
    edits.append((zero.lineno, end(zero), ""))
    edits.append((loop.lineno, end(whole), textwrap.indent(finish, " " * 8)))
    edits.append((epoch.lineno, epoch.lineno, textwrap.indent(save, " " * 4) + "\n"))

    lines = source.splitlines(keepends=True)
    for first, after, text in sorted(edits, reverse=True):
        lines[first - 1 : after - 1] = [text]
    return imports + "".join(lines)


def end(node: Any) -> int:
    """The line after it."""
    return int(node.end_lineno) + 1


class Changed:
    """A trainer with the changes, run in processes of its own.

    Attributes:
        runs: Where its runs lie.
        whole: A run of 36 steps that nothing interrupted.
    """

    def __init__(self, folder: Path, source: Path, words: list[Path], path: list[Path]) -> None:
        config = yaml.safe_load((GENUINE / "config_dit_mini.yml").read_text())
        config["log_dir"] = str(folder / "runs")
        (folder / "config_dit_mini.yml").write_text(yaml.safe_dump(config))
        (folder / "train.py").write_text(applied(source.read_text()))
        self._folder, self._words, self._path = folder, words, [HERE.parent.parent, *path]
        self.runs = folder / "runs"
        self.train("whole", 36)
        self.whole = self.runs / "whole"

    def train(self, run: str, max_steps: int, *options: Any, killed_at: int | None = None) -> str:
        """Train a run, saving every 10 steps, until a step is reached or SIGKILL comes; return what was printed."""
        words = [sys.executable, *self._words, "train.py", "--config", "config_dit_mini.yml", "--run-name", run]
        words += ["--max-steps", max_steps, "--save-every", 10, "--max-epochs", 1000, *options]
        path = os.pathsep.join(map(str, self._path))
        done = subprocess.run(
            [str(word) for word in words],
            env={**os.environ, "PYTHONPATH": path, "KILLED_AT": str(killed_at), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            cwd=self._folder,
            check=False,
        )
        assert done.returncode == (0 if killed_at is None else -signal.SIGKILL), done.stderr[-2000:]
        return done.stdout


_changed: dict[str, Changed] = {}  # tests come in any order, and each takes the one it wants


@pytest.fixture
def trainer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Changed:
    """The changed trainer of the structure, or the changed real one."""
    if request.param not in _changed:
        source, words, path = HERE / "standin_trainer.py", [], []
        if request.param == "real":
            wheel = request.getfixturevalue("seedvc_wheel")
            for name in ("munch", "einops"):  # which Seed-VC imports
                pytest.importorskip(name)
            source, words, path = wheel / "seed_vc" / "train.py", [HERE / "seedvc_train_py.py"], [wheel]
        _changed[request.param] = Changed(tmp_path_factory.mktemp("trainer"), source, words, path)
    return _changed[request.param]


both = pytest.mark.parametrize("trainer", ["stand-in", "real"], indirect=True)
standin = pytest.mark.parametrize("trainer", ["stand-in"], indirect=True)


def state(folder: Path, step: int) -> dict[str, Any]:
    """What training had reached; where an epoch began is another matter."""
    found = CheckpointStore(folder, read_only=True).load(step)
    return {key: value for key, value in found.items() if key != "epoch"}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("DiT_"))


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


@both
def test_killed_and_started_again_it_goes_on_exactly(trainer: Changed) -> None:
    """Twice killed, a run ends with the weights, moments, learning rate and loss of one that was left alone."""
    run = trainer.runs / "killed"
    trainer.train("killed", 36, killed_at=17)
    assert names(run) == ["DiT_epoch_00001_step_00010.pth"]
    trainer.train("killed", 36, killed_at=33)
    assert "resumed from DiT_epoch_00003_step_00030.pth" in trainer.train("killed", 36)
    assert [name[-9:-4] for name in names(run)] == ["00030", "00036"]
    assert equal(state(run, 36), state(trainer.whole, 36))
    assert equal(state(run, 30), state(trainer.whole, 30))


@both
def test_a_run_of_the_old_trainer_is_continued(trainer: Changed) -> None:
    """A folder that Seed-VC's trainer left goes on at its step 20, with its optimiser; pruning takes its oldest."""
    run = trainer.runs / "old"
    shutil.copytree(GENUINE, run)
    theirs = torch.load(run / "DiT_epoch_00002_step_00020.pth", weights_only=True)
    assert "resumed from DiT_epoch_00002_step_00020.pth" in trainer.train("old", 25)
    ours = CheckpointStore(run, read_only=True).load(25)
    assert (ours["iters"], ours["epoch"]) == (25, 2)
    assert names(run) == ["DiT_epoch_00002_step_00020.pth", "DiT_epoch_00002_step_00025.pth"]
    for (name, before), (_, after) in zip(theirs["optimizer"], ours["optimizer"], strict=True):
        steps = {key: int(value["step"]) for key, value in before["state"].items()}
        assert {key: int(value["step"]) - 5 for key, value in after["state"].items()} == steps, name
    assert [pair[1]["last_epoch"] for pair in ours["scheduler"]] == [25, 25]
    assert [key for key in ours if key != "ema_loss"] == list(theirs)


@standin
def test_the_end_leaves_what_the_services_load(trainer: Changed) -> None:
    """ft_model.pth has the weights of the last step, stock torch reads it, and its manifest tells the settings."""
    run = trainer.whole
    exported = torch.load(run / "ft_model.pth", weights_only=True)
    assert list(exported) == ["net"]
    assert equal(exported["net"], state(run, 36)["net"])
    said = CheckpointFile.at(run / "ft_model.pth").manifest()
    assert said is not None
    assert (said.step, said.settings["preprocess_params.sr"]) == (36, 22050)
    before = {path.name: path.read_bytes() for path in run.glob("*.pth")}
    trainer.train("whole", 36)  # a finished run has nothing to do
    assert {path.name: path.read_bytes() for path in run.glob("*.pth")} == before


@standin
def test_stray_and_torn_files_do_no_harm(trainer: Changed) -> None:
    """Copies with odd names stay and are not resumed from; a torn newest is set aside and the one before it taken."""
    run = trainer.runs / "torn"
    trainer.train("torn", 36, killed_at=24)
    ten, twenty = names(run)
    strays = {"DiT_epoch_00001_step_00010_copy.pth", "DiT_epoch_00009_step_99999_best.pth", "DiT_notes.pth"}
    for stray in strays:
        shutil.copy(run / ten, run / stray)
    os.truncate(run / twenty, 9000)
    assert f"resumed from {ten}" in trainer.train("torn", 36)
    assert (run / "aside" / twenty).exists()
    assert strays <= set(names(run))
    assert equal(state(run, 36), state(trainer.whole, 36))


@standin
def test_a_new_run_starts_from_the_given_weights(trainer: Changed) -> None:
    """--pretrained-ckpt is where a run begins, and not where it goes on."""
    start = GENUINE / "ft_model.pth"
    trainer.train("pretrained", 11, "--pretrained-ckpt", start)
    given, fresh = (
        state(run, step)["net"]["cfm"] for run, step in ((trainer.runs / "pretrained", 11), (trainer.whole, 36))
    )
    weights = torch.load(start, weights_only=True)["net"]["cfm"]
    unused = "estimator.x_embedder.bias"  # no gradient reaches it, so it is as it was
    assert torch.equal(given[unused], weights[unused])
    assert not torch.equal(fresh[unused], weights[unused])
    assert "resumed from" in trainer.train("pretrained", 12, "--pretrained-ckpt", start)


def test_the_page_takes_out_the_old_ways() -> None:
    """After the changes nothing of the old search, save and pruning is left in the stand-in."""
    before, after = ((HERE / "standin_trainer.py").read_text(), applied((HERE / "standin_trainer.py").read_text()))
    for word in ("glob.glob", "torch.save", "latest = max("):
        assert word in before
        assert word not in after
    compile(after, "train.py", "exec")
