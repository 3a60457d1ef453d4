"""Predict many images into a file of lines, in one or several processes, so that a killed run can go on."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from detectron2.config import CfgNode
from detectron2.structures import Instances
from tqdm import tqdm

from sparseinst.data.broken_images import describe_failure
from sparseinst.inference.pipeline import IMAGE_QUEUE_LENGTH, QUEUE_LENGTH, Interruption, read_images_ahead, work_behind
from sparseinst.inference.prediction_lines import error_line, header, prediction_line
from sparseinst.inference.predictor import Predictor
from sparseinst.inference.resumable_file import ResumableFile, merge, shards
from sparseinst.inference.timed_predictor import TimedPredictor


class Summary(NamedTuple):
    """Count the work of one process.

    Attributes:
        num_before: images of this process that had a line at the start.
        num_failed_before: those whose line has an error.
        num_done: images that got a line now.
        failures: the errors of those that could not be used.
        is_interrupted: Ctrl-C ended the work.
        is_complete: the output has a line for every image of the run.
        speed: a line about the time.
    """

    num_before: int
    num_failed_before: int
    num_done: int
    failures: list[str]
    is_interrupted: bool
    is_complete: bool
    speed: str


def predict_many(
    cfg: CfgNode, predictor: Predictor, names: Sequence[str], output: Path, *, rank: int = 0, num_ranks: int = 1
) -> Summary:
    """Write one line for each image, see `prediction_line`, below a header, see `header`.

    Images that have a line of an earlier run are skipped. Reading, prediction and writing overlap.

    Args:
        cfg: of the predictor.
        predictor: of MODEL.WEIGHTS.
        names: paths of all images, each once.
        output: file of the run; see `resumable_file` for the files of several processes.
        rank, num_ranks: this process predicts every ``num_ranks``-th image from the ``rank``-th on.

    Raises:
        ValueError: the output belongs to another run or is in use, or MODEL.WEIGHTS is empty.
        OSError: the output cannot be written.
    """
    run = header(cfg, names, predictor.classes)
    # Models of Detectron2 do not read the key.
    timed = TimedPredictor(predictor, cfg.MODEL.OUTPUT.SCORE_THRESHOLD)
    failures: list[str] = []
    with ResumableFile(output, run, rank, num_ranks) as file, Interruption() as interruption:
        done = file.done()
        share = names[rank::num_ranks]
        remaining = [name for name in share if name not in done]
        num_failed_before = sum(done[name].has_error for name in share if name in done)

        def write(predicted: tuple[str, Instances | Exception]) -> None:
            name, result = predicted
            if isinstance(result, Exception):
                failures.append(describe_failure(name, result))
                file.append(error_line(name, result))
            else:
                file.append(prediction_line(name, result, predictor.classes.category_ids))

        predicted = _predict_each(timed, remaining, predictor.max_image_pixels, interruption)
        with contextlib.closing(predicted), contextlib.closing(work_behind(write, predicted, QUEUE_LENGTH)) as written:
            num_done = sum(1 for _ in tqdm(written, total=len(remaining), unit="image", disable=rank != 0))
        speed = timed.speed(num_done, "images")
    # The lock held off other processes, so one process knows the content of its file.
    is_complete = num_done == len(remaining) if num_ranks == 1 and not shards(output) else merge(output, run, names)
    num_before = len(share) - len(remaining)
    return Summary(num_before, num_failed_before, num_done, failures, interruption.requested, is_complete, speed)


def _predict_each(
    timed: TimedPredictor, names: Sequence[str], max_pixels: int, interruption: Interruption
) -> Iterator[tuple[str, Instances | Exception]]:
    """Yield the instances of each image, or the error where it cannot be used, until Ctrl-C."""
    with contextlib.closing(read_images_ahead(names, max_pixels, IMAGE_QUEUE_LENGTH)) as images:
        for name, image in zip(names, images):
            if interruption.requested:
                return
            yield name, timed.predict_or_error(image)
