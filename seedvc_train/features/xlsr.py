"""What is said, as the first layers of XLS-R hear it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from seedvc_train.features.pretrained import Pretrained
from seedvc_train.features.weights import EncoderError, build_empty, digest, fill, require

__all__ = ["XlsrEncoder"]

_SR = 16_000


class XlsrEncoder:
    """The first layers of a wav2vec 2.0 model such as XLS-R (Babu et al., "XLS-R: Self-supervised cross-lingual
    speech representation learning at scale", 2021), through ``transformers``.

    The layers after ``output_layer`` are not loaded. What the model does after its last layer stays: the layer norm
    at the end of the pre-norm kind, which XLS-R is. Seed-VC cuts it in the same way, at training and in its
    services, but computes in float16, this in float32: features differ by the former's rounding.

    Args:
        name: a folder that ``save_pretrained`` wrote, or a repository on Hugging Face's hub.
        output_layer: layers to run; None for all.
        device: where it runs.

    Raises:
        EncoderError: the model is missing, damaged, no wav2vec 2.0 model, or has fewer layers.
    """  # noqa: D205 - the reference is part of the first sentence

    def __init__(self, name: str, output_layer: int | None = None, device: torch.device | str = "cpu") -> None:
        require("transformers", "transformers")
        from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor

        files = Pretrained.find(name, "wav2vec2")
        config = files.parse_config(Wav2Vec2Config)
        if output_layer is not None and not 1 <= output_layer <= config.num_hidden_layers:
            raise EncoderError(
                f"{name}: has {config.num_hidden_layers} layers, speech_tokenizer.output_layer asks for {output_layer}"
            )
        config.num_hidden_layers = output_layer or config.num_hidden_layers
        self._extractor = files.extractor(Wav2Vec2FeatureExtractor, _SR)
        self._config = config
        self._device = torch.device(device)
        # The file holds later layers too, and the heads that the model was trained with.
        self._model = self._filled(files.state("wav2vec2."), files.weights)
        normalised = "normalised" if self._extractor.do_normalize else "as it is"
        self.identity = f"wav2vec2 {digest(self._model)} {config.num_hidden_layers} layers, input {normalised}"
        self.dim = int(config.hidden_size)

    def _filled(self, state: dict[str, torch.Tensor], path: str) -> nn.Module:
        from transformers import Wav2Vec2Model

        model = build_empty(lambda: Wav2Vec2Model(self._config))
        fill(model, state, path, strict=False)
        return nn.Module.to(model, self._device)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_model": self._model.state_dict()}  # torch does not pickle its weight norm

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._model = self._filled(state["_model"], "a pickled encoder")

    @torch.no_grad()
    def __call__(self, waves: torch.Tensor) -> torch.Tensor:
        """Hear waves of equal lengths.

        Args:
            waves: float32 at 16 kHz, (B, samples), at least 400 samples.

        Returns:
            The hidden states after the layer asked for, (B, frames, dim), float32 on the CPU; a frame takes 400
            samples and the next begins 320 later.
        """
        heard = self._extractor(list(waves.cpu().numpy()), sampling_rate=_SR, return_tensors="pt")
        states: torch.Tensor = self._model(heard.input_values.to(self._device)).last_hidden_state
        return states.cpu()
