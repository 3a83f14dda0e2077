"""Conditional flow matching along straight paths.

Lipman et al., "Flow Matching for Generative Modeling", 2022.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name
from torch import Tensor, nn

from seedvc_train.model.dit import DiT, length_mask

if TYPE_CHECKING:
    from collections.abc import Iterator

    from seedvc_train.config import ModelParams

__all__ = ["FlowMatching", "draw_prompt_lens", "evaluating"]

_SIGMA = 1e-6
_NO_PROMPT_PROBABILITY = 0.1


def draw_prompt_lens(x_lens: Tensor) -> Tensor:
    """Draw how many first frames of each item serve as its prompt in training, (B,) int64.

    floor(U·(x_len - 1)), so that a frame is left to estimate, and none at all with probability 0.1. Two draws
    of (B,) from the global generator of `x_lens`' device: call it before `FlowMatching.loss` draws the rest.
    """
    longest = (x_lens - 1).clamp(min=0)
    lens = (torch.rand(len(x_lens), device=x_lens.device) * longest).floor().long()
    return lens.masked_fill(torch.rand(len(x_lens), device=x_lens.device) < _NO_PROMPT_PROBABILITY, 0)


class FlowMatching(nn.Module):
    """The training loss and the sampler around the flow's estimator."""

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.estimator = DiT(params)
        self.criterion = F.l1_loss if params.reg_loss_type == "l1" else F.mse_loss

    def loss(
        self,
        x1: Tensor,
        x_lens: Tensor,
        prompt_lens: Tensor,
        cond: Tensor,
        style: Tensor,
        t: Tensor | None = None,
        z: Tensor | None = None,
    ) -> Tensor:
        """Distance between the estimated and the true flow, averaged over an item's frames, then over items.

        Only the frames from prompt_len to x_len count. An item that has none says nothing about the flow: it
        is left out of the average, and a batch of only such items has loss 0.

        Args:
            x1: target mel, (B, C, T).
            x_lens: valid frames of each item, (B,).
            prompt_lens: first frames that are given as prompt, (B,).
            cond: output of the length regulator, (B, T, content_dim).
            style: speaker embedding, (B, S).
            t: time of the flow, B values in [0, 1]; drawn first when None.
            z: noise like x1; drawn second when None.

        Returns:
            A scalar.
        """
        t = torch.rand(len(x1), 1, 1, device=x1.device, dtype=x1.dtype) if t is None else t.reshape(-1, 1, 1)
        z = torch.randn_like(x1) if z is None else z
        in_prompt = length_mask(prompt_lens, x1.shape[-1])[:, None]
        y = ((1 - (1 - _SIGMA) * t) * z + t * x1).masked_fill(in_prompt, 0)
        u = x1 - (1 - _SIGMA) * z
        estimate = self.estimator(y, x1.masked_fill(~in_prompt, 0), x_lens, t.flatten(), style, cond).float()

        counted = length_mask(x_lens, x1.shape[-1])[:, None] & ~in_prompt
        distance = self.criterion(estimate, u, reduction="none").masked_fill(~counted, 0)
        frames = counted.sum((1, 2))
        per_item = distance.sum((1, 2)) / (x1.shape[1] * frames.clamp(min=1))
        return per_item.sum() / (frames > 0).sum().clamp(min=1)

    @torch.no_grad()
    def sample(
        self,
        cond: Tensor,
        x_lens: Tensor,
        prompt: Tensor,
        style: Tensor,
        steps: int,
        cfg_rate: float,
        z: Tensor | None = None,
    ) -> Tensor:
        """Follow the flow from noise to a mel in Euler steps, always in evaluation mode.

        Guidance is (1 + cfg_rate)·f(everything) - cfg_rate·f(nothing): Ho and Salimans, "Classifier-Free
        Diffusion Guidance", 2022.

        Args:
            cond: output of the length regulator, (B, T, content_dim).
            x_lens: valid frames of each item, (B,).
            prompt: mel of the prompt, (B, C, P) with P ≤ T.
            style: speaker embedding, (B, S).
            steps: number of Euler steps, at least 1.
            cfg_rate: strength of the guidance, 0 for none.
            z: noise, (B, C, T); drawn when None.

        Returns:
            (B, C, T), zero in the prompt's frames.

        Raises:
            ValueError: for no steps or a prompt longer than `cond`.
        """
        frames, prompt_frames = cond.shape[1], prompt.shape[-1]
        if steps < 1:
            raise ValueError(f"sampling needs at least 1 step, not {steps}")
        if prompt_frames > frames:
            raise ValueError(f"the prompt has {prompt_frames} frames, more than the {frames} to sample")
        prompt_x = F.pad(prompt, (0, frames - prompt_frames))
        x = torch.randn_like(prompt_x) if z is None else z.clone()
        x[..., :prompt_frames] = 0
        with evaluating(self):
            for i in range(steps):
                t = torch.full((len(x),), i / steps, device=x.device, dtype=x.dtype)
                flow = self.estimator(x, prompt_x, x_lens, t, style, cond)
                if cfg_rate:
                    nothing = (torch.zeros_like(style), torch.zeros_like(cond))
                    blind = self.estimator(x, torch.zeros_like(prompt_x), x_lens, t, *nothing)
                    flow = (1 + cfg_rate) * flow - cfg_rate * blind
                x = x + flow / steps
                x[..., :prompt_frames] = 0
        return x


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """In evaluation mode while entered; then each part in the mode that it was in."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training
