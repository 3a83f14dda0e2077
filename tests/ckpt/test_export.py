"""The exported weights are those of the checkpoint, and load where they are meant to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile

import fsspec
import pytest
import safetensors
import safetensors.torch
import states
import torch

from seedvc_ckpt import CheckpointExistsError, CheckpointStore, CorruptCheckpointError, ExportError
from seedvc_ckpt.export import export
from seedvc_ckpt.file import CheckpointFile

RUN = os.path.join(os.path.dirname(__file__), "..", "data", "run_from_seedvc")
FORMATS = ["out.pth", "out.safetensors"]


def network():
    torch.manual_seed(1)
    return {
        "cfm": {"estimator.w": torch.randn(4, 3), "estimator.input_pos": torch.arange(5), "b": torch.randn(3)},
        "length_regulator": {"w": torch.randn(2, 2).t(), "scale": torch.tensor(1.5), "none": torch.empty(0, 2)},
    }


def flat(net):
    return {f"{module}.{name}": tensor for module, tensors in net.items() for name, tensor in tensors.items()}


def read(path):
    """The exported tensors by their full names, read by torch or by safetensors."""
    if str(path).endswith(".safetensors"):
        return safetensors.torch.load_file(path)
    loaded = torch.load(path, weights_only=True)
    assert list(loaded) == ["net"]
    return flat(loaded["net"])


def same(one, other):
    return states.difference(dict(sorted(one.items())), dict(sorted(other.items()))) is None


@pytest.fixture
def store(tmp_path):
    with CheckpointStore(tmp_path / "run") as store:
        state = {"net": network(), "optimizer": [torch.ones(9)], "iters": 5}
        store.save(state, 5, 1, metrics={"loss": 0.5}, settings={"sr": 9})
        yield store


@pytest.mark.parametrize("name", FORMATS)
def test_the_net_is_exported_and_nothing_else(name, store, tmp_path):
    """The file holds the tensors of net, each the same bit for bit, as other libraries read it."""
    target = tmp_path / name
    assert store.export(target) == os.fspath(target)
    assert same(read(target), flat(network()))


def test_the_torch_file_has_the_form_that_seedvc_reads(store, tmp_path):
    """The state is exactly {"net": {module: {name: tensor}}}, in plain dicts."""
    store.export(tmp_path / "out.pth")
    loaded = torch.load(tmp_path / "out.pth", weights_only=True)
    assert states.difference(loaded, {"net": network()}) is None


@pytest.mark.parametrize("name", FORMATS)
def test_the_manifest_says_where_it_came_from_and_no_time(name, store, tmp_path):
    """Run, step, epoch, metrics and source stand in the export; no wall clock does."""
    store.export(tmp_path / name)
    if name.endswith(".pth"):
        with zipfile.ZipFile(tmp_path / name) as archive:
            found = json.loads(archive.read("archive/seedvc_ckpt.json"))
        assert found["tensors"] == 6
    else:
        with safetensors.safe_open(tmp_path / name, "pt") as file:
            assert file.metadata()["format"] == "pt"
            found = json.loads(file.metadata()["seedvc_ckpt"])
    assert (found["run"], found["step"], found["epoch"], found["metrics"]) == ("run", 5, 1, {"loss": 0.5})
    assert found["settings"] == {"sr": 9}
    assert found["exported_from"] == "DiT_epoch_00001_step_00005.pth"
    assert "created" not in found


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_input_gives_the_same_bytes(name, store, tmp_path):
    """Two exports, and those of the same file on another storage, are equal byte for byte."""
    store.export(tmp_path / name)
    first = (tmp_path / name).read_bytes()
    store.export(tmp_path / name, overwrite=True)
    assert (tmp_path / name).read_bytes() == first
    memory = fsspec.filesystem("memory", skip_instance_cache=True)
    source = store.latest().name
    memory.pipe_file(f"/export-test/run/{source}", (tmp_path / "run" / source).read_bytes())
    export(CheckpointFile.at(f"memory://export-test/run/{source}"), f"memory://export-test/{name}", overwrite=True)
    assert memory.cat_file(f"/export-test/{name}") == first


@pytest.mark.parametrize("name", FORMATS)
def test_an_existing_target_is_left_alone(name, store, tmp_path):
    """Without overwrite the file that is there stays as it is."""
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(CheckpointExistsError, match="exists already"):
        store.export(tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"mine"
    store.export(tmp_path / name, overwrite=True)
    assert same(read(tmp_path / name), flat(network()))


@pytest.mark.parametrize("name", FORMATS)
def test_the_prefix_of_distributed_training_is_removed(name, tmp_path):
    """A checkpoint of a DDP run exports the names of the bare model; a mixture is refused."""
    net = {module: {f"module.{key}": value for key, value in named.items()} for module, named in network().items()}
    with CheckpointStore(tmp_path / "run") as store:
        store.save({"net": net}, 1)
        store.export(tmp_path / name)
        assert same(read(tmp_path / name), flat(network()))
        net["cfm"]["odd"] = torch.ones(1)
        store.save({"net": net}, 2)
        with pytest.raises(ExportError, match=r"some names begin with 'module\.'"):
            store.export(tmp_path / "mixed.pth")


@pytest.mark.parametrize("name", FORMATS)
def test_averaged_weights_are_exported_in_place_of_the_net(name, tmp_path):
    """Seed-VC's list of averaged tensors goes to the names in order, buffers of positions left out."""
    net = network()
    ema = {m: [[t + 1 for key, t in named.items() if "input_pos" not in key]] for m, named in net.items()}
    with CheckpointStore(tmp_path / "run") as store:
        store.save({"net": net, "ema": ema}, 1)
        store.export(tmp_path / name, weights="ema")
        wanted = {key: value if "input_pos" in key else value + 1 for key, value in flat(net).items()}
        assert same(read(tmp_path / name), wanted)
        del ema["cfm"][0][0]
        store.save({"net": net, "ema": ema}, 2)
        store.save({"net": net}, 3)
        store.save({"net": net, "ema": {"cfm": 5, "length_regulator": 5}}, 4)
        for step, reason in {2: "don't match", 3: "no averaged weights", 4: "not laid out"}.items():
            with pytest.raises(ExportError, match=reason):
                store.export(tmp_path / "bad.pth", step, weights="ema")
        with pytest.raises(ExportError, match="'net' or 'ema'"):
            store.export(tmp_path / "bad.pth", weights="nte")
    assert not (tmp_path / "bad.pth").exists()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16, "float64", torch.float32])
def test_floating_tensors_are_converted_and_others_are_not(name, dtype, store, tmp_path):
    """A dtype converts as torch does; whole numbers stay what they are."""
    store.export(tmp_path / name, dtype=dtype)
    kind = getattr(torch, str(dtype).removeprefix("torch."))
    wanted = {key: t.to(kind) if t.is_floating_point() else t for key, t in flat(network()).items()}
    assert same(read(tmp_path / name), wanted)


@pytest.mark.parametrize("name", FORMATS)
def test_values_that_are_not_finite_are_refused(name, tmp_path):
    """NaN, infinities and what overflows the new type are refused by name, unless they are asked for."""
    with CheckpointStore(tmp_path / "run") as store:
        for step, (value, dtype) in enumerate([(float("nan"), None), (-float("inf"), None), (1e5, "float16")]):
            state = {"net": {"cfm": {"good": torch.ones(3), "bad": torch.tensor([1, value, 2])}}}
            store.save(state, step)
            with pytest.raises(ExportError, match=r"cfm\.bad has 1 values that are not finite"):
                store.export(tmp_path / name, dtype=dtype)
            assert not (tmp_path / name).exists()
            store.export(tmp_path / f"{step}{name}", dtype=dtype, allow_non_finite=True)
            found = read(tmp_path / f"{step}{name}")["cfm.bad"]
            assert states.bits(found) == states.bits(state["net"]["cfm"]["bad"].to(found.dtype))


def test_differences_from_the_model_are_listed(store, tmp_path):
    """Wrong shapes, missing and surplus names are all told, and nothing is written."""
    expected = {name: tuple(tensor.shape) for name, tensor in flat(network()).items()}
    store.export(tmp_path / "fits.pth", expected=expected)
    expected["cfm.estimator.w"] = [4, 4]
    expected["cfm.new"] = ()
    del expected["cfm.b"]
    with pytest.raises(ExportError) as caught:
        store.export(tmp_path / "out.pth", expected=expected)
    assert caught.value.differences == (
        "cfm.estimator.w: 4×3 in the checkpoint, 4×4 in the model",
        "cfm.new: missing in the checkpoint",
        "cfm.b: not in the model",
    )
    assert not (tmp_path / "out.pth").exists()


def test_unknown_types_are_refused(store, tmp_path):
    """A dtype that weights can't have is refused before anything is written."""
    for dtype in ("int8", "float7", torch.complex64):
        with pytest.raises(ExportError, match="choose float32"):
            store.export(tmp_path / "out.pth", dtype=dtype)


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_tied_tensors_stay_tied(dtype, tmp_path):
    """One tensor under two names is stored once and shared after loading; overlapping views go on overlapping."""
    tied, base = torch.randn(4), torch.randn(10)
    net = {"cfm": {"a": tied, "left": base[:6], "b": tied, "right": base[4:], "same": base[4:], "empty": base[:0]}}
    with CheckpointStore(tmp_path / "run") as store:
        store.save({"net": net}, 1)
        store.export(tmp_path / "out.pth", dtype=dtype)
    loaded = torch.load(tmp_path / "out.pth", weights_only=True)["net"]["cfm"]
    kind = getattr(torch, dtype) if dtype else torch.float32
    assert all(torch.equal(loaded[name], tensor.to(kind)) for name, tensor in net["cfm"].items())
    assert loaded["a"] is loaded["b"]
    loaded["right"][0] = 7
    assert loaded["left"][4] == loaded["same"][0] == 7
    with zipfile.ZipFile(tmp_path / "out.pth") as archive:
        assert len([name for name in archive.namelist() if "/data/" in name]) == 3


@pytest.mark.parametrize("name", FORMATS)
def test_views_in_files_of_others_are_exported_at_their_own_size(name, tmp_path):
    """A net cut from one large storage exports its own values alone; NaN beside them does no harm."""
    base = torch.arange(100_000.0)
    base[50:60] = float("nan")
    net = {"cfm": {"a": base[:50], "t": base[100:200].view(10, 10).t(), "gaps": base[40:70:20], "z": base[9]}}
    path = tmp_path / "DiT_epoch_00000_step_00001.pth"
    torch.save({"net": net}, path)
    export(CheckpointFile.at(path), tmp_path / name, allow_non_finite=True)
    assert same(read(tmp_path / name), flat(net))
    assert (tmp_path / name).stat().st_size < 8000
    del net["cfm"]["a"], net["cfm"]["z"]
    torch.save({"net": net}, path)
    net["cfm"]["gaps"].copy_(torch.tensor([1.0, 2.0]))
    torch.save({"net": net}, path)
    export(CheckpointFile.at(path), tmp_path / name, overwrite=True)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("checkpoint", ["DiT_epoch_00001_step_00010.pth", "DiT_epoch_00002_step_00020.pth"])
def test_seedvcs_own_checkpoints_are_exported(name, checkpoint, tmp_path):
    """From a file of Seed-VC's trainer comes what torch.load finds under net, whichever the format."""
    source = os.path.join(RUN, checkpoint)
    export(CheckpointFile.at(source), tmp_path / name)
    net = torch.load(source, weights_only=True)["net"]
    assert same(read(tmp_path / name), flat(net))


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_tensor_publishes_nothing(name, store, tmp_path):
    """Damage in the weights is named, and the folder of the target is as it was; damage elsewhere does no harm."""
    path = tmp_path / "run" / store.latest().name
    data = bytearray(path.read_bytes())
    archive = states.opened(data)
    where = archive.data_offset("data/2")
    data[where] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match=r"cfm\.b"):
        store.export(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["run"]
    assert sorted(os.listdir(tmp_path / "run")) == [".seedvc_ckpt.lock", path.name]


def test_a_renamed_checkpoint_is_not_exported_as_what_it_is_not(store, tmp_path):
    """A file whose manifest contradicts its name is damaged for an export too."""
    os.rename(tmp_path / "run" / store.latest().name, tmp_path / "run" / "DiT_epoch_00001_step_00006.pth")
    with pytest.raises(CorruptCheckpointError, match="renamed"):
        store.export(tmp_path / "out.pth")


@pytest.mark.parametrize(
    "state",
    [5, [], {}, {"net": 5}, {"net": {}}, {"net": {"cfm": [torch.ones(1)]}}, {"net": {"cfm": {"a": 1}}},
     {"net": {"cfm": {1: torch.ones(1)}}}, {"model": {"cfm": {"a": torch.ones(1)}}}],
)  # fmt: skip
def test_what_holds_no_weights_is_refused(state, tmp_path):
    """A state without modules of named tensors under net is refused with what it holds instead."""
    with CheckpointStore(tmp_path / "run") as store:
        store.save(state, 1)
        for weights in ("net", "ema"):
            with pytest.raises(ExportError):
                store.export(tmp_path / "out.pth", weights=weights)


def test_safetensors_refuses_what_it_cannot_say(tmp_path):
    """Two tensors of one name, and types that the format lacks, are refused, not dropped."""
    with CheckpointStore(tmp_path / "run") as store:
        store.save({"net": {"a.b": {"c": torch.ones(1)}, "a": {"b.c": torch.zeros(1)}}}, 1)
        with pytest.raises(ExportError, match=r"a\.b\.c"):
            store.export(tmp_path / "out.safetensors")
        store.save({"net": {"a": {"c": torch.ones(1, dtype=torch.complex128)}}}, 2)
        with pytest.raises(ExportError, match="complex128"):
            store.export(tmp_path / "out.safetensors")


def test_tensors_sharing_memory_as_different_types_are_refused(tmp_path):
    """A net with one memory under two types can't be converted or checked, and is refused by name."""
    base = torch.ones(4)
    with CheckpointStore(tmp_path / "run") as store:
        store.save({"net": {"cfm": {"a": base, "bytes": base.view(torch.uint8)}}}, 1)
        with pytest.raises(ExportError, match=r"cfm\.a, cfm\.bytes"):
            store.export(tmp_path / "out.pth")


@pytest.mark.parametrize("name", FORMATS)
def test_an_export_takes_the_memory_of_its_largest_tensor(name, tmp_path):
    """Exporting 20 tensors of 10 MB after two such needs room for a few tensors, not for the whole file."""
    tensor = torch.ones(2_500_000)
    with CheckpointStore(tmp_path / "run") as store:
        store.save({"net": {"cfm": {str(n): tensor + n for n in range(2)}}}, 1)
        store.save({"net": {"cfm": {str(n): tensor + n for n in range(20)}}}, 2)
    code = (
        "import sys\n"
        "from seedvc_ckpt import CheckpointStore\n"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) // 1024\n"
        "store = CheckpointStore(sys.argv[1])\n"
        "store.export(sys.argv[2], 1)\n"
        "before = peak()\n"
        "store.export(sys.argv[2], 2, overwrite=True)\n"
        "print(peak() - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run"), str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) < 100
    assert (tmp_path / name).stat().st_size > 200_000_000
