"""What starting costs: which modules are imported, which files are touched."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from seedvc_ckpt import SEED_VC

HEAVY = ("torch", "fsspec", "numpy", "safetensors", "yaml", "seedvc_train")
SCRIPT = f"""
import json, sys
sys.argv = sys.argv[1:]
{{code}}
print(json.dumps([name for name in {HEAVY} if name in sys.modules]), file=sys.stderr)
"""
COMMAND = """
from seedvc_ckpt.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""


def imported(code, *arguments):
    script = SCRIPT.format(code=code)
    done = subprocess.run(
        [sys.executable, "-c", script, "seedvc-ckpt", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stderr.splitlines()[-1])


def test_the_measure_sees_torch():
    """The check below would notice: saving does import torch."""
    assert "torch" in imported("import seedvc_ckpt.format.torchzip")


def test_importing_the_library_brings_in_no_torch():
    """`import seedvc_ckpt`, and naming its store, patterns and rules, need neither torch nor fsspec."""
    assert imported("from seedvc_ckpt import *; store = CheckpointStore('nowhere'); store.list()") == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["ls"],
        ["ls", "--json"],
        ["latest"],
        ["verify"],
        ["verify", "--all"],
        ["show"],
        ["show", "--tensors"],
        ["show", "--globals"],
        ["prune", "--keep-last", "1", "--dry-run"],
        ["rewind", "--dry-run"],
    ],
    ids=" ".join,
)
def test_reading_commands_start_without_torch(arguments, data):
    """Listing, verifying and showing start at once: neither torch nor fsspec is imported."""
    command, *options = arguments
    run = [data / "run_from_seedvc", *(["20"] if command == "rewind" else [])]
    assert imported(COMMAND, command, *run, *options) == []


def test_latest_looks_at_names_only(tmp_path):
    """latest() among 10,000 checkpoints opens the folder, looks at one file, and touches no other."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    run = tmp_path / "run"
    run.mkdir()
    for number in range(10_000):
        (run / SEED_VC.format(number * 500, number // 100)).touch()
    (run / "DiT_epoch_00099_step_4999500.pth.pin").touch()
    trace = tmp_path / "trace"
    code = (
        f"from seedvc_ckpt import CheckpointStore; i = CheckpointStore({str(run)!r}).latest(); print(i.step, i.pinned)"
    )
    done = subprocess.run(
        ["strace", "-f", "-e", "trace=file", "-o", str(trace), sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    if "ptrace" in done.stderr.lower():
        pytest.skip("strace may not trace here")
    assert done.stdout.split() == ["4999500", "True"]
    touched = re.findall(rf'(\w+)\([^"]*"({re.escape(str(run))}[^"]*)"', trace.read_text())
    opened = [call for call, path in touched if path == str(run)]
    looked_at = [path for _, path in touched if path != str(run)]
    assert len(opened) == 1, touched
    assert looked_at == [str(run / SEED_VC.format(4999500, 99))]
