"""Every kind of storage does what storages have to do."""

from __future__ import annotations

from itertools import count

import fsspec
import pytest

from seedvc_ckpt.storage import open_storage
from seedvc_ckpt.testing import StorageContract

_numbers = count()


class TestLocal(StorageContract):
    clears = False

    @pytest.fixture
    def open_place(self, tmp_path):
        return lambda: open_storage(tmp_path / "run")


class TestMemory(StorageContract):
    fork = False

    @pytest.fixture
    def open_place(self):
        place = f"memory://contract-{next(_numbers)}/run"
        return lambda: open_storage(place)


class TestRemote(StorageContract):
    @pytest.fixture
    def open_place(self, remote):
        url, options = remote
        return lambda: open_storage(url, storage_options=options)


class TestMoto(StorageContract):
    @pytest.fixture
    def open_place(self, moto):
        url = moto.url(f"contract-{next(_numbers)}")
        return lambda: open_storage(url, storage_options=moto.options)


class TestAnyFsspec(StorageContract):
    """What is known of a filesystem is only what fsspec says of all."""

    fork = False

    @pytest.fixture
    def open_place(self):
        number = next(_numbers)
        fs = fsspec.filesystem("dir", path=f"/contract-any-{number}", fs=fsspec.filesystem("memory"))
        return lambda: open_storage("run", fs=fs)


class TestObstore(StorageContract):
    """A filesystem of obstore's: its fsspec calls know no condition, and its connections no fork."""

    exclusive = False
    fork = False

    @pytest.fixture
    def open_place(self, weed):
        obstore = pytest.importorskip("obstore.fsspec")
        fs = obstore.FsspecStore(
            "s3",
            endpoint=weed.options["endpoint_url"],
            access_key_id=weed.options["key"],
            secret_access_key=weed.options["secret"],
            region="us-east-1",
            client_options={"allow_http": True},
        )
        place = weed.url(f"contract-{next(_numbers)}").removeprefix("s3://")
        return lambda: open_storage(place, fs=fs)
