"""Detections: points NMS, the area filter, blocks of cells, NMS; worked by hand and against straightforward code."""

import pytest
import torch
from detectron2.layers import ShapeSpec

from sparseinst.config import load_config
from sparseinst.modeling.solo import postprocessing
from sparseinst.modeling.solo.heads import build_solo_head
from sparseinst.modeling.solo.postprocessing import DetectionOptions, candidate_cells, detect, points_nms
from sparseinst.ops.masks import greedy_nms, mask_intersections, mask_nms, matrix_nms
from tests.modeling.solo.tiny_solo import VARIANTS, tiny_solo
from tests.oracles.solo_postprocessing import straightforward_detect


def test_points_nms():
    scores = torch.tensor([[[1.0, 2, 1], [3, 1, 3], [1, 1, 3]]])
    assert points_nms(scores).tolist() == [[[1, 2, 0], [3, 0, 3], [0, 0, 3]]]


def test_candidates_have_several_classes_and_ascending_cells():
    logits = torch.full((2, 5), -9.0)
    logits[0, 3], logits[1, 3], logits[1, 4] = 2.0, 1.0, 3.0
    cells, classes, scores = candidate_cells(logits, (2, 1), 0.1)
    assert cells.tolist() == [3, 3, 4] and classes.tolist() == [0, 1, 1]
    assert scores.tolist() == pytest.approx(torch.tensor([2.0, 1.0, 3.0]).sigmoid().tolist())


def rows(*pixels, width=20):
    masks = torch.zeros(len(pixels), 1, width, dtype=torch.bool)
    for index, (start, end) in enumerate(pixels):
        masks[index, 0, start : end + 1] = True
    return masks


@pytest.mark.parametrize(
    ("kernel", "expected"), [("gaussian", [0.9, 0.1583, 0.4947, 0.6]), ("linear", [0.9, 0.08, 0.4083, 0.6])]
)
def test_matrix_nms(kernel, expected):
    scores, classes = torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([0, 0, 0, 1])
    found = matrix_nms(scores, classes, mask_intersections(rows((0, 9), (1, 9), (5, 11), (0, 9))), kernel)
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("kernel", "expected"), [("gaussian", [1, 0.1979, 0.9231]), ("linear", [1, 0.1, 0.8])])
def test_matrix_nms_from_overlaps(kernel, expected):
    # Masks of 1 pixel would have these IoUs: intersection = iou * 2 / (1 + iou) of equal areas.
    iou = torch.tensor([[1, 0.9, 0.2], [0.9, 1, 0.6], [0.2, 0.6, 1]])
    found = matrix_nms(torch.ones(3), torch.zeros(3), 2 * iou / (1 + iou), kernel)
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("kernel", "expected"), [("gaussian", [0.9, 0.1083, 0.0947]), ("linear", [0.9, 0, 0])])
def test_matrix_nms_of_equal_masks(kernel, expected):
    found = matrix_nms(
        torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3), mask_intersections(rows((0, 9), (0, 9), (0, 9))), kernel
    )
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


def test_intersections_by_tiles():
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(90, 37, 50, dtype=torch.bool)
    for mask in masks[:-1]:
        y, x = (int(torch.randint(side, (1,), generator=generator)) for side in (37, 50))
        mask[y : y + 9, x : x + 12] = torch.rand(mask[y : y + 9, x : x + 12].shape, generator=generator) > 0.3
    flat = masks.flatten(1).float()
    assert torch.equal(mask_intersections(masks), flat @ flat.T)
    assert torch.equal(mask_intersections(masks[:3]), (flat @ flat.T)[:3, :3])


@pytest.mark.parametrize("variant", ["solo", "decoupled", "solov2"])
@pytest.mark.parametrize("block", [2**25, 2**9], ids=["one block", "blocks"])
def test_equals_straightforward_code(variant, block, monkeypatch):
    monkeypatch.setattr(postprocessing, "MAX_PIXELS_AT_ONCE", block)
    model = tiny_solo(variant)
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    options = DetectionOptions(score_threshold=0.4, nms_pre=60, max_detections=20)
    with torch.no_grad():
        outputs = model.network(images)
        sizes = {"padded_size": (64, 96), "image_size": (60, 90), "output_size": (80, 120)}
        found = detect(model.head, outputs, 0, options, **sizes)
        scores, classes, masks = straightforward_detect(model.head, outputs, 0, options, **sizes)
    assert len(found.scores) > 3 and found.classes.tolist() == classes.tolist()
    assert torch.allclose(found.scores, scores, atol=1e-5)
    assert (found.masks != masks).flatten(1).sum(1).max() <= 2
    rows, columns = masks[0].any(1).nonzero(), masks[0].any(0).nonzero()
    assert found.boxes[0].tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("options", [{"score_threshold": 1.0}, {"score_threshold": 0.0, "update_threshold": 1.0}])
def test_nothing_is_left(variant, options):
    model = tiny_solo(variant)
    with torch.no_grad():
        outputs = model.network(torch.zeros(1, 3, 64, 64))
        found = detect(
            model.head, outputs, 0, DetectionOptions(**options),
            padded_size=(64, 64), image_size=(64, 64), output_size=(50, 60),
        )  # fmt: skip
    assert len(found.scores) == 0 and found.boxes.shape == (0, 4) and found.masks.shape == (0, 50, 60)
    assert found.masks.dtype == torch.bool and found.classes.dtype == torch.int64


class FixedMasks:
    """Stands for a head whose masks are given: each has as many pixels as the index of its cell says."""

    num_grids, strides, mask_strides, level_sizes = (8, 8, 8), (8, 16, 32), (4, 8, 16), [64, 64, 64]

    def mask_probs(self, outputs, image, level, cells, size=None):
        masks = torch.zeros(len(cells), size[0] * size[1])
        for mask, cell in zip(masks, cells.tolist()):
            mask[:cell] = 0.9
        return masks.unflatten(1, size)


def published_head(config):
    """Return a head with the published grids and strides, and a narrow tower."""
    node_name = f"MODEL.{config.split('/')[0].upper()}"
    cfg = load_config(config, [f"{node_name}.NUM_CLASSES", 1, f"{node_name}.NUM_CONVS", 1, f"{node_name}.CHANNELS", 32])
    shapes = {f"p{level}": ShapeSpec(channels=32, stride=2**level) for level in range(2, 7)}
    return build_solo_head(cfg, shapes, node_name)


PUBLISHED_HEADS = ("solo/solo_r50_3x", "solo/decoupled_solo_r50_3x", "solov2/solov2_r50_3x")


@pytest.mark.parametrize("config", PUBLISHED_HEADS)
def test_masks_up_to_the_stride_are_dropped(config, monkeypatch):
    head = published_head(config)
    monkeypatch.setattr(head, "mask_probs", FixedMasks().mask_probs)
    kept = {}
    for level, start in enumerate((0, 1600, 2896, 3472, 3728)):
        for area in (8, 9, 16, 17, 32, 33):
            logits = torch.full((1, 1, 3872), -9.0)
            logits[0, 0, start + area] = 9.0
            found = detect(
                head, {"cate_logits": logits}, 0, DetectionOptions(),
                padded_size=(64, 64), image_size=(64, 64), output_size=(64, 64),
            )  # fmt: skip
            if len(found.scores):
                kept.setdefault(level, []).append(area)
    assert kept == {0: [9, 16, 17, 32, 33], 1: [9, 16, 17, 32, 33], 2: [17, 32, 33], 3: [33], 4: [33]}


class OneSoftMask:
    """Stands for a head with one cell, whose mask has 2x2 pixels."""

    num_grids, mask_strides, level_sizes = (1,), (4,), [1]

    def __init__(self, stride):
        self.strides = (stride,)

    def mask_probs(self, outputs, image, level, cells, size=None):
        assert size == (2, 2) and cells.tolist() == [0]
        return torch.tensor([[[0.6, 0.9], [0.4, 0.2]]])


@pytest.mark.parametrize(("stride", "scores"), [(1, [0.8 * 0.75]), (2, [])])
def test_maskness(stride, scores):
    # 0.6 and 0.9 are above the threshold: area 2, maskness (0.6 + 0.9) / 2.
    outputs = {"cate_logits": torch.tensor([[[0.8]]]).logit()}
    found = detect(
        OneSoftMask(stride), outputs, 0, DetectionOptions(), padded_size=(8, 8), image_size=(8, 8), output_size=(8, 8)
    )
    assert found.scores.tolist() == pytest.approx(scores, abs=1e-6)


def test_a_decoupled_cell_is_a_row_and_a_column():
    head = published_head("solo/decoupled_solo_r50_3x")
    assert sum(head.num_grids) == 128 and sum(head.level_sizes) == 3872
    # Cell 2000 is cell 400 of level 1, which follows 1600 cells and 40 channels: row 400 // 36 = 11, column 4.
    outputs = {"cate_logits": torch.full((1, 1, 3872), 9.0)}
    for axis, channel in (("x", 44), ("y", 51)):
        logits = torch.full((1, 128, 8, 8), -20.0)
        logits[:, channel] = 20.0
        for level, part in enumerate(logits.split(head.num_grids, dim=1)):
            outputs[f"mask_logits_{axis}_{level}"] = part
    probs = torch.cat([head.mask_probs(outputs, 0, level, torch.arange(n)) for level, n in enumerate(head.level_sizes)])
    assert (probs > 0.5).flatten(1).any(1).nonzero().tolist() == [[2000]] and probs[2000].min() > 0.99
    found = detect(
        head, outputs, 0, DetectionOptions(), padded_size=(32, 32), image_size=(32, 32), output_size=(32, 32)
    )
    assert found.prediction_idx.tolist() == [2000] and found.masks.all()


def test_greedy_nms_by_key():
    masks = rows((0, 9), (1, 9), (5, 11), (0, 9))
    classes = torch.tensor([0, 0, 0, 1])
    assert mask_nms(masks, classes, 0.5).tolist() == [0, 2, 3]
    assert greedy_nms(classes, mask_intersections(masks), 0.95).tolist() == [0, 1, 2, 3]
    logits = torch.full((1, 1, 192), -9.0)
    logits[0, 0, [20, 22, 63]] = torch.tensor([1.0, 2.0, 0.5])
    found = detect(
        FixedMasks(), {"cate_logits": logits}, 0, DetectionOptions(nms_type="mask"),
        padded_size=(64, 64), image_size=(64, 64), output_size=(64, 64),
    )  # fmt: skip
    # The mask of 20 pixels lies in that of 22; that of 63 overlaps it by a third.
    assert found.prediction_idx.tolist() == [22, 63]
