"""A training checkpoint to the weights alone, as Seed-VC's services load them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from seedvc_ckpt.errors import CheckpointExistsError, ExportError
from seedvc_ckpt.file import CheckpointFile, run_name
from seedvc_ckpt.format import contents
from seedvc_ckpt.format.contents import TensorRef
from seedvc_ckpt.manifest import Manifest, library_version
from seedvc_ckpt.storage import Storage, open_parent

if TYPE_CHECKING:
    import torch

__all__ = ["export", "export_to"]

_SHOWN = 20
_EMA_LEFT_OUT = "input_pos"  # Seed-VC's averaged weights are a list without these buffers


def export(source: CheckpointFile, target: str | os.PathLike[str], **options: Any) -> str:
    """Write the weights of a checkpoint to a path or URL and return it; the options are those of `export_to`."""
    storage, name = open_parent(target)
    export_to(source, storage, name, **options)
    return os.fspath(target)


def export_to(
    source: CheckpointFile,
    storage: Storage,
    name: str,
    *,
    expected: Mapping[str, Sequence[int]] | None = None,
    dtype: str | torch.dtype | None = None,
    weights: Literal["net", "ema"] = "net",
    overwrite: bool = False,
    allow_non_finite: bool = False,
) -> None:
    """Write the weights of a checkpoint to a file in a storage.

    The file holds ``{"net": {module: {name: tensor}}}``, or with the suffix ``.safetensors`` the same tensors under
    ``module.name``. The prefix ``module.`` of distributed training is removed. The same input gives the same bytes.
    Tensors are read, checked and written one at a time.

    Args:
        source: The checkpoint.
        storage: Where to.
        name: Under which name; its suffix decides the format.
        expected: Shapes by name (``module.name``) that the weights must have, all of them and no others.
        dtype: Convert floating-point tensors to this.
        weights: "net", or "ema" for the averaged weights of a checkpoint that has them.
        overwrite: Replace an existing target.
        allow_non_finite: Let NaN and infinities through.

    Raises:
        ExportError: if the checkpoint has no such weights, they differ from `expected`, or are not finite.
        CheckpointExistsError: if the target exists and `overwrite` is false.
        CorruptCheckpointError: if a tensor is damaged. In all these cases nothing is written.
    """
    if not overwrite and storage.stat(name) is not None:
        raise _taken(storage, name)
    from seedvc_ckpt.format import weights as formats  # torch takes more than a second to import

    kind = None if dtype is None else formats.floating_dtype(dtype)
    encode: Any = formats.as_safetensors if name.endswith(".safetensors") else formats.as_torch_zip
    with source.opened() as archive:
        tree = contents.read_tree(archive)
        chosen = _weights(archive.source.name, tree, weights)
        if expected is not None:
            _compare(archive.source.name, chosen, expected)
        manifest = _manifest(source, tree)
        encoded = encode(archive, chosen, manifest, kind, allow_non_finite=allow_non_finite)
        try:
            storage.publish(name, encoded.size, encoded, overwrite=overwrite)
        except FileExistsError:
            raise _taken(storage, name) from None


def _taken(storage: Storage, name: str) -> CheckpointExistsError:
    return CheckpointExistsError(
        f"{name} exists already in {storage.location} and was left as it is: name another target, or overwrite it "
        "(--force)"
    )


def _manifest(source: CheckpointFile, tree: Any) -> Manifest:
    known = source.manifest()
    if known is None:
        step, epoch = tree.get("iters"), tree.get("epoch")
        known = Manifest(
            run=run_name(source.storage.location),
            step=step if type(step) is int and step >= 0 else None,
            epoch=epoch if type(epoch) is int and epoch >= 0 else 0,
        )
    return Manifest(
        run=known.run,
        step=known.step,
        epoch=known.epoch,
        metrics=known.metrics,
        settings=known.settings,
        library=library_version(),
        exported_from=source.name,
    )


def _weights(file: str, tree: Any, weights: str) -> dict[str, dict[str, TensorRef]]:
    """The tensors of each module, named as the model names them."""
    net = tree.get("net") if isinstance(tree, dict) else None
    if not isinstance(net, dict) or not net:
        keys = ", ".join(map(str, tree)) if isinstance(tree, dict) else type(tree).__name__
        raise ExportError(f"{file} has no weights under 'net' (it holds: {keys or 'nothing'})")
    modules = {module: _named_tensors(file, f"net[{module!r}]", tensors) for module, tensors in net.items()}
    if weights == "net":
        return {module: _without_prefix(file, tensors) for module, tensors in modules.items()}
    if weights != "ema":
        raise ExportError(f"weights are 'net' or 'ema', not {weights!r}")
    return {
        module: _without_prefix(file, _averaged(file, tree, module, tensors)) for module, tensors in modules.items()
    }


def _named_tensors(file: str, place: str, tensors: Any) -> dict[str, TensorRef]:
    if not isinstance(tensors, dict):
        raise ExportError(f"{file}: {place} is a {type(tensors).__name__}, not a state dict")
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, TensorRef):
            raise ExportError(f"{file}: {place}[{name!r}] is a {type(value).__name__}, not a named tensor")
    return tensors


def _without_prefix(file: str, tensors: dict[str, TensorRef]) -> dict[str, TensorRef]:
    """Without the ``module.`` that DistributedDataParallel puts before each name."""
    if not tensors or not all(name.startswith("module.") for name in tensors):
        if any(name.startswith("module.") for name in tensors):
            raise ExportError(f"{file}: some names begin with 'module.' and some don't: it mixes two models")
        return tensors
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def _averaged(file: str, tree: Any, module: str, tensors: dict[str, TensorRef]) -> dict[str, TensorRef]:
    ema = tree.get("ema")
    if not isinstance(ema, dict) or module not in ema:
        raise ExportError(f"{file} has no averaged weights of {module} under 'ema': export --weights net")
    try:
        averaged = list(ema[module][0])
    except (KeyError, IndexError, TypeError):
        raise ExportError(f"{file}: ema[{module!r}] is not laid out as Seed-VC does it") from None
    names = [name for name in tensors if _EMA_LEFT_OUT not in name]
    shapes = [tensors[name].shape for name in names]
    if [value.shape if isinstance(value, TensorRef) else None for value in averaged] != shapes:
        raise ExportError(
            f"{file}: the {len(averaged)} tensors of ema[{module!r}] don't match the {len(names)} of net[{module!r}]"
        )
    return {**tensors, **dict(zip(names, averaged, strict=True))}


def _compare(file: str, weights: Mapping[str, Mapping[str, TensorRef]], expected: Mapping[str, Sequence[int]]) -> None:
    found = {f"{module}.{name}": ref.shape for module, tensors in weights.items() for name, ref in tensors.items()}
    wanted = {name: tuple(shape) for name, shape in expected.items()}
    differences = [
        f"{name}: {_shape(found[name])} in the checkpoint, {_shape(shape)} in the model"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    differences += [f"{name}: missing in the checkpoint" for name in wanted if name not in found]
    differences += [f"{name}: not in the model" for name in found if name not in wanted]
    if differences:
        shown = differences[:_SHOWN]
        rest = len(differences) - len(shown)
        lines = "\n".join(f"  {line}" for line in shown) + (f"\n  … and {rest} more" if rest else "")
        raise ExportError(
            f"{file} does not fit the model: {len(differences)} differences. Seed-VC would load it without a word and "
            f"leave those layers at random values; nothing was exported\n{lines}",
            tuple(differences),
        )


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a single number"
