"""Large requests to S3 are signed by s3fs and made by obstore; whatever that can't do, s3fs does."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch

from seedvc_ckpt import CheckpointNotFoundError, CheckpointStore
from seedvc_ckpt.storage import open_storage
from seedvc_ckpt.storage.buckets import s3_transfers

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
    """A run on the server that was saved to and resumed from."""
    url = server.url(f"transfers-{os.getpid()}-{next(_numbers)}")
    with CheckpointStore(url, storage_options={**server.options, **options}) as store:
        store.save(state(), 1)
        assert torch.equal(store.resume().state["net"], state()["net"])
    return url


@pytest.mark.parametrize("name", ["weed", "moto", "s3rver"])
def test_obstore_moves_what_is_large(name, request, calls):
    """Parts and ranges of a megabyte and more are no requests of s3fs."""
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
    assert (calls["upload_part"], calls["get_object"]) == (3, 3)


def test_without_obstore_s3fs_does_it(weed, calls, monkeypatch):
    monkeypatch.setattr(s3_transfers, "_installed", lambda: False)
    saved_and_loaded(weed)
    assert (calls["upload_part"], calls["get_object"]) == (3, 3)


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
    assert "obstore could not write" in caplog.text
    assert "X-Amz" not in caplog.text
    assert weed.options["secret"] not in caplog.text


def test_a_url_that_expired_is_no_loss(weed, calls, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    url = saved_and_loaded(weed)
    calls.clear()
    monkeypatch.setattr(s3_transfers, "_EXPIRES", -60)
    with CheckpointStore(url, storage_options=weed.options, read_only=True) as store:
        assert torch.equal(store.resume().state["net"], state()["net"])
    assert calls["get_object"] == 3
    assert "obstore could not read" in caplog.text


def test_urls_are_signed_anew_in_time(weed, monkeypatch):
    """A file of which reading takes longer than its URL holds."""
    url = saved_and_loaded(weed)
    monkeypatch.setattr(s3_transfers, "_SIGNED_ANEW", -1.0)
    signed = []
    sign = s3_transfers.Transfers._sign

    async def seen(self, *arguments):
        signed.append(await sign(self, *arguments))
        return signed[-1]

    monkeypatch.setattr(s3_transfers.Transfers, "_sign", seen)
    with CheckpointStore(url, storage_options=weed.options, read_only=True) as store:
        store.resume()
    assert len(signed) >= 3


def test_after_failures_it_is_left_alone_for_a_while(weed, monkeypatch):
    """Three in a row; one that succeeds between them begins the count anew."""
    storage = open_storage(saved_and_loaded(weed), storage_options=weed.options)
    transfers = storage._bucket._transfers
    entry = next(found for found in storage.list() if found.name.endswith(".pth"))
    key, tag = storage._prefix + entry.name, entry.stat().identity[0]

    def read(tag):
        return asyncio.run_coroutine_threadsafe(transfers.read(key, 0, 1 << 20, tag), storage._client.fs.loop).result()

    for tags, last in (([tag, '"x"', '"x"', tag, '"x"', '"x"', tag], True), ([*['"x"'] * 3, tag], False)):
        found = [read(one) is not None for one in tags]
        assert found[-1] == last
    monkeypatch.setattr(transfers, "_not_before", 0.0)
    assert read(tag) is not None


def test_a_file_that_is_replaced_while_it_is_read_is_not_mixed(weed):
    url = saved_and_loaded(weed)
    storage = open_storage(url, storage_options=weed.options)
    name = next(found.name for found in storage.list() if found.name.endswith(".pth"))
    with storage.open(name) as blob, CheckpointStore(url, storage_options=weed.options) as store:
        blob.announce([(0, 2 << 20)])
        buffer = bytearray(2 << 20)
        blob.read_into(0, memoryview(buffer))
        store.save(state(2), 1, overwrite=True)
        blob.announce([(2 << 20, 4 << 20)])
        with pytest.raises(CheckpointNotFoundError, match="replaced while it was read"):
            blob.read_into(2 << 20, memoryview(buffer))


_AFTER_A_FORK = """
import os, sys
import torch
from seedvc_ckpt import CheckpointStore
from seedvc_ckpt.storage.buckets import s3_transfers

url, options = sys.argv[1], eval(sys.argv[2])
with CheckpointStore(url, storage_options=options, read_only=True) as store:
    before = store.resume().state["net"]
assert s3_transfers._runs_in == os.getpid(), "obstore was not used"
child = os.fork()
if not child:
    with CheckpointStore(url, storage_options=options, read_only=True) as store:
        equal = torch.equal(store.resume().state["net"], before)
    os._exit(0 if equal else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_fork_of_a_process_that_used_it_goes_on_with_s3fs(weed):
    """Its threads are not there in the child, which would wait for them."""
    url = saved_and_loaded(weed)
    program = [sys.executable, "-W", "ignore", "-c", _AFTER_A_FORK, url, repr(weed.options)]
    subprocess.run(program, check=True, timeout=100)
