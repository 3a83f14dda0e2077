"""The main job shown once: train, die, resume, export."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from itertools import count

import click

from seedvc_ckpt import CheckpointStore
from seedvc_train.corpus import write_demo_corpus
from seedvc_train.metrics import NAME

__all__ = ["demo"]

_MAX_STEPS = 240
_SAVE_EVERY = 50
_KILL_AFTER = 120
_PATIENCE = 600  # seconds


def demo() -> int:
    """Run ``seedvc-train`` on a made-up corpus, kill it, start it again, and tell what happened; return 0 or 1."""
    folder = next(name for name in _names() if not os.path.exists(name))
    recordings, run = os.path.join(folder, "recordings"), os.path.join(folder, "my_run")
    clips = write_demo_corpus(recordings)
    _say(f"1. {len(clips)} recordings of two made-up voices are in {recordings}")
    options = f"--dataset-dir {recordings} --log-dir {folder} --features builtin --lr 1e-3"
    options += f" --max-steps {_MAX_STEPS} --save-every {_SAVE_EVERY}"
    command = [sys.executable, "-m", "seedvc_train", *shlex.split(options)]
    _say(f"2. seedvc-train {options}")
    died_at = _train_and_kill(command, run)
    if died_at is None:
        return 1
    latest = CheckpointStore(run, read_only=True).latest()
    _say(f"3. SIGKILL at step {died_at}; the newest checkpoint is {latest.name if latest else 'none'}. Once more:")
    if subprocess.run(command, check=False).returncode:
        return 1
    _say(f"4. seedvc-ckpt ls {run}")
    subprocess.run([sys.executable, "-m", "seedvc_ckpt", "ls", run], check=True)
    first, last = _losses(run)
    click.echo(f"\nloss {first:.3f} in the first steps, {last:.3f} in the last")
    click.echo(
        f"""
Next:
  seedvc-ckpt verify {run} --all
  seedvc-ckpt show {run}
  seedvc-ckpt export {run} --out {folder}/half.safetensors --dtype float16
  seedvc-train {options.replace(str(_MAX_STEPS), str(2 * _MAX_STEPS))}
"""
    )
    return 0


def _names() -> list[str]:
    return ["seedvc-demo", *(f"seedvc-demo-{number}" for number in range(2, 1000))]


def _say(text: str) -> None:
    click.echo(f"\n{click.style(text, bold=True)}")


def _train_and_kill(command: list[str], run: str) -> int | None:
    """Start training, kill it when it is half-way, and return the last step that it logged."""
    process = subprocess.Popen(command)
    try:
        for _ in count():
            logged = _steps(run)
            if logged and logged[-1]["step"] >= _KILL_AFTER:
                break
            if process.poll() is not None:
                return None
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(_PATIENCE)
    return int(_steps(run)[-1]["step"])


def _steps(run: str) -> list[dict[str, float]]:
    try:
        with open(os.path.join(run, NAME), encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.endswith("\n")]
    except FileNotFoundError:
        return []


def _losses(run: str) -> tuple[float, float]:
    losses = [line["loss"] for line in _steps(run)]
    part = max(1, len(losses) // 5)
    return sum(losses[:part]) / part, sum(losses[-part:]) / part
