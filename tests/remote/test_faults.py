"""Saves and loads over a connection that fails once, at a random moment, in every way that connections do."""

from __future__ import annotations

import uuid

import pytest
import torch
import writer
from proxy import FAULTS, HTTP_FAULTS, Proxy

from seedvc_ckpt import CheckpointError, CheckpointStore, CorruptCheckpointError
from seedvc_ckpt.storage import open_storage, read_file

SIZES = (1000, 5_500_000)  # floats: one request, and two parts of an upload


@pytest.fixture
def proxied(server, chance):
    """A proxy in front of the server, a URL and options to reach it through, and options for the straight way."""
    with Proxy(server.port, chance) as proxy:
        options = server.options_for(proxy.port)
        if server.name in ("weed", "moto"):
            options = {**options, "config_kwargs": {"read_timeout": 2, "connect_timeout": 2}}
        elif server.name == "fake_gcs":
            options = {**options, "requests_timeout": 2}
        elif server.name == "azurite":
            options = {**options, "timeout": 10, "connection_timeout": 2, "read_timeout": 2}
        yield proxy, options


def impatient(storage):
    """Let Azure's client, which waits for 15 s and more before it repeats a request, wait for less."""
    service = getattr(storage._client.fs, "service_client", None)
    if service is not None:
        service._config.retry_policy.initial_backoff = 0.1
        service._config.retry_policy.increment_base = 1
    return storage


def test_one_fault_at_any_moment(server, proxied, chance, full, tally):
    """A save either succeeds or fails with an error of ours; nothing partial is listed, nothing lost, nothing doubled.

    After a failed save the next one goes on, with the same step or the one after it if the file is there.
    """
    proxy, options = proxied
    name = f"faults-{uuid.uuid4().hex}"
    through, straight = server.url_for(name, proxy.port), server.url(name)
    looking = CheckpointStore(straight, storage_options=server.options, read_only=True)
    with CheckpointStore(impatient(open_storage(through, storage_options=options))) as store:
        store.save(writer.state(1, SIZES[0]), 1)
        step, recovered, refused, happened, errors = 1, 0, 0, 0, []
        cases = 130 if full else 6
        for _ in range(cases):
            size = chance.choice(SIZES)
            fault = chance.choice(FAULTS if server.name == "sshd" else HTTP_FAULTS)
            byte = int(10 ** chance.uniform(0, 7.3 if size > 1000 else 4.5))
            proxy.arm(fault, chance.randrange(1, 12) if fault.isdecimal() else byte)
            try:
                store.save(writer.state(step + 1, size), step + 1)
                saved = True
                recovered += 1
            except CheckpointError as error:
                errors.append(error)
                saved = False
            happened += bool(proxy.disarm())
            infos = looking.list()
            assert [info.step for info in infos] in ([*range(1, step + 1)], [*range(1, step + 2)])
            assert not saved or infos[-1].step == step + 1
            step = infos[-1].step
            looking.verify(infos[-1])
            proxy.arm(fault if fault in FAULTS else "truncated", byte)
            try:
                state = store.load()
                assert torch.equal(state["net"]["cfm"]["w"], looking.load()["net"]["cfm"]["w"])
                assert state["step"] == step
            except CheckpointError as error:
                errors.append(error)
                refused += 1
            happened += bool(proxy.disarm())
    for info in looking.list():
        assert looking.load(info)["step"] == info.step
    assert not [error for error in errors if isinstance(error, CorruptCheckpointError)]
    assert refused < cases
    how = f"a connection that fails once: {recovered} saves recovered, {cases - recovered} failed cleanly"
    tally.record("2, 3", straight.partition(":")[0], how, happened)
    assert happened


@pytest.mark.parametrize("size", [1000, 20 << 20])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_write_whose_answer_was_lost_is_recognised(size, overwrite, server, proxied, tally):
    """The server has the object, the client repeats the request and is refused: it was our own, and so it is saved."""
    if server.name == "sshd":
        pytest.skip("told by the temporary name: test_sftp.py")
    proxy, options = proxied
    last = "POST" if (server.name == "weed") == (size > 1000) else "PUT"
    if server.name == "azurite":
        last = "PUT"
    url = server.url_for(f"lost-{uuid.uuid4().hex}", proxy.port)
    storage = impatient(open_storage(url, storage_options=options))
    if overwrite:
        storage.publish("a", 3, [memoryview(b"old")])
    content = bytes(size)
    found = storage.publish(
        "a", size, [memoryview(content)], overwrite=overwrite, before=lambda: proxy.arm(f"lost {last}", 0)
    )
    assert proxy.disarm() == f"lost {last}"
    assert (found.size, read_file(storage, "a")) == (size, content)
    assert isinstance(_refused(storage), FileExistsError)
    tally.record("2, 3", server.url("x").partition(":")[0], "the answer to the last request of a save is lost", 1)


def _refused(storage):
    try:
        storage.publish("a", 5, [memoryview(b"other")])
    except FileExistsError as error:
        return error
