"""Features that were kept are those that were heard, whoever keeps them, however often it is interrupted."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fill_cache
import numpy as np
import pytest
import runs
import torch
from file_systems import filled, loop_mounted, missing, remount
from safetensors import safe_open
from safetensors.torch import save_file
from test_resume import differences, losses

from seedvc_ckpt import CheckpointStore
from seedvc_train import progress as progress_module
from seedvc_train.audio import MelSpectrogram
from seedvc_train.corpus import write_demo_corpus
from seedvc_train.data import TrainingData
from seedvc_train.dataset import Batch, DatasetError, mixed_seed, scan
from seedvc_train.feature_cache import CachedClips, FeatureCache, FeatureCacheError
from seedvc_train.features import Features
from seedvc_train.features.builtin import BuiltinFrontEnd
from seedvc_train.features.stored import DamagedFeaturesError, as_bytes, read
from seedvc_train.progress import ClipProgress

SR = 16000
SHIFTS = 3


class Pitched(BuiltinFrontEnd):
    """Hears pitch too."""

    def __call__(self, wave, sr, shifts):
        heard = super().__call__(wave, sr, shifts)
        return Features(heard.content, heard.shifted_contents, heard.style, wave[::160].abs() * 100)


class Deaf:
    """What a front end must not be asked for."""

    identity = BuiltinFrontEnd(24, 6).identity

    def __call__(self, wave, sr, shifts):
        raise AssertionError("a clip was heard again")


def cache_in(folder: Path, recordings: Path, front_end=None, *, shifts: int = SHIFTS, n_mels: int = 20, sr: int = SR):
    mel = MelSpectrogram(sr, 512, 512, 256, n_mels)
    corpus = scan(str(recordings), sr, progress=False)
    return FeatureCache(str(folder), corpus, mel, front_end or BuiltinFrontEnd(24, 6), shifts)


def batches(cache: FeatureCache, workers: int = 0, epoch: int = 0, position: int = 0) -> Iterator[Batch]:
    mel = MelSpectrogram(SR, 512, 512, 256, 20)
    data = TrainingData(cache.corpus, mel, Deaf(), batch_size=2, seed=5, num_workers=workers, cache=cache)
    return iter(data.batches(epoch, position))


def same(first: tuple, second: tuple) -> bool:
    return all(
        one is two is None or (one is not None and two is not None and torch.equal(one, two))
        for one, two in zip(first, second, strict=True)
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def full_cache(recordings: Path, tmp_path: Path) -> FeatureCache:
    cache = cache_in(tmp_path / "cache", recordings)
    assert cache.fill(cache.missing(), threads=2) == 6
    return cache


# what is kept


@pytest.mark.parametrize("front_end", [BuiltinFrontEnd(24, 6), Pitched(24, 6)])
def test_what_is_read_is_what_was_heard(recordings, tmp_path, front_end):
    """Each tensor of each clip and copy, bit for bit; the copies are drawn from the clip's digest and their number."""
    cache = cache_in(tmp_path / "cache", recordings, front_end)
    cache.fill(cache.missing(), threads=2)
    mel, threads = MelSpectrogram(SR, 512, 512, 256, 20), torch.get_num_threads()
    torch.set_num_threads(1)
    for index, clip in enumerate(cache.corpus.clips):
        wave = cache.corpus.read(index)
        shifts = [torch.Generator().manual_seed(mixed_seed(int(clip.digest, 16), k)) for k in range(SHIFTS)]
        heard = front_end(wave, SR, shifts)
        for k in range(SHIFTS):
            expected = (mel(wave), heard.content, heard.shifted_contents[k], heard.style, heard.f0)
            item = cache.item(index, k)
            assert same((item.mel, item.content, item.shifted_content, item.style, item.f0), expected)
        assert not torch.equal(heard.shifted_contents[0], heard.shifted_contents[1])
    torch.set_num_threads(threads)


def test_neither_seeds_nor_names_nor_threads_change_what_is_kept(recordings, tmp_path, full_cache):
    """Runs share files: another folder of the same recordings under other names lacks nothing, and bytes are equal."""
    moved = tmp_path / "moved"
    for number, path in enumerate(sorted(recordings.rglob("*.wav"), reverse=True)):
        (moved / str(number)).mkdir(parents=True)
        shutil.copy(path, moved / str(number) / "clip.wav")
    assert cache_in(tmp_path / "cache", moved, Deaf()).missing() == []
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        again = cache_in(tmp_path / "again", moved)
        again.fill(again.missing(), threads=1)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert contents(tmp_path / "again") == contents(tmp_path / "cache")


def test_what_another_process_kept_is_not_heard_again(recordings, tmp_path, full_cache):
    """A clip that was missing when a process looked, and is there when its turn comes, costs nothing."""
    assert cache_in(tmp_path / "cache", recordings, Deaf()).fill(range(6), threads=2) == 0


@pytest.mark.parametrize("ours", [1, 3])
def test_each_clip_is_heard_by_one_thread_of_torchs(recordings, tmp_path, ours):
    """Whatever torch is set to, while the cache is filled and in a repair: a product's last bits can depend on it."""

    class Counting(BuiltinFrontEnd):
        def __call__(self, wave, sr, shifts):
            heard = super().__call__(wave, sr, shifts)
            threads = torch.full((1, 1), float(torch.get_num_threads()))
            return Features(threads, heard.shifted_contents, heard.style, None)

    cache, threads = cache_in(tmp_path / "cache", recordings, Counting(24, 6)), torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        cache.fill(cache.missing(), ours)
        os.unlink(cache.path(0))
        cache.repair([0])
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(threads)
    assert [cache.item(index, 0).content.item() for index in range(6)] == [1] * 6


def test_whatever_changes_what_is_heard_has_files_of_its_own(recordings, tmp_path, full_cache):
    """Another front end, sample rate, mel spectrogram, number of copies or recording finds nothing, spoils nothing."""
    before = contents(tmp_path / "cache")
    louder = tmp_path / "louder"
    write_demo_corpus(str(louder), clips=3)
    for path in louder.rglob("*.wav"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    others = [
        cache_in(tmp_path / "cache", recordings, BuiltinFrontEnd(24, 8)),
        cache_in(tmp_path / "cache", recordings, sr=22050),
        cache_in(tmp_path / "cache", recordings, n_mels=21),
        cache_in(tmp_path / "cache", recordings, shifts=SHIFTS + 1),
        cache_in(tmp_path / "cache", louder),
    ]
    paths = {full_cache.path(index) for index in range(6)}
    for other in others:
        assert len(other.missing()) == 6
        paths |= {other.path(index) for index in range(6)}
        other.fill(other.missing(), threads=2)
    assert len(paths) == 36
    assert before.items() <= contents(tmp_path / "cache").items()
    assert full_cache.missing() == []


def test_an_epoch_draws_its_copies_from_seed_epoch_and_clip(full_cache):
    """The same draw each time, in any order; over some epochs every copy of a clip is heard."""

    def drawn(seed: int, epoch: int) -> list[int]:
        clips = CachedClips(full_cache, seed, epoch)
        copies = [[full_cache.item(index, k).shifted_content for k in range(SHIFTS)] for index in range(6)]
        items = {index: clips[index] for index in reversed(range(6))}
        return [
            next(k for k in range(SHIFTS) if torch.equal(items[index].shifted_content, copies[index][k]))
            for index in range(len(clips))
        ]

    epochs = [drawn(0, epoch) for epoch in range(20)]
    assert epochs == [drawn(0, epoch) for epoch in range(20)]
    assert epochs != [drawn(1, epoch) for epoch in range(20)]
    assert all(set(copies) == set(range(SHIFTS)) for copies in zip(*epochs, strict=True))


def test_training_needs_no_recording_any_more(recordings, tmp_path):
    """Once kept, no audio is opened and no front end is asked; with workers and without, from any position."""
    copied = tmp_path / "recordings"
    shutil.copytree(recordings, copied)
    cache = cache_in(tmp_path / "cache", copied)
    cache.fill(cache.missing(), threads=2)
    kept = cache_in(tmp_path / "cache", copied, Deaf())
    shutil.rmtree(copied)
    alone, shared = list(batches(kept)), list(batches(kept, workers=2))
    assert len(alone) == len(shared) == 3
    assert all(same(one, two) for one, two in zip(alone, shared, strict=True))
    assert all(same(one, two) for one, two in zip(alone[1:], batches(kept, position=1), strict=True))


def test_keeping_and_reading_draw_no_global_random_numbers(recordings, tmp_path):
    """Torch, NumPy and Python draw the same numbers afterwards."""

    def states() -> list[object]:
        return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]

    before = states()
    cache = cache_in(tmp_path / "cache", recordings)
    cache.fill(cache.missing(), threads=2)
    assert len(list(batches(cache)) + list(batches(cache, workers=1))) == 6
    assert states() == before


def test_what_is_no_number_is_not_kept(recordings, tmp_path):
    """An encoder that overflowed once must not spoil every run to come: the clip is named and nothing is written."""

    class Overflowing(BuiltinFrontEnd):
        def __call__(self, wave, sr, shifts):
            heard = super().__call__(wave, sr, shifts)
            heard.shifted_contents[1][3, 5] = float("inf")
            return heard

    cache = cache_in(tmp_path / "cache", recordings, Overflowing(24, 6))
    with pytest.raises(FeatureCacheError, match=r"shifted_content\.1 of '.*\.wav' holds values that are not finite"):
        cache.fill(cache.missing(), threads=1)
    assert not (tmp_path / "cache").exists()


def test_a_recording_that_changes_before_it_is_heard_is_named(recordings, tmp_path):
    """Features are of the bytes that the scan saw, or of none."""
    copied = tmp_path / "recordings"
    shutil.copytree(recordings, copied)
    cache = cache_in(tmp_path / "cache", copied)
    first, second = (copied / cache.corpus.clips[index].path for index in (0, 1))
    first.write_bytes(second.read_bytes())
    with pytest.raises(DatasetError, match="has changed since the run started"):
        cache.fill(cache.missing(), threads=2)
    assert not Path(cache.path(0)).exists()


# damage


def test_no_flipped_bit_goes_unseen(tmp_path):
    """Every single bit of a file, header and tensors: reading refuses it, or gives the same tensors as before."""
    tensors = {"mel": torch.randn(3, 4), "content": torch.randn(4, 3), "style": torch.randn(2)}
    whole = as_bytes(tensors, '{"clip": "a"}')
    path = tmp_path / "file"
    harmless = 0
    for bit in range(8 * len(whole)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            found = read(str(path), '{"clip": "a"}')
        except DamagedFeaturesError:
            continue
        harmless += 1
        assert set(found) == set(tensors)
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert harmless < 0.02 * 8 * len(whole)  # spaces between the tokens of the header's JSON


def test_the_bytes_are_decided_by_tensors_and_recipe():
    """Not by the order in which the tensors come; so caches can be compared as files."""
    mel, style = torch.randn(3, 4), torch.randn(2)
    assert as_bytes({"mel": mel, "style": style}, "{}") == as_bytes({"style": style, "mel": mel}, "{}")


@pytest.mark.parametrize("forged", ["names swapped", "another shape", "a tensor less", "a tensor more"])
def test_what_is_valid_but_not_what_was_written_is_seen(tmp_path, forged):
    """A header that another program rewrote: every byte of the tensors is there, but they are not the same tensors."""
    tensors = {"mel": torch.randn(3, 4), "content": torch.randn(3, 4)}
    path = str(tmp_path / "file")
    Path(path).write_bytes(as_bytes(tensors, "{}"))
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    mel, content = tensors["mel"], tensors["content"]
    others = {
        "names swapped": {"mel": content, "content": mel},
        "another shape": {"mel": mel.reshape(4, 3), "content": content},
        "a tensor less": {"mel": mel},
        "a tensor more": {"mel": mel, "content": content, "f0": torch.randn(2)},
    }
    save_file(others[forged], path, metadata)
    with pytest.raises(DamagedFeaturesError):
        read(path, "{}", () if "tensor" in forged else None)


def test_no_cut_goes_unseen(tmp_path):
    """A file cut to any shorter length, or with something after its end, is refused."""
    whole = as_bytes({"mel": torch.randn(3, 4)}, "{}")
    path = tmp_path / "file"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedFeaturesError):
            read(str(path), "{}", ())
    path.write_bytes(whole + b"\0")
    with pytest.raises(DamagedFeaturesError):
        read(str(path), "{}", ())


def flip_late(path: Path, _other: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-40:] = bytes(40)
    path.write_bytes(content)


DAMAGES = {
    "bits of a tensor": flip_late,
    "cut": lambda path, _other: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path, _other: os.truncate(path, 0),
    "zeros": lambda path, _other: path.write_bytes(bytes(path.stat().st_size)),
    "another clip's": lambda path, other: shutil.copy(other, path),
    "foreign": lambda path, _other: path.write_text("no features"),
    "foreign safetensors": lambda path, _other: path.write_bytes(
        (2).to_bytes(8, "little") + b"{}"  # valid, of no tensor
    ),
    "gone": lambda path, _other: path.unlink(),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_under_a_run_is_told_and_mended(full_cache, tmp_path, caplog, damage, workers):
    """A file that is damaged after the start is computed anew where it is read; the batches are the same bits."""
    before, kept = list(batches(full_cache)), contents(tmp_path / "cache")
    DAMAGES[damage](Path(full_cache.path(2)), Path(full_cache.path(3)))
    DAMAGES[damage](Path(full_cache.path(4)), Path(full_cache.path(3)))
    others = multiprocessing.active_children()
    after = list(batches(full_cache, workers))
    assert len(after) == 3
    assert set(multiprocessing.active_children()) <= set(others)
    assert all(same(one, two) for one, two in zip(before, after, strict=True))
    assert contents(tmp_path / "cache") == kept
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    for index in (2, 4):
        assert any(full_cache.path(index) in line and line.endswith("; computing it again") for line in told)


@pytest.mark.parametrize("damage", sorted(set(DAMAGES) - {"bits of a tensor"}))
def test_damage_before_a_start_is_told_and_mended(full_cache, tmp_path, caplog, damage):
    """What the headers and lengths of the files show is found before the first step, and only that is computed."""
    kept = contents(tmp_path / "cache")
    DAMAGES[damage](Path(full_cache.path(2)), Path(full_cache.path(3)))
    assert full_cache.missing() == [2]
    assert len(caplog.records) == (damage != "gone")
    assert full_cache.fill([2], threads=1) == 1
    assert contents(tmp_path / "cache") == kept


def test_a_folder_that_is_deleted_under_a_run_is_filled_again(full_cache, tmp_path):
    """Nobody has to know that a run uses the cache before clearing it."""
    before, running = list(batches(full_cache)), batches(full_cache, workers=2)
    first = next(running)
    shutil.rmtree(tmp_path / "cache")
    assert all(same(one, two) for one, two in zip(before, [first, *running], strict=True))


def test_what_can_not_be_mended_ends_the_run(full_cache):
    """A repair is tried once; a place that keeps nothing is an error and no endless loop."""
    os.unlink(full_cache.path(2))
    os.mkdir(full_cache.path(2))
    with pytest.raises(FeatureCacheError, match="can't keep features in"):
        list(batches(full_cache))


# several processes, and their deaths


def start_filling(recordings: Path, folder: Path, shifts: int, seconds: float) -> subprocess.Popen[str]:
    words = [sys.executable, fill_cache.__file__, runs.CONFIG, recordings, folder, shifts, seconds]
    return subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def one_go(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of a run with its four copies of each clip, filled by one process."""
    folder = tmp_path_factory.mktemp("one_go") / "cache"
    process = start_filling(recordings, folder, 4, 0)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "6\n"), errors
    return folder


@pytest.fixture(scope="module")
def whole_run(recordings: Path, one_go: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on that cache which nothing interrupts."""
    logs = tmp_path_factory.mktemp("whole")
    result = runs.train(recordings, logs, feature_cache=one_go, max_steps=20)
    assert "features: 6 clips from the cache, 0 computed" in result.output
    return logs / "run"


def test_a_killed_fill_goes_on_where_it_was(recordings, tmp_path, one_go, whole_run):
    """Three kills at random moments: the next process computes what is missing, and a run on it has the same bits."""
    folder, left = tmp_path / "cache", 6
    for kill in range(3):
        process = start_filling(recordings, folder, 4, 0.2)
        deadline = time.monotonic() + 60
        while len(list(folder.glob("*.safetensors"))) < 2 * kill + 1 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(random.SystemRandom().uniform(0, 0.05))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        kept = contents(folder)
        left = 6 - len([name for name in kept if name.endswith(".safetensors")])
    process = start_filling(recordings, folder, 4, 0)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, f"{left}\n"), errors
    assert contents(folder) == contents(one_go)
    runs.train(recordings, tmp_path, feature_cache=folder, max_steps=20, num_workers=2)
    assert differences(whole_run, tmp_path / "run") == []


def test_what_a_killed_process_was_writing_is_removed(recordings, tmp_path, one_go):
    """The next process that writes takes the half-written file away."""
    folder = tmp_path / "cache"
    script = (
        "import os, sys, fill_cache; from seedvc_ckpt.storage import local\n"
        "local._sync = lambda descriptor: os.kill(os.getpid(), 9)\n"
        f"cache = fill_cache.cache_of({str(runs.CONFIG)!r}, {str(recordings)!r}, {str(folder)!r}, 4)\n"
        "cache.fill(cache.missing(), threads=1)\n"
    )
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [name.startswith(".tmp-") for name in contents(folder)] == [True]
    process = start_filling(recordings, folder, 4, 0)
    process.communicate(timeout=60)
    assert contents(folder) == contents(one_go)


def test_two_processes_fill_one_folder(recordings, tmp_path, one_go, whole_run):
    """Both succeed, the files are those of one process, and a run on them has the same bits."""
    folder = tmp_path / "cache"
    processes = [start_filling(recordings, folder, 4, 0.1) for _ in range(2)]
    answers = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    assert sum(int(output) for output, _ in answers) >= 6
    assert contents(folder) == contents(one_go)
    runs.train(recordings, tmp_path, feature_cache=folder, max_steps=20)
    assert differences(whole_run, tmp_path / "run") == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_ends_as_one_left_alone(recordings, tmp_path, one_go, whole_run, workers):
    """With the cache too: killed, its cache damaged meanwhile, and continued, a run ends bit for bit the same."""
    folder = tmp_path / "cache"
    shutil.copytree(one_go, folder)
    options = {"feature_cache": folder, "num_workers": workers, "max_steps": 20, "save_every": 1}
    process = runs.start(recordings, tmp_path, **options)
    deadline, reached = time.monotonic() + 60, 0
    while reached < 7 and process.poll() is None and time.monotonic() < deadline:
        latest = CheckpointStore(tmp_path / "run", read_only=True).latest()
        reached = latest.step if latest else 0
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    flip_late(first, first)
    second.unlink()
    result = runs.train(recordings, tmp_path, **options)
    assert "resumed from step" in result.output
    assert "features: 5 clips from the cache, 1 computed" in result.output
    assert differences(whole_run, tmp_path / "run") == []
    assert losses(whole_run)[-1] == losses(tmp_path / "run")[-1]
    assert contents(folder) == contents(one_go)


# places that can't be written to


@pytest.fixture
def small_disk() -> Iterator[Path]:
    if reason := missing():
        pytest.skip(reason)
    with loop_mounted("tmpfs") as mount:
        yield Path(mount)


def test_a_full_disk_is_told_and_what_was_kept_is_used(recordings, tmp_path, small_disk, one_go):
    """The command says in one sentence what is full and what to do; with room again it goes on where it was."""
    needed = max(len(content) for content in contents(one_go).values())
    with filled(small_disk, 3 * needed):
        process = runs.start(recordings, tmp_path, feature_cache=small_disk / "cache")
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"can't keep features in {small_disk / 'cache'}: No space left on device" in errors
    assert "--feature-cache" in errors
    assert "Traceback" not in errors
    found = len(contents(small_disk / "cache"))
    assert 1 <= found < 6
    result = runs.train(recordings, tmp_path, feature_cache=small_disk / "cache")
    assert f"features: {found} clips from the cache, {6 - found} computed" in result.output


def test_a_read_only_folder_is_used_when_it_is_full_and_told_when_not(recordings, tmp_path, small_disk, one_go):
    """A cache that lacks nothing is only read; one that lacks a clip says that it can't be written to."""
    shutil.copytree(one_go, small_disk / "cache")
    remount(str(small_disk), "ro")
    result = runs.train(recordings, tmp_path, feature_cache=small_disk / "cache")
    assert "features: 6 clips from the cache, 0 computed" in result.output
    result = runs.train(recordings, tmp_path, feature_cache=small_disk / "cache", run_name="other", shifts=2)
    assert isinstance(result.exception, FeatureCacheError)
    assert "Read-only file system" in str(result.exception)


# the command


def test_the_command_says_what_it_did(recordings, tmp_path):
    """How many clips were there, how many were computed, how much room they take and where; nothing when it is off."""
    first = runs.train(recordings, tmp_path, feature_cache=tmp_path / "cache")
    size = sum(len(content) for content in contents(tmp_path / "cache").values())
    assert f"features: 0 clips from the cache, 6 computed; {size / 1e3:.3g} kB in {tmp_path}/cache" in first.output
    second = runs.train(recordings, tmp_path, feature_cache=tmp_path / "cache", run_name="other", seed=9)
    assert "features: 6 clips from the cache, 0 computed" in second.output
    for off in (None, "off"):
        assert "features:" not in runs.train(recordings, tmp_path, run_name=f"{off}", feature_cache=off).output


def test_what_is_validated_on_is_kept_too(recordings, tmp_path, monkeypatch):
    """A second start hears no clip of the validation again, and finds the scores that are found without a cache."""
    options = {"val_dir": recordings, "max_steps": 2, "save_every": 1}
    first = runs.train(recordings, tmp_path, **options, feature_cache=tmp_path / "cache")
    assert "validation features: 0 clips from the cache, 6 computed" in first.output
    monkeypatch.setattr(BuiltinFrontEnd, "__call__", Deaf.__call__)
    second = runs.train(recordings, tmp_path, **options, feature_cache=tmp_path / "cache", run_name="again")
    assert second.return_value == 0, second.exception
    assert "validation features: 6 clips from the cache, 0 computed" in second.output
    lines = [[line["val_loss"] for line in runs.metrics(tmp_path / name)] for name in ("run", "again")]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 2


def test_what_changes_the_numbers_is_recorded_and_the_folder_is_not(recordings, tmp_path):
    """A run goes on with another folder, but not with another number of copies or without the cache, unless told to."""
    runs.train(recordings, tmp_path, feature_cache=tmp_path / "cache", max_steps=2)
    other = runs.train(recordings, tmp_path, feature_cache=tmp_path / "other", max_steps=3)
    assert other.return_value == 0, other.exception
    fewer = runs.train(recordings, tmp_path, feature_cache=tmp_path / "cache", shifts=2, max_steps=4)
    assert "feature_cache.shifts: 4 then, 2 now" in str(fewer.exception)
    without = runs.train(recordings, tmp_path, max_steps=4)
    assert "feature_cache.shifts: 4 then, not set now" in str(without.exception)
    allowed = runs.train(recordings, tmp_path, max_steps=4, allow_changes=True)
    assert "changed: feature_cache.shifts: 4 then, not set now" in allowed.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"feature_cache": "s3://bucket/cache"}, "is no folder on this machine"),
        ({"feature_cache": ""}, "is no folder on this machine"),
        ({"shifts": 3}, "feature cache, which is off"),
        ({"shifts": 3, "feature_cache": "off"}, "feature cache, which is off"),
    ],
)
def test_options_that_mean_nothing_are_refused(recordings, tmp_path, options, said):
    """A cache on a server, or a number of copies for a cache that is off, are mistakes."""
    assert said in str(runs.train(recordings, tmp_path, **options).exception)


def test_a_file_gets_a_line_now_and_then(capsys, monkeypatch):
    """Where standard error is no terminal, half a minute without a word ends with one."""
    with ClipProgress("computing features", 3) as progress:
        progress.step()
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(progress_module, "_SILENCE", 0)
        progress.step()
    assert capsys.readouterr().err == "computing features: 2/3 clips\n"
