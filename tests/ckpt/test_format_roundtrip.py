"""What is saved is what is loaded: by this library, and by stock torch."""

from __future__ import annotations

import io
import math
import struct
from collections import OrderedDict

import pytest
import states
import torch
from hypothesis import HealthCheck, example, given, settings

from seedvc_ckpt import CheckpointStore


def stock_loads(data, tmp_path):
    path = tmp_path / "stock.pth"
    path.write_bytes(data)
    return [torch.load(path), torch.load(path, weights_only=True), torch.load(path, weights_only=True, mmap=True)]


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(state=states.states)
@example(state={"nan": struct.unpack("<d", b"\x01\0\0\0\0\0\xf0\x7f")[0], "zero": -0.0, "inf": -math.inf})
def test_any_state_comes_back_exactly_and_stock_torch_agrees(state):
    """Every type, bit, key order and shared object of a state survives, for us and for torch.load."""
    data = states.save(state)
    states.verify(data)
    assert states.difference(state, states.load(data)) is None
    assert states.difference(state, torch.load(io.BytesIO(data), weights_only=True)) is None


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", states.DTYPES)
def test_tensors_of_every_type_and_form_come_back_bit_for_bit(dtype, tmp_path):
    """Whatever torch can hold of a dtype is the same after loading, in the three ways that torch.load has."""
    base = states.filled(dtype, (6, 4))
    forms = {
        "plain": base.clone(),
        "transposed": base.t(),
        "every second": base.clone()[:, ::2],
        "packed": states.filled(dtype, (300, 300))[:, ::150],
        "expanded": states.filled(dtype, (1, 3)).expand(5, 3),
        "no dimension": base[0, 0].clone(),
        "empty": base[:0].clone(),
        "empty view": base[3:3, 1:],
    }
    data = states.save(forms)
    for loaded in (states.load(data), *stock_loads(data, tmp_path)):
        assert states.difference(forms, loaded) is None


def test_lazy_conjugates_and_negatives_are_saved_as_they_read():
    """A view that torch computes only when it is read has its values in the file, without the flag."""
    base = torch.randn(3, 4, dtype=torch.complex64)
    loaded = states.load(states.save({"conj": base.conj(), "neg": base.conj().imag, "base": base}))
    assert torch.equal(loaded["conj"], torch.complex(base.real, -base.imag))
    assert torch.equal(loaded["neg"], -base.imag)
    assert torch.equal(loaded["base"], base)
    assert not loaded["conj"].is_conj()
    assert not loaded["neg"].is_neg()


def test_a_view_is_saved_at_its_own_size():
    """A slice of a large tensor takes its own bytes in the file, not those of the tensor it was cut from."""
    large = torch.randn(1_000_000)
    column = torch.randn(1000, 1000)[:, 0]
    data = states.save({"view": large[5:105], "column": column})
    assert len(data) < 10_000
    assert torch.equal(states.load(data)["view"], large[5:105])
    assert torch.equal(states.load(data)["column"], column)


@pytest.mark.parametrize("reader", ["ours", "stock"])
def test_overlapping_views_share_one_record_and_go_on_sharing_memory(reader):
    """Views that overlap are stored once, keep their strides, and a write through one shows in the other."""
    base = torch.arange(1000.0)
    state = {"left": base[:600], "right": base[400:], "odd": base[1::2], "matrix": base.view(10, 100).t()}
    data = states.save(state)
    assert [name for name in states.opened(data).records if name.startswith("data/")] == ["data/0"]
    loaded = states.load(data) if reader == "ours" else torch.load(io.BytesIO(data), weights_only=True)
    assert states.difference(state, loaded) is None
    assert {key: value.stride() for key, value in loaded.items()} == {k: v.stride() for k, v in state.items()}
    loaded["left"][401] = -1
    assert loaded["right"][1] == loaded["odd"][200] == loaded["matrix"][1, 4] == -1


def test_a_view_inside_another_does_not_end_the_sharing():
    """What overlaps the large view only, behind the end of a small one, still belongs to the same record."""
    base = torch.arange(100.0)
    state = {"large": base[:90], "inner": base[10:20], "late": base[50:60]}
    loaded = states.load(states.save(state))
    loaded["large"][:] = -1
    assert (loaded["inner"] == -1).all()
    assert (loaded["late"] == -1).all()


def test_views_of_one_memory_as_different_types_go_on_sharing_it():
    """A tensor and its bytes are one record, whichever of the two comes first."""
    base = torch.arange(100, dtype=torch.float64)
    state = {"bytes": base[7:20].view(torch.uint8)[3:40], "numbers": base[5:90], "half": base[8:].view(torch.bfloat16)}
    loaded = states.load(states.save(state))
    assert states.difference(state, loaded) is None
    loaded["numbers"][3] = 0
    assert not loaded["bytes"][5:13].any()
    assert not loaded["half"][:4].any()
    odd = {"bytes": base.view(torch.uint8)[3:40], "numbers": base[1:5]}
    assert states.difference(odd, states.load(states.save(odd))) is None


def test_neighbours_in_one_storage_are_separate_records():
    """Parts that touch but don't overlap are stored apart, each aligned."""
    query, key = torch.arange(20.0).split(10)
    archive = states.opened(states.save({"q": query, "k": key}))
    assert [record.size for name, record in archive.records.items() if name.startswith("data/")] == [40, 40]


def test_identity_of_tensors_and_containers_survives():
    """One object in two places is one object after loading; equal ones stay apart; tied memory stays tied."""
    weight, shared = torch.nn.Parameter(torch.randn(3)), [1, 2]
    state = {"a": weight, "b": weight, "tied": weight.detach(), "l": [shared, shared, [1, 2]], "d": {"l": shared}}
    loaded = states.load(states.save(state))
    assert states.difference(state, loaded) is None
    assert loaded["a"] is loaded["b"]
    assert loaded["a"].data_ptr() == loaded["tied"].data_ptr()
    assert loaded["l"][0] is loaded["l"][1] is loaded["d"]["l"] is not loaded["l"][2]


def test_parameters_and_gradients_flags_survive():
    """A Parameter stays one, and requires_grad is as it was, on leaves and on results of a computation."""
    leaf = torch.randn(2, requires_grad=True)
    state = [torch.nn.Parameter(torch.randn(2)), torch.nn.Parameter(torch.ones(1).int(), False), leaf, leaf * 2]
    loaded = states.load(states.save(state))
    assert states.difference(state, loaded) is None
    assert loaded[3].grad_fn is None


def test_real_models_and_optimizers_load_with_their_metadata(tmp_path):
    """A state_dict's version notes and AdamW's state come back, and both load into new objects."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    state = {"net": model.state_dict(), "optimizer": [("all", optimizer.state_dict())]}
    data = states.save(state)
    for loaded in (states.load(data), *stock_loads(data, tmp_path)):
        assert states.difference(state, loaded) is None
        assert type(loaded["net"]) is OrderedDict
        assert loaded["net"]._metadata["1"] == {"version": 2}
        torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)).load_state_dict(loaded["net"])
        torch.optim.AdamW(model.parameters()).load_state_dict(loaded["optimizer"][0][1])


@pytest.mark.parametrize("mmap", [False, True])
def test_what_stock_torch_saved_loads_alike(mmap, tmp_path):
    """Files of torch.save, with views of larger storages, come back as torch.load gives them."""
    base = torch.arange(1000.0)
    state = {
        "view": base[10:20], "t": base.view(10, 100).t(), "f8": base[:8].to(torch.float8_e5m2), "p": [b"\xff\0", 1j],
        "conj": torch.randn(2, dtype=torch.complex64), "u16": states.filled("uint16", (3,)), "s": {1, "a"},
        "parameter": torch.nn.Parameter(base[:3]), "cnt": None, "size": torch.Size([1, 2]),
    }  # fmt: skip
    path = tmp_path / "DiT_epoch_00000_step_00001.pth"
    torch.save(state, path)
    with CheckpointStore(tmp_path, read_only=True) as store:
        loaded = store.load(mmap=mmap)
        assert store.inspect().manifest is None
        store.verify()
    assert states.difference(torch.load(path, weights_only=True), loaded) is None
    assert loaded["view"].untyped_storage().nbytes() == 4000


@pytest.mark.parametrize("mmap", [False, True])
def test_loaded_tensors_can_be_changed_without_changing_the_file(mmap, tmp_path):
    """Writing into what was loaded, mapped or not, leaves the checkpoint as it was."""
    with CheckpointStore(tmp_path) as store:
        store.save({"x": torch.arange(100.0)}, 1)
        store.load(mmap=mmap)["x"].zero_()
        assert torch.equal(store.load()["x"], torch.arange(100.0))


def test_a_state_may_be_any_single_value():
    """A tensor, a number or nothing at all is a state too."""
    for state in (torch.ones(2), 5, None, [], {}, ()):
        assert states.difference(state, states.load(states.save(state))) is None


def test_map_location_moves_all_tensors():
    """Tensors arrive on the device asked for, views of one memory still on one memory."""
    base = torch.arange(10.0)
    loaded = states.load(states.save({"a": base[:6], "b": base[4:]}), map_location="meta")
    assert {value.device.type for value in loaded.values()} == {"meta"}
    assert loaded["b"].shape == (6,)
