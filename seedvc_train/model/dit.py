"""The diffusion transformer over mel frames that estimates the flow, with an MLP or a WaveNet as its head.

Peebles and Xie, "Scalable Diffusion Models with Transformers", 2022.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name
from torch import Tensor, nn

from seedvc_train.model.transformer import Transformer
from seedvc_train.model.wavenet import WaveNet
from seedvc_train.model.weight_norm import WeightNormLinear

if TYPE_CHECKING:
    from seedvc_train.config import ModelParams

__all__ = ["DiT", "length_mask"]

_FREQUENCIES = 128
_LARGEST_PERIOD = 10000.0
_POSITIONS = 16384


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """(B, size), True on the first `lengths[b]` entries of row b."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


class _TimestepEmbedder(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        exponent = torch.arange(_FREQUENCIES, dtype=torch.float32) / _FREQUENCIES
        self.freqs: Tensor
        self.register_buffer("freqs", torch.exp(-math.log(_LARGEST_PERIOD) * exponent))
        self.mlp = nn.Sequential(nn.Linear(2 * _FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        with torch.autocast(t.device.type, enabled=False):  # neighbouring times are one and the same in 16 bits
            angle = 1000 * t[:, None] * self.freqs
            embedding: Tensor = self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))
        return embedding


class _FinalLayer(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = WeightNormLinear(dim, dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(time)[:, None].chunk(2, dim=-1)
        y: Tensor = self.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        return y


class DiT(nn.Module):
    """Estimate the flow at time t of a noisy mel, given a prompt, content and a speaker's style.

    `x_embedder`, `cond_embedder`, `content_mask_embedder` and, where its switch is off, `skip_linear` are
    never used: Seed-VC's checkpoints carry them and its optimizer counts them by position.
    """

    input_pos: Tensor

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        dit = params.dit
        dim, mels = dit.hidden_dim, dit.in_channels
        self.params = dit
        self.class_dropout_prob = dit.class_dropout_prob
        self.register_buffer("input_pos", torch.arange(_POSITIONS))
        self.transformer = Transformer(dit)
        self.x_embedder = WeightNormLinear(mels, dim)
        self.cond_embedder = nn.Embedding(dit.content_codebook_size, dim)
        self.cond_projection = nn.Linear(dit.content_dim, dim)
        self.t_embedder = _TimestepEmbedder(dim)
        if dit.final_layer_type == "wavenet":
            self._add_wavenet(params)
        else:
            self.final_mlp = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, mels))
        self.content_mask_embedder = nn.Embedding(1, dim)
        self.skip_linear = nn.Linear(dim + mels, dim)
        style_features = params.style_encoder.dim if dit.style_condition and not dit.style_as_token else 0
        self.cond_x_merge_linear = nn.Linear(2 * mels + dim + style_features, dim)
        if dit.style_as_token:
            self.style_in = nn.Linear(params.style_encoder.dim, dim)
        self._initialise()

    def _add_wavenet(self, params: ModelParams) -> None:
        if params.wavenet is None:
            raise ValueError("model_params.wavenet: missing, and DiT.final_layer_type is wavenet")
        dim = params.dit.hidden_dim
        self.t_embedder2 = _TimestepEmbedder(dim)
        self.conv1 = nn.Linear(dim, dim)
        self.conv2 = nn.Conv1d(dim, params.dit.in_channels, 1)
        self.wavenet = WaveNet(params.wavenet)
        self.final_layer = _FinalLayer(dim)
        self.res_projection = nn.Linear(dim, dim)

    @torch.no_grad()
    def _initialise(self) -> None:
        """DiT's initialisation: Xavier for projections, a small normal for embeddings and modulation.

        DiT zeroes its modulation and output weights. Here no gate turns a zero into an identity, so the norms
        start around scale 1 and shift 0, and both kinds of weight are small instead of zero: every parameter
        that is used has a gradient from the first step.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        small = [m for name, m in self.named_modules() if name.endswith("project_layer")]
        for norm_projection in small:
            norm_projection.bias[: self.params.hidden_dim] = 1.0
        small += [m for name, m in self.named_modules() if "t_embedder" in name and isinstance(m, nn.Linear)]
        if self.params.final_layer_type == "wavenet":
            small += [self.final_layer.adaLN_modulation[1], self.conv2]
        else:
            small.append(self.final_mlp[2])
        for module in small:
            nn.init.normal_(module.weight, std=0.02)

    def forward(
        self,
        x: Tensor,
        prompt_x: Tensor,
        x_lens: Tensor,
        t: Tensor,
        style: Tensor,
        cond: Tensor,
        mask_content: bool = False,  # noqa: FBT001, FBT002 - the published signature, callable by position
    ) -> Tensor:
        """Estimate the flow.

        In training mode one draw of `torch.rand(1)` decides whether the whole batch loses its prompt, content
        and style (class dropout), and `mask_content` has no effect; in evaluation `mask_content` decides.

        Args:
            x: noisy mel, (B, C, T).
            prompt_x: the prompt's mel, zero after its end, (B, C, T).
            x_lens: valid frames of each item, (B,).
            t: time of the flow from 0 (noise) to 1 (mel), (B,).
            style: speaker embedding, (B, S).
            cond: output of the length regulator, (B, T, content_dim).
            mask_content: drop prompt, content and style.

        Returns:
            (B, C, T).
        """
        if self.training:
            mask_content = bool(torch.rand(1) < self.class_dropout_prob)
        time: Tensor = self.t_embedder(t)
        tokens = self._tokens(time, style, mask_content=mask_content)
        frames = self._merge(x, prompt_x, style, cond, mask_content=mask_content)
        valid = length_mask(x_lens + len(tokens), len(tokens) + x.shape[-1])
        h: Tensor = self.transformer(torch.cat([*tokens, frames], dim=1), time, valid)[:, len(tokens) :]
        if self.params.long_skip_connection:
            h = self.skip_linear(torch.cat([h, x.transpose(1, 2)], dim=-1))
        if self.params.final_layer_type == "mlp":
            estimate: Tensor = self.final_mlp(h).transpose(1, 2)
            return estimate
        return self._wavenet_head(h, t, time, x_lens)

    def _tokens(self, time: Tensor, style: Tensor, *, mask_content: bool) -> list[Tensor]:
        tokens = [time[:, None]] if self.params.time_as_token else []
        if self.params.style_as_token:
            token = self.style_in(style)[:, None]
            # A constant, not a product with zero: in a dropped step `style_in` gets no gradient and no decay.
            tokens.append(torch.zeros_like(token) if mask_content else token)
        return tokens

    def _merge(self, x: Tensor, prompt_x: Tensor, style: Tensor, cond: Tensor, *, mask_content: bool) -> Tensor:
        conditions = [prompt_x.transpose(1, 2), self.cond_projection(cond)]
        if self.params.style_condition and not self.params.style_as_token:
            conditions.append(style[:, None].expand(-1, x.shape[-1], -1))
        if mask_content:
            # A product: in a dropped step the gradient of what feeds the content is zero, not None, and AdamW
            # counts the step, as the optimizer states of Seed-VC's runs show.
            conditions = [condition * 0 for condition in conditions]
        merged: Tensor = self.cond_x_merge_linear(torch.cat([x.transpose(1, 2), *conditions], dim=-1))
        return merged

    def _wavenet_head(self, h: Tensor, t: Tensor, time: Tensor, x_lens: Tensor) -> Tensor:
        mask = length_mask(x_lens, h.shape[1])[:, None].type_as(h)
        y = self.wavenet(self.conv1(h).transpose(1, 2), mask, self.t_embedder2(t))
        y = self.final_layer(y.transpose(1, 2) + self.res_projection(h), time)
        estimate: Tensor = self.conv2(y.transpose(1, 2))
        return estimate
