"""Export the tiny SparseInst by the command."""

import runpy
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode

from sparseinst.inference import Predictor
from sparseinst.tools import export
from tests.tiny_model import normed_placed_model, placed_cfg, tiny_cfg, tiny_model

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "onnx_only.py"
CLASSES = {"names": ["disc", "bar", "cross"], "category_ids": [3, 8, 9]}
# Random weights find something.
OPTS = ("MODEL.SPARSE_INST.CLS_THRESHOLD", 0.3, "MODEL.SPARSE_INST.MASK_THRESHOLD", 0.5)


def save_tiny(folder: Path, *opts) -> list[str]:
    """Write config and weights; return the arguments that name them."""
    opts = (*OPTS, *opts)
    return _save(folder, tiny_cfg(*opts), tiny_model(*opts))


def save_placed(folder: Path, *opts) -> list[str]:
    """Write config and weights of a tiny model with a PlacedIAMDecoder and norms, as `save_tiny` does."""
    opts = (*OPTS, "MODEL.SPARSE_INST.DECODER.NUM_MASKS", 20, *opts)
    return _save(folder, placed_cfg(*opts), normed_placed_model(*opts))


def _save(folder: Path, cfg: CfgNode, model: torch.nn.Module) -> list[str]:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(cfg.dump())
    torch.save({"model": model.state_dict(), "classes": CLASSES}, folder / "model.pth")
    return ["--config-file", str(folder / "config.yaml")]


def run_export(folder: Path, *args, opts=()) -> int:
    """Export what `save_tiny` wrote; return the exit code."""
    config = ["--config-file", str(folder / "config.yaml")]
    weights = ["MODEL.WEIGHTS", str(folder / "model.pth")]
    return export.main([*config, *map(str, args), *weights, *map(str, opts)])


def photos(seed=0) -> list[np.ndarray]:
    """Return random images of several sizes, RGB."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((50, 70), (64, 96), (90, 48), (64, 64))]


def assert_same_detections(found, expected, score_tolerance=1e-4, pixels=0.001) -> None:
    """Compare Instances of two engines: scores to rounding, masks but for pixels at the threshold."""
    assert len(found) == len(expected) > 0 and found.image_size == expected.image_size
    assert torch.allclose(found.scores, expected.scores, atol=score_tolerance)
    assert torch.equal(found.pred_classes, expected.pred_classes)
    assert (found.pred_masks != expected.pred_masks).float().mean() <= pixels


def load_example(path: Path):
    """Return the model of examples/onnx_only.py for an exported file."""
    return runpy.run_path(str(EXAMPLE))["Model"](str(path))


def assert_example_finds_the_same(path: Path, image: np.ndarray) -> None:
    """Compare the detections of examples/onnx_only.py in an RGB image with the Predictor's of the same file."""
    (expected,) = Predictor(path)([image], "RGB")
    scores, classes, boxes, masks = load_example(path).detect(image[:, :, ::-1])
    assert len(expected) and classes.tolist() == expected.pred_classes.tolist()
    assert np.allclose(scores, expected.scores, atol=1e-4)
    # A pixel at the threshold may differ.
    assert np.abs(boxes - expected.pred_boxes.tensor.numpy()).max() <= 1
    assert (masks != expected.pred_masks.numpy()).mean() <= 0.001
