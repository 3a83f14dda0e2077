"""Damage is found before tensors are used, and is called by its name."""

from __future__ import annotations

import io
import os
import random
import zlib

import pytest
import states
import torch

from seedvc_ckpt import CheckpointError, CheckpointStore, CorruptCheckpointError
from seedvc_ckpt.file import CheckpointFile

RUN = os.path.join(os.path.dirname(__file__), "..", "data", "run_from_seedvc")


def small_state():
    return {
        "net": {"w": torch.arange(40, dtype=torch.float32), "e": torch.empty(0), "b": torch.ones(3).bfloat16()},
        "iters": 5,
        "tail": ["text", None, 1.5, b"bytes"],
    }


def refused(check, data):
    """Whether a check refuses the bytes; an error that is not the library's own gets through."""
    try:
        check(data)
    except CheckpointError:
        return True
    return False


@pytest.fixture(scope="module")
def ours():
    return states.save(small_state(), metrics={"loss": 0.5})


@pytest.mark.parametrize("check", [states.verify, states.load])
def test_every_changed_byte_of_our_files_is_detected(check, ours):
    """There is no byte in a file of this library, headers and padding included, whose change goes unnoticed."""
    draw = random.Random(1)
    assert not refused(check, ours)
    for at in range(len(ours)):
        changed = bytearray(ours)
        changed[at] ^= draw.randint(1, 255)
        assert refused(check, changed), f"byte {at} of {len(ours)}"


def test_every_flipped_bit_of_our_directory_is_detected(ours):
    """In the directory at the end each single bit counts."""
    for at in range(states.opened(ours).directory_offset, len(ours)):
        for bit in range(8):
            changed = bytearray(ours)
            changed[at] ^= 1 << bit
            assert refused(states.verify, changed), f"bit {bit} of byte {at}"


@pytest.mark.parametrize("check", [states.verify, states.load])
def test_every_truncation_and_added_byte_is_detected(check, ours):
    """A file cut at any length, and one with bytes before or after it, is not taken for a checkpoint."""
    assert all(refused(check, ours[:size]) for size in range(len(ours)))
    assert all(refused(check, ours[size:]) for size in range(1, len(ours), 7))
    assert all(refused(check, ours + more) for more in (b"\0", b"PK", b"\0" * 64, ours[-22:], ours[-60:], ours))
    assert all(refused(check, more + ours) for more in (b"\0", bytes(64), ours))


def test_holes_and_swapped_blocks_are_detected(ours):
    """Zeros where a block was never written, and blocks in each other's place, are found wherever they are."""
    draw = random.Random(2)
    for _ in range(1500):
        size = draw.choice([1, 2, 4, 16, 64, 512])
        one, other = (draw.randrange(len(ours) - size) for _ in range(2))
        holed, swapped = bytearray(ours), bytearray(ours)
        holed[one : one + size] = bytes(size)
        swapped[one : one + size], swapped[other : other + size] = (
            ours[other : other + size],
            ours[one : one + size],
        )
        for changed in (holed, swapped):
            assert changed == ours or refused(states.verify, changed), (size, one, other)
            assert changed == ours or refused(states.load, changed), (size, one, other)


def test_two_files_mixed_are_detected(ours):
    """The first part of one checkpoint with the rest of another, as an interrupted overwrite leaves it, is found."""
    state = small_state()
    state["net"]["w"] += 1
    other = states.save(state, metrics={"loss": 0.4})
    assert len(other) == len(ours)
    for at in range(64, len(ours), 64):
        mixed = ours[:at] + other[at:]
        assert mixed in (ours, other) or refused(states.verify, mixed), at


def stock_files():
    base = torch.arange(64.0)
    yield states.stock_save({"a": base[3:9], "b": base.view(8, 8).t(), "n": {"k": [1, 2.5, "x", b"y"]}, "e": base[:0]})
    yield states.stock_save({"w": torch.ones(3, dtype=torch.float8_e5m2), "i": torch.arange(4)})
    yield states.stock_save([torch.randn(5), True])


@pytest.mark.parametrize("number", range(3))
def test_a_changed_byte_of_a_stock_file_is_detected_or_changes_nothing(number):
    """In files of torch.save every change is refused, or leaves the loaded state bit for bit the same."""
    data = [*stock_files()][number]
    original = states.load(data)
    draw = random.Random(number)
    harmless = 0
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= draw.randint(1, 255)
        try:
            states.verify(changed)
            loaded = states.load(changed)
        except CheckpointError:
            continue
        harmless += 1
        assert states.difference(original, loaded) is None, at
    assert harmless < len(data) / 2


def test_changes_in_seedvcs_own_files_are_detected_or_change_nothing():
    """The same holds for checkpoints that Seed-VC's trainer wrote."""
    with open(os.path.join(RUN, "DiT_epoch_00002_step_00020.pth"), "rb") as file:
        data = file.read()
    archive = states.opened(data)
    original = states.load(data)
    draw = random.Random(3)
    places = [draw.randrange(len(data)) for _ in range(60)]
    # most of the file is tensors: look harder at its directory, headers and pickle
    places += [draw.randrange(archive.directory_offset, len(data)) for _ in range(60)]
    places += [record.header_offset + draw.randrange(64) for record in draw.sample(list(archive.records.values()), 40)]
    for at in places:
        changed = bytearray(data)
        changed[at] ^= draw.randint(1, 255)
        try:
            states.verify(changed)
            loaded = states.load(changed)
        except CheckpointError:
            continue
        assert states.difference(original, loaded) is None, at


def test_the_damaged_tensor_is_named(ours):
    """The error tells which record is damaged and which tensor was in it."""
    archive = states.opened(ours)
    for record, path in {"data/0": "net['w']", "data/2": "net['b']"}.items():
        changed = bytearray(ours)
        changed[archive.data_offset(record)] ^= 1
        for check in (states.verify, states.load):
            with pytest.raises(CorruptCheckpointError) as caught:
                check(changed)
            assert caught.value.record == f"{record} ({path})"
            assert "CRC-32" in caught.value.reason


@pytest.mark.parametrize("mmap", [False, True])
def test_a_damaged_file_on_disk_is_refused_by_every_way_in(mmap, tmp_path):
    """verify, load and mapped load refuse it; without verification the small records still are checked."""
    with CheckpointStore(tmp_path) as store:
        info = store.save(small_state(), 5)
        path = tmp_path / info.name
        data = bytearray(path.read_bytes())
        archive = states.opened(data)
        data[archive.data_offset("data/0") + 9] ^= 4
        path.write_bytes(data)
        with pytest.raises(CorruptCheckpointError, match=r"net\['w'\]"):
            store.verify()
        with pytest.raises(CorruptCheckpointError, match=r"net\['w'\]"):
            store.load(mmap=mmap)
        assert store.load(mmap=mmap, verify=False)["net"]["w"][2] != 2
        data[archive.data_offset("data.pkl") + 9] ^= 4
        path.write_bytes(data)
        with pytest.raises(CorruptCheckpointError, match=r"data\.pkl"):
            store.load(mmap=mmap, verify=False)


def test_records_of_no_tensor_are_checked_too():
    """A record that nothing refers to is verified on load like the others, whatever it is called."""
    pickled = states.Pickle().tensor().done
    for name in ("0", "extra", "data/00"):
        data = bytearray(states.torch_zip(pickled, {name: b"some content"}))
        assert not refused(states.load, data)
        data[data.index(b"some content")] ^= 1
        assert refused(states.load, data), name
        assert refused(states.verify, data), name


def test_a_record_of_the_wrong_length_is_named():
    """A tensor whose record is missing, too short or too long is refused by its path."""
    pickled = ((states.Pickle() + b"}(").text("w").tensor() + b"u").done
    for records, reason in ({"data/0": bytes(15)}, "15 bytes"), ({"data/0": bytes(17)}, "17 bytes"):
        with pytest.raises(CorruptCheckpointError, match=rf"data/0 \(w\).*{reason} instead of 16"):
            states.load(states.torch_zip(pickled, records))
    other = ((states.Pickle() + b"}(").text("w").tensor(key="7") + b"u").done
    with pytest.raises(CorruptCheckpointError, match=r"data/7 \(w\): is missing"):
        states.load(states.torch_zip(other))


def test_a_file_that_ends_while_it_is_read_is_damaged(tmp_path):
    """A file that was truncated after it was opened is refused as cut short."""
    path = tmp_path / "x.pth"
    path.write_bytes(states.save({"x": torch.ones(100_000)}))
    with CheckpointFile.at(path).opened() as archive:
        os.truncate(path, 50_000)
        with pytest.raises(CorruptCheckpointError, match="ends at byte"):
            archive.verify()


def test_a_damaged_manifest_is_named(ours):
    """A manifest with the right checksum and the wrong contents is damage of the manifest."""
    archive = states.opened(ours)
    record = archive.records["seedvc_ckpt.json"]
    start = archive.data_offset("seedvc_ckpt.json")
    content = ours[start : start + record.size].replace(b'"step":5', b'"step":x')
    changed = ours.replace(ours[start : start + record.size], content)
    changed = changed.replace(record.crc.to_bytes(4, "little"), zlib.crc32(content).to_bytes(4, "little"))
    with pytest.raises(CorruptCheckpointError, match="the manifest: not readable"):
        states.verify(changed)


def test_stock_torch_itself_does_not_notice(ours):
    """The reason for all of this: torch.load takes the same damaged file without a word."""
    changed = bytearray(ours)
    changed[states.opened(ours).data_offset("data/0") + 5] ^= 64
    assert torch.load(io.BytesIO(changed), weights_only=True)["net"]["w"][1] != 1
