"""Large requests to S3 are signed by s3fs and made by others; whatever those can't do, s3fs does."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import subprocess
import sys
from collections import Counter
from contextlib import closing, suppress

import pytest
import torch
from proxy import Tls

from seedvc_ckpt import CheckpointNotFoundError, CheckpointStore
from seedvc_ckpt.storage import open_storage, read_chunks
from seedvc_ckpt.storage.buckets import receiving, s3_transfers

_FLOATS = 10_000_000  # three parts of an upload, three ranges
_numbers = itertools.count(1)


@pytest.fixture
def calls(monkeypatch):
    """How many parts and ranges of a megabyte and more s3fs was asked for."""
    from s3fs import S3FileSystem

    seen, call = Counter(), S3FileSystem._call_s3

    async def counted(self, method, *arguments, **options):
        start, _, end = options.get("Range", "=0-0").partition("=")[2].partition("-")
        size = options["Body"].getbuffer().nbytes if method == "upload_part" else int(end) - int(start) + 1
        seen[method] += size >= 1 << 20
        return await call(self, method, *arguments, **options)

    monkeypatch.setattr(S3FileSystem, "_call_s3", counted)
    return seen


def state(step=1):
    return {"net": torch.arange(_FLOATS, dtype=torch.float32) + step}


def saved_and_loaded(server, **options):
    """A run on the server that was saved to, resumed from and read as it is copied."""
    url = server.url(f"transfers-{os.getpid()}-{next(_numbers)}")
    with CheckpointStore(url, storage_options={**server.options, **options}) as store:
        store.save(state(), 1)
        assert torch.equal(store.resume().state["net"], state()["net"])
    assert read_in_order(url, {**server.options, **options}) > 4 * _FLOATS
    return url


def checkpoint(url, options):
    """The storage of a run, and the name of its only checkpoint."""
    storage = open_storage(url, storage_options=options)
    return storage, next(found.name for found in storage.list() if found.name.endswith(".pth"))


def read_in_order(url, options):
    """How many bytes a checkpoint has, fetched in blocks."""
    storage, name = checkpoint(url, options)
    with storage.open(name) as blob:
        return sum(map(len, read_chunks(blob)))


@pytest.mark.parametrize("name", ["weed", "moto", "s3rver"])
def test_what_is_large_is_no_request_of_s3fs(name, request, calls):
    """Parts and ranges of a megabyte and more, however they are read."""
    saved_and_loaded(request.getfixturevalue(name))
    assert calls.keys() >= {"upload_part", "get_object"}
    assert (calls["upload_part"], calls["get_object"]) == (0, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"s3_additional_kwargs": {"StorageClass": "STANDARD"}},
        {"config_kwargs": {"proxies": {}, "user_agent_extra": "mine"}},
        {"requester_pays": True},
        {"client_kwargs": {"region_name": "us-east-1", "verify": True}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_no_url_can_carry_are_those_of_s3fs(options, moto, calls):
    """They may mean headers, certificates or other servers."""
    saved_and_loaded(moto, **options)
    assert (calls["upload_part"], calls["get_object"]) == (3, 6)


def test_without_obstore_s3fs_does_it(weed, calls, monkeypatch):
    """Parts and blocks; a resume has no use for obstore."""
    monkeypatch.setattr(s3_transfers, "_installed", lambda: False)
    saved_and_loaded(weed)
    assert (calls["upload_part"], calls["get_object"]) == (3, 3)


def test_behind_a_proxy_it_is_asked(weed, monkeypatch):
    """Connections of our own would pass it by; obstore and s3fs read the same variables and don't."""
    url = saved_and_loaded(weed)
    (storage, name), connections = checkpoint(url, weed.options), []
    monkeypatch.setattr(receiving, "_connected", lambda *target: connections.append(target) or 1 / 0)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    for passed_by, expected in (("elsewhere", 0), ("127.0.0.1", 1)):
        monkeypatch.setenv("no_proxy", passed_by)
        receiver = storage._bucket.receiving(storage._prefix + name, "")
        with suppress(ZeroDivisionError):
            assert receiver.begin(0, 1 << 20) is None
        assert len(connections) == expected


def test_a_service_without_checksums_gets_none(moto, calls):
    """When botocore is told to send none, a part that carries one would not fit its upload."""
    url = moto.url(f"transfers-{os.getpid()}-{next(_numbers)}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        with CheckpointStore(url, storage_options={**moto.options, "default_block_size": 6 << 20}) as store:
            store.save(state(), 1)
    assert calls["upload_part"] == 3


def test_a_part_that_changed_on_its_way_is_refused_and_sent_again(weed, calls, monkeypatch, caplog):
    """The service compares the checksum; the log says what happened without signature or secret."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(s3_transfers, "_crc32", lambda content: "AAAAAA==")
    saved_and_loaded(weed)
    assert calls["upload_part"] == 3
    assert "can't write" in caplog.text
    assert "X-Amz" not in caplog.text
    assert weed.options["secret"] not in caplog.text


def test_a_url_that_expired_is_no_loss(weed, calls, monkeypatch, caplog):
    """Neither for a resume nor for what is fetched in blocks."""
    caplog.set_level(logging.INFO)
    url = saved_and_loaded(weed)
    calls.clear()
    monkeypatch.setattr(s3_transfers, "_EXPIRES", -60)
    with CheckpointStore(url, storage_options=weed.options, read_only=True) as store:
        assert torch.equal(store.resume().state["net"], state()["net"])
    assert calls["get_object"] == 3
    assert "can't read" in caplog.text
    assert "X-Amz-Signature" not in caplog.text
    assert read_in_order(url, weed.options) > 4 * _FLOATS
    assert calls["get_object"] == 6


@pytest.mark.parametrize("act", ["resume", "blocks"])
@pytest.mark.parametrize("after", [300.0, -1.0])
def test_urls_are_signed_anew_in_time(act, after, weed, monkeypatch):
    """A file of which reading takes longer than its URL holds."""
    url = saved_and_loaded(weed)
    monkeypatch.setattr(s3_transfers, "_SIGNED_ANEW", after)
    signed = []
    sign = s3_transfers.Transfers._sign

    async def seen(self, *arguments):
        signed.append(await sign(self, *arguments))
        return signed[-1]

    monkeypatch.setattr(s3_transfers.Transfers, "_sign", seen)
    if act == "resume":
        with CheckpointStore(url, storage_options=weed.options, read_only=True) as store:
            store.resume()
    else:
        read_in_order(url, weed.options)
    assert len(signed) >= 2 if after < 0 else len(signed) == 1


def test_a_resume_over_https(weed, calls, certificate, monkeypatch):
    """Trusting whom botocore is told to trust."""
    key, found = certificate
    url = saved_and_loaded(weed)
    calls.clear()
    monkeypatch.setenv("AWS_CA_BUNDLE", str(found))
    with Tls(weed.port, key, found) as port:
        options = {**weed.options, "endpoint_url": f"https://127.0.0.1:{port}"}
        with CheckpointStore(url, storage_options=options, read_only=True) as store:
            assert torch.equal(store.resume().state["net"], state()["net"])
    assert calls["get_object"] == 0


def test_after_failures_it_is_left_alone_for_a_while(weed, monkeypatch):
    """Three in a row; one that succeeds between them begins the count anew."""
    storage, name = checkpoint(saved_and_loaded(weed), weed.options)
    transfers = storage._bucket._transfers
    key, tag = storage._prefix + name, storage.stat(name).identity[0]

    def read(tag):
        return asyncio.run_coroutine_threadsafe(transfers.read(key, 0, 1 << 20, tag), storage._client.fs.loop).result()

    def received(tag):
        with closing(transfers.receiver(key, tag)) as receiver:
            arriving = receiver.begin(0, 1 << 20)
            if arriving is None:
                return None
            with closing(arriving):
                buffer = bytearray(1 << 20)
                return arriving.read_into(0, memoryview(buffer)) or None

    for tags, last in (([tag, '"x"', '"x"', tag, '"x"', '"x"', tag], True), ([*['"x"'] * 3, tag], False)):
        found = [read(one) is not None for one in tags]
        assert found[-1] == last
    assert received(tag) is None
    monkeypatch.setattr(transfers, "_not_before", 0.0)
    assert read(tag) is not None
    assert [received(one) is not None for one in (tag, *['"x"'] * 2, tag, *['"x"'] * 2, tag)][-1]
    assert [received(one) is not None for one in (*['"x"'] * 3, tag)] == [False] * 4
    assert read(tag) is None


@pytest.mark.parametrize("way", ["announced", "in parallel"])
def test_a_file_that_is_replaced_while_it_is_read_is_not_mixed(way, weed):
    url = saved_and_loaded(weed)
    storage, name = checkpoint(url, weed.options)

    def read(blob, start):
        buffer = memoryview(bytearray(2 << 20))
        if way == "announced":
            blob.announce([(start, start + len(buffer))])
            blob.read_into(start, buffer)
        else:
            stretch = [(start, start + len(buffer))]
            blob.read_in_parallel(stretch, lambda source, _: source.read_into(start, buffer))

    with storage.open(name) as blob, CheckpointStore(url, storage_options=weed.options) as store:
        read(blob, 0)
        store.save(state(2), 1, overwrite=True)
        with pytest.raises(CheckpointNotFoundError, match="replaced while it was read"):
            read(blob, 2 << 20)


_AFTER_A_FORK = """
import os, sys
import torch
from seedvc_ckpt import CheckpointStore
from seedvc_ckpt.storage.buckets import s3_transfers

url, options = sys.argv[1], eval(sys.argv[2])
state = {"net": torch.arange(10_000_000.0)}
with CheckpointStore(url, storage_options=options) as store:
    store.save(state, 1)
    store.resume()
assert s3_transfers._runs_in == os.getpid(), "obstore was not used"
child = os.fork()
if not child:
    with CheckpointStore(url, storage_options=options) as store:
        store.save(state, 2)
        equal = torch.equal(store.resume().state["net"], state["net"])
    os._exit(0 if equal else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_fork_of_a_process_that_used_obstore_goes_on_with_s3fs(weed):
    """Its threads are not there in the child, which would wait for them."""
    url = weed.url(f"transfers-{os.getpid()}-{next(_numbers)}")
    program = [sys.executable, "-W", "ignore", "-c", _AFTER_A_FORK, url, repr(weed.options)]
    subprocess.run(program, check=True, timeout=100)
