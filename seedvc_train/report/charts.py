"""The charts of a report, drawn with Matplotlib's Agg. Colours are those of Okabe and Ito, told apart by all eyes."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from seedvc_train.report.history import Checkpoint, History, Line

__all__ = ["Chart", "draw"]

BLUE, ORANGE, RED, GREEN, SKY, PURPLE, GREY, INK = (
    "#0072B2", "#E69F00", "#D55E00", "#009E73", "#56B4E9", "#CC79A7", "#9a9a9a", "#222222",
)  # fmt: skip
_WIDTH = 10.0  # inches, of 110 dots
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "text.parse_math": False,  # a metric may be named a$b$
}
_MARKED = 30  # the most resumes that get a line through the chart


@dataclass(frozen=True)
class Chart:
    """A picture: its name, what it shows, and the bytes of a PNG."""

    name: str
    title: str
    png: bytes


@dataclass(frozen=True)
class _Row:
    """Things that happened, as a row of marks."""

    label: str
    steps: Sequence[int]
    marker: str
    colour: str
    filled: bool = True


def draw(history: History) -> list[Chart]:
    """Draw all charts that there is something for."""
    found = []
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a metric may have a name in any script
        for name, title, drawn in (
            ("loss", "Loss and learning rate, and what happened", _loss),
            ("scores", "Scores", _scores),
            ("time", "Time per step, and what saves cost", _time),
            ("disk", "Sizes on disk", _disk),
        ):
            figure = drawn(history)
            if figure is not None:
                found.append(Chart(name, title, _png(figure)))
    return found


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _loss(history: History) -> Figure | None:
    rows = _rows(history)
    if not history.lines and not rows:
        return None
    if not history.lines:
        figure = Figure(figsize=(_WIDTH, 0.9 + 0.3 * len(rows)), layout="constrained")
        _draw_rows(figure.subplots(), rows)
        return figure
    heights = [3.4, 1.3, 0.3 * len(rows) + 0.1] if rows else [3.4, 1.3]
    figure = Figure(figsize=(_WIDTH, sum(heights) + 1.0), layout="constrained")
    loss, rate, *strip = figure.subplots(len(heights), sharex=True, height_ratios=heights)
    steps = [line.step for line in history.lines]
    dot = {"marker": "."} if len(steps) < 3 else {}
    loss.plot(steps, _numbers(history.lines, "loss"), color=SKY, alpha=0.7, linewidth=0.7, label="of the step", **dot)
    loss.plot(steps, _numbers(history.lines, "running_loss"), color=BLUE, linewidth=2, label="running", **dot)
    validated = [line for line in history.lines if not math.isnan(line.number("val_loss"))]
    if validated:
        loss.plot(
            [line.step for line in validated],
            _numbers(validated, "val_loss"),
            color=ORANGE,
            linewidth=1.5,
            marker="o",
            markersize=3.5,
            label="validation",
        )
    top, above = _top([it for key in ("loss", "running_loss", "val_loss") for it in _numbers(history.lines, key)])
    loss.set(title=f"Loss (highest {above:.4g}, not shown)" if above else "Loss", ylabel="loss")
    if above:
        loss.set_ylim(0, top)
    rate.plot(steps, _numbers(history.lines, "lr"), color=INK, linewidth=1.5, **dot)
    rate.set(title="Learning rate", ylabel="learning rate")
    rates = [value for value in _numbers(history.lines, "lr") if value > 0]
    rate.set_ylim(0, max(rates, default=1.0) * 1.2)
    rate.yaxis.set_major_formatter("{x:g}")
    _draw_moments(loss, history)
    _legend(loss)
    if strip:
        _draw_rows(strip[0], rows)
    (strip or [rate])[0].set_xlabel("step")
    return figure


def _draw_moments(axes: Axes, history: History) -> None:
    """A line through the chart where the run was taken up again or a checkpoint was set aside, while they are few."""
    for label, colour, style, kind in (("resumed", GREEN, "--", "resumed"), ("set aside", RED, ":", "set_aside")):
        steps = sorted({event.step for event in history.of(kind)})
        for number, step in enumerate(steps if len(steps) <= _MARKED else []):
            axes.axvline(step, color=colour, linestyle=style, linewidth=1, label=None if number else label)


def _rows(history: History) -> list[_Row]:
    """What happened, as far as it did, from the top down."""

    def steps(checkpoints: Sequence[Checkpoint]) -> list[int]:
        return [checkpoint.step for checkpoint in checkpoints]

    known = history.checkpoints
    rows = [
        _Row("started", [event.step for event in history.of("started")], ">", INK),
        _Row("resumed", [event.step for event in history.of("resumed")], ">", GREEN),
        _Row("saved, here", steps([checkpoint for checkpoint in known if checkpoint.here]), "o", BLUE),
        _Row("saved, pruned", steps([it for it in known if it.fate == "pruned"]), "o", BLUE, filled=False),
        _Row("saved, gone", steps([it for it in known if it.fate == "gone"]), "x", GREY),
        _Row("set aside", steps([it for it in known if it.fate == "set aside"]), "X", RED),
        _Row("interrupted", [event.step for event in history.of("interrupted")], "s", ORANGE),
        _Row("failed", [event.step for event in history.of("failed")], "X", PURPLE),
        _Row("ended", [event.step for event in history.of("ended")], "s", INK),
    ]
    return [row for row in rows if row.steps]


def _draw_rows(axes: Axes, rows: Sequence[_Row]) -> None:
    for height, row in enumerate(rows):
        axes.scatter(
            row.steps,
            [height] * len(row.steps),
            s=26,
            marker=row.marker,
            color=row.colour,
            facecolors=row.colour if row.filled else "white",
            linewidths=1,
        )
    axes.set(xlabel="step", ylim=(len(rows) - 0.5, -0.5))
    axes.set_yticks(range(len(rows)), [f"{row.label} ({len(row.steps)})" for row in rows])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(visible=True, axis="both")


def _time(history: History) -> Figure | None:
    saves = [it for it in history.checkpoints if it.seconds_stalled >= 0]
    logged = [line for line in history.lines if line.number("seconds_per_step") >= 0]
    if not saves and not logged:
        return None
    figure = Figure(figsize=(_WIDTH, 2.7 * (bool(saves) + bool(logged))), layout="constrained")
    panels = list(figure.subplots(bool(saves) + bool(logged), sharex=True, squeeze=False)[:, 0])
    if logged:
        _draw_speed(panels[0], logged)
    if saves:
        _draw_costs(panels[-1], saves)
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return figure


def _draw_speed(axes: Axes, logged: Sequence[Line]) -> None:
    seconds = sorted(_numbers(logged, "seconds_per_step"))
    middle = seconds[len(seconds) // 2]
    top, above = _top(seconds)
    factor, unit = _unit(middle)
    axes.plot(
        [line.step for line in logged],
        [value * factor for value in _numbers(logged, "seconds_per_step")],
        color=BLUE,
        linewidth=1,
        marker="." if len(logged) < 3 else None,
    )
    longest = f", longest {_in_words(above)}, not shown" if above else ""
    axes.set(title=f"Time per step, saving aside (median {_in_words(middle)}{longest})", ylabel=unit)
    axes.set_ylim(0, top * factor)


def _draw_costs(axes: Axes, saves: Sequence[Checkpoint]) -> None:
    known = [value for it in saves for value in (it.seconds_stalled, it.seconds_until_durable) if value > 0]
    factor, unit = _unit(max(known, default=1.0))
    steps = [it.step for it in saves]
    axes.scatter(steps, [it.seconds_until_durable * factor for it in saves], s=24, marker="o", facecolors="white",
                 color=BLUE, label="until it was durable and older ones pruned")  # fmt: skip
    axes.scatter(steps, [it.seconds_stalled * factor for it in saves], s=30, marker="v", color=RED,
                 label="training waited")  # fmt: skip
    axes.set(title="Each save", ylabel=unit)
    if known and max(known) > 20 * min(known):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylim(min(known) * factor / 2, max(known) * factor * 2)
    else:
        axes.set_ylim(0, max(known, default=1.0) * factor * 1.15)
    _legend(axes)


def _disk(history: History) -> Figure | None:
    known = [it for it in history.checkpoints if it.size >= 0]
    if not known:
        return None
    factor, unit = _bytes_unit(max(it.size for it in known))
    figure = Figure(figsize=(_WIDTH, 4.8), layout="constrained")
    each, total = figure.subplots(2, sharex=True)
    for label, marker, colour, filled, chosen in (
        ("here", "o", BLUE, True, [it for it in known if it.here]),
        ("pruned or gone", "o", BLUE, False, [it for it in known if it.fate in ("pruned", "gone")]),
        ("set aside", "X", RED, True, [it for it in known if it.fate == "set aside"]),
    ):
        if chosen:
            steps, sizes = [it.step for it in chosen], [it.size * factor for it in chosen]
            each.scatter(
                steps, sizes, s=26, marker=marker, color=colour, facecolors=colour if filled else "white", label=label
            )
    each.set(title="Each checkpoint", ylabel=unit)
    each.set_ylim(0, max(it.size for it in known) * factor * 1.15 or 1)
    _legend(each)
    steps, sizes = _totals(history)
    factor, unit = _bytes_unit(max(sizes))
    total.plot(steps, [size * factor for size in sizes], color=BLUE, drawstyle="steps-post", linewidth=1.5, marker=".")
    now = sum(it.size for it in known if it.here) * factor
    total.set(title=f"All checkpoints of the run, without what was set aside (now {now:.3g} {unit})", ylabel=unit)
    total.set_xlabel("step")
    total.set_ylim(0, max(sizes) * factor * 1.15 or 1)
    total.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return figure


def _totals(history: History) -> tuple[list[int], list[float]]:
    """Bytes of all checkpoints after each save and what was pruned with it; by the listing where no event tells."""
    sizes: dict[str, float] = {}
    steps: list[int] = []
    totals: list[float] = []
    for event in history.of("saved", "pruned", "set_aside"):
        if event.text("event") == "saved":
            sizes[event.text("name")] = event.number("bytes")
            steps.append(event.step)
            totals.append(0.0)
        else:
            sizes.pop(event.text("name"), None)
        if totals:
            totals[-1] = sum(size for size in sizes.values() if not math.isnan(size))
    if steps:
        return steps, totals
    here = [it for it in history.checkpoints if not math.isnan(it.size)]
    return [it.step for it in here], [sum(it.size for it in here[: number + 1]) for number in range(len(here))]


def _scores(history: History) -> Figure | None:
    if not history.scores:
        return None
    metrics = list(history.scores)
    figure = Figure(figsize=(_WIDTH, 2.4 * len(metrics) + 0.3), layout="constrained")
    panels = figure.subplots(len(metrics), sharex=True, squeeze=False)[:, 0]
    for axes, metric in zip(panels, metrics, strict=True):
        values = history.scores[metric]
        best = history.best(metric)
        axes.plot(list(values), list(values.values()), color=BLUE, linewidth=1.5, marker="o", markersize=4)
        if math.isfinite(values[best]):
            label = f"lowest: {values[best]:.4g} at step {best}"
            axes.scatter([best], [values[best]], s=170, marker="*", color=RED, zorder=3, label=label)
            _legend(axes)
        axes.set(title=_shown(metric), ylabel=_shown(metric))
        axes.margins(y=0.2)
    panels[-1].set_xlabel("step of the checkpoint")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return figure


def _top(values: Sequence[float]) -> tuple[float, float | None]:
    """Where an axis from 0 ends, so that few large values don't flatten the rest, and the largest where it is above."""
    known = sorted(value for value in values if not math.isnan(value))
    if not known or known[-1] <= 0:
        return 1.0, None
    most = known[int(0.95 * (len(known) - 1))]
    return (1.5 * most, known[-1]) if known[-1] > 4 * most > 0 else (1.1 * known[-1], None)


def _legend(axes: Axes) -> None:
    """Beside the title, where it hides nothing."""
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1.01), ncols=5, borderaxespad=0)


def _numbers(lines: Sequence[Line], key: str) -> list[float]:
    """The values; NaN leaves a gap."""
    return [line.number(key) for line in lines]


def _shown(name: str) -> str:
    """A name on one line, cut where it is long."""
    plain = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)
    return plain if len(plain) <= 40 else f"{plain[:39]}…"


def _unit(seconds: float) -> tuple[float, str]:
    return (1e3, "milliseconds") if seconds < 1 else (1.0, "seconds")


def _in_words(seconds: float) -> str:
    return (
        f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:.0f} s"
    )


def _bytes_unit(size: float) -> tuple[float, str]:
    for limit, unit in ((1e3, "bytes"), (1e6, "kB"), (1e9, "MB")):
        if size < limit:
            return 1e3 / limit, unit
    return 1e-9, "GB"
