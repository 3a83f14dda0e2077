"""Stores on servers: what they read and tell, and what they say when something is wrong."""

from __future__ import annotations

import json
import logging
import os
import pickle
import socket
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import pytest
import torch

from seedvc_ckpt import CheckpointNotFoundError, CheckpointStore, SaveFailedError, StorageError, keep_last
from seedvc_ckpt.doctor import diagnose
from seedvc_ckpt.storage import open_storage

CANARY = "canary0SECRET0value"


def state(step=1, size=1000):
    return {"net": {"cfm": {"w": torch.full((size,), float(step))}}, "optimizer": {"m": torch.ones(2 * size)}}


def command(server, *words, **environment):
    """The installed command with the server's environment."""
    tool = Path(sys.executable).with_name("seedvc-ckpt")
    return subprocess.run(
        [tool, *map(str, words)],
        env={**os.environ, **server.environment, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_run_on_a_server_is_one_on_a_disk(remote, tmp_path):
    """Saving, listing, pruning, pinning, rewinding, exporting, verifying and resuming do what they do on a disk."""
    url, options = remote
    places = [CheckpointStore(tmp_path / url.rpartition("/")[2], retention=keep_last(2))]
    places.append(CheckpointStore(url, storage_options=options, retention=keep_last(2)))
    told = []
    for store in places:
        with store:
            for step in (1, 2, 3):
                store.save(state(step), step, metrics={"loss": 1 / step})
            kept = [(info.name, info.size) for info in store.list()]
            pinned = store.pin(2).pinned, [info.pinned for info in store.list()]
            store.save(state(4), 4)
            store.save(state(5), 5)
            after = [info.step for info in store.list()]
            rewound = [info.step for info in store.rewind(4)]
            store.verify()
            found = store.resume()
            target = store.export(tmp_path / "ft_model.pth", overwrite=True)
            weights = Path(target).read_bytes()
            told.append((kept, pinned, after, rewound, found.info.step, store.latest().step, weights))
            assert torch.equal(found.state["net"]["cfm"]["w"], state(4)["net"]["cfm"]["w"])
            assert store.run_name == url.rpartition("/")[2]
            assert not [finding for finding in diagnose(store) if finding.problem]
    assert told[0][1:] == told[1][1:]
    assert [name for name, _ in told[0][0]] == [name for name, _ in told[1][0]]


_SCORER = """
import json, sys
from seedvc_ckpt import CheckpointStore
store = CheckpointStore(sys.argv[1], storage_options=json.loads(sys.argv[2]))
for number in range(4):
    store.add_scores(1, {f"{sys.argv[3]} {number}": number})
"""


def test_a_run_on_a_server_is_scored_by_several_while_it_trains(remote):
    """No score is lost though the server can't append, and the run's own lease is with its trainer."""
    url, options = remote
    with CheckpointStore(url, storage_options=options) as store:
        store.save(state(), 1, metrics={"loss": 1})
        command = [sys.executable, "-c", _SCORER, url, json.dumps(options)]
        scorers = [subprocess.Popen([*command, name]) for name in "ab"]
        for number in range(4):
            store.add_scores(1, {f"c {number}": number})
        store.save(state(2), 2)
        assert [scorer.wait(300) for scorer in scorers] == [0, 0]
        found = store.scores()
    assert [*map(len, found.values())] == [13, 0]
    assert not [finding for finding in diagnose(store) if finding.problem]


def test_every_command_takes_a_url(server, remote):
    """With the vendor's own environment variables the commands need nothing but the URL."""
    url, options = remote
    with CheckpointStore(url, storage_options=options) as store:
        for step in (1, 2):
            store.save(state(step), step, metrics={"loss": 1 / step})
    for words, code in (
        (["ls", url], 0),
        (["ls", url, "--metric", "loss"], 0),
        (["latest", url], 0),
        (["show", url], 0),
        (["verify", url, "--all"], 0),
        (["diff", url, f"{url}/DiT_epoch_00000_step_00001.pth"], 1),
        (["pin", url, "1"], 0),
        (["unpin", url, "1"], 0),
        (["prune", url, "--keep-last", "1", "--dry-run"], 0),
        (["gc", url], 0),
        (["doctor", url], 0),
        (["export", url, "--best", "loss"], 0),
        (["rewind", url, "1"], 0),
    ):
        result = command(server, *words)
        assert (result.returncode, result.stderr) == (code, ""), (words, result)
    listed = json.loads(command(server, "ls", url, "--json").stdout)
    assert [entry["step"] for entry in listed] == [1]


def test_the_newest_of_many_names_is_found_by_the_listing_alone(weed):
    """`latest` reads the listing, page by page, and nothing else."""
    url = weed.url("many")
    storage = open_storage(url, storage_options=weed.options)
    client, calls = storage._client, []
    paths = [f"runs/many/DiT_epoch_00000_step_{step:05d}.pth" for step in range(1200)]

    async def fill():
        import asyncio

        gate = asyncio.Semaphore(50)

        async def put(path):
            async with gate:
                await client.fs._pipe_file(path, b"x")

        await asyncio.gather(*map(put, paths))

    client.run(fill())
    s3 = client.fs._s3
    s3.meta.events.register("before-call.s3", lambda model, **_: calls.append(model.name))
    assert CheckpointStore(url, storage_options=weed.options).latest().step == 1199
    assert calls == ["ListObjectsV2"] * 2


def test_an_export_moves_the_weights_only(weed, tmp_path):
    """Of a file of ours, where `net` is contiguous, little more than a third is fetched; to look inside, far less."""
    url = weed.url("export")
    with CheckpointStore(url, storage_options=weed.options) as store:
        info = store.save(state(size=4_000_000), 1)
        moved = []
        s3 = store.storage._client.fs._s3

        def received(parsed, **_):
            moved.append(parsed.get("ContentLength", 0) if "Body" in parsed else 0)

        s3.meta.events.register("after-call.s3.GetObject", received)
        store.export(tmp_path / "ft_model.pth")
        exported, moved[:] = sum(moved), []
        store.inspect()
        looked, moved[:] = sum(moved), []
        store.list(), store.latest()
        assert exported <= 0.36 * info.size
        assert 0 < looked <= 600_000
        assert moved == []


def test_a_copy_on_this_machine_is_mapped(weed, tmp_path):
    """With `cache_dir` a checkpoint is fetched once; another of its name, and a damaged copy, are fetched again."""
    url, cache = weed.url("cached"), tmp_path / "cache"
    with CheckpointStore(url, storage_options=weed.options) as store:
        store.save(state(1), 1)
        first = store.load(cache_dir=cache)
        copies = list(cache.rglob("*.pth"))
        before = copies[0].stat()
        assert torch.equal(store.load(cache_dir=cache)["net"]["cfm"]["w"], first["net"]["cfm"]["w"])
        assert (list(cache.rglob("*.pth")), copies[0].stat()) == (copies, before)
        content = bytearray(copies[0].read_bytes())
        content[5000] ^= 1
        copies[0].write_bytes(content)
        assert torch.equal(store.load(cache_dir=cache)["net"]["cfm"]["w"], first["net"]["cfm"]["w"])
        store.save(state(2), 1, overwrite=True)
        assert store.load(cache_dir=cache)["net"]["cfm"]["w"][0] == 2


@pytest.mark.parametrize("name", ["s3rver", "localbucket", "weed", "azurite", "sshd"])
def test_a_store_that_keeps_no_two_writers_apart_is_told(name, request, caplog):
    """What conditions a server ignores is found at the first save, kept, shown by doctor, and warned of."""
    server = request.getfixturevalue(name)
    url = server.url("promises")
    unwritten = diagnose(CheckpointStore(url, storage_options=server.options, read_only=True))
    assert any("not known" in finding.what for finding in unwritten)
    with caplog.at_level(logging.WARNING), CheckpointStore(url, storage_options=server.options) as store:
        store.save(state(), 1)
    found = [finding.what for finding in diagnose(CheckpointStore(url, storage_options=server.options))]
    unsafe = name in ("s3rver", "localbucket")
    assert any("unsafe for two writers" in what for what in found) == unsafe, found
    assert bool([record for record in caplog.records if "two writers" in record.message]) == (name == "s3rver")


def test_what_is_missing_is_said_with_its_remedy(server):
    """A bucket that is not there, and a server that does not answer."""
    missing = server.url("x").replace("/runs/", "/no-such-bucket/")
    if server.name != "sshd":
        store = CheckpointStore(missing, storage_options=server.options)
        for act in (store.list, lambda: store.save(state(), 1)):
            with pytest.raises(StorageError, match="no such bucket"):
                act()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {**server.options_for(port), **({"config_kwargs": {"connect_timeout": 1, "retries": {"max_attempts": 0}}}
                                             if server.name == "weed" else {})}  # fmt: skip
    if server.name in ("weed", "sshd"):  # the others' clients try again for a minute
        with pytest.raises(StorageError, match=r"(?i)connect"):
            CheckpointStore(server.url_for("x", port), storage_options=options).list()


def wrong_options(server):
    if server.name == "weed":
        return {**server.options, "secret": CANARY}
    if server.name == "azurite":
        words = server.options["connection_string"].split(";")
        key = "Y2FuYXJ5MFNFQ1JFVDB2YWx1ZTAwMDAwMDAwMDAwMDA="
        return {"connection_string": ";".join(f"AccountKey={key}" if w.startswith("AccountKey") else w for w in words)}
    return {"username": "root", "password": CANARY, "known_hosts": None, "client_keys": None}


@pytest.mark.parametrize("name", ["weed", "azurite", "sshd"])
def test_no_secret_is_ever_shown(name, request, caplog, tmp_path):
    """Not in errors and what they chain, logs, representations, manifests, JSON, nor on the terminal."""
    server = request.getfixturevalue(name)
    options, url = wrong_options(server), server.url("secret")
    secrets = [
        CANARY,
        "Y2FuYXJ5MFNFQ1JFVDB2YWx1ZTAwMDAwMDAwMDAwMDA",
        "eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq",
    ]
    secrets.append(server.options.get("secret", CANARY))
    told = []
    with caplog.at_level(logging.DEBUG, logger="seedvc_ckpt"):
        for made in (options, server.options):
            store = CheckpointStore(url, storage_options=made)
            told += [repr(store), str(vars(store).keys()), store.location, repr(store.storage)]
            for act in (store.list, store.resume, lambda: store.save(state(), 1), lambda: store.load(77), store.close):  # noqa: B023
                try:
                    act()
                except Exception as error:
                    told += [str(error), repr(error), *traceback.format_exception(error), str(pickle.dumps(error))]
            if made is not options:
                told += [store.inspect().manifest.to_json().decode(), json.dumps([str(info) for info in store.list()])]
    assert any("denied" in text or "refused" in text or "Permission" in text for text in told), told
    with_password = f"sftp://user:{CANARY}@127.0.0.1:{server.port}{tmp_path}/run" if name == "sshd" else None
    if with_password:
        for words in (["ls"], ["ls", "--json"], ["doctor"], ["latest"], ["export"]):
            result = command(server, words[0], with_password, *words[1:])
            assert result.returncode
            told += [result.stdout, result.stderr]
        told.append(CheckpointStore(with_password).location)
    for words in (["ls", "--json"], ["show", "--json"], ["doctor", "--json"], ["verify", "--json"]):
        result = command(server, words[0], url, *words[1:])
        assert result.returncode == 0, result
        told += [result.stdout, result.stderr]
    told += [record.getMessage() for record in caplog.records if record.name.startswith("seedvc")]
    for text in told:
        assert not [secret for secret in secrets if secret.lower() in text.lower()], text


def test_a_signed_url_is_refused_without_being_shown():
    """A token in a URL names no place; the message leaves it out."""
    with pytest.raises(StorageError) as caught:
        CheckpointStore(f"az://runs/x?sv=2024&sig={CANARY}")
    assert CANARY not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(("url", "extra"), [("s3://b/r", "s3"), ("gs://b/r", "gcs"), ("az://b/r", "azure"),
                                            ("sftp://h/r", "sftp")])  # fmt: skip
def test_a_missing_extra_is_named(url, extra):
    """Without the package the message says what to install; nothing is imported before."""
    package = {"s3": "s3fs", "gcs": "gcsfs", "azure": "adlfs", "sftp": "sshfs"}[extra]
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        f"u.find_spec = lambda name, *a: None if name == {package!r} else find(name, *a)\n"
        "from seedvc_ckpt.cli import main\n"
        f"sys.argv = ['seedvc-ckpt', 'ls', {url!r}]\n"
        "main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert f"pip install 'seedvc-ckpt[{extra}]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_users_filesystem_is_used_as_it_is(weed):
    """`fs=` works with its caches on, sees what others change, and is neither changed nor closed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import s3fs

    fs = s3fs.S3FileSystem(**weed.options, skip_instance_cache=True)
    place = weed.url("own").removeprefix("s3://")
    before = dict(fs.storage_options)
    mine, other = CheckpointStore(place, fs=fs), CheckpointStore(weed.url("own"), storage_options=weed.options)
    assert mine.latest() is None
    with other:
        other.save(state(1), 1)
    assert mine.latest().step == 1
    with mine:
        mine.save(state(2), 2)
    assert other.latest().step == 2
    assert fs.storage_options == before
    assert fs.exists(f"{place}/DiT_epoch_00000_step_00002.pth")


def test_what_cannot_be_made_safe_is_refused():
    """Filesystems for one event loop, and fsspec's own SFTP, are refused with the reason."""
    import s3fs
    from fsspec.implementations.sftp import SFTPFileSystem

    with pytest.raises(StorageError, match="asynchronous"):
        CheckpointStore("b/r", fs=s3fs.S3FileSystem(asynchronous=True, anon=True, skip_instance_cache=True))
    unconnected = SFTPFileSystem.__new__(SFTPFileSystem)
    with pytest.raises(StorageError, match="sshfs"):
        CheckpointStore("/r", fs=unconnected)


def test_an_absent_checkpoint_is_not_found(remote):
    """As on a disk."""
    url, options = remote
    store = CheckpointStore(url, storage_options=options)
    assert (store.list(), store.latest(), store.resume()) == ([], None, None)
    for act in (store.load, lambda: store.load(3), lambda: store.verify(3), lambda: store.pin(3)):
        with pytest.raises(CheckpointNotFoundError):
            act()


def test_a_bucket_that_may_not_be_written(weed):
    """A save that is refused is a SaveFailedError or StorageError, and says access was denied."""
    store = CheckpointStore(weed.url("denied"), storage_options={**weed.options, "key": "nobody"})
    with pytest.raises((SaveFailedError, StorageError), match=r"credentials|denied"):
        store.save(state(), 1)


_LEAVES_AT_ONCE = """
import asyncio, json, sys, torch
from seedvc_ckpt import AsyncSaver, CheckpointStore
from seedvc_ckpt.storage.buckets import s3

send = s3._Multipart.part

async def slowly(self, *arguments, **options):
    await asyncio.sleep(1)
    await asyncio.get_running_loop().run_in_executor(None, int)  # as the look-up of a host's name
    await send(self, *arguments, **options)

s3._Multipart.part = slowly
saver = AsyncSaver(CheckpointStore(sys.argv[1], storage_options=json.loads(sys.argv[2])))
saver.save({"w": torch.zeros(6_000_000)}, 1)
"""


def test_a_program_that_ends_finishes_its_save(weed):
    """A save in the background is completed though nobody waits for it, with all that its client needs."""
    url = weed.url("leaves")
    words = [sys.executable, "-c", _LEAVES_AT_ONCE, url, json.dumps(weed.options)]
    result = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    store = CheckpointStore(url, storage_options=weed.options)
    store.verify(1)
    assert store.storage.holder() == ""
