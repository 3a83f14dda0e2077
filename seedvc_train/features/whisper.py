"""What is said, as the encoder of Whisper hears it."""

from __future__ import annotations

import torch
from torch import nn

from seedvc_train.features.pretrained import Pretrained
from seedvc_train.features.weights import EncoderError, build_empty, digest, fill, require

__all__ = ["WhisperEncoder"]

_SR = 16_000
_HOP = 320  # samples a frame, after the two convolutions


class WhisperEncoder:
    """The encoder of a Whisper model (Radford et al., "Robust speech recognition via large-scale weak
    supervision", 2022), through ``transformers``; its decoder is never loaded.

    It computes in float32, Seed-VC's services in float16: features differ by the latter's rounding.

    Args:
        name: a folder that ``save_pretrained`` wrote, or a repository on Hugging Face's hub.
        device: where it runs.

    Raises:
        EncoderError: the model is missing, damaged, or no Whisper model.
    """  # noqa: D205 - the reference is part of the first sentence

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        require("transformers", "transformers")
        from transformers import WhisperConfig, WhisperFeatureExtractor
        from transformers.models.whisper.modeling_whisper import WhisperEncoder as Encoder

        files = Pretrained.find(name, "whisper")
        config = files.parse_config(WhisperConfig)
        self._extractor = files.extractor(WhisperFeatureExtractor, _SR)
        frames = self._extractor.nb_max_frames
        if self._extractor.feature_size != config.num_mel_bins or frames != 2 * config.max_source_positions:
            raise EncoderError(
                f"{name}: its feature extractor gives {self._extractor.feature_size} bins and {frames} frames, its "
                f"encoder takes {config.num_mel_bins} and {2 * config.max_source_positions}"
            )
        self._encoder = build_empty(lambda: Encoder(config))
        fill(self._encoder, files.state("model.encoder.", "encoder."), files.weights)
        self.identity = f"whisper {digest(self._encoder)}"
        self.dim = int(config.d_model)
        self._device = torch.device(device)
        nn.Module.to(self._encoder, self._device)

    @torch.no_grad()
    def __call__(self, waves: torch.Tensor) -> torch.Tensor:
        """Hear waves of equal lengths.

        Args:
            waves: float32 at 16 kHz, (B, samples), at most as long as the model's window, 30 s.

        Returns:
            The last hidden states, (B, frames, dim), float32 on the CPU. There are samples // 320 + 1 frames, as
            Seed-VC takes them; only a wave that fills the window has one less, since the window has no more.

        Raises:
            ValueError: the waves are longer than the window.
        """
        samples = waves.shape[-1]
        if samples >= self._extractor.n_samples + _HOP:  # a fraction of a frame may come from resampling
            window = self._extractor.n_samples / _SR
            raise ValueError(f"{samples / _SR:.2f} s of audio, but Whisper's window holds {window:g} s")
        heard = self._extractor(list(waves.cpu().numpy()), sampling_rate=_SR, return_tensors="pt")
        states: torch.Tensor = self._encoder(heard.input_features.to(self._device)).last_hidden_state
        return states[:, : samples // _HOP + 1].cpu()
