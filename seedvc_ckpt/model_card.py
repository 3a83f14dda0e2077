"""``model_card.md``: where exported weights come from and how to serve them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping

from seedvc_ckpt.file import Inspection
from seedvc_ckpt.manifest import Manifest, Setting, library_version

__all__ = ["model_card"]

Row = tuple[str, object]


def model_card(
    exported: Inspection,
    source: Manifest | None,
    *,
    file: str,
    config: str,
    service: str,
    weights: str,
    scores: Mapping[str, float],
) -> str:
    """The card, in Markdown. There is no time in it, so that the same input gives the same bytes.

    Args:
        exported: The exported file.
        source: What the checkpoint says of itself that it was taken from.
        file: Its name.
        config: Name of the YAML beside it.
        service: The script that serves it.
        weights: "net" or "ema".
        scores: The numbers known of the checkpoint.
    """
    said = exported.manifest or Manifest()
    step = "step not recorded" if said.step is None else f"step {said.step}"
    lines = [
        f"# {_text(said.run)}, {step}",
        "",
        f"Weights of a Seed-VC voice converter for `{_text(config)}`.",
        "",
        *_table("| | |", _origin(exported, said, source, weights)),
    ]
    if scores:
        lines += ["", "## Losses and scores", "", *_table("| metric | value |", sorted(scores.items()))]
    if said.settings:
        settings = ((name, value) for name, value in said.settings.items() if name != "data")
        lines += ["", "## Trained with", "", *_table("| setting | value |", sorted(settings))]
    lines += [
        "",
        "## Start the service",
        "",
        "From a copy of Seed-VC, with the paths of the two files:",
        "",
        "```sh",
        f"python {service} --checkpoint {shlex.quote(file)} --config {shlex.quote(config)}",
        "```",
        "",
        "`sha256sum -c SHA256SUMS` in this folder checks that all files arrived whole.",
        "",
    ]
    return "\n".join(lines)


def _origin(exported: Inspection, said: Manifest, source: Manifest | None, weights: str) -> Iterator[Row]:
    types = sorted({ref.dtype for ref in exported.tensors.values() if "float" in ref.dtype})
    yield "run", said.run
    yield "step", "not recorded" if said.step is None else said.step
    yield "epoch", said.epoch
    yield "checkpoint", said.exported_from
    if source is not None and source.resumed_from:
        yield "continued from", source.resumed_from
    yield "weights", "averaged (`ema`)" if weights == "ema" else "as trained (`net`)"
    yield "tensors", f"{len(exported.tensors)}, {', '.join(types)}"
    yield "numbers", f"{sum(ref.numel for ref in exported.tensors.values()):,}"
    yield "digest of the data", said.settings.get("data", "not recorded")
    yield "exported by", f"seedvc-ckpt {library_version()}"
    yield "saved by", f"seedvc-ckpt {source.library}" if source is not None else "another program"
    yield "torch", (source and source.torch) or "not recorded"


def _table(header: str, rows: Iterable[Row]) -> Iterator[str]:
    yield from (header, "|---|---|")
    for name, value in rows:
        yield f"| {_text(name)} | {_text(value)} |"


def _text(value: Setting | object) -> str:
    """A value in one line that ends no cell."""
    text = f"{value:.6g}" if isinstance(value, float) else "none" if value is None else str(value)
    return " ".join(text.split()).replace("|", "\\|").encode(errors="backslashreplace").decode()
