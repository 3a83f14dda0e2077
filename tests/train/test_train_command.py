"""The command seedvc-train: what it takes, what it refuses, and what it leaves in the run's folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import sysconfig
import termios
import time
from pathlib import Path

import numpy as np
import pytest
import runs
import soundfile
import torch
import yaml

import seedvc_train
from seedvc_ckpt import CheckpointStore, LeaseHeldError
from seedvc_train.corpus import write_demo_corpus
from seedvc_train.dataset import Batch
from seedvc_train.loop import TrainingError, training_loss
from seedvc_train.model import build_model


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips: two batches an epoch."""
    folder = tmp_path_factory.mktemp("recordings")
    write_demo_corpus(str(folder), clips=2)
    return folder


def test_the_folder_looks_as_seedvc_leaves_it(recordings: Path, tmp_path: Path) -> None:
    """A finished run holds its newest checkpoints, ft_model.pth, the YAML under its own name and its logs."""
    runs.train(recordings, tmp_path, max_steps=10, save_every=4)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        ".seedvc_ckpt.lock",
        "DiT_epoch_00003_step_00008.pth",
        "DiT_epoch_00004_step_00010.pth",
        "config_dit_mini.yml",
        "events.jsonl",
        "ft_model.pth",
        "metrics.jsonl",
    ]
    assert (tmp_path / "run" / "config_dit_mini.yml").read_bytes() == runs.CONFIG.read_bytes()
    (line,) = runs.metrics(tmp_path / "run")
    assert set(line) == {"step", "epoch", "loss", "running_loss", "lr", "seconds_per_step", "seconds_stalled"}


def test_the_weights_fit_the_config(recordings: Path, tmp_path: Path) -> None:
    """ft_model.pth holds exactly the tensors of the model, equal to those of the last checkpoint."""
    runs.train(recordings, tmp_path)
    net = torch.load(tmp_path / "run" / "ft_model.pth", weights_only=True)["net"]
    model = build_model(yaml.safe_load(runs.CONFIG.read_text())["model_params"])
    for name, module in model.items():
        module.load_state_dict(net[name])
    last = CheckpointStore(tmp_path / "run").load()["net"]
    assert all(torch.equal(tensor, last[name][key]) for name in net for key, tensor in net[name].items())


def test_checkpoints_carry_the_loss(recordings: Path, tmp_path: Path) -> None:
    """Each checkpoint's manifest has the running loss, so that keep_best can use it, and names what it came from."""
    runs.train(recordings, tmp_path, max_steps=3)
    runs.train(recordings, tmp_path, max_steps=6)
    first, second = (CheckpointStore(tmp_path / "run").inspect(step).manifest for step in (3, 6))
    assert first.metrics["loss"] > 0
    assert first.resumed_from is None
    assert second.resumed_from == "DiT_epoch_00001_step_00003.pth"


def test_keep_every_keeps_for_good(recordings: Path, tmp_path: Path) -> None:
    """--keep-last and --keep-every decide together what stays."""
    runs.train(recordings, tmp_path, max_steps=10, save_every=1, keep_last=1, keep_every=4)
    assert [info.step for info in CheckpointStore(tmp_path / "run").list()] == [4, 8, 10]


def test_max_epochs_ends_a_run(recordings: Path, tmp_path: Path) -> None:
    """--max-epochs stops after whole epochs, saved and exported."""
    result = runs.train(recordings, tmp_path, max_epochs=2, max_steps=100)
    assert "done at step 4" in result.output
    assert CheckpointStore(tmp_path / "run").latest().step == 4


def test_recordings_of_all_kinds_train(tmp_path: Path) -> None:
    """8 to 48 kHz, mono and stereo, five formats; a torn file and a text file named .wav are named and skipped."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number, (rate, channels, suffix) in enumerate(
        [
            (8000, 1, "wav"),
            (16000, 2, "flac"),
            (24000, 1, "ogg"),
            (44100, 2, "mp3"),
            (48000, 1, "opus"),
            (48000, 2, "wav"),
        ]
    ):
        time = np.arange(int(1.5 * rate)) / rate
        wave = 0.3 * np.sin(2 * np.pi * 220 * time) + 0.01 * random.standard_normal(len(time))
        form = {"format": "OGG", "subtype": "OPUS"} if suffix == "opus" else {}
        soundfile.write(folder / f"{number} [x].{suffix}", np.stack([wave] * channels, axis=1), rate, **form)
    torn = (folder / "1 [x].flac").read_bytes()
    (folder / "torn.flac").write_bytes(torn[: len(torn) // 2])
    (folder / "text.wav").write_text("this is no sound")
    (folder / "notes.txt").write_text("neither is this")
    (folder / os.fsdecode(b"\xff not text.wav")).write_text("nor this")
    result = runs.train(folder, tmp_path, max_steps=4)
    assert result.return_value == 0, result.exception
    assert "6 clips" in result.output
    assert result.output.count("skipped torn.flac") == 1
    assert result.output.count("skipped text.wav") == 1
    assert "\\udcff not text.wav" in result.output


@pytest.mark.parametrize("name", ["xlsr_tiny", "whisper_small_wavenet", "whisper_base_f0_44k"])
def test_every_preset_trains_when_it_is_made_small(recordings: Path, tmp_path: Path, name: str) -> None:
    """The layout of each of Seed-VC's presets trains, resumes and exports without any weights of theirs."""
    presets = json.loads((runs.DATA / "presets.json").read_text())
    (config,) = (value for key, value in presets.items() if name in key)
    model = config["model_params"]
    model["DiT"].update(hidden_dim=24, num_heads=2, depth=2, content_dim=24)
    model["length_regulator"].update(channels=24)
    if "wavenet" in model:
        model["wavenet"].update(hidden_dim=24, num_layers=2)
    path = tmp_path / f"config_{name}.yml"
    path.write_text(yaml.safe_dump(config))
    assert runs.train(recordings, tmp_path, config=path, max_steps=2).return_value == 0
    result = runs.train(recordings, tmp_path, config=path, max_steps=3)
    assert "resumed from step 2" in result.output
    assert (tmp_path / "run" / "ft_model.pth").exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--dataset-dir", "nowhere"], 1, "does not exist"),
        (["--dataset-dir", "EMPTY"], 1, "none is usable"),
        (["--dataset-dir", "EMPTY", "--config", "nowhere.yml"], 2, "no such config file"),
        (["--dataset-dir", "EMPTY", "--config", "BROKEN"], 2, "model_params"),
        ([], 2, "--dataset-dir"),
        (["--dataset-dir", "EMPTY", "--run-name", "a/b"], 2, "not the name of one folder"),
        (["--dataset-dir", "EMPTY", "--resume", "sometimes"], 2, "none of auto, never and a step"),
        (["--dataset-dir", "EMPTY", "--max-steps", "0"], 2, "--max-steps"),
        (["--dataset-dir", "CLIPS", "--device", "abacus"], 2, "no such device"),
        (["--dataset-dir", "CLIPS", "--resume", "77"], 1, "no checkpoint of step 77"),
        (["--dataset-dir", "CLIPS", "--pretrained-ckpt", "nowhere.pth"], 1, "nowhere.pth"),
        (["--dataset-dir", "CLIPS", "--log-dir", "nosuch://x"], 1, "can't be used"),
    ],
)
def test_mistakes_are_told_without_a_traceback(
    recordings: Path, tmp_path: Path, words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each mistake gets a sentence that says what was found and an exit code, never a traceback."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.yml").write_text("batch_size: 2\n")
    named = {"EMPTY": tmp_path / "empty", "BROKEN": tmp_path / "broken.yml", "CLIPS": recordings}
    ended, errors = runs.main(capsys, "--log-dir", tmp_path / "logs", *(named.get(word, word) for word in words))
    assert ended == code, errors
    assert said in errors
    assert "Traceback" not in errors


def test_without_the_extra_it_says_what_to_install(tmp_path: Path) -> None:
    """Where the packages of [train] are missing the command names the install that brings them."""
    packages = tmp_path / "packages"  # an installation like this one, without two packages
    packages.mkdir()
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if package.suffix != ".pth" and not package.name.startswith(("soundfile", "soxr")):
            (packages / package.name).symlink_to(package)
    project = Path(seedvc_train.__file__).parent.parent
    words = [sys.executable, "-S", "-m", "seedvc_train", "--dataset-dir", str(tmp_path)]
    paths = os.pathsep.join(map(str, (packages, project)))
    result = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths})
    assert result.returncode == 2, result.stderr
    assert "training needs soundfile, soxr: run pip install 'seedvc-ckpt[train]'" in result.stderr


def test_a_loss_that_is_not_finite_stops_and_saves_nothing(recordings: Path, tmp_path: Path) -> None:
    """Training that blew up ends with the step named; the last good checkpoint stays the newest."""
    result = runs.train(recordings, tmp_path, max_steps=400, save_every=1, lr=1e30)
    assert isinstance(result.exception, TrainingError)
    assert "--lr" in str(result.exception)
    assert not (tmp_path / "run" / "ft_model.pth").exists()


def test_the_prompt_hears_the_true_voice() -> None:
    """Content of the prompt's frames comes from the recording, content of the rest from the shifted copy."""
    model = build_model(yaml.safe_load(runs.CONFIG.read_text())["model_params"]).eval()
    torch.manual_seed(0)
    lens = torch.tensor([40, 40])
    true, shifted = torch.randn(2, 20, 24), torch.randn(2, 20, 24)
    heard: list[torch.Tensor] = []

    def spy(x1: torch.Tensor, x_lens: object, prompt_lens: torch.Tensor, cond: torch.Tensor, style: object) -> object:
        heard.extend([prompt_lens, cond])
        return torch.zeros(())

    model["cfm"].loss = spy
    training_loss(
        model, Batch(torch.randn(2, 20, 40), lens, true, shifted, torch.tensor([20, 20]), torch.randn(2, 16), None)
    )
    prompt_lens, cond = heard
    assert 0 < prompt_lens.max() < 40
    of_true, of_shifted = (model["length_regulator"](content, ylens=lens) for content in (true, shifted))
    for row, length in enumerate(prompt_lens):
        assert torch.equal(cond[row, :length], of_true[row, :length])
        assert torch.equal(cond[row, length:], of_shifted[row, length:])


def test_a_terminal_gets_a_progress_bar(recordings: Path, tmp_path: Path) -> None:
    """On a terminal a bar shows step, loss, speed and the last save."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    words = [sys.executable, "-m", "seedvc_train", *runs.arguments(recordings, tmp_path, max_steps=6)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # how Linux tells that the other side is closed
            while read := os.read(ours, 4096):
                shown += read
    os.close(ours)
    assert process.returncode == 0
    for part in (b"6/6", b"loss", b"step/s", b"saved 3"):
        assert part in shown


def test_a_second_trainer_is_told(recordings: Path, tmp_path: Path) -> None:
    """Of two trainers on one run the second stops before its first step and is told who holds the run."""
    first = runs.start(recordings, tmp_path, max_steps=5000, save_every=5000)
    try:
        while not runs.metrics(tmp_path / "run"):
            assert first.poll() is None, first.communicate()
            time.sleep(0.02)
        before = (tmp_path / "run" / "config_dit_mini.yml").stat().st_mtime_ns
        result = runs.train(recordings, tmp_path)
        assert isinstance(result.exception, LeaseHeldError)
        assert f"process {first.pid} on " in str(result.exception)
        assert (tmp_path / "run" / "config_dit_mini.yml").stat().st_mtime_ns == before
    finally:
        first.kill()
        first.communicate()
    assert runs.train(recordings, tmp_path).return_value == 0
