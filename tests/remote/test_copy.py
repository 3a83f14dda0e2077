"""`seedvc-ckpt copy` between disks and servers: complete, interrupted, refused."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from servers import BUCKET
from test_remote_contests import Writer
from test_training import Commands

from seedvc_ckpt import CheckpointError, CheckpointExistsError, CheckpointStore, CorruptCheckpointError, keep_last
from seedvc_ckpt.cli import commands as seedvc_ckpt_commands
from seedvc_ckpt.copying import copy_run, plan_copy
from seedvc_ckpt.storage import read_file

GENUINE = Path(__file__).parent.parent / "data" / "run_from_seedvc"
ODD = ("[x]*.yml", "a b.txt", "100%25 #1?.log", "ünï+&=;'.yml", ".hidden", "{c},~!@.json")


def state(step: int, size: int = 20_000) -> dict[str, object]:
    return {"net": {"cfm": {"w": torch.full((size,), float(step))}}, "iters": step, "epoch": 0}


def name_of(step: int) -> str:
    return f"DiT_epoch_00000_step_{step:05d}.pth"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run on a disk: three checkpoints, one pinned, a log, a config, an export, odd names, an empty file."""
    folder = tmp_path / "run"
    with CheckpointStore(folder) as store:
        for step in (1, 2, 3):
            store.save(state(step), step)
        store.pin(2)
        store.export(folder / "ft_model.pth")
        store.set_aside(store.save(state(4), 4), "of no use")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    (folder / "config_dit_mini.yml").write_bytes((GENUINE / "config_dit_mini.yml").read_bytes())
    (folder / "empty.txt").touch()
    (folder / ".tmp-of-a-dead-writer").write_text("half")
    for name in ODD:
        (folder / name).write_text(f"of {name}")
    return folder


class Place:
    """A run anywhere: a folder, or a place on a server."""

    def __init__(self, url: str, options: dict[str, object] | None = None) -> None:
        self.url = url
        self._options = options

    def store(self, **options: object) -> CheckpointStore:
        return CheckpointStore(self.url, storage_options=self._options, **options)

    @property
    def storage(self):
        return self.store().storage

    def files(self, below: str = "") -> dict[str, bytes]:
        """Contents by names, of all but what the library has for itself."""
        storage = self.storage.below(below) if below else self.storage
        return {name: read_file(storage, name) for name in self.names(below)}

    def names(self, below: str = "") -> set[str]:
        """The names of these files, and of no temporary ones."""
        storage = self.storage.below(below) if below else self.storage
        return {entry.name for entry in storage.list() if not entry.name.startswith((".seedvc_ckpt.", ".tmp-"))}

    def put(self, name: str, content: bytes) -> None:
        self.storage.publish(name, len(content), [memoryview(content)], overwrite=True)


@pytest.fixture
def there(server) -> Place:
    """An empty place on each kind of server."""
    return Place(server.url(f"copy_{os.urandom(4).hex()}"), server.options)


@pytest.fixture
def on_s3(weed) -> Place:
    """An empty place on S3."""
    return Place(weed.url(f"copy_{os.urandom(4).hex()}"), weed.options)


@pytest.fixture
def at(monkeypatch):
    """Let this process reach a server by its URL alone."""

    def reach(server) -> None:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)

    return reach


@pytest.fixture(scope="module")
def commands():
    with Commands() as started:
        yield started


def invoke(*words: object):
    return CliRunner().invoke(seedvc_ckpt_commands, ["copy", *map(str, words)], standalone_mode=False)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_there_and_back(there, run, tmp_path):
    """A run comes back from a server as it went, odd names and all; what is there already is not sent again."""
    here = Place(str(run))
    with there.store() as target:
        done = copy_run(here.store(read_only=True), target)
    assert there.files() == here.files()
    assert ".tmp-of-a-dead-writer" not in [entry.name for entry in there.storage.list()]
    assert {*done.copied} == {*here.files()}
    assert there.store().list()[1].pinned
    assert there.files("aside") == {}
    for info in there.store().list():
        there.store().verify(info)

    writes = {entry.name: entry.stat() for entry in there.storage.list()}
    with there.store() as target:
        again = copy_run(here.store(), target)
    assert (again.copied, {*again.there}, again.aside) == ([], {*here.files()}, [])
    unchanged = {entry.name: entry.stat() for entry in there.storage.list()}
    assert {name: unchanged[name] for name in here.files()} == {name: writes[name] for name in here.files()}

    back = Place(str(tmp_path / "back"))
    with back.store() as target:
        copy_run(there.store(read_only=True), target)
    assert back.files() == here.files()


def test_from_one_server_to_another(weed, azurite, fake_gcs, sshd, run):
    """A run goes from server to server, round all of them, and arrives as it began."""
    place = Place(str(run))
    for server in (sshd, weed, azurite, fake_gcs, sshd):
        following = Place(server.url(f"copy_{os.urandom(4).hex()}"), server.options)
        with following.store() as target:
            copy_run(place.store(read_only=True), target)
        place = following
    assert place.files() == Place(str(run)).files()


def test_a_run_of_seed_vcs_own(there, tmp_path):
    """Files that Seed-VC itself wrote are copied and checked too."""
    with there.store() as target:
        copy_run(CheckpointStore(GENUINE, read_only=True), target)
    assert there.files() == {path.name: path.read_bytes() for path in GENUINE.iterdir()}
    assert there.store().load()["iters"] == 20


def test_large_files_go_in_parts(there, tmp_path):
    """A checkpoint of several parts arrives whole, and how much was done is told to the last byte."""
    folder = tmp_path / "large"
    with CheckpointStore(folder) as store:
        store.save(state(1, 5_500_000), 1)
    told = []
    with there.store() as target:
        planned = plan_copy(CheckpointStore(folder), target)
        copy_run(CheckpointStore(folder), target, progress=told.append)
    assert there.files() == Place(str(folder)).files()
    assert planned.work(verify=False) <= sum(told) <= planned.work(verify=True)
    assert sum(told) >= 0.99 * planned.work(verify=True)


def test_another_checkpoint_of_the_name_stops_it(there, run, tmp_path):
    """DST with another checkpoint of a name, of equal size even: exit 1's error, and nothing is changed there."""
    with CheckpointStore(tmp_path / "other" / "run") as other:
        size = other.save(state(7), 2).size
    assert size == CheckpointStore(run).list()[1].size
    there.put(name_of(2), (tmp_path / "other" / "run" / name_of(2)).read_bytes())
    before = there.files()
    for verify in (True, False):
        with there.store() as target, pytest.raises(CheckpointExistsError, match=f"another {name_of(2)}"):
            copy_run(CheckpointStore(run), target, verify=verify)
    assert there.files() == before


def test_older_files_are_set_aside(there, run):
    """A file of DST that is no checkpoint and differs is kept in aside/, whatever its name."""
    older = {"metrics.jsonl": b"{}\n", "ft_model.pth": b"old", "[x]*.yml": b"old too", "100%25 #1?.log": b"oldest"}
    for name, content in older.items():
        there.put(name, content)
    with there.store() as target:
        done = copy_run(CheckpointStore(run), target)
    assert there.files() == Place(str(run)).files()
    kept = there.files("aside")
    assert {name: kept[name] for name in older} == older
    assert {*done.aside} == {f"aside/{name}" for name in older}
    assert run.name in kept["metrics.jsonl.reason.txt"].decode()


def test_a_damaged_source_is_told_and_left_out(there, run):
    """A damaged checkpoint of SRC is reported, is in DST under no checkpoint's name, and keeps nothing else away."""
    damage(run / name_of(2))
    with there.store() as target, pytest.raises(CorruptCheckpointError, match=name_of(2)):
        copy_run(CheckpointStore(run), target)
    assert [info.step for info in there.store().list()] == [1, 3]
    expected = Place(str(run)).files()
    del expected[name_of(2)]
    assert there.files() == expected
    assert there.files("aside")[name_of(2)] == (run / name_of(2)).read_bytes()


def test_damage_on_the_way_is_not_the_sources(there, run, monkeypatch):
    """A file that does not read back as it was sent, checkpoint or not, is set aside; the next try sends it anew."""
    for victim in (name_of(2), "ft_model.pth"):
        with there.store() as target:
            genuine = target.storage.publish

            def publish(name, size, chunks, *, genuine=genuine, victim=victim, **options):
                content = bytearray(b"".join(chunks))
                if name == victim:
                    content[size // 2] ^= 1
                return genuine(name, size, [memoryview(content)], **options)

            monkeypatch.setattr(target.storage, "publish", publish)
            with pytest.raises(CheckpointError, match="does not read back") as told:
                copy_run(CheckpointStore(run), target)
            assert not isinstance(told.value, CorruptCheckpointError)
        assert victim not in there.files()
    with there.store() as target:
        copy_run(CheckpointStore(run), target)
    assert there.files() == Place(str(run)).files()


def test_kills_and_interrupts(server, there, commands, run, chance, full, tally, tmp_path):
    """Killed or interrupted at random moments, in both directions, a copy that is run again ends as an unbroken one."""
    with CheckpointStore(run) as store:
        for step in (5, 6):
            store.save(state(step, 5_500_000), step)
    expected = Place(str(run)).files()
    cases = inside = 0
    back = Place(str(tmp_path / "back"))
    for source, target in ((str(run), there), (there.url, back)):
        for number in range(10 if full else 2):
            how = (signal.SIGKILL, signal.SIGINT)[number % 2]
            copying = commands.start(["seedvc-ckpt", "copy", source, target.url], server.environment, tmp_path)
            deadline = time.monotonic() + 60
            begun = target.names()
            while copying.code is None and target.names() == begun and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.3))
            if copying.code is None:
                copying.signal(how)
                inside += 1
            code = copying.wait()
            assert code in (0, -signal.SIGKILL if how == signal.SIGKILL else 130), copying.errors
            assert "Traceback" not in copying.errors
            assert code != 130 or "\ninterrupted\n" in copying.errors
            assert target.files().items() <= expected.items()
            cases += 1
        last = commands.start(["seedvc-ckpt", "copy", source, target.url], server.environment, tmp_path)
        assert last.wait() == 0, last.errors
        assert target.files() == expected
        assert not [entry.name for entry in target.storage.list() if entry.name.startswith(".tmp-")]
    assert inside
    tally.record("2", there.url.partition(":")[0], "SIGKILL and SIGINT of seedvc-ckpt copy, run again", cases)


def test_what_a_killed_copy_left_unchecked_is_checked(there, run):
    """A damaged file that a copy sent, and was killed before it checked, is found by the next one."""
    damage(run / name_of(3))
    with there.store() as target:
        copy_run(CheckpointStore(run), target, verify=False)
        with pytest.raises(CorruptCheckpointError, match=name_of(3)):
            copy_run(CheckpointStore(run), target)
    assert [info.step for info in there.store().list()] == [1, 2]


def test_a_source_that_is_written_to(on_s3, tmp_path):
    """While a trainer saves and prunes, its run can be copied again and again; what is pruned meanwhile is left out."""
    folder, ended = tmp_path / "live", threading.Event()

    def save() -> None:
        with CheckpointStore(folder, retention=keep_last(2)) as store:
            for step in range(1, 10_000):
                store.save(state(step, 1000), step)
                with open(folder / "metrics.jsonl", "a") as log:
                    log.write(f"{step}\n")
                if ended.is_set():
                    return

    saving = threading.Thread(target=save)
    saving.start()
    try:
        while not list(folder.glob("*.pth")):
            time.sleep(0.01)
        with on_s3.store() as target:
            for _ in range(15):
                copy_run(CheckpointStore(folder, read_only=True), target)
    finally:
        ended.set()
        saving.join()
    infos = on_s3.store().list()
    assert infos
    for info in infos:
        on_s3.store().verify(info)


def test_another_writer_is_named(there, run):
    """Where another process is writing to DST, nothing is sent, and it is told who that is."""
    writer = Writer(do="save_on", url=there.url, options=there._options, size=1000)
    writer.wait_for("saved")
    with there.store() as target, pytest.raises(CheckpointError, match=f"process {writer.process.pid} on "):
        target.acquire()
    os.kill(writer.process.pid, signal.SIGSTOP)
    (run / "metrics.jsonl").write_text("new")
    for info in CheckpointStore(run).list():
        (run / info.name).unlink()
    with there.store() as target, pytest.raises(CheckpointError, match=f"process {writer.process.pid} on "):
        copy_run(CheckpointStore(run), target)
    writer.kill()
    assert "metrics.jsonl" not in there.files()


def test_the_command(server, there, run, at):
    """The command says what it would do and did, in words or JSON, and draws no bar where nobody sees it."""
    at(server)
    wanted = Place(str(run)).files()
    planned = invoke(run, there.url, "--dry-run")
    assert f"{len(wanted)} would be copied, 0 are there already" in planned.output
    assert all(name in planned.output for name in wanted)
    as_json = json.loads(invoke(run, there.url, "--dry-run", "--json").output)
    assert ({*as_json["copied"]}, as_json["there"], as_json["dry_run"]) == ({*wanted}, [], True)
    assert not list(there.storage.list())

    there.put("metrics.jsonl", b"old")
    done = invoke(run, there.url)
    assert done.exception is None
    assert done.stderr == ""
    assert done.output == (
        "an older file was kept as aside/metrics.jsonl\n"
        f"{len(wanted)} copied to {there.url}, checked byte for byte; 0 were there already\n"
    )
    assert there.files() == wanted
    again = json.loads(invoke(run, there.url + "/", "--json", "--no-verify").output)
    assert (again["copied"], {*again["there"]}, again["aside"], again["dry_run"]) == ([], {*wanted}, [], False)
    other = invoke(run, there.url + "_2", "--no-verify")
    assert "not checked" in other.output


@pytest.mark.parametrize("spelling", ["{}", "{}/", "{}/.", "link", "{}/../run"])
def test_a_copy_onto_itself_is_refused(run, tmp_path, spelling, tally):
    """SRC and DST that are one folder, however they are spelled, are refused, and nothing is changed."""
    (tmp_path / "link").symlink_to(run)
    before = Place(str(run)).files()
    other = str(tmp_path / "link") if spelling == "link" else spelling.format(run)
    for words in ((run, other), (other, run), (run, other, "--dry-run")):
        assert "are one place" in str(invoke(*words).exception)
    assert Place(str(run)).files() == before


def test_a_copy_onto_itself_on_a_server_is_refused(server, there, run, at):
    """So are two spellings of one URL."""
    at(server)
    with there.store() as target:
        copy_run(CheckpointStore(run), target)
    for words in ((there.url, there.url + "/"), (there.url + "//", there.url)):
        assert "are one place" in str(invoke(*words).exception)
    assert there.files() == Place(str(run)).files()


def test_mistakes_are_told(commands, weed, run, tmp_path):
    """A place that is missing, empty or of no known kind is told in words, with an exit code, and no traceback."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    nowhere = weed.url("nowhere_at_all")
    for words, code, said in (
        ([tmp_path / "missing", tmp_path / "to"], 2, "does not exist"),
        ([tmp_path / "empty", tmp_path / "to"], 1, "nothing to copy"),
        ([tmp_path / "file", tmp_path / "to"], 2, "is not a folder"),
        ([nowhere, tmp_path / "to"], 1, "nothing to copy"),
        ([run, tmp_path / "file"], 1, str(tmp_path / "file")),
        ([run, "nosuch://bucket/run"], 1, "nosuch"),
        (["nosuch://bucket/run", run], 2, "nosuch"),
        ([run, "s3://"], 1, "names no bucket"),
    ):
        copying = commands.start(["seedvc-ckpt", "copy", *map(str, words)], weed.environment, tmp_path)
        assert copying.wait() == code, (words, copying.errors)
        assert said in copying.errors, (words, copying.errors)
        assert "Traceback" not in copying.errors
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("kind", ["moto", "azurite", "fake_gcs"])
def test_a_missing_bucket_is_told(kind, request, run):
    """Words for a bucket that is not there, on each kind of server that makes none by itself."""
    server = request.getfixturevalue(kind)
    url = server.url("run").replace(f"//{BUCKET}/", "//no-such-bucket/")
    with (
        CheckpointStore(url, storage_options=server.options) as target,
        pytest.raises(CheckpointError, match="there is no such bucket"),
    ):
        copy_run(CheckpointStore(run), target)


def test_names_that_are_no_text(there, run):
    """A file whose name is not UTF-8 is copied, or told of in words."""
    with open(os.fsencode(run) + b"/caf\xe9.yml", "wb") as file:
        file.write(b"odd")
    try:
        with there.store() as target:
            copy_run(CheckpointStore(run), target)
    except CheckpointError:
        assert there.store().latest() is None
    else:
        assert there.files() == Place(str(run)).files()


def test_pickles_that_are_not_plain(on_s3, run):
    """A checkpoint that this library will not load is still copied, and compared byte for byte."""
    torch.save({"odd": Path("x")}, run / name_of(8))
    torch.save({"a": 1}, run / name_of(9), _use_new_zipfile_serialization=False)
    for _ in range(2):
        with on_s3.store() as target:
            copy_run(CheckpointStore(run), target)
        assert on_s3.files() == Place(str(run)).files()
