"""A folder of recordings as training batches that depend on the seed, the epoch and the clip alone."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from seedvc_train.audio import AudioError, MelSpectrogram, Samples, decode, resample
from seedvc_train.interruption import ignore_in_worker

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from seedvc_train.features import FrontEnd

EXTENSIONS = (".wav", ".flac", ".mp3", ".ogg", ".opus")
SHORTEST = 1.0  # seconds
LONGEST = 30.0  # seconds
MEL_PADDING = -10.0
_MOST_BYTES = 1 << 29  # more than 30 s of eight channels in 32 bits at 384 kHz
_READERS = 4


class DatasetError(ValueError):
    """The recordings cannot be trained on: nothing usable was found, or a file changed under a run."""


@dataclass(frozen=True)
class Clip:
    """A usable recording.

    Attributes:
        path: POSIX path relative to the folder.
        samples: its length after resampling to the corpus's rate.
        digest: 128-bit BLAKE2b of the file's bytes, as hex.
    """

    path: str
    samples: int
    digest: str


@dataclass(frozen=True)
class Skipped:
    """A file, or a folder that could not be listed, that is no clip, and why not."""

    path: str
    reason: str


@dataclass(frozen=True)
class Corpus:
    """What `scan` found under ``root``, in the order of the paths, to be read at ``sr`` Hz."""

    root: str
    sr: int
    clips: tuple[Clip, ...]
    skipped: tuple[Skipped, ...]

    @property
    def seconds(self) -> float:
        """Duration of all clips."""
        return sum(clip.samples for clip in self.clips) / self.sr

    def digest(self) -> str:
        """128-bit BLAKE2b, as hex, of the clips' relative paths and contents, in order."""
        lines = (f"{clip.digest} {clip.path}\0" for clip in self.clips)
        return blake2b("".join(lines).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()

    def read(self, index: int) -> torch.Tensor:
        """Read clip ``index`` as a mono wave, float32 (samples,), at ``sr``.

        Raises:
            DatasetError: the file no longer holds the bytes that were scanned.
        """
        clip = self.clips[index]
        path = os.path.join(self.root, clip.path)
        try:
            samples, digest = _read(path, self.sr)
        except (OSError, AudioError) as error:
            raise DatasetError(f"{path!r} has changed since the run started: {_reason(error)}") from error
        if digest != clip.digest:
            raise DatasetError(f"{path!r} has changed since the run started: its contents differ")
        return torch.from_numpy(samples)


def scan(folder: str, sr: int, *, progress: bool = True) -> Corpus:
    """Find the usable recordings in a folder tree: WAV, FLAC, MP3, Ogg and Opus files of 1 to 30 s.

    Every file is decoded once to its end. What cannot be read, was cut off (see `seedvc_train.audio.decode`)
    or is too short or too long is skipped with its reason. Files and folders with a leading dot are ignored,
    links to files followed, links to folders skipped.

    Args:
        folder: the top of the tree.
        sr: rate in Hz to read the clips at.
        progress: show a bar on stderr, if that is a terminal.

    Raises:
        DatasetError: the folder is missing, is not a folder, or holds no usable clip.
    """
    if not os.path.isdir(folder):
        what = "is not a folder" if os.path.exists(folder) else "does not exist"
        raise DatasetError(f"looked for a folder of recordings at {folder!r}, which {what}")
    paths, unentered = _walk(folder)
    sounds = [path for path in paths if _kind(path) in EXTENSIONS]
    pool = ThreadPoolExecutor(_READERS)
    try:
        found = pool.map(lambda path: _probe(folder, path, sr), sounds)
        bar = tqdm(found, "reading clips", len(sounds), unit="clip", disable=None if progress else True)
        results = [*unentered, *bar]
    finally:
        pool.shutdown(cancel_futures=True)
    clips = tuple(result for result in results if isinstance(result, Clip))
    skipped = tuple(result for result in results if isinstance(result, Skipped))
    if not clips:
        raise DatasetError(_nothing_usable(folder, paths, skipped))
    return Corpus(folder, sr, clips, skipped)


def _walk(folder: str) -> tuple[list[str], list[Skipped]]:
    """Relative paths of the files of a tree, sorted, and the folders that were not entered."""
    paths: list[str] = []
    unentered: list[Skipped] = []

    def relative(path: str) -> str:
        return os.path.relpath(path, folder)

    def unlistable(error: OSError) -> None:
        unentered.append(Skipped(relative(error.filename), _reason(error)))

    for parent, folders, files in os.walk(folder, onerror=unlistable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [relative(os.path.join(parent, name)) for name in files if not name.startswith(".")]
        links = [path for name in folders if os.path.islink(path := os.path.join(parent, name))]
        unentered += [Skipped(relative(path), "a link to a folder, which is not entered") for path in links]
    return sorted(paths), sorted(unentered, key=lambda skipped: skipped.path)


def _kind(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _probe(folder: str, path: str, sr: int) -> Clip | Skipped:
    """Decode one file as training will."""
    try:
        samples, digest = _read(os.path.join(folder, path), sr)
    except (OSError, AudioError) as error:
        return Skipped(path, _reason(error))
    return Clip(path, len(samples), digest)


def _read(path: str, sr: int) -> tuple[Samples, str]:
    """The samples of a clip at ``sr`` and the digest of the very bytes they were decoded from."""
    if not os.path.isfile(path):
        raise AudioError("not a file" if os.path.exists(path) else "does not exist")
    if os.path.getsize(path) > _MOST_BYTES:
        raise AudioError(f"longer than {LONGEST:g} s, judging by its size")
    with open(path, "rb") as file:
        data = file.read()
    samples, rate = decode(data, LONGEST)
    if len(samples) > LONGEST * rate:
        raise AudioError(f"longer than {LONGEST:g} s")
    if len(samples) < SHORTEST * rate:
        raise AudioError(f"shorter than {SHORTEST:g} s: {len(samples) / rate:.2f} s")
    return resample(samples, rate, sr), blake2b(data, digest_size=16).hexdigest()


def _reason(error: OSError | AudioError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _nothing_usable(folder: str, paths: list[str], skipped: Sequence[Skipped], most: int = 10) -> str:
    kinds = Counter(_kind(path) or "no extension" for path in paths)
    found = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "no files at all"
    reasons = [f"\n  {item.path!r}: {item.reason}" for item in skipped[:most]]
    if len(skipped) > most:
        reasons.append(f"\n  and {len(skipped) - most} more")
    return (
        f"looked for recordings of {SHORTEST:g} to {LONGEST:g} s ({', '.join(EXTENSIONS)}) in {folder!r} "
        f"and below, and none is usable; found {found}" + "".join(reasons)
    )


def mixed_seed(*numbers: int) -> int:
    """A 64-bit seed from several numbers, through BLAKE2b, so that neighbouring numbers share nothing."""
    text = ",".join(str(int(number)) for number in numbers)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


class EpochBatches(Sampler[list[int]]):
    """The batches of one epoch from a position on, as lists of clip indexes; the last may be smaller.

    The order comes from (seed, epoch) alone: the batches from ``start`` are the tail of the batches from 0.
    ``len()`` is the number of batches that remain.

    Raises:
        ValueError: a count is below 1 or ``start`` lies outside the epoch.
    """

    def __init__(self, num_clips: int, batch_size: int, seed: int, epoch: int, start: int = 0) -> None:
        if num_clips < 1 or batch_size < 1:
            raise ValueError(f"num_clips {num_clips} and batch_size {batch_size} must be at least 1")
        total = -(-num_clips // batch_size)
        if not 0 <= start <= total:
            raise ValueError(f"start {start} lies outside an epoch of {total} batches")
        generator = torch.Generator().manual_seed(mixed_seed(seed, epoch))
        order: list[int] = torch.randperm(num_clips, generator=generator).tolist()
        self._batches = [order[i * batch_size : (i + 1) * batch_size] for i in range(start, total)]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


@dataclass(frozen=True)
class Item:
    """One clip as the network sees it; float32.

    Attributes:
        mel: (C, T).
        content: (N, content_dim).
        shifted_content: (N, content_dim).
        style: (style_dim,).
        f0: (M,) in Hz, or None.
    """

    mel: torch.Tensor
    content: torch.Tensor
    shifted_content: torch.Tensor
    style: torch.Tensor
    f0: torch.Tensor | None


class ClipDataset(Dataset[Item]):
    """The clips of a corpus in one epoch; what is random in a clip comes from (seed, epoch, index) alone.

    Raises:
        ValueError: ``mel`` expects another sample rate than the corpus is read at.
    """

    def __init__(self, corpus: Corpus, mel: MelSpectrogram, front_end: FrontEnd, seed: int, epoch: int) -> None:
        check_rate(corpus, mel)
        self.corpus, self.mel, self.front_end = corpus, mel, front_end
        self.seed, self.epoch = seed, epoch

    def __len__(self) -> int:
        return len(self.corpus.clips)

    def __getitem__(self, index: int) -> Item:
        """Compute clip ``index``.

        Raises:
            DatasetError: its file has changed since the scan.
        """
        wave = self.corpus.read(index)
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch, index))
        with torch.no_grad(), one_thread():
            heard = self.front_end(wave, self.corpus.sr, [generator])
            return Item(self.mel(wave), heard.content, heard.shifted_contents[0], heard.style, heard.f0)


def check_rate(corpus: Corpus, mel: MelSpectrogram) -> None:
    """See that waves and mel filters are of one sample rate.

    Raises:
        ValueError: they are not.
    """
    if mel.sr != corpus.sr:
        raise ValueError(f"the mel spectrogram expects {mel.sr} Hz but the corpus is read at {corpus.sr} Hz")


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread, in this thread and in those that are started meanwhile.

    A product of matrices can differ in its last bit with the number of threads, and loader processes have only one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Batch(NamedTuple):
    """Padded clips; lengths are int64, everything else float32.

    Attributes:
        mel: (B, C, T), padded with -10.
        mel_lens: (B,).
        content: (B, N, content_dim), padded with zeros.
        shifted_content: (B, N, content_dim), padded with zeros.
        content_lens: (B,).
        style: (B, style_dim).
        f0: (B, M) in Hz, padded with zeros (unvoiced); None when the front end hears no pitch.
    """

    mel: torch.Tensor
    mel_lens: torch.Tensor
    content: torch.Tensor
    shifted_content: torch.Tensor
    content_lens: torch.Tensor
    style: torch.Tensor
    f0: torch.Tensor | None

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        return Batch._make(value if value is None else value.to(device, non_blocking=True) for value in self)


def collate(items: Sequence[Item]) -> Batch:
    """Stack clips, padded to the longest."""
    f0 = [item.f0 for item in items if item.f0 is not None]
    return Batch(
        mel=_stack([item.mel for item in items], dim=1, value=MEL_PADDING),
        mel_lens=torch.tensor([item.mel.shape[1] for item in items]),
        content=_stack([item.content for item in items]),
        shifted_content=_stack([item.shifted_content for item in items]),
        content_lens=torch.tensor([len(item.content) for item in items]),
        style=torch.stack([item.style for item in items]),
        f0=_stack(f0) if f0 else None,
    )


def _stack(tensors: Sequence[torch.Tensor], dim: int = 0, value: float = 0.0) -> torch.Tensor:
    """Stack tensors that differ in length along ``dim``."""
    longest = max(tensor.shape[dim] for tensor in tensors)

    def padded(tensor: torch.Tensor) -> torch.Tensor:
        after = [0, 0] * (tensor.dim() - 1 - dim) + [0, longest - tensor.shape[dim]]
        return functional.pad(tensor, after, value=value)

    return torch.stack([padded(tensor) for tensor in tensors])


def loader(
    dataset: Dataset[Item], batches: EpochBatches, num_workers: int = 0, *, pin_memory: bool = False
) -> DataLoader[Item]:
    """Batches of one epoch, the same for any number of workers; no global random state is read or changed.

    Iterating yields `Batch`. The generator is the loader's own: without one, iterating would draw a seed for
    the workers from torch's global generator, and a resumed run would diverge from an uninterrupted one.
    """
    if num_workers:
        atexit.unregister(_end_workers)
        atexit.register(_end_workers)  # the last one registered is the first one called
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=ignore_in_worker,
        generator=torch.Generator().manual_seed(0),
    )


def _end_workers() -> None:
    """At exit, kill what an error left running: workers ignore the SIGTERM after which Python would wait for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report the kills as errors of their own
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
