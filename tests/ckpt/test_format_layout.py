"""How a file is laid out: what other programs see of it."""

from __future__ import annotations

import io
import json
import mmap
import os
import subprocess
import sys
import zipfile
import zlib
from datetime import datetime, timezone

import pytest
import states
import torch

from seedvc_ckpt import CheckpointStore, CorruptCheckpointError, Manifest, UnsafeCheckpointError
from seedvc_ckpt.file import CheckpointFile
from seedvc_ckpt.format import torchzip
from seedvc_ckpt.format import zipbytes as zb
from seedvc_ckpt.format.archive import Archive
from seedvc_ckpt.format.records import RecordSource

GIB = 1 << 30


def test_tensors_stand_at_multiples_of_64_bytes():
    """Every record of a tensor begins aligned, so that mapped files need no copy."""
    data = states.save({"t": [torch.ones(n, dtype=torch.uint8) for n in range(1, 90)]})
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [entry for entry in archive.infolist() if "/data/" in entry.filename]
    assert len(entries) == 89
    for number, entry in enumerate(entries, 1):
        sizes = data[entry.header_offset + 26 : entry.header_offset + 30]
        start = entry.header_offset + 30 + sum(int.from_bytes(sizes[at : at + 2], "little") for at in (0, 2))
        assert start % 64 == 0
        assert data[start : start + entry.file_size] == b"\1" * number


def test_pythons_zipfile_reads_every_record():
    """The archive is plain zip: stored, in one folder, checksums right."""
    data = states.save({"x": torch.arange(5), "n": 1})
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        assert sorted(archive.namelist()) == [
            f"archive/{name}" for name in ("byteorder", "data.pkl", "data/0", "seedvc_ckpt.json", "version")
        ]


def test_the_manifest_says_what_the_save_was(tmp_path):
    """Step, epoch, time, versions, metrics, origin and totals stand in one JSON record of the file."""
    before = datetime.now(timezone.utc)
    metrics = {"loss": 0.81, "nan": float("nan"), "inf": float("inf"), "down": float("-inf"), "größe\n": 1}
    with CheckpointStore(tmp_path / "run") as store:
        store.save({"x": torch.ones(3)}, 5, 1)
        assert store.resume().info.step == 5
        info = store.save({"x": torch.ones(3), "y": [torch.ones(2, 2)], "n": 1}, 10, 2, metrics=metrics)
        found = store.inspect().manifest
        with zipfile.ZipFile(tmp_path / "run" / info.name) as archive:
            record = json.loads(archive.read("archive/seedvc_ckpt.json"))
    assert (found.schema_version, found.step, found.epoch, found.run) == (1, 10, 2, "run")
    assert (found.tensors, found.tensor_bytes, found.torch) == (2, 28, torch.__version__)
    assert found.resumed_from == "DiT_epoch_00001_step_00005.pth"
    assert before <= found.created <= datetime.now(timezone.utc)
    assert repr(found.metrics) == repr({key: float(value) for key, value in metrics.items()})
    assert (record["step"], record["epoch"], record["library"]) == (10, 2, found.library)


def test_a_manifest_reads_back_as_it_was_written():
    """The JSON record is an exact inverse, infinities included."""
    manifest = Manifest(step=3, metrics={"a": float("inf"), "b": 1e-300}, created=datetime.now(timezone.utc), torch="2")
    assert Manifest.from_json(manifest.to_json(), "f") == manifest


@pytest.mark.parametrize("newer", [{"schema_version": 2}, {"requires": ["shards"]}])
def test_a_newer_manifest_is_refused_with_the_remedy(newer):
    """What this version does not know it does not guess at."""
    text = json.dumps({"schema_version": 1, "library": "9.9", **newer}).encode()
    with pytest.raises(UnsafeCheckpointError, match=r"newer seedvc-ckpt \(9.9\).*upgrade"):
        Manifest.from_json(text, "f")


def test_the_announced_size_is_the_size():
    """The size that is known before writing is that of the bytes written, and of the chunks together."""
    for state in ({"x": torch.ones(1000)}, {}, {"t": [torch.ones(n) for n in range(50)]}):
        encoded = torchzip.encode(state, Manifest(step=1))
        assert encoded.size == len(b"".join(encoded))


def test_equal_states_give_equal_files():
    """The bytes depend on the state and the manifest only."""
    state = {"x": torch.arange(9.0), "s": "a", "l": [1, 2]}
    copy = {"x": torch.arange(9.0), "s": "a", "l": [1, 2]}
    assert states.save(state) == states.save(copy)


def test_verifying_and_inspecting_need_no_torch(tmp_path):
    """Listing, inspecting and verifying run without importing torch."""
    with CheckpointStore(tmp_path) as store:
        store.save({"x": torch.ones(3)}, 5)
    code = (
        "import sys; from seedvc_ckpt import CheckpointStore; store = CheckpointStore(sys.argv[1], read_only=True);"
        "store.list(); store.verify(); store.inspect(); store.file().globals(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)


def test_inspecting_reads_no_tensor_data():
    """What a checkpoint holds is told from its directory and pickle; gigabytes are left alone."""

    class Counting(states.Memory):
        read = 0

        def read_into(self, offset, buffer):
            self.read += len(buffer)
            super().read_into(offset, buffer)

    source = Counting(states.save({"x": torch.zeros(1_000_000)}))
    tree = torchzip.contents.read_tree(Archive.open(source))
    assert tree["x"].shape == (1_000_000,)
    assert source.read < 200_000


def write_sparse(path, chunks):
    """Write a file with a hole in place of its largest chunk, which is zeros."""
    with open(path, "wb") as file:
        for chunk in chunks:
            if len(chunk) > GIB:
                file.seek(len(chunk), os.SEEK_CUR)
            else:
                file.write(chunk)


def test_records_beyond_4_gib_are_written_and_read(tmp_path):
    """A record of more than 4 GiB, and records and a directory behind it, are read by us, zipfile and stock torch."""
    size = 4 * GIB + 3
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE)  # never written to: takes no memory
    memory.madvise(mmap.MADV_HUGEPAGE)
    zeros = memoryview(memory)
    small = torch.arange(3.0)
    storage = torchzip.Storage("0", "int8", size)
    other = torchzip.Storage("1", "float32", 3)
    tree = {
        "huge": torchzip.TensorRef(storage, "int8", 0, (size,), (1,)),
        "small": torchzip.TensorRef(other, "float32", 0, (3,), (1,)),
    }
    sources = [
        RecordSource("data/0", size, lambda: zeros),
        RecordSource("data/1", 12, lambda: memoryview(small.numpy()).cast("B")),
    ]
    encoded = torchzip.encode_tree(tree, sources, Manifest(step=1))
    path = tmp_path / "huge.pth"
    write_sparse(path, encoded)
    assert path.stat().st_size == encoded.size
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("archive/data/0").file_size == size
        assert archive.getinfo("archive/data/1").header_offset > 4 * GIB
        assert archive.read("archive/data/1") == small.numpy().tobytes()
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert loaded["huge"].numel() == size
    assert torch.equal(loaded["small"], small)
    with CheckpointFile.at(path).opened() as archive:
        archive.check_layout()
        archive.verify_record("data/1")
        assert archive.records["data/0"].size == size
        assert archive.directory_offset > 4 * GIB
    mapped = CheckpointFile.at(path).load(mmap=True, verify=False)
    assert torch.equal(mapped["small"], small)
    with open(path, "r+b") as damaged:
        damaged.seek(encoded.size - 22 - 20 - 56 + 50)
        damaged.write(b"\x01")
    with pytest.raises(CorruptCheckpointError):
        CheckpointFile.at(path).load(mmap=True)


@pytest.mark.parametrize("size", [0xFFFFFFFE, 0xFFFFFFFF, 0x100000000])
@pytest.mark.parametrize("offset", [0, 0xFFFFFFFE, 0xFFFFFFFF, 0x100000000])
def test_large_numbers_survive_the_directory(size, offset):
    """Sizes and offsets on both sides of 32 bits are the same when Python's zipfile reads them."""
    record = zb.Record("archive/data/0", size, 7, offset)
    directory_at = offset + zb.local_header_size(record.name, size, offset) + size

    class Sparse(io.RawIOBase):
        tail = zb.directory_bytes([record], directory_at)
        at = 0

        def seekable(self):
            return True

        def readable(self):
            return True

        def tell(self):
            return self.at

        def seek(self, to, whence=0):
            self.at = to + (0, self.at, directory_at + len(self.tail))[whence]
            return self.at

        def read(self, count=-1):
            assert self.at >= directory_at
            start = self.at - directory_at
            found = self.tail[start:] if count is None or count < 0 else self.tail[start : start + count]
            self.at += len(found)
            return found

    with zipfile.ZipFile(Sparse()) as archive:
        (entry,) = archive.infolist()
    assert (entry.file_size, entry.compress_size, entry.header_offset, entry.CRC) == (size, size, offset, 7)
    header = zb.local_header(record)
    assert (offset + len(header)) % 64 == 0
    assert len(header) == zb.local_header_size(record.name, size, offset)


@pytest.mark.parametrize("count", [65_530, 65_531, 65_532])
def test_more_records_than_16_bits_count(count, tmp_path):
    """Archives around 65,535 records are read by zipfile and by stock torch."""
    records = [
        RecordSource(f"data/{number}", 1, lambda number=number: memoryview(bytes([number % 251])))
        for number in range(count)
    ]
    refs = [
        torchzip.TensorRef(torchzip.Storage(str(number), "uint8", 1), "uint8", 0, (1,), (1,)) for number in range(5)
    ]
    tree = {"first": refs, "last": torchzip.TensorRef(torchzip.Storage(str(count - 1), "uint8", 1), "uint8", 0, (), ())}
    path = tmp_path / "many.pth"
    path.write_bytes(b"".join(torchzip.encode_tree(tree, records, Manifest(step=1))))
    with zipfile.ZipFile(path) as archive:
        assert len(archive.namelist()) == count + 4
        assert archive.read(f"archive/data/{count - 1}") == bytes([(count - 1) % 251])
    with CheckpointFile.at(path).opened() as archive:
        archive.check_layout()
        assert len(archive.records) == count + 4
        archive.verify_record(f"data/{count - 1}")
    loaded = torch.load(path, weights_only=True)
    assert [value.item() for value in loaded["first"]] == [0, 1, 2, 3, 4]
    assert loaded["last"].item() == (count - 1) % 251


def test_checksums_are_zlibs():
    """The CRC-32 in the directory is that of the contents, as any zip program computes it."""
    data = states.save({"x": torch.arange(100)})
    archive = states.opened(data)
    start = archive.data_offset("data/0")
    assert archive.records["data/0"].crc == zlib.crc32(data[start : start + 800])
