"""The tables and charts of docs/benchmarks, from the JSON of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["goals", "page", "write_charts"]

Results = dict[str, Any]
_OURS = "#0b6e4f"
_OTHERS = "#9aa5b1"
_LABELS = {
    "Plain": "plain write + fsync",
    "TorchSave": "torch.save + fsync",
    "Ours": "seedvc-ckpt",
    "OursInBackground": "seedvc-ckpt AsyncSaver",
}
_KINDS = ("lists", "head", "get", "put", "post", "delete")
_REQUESTS = {name: [f"{name} {kind}" for kind in _KINDS] for name in ("export", "show", "ls", "latest")}
_COLORS = {"Plain": "#c3ccd5", "TorchSave": "#7b8794", "Ours": "#5fb49c", "OursInBackground": _OURS}


def goals(found: Results) -> list[tuple[str, float, float]]:
    """What was to be reached: words, ratio, the most that it was to be."""
    answer = []
    if saving := found.get("saving"):
        theirs, limit = saving["torch.save + fsync"], saving["plain write + fsync (the limit)"]
        ours, background = saving["seedvc-ckpt"], saving["seedvc-ckpt AsyncSaver"]
        answer += [
            ("stall of a background save ÷ torch.save + fsync", background["stall"] / theirs["stall"], 0.02),
            ("durable ÷ plain write + fsync", ours["durable"] / limit["durable"], 1.05),
            ("durable ÷ torch.save + fsync", ours["durable"] / theirs["durable"], 0.8),
            ("memory of a background save ÷ state", background["memory"] / background["bytes"], 1.0),
            ("memory of a save ÷ 64 MB", ours["memory"] / (64 << 20), 1.0),
        ]
    if reading := found.get("reading"):
        resume, export = reading["resuming"], reading["exporting"]
        answer += [
            ("resume ÷ (CRC-32 on all cores + copying)", resume["resume"] / resume["limit"], 1.2),
            ("resume ÷ torch.load + load_state_dict", resume["resume"] / resume["torch"], 1.0),
            ("export ÷ cp + fsync", export["export"] / export["cp"], 1.2),
            ("memory of an export ÷ 64 MB", export["memory"] / (64 << 20), 1.0),
            ("seconds to inspect 2.4 GB ÷ 0.05", reading["looking"]["inspect"] / 0.05, 1.0),
        ]
    if names := found.get("names"):
        answer.append(("ls of 10,000 ÷ (imports + scandir)", names["10000"]["ls"] / names["10000"]["limit"], 2.0))
    return answer + _remote_goals(found)


def _remote_goals(found: Results) -> list[tuple[str, float, float]]:
    remote = found.get("remote")
    if not remote:
        return []
    save, upload = _ours_and_fastest(remote["saving"])
    resume, download = _ours_and_fastest(remote["resuming"])
    requests = sum(count for what, count in remote["names"].items() if what in _REQUESTS["latest"])
    return [
        ("S3: save ÷ fastest plain upload", save["seconds"] / upload, 1.15),
        ("S3: memory of a save, beyond the state, ÷ 256 MB", save["memory"] / (256 << 20), 1.0),
        ("S3: resume ÷ fastest plain download", resume["seconds"] / download, 1.15),
        ("S3: memory of a resume, beyond the state, ÷ 256 MB", resume["memory"] / (256 << 20), 1.0),
        ("S3: bytes moved by an export ÷ file", remote["looking"]["export bytes"] / remote["file"]["bytes"], 0.36),
        ("S3: requests of `latest` among 10,000 names ÷ pages of 1,000", requests / 10, 1.0),
    ]


def _ours_and_fastest(ways: Results) -> tuple[dict[str, float], float]:
    return ways["seedvc-ckpt"], min(row["seconds"] for way, row in ways.items() if way != "seedvc-ckpt")


def page(found: Results, folder: Path) -> str:
    """The text of README.md; ends with the folder's notes.md, where there is one."""
    machine = found["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    made = (
        f"Made by `python -m benchmarks` on {machine['date']}: {machine['system']}, {machine['processor']}, "
        f"{machine['cores']} cores, {machine['memory']}; {versions}. Shared machines are noisy: what counts is the "
        "ratio of two rows of one run. All numbers are in [results.json](results.json)."
    )
    parts = [
        "# Benchmarks",
        made,
        _saving(found),
        _goals(found),
        _sizes(found),
        _training(found),
        _features(found),
        _names(found),
        _remote(found),
        (folder / "notes.md").read_text().strip() if (folder / "notes.md").exists() else "",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _saving(found: Results) -> str:
    saving = found.get("saving")
    if not saving:
        return ""
    rows = [
        [label, f"{row['stall']:.3f}", f"{row['delay']:.2f}", f"{row['durable']:.2f}", f"{row['memory'] / 1e9:.2f}"]
        for label, row in saving.items()
    ]
    state = next(iter(saving.values()))
    return (
        "## A save of 103 million parameters with AdamW\n\n"
        f"{state['bytes'] / 1e9:.2f} GB in about 1,100 tensors, in a loop of real training steps of "
        f"{state['step']:.2f} s each. *Stalls*: the call, and what the next step waits for. *Delays*: by how much "
        "training is later in all, the stall and the slower steps while the save is in flight. *Durable*: after the "
        "call, with nothing else running. Seconds, medians.\n\n"
        + _table(["", "training stalls", "training is later by", "durable after", "extra memory, GB"], rows)
        + "\n\n![Stalls, delays and durability](saving.png)"
    )


def _goals(found: Results) -> str:
    rows = [
        [what, f"{ratio:.3g}", f"≤ {most:g}", "yes" if ratio <= 1.005 * most else "no"]
        for what, ratio, most in goals(found)
    ]
    return "## What was to be reached\n\n" + _table(["", "measured", "goal", "reached"], rows) if rows else ""


def _sizes(found: Results) -> str:
    sizes = found.get("sizes")
    if not sizes:
        return ""
    columns = list(next(iter(sizes.values())))
    rows = []
    for name, row in sizes.items():
        rows.append([_LABELS[name], *(_seconds(row[column], "durable") for column in columns)])
        if name == "OursInBackground":
            rows.append([f"{_LABELS[name]}: the call", *(_seconds(row[column], "call") for column in columns)])
    head = ["durable after, seconds", *(f"{column} M" for column in columns)]
    return "## Against the size of the state\n\n" + _table(head, rows) + "\n\n![Size](sizes.png)"


def _seconds(row: dict[str, float] | None, what: str) -> str:
    return "–" if row is None else f"{row[what]:.3f}"


def _training(found: Results) -> str:
    training = found.get("training")
    if not training:
        return ""
    alone = training["no saves"]
    rows = []
    for key, seconds in training.items():
        name, _, every = key.partition(" every ")
        what = f"{_LABELS[name]}, every {every}" if every else key
        rows.append([what, f"{seconds:.1f}", f"{seconds / alone:.2f}"])
    return "## Saves in a run\n\n120 steps of a 6 M parameter model.\n\n" + _table(["", "seconds", "÷ no saves"], rows)


def _features(found: Results) -> str:
    features = found.get("features")
    if not features:
        return ""
    rows = [
        [
            "encoder in every step" if name == "off" else "features from the cache",
            str(workers),
            f"{features[f'{name} {workers}']:.3f}",
            f"{features[f'{name} {workers}'] / features[f'cache {workers}']:.1f}",
        ]
        for name in ("off", "cache")
        for workers in (0, 2)
    ]
    words = (
        "A step of the `xlsr_tiny` DiT on two clips, on the processor alone, with content from an encoder of Whisper "
        f"base's shape with random weights; {features['clips']:.0f} clips of {features['seconds']:.0f} s in all. In "
        "every step the encoder hears each clip and one disguised copy. Filling the cache, with four copies of each, "
        f"took {features['computing a clip']:.1f} s a clip, once; it holds {features['bytes a second'] / 1e6:.2f} MB "
        "for a second of recording."
    )
    head = ["", "loader processes", "seconds a step", "÷ from the cache"]
    return f"## Features once\n\n{words}\n\n" + _table(head, rows)


def _names(found: Results) -> str:
    names = found.get("names")
    if not names:
        return ""
    rows = [
        [f"{int(number):,}", *(f"{row[what] * 1000:,.1f}" for what in ("ls", "limit", "list", "latest"))]
        for number, row in names.items()
    ]
    head = ["checkpoints", "`seedvc-ckpt ls`", "imports + scandir", "`list()`", "`latest()`"]
    return "## Against the number of checkpoints\n\nMilliseconds.\n\n" + _table(head, rows)


def _remote(found: Results) -> str:
    remote = found.get("remote")
    if not remote:
        return ""
    size = remote["file"]["bytes"]
    words = (
        f"The state of the first table, a file of {size / 1e9:.2f} GB, on SeaweedFS, a server that speaks S3, on the "
        "same machine. Seconds, those of the client's processor, and memory beyond the state or the file's contents; "
        "each in a process of its own that was connected before, medians."
    )
    parts = [
        "## On S3",
        words,
        _transfers("save", remote["saving"]),
        _transfers("resume", remote["resuming"]),
        "What commands receive, and the requests that they make:",
        _table(
            ["", "received, MB", "÷ file", *_KINDS],
            [
                *_moved("export", "`export`", remote["looking"], size),
                *_moved("show", "`show`", remote["looking"], size),
                *_moved("ls", "`ls` of 2", remote["looking"], size),
                *_moved("latest", "`latest` of 2", remote["looking"], size),
                *_moved("ls", "`ls` of 10,000", remote["names"]),
                *_moved("latest", "`latest` of 10,000", remote["names"]),
            ],
        ),
    ]
    return "\n\n".join(parts)


def _transfers(what: str, ways: Results) -> str:
    _, fastest = _ours_and_fastest(ways)
    rows = [
        [
            way,
            f"{row['seconds']:.2f}",
            f"{row['seconds'] / fastest:.2f}",
            f"{row['processor']:.2f}",
            f"{row['memory'] / 1e6:,.0f}",
        ]
        for way, row in ways.items()
    ]
    return _table([what, "seconds", "÷ fastest plain", "processor, seconds", "extra memory, MB"], rows)


def _moved(name: str, label: str, counts: Results, size: float | None = None) -> list[list[str]]:
    received = counts[f"{name} bytes"]
    requests = [f"{counts.get(key, 0):.0f}" for key in _REQUESTS[name]]
    return [[label, f"{received / 1e6:,.3f}", f"{received / size:.4f}" if size else "–", *requests]]


def write_charts(found: Results, folder: Path) -> None:
    """Draw saving.png and sizes.png."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    if saving := found.get("saving"):
        figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True)
        labels = list(saving)[::-1]
        colors = [_OURS if "seedvc" in label else _OTHERS for label in labels]
        titles = {"stall": "training stalls, s", "delay": "training is later by, s", "durable": "durable after, s"}
        for axis, (what, title) in zip(axes, titles.items(), strict=True):
            values = [max(saving[label][what], 0.0) for label in labels]
            bars = axis.barh(labels, values, color=colors)
            axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
            axis.set_title(title, fontsize=10)
            axis.margins(x=0.18)
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=9)
        figure.tight_layout()
        figure.savefig(folder / "saving.png", dpi=110)
        plt.close(figure)
    if sizes := found.get("sizes"):
        figure, axis = plt.subplots(figsize=(6, 3.8))
        for name, row in sizes.items():
            points = [(int(size), found["durable"]) for size, found in row.items() if found]
            axis.plot(*zip(*points, strict=True), marker="o", color=_COLORS[name], label=f"{_LABELS[name]}: durable")
        calls = [(int(size), found["call"]) for size, found in sizes["OursInBackground"].items() if found]
        axis.plot(
            *zip(*calls, strict=True), marker="o", color=_OURS, linestyle=":", label="seedvc-ckpt AsyncSaver: the call"
        )
        axis.set_xlabel("million parameters, with AdamW")
        axis.set_ylabel("seconds")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
        figure.tight_layout()
        figure.savefig(folder / "sizes.png", dpi=110)
        plt.close(figure)
