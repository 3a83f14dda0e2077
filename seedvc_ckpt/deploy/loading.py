"""Which tensors of a file Seed-VC's services would load into the model of a config, by name and shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from seedvc_ckpt.format.contents import TensorRef

__all__ = ["Loading", "Shape", "is_computed", "predict"]

Shape = tuple[int, ...]

_PREFIX = "module."
_COMPUTED = ("input_pos", "freqs")  # buffers that the model fills by itself, with the same numbers as training did


@dataclass(frozen=True)
class Loading:
    """What becomes of each tensor, by names such as ``cfm.estimator.input_pos``.

    Attributes:
        loaded: The tensors that reach the model.
        missing: Names that the model has and the file lacks.
        mismatched: Shapes in the file and in the model, where they differ.
        ignored: Shapes of what the file has in modules that the service builds and their model has no place for.
        modules_ignored: Modules of the file that the service does not build.
        no_tensors: Places of the model where the file has something other than a tensor; the service stops there.
        doubled: Names that stand in the file with and without ``module.``; the service takes those with it.
    """

    loaded: Mapping[str, TensorRef]
    missing: tuple[str, ...]
    mismatched: Mapping[str, tuple[Shape, Shape]]
    ignored: Mapping[str, Shape]
    modules_ignored: tuple[str, ...]
    no_tensors: tuple[str, ...]
    doubled: tuple[str, ...]

    @classmethod
    def of_nothing(cls) -> Loading:
        """Where nothing was loaded, since the service would have stopped before."""
        return cls({}, (), {}, {}, (), (), ())

    @property
    def left_random(self) -> tuple[str, ...]:
        """The model's tensors that keep their random initial values."""
        return tuple(name for name in (*self.missing, *self.mismatched) if not is_computed(name))

    @property
    def given(self) -> Mapping[str, Shape]:
        """The shapes in the file of all tensors of the modules that the service builds."""
        loaded = {name: ref.shape for name, ref in self.loaded.items()}
        return {**loaded, **self.ignored, **{name: given for name, (given, _) in self.mismatched.items()}}


def predict(net: Mapping[str, Any], expected: Mapping[str, Sequence[int]]) -> Loading:
    """Load as the services do: module by module, without one leading ``module.``, what is equal in name and shape.

    Args:
        net: What stands under ``net``, with a `TensorRef` for each tensor.
        expected: Shapes by name (``module.name``) of the model that the config describes.
    """
    modules = dict.fromkeys(name.partition(".")[0] for name in expected)
    given: dict[str, Any] = {}
    doubled: list[str] = []
    for module in modules:
        tensors = net.get(module, {})
        names = _without_prefix(tensors) if isinstance(tensors, Mapping) else {"": tensors}
        given.update({f"{module}.{name}".rstrip("."): value for name, value in names.items()})
        if isinstance(tensors, Mapping):
            doubled += [f"{module}.{name}" for name in tensors if f"{_PREFIX}{name}" in tensors]
    refs = {name: value for name, value in given.items() if isinstance(value, TensorRef)}
    wanted = {name: tuple(shape) for name, shape in expected.items()}
    return Loading(
        loaded={name: ref for name, ref in refs.items() if wanted.get(name) == ref.shape},
        missing=tuple(name for name in wanted if name not in given),
        mismatched={
            name: (refs[name].shape, shape)
            for name, shape in wanted.items()
            if name in refs and refs[name].shape != shape
        },
        ignored={
            name: refs[name].shape if name in refs else ()
            for name in given
            if name not in wanted and name not in modules
        },
        modules_ignored=tuple(str(module) for module in net if module not in modules),
        no_tensors=tuple(name for name in given if name not in refs and (name in wanted or name in modules)),
        doubled=tuple(doubled),
    )


def is_computed(name: str) -> bool:
    """Whether it is a buffer that the model computes when it is built."""
    return name.rpartition(".")[2] in _COMPUTED


def _without_prefix(tensors: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(tensors)
    for name in tensors:
        if isinstance(name, str) and name.startswith(_PREFIX):
            found[name[len(_PREFIX) :]] = found.pop(name)
    return found
