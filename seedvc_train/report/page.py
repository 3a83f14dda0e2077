"""The page of a report: one HTML file that asks for nothing else, and runs nothing."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from seedvc_ckpt.cli.output import readable_size
from seedvc_ckpt.manifest import library_version
from seedvc_train.places import AVERAGED, picture_name
from seedvc_train.report.charts import Chart
from seedvc_train.report.history import History, Line

__all__ = ["render"]

_MELS = 6 << 20  # the most bytes of pictures on the page, of some 100 to 800 kB each
_TOLD = ("started", "resumed", "set_aside", "interrupted", "failed", "ended")


def render(history: History, charts: Sequence[Chart]) -> bytes:
    """The page as UTF-8. Whatever comes from the run is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=_number, size=_size, moment=_moment, png=_png, details=_details)
    template = environment.from_string(files("seedvc_train.report").joinpath("page.html").read_text("utf-8"))
    starts = history.of("started", "resumed")
    mels = _mels(history)
    first, later = [mel for mel in mels if mel.first], [mel for mel in mels if not mel.first]
    page = template.render(
        run=history,
        about_learning=[chart for chart in charts if chart.name in ("loss", "scores")],
        about_costs=[chart for chart in charts if chart.name not in ("loss", "scores")],
        tiles=_tiles(history),
        options=_plain(starts[-1].values.get("options")) if starts else {},
        versions=_versions(history, starts),
        settings=dict(sorted(history.manifest.settings.items())) if history.manifest else {},
        told=history.of(*_TOLD),
        mels=first,
        more_mels=later,
        mels_left_out=len(history.mels) - len(mels),
        scored_on=_scored_on(history),
        scored=list(history.scores),
        best={metric: history.best(metric) for metric in history.scores},
        made=datetime.now(timezone.utc).isoformat(" ", "minutes")[:16],
        version=library_version(),
    )
    return page.encode("utf-8", "backslashreplace")  # a file name may be no text


@dataclass(frozen=True)
class _Mel:
    """A picture of mels: whether it is seen without a click, and why."""

    name: str
    why: str
    first: bool
    content: bytes


def _mels(history: History) -> list[_Mel]:
    """The pictures of the best checkpoints and of the newest, then the others from the newest back, while they fit."""
    best = dict(_best_pictures(history))
    newest_first = list(history.mels)[::-1]
    chosen = sorted(newest_first, key=lambda name: name not in best and name != newest_first[0])
    mels: list[_Mel] = []
    room = _MELS
    for name in chosen:
        content = history.mels[name]
        room -= len(content)
        if mels and room < 0:
            break
        why = f"lowest {' and '.join(best[name])}" if name in best else "the newest" if name == newest_first[0] else ""
        mels.append(_Mel(name, why, bool(why), content))
    return mels


def _best_pictures(history: History) -> Iterator[tuple[str, list[str]]]:
    """The names of the best checkpoints' pictures, each with the metrics that they are best by."""
    for it in history.checkpoints:
        metrics = [metric for metric in it.scores if history.best(metric) == it.step]
        for mark in ("", AVERAGED):
            if of := [metric for metric in metrics if metric.endswith(AVERAGED) == bool(mark)]:
                yield picture_name(it.name, mark), of


def _scored_on(history: History) -> list[tuple[str, str]]:
    """What scores were computed on, each with the metrics that were."""
    told = sorted(set(history.scored_on.values()) - {""})
    return [(", ".join(key for key in history.scores if history.scored_on[key] == on), on) for on in told]


def _tiles(history: History) -> list[tuple[str, str]]:
    here = [it for it in history.checkpoints if it.here]
    last = history.lines[-1] if history.lines else None
    lowest = min((line for line in history.lines), key=_by_running_loss, default=None)
    tiles = [
        ("last step known", _number(history.step)),
        ("running loss", _number(last.number("running_loss")) if last else "–"),
        ("lowest running loss", f"{_number(lowest.number('running_loss'))} at {lowest.step}" if lowest else "–"),
        ("checkpoints here", f"{len(here)}, {_size(sum(it.size for it in here))}"),
        ("resumed", _number(len(history.of("resumed")))),
        ("set aside", _number(len(history.of("set_aside")))),
    ]
    stalled = [it.seconds_stalled for it in history.checkpoints if not math.isnan(it.seconds_stalled)]
    if stalled:
        tiles.append((f"training waited for {len(stalled)} saves", f"{sum(stalled):.3g} s"))
    best = [(metric, history.best(metric)) for metric in history.scores]
    tiles += [(f"lowest {metric}", f"{_number(history.scores[metric][step])} at {step}") for metric, step in best]
    return tiles


def _by_running_loss(line: Line) -> float:
    loss = line.number("running_loss")
    return math.inf if math.isnan(loss) else loss


def _versions(history: History, starts: Sequence[Line]) -> dict[str, str]:
    found = _plain(starts[-1].values.get("versions")) if starts else {}
    if history.manifest:
        found = {"torch": history.manifest.torch or "unknown", "seedvc-ckpt": history.manifest.library, **found}
    return found


def _plain(values: object) -> dict[str, str]:
    return {str(key): str(value) for key, value in values.items()} if isinstance(values, dict) else {}


def _details(event: Line) -> str:
    """What there is to say of an event."""
    kind = event.text("event")
    if kind == "resumed":
        reached = event.number("reached")
        lost = f", {reached - event.step:.0f} logged steps trained again" if reached > event.step else ""
        return f"from {event.text('name')}{lost}"
    if kind == "set_aside":
        return f"{event.text('name')}: {event.text('reason')}"
    return event.text("error") or event.text("signal")


def _number(value: float | None) -> str:
    """A number in few digits; a dash where it is not known."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _size(size: float) -> str:
    return "–" if math.isnan(size) else readable_size(size)


def _moment(time: str) -> str:
    """A time of a log to the second, UTC."""
    try:
        return datetime.fromisoformat(time).astimezone(timezone.utc).isoformat(" ", "seconds")[:19]
    except (ValueError, OverflowError):
        return time


def _png(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
