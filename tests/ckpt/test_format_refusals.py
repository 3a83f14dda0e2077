"""What could not be loaded again is refused when it is saved, with the path to it."""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import io
import pathlib
import threading
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import states
import torch

from seedvc_ckpt import CheckpointError, CheckpointStore, UnsafeCheckpointError
from seedvc_ckpt.format import archive as archives
from seedvc_ckpt.format.unpickle import list_globals

Point = collections.namedtuple("Point", "x y")


class _Colour(enum.IntEnum):
    RED = 1


class _Name(str):
    __slots__ = ()


class _Unwilling:
    def __reduce__(self):
        raise RuntimeError("no")


REFUSED = [
    np.float64(1), np.int64(2), np.zeros(2), np.random.default_rng(0), argparse.Namespace(a=1), pathlib.Path("x"),
    datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc), datetime.timedelta(1),
    defaultdict(int), Point(1, 2), _Colour.RED, _Name("n"),
    frozenset([1]), range(3), slice(1), (lambda: 1), len, int, torch.nn.Linear(1, 1), torch.Generator(),
    threading.Lock(), io.BytesIO(b"x"), iter([]), object(), _Unwilling(), 2**3000, -(2**3000), "\ud800", "a\udfff",
    memoryview(b"x"), Ellipsis, NotImplemented, {1, (1, (2, (3,)))}, {2**80}, b"", deque := collections.deque([1]),
    {("nested", ("tuple",)): 1}, {frozenset(): 1}, {2**64: 1}, {_Colour.RED: 1}, {"\ud800": 1}, tuple(range(3)).count,
]  # fmt: skip


@pytest.mark.parametrize("value", REFUSED, ids=lambda value: type(value).__name__)
def test_what_cannot_be_read_back_is_refused_by_its_path(value):
    """The error names the very place, the type found there and what to do."""
    state = {"net": {"w": torch.ones(2)}, "optimizer": [("cfm", {"state": [0, 1, 2, value]})]}
    with pytest.raises(UnsafeCheckpointError) as caught:
        states.save(state)
    message = str(caught.value)
    assert message.startswith("optimizer[0][1]['state'][3]")
    assert "can't be saved" in message
    if type(value) is not dict:
        assert type(value).__qualname__ in message


@pytest.mark.filterwarnings("ignore:.*quantized")
@pytest.mark.filterwarnings("ignore:.*CSR")
@pytest.mark.filterwarnings("ignore:.*nested")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.ones(2, device="meta"), "meta device"),
        (lambda: torch.eye(2).to_sparse(), "sparse_coo"),
        (lambda: torch.eye(2).to_sparse_csr(), "sparse_csr"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.quint8), "quint8"),
        (lambda: torch.masked.as_masked_tensor(torch.ones(2), torch.ones(2).bool()), "MaskedTensor"),
        (torch.nn.UninitializedParameter, "UninitializedParameter"),
        (lambda: with_attribute(torch.ones(2)), r"Python attributes \(note\)"),
        (lambda: torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "float4"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
@pytest.mark.filterwarnings("ignore:Sparse")
def test_unusual_tensors_are_refused_by_their_path(make, reason):
    """A tensor without data, or of a kind that would come back as another, is refused."""
    state = {"a": [torch.ones(1), make()]}
    with pytest.raises(UnsafeCheckpointError, match=rf"^a\[1\] .*{reason}"):
        states.save(state)


def with_attribute(tensor):
    tensor.note = "lost"
    return tensor


def test_a_dtensor_is_refused_with_the_remedy():
    """A tensor that is spread over processes is refused, and the way out is named."""
    fake = type("DTensor", (torch.Tensor,), {})
    with pytest.raises(UnsafeCheckpointError, match=r"^net\['w'\] .*DTensor.*full_tensor"):
        states.save({"net": {"w": torch.ones(2).as_subclass(fake)}})


def test_nesting_and_cycles_are_refused():
    """200 levels are saved and read; 300, and a state that contains itself, are refused."""
    deep = [torch.ones(1)]
    for _ in range(190):
        deep = [deep]
    assert states.difference(deep, states.load(states.save(deep))) is None
    for _ in range(110):
        deep = {"k": deep}
    with pytest.raises(UnsafeCheckpointError, match=r"nests deeper than 200 levels at k\['k'\]"):
        states.save(deep)
    cycle = {"a": []}
    cycle["a"].append(cycle)
    with pytest.raises(UnsafeCheckpointError, match=r"contains itself at a\[0\]"):
        states.save(cycle)
    hidden = OrderedDict()
    hidden._metadata = {"": hidden}
    with pytest.raises(UnsafeCheckpointError, match="contains itself"):
        states.save([hidden])


def test_sharing_that_unfolds_without_end_is_refused():
    """Lists of lists of the same lists are refused in a moment, though they are small in memory."""
    laughs = []
    for _ in range(60):
        laughs = [laughs, laughs]
    with pytest.raises(UnsafeCheckpointError, match="unfolds"):
        states.save({"a": laughs})


def test_a_state_too_large_for_its_reader_is_refused():
    """What the reader's own limits would refuse is never written."""
    with pytest.raises(UnsafeCheckpointError, match=r"^big .*tensors of large"):
        states.save({"small": 1, "big": b"x" * (archives.MAX_PICKLE + 1)})
    with pytest.raises(UnsafeCheckpointError, match="fewer metrics"):
        states.save({}, metrics={str(number): 0.0 for number in range(100_000)})


def test_a_tensor_that_unfolds_without_end_is_refused():
    """One number that claims to be a huge tensor is refused by its path; a modest expansion is kept as it is."""
    with pytest.raises(UnsafeCheckpointError, match=r"^mask .*unfolded"):
        states.save({"mask": torch.ones(1).expand(2**40)})
    modest = torch.ones(1).expand(1000, 1000)
    assert states.load(states.save({"mask": modest}))["mask"].stride() == (0, 0)


def test_attributes_beside_metadata_are_refused():
    """An OrderedDict with attributes of its own would lose them, and is refused."""
    odd = OrderedDict(a=1)
    odd.note = 1
    with pytest.raises(UnsafeCheckpointError, match=r"^net .*sets attributes"):
        states.save({"net": odd})


def test_a_refused_save_leaves_no_file(tmp_path):
    """Nothing is published, and the checkpoint before stays the newest."""
    with CheckpointStore(tmp_path) as store:
        store.save({"x": 1}, 1)
        before = sorted(tmp_path.iterdir())
        with pytest.raises(CheckpointError):
            store.save({"x": np.float64(1)}, 2)
        assert sorted(tmp_path.iterdir()) == before


def test_globals_are_listed_without_loading():
    """The names that a pickle asks for are told, also those that are never loaded, and for damaged pickles."""
    assert list_globals(states.Pickle().name("os.system").done) == ["os.system"]
    assert list_globals(b"\x80\x04\x8c\x02os\x8c\x06system\x93.") == ["os.system"]
    assert list_globals(states.opened(states.save({"x": torch.ones(1)})).pickle()) == [
        "collections.OrderedDict", "torch.FloatStorage", "torch._utils._rebuild_tensor_v2"
    ]  # fmt: skip
    assert "ends in an error" in list_globals(b"\x80\x02")[0]
