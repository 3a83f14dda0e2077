"""Training into a run on a server: killed, interrupted, cut off from it, and gone on with from another machine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
import runs

from seedvc_ckpt import CheckpointStore
from seedvc_ckpt.cli import main as seedvc_ckpt
from seedvc_ckpt.format.compare import compare
from seedvc_ckpt.storage import open_storage, read_file
from seedvc_train.cli import main as seedvc_train
from seedvc_train.metrics import MetricsLog

STEPS = 12
WEIGHTS = "ft_model.pth"
_COMMANDS = {"seedvc-train": seedvc_train, "seedvc-ckpt": seedvc_ckpt}


class Commands:
    """Starts commands in milliseconds: forks of a process that has imported all they need, and has no threads."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def start(self, words: list[str], environment: dict[str, str], folder: Path) -> Command:
        """Start a command in a process group of its own, with these variables added; its output goes to the folder."""
        number = sum(1 for _ in folder.glob("*.out"))
        told = [str(folder / f"{number}.{stream}") for stream in ("out", "err")]
        for path in told:
            Path(path).touch()
        return Command(self, self.ask(start=words, environment=environment, told=told), *map(Path, told))

    def ask(self, **what: object) -> int | None:
        """One question to that process, and its answer."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        answer: int | None = json.loads(self._process.stdout.readline())
        return answer


class Command:
    """A command that was started."""

    def __init__(self, commands: Commands, process: int | None, out: Path, err: Path) -> None:
        assert process
        self._commands = commands
        self.process = process
        self._out = out
        self._err = err
        self._code: int | None = None

    @property
    def code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        if self._code is None:
            self._code = self._commands.ask(poll=self.process)
        return self._code

    @property
    def output(self) -> str:
        return self._out.read_text()

    @property
    def errors(self) -> str:
        return self._err.read_text()

    @property
    def steps(self) -> int:
        """How many steps a trainer has told of."""
        return sum(line.startswith("step ") for line in self.errors.splitlines())

    def wait(self, seconds: float = 120) -> int:
        """Its exit code, when it has ended."""
        deadline = time.monotonic() + seconds
        while (code := self.code) is None:
            assert time.monotonic() < deadline, f"still running\n{self.output}{self.errors}"
            time.sleep(0.005)
        return code

    def wait_for_steps(self, steps: int) -> None:
        """Return when it has done so many."""
        deadline = time.monotonic() + 60
        while self.steps < steps:
            assert self.code is None, f"ended with {self.code}\n{self.output}{self.errors}"
            assert time.monotonic() < deadline, f"no {steps} steps within a minute\n{self.output}{self.errors}"
            time.sleep(0.005)

    def signal(self, number: int) -> None:
        """Send a signal to it and those that it started, as a terminal does."""
        os.killpg(self.process, number)

    def kill(self) -> None:
        """End it at once."""
        self.signal(signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL, f"ended by itself\n{self.output}{self.errors}"


class Trainers:
    """Starts `seedvc-train` on one run, from machines of any name.

    Attributes:
        url: The run.
    """

    def __init__(self, commands: Commands, server, config: Path, recordings: Path, folder: Path) -> None:
        self._commands = commands
        self._server = server
        self._recordings = recordings
        self._folder = folder
        self.config = config
        self.begin_another()

    def begin_another(self) -> None:
        """Be about a run that is not there yet."""
        self.logs = self._server.url(f"train_{os.urandom(4).hex()}")
        self.url = f"{self.logs}/run"

    @property
    def store(self) -> CheckpointStore:
        return CheckpointStore(self.url, storage_options=self._server.options, read_only=True)

    @property
    def storage(self):
        return open_storage(self.url, storage_options=self._server.options)

    def start(self, machine: str = "here", **options: object) -> Command:
        given = {"config": self.config, "max_steps": STEPS, "save_every": 1, "keep_last": 3, **options}
        words = ["seedvc-train", *runs.arguments(self._recordings, self.logs, **given)]
        environment = {**self._server.environment, "XDG_CACHE_HOME": str(self._folder / machine)}
        return self._commands.start(words, environment, self._folder)

    def finish(self, machine: str = "here", **options: object) -> Command:
        """Run it to its end."""
        trainer = self.start(machine, **options)
        assert trainer.wait() == 0, trainer.output + trainer.errors
        assert "Traceback" not in trainer.errors
        return trainer

    @property
    def logged(self) -> list[dict[str, float]]:
        """What is in the log on the server."""
        return [json.loads(line) for line in read_file(self.storage, "metrics.jsonl").decode().splitlines()]

    def assert_as(self, whole: Path) -> None:
        """Assert that the run is bit for bit that of a folder, and complete."""
        one, other = CheckpointStore(whole).file(), self.store.file()
        assert one.name == other.name
        with one.opened() as left, other.opened() as right:
            assert list(compare(left, right)) == []
        for info in self.store.list():
            self.store.verify(info)
        assert read_file(self.storage, WEIGHTS) == (whole / WEIGHTS).read_bytes()
        assert read_file(self.storage, self.config.name) == self.config.read_bytes()
        assert [_numbers(line) for line in self.logged] == [_numbers(line) for line in runs.metrics(whole)]


def _numbers(line: dict[str, float]) -> tuple[float, ...]:
    """Of a line of the log, what is the same each time."""
    return line["step"], line["epoch"], line["loss"], line["running_loss"], line["lr"]


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with Commands() as started:
        yield started


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mini config, with every step logged."""
    path = tmp_path_factory.mktemp("config") / runs.CONFIG.name
    path.write_text(runs.CONFIG.read_text() + "log_interval: 1\n")
    return path


@pytest.fixture(scope="module")
def whole(commands: Commands, config: Path, recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a disk that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    words = runs.arguments(recordings, folder, config=config, max_steps=STEPS, save_every=1, keep_last=3)
    trainer = commands.start(["seedvc-train", *words], {}, folder)
    assert trainer.wait() == 0, trainer.errors
    return folder / "run"


@pytest.fixture
def trainers(commands: Commands, server, config: Path, recordings: Path, tmp_path: Path) -> Trainers:
    return Trainers(commands, server, config, recordings, tmp_path)


@pytest.fixture
def on_s3(commands: Commands, weed, config: Path, recordings: Path, tmp_path: Path) -> Trainers:
    return Trainers(commands, weed, config, recordings, tmp_path)


def test_kills_change_no_bit(trainers, server, whole, chance, full, tally):
    """Killed at random moments and started again, a run on a server ends bit for bit as one on a disk left alone."""
    kills = 12 if full else 2
    for kill in range(kills):
        trainer = trainers.start()
        there = trainers.store.latest()
        ahead = (kill + 1) * (STEPS - 2) // kills - (there.step if there else 0)
        trainer.wait_for_steps(max(1, ahead))
        time.sleep(chance.uniform(0, 0.15))
        trainer.kill()
    last = trainers.finish()
    assert "resumed from step" in last.output
    trainers.assert_as(whole)
    tally.record("9", trainers.url.partition(":")[0], "SIGKILL of seedvc-train, started again", kills)


def test_a_killed_server_changes_no_bit(trainers, server, whole, chance, full, tally):
    """With its server killed and restarted a trainer goes on, or ends with an error and exit code 1, and goes on later.

    Then too the run ends bit for bit as one on a disk left alone.
    """
    kills, endured = 6 if full else 1, 0
    for _ in range(kills):
        trainers.begin_another()
        trainer = trainers.start()
        trainer.wait_for_steps(chance.randrange(1, 5))
        trainer.signal(signal.SIGSTOP)
        time.sleep(server.durable_after)
        server.kill()
        trainer.signal(signal.SIGCONT)
        time.sleep(chance.uniform(0, 2))
        server.start()
        code = trainer.wait()
        assert code in (0, 1)
        assert ("error: " in trainer.errors) == bool(code)
        assert "Traceback" not in trainer.errors
        endured += not code
        trainers.finish()
        trainers.assert_as(whole)
    how = f"seedvc-train, its server killed and restarted: {endured} endured, {kills - endured} started again"
    tally.record("9", trainers.url.partition(":")[0], how, kills)


def test_ctrl_c_saves_and_another_machine_goes_on(trainers, whole):
    """SIGINT saves and exits with 130; another machine goes on, with every step once in the log, and the same bits.

    A second trainer is told who is at work, and weights of another run are kept.
    """
    trainers.storage.publish(WEIGHTS, 5, [memoryview(b"other")])
    first = trainers.start("one")
    first.wait_for_steps(2)
    first.signal(signal.SIGSTOP)
    second = trainers.start("two")
    assert second.wait() == 1
    assert f"process {first.process} on " in second.errors
    assert "Traceback" not in second.errors
    assert not second.steps
    first.signal(signal.SIGINT)
    first.signal(signal.SIGCONT)
    assert first.wait() == 130
    assert "Traceback" not in first.errors
    reached = trainers.store.latest().step
    assert f"stopped at step {reached}, saved" in first.output
    assert [line["step"] for line in trainers.logged] == [*range(1, reached + 1)]
    assert read_file(trainers.storage, WEIGHTS) == b"other"

    last = trainers.finish("two")
    assert f"resumed from step {reached} " in last.output
    assert f"kept the {WEIGHTS} that was here as aside/{WEIGHTS}" in last.output
    trainers.assert_as(whole)
    assert read_file(trainers.storage.below("aside"), WEIGHTS) == b"other"
    again = trainers.finish("three")
    assert f"done at step {STEPS}: {trainers.url}/{WEIGHTS}" in again.output
    assert "kept the" not in again.output
    trainers.assert_as(whole)


def test_resume_goes_back_or_starts_anew(on_s3, whole):
    """--resume STEP and --resume never set the later files aside on the server, and repeat them bit for bit."""
    on_s3.finish(keep_last=STEPS, max_steps=5)
    back = on_s3.finish(resume=3, max_steps=6, keep_last=STEPS)
    assert "resumed from step 3 " in back.output
    assert [info.step for info in on_s3.store.list()] == [*range(1, 7)]
    assert [line["step"] for line in on_s3.logged] == [*range(1, 7)]
    aside = CheckpointStore(on_s3.storage.below("aside"), read_only=True)
    assert [info.step for info in aside.list()] == [4, 5]
    for info in aside.list():
        with aside.file(info.step).opened() as before, on_s3.store.file(info.step).opened() as now:
            assert list(compare(before, now)) == []

    anew = on_s3.finish("elsewhere", resume="never")
    assert "starting at step 0" in anew.output
    on_s3.assert_as(whole)
    kept = [entry.name for entry in on_s3.storage.below("aside").list()]
    assert {"metrics.jsonl", "DiT_epoch_00001_step_00004.pth.1"} <= {*kept}
    assert [info.step for info in aside.list()] == [*range(1, 7)]


def test_the_events_follow_the_run(on_s3, tmp_path):
    """What happened to a run on a server stands there, from each machine that trained it; a report is drawn from it."""
    pytest.importorskip("matplotlib")
    from seedvc_train.report import write_report

    on_s3.finish("here", max_steps=2)
    on_s3.finish("elsewhere", max_steps=3)
    lines = [json.loads(line) for line in read_file(on_s3.storage, "events.jsonl").splitlines()]
    told = [(line["event"], line["step"]) for line in lines]
    assert told == [
        ("started", 0),
        ("saved", 1),
        ("saved", 2),
        ("ended", 2),
        ("resumed", 2),
        ("saved", 3),
        ("ended", 3),
    ]
    write_report(on_s3.store, str(tmp_path))
    page = (tmp_path / "report.html").read_text()
    assert all(info.name in page for info in on_s3.store.list())


def test_signals_reach_loader_processes_too(commands, weed, config, recordings, whole, tmp_path):
    """Started as people do, with loader processes, SIGINT to all of them saves; the run goes on to the same bits."""
    logs = weed.url(f"train_{os.urandom(4).hex()}") + "//"
    options = {"config": config, "max_steps": STEPS, "save_every": 4, "keep_last": 3, "num_workers": 2}
    words = [sys.executable, "-m", "seedvc_train", *runs.arguments(recordings, logs, **options)]
    cache = {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path)}
    environment = {**os.environ, **weed.environment, **cache}
    first = subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert first.stderr
    assert first.stderr.readline().startswith("step 1/")
    os.killpg(first.pid, signal.SIGINT)
    output, errors = first.communicate(timeout=60)
    assert first.returncode == 130, errors
    assert "Traceback" not in errors
    assert "stopped at step " in output
    assert commands.start(["seedvc-train", *words[3:]], environment, tmp_path).wait() == 0
    store = CheckpointStore(f"{logs.rstrip('/')}/run", storage_options=weed.options, read_only=True)
    with CheckpointStore(whole).file().opened() as left, store.file().opened() as right:
        assert list(compare(left, right)) == []


def test_a_missing_bucket_is_told(commands, moto, recordings, tmp_path):
    """A bucket that is not there ends the trainer before its first step, with words and exit code 1."""
    words = ["seedvc-train", *runs.arguments(recordings, "s3://no-such-bucket/logs")]
    trainer = commands.start(words, {**moto.environment, "XDG_CACHE_HOME": str(tmp_path)}, tmp_path)
    assert trainer.wait() == 1
    assert "there is no such bucket" in trainer.errors
    assert "Traceback" not in trainer.errors
    assert not trainer.steps


def test_what_the_server_lacks_of_the_log_is_added_here(on_s3, monkeypatch, tmp_path):
    """Lines of the log that a killed trainer had not sent are kept, if the log here and there is of one run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = CheckpointStore(on_s3.storage)
    with MetricsLog(store, 0) as log:
        log.write(step=1, loss=0.5)
    killed = MetricsLog(store, 1)
    killed.write(step=2, loss=0.25)
    killed.write(step=3, loss=0.125)
    killed._file.close()
    with MetricsLog(store, 2):
        pass
    assert on_s3.logged == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    other = b'{"step": 1, "loss": 4.0}\n'
    store.storage.publish("metrics.jsonl", len(other), [memoryview(other)], overwrite=True)
    with MetricsLog(store, 2):
        pass
    assert on_s3.logged == [{"step": 1, "loss": 4.0}]
    store.close()


def test_a_trainer_that_lost_the_run_leaves_the_log(on_s3, monkeypatch, tmp_path, caplog):
    """Who has lost the lease to another machine does not replace the log that this one writes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = CheckpointStore(on_s3.storage)
    store.acquire()
    with MetricsLog(store, 0) as log:
        log.write(step=1)
        log.publish()
        while not store.storage.stat("metrics.jsonl"):
            time.sleep(0.01)
        before = read_file(store.storage, "metrics.jsonl")
        newer = f".seedvc_ckpt.lease.{store._lease.epoch + 1:010d}"
        store.storage.put_small(newer, b"{}", create=True)
        log.write(step=2)
    assert read_file(store.storage, "metrics.jsonl") == before
    assert "metrics.jsonl was not sent" in caplog.text
    store.close()


def _serve() -> None:
    """Be the process that `Commands` forks from."""
    import torch

    torch.set_num_threads(1)
    for name in ("adlfs", "gcsfs", "obstore", "s3fs", "sshfs", "tqdm", "soundfile", "soxr", "seedvc_train.loop"):
        with contextlib.suppress(ImportError):
            __import__(name)
    for line in sys.stdin:
        asked = json.loads(line)
        if "poll" in asked:
            process, status = os.waitpid(asked["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if process else None
        else:
            answer = os.fork()
            if answer == 0:
                _become(asked["start"], asked["environment"], asked["told"])
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _become(words: list[str], environment: dict[str, str], told: list[str]) -> None:
    """Be a command from now on."""
    code: object = 70
    try:
        os.setsid()
        os.environ.update(environment)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream, path in enumerate(told, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), stream)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        sys.argv = words
        _COMMANDS[words[0]]()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        import atexit

        signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interpreter that ends prints whatever interrupts it
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    _serve()
