"""Two checkpoints compared: every bit that differs is told, and nothing else."""

from __future__ import annotations

import math
import struct
from collections import OrderedDict

import pytest
import states
import torch
from hypothesis import given, settings

from seedvc_ckpt import CorruptCheckpointError
from seedvc_ckpt.format.compare import compare


def differences(one, other):
    archives = [states.opened(states.save(state, step=step)) for step, state in enumerate((one, other))]
    return [*compare(*archives)]


def tensor_difference(one, other):
    (found,) = differences({"t": one}, {"t": other})
    assert found.path == "t"
    return found.elements, found.largest


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@settings(max_examples=60, deadline=None)
@given(state=states.states)
def test_a_state_equals_itself(state):
    """Whatever a state holds, NaN included, two files of it don't differ, though their manifests do."""
    assert differences(state, state) == []


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", states.DTYPES)
def test_one_changed_bit_of_any_type_is_found(dtype):
    """In every dtype a single bit makes the tensors differ in one element, in whatever form they are."""
    one = states.filled(dtype, (6, 4))
    other = one.clone()
    if dtype == "bool":
        other[2, 3] ^= True
    else:
        other.view(torch.uint8)[2, -1] ^= 1
    for form in (lambda t: t, torch.t, lambda t: t[2:], lambda t: t[2, 3], lambda t: t[2:3, 3:].expand(5, 1)):
        elements, largest = tensor_difference(form(one), form(other))
        assert elements == (5 if form(one).shape == (5, 1) else 1)
        assert largest > 0 or math.isnan(largest)


@pytest.mark.parametrize(
    ("one", "other", "largest"),
    [
        (torch.tensor(2**60), torch.tensor(2**60 + 1), 1.0),
        (torch.tensor(-(2**63)), torch.tensor(2**63 - 1), 2.0**64),
        (torch.tensor(-(2**63)), torch.tensor(-(2**63) + 3), 3.0),
        (torch.tensor(2**64 - 1, dtype=torch.uint64), torch.tensor(2**64 - 2, dtype=torch.uint64), 1.0),
        (torch.tensor(2**64 - 1, dtype=torch.uint64), torch.tensor(0, dtype=torch.uint64), 2.0**64),
        (torch.tensor(1.0), torch.tensor(-2.0), 3.0),
        (torch.tensor(0.0), torch.tensor(-0.0), 0.0),
        (torch.tensor(1.0), torch.tensor(math.inf), math.inf),
        (torch.tensor(1.0), torch.tensor(math.nan), math.nan),
        (torch.tensor(1 + 1j), torch.tensor(4 + 5j), 5.0),
        (torch.tensor(True), torch.tensor(False), 1.0),
        (torch.tensor(1.5, dtype=torch.bfloat16), torch.tensor(2.0, dtype=torch.bfloat16), 0.5),
    ],
)
def test_the_largest_difference_is_told(one, other, largest):
    """How far apart two values are is right also where floats would round it away."""
    for pair in ((one, other), (other, one)):
        elements, found = tensor_difference(*pair)
        assert elements == 1
        assert found == largest or (math.isnan(found) and math.isnan(largest))


def test_payloads_of_nan_count():
    """Two NaNs with different bits differ, in tensors and in plain floats; equal ones don't."""
    one, other = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert tensor_difference(one.clone(), other.clone())[0] == 1
    quiet, odd = (struct.unpack("<d", struct.pack("<Q", bits))[0] for bits in (0x7FF8 << 48, (0x7FF8 << 48) + 1))
    assert [found.path for found in differences({"a": quiet}, {"a": odd})] == ["a"]
    assert differences({"a": odd}, {"a": odd}) == []
    assert [found.path for found in differences([0.0, complex(0, -0.0)], [-0.0, 0j])] == ["[0]", "[1]"]


def test_missing_values_and_other_types_and_shapes_are_told_by_path():
    """What one side lacks, and what is of another kind, is named with what stands there."""
    one = {
        "net": {"w": torch.ones(2), "gone": 1},
        "l": [1, 2],
        "t": 1,
        "s": torch.ones(2, 3),
        "d": torch.ones(1),
        "e": [],
    }
    other = {"net": {"w": torch.ones(2), "new": None}, "l": [1], "t": True, "s": torch.ones(3, 2),
             "d": torch.ones(1).half(), "e": ()}  # fmt: skip
    assert {found.path: found.what for found in differences(one, other)} == {
        "net['gone']": "1 in the first only",
        "net['new']": "None in the second only",
        "l[1]": "2 in the first only",
        "t": "1 in the first, True in the second",
        "s": "float32 [2, 3] in the first, float32 [3, 2] in the second",
        "d": "float32 [1] in the first, float16 [1] in the second",
        "e": "a list of 0 in the first, a tuple of 0 in the second",
    }


def test_torchs_own_values_are_compared():
    """Dtypes, devices and sizes are told as torch writes them."""
    one, other = (
        [torch.float32, torch.device("cpu"), torch.Size([1])],
        [torch.half, torch.device("cuda:1"), torch.Size([2])],
    )
    assert differences(one, one) == []
    assert [found.what for found in differences(one, other)] == [
        "torch.float32 in the first, torch.float16 in the second",
        "torch.device('cpu') in the first, torch.device('cuda:1') in the second",
        "torch.Size((1,)) in the first, torch.Size((2,)) in the second",
    ]


def test_how_it_is_stored_does_not_count():
    """Strides, shared memory, key order, dict or OrderedDict and the writer make no difference; values do."""
    base = torch.arange(12.0)
    one = {"a": base[:8], "b": base[4:], "t": base.view(3, 4).t(), "d": {"x": 1, "y": 2}}
    other = OrderedDict(d={"y": 2, "x": 1}, t=one["t"].contiguous(), b=base[4:].clone(), a=base[:8].clone())
    assert differences(one, other) == []
    stock = [states.opened(states.stock_save(state)) for state in (one, other)]
    assert [*compare(*stock)] == [*compare(stock[0], states.opened(states.save(other)))] == []
    other["b"][5] += 2
    assert [(found.path, found.elements, found.largest) for found in differences(one, other)] == [("b", 1, 2.0)]


def test_empty_tensors_are_equal_when_their_shapes_are():
    """A tensor without elements differs by its shape and type only."""
    assert differences({"e": torch.ones(0, 3)}, {"e": torch.ones(0, 3)}) == []
    assert len(differences({"e": torch.ones(0, 3)}, {"e": torch.ones(3, 0)})) == 1


@pytest.mark.parametrize("record", ["data/0", "data/1"])
def test_a_damaged_tensor_is_not_compared(record):
    """Damage is told as damage, by the tensor's path, and not as a difference; in views of larger records too."""
    base = torch.arange(100.0)
    data = states.stock_save({"a": torch.ones(4), "b": [base[3:6], base[9:]]})
    archive = states.opened(data)
    damaged = bytearray(data)
    damaged[archive.data_offset(record)] ^= 1
    with pytest.raises(CorruptCheckpointError, match=r"a\)|b\[0\]\)"):
        [*compare(archive, states.opened(damaged))]


def test_views_of_one_large_record_cost_what_they_hold():
    """Thousands of views of one record don't read it thousands of times."""

    class Counting(states.Memory):
        read = 0

        def read_into(self, offset, buffer):
            self.read += len(buffer)
            super().read_into(offset, buffer)

    source = Counting(states.stock_save([*torch.arange(100_000.0).split(100)]))
    assert [*compare(states.Archive.open(source), states.opened(source.data))] == []
    assert source.read < 3 * source.size
