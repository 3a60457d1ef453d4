"""Stages that overlap, each in a thread: reading, the model, drawing and writing.

OpenCV, Pillow and PyTorch let other threads run while they work. Items keep their order, few items wait between two
stages, and an error in a thread is raised where its item is requested. Closing a generator, or leaving it by an
exception, drops the waiting items and ends its thread.
"""

import contextlib
import functools
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import FrameType, TracebackType
from typing import BinaryIO, TypeVar

import numpy as np
import torch

from sparseinst.data.images import ImageReadError, read_image

Item = TypeVar("Item")
Result = TypeVar("Result")

# Items that may wait between two stages.
QUEUE_LENGTH = 3
# Images that wait: fewer than frames, because they can be large.
IMAGE_QUEUE_LENGTH = 1
# After a prediction with larger boolean masks, the next one is made when it is finished.
LARGE_MASK_BYTES = 2**28
_END = object()


class Interruption:
    """Record the first Ctrl-C inside a ``with`` block, so that it cuts off no stage; a second one raises.

    Outside the main thread, or where Ctrl-C is ignored, nothing changes.

    Attributes:
        requested: whether Ctrl-C was pressed.
    """

    def __init__(self) -> None:
        self.requested = False
        self._is_watching = False

    def __enter__(self) -> "Interruption":
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            try:
                signal.signal(signal.SIGINT, self._note)
                self._is_watching = True
            except ValueError:  # Not the main thread.
                pass
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_watching:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def read_ahead(items: Iterable[Item], queue_length: int = QUEUE_LENGTH) -> Iterator[Item]:
    """Yield the items, which a thread makes while the caller uses earlier ones.

    Args:
        items: used by that thread only, until the generator is closed.
        queue_length: items made ahead, at most; 0: none, and no thread.
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


def read_images_ahead(
    paths: Iterable[str | os.PathLike], max_pixels: int, queue_length: int
) -> Iterator[np.ndarray | ImageReadError]:
    """Yield the RGB image of each path, or the error where one cannot be read; ``queue_length`` are read ahead."""
    return read_ahead((image_or_error(path, max_pixels) for path in paths), queue_length)


def work_behind(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    queue_length: int = QUEUE_LENGTH,
    is_large: Callable[[Item], bool] = lambda item: False,
) -> Iterator[Result]:
    """Yield what ``work`` returns for each item; a thread runs it while the caller's thread makes the next items.

    Args:
        work: called with one item after the other, always in the same thread.
        items: requested in the caller's thread.
        queue_length: items that may wait for ``work``; 0: it runs at once, without a thread.
        is_large: returns True to save memory: the next item is then made after this one is done.
    """
    if queue_length == 0:
        yield from map(work, items)
        return
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(1, "work_behind") as thread:
        # The executor does not join a thread whose start was interrupted, so the thread starts before it has work.
        thread.submit(int).result()
        try:
            for item in items:
                waiting.append(thread.submit(work, item))
                allowed = 0 if is_large(item) else queue_length
                # Frees its memory before the next one is made.
                del item
                while waiting and (waiting[0].done() or len(waiting) > allowed):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            _drop(waiting)


def run_stages(
    predicted: Generator[Item, None, None],
    finish: Callable[[Item], Result],
    show: Callable[[Result], bool] | None,
    queue_length: int,
    interruption: Interruption,
) -> tuple[int, bool]:
    """Predict in this thread and finish in another, until the end or Ctrl-C.

    Args:
        predicted: tuples that end with the instances.
        finish: draws, writes and collects one prediction.
        show: shows a result in a window, and returns True to stop. Windows belong to this thread and show results
            without delay, so everything runs in this thread then.
        queue_length: predictions that may wait until they are finished.
        interruption: has recorded Ctrl-C, if it was pressed.

    Returns:
        How many predictions were finished, and whether Ctrl-C did not end the work.
    """
    num_done = 0

    def until_interrupted() -> Iterator[Item]:
        for item in predicted:
            yield item
            if interruption.requested:
                return

    def count(item: Item) -> Result:
        nonlocal num_done
        result = finish(item)
        num_done += 1
        return result

    is_complete = True
    queue_length = queue_length if show is None else 0
    try:
        with (
            contextlib.closing(predicted),
            contextlib.closing(work_behind(count, until_interrupted(), queue_length, has_large_masks)) as finished,
        ):
            for result in finished:
                if show is not None and show(result):
                    break
        is_complete = not interruption.requested
    except KeyboardInterrupt:
        is_complete = False
    if not is_complete:
        print("Interrupted", file=sys.stderr)
    return num_done, is_complete


def has_large_masks(predicted: tuple) -> bool:
    """Return whether the instances at the end of a tuple have boolean masks of more than LARGE_MASK_BYTES."""
    masks = predicted[-1].pred_masks
    return isinstance(masks, torch.Tensor) and masks.numel() > LARGE_MASK_BYTES


def _drop(waiting: deque[Future]) -> None:
    for future in waiting:
        future.cancel()


def image_or_error(path: str | os.PathLike | BinaryIO, max_pixels: int) -> np.ndarray | ImageReadError:
    """Return the RGB image of a path or an open file, or the error where it cannot be read."""
    # A raised error would end the thread that reads the other images.
    try:
        return read_image(path, max_pixels=max_pixels)
    except ImageReadError as error:
        return error
