"""Weights averaged over training, which often sound better than those of the last step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

__all__ = ["LEFT_OUT", "Ema"]

LEFT_OUT = "input_pos"  # Seed-VC's lists of averages pass over these buffers


class Ema:
    """An exponential moving average of the weights, in float32.

    After each step, average ← d·average + (1 - d)·weights. With n updates before, d = min(decay, (1 + n)/(10 + n)), so
    that a short run's average is not mostly the weights it began with: the rule of TensorFlow's
    ``ExponentialMovingAverage(num_updates=n)``.

    Args:
        model: ``cfm`` and ``length_regulator``, on the device where they are trained; not copied.
        decay: Between 0 and 1.

    Attributes:
        decay: The largest d.
        updates: n.
        averages: Of each module, by the names of its state dict.
    """

    def __init__(self, model: nn.ModuleDict, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._weights = {
            module: {name: tensor for name, tensor in tensors.state_dict().items() if LEFT_OUT not in name}
            for module, tensors in model.items()
        }
        self.averages = {
            module: {name: tensor.clone() for name, tensor in tensors.items()}
            for module, tensors in self._weights.items()
        }

    def update(self) -> None:
        """Take the weights of a finished step in."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        for module, averages in self.averages.items():
            average(list(averages.values()), list(self._weights[module].values()), self.updates)
        self.updates += 1

    def restart(self) -> None:
        """Begin with the weights as they are now."""
        self.restore(self._weights, 0)

    @torch.no_grad()
    def restore(self, averages: Mapping[str, Mapping[str, Tensor]], updates: int) -> None:
        """Take over saved averages; further names are passed over."""
        for module, tensors in self.averages.items():
            for name, tensor in tensors.items():
                tensor.copy_(averages[module][name])
        self.updates = updates

    def to_checkpoint(self) -> dict[str, list[list[Tensor]]]:
        """The averages as Seed-VC lays them out: ``ema[module][0]`` lists them in the order of ``net[module]``."""
        return {module: [list(tensors.values())] for module, tensors in self.averages.items()}
