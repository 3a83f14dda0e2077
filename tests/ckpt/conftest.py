"""What the tests of the checkpoint library share."""

import struct
import subprocess
import sys
import zipfile
from itertools import count
from pathlib import Path

import pytest
import torch

from seedvc_ckpt import CheckpointStore

DATA = Path(__file__).parents[1] / "data"
_numbers = count()


@pytest.fixture
def data():
    """The folder of the golden files."""
    return DATA


@pytest.fixture
def run(tmp_path):
    """The path of a run that does not exist yet."""
    return tmp_path / "run"


@pytest.fixture(params=["local", "memory"])
def location(request, tmp_path):
    """A fresh place for a store, on disk and in memory."""
    if request.param == "memory":
        return f"memory://{tmp_path.name}-{next(_numbers)}/run"
    return str(tmp_path / "run")


@pytest.fixture
def state():
    """A function that makes a small state, different for each number."""

    def make(number=0):
        return {"net": {"cfm": {"weight": torch.arange(600, dtype=torch.float32) + number}}, "iters": number}

    return make


@pytest.fixture
def filled(state):
    """A function that makes a store with a checkpoint at each of the steps."""

    def make(location, *steps, **options):
        store = CheckpointStore(location, **options)
        for step in steps:
            store.save(state(step), step, metrics={"loss": 1.0})
        return store

    return make


@pytest.fixture
def damage():
    """A function that flips one bit in the largest record of a checkpoint file."""

    def flip(path):
        path = Path(path)
        with zipfile.ZipFile(path) as archive:
            record = max(archive.infolist(), key=lambda record: record.file_size)
        content = bytearray(path.read_bytes())
        name, extra = struct.unpack_from("<HH", content, record.header_offset + 26)
        content[record.header_offset + 30 + name + extra + record.file_size // 2] ^= 1
        path.write_bytes(content)

    return flip


@pytest.fixture
def snapshot():
    """A function that tells everything about a folder: paths, kinds, modes, times and bytes."""

    def take(folder):
        found = {}
        for path in sorted(Path(folder).rglob("*")):
            status = path.lstat()
            content = path.read_bytes() if path.is_file() else None
            found[str(path.relative_to(folder))] = (status.st_mode, status.st_mtime_ns, content)
        return found

    return take


@pytest.fixture
def seedvc_ckpt():
    """A function that runs the installed command in a process of its own."""

    def call(*arguments, **options):
        command = [str(Path(sys.executable).with_name("seedvc-ckpt")), *map(str, arguments)]
        options = {"capture_output": True, "text": True, "timeout": 60, "check": False, **options}
        return subprocess.run(command, **options)  # noqa: PLW1510

    return call
