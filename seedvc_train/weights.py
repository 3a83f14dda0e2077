"""The weights that a checkpoint holds, and how they get into a model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from seedvc_train.ema import LEFT_OUT

__all__ = ["StateError", "flat", "load_weights", "misfits", "weights_of"]

_SHOWN = 10


class StateError(ValueError):
    """A checkpoint that does not fit the model or the optimisers of this run."""


def weights_of(checkpoint: Any, which: str = "net") -> dict[str, dict[str, Tensor]]:
    """The tensors of each module by their names, without the prefix of distributed training.

    Args:
        checkpoint: As it was loaded.
        which: "net", or "ema" for the averages, beside which the buffers that have none are those of ``net``.

    Raises:
        StateError: if it holds none, or is laid out otherwise than Seed-VC does it.
    """
    net = checkpoint.get("net") if isinstance(checkpoint, dict) else None
    if not isinstance(net, dict) or not all(isinstance(tensors, dict) for tensors in net.values()):
        raise StateError("it holds no weights ('net'): it is no checkpoint of Seed-VC's layout")
    for module, tensors in net.items():
        for name, value in tensors.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                raise StateError(f"its net[{module!r}][{name!r}] is a {type(value).__name__}, not a named tensor")
    if which == "ema":
        net = {module: {**tensors, **_averages(checkpoint, module, tensors)} for module, tensors in net.items()}
    return {
        module: {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
        for module, tensors in net.items()
    }


def _averages(checkpoint: dict[str, Any], module: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    ema = checkpoint.get("ema")
    if not isinstance(ema, dict) or module not in ema:
        raise StateError(f"it holds no averaged weights of {module} ('ema'): use those of 'net'")
    try:
        averages = list(ema[module][0])
    except (KeyError, IndexError, TypeError):
        raise StateError(f"its ema[{module!r}] is no list that holds a list of tensors, as Seed-VC has it") from None
    names = [name for name in tensors if LEFT_OUT not in name]
    if len(names) != len(averages):
        raise StateError(
            f"its ema[{module!r}] has {len(averages)} tensors, and net[{module!r}] has {len(names)} to average"
        )
    for name, average in zip(names, averages, strict=True):
        if not isinstance(average, Tensor) or average.shape != tensors[name].shape:
            found = tuple(average.shape) if isinstance(average, Tensor) else type(average).__name__
            raise StateError(
                f"its ema[{module!r}] has {found} in the place of {name}, {tuple(tensors[name].shape)}: it is not in "
                "the order of net"
            )
    return dict(zip(names, averages, strict=True))


def load_weights(model: nn.ModuleDict, checkpoint: dict[str, Any], which: str = "net") -> None:
    """Copy the weights of ``net``, or the averages, into the model; every name and shape has to fit.

    Raises:
        StateError: listing what does not fit, or that there are no averages; the model is unchanged then.
    """
    given, wanted = flat(weights_of(checkpoint, which)), model.state_dict()
    problems = [f"{name}: missing" for name in wanted if name not in given]
    problems += [f"{name}: not in the model" for name in given if name not in wanted]
    problems += misfits(given, wanted)
    if problems:
        rest = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        listed = "\n  ".join(problems[:_SHOWN])
        raise StateError(f"its weights don't fit the model that the config describes:\n  {listed}{rest}")
    model.load_state_dict(given)


def flat(weights: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The same under the names that they have in the whole model."""
    return {f"{module}.{name}": tensor for module, tensors in weights.items() for name, tensor in tensors.items()}


def misfits(given: dict[str, Tensor], wanted: dict[str, Tensor], space: str = " ") -> list[str]:
    """In words, which tensors have another shape than is wanted, with `space` between name and shapes."""
    return [
        f"{name}:{space}{tuple(given[name].shape)} in the checkpoint, {tuple(tensor.shape)} in the model"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]
