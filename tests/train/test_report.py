"""seedvc-train report: a run on one page that needs nothing else, whatever is or is not in the run."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from html.parser import HTMLParser
from pathlib import Path

import pytest
import runs
from click.testing import CliRunner, Result

import seedvc_train
from seedvc_ckpt import CheckpointStore, NamePattern
from seedvc_train.cli import command
from seedvc_train.corpus import write_demo_corpus

pytest.importorskip("matplotlib")

from matplotlib import image

from seedvc_train.report import charts, write_report
from seedvc_train.report.history import read_history

NAME = "DiT_epoch_{:05d}_step_{:05d}.pth"
EVIL = '<script>alert("x")</script><img src=http://evil.example/x>'


class Page(HTMLParser):
    """A page's text, tags, and what its attributes refer to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.text, self.tags, self.references = "", set(), []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.add(tag)
        self.references += [value for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


def report(run: Path | str, *words: object) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(command, ["report", str(run), *map(str, words)], standalone_mode=False)


def page_of(run: Path) -> Page:
    result = report(run)
    assert result.exception is None, result.output
    assert result.output.splitlines()[0] == str(run / "report" / "report.html")
    return Page(run / "report" / "report.html")


def write(path: Path, lines: list[dict], end: str = "") -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + end)


def event(kind: str, step: int | None, minute: int = 0, **values: object) -> dict:
    at = {} if step is None else {"step": step}
    return {"time": f"2026-01-01T00:{minute:02d}:00+00:00", "event": kind, **at, **values}


def saved(step: int, size: int, minute: int = 0, **values: object) -> dict:
    name = NAME.format(0, step)
    costs = {"seconds_stalled": 0.25, "seconds_until_durable": 2.0}
    return event("saved", step, minute, name=name, epoch=0, bytes=size, **{**costs, **values})


def metric(step: int, **values: object) -> dict:
    logged = {"epoch": 0, "loss": 1 / step, "running_loss": 2 / step, "lr": 1e-4, "seconds_per_step": 0.5}
    return {"step": step, **logged, **values}


def history(run: Path):
    return read_history(CheckpointStore(run, read_only=True))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained, damaged and gone on with; to be read only."""
    folder = tmp_path_factory.mktemp("trained")
    write_demo_corpus(str(folder / "recordings"), clips=2)
    runs.train(folder / "recordings", folder, max_steps=12)
    newest = folder / "run" / CheckpointStore(folder / "run").latest().name
    newest.write_bytes(newest.read_bytes()[:-100])
    runs.train(folder / "recordings", folder, max_steps=12, save_every=1)
    return folder / "run"


def test_a_trained_run_is_shown_in_full(trained: Path, tmp_path: Path) -> None:
    """Every checkpoint ever saved stands in the table with its fate, beside losses, settings, versions and config."""
    out = tmp_path / "out"
    assert report(trained, "--out", out).exception is None
    page = Page(out / "report.html")
    for words in (
        "DiT_epoch_00005_step_00012.pth",
        "set aside",
        "pruned",
        "preprocess_params.sr",
        "config_dit_mini.yml",
    ):
        assert words in page.text
    assert sorted(path.name for path in out.iterdir()) == ["disk.png", "loss.png", "report.html", "time.png"]
    found = history(trained)
    fates = [(it.step, it.fate) for it in found.checkpoints]
    assert fates == [(3, "pruned"), (6, "pruned"), (9, "pruned"), (10, "pruned"), (11, "here"), (12, "set aside"),
                     (12, "here")]  # fmt: skip
    assert [info.size for info in CheckpointStore(trained).list()] == [it.size for it in found.checkpoints if it.here]
    assert all(0 < it.seconds_stalled <= 60 for it in found.checkpoints)
    for path in out.glob("*.png"):
        assert image.imread(path).std() > 0.01  # not blank


def test_the_page_asks_for_nothing_and_runs_nothing(trained: Path, tmp_path: Path) -> None:
    """No script, no link, no picture but those inside: it can be mailed, and opened without a network."""
    report(trained, "--out", tmp_path)
    page = Page(tmp_path / "report.html")
    assert len(page.references) == 3
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert not page.tags & {"script", "link", "iframe", "object", "base", "form"}
    assert "default-src 'none'" in (tmp_path / "report.html").read_text()


def test_what_comes_from_the_run_is_escaped(tmp_path: Path) -> None:
    """Names, reasons, options, metrics and configs can hold HTML; it is shown, not obeyed."""
    run = tmp_path / EVIL.replace("/", "\N{FRACTION SLASH}")
    about = {"options": {EVIL: EVIL}, "versions": {EVIL: EVIL}}
    about_it = event("set_aside", 5, 1, name=EVIL, reason=f"reason {EVIL}")
    write(run / "events.jsonl", [event("started", 0, **about), about_it, event("failed", None, error=f"failed {EVIL}"),
                                 event(EVIL, 3), {**event("ended", 4), "time": EVIL}])  # fmt: skip
    (run / f"{EVIL[:8]}.yml").write_text(f"config: {EVIL}")
    score = {"name": EVIL, "step": 5, "size": 1, "digest": "", "scores": {f"$a^{EVIL}": 1.0}}
    write(run / "scores.jsonl", [score])
    page = page_of(run)
    assert not page.tags & {"script", "alert"}
    assert all(reference.startswith("data:") for reference in page.references)
    for words in (f"reason {EVIL}", f"failed {EVIL}", f"config: {EVIL}", f"$a^{EVIL}"):
        assert words in page.text


def test_a_run_of_seedvcs_own_trainer(tmp_path: Path) -> None:
    """Without any log of ours its checkpoints and sizes are shown, and what is missing is said."""
    run = tmp_path / "theirs"
    shutil.copytree(runs.GENUINE, run)
    page = page_of(run)
    assert "no metrics.jsonl" in page.text
    assert "no events.jsonl" in page.text
    assert "DiT_epoch_00002_step_00020.pth" in page.text
    assert [(it.step, it.fate) for it in history(run).checkpoints] == [(10, "here"), (20, "here")]
    assert (run / "report" / "disk.png").exists()
    assert not (run / "report" / "time.png").exists()


def test_an_empty_run(tmp_path: Path) -> None:
    """An empty folder gets a page that says so."""
    page = page_of(tmp_path)
    assert "no checkpoints" in page.text
    assert not page.references


def test_metrics_alone_torn_and_odd(tmp_path: Path) -> None:
    """Torn lines and lines of other kinds are passed over; values that are no numbers leave gaps."""
    lines = [metric(1), metric(2, loss=float("nan"), running_loss=None), metric(3, loss="low", lr=float("inf")),
             {"step": "4"}, {"step": True}, {"loss": 1}, {"step": 10**400},
             metric(5, seconds_per_step=None)]  # fmt: skip
    write(tmp_path / "metrics.jsonl", lines, '[1]\nnot json\n"x"\n\xff\n{"step": 6, "lo')
    page = page_of(tmp_path)
    found = history(tmp_path)
    assert [line.step for line in found.lines] == [1, 2, 3, 5]
    assert found.step == 5
    assert "nan" not in page.text.lower()
    assert (tmp_path / "report" / "loss.png").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0, 1e300, 1e17, None, "x"])
def test_no_number_breaks_a_chart(tmp_path: Path, value: object) -> None:
    """Whatever stands in a log where a number should, the report is drawn."""
    odd = dict.fromkeys(("loss", "running_loss", "lr", "seconds_per_step"), value)
    write(tmp_path / "metrics.jsonl", [metric(1, **odd)])
    costs = {"seconds_stalled": value, "seconds_until_durable": value, "bytes": value, "epoch": value}
    write(tmp_path / "events.jsonl", [{**saved(1, 1), **costs}, event("resumed", 1, reached=value, name=value)])
    score = {"name": "a", "step": 1, "size": 1, "digest": "", "scores": {"m": value}}
    write(tmp_path / "scores.jsonl", [score])
    page_of(tmp_path)


def test_every_kind_of_event_is_marked(tmp_path: Path) -> None:
    """Saves, prunings, resumes, what was set aside and each end have marks at their steps, in rows with counts."""
    write(tmp_path / "metrics.jsonl", [metric(step) for step in (10, 20, 30)])
    happened = [event("started", 0), saved(10, 5, 1), saved(20, 5, 2), event("pruned", 10, 2, name=NAME.format(0, 10)),
                saved(30, 5, 3), event("interrupted", 30, 3, signal="SIGTERM"),
                event("set_aside", 30, 4, name=NAME.format(0, 30), reason="torn"),
                event("resumed", 20, 4, name=NAME.format(0, 20), reached=30), event("failed", None, 5, error="E"),
                event("ended", 31, 6)]  # fmt: skip
    write(tmp_path / "events.jsonl", happened)
    figure = charts._loss(history(tmp_path))
    *_, strip = figure.axes
    found = {
        label.get_text(): [tuple(point) for point in marks.get_offsets().tolist()]
        for label, marks in zip(strip.get_yticklabels(), strip.collections, strict=True)
    }
    assert found == {
        "started (1)": [(0, 0)],
        "resumed (1)": [(20, 1)],
        "saved, pruned (1)": [(10, 2)],
        "saved, gone (1)": [(20, 3)],
        "set aside (1)": [(30, 4)],
        "interrupted (1)": [(30, 5)],
        "failed (1)": [(20, 6)],
        "ended (1)": [(31, 7)],
    }
    lines = {line.get_label(): list(line.get_xdata()) for line in figure.axes[0].get_lines()}
    assert lines == {"of the step": [10, 20, 30], "running": [10, 20, 30], "resumed": [20, 20],
                     "set aside": [30, 30]}  # fmt: skip
    assert "10 logged steps trained again" in page_of(tmp_path).text


def test_an_outlier_does_not_flatten_a_curve(tmp_path: Path) -> None:
    """One step with an enormous loss, or a machine that slept, leaves the rest readable, and is named."""
    steps = [metric(step, loss=0.5, running_loss=0.5, seconds_per_step=0.2) for step in range(1, 101)]
    write(tmp_path / "metrics.jsonl", [*steps, metric(101, loss=9e6, running_loss=0.5, seconds_per_step=3600.0)])
    loss, time = charts._loss(history(tmp_path)).axes[0], charts._time(history(tmp_path)).axes[0]
    assert loss.get_ylim() == (0, 0.75)
    assert loss.get_title() == "Loss (highest 9e+06, not shown)"
    assert time.get_ylim() == (0, pytest.approx(300))
    assert "median 200 ms, longest 3600 s, not shown" in time.get_title()


def test_sizes_add_up(tmp_path: Path) -> None:
    """The total after each save is that of what was not pruned or set aside by then."""
    first, second, third = (NAME.format(0, step) for step in (10, 20, 30))
    write(tmp_path / "events.jsonl", [saved(10, 100), saved(20, 200), saved(30, 300), event("pruned", 10, name=first),
                                      event("set_aside", 30, name=third), saved(30, 350),
                                      event("pruned", 20, name=second)])  # fmt: skip
    assert charts._totals(history(tmp_path)) == ([10, 20, 30, 30], [100, 300, 200, 350])


def test_the_best_score_is_the_lowest_of_what_compares(tmp_path: Path) -> None:
    """The lowest score is marked; NaN is never best; scores of another validation set are not mixed in."""

    def score(step: int, value: float | str, on: str = "b") -> dict:
        name = NAME.format(0, step)
        return {
            "name": name,
            "step": step,
            "size": 1,
            "digest": "",
            "scores": {"val_loss": value},
            "on": {"val_loss": on},
        }

    write(tmp_path / "scores.jsonl", [score(5, 0.01, "a"), score(10, "NaN"), score(20, 0.5), score(30, 0.75),
                                      score(40, 2.0), score(40, 0.5)], '{"name": "to')  # fmt: skip
    found = history(tmp_path)
    assert [*found.scores["val_loss"]] == [10, 20, 30, 40]
    assert found.best("val_loss") == 40
    (axes,) = charts._scores(found).axes
    assert axes.get_legend().get_texts()[0].get_text() == "lowest: 0.5 at step 40"
    assert "0.5 at 40" in page_of(tmp_path).text


def test_pictures_of_mels_are_inside(tmp_path: Path) -> None:
    """The best checkpoint's and the newest are seen at once, the others from the newest back; what is no PNG is not."""
    buffer = io.BytesIO()
    image.imsave(buffer, [[0.0, 1.0]], format="png")
    mels = tmp_path / "mels"
    mels.mkdir()
    for step in range(1, 13):
        (mels / NAME.format(0, step).replace(".pth", ".png")).write_bytes(buffer.getvalue())
    (mels / "bad.png").write_text(EVIL)
    write(tmp_path / "events.jsonl", [saved(step, 1) for step in range(1, 13)])
    values = [{"name": NAME.format(0, step), "step": step, "size": 1, "digest": "",
               "scores": {"val_loss": abs(step - 7.1), "mel_distance": abs(step - 3.1), "wer": abs(step - 7.1)}}
              for step in range(1, 13)]  # fmt: skip
    averaged = {"name": NAME.format(0, 3), "step": 3, "size": 1, "digest": "", "scores": {"val_loss_ema": 1.0}}
    write(tmp_path / "scores.jsonl", [*values, averaged])
    page = page_of(tmp_path)
    shown = [int(line.split("step_")[1][:5]) for line in page.text.splitlines() if ".png" in line]
    assert shown == [12, 7, 3, 11, 10, 9, 8, 6, 5, 4, 2, 1]
    assert "step_00007.png – lowest val_loss and wer" in page.text
    assert "step_00003.png – lowest mel_distance" in page.text
    assert "step_00012.png – the newest" in page.text
    assert "9 more, the newest first" in page.text
    (mels / NAME.format(0, 3).replace(".pth", "_ema.png")).write_bytes(buffer.getvalue())
    assert "step_00003_ema.png – lowest val_loss_ema" in page_of(tmp_path).text


def test_many_pictures_do_not_swell_the_page(tmp_path: Path) -> None:
    """Up to 6 MiB of pictures are on the page, those of the best and the newest first; the rest is counted."""
    mels = tmp_path / "mels"
    mels.mkdir()
    for step in range(10):
        (mels / f"{step}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(1 << 20))
    write(tmp_path / "events.jsonl", [{**saved(1, 1), "name": "2.pth"}])
    write(tmp_path / "scores.jsonl", [{"name": "2.pth", "step": 1, "size": 1, "digest": "", "scores": {"m": 1}}])
    page = page_of(tmp_path)
    shown = [line.split(".png")[0] for line in page.text.splitlines() if ".png" in line]
    assert shown == ["9", "2", "8", "7", "6"]
    assert "5 more are in the run's folder" in page.text
    (mels / "10.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(7 << 20))
    assert "10.png" in page_of(tmp_path).text


def test_what_evaluate_found_is_shown(tmp_path: Path) -> None:
    """Scores, what they were computed on, the best checkpoint and pictures of a run that was really scored."""
    write_demo_corpus(str(tmp_path / "recordings"), clips=1)
    clips = tmp_path / "recordings"
    runs.train(clips, tmp_path, max_steps=3, save_every=1, keep_last=9, val_dir=clips)
    words = ["evaluate", tmp_path / "run", "--every", "--val-dir", clips, "--euler-steps", 1, "--pictures", 1]
    assert CliRunner().invoke(command, [*map(str, words)], standalone_mode=False).return_value == 0
    page, found = page_of(tmp_path / "run"), history(tmp_path / "run")
    assert "Not in this run" not in page.text
    assert [*found.scores] == ["mel_distance", "val_loss"]
    assert [*found.scores["val_loss"]] == [*found.scores["mel_distance"]] == [1, 2, 3]
    on = json.loads((tmp_path / "run" / "scores.jsonl").read_text().splitlines()[-1])["on"]
    assert f"val_loss: computed on {on['val_loss']}\n" in page.text
    assert f"mel_distance: computed on {on['mel_distance']}\n" in page.text
    names = {line.split(".png")[0]: line for line in page.text.splitlines() if ".png" in line}
    assert len(names) == 3
    for metric in found.scores:
        (best,) = (it for it in found.checkpoints if it.step == found.best(metric))
        assert metric in names[best.name.removesuffix(".pth")].split("lowest")[1]


def test_validation_losses_are_drawn_beside_those_of_training(tmp_path: Path) -> None:
    """Those that were logged, at their steps, in the chart of the loss; without any there is no such curve."""
    logged = [metric(step, **({"val_loss": 3.0 + step} if step in (2, 4) else {})) for step in range(1, 6)]
    write(tmp_path / "metrics.jsonl", logged)
    lines = {line.get_label(): line for line in charts._loss(history(tmp_path)).axes[0].get_lines()}
    assert list(lines["validation"].get_xdata()) == [2, 4]
    assert list(lines["validation"].get_ydata()) == [5, 7]
    assert charts._loss(history(tmp_path)).axes[0].get_ylim()[1] > 7
    write(tmp_path / "metrics.jsonl", [metric(1), metric(2)])
    lines = {line.get_label(): line for line in charts._loss(history(tmp_path)).axes[0].get_lines()}
    assert "validation" not in lines


def test_checkpoints_may_be_named_otherwise(tmp_path: Path) -> None:
    """With --pattern those are found that are named by it."""
    with CheckpointStore(tmp_path, pattern=NamePattern("model-{step}.pth")) as store:
        store.save({"net": {}}, 7)
    assert "no checkpoints" in page_of(tmp_path).text
    assert report(tmp_path, "--pattern", "model-{step}.pth").exception is None
    page = Page(tmp_path / "report" / "report.html")
    assert "no checkpoints" not in page.text
    assert "model-7.pth" in page.text
    assert "step" in str(report(tmp_path, "--pattern", "model.pth").exception)


def test_long_runs_stay_small(tmp_path: Path) -> None:
    """10,000 logged steps and 200 checkpoints give a page of under 1 MB."""
    write(tmp_path / "metrics.jsonl", [metric(step) for step in range(1, 10_001)])
    write(tmp_path / "events.jsonl", [saved(50 * number, 300_000_000) for number in range(1, 201)])
    page_of(tmp_path)
    assert (tmp_path / "report" / "report.html").stat().st_size < 1_000_000


def test_a_report_can_be_made_again_and_changes_nothing_else(trained: Path, tmp_path: Path) -> None:
    """It replaces an earlier one; of the run it changes nothing."""
    before = {path.name: path.stat().st_mtime_ns for path in trained.iterdir()}
    store = CheckpointStore(trained, read_only=True)
    first = write_report(store, str(tmp_path))
    assert first == write_report(store, str(tmp_path))
    assert {path.name: path.stat().st_mtime_ns for path in trained.iterdir()} == before


def test_a_run_on_a_server_needs_a_folder_here(tmp_path: Path) -> None:
    """For a URL --out is asked for; with it the report is that of the run."""
    store = CheckpointStore("memory://reports/run")
    content = json.dumps(metric(7)).encode() + b"\n"
    store.storage.publish("metrics.jsonl", len(content), [memoryview(content)])
    refused = report("memory://reports/run")
    assert "--out" in str(refused.exception)
    assert report("memory://reports/run", "--out", tmp_path / "here").exception is None
    assert "memory://reports/run" in Page(tmp_path / "here" / "report.html").text


def test_mistakes_get_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that is not there, and a folder that can't be written, are told without a traceback."""
    (tmp_path / "file").touch()
    for words, said in (
        ([tmp_path / "nowhere"], "does not exist"),
        ([tmp_path, "--out", tmp_path / "file" / "below"], "below"),
    ):
        code, errors = runs.main(capsys, "report", *words)
        assert code in (1, 2)
        assert said in errors
        assert "Traceback" not in errors


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path) -> None:
    """Where the extra is missing the command names it."""
    packages = tmp_path / "packages"  # an installation like this one, without a package
    packages.mkdir()
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if package.suffix != ".pth" and not package.name.startswith("matplotlib"):
            (packages / package.name).symlink_to(package)
    project = Path(seedvc_train.__file__).parent.parent
    shown = subprocess.run(
        [sys.executable, "-S", "-m", "seedvc_train", "report", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (packages, project)))},
    )
    assert shown.returncode == 2, shown.stderr
    assert "a report needs matplotlib: run pip install 'seedvc-ckpt[report]'" in shown.stderr
