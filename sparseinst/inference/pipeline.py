"""Stages that run beside one another, each in a thread: reading, the model, drawing and writing.

OpenCV, Pillow and PyTorch let other threads run while they work. Order is kept, few items wait between two stages, and
what goes wrong in a thread is raised where its item is asked for. When a generator is closed, or left by an exception
such as Ctrl-C's, what waits is dropped, and its thread has ended.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Items that may wait between two stages.
QUEUE_LENGTH = 3
_END = object()


def read_ahead(items: Iterable[Item], queue_length: int = QUEUE_LENGTH) -> Iterator[Item]:
    """The items, which are made in a thread while earlier ones are worked on.

    Args:
        items: used by that thread only, until the generator is closed.
        queue_length: items made ahead, at most; 0: none, and without a thread.
    """
    if queue_length == 0:
        yield from items
        return
    make_next = functools.partial(next, iter(items), _END)
    with ThreadPoolExecutor(1, "read_ahead") as thread:
        waiting = deque(thread.submit(make_next) for _ in range(queue_length))
        try:
            while (item := waiting.popleft().result()) is not _END:
                waiting.append(thread.submit(make_next))
                yield item
        finally:
            _drop(waiting)


def work_behind(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    queue_length: int = QUEUE_LENGTH,
    is_large: Callable[[Item], bool] = lambda item: False,
) -> Iterator[Result]:
    """What ``work`` makes of each item, in a thread, while the caller's thread makes the next items.

    Args:
        work: called with one item after the other, always in the same thread.
        items: asked for in the caller's thread.
        queue_length: items that may wait for ``work``; 0: it is done at once, without a thread.
        is_large: whether the next item is not to be made before this one is done, because of its memory.
    """
    if queue_length == 0:
        yield from map(work, items)
        return
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(1, "work_behind") as thread:
        # A thread that Ctrl-C meets while it starts is not waited for: it starts before it has work.
        thread.submit(int).result()
        try:
            for item in items:
                waiting.append(thread.submit(work, item))
                allowed = 0 if is_large(item) else queue_length
                # It is not to be kept while the next one is made.
                del item
                while waiting and (waiting[0].done() or len(waiting) > allowed):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            _drop(waiting)


def _drop(waiting: deque[Future]) -> None:
    for future in waiting:
        future.cancel()
