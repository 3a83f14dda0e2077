"""Compiling the model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import torch

from seedvc_ckpt import CheckpointStore
from seedvc_train import device
from seedvc_train.model import build_model

# torch looks at .grad of what is no leaf and hides the warning by a filter, which "error" comes before
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Compiling traces the model, forward and backward, but runs it by torch's own kernels; one entry a graph."""
    from torch._dynamo.backends.debugging import aot_eager

    graphs: list[int] = []

    def counted(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(len(graph.graph.nodes))
        return aot_eager(graph, inputs)

    torch.compiler.reset()
    monkeypatch.setattr(device, "_COMPILER", counted)
    return graphs


@pytest.mark.parametrize("name", ["golden_tiny_tokens", "golden_wavenet_longskip"])
def test_a_compiled_model_computes_the_same(traced: list[int], name: str, full: bool) -> None:
    """Compiled, the model keeps its names and gives Seed-VC's outputs and gradients, for mels of any length."""
    if name != "golden_wavenet_longskip" and not full:
        pytest.skip("the model with more in it is enough; --full compiles the other too")
    golden = torch.load(runs.DATA / f"{name}.pth", weights_only=True)
    models = []
    for _ in range(2):
        model = build_model(golden["model_params"]).eval()
        for module, tensors in golden["net"].items():
            model[module].load_state_dict(tensors)
        models.append(model)
    device.compile_model(models[1])
    assert list(models[1].state_dict()) == list(models[0].state_dict())
    given, counts = golden["estimator_inputs"], []
    for frames in (37, 30, 23):
        losses = []
        for model in models:
            mel, cond = given["x"][..., :frames], given["cond"][:, :frames]
            lens = given["x_lens"].clamp(max=frames)
            t, z = torch.tensor([0.3, 0.6]), torch.linspace(-1, 1, mel.numel()).view_as(mel)
            loss = model["cfm"].loss(mel, lens, lens // 3, cond, given["style"], t, z)
            model.zero_grad()
            loss.backward()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)
        gradients = [model["cfm"].estimator.cond_projection.bias.grad for model in models]
        assert torch.allclose(*gradients, atol=1e-7)
        counts.append(len(traced))
    assert counts[0] > 0
    assert counts[2] == counts[0], "each length is compiled anew"


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch's, at its own import
def test_the_true_compiler_compiles_once_for_all_lengths(full: bool) -> None:
    """What --compile hands to inductor is compiled for mels of any length at once."""
    if not full:
        pytest.skip("the compiler takes a minute: with --full")
    golden = torch.load(runs.DATA / "golden_wavenet_longskip.pth", weights_only=True)
    model = build_model(golden["model_params"]).eval()
    torch.compiler.reset()
    device.compile_model(model)
    given = golden["estimator_inputs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for frames in (37, 30, 23):
            mel, cond = given["x"][..., :frames], given["cond"][:, :frames]
            lens = given["x_lens"].clamp(max=frames)
            model["cfm"].loss(mel, lens, lens // 3, cond, given["style"]).backward()


def test_a_compiled_run_saves_what_any_run_saves(recordings: Path, tmp_path: Path, traced: list[int]) -> None:
    """Checkpoints of --compile have the same tensors, and a run may change to and from it, which is said."""
    runs.train(recordings, tmp_path / "plain", max_steps=2)
    compiled = runs.train(recordings, tmp_path / "compiled", max_steps=2, compile=True)
    assert compiled.return_value == 0, compiled.exception
    assert traced
    files = [CheckpointStore(tmp_path / logs / "run").inspect() for logs in ("plain", "compiled")]
    assert list(files[0].tensors) == list(files[1].tensors)
    result = runs.train(recordings, tmp_path / "compiled", max_steps=3)
    assert result.return_value == 0, result.exception
    assert "compiled: True then, False now, so the last bits may differ" in result.output


def test_a_compiler_that_is_missing_is_told(recordings: Path, tmp_path: Path) -> None:
    """Where torch finds no C++ compiler, --compile ends in words and not in a traceback."""
    words = [sys.executable, "-m", "seedvc_train", *runs.arguments(recordings, tmp_path / "logs", compile=True)]
    environment = {**os.environ, "CXX": "/nonexistent/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    found = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "error: --compile: torch can't compile the model here" in found.stderr
    assert "Leave --compile out" in found.stderr
    assert "Traceback" not in found.stderr
    assert not CheckpointStore(tmp_path / "logs" / "run").list()
