"""Work in threads: order, failures, and nothing left running."""

import threading

import pytest

from seedvc_ckpt.threads import ahead, available_cores, in_parallel


def ours():
    return [thread for thread in threading.enumerate() if thread.name.startswith("seedvc-ckpt")]


def test_items_come_in_order_and_are_made_elsewhere():
    """`ahead` gives all items in their order, made by another thread."""
    makers = set()

    def items():
        for number in range(100):
            makers.add(threading.get_ident())
            yield number

    assert list(ahead(items())) == list(range(100))
    assert makers
    assert threading.get_ident() not in makers
    assert ours() == []


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_no_more_is_made_ahead_than_was_said(depth):
    """However slow the taker, at most `depth` items are made that it has not asked for."""
    made = []

    def items():
        for number in range(50):
            made.append(number)
            yield number

    most = 0
    for taken, _ in enumerate(ahead(items(), depth), start=1):
        threading.Event().wait(0.001)
        most = max(most, len(made) - taken)
    assert 0 < most <= depth


def test_a_failing_item_is_raised_where_it_would_have_come():
    """What the maker raises comes after the items before it."""

    def items():
        yield 1
        yield 2
        raise KeyError("third")

    taken = []
    with pytest.raises(KeyError, match="third"):
        taken.extend(ahead(items()))
    assert taken == [1, 2]
    assert ours() == []


def test_whoever_stops_taking_stops_the_maker():
    """An abandoned iterator ends its thread and closes what makes the items."""
    closed = threading.Event()

    def items():
        try:
            yield from range(1_000_000)
        finally:
            closed.set()

    source = items()
    iterator = ahead(source)
    assert next(iterator) == 0
    iterator.close()
    assert ours() == []
    source.close()
    assert closed.is_set()


def test_without_threads_the_work_is_done_all_the_same(monkeypatch):
    """Where no thread can be started, the caller's does everything."""

    def refuse(_thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    done = []
    assert list(ahead(range(5))) == [0, 1, 2, 3, 4]
    in_parallel([lambda number=number: done.append(number) for number in range(5)], threads=3)
    assert done == [0, 1, 2, 3, 4]


def test_jobs_run_at_the_same_time():
    """With n threads, n jobs can wait for each other."""
    meeting = threading.Barrier(3, timeout=10)
    in_parallel([meeting.wait] * 3, threads=3)
    in_parallel([], threads=3)
    assert available_cores() >= 1
    assert ours() == []


def test_the_first_jobs_failure_is_raised():
    """Of several failures the one of the first job counts, whichever came first; no job is begun after one."""
    late = threading.Event()
    begun = []

    def first():
        begun.append("first")
        assert late.wait(10)
        raise KeyError("first")

    def second():
        begun.append("second")
        late.set()
        raise KeyError("second")

    with pytest.raises(KeyError, match="first"):
        in_parallel([first, second, *[lambda: begun.append("later")] * 100], threads=2)
    assert sorted(begun) == ["first", "second"]


def test_an_interruption_comes_before_the_failures_that_it_caused():
    """Ctrl-C in one job is what is raised, though an earlier job failed because of it."""
    interrupted = threading.Event()

    def fail():
        interrupted.wait(10)
        raise ValueError("cancelled")

    def interrupt():
        interrupted.set()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_parallel([fail, interrupt], threads=2)
