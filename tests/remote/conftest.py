"""Storage servers for the tests of remote stores: each is started once, when the first test asks for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from servers import Azurite, FakeGcs, LocalBucket, Moto, S3rver, Server, Sshd, Weed

_numbers = itertools.count(1)


def _fixture(kind: type[Server]) -> Callable[..., Any]:
    @pytest.fixture(scope="session", name=kind.name)
    def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
        if reason := kind.missing():
            pytest.skip(reason)
        with kind(tmp_path_factory.mktemp(kind.name)) as server:
            yield server

    return started


weed = _fixture(Weed)
moto = _fixture(Moto)
azurite = _fixture(Azurite)
fake_gcs = _fixture(FakeGcs)
sshd = _fixture(Sshd)
s3rver = _fixture(S3rver)
localbucket = _fixture(LocalBucket)


@pytest.fixture(params=[Weed.name, Azurite.name, FakeGcs.name, Sshd.name])
def server(request: pytest.FixtureRequest) -> Server:
    """A server of each kind of backend."""
    found: Server = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def remote(server: Server) -> tuple[str, dict[str, Any]]:
    """A URL that no other test uses, on each kind of backend, and the options to reach it."""
    return server.url(f"run_{next(_numbers)}"), server.options
