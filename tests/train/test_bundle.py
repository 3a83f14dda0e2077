"""A bundle is all that a service needs, whole or recognisably not, and only of what the service would run rightly."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pretrained_models
import pytest
import runs
import torch
import yaml
from click.testing import CliRunner, Result
from deployed import LARGE, SMALL, TINY, exported, small

from seedvc_ckpt import CheckpointError, CheckpointStore, ExportError
from seedvc_ckpt.bundle import CARD, SUMS, WEIGHTS, ServedConfig, write_bundle
from seedvc_ckpt.cli import commands
from seedvc_ckpt.cli.model import describe
from seedvc_ckpt.file import CheckpointFile
from seedvc_ckpt.storage import open_storage
from seedvc_ckpt.testing import Call, FaultyStorage
from seedvc_train.model import build_model

NAMES = sorted([WEIGHTS, LARGE, CARD, SUMS])


def net(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    return {name: module.state_dict() for name, module in build_model(small(LARGE)["model_params"]).items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small model with pitch, at steps 500 and 1000, with its YAML and a score."""
    folder = tmp_path_factory.mktemp("made")
    exported(folder, small(LARGE), net(1), data="0123abcd", note="a | b")
    with CheckpointStore(folder / "run") as store:
        settings = store.inspect().manifest.settings  # type: ignore[union-attr]
        state = {"net": net(2), "optimizer": [torch.ones(500)]}
        state["ema"] = {module: [[t for name, t in tensors.items() if "input_pos" not in name]]
                        for module, tensors in net(3).items()}  # fmt: skip
        store.save(state, 1000, 4, metrics={"loss": 0.8125}, settings=settings)
        store.add_scores(1000, {"val_loss": 0.75}, on="the validation set")
    (folder / "run" / LARGE).write_text(yaml.safe_dump(small(LARGE)))
    return folder / "run"


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def export(*arguments: Any) -> Result:
    return CliRunner().invoke(commands, ["export", *map(str, arguments)], standalone_mode=False)


def bundle(run: Path, folder: Any, *options: Any) -> Result:
    done = export(run, "--bundle", folder, *options)
    assert done.exit_code == 0, done.exception or done.output
    return done


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_bundle_has_all_that_a_service_needs(run: Path, tmp_path: Path) -> None:
    """Weights, YAML, card and checksums, which sha256sum accepts; and the command that starts the service."""
    folder = tmp_path / "to serve"
    done = bundle(run, folder)
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) == NAMES
    checked = subprocess.run(["sha256sum", "-c", SUMS], cwd=folder, capture_output=True, text=True, check=True)
    assert checked.stdout.splitlines() == [f"{name}: OK" for name in NAMES if name != SUMS]
    assert checked.stderr == ""
    assert (folder / LARGE).read_bytes() == (run / LARGE).read_bytes()
    given, written = CheckpointStore(run).load()["net"], torch.load(folder / WEIGHTS, weights_only=True)["net"]
    assert all(torch.equal(written[module][name], value) for module in given for name, value in given[module].items())
    assert f"python app_svc.py --checkpoint '{folder}/{WEIGHTS}' --config '{folder}/{LARGE}'" in done.stdout
    judged = CliRunner().invoke(commands, ["check-deploy", str(folder / WEIGHTS), str(folder / LARGE)])
    assert judged.exit_code == 0, judged.stdout


def test_the_card_tells_where_the_weights_come_from(run: Path, tmp_path: Path) -> None:
    """Run, step, epoch, checkpoint, data, losses, scores, settings, versions and the command; no time."""
    bundle(run, tmp_path / "out")
    card = (tmp_path / "out" / CARD).read_text()
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", card, re.MULTILINE))
    assert card.startswith("# run, step 1000\n")
    assert rows["run"] == "run"
    assert (rows["step"], rows["epoch"]) == ("1000", "4")
    assert rows["checkpoint"] == "DiT_epoch_00004_step_01000.pth"
    assert rows["digest of the data"] == "0123abcd"
    assert (rows["loss"], rows["val_loss"]) == ("0.8125", "0.75")
    assert rows["torch"] == torch.__version__
    assert rows["exported by"].startswith("seedvc-ckpt ")
    assert rows["preprocess_params.sr"] == "44100"
    assert rows["preprocess_params.spect_params.fmax"] == "none"
    assert rows["weights"] == "as trained (`net`)"
    assert r"| note | a \| b |" in card
    assert f"python app_svc.py --checkpoint {WEIGHTS} --config {LARGE}" in card
    assert not re.search(r"20\d\d-\d\d|\d\d:\d\d", card)


def test_the_same_input_gives_the_same_bundle(run: Path, tmp_path: Path) -> None:
    """Two bundles, also one on another kind of storage, are equal byte for byte."""
    bundle(run, tmp_path / "one")
    bundle(run, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    bundle(run, "memory://bundles/three")
    fs = fsspec.filesystem("memory")
    there = {name: fs.cat_file(f"/bundles/three/{name}") for name in NAMES}
    assert there == {name: (tmp_path / "one" / name).read_bytes() for name in NAMES}


def test_step_type_and_weights_are_chosen(run: Path, tmp_path: Path) -> None:
    """--step, --dtype and --weights work as for a single file, and the card says so."""
    bundle(run, tmp_path / "a", "--step", 500, "--dtype", "float16")
    card = (tmp_path / "a" / CARD).read_text()
    assert card.startswith("# run, step 500\n")
    assert "float16 |" in card
    assert "loss" not in card
    bundle(run, tmp_path / "b", "--weights", "ema")
    assert "averaged (`ema`)" in (tmp_path / "b" / CARD).read_text()
    written = torch.load(tmp_path / "b" / WEIGHTS, weights_only=True)["net"]
    assert torch.equal(written["cfm"]["estimator.skip_linear.bias"], net(3)["cfm"]["estimator.skip_linear.bias"])
    best = bundle(run, tmp_path / "c", "--best", "val_loss")
    assert "step_01000" in best.stdout


@pytest.mark.parametrize("there", [WEIGHTS, LARGE, CARD, SUMS])
def test_what_is_there_is_replaced_only_when_forced(there: str, run: Path, tmp_path: Path) -> None:
    """One file of that name in the folder, and nothing is written; --force writes all; other files stay."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / there).write_text("older")
    (folder / "other.txt").write_text("mine")
    done = export(run, "--bundle", folder)
    assert isinstance(done.exception, CheckpointError)
    assert "--force" in str(done.exception)
    assert contents(folder) == {there: b"older", "other.txt": b"mine"}
    bundle(run, folder, "--force")
    subprocess.run(["sha256sum", "--quiet", "-c", SUMS], cwd=folder, check=True)
    assert (folder / "other.txt").read_text() == "mine"


def test_a_bundle_in_the_run_itself_leaves_its_config(run: Path) -> None:
    """The run's folder may be the bundle: the YAML that is there already is the one that is meant."""
    bundle(run, run)
    subprocess.run(["sha256sum", "--quiet", "-c", SUMS], cwd=run, check=True)
    found = CliRunner().invoke(commands, ["doctor", str(run)]).stdout
    assert CARD not in found


def served(folder: Path) -> ServedConfig:
    return describe(LARGE, (folder / LARGE).read_bytes())


@pytest.mark.parametrize("when", ["before", "midway", "after"])
@pytest.mark.parametrize("older", [False, True])
def test_an_interrupted_bundle_is_not_taken_for_a_whole_one(when: Any, older: bool, run: Path, tmp_path: Path) -> None:
    """Stopped at any call, a folder with checksums is whole: sha256sum finds every file as it should be."""
    source, other = CheckpointStore(run).file(1000), CheckpointStore(run).file(500)
    number, finished = 0, False
    while not finished:
        folder = tmp_path / str(number)
        if older:
            write_bundle(other, open_storage(folder), served(run))
            before = contents(folder)
        stopped: list[Call] = []

        def faults(call: Call, at: int = number, seen: list[Call] = stopped) -> Any:
            if call.number == at:
                seen.append(call)
                return when
            return None

        try:
            write_bundle(source, FaultyStorage(open_storage(folder), faults), served(run), overwrite=older)
            finished = not stopped
        except CheckpointError:
            pass
        if (folder / SUMS).exists():
            subprocess.run(["sha256sum", "--quiet", "-c", SUMS], cwd=folder, check=True)
            if older and stopped and contents(folder) != before:  # then it is all of the new one
                assert "step 1000" in (folder / CARD).read_text()
        number += 1
    assert number > 12


def wrong_configs() -> Iterator[Any]:
    def at(value: Any, *place: str) -> dict[str, Any]:
        config = small(LARGE)
        section = config
        for part in place[:-1]:
            section = section[part]
        section[place[-1]] = value
        return config

    yield pytest.param(small(TINY), "random values", id="another model")
    yield pytest.param(at(32000, "preprocess_params", "sr"), "sr 44100", id="sample rate")
    yield pytest.param(at("openai/whisper-base", "model_params", "speech_tokenizer", "name"), "512", id="tokenizer")


@pytest.mark.parametrize(("config", "words"), list(wrong_configs()))
def test_contradictions_are_refused(config: Any, words: str, run: Path, tmp_path: Path) -> None:
    """A config that the service would run otherwise than it was trained is refused, saying why; nothing is written."""
    (tmp_path / "other.yml").write_text(yaml.safe_dump(config))
    done = export(run, "--bundle", tmp_path / "out", "--config", tmp_path / "other.yml")
    assert isinstance(done.exception, CheckpointError)
    assert words in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_refused(run: Path, tmp_path: Path) -> None:
    """A checkpoint with NaN in it makes no bundle, and leaves an older bundle whole."""
    bundle(run, tmp_path / "out")
    before = contents(tmp_path / "out")
    bad = net(2)
    bad["cfm"]["estimator.skip_linear.bias"][0] = torch.nan
    with CheckpointStore(run) as store:
        store.save({"net": bad}, 2000)
    done = export(run, "--bundle", tmp_path / "out", "--force")
    assert "not finite" in str(done.exception)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("names", [[], ["a.yml", "b.yaml"]])
def test_the_config_is_asked_for_where_it_is_not_clear(names: list[str], run: Path, tmp_path: Path) -> None:
    """A run's folder with no YAML or several: the command asks for --config."""
    for name in names:
        shutil.copy(run / LARGE, run / name)
    (run / LARGE).unlink()
    done = CliRunner().invoke(commands, ["export", str(run), "--bundle", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "--config" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_config_that_could_not_be_listed_is_refused(run: Path, tmp_path: Path) -> None:
    """A YAML with a name that sha256sum would need escaped, or that is one of the bundle's own, is refused."""
    for name in ("a\\b.yml", "a\nb.yml", CARD):
        served_as = ServedConfig(name, b"", served(run).values, served(run).expected)
        with pytest.raises(CheckpointError, match="rename"):
            write_bundle(CheckpointStore(run).file(), open_storage(tmp_path / "out"), served_as)


def test_one_target_is_enough(run: Path, tmp_path: Path) -> None:
    """--out and --bundle together are a wrong call."""
    done = CliRunner().invoke(commands, ["export", str(run), "--bundle", str(tmp_path), "--out", "x.pth"])
    assert done.exit_code == 2


def test_a_run_of_seedvcs_own_trainer_is_told_of(tmp_path: Path) -> None:
    """Where the checkpoint says little, the card says that it does not know."""
    with CheckpointStore(tmp_path / "run") as store:
        store.save({"net": net(1)}, 3)
    torch.save({"net": net(1), "iters": 7, "epoch": 2}, tmp_path / "run" / "DiT_epoch_00002_step_00007.pth")
    (tmp_path / LARGE).write_text(yaml.safe_dump(small(LARGE)))
    bundle(tmp_path / "run", tmp_path / "out", "--config", tmp_path / LARGE)
    card = (tmp_path / "out" / CARD).read_text()
    assert "| step | 7 |" in card
    assert "| saved by | another program |" in card
    assert "| digest of the data | not recorded |" in card
    assert hashlib.sha256(card.encode()).hexdigest() in (tmp_path / "out" / SUMS).read_text()
    assert CheckpointFile.at(tmp_path / "out" / WEIGHTS).manifest().step == 7  # type: ignore[union-attr]


def test_the_config_may_be_a_url(run: Path, tmp_path: Path) -> None:
    """--config takes a URL, for a bundle and for a single file, and the copy has its bytes."""
    fsspec.filesystem("memory").pipe_file(f"/configs/{LARGE}", (run / LARGE).read_bytes())
    (run / LARGE).unlink()
    bundle(run, tmp_path / "out", "--config", f"memory://configs/{LARGE}")
    assert export(run, "--config", f"memory://configs/{LARGE}").exit_code == 0
    assert (run / LARGE).read_bytes() == (tmp_path / "out" / LARGE).read_bytes()


@pytest.mark.parametrize("preset", [TINY, SMALL, LARGE])
def test_a_run_agrees_with_its_own_config(preset: str, recordings: Path, tmp_path: Path) -> None:
    """What `seedvc-train` keeps of a config never contradicts that config: its built-in features alone are refused."""
    (tmp_path / preset).write_text(yaml.safe_dump(small(preset)))
    done = runs.train(
        recordings, tmp_path, config=tmp_path / preset, max_steps=1, batch_size=1, features="builtin", sync_save=True
    )
    assert done.exit_code == 0, done.exception or done.output
    refused = export(tmp_path / "run", "--bundle", tmp_path / "out")
    assert isinstance(refused.exception, ExportError)
    (reason,) = refused.exception.differences
    assert "built-in features" in reason
    judged = CliRunner().invoke(commands, ["check-deploy", str(tmp_path / "run" / WEIGHTS), str(tmp_path / preset)])
    assert judged.exit_code == 1
    assert "1 problem\n" in judged.stdout


def on_encoders(preset: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """A small preset for small encoders of its own kind, and the options to train with them."""
    config = small(preset)
    params = config["model_params"]
    if preset == TINY:
        encoder, dim = pretrained_models.save_xlsr(folder / "encoder"), pretrained_models.XLSR_DIM
        params["speech_tokenizer"]["output_layer"] = 2
    else:
        encoder, dim = pretrained_models.save_whisper(folder / "encoder", window=30), pretrained_models.WHISPER_DIM
    params["speech_tokenizer"]["name"] = str(encoder)
    params["length_regulator"]["in_channels"] = dim
    (folder / preset).write_text(yaml.safe_dump(config))
    return folder / preset, {"campplus": pretrained_models.save_campplus(folder / "campplus.bin")}


@pytest.mark.parametrize("preset", [TINY, SMALL, LARGE])
def test_a_run_on_encoders_is_bundled_and_fits_no_other_preset(
    preset: str, recordings: Path, tmp_path: Path, full: bool
) -> None:
    """Trained, exported and checked by the commands: the recommended config with pitch, the two others likewise."""
    if preset != LARGE and not full:
        pytest.skip("the recommended preset is enough; --full trains all three")
    config, options = on_encoders(preset, tmp_path)
    done = runs.train(recordings, tmp_path, config=config, max_steps=2, batch_size=1, feature_cache="off", **options)
    assert done.exit_code == 0, done.exception or done.output
    folder = tmp_path / "out"
    bundle(tmp_path / "run", folder)
    judge = CliRunner()
    fits = judge.invoke(commands, ["check-deploy", str(folder / WEIGHTS), str(folder / preset)])
    assert fits.exit_code == 0, fits.stdout
    for other in {TINY, SMALL, LARGE} - {preset}:
        (tmp_path / "other").mkdir(exist_ok=True)
        path, _ = on_encoders(other, tmp_path / "other")
        judged = judge.invoke(commands, ["check-deploy", str(folder / WEIGHTS), str(path)])
        told = " ".join(judged.stdout.split())
        assert judged.exit_code == 1
        assert "random values" in told
        assert ("44100" in told) == (LARGE in (preset, other))
        assert ("pitch" in told) == (LARGE in (preset, other))
