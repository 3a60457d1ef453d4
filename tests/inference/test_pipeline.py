import contextlib
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from sparseinst.inference import pipeline
from sparseinst.inference.pipeline import Interruption, has_large_masks, read_ahead, run_stages, work_behind
from sparseinst.structures.rle_masks import RLEMasks

TIMEOUT = 10


def threads_named(name):
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


def wait_for(condition):
    until = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.001)


@pytest.mark.parametrize("queue_length", [0, 1, 3, 50])
@pytest.mark.parametrize("count", [0, 1, 20])
def test_all_items_come_in_their_order(count, queue_length):
    assert list(read_ahead(iter(range(count)), queue_length)) == list(range(count))
    expected = [2 * item for item in range(count)]
    assert list(work_behind(lambda item: 2 * item, range(count), queue_length)) == expected
    both = work_behind(lambda item: 2 * item, read_ahead(range(count), queue_length), queue_length)
    assert list(both) == expected
    assert not threads_named("read_ahead") and not threads_named("work_behind")


def test_items_are_read_ahead_and_no_more_than_fit():
    made = []
    with contextlib.closing(read_ahead((made.append(item) or item for item in range(20)), 3)) as items:
        assert next(items) == 0
        # While 0 is worked on.
        wait_for(lambda: made == [0, 1, 2, 3])
        time.sleep(0.02)
        assert made == [0, 1, 2, 3]
        assert next(items) == 1
        wait_for(lambda: made == [0, 1, 2, 3, 4])


def test_work_is_done_in_one_other_thread_while_items_are_made():
    workers, done, gate = set(), [], threading.Event()

    def work(item):
        workers.add(threading.current_thread())
        if item == 0:
            assert gate.wait(TIMEOUT)
        done.append(item)
        return item

    def items():
        for item in range(6):
            if item == 3:
                # 0 is not done yet, and the caller's thread was not kept.
                assert not done
                gate.set()
            assert threading.current_thread() is threading.main_thread()
            yield item

    assert list(work_behind(work, items(), 3)) == list(range(6))
    assert len(workers) == 1 and threading.main_thread() not in workers


def test_no_more_than_so_many_wait_for_work():
    made, gate = [], threading.Event()
    results = work_behind(lambda item: gate.wait(TIMEOUT) and item, (made.append(i) or i for i in range(20)), 2)
    threading.Timer(0.1, gate.set).start()
    assert next(results) == 0
    # One in work and two that waited.
    assert made == [0, 1, 2]
    assert list(results) == list(range(1, 20))


def test_after_a_large_item_the_next_one_is_not_made_before_it_is_done():
    done = []

    def work(item):
        time.sleep(0.02)
        done.append(item)

    def items():
        for item in range(8):
            # 2 and 5 are large.
            assert not {2, 5} & set(range(item)) - set(done)
            yield item

    for _ in work_behind(work, items(), 3, lambda item: item in (2, 5)):
        pass
    assert done == list(range(8))


def failing(count):
    yield from range(count)
    raise ValueError("no more frames")


@pytest.mark.parametrize("queue_length", [0, 1, 3])
def test_errors_come_where_their_item_is_asked_for(queue_length):
    seen = []
    with pytest.raises(ValueError, match="no more frames"):
        for item in read_ahead(failing(5), queue_length):
            seen.append(item)
    assert seen == [0, 1, 2, 3, 4]

    def work(item):
        if item == 2:
            raise OSError("disk full")
        return item

    seen = []
    with pytest.raises(OSError, match="disk full"):
        for item in work_behind(work, range(20), queue_length):
            seen.append(item)
    assert seen == [0, 1]
    with pytest.raises(ValueError, match="no more frames"):
        list(work_behind(lambda item: item, failing(5), queue_length))
    assert not threads_named("read_ahead") and not threads_named("work_behind")


@pytest.mark.parametrize("queue_length", [0, 3])
def test_leaving_early_ends_the_threads_and_drops_what_waits(queue_length):
    done = []

    def work(item):
        time.sleep(0.01)
        done.append(item)
        return item

    for error in (KeyboardInterrupt, None):
        with pytest.raises(KeyboardInterrupt) if error else contextlib.nullcontext():
            source = read_ahead(range(1000), queue_length)
            with contextlib.closing(source), contextlib.closing(work_behind(work, source, queue_length)) as results:
                assert next(results) == 0
                if error:
                    raise error
        num_done = len(done)
        assert num_done <= queue_length + 3
        assert not threads_named("read_ahead") and not threads_named("work_behind")
        time.sleep(0.03)
        assert len(done) == num_done
        done.clear()


def test_what_waits_when_it_is_left_is_not_done():
    started, made, gate = [], threading.Event(), threading.Event()

    def items():
        yield from range(3)
        made.set()
        yield from range(3, 1000)

    def work(item):
        started.append(item)
        assert (made if item == 0 else gate).wait(TIMEOUT)

    results = work_behind(work, items(), 3)
    next(results)
    # 1 is in work, 2 and 3 wait.
    threading.Timer(0.5, gate.set).start()
    results.close()
    assert started in ([0], [0, 1])


def test_ctrl_c_while_an_item_is_made_ends_the_work():
    def items():
        yield 0
        raise KeyboardInterrupt

    done = []
    with pytest.raises(KeyboardInterrupt):
        list(work_behind(done.append, items()))
    assert not threads_named("work_behind")


def test_the_first_ctrl_c_is_recorded_and_the_second_one_raises():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGINT)
            assert interruption.requested
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with Interruption():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def with_masks(masks):
    return "name", SimpleNamespace(pred_masks=masks)


def test_large_masks_are_boolean_ones(monkeypatch):
    monkeypatch.setattr(pipeline, "LARGE_MASK_BYTES", 10)
    assert not has_large_masks(with_masks(torch.zeros(2, 5, 1, dtype=torch.bool)))
    assert has_large_masks(with_masks(torch.zeros(1, 1, 11, dtype=torch.bool)))
    assert not has_large_masks(with_masks(RLEMasks([{"size": [9, 9], "counts": b"a2"}] * 2, (9, 9))))


@pytest.mark.parametrize(("side", "others"), [(2, 1), (4, 0)])
def test_after_large_masks_the_next_prediction_waits(monkeypatch, side, others):
    """While the first one is finished, the second one is made where masks are small only."""
    monkeypatch.setattr(pipeline, "LARGE_MASK_BYTES", 10)
    made, seen = [], []

    def predicted():
        for index in range(2):
            made.append(index)
            yield with_masks(torch.zeros(1, side, side, dtype=torch.bool))

    def finish(item):
        until = time.monotonic() + (TIMEOUT if others else 0.05)
        while len(made) < 2 and time.monotonic() < until:
            time.sleep(0.001)
        seen.append(len(made))

    with Interruption() as interruption:
        assert run_stages(predicted(), finish, None, 1, interruption) == (2, True)
    assert seen[0] == 1 + others
