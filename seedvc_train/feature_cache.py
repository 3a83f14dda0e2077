"""The features of a corpus, computed once for all runs that hear it through the same front end."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import blake2b

import torch
from torch.utils.data import Dataset

from seedvc_ckpt.errors import SaveFailedError, StorageError
from seedvc_ckpt.storage import open_storage
from seedvc_ckpt.threads import in_parallel
from seedvc_train.audio import MelSpectrogram
from seedvc_train.dataset import Corpus, Item, check_rate, mixed_seed, one_thread
from seedvc_train.features import FrontEnd
from seedvc_train.features.stored import DamagedFeaturesError, as_bytes, check, read

__all__ = ["CachedClips", "Disguise", "FeatureCache", "FeatureCacheError"]

Disguise = Callable[[str, int], torch.Generator]
"""From a clip's digest and the number of a copy to what is random about that copy."""

_FORMAT = 1  # to be raised whenever the same recording gets other features by the same settings
_SHIFTED = "shifted_content"

_log = logging.getLogger(__name__)


class FeatureCacheError(RuntimeError):
    """Features can't be computed or kept."""


class FeatureCache:
    """A folder with one file of features for each clip of a corpus.

    The name of a file is a digest of its *recipe*: of the recording's own digest and of all that decides what is heard
    in it. So runs, folders of recordings and settings can share a folder, and nothing in it is ever out of date. Files
    appear whole or not at all; whoever needs one that is missing writes it, and if two do at once both write the same.

    A clip has ``shifts`` disguised copies, decided by its digest and their numbers alone; the front end hears the clip
    and its copies in one call.

    Args:
        folder: where the files are; made when the first is written.
        corpus: the recordings.
        mel: computes their mel spectrograms.
        front_end: hears the rest; must stand being called from several threads.
        shifts: disguised copies of each clip.
        disguise: decides them, if not as for training.
        purpose: names what they are for then, and is part of the recipe.

    Raises:
        ValueError: ``mel`` expects another sample rate than the corpus is read at.
    """

    def __init__(
        self,
        folder: str,
        corpus: Corpus,
        mel: MelSpectrogram,
        front_end: FrontEnd,
        shifts: int,
        disguise: Disguise | None = None,
        purpose: str = "",
    ) -> None:
        check_rate(corpus, mel)
        self._disguise, self._purpose = disguise or _training_disguise, purpose
        self.folder, self.corpus, self.shifts = folder, corpus, shifts
        self._mel, self._front_end = mel, front_end
        self._identity = front_end.identity  # a digest of weights need not be computed for each clip

    def path(self, index: int) -> str:
        """The file of clip ``index``."""
        return os.path.join(self.folder, self._name(index))

    def item(self, index: int, shift: int) -> Item:
        """Clip ``index`` with its disguised copy number ``shift``, read from the cache.

        Raises:
            DamagedFeaturesError: its file is missing or damaged.
        """
        shifted = f"{_SHIFTED}.{shift}"
        found = read(self.path(index), self._recipe(index), ("mel", "content", shifted, "style", "f0"))
        return Item(found["mel"], found["content"], found[shifted], found["style"], found.get("f0"))

    def missing(self) -> list[int]:
        """The clips that have to be computed, judged by the headers of their files; damaged ones are logged."""
        return [index for index in range(len(self.corpus.clips)) if not self._is_there(index)]

    def fill(self, indexes: Sequence[int], threads: int, done: Callable[[], None] = lambda: None) -> int:
        """Compute the features of clips and keep them.

        Each clip is computed with one thread of torch's, whatever ``threads`` is: its bits depend on nothing else.

        Args:
            indexes: the clips; those that another process keeps meanwhile are left out.
            threads: how many are computed at the same time.
            done: called after each.

        Returns:
            How many were computed.

        Raises:
            FeatureCacheError: the folder can't be written to, or a front end hears what is no number.
            DatasetError: a recording has changed since the scan.
        """
        if not indexes:
            return 0
        self._tidy()
        first = int.from_bytes(os.urandom(4), "big") % len(indexes)  # processes that begin together share the work
        computed, guard = 0, threading.Lock()

        def keep(index: int) -> None:
            nonlocal computed
            needed = not self._is_there(index)
            if needed:
                self._keep(index)
            with guard:
                computed += needed
                done()

        with one_thread():  # the threads that are started now take it over
            in_parallel([partial(keep, index) for index in (*indexes[first:], *indexes[:first])], threads)
        return computed

    def repair(self, indexes: Sequence[int]) -> None:
        """Read the files of clips to their last byte, and compute those anew that are missing or damaged.

        Raises:
            FeatureCacheError, DatasetError: as `fill`.
        """
        with one_thread():
            for index in indexes:
                try:
                    read(self.path(index), self._recipe(index))
                except DamagedFeaturesError as error:
                    _log.warning("%s; computing it again", error)
                    self._keep(index)

    def nbytes(self) -> int:
        """The size of the corpus's files."""
        return sum(os.path.getsize(path) for path in {self.path(index) for index in range(len(self.corpus.clips))})

    def _is_there(self, index: int) -> bool:
        path = self.path(index)
        try:
            check(path, self._recipe(index))
        except DamagedFeaturesError as error:
            if os.path.lexists(path):
                _log.warning("%s; computing it again", error)
            return False
        return True

    def _keep(self, index: int) -> None:
        content = as_bytes(self._hear(index), self._recipe(index))
        try:
            open_storage(self.folder).publish(self._name(index), len(content), [memoryview(content)], overwrite=True)
        except SaveFailedError as error:
            reason = getattr(error.__cause__, "strerror", None) or "No space left on device"
            free = "" if error.free is None else f", {error.free:,} are free"
            raise FeatureCacheError(
                f"can't keep features in {self.folder}: {reason}. A clip needs {len(content):,} bytes{free}. What is "
                "there stays and is used by the next start; name another folder with --feature-cache, or compute "
                "features in every step with --feature-cache off"
            ) from error

    def _hear(self, index: int) -> dict[str, torch.Tensor]:
        clip, wave = self.corpus.clips[index], self.corpus.read(index)
        shifts = [self._disguise(clip.digest, k) for k in range(self.shifts)]
        with torch.no_grad():
            heard = self._front_end(wave, self.corpus.sr, shifts)
            tensors = {"mel": self._mel(wave), "content": heard.content, "style": heard.style}
        tensors |= {f"{_SHIFTED}.{k}": content for k, content in enumerate(heard.shifted_contents)}
        if heard.f0 is not None:
            tensors["f0"] = heard.f0
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise FeatureCacheError(f"{name} of {clip.path!r} holds values that are not finite (NaN or infinite)")
        return tensors

    def _recipe(self, index: int) -> str:
        return json.dumps(
            {
                "format": _FORMAT,
                "clip": self.corpus.clips[index].digest,
                "mel": self._mel.settings,
                "front end": self._identity,
                "shifts": self.shifts,
                **({"purpose": self._purpose} if self._purpose else {}),
            }
        )

    def _name(self, index: int) -> str:
        return f"{blake2b(self._recipe(index).encode(), digest_size=16).hexdigest()}.safetensors"

    def _tidy(self) -> None:
        """Remove what killed processes left."""
        storage = open_storage(self.folder)
        for leftover in storage.leftovers():
            try:
                storage.remove_leftover(leftover)
            except StorageError as error:  # it takes room, no more
                _log.warning("%s", error)


def _training_disguise(digest: str, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(mixed_seed(int(digest, 16), number))


class CachedClips(Dataset[Item]):
    """The clips of a cache in one epoch; which disguised copy is heard depends on (seed, epoch, index) alone."""

    def __init__(self, cache: FeatureCache, seed: int, epoch: int) -> None:
        self.cache, self.seed, self.epoch = cache, seed, epoch

    def __len__(self) -> int:
        return len(self.cache.corpus.clips)

    def __getitem__(self, index: int) -> Item:
        """Read clip ``index``.

        Raises:
            DamagedFeaturesError: its file is missing or damaged.
        """
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch, index))
        return self.cache.item(index, int(torch.randint(self.cache.shifts, (), generator=generator)))
