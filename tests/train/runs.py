"""Small training runs for the tests: the command in this process or in one of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from seedvc_ckpt import CheckpointStore
from seedvc_ckpt.format.compare import compare
from seedvc_train import cli

DATA = Path(__file__).parent.parent / "data"
GENUINE = DATA / "run_from_seedvc"
CONFIG = GENUINE / "config_dit_mini.yml"


def arguments(recordings: Path, logs: Path, **options: object) -> list[str]:
    """The command's arguments: few short steps of a mini model unless `options` say otherwise."""
    given = {
        "config": CONFIG,
        "dataset_dir": recordings,
        "log_dir": logs,
        "run_name": "run",
        "max_steps": 6,
        "save_every": 3,
        "lr": 1e-3,
        **options,
    }
    words = []
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [] if value is None else [flag, str(value)]
    return words


def train(recordings: Path, logs: Path, **options: object) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(cli.command, arguments(recordings, logs, **options), standalone_mode=False)


def main(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[object, str]:
    """Be the command, as a shell starts it, in this process: the exit code and what was written to standard error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["seedvc-train", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
    return end.value.code, capsys.readouterr().err


def start(recordings: Path, logs: Path, **options: object) -> subprocess.Popen[str]:
    """Start the command in a process group of its own."""
    words = [sys.executable, "-m", "seedvc_train", *arguments(recordings, logs, **options)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def differences(first: Path, second: Path) -> list[str]:
    """What differs between the latest checkpoints of two runs."""
    one, other = CheckpointStore(first).file(), CheckpointStore(second).file()
    assert one.name == other.name
    with one.opened() as left, other.opened() as right:
        return [f"{difference.path}: {difference.what}" for difference in compare(left, right)]


def metrics(run: Path) -> list[dict[str, float]]:
    """The whole lines of a run's log."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]
