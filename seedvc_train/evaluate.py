"""Checkpoints of a run, scored one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import fmean
from typing import Literal

from torch import nn

from seedvc_ckpt import CheckpointInfo, CheckpointNotFoundError, CheckpointStore, CorruptCheckpointError
from seedvc_train.places import AVERAGED, picture_name
from seedvc_train.validation import Sampled, ValidationClip, ValidationSet
from seedvc_train.weights import StateError, load_weights

__all__ = ["Evaluation", "Scored"]

_PICTURES = "mels"


@dataclass(frozen=True)
class Scored:
    """What became of a checkpoint.

    Attributes:
        info: The checkpoint.
        scores: Its numbers by metric; empty if it could not be scored.
        problem: Why not.
        picture: Name of its picture below the run's folder.
    """

    info: CheckpointInfo
    scores: dict[str, float]
    problem: str = ""
    picture: str = ""


@dataclass(frozen=True)
class Evaluation:
    """How checkpoints are scored.

    Attributes:
        store: The run.
        model: What their weights are loaded into, one at a time.
        data: What they are scored on.
        euler_steps: Of each sampled mel.
        pictures: For how many clips mels are drawn; none without matplotlib.
        frame_seconds: Duration of a mel frame.
        weights: "net", or "ema" for their averages, whose metrics have names of their own.
    """

    store: CheckpointStore
    model: nn.ModuleDict
    data: ValidationSet
    euler_steps: int
    pictures: int
    frame_seconds: float
    weights: Literal["net", "ema"] = "net"

    @property
    def metrics(self) -> tuple[str, str]:
        """The names of the validation loss and of the distance of sampled mels."""
        return f"val_loss{self._mark}", f"mel_distance{self._mark}"

    @property
    def _mark(self) -> str:
        return AVERAGED if self.weights == "ema" else ""

    @property
    def on(self) -> dict[str, str]:
        """By metric, what it is computed on."""
        loss, distance = self.metrics
        return {loss: self.data.identity, distance: f"{self.data.identity}, {self.euler_steps} Euler steps"}

    @property
    def work(self) -> int:
        """How often `done` is called for each checkpoint."""
        return 2 * len(self.data.clips)

    def unscored(self) -> list[CheckpointInfo]:
        """The checkpoints that lack a score on this data, ascending."""
        known = self.store.scores(on=self.on)
        return [info for info, scores in known.items() if not all(metric in scores for metric in self.metrics)]

    def score(self, infos: Sequence[CheckpointInfo], done: Callable[[], object] = lambda: None) -> Iterator[Scored]:
        """Score checkpoints, write the scores down, and draw mels; one checkpoint at a time is in memory.

        A damaged one, and one that is pruned meanwhile, is told and left out.

        Raises:
            StateError: if a checkpoint does not fit the model, or has not the weights that are scored.
            CheckpointError: if the run can't be read or written.
        """
        for info in infos:
            try:
                load_weights(self.model, self.store.load(info), self.weights)
                yield self._scored(info, done)
            except StateError as error:
                raise StateError(f"{info.name} can't be scored: {error}") from None
            except (CorruptCheckpointError, CheckpointNotFoundError) as error:
                yield Scored(info, {}, str(error))

    def _scored(self, info: CheckpointInfo, done: Callable[[], object]) -> Scored:
        loss = self.data.loss(self.model, done)
        samples: list[tuple[ValidationClip, Sampled]] = []
        distances = []
        for clip in self._by_digest():
            sampled = self.data.sample(self.model, clip, self.euler_steps)
            distances.append(sampled.distance)
            if len(samples) < self.pictures:
                samples.append((clip, sampled))
            done()
        scores = dict(zip(self.metrics, (loss, fmean(distances)), strict=True))
        self.store.add_scores(info, scores, on=self.on)
        return Scored(info, scores, picture=self._draw(info, scores, samples))

    def _by_digest(self) -> list[ValidationClip]:
        """The clips in an order that shows the same ones for every checkpoint, wherever they lie."""
        return sorted(self.data.clips, key=lambda clip: clip.clip.digest)

    def _draw(
        self, info: CheckpointInfo, scores: dict[str, float], samples: Sequence[tuple[ValidationClip, Sampled]]
    ) -> str:
        if not samples or find_spec("matplotlib") is None:
            return ""
        from seedvc_train.pictures import MelRow, mel_picture

        rows = [
            MelRow(
                clip.clip.path,
                clip.item.shifted_content,
                clip.item.mel,
                sampled.mel,
                sampled.prompt,
                self.frame_seconds,
                sampled.distance,
            )
            for clip, sampled in samples
        ]
        numbers = ", ".join(f"{metric} {value:.4f}" for metric, value in scores.items())
        picture = mel_picture(f"{self.store.run_name}, step {info.step}: {numbers}", rows)
        name = picture_name(info.name, self._mark)
        self.store.storage.below(_PICTURES).publish(name, len(picture), [memoryview(picture)], overwrite=True)
        return f"{_PICTURES}/{name}"
