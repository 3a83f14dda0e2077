"""Precision, gradient accumulation and averaged weights: what they compute, and that a resume keeps it to the bit."""

from __future__ import annotations

import math
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import runs
import torch
from torch import nn

from seedvc_ckpt import CheckpointStore
from seedvc_train import loop
from seedvc_train.ema import Ema
from seedvc_train.loop import TrainingError, groups
from seedvc_train.model import build_model
from seedvc_train.precision import Precision
from seedvc_train.state import TrainingState

CPU = torch.device("cpu")
GOLDENS = sorted(runs.DATA.glob("golden_*.pth"))


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate": 2},
        {"ema": 0.9},
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"precision": "fp16", "accumulate": 2, "ema": 0.99},
    ],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()),
)
def test_a_kill_changes_no_bit(recordings: Path, tmp_path: Path, options: dict[str, object], full: bool) -> None:
    """Killed and continued, with no loader process and with two, a run ends as one left alone."""
    if len(options) < 3 and "bf16" not in options.values() and not full:
        pytest.skip("all of them together are enough; --full tries each alone")
    options = {"max_steps": 12, "save_every": 1, **options}
    assert runs.train(recordings, tmp_path / "whole", **options).return_value == 0
    for workers in (0, 2):
        logs = tmp_path / f"killed {workers}"
        process = runs.start(recordings, logs, **options, num_workers=workers)
        reached = 0
        while process.poll() is None and reached < 2:
            latest = CheckpointStore(logs / "run", read_only=True).latest()
            reached = latest.step if latest else 0
            time.sleep(0.005)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it ended by itself"
        result = runs.train(recordings, logs, **options, num_workers=workers)
        assert result.return_value == 0, result.exception
        assert "resumed from step" in result.output
        assert runs.differences(tmp_path / "whole" / "run", logs / "run") == []
    saved = CheckpointStore(tmp_path / "whole" / "run").load()
    assert ("ema" in saved) == ("ema" in options)
    assert (saved["seedvc_train"]["loss_scale"] != {}) == (options.get("precision") == "fp16")


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"accumulate": 2}, {"ema": 0.9}])
def test_each_option_is_a_setting(recordings: Path, tmp_path: Path, options: dict[str, object]) -> None:
    """A run does not go on with another precision, accumulation or average unless it is told to."""
    runs.train(recordings, tmp_path, max_steps=2)
    refused = runs.train(recordings, tmp_path, max_steps=3, **options)
    ((name, value),) = options.items()
    assert f"{name}: " in str(refused.exception)
    assert f" then, {value} now" in str(refused.exception)
    allowed = runs.train(recordings, tmp_path, max_steps=3, **options, allow_changes=True)
    assert allowed.return_value == 0, allowed.exception


def test_averages_begin_with_the_weights_of_a_resumed_run(recordings: Path, tmp_path: Path) -> None:
    """--ema given later averages from the weights that the run had then, and says so."""
    runs.train(recordings, tmp_path, max_steps=3)
    before = CheckpointStore(tmp_path / "run").load()["net"]
    result = runs.train(recordings, tmp_path, max_steps=4, ema=0.9, allow_changes=True)
    assert "averaged weights, which begin with the weights as they are now" in result.output
    after = CheckpointStore(tmp_path / "run").load()
    name = "estimator.cond_projection.weight"
    names = [key for key in after["net"]["cfm"] if "input_pos" not in key]
    average = after["ema"]["cfm"][0][names.index(name)]
    expected = 0.1 * before["cfm"][name] + 0.9 * after["net"]["cfm"][name]
    assert torch.allclose(average, expected, atol=1e-7)
    assert not torch.allclose(average, after["net"]["cfm"][name], atol=1e-7)


class _Tiny(nn.ModuleDict):
    def __init__(self) -> None:
        super().__init__({"cfm": nn.Linear(2, 2), "length_regulator": nn.Linear(2, 1)})
        self["cfm"].register_buffer("input_pos", torch.arange(4))


def test_the_average_is_what_it_says() -> None:
    """Averages follow d = min(decay, (1 + n)/(10 + n)), and input_pos is passed over."""
    model, expected = _Tiny(), None
    ema = Ema(model, 0.3)
    for n in range(6):
        decay = min(0.3, (1 + n) / (10 + n))
        old = model["cfm"].weight.detach().double().clone() if expected is None else expected
        with torch.no_grad():
            model["cfm"].weight.copy_(torch.randn(2, 2))
        ema.update()
        expected = decay * old + (1 - decay) * model["cfm"].weight.detach().double()
        assert torch.allclose(ema.averages["cfm"]["weight"].double(), expected, atol=1e-6)
    laid_out = ema.to_checkpoint()
    assert [tuple(tensor.shape) for tensor in laid_out["cfm"][0]] == [(2, 2), (2,)]
    assert len(laid_out["length_regulator"]) == 1


def test_ft_model_holds_the_averages(recordings: Path, tmp_path: Path) -> None:
    """With --ema, ft_model.pth is what export --weights ema gives; the last step's weights are still to be had."""
    result = runs.train(recordings, tmp_path, max_steps=4, ema=0.99)
    assert "holds the averaged weights" in result.output
    store = CheckpointStore(tmp_path / "run")
    store.export(tmp_path / "ema.pth", weights="ema")
    store.export(tmp_path / "net.pth")
    assert (tmp_path / "run" / "ft_model.pth").read_bytes() == (tmp_path / "ema.pth").read_bytes()
    assert (tmp_path / "net.pth").read_bytes() != (tmp_path / "ema.pth").read_bytes()


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
@pytest.mark.parametrize(("name", "tolerance"), [("bf16", 2e-2), ("fp16", 2.5e-3)])
def test_half_precision_computes_the_same(path: Path, name: str, tolerance: float) -> None:
    """Under autocast the outputs are Seed-VC's but for the rounding of the format; loss and gradients are fp32."""
    golden = torch.load(path, weights_only=True)
    model = build_model(golden["model_params"])
    for module, tensors in golden["net"].items():
        model[module].load_state_dict(tensors)
    given, precision = golden["estimator_inputs"], Precision(name, CPU)
    inputs = [given[key] for key in ("x", "prompt_x", "x_lens", "t", "style", "cond")]
    with precision.autocast():
        estimate = model.eval()["cfm"].estimator(*inputs)
        loss = model["cfm"].loss(given["x"], given["x_lens"], given["x_lens"] // 2, given["cond"], given["style"])
    expected = golden["outputs"]["estimator"]
    assert estimate.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
    assert (estimate.float() - expected).abs().max() < tolerance * expected.abs().max()
    assert loss.dtype == torch.float32
    loss.backward()
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None} == {torch.float32}


def test_neighbouring_times_stay_apart() -> None:
    """The time embedding under bf16 is that of fp32, bit for bit."""
    golden = torch.load(GOLDENS[0], weights_only=True)
    embed = build_model(golden["model_params"])["cfm"].estimator.t_embedder
    times = torch.tensor([0.5, 0.5001, 0.9999])
    with torch.no_grad(), Precision("bf16", CPU).autocast():
        halved = embed(times)
    with torch.no_grad():
        assert torch.equal(halved, embed(times))


def _state(precision: str, ema: float | None = None) -> TrainingState:
    return TrainingState.fresh(_Tiny(), 1e-2, precision=precision, ema_decay=ema)


def _give_gradients(state: TrainingState, value: float) -> None:
    loss = sum(parameter.sum() for parameter in state.model.parameters())
    state.model.zero_grad()
    state.precision.scaler.scale(loss * value).backward()


def test_an_overflow_in_fp16_changes_only_the_loss_scale() -> None:
    """Gradients that overflow leave weights, moments, averages and learning rate, halve the scale, and are no error."""
    state = _state("fp16", ema=0.5)
    _give_gradients(state, 1.0)
    assert state.apply_gradients()
    before = [parameter.clone() for parameter in state.model.parameters()]
    rate, averages = state.schedulers["cfm"].get_last_lr(), state.ema.averages["cfm"]["weight"].clone()
    _give_gradients(state, 1.0)
    next(state.model["length_regulator"].parameters()).grad[0, 0] = math.inf
    assert not state.apply_gradients()
    assert all(map(torch.equal, before, state.model.parameters()))  # those of the other module too
    assert state.schedulers["cfm"].get_last_lr() == rate
    assert torch.equal(state.ema.averages["cfm"]["weight"], averages)
    assert state.optimizers["cfm"].state[state.model["cfm"].weight]["step"] == 1
    assert state.precision.scaler.get_scale() == 2.0**15
    assert not state.precision.exhausted


def test_overflows_count_as_steps(recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the loss scale is too large steps go on and nothing moves; a resume among them goes on to the bit."""
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**22)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    options = {"save_every": 1, "keep_last": 20, "precision": "fp16"}
    runs.train(recordings, tmp_path / "whole", max_steps=12, **options)
    store = CheckpointStore(tmp_path / "whole" / "run")
    states = [store.load(step) for step in range(1, 13)]
    scales = [state["seedvc_train"]["loss_scale"]["scale"] for state in states]
    assert scales[:2] == [2.0**21, 2.0**20]
    moments = [state["optimizer"][0][1]["state"] for state in states]
    assert not moments[1]
    assert moments[-1]
    assert [state["seedvc_train"]["position"] for state in states[:3]] == [1, 2, 3]
    assert states[1]["scheduler"][0][1]["last_epoch"] == 0
    assert runs.metrics(tmp_path / "whole" / "run")[0]["loss_scale"] == scales[9]
    runs.train(recordings, tmp_path / "two", max_steps=2, **options)
    runs.train(recordings, tmp_path / "two", max_steps=12, **options)
    assert runs.differences(tmp_path / "whole" / "run", tmp_path / "two" / "run") == []


def test_gradients_that_are_never_finite_end_the_run() -> None:
    """Gradients that are not finite are an error: in fp32 and bf16 at once, in fp16 at a scale below 1."""
    for precision, tries in (("fp32", 1), ("bf16", 1), ("fp16", 17)):
        state = _state(precision)
        before = [parameter.clone() for parameter in state.model.parameters()]
        for attempt in range(tries):
            assert state.precision.exhausted == (precision != "fp16"), attempt
            _give_gradients(state, math.inf)
            assert not state.apply_gradients()
        assert state.precision.exhausted
        assert all(map(torch.equal, before, state.model.parameters()))


@pytest.mark.parametrize(
    ("loss", "told"), [(math.nan, "the loss is nan in step 1"), (None, "the gradients are not finite in step 1")]
)
def test_what_is_not_finite_is_told(
    recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: float | None, told: str
) -> None:
    """A loss or gradients that are not finite end the run before a weight has changed or a checkpoint is saved."""

    def broken(model: nn.ModuleDict, batch: object) -> torch.Tensor:
        total = sum(parameter.sum() for parameter in model.parameters())
        return total * loss if loss is not None else total.sub(total.detach()).abs().sqrt()  # slope 1/0 at 0

    monkeypatch.setattr(loop, "training_loss", broken)
    result = runs.train(recordings, tmp_path, max_steps=2, save_every=1)
    assert isinstance(result.exception, TrainingError)
    assert told in str(result.exception)
    assert not CheckpointStore(tmp_path / "run").list()


def test_accumulated_batches_are_one_step(recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--accumulate averages loss and gradients of its batches, and an epoch's last step takes what is left."""
    seen: list[tuple[int, torch.Tensor]] = []
    true_loss, apply = loop.training_loss, TrainingState.apply_gradients

    def loss_of(model: nn.ModuleDict, batch: object) -> torch.Tensor:
        loss = true_loss(model, batch)
        weight = model["cfm"].estimator.cond_projection.weight
        seen.append((loss.item(), torch.autograd.grad(loss, weight, retain_graph=True)[0]))
        return loss

    def check(state: TrainingState) -> bool:
        averaged = torch.stack([gradient for _, gradient in seen]).mean(0)
        assert torch.allclose(state.model["cfm"].estimator.cond_projection.weight.grad, averaged, rtol=1e-3, atol=1e-5)
        taken.append([loss for loss, _ in seen])
        seen.clear()
        return apply(state)

    taken: list[list[float]] = []
    monkeypatch.setattr(loop, "training_loss", loss_of)
    monkeypatch.setattr(TrainingState, "apply_gradients", check)
    result = runs.train(recordings, tmp_path, max_steps=3, save_every=1, keep_last=9, accumulate=2)
    assert result.return_value == 0, result.exception
    assert [len(losses) for losses in taken] == [2, 1, 2]  # three batches an epoch
    store = CheckpointStore(tmp_path / "run")
    states = [store.load(step) for step in (1, 2, 3)]
    assert [(state["epoch"], state["seedvc_train"]["position"]) for state in states] == [(0, 2), (0, 3), (1, 2)]
    assert states[0]["seedvc_train"]["running_loss"] == pytest.approx(sum(taken[0]) / 2, rel=1e-6)


def test_groups_take_all_in_order() -> None:
    """Every batch is in one group, in order."""
    assert list(groups(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(groups([], 3)) == []


def test_an_optimizer_state_of_another_form_goes_on_fused() -> None:
    """A state that an unfused AdamW saved, as Seed-VC's, is stepped by the fused form, with equal numbers."""
    state, other = _state("fp32"), _Tiny()
    other.load_state_dict(state.model.state_dict())
    plain = torch.optim.AdamW(other["cfm"].parameters(), lr=1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)
    for parameter in other["cfm"].parameters():
        parameter.grad = torch.ones_like(parameter)
    plain.step()
    state.model.load_state_dict(other.state_dict())
    state.optimizers["cfm"].load_state_dict(plain.state_dict())
    assert [group["fused"] for group in state.optimizers["cfm"].param_groups] == [True]
    for parameter in state.model["cfm"].parameters():
        parameter.grad = torch.ones_like(parameter)
    plain.step()
    state.optimizers["cfm"].step()
    for ours, theirs in zip(state.model["cfm"].parameters(), other["cfm"].parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-7)
