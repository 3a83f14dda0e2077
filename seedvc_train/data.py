"""Recordings and front end together: what a run trains on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch.utils.data import Dataset

from seedvc_train.audio import MelSpectrogram
from seedvc_train.dataset import Batch, ClipDataset, Corpus, EpochBatches, Item, loader
from seedvc_train.feature_cache import CachedClips, FeatureCache
from seedvc_train.features import FrontEnd
from seedvc_train.features.stored import DamagedFeaturesError

__all__ = ["TrainingData"]


@dataclass(frozen=True)
class TrainingData:
    """Everything that decides the batches of a run, how many processes prepare them, and in which memory.

    With a cache nothing is decoded or heard here: the files of a filled one are all that is read.
    """

    corpus: Corpus
    mel: MelSpectrogram
    front_end: FrontEnd
    batch_size: int
    seed: int
    num_workers: int
    pin_memory: bool = False
    cache: FeatureCache | None = None

    def batches(self, epoch: int, position: int) -> Iterable[Batch]:
        """The batches of an epoch from a position on."""
        if self.cache is not None:
            return self._cached(self.cache, epoch, position)
        clips = ClipDataset(self.corpus, self.mel, self.front_end, self.seed, epoch)
        return self._loaded(clips, self._order(epoch, position))

    def _cached(self, cache: FeatureCache, epoch: int, position: int) -> Iterator[Batch]:
        repaired = None
        while True:
            order = self._order(epoch, position)
            try:
                for batch in self._loaded(CachedClips(cache, self.seed, epoch), order):
                    yield batch
                    position += 1
            except DamagedFeaturesError as error:
                if position == repaired:
                    raise  # what was written a moment ago can't be read
                error.__traceback__ = None  # it keeps the loader, whose processes would live on
                cache.repair(next(iter(self._order(epoch, position))))  # here: a worker has no encoder on a GPU
                repaired = position
            else:
                return

    def _loaded(self, clips: Dataset[Item], order: EpochBatches) -> Iterable[Batch]:
        return loader(clips, order, self.num_workers, pin_memory=self.pin_memory)

    def _order(self, epoch: int, position: int) -> EpochBatches:
        return EpochBatches(len(self.corpus.clips), self.batch_size, self.seed, epoch, position)
