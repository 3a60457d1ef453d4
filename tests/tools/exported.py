"""Export the tiny SparseInst by the command."""

from pathlib import Path

import numpy as np
import torch

from sparseinst.tools import export
from tests.tiny_model import tiny_cfg, tiny_model

CLASSES = {"names": ["disc", "bar", "cross"], "category_ids": [3, 8, 9]}
# Random weights find something.
OPTS = ("MODEL.SPARSE_INST.CLS_THRESHOLD", 0.3, "MODEL.SPARSE_INST.MASK_THRESHOLD", 0.5)


def save_tiny(folder: Path, *opts) -> list[str]:
    """Write config and weights; return the arguments that name them."""
    opts = (*OPTS, *opts)
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(tiny_cfg(*opts).dump())
    torch.save({"model": tiny_model(*opts).state_dict(), "classes": CLASSES}, folder / "model.pth")
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
