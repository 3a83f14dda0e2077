"""Files made to hurt: refused with an error of the library's own, quickly, and without running anything."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from contextlib import suppress

import pytest
import states
import torch
from states import Pickle

from seedvc_ckpt import CheckpointError, CheckpointStore, CorruptCheckpointError, Manifest, UnsafeCheckpointError
from seedvc_ckpt.format import compare, contents
from seedvc_ckpt.format.unpickle import list_globals

SECONDS = 5


def refuses(data, match=None, error=CheckpointError):
    """Load, verify, inspect: each refuses the file within the time allowed."""
    for check in (states.load, states.verify, lambda data: contents.read_tree(states.opened(data))):
        begun = time.monotonic()
        with pytest.raises(error, match=match):
            check(data)
        assert time.monotonic() - begun < SECONDS


def state_with(value):
    """A file whose state is {"a": value}, the value given as pickle operations."""
    return states.torch_zip(
        ((Pickle() + b"}").text("a") + (value.code if isinstance(value, Pickle) else value) + b"s").done
    )


class _Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", range(6))
def test_no_file_makes_us_run_its_code(protocol, tmp_path):
    """A call hidden in a pickle of any protocol is refused, and the deed is not done."""
    deed = str(tmp_path / "done")
    for evil in (_Evil(deed), {"net": [_Evil(deed)]}):
        data = states.torch_zip(pickle.dumps(evil, protocol))
        refuses(data, error=UnsafeCheckpointError)
        path = tmp_path / "DiT_epoch_00000_step_00001.pth"
        path.write_bytes(data)
        with CheckpointStore(tmp_path) as store:
            for call in (store.load, store.resume, store.verify, store.inspect, lambda: store.load(verify=False)):
                with pytest.raises(UnsafeCheckpointError):
                    call()
            with pytest.raises(UnsafeCheckpointError):
                store.export(tmp_path / "out.pth")
            store.file().globals()
            assert path.exists()
    assert not os.path.exists(deed)


@pytest.mark.parametrize("name", [
    "os.system", "builtins.eval", "builtins.getattr", "torch.load", "torch.hub.load", "torch._utils._rebuild_qtensor",
    "torch._utils._rebuild_sparse_tensor", "torch.nn.modules.linear.Linear", "numpy.core.multiarray._reconstruct",
    "collections.defaultdict", "torch.float33", "torch.UntypedStorage", "collections.OrderedDict.fromkeys", ".", "..",
    "__builtin__.bytes", "_codecs.decode", "torch._tensor._rebuild_from_type_v2", "torch.\x1b[31mred",
])  # fmt: skip
def test_names_that_are_not_on_the_list_are_refused(name):
    """Only the fixed list of names can be asked for; the error shows the name without control characters."""
    with pytest.raises(UnsafeCheckpointError) as caught:
        states.load(state_with(Pickle(b"").name(name)))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", [
    "collections.OrderedDict", "torch.FloatStorage", "torch._utils._rebuild_tensor_v2", "torch.Size", "_codecs.encode",
])  # fmt: skip
def test_names_left_as_values_are_refused(name):
    """A name that may be called is no value by itself: not in a dict, list, tuple or as the whole state."""
    value = Pickle(b"").name(name).code
    for data in (state_with(value), state_with(value + b"\x85"), state_with(b"]" + value + b"a")):
        refuses(data, error=UnsafeCheckpointError)
    refuses(states.torch_zip(Pickle().name(name).done), error=UnsafeCheckpointError)


@pytest.mark.parametrize("operations", [
    b"\x8b" + struct.pack("<i", 1 << 30),  # LONG4
    b"\x8e" + struct.pack("<Q", 1 << 60),  # BINBYTES8
    b"\x95" + struct.pack("<Q", 1 << 60),  # FRAME
    b"\x8d" + struct.pack("<Q", 1 << 60),  # BINUNICODE8
    b"X\xff\xff\xff\xff",  # text without end
    b"\x8a\xff",  # number without end
    b"U\xff", b"K", b"M\0", b"J\0", b"G\0", b"c", b"cos\n", b"c" + b"x" * 600,
    b"h\x05", b"j\xff\xff\xff\xff",  # memo entries that are not there
    b"t", b"u", b"e", b"s", b"a", b"\x86", b"\x87", b"R", b"b", b"Q", b"0", b"2", b"1", b".",
    b"(", b"((((", b"(tt", b"NNR", b"Nb", b"}Nb", b"]}b", b"NQ", b")Q", b"(NNNNNtQ", b"]NNs", b"]Na" * 3,
    b"X\x02\0\0\0\xff\xfe", b"I1\n", b"L1L\n", b"S'a'\n", b"P1\n", b"i", b"o", b"\x81", b"\x92", b"\x93", b"\x82\1",
    b"\x80\x02\x80\x05", b"\x80\x03", b"\x80", b"\0", b"\xff", b"\x8f", b"\x90", b"\x91", b"\x94", b"\x97", b"\x98",
])  # fmt: skip
def test_operations_out_of_place_are_refused(operations):
    """What is malformed, unknown or from another protocol ends in an error of ours, before and inside a state."""
    refuses(states.torch_zip(b"\x80\x02" + operations), error=UnsafeCheckpointError)
    refuses(states.torch_zip(b"\x80\x02}" + operations + b"."), error=UnsafeCheckpointError)


def test_a_huge_memo_index_costs_nothing():
    """The memo is a dict: an index of four billion takes one entry."""
    data = state_with(b"Nr\xff\xff\xff\xff")
    assert states.load(data) == {"a": None}


BAD_TENSORS = {
    "beyond": {"shape": (5,)},
    "beyond by its offset": {"offset": 1},
    "beyond by its strides": {"shape": (2, 2), "stride": (3, 1)},
    "negative offset": {"offset": -1},
    "negative stride": {"stride": (-1,)},
    "negative shape": {"shape": (-4,)},
    "fewer strides": {"shape": (2, 2), "stride": (1,)},
    "huge and expanded": {"shape": (1 << 61,), "stride": (0,)},
    "overflowing": {"shape": (1 << 40, 1 << 40), "stride": (0, 0)},
    "huge and overlapping": {"shape": (2, 2, 1 << 40), "stride": (1, 1, 0)},
    "huge beside zero": {"shape": (0, 1 << 40, 1 << 40), "stride": (1, 1, 1)},
    "huge offset": {"offset": 1 << 62, "shape": (0,)},
    "huge stride": {"shape": (1,), "stride": (1 << 2000,)},
    "many dimensions": {"shape": (1,) * 70, "stride": (1,) * 70},
    "huge storage": {"count": 1 << 61},
    "larger storage": {"count": 5},
    "smaller storage": {"count": 3, "shape": (3,)},
    "negative storage": {"count": -4},
    "other kind of storage": {"kind": "DoubleStorage"},
    "missing storage": {"key": "1"},
    "path as a key": {"key": "../0"},
    "empty key": {"key": ""},
}


@pytest.mark.parametrize("bad", BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_impossible_tensors_are_refused(bad):
    """A tensor that does not lie inside its record, or that no memory can hold, is refused."""
    refuses(state_with(Pickle(b"").tensor(**bad)))


def test_the_tensor_that_the_bad_ones_differ_from_is_fine():
    """The tensors made by hand are refused for what is wrong with them, not for how they are made."""
    assert torch.equal(states.load(state_with(Pickle(b"").tensor()))["a"], torch.zeros(4))
    assert states.load(state_with(Pickle(b"").tensor(shape=(0, 9), offset=4, stride=(1, 1))))["a"].shape == (0, 9)


def call(name, *arguments):
    """The operations that call a name."""
    return Pickle(b"").name(name).code + b"(" + b"".join(arguments) + b"tR"


TENSOR = Pickle(b"").tensor().code
STORAGE = Pickle(b"").storage().code
NO_HOOKS = call("collections.OrderedDict")
ODD = {
    "storage as a value": STORAGE,
    "storage described twice": b"(" + STORAGE + Pickle(b"").storage(count=2).code + b"t",
    "integers with a gradient": call(
        "torch._utils._rebuild_tensor_v2", Pickle(b"").storage("IntStorage").code, b"K\0K\4\x85K\1\x85\x88", NO_HOOKS
    ),
    "integer parameter with a gradient": call(
        "torch._utils._rebuild_parameter", Pickle(b"").tensor(kind="IntStorage").code, b"\x88", NO_HOOKS
    ),
    "parameter of a number": call("torch._utils._rebuild_parameter", b"K\1\x88", NO_HOOKS),
    "parameter of a parameter": call(
        "torch._utils._rebuild_parameter", call("torch._utils._rebuild_parameter", b"N\x88", NO_HOOKS), b"\x88",
        NO_HOOKS,
    ),
    "hooks": call("torch._utils._rebuild_tensor_v2", STORAGE, b"K\0K\4\x85K\1\x85\x89", b"}K\1K\1s"),
    "too few arguments": call("torch._utils._rebuild_tensor_v2", STORAGE),
    "no storage": call("torch._utils._rebuild_tensor_v2", b"NK\0K\4\x85K\1\x85\x89", NO_HOOKS),
    "shape as a list": call("torch._utils._rebuild_tensor_v2", STORAGE, b"K\0]K\4aK\1\x85\x89", NO_HOOKS),
    "shape as a float": call(
        "torch._utils._rebuild_tensor_v2", STORAGE, b"K\0G" + bytes(8) + b"\x85K\1\x85\x89", NO_HOOKS
    ),
    "shape of booleans": call("torch._utils._rebuild_tensor_v2", STORAGE, b"K\0\x88\x85K\1\x85\x89", NO_HOOKS),
    "type as text": call(
        "torch._utils._rebuild_tensor_v3", Pickle(b"").storage("ByteStorage", count=16).code, b"K\0K\4\x85K\1\x85\x89",
        NO_HOOKS, Pickle(b"").text("torch.float32").code,
    ),
    "storage called": call("torch.FloatStorage", b"K\4"),
    "dtype called": Pickle(b"").name("torch.float32").code + b")R",
    "device": call("torch.device", Pickle(b"").text("nonsense!").code),
    "device that torch does not know": call("torch.device", Pickle(b"").text("nonsense").code),
    "device index": call("torch.device", Pickle(b"").text("cuda").code, b"M\xff\xff"),
    "size of a list": call("torch.Size", b"]"),
    "size of text": call("torch.Size", Pickle(b"").text("a").code + b"\x85"),
    "size with a negative length": call("torch.Size", Pickle(b"").number(-1).code + b"\x85"),
    "encoding": call("_codecs.encode", Pickle(b"").text("a").code, Pickle(b"").text("rot13").code),
    "bytearray of a number": call("__builtin__.bytearray", Pickle(b"").number(1 << 40).code),
    "set of lists": call("__builtin__.set", b"]]a"),
    "set of a string": call("__builtin__.set", Pickle(b"").text("abc").code),
    "complex of text": call("__builtin__.complex", Pickle(b"").text("1").code, b"G" + bytes(8)),
    "dict of what is no pair": call("collections.OrderedDict", b"]K\1a"),
    "list as a key": b"}]K\1s",
    "tensor as a key": b"}" + TENSOR + b"K\1s",
    "attributes of a dict": b"}}" + Pickle(b"").text("_metadata").code + b"K\1sb",
    "other attributes": NO_HOOKS + b"}" + Pickle(b"").text("__class__").code + b"K\1sb",
    "attributes of a tensor": TENSOR + b"}" + Pickle(b"").text("_metadata").code + b"K\1sb",
    "items of a counter": call("collections.Counter", b"}") + b"K\1K\1s",
    "items of a tensor": TENSOR + b"K\1K\1s",
    "append to a tensor": TENSOR + b"K\1a",
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_arguments_of_the_wrong_kind_are_refused(odd):
    """Allowed names called with what they don't take are refused, where torch would raise or do worse."""
    if b"nonsense" in odd:  # which devices there are only torch knows
        with pytest.raises(UnsafeCheckpointError):
            states.load(state_with(odd))
    else:
        refuses(state_with(odd), error=UnsafeCheckpointError)


def laughs(twice):
    """A value that holds itself twice on each of 60 levels."""
    return b"N" + (b"q\0" + twice) * 60


TUPLES = laughs(b"h\0\x86")
BOMBS = {
    "lists": laughs(b"]h\0a\x86"),
    "tuples": TUPLES,
    "tuple as a key": b"}" + TUPLES + b"K\1s",
    "tuple as an item of a set": call("__builtin__.set", b"]" + TUPLES + b"a"),
    "tuple as a shape": call("torch._utils._rebuild_tensor_v2", STORAGE, b"K\0", TUPLES, b"K\1\x85\x89", NO_HOOKS),
    "tuple as an offset": call("torch._utils._rebuild_tensor_v2", STORAGE, TUPLES, b"))\x89", NO_HOOKS),
    "tuple as a type": call(
        "torch._utils._rebuild_tensor_v3", Pickle(b"").storage("ByteStorage", count=16).code, b"K\0K\4\x85K\1\x85\x89",
        NO_HOOKS, TUPLES,
    ),
    "tuple called": TUPLES + b")R",
    "tuple as a storage": b"(" + TUPLES + b"NNNNtQ",
    "tuple as a storage's kind": b"(" + Pickle(b"").text("storage").code + TUPLES + b"NNNtQ",
    "tuple as a size": call("torch.Size", TUPLES),
    "tuple as a device": call("torch.device", TUPLES),
    "deep lists": b"]" * 10_000 + b"a" * 9_999,
    "deep tuples": b")" + b"\x85" * 10_000,
    "deep dicts": b"}" + b"K\1}" * 10_000 + b"s" * 10_000,
    "deep tuple as a key": b"})" + b"\x85" * 10_000 + b"K\1s",
    "deep size": call("torch.Size", b")" + b"\x85" * 10_000),
    "many operations": b"(" + b"N" * 3_000_000 + b"t",
    "cycle": b"]q\0h\0a",
    "long tuple as many keys": b"}(" + b"N" * 50_000 + b"tq\0" + b"K\1s" + b"h\0K\1s" * 50_000,
    "bytes copied": Pickle(b"").text("x" * 1_000_000).code + b"q\0" + Pickle(b"").name("_codecs.encode").code + b"q\1"
        + Pickle(b"").text("latin1").code + b"q\2" + b"\x87" + b"(" + b"h\1h\0h\2\x86R" * 100_000 + b"t\x86",
    "sets copied": b"](" + b"".join(Pickle(b"").number(n).code for n in range(20_000)) + b"eq\0"
        + Pickle(b"").name("__builtin__.set").code + b"q\1" + b"(" + b"h\1h\0\x85R" * 50_000 + b"t\x87",
    "colliding keys": b"}("
        + b"".join(Pickle(b"").number(n * ((1 << 61) - 1)).code + b"N" for n in range(60_000)) + b"u",
    "many tuples as keys": b"}(" + b"".join(Pickle(b"").number(n).code + b"\x85N" for n in range(60_000)) + b"u",
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_what_unfolds_without_end_is_refused_in_bounded_time(bomb):
    """Small pickles that stand for exponentially much, or nest 10,000 deep, are refused in seconds."""
    refuses(state_with(bomb), error=UnsafeCheckpointError)


def test_the_costliest_states_that_are_let_through_are_walked_in_bounded_time():
    """What sharing may unfold to, and a million values 190 levels down, are verified and compared in seconds."""
    shared = b"N" + b"q\0" + b"".join(b"h\0\x86q\0" for _ in range(16))
    deep = b"]" * 190 + TENSOR + b"q\0a(" + b"h\0" * 150_000 + b"e" + b"a" * 189
    for value in (shared, deep):
        data = state_with(value)
        begun = time.monotonic()
        states.verify(data)
        assert time.monotonic() - begun < SECONDS
    begun = time.monotonic()
    assert [*compare.compare(states.opened(data), states.opened(data))] == []
    assert time.monotonic() - begun < 2 * SECONDS


@pytest.mark.parametrize("zip_serialization", [False, "tar", 4])
def test_formats_from_before_torch_1_6_are_refused_with_the_remedy(zip_serialization):
    """The older formats of torch can't be read without running their pickle, and are refused as such."""
    if zip_serialization == "tar":
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name in ("sys_info", "pickle", "storages", "tensors"):
                archive.addfile(tarfile.TarInfo(name))
        data = buffer.getvalue()
    else:
        protocol = {"pickle_protocol": 4} if zip_serialization else {}
        data = states.stock_save({"x": torch.ones(3)}, _use_new_zipfile_serialization=False, **protocol)
    refuses(data, "before 1.6.*save it again", UnsafeCheckpointError)


def test_compressed_records_and_bombs_are_refused():
    """A checkpoint is never compressed: a deflated record is refused before a byte of it is inflated."""
    pickled = Pickle().tensor().done
    data = states.torch_zip(pickled, {"data/1": bytes(50_000_000)}, compression=zipfile.ZIP_DEFLATED)
    assert len(data) < 100_000
    refuses(data, "compressed", CorruptCheckpointError)


def rezip(names):
    """A zip of records under any names, duplicates and all."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in names:
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


GOOD = [("archive/data.pkl", Pickle().tensor().done), ("archive/data/0", bytes(16))]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("extra", [
    "archive/data.pkl", "archive/data/0", "other/data/1", "data.pkl", "archive/../x", "../archive/x", "/archive/x",
    "archive//x", "archive/", "archive/./x", "archive/a\\..\\b", "C:/x/y", "ARCHIVE/data/0",
])  # fmt: skip
def test_names_that_play_tricks_are_refused(extra):
    """Duplicates, second folders and names that lead elsewhere make a file no checkpoint."""
    assert not isinstance(states.load(rezip(GOOD)), Exception)
    refuses(rezip([*GOOD, (extra, b"x")]), error=CorruptCheckpointError)


def patched(data, at, layout, value):
    changed = bytearray(data)
    struct.pack_into(layout, changed, at, value)
    return bytes(changed)


def test_sizes_and_places_that_lie_are_refused():
    """Sizes, offsets and counts in the directory and at the end that don't fit the file are refused."""
    data = rezip(GOOD)
    central = data.index(b"PK\x01\x02")
    end = len(data) - 22
    places = {central + 20: "<I", central + 24: "<I", central + 42: "<I", end + 8: "<H", end + 10: "<H",
              end + 12: "<I", end + 16: "<I", end + 20: "<H", central + 28: "<H", central + 30: "<H"}  # fmt: skip
    for at, layout in places.items():
        (value,) = struct.unpack_from(layout, data, at)
        top = (1 << 8 * struct.calcsize(layout)) - 1
        for lie in {value + 1, value + 50, top, top - 1, 1 << 15} - {value}:
            refuses(patched(data, at, layout, lie), error=CorruptCheckpointError)


def test_overlapping_records_are_refused():
    """Two records that lie over each other, which no writer makes, are refused."""
    data = rezip(GOOD)
    second = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 4)
    refuses(patched(data, second + 42, "<I", 0), error=CorruptCheckpointError)
    refuses(patched(data, second + 42, "<I", 8), error=CorruptCheckpointError)


def test_a_record_inside_another_is_refused_at_once():
    """A record hidden in another's contents, its header and checksum right, is refused by the directory alone."""
    inner = rezip([("archive/data/1", b"secret")])
    inner = inner[: inner.index(b"PK\x01\x02")]
    data = rezip([*GOOD, ("archive/data/2", inner), ("archive/data/1", b"secret")])
    last = data.rindex(b"PK\x01\x02")
    changed = patched(data, last + 42, "<I", data.index(inner))
    assert states.opened(data)
    with pytest.raises(CorruptCheckpointError, match="overlapping"):
        states.opened(changed)


def test_zip64_numbers_that_lie_are_refused():
    """64-bit sizes and places beyond the file are refused like the short ones."""
    data = states.stock_save({"x": torch.ones(3)})
    end = data.index(b"PK\x06\x06")
    for at in (24, 32, 40, 48):
        for lie in (0, 1, 1 << 40, (1 << 64) - 1):
            refuses(patched(data, end + at, "<Q", lie), error=CorruptCheckpointError)


@pytest.mark.parametrize("manifest", [
    b"", b"null", b"[]", b"5", b"{", b"\xff\xfe", b'{"step": "5"}', b'{"step": -1}', b'{"step": 1.5}',
    b'{"step": true}',
    b'{"metrics": []}', b'{"metrics": {"a": {}}}', b'{"requires": "x"}', b'{"created": "yesterday"}', b'{"created": 1}',
    b'{"step": ' + b"9" * 5000 + b"}", b"[" * 100_000, b'{"a":' * 100_000, b'{"schema_version": 99}',
    b'{"requires": ["x"]}', b'{"run": ["a"]}', b" " * (2 << 20), b'{"metrics": {"' + b"k" * 500_000 + b'": []}}',
])  # fmt: skip
def test_manifests_of_the_wrong_kind_are_refused(manifest):
    """A manifest that is no manifest, too large or too deep ends in a short error of ours."""
    data = states.torch_zip(Pickle().tensor().done, {"seedvc_ckpt.json": manifest})
    with pytest.raises(CheckpointError) as caught:
        states.opened(data).manifest()
    assert len(str(caught.value)) < 1000


def test_a_manifest_may_be_odd_where_it_does_no_harm():
    """Fields of later versions are skipped, and infinities are numbers."""
    found = Manifest.from_json(b'{"step": 5, "colour": "red", "metrics": {"a": "-Infinity", "b": 2}}', "f")
    assert (found.step, found.metrics) == (5, {"a": float("-inf"), "b": 2.0})


@pytest.mark.parametrize("data", [b"", b"P", b"PK\x05\x06" + bytes(18), b"\0" * 100, b"hello" * 100, bytes(70_000)])
def test_what_is_no_archive_is_refused(data):
    """Empty files, text and zeros are not checkpoints."""
    refuses(data, error=CorruptCheckpointError)


def test_a_file_that_claims_gigabytes_takes_little_memory(tmp_path):
    """Sparse files with a directory or a pickle of gigabytes are refused in bounded memory."""
    size = 3 << 30
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 3, 3, size, 0, 0)
    for number, tail in enumerate([end, struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, 62, size - 62, 0)]):
        path = tmp_path / f"{number}.pth"
        with open(path, "wb") as file:
            if number:
                name = b"archive/data.pkl"
                entry = (b"PK\x01\x02", 20, 20, 0, 0, 0, 0, 0, size - 200, size - 200, len(name), 0, 0, 0, 0, 0, 0)
                file.write(
                    struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, 0, 0, 0, 0, 0, size - 200, size - 200, len(name), 0)
                    + name
                )
                file.seek(size - 62)
                file.write(struct.pack("<4s6H3I5H2I", *entry) + name)
            file.seek(size)
            file.write(tail)
        code = (
            "import resource, sys\n"
            "from seedvc_ckpt import CheckpointError\n"
            "from seedvc_ckpt.file import CheckpointFile\n"
            "resource.setrlimit(resource.RLIMIT_AS, (600 << 20,) * 2)\n"
            "try: CheckpointFile.at(sys.argv[1]).inspect()\n"
            "except CheckpointError as error: print(type(error).__name__)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.stdout == "CorruptCheckpointError\n", done.stderr


def outcome(data):
    """What comes of a file: an error of the library's own, or a state; anything else gets through."""
    try:
        states.verify(data)
        return states.load(data)
    except CheckpointError:
        return None


def mutated(data, draw):
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 4, 9])):
        at = draw.randrange(len(changed))
        kind = draw.randrange(4)
        if kind == 0:
            changed[at] = draw.randrange(256)
        elif kind == 1:
            del changed[at : at + draw.randint(1, 9)]
        elif kind == 2:
            other = draw.randrange(len(changed) or 1)
            changed[at:at] = changed[other : other + draw.randint(1, 30)]
        else:
            changed[at] ^= 1 << draw.randrange(8)
        if not changed:
            changed = bytearray(data)
    return bytes(changed)


def fuzz(seed, make, seconds=2.5):
    draw = random.Random(seed)
    until = time.monotonic() + seconds
    count = 0
    while time.monotonic() < until:
        begun = time.monotonic()
        outcome(make(draw))
        count += 1
        assert time.monotonic() - begun < SECONDS
    assert count > 100


def test_mutated_pickles_raise_nothing_but_our_errors():
    """Random changes of a real pickle, with right checksums, end in a state or in an error of ours."""
    base = torch.arange(12.0)
    net = torch.nn.BatchNorm1d(2).state_dict()
    data = states.save({"a": base[:4], "p": torch.nn.Parameter(base), "net": net, "l": [1, (2, 1j), {"x"}, b"b", None],
                        "f": torch.zeros(2).to(torch.float8_e5m2), "d": torch.float32})  # fmt: skip
    archive = states.opened(data)
    records = {name: archive.content(name, 1 << 20) for name in archive.records if name.startswith("data/")}
    pickled = archive.pickle()
    fuzz(1, lambda draw: states.torch_zip(mutated(pickled, draw), records))


@pytest.mark.parametrize("stock", [False, True])
def test_mutated_directories_raise_nothing_but_our_errors(stock):
    """Random changes at the end of a file, ours and torch's, end in a state or in an error of ours."""
    state = {"a": torch.arange(4.0), "n": 1}
    data = states.stock_save(state) if stock else states.save(state)
    start = states.opened(data).directory_offset
    fuzz(2, lambda draw: data[:start] + mutated(data[start:], draw), 2)


def test_mutated_manifests_raise_nothing_but_our_errors():
    """Random changes of a manifest, with right checksums, end in a state or in an error of ours."""
    data = states.save({"n": 1}, metrics={"a": 1.0, "b": float("nan")}, run="r")
    content = states.opened(data).content("seedvc_ckpt.json", 1 << 20)
    assert json.loads(content)["step"] == 5

    def check(draw):
        with suppress(CheckpointError):
            Manifest.from_json(mutated(content, draw), "f")
        return data

    fuzz(3, check, 1)


def test_listing_the_globals_of_a_hostile_pickle_is_bounded():
    """The names of a pickle with millions of operations are listed in seconds."""
    begun = time.monotonic()
    assert list_globals(b"\x80\x02" + b"N" * 40_000_000) == []
    assert time.monotonic() - begun < 3 * SECONDS
