"""Validation: numbers that depend on weights and clips, and on nothing else."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from seedvc_train.audio import MelSpectrogram
from seedvc_train.config import load_config
from seedvc_train.dataset import Clip, Corpus, scan
from seedvc_train.feature_cache import FeatureCache
from seedvc_train.features import FrontEnd
from seedvc_train.features.builtin import BuiltinFrontEnd
from seedvc_train.model import build_model
from seedvc_train.pictures import MelRow, mel_picture
from seedvc_train.validation import ValidationError, ValidationSet, hear, split, validation_cache

CONFIG = load_config(runs.CONFIG)
PARAMS = CONFIG.model_params


@pytest.fixture(scope="module")
def mel() -> MelSpectrogram:
    sound = CONFIG.preprocess_params
    return MelSpectrogram(sound.sr, **sound.spect_params.model_dump())


@pytest.fixture(scope="module")
def front_end() -> BuiltinFrontEnd:
    return BuiltinFrontEnd(PARAMS.length_regulator.in_channels, PARAMS.style_encoder.dim)


@pytest.fixture(scope="module")
def corpus(recordings: Path) -> Corpus:
    return scan(str(recordings), CONFIG.preprocess_params.sr)


@pytest.fixture(scope="module")
def data(corpus: Corpus, mel: MelSpectrogram, front_end: BuiltinFrontEnd) -> ValidationSet:
    return hear(replace(corpus, clips=corpus.clips[:3]), mel, front_end)


@pytest.fixture
def model() -> nn.ModuleDict:
    torch.manual_seed(3)
    model = build_model(PARAMS)
    for parameter in model.parameters():  # the last layers begin at zero, and so would say nothing of the others
        nn.init.normal_(parameter, std=0.2)
    return model


def random_states() -> tuple[object, ...]:
    numpy = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2:]


class Deaf:
    """What a front end must not be asked for."""

    def __init__(self, identity: str) -> None:
        self.identity = identity

    def __call__(self, *_: object) -> None:
        raise AssertionError("a clip was heard again")


def test_a_cache_changes_no_bit(
    model: nn.ModuleDict, corpus: Corpus, mel: MelSpectrogram, front_end: BuiltinFrontEnd, tmp_path: Path
) -> None:
    """Kept, read or mended, in whatever number of threads: what is heard, and the loss, are those of no cache."""
    plain = hear(corpus, mel, front_end)
    heard_all = len(corpus.clips)

    def listening(front_end: FrontEnd, threads: int) -> ValidationSet:
        done: list[int] = []
        cache = validation_cache(str(tmp_path), corpus, mel, front_end)
        data = hear(corpus, mel, front_end, lambda: done.append(1), threads=threads, cache=cache)
        assert len(done) == heard_all
        assert data.identity == plain.identity
        return data

    deaf = Deaf(front_end.identity)
    first, again = listening(front_end, 2), listening(deaf, 2)
    damaged = min(tmp_path.iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-1])
    mended = listening(front_end, 1)
    for other in (first, again, mended, hear(corpus, mel, front_end, threads=3)):
        for one, two in zip(plain.clips, other.clips, strict=True):
            assert one.clip == two.clip
            for left, right in zip(vars(one.item).values(), vars(two.item).values(), strict=True):
                assert left is right is None or torch.equal(left, right)
        assert other.loss(model) == plain.loss(model)


def test_training_and_validation_share_a_folder_and_no_file(
    corpus: Corpus, mel: MelSpectrogram, front_end: BuiltinFrontEnd, tmp_path: Path
) -> None:
    """Their disguises of a clip differ, even where both keep one."""
    training = FeatureCache(str(tmp_path), corpus, mel, front_end, 1)
    validating = validation_cache(str(tmp_path), corpus, mel, front_end)
    assert {training.path(index) for index in range(6)}.isdisjoint(validating.path(index) for index in range(6))
    training.fill(range(6), 1)
    assert validating.missing() == [*range(6)]


def test_validating_changes_nothing(
    model: nn.ModuleDict, corpus: Corpus, mel: MelSpectrogram, front_end: BuiltinFrontEnd
) -> None:
    """No global random state, weight, gradient or mode is another after listening, loss and sampling."""
    model["length_regulator"].eval()
    (model["cfm"].estimator.t_embedder.mlp[0].weight * 1.0).sum().backward()
    modes = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = random_states()
    data = hear(replace(corpus, clips=corpus.clips[:1]), mel, front_end)
    data.loss(model)
    data.sample(model, data.clips[0], 2)
    assert random_states() == before
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert [gradient.unique().tolist() for gradient in gradients] == [[1.0]]


def test_equal_weights_give_equal_numbers(model: nn.ModuleDict, data: ValidationSet) -> None:
    """Whatever was drawn before, in whatever order the clips come, and whatever the model was doing."""
    loss, sampled = data.loss(model), data.sample(model, data.clips[0], 2)
    torch.rand(7)
    model.eval()
    turned = replace(data, clips=data.clips[::-1])
    assert turned.loss(model) == loss
    again = turned.sample(model, turned.clips[-1], 2)
    assert again.distance == sampled.distance
    assert torch.equal(again.mel, sampled.mel)


def test_other_weights_give_other_numbers(model: nn.ModuleDict, data: ValidationSet) -> None:
    """The loss feels every part: the estimator, and the length regulator through it."""
    losses = {data.loss(model)}
    for name in ("cfm.estimator.cond_projection.bias", "length_regulator.content_in_proj.weight"):
        model.state_dict()[name].neg_()
        losses.add(data.loss(model))
    assert len(losses) == 3


def test_the_numbers_of_clips_are_averaged(model: nn.ModuleDict, data: ValidationSet) -> None:
    """No clip is felt by another: the loss of several is the mean of each alone."""
    alone = [replace(data, clips=(clip,)).loss(model) for clip in data.clips]
    assert data.loss(model) == pytest.approx(sum(alone) / len(alone), rel=1e-12)
    assert len(set(alone)) == len(alone)


class Knowing(nn.Module):
    """An estimator that knows the clip: the flow from any point leads straight to it."""

    def __init__(self, truth: torch.Tensor) -> None:
        super().__init__()
        self.truth = truth
        self.seen: list[tuple[torch.Tensor, ...]] = []

    def forward(self, x: torch.Tensor, prompt: torch.Tensor, lens: torch.Tensor, t: torch.Tensor, *_: object):
        self.seen.append((t.clone(), (prompt != 0).any(1).sum(1), prompt.clone()))
        return (self.truth - x) / (1 - t[:, None, None])


def test_a_model_that_knows_the_truth_is_perfect(model: nn.ModuleDict, data: ValidationSet) -> None:
    """Then the loss is zero and the sample is the clip; eight times of the flow are tried, one in each eighth."""
    clip = data.clips[0]
    one = replace(data, clips=(clip,))
    knowing = model["cfm"].estimator = Knowing(clip.item.mel)
    assert one.loss(model) == pytest.approx(0, abs=1e-3)
    times, prompts, _ = knowing.seen.pop()
    assert (times * 8).long().tolist() == [*range(8)]
    assert prompts.max() < clip.frames
    assert len(prompts.unique()) > 3
    for steps in (1, 10):
        sampled = one.sample(model, clip, steps)
        assert sampled.prompt == clip.frames // 3
        assert sampled.distance == pytest.approx(0, abs=1e-4)
        torch.testing.assert_close(sampled.mel, clip.item.mel, atol=1e-3, rtol=0)
    knowing.truth = clip.item.mel + 2
    assert one.sample(model, clip, 10).distance == pytest.approx(2, abs=1e-4)
    _, _, prompt = knowing.seen[-2]
    torch.testing.assert_close(prompt[0, :, : sampled.prompt], clip.item.mel[:, : sampled.prompt])


def test_after_the_prompt_the_disguised_copy_is_heard(model: nn.ModuleDict, data: ValidationSet) -> None:
    """As at conversion: what the true voice says after the prompt is not listened to."""
    clip = data.clips[0]

    class Recording(nn.Module):
        def forward(self, content: torch.Tensor, ylens: torch.Tensor, f0: torch.Tensor | None) -> torch.Tensor:
            return torch.full((1, int(ylens.max()), 32), content.sum().sign().item())

    item = replace(
        clip.item,
        content=torch.ones_like(clip.item.content),
        shifted_content=-torch.ones_like(clip.item.shifted_content),
    )
    conditions = []
    model["length_regulator"] = Recording()
    model["cfm"].estimator.cond_projection.register_forward_hook(lambda _m, given, _out: conditions.append(given[0]))
    prompt = data.sample(model, replace(clip, item=item), 1).prompt
    assert conditions[0][0, :prompt].unique().tolist() == [1]
    assert conditions[0][0, prompt:].unique().tolist() == [-1]


def test_the_identity_tells_what_does_not_compare(
    data: ValidationSet, corpus: Corpus, mel: MelSpectrogram, front_end: BuiltinFrontEnd
) -> None:
    """Other clips, rates and front ends are told apart; names of files and their order are not."""
    some = replace(corpus, clips=corpus.clips[:2])
    moved = replace(corpus, clips=tuple(replace(clip, path=f"moved/{clip.path}") for clip in corpus.clips[:3]))

    def identity(clips: tuple[Clip, ...]) -> str:
        class Deaf:
            identity = front_end.identity
            __call__ = front_end.__call__

        return hear(replace(corpus, clips=clips), mel, Deaf()).identity

    assert identity(some.clips) != data.identity
    assert identity(corpus.clips[:3][::-1]) == data.identity
    assert "3 clips" in data.identity
    assert front_end.identity in data.identity
    assert {clip.digest for clip in moved.clips} == {clip.clip.digest for clip in data.clips}


# --- the split ------------------------------------------------------------------------------------------------------


def corpus_of(digests: list[str]) -> Corpus:
    return Corpus("clips", 16000, tuple(Clip(f"{n}.wav", 16000, digest) for n, digest in enumerate(digests)), ())


digests = st.lists(st.binary(min_size=16, max_size=16).map(bytes.hex), min_size=30, max_size=60)


@given(digests, digests, st.floats(0.3, 0.7))
def test_a_clip_stays_on_its_side(there: list[str], added: list[str], fraction: float) -> None:
    """Adding recordings moves none from one side to the other, and copies of one are on one side."""
    try:
        kept, out = split(corpus_of(there), fraction)
        more, more_out = split(corpus_of([*added, *there, *there]), fraction)
    except ValidationError:
        return
    sides = [{clip.digest for clip in side.clips} for side in (kept, out, more, more_out)]
    assert sides[0] <= sides[2]
    assert sides[1] <= sides[3]
    assert not sides[2] & sides[3]
    assert len(kept.clips) + len(out.clips) == len(there)


def test_a_split_has_its_size() -> None:
    """Of many clips the part that was asked for is held out, and a larger one holds out the same and more."""
    corpus = corpus_of([f"{number:032x}" for number in range(4000)])
    tenth, fifth = (split(corpus, fraction)[1] for fraction in (0.1, 0.2))
    assert len(tenth.clips) == pytest.approx(400, abs=60)
    assert set(tenth.clips) < set(fifth.clips)


@pytest.mark.parametrize(("fraction", "side"), [(1e-9, "to validate on"), (1 - 1e-9, "to train on")])
def test_an_empty_side_is_refused(fraction: float, side: str) -> None:
    """With what to do instead."""
    with pytest.raises(ValidationError, match=f"none of the 3 clips in 'clips' {side}: choose another fraction"):
        split(corpus_of(["00" * 16, "11" * 16, "22" * 16]), fraction)


# --- pictures -------------------------------------------------------------------------------------------------------


def rows(number: int) -> Iterator[MelRow]:
    torch.manual_seed(number)
    for clip in range(number):
        yield MelRow(f"clip {clip}", torch.rand(50, 24), torch.rand(20, 90), torch.rand(20, 90), 30, 0.01, 0.5)


def test_pictures_are_pngs_that_show_what_differs() -> None:
    """Equal mels are equal files; another sample, or another prompt, is another picture; more clips are higher."""
    one, more = list(rows(1)), list(rows(3))
    picture = mel_picture("a run", one)
    assert picture.startswith(b"\x89PNG")
    assert mel_picture("a run", one) == picture
    assert mel_picture("a run", [replace(one[0], sampled=one[0].sampled.flip(1))]) != picture
    assert mel_picture("a run", [replace(one[0], heard=one[0].heard.flip(0))]) != picture
    assert mel_picture("a run", [replace(one[0], prompt=40)]) != picture
    height = [int.from_bytes(png[20:24], "big") for png in (picture, mel_picture("a run", more))]
    assert height[0] < height[1]


def test_a_constant_mel_can_be_drawn() -> None:
    """Silence, and content that never changes, are no reason to fail."""
    flat = MelRow("silence", torch.zeros(5, 24), torch.full((20, 9), -11.5), torch.full((20, 9), -11.5), 0, 0.01, 0.0)
    assert mel_picture("silence", [flat]).startswith(b"\x89PNG")
