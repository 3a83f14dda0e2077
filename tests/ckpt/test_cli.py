"""The command line: answers, exit codes, and never a traceback."""

import json
import os
import pty
import random
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

from seedvc_ckpt import SEED_VC, CheckpointError, CheckpointStore
from seedvc_ckpt.cli import commands, main

COMMANDS = [
    "ls",
    "latest",
    "show",
    "verify",
    "diff",
    "prune",
    "pin",
    "unpin",
    "rewind",
    "gc",
    "doctor",
    "copy",
    "export",
    "check-deploy",
]
FILE = "DiT_epoch_00002_step_00020.pth"
CONFIG = "config_dit_mini.yml"


@pytest.fixture
def invoke():
    """A function that runs a command in this process and returns its result; library errors are raised."""

    def call(*arguments):
        result = CliRunner().invoke(commands, list(map(str, arguments)), catch_exceptions=True)
        if isinstance(result.exception, Exception):
            raise result.exception
        return result

    return call


@pytest.fixture
def tool(monkeypatch, capsys):
    """A function that runs the whole tool in this process, error handling included; faster than a process each."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["seedvc-ckpt", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, ended.value.code or 0, shown.out, shown.err)

    return call


@pytest.fixture
def golden(data, tmp_path):
    """A copy of the run that Seed-VC's own trainer wrote."""
    return Path(shutil.copytree(data / "run_from_seedvc", tmp_path / "golden"))


def answer(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


# --- the commands ---------------------------------------------------------------------------------------------------


def test_ls_lists_oldest_first(invoke, run, filled, state):
    """One line for each checkpoint, ascending, with a total; marks are explained."""
    store = filled(run, 500, 123456)
    lines = invoke("ls", run).stdout.splitlines()
    assert lines[0].split() == ["step", "epoch", "size", "saved", "name"]
    assert [line.split()[0] for line in lines[1:3]] == ["500", "123456"]
    assert re.fullmatch(r"2 checkpoints, [0-9.]+ kB", lines[3])
    (run / f"{store.latest().name}.pin").touch()
    shutil.copy(run / SEED_VC.format(500), run / SEED_VC.format(500, 1))
    marked = invoke("ls", run).stdout.splitlines()
    assert [line.split()[-2] for line in marked[1:4]] == ["=", "=", "P"]
    assert marked[4].endswith("; P: pinned; =: several of this step")


def test_ls_and_latest_as_json_are_the_infos(invoke, run, filled):
    """--json gives the fields of CheckpointInfo, and nothing else is printed."""
    store = filled(run, 500, 1000)
    fields = [{**vars(info), "modified": info.modified.isoformat()} for info in store.list()]
    assert answer(invoke("ls", run, "--json")) == fields
    assert answer(invoke("latest", run, "--json")) == fields[-1]
    assert answer(invoke("ls", run, "--json", "--pattern", "x{step}")) == []


def test_latest_prints_a_path_to_use(invoke, run, filled):
    """The path of the newest is printed alone; without one the exit code is 1."""
    name = filled(run, 500, 1000).latest().name
    assert invoke("latest", f"{run}/").stdout == f"{run}/{name}\n"
    none = invoke("latest", run, "--pattern", "x{step}")
    assert (none.exit_code, none.stdout) == (1, "")
    assert "no checkpoint named like x{step}" in none.stderr
    assert json.loads(invoke("latest", run, "--pattern", "x{step}", "--json").stdout) is None


def test_memory_runs_are_runs(invoke, state):
    """A URL is a RUN like any folder."""
    CheckpointStore("memory://cli/run").save(state(), 7)
    assert invoke("latest", "memory://cli/run").stdout == f"memory://cli/run/{SEED_VC.format(7)}\n"
    assert answer(invoke("show", "memory://cli/run", "--json"))["manifest"]["step"] == 7
    assert invoke("verify", f"memory://cli/run/{SEED_VC.format(7)}").exit_code == 0


def test_show_tells_what_is_inside(invoke, run, filled, golden):
    """Manifest, keys, every tensor, and every global that a pickle asks for, as text and as JSON."""
    filled(run, 500)
    text = invoke("show", run).stdout
    assert "step           500" in text
    assert "loss 1" in text
    assert re.search(r"^net +1 +2\.4 kB", text, re.MULTILINE)
    assert "net['cfm']['weight']  float32  600" in invoke("show", run, "--tensors").stdout
    document = answer(invoke("show", run, "--step", 500, "--json"))
    assert document["keys"] == ["net", "iters"]
    assert document["values"] == {"iters": 500}
    assert document["tensors"]["net['cfm']['weight']"]["shape"] == [600]
    assert "no manifest" in invoke("show", golden / FILE).stdout
    CheckpointStore(run).save({"x": 1}, 600, settings={"preprocess_params.sr": 44100, "features": "builtin"})
    text = invoke("show", run).stdout
    assert re.search(r"settings +preprocess_params.sr: 44100\n +features: builtin\n", text)
    assert "torch._utils._rebuild_tensor_v2" in answer(invoke("show", golden, "--globals", "--json"))
    torch.save({"x": os.path.join}, run / "odd.pth")
    assert "posixpath.join" in invoke("show", run / "odd.pth", "--globals").stdout


def test_verify_names_the_damage(invoke, run, filled, damage):
    """Exit 0 when every byte is right, 1 with the tensor's name when not; --all looks at all."""
    filled(run, 0, 500)
    assert invoke("verify", run, "--all").exit_code == 0
    damage(run / SEED_VC.format(0))
    assert invoke("verify", run).exit_code == 0
    bad = invoke("verify", run, "--step", 0)
    assert (bad.exit_code, "DAMAGED" in bad.stdout, "weight" in bad.stdout) == (1, True, True)
    document = invoke("verify", run, "--all", "--json")
    assert document.exit_code == 1
    assert [item["intact"] for item in json.loads(document.stdout)] == [False, True]
    assert invoke("verify", run, "--all", "--pattern", "x{step}").exit_code == 0
    torch.save({"x": os.path.join}, run / "odd.pth")
    assert "REFUSED" in invoke("verify", run / "odd.pth").stdout


def test_diff_compares_values(invoke, run, filled, state, tmp_path):
    """Exit 0 for equal values (manifests aside), 1 with what differs."""
    filled(run, 500)
    filled(tmp_path / "other", 500)
    filled(tmp_path / "third", 501)
    same = invoke("diff", run, tmp_path / "other")
    assert (same.exit_code, same.stdout.startswith("no difference")) == (0, True)
    different = invoke("diff", run, tmp_path / "third")
    assert different.exit_code == 1
    assert "weight" in different.stdout
    document = invoke("diff", run, tmp_path / "third" / SEED_VC.format(501), "--json")
    assert {item["path"] for item in json.loads(document.stdout)["differences"]} == {
        "net['cfm']['weight']",
        "iters",
    }


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (["--keep-last", 2], [3, 4]),
        (["--keep-every", 2], [2, 4]),
        (["--keep-best", "loss"], [1, 4]),
        (["--keep-best", "loss:2"], [1, 2, 4]),
        (["--keep-best", "loss:2:max"], [3, 4]),
        (["--keep-best", "loss:max"], [4]),
        (["--keep-within", "7d"], [1, 2, 3, 4]),
        (["--keep-within", f"{'9' * 30}w"], [1, 2, 3, 4]),
        (["--keep-last", "9" * 30], [1, 2, 3, 4]),
        (["--keep-last", 1, "--keep-every", 3], [3, 4]),
    ],
)
def test_prune_keeps_by_its_rules(options, left, invoke, run, state):
    """Each option is a rule; --dry-run prints the same plan and deletes nothing; why each stays is told."""
    store = CheckpointStore(run)
    for step in range(1, 5):
        store.save(state(), step, metrics={"loss": step})
    dry = answer(invoke("prune", run, *options, "--dry-run", "--json"))
    assert len(store.list()) == 4
    text = invoke("prune", run, *options).stdout
    assert [info.step for info in store.list()] == left == [item["step"] for item in dry["keep"]]
    assert all(item["reasons"] for item in dry["keep"])
    assert f"{len(left)} kept, {4 - len(left)} removed" in text


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--dry-run"],
        ["--keep-last", "0"],
        ["--keep-last", "-1"],
        ["--keep-last", "x"],
        ["--keep-every", "0"],
        ["--keep-within", "soon"],
        ["--keep-within", "-1d"],
        ["--keep-within", "\u0663d"],
        ["--keep-best", ""],
        ["--keep-best", ":2"],
        ["--keep-best", "loss:0"],
        ["--keep-best", "loss:x"],
        ["--keep-best", "loss:2:best"],
        ["--keep-best", "a:1:2:max"],
    ],
)
def test_prune_refuses_what_it_does_not_understand(options, run, filled, snapshot, tool):
    """Without a rule, or with a malformed one, nothing is deleted and the exit code is 2."""
    filled(run, 1, 2)
    before = snapshot(run)
    assert tool("prune", run, *options).returncode == 2
    assert snapshot(run) == before


def test_prune_says_what_it_could_not_delete(seedvc_ckpt, run, filled):
    """A file that can't be deleted is named, and the exit code is 1."""
    filled(run, 1, 2)
    path = run / SEED_VC.format(1)
    if subprocess.run(["chattr", "+i", path], capture_output=True, check=False).returncode:
        pytest.skip("files can't be made immutable here")
    try:
        done = seedvc_ckpt("prune", run, "--keep-last", 1)
        document = seedvc_ckpt("prune", run, "--keep-last", 1, "--json")
    finally:
        subprocess.run(["chattr", "-i", path], check=True)
    assert done.returncode == document.returncode == 1
    assert "NOT REMOVED" in done.stdout
    assert "not permitted" in done.stderr
    assert json.loads(document.stdout)["not_removed"] == [path.name]


def test_rewind_sets_aside(invoke, run, filled):
    """What is later than the step moves to aside/; --dry-run only tells; a step that is not there is refused."""
    store = filled(run, 1, 2, 3)
    dry = invoke("rewind", run, 1, "--dry-run")
    assert dry.stdout.splitlines() == [f"would set aside  {SEED_VC.format(step)}" for step in (2, 3)]
    assert len(store.list()) == 3
    with pytest.raises(CheckpointError, match="nearest"):
        invoke("rewind", run, 7)
    assert [item["step"] for item in answer(invoke("rewind", run, 2, "--json"))["set_aside"]] == [3]
    done = invoke("rewind", run, 1).stdout
    assert f"set aside  {SEED_VC.format(2)}" in done
    assert f"training goes on from {SEED_VC.format(1)}" in done
    assert [info.step for info in store.list()] == [1]
    assert "nothing is later" in invoke("rewind", run, 1, "--dry-run").stdout


# --- export ---------------------------------------------------------------------------------------------------------


def test_export_makes_what_the_service_starts_with(invoke, golden, data, tmp_path):
    """With the run's YAML: ft_model.pth in the run, the YAML beside it, and the command line to start with."""
    (golden / "ft_model.pth").unlink()
    config = shutil.move(golden / CONFIG, tmp_path / CONFIG)
    result = invoke("export", golden, "--config", config)
    assert result.exit_code == 0, result.output
    written = torch.load(golden / "ft_model.pth", weights_only=True)
    expected = torch.load(data / "run_from_seedvc" / FILE, weights_only=True)
    for module, tensors in expected["net"].items():
        assert written["net"][module].keys() == tensors.keys()
        assert all(torch.equal(written["net"][module][name], value) for name, value in tensors.items())
    assert (golden / CONFIG).read_bytes() == Path(config).read_bytes()
    assert f"python app_vc.py --checkpoint {golden}/ft_model.pth --config {golden}/{CONFIG}" in result.stdout


def test_export_takes_step_target_type_and_weights(invoke, golden, tmp_path):
    """--step, --out, --dtype and --weights choose; averaged weights that are not there are refused."""
    out = tmp_path / "a b" / "half.safetensors"
    result = invoke("export", golden, "--step", 10, "--out", out, "--dtype", "float16")
    assert "step_00010" in result.stdout
    assert "not checked" in result.stdout
    from safetensors.torch import load_file

    tensors = load_file(out)
    assert {value.dtype for value in tensors.values() if value.is_floating_point()} == {torch.float16}
    with pytest.raises(CheckpointError, match="averaged"):
        invoke("export", golden, "--out", tmp_path / "ema.pth", "--weights", "ema")
    assert not (tmp_path / "ema.pth").exists()


def test_export_replaces_only_when_forced(invoke, golden, snapshot):
    """An existing target, or another YAML beside it, is never replaced without a word."""
    before = snapshot(golden)
    with pytest.raises(CheckpointError, match="--force"):
        invoke("export", golden)
    assert snapshot(golden) == before
    assert invoke("export", golden, "--force", "--step", 10).exit_code == 0
    assert (golden / "ft_model.pth").read_bytes() != before["ft_model.pth"][2]
    with pytest.raises(CheckpointError, match="exists"):
        invoke("export", golden / FILE)
    other = golden.parent / "elsewhere" / CONFIG
    other.parent.mkdir()
    other.write_text((golden / CONFIG).read_text() + "# changed\n")
    result = invoke("export", golden, "--force", "--config", other)
    assert f"kept {golden}/{CONFIG}" in result.stderr
    assert f"--config {other}" in result.stdout
    assert (golden / CONFIG).read_bytes() == before[CONFIG][2]


def test_export_refuses_another_model(seedvc_ckpt, golden):
    """A YAML of another size is refused with the list of differences; nothing is written."""
    config = yaml.safe_load((golden / CONFIG).read_text())
    config["model_params"]["DiT"]["depth"] += 2
    (golden / "other.yml").write_text(yaml.safe_dump(config))
    done = seedvc_ckpt("export", golden, "--config", golden / "other.yml", "--out", golden / "new.pth")
    assert (done.returncode, done.stdout) == (1, "")
    assert "missing in the checkpoint" in done.stderr
    assert not (golden / "new.pth").exists()


# --- calls that go wrong --------------------------------------------------------------------------------------------


def assert_polite(done, *codes):
    """Exit code as expected, something said on standard error, and no traceback."""
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    assert done.returncode in codes, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.strip()


@pytest.fixture
def zoo(run, filled, damage):
    """A folder of files that are no good checkpoints, each by its kind."""
    filled(run, 1, 2)
    good = (run / SEED_VC.format(1)).read_bytes()
    (run / "text.pth").write_text("no checkpoint\n")
    (run / "empty.pth").touch()
    (run / "half.pth").write_bytes(good[: len(good) // 2])
    (run / "folder.pth").mkdir()
    (run / "zip.pth").write_bytes(b"PK\x05\x06" + bytes(18))
    (run / "dangling.pth").symlink_to("nowhere")
    (run / "circle.pth").symlink_to("circle.pth")
    os.mkfifo(run / "pipe.pth")
    (run / SEED_VC.format(3)).write_bytes(good)
    return run


@pytest.mark.parametrize("command", ["show", "verify", "diff", "export"])
@pytest.mark.parametrize(
    "name",
    [
        "text.pth",
        "empty.pth",
        "half.pth",
        "folder.pth",
        "zip.pth",
        "dangling.pth",
        "circle.pth",
        "pipe.pth",
        "none.pth",
    ],
)
def test_bad_files_are_bad_news(command, name, zoo, tool):
    """Texts, stumps, folders, pipes and missing files give one sentence and exit 1 or 2."""
    arguments = [zoo / name, zoo / SEED_VC.format(1)] if command == "diff" else [zoo / name]
    out = ["--out", zoo / "out.pth"] if command == "export" else []
    done = tool(command, *arguments, *out)
    if command == "verify" and done.returncode == 1 and not done.stderr:
        done.stderr = done.stdout  # there the verdict is the answer
    assert_polite(done, 1, 2)
    assert not (zoo / "out.pth").exists()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["ls", "nowhere"], 2),
        (["ls", ""], 2),
        (["ls", "x" * 5000], 2),
        (["ls", "{run}/text.pth"], 2),
        (["ls", "{run}/text.pth/deeper"], 2),
        (["ls", "nosuch://x"], 2),
        (["ls", "file://"], 2),
        (["ls"], 2),
        (["list", "{run}"], 2),
        (["ls", "{run}", "--nonsense"], 2),
        (["ls", "{run}", "--pattern", "nothing"], 2),
        (["ls", "{run}", "--pattern", "{step}{epoch}"], 2),
        (["ls", "{run}", "--pattern", "{step"], 2),
        (["latest", "nowhere"], 2),
        (["show", "nowhere.pth"], 2),
        (["show", "{run}", "--step", "77"], 1),
        (["show", "{run}", "--step", "3"], 1),
        (["show", "{run}", "--step", "-1"], 2),
        (["show", "{run}", "--step", "9" * 40], 1),
        (["show", "{run}", "--step", "9" * 5000], 2),
        (["show", "{run}/text.pth", "--step", "1"], 2),
        (["verify", "{run}", "--all", "--step", "1"], 2),
        (["verify", "{run}/text.pth", "--all"], 2),
        (["diff", "{run}"], 2),
        (["prune", "{run}"], 2),
        (["prune", "nowhere", "--keep-last", "1"], 2),
        (["prune", "{run}", "--keep-best", "nothing"], 1),
        (["rewind", "{run}", "77"], 1),
        (["rewind", "{run}", "-1"], 2),
        (["rewind", "{run}", "9" * 40], 1),
        (["rewind", "nowhere", "1"], 2),
        (["export", "nowhere"], 2),
        (["export", "{run}", "--step", "1", "--out", "{run}/text.pth/x.pth"], 1),
        (["export", "{run}", "--step", "1", "--out", "{run}/folder.pth"], 1),
        (["export", "{run}", "--step", "1", "--out", "{run}/"], 1),
        (["export", "{run}", "--step", "1", "--out", "nosuch://x/y.pth"], 1),
        (["export", "{run}", "--step", "1", "--config", "nowhere.yml"], 2),
        (["export", "{run}", "--step", "1", "--config", "{run}"], 2),
        (["export", "{run}", "--step", "1", "--config", "{run}/text.pth"], 2),
        (["export", "{run}", "--step", "1", "--dtype", "int8"], 2),
    ],
)
def test_wrong_calls_are_told_without_a_traceback(arguments, code, zoo, tool, snapshot):
    """Wrong paths, options, patterns and numbers: exit 2 for wrong usage, 1 for bad news; nothing changes."""
    (zoo / "pipe.pth").unlink()
    before = snapshot(zoo)
    done = tool(*(argument.replace("{run}", str(zoo)) for argument in arguments))
    assert_polite(done, code)
    assert done.stdout == ""
    assert snapshot(zoo) == before


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["ls", "nowhere"], 2), (["show", "{run}/text.pth"], 1), (["latest"], 2), (["rewind", "{run}", "77"], 1)],
)
def test_exit_codes_reach_the_shell(arguments, code, zoo, seedvc_ckpt):
    """The installed command, in a process of its own, exits and speaks as the others here."""
    done = seedvc_ckpt(*(argument.replace("{run}", str(zoo)) for argument in arguments))
    assert_polite(done, code)
    assert done.stdout == ""


@pytest.mark.parametrize("name", ["my run", "[x]*?#%", "-rf", "模型 Ж", "a::b", "~", "it's"])
def test_odd_names_are_names(name, tmp_path, filled, seedvc_ckpt):
    """Every command takes folders with blanks, globs, dashes (after --) and other scripts."""
    filled(tmp_path / name, 1, 2)
    for command in (["ls"], ["latest"], ["show"], ["verify"], ["verify", "--all"], ["prune", "--keep-last", "2"]):
        done = seedvc_ckpt(*command, "--", name, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), command
    assert seedvc_ckpt("latest", "--", name, cwd=tmp_path).stdout == f"{name}/{SEED_VC.format(2)}\n"


def test_names_that_are_no_text_are_printed(tmp_path, filled, seedvc_ckpt):
    """A folder whose name is not UTF-8 is listed and told about without a traceback."""
    name = os.fsdecode(b"run\xff")
    filled(tmp_path / name, 1)
    for command in ("ls", "latest", "show", "verify"):
        done = seedvc_ckpt(command, tmp_path / name, text=False)
        assert b"Traceback" not in done.stderr
        assert done.returncode == 0, done.stderr
    done = seedvc_ckpt("ls", tmp_path / name / "nothing", text=False)
    assert (done.returncode, b"Traceback" in done.stderr) == (2, False)


@pytest.mark.parametrize("arguments", [["ls"], ["ls", "--json"], ["show", "--tensors"], ["verify", "--all"]])
def test_a_closed_pipe_ends_quietly(arguments, run, state, seedvc_ckpt):
    """`| head -1` gets its line, and nothing is said about the pipe."""
    store = CheckpointStore(run)
    store.save({f"a rather long name of a tensor {number}": torch.zeros(1) for number in range(2000)}, 0)
    for step in range(1, 1500):
        os.link(run / SEED_VC.format(0), run / SEED_VC.format(step)) if "ls" in arguments else None
    tool = Path(sys.executable).with_name("seedvc-ckpt")
    done = subprocess.run(
        f"'{tool}' {' '.join(arguments)} '{run}' | head -c 1",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (len(done.stdout), done.stderr) == (1, "")


@pytest.mark.parametrize("arguments", [["ls"], ["latest"], ["show", "--json"]])
def test_output_that_cannot_be_written_is_told(arguments, run, filled, seedvc_ckpt):
    """A full disk behind standard output is an error, not a traceback and not success."""
    filled(run, 1)
    with open("/dev/full", "w") as full:
        done = seedvc_ckpt(*arguments, run, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode != 0


def test_damaged_files_never_cause_a_traceback(run, filled, invoke):
    """Files with random bytes changed or cut give a library error or an answer, from every command that reads."""
    filled(run, 0)
    good, chance = (run / SEED_VC.format(0)).read_bytes(), random.Random(7)
    for number in range(60):
        content = bytearray(good)
        for _ in range(chance.choice([1, 1, 2, 30])):
            content[chance.choice([0, len(good) - 400, len(good) - 1200]) + chance.randrange(400)] = chance.randrange(
                256
            )
        path = run / f"{number}.pth"
        path.write_bytes(content[: chance.choice([None, None, chance.randrange(len(content))])])
        for command in (["show", path], ["show", path, "--globals"], ["verify", path], ["diff", path, run]):
            with suppress(CheckpointError):
                invoke(*command)


# --- looks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example(command, invoke):
    """--help explains the command, with an example of its use that fits the terminal."""
    text = invoke(command, "--help").stdout
    assert re.search(rf"Example: .*seedvc-ckpt\s+{command}\b", text)
    assert max(map(len, text.splitlines())) <= 100
    assert invoke(command, "-h").stdout == text


def test_help_and_version(seedvc_ckpt):
    """The tool names its commands and its version, also as python -m."""
    text = seedvc_ckpt("--help").stdout
    assert re.findall(r"^  (\w[\w-]*)  ", text, re.MULTILINE) == COMMANDS
    assert re.fullmatch(r"seedvc-ckpt, version \d.*\n", seedvc_ckpt("--version").stdout)
    again = subprocess.run([sys.executable, "-m", "seedvc_ckpt", "--help"], capture_output=True, text=True, check=True)
    assert again.stdout == text


def test_tables_fit_80_columns(invoke, run, state, golden, monkeypatch):
    """For an ordinary run no line of ls, show, prune and verify is longer than a terminal is wide."""
    store = CheckpointStore(run)
    for step in (99_500, 100_000, 999_500):
        store.save(state(), step, 12, metrics={"loss": 0.123456789, "validation": 1.25})
    os.truncate(run / SEED_VC.format(99_500, 12), 341_000_000)  # a sparse file, as long as Seed-VC's
    (run / f"{SEED_VC.format(100_000, 12)}.pin").touch()
    shutil.copy(run / SEED_VC.format(100_000, 12), run / SEED_VC.format(100_000, 13))
    monkeypatch.chdir(run.parent)
    for arguments in (["ls", "run"], ["show", "run"], ["show", golden.name], ["verify", "run"]):
        lines = invoke(*arguments).stdout.splitlines()
        assert max(map(len, lines)) <= 80, lines
    rules = ["--keep-last", 2, "--keep-every", 500, "--dry-run"]
    assert max(map(len, invoke("prune", run, *rules).stdout.splitlines())) <= 80


@pytest.mark.parametrize("command", ["ls", "verify"])
def test_colour_is_for_terminals_only(command, run, filled, seedvc_ckpt):
    """A terminal gets colours; a pipe or file gets plain text."""
    filled(run, 1)
    assert "\x1b" not in seedvc_ckpt(command, run).stdout
    ours, theirs = pty.openpty()
    seedvc_ckpt(command, run, capture_output=False, stdout=theirs, stderr=subprocess.DEVNULL)
    os.close(theirs)
    shown = os.read(ours, 10_000)
    os.close(ours)
    assert b"\x1b[" in shown


@pytest.mark.parametrize("arguments", [["ls"], ["latest"], ["show"], ["verify"], ["verify", "--all"]])
def test_json_is_one_document(arguments, run, state, seedvc_ckpt):
    """With --json standard output parses as strict JSON, NaN included, and standard error is silent."""
    CheckpointStore(run).save({**state(), "nan": float("nan")}, 1, metrics={"loss": float("nan")})
    done = seedvc_ckpt(*arguments, run, "--json")

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    json.loads(done.stdout, parse_constant=refuse)
    assert (done.returncode, done.stderr) == (0, "")


def test_pin_unpin_and_gc(run, filled, invoke):
    """Pinning marks a checkpoint, unpinning takes that back, gc tells what it removed."""
    with filled(run, 1, 2, 3):
        pass
    assert "pinned" in invoke("pin", run, 1).stdout
    assert [info["pinned"] for info in answer(invoke("ls", run, "--json"))] == [True, False, False]
    invoke("prune", run, "--keep-last", 1)
    assert [info["step"] for info in answer(invoke("ls", run, "--json"))] == [1, 3]
    assert "unpinned" in invoke("unpin", run, 1).stdout
    assert [info["pinned"] for info in answer(invoke("ls", run, "--json"))] == [False, False]
    leftover = run / f".tmp-{'0' * 16}-999999999-1-{os.uname().nodename}"
    leftover.write_bytes(b"part")
    assert [item["name"] for item in answer(invoke("gc", run, "--dry-run", "--json"))["removed"]] == [leftover.name]
    assert leftover.exists()
    assert "1 removed" in invoke("gc", run).stdout
    assert not leftover.exists()
    assert "nothing left behind" in invoke("gc", run).stdout
