"""A folder of recordings becomes the same batches every time, or an error that says what is wrong."""

import os
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from seedvc_train import dataset as dataset_module
from seedvc_train.audio import MelSpectrogram, read_audio
from seedvc_train.dataset import (
    ClipDataset,
    Corpus,
    DatasetError,
    EpochBatches,
    Item,
    collate,
    loader,
    mixed_seed,
    scan,
)
from seedvc_train.features import Features
from seedvc_train.features.builtin import BuiltinFrontEnd

SR = 16000
UNREADABLE = "/proc/self/mem"  # a regular file whose first byte cannot be read, even by root


def write(path, seconds=1.2, rate=16000, channels=1, seed=0, **kind) -> str:
    """A real sound file of noise; folders are made."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    noise = 0.1 * np.random.default_rng(seed).standard_normal((round(seconds * rate), channels))
    if path.endswith(".opus"):
        kind = {"format": "OGG", "subtype": "OPUS"}
    soundfile.write(path, noise, rate, **kind)
    return path


def look(folder) -> Corpus:
    return scan(str(folder), SR, progress=False)


def paths(corpus: Corpus) -> list[str]:
    return [clip.path for clip in corpus.clips]


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    for number in range(5):
        write(str(tmp_path / "clips" / f"{number}.wav"), 1.0 + 0.1 * number, seed=number)
    return look(tmp_path / "clips")


def prepared(corpus: Corpus, epoch: int = 0, seed: int = 0, front_end=None) -> ClipDataset:
    mel = MelSpectrogram(SR, 512, 512, 256, 20)
    return ClipDataset(corpus, mel, front_end or BuiltinFrontEnd(24, 6), seed, epoch)


def same(first, second) -> bool:
    return all(
        one is two is None or (one is not None and two is not None and torch.equal(one, two))
        for one, two in zip(first, second, strict=True)
    )


# scanning


def test_a_scan_takes_every_container_in_the_order_of_the_paths(tmp_path):
    """Names of any case, alphabet and punctuation, at any rate and channel count, sorted by relative path."""
    names = [
        "b/one.WAV",
        "b/[x]*?#%.flac",
        "a b/c d.mp3",
        "ünïcode/声.ogg",
        "z.opus",
        "b.wav",
        "x.wav/in.FlAc",
    ]
    for number, name in enumerate(names):
        rate = (24000 if name.endswith(".opus") else 44100) if number % 2 else 16000
        write(str(tmp_path / name), rate=rate, channels=1 + number % 2)
    (tmp_path / "notes.txt").write_text("not a recording, and no reason to say so")
    corpus = look(tmp_path)
    assert paths(corpus) == sorted(names)
    assert corpus.skipped == ()
    assert corpus.seconds == pytest.approx(1.2 * len(names), abs=0.2)
    for index, clip in enumerate(corpus.clips):
        assert torch.equal(corpus.read(index), read_audio(str(tmp_path / clip.path), SR))
        assert len(corpus.read(index)) == clip.samples


def test_hidden_files_and_folders_are_ignored(tmp_path):
    """What a desktop or a tool hides is neither a clip nor a complaint."""
    for name in ("clip.wav", ".clip.wav", ".cache/clip.wav", "a/.b/clip.wav", "a/clip.wav"):
        write(str(tmp_path / name))
    corpus = look(tmp_path)
    assert paths(corpus) == ["a/clip.wav", "clip.wav"]
    assert corpus.skipped == ()


def test_links_to_files_are_followed_and_links_to_folders_are_not(tmp_path):
    """A folder that links to itself ends the scan no later, and what was not entered is named."""
    real = write(str(tmp_path / "elsewhere" / "real.wav"))
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / "linked.wav").symlink_to(real)
    (folder / "gone.wav").symlink_to(tmp_path / "gone.wav")
    (folder / "loop").symlink_to(folder)
    corpus = look(folder)
    assert paths(corpus) == ["linked.wav"]
    assert [(item.path, item.reason) for item in corpus.skipped] == [
        ("loop", "a link to a folder, which is not entered"),
        ("gone.wav", "does not exist"),
    ]


def test_each_unusable_file_is_skipped_once_with_its_reason(tmp_path):
    """Damaged, mislabelled, empty, too short, too long and special files cost themselves only."""
    write(str(tmp_path / "good.wav"))
    expected = {}
    for name in ("cut.wav", "cut.flac", "cut.mp3"):
        whole = write(str(tmp_path / name), seconds=3.0)
        os.truncate(whole, os.path.getsize(whole) // 2)
        expected[name] = "cut off" if not name.endswith("flac") else "cannot be decoded"
    (tmp_path / "text.wav").write_text("hello " * 1000)
    (tmp_path / "empty.ogg").touch()
    os.mkfifo(tmp_path / "pipe.wav")
    os.symlink(UNREADABLE, tmp_path / "unreadable.wav")
    write(str(tmp_path / "short.wav"), seconds=0.99)
    write(str(tmp_path / "long.wav"), seconds=30.01, rate=8000)
    soundfile.write(tmp_path / "nan.wav", np.full(32000, np.nan, np.float32), 16000, subtype="FLOAT")
    expected |= {"text.wav": "cannot be decoded", "empty.ogg": "empty file", "pipe.wav": "not a file"}
    expected |= {"unreadable.wav": "Input/output error"}
    expected |= {"short.wav": "shorter than 1 s: 0.99 s", "long.wav": "longer than 30 s", "nan.wav": "NaN"}
    corpus = look(tmp_path)
    assert paths(corpus) == ["good.wav"]
    assert [item.path for item in corpus.skipped] == sorted(expected)
    for item in corpus.skipped:
        assert expected[item.path] in item.reason


@pytest.mark.parametrize("rate", [8000, 22050, 44100])
def test_one_and_thirty_seconds_are_within_the_limits(tmp_path, rate):
    """The limits themselves are allowed, one sample beyond them is not, whatever the rate."""
    for name, samples in (("1", rate), ("30", 30 * rate), ("below", rate - 1), ("above", 30 * rate + 1)):
        soundfile.write(tmp_path / f"{name}.flac", np.zeros(samples), rate)
    corpus = look(tmp_path)
    assert paths(corpus) == ["1.flac", "30.flac"]
    assert [item.path for item in corpus.skipped] == ["above.flac", "below.flac"]


def test_a_huge_file_is_not_read(tmp_path, monkeypatch):
    """A day of audio among the clips is skipped by its size, before memory is spent on it."""
    monkeypatch.setattr(dataset_module, "_MOST_BYTES", 40000)
    write(str(tmp_path / "clip.wav"))
    write(str(tmp_path / "day.wav"), seconds=2.0)
    assert [item.reason for item in look(tmp_path).skipped] == ["longer than 30 s, judging by its size"]


@pytest.mark.parametrize(("name", "what"), [("none", "does not exist"), ("file.wav", "is not a folder")])
def test_a_path_that_is_no_folder_is_named(tmp_path, name, what):
    """A typing error in a path is reported as one."""
    write(str(tmp_path / "file.wav"))
    with pytest.raises(DatasetError, match=what) as caught:
        look(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_a_folder_with_nothing_usable_says_what_it_holds(tmp_path):
    """The error tells what was looked for, where, what is there and why each sound file was refused."""
    (tmp_path / "a.wav").write_text("text")
    write(str(tmp_path / "b.wav"), seconds=0.5)
    for name in ("c.m4a", "d.M4A", "README"):
        (tmp_path / name).touch()
    with pytest.raises(DatasetError) as caught:
        look(tmp_path)
    message = str(caught.value)
    for part in (
        str(tmp_path),
        "1 to 30 s",
        ".flac",
        "2 .m4a",
        "2 .wav",
        "1 no extension",
        "'a.wav': cannot be",
    ):
        assert part in message
    assert "'b.wav': shorter than 1 s" in message


def test_an_error_stays_readable_for_many_bad_files(tmp_path):
    """Ten reasons are shown, the rest counted; an empty folder is called empty."""
    with pytest.raises(DatasetError, match="no files at all"):
        look(tmp_path)
    for number in range(13):
        (tmp_path / f"{number}.wav").touch()
    with pytest.raises(DatasetError, match="and 3 more") as caught:
        look(tmp_path)
    assert str(caught.value).count("empty file") == 10


def test_a_corpus_digest_follows_names_and_contents(tmp_path):
    """Moving the folder keeps the digest; renaming, changing, adding or losing a clip changes it."""
    for root in ("one", "two"):
        for name in ("a.wav", "b.wav"):
            write(str(tmp_path / root / name), seed=ord(name[0]))
    digests = [look(tmp_path / "one").digest(), look(tmp_path / "two").digest()]
    assert digests[0] == digests[1]
    write(str(tmp_path / "two" / "b.wav"), seed=7)
    digests.append(look(tmp_path / "two").digest())
    os.rename(tmp_path / "two" / "b.wav", tmp_path / "two" / "c.wav")
    digests.append(look(tmp_path / "two").digest())
    os.remove(tmp_path / "two" / "c.wav")
    digests.append(look(tmp_path / "two").digest())
    assert len(set(digests)) == 4


# order


BATCHES = st.tuples(st.integers(1, 50), st.integers(1, 9), st.integers(-5, 2**40), st.integers(0, 1000))


@settings(deadline=None)
@given(BATCHES, st.data())
def test_any_start_continues_the_same_epoch(args, data):
    """Batches from a position on are the tail of the whole epoch, and `len` counts what remains."""
    whole = list(EpochBatches(*args))
    start = data.draw(st.integers(0, len(whole)))
    rest = EpochBatches(*args, start=start)
    assert list(rest) == whole[start:]
    assert len(rest) == len(whole) - start


@settings(deadline=None)
@given(BATCHES)
def test_every_clip_comes_once_an_epoch(args):
    """Nothing is dropped: all batches are full but the last, which holds the rest."""
    num_clips, batch_size, *_ = args
    batches = list(EpochBatches(*args))
    assert sorted(index for batch in batches for index in batch) == list(range(num_clips))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size


def test_epochs_and_seeds_have_orders_of_their_own():
    """Neighbouring seeds and epochs do not share an order, which a sum of the two would make them do."""
    orders = {str(list(EpochBatches(100, 4, seed, epoch))) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


@pytest.mark.parametrize("args", [(0, 1, 0, 0), (1, 0, 0, 0), (5, 2, 0, 0, -1), (5, 2, 0, 0, 4)])
def test_positions_outside_an_epoch_are_refused(args):
    """A start beyond the last batch means the data changed; it must not become an empty epoch."""
    with pytest.raises(ValueError, match=r"at least 1|outside an epoch of 3 batches"):
        EpochBatches(*args)


@settings(deadline=None)
@example([[1, 23], [12, 3], [123]])
@given(st.lists(st.lists(st.integers(0, 2**64), min_size=1, max_size=3), unique_by=tuple, max_size=20))
def test_mixed_seeds_do_not_collide(lists):
    """Different numbers, orders and counts give different seeds, which a generator accepts."""
    seeds = [mixed_seed(*numbers) for numbers in lists]
    assert len(set(seeds)) == len(seeds)
    for seed in seeds:
        torch.Generator().manual_seed(seed)


# clips


def test_an_item_depends_on_seed_epoch_and_clip_alone(corpus):
    """Items can be computed in any order and again; the shift is drawn anew for each epoch and seed."""
    first, again = prepared(corpus), prepared(corpus)
    backwards = [again[index] for index in reversed(range(5))][::-1]
    for index in range(5):
        assert torch.equal(first[index].shifted_content, backwards[index].shifted_content)
        assert torch.equal(first[index].mel, backwards[index].mel)
    for other in (prepared(corpus, epoch=1), prepared(corpus, seed=1)):
        assert not torch.equal(first[0].shifted_content, other[0].shifted_content)
        assert torch.equal(first[0].content, other[0].content)


def test_clips_of_an_epoch_draw_different_numbers(corpus):
    """Two clips of one epoch are not disguised the same way."""

    def draw(wave, sr, shifts):
        return Features(wave[:1, None], (wave[:1, None],), torch.rand(2, generator=shifts[0]), None)

    dataset = prepared(corpus, front_end=draw)
    assert len(dataset) == 5
    assert len({tuple(dataset[index].style.tolist()) for index in range(5)}) == 5


@pytest.mark.parametrize("change", ["other", "cut", "gone", "longer", "unreadable"])
def test_a_file_that_changes_under_a_run_is_named(corpus, change):
    """A clip that passed the scan raises only if its file changed, and then says which and that it did."""
    path = os.path.join(corpus.root, "2.wav")
    if change == "other":
        write(path, 1.2, seed=9)
    elif change == "cut":
        os.truncate(path, 20000)
    elif change == "gone":
        os.remove(path)
    elif change == "unreadable":
        os.remove(path)
        os.symlink(UNREADABLE, path)
    else:
        write(path, 31.0)
    dataset = prepared(corpus)
    assert dataset[1].mel.shape[0] == 20
    with pytest.raises(DatasetError, match="has changed since the run started") as caught:
        dataset[2]
    assert path in str(caught.value)


def test_a_changed_file_is_named_from_a_worker_too(corpus):
    """The error keeps its type across the process boundary."""
    write(os.path.join(corpus.root, "2.wav"), 1.2, seed=9)
    with pytest.raises(DatasetError, match="has changed since the run started"):
        list(loader(prepared(corpus), EpochBatches(5, 2, 0, 0), num_workers=1))


def test_an_error_in_a_worker_ends_the_program(corpus, tmp_path):
    """A run that a changed file stops says so and exits; it does not wait for its other workers for ever."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os\n"
        "from seedvc_train.audio import MelSpectrogram\n"
        "from seedvc_train.dataset import ClipDataset, EpochBatches, loader, scan\n"
        "from seedvc_train.features.builtin import BuiltinFrontEnd\n"
        f"corpus = scan({corpus.root!r}, {SR}, progress=False)\n"
        f"os.remove({os.path.join(corpus.root, '2.wav')!r})\n"
        f"clips = ClipDataset(corpus, MelSpectrogram({SR}, 512, 512, 256, 20), BuiltinFrontEnd(24, 6), 0, 0)\n"
        "for batch in loader(clips, EpochBatches(5, 1, 0, 0), num_workers=2):\n"
        "    pass\n"
    )
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "has changed since the run started" in ended.stderr
    assert "killed" not in ended.stderr


def test_a_mel_for_another_rate_is_refused(corpus):
    """Waves at one rate never meet mel filters for another."""
    with pytest.raises(ValueError, match="expects 22050 Hz"):
        ClipDataset(corpus, MelSpectrogram(22050, 512, 512, 256, 20), BuiltinFrontEnd(24, 6), 0, 0)


# batches


def item(frames: int, content: int, f0: int | None, fill: float) -> Item:
    return Item(
        mel=torch.full((3, frames), fill),
        content=torch.full((content, 2), fill),
        shifted_content=torch.full((content, 2), -fill),
        style=torch.full((4,), fill),
        f0=None if f0 is None else torch.full((f0,), fill),
    )


LENGTHS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4)


@settings(deadline=None)
@given(LENGTHS, st.booleans())
def test_a_batch_holds_every_value_and_pads_the_rest(lengths, with_f0):
    """Mel is padded with -10, content and pitch with zeros; the lengths say where the clips end."""
    fills = [1.0 + number for number in range(len(lengths))]
    items = [item(t, n, m if with_f0 else None, fill) for (t, n, m), fill in zip(lengths, fills, strict=True)]
    batch = collate(items)
    assert batch.mel.shape == (len(items), 3, max(t for t, _, _ in lengths))
    assert batch.content.shape == batch.shifted_content.shape == (len(items), max(n for _, n, _ in lengths), 2)
    assert batch.style.tolist() == [[fill] * 4 for fill in fills]
    assert batch.mel_lens.dtype == batch.content_lens.dtype == torch.int64
    assert batch.mel_lens.tolist() == [t for t, _, _ in lengths]
    assert batch.content_lens.tolist() == [n for _, n, _ in lengths]
    assert (batch.f0 is not None) == with_f0
    for b, ((t, n, m), fill) in enumerate(zip(lengths, fills, strict=True)):
        assert (batch.mel[b, :, :t] == fill).all()
        assert (batch.mel[b, :, t:] == -10).all()
        assert (batch.content[b, :n] == fill).all()
        assert (batch.shifted_content[b, :n] == -fill).all()
        assert not batch.content[b, n:].any()
        assert not batch.shifted_content[b, n:].any()
        if batch.f0 is not None:
            assert batch.f0.shape[1] == max(m for _, _, m in lengths)
            assert (batch.f0[b, :m] == fill).all()
            assert not batch.f0[b, m:].any()


@pytest.mark.parametrize("start", [0, 2])
def test_workers_do_not_change_the_batches(corpus, start):
    """No worker or two, from the first batch or a later one: the same bits in the same order."""
    batches = EpochBatches(5, 2, seed=3, epoch=1, start=start)
    alone, shared = (list(loader(prepared(corpus, 1, 3), batches, workers)) for workers in (0, 2))
    assert len(alone) == len(shared) == len(batches)
    assert all(same(one, two) for one, two in zip(alone, shared, strict=True))
    for indexes, batch in zip(batches, alone, strict=True):
        assert batch.mel_lens.tolist() == [corpus.clips[index].samples // 256 for index in indexes]


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_global_random_states_alone(corpus, workers):
    """Torch, NumPy and Python draw the same numbers after an epoch as without it."""

    def states() -> list[bytes]:
        return [pickle.dumps(s) for s in (torch.get_rng_state().numpy(), np.random.get_state(), random.getstate())]

    before = states()
    assert len(list(loader(prepared(corpus), EpochBatches(5, 2, 0, 0), workers))) == 3
    assert states() == before


def test_batches_do_not_depend_on_the_global_random_states(corpus):
    """Seeding the global generators differently changes nothing."""
    torch.manual_seed(1)
    one = list(loader(prepared(corpus), EpochBatches(5, 2, 0, 0)))
    torch.manual_seed(2)
    two = list(loader(prepared(corpus), EpochBatches(5, 2, 0, 0)))
    assert all(same(a, b) for a, b in zip(one, two, strict=True))


def test_the_number_of_threads_does_not_change_a_clip(corpus):
    """A loader process has one thread, the main process several: at 44.1 kHz a plain product would differ by bits."""
    at_44k = scan(corpus.root, 44100, progress=False)
    clips = ClipDataset(at_44k, MelSpectrogram(44100, 2048, 2048, 512, 128), BuiltinFrontEnd(768, 192), 0, 0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = clips[0]
        torch.set_num_threads(2)
        two = clips[0]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one.mel, two.mel)
    assert torch.equal(one.content, two.content)
