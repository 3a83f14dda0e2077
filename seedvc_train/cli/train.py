"""``seedvc-train`` itself: training, where no other command is named."""

from __future__ import annotations

import os
from contextlib import ExitStack
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click

from seedvc_train.cli.options import device_option, encoder_options, fraction
from seedvc_train.config import load_config

if TYPE_CHECKING:
    import torch

    from seedvc_ckpt.retention import Rule
    from seedvc_train.audio import MelSpectrogram
    from seedvc_train.dataset import Corpus
    from seedvc_train.feature_cache import FeatureCache
    from seedvc_train.features import FrontEnd

__all__ = ["command"]

_PRESET = os.path.join(os.path.dirname(os.path.dirname(__file__)), "presets", "config_dit_mel_demo_tiny.yml")
_NEEDED = ("numpy", "soundfile", "soxr", "tqdm")
_SHIFTS = 4  # fewer, and the network may learn the disguises; each costs as much time and room as the clip itself


def _resume(_ctx: click.Context, _parameter: click.Parameter, value: str) -> str:
    if value not in ("auto", "never") and not (value.isascii() and value.isdecimal()):
        raise click.BadParameter(f"{value!r} is none of auto, never and a step")
    return value


def _run_name(_ctx: click.Context, _parameter: click.Parameter, value: str) -> str:
    if not value or value in (".", "..") or "/" in value or "\0" in value or os.sep in value:
        raise click.BadParameter(f"{value!r} is not the name of one folder; use --log-dir for where it lies")
    return value


def _cache(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and (not value or "://" in value or "\0" in value):
        raise click.BadParameter(f"{value!r} is no folder on this machine, where the feature cache has to be")
    return value


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example: seedvc-train --config config_dit_mel_seed_uvit_xlsr_tiny.yml --dataset-dir recordings "
    "--run-name my_run --max-steps 5000. Start the same command again after a crash and it goes on.",
)
@click.option("--config", default=_PRESET, metavar="YAML", help="A config of Seed-VC's.  [default: a tiny one to try]")
@click.option("--pretrained-ckpt", metavar="FILE|RUN", help="Weights that a new run starts from; of a RUN, its latest.")
@click.option("--pretrained-weights", type=click.Choice(["net", "ema"]), default="net", show_default=True,
              help="Of --pretrained-ckpt: the trained ones, or their averages where it has them.")  # fmt: skip
@click.option(
    "--compile", is_flag=True, help="Compile the model first (minutes); resumes differ in the last bits then."
)
@click.option("--dataset-dir", metavar="DIR", help="Recordings of 1 to 30 s, in any folders below it.")
@click.option("--run-name", default="my_run", show_default=True, callback=_run_name, help="The run's folder.")
@click.option("--log-dir", metavar="DIR|URL", help="Where runs lie.  [default: the YAML's log_dir]")
@click.option("--batch-size", type=click.IntRange(min=1), help="Clips a step.  [default: the YAML's]")
@click.option("--max-steps", type=click.IntRange(min=1), default=1000, show_default=True, help="Steps in all.")
@click.option("--max-epochs", type=click.IntRange(min=1), default=1000, show_default=True, help="Epochs in all.")
@click.option("--save-every", type=click.IntRange(min=1), default=500, show_default=True, help="Steps between saves.")
@click.option("--num-workers", type=click.IntRange(min=0), default=0, show_default=True, help="Loader processes.")
@click.option("--gpu", type=click.IntRange(min=0), help="Number of the GPU, as --device cuda:N.")
@device_option
@click.option("--precision", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True,
              help="Of the forward pass; weights, loss and averages stay fp32.")  # fmt: skip
@click.option("--tf32", is_flag=True, help="On CUDA, multiply fp32 faster and with 10 bits of mantissa.")
@click.option("--accumulate", type=click.IntRange(min=1), default=1, show_default=True, metavar="N",
              help="Batches a step, gradients averaged: N times the batch size in the memory of one.")  # fmt: skip
@click.option("--ema", type=click.FloatRange(0, 1, min_open=True, max_open=True), metavar="DECAY",
              help="Average the weights too, by DECAY a step (such as 0.999), for ft_model.pth.")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of everything random.")
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), help="Learning rate.  [default: 1e-5]")
@click.option(
    "--keep-last", type=click.IntRange(min=1), default=2, show_default=True, help="Newest checkpoints to keep."
)
@click.option("--keep-every", type=click.IntRange(min=1), metavar="STEPS", help="Keep multiples of this for good.")
@click.option("--keep-best", metavar="METRIC[:N[:max]]", help="Keep the N with the smallest (largest) METRIC, such as "
              "val_loss:3, and what is not scored by it yet.")  # fmt: skip
@click.option("--val-dir", metavar="DIR", help="Recordings to validate on, which are not trained on.")
@click.option("--val-split", type=fraction, metavar="FRACTION",
              help="Train on all but so many of the recordings, and validate on these.")  # fmt: skip
@click.option("--val-every", type=click.IntRange(min=1), metavar="STEPS",
              help="Steps between validations.  [default: as --save-every]")  # fmt: skip
@click.option("--sync-save", is_flag=True, help="Wait for each save, instead of writing it while training goes on.")
@click.option("--resume", default="auto", show_default=True, callback=_resume, metavar="auto|never|STEP",
              help="Go on from the newest intact checkpoint, start anew, or go back to a step.")  # fmt: skip
@click.option("--allow-changes", is_flag=True, help="Go on though settings or data changed.")
@click.option("--features", type=click.Choice(["auto", "seedvc", "builtin"]), default="auto", show_default=True,
              help="Listen with the encoders of the YAML, as Seed-VC does, or without weights; auto: with those "
              "of the YAML if they are here or on Hugging Face's hub.")  # fmt: skip
@encoder_options
@click.option("--feature-cache", metavar="DIR|off", callback=_cache,
              help="Compute features once and keep them here, or in every step.  [default: off with built-in "
              "features, else features/ in the user's cache folder]")  # fmt: skip
@click.option("--shifts", type=click.IntRange(min=1), metavar="K",
              help=f"Disguised copies of each clip in the feature cache.  [default: {_SHIFTS}]")  # fmt: skip
@click.option("--tensorboard", is_flag=True, help="Write the logs for TensorBoard too, to RUN/tensorboard.")
@click.option("--demo", is_flag=True, help="Show it all once: train on made-up speech, be killed, resume, export.")
@click.pass_context
def command(context: click.Context, /, **options: Any) -> int:
    """Train the DiT of a Seed-VC voice converter, resumable bit for bit.

    Checkpoints go to LOG_DIR/RUN_NAME as Seed-VC names them, the weights of the last one to ft_model.pth there.
    Ctrl-C finishes the step, saves and stops; a second one stops at once.
    """
    if context.invoked_subcommand is not None:
        return 0
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise click.UsageError(f"training needs {', '.join(missing)}: run pip install 'seedvc-ckpt[train]'")
    if options["tensorboard"] and find_spec("tensorboard") is None:
        raise click.UsageError("--tensorboard needs tensorboard: run pip install 'seedvc-ckpt[tensorboard]'")
    if options["demo"]:
        from seedvc_train.demo import demo

        return demo()
    if not options["dataset_dir"]:
        raise click.UsageError("say where the recordings are with --dataset-dir, or try --demo")
    if options["val_dir"] and options["val_split"]:
        raise click.UsageError("--val-dir and --val-split name recordings to validate on each: give one of them")
    if options["val_every"] and not (options["val_dir"] or options["val_split"]):
        raise click.UsageError("--val-every validates on nothing: say on what with --val-dir or --val-split")
    return _train(options)


def _train(options: dict[str, Any]) -> int:
    config = load_config(options["config"])
    folder = _below(options["log_dir"] or config.log_dir, options["run_name"])
    from seedvc_ckpt import CheckpointStore
    from seedvc_ckpt.scores import comparable
    from seedvc_train import run
    from seedvc_train.audio import MelSpectrogram
    from seedvc_train.data import TrainingData
    from seedvc_train.dataset import scan
    from seedvc_train.device import (
        DeviceError,
        compile_model,
        compiler_errors,
        find_device,
        listeners,
        prepare_device,
        wants_pinned_memory,
    )
    from seedvc_train.events import EventLog
    from seedvc_train.features.builtin import BuiltinFrontEnd
    from seedvc_train.features.choose import EncoderOptions, choose_front_end
    from seedvc_train.loop import Limits, train
    from seedvc_train.metrics import MetricsLog
    from seedvc_train.model import build_model
    from seedvc_train.optim import LEARNING_RATE
    from seedvc_train.pretrained import Pretrained
    from seedvc_train.randomness import seed_all
    from seedvc_train.runlog import folder_here
    from seedvc_train.saving import Saving
    from seedvc_train.settings import Settings
    from seedvc_train.state import TrainingState
    from seedvc_train.validation import hear, validation_cache

    if options["tensorboard"]:
        from seedvc_train.tensorboard import FOLDER, TensorBoard, show_scores

    sound, seed, start = config.preprocess_params, options["seed"], options["pretrained_ckpt"]
    try:
        device = find_device(options["device"], options["gpu"])
        prepare_device(device, tf32=options["tf32"])
    except DeviceError as error:
        raise click.UsageError(str(error)) from None
    corpus = scan(options["dataset_dir"], sound.sr)
    _tell(corpus, "clips")
    corpus, held_out = _held_out(corpus, options)
    mel = MelSpectrogram(sound.sr, **sound.spect_params.model_dump())
    encoders = EncoderOptions(*(options[key] for key in ("features", "content_encoder", "campplus", "rmvpe")))
    beside = os.path.dirname(options["config"])
    in_workers = options["feature_cache"] == "off" and options["num_workers"]
    listening_on = "cpu" if in_workers else device  # loader processes can't share a GPU's memory
    front_end = choose_front_end(config, beside, encoders, listening_on, _say)
    features = "builtin" if isinstance(front_end, BuiltinFrontEnd) else front_end.identity
    batch_size = options["batch_size"] or config.batch_size
    cache = _feature_cache(options, corpus, mel, front_end)
    chosen = {name: options[name] for name in ("seed", "precision", "tf32", "accumulate", "ema", "val_split")}
    chosen |= {"feature_cache.shifts": cache.shifts} if cache else {}
    settings = Settings.of(config, corpus, batch_size=batch_size, features=features, **chosen)
    pinned = wants_pinned_memory(device)
    data = TrainingData(corpus, mel, front_end, batch_size, seed, options["num_workers"], pinned, cache)
    validation = None
    if held_out is not None:
        prepare_device(device, tf32=False)  # as evaluate listens, whose numbers are to compare
        kept = validation_cache(cache.folder, held_out, mel, front_end) if cache else None
        if kept is not None:
            _fill(kept, device, "validation features")
        validation = hear(held_out, mel, front_end, threads=listeners(device), cache=kept)
        prepare_device(device, tf32=options["tf32"])

    seed_all(seed)
    model = build_model(config.model_params).to(device)
    if options["compile"]:
        compile_model(model)
    state = TrainingState.fresh(
        model,
        options["lr"] or LEARNING_RATE,
        precision=options["precision"],
        ema_decay=options["ema"],
        compiled=options["compile"],
    )
    with CheckpointStore(folder, retention=_rules(options)) as store, ExitStack() as stack, EventLog(store) as events:
        store.acquire()  # a second trainer must not find out after its first hour
        resumed = run.begin(
            state,
            store,
            settings,
            resume=options["resume"],
            pretrained=Pretrained(start, options["pretrained_weights"]) if start else None,
            lr=options["lr"],
            allow_changes=options["allow_changes"],
            say=_say,
            log=events,
        )
        run.keep_config(store.storage, options["config"])
        if cache is not None:
            prepare_device(device, tf32=False)  # runs without it share the cache
            _fill(cache, device, "features")
            prepare_device(device, tf32=options["tf32"])
        limits = Limits(
            options["max_steps"],
            options["max_epochs"],
            options["save_every"],
            config.log_interval,
            options["accumulate"],
            options["val_every"] or options["save_every"],
        )
        scored_on = validation.identity if validation else ""
        saving = Saving(store, state.changed_by, events, scored_on, in_background=not options["sync_save"])
        log = MetricsLog(store, state.step)
        if options["tensorboard"]:
            board = stack.enter_context(TensorBoard(os.path.join(folder_here(store), FOLDER), state.step))
            log.copy_to(board.write)
            events.copy_to(board.write)
            show_scores(board.folder, [it for it in comparable(store.storage, {}) if it.step <= state.step])
            _say(f"for TensorBoard: {board.folder}")
        run.note_start(events, state.step, resumed, log.reached, options)
        with compiler_errors():
            code = train(state, data.batches, saving, settings, limits, log, validation)
        run.note_end(events, state.step, code)
        if code:
            _say(f"stopped at step {state.step}, saved; start the same command again to go on")
        elif state.ema is None:
            _say(f"done at step {state.step}: {run.publish_weights(store, _say)}")
        else:
            target = run.publish_weights(store, _say, "ema")
            _say(f"done at step {state.step}: {target}, which holds the averaged weights")
    return code


def _tell(corpus: Corpus, what: str) -> None:
    _say(f"{len(corpus.clips)} {what}, {corpus.seconds / 60:.1f} minutes")
    for skipped in corpus.skipped:
        _say(f"  skipped {skipped.path}: {skipped.reason}")


def _held_out(corpus: Corpus, options: dict[str, Any]) -> tuple[Corpus, Corpus | None]:
    """The clips to train on, and those to validate on."""
    from seedvc_train.dataset import scan
    from seedvc_train.validation import split

    if options["val_split"]:
        corpus, held_out = split(corpus, options["val_split"])
        _say(f"{len(held_out.clips)} of them are held out for validation")
        return corpus, held_out
    if not options["val_dir"]:
        return corpus, None
    held_out = scan(options["val_dir"], corpus.sr)
    _tell(held_out, "clips for validation")
    both = {clip.digest for clip in corpus.clips} & {clip.digest for clip in held_out.clips}
    if both:
        _say(f"  {len(both)} of them are trained on too, so that val_loss will look better than it is")
    return corpus, held_out


def _rules(options: dict[str, Any]) -> list[Rule]:
    from seedvc_ckpt.retention import keep_best_of, keep_every, keep_last

    rules = [keep_last(options["keep_last"])]
    if options["keep_every"]:
        rules.append(keep_every(options["keep_every"]))
    if options["keep_best"]:
        try:
            rules.append(keep_best_of(options["keep_best"], scored_later=True))
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--keep-best") from None
    return rules


def _feature_cache(
    options: dict[str, Any], corpus: Corpus, mel: MelSpectrogram, front_end: FrontEnd
) -> FeatureCache | None:
    from seedvc_train.feature_cache import FeatureCache
    from seedvc_train.features.builtin import BuiltinFrontEnd
    from seedvc_train.places import cache_folder

    # the built-in front end takes milliseconds a clip, which a new disguise in every epoch is worth
    default = "off" if isinstance(front_end, BuiltinFrontEnd) else os.path.join(cache_folder(), "features")
    folder = options["feature_cache"] or default
    if folder == "off":
        if options["shifts"]:
            raise click.UsageError("--shifts counts copies in the feature cache, which is off: see --feature-cache")
        return None
    return FeatureCache(folder, corpus, mel, front_end, options["shifts"] or _SHIFTS)


def _fill(cache: FeatureCache, device: torch.device, what: str) -> None:
    """Compute what the cache lacks, and say so."""
    from seedvc_ckpt.cli.output import readable_size
    from seedvc_train.device import listeners
    from seedvc_train.progress import ClipProgress

    missing = cache.missing()
    with ClipProgress(f"computing {what}", len(missing)) as progress:
        computed = cache.fill(missing, listeners(device), progress.step)
    found, size = len(cache.corpus.clips) - computed, readable_size(cache.nbytes())
    _say(f"{what}: {found} clips from the cache, {computed} computed; {size} in {cache.folder}")


def _below(log_dir: str, name: str) -> str:
    """A run's place; the slashes after a scheme stay."""
    scheme, mark, path = log_dir.rpartition("://")
    return f"{scheme}{mark}{path.rstrip('/')}/{name}"


def _say(line: str) -> None:
    """Print a line; a file name that is no text is shown escaped."""
    click.echo(line.encode(errors="backslashreplace").decode())
