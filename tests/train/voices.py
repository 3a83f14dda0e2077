"""Voices whose pitch and formants are known because they are made up."""

import numpy as np
import torch

VOWEL = ((700.0, 90.0), (1220.0, 110.0), (2600.0, 160.0))  # centres and widths of three formants, Hz


def sung(f0: np.ndarray, sr: int, formants=VOWEL, noise: float = 0.003, seed: int = 0) -> torch.Tensor:
    """A vowel at a pitch in Hz that is given for each sample, 0 for silence; float32, peak about 0.5."""
    phase = 2 * np.pi * np.cumsum(f0) / sr
    wave = np.zeros(len(f0))
    for harmonic in range(1, int(0.45 * sr / max(f0.max(), 1.0)) + 1):
        hz = harmonic * f0
        gain = 0.1 + sum(1 / (1 + ((hz - centre) / width) ** 2) for centre, width in formants)
        wave += np.where(f0 > 0, gain / np.sqrt(harmonic) * np.sin(harmonic * phase), 0)
    wave *= 0.5 / max(np.abs(wave).max(), 1e-9)
    wave += noise * np.random.default_rng(seed).standard_normal(len(f0))
    return torch.from_numpy(wave.astype(np.float32))


def seconds(length: float, sr: int) -> np.ndarray:
    return np.arange(round(length * sr)) / sr
