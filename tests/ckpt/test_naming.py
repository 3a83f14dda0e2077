"""File names: what formats parses back, and nothing else does."""

import itertools
import re

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from seedvc_ckpt import SEED_VC, CheckpointError, NamePattern, PatternError
from seedvc_ckpt.naming import MAX_NUMBER, ParsedName

TEMPLATES = [
    SEED_VC.template,
    "CFM_epoch_{epoch:05d}_step_{step:05d}.pth",
    "AR_epoch_{epoch:05d}_step_{step:05d}.pth",
    "step_{step}.pth",
    "{step:05d}",
    "{step:012d}.ckpt",
    "s{step:03d}e{epoch}.pth",
    "{epoch:02d}-{step:d}.pt",
    "{step} {epoch:05}",
    "a{{b}}{step:05d}{{{epoch:02d}}}.pth",
    "x.+*?^$()[]|\\{step:05d}(.*){epoch:03d}$",
    "Ж_{step:05d}_é_{epoch:05d}.pth",
    "1{step:05d}2x3{epoch:05d}4",
    "~{step}::{epoch}#%.pth",
]
numbers = st.one_of(
    st.integers(0, MAX_NUMBER),
    st.sampled_from([0, 1, 9, 10, 99, 999, 1000, 9999, 10000, 99999, 100000, 123456, 99999999, MAX_NUMBER]),
)


@pytest.mark.parametrize(
    ("step", "epoch", "name"),
    [
        (500, 3, "DiT_epoch_00003_step_00500.pth"),
        (0, 0, "DiT_epoch_00000_step_00000.pth"),
        (99999, 99999, "DiT_epoch_99999_step_99999.pth"),
        (123456, 7, "DiT_epoch_00007_step_123456.pth"),
        (99999999, 100000, "DiT_epoch_100000_step_99999999.pth"),
    ],
)
def test_default_names_are_those_of_seed_vc(step, epoch, name):
    """The names are Seed-VC's, and a width is a minimum."""
    assert SEED_VC.format(step, epoch) == name
    assert SEED_VC.parse(name) == ParsedName(step, epoch)


def test_names_sort_as_numbers():
    """Longer numbers are larger, whatever their text sorts like."""
    steps = [99999999, 5, 123456, 99999, 100000, 1000000]
    parsed = [SEED_VC.parse(SEED_VC.format(step)) for step in steps]
    assert [found.step for found in sorted(parsed)] == sorted(steps)
    assert ParsedName(5, 9) < ParsedName(6, 0)


@pytest.mark.parametrize("template", TEMPLATES)
@given(step=numbers, epoch=numbers)
@settings(max_examples=60, deadline=None)
def test_parse_reverses_format(template, step, epoch):
    """Every name that can be made is read back as it was meant."""
    pattern = NamePattern(template)
    found = pattern.parse(pattern.format(step, epoch))
    assert found == (step, epoch if "{epoch" in template else 0)
    assert type(found.step) is int


def made_by(pattern, name):
    """Whether some pair of numbers written in `name` formats to it: by trying all, with no parsing."""
    runs = {run for size in range(1, len(name) + 1) for run in re.findall(rf"(?=([0-9]{{{size}}}))", name)}
    candidates = {int(run) for run in runs} | {0}
    candidates = {number for number in candidates if number <= MAX_NUMBER}
    epochs = candidates if "{epoch" in pattern.template else {0}
    pairs = itertools.product(candidates, epochs)
    return {(step, epoch) for step, epoch in pairs if pattern.template.format(step=step, epoch=epoch) == name}


@st.composite
def near_misses(draw):
    """A pattern, and a name that it made with a few characters replaced, inserted, removed or doubled."""
    pattern = NamePattern(draw(st.sampled_from(TEMPLATES)))
    name = list(pattern.format(draw(st.integers(0, 200000)), draw(st.integers(0, 200000))))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(name)))
        kind = draw(st.sampled_from(["replace", "insert", "remove", "zero"]))
        character = draw(st.sampled_from("0019_ .-+\u0663\uff15\u00b2\n{}\\xEe") | st.characters(codec="utf-8"))
        name[at : at + (kind in ("replace", "remove"))] = {"zero": "0", "remove": ""}.get(kind, character)
    return pattern, "".join(name)


@given(near_misses())
@settings(max_examples=500, deadline=None)
@example((SEED_VC, "DiT_epoch_00000_step_000500.pth"))
@example((SEED_VC, "DiT_epoch_00000_step_00500.pth\n"))
def test_parse_accepts_exactly_what_format_makes(drawn):
    """A name counts if and only if some pair of numbers formats to it."""
    pattern, name = drawn
    found = pattern.parse(name)
    assert ({found} if found else set()) == made_by(pattern, name)


@pytest.mark.parametrize(
    "name",
    [
        "DiT_epoch_00000_step_00500_copy.pth",
        "DiT_epoch_00000_step_00500.pth.tmp",
        "DiT_epoch_00000_step_00500 (1).pth",
        "DiT_epoch_00000_step_-0500.pth",
        "DiT_epoch_00000_step_+0500.pth",
        "DiT_epoch_00000_step_0_500.pth",
        "DiT_epoch_00000_step_0500.pth",
        "DiT_epoch_00000_step_000500.pth",
        "DiT_epoch_000000_step_00500.pth",
        "DiT_epoch_00000_step_\u0660\u0660\u0665\u0660\u0660.pth",
        "DiT_epoch_00000_step_\uff10\uff10\uff15\uff10\uff10.pth",
        "DiT_epoch_00000_step_00500.pth\n",
        "\nDiT_epoch_00000_step_00500.pth",
        "xDiT_epoch_00000_step_00500.pth",
        "DiT_epoch_00000_step_00500xpth",
        "dit_epoch_00000_step_00500.pth",
        f"DiT_epoch_00000_step_{MAX_NUMBER + 1}.pth",
        f"DiT_epoch_00000_step_{'9' * 5000}.pth",
        "DiT_epoch_00000_step_.pth",
        "ft_model.pth",
        "",
    ],
)
def test_stray_names_are_no_checkpoints(name):
    """Copies, leftovers, signs, other digits and wrong widths are not taken for checkpoints."""
    assert SEED_VC.parse(name) is None


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("DiT.pth", "no {step}"),
        ("DiT_{epoch}.pth", "no {step}"),
        ("", "no {step}"),
        ("{{step}}", "no {step}"),
        ("{step}{epoch}", "ambiguous"),
        ("{step}7{epoch:03d}", "ambiguous"),
        ("{step}_{step}", "twice"),
        ("{step}_{epoch}_{epoch}", "twice"),
        ("{step}_{loss}", "{loss}"),
        ("{}", "{}"),
        ("{0}_{step}", "{0}"),
        ("{step.real}", "step.real"),
        ("{step[0]}", "step[0]"),
        ("{step!r}", "step!r"),
        ("{step:5d}", "zero-padded"),
        ("{step:x}", "zero-padded"),
        ("{step:,}", "zero-padded"),
        ("{step:+05d}", "zero-padded"),
        ("{step:{epoch}}", "zero-padded"),
        ("{step:0100d}", "zero-padded"),
        ("{step:\u0660\u0665d}", "zero-padded"),
        ("{step", "malformed"),
        ("step}", "malformed"),
        ("runs/{step}", "'/'"),
        ("{step}\n", "control"),
        ("{step}\0", "control"),
        (".{step}", "begins with a dot"),
        ("{step}.pin", ".pin"),
        ("{step}.lock", ".lock"),
        ("x" * 200 + "{step}", "limit"),
        ("{step}\udcff", "no file name"),
        (b"{step}", "string"),
        (None, "string"),
    ],
)
def test_templates_that_cannot_be_read_back_are_refused(template, reason):
    """A template is refused when it is built, with the reason, never at the first save."""
    with pytest.raises(PatternError) as caught:
        NamePattern(template)
    assert reason in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, CheckpointError)


literals = st.text("0123456789_-xé{}[.*", max_size=3).map(lambda text: text.replace("{", "{{").replace("}", "}}"))
fields = st.sampled_from(["{step}", "{epoch}", "{step:02d}", "{step:05d}", "{epoch:03d}", "{epoch:05}"])
templates = st.lists(st.one_of(literals, fields), min_size=1, max_size=5).map("".join)
small = st.integers(0, 1200) | st.sampled_from([9, 10, 99, 100, 101, 999, 1000, 10000, 100000])


@given(template=templates, pairs=st.lists(st.tuples(small, small), min_size=2, max_size=12))
@settings(max_examples=400, deadline=None)
@example(template="{step}{epoch}", pairs=[(1, 11), (11, 1)])
def test_accepted_templates_never_name_two_checkpoints_alike(template, pairs):
    """For each template that is accepted, different numbers have different names."""
    try:
        pattern = NamePattern(template)
    except PatternError:
        assume(False)
    meant = {(step, epoch if "{epoch" in template.replace("{{", "") else 0) for step, epoch in pairs}
    assert len({pattern.format(step, epoch) for step, epoch in meant}) == len(meant)


@pytest.mark.parametrize("number", [-1, MAX_NUMBER + 1, 10**30, True, 1.0, 500.5, "500", None, float("nan"), [5]])
def test_numbers_that_no_name_can_hold_are_refused(number):
    """Only whole numbers from 0 to 2**53 become names, and the error says which one was wrong."""
    with pytest.raises(PatternError, match="step must be"):
        SEED_VC.format(number)
    with pytest.raises(PatternError, match="epoch must be"):
        SEED_VC.format(1, number)


def test_whole_numbers_of_other_libraries_are_taken():
    """Whole numbers of numpy and torch name the same file as Python's."""
    numpy, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    assert SEED_VC.format(numpy.int64(500), numpy.uint8(3)) == SEED_VC.format(torch.tensor(500), 3)


def test_patterns_compare_by_template():
    """Equal templates make equal patterns, which can be keys."""
    assert len({NamePattern("{step}"), NamePattern("{step}"), NamePattern("x{step}")}) == 2
