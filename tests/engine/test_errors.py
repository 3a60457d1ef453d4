"""Errors that a user can cause end a command with one line."""

import pytest

from sparseinst.data.broken_images import BrokenImages, Failure
from sparseinst.data.images import DataError
from sparseinst.engine.errors import run_errors, setup_errors


def test_a_missing_package_is_named():
    with pytest.raises(SystemExit, match="^error: pip install timm$"), setup_errors():
        raise ImportError("pip install timm")


def test_too_many_broken_images_are_one_line_with_count_limit_and_remedy():
    with pytest.raises(SystemExit) as caught, run_errors("out"):
        BrokenImages(1).add([Failure("a.png", "a.png: empty"), Failure("b.png", "b.png: empty")])
    text = caught.value.code
    assert text.startswith("error: 2 images cannot be used, and DATALOADER.MAX_BROKEN_IMAGES is 1. Repair them")
    assert text.endswith(": a.png: empty; b.png: empty") and "\n" not in text


def test_the_traceback_of_a_worker_is_left_out():
    # As PyTorch raises the error of a worker.
    text = "Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File x\n"
    with pytest.raises(SystemExit, match="^error: sparseinst.DataError: a.png is empty$"), run_errors("out"):
        raise DataError(text + "sparseinst.DataError: a.png is empty\n")
