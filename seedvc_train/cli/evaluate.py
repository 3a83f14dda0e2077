"""``seedvc-train evaluate``."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click

from seedvc_ckpt.cli.target import pattern_option, run_at
from seedvc_train.cli.options import device_option, encoder_options, fraction

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from seedvc_ckpt import CheckpointInfo, CheckpointStore
    from seedvc_train.config import Config
    from seedvc_train.dataset import Corpus
    from seedvc_train.evaluate import Evaluation, Scored
    from seedvc_train.features import FrontEnd

__all__ = ["command"]


@click.command(
    "evaluate",
    epilog="Example: seedvc-train evaluate runs/my_run --every --val-dir held_out",
)
@click.argument("run")
@click.option("--every", is_flag=True, help="All checkpoints that are not scored on these clips yet.")
@click.option("--step", type=click.IntRange(min=0), help="The checkpoint of this step.  [default: the latest]")
@click.option("--val-dir", metavar="DIR", help="Recordings that the run was not trained on.")
@click.option("--dataset-dir", metavar="DIR", help="The recordings of a run that held some of them out.")
@click.option("--val-split", type=fraction, metavar="FRACTION", help="How many of them.  [default: as in training]")
@click.option("--config", metavar="YAML", help="Describes the model.  [default: the run's own copy]")
@click.option("--weights", type=click.Choice(["net", "ema"]), default="net", show_default=True,
              help="The trained ones, or their averages: val_loss_ema and mel_distance_ema.")  # fmt: skip
@click.option("--euler-steps", type=click.IntRange(min=1), default=10, show_default=True, help="Of sampled mels.")
@click.option("--pictures", type=click.IntRange(min=0), default=3, show_default=True, metavar="N",
              help="Draw the mels of N clips for each checkpoint.")  # fmt: skip
@pattern_option
@encoder_options
@device_option
@click.option("--tensorboard", is_flag=True, help="Show all scores of the run in TensorBoard too.")
@click.option("--json", "as_json_", is_flag=True, help="Print one JSON document and nothing else.")
def command(run: str, as_json_: bool, **options: Any) -> int:  # noqa: FBT001
    """Score checkpoints of a RUN on recordings that it was not trained on.

    The validation loss and the distance of sampled mels go to the run's scores.jsonl, where seedvc-ckpt ls --metric
    val_loss and seedvc-ckpt export --best val_loss find them; pictures of the mels to RUN/mels. The run may be training
    meanwhile. A damaged checkpoint is told and left out, and the exit code is 1 then.
    """
    if (options["val_dir"] is None) == (options["dataset_dir"] is None):
        raise click.UsageError("say what to score on: --val-dir, or --dataset-dir of a run with held-out clips")
    if options["val_dir"] is not None and options["val_split"] is not None:
        raise click.UsageError("--val-split is of --dataset-dir; all of --val-dir is scored on")
    if options["every"] and options["step"] is not None:
        raise click.UsageError("--every and --step name checkpoints each: give one of them")
    if options["tensorboard"] and find_spec("tensorboard") is None:
        raise click.UsageError("--tensorboard needs tensorboard: run pip install 'seedvc-ckpt[tensorboard]'")
    with run_at(run, pattern=options["pattern"]) as store:
        config = _config(store, options["config"])
        infos = _infos(store, options)
        if not infos:
            raise click.UsageError(f"there is no checkpoint in {run}")
        made_with = _settings(store)
        corpus = _corpus(config, options, made_with.get("val_split"))
        evaluation = _evaluation(store, config, corpus, options, made_with.get("features"))
        if options["every"]:
            infos = evaluation.unscored()
        results = _scored(evaluation, infos)
        board = _shown(evaluation) if options["tensorboard"] else None
        if as_json_:
            _print_json(evaluation, results)
        else:
            _print(evaluation, results, drawn=options["pictures"] > 0)
            if board:
                click.echo(f"for TensorBoard: {board}")
    return 1 if any(result.problem for result in results) else 0


def _infos(store: CheckpointStore, options: dict[str, Any]) -> list[CheckpointInfo]:
    infos, step = store.list(), options["step"]
    if options["every"] or not infos:
        return infos
    found = infos[-1:] if step is None else [info for info in infos if info.step == step]
    if not found:
        raise click.UsageError(f"no checkpoint of step {step} in {store.location}: seedvc-ckpt ls shows what is there")
    return found


def _config(store: CheckpointStore, given: str | None) -> Config:
    from seedvc_ckpt.storage import read_file
    from seedvc_train.config import load_config, parse_config

    if given is not None:
        return load_config(given)
    names = sorted(entry.name for entry in store.storage.list() if entry.name.endswith((".yml", ".yaml")))
    if len(names) != 1:
        found = f"holds {len(names)} ({', '.join(names)})" if names else "holds no YAML"
        raise click.UsageError(f"{store.location} {found}: say with --config which one describes the model")
    return parse_config(read_file(store.storage, names[0]), f"{store.location}/{names[0]}")


def _settings(store: CheckpointStore) -> Mapping[str, Any]:
    """What the newest checkpoint that can be asked says that it was made with."""
    from seedvc_ckpt import CorruptCheckpointError

    for info in reversed(store.list()):
        try:
            manifest = store.file(info).manifest()
        except CorruptCheckpointError:
            continue  # told when it is to be scored
        return manifest.settings if manifest else {}
    return {}


def _corpus(config: Config, options: dict[str, Any], trained: Any) -> Corpus:
    """The clips to score on; `trained` is the split that the run was trained with."""
    from seedvc_train.dataset import scan
    from seedvc_train.validation import split

    sr = config.preprocess_params.sr
    if options["val_dir"] is not None:
        return scan(options["val_dir"], sr)
    part = options["val_split"] or trained
    if not isinstance(part, float):
        raise click.UsageError(
            "the run does not tell that clips were held out of its training: say how many with --val-split, or give "
            "other recordings with --val-dir"
        )
    return split(scan(options["dataset_dir"], sr), part)[1]


def _evaluation(
    store: CheckpointStore, config: Config, corpus: Corpus, options: dict[str, Any], trained: Any
) -> Evaluation:
    from tqdm import tqdm

    from seedvc_train.audio import MelSpectrogram
    from seedvc_train.device import DeviceError, find_device, listeners, prepare_device
    from seedvc_train.evaluate import Evaluation
    from seedvc_train.model import build_model
    from seedvc_train.validation import hear

    try:
        device = find_device(options["device"], None)
        prepare_device(device, tf32=False)
    except DeviceError as error:
        raise click.UsageError(str(error)) from None
    sound = config.preprocess_params
    beside = os.path.dirname(options["config"]) if options["config"] else store.location
    front_end = _front_end(config, beside, options, device, trained)
    mel = MelSpectrogram(sound.sr, **sound.spect_params.model_dump())
    with tqdm(total=len(corpus.clips), desc="listening", unit="clip", disable=None) as bar:
        data = hear(corpus, mel, front_end, bar.update, threads=listeners(device))
    return Evaluation(
        store,
        build_model(config.model_params).to(device),
        data,
        options["euler_steps"],
        options["pictures"],
        sound.spect_params.hop_length / sound.sr,
        options["weights"],
    )


def _front_end(config: Config, beside: str, options: dict[str, Any], device: torch.device, trained: Any) -> FrontEnd:
    """What the run was trained to listen with: `trained`, where it tells."""
    from seedvc_train.features.builtin import BuiltinFrontEnd
    from seedvc_train.features.choose import EncoderOptions, choose_front_end

    named = EncoderOptions("seedvc", options["content_encoder"], options["campplus"], options["rmvpe"])
    chosen = EncoderOptions("builtin") if trained == "builtin" and not named.named else named
    front_end = choose_front_end(config, beside, chosen, device, click.echo)
    heard = "builtin" if isinstance(front_end, BuiltinFrontEnd) else front_end.identity
    if trained not in (None, heard):
        raise click.UsageError(
            f"the run was trained on features of\n  {trained}\nand would be scored on those of\n  {heard}\nName the "
            "encoders that it was trained with: --content-encoder, --campplus, --rmvpe"
        )
    return front_end


def _scored(evaluation: Evaluation, infos: list[CheckpointInfo]) -> list[Scored]:
    from tqdm import tqdm

    results = []
    with tqdm(total=len(infos) * evaluation.work, unit="clip", disable=None) as bar:
        for result in evaluation.score(infos, bar.update):
            bar.set_description(f"step {result.info.step}")
            results.append(result)
    return results


def _shown(evaluation: Evaluation) -> str:
    """Show the run's scores in TensorBoard, beside what its trainer shows."""
    from seedvc_ckpt.scores import comparable
    from seedvc_train.runlog import folder_here
    from seedvc_train.tensorboard import FOLDER, show_scores

    store = evaluation.store
    return show_scores(os.path.join(folder_here(store), FOLDER), comparable(store.storage, evaluation.on))


def _print(evaluation: Evaluation, results: list[Scored], *, drawn: bool) -> None:
    from seedvc_ckpt.cli.output import columns

    click.echo(f"on {evaluation.data.identity}")
    if not results:
        click.echo("all checkpoints are scored on these clips already")
        return
    scored = [found.scores for found in results if found.scores]
    best = {metric: min((scores[metric] for scores in scored), default=None) for metric in evaluation.metrics}
    rows = [
        (
            str(found.info.step),
            *(_number(found.scores.get(metric), best[metric]) for metric in evaluation.metrics),
            found.picture or ("NOT SCORED" if found.problem else ""),
        )
        for found in results
    ]
    columns(rows, ["step", *evaluation.metrics, ""], " ".join(["step", *evaluation.metrics]))
    for found in results:
        if found.problem:
            click.echo(f"{click.style('not scored:', fg='red')} {found.problem}", err=True)
    if drawn and find_spec("matplotlib") is None:
        click.echo("no mels were drawn: run pip install 'seedvc-ckpt[report]'", err=True)


def _number(value: float | None, best: float | None) -> str:
    return "- " if value is None else f"{value:.4f}{'*' if value == best else ' '}"


def _print_json(evaluation: Evaluation, results: list[Scored]) -> None:
    from seedvc_ckpt.cli.output import as_json

    found = [
        {
            "name": result.info.name,
            "step": result.info.step,
            "epoch": result.info.epoch,
            "scores": result.scores,
            "picture": result.picture or None,
            "problem": result.problem or None,
        }
        for result in results
    ]
    as_json({"run": evaluation.store.location, "on": evaluation.on, "checkpoints": found})
