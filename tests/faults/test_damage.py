"""Changed bytes, holes, cuts and swaps, by the ten thousand: what would change a state is refused."""

from __future__ import annotations

import os
import random
import resource
import shutil
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import states
import torch
from zygote import be_command, run_in_child

from seedvc_ckpt import SEED_VC, CheckpointError, CheckpointStore, CorruptCheckpointError
from seedvc_ckpt.format import torchzip

DATA = Path(__file__).parent.parent / "data" / "run_from_seedvc"


def small() -> dict[str, object]:
    """Many dtypes, views of one memory, an empty tensor, and plain values."""
    base = torch.arange(48.0)
    tensors = {name: states.filled(name, (3, 5), seed) for seed, name in enumerate(states.DTYPES[:12])}
    views = {"row": base.view(6, 8)[2], "column": base.view(6, 8)[:, 1], "all": base, "empty": base[:0]}
    return {"net": {**tensors, **views}, "iters": 5, "list": [1, 2.5, "text", b"bytes", None, {"deep": [True]}]}


def training() -> dict[str, object]:
    """A model with its optimizer, about 200 kB."""
    model = torch.nn.Sequential(torch.nn.Linear(96, 128), torch.nn.BatchNorm1d(128), torch.nn.Linear(128, 16))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 96)).sum().backward()
    optimizer.step()
    return {"net": {"cfm": model.state_dict()}, "optimizer": optimizer.state_dict(), "iters": 5}


def our_files() -> dict[str, bytes]:
    return {
        "small": states.save(small(), metrics={"loss": 0.5}),
        "training": states.save(training()),
        "export": states.save({"net": {"cfm": {"w": torch.randn(300)}}}, exported_from="x.pth", created=None),
    }


def stock_files() -> dict[str, bytes]:
    genuine = {path.name: path.read_bytes() for path in DATA.glob("*.pth")}
    return {"small": states.stock_save(small()), "training": states.stock_save(training()), **genuine}


def byte(data: bytes, chance: random.Random) -> bytearray:
    """One byte is another, anywhere or in the parts that are not tensors."""
    changed = bytearray(data)
    tail = max(0, len(data) - 4000)
    changed[chance.choice([chance.randrange(len(data)), chance.randrange(tail, len(data))])] ^= chance.randint(1, 255)
    return changed


def hole(data: bytes, chance: random.Random) -> bytearray:
    """Zeros where bytes were."""
    changed = bytearray(data)
    size = chance.choice([1, 8, 64, 512, 4096])
    at = chance.randrange(len(data))
    changed[at : at + size] = bytes(len(changed[at : at + size]))
    return changed


def cut(data: bytes, chance: random.Random) -> bytearray:
    """The end is missing."""
    return bytearray(data[: chance.choice([chance.randrange(len(data)), len(data) - chance.randint(1, 200)])])


def swap(data: bytes, chance: random.Random) -> bytearray:
    """Two blocks are in each other's place."""
    changed = bytearray(data)
    size = chance.choice([1, 16, 64, 512, 4096])
    size = min(size, len(data) // 2)
    one, other = sorted(chance.randrange(len(data) - size) for _ in range(2))
    other = max(other, one + size)
    if other + size <= len(data):
        changed[one : one + size], changed[other : other + size] = data[other : other + size], data[one : one + size]
    return changed


CHANGES = {"a changed byte": byte, "a hole": hole, "the end cut off": cut, "blocks swapped": swap}


def shares(full: bool, cases: int) -> Iterator[tuple[str, Callable[[bytes, random.Random], bytearray], int]]:
    for how, change in CHANGES.items():
        yield how, change, (cases if full else cases // 25) // (1 if how == "a changed byte" else 4)


@pytest.mark.parametrize("name", ["small", "training", "export"])
def test_whatever_changes_our_files_is_detected(name, full, chance, tally, monkeypatch):
    """Both verify and load refuse every file of ours that differs in a byte, and load has then built no tensor."""
    data, built = our_files()[name], []
    tensor = torchzip._TensorBuilder.tensor

    def spy(builder, *arguments, **options):
        built.append(builder)
        return tensor(builder, *arguments, **options)

    monkeypatch.setattr(torchzip._TensorBuilder, "tensor", spy)
    states.verify(data)
    assert states.load(data) is not None
    assert built
    built.clear()
    for how, change, cases in shares(full, 6000):
        missed = tried = 0
        for _ in range(cases):
            changed = change(data, chance)
            if changed == data:
                continue
            tried += 1
            missed += not (_refused(states.verify, changed) and _refused(states.load, changed) and not built)
        tally.record("6", "our files", f"{how}: verify and load refuse it before a tensor is made", tried, missed)
        assert not missed, f"{missed} of {tried}"


@pytest.mark.parametrize("name", sorted(stock_files()))
def test_whatever_changes_the_state_in_others_files_is_detected(name, full, chance, tally):
    """A file of torch.save or of Seed-VC that still loads after a change holds the same state, bit for bit."""
    data = stock_files()[name]
    original = states.load(data)
    for how, change, cases in shares(full, 2600):
        missed = 0
        for _ in range(cases):
            changed = change(data, chance)
            try:
                states.verify(changed)
                loaded = states.load(changed)
            except CheckpointError:
                continue
            missed += states.difference(original, loaded) is not None
        tally.record("6", "files of torch.save", f"{how}: refused, or the state is the same", cases, missed)
        assert not missed, f"{missed} of {cases}"


def test_files_in_each_others_place(tmp_path, full, chance, tally):
    """Two checkpoints of a run that were swapped are refused by their steps, and resume steps over both."""
    rounds = 200 if full else 10
    for number in range(rounds):
        run = tmp_path / str(number)
        steps = sorted(chance.sample(range(1, 1000), 3))
        with CheckpointStore(run) as store:
            for step in steps:
                store.save({"x": torch.full((9,), step)}, step)
        paths = [run / SEED_VC.format(step) for step in steps]
        paths[1].rename(run / "other")
        paths[2].rename(paths[1])
        (run / "other").rename(paths[2])
        store = CheckpointStore(run)
        for step in steps[1:]:
            with pytest.raises(CorruptCheckpointError, match="swapped with another"):
                store.verify(step)
            with pytest.raises(CorruptCheckpointError, match="swapped with another"):
                store.load(step)
        found = store.resume()
        assert (found.info.step, found.steps_lost) == (steps[0], steps[2] - steps[0])
        assert sorted(os.listdir(run / "aside")) == sorted(
            name for path in paths[1:] for name in (path.name, f"{path.name}.reason.txt")
        )
        store.close()
    tally.record("6", "our files", "two checkpoints of a run swapped", rounds)


# --- hostile files, through every command ----------------------------------------------------------------------------


class _Evil:
    def __init__(self, deed: Path) -> None:
        self.deed = str(deed)

    def __reduce__(self):
        return os.mkdir, (self.deed,)


def _nested(depth: int) -> bytes:
    return b"\x80\x02" + b"](" * depth + b"e" * depth + b"."


def hostile_files(folder: Path, deed: Path) -> dict[str, Path]:
    """Files that try something, by what they try."""
    evil = _Evil(deed)
    files = {}

    def path(name: str) -> Path:
        files[name] = folder / f"{name.replace(' ', '_')}.pth"
        return files[name]

    torch.save({"net": {}, "optimizer": {"state": {0: {"exp_avg": evil}}}}, path("a call in the optimizer"))
    torch.save(evil, path("a call as the state"))
    torch.save({"x": evil}, path("a legacy file"), _use_new_zipfile_serialization=False)
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it saves in a single process, as it is told to
        dcp.save({"x": torch.ones(3)}, checkpoint_id=folder / "dcp", no_dist=True)
    files["the .metadata of a DCP folder"] = folder / "dcp" / ".metadata"
    with zipfile.ZipFile(path("a deflated bomb"), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(300 << 20))
    path("a pickle nested 10000 deep").write_bytes(states.torch_zip(_nested(10_000)))
    with zipfile.ZipFile(path("a manifest of a gigabyte"), "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", states.Pickle().tensor().done)
        with archive.open("archive/seedvc_ckpt.json", "w", force_zip64=True) as manifest:
            for _ in range(1024):
                manifest.write(bytes(1 << 20))
    path("another format").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(5000))
    path("an empty file").touch()
    os.mkfifo(path("a pipe"))
    path("a link to a device").symlink_to("/dev/zero")
    return files


def _measured(arguments: list[str], output: Path, limit: int) -> int:
    """Run the command line in a child with bounded memory and time; its exit code."""

    def act() -> None:
        from seedvc_ckpt.cli import main

        resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
        before = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (before + limit, before + limit))
        be_command(main, ["seedvc-ckpt", *arguments], output)

    return run_in_child(act)


def test_hostile_files_on_every_command(tmp_path, tally):
    """Whatever the file tries, each command ends by itself in a clear error, runs nothing, and takes 200 MB at most."""
    deed, output, target = tmp_path / "deed", tmp_path / "output", tmp_path / "target.pth"
    intact = tmp_path / "intact.pth"
    intact.write_bytes(states.save({"net": {"cfm": {"w": torch.ones(3)}}}))
    assert _measured(["verify", str(intact)], output, 200 << 20) == 0, output.read_text()
    tried = Counter()
    for what, file in hostile_files(tmp_path, deed).items():
        run = tmp_path / f"run of {file.stem}"
        run.mkdir()
        (run / SEED_VC.format(5)).symlink_to(file)
        where = str(file)
        commands = [["show", where], ["show", "--globals", where], ["verify", where], ["diff", where, str(intact)],
                    ["export", where, "--out", str(target)], ["verify", "--all", str(run)], ["doctor", str(run)],
                    ["export", str(run)], ["show", str(run)], ["ls", str(run)], ["latest", str(run)]]  # fmt: skip
        for command in commands:
            code = _measured(command, output, (200 << 20) + min(file.stat().st_size, 1 << 20))
            said = output.read_text()
            # names alone are no danger: ls, latest and the list of globals answer what they can; a pipe is not listed
            harmless = command[0] in ("ls", "latest") or "--globals" in command or not file.is_file()
            assert code in ((0, 1) if harmless else (1, 2)), (what, command, code, said)
            assert "Traceback" not in said, (what, command, said)
            assert not deed.exists(), (what, command)
            assert not target.exists(), (what, command)
            tried[what] += 1
    tally.record("7", "any", "hostile files through every command", sum(tried.values()))
    shutil.rmtree(tmp_path / "dcp")


def _refused(check: Callable[[bytes], object], data: bytearray) -> bool:
    try:
        check(data)
    except CheckpointError:
        return True
    return False
