"""A front end that takes its time, and a process that fills a cache through it and prints how many clips it computed.

Its arguments: CONFIG RECORDINGS FOLDER SHIFTS SECONDS.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import torch

from seedvc_train.audio import MelSpectrogram
from seedvc_train.config import load_config
from seedvc_train.dataset import scan
from seedvc_train.feature_cache import FeatureCache
from seedvc_train.features import Features
from seedvc_train.features.builtin import BuiltinFrontEnd


class SlowFrontEnd(BuiltinFrontEnd):
    """The built-in one, which waits before it answers."""

    seconds = 0.0

    def __call__(self, wave: torch.Tensor, sr: int, shifts: Sequence[torch.Generator]) -> Features:
        time.sleep(self.seconds)
        return super().__call__(wave, sr, shifts)


def cache_of(config: str, recordings: str, folder: str, shifts: int, seconds: float = 0.0) -> FeatureCache:
    """The cache that a run of this config has, with the built-in front end."""
    parsed = load_config(config)
    sound, model = parsed.preprocess_params, parsed.model_params
    mel = MelSpectrogram(sound.sr, **sound.spect_params.model_dump())
    front_end = SlowFrontEnd(model.length_regulator.in_channels, model.style_encoder.dim)
    front_end.seconds = seconds
    return FeatureCache(folder, scan(recordings, sound.sr, progress=False), mel, front_end, shifts)


if __name__ == "__main__":
    cache = cache_of(*sys.argv[1:4], int(sys.argv[4]), float(sys.argv[5]))
    sys.stdout.write(f"{cache.fill(cache.missing(), threads=2)}\n")
