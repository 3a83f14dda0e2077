"""Recordings and front end together: what a run trains on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from seedvc_train.audio import MelSpectrogram
from seedvc_train.dataset import Batch, ClipDataset, Corpus, EpochBatches, loader
from seedvc_train.features import FrontEnd

__all__ = ["TrainingData"]


@dataclass(frozen=True)
class TrainingData:
    """Everything that decides the batches of a run, how many processes prepare them, and in which memory."""

    corpus: Corpus
    mel: MelSpectrogram
    front_end: FrontEnd
    batch_size: int
    seed: int
    num_workers: int
    pin_memory: bool = False

    def batches(self, epoch: int, position: int) -> Iterable[Batch]:
        """The batches of an epoch from a position on."""
        order = EpochBatches(len(self.corpus.clips), self.batch_size, self.seed, epoch, position)
        clips = ClipDataset(self.corpus, self.mel, self.front_end, self.seed, epoch)
        return loader(clips, order, self.num_workers, pin_memory=self.pin_memory)
