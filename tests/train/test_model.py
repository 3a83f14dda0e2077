"""The network: the same tensors, outputs, loss and gradients as Seed-VC's, for every switch."""

import copy
import functools
import itertools
import json
from pathlib import Path

import dit_reference as reference
import pytest
import torch
from torch import nn

from seedvc_train.config import Config, ConfigError, ModelParams, load_config
from seedvc_train.model import build_model, draw_prompt_lens, expected_tensors
from seedvc_train.model.length_regulator import f0_to_bins
from seedvc_train.model.weight_norm import WeightNormConv1d, WeightNormLinear

DATA = Path(__file__).parents[1] / "data"
PRESETS = json.loads((DATA / "presets.json").read_text())
KEYS = json.loads((DATA / "state_dict_keys.json").read_text())
GOLDENS = ["golden_f0_mlp", "golden_tiny_tokens", "golden_wavenet_longskip"]
ESTIMATOR_ARGUMENTS = ("x", "prompt_x", "x_lens", "t", "style", "cond")


@functools.cache
def golden(name):
    return torch.load(DATA / f"{name}.pth", weights_only=True)


def golden_model(name, **dit_changes):
    content = golden(name)
    params = copy.deepcopy(content["model_params"])
    params["DiT"] |= {"class_dropout_prob": 0.0} | dit_changes
    if "wavenet" in params:
        params["wavenet"]["p_dropout"] = 0.0
    model = build_model(params)
    for part, state in content["net"].items():
        model[part].load_state_dict(state)
    return model.eval()


def golden_inputs(name):
    content = golden(name)
    return content["estimator_inputs"], content["regulator_inputs"], content["outputs"]


def estimator_inputs(name):
    return [golden_inputs(name)[0][key] for key in ESTIMATOR_ARGUMENTS]


def tiny_params(**switches):
    """A network that is small enough for the slow reference, and its switches (DiT's unless named below)."""
    params = {
        "dit_type": "DiT",
        "reg_loss_type": switches.pop("reg_loss_type", "l1"),
        "speech_tokenizer": {"type": "whisper", "name": "openai/whisper-small"},
        "style_encoder": {"dim": 6},
        "length_regulator": {
            "channels": 12,
            "in_channels": 5,
            "content_codebook_size": 3,
            "sampling_ratios": [1] * switches.pop("ratios", 4),
            "f0_condition": switches.get("f0_condition", False),
            "n_f0_bins": 30,
        },
        "DiT": {
            "hidden_dim": 16,
            "num_heads": 2,
            "depth": 3,
            "class_dropout_prob": 0.0,
            "in_channels": 7,
            "content_dim": 12,
            "content_codebook_size": 3,
            "final_layer_type": "mlp",
            "style_condition": True,
            "style_as_token": False,
            "time_as_token": False,
            "uvit_skip_connection": True,
            "long_skip_connection": False,
            "f0_condition": False,
        },
        "wavenet": {
            "hidden_dim": 16,
            "num_layers": 2,
            "kernel_size": switches.pop("kernel_size", 5),
            "dilation_rate": switches.pop("dilation_rate", 1),
            "p_dropout": 0.0,
        },
    }
    params["DiT"] |= switches
    return params


def tiny_model(params):
    """A model whose every tensor is away from its initial value, in evaluation mode."""
    model = build_model(params)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tiny_batch(frames=11, lens=(11, 8), content_dim=12):
    return {
        "x": torch.randn(len(lens), 7, frames),
        "prompt_x": torch.randn(len(lens), 7, frames),
        "x_lens": torch.tensor(lens),
        "t": torch.rand(len(lens)),
        "style": torch.randn(len(lens), 6),
        "cond": torch.randn(len(lens), frames, content_dim),
    }


def training_loss(model, batch, prompt_lens, **given):
    cfm = model["cfm"]
    return cfm.loss(batch["x"], batch["x_lens"], prompt_lens, batch["cond"], batch["style"], **given)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(1234)


@pytest.mark.parametrize("name", GOLDENS)
class TestGolden:
    """Seed-VC's own modules gave these outputs; float32, CPU."""

    @pytest.mark.parametrize(("output", "mask_content"), [("estimator", False), ("estimator_content_masked", True)])
    def test_estimator(self, name, output, mask_content):
        """The estimate is Seed-VC's, with the content and without."""
        model = golden_model(name)
        with torch.no_grad():
            estimate = model["cfm"].estimator(*estimator_inputs(name), mask_content=mask_content)
        torch.testing.assert_close(estimate, golden_inputs(name)[2][output], atol=5e-6, rtol=0)

    def test_length_regulator(self, name):
        """The conditioning is Seed-VC's."""
        _, given, outputs = golden_inputs(name)
        regulator = golden_model(name)["length_regulator"]
        with torch.no_grad():
            cond = regulator(given["content"], ylens=given["ylens"], f0=given["f0"])
        torch.testing.assert_close(cond, outputs["regulator"], atol=5e-6, rtol=0)

    def test_loss_and_gradients(self, name):
        """The loss, the norm of its gradient and one gradient are Seed-VC's."""
        given, _, outputs = golden_inputs(name)
        model = golden_model(name).train()
        loss = training_loss(model, given, given["prompt_lens"], t=given["loss_t"], z=given["loss_z"])
        loss.backward()
        gradients = [p.grad for p in model["cfm"].parameters() if p.grad is not None]
        bias = model["cfm"].estimator.cond_projection.bias.grad
        assert loss.shape == ()
        assert abs(loss - outputs["loss"]) <= 5e-6
        assert abs(nn.utils.get_total_norm(gradients) - outputs["grad_norm"]) <= 5e-6
        torch.testing.assert_close(bias, outputs["grad_cond_projection_bias"], atol=1e-7, rtol=0)

    def test_sample(self, name):
        """Four guided Euler steps end where Seed-VC's do, from a model that was left in training mode too."""
        given, _, outputs = golden_inputs(name)
        sampled = (
            golden_model(name, class_dropout_prob=1.0)
            .train()["cfm"]
            .sample(
                given["cond"][:1],
                torch.tensor([given["cond"].shape[1]]),
                given["euler_prompt"],
                given["style"][:1],
                4,
                0.7,
                z=given["euler_z"],
            )
        )
        torch.testing.assert_close(sampled, outputs["euler_4_steps_cfg_0.7"], atol=5e-6, rtol=0)

    def test_copy(self, name):
        """A deep copy is a model of its own with the same outputs."""
        model = golden_model(name)
        copied = copy.deepcopy(model)
        inputs = estimator_inputs(name)
        with torch.no_grad():
            expected = model["cfm"].estimator(*inputs)
            for parameter in model.parameters():
                parameter.zero_()
            assert torch.equal(copied["cfm"].estimator(*inputs), expected)


def preset_of(name):
    return Config.parse(next(config for file, config in PRESETS.items() if name in file))


@pytest.mark.parametrize("name", KEYS)
def test_state_dicts_equal_seed_vcs(name):
    """Keys, shapes, dtypes and order are those of the published checkpoints."""
    with torch.device("meta"):
        model = build_model(preset_of(name).model_params)
    for part, expected in KEYS[name].items():
        state = model[part].state_dict()
        assert [(k, list(v.shape), str(v.dtype)) for k, v in state.items()] == [(k, *v) for k, v in expected.items()]


@pytest.mark.parametrize("name", KEYS)
def test_parameters_come_in_the_optimizers_order(name):
    """AdamW's saved state is indexed by position: parameters are ordered like the keys, buffers aside."""
    with torch.device("meta"):
        model = build_model(preset_of(name).model_params)
    for part, expected in KEYS[name].items():
        keys = [key for key in expected if not key.endswith(("input_pos", "freqs"))]
        assert [key for key, _ in model[part].named_parameters()] == keys


def test_switches_decide_which_tensors_there_are():
    """Only what Seed-VC keeps in spite of its switch is there without it."""

    def names(**switches):
        return {name.removeprefix("cfm.estimator.") for name in build_model(tiny_params(**switches)).state_dict()}

    plain, uvit = names(uvit_skip_connection=False), names()
    assert {name.split(".")[3] for name in uvit - plain} == {"skip_in_linear"}
    assert len(uvit - plain) == 3 * 2
    assert names(style_as_token=True) - uvit == {"style_in.weight", "style_in.bias"}
    assert names(time_as_token=True) == names(long_skip_connection=True) == uvit
    assert names(style_condition=False) == uvit
    wavenet = names(final_layer_type="wavenet")
    assert {name.split(".")[0] for name in uvit - wavenet} == {"final_mlp"}
    assert {name.split(".")[0] for name in wavenet - uvit} == {
        *("t_embedder2", "conv1", "conv2", "wavenet", "final_layer", "res_projection")
    }
    with_f0 = names(f0_condition=True) - uvit
    assert with_f0 == {"length_regulator.f0_mask", "length_regulator.f0_embedding.weight"}


def test_expected_tensors_reads_a_config_or_its_path(tmp_path):
    """Names are flattened over both modules, buffers included, and no random number is drawn."""
    path = DATA / "run_from_seedvc" / "config_dit_mini.yml"
    before = torch.get_rng_state()
    tensors = expected_tensors(path)
    assert torch.equal(torch.get_rng_state(), before)
    net = torch.load(DATA / "run_from_seedvc" / "ft_model.pth", weights_only=True)["net"]
    assert tensors == {f"{part}.{k}": tuple(v.shape) for part in net for k, v in net[part].items()}
    assert tensors["cfm.estimator.input_pos"] == (16384,)
    assert expected_tensors(str(path)) == expected_tensors(load_config(path)) == tensors
    with pytest.raises(ConfigError, match="no such config file"):
        expected_tensors(tmp_path / "none.yml")


def test_build_model_takes_checked_or_plain_parameters():
    """A mapping and its ModelParams build the same network; a wrong mapping is refused with its place."""
    params = tiny_params()
    plain, checked = (build_model(p).state_dict() for p in (params, ModelParams.parse(params)))
    assert [(k, v.shape) for k, v in plain.items()] == [(k, v.shape) for k, v in checked.items()]
    del params["DiT"]["depth"]
    with pytest.raises(ConfigError, match=r"model_params\.DiT\.depth: missing"):
        build_model(params)


SWITCHES = (
    "final_layer_type",
    "style_as_token",
    "time_as_token",
    "uvit_skip_connection",
    "long_skip_connection",
)
CASES = [
    dict(zip((*SWITCHES, "style_condition"), values, strict=True)) | {"depth": 1 + i % 5}
    for i, values in enumerate(itertools.product(["mlp", "wavenet"], *[[False, True]] * 5))
]
CASES += [{"final_layer_type": "wavenet", "dilation_rate": 2, "kernel_size": kernel} for kernel in (1, 3, 7, 9)]


@pytest.mark.parametrize("switches", CASES, ids=str)
def test_every_switch_against_the_slow_reference(switches):
    """Each combination estimates what plain loops in float64 do, padding and dropped content included."""
    params = tiny_params(**switches)
    model, batch = tiny_model(params), tiny_batch()
    estimator = model["cfm"].estimator
    for dropped in (False, True):
        with torch.no_grad():
            estimate = estimator(**batch, mask_content=dropped)
            for b in range(2):
                item = {"x_len" if key == "x_lens" else key: value[b] for key, value in batch.items()}
                expected = reference.estimate(estimator.state_dict(), params, **item, dropped=dropped)
                torch.testing.assert_close(estimate[b].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ratios", [1, 2, 4, 5])
@pytest.mark.parametrize("f0", ["off", "given", "unknown"])
def test_length_regulator_against_the_slow_reference(ratios, f0):
    """For any number of sampling ratios, with F0, with unknown F0 and without the term."""
    params = tiny_params(ratios=ratios, f0_condition=f0 != "off")
    regulator = tiny_model(params)["length_regulator"]
    content, ylens = torch.randn(2, 9, 5), torch.tensor([13, 10])
    hertz = torch.tensor([[0.0, 49, 51, 120, 333, 1099, 2000], [0, 0, 75, 80, 85, 440, 441]])
    given = hertz if f0 == "given" else None
    with torch.no_grad():
        cond = regulator(content, ylens, given)
    for b in range(2):
        pitch = None if given is None else given[b]
        expected = reference.regulate(
            regulator.state_dict(), params["length_regulator"], content[b], ylens[b], 13, pitch
        )
        torch.testing.assert_close(cond[b].double(), expected, atol=1e-5, rtol=1e-5)
    assert not cond[1, 10:].any()


@pytest.mark.parametrize("reg_loss_type", ["l1", "l2"])
@pytest.mark.parametrize("prompt_lens", [(0, 0), (3, 7), (10, 0)])
def test_loss_against_the_slow_reference(reg_loss_type, prompt_lens):
    """Both distances, over the frames between prompt and end, averaged per item and then over the batch."""
    params = tiny_params(reg_loss_type=reg_loss_type, style_as_token=True)
    model, batch = tiny_model(params), tiny_batch()
    t, z = torch.rand(2, 1, 1), torch.randn_like(batch["x"])
    with torch.no_grad():
        loss = training_loss(model, batch, torch.tensor(prompt_lens), t=t, z=z)
    weights = model["cfm"].estimator.state_dict()
    given = (batch["x"], batch["x_lens"], prompt_lens, batch["cond"], batch["style"], t, z)
    assert abs(loss - reference.loss(weights, params, *given)) <= 1e-5


@pytest.mark.parametrize("bins", [2, 30, 256])
def test_f0_bins(bins):
    """50 Hz is bin 1, 1100 Hz the last; unvoiced, negative and lower are 1, higher is the last."""
    hertz = [0.0, -3.0, 1.0, 49.0, 50.0, 60.0, 110.0, 220.0, 441.0, 700.0, 1099.0, 1100.0, 1101.0, 9000.0]
    expected = [reference.f0_bin(hz, bins) for hz in hertz]
    assert f0_to_bins(torch.tensor(hertz), bins).tolist() == expected
    assert expected[:5] == [1] * 5
    assert expected[-3:] == [bins - 1] * 3


def test_unused_parameters_are_those_without_adamw_state():
    """After a step, AdamW holds a state for exactly the parameters that it holds one for in a real run."""
    run = DATA / "run_from_seedvc"
    model = build_model(load_config(run / "config_dit_mini.yml").model_params)
    saved = torch.load(run / "DiT_epoch_00002_step_00020.pth", weights_only=True)["optimizer"]
    ylens = torch.tensor([12, 9])
    cond = model["length_regulator"](torch.randn(2, 7, 24), ylens)
    model["cfm"].eval()
    loss = model["cfm"].loss(torch.randn(2, 20, 12), ylens, torch.tensor([4, 0]), cond, torch.randn(2, 16))
    loss.backward()
    for part, state in saved:
        optimizer = torch.optim.AdamW(model[part].parameters(), lr=1e-5)
        optimizer.step()
        ours = optimizer.state_dict()["state"]
        assert ours.keys() == state["state"].keys()
        for i, tensors in ours.items():
            assert tensors["exp_avg"].shape == state["state"][i]["exp_avg"].shape


def without_gradient(model):
    return {name for name, p in model["cfm"].estimator.named_parameters() if p.grad is None}


def test_parameters_that_the_forward_never_uses_get_no_gradient():
    """None, not zero; every other parameter of a fresh model has a gradient that is not zero."""
    params = tiny_params(final_layer_type="wavenet", depth=5)
    model = build_model(params)
    training_loss(model, tiny_batch(), torch.tensor([3, 0])).backward()
    unused = {"x_embedder.bias", "x_embedder.weight_g", "x_embedder.weight_v", "cond_embedder.weight"}
    unused |= {"content_mask_embedder.weight", "skip_linear.weight", "skip_linear.bias"}
    unused |= {f"transformer.layers.{i}.skip_in_linear.{kind}" for i in range(3) for kind in ("weight", "bias")}
    assert without_gradient(model) == unused
    for name, parameter in model["cfm"].estimator.named_parameters():
        if name not in unused:
            assert parameter.grad.abs().sum() > 0, name


def test_a_dropped_step_leaves_the_style_token_without_gradient():
    """As in a real run's optimizer: `style_in` skips a dropped step, the content's path counts it."""
    model = build_model(tiny_params(style_as_token=True, class_dropout_prob=1.0))
    batch = tiny_batch()
    batch["cond"].requires_grad_()
    training_loss(model, batch, torch.tensor([3, 0])).backward()
    estimator = model["cfm"].estimator
    assert estimator.style_in.weight.grad is None
    assert estimator.style_in.bias.grad is None
    assert not estimator.cond_projection.weight.grad.any()
    assert not batch["cond"].grad.any()


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_class_dropout_is_one_draw_per_batch_in_training_only(probability):
    """Training draws one number and ignores the argument; evaluation draws none and obeys it."""
    estimator = tiny_model(tiny_params(class_dropout_prob=probability))["cfm"].estimator
    batch, dropped = tiny_batch(), probability == 1.0
    with torch.no_grad():
        before = torch.get_rng_state()
        expected = estimator(**batch, mask_content=dropped)
        other = estimator(**batch, mask_content=not dropped)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(estimator.train()(**batch, mask_content=not dropped), expected)
        after = torch.get_rng_state()
        torch.set_rng_state(before)
        torch.rand(1)
        assert torch.equal(torch.get_rng_state(), after)
    assert not torch.equal(expected, other)


def test_loss_draws_t_then_z_then_the_class_dropout():
    """The order of draws is fixed, so that a resumed run repeats them."""
    model = build_model(tiny_params(style_as_token=True, class_dropout_prob=0.5))
    batch, prompt_lens = tiny_batch(), torch.tensor([3, 0])
    dropped_once = set()
    for seed in range(8):
        torch.manual_seed(seed)
        loss = training_loss(model, batch, prompt_lens)
        torch.manual_seed(seed)
        t, z = torch.rand(2, 1, 1), torch.randn_like(batch["x"])
        dropped = bool(torch.rand(1) < 0.5)
        model["cfm"].estimator.class_dropout_prob = float(dropped)
        assert torch.equal(training_loss(model, batch, prompt_lens, t=t, z=z), loss)
        model["cfm"].estimator.class_dropout_prob = 0.5
        dropped_once.add(dropped)
    assert dropped_once == {False, True}


def test_the_wavenets_dropout_acts_in_training_only():
    """p_dropout changes a training estimate, and nothing in evaluation."""
    params = tiny_params(final_layer_type="wavenet")
    without, batch = tiny_model(params), tiny_batch()
    params["wavenet"]["p_dropout"] = 0.5
    model = build_model(params).eval()
    model.load_state_dict(without.state_dict())
    with torch.no_grad():
        expected = without["cfm"].estimator(**batch)
        assert torch.equal(model["cfm"].estimator(**batch), expected)
        assert not torch.allclose(model.train()["cfm"].estimator(**batch), expected, atol=1e-3)


def test_the_prompt_and_its_frames_reach_the_estimator(monkeypatch):
    """The prompt input holds x1 in its frames only; the noisy mel is zero there; t is one per item."""
    model, batch = build_model(tiny_params()), tiny_batch()
    calls = []
    monkeypatch.setattr(model["cfm"].estimator, "forward", lambda *a: calls.append(a) or torch.zeros(2, 7, 11))
    t, z = torch.tensor([[[0.25]], [[1.0]]]), torch.randn(2, 7, 11)
    training_loss(model, batch, torch.tensor([4, 0]), t=t, z=z)
    y, prompt_x, x_lens, times = calls[0][:4]
    assert torch.equal(prompt_x[0, :, :4], batch["x"][0, :, :4])
    assert not prompt_x[0, :, 4:].any()
    assert not prompt_x[1].any()
    assert not y[0, :, :4].any()
    torch.testing.assert_close(y[0, :, 4:], (0.75 * z + 0.25 * batch["x"])[0, :, 4:])
    torch.testing.assert_close(y[1], batch["x"][1], atol=1e-5, rtol=0)
    assert torch.equal(times, torch.tensor([0.25, 1.0]))
    assert torch.equal(x_lens, batch["x_lens"])


def scrambled(batch, at):
    changed = {key: value.clone() for key, value in batch.items()}
    for key, frames in (("x", 2), ("prompt_x", 2), ("cond", 1)):
        changed[key].select(0, 1).narrow(frames - 1, at, 11 - at).normal_()
    return changed


@pytest.mark.parametrize("tokens", [False, True])
def test_padding_does_not_reach_the_valid_frames(tokens):
    """With the MLP head, what lies beyond x_len changes neither the estimate before it nor the loss."""
    model = tiny_model(tiny_params(style_as_token=tokens, time_as_token=tokens, long_skip_connection=True))
    batch = tiny_batch()
    other = scrambled(batch, 8)
    z, t = torch.randn(2, 7, 11), torch.rand(2)
    with torch.no_grad():
        a, b = (model["cfm"].estimator(**each) for each in (batch, other))
        losses = [training_loss(model, each, torch.tensor([2, 3]), t=t, z=z) for each in (batch, other)]
    torch.testing.assert_close(a[0], b[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(a[1, :, :8], b[1, :, :8], atol=1e-6, rtol=0)
    assert not torch.allclose(a[1, :, 8:], b[1, :, 8:], atol=1e-3)
    torch.testing.assert_close(*losses, atol=1e-6, rtol=0)


def test_padding_reaches_only_the_last_frames_through_the_wavenet():
    """Its first layer reads unmasked frames: padding reaches half a kernel per layer back, no further."""
    model = tiny_model(tiny_params(final_layer_type="wavenet", kernel_size=3))
    batch = tiny_batch()
    with torch.no_grad():
        a, b = (model["cfm"].estimator(**each) for each in (batch, scrambled(batch, 8)))
    torch.testing.assert_close(a[1, :, :6], b[1, :, :6], atol=1e-6, rtol=0)
    assert not torch.allclose(a[1, :, 7], b[1, :, 7], atol=1e-4)


@pytest.mark.parametrize("tokens", [False, True])
def test_an_item_is_estimated_alike_alone_and_in_a_batch(tokens):
    """Batching with longer items changes nothing for a shorter one."""
    model = tiny_model(tiny_params(style_as_token=tokens, time_as_token=tokens))
    batch = tiny_batch(frames=11, lens=(11, 8, 1))
    with torch.no_grad():
        together = model["cfm"].estimator(**batch)
        for b, frames in enumerate((11, 8, 1)):
            item = {key: value[b : b + 1] for key, value in batch.items()}
            item |= {"x": item["x"][..., :frames], "prompt_x": item["prompt_x"][..., :frames]}
            item["cond"] = item["cond"][:, :frames]
            alone = model["cfm"].estimator(**item)
            torch.testing.assert_close(together[b : b + 1, :, :frames], alone, atol=1e-6, rtol=0)


def test_an_item_that_is_all_prompt_is_left_out_of_the_average():
    """Its loss has no frames: the batch's loss is that of the others, and gradients stay finite."""
    model, batch = build_model(tiny_params()), tiny_batch()
    t, z = torch.rand(2), torch.randn(2, 7, 11)
    loss = training_loss(model, batch, torch.tensor([3, 8]), t=t, z=z)
    first = {key: value[:1] for key, value in batch.items()}
    alone = training_loss(model, first, torch.tensor([3]), t=t[:1], z=z[:1])
    torch.testing.assert_close(loss, alone)
    nothing = training_loss(model, batch, torch.tensor([11, 8]), t=t, z=z)
    assert nothing == 0
    (loss + nothing).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("head", ["mlp", "wavenet"])
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_the_shortest_clips_train(head, frames):
    """A batch of one to three frames, shorter than the WaveNet's padding, matches the slow reference."""
    params = tiny_params(final_layer_type=head, kernel_size=9)
    model, batch = tiny_model(params), tiny_batch(frames=frames, lens=(frames, 1, frames))
    t, z = torch.rand(3), torch.randn(3, 7, frames)
    loss = training_loss(model, batch, torch.tensor([0, 0, 0]), t=t, z=z)
    loss.backward()
    given = (batch["x"], batch["x_lens"], (0, 0, 0), batch["cond"], batch["style"], t, z)
    with torch.no_grad():
        expected = reference.loss(model["cfm"].estimator.state_dict(), params, *given)
    assert abs(loss.item() - expected) <= 1e-5
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_clips_longer_than_the_checkpoints_positions_are_estimated():
    """`input_pos` of 16384 entries is no limit."""
    frames = 16384 + 3
    model = tiny_model(tiny_params(depth=1, num_heads=1))
    with torch.no_grad():
        estimate = model["cfm"].estimator(**tiny_batch(frames=frames, lens=(frames,)))
    assert estimate.shape == (1, 7, frames)
    assert estimate.isfinite().all()


@pytest.mark.parametrize("head", ["mlp", "wavenet"])
def test_mixed_precision_gives_a_float32_loss_near_the_full_one(head):
    """Under bfloat16 autocast no operation mixes types, and the loss is that of float32 to three digits."""
    model, batch = tiny_model(tiny_params(final_layer_type=head)), tiny_batch()
    given = {"t": torch.rand(2), "z": torch.randn(2, 7, 11)}
    full = training_loss(model, batch, torch.tensor([3, 0]), **given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = training_loss(model, batch, torch.tensor([3, 0]), **given)
    mixed.backward()
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, full, rtol=5e-3, atol=0)


def test_a_bfloat16_model_gives_bfloat16_estimates():
    """A model that was cast as a whole still attends in one type, near the full estimate."""
    model, batch = tiny_model(tiny_params(style_as_token=True)), tiny_batch()
    with torch.no_grad():
        full = model["cfm"].estimator(**batch)
        half = {key: value if key == "x_lens" else value.bfloat16() for key, value in batch.items()}
        estimate = model.bfloat16()["cfm"].estimator(**half)
    assert estimate.dtype == torch.bfloat16
    assert (estimate - full).abs().max() < 0.1 * full.abs().max()


def test_prompt_lengths_are_uniform_or_none():
    """floor(U·(len - 1)): at most len - 2 (0 for one frame), and none for an extra tenth."""
    lens = torch.tensor([1, 2, 5, 101]).repeat(20000)
    drawn = draw_prompt_lens(lens)
    assert drawn.dtype == torch.int64
    for length, most in ((1, 0), (2, 0), (5, 3), (101, 99)):
        mine = drawn[lens == length]
        assert (mine.min(), mine.max()) == (0, most)
        none = 0.1 + 0.9 / max(length - 1, 1)
        assert abs((mine == 0).float().mean() - none) < 0.015
    positive = drawn[(lens == 101) & (drawn > 0)].float()
    assert abs(positive.mean() - 50) < 1.5
    assert abs(positive.std() - 99 / 12**0.5) < 1.5


def test_prompt_lengths_take_two_draws_of_the_batch():
    """First the lengths, then which of them are none: the order that a resumed run repeats."""
    lens = torch.tensor([90, 80, 7, 7, 60, 50])
    for seed in range(10):
        torch.manual_seed(seed)
        drawn, after = draw_prompt_lens(lens), torch.get_rng_state()
        torch.manual_seed(seed)
        share, none = torch.rand(6), torch.rand(6)
        expected = [0 if n < 0.1 else int(u * (x - 1)) for u, n, x in zip(share, none, lens, strict=True)]
        assert drawn.tolist() == expected
        assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("head", ["mlp", "wavenet"])
def test_a_fresh_model_learns(head):
    """From its own initialisation, it learns what content says about a mel: the loss halves in 120 steps."""
    model = build_model(tiny_params(final_layer_type=head, style_as_token=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    content, style = torch.randn(4, 6, 5), torch.randn(4, 6)
    mel = 2 * (content @ torch.randn(5, 7)).repeat_interleave(2, dim=1).transpose(1, 2)
    lens, none = torch.tensor([12, 12, 9, 7]), torch.zeros(4, dtype=torch.int64)
    losses = []
    for _ in range(120):
        optimizer.zero_grad()
        loss = model["cfm"].loss(mel, lens, none, model["length_regulator"](content, lens), style)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-8:]) < 0.5 * sum(losses[:8])


def test_a_fresh_model_starts_near_identity_modulation():
    """Norms start around scale 1 and shift 0, weight norm at its direction's own length, estimates small."""
    model = build_model(tiny_params(final_layer_type="wavenet"))
    for name, module in model.named_modules():
        if name.endswith("project_layer"):
            assert torch.equal(module.bias, torch.cat([torch.ones(16), torch.zeros(16)]))
            assert 0 < module.weight.std() < 0.04
        if hasattr(module, "weight_g"):
            norm = module.weight_v.flatten(1).norm(dim=1)
            torch.testing.assert_close(module.weight_g.flatten(), norm)
            assert norm.min() > 0
    with torch.no_grad():
        assert model["cfm"].eval().estimator(**tiny_batch()).abs().max() < 1


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_weight_norm_equals_torchs(kind):
    """Outputs and gradients are those of torch's parametrization."""
    theirs = nn.Linear(5, 4) if kind == "linear" else nn.Conv1d(5, 4, 3, dilation=2)
    ours = WeightNormLinear(5, 4) if kind == "linear" else WeightNormConv1d(5, 4, 3, dilation=2)
    nn.utils.parametrizations.weight_norm(theirs)
    with torch.no_grad():
        ours.weight_g.uniform_(0.5, 2)
    original = theirs.parametrizations.weight
    pairs = [
        (theirs.bias, ours.bias),
        (original.original0, ours.weight_g),
        (original.original1, ours.weight_v),
    ]
    with torch.no_grad():
        for a, b in pairs:
            a.copy_(b)
    x = torch.randn(3, 5) if kind == "linear" else torch.randn(3, 5, 9)
    torch.testing.assert_close(ours(x), theirs(x))
    for module in (ours, theirs):
        module(x).square().sum().backward()
    for a, b in pairs:
        torch.testing.assert_close(a.grad, b.grad)


class TestSample:
    """The sampler beyond the golden's four steps."""

    def given(self, model, **changes):
        """Arguments of a small sampling."""
        batch = tiny_batch()
        prompt = torch.randn(2, 7, 3)
        given = {"cond": batch["cond"], "x_lens": batch["x_lens"], "prompt": prompt, "style": batch["style"]}
        return given | {"steps": 2, "cfg_rate": 0.5, "z": torch.randn(2, 7, 11)} | changes

    def test_restores_every_modules_mode(self):
        """Sampling between training steps leaves training, and a frozen part's evaluation, as they were."""
        model = build_model(tiny_params(class_dropout_prob=0.5))["cfm"]
        model.estimator.transformer.eval()
        before = {name: module.training for name, module in model.named_modules()}
        model.sample(**self.given(model))
        assert {name: module.training for name, module in model.named_modules()} == before

    def test_restores_the_modes_after_a_failure(self):
        """An error inside a step does not leave the model in evaluation mode."""
        model = build_model(tiny_params())["cfm"]
        with pytest.raises(RuntimeError):
            model.sample(**self.given(model, style=torch.randn(2, 5)))
        assert all(module.training for module in model.modules())

    @pytest.mark.parametrize("cfg_rate", [0.0, 0.7])
    def test_follows_euler_steps(self, cfg_rate):
        """Each step adds the guided estimate at i/n; the prompt's frames stay zero, the noise unchanged."""
        model = tiny_model(tiny_params())["cfm"]
        given = self.given(model, steps=3, cfg_rate=cfg_rate)
        noise = given["z"].clone()
        sampled = model.sample(**given)
        assert torch.equal(given["z"], noise)
        assert not sampled[..., :3].any()
        assert not sampled.requires_grad
        prompt_x = torch.cat([given["prompt"], torch.zeros(2, 7, 8)], dim=-1)
        keep = torch.cat([torch.zeros(3), torch.ones(8)])
        x, lens, style, cond = noise * keep, given["x_lens"], given["style"], given["cond"]
        for i in range(3):
            t = torch.full((2,), i / 3)
            with torch.no_grad():
                flow = model.estimator(x, prompt_x, lens, t, style, cond)
                blind = model.estimator(x, 0 * prompt_x, lens, t, 0 * style, 0 * cond)
            x = (x + (flow + cfg_rate * (flow - blind)) / 3) * keep
        torch.testing.assert_close(sampled, x, atol=1e-5, rtol=0)

    def test_draws_its_noise(self):
        """Without z, the noise comes from the global generator."""
        model = tiny_model(tiny_params())["cfm"]
        torch.manual_seed(5)
        z = torch.randn(2, 7, 11)
        torch.manual_seed(5)
        given = self.given(model)
        torch.manual_seed(5)
        drawn = model.sample(**given | {"z": None})
        assert torch.equal(drawn, model.sample(**given | {"z": z}))

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"steps": 0}, "at least 1 step, not 0"),
            ({"prompt": torch.zeros(2, 7, 12)}, "the prompt has 12 frames, more than the 11 to sample"),
        ],
    )
    def test_refuses_what_cannot_be_sampled(self, changes, sentence):
        """No steps, or a prompt beyond the end, is an error before any work."""
        model = build_model(tiny_params())["cfm"]
        with pytest.raises(ValueError, match=sentence):
            model.sample(**self.given(model, **changes))
