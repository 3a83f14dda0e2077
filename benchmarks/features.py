"""What a step costs with frozen encoders in it, and from kept features: `python -m benchmarks.features FOLDER`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Sequence

import torch

from benchmarks.states import preset_config
from seedvc_ckpt.threads import available_cores
from seedvc_train.audio import MelSpectrogram, resample
from seedvc_train.corpus import write_demo_corpus
from seedvc_train.data import TrainingData
from seedvc_train.dataset import Batch, scan
from seedvc_train.feature_cache import FeatureCache
from seedvc_train.features import Features
from seedvc_train.features.builtin import BuiltinFrontEnd
from seedvc_train.features.whisper import WhisperEncoder
from seedvc_train.loop import training_loss
from seedvc_train.model import build_model
from seedvc_train.optim import clip_gradients
from seedvc_train.state import TrainingState

__all__ = ["compare"]

_SR = 16_000
_BATCH = 2
_SHIFTS = 4
_WIDTH = 512


def compare(folder: str, clips: int = 12, layers: int = 6) -> dict[str, float]:
    """Seconds of a training step of the ``xlsr_tiny`` DiT, by where content comes from and by loader processes.

    Content comes from an encoder of Whisper base's shape with random weights, which hears a clip and one disguised
    copy in each step; the disguise is a gain, which costs nothing. Each figure is the mean over one epoch or more.

    Args:
        folder: Where recordings, model and cache go.
        clips: Recordings, an even number.
        layers: Of the encoder; 6 are Whisper base's.
    """
    recordings = os.path.join(folder, "recordings")
    write_demo_corpus(recordings, clips=clips // 2)
    params = preset_config("xlsr_tiny").model_dump(by_alias=True)
    params["model_params"]["length_regulator"]["in_channels"] = _WIDTH
    sound = params["preprocess_params"]
    corpus = scan(recordings, sound["sr"], progress=False)
    mel = MelSpectrogram(sound["sr"], **sound["spect_params"])
    whisper = _whisper_base(os.path.join(folder, "whisper"), layers)
    front_end = _Whisper(whisper, params["model_params"]["style_encoder"]["dim"])
    cache = FeatureCache(os.path.join(folder, "cache"), corpus, mel, front_end, _SHIFTS)
    torch.manual_seed(0)
    state = TrainingState.fresh(build_model(params["model_params"]), 1e-5)

    began = time.perf_counter()
    cache.fill(cache.missing(), available_cores())
    found = {"computing a clip": (time.perf_counter() - began) / len(corpus.clips)}
    found["bytes a second"] = cache.nbytes() / corpus.seconds
    found["clips"], found["seconds"] = len(corpus.clips), corpus.seconds
    warm_up = TrainingData(corpus, mel, front_end, _BATCH, seed=0, num_workers=0, cache=cache)
    _seconds_per_step(state, warm_up.batches(0, 0))
    for name, source, epochs in (("cache", cache, 2), ("off", None, 1)):
        for workers in (0, 2):
            data = TrainingData(corpus, mel, front_end, _BATCH, seed=0, num_workers=workers, cache=source)
            found[f"{name} {workers}"] = (
                sum(_seconds_per_step(state, data.batches(epoch, 0)) for epoch in range(epochs)) / epochs
            )
    return found


def _seconds_per_step(state: TrainingState, batches: Iterable[Batch]) -> float:
    began, steps = time.perf_counter(), 0
    for batch in batches:
        state.model.zero_grad(set_to_none=True)
        training_loss(state.model, batch).backward()  # type: ignore[no-untyped-call]
        clip_gradients(state.model)
        for optimizer in state.optimizers.values():
            optimizer.step()
        steps += 1
    return (time.perf_counter() - began) / steps


class _Whisper:
    """Content by Whisper, style by the built-in front end."""

    def __init__(self, model: str, style_dim: int) -> None:
        self._encoder = WhisperEncoder(model)
        self._builtin = BuiltinFrontEnd(_WIDTH, style_dim)
        self.identity = f"{self._encoder.identity}, disguised by a gain"

    def __call__(self, wave: torch.Tensor, sr: int, shifts: Sequence[torch.Generator]) -> Features:
        heard = torch.from_numpy(resample(wave.numpy(), sr, _SR))
        gains = [0.5 + 0.5 * torch.rand((), generator=generator) for generator in shifts]
        content, *shifted = self._encoder(torch.stack([heard, *(gain * heard for gain in gains)]))
        return Features(content, tuple(shifted), self._builtin(wave, sr, []).style, None)


def _whisper_base(folder: str, layers: int) -> str:
    """A model of the shape of openai/whisper-base, whose weights can't be had everywhere, in a folder."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=_WIDTH,
        encoder_layers=layers,
        encoder_attention_heads=8,
        encoder_ffn_dim=2048,
        decoder_layers=1,  # which the encoder is saved with, and nothing reads
        decoder_attention_heads=8,
    )
    WhisperModel(config).save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    return folder


if __name__ == "__main__":
    print(json.dumps(compare(sys.argv[1], *map(int, sys.argv[2:]))))  # noqa: T201
