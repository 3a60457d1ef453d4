"""Time models of every architecture in one process and in turn: ``sparseinst benchmark --suite realtime``."""

import functools
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from torch import nn
from tqdm import tqdm

from sparseinst.benchmarks.inference import (
    AS_PUBLISHED,
    COPY,
    END_TO_END,
    NETWORK,
    PREPROCESSING,
    batched_inputs,
    draw_examples,
    protocols,
    time_stages,
)
from sparseinst.benchmarks.settings import percentiles
from sparseinst.config import load_config, meta_architecture
from sparseinst.data.augmentations import build_test_augmentations
from sparseinst.evaluation.stage_timer import StageTimer
from sparseinst.modeling.meta_arch import InstanceSegmenter
from sparseinst.runtime.optimize import optimize_as_configured

# Objects in each image, and the input sizes.
DETECTIONS = (50, 100)
OWN_SIZE, COMMON_SIZE = "own size", "common size"
# Short side of the common size, and the side of square inputs; a multiple of 32.
COMMON_SIDE = 544
_COMMON_SIZE_KEYS = (
    "INPUT.MIN_SIZE_TEST", COMMON_SIDE, "INPUT.MAX_SIZE_TEST", 960,
)  # fmt: skip
# Factor of the random weights of convolutions on the image.
_FIRST_WEIGHTS = 1e-4
# Boxes above the score threshold that the NMS of Detectron2's models leaves.
_CANDIDATES = 150


class SuiteModel(NamedTuple):
    """A model of a suite.

    Attributes:
        config: path of a config, or name of one of this project or of Detectron2's model zoo.
        ap: published mask AP of COCO, in percent; None: unknown.
        split: on which it was measured.
    """

    config: str
    ap: float | None = None
    split: str = "val2017"


SUITES = {
    "realtime": (
        SuiteModel("sparse_inst_r50_giam", 33.4),
        SuiteModel("sparse_inst_r50vd_dcn_giam_aug", 37.4),
        SuiteModel("sparse_inst_pvt_b1_giam", 35.3),
        SuiteModel("solov2/solov2_light_448_r50_3x", 33.7),
        SuiteModel("solov2/solov2_light_512_dcn_r50_3x", 36.4),
        SuiteModel("solo/decoupled_solo_light_r50_3x", 33.0),
        SuiteModel("solov2/solov2_r50_3x", 37.5),
        SuiteModel("yolact/yolact_resnet50", 28.2, "test-dev"),
        SuiteModel("yolact/yolact_base", 29.8, "test-dev"),
        SuiteModel("yolact/yolact_plus_resnet50", 34.1, "test-dev"),
        SuiteModel("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml", 37.2),
    )
}


def suite_config(name: str, opts: Sequence[str], at_common_size: bool) -> CfgNode:
    """Return the config of a model of a suite, with random weights.

    Args:
        name: see `SuiteModel`.
        opts: KEY VALUE overrides of all models.
        at_common_size: resize images to COMMON_SIDE, not as the config says.

    Raises:
        ValueError: see `load_config`.
    """
    cfg = load_config(_config_file(name), opts)
    cfg.MODEL.WEIGHTS = ""
    if at_common_size:
        cfg.merge_from_list(list(_COMMON_SIZE_KEYS))
        if cfg.INPUT.SQUARE_SIZE:
            cfg.merge_from_list(["INPUT.SQUARE_SIZE", COMMON_SIDE, "INPUT.MIN_SIZE_TEST", 0])
    return cfg


def _config_file(name: str) -> str:
    """Return the path of a config of Detectron2's model zoo, and other names as they are."""
    try:
        return name if os.path.isfile(name) else model_zoo.get_config_file(name)
    # Paths of Windows are a ValueError.
    except (RuntimeError, ValueError):
        return name


def run_suite(
    models: Sequence[SuiteModel], image: np.ndarray, opts: Sequence[str], *, repetitions: int, warmup: int
) -> list[dict]:
    """Load the models at each size, then run all of them in turn within each repetition.

    Args:
        models: of the suite.
        image: (height, width, 3) uint8.
        opts: KEY VALUE overrides of all models.
        repetitions, warmup: as of `measure_models`.

    Returns:
        For each model ``config``, ``family`` (MODEL.META_ARCHITECTURE), ``published_ap``, ``split``, ``precision``, and
        ``ms``: percentiles of the milliseconds by size, number of objects and protocol.

    Raises:
        ValueError: a config is wrong, or a model cannot predict so many instances.
    """
    rows, cfgs = [], {OWN_SIZE: [], COMMON_SIZE: []}
    for each in models:
        for size, loaded in cfgs.items():
            loaded.append(suite_config(each.config, opts, size == COMMON_SIZE))
        cfg = cfgs[OWN_SIZE][-1]
        is_ours = issubclass(meta_architecture(cfg), InstanceSegmenter)
        rows.append(
            {
                "config": each.config,
                "family": cfg.MODEL.META_ARCHITECTURE,
                "published_ap": each.ap,
                "split": each.split,
                "precision": cfg.RUNTIME.PRECISION if is_ours else "float32, eager",
                "ms": {},
            }
        )
    # Loading counts as a run. Models take different times, so the speed is that of all runs so far.
    total = len(cfgs) * len(models) * (1 + warmup + repetitions)
    with tqdm(total=total, desc="benchmark", unit="run", smoothing=0) as steps:
        for size, loaded in cfgs.items():
            runs, timers = [], []
            for cfg, row in zip(loaded, rows):
                timers.append(StageTimer(torch.device(cfg.MODEL.DEVICE)))
                try:
                    runs.append(_timed(cfg, image, timers[-1]))
                except ValueError as error:
                    raise ValueError(f"{row['config']}: {error}") from error
                steps.update()
            for _ in range(warmup + repetitions):
                for run in runs:
                    with torch.inference_mode():
                        run()
                    steps.update()
            for row, timer in zip(rows, timers):
                row["ms"][size] = _milliseconds(timer, warmup)
    return rows


def _timed(cfg: CfgNode, image: np.ndarray, timer: StageTimer) -> Callable[[], None]:
    """Build a model, and return a function that runs it once for all of DETECTIONS.

    Raises:
        ValueError: the model predicts no instances, or cannot predict so many.
    """
    augmentation = T.AugmentationList(build_test_augmentations(cfg))
    if issubclass(meta_architecture(cfg), InstanceSegmenter):
        model = optimize_as_configured(cfg, _build(cfg))
        with torch.inference_mode():
            examples = draw_examples(model, [image], augmentation, DETECTIONS)
        return functools.partial(time_stages, model, [image], augmentation, examples, timer)
    return functools.partial(_run_stock, _stock_models(cfg, image, augmentation), image, augmentation, timer)


def _stock_models(cfg: CfgNode, image: np.ndarray, augmentation: T.AugmentationList) -> list[nn.Module]:
    """Build a model of Detectron2 for each of DETECTIONS, which keeps this number of objects with random weights.

    Raises:
        ValueError: the model predicts no instances, or cannot predict so many.
    """
    inputs = batched_inputs([image], augmentation)
    models, threshold = [], 0.0
    for count in (_CANDIDATES, *DETECTIONS):
        cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = threshold
        cfg.TEST.DETECTIONS_PER_IMAGE = count
        models.append(_build(cfg))
        with torch.inference_mode():
            result = models[-1](inputs)[0]
        if len(result.get("instances", ())) < count:
            raise ValueError(
                f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} does not find {count} objects with random "
                "weights; expected a model of instances, or a larger image"
            )
        # NMS gets about as many boxes as in a trained model.
        threshold = threshold or float(result["instances"].scores.min())
    return models[1:]


def _build(cfg: CfgNode) -> nn.Module:
    """Build a model with random weights whose outputs are as small as those of trained weights."""
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    # Deep networks amplify the image. Without this factor Mask R-CNN proposes the same few boxes again and again, and
    # tanh turns the rounding of an optimized YOLACT into other signs, which its self-check refuses.
    for parameter in model.parameters():
        if parameter.dim() == 4 and parameter.shape[1] == len(cfg.MODEL.PIXEL_MEAN):
            parameter.data *= _FIRST_WEIGHTS
    return model


def _run_stock(
    models: Sequence[nn.Module], image: np.ndarray, augmentation: T.AugmentationList, timer: StageTimer
) -> None:
    """Run and time models of Detectron2, whose forward normalizes, pads, runs the network and makes the masks."""
    for model in models:
        with timer.stage(PREPROCESSING):
            inputs = batched_inputs([image], augmentation)
        with timer.stage(NETWORK):
            results = model(inputs)
        with timer.stage(COPY):
            results[0]["instances"].to("cpu")


def _milliseconds(timer: StageTimer, warmup: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return the percentiles of a model's times by number of objects and protocol."""
    # A stage runs once for each of DETECTIONS, or once for all of them.
    repetitions = len(timer.seconds[COPY]) // len(DETECTIONS)
    stages = {stage: np.reshape(laps, (repetitions, -1))[warmup:] for stage, laps in timer.seconds.items()}
    return {
        str(count): {name: percentiles(1e3 * seconds[:, index], "_ms") for name, seconds in protocols(stages).items()}
        for index, count in enumerate(DETECTIONS)
    }


def suite_table(rows: Sequence[dict]) -> str:
    """Return the rows of `run_suite` as a table of Markdown, medians for each of DETECTIONS in a cell."""
    columns = [(size, protocol) for size in (OWN_SIZE, COMMON_SIZE) for protocol in (AS_PUBLISHED, END_TO_END)]
    header = ["config", "AP", *(f"{size}, {protocol}" for size, protocol in columns)]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        ap = "-" if row["published_ap"] is None else f"{row['published_ap']}{' *' * (row['split'] != 'val2017')}"
        times = [
            ", ".join(f"{row['ms'][size][str(count)][protocol]['median_ms']:.0f}" for count in DETECTIONS)
            for size, protocol in columns
        ]
        lines.append([row["config"].rpartition("/")[2].removesuffix(".yaml"), ap, *times])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
