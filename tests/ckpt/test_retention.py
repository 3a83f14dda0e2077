"""Retention: pure functions of a listing."""

import math
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seedvc_ckpt import CheckpointInfo, MissingMetricError, keep_best, keep_every, keep_last, keep_within
from seedvc_ckpt.retention import plan

START = datetime(2026, 1, 1, tzinfo=timezone.utc)


def info(step, *, epoch=0, minutes=0, pinned=False):
    return CheckpointInfo(f"{epoch}_{step}", step, epoch, 1, START + timedelta(minutes=minutes), pinned)


def kept(infos, rules, metrics=None):
    return [item.step for item in plan(infos, rules, metrics).keep]


TEN = [info(step, minutes=step) for step in range(100, 1100, 100)]
LOSS = {item: {"loss": value} for item, value in zip(TEN, [5, 4, 3, 2, 1, 2, 3, 4, 5, 6], strict=True)}


@pytest.mark.parametrize("rules", [None, [], ()])
def test_without_rules_everything_stays(rules):
    """No rule means keep all, and the plan says so."""
    made = plan(TEN, rules)
    assert list(made.keep) == TEN
    assert made.remove == ()
    assert all("no rule given" in why for why in made.keep.values())


@pytest.mark.parametrize("rules", [None, keep_last(1), keep_every(5), keep_within(timedelta(1)), keep_best("loss", 2)])
def test_an_empty_listing_is_planned(rules):
    """Every rule takes a run without checkpoints."""
    made = plan([], rules, {})
    assert (made.keep, made.remove) == ({}, ())


@pytest.mark.parametrize(
    ("rule", "steps"),
    [
        (keep_last(1), [1000]),
        (keep_last(3), [800, 900, 1000]),
        (keep_last(10**30), [item.step for item in TEN]),
        (keep_every(400), [400, 800, 1000]),
        (keep_every(1), [item.step for item in TEN]),
        (keep_within(timedelta(0)), [1000]),
        (keep_within(timedelta(minutes=200)), [800, 900, 1000]),
        (keep_within(timedelta(minutes=199, seconds=59)), [900, 1000]),
        (keep_within(timedelta.max), [item.step for item in TEN]),
        (keep_best("loss"), [500, 1000]),
        (keep_best("loss", 2), [500, 600, 1000]),
        (keep_best("loss", 2, "max"), [900, 1000]),
    ],
)
def test_each_rule_keeps_what_it_says(rule, steps):
    """Counts, multiples, ages and metrics select as documented; of equal values the newer is better."""
    assert kept(TEN, rule, LOSS) == steps


def test_rules_are_joined_with_all_their_reasons():
    """A checkpoint stays if any rule keeps it, and every reason is told."""
    made = plan(TEN, [keep_last(2), keep_every(500), keep_best("loss")], LOSS)
    assert {item.step: why for item, why in made.keep.items()} == {
        500: ("every 500 steps", "best loss (min), 1"),
        900: ("one of the last 2",),
        1000: ("newest", "one of the last 2", "every 500 steps"),
    }
    assert [item.step for item in made.remove] == [100, 200, 300, 400, 600, 700, 800]


def test_pinned_checkpoints_stay():
    """A pin outweighs every rule."""
    pinned = info(150, pinned=True)
    assert plan([*TEN, pinned], keep_last(1)).keep[pinned] == ("pinned",)


def test_the_order_of_the_listing_does_not_matter():
    """Newest means the largest (step, epoch), not the last in the list."""
    twins = [info(1000, epoch=2), *reversed(TEN), info(1000, epoch=1)]
    assert [(item.step, item.epoch) for item in plan(twins, keep_last(1)).keep] == [(1000, 2)]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_nan_is_worse_than_any_number(mode):
    """A diverged checkpoint is never best while any other has a number, infinities included."""
    worst = math.inf if mode == "min" else -math.inf
    infos = [info(1), info(2), info(3), info(4)]
    values = [math.nan, worst, math.nan, 0.0]
    metrics = {item: {"loss": value} for item, value in zip(infos, values, strict=True)}
    assert 1 not in kept(infos, keep_best("loss", 2, mode), metrics)
    assert 2 in kept(infos, keep_best("loss", 2, mode), metrics)


def test_a_missing_metric_is_named():
    """A metric that no checkpoint has is refused, with what they have instead."""
    metrics = {**LOSS, TEN[3]: {"score": 1.0, "lr": 2.0}}
    with pytest.raises(MissingMetricError, match=r"no checkpoint has the metric 'los' \(they have: loss, lr, score\)"):
        plan(TEN, keep_best("los"), metrics)


@pytest.mark.parametrize("later", [False, True])
def test_what_is_not_scored_yet_stays(later):
    """A checkpoint is never removed for lack of a score, and takes no place among the best."""
    scored = {item: LOSS[item] for item in TEN[2:8]}
    made = plan(TEN, keep_best("loss", 2, scored_later=later), scored)
    assert [item.step for item in made.keep] == [100, 200, 500, 600, 900, 1000]
    assert made.keep[TEN[0]] == ("no loss yet",)
    assert made.keep[TEN[4]] == ("best loss (min), 1",)


def test_scores_may_come_later():
    """A rule that was told so keeps everything as long as nothing is scored."""
    assert plan(TEN, keep_best("loss", scored_later=True), {}).remove == ()


@pytest.mark.parametrize("number", [0, -1, True, 1.0, "3", None, math.nan])
@pytest.mark.parametrize("make", [keep_last, keep_every, lambda n: keep_best("loss", n)])
def test_counts_below_one_are_refused(make, number):
    """A rule that would keep nothing, or means nothing, is refused when it is made."""
    with pytest.raises(ValueError, match="at least 1"):
        make(number)


@pytest.mark.parametrize("age", [timedelta(seconds=-1), 3600, None, "1d"])
def test_ages_are_timedeltas(age):
    """Only a timedelta of zero or more is an age."""
    with pytest.raises(ValueError, match="timedelta"):
        keep_within(age)


@pytest.mark.parametrize("arguments", [("loss", 1, "best"), ("loss", 1, None), ("", 1), (None, 1), (keep_last, 1)])
def test_keep_best_takes_a_name_and_a_direction(arguments):
    """A misspelt direction or an empty name is refused when the rule is made."""
    with pytest.raises(ValueError, match="keep_best takes"):
        keep_best(*arguments)


values = st.floats(allow_nan=True) | st.sampled_from([0.0, 1.0])
listings = st.dictionaries(
    st.tuples(st.integers(0, 30), st.integers(0, 2)), st.tuples(st.integers(0, 60), st.booleans(), values), max_size=12
)
rules = st.one_of(
    st.integers(1, 6).map(keep_last),
    st.integers(1, 8).map(keep_every),
    st.integers(0, 40).map(lambda minutes: keep_within(timedelta(minutes=minutes))),
    st.builds(keep_best, st.just("loss"), st.integers(1, 4), st.sampled_from(["min", "max"])),
)


@given(listings, st.lists(rules, max_size=3), rules)
@settings(max_examples=300, deadline=None)
def test_plans_are_safe(listing, few, one_more):
    """The newest and the pinned stay, all are planned once, each keeper has a reason, more rules keep more."""
    metrics = {
        info(step, epoch=epoch, minutes=minutes, pinned=pinned): {"loss": loss}
        for (step, epoch), (minutes, pinned, loss) in listing.items()
    }
    made = plan(metrics, few, metrics)
    assert sorted([*made.keep, *made.remove], key=str) == sorted(metrics, key=str)
    assert not set(made.keep) & set(made.remove)
    assert all(made.keep.values())
    assert all(item in made.keep for item in metrics if item.pinned)
    if metrics:
        assert max(metrics, key=lambda item: (item.step, item.epoch)) in made.keep
    if few:
        assert set(made.keep) <= set(plan(metrics, [*few, one_more], metrics).keep)
    assert list(made.remove) == sorted(made.remove, key=lambda item: (item.step, item.epoch))


@given(listings, st.integers(1, 5), st.sampled_from(["min", "max"]))
@settings(max_examples=200, deadline=None)
def test_no_removed_checkpoint_beats_a_best_one(listing, n, mode):
    """What keep_best leaves out is never better than what it keeps, and it keeps n where there are n."""
    metrics = {info(step, epoch=epoch): {"loss": loss} for (step, epoch), (_, _, loss) in listing.items()}
    chosen = set(keep_best("loss", n, mode)(sorted(metrics, key=lambda item: (item.step, item.epoch)), metrics))
    assert len(chosen) == min(n, len(metrics))
    sign = 1 if mode == "min" else -1
    for left in set(metrics) - chosen:
        for best in chosen:
            assert not sign * metrics[left]["loss"] < sign * metrics[best]["loss"]
            assert not math.isnan(metrics[best]["loss"]) or math.isnan(metrics[left]["loss"])
