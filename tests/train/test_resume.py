"""A run that was interrupted ends as one that was not."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import runs
import torch
from runs import differences
from zygote import Child, be_command

from seedvc_ckpt import CheckpointStore
from seedvc_ckpt.file import CheckpointFile
from seedvc_ckpt.format.compare import compare
from seedvc_train.cli import main
from seedvc_train.corpus import write_demo_corpus

_STEPS = 60
_KILLS = 10


def losses(run: Path) -> list[tuple[float, float, float, float]]:
    """(step, loss, running loss, learning rate) of every logged step."""
    return [(line["step"], line["loss"], line["running_loss"], line["lr"]) for line in runs.metrics(run)]


def test_ten_kills_change_no_bit(recordings: Path, tmp_path: Path) -> None:
    """Killed ten times at random moments, half of them inside a save, a run ends bit for bit as one left alone."""
    options = {"max_steps": _STEPS, "save_every": 1, "keep_last": 3}
    assert runs.train(recordings, tmp_path / "whole", **options).return_value == 0
    run = tmp_path / "killed" / "run"
    seed = random.SystemRandom().randrange(1 << 32)
    moments = random.Random(seed)
    words = ["seedvc-train", *runs.arguments(recordings, tmp_path / "killed", **options)]
    output = tmp_path / "output.txt"
    for kill in range(_KILLS):
        process = Child(lambda: be_command(main, words, output)).go()
        target = min(_STEPS - 2, (kill + 1) * _STEPS // (_KILLS + 1))
        reached, deadline = 0, time.monotonic() + 60
        while reached < target and time.monotonic() < deadline:
            latest = CheckpointStore(run, read_only=True).latest()
            reached = latest.step if latest else 0
            time.sleep(0.002)
        deadline = time.monotonic() + 5
        while kill % 2 and not list(run.glob(".tmp-*")) and time.monotonic() < deadline:
            pass
        time.sleep(moments.uniform(0, 0.02))
        process.kill()
        assert process.wait() == -signal.SIGKILL, f"seed {seed}: ended by itself\n{output.read_text()}"
    result = runs.train(recordings, tmp_path / "killed", **options)
    assert result.return_value == 0, result.output
    assert "resumed from step" in result.output
    assert differences(tmp_path / "whole" / "run", run) == [], f"seed {seed}"
    assert losses(run) == losses(tmp_path / "whole" / "run"), f"seed {seed}"
    weights = [tmp_path / logs / "run" / "ft_model.pth" for logs in ("whole", "killed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_larger_limit_goes_on(recordings: Path, tmp_path: Path) -> None:
    """Reaching --max-steps saves a checkpoint that a larger --max-steps continues, as if there had been one limit."""
    runs.train(recordings, tmp_path / "once", max_steps=11, save_every=4)
    runs.train(recordings, tmp_path / "twice", max_steps=7, save_every=4)
    assert CheckpointStore(tmp_path / "twice" / "run").latest().step == 7
    second = runs.train(recordings, tmp_path / "twice", max_steps=11, save_every=4)
    assert "resumed from step 7 (DiT_epoch_00002_step_00007.pth)" in second.output
    assert differences(tmp_path / "once" / "run", tmp_path / "twice" / "run") == []


def test_workers_change_no_bit(recordings: Path, tmp_path: Path) -> None:
    """Two loader processes, with an interruption between, give what none gives."""
    runs.train(recordings, tmp_path / "none", max_steps=8)
    runs.train(recordings, tmp_path / "two", max_steps=4, num_workers=2)
    runs.train(recordings, tmp_path / "two", max_steps=8, num_workers=1)
    assert differences(tmp_path / "none" / "run", tmp_path / "two" / "run") == []


def test_two_threads_change_no_bit(recordings: Path, tmp_path: Path) -> None:
    """Where two threads share the work on a tensor, an interrupted run ends as one left alone, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs.train(recordings, tmp_path / "whole", max_steps=4, save_every=4)
        runs.train(recordings, tmp_path / "parted", max_steps=2, save_every=2, num_workers=2)
        result = runs.train(recordings, tmp_path / "parted", max_steps=4, save_every=2)
    finally:
        torch.set_num_threads(threads)
    assert "last bits may differ" not in result.output
    assert differences(tmp_path / "whole" / "run", tmp_path / "parted" / "run") == []
    assert CheckpointStore(tmp_path / "whole" / "run").load()["seedvc_train"]["environment"]["threads"] == 2


def test_the_seed_matters(recordings: Path, tmp_path: Path) -> None:
    """Another seed gives another run: the comparison above can fail."""
    runs.train(recordings, tmp_path / "zero", max_steps=2)
    runs.train(recordings, tmp_path / "one", max_steps=2, seed=1)
    assert differences(tmp_path / "zero" / "run", tmp_path / "one" / "run") != []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_stops(recordings: Path, tmp_path: Path, number: int, code: int) -> None:
    """SIGINT or SIGTERM to the whole group, as a terminal sends it, finishes and saves the step; nothing is lost."""
    process = runs.start(recordings, tmp_path / "stopped", max_steps=2000, save_every=1000, num_workers=2)
    _wait_for_step(tmp_path / "stopped" / "run", 10, process)
    os.killpg(process.pid, number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    stopped_at = CheckpointStore(tmp_path / "stopped" / "run").latest().step
    assert f"stopped at step {stopped_at}, saved" in output
    assert not (tmp_path / "stopped" / "run" / "ft_model.pth").exists()
    runs.train(recordings, tmp_path / "stopped", max_steps=stopped_at + 3)
    runs.train(recordings, tmp_path / "whole", max_steps=stopped_at + 3)
    assert differences(tmp_path / "whole" / "run", tmp_path / "stopped" / "run") == []


def test_a_second_signal_ends_at_once(recordings: Path, tmp_path: Path) -> None:
    """Two signals end the process without another save and leave nothing half-written."""
    process = runs.start(recordings, tmp_path, max_steps=2000, save_every=10)
    _wait_for_step(tmp_path / "run", 20, process)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode in (130, 143)
    assert "Traceback" not in errors
    assert "stopped at" not in output
    assert not list((tmp_path / "run").glob(".tmp-*"))
    for info in CheckpointStore(tmp_path / "run").list():
        CheckpointStore(tmp_path / "run").verify(info)


def test_the_log_holds_no_step_twice(recordings: Path, tmp_path: Path) -> None:
    """On resume the log is cut back to the step gone on from, and a torn last line goes."""
    runs.train(recordings, tmp_path, max_steps=20, save_every=100)
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 30, "loss": 1.0}\n{"step": 40, "lo')
    runs.train(recordings, tmp_path, max_steps=30)
    assert [line["step"] for line in runs.metrics(tmp_path / "run")] == [10, 20, 30]
    assert all("seconds_stalled" in line for line in runs.metrics(tmp_path / "run"))


def test_resume_never_starts_anew(recordings: Path, tmp_path: Path) -> None:
    """--resume never begins at step 0 and keeps the earlier run's files, set aside."""
    runs.train(recordings, tmp_path, max_steps=6)
    result = runs.train(recordings, tmp_path, max_steps=3, resume="never")
    assert "starting at step 0" in result.output
    assert [info.step for info in CheckpointStore(tmp_path / "run").list()] == [3]
    aside = {path.name for path in (tmp_path / "run" / "aside").iterdir()}
    assert {"DiT_epoch_00000_step_00003.pth", "DiT_epoch_00001_step_00006.pth"} <= aside


def test_resume_at_a_step_branches(recordings: Path, tmp_path: Path) -> None:
    """--resume STEP goes on from that step, sets later ones aside, and repeats them bit for bit."""
    runs.train(recordings, tmp_path, max_steps=6)
    result = runs.train(recordings, tmp_path, max_steps=6, resume=3)
    assert "resumed from step 3 " in result.output
    aside = CheckpointFile.at(tmp_path / "run" / "aside" / "DiT_epoch_00001_step_00006.pth")
    with aside.opened() as before, CheckpointStore(tmp_path / "run").file(6).opened() as again:
        assert list(compare(before, again)) == []


def test_a_damaged_newest_is_stepped_over(recordings: Path, tmp_path: Path) -> None:
    """A damaged newest checkpoint is named and set aside, the run goes on from the one before, and ends the same."""
    runs.train(recordings, tmp_path / "whole", max_steps=9)
    runs.train(recordings, tmp_path / "hurt", max_steps=6)
    newest = tmp_path / "hurt" / "run" / "DiT_epoch_00001_step_00006.pth"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    result = runs.train(recordings, tmp_path / "hurt", max_steps=9)
    assert "resumed from step 3 " in result.output
    assert f"set {newest.name} aside, it is damaged" in result.output
    assert "3 steps" in result.output
    assert differences(tmp_path / "whole" / "run", tmp_path / "hurt" / "run") == []


def test_changed_settings_are_refused_with_a_diff(recordings: Path, tmp_path: Path) -> None:
    """A run goes on with other settings or data only when told to, and says what changed."""
    runs.train(recordings, tmp_path, max_steps=3)
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    other = tmp_path / "config_dit_mini.yml"
    other.write_text(runs.CONFIG.read_text().replace("class_dropout_prob: 0.1", "class_dropout_prob: 0.2"))
    result = runs.train(recordings, tmp_path, max_steps=6, batch_size=3, config=other)
    assert "batch_size: 2 then, 3 now" in str(result.exception)
    assert "model_params.DiT.class_dropout_prob: 0.1 then, 0.2 now" in str(result.exception)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    allowed = runs.train(recordings, tmp_path, max_steps=6, batch_size=3, config=other, allow_changes=True)
    assert allowed.return_value == 0
    assert "changed: batch_size: 2 then, 3 now" in allowed.output
    assert (tmp_path / "run" / "aside" / "config_dit_mini.yml").read_bytes() == runs.CONFIG.read_bytes()


def test_a_run_from_before_an_option_goes_on_with_its_default(recordings: Path, tmp_path: Path) -> None:
    """What a checkpoint does not tell was as it is without the option; anything else is a change."""
    runs.train(recordings, tmp_path / "whole", max_steps=4, save_every=4)
    runs.train(recordings, tmp_path / "older", max_steps=2, save_every=2)
    with CheckpointStore(tmp_path / "older" / "run") as store:
        state = store.load(2)
        for name in ("precision", "tf32", "accumulate", "ema", "val_split"):
            del state["seedvc_train"]["settings"]["values"][name]
        store.save(state, 2, overwrite=True)
    other = runs.train(recordings, tmp_path / "older", max_steps=4, precision="bf16", accumulate=2)
    assert "precision: fp32 then, bf16 now" in str(other.exception)
    assert "accumulate: 1 then, 2 now" in str(other.exception)
    assert "tf32" not in str(other.exception)
    assert runs.train(recordings, tmp_path / "older", max_steps=4, save_every=4).exit_code == 0
    assert differences(tmp_path / "whole" / "run", tmp_path / "older" / "run") == []


def test_changed_data_is_refused_with_a_diff(tmp_path: Path) -> None:
    """New, missing and altered clips are named before a run goes on with them."""
    recordings = tmp_path / "recordings"
    paths = [recordings / path for path in write_demo_corpus(str(recordings), clips=2)]
    runs.train(recordings, tmp_path, max_steps=2)
    paths[0].rename(paths[0].with_name("renamed.wav"))
    paths[1].write_bytes(paths[2].read_bytes())
    result = runs.train(recordings, tmp_path, max_steps=4)
    assert "renamed.wav is new" in str(result.exception)
    assert f"{paths[0].name} is gone" in str(result.exception)
    assert f"{paths[1].name} has other contents" in str(result.exception)


def test_limits_may_change_freely(recordings: Path, tmp_path: Path) -> None:
    """What does not change the numbers (limits, saving, workers) is no changed setting."""
    runs.train(recordings, tmp_path, max_steps=2, save_every=2, keep_last=1)
    result = runs.train(recordings, tmp_path, max_steps=4, save_every=1, keep_last=5, max_epochs=50)
    assert result.return_value == 0, result.exception


def test_a_finished_run_started_again_changes_nothing_but_the_export(recordings: Path, tmp_path: Path) -> None:
    """Started again at its limit a run trains no step and still has its ft_model.pth."""
    runs.train(recordings, tmp_path, max_steps=3)
    (tmp_path / "run" / "ft_model.pth").unlink()
    before = CheckpointStore(tmp_path / "run").list()
    result = runs.train(recordings, tmp_path, max_steps=3)
    assert "done at step 3" in result.output
    assert CheckpointStore(tmp_path / "run").list() == before
    assert (tmp_path / "run" / "ft_model.pth").exists()


def _wait_for_step(run: Path, step: int, process: object) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        lines = runs.metrics(run)
        if lines and lines[-1]["step"] >= step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError(f"no step {step} in a minute")


def test_another_thread_count_is_told(recordings: Path, tmp_path: Path) -> None:
    """What would change the last bits of the numbers, such as the number of threads, is said on resume."""
    threads = torch.get_num_threads()
    runs.train(recordings, tmp_path, max_steps=2)
    try:
        torch.set_num_threads(threads + 1)
        result = runs.train(recordings, tmp_path, max_steps=3)
    finally:
        torch.set_num_threads(threads)
    assert f"threads: {threads} then, {threads + 1} now, so the last bits may differ" in result.output
    again = runs.train(recordings, tmp_path, max_steps=4)
    assert "resumed from step 3" in again.output
    assert f"threads: {threads + 1} then, {threads} now" in again.output
