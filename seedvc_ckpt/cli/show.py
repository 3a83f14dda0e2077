"""``seedvc-ckpt show``."""

from __future__ import annotations

from typing import Any

import click

from seedvc_ckpt.cli.output import as_json, columns, json_option, readable_size
from seedvc_ckpt.cli.target import Which, checkpoint_at, pattern_option, step_option
from seedvc_ckpt.file import Inspection
from seedvc_ckpt.format.contents import CONTAINERS, TensorRef, walk
from seedvc_ckpt.naming import NamePattern

__all__ = ["command"]


@click.command("show", epilog="Example: seedvc-ckpt show runs/my_run --step 500 --tensors")
@click.argument("run_or_file")
@step_option
@pattern_option
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--globals", "globals_", is_flag=True, help="List what the file's pickle asks for; loads nothing.")
@json_option
def command(
    run_or_file: str,
    step: Which,
    pattern: NamePattern,
    tensors: bool,  # noqa: FBT001
    globals_: bool,  # noqa: FBT001
    as_json_: bool,  # noqa: FBT001
) -> None:
    """Show what a checkpoint holds: manifest, keys, shapes. Reads no tensor data."""
    file = checkpoint_at(run_or_file, step, pattern)
    if globals_:
        names = file.globals()
        if as_json_:
            as_json(names)
        else:
            click.echo("\n".join(names) or "nothing: plain data only")
        return
    found = file.inspect()
    if as_json_:
        as_json(_document(found))
        return
    click.echo(f"{found.name}  {readable_size(found.size)}")
    if found.manifest is None:
        click.echo("no manifest: not written by seedvc-ckpt")
    else:
        said = found.manifest.model_dump(exclude_none=True, exclude_defaults=True, exclude={"settings"})
        for key, value in said.items():
            click.echo(f"  {key:<14} {_brief(value)}")
        for number, (key, value) in enumerate(found.manifest.settings.items()):
            click.echo(f"  {'settings' if number == 0 else '':<14} {_brief(f'{key}: {value}')}")
    click.echo()
    if tensors:
        rows = [(path, ref.dtype, "×".join(map(str, ref.shape)), readable_size(ref.nbytes)) for path, ref in
                found.tensors.items()]  # fmt: skip
        columns(rows, ["tensor", "dtype", "shape", "size"], "size")
    else:
        columns(_top_level(found.tree), ["key", "tensors", "size", "value"], "tensors size")


def _document(found: Inspection) -> dict[str, Any]:
    tensors = {
        path: {"dtype": ref.dtype, "shape": ref.shape, "stride": ref.stride, "nbytes": ref.nbytes}
        for path, ref in found.tensors.items()
    }
    manifest = found.manifest.model_dump(mode="json", exclude_none=True) if found.manifest else None
    return {
        "name": found.name,
        "size": found.size,
        "manifest": manifest,
        "keys": found.keys,
        "values": dict(_values(found.tree)),
        "tensors": tensors,
    }


def _values(tree: Any) -> list[tuple[str, Any]]:
    if not isinstance(tree, dict):
        return []
    return [(str(key), value) for key, value in tree.items() if type(value) in (int, float, str, bool, type(None))]


def _top_level(tree: Any) -> list[tuple[str, str, str, str]]:
    rows = []
    for key, value in tree.items() if isinstance(tree, dict) else [("(the state)", tree)]:
        refs = [leaf for _, leaf in walk(value) if isinstance(leaf, TensorRef)]
        storages = {ref.storage.key: ref.storage.nbytes for ref in refs}
        size = readable_size(sum(storages.values())) if refs else ""
        shown = f"{type(value).__name__} of {len(value)}" if type(value) in CONTAINERS else ""
        if not refs and not shown:
            shown = _brief(value)
        rows.append((str(key), str(len(refs) or ""), size, shown))
    return rows


def _brief(value: Any) -> str:
    text = ", ".join(f"{key} {number:.6g}" for key, number in value.items()) if isinstance(value, dict) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
