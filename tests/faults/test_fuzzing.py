"""A fuzzer feeds the readers; what it once found, and what led it to new code, is read again each time."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import fuzzing
import pytest

CORPUS = Path(__file__).parent.parent / "data" / "corpus"
SECONDS = {False: 2, True: 120}


@pytest.mark.parametrize("target", fuzzing.TARGETS)
def test_the_corpus_is_read_or_refused(target: str) -> None:
    """Every input that is kept is answered, or refused with a CheckpointError."""
    kept = [*(CORPUS / target).iterdir()]
    assert kept, "the corpus is missing"
    for path in kept:
        fuzzing.feed(target, path.read_bytes())
    for data in fuzzing.seeds(target):
        fuzzing.TARGETS[target](data)


def fuzzed(target: str, folder: Path, seconds: int, seed: int) -> subprocess.CompletedProcess[str]:
    """A fuzzer's run on a copy of the corpus."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for path in (CORPUS / target).iterdir():
        (corpus / path.name).write_bytes(path.read_bytes())
    command = [sys.executable, fuzzing.__file__, target, str(corpus), str(seconds), str(seed)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=seconds + 120)


@pytest.mark.parametrize("target", fuzzing.TARGETS)
def test_fuzzing(target: str, tmp_path: Path, full: bool, tally, chance) -> None:
    """Whatever a fuzzer makes of good files, the readers end by themselves, in bounded time and memory."""
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("there is no atheris for this platform")
    done = fuzzed(target, tmp_path, SECONDS[full], chance.randrange(1 << 31))
    assert done.returncode == 0, f"{(done.stdout + done.stderr)[-3000:]}\nfound: {[*map(str, tmp_path.glob('*-*'))]}"
    tried = int(re.search(r"number_of_executed_units: (\d+)", done.stderr).group(1))
    assert tried > 1000
    tally.record("7", "any", f"the {target} is what a fuzzer makes", tried)


def test_a_finding_fails_the_run(tmp_path: Path) -> None:
    """An input that a reader answers with something else than a CheckpointError ends the fuzzer in an error."""
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("there is no atheris for this platform")
    broken = tmp_path / "broken.py"
    broken.write_text(
        f"import runpy, sys\nsys.path.insert(0, {str(Path(fuzzing.__file__).parent)!r})\n"
        f"sys.path.insert(0, {str(Path(fuzzing.__file__).parent.parent / 'ckpt')!r})\n"
        "from seedvc_ckpt import Manifest\n"
        "made = Manifest.from_json\n"
        "def from_json(data, name):\n"
        "    if data[:1] != b'{': raise ZeroDivisionError\n"
        "    return made(data, name)\n"
        "Manifest.from_json = from_json\n"
        f"sys.argv = ['fuzzing', 'manifest', {str(tmp_path)!r}, '10', '1']\n"
        f"runpy.run_path({fuzzing.__file__!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, broken], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "ZeroDivisionError" in done.stdout + done.stderr
    assert list(tmp_path.glob("crash-*"))
