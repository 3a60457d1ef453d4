"""Time every architecture in one process and in turn: ``sparseinst benchmark --suite realtime``."""

import gc
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

from sparseinst.benchmarks.inference import batched_inputs, measure_models
from sparseinst.config import load_config
from sparseinst.data.augmentations import build_test_augmentations
from sparseinst.evaluation.stage_timer import now
from sparseinst.modeling.meta_arch import InstanceSegmenter
from sparseinst.runtime.optimize import optimize_as_configured

# Objects in each image, the protocols (stages of `measure_models`), and the input sizes.
DETECTIONS = (50, 100)
PROTOCOLS = ("as published", "end to end")
OWN_SIZE, COMMON_SIZE = "own size", "common size"
# Short side of the common size, and the side of square inputs; a multiple of 32.
COMMON_SIDE = 544
_COMMON_SIZE_KEYS = (
    "INPUT.MIN_SIZE_TEST", COMMON_SIDE, "INPUT.MAX_SIZE_TEST", 960,
)  # fmt: skip


class SuiteModel(NamedTuple):
    """A model of a suite.

    Attributes:
        config: name of a config of this project, or the path of one in Detectron2's model zoo.
        ap: published mask AP of COCO, in percent.
        split: on which it was measured.
    """

    config: str
    ap: float
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


def suite_config(name: str, opts: Sequence[str], at_common_size: bool, num_detections: int) -> CfgNode:
    """Return the config of a model of a suite, with random weights.

    Args:
        name: see `SuiteModel`.
        opts: KEY VALUE overrides of all models.
        at_common_size: resize images to COMMON_SIDE, not as the config says.
        num_detections: that stock Detectron2 models return.
    """
    is_stock = name.endswith(".yaml") and name.startswith("COCO-")
    cfg = load_config(model_zoo.get_config_file(name) if is_stock else name, opts)
    cfg.MODEL.WEIGHTS = ""
    if at_common_size:
        cfg.merge_from_list(list(_COMMON_SIZE_KEYS))
        if cfg.INPUT.SQUARE_SIZE:
            cfg.merge_from_list(["INPUT.SQUARE_SIZE", COMMON_SIDE, "INPUT.MIN_SIZE_TEST", 0])
    # With random weights, a stock model keeps as many objects as it may.
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST = 1.0
    cfg.TEST.DETECTIONS_PER_IMAGE = num_detections
    return cfg


def run_suite(
    models: Sequence[SuiteModel], image: np.ndarray, opts: Sequence[str], *, repetitions: int, warmup: int
) -> list[dict]:
    """Measure the models one after the other.

    Args:
        models: of the suite.
        image: (height, width, 3) uint8.
        opts: KEY VALUE overrides of all models.
        repetitions, warmup: as of `measure_models`.

    Returns:
        For each model ``config``, ``published_ap``, ``split``, and ``ms``: median milliseconds by size, number of
        objects and protocol.
    """
    rows = []
    steps = tqdm(total=len(models) * 2 * len(DETECTIONS), desc="benchmark", unit="run")
    for each in models:
        milliseconds: dict[str, dict[str, dict[str, float]]] = {}
        for size in (OWN_SIZE, COMMON_SIZE):
            for num_detections in DETECTIONS:
                cfg = suite_config(each.config, opts, size == COMMON_SIZE, num_detections)
                found = _measure(cfg, image, num_detections, repetitions, warmup)
                milliseconds.setdefault(size, {})[str(num_detections)] = found
                gc.collect()
                steps.update()
        rows.append({"config": each.config, "published_ap": each.ap, "split": each.split, "ms": milliseconds})
    steps.close()
    return rows


def _measure(cfg: CfgNode, image: np.ndarray, num_detections: int, repetitions: int, warmup: int) -> dict[str, float]:
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    augmentation = T.AugmentationList(list(build_test_augmentations(cfg)))
    if isinstance(model, InstanceSegmenter):
        measured = measure_models(
            {"": optimize_as_configured(cfg, model)}, [image], {"": augmentation}, num_detections=num_detections,
            repetitions=repetitions, warmup=warmup,
        )[""]  # fmt: skip
        return {protocol: 1e3 * float(np.median(measured.stages[protocol])) for protocol in PROTOCOLS}
    return _measure_stock(model, lambda: batched_inputs([image], augmentation), repetitions, warmup)


def _measure_stock(
    model: nn.Module, preprocess: Callable[[], list[dict]], repetitions: int, warmup: int
) -> dict[str, float]:
    """Time a model of Detectron2, whose forward normalizes, pads, runs the network and makes the masks."""
    seconds = []
    with torch.inference_mode():
        for _ in range(warmup + repetitions):
            start = now(model.device)
            inputs = preprocess()
            resized = now(model.device)
            results = model(inputs)
            done = now(model.device)
            for result in results:
                result["instances"].to("cpu")
            seconds.append((done - resized, now(model.device) - start))
    return dict(zip(PROTOCOLS, (1e3 * np.median(seconds[warmup:], axis=0)).tolist()))


def suite_table(rows: Sequence[dict]) -> str:
    """Return the rows of `run_suite` as a table of Markdown."""
    columns = [
        (size, count, protocol) for size in (OWN_SIZE, COMMON_SIZE) for count in DETECTIONS for protocol in PROTOCOLS
    ]
    header = ["config", "AP, published", *(f"{size}, {count} objects, {protocol}" for size, count, protocol in columns)]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        ap = f"{row['published_ap']}" + (f" ({row['split']})" if row["split"] != "val2017" else "")
        times = [f"{row['ms'][size][str(count)][protocol]:.0f}" for size, count, protocol in columns]
        lines.append([row["config"].rpartition("/")[2].removesuffix(".yaml"), ap, *times])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
