"""The weights that a checkpoint holds, and how they get into a model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from seedvc_train.ema import LEFT_OUT

__all__ = ["StateError", "load_pretrained", "load_weights", "weights_of"]

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


def load_weights(model: nn.ModuleDict, checkpoint: dict[str, Any]) -> None:
    """Copy the weights of ``net`` into the model; every name and shape has to fit.

    Raises:
        StateError: listing what does not fit; the model is unchanged then.
    """
    given, wanted = _flat(weights_of(checkpoint)), model.state_dict()
    problems = [f"{name}: missing" for name in wanted if name not in given]
    problems += [f"{name}: not in the model" for name in given if name not in wanted]
    problems += _misfits(given, wanted)
    if problems:
        rest = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        listed = "\n  ".join(problems[:_SHOWN])
        raise StateError(f"its weights don't fit the model that the config describes:\n  {listed}{rest}")
    model.load_state_dict(given)


def load_pretrained(model: nn.ModuleDict, checkpoint: Any, name: str) -> list[str]:
    """Copy those weights of ``net`` that fit the model.

    Returns:
        In words, how many were loaded and what was not.

    Raises:
        StateError: if nothing fits.
    """
    given, wanted = _flat(weights_of(checkpoint)), model.state_dict()
    fitting = {key: tensor for key, tensor in given.items() if key in wanted and tensor.shape == wanted[key].shape}
    if not fitting:
        raise StateError(
            f"{name} holds no weights that fit the model which the config describes ({len(given)} tensors there, "
            f"{len(wanted)} in the model): it belongs to another config"
        )
    model.load_state_dict(fitting, strict=False)
    report = [f"{len(fitting)} of the model's {len(wanted)} tensors loaded from {name}"]
    missing = [key for key in wanted if key not in given]
    unexpected = [key for key in given if key not in wanted]
    for what, names in (
        ("missing there, left at their initial values", missing),
        ("not in the model, ignored", unexpected),
        ("of another shape, left at their initial values", _misfits(given, wanted)),
    ):
        if names:
            rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            report.append(f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{rest}")
    return report


def _flat(weights: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The same under the names that they have in the whole model."""
    return {f"{module}.{name}": tensor for module, tensors in weights.items() for name, tensor in tensors.items()}


def _misfits(given: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    return [
        f"{name}: {tuple(given[name].shape)} in the checkpoint, {tuple(tensor.shape)} in the model"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]
