"""How good a model is on recordings that it was not trained on, in numbers that compare.

All that is random comes from the digest of a clip and nothing else; every clip is computed by itself, without padding.
So the numbers of two checkpoints, runs or machines differ by the weights and by rounding alone, and no global random
state is read or changed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from statistics import fmean
from typing import cast

import torch
from torch import Tensor, nn

from seedvc_ckpt.threads import in_parallel
from seedvc_train.audio import MelSpectrogram
from seedvc_train.dataset import Clip, Corpus, Item, one_thread
from seedvc_train.feature_cache import FeatureCache
from seedvc_train.features import FrontEnd
from seedvc_train.features.stored import DamagedFeaturesError
from seedvc_train.model import FlowMatching, evaluating
from seedvc_train.model.dit import length_mask

__all__ = [
    "GUIDANCE",
    "Sampled",
    "ValidationClip",
    "ValidationError",
    "ValidationSet",
    "hear",
    "split",
    "validation_cache",
]

_VERSION = 1  # of the numbers: those of another version don't compare
_TIMES = 8  # of the flow, for each clip
_PROMPT = 3  # the first 1/3 of a clip is the prompt of a sample
_NO_PROMPT = 0.1
GUIDANCE = 0.7
"""Strength of the classifier-free guidance of samples: the default of Seed-VC's conversion."""


class ValidationError(ValueError):
    """Recordings that can't be set aside for validation."""


def split(corpus: Corpus, fraction: float) -> tuple[Corpus, Corpus]:
    """The clips to train on, and about `fraction` of all that are not: those whose digest says so.

    A clip stays on its side whatever else comes or goes, and copies of one recording are on one side.

    Raises:
        ValidationError: if one of the two sides would be empty.
    """
    held_out = [_place(clip.digest) < fraction for clip in corpus.clips]
    kept = tuple(clip for clip, out in zip(corpus.clips, held_out, strict=True) if not out)
    validation = tuple(clip for clip, out in zip(corpus.clips, held_out, strict=True) if out)
    if not kept or not validation:
        side = "to validate on" if kept else "to train on"
        raise ValidationError(
            f"a split of {fraction:g} leaves none of the {len(corpus.clips)} clips in {corpus.root!r} {side}: choose "
            "another fraction, or keep the clips for validation in a folder of their own (--val-dir)"
        )
    return replace(corpus, clips=kept), replace(corpus, clips=validation)


def _place(digest: str) -> float:
    """Where a clip stands among all that could be, from 0 to 1."""
    return int.from_bytes(blake2b(f"validation {digest}".encode(), digest_size=8).digest(), "big") / 2**64


@dataclass(frozen=True)
class ValidationClip:
    """A clip with all that the front end hears in it."""

    clip: Clip
    item: Item

    def generator(self, purpose: str) -> torch.Generator:
        """What is random about it, another for each purpose."""
        return _generator(self.clip.digest, purpose)

    @property
    def frames(self) -> int:
        """Of its mel."""
        return self.item.mel.shape[1]


@dataclass(frozen=True)
class Sampled:
    """A mel that a model made of a clip.

    Attributes:
        mel: (C, T), the prompt's frames as they were given.
        prompt: Number of those.
        distance: Mean absolute difference from the true mel over all other frames and bins, in ln.
    """

    mel: Tensor
    prompt: int
    distance: float


@dataclass(frozen=True)
class ValidationSet:
    """Recordings that are not trained on, heard.

    Attributes:
        clips: In no particular order.
        identity: What numbers on it are computed on: equal where they compare.
    """

    clips: tuple[ValidationClip, ...]
    identity: str

    def loss(self, model: nn.ModuleDict, done: Callable[[], object] = lambda: None) -> float:
        """The flow-matching loss in evaluation mode, without class dropout: the mean over clips.

        Each clip is taken at eight times of the flow, one in each eighth of [0, 1], with a noise and a prompt length of
        its own each, as training draws them.

        Args:
            model: `cfm` and `length_regulator`, left as it was.
            done: Called after each clip.
        """
        losses = []
        with torch.no_grad(), evaluating(model):
            for clip in self.clips:
                losses.append(_loss(model, clip))
                done()
        return fmean(losses)

    def sample(self, model: nn.ModuleDict, clip: ValidationClip, steps: int) -> Sampled:
        """Let a model speak a clip again, from its own first third as prompt, in `steps` Euler steps.

        As at conversion, the voice comes from the prompt and the clip's style, what is said from the disguised copy;
        pitch is the clip's own.
        """
        device = next(model.parameters()).device
        prompt = clip.frames // _PROMPT
        mel = clip.item.mel.to(device)[None]
        lens = torch.tensor([clip.frames], device=device)
        with torch.no_grad(), evaluating(model):
            cond = _conditions(model, clip, torch.tensor([prompt], device=device))
            z = torch.randn(mel.shape, generator=clip.generator("sample")).to(device)
            cfm = cast("FlowMatching", model["cfm"])
            style = clip.item.style.to(device)[None]
            made = cfm.sample(cond, lens, mel[..., :prompt], style, steps, GUIDANCE, z)
        made[..., :prompt] = mel[..., :prompt]
        distance = (made - mel)[..., prompt:].abs().mean().item()
        return Sampled(made[0].cpu(), prompt, distance)


def hear(
    corpus: Corpus,
    mel: MelSpectrogram,
    front_end: FrontEnd,
    done: Callable[[], object] = lambda: None,
    *,
    threads: int = 1,
    cache: FeatureCache | None = None,
) -> ValidationSet:
    """Listen to all clips of a corpus, once for all validations; they stay in memory.

    Each clip is heard by one thread of torch's, so that what is heard is the same with a cache and without.

    Args:
        corpus: The recordings.
        mel: As in training.
        front_end: As in training.
        done: Called after each clip, by one thread at a time.
        threads: How many clips are heard at the same time.
        cache: `validation_cache` of the same; what it holds is not heard again.

    Raises:
        DatasetError: if a file has changed since the scan.
        FeatureCacheError: if the cache can't be written.
    """
    items: dict[int, Item] = {}
    guard = threading.Lock()

    def listen(index: int) -> None:
        items[index] = _hear(corpus, index, mel, front_end) if cache is None else _cached(cache, index)
        with guard:
            done()

    with one_thread():  # the threads that are started now take it over
        in_parallel([partial(listen, index) for index in range(len(corpus.clips))], threads)
    clips = tuple(ValidationClip(clip, items[index]) for index, clip in enumerate(corpus.clips))
    return ValidationSet(clips, _identity(corpus.clips, corpus.sr, front_end.identity))


def validation_cache(folder: str, corpus: Corpus, mel: MelSpectrogram, front_end: FrontEnd) -> FeatureCache:
    """Where what `hear` hears can be kept from run to run; training's own files in the folder are others."""
    return FeatureCache(folder, corpus, mel, front_end, 1, _disguise, f"validation {_VERSION}")


def _hear(corpus: Corpus, index: int, mel: MelSpectrogram, front_end: FrontEnd) -> Item:
    wave = corpus.read(index)
    with torch.no_grad():
        heard = front_end(wave, corpus.sr, [_disguise(corpus.clips[index].digest, 0)])
        return Item(mel(wave), heard.content, heard.shifted_contents[0], heard.style, heard.f0)


def _cached(cache: FeatureCache, index: int) -> Item:
    try:
        item = cache.item(index, 0)
    except DamagedFeaturesError:
        cache.repair([index])
        item = cache.item(index, 0)
    # a file that is damaged under a run, whose memory theirs is, must not change its later scores
    mel, content, shifted, style = (it.clone() for it in (item.mel, item.content, item.shifted_content, item.style))
    return Item(mel, content, shifted, style, None if item.f0 is None else item.f0.clone())


def _disguise(digest: str, _number: int) -> torch.Generator:
    return _generator(digest, "shift")


def _identity(clips: Sequence[Clip], sr: int, front_end: str) -> str:
    lines = "".join(sorted(f"{clip.digest}\n" for clip in clips))
    digest = blake2b(lines.encode(), digest_size=8).hexdigest()
    return f"version {_VERSION}, {len(clips)} clips {digest} at {sr} Hz, {front_end}"


def _generator(digest: str, purpose: str) -> torch.Generator:
    seed = blake2b(f"{_VERSION} {purpose} {digest}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(seed, "big"))


def _loss(model: nn.ModuleDict, clip: ValidationClip) -> float:
    generator = clip.generator("loss")
    t = (torch.arange(_TIMES) + torch.rand(_TIMES, generator=generator)) / _TIMES
    prompts = (torch.rand(_TIMES, generator=generator) * max(clip.frames - 1, 0)).floor().long()
    prompts = prompts.masked_fill(torch.rand(_TIMES, generator=generator) < _NO_PROMPT, 0)
    z = torch.randn(_TIMES, *clip.item.mel.shape, generator=generator)

    device = next(model.parameters()).device
    prompts = prompts.to(device)
    mel = clip.item.mel.to(device).expand(_TIMES, -1, -1)
    style = clip.item.style.to(device).expand(_TIMES, -1)
    lens = torch.full((_TIMES,), clip.frames, device=device)
    cond = _conditions(model, clip, prompts)
    cfm = cast("FlowMatching", model["cfm"])
    return cfm.loss(mel, lens, prompts, cond, style, t.to(device), z.to(device)).item()


def _conditions(model: nn.ModuleDict, clip: ValidationClip, prompts: Tensor) -> Tensor:
    """What the length regulator makes of a clip, disguised after the prompt: (B, T, channels) for B prompt lengths."""
    regulate, item, device = model["length_regulator"], clip.item, prompts.device
    lens = torch.tensor([clip.frames], device=device)
    f0 = None if item.f0 is None else item.f0.to(device)[None]
    true = regulate(item.content.to(device)[None], ylens=lens, f0=f0)
    disguised = regulate(item.shifted_content.to(device)[None], ylens=lens, f0=f0)
    in_prompt = length_mask(prompts, clip.frames)[..., None]
    return torch.where(in_prompt, true, disguised)
