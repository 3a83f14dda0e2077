"""Example states, files made by hand, and exact comparison, shared by the tests of the file format."""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections import Counter, OrderedDict

import torch
from hypothesis import strategies as st

from seedvc_ckpt import CorruptCheckpointError, Manifest
from seedvc_ckpt.format import contents, torchzip
from seedvc_ckpt.format.archive import Archive

DTYPES = [
    "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "bfloat16",
    "float32", "float64", "complex32", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz",
    "float8_e5m2fnuz", "float8_e8m0fnu",
]  # fmt: skip


class Memory:
    """Bytes as a source."""

    name = "memory.pth"

    def __init__(self, data):
        self.data = bytes(data)
        self.size = len(self.data)

    def read_into(self, offset, buffer):
        """Fill the buffer."""
        found = self.data[offset : offset + len(buffer)]
        if len(found) < len(buffer):
            raise CorruptCheckpointError(self.name, "", "ends too early")
        buffer[:] = found

    def announce(self, stretches):
        """All is at hand."""

    def read_in_parallel(self, stretches, read):
        """One after the other."""
        for number in range(len(stretches)):
            read(self, number)

    def map(self):
        """There is nothing to map."""


def opened(data):
    return Archive.open(Memory(data))


def save(state, **manifest):
    return b"".join(torchzip.encode(state, Manifest(**{"step": 5, "epoch": 1, **manifest})))


def load(data, **options):
    return torchzip.decode(opened(data), **options)


def verify(data):
    archive = opened(data)
    archive.manifest()
    archive.verify(contents.storage_names(contents.read_tree(archive)))


def stock_save(state, **options):
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


def bits(tensor):
    """A tensor's elements as bytes, read by a way of its own."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    raw = tensor.reshape(-1).clone(memory_format=torch.contiguous_format)
    return raw.view(torch.uint8).numpy().tobytes()


def filled(dtype, shape, seed=0):
    """Random bytes as a tensor: every kind of NaN and subnormal that a dtype has."""
    dtype = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (math.prod(shape) * size,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def difference(one, other, at="state", *, identity=None):
    """Where two states differ in a type, a bit, a key's order or in which of their objects are the same; or None."""
    identity = {} if identity is None else identity
    if type(one) is not type(other):
        return f"{at}: {type(one)} and {type(other)}"
    if isinstance(one, (torch.Tensor, dict, list, set)):
        if identity.setdefault(id(one), id(other)) != id(other):
            return f"{at}: the same object is not the same"
        if identity.setdefault(("back", id(other)), id(one)) != id(one):
            return f"{at}: different objects have become one"
    if isinstance(one, torch.Tensor):
        kinds = [(t.dtype, t.shape, t.requires_grad) for t in (one, other)]
        return None if kinds[0] == kinds[1] and bits(one) == bits(other) else f"{at}: {kinds}"
    if isinstance(one, dict):
        keys = [[(type(key), repr(key)) for key in found] for found in (one, other)]
        if keys[0] != keys[1] or getattr(one, "_metadata", 0) != getattr(other, "_metadata", 0):
            return f"{at}: {keys}"
        pairs = [(key, a, b) for (key, a), b in zip(one.items(), other.values(), strict=True)]
    elif isinstance(one, (list, tuple)) and not isinstance(one, torch.Size):
        if len(one) != len(other):
            return f"{at}: {len(one)} and {len(other)} items"
        pairs = [(key, a, b) for key, (a, b) in enumerate(zip(one, other, strict=True))]
    else:
        return None if exact(one) == exact(other) else f"{at}: {one!r} and {other!r}"
    found = (difference(a, b, f"{at}[{key!r}]", identity=identity) for key, a, b in pairs)
    return next(filter(None, found), None)


def exact(value):
    if isinstance(value, float):
        return struct.pack("<d", value)
    if isinstance(value, complex):
        return exact(value.real), exact(value.imag)
    return value


tensors = st.builds(
    filled,
    st.sampled_from(DTYPES),
    st.sampled_from([(), (0,), (1,), (3,), (2, 3), (2, 0, 4), (1, 5, 1)]),
    st.integers(0, 2**16),
)
floats = st.floats() | st.sampled_from([0x7FF0000000000001, 0xFFF8000000000123]).map(
    lambda payload: struct.unpack("<d", struct.pack("<Q", payload))[0]
)
texts = st.text(max_size=8) | st.sampled_from(["\0", "a\nb", "日本", "𝄞", "e\u0301", ""])
atoms = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**2039), 2**2039 - 1),
    floats,
    st.complex_numbers(),
    texts,
    st.binary(min_size=1, max_size=8),
    st.binary(max_size=4).map(bytearray),
    st.sampled_from([torch.float32, torch.float8_e5m2, torch.device("cpu"), torch.device("cuda", 3)]),
    st.lists(st.integers(0, 9), max_size=3).map(torch.Size),
    st.sets(st.integers(0, 9) | texts, max_size=3),
)
keys = texts | st.integers(-(2**40), 2**40) | st.booleans() | st.tuples(texts, st.integers(0, 9))


def _containers(inner):
    mappings = st.dictionaries(keys, inner, min_size=1, max_size=4)
    lists = st.lists(inner, min_size=1, max_size=4)
    counters = st.dictionaries(texts, st.integers(0, 9), max_size=3).map(Counter)
    shared = inner.map(lambda value: [value, {"again": value}, (value,)])
    return st.sampled_from([lists, lists.map(tuple), mappings, mappings.map(OrderedDict), counters, shared]).flatmap(
        lambda chosen: chosen
    )


states = st.lists(st.recursive(tensors | atoms, _containers, max_leaves=10), min_size=1, max_size=4)


class Pickle:
    """Pickles written by hand, protocol 2."""

    def __init__(self, code=b"\x80\x02"):
        self.code = code

    def __add__(self, code):
        return Pickle(self.code + code)

    def text(self, value):
        """Push a string."""
        encoded = value.encode()
        return self + (b"X" + struct.pack("<I", len(encoded)) + encoded)

    def number(self, value):
        """Push a whole number."""
        size = value.bit_length() // 8 + 1
        return self + (b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True))

    def name(self, name):
        """Push what a dotted name stands for."""
        module, _, last = name.rpartition(".")
        return self + f"c{module}\n{last}\n".encode()

    def numbers(self, values):
        """Push a tuple of whole numbers."""
        made = self + b"("
        for value in values:
            made = made.number(value)
        return made + b"t"

    def storage(self, kind="FloatStorage", key="0", count=4):
        """Push a storage."""
        return ((self + b"(").text("storage").name(f"torch.{kind}").text(key).text("cpu").number(count)) + b"tQ"

    def tensor(self, offset=0, shape=(4,), stride=(1,), **storage):
        """Push a tensor over a storage."""
        made = ((self.name("torch._utils._rebuild_tensor_v2") + b"(").storage(**storage)).number(offset)
        made = made.numbers(shape).numbers(stride) + b"\x89"
        return made.name("collections.OrderedDict") + b")RtR"

    @property
    def done(self):
        """The finished pickle."""
        return self.code + b"."


def torch_zip(pickled, records=None, *, compression=zipfile.ZIP_STORED, root="archive"):
    """A torch file around a pickle, written by Python's zipfile."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr(f"{root}/data.pkl", pickled)
        archive.writestr(f"{root}/byteorder", b"little")
        for name, content in {"data/0": bytes(16), "version": b"3\n", **(records or {})}.items():
            archive.writestr(f"{root}/{name}", content)
    return buffer.getvalue()
