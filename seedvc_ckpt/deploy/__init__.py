"""Whether Seed-VC's services, started with a file and a config, would run the model that was trained.

They never fail on a pair that does not fit: what differs in name or shape stays random, what they set up beside the
weights is what the config says. `check` tells beforehand what they would do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from seedvc_ckpt.deploy.agreement import Remark, contradictions, flat
from seedvc_ckpt.deploy.loading import Loading, Shape, is_computed, predict
from seedvc_ckpt.errors import CorruptCheckpointError, UnsafeCheckpointError
from seedvc_ckpt.file import CheckpointFile, Inspection
from seedvc_ckpt.format.contents import TensorRef
from seedvc_ckpt.manifest import Setting
from seedvc_ckpt.storage.condition import Finding, note, problem

__all__ = ["Loading", "Report", "Shape", "check", "flat", "service_of"]

_AGAIN = "export it anew, with the config that the run was trained with"


@dataclass(frozen=True)
class Report:
    """How a service would start.

    Attributes:
        file: The file's name.
        tensors: Number of tensors of the model that the config describes.
        loading: What becomes of each.
        findings: In words; problems before notes.
    """

    file: str
    tensors: int
    loading: Loading
    findings: tuple[Finding, ...]

    @property
    def problems(self) -> tuple[Finding, ...]:
        """What would make the service's model another one than was trained; empty when all is well."""
        return tuple(finding for finding in self.findings if finding.problem)


def service_of(config: Mapping[str, Setting]) -> str:
    """The script of Seed-VC's that serves a config: with pitch or without."""
    return "app_svc.py" if config.get("model_params.DiT.f0_condition") is True else "app_vc.py"


def check(
    file: CheckpointFile,
    config: Mapping[str, Any],
    expected: Mapping[str, Sequence[int]],
    *,
    values: bool = True,
    progress: Callable[[int], None] = lambda _: None,
) -> Report:
    """Find out what a service would do with a file and a config; the file may be a training checkpoint too.

    Args:
        file: The checkpoint or export.
        config: The YAML.
        expected: Shapes by name (``module.name``) of the model that it describes.
        values: Read the weights too, whether they are intact and finite.
        progress: Called with the number of bytes read since the last call.

    Raises:
        CheckpointNotFoundError: if there is no such file.
        StorageError: if it can't be read.
    """
    try:
        found = file.inspect()
        return _checked(file, found, flat(config), expected, values=values, progress=progress)
    except (CorruptCheckpointError, UnsafeCheckpointError) as error:
        what = f"the file can't be loaded: {str(error).removeprefix(f'{file.name}: ')}"
        remedy = "export it anew from an intact checkpoint of its run"
        return Report(file.name, len(expected), Loading.of_nothing(), (problem(file.name, what, remedy),))


def _checked(
    file: CheckpointFile,
    found: Inspection,
    config: Mapping[str, Setting],
    expected: Mapping[str, Sequence[int]],
    *,
    values: bool,
    progress: Callable[[int], None],
) -> Report:
    net = found.tree.get("net") if isinstance(found.tree, dict) else None
    if not isinstance(net, dict):
        return Report(file.name, len(expected), Loading.of_nothing(), (problem(file.name, *_no_weights(found)),))
    loading = predict(net, expected)
    trained = found.manifest.settings if found.manifest else {}
    problems = [*_of_loading(loading, len(expected), net), *_of_types(loading)]
    problems += contradictions(config, trained, loading.given)
    if str(trained.get("features")).startswith("builtin"):
        problems.append(
            Remark(
                "the file was trained on the built-in features, which no service has: it could not understand the "
                "service's",
                "train with the front ends that the config names",
            )
        )
    if values:
        problems += _of_values(file, loading, progress)
    notes = [*_notes_on_loading(loading), *_notes_on_file(found, trained)]
    findings = [problem(file.name, *found) for found in problems] + [note(file.name, *found) for found in notes]
    return Report(file.name, len(expected), loading, tuple(findings))


def _no_weights(found: Inspection) -> Remark:
    if "ema" in found.keys:
        return Remark(
            "the file has averaged weights ('ema') and none under 'net', where the service looks: it would stop",
            "export from the training checkpoint with --weights ema, which puts them under 'net'",
        )
    keys = ", ".join(found.keys)[:200] or "nothing"
    return Remark(f"the file has no weights under 'net' (it holds: {keys}): the service would stop", _AGAIN)


def _of_loading(loading: Loading, tensors: int, net: Mapping[str, Any]) -> Iterator[Remark]:
    for module in dict.fromkeys(name.partition(".")[0] for name in loading.missing):
        if module not in net:
            yield Remark(f"the file has no module {module!r}: the service would leave all of it random", _AGAIN)
    if loading.no_tensors:
        yield Remark(
            f"the file has no tensor at {_some(loading.no_tensors)} but something else: the service would stop", _AGAIN
        )
    random = loading.left_random
    if random:
        yield Remark(
            f"{len(random)} of the model's {tensors} tensors would be left at random values",
            "use the config that the run was trained with, or export the file anew",
        )
    ignored = [name for name in loading.ignored if not is_computed(name)]
    if ignored:
        yield Remark(
            f"{len(ignored)} of the file's tensors would be ignored, since the config's model has no place for them: "
            "what was trained is another model",
            "use the config that the run was trained with",
        )


def _of_types(loading: Loading) -> Iterator[Remark]:
    odd = [
        f"{name} ({ref.dtype})"
        for name, ref in loading.loaded.items()
        if not is_computed(name) and not _is_floating(ref)
    ]
    if odd:
        yield Remark(f"the file has weights that are no floating-point numbers: {_some(odd)}", _AGAIN)


def _of_values(file: CheckpointFile, loading: Loading, progress: Callable[[int], None]) -> Iterator[Remark]:
    from seedvc_ckpt.format.weights import non_finite  # torch takes more than a second to import

    with file.opened() as archive:
        bad = non_finite(archive, loading.loaded, progress)
    if bad:
        listed = _some([f"{name} ({count:,})" for name, count in bad.items()])
        yield Remark(
            f"the file has values that are not finite: {listed}: it would give noise or silence",
            "export an earlier step",
        )


def _notes_on_loading(loading: Loading) -> Iterator[Remark]:
    types = {ref.dtype for name, ref in loading.loaded.items() if not is_computed(name) and _is_floating(ref)}
    if types - {"float32"}:
        yield Remark(
            f"the file's weights are {', '.join(sorted(types))}: the service turns them into float32, with no more "
            "precision and no less memory than others",
            "nothing, if the smaller file is what you want; else export without --dtype",
        )
    computed = [name for name in (*loading.missing, *loading.mismatched) if is_computed(name)]
    if computed:
        yield Remark(f"the file lacks {_some(computed)}, which the model computes by itself", "nothing")
    if loading.modules_ignored:
        yield Remark(
            f"the file has modules that the service does not build: {_some(loading.modules_ignored)}", "nothing"
        )
    if loading.doubled:
        yield Remark(
            f"the file has {len(loading.doubled)} tensors twice, with and without 'module.': the service takes those "
            "with it",
            "export anew, so that there is no doubt",
        )


def _notes_on_file(found: Inspection, trained: Mapping[str, Setting]) -> Iterator[Remark]:
    if "optimizer" in found.keys:
        yield Remark(
            "the file is a training checkpoint: the service takes its weights and ignores the rest",
            "export it: a third",
        )
    if "ema" in found.keys:
        yield Remark(
            "the file has averaged weights too, which the service ignores", "export with --weights ema to serve them"
        )
    if not trained:
        yield Remark(
            "the file does not say which settings it was trained with: sample rate, mels and encoders were checked "
            "only as far as its tensors tell",
            "save with settings=, as seedvc-train does",
        )


def _is_floating(ref: TensorRef) -> bool:
    return ref.dtype.startswith(("float", "bfloat"))


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
