"""Work in threads that goes on while the interpreter shuts down, as `concurrent.futures` does not."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

__all__ = ["ahead", "available_cores", "in_parallel"]

_T = TypeVar("_T")
_END = object()


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ahead(items: Iterable[_T], depth: int = 2) -> Iterator[_T]:
    """The same items in the same order, made in a thread of their own up to `depth` ahead of who takes them."""
    made: SimpleQueue[Any] = SimpleQueue()
    room = threading.Semaphore(depth)
    abandoned = False

    def make() -> None:
        try:
            for item in items:
                made.put(item)
                room.acquire()
                if abandoned:
                    return
            made.put(_END)
        except BaseException as error:  # noqa: BLE001 - raised again where the items are taken
            made.put(_Failure(error))

    maker = threading.Thread(target=make, name="seedvc-ckpt ahead", daemon=True)
    try:
        maker.start()
    except RuntimeError:  # no more threads may be started
        yield from items
        return
    try:
        while (item := made.get()) is not _END:
            if isinstance(item, _Failure):
                raise item.error
            yield item
            room.release()
    finally:
        abandoned = True
        room.release()
        maker.join()


def in_parallel(jobs: Sequence[Callable[[], object]], threads: int | None = None) -> None:
    """Do all jobs, on as many threads as there are cores; of several failures the first job's is raised.

    An interruption comes before all others, which it may have caused.

    After a failure no further job is begun, but those before it are done.
    """
    width = min(threads or available_cores(), len(jobs))
    taken, guard = iter(range(len(jobs))), threading.Lock()
    failures: dict[int, BaseException] = {}

    def work() -> None:
        while not failures:
            with guard:
                number = next(taken, None)
            if number is None:
                return
            try:
                jobs[number]()
            except BaseException as error:  # noqa: BLE001 - raised again below
                failures[number] = error

    helpers = [threading.Thread(target=work, name="seedvc-ckpt reader", daemon=True) for _ in range(width - 1)]
    started = []
    with suppress(RuntimeError):  # no more threads may be started: those that are do it all
        for helper in helpers:
            helper.start()
            started.append(helper)
    work()
    for helper in started:
        helper.join()
    if failures:
        interrupted = [number for number, error in failures.items() if not isinstance(error, Exception)]
        raise failures[min(interrupted or failures)]
