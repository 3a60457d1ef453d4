"""Check everything that an evaluation needs before a training or an evaluation starts."""

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from sparseinst.data.coco_json import class_info, registered_images
from sparseinst.evaluation.coco_evaluation import TASKS, check_coco_eval
from sparseinst.evaluation.evaluate import build_evaluator

# The evaluators and the loader read these keys of each image.
_IMAGE_KEYS = ("file_name", "image_id")


def check_evaluation(cfg: CfgNode, class_names: Sequence[str] | None = None) -> None:
    """Check the data sets of DATASETS.TEST: classes, images and the evaluator.

    Args:
        cfg: its data sets are registered; a data set without a json is converted to one in OUTPUT_DIR.
        class_names: of the model, in the order of its class logits; None where they are unknown.

    Raises:
        ValueError: a data set cannot be evaluated; the message names it and the reason.
    """
    for name in cfg.DATASETS.TEST:
        class_info(name)
        _check_images(name)
        try:
            build_evaluator(cfg, name, class_names=class_names)
        except ValueError:
            raise
        # The annotations of a registered data set can be anything.
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise ValueError(
                f"The data set {name!r} of DATASETS.TEST cannot be evaluated ({text}). Each annotation needs bbox, "
                "bbox_mode, category_id and segmentation, each image file_name, image_id, height and width"
            ) from error


def _check_images(name: str) -> None:
    # Data sets that this project registers have been checked, and say so by this entry.
    if MetadataCatalog.get(name).get("num_instances") is not None:
        return
    images = registered_images(name)
    if not images:
        raise ValueError(f"The data set {name!r} of DATASETS.TEST has no images")
    for key in _IMAGE_KEYS:
        lacking = [index for index, image in enumerate(images) if key not in image]
        if lacking:
            raise ValueError(
                f"{len(lacking)} of the {len(images)} images of the data set {name!r} have no {key!r} (the first: "
                f"number {lacking[0]}), which an evaluation needs: add it to the dicts that the registered function "
                "returns"
            )
    if len({image["image_id"] for image in images}) < len(images):
        raise ValueError(f"The data set {name!r} gives several images the same 'image_id'; number them")


def check_test_config(cfg: CfgNode) -> None:
    """Check keys of the evaluation. Raise ValueError on one that cannot be used."""
    check_coco_eval(cfg.TEST.COCO_EVAL)
    check_expected_results(cfg)
    if cfg.TEST.AUG.ENABLED:
        raise ValueError("TEST.AUG.ENABLED is True: test-time augmentation is not available; set it to False")


def check_expected_results(cfg: CfgNode) -> None:
    """Raise ValueError where TEST.EXPECTED_RESULTS cannot be compared with the results of the evaluation."""
    expected = cfg.TEST.EXPECTED_RESULTS
    for entry in expected:
        is_entry = isinstance(entry, list | tuple) and len(entry) == 4 and all(isinstance(x, str) for x in entry[:2])
        if not is_entry or entry[0] not in TASKS or not all(isinstance(x, int | float) for x in entry[2:]):
            raise ValueError(
                f"TEST.EXPECTED_RESULTS has the entry {entry!r}; expected [task, metric, value, tolerance], such as "
                f"['segm', 'AP', 30.0, 0.5], with a task of {', '.join(TASKS)}"
            )
    if expected and len(cfg.DATASETS.TEST) != 1:
        raise ValueError(
            f"TEST.EXPECTED_RESULTS needs one data set in DATASETS.TEST, which has {len(cfg.DATASETS.TEST)}: set "
            "TEST.EXPECTED_RESULTS []"
        )
