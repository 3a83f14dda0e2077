"""Runs of Seed-VC's own trainer, and the ways in which its own resume loses work, each as a scenario."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import runs
import torch

from seedvc_ckpt import CheckpointStore
from seedvc_ckpt.file import CheckpointFile
from seedvc_train.corpus import write_demo_corpus
from seedvc_train.dataset import scan
from seedvc_train.state import StateError

NAMES = ("DiT_epoch_00001_step_00010.pth", "DiT_epoch_00002_step_00020.pth")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips: two batches an epoch."""
    folder = tmp_path_factory.mktemp("recordings")
    write_demo_corpus(str(folder), clips=2)
    return folder


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """A folder of runs with a genuine one in it, under the name "run"."""
    shutil.copytree(runs.GENUINE, tmp_path / "run")
    return tmp_path


def genuine(name: str) -> dict[str, object]:
    return torch.load(runs.GENUINE / name, weights_only=True)


def test_its_run_is_continued_at_the_true_step(recordings: Path, logs: Path) -> None:
    """A run of Seed-VC's goes on at the step of its newest file and says plainly what that file does not record."""
    result = runs.train(recordings, logs, max_steps=23, save_every=100, lr=None)
    assert "resumed from step 20 (DiT_epoch_00002_step_00020.pth)" in result.output
    for what in ("the position inside epoch 2", "random states", "the running loss"):
        assert f"not recorded: {what}" in result.output
    saved = CheckpointStore(logs / "run").load(23)
    assert saved["iters"] == 23


def test_its_optimizer_and_scheduler_are_restored(recordings: Path, logs: Path) -> None:
    """After one step the optimiser has counted 21 and its moments and learning rate come from the 20 before."""
    runs.train(recordings, logs, max_steps=21, save_every=100, lr=None)
    before, after = genuine(NAMES[1]), CheckpointStore(logs / "run").load(21)
    for (name, old), (other, new) in zip(before["optimizer"], after["optimizer"], strict=True):
        assert name == other
        assert list(old["state"]) == list(new["state"])
        stepped = {float(state["step"]) for state in new["state"].values()} - {20.0}  # 20: no gradient in this step
        assert stepped == {21.0} or name == "cfm"
        for index, state in old["state"].items():
            moved = new["state"][index]["exp_avg"] - 0.9 * state["exp_avg"]
            assert moved.abs().max() <= 0.1 * 10.0 + 1e-6  # what a clipped gradient can add
        assert new["param_groups"][0]["lr"] == pytest.approx(old["param_groups"][0]["lr"] * 0.999996, rel=1e-12)
    assert [pair[1]["last_epoch"] for pair in after["scheduler"]] == [21, 21]


def test_its_export_is_set_aside(recordings: Path, logs: Path) -> None:
    """Its ft_model.pth, of a step that no checkpoint holds, is kept beside ours."""
    result = runs.train(recordings, logs, max_steps=21, lr=None)
    kept = logs / "run" / "aside" / "ft_model.pth"
    assert kept.read_bytes() == (runs.GENUINE / "ft_model.pth").read_bytes()
    assert "kept the ft_model.pth that was here as aside/ft_model.pth" in result.output
    assert (logs / "run" / "aside" / "ft_model.pth.reason.txt").read_text().strip()
    again = runs.train(recordings, logs, max_steps=22, lr=None)
    assert "kept the ft_model.pth" not in again.output
    assert sorted(path.name for path in (logs / "run" / "aside").iterdir()) == [
        "ft_model.pth",
        "ft_model.pth.reason.txt",
    ]


def test_our_checkpoints_have_its_layout(recordings: Path, logs: Path) -> None:
    """Beside one key of ours, a checkpoint has the keys, types and order that its trainer writes."""
    runs.train(recordings, logs, max_steps=21, lr=None)
    theirs = genuine(NAMES[1])
    ours = torch.load(logs / "run" / "DiT_epoch_00002_step_00021.pth", weights_only=True)
    assert list(ours) == [*theirs, "seedvc_train"]
    for module, tensors in theirs["net"].items():
        assert list(ours["net"][module]) == list(tensors)
        assert type(ours["net"][module]) is type(tensors)
    assert [type(pair) for pair in ours["optimizer"]] == [tuple, tuple]
    assert [set(pair[1]) for pair in ours["scheduler"]] == [set(pair[1]) for pair in theirs["scheduler"]]


def test_our_exports_say_what_a_service_must_agree_with(recordings: Path, logs: Path) -> None:
    """The manifest of a checkpoint and its export has the audio settings, front ends, options and data of the run."""
    runs.train(recordings, logs, max_steps=21, lr=None)
    saved = CheckpointStore(logs / "run").inspect().manifest
    assert saved is not None
    assert saved.settings["preprocess_params.sr"] == 22050
    assert saved.settings["preprocess_params.spect_params.hop_length"] == 256
    assert saved.settings["model_params.speech_tokenizer.type"] == "xlsr"
    assert saved.settings["model_params.DiT.f0_condition"] is False
    assert saved.settings["features"] == "builtin"
    assert saved.settings["data"] == scan(str(recordings), 22050).digest()
    assert "model_params.DiT.depth" not in saved.settings  # the tensors tell
    exported = CheckpointFile.at(logs / "run" / "ft_model.pth").manifest()
    assert exported is not None
    assert exported.settings == saved.settings


def test_steps_never_go_back(recordings: Path, logs: Path) -> None:
    """Defects 1 and 2: after a resume the numbers go on, so that pruning and the next resume take the new work."""
    runs.train(recordings, logs, max_steps=24, save_every=2, lr=None)
    assert [info.step for info in CheckpointStore(logs / "run").list()] == [22, 24]
    result = runs.train(recordings, logs, max_steps=26, save_every=2, lr=None)
    assert "resumed from step 24 " in result.output


def test_a_torn_newest_is_stepped_over(recordings: Path, logs: Path) -> None:
    """Defect 3: a file cut short, as a crash leaves it there, is set aside and the run goes on from the one before."""
    torn = logs / "run" / "DiT_epoch_00004_step_00030.pth"
    torn.write_bytes((runs.GENUINE / NAMES[1]).read_bytes()[:1_000_000])
    result = runs.train(recordings, logs, max_steps=21, lr=None)
    assert "resumed from step 20 " in result.output
    assert (logs / "run" / "aside" / torn.name).stat().st_size == 1_000_000


def test_nothing_is_deleted_before_the_newest_is_proved(recordings: Path, logs: Path) -> None:
    """Defect 4: a start deletes nothing; older files go only when a newer one is durable."""
    shutil.copy(logs / "run" / NAMES[0], logs / "run" / "DiT_epoch_00000_step_00005.pth")
    newest = logs / "run" / NAMES[1]
    newest.write_bytes(newest.read_bytes()[:-100])
    nothing_to_do = runs.train(recordings, logs, max_steps=10, lr=None)
    assert "resumed from step 10 " in nothing_to_do.output
    assert [info.step for info in CheckpointStore(logs / "run").list()] == [5, 10]
    runs.train(recordings, logs, max_steps=11, lr=None)
    assert [info.step for info in CheckpointStore(logs / "run").list()] == [10, 11]


@pytest.mark.parametrize("name", ["run [x]*?#%", "Stimme ü 声", "a::b", "~", "-dash", "%20", "{step}"])
def test_any_run_name_works(recordings: Path, tmp_path: Path, name: str) -> None:
    """Defect 5: names that break globs and stray files that break number parsing are nothing special."""
    run = tmp_path / name
    shutil.copytree(runs.GENUINE, run)
    strays = (
        "DiT_epoch_00001_step_00500_copy.pth",
        "DiT_epoch_00009_step_90000_best.pth",
        "DiT_epoch_00009_step_90000.pth.tmp",
        "DiT_epoch_00009_step_-0500.pth",
    )
    for stray in strays:
        (run / stray).write_bytes(b"not a checkpoint")
    (run / "DiT_epoch_00009_step_99999.pth").mkdir()
    result = runs.train(recordings, tmp_path, run_name=name, max_steps=21, lr=None)
    assert result.return_value == 0, result.exception
    assert "resumed from step 20 " in result.output
    assert all((run / stray).exists() for stray in strays)


def test_an_optimizer_that_does_not_fit_is_an_error(recordings: Path, logs: Path) -> None:
    """Defect 8: an optimiser state that can't be loaded stops the run and is not passed over."""
    state = genuine(NAMES[1])
    state["optimizer"][0][1]["param_groups"][0]["params"].pop()
    torch.save(state, logs / "run" / NAMES[1])
    before = sorted(path.name for path in (logs / "run").iterdir())
    result = runs.train(recordings, logs, max_steps=21, lr=None)
    assert isinstance(result.exception, StateError)
    assert "optimizer state of cfm does not fit" in str(result.exception)
    left = sorted(path.name for path in (logs / "run").iterdir())
    assert [name for name in left if name != ".seedvc_ckpt.lock"] == before


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_runs_no_code(recordings: Path, logs: Path, tmp_path: Path, zipped: bool) -> None:
    """Defect 8: code in a checkpoint is refused by name and not run, whatever the file's format."""
    trap = tmp_path / "sprung"
    state = genuine(NAMES[1])
    state["optimizer"].append(_Evil(trap))
    torch.save(state, logs / "run" / "DiT_epoch_00003_step_00025.pth", _use_new_zipfile_serialization=zipped)
    result = runs.train(recordings, logs, max_steps=26, lr=None)
    assert result.exception is not None
    assert "DiT_epoch_00003_step_00025.pth" in str(result.exception)
    assert not trap.exists()
    pickle.loads(pickle.dumps(_Evil(trap)))  # the trap works
    assert trap.exists()


def test_a_model_of_another_config_is_refused(recordings: Path, logs: Path) -> None:
    """Weights that don't fit the config's model are listed, and nothing is changed."""
    other = logs / "other.yml"
    other.write_text(runs.CONFIG.read_text().replace("depth: 3", "depth: 2"))
    result = runs.train(recordings, logs, max_steps=21, lr=None, config=other)
    assert isinstance(result.exception, StateError)
    assert "cfm.estimator.transformer.layers.2.attention.wqkv.weight: not in the model" in str(result.exception)
