"""``seedvc-train report``: a run on one page."""

from __future__ import annotations

from seedvc_ckpt import CheckpointStore
from seedvc_ckpt.storage import open_storage
from seedvc_train.report.charts import draw
from seedvc_train.report.history import read_history
from seedvc_train.report.page import render

__all__ = ["PAGE", "write_report"]

PAGE = "report.html"


def write_report(store: CheckpointStore, out: str) -> list[str]:
    """Write a page and its charts to a folder, replacing those of an earlier report; return the paths, the page first.

    Args:
        store: The run; it is only read, also while it trains.
        out: The folder, made if need be.

    Raises:
        StorageError: if the run can't be read.
        SaveFailedError: if the report can't be written.
    """
    history = read_history(store)
    charts = draw(history)
    files = {PAGE: render(history, charts), **{f"{chart.name}.png": chart.png for chart in charts}}
    folder = open_storage(out)
    for name, content in files.items():
        folder.publish(name, len(content), [memoryview(content)], overwrite=True)
    return [f"{out.rstrip('/')}/{name}" for name in files]
