"""The self-check accepts files that differ by rounding, and finds wrong ones, without a single export."""

import copy
from types import SimpleNamespace

import pytest
import torch

from sparseinst.ops.masks import masks_to_boxes
from sparseinst.runtime.export import EXAMPLE_CELLS, ExportableNetwork
from sparseinst.runtime.exported_model import open_network
from sparseinst.runtime.self_check import (
    BOUNDS,
    MASK_BOUNDS,
    SelfCheckError,
    check_differences,
    check_shapes,
    dice_coefficients,
    end_to_end_differences,
    output_differences,
)
from sparseinst.tools import export_run
from tests.modeling.solo.tiny_solo import tiny_solo
from tests.modeling.yolact.tiny_yolact import spread_scores, tiny_yolact
from tests.tiny_model import tiny_model

FINDS = ("MODEL.SPARSE_INST.CLS_THRESHOLD", 0.3, "MODEL.SPARSE_INST.MASK_THRESHOLD", 0.5)
SHAPES = [(1, 64, 64), (3, 96, 160)]


def test_shapes_of_the_check_are_new_to_the_network():
    shapes = check_shapes(32, None, None, (640, 864))
    assert shapes == [(1, 64, 64), (3, 96, 192), (1, 192, 64), (1, 640, 864)]
    # The export sees 2 images.
    example = (2, *(32 * cells for cells in EXAMPLE_CELLS))
    assert all(seen not in values for seen, values in zip(example, zip(*shapes)))
    assert check_shapes(32, (64, 96), 4, (640, 864)) == [(4, 64, 96), (4, 64, 96)]
    assert check_shapes(32, (64, 96), None, (640, 864)) == [(1, 64, 96), (3, 64, 96)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda name, value: value * (1 + 1e-3 * (name == "pred_masks")), "pred_masks by 0.001"),
        (lambda name, value: value * torch.nan if name == "pred_scores" else value, "pred_scores by nan"),
        (lambda name, value: value[:1], "pred_logits is .1, 6, 3. torch.float32 for images .3, 3, 96, 192."),
        (lambda name, value: value.double(), "torch.float64 for images"),
    ],
)
def test_differences_are_found(wrong, message):
    network = ExportableNetwork(tiny_model().requires_grad_(False))
    shapes = check_shapes(32, None, None, (64, 64))[:2]
    assert max(output_differences(network, network, shapes, "float32").values()) == 0
    with pytest.raises(SelfCheckError, match=message):
        found = output_differences(
            network, lambda x: {name: wrong(name, value) for name, value in network(x).items()}, shapes, "float32"
        )
        check_differences(found, 1e-4)


@pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan])
def test_outputs_of_int8_are_finite(wrong):
    """INT8 has no bound."""
    network = ExportableNetwork(tiny_model().requires_grad_(False))

    def with_one(images):
        outputs = {name: value.clone() for name, value in network(images).items()}
        outputs["pred_masks"][0, 0, 0, 0] = wrong
        return outputs

    found = output_differences(network, with_one, [(1, 64, 64)], "int8")
    with pytest.raises(SelfCheckError, match="pred_masks by (inf|nan); all values must be finite"):
        check_differences(found, float("inf"))
    check_differences({**found, "pred_masks": 1e6}, float("inf"))


@pytest.mark.parametrize(("threshold", "finds"), [(0.3, True), (0.999, False)])
def test_compared_detections_are_counted(threshold, finds):
    model = tiny_model("MODEL.SPARSE_INST.CLS_THRESHOLD", threshold, "MODEL.SPARSE_INST.MASK_THRESHOLD", 0.5)
    network = ExportableNetwork(model.requires_grad_(False), max_detections=4)
    worst, num_compared = end_to_end_differences(network, network, [(1, 64, 64)], 1e-4)
    assert max(worst.values()) < 1e-4 and (num_compared > 0) is finds
    images = [torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    assert (end_to_end_differences(network, network, [(1, 64, 64)], 1e-4, images)[1] > num_compared) is finds


@pytest.mark.parametrize("family", ["sparse_inst", "yolact"])
def test_wrong_boxes_are_found(family):
    """Tight boxes of masks and predicted boxes; the check finds a shift by a pixel."""
    if family == "yolact":
        model = spread_scores(tiny_yolact("MODEL.YOLACT.MAX_DETECTIONS", 20))
    else:
        model = tiny_model("MODEL.SPARSE_INST.CLS_THRESHOLD", 0.3, "MODEL.SPARSE_INST.MASK_THRESHOLD", 0.5)
    network = ExportableNetwork(model.requires_grad_(False), max_detections=20)

    def shifted(images):
        return {name: value + (name == "boxes") for name, value in network(images).items()}

    assert end_to_end_differences(network, network, [(1, 64, 64)], 1e-4)[0]["boxes"] < 1e-5
    worst, _ = end_to_end_differences(network, shifted, [(1, 64, 64)], 1e-4)
    assert worst["boxes"] == pytest.approx(1 / 64, rel=1e-3)
    with pytest.raises(SelfCheckError, match="boxes by 0.016; at most 0.0001"):
        check_differences(worst, 1e-4)


def without(row):
    """Return a function that drops a detection from the outputs of a file."""

    def drop(outputs):
        return {
            name: torch.cat([value[:, :row], value[:, row + 1 :], torch.zeros_like(value[:, :1])], 1)
            for name, value in outputs.items()
        }

    return drop


def with_an_empty_row(outputs):
    return {
        name: torch.cat([value[:, :1], torch.zeros_like(value[:, :1]), value[:, 1:]], 1)
        for name, value in outputs.items()
    }


def with_a_wrong_class(outputs):
    is_best = outputs["scores"] == outputs["scores"].amax()
    return {**outputs, "classes": (outputs["classes"] + is_best) % 3}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda outputs: {**outputs, "classes": outputs["classes"].flip(1)}, "lacks . of"),
        (with_a_wrong_class, "lacks 1 of"),
        (lambda outputs: {**outputs, "masks": outputs["masks"].roll(1, 1)}, "lacks . of"),
        (lambda outputs: {**outputs, "masks": outputs["masks"].roll(8, 3)}, "lacks . of"),
        (lambda outputs: {**outputs, "scores": outputs["scores"] * 0.99}, "lacks . of"),
        (lambda outputs: {**outputs, "scores": outputs["scores"] * torch.nan}, "has 0 detections"),
        (lambda outputs: {name: value.flip(1) for name, value in outputs.items()}, "are not sorted by their scores"),
        (with_an_empty_row, "are not sorted by their scores"),
        (lambda outputs: {name: value.repeat_interleave(2, 1) for name, value in outputs.items()}, "and lacks 0 of"),
        (without(0), "lacks 1 of"),
        (without(2), "lacks 1 of"),
    ],
    ids=[
        "order of classes",
        "a class",
        "order of masks",
        "masks",
        "scores",
        "nan",
        "order",
        "gap",
        "twice",
        "first",
        "third",
    ],
)
def test_wrong_detections_are_found(wrong, message):
    network = ExportableNetwork(tiny_model(*FINDS, seed=2).requires_grad_(False), max_detections=6)
    with pytest.raises(SelfCheckError, match=message):
        worst, _ = end_to_end_differences(network, lambda images: wrong(network(images)), [(1, 64, 96)], 1e-4)
        check_differences(worst, 1e-4)


@pytest.mark.parametrize(
    ("precision", "num_pixels", "message"),
    [("float32", 20, "worst_mask by 0.019; at most 0.01 is allowed"), ("float16", 400, "lacks 1 of")],
)
def test_one_wrong_mask_among_many_is_found(precision, num_pixels, message):
    """A mask of 506 pixels lacks some; the image has 6144."""
    model = tiny_model(*FINDS, "MODEL.SPARSE_INST.DECODER.NUM_MASKS", 40, seed=2).requires_grad_(False)
    network = ExportableNetwork(model, max_detections=40)

    def wrong(images):
        outputs = network(images)
        masks = outputs["masks"].clone()
        masks[0, 37][tuple(masks[0, 37].nonzero()[:num_pixels].T)] = 0
        return {**outputs, "masks": masks, "boxes": masks_to_boxes(masks[0])[None]}

    with pytest.raises(SelfCheckError, match=message):
        worst, _ = end_to_end_differences(network, wrong, [(1, 64, 96)], BOUNDS[precision])
        check_differences(worst, BOUNDS[precision], MASK_BOUNDS[precision])


def test_a_pixel_of_a_tiny_mask_may_differ():
    """Areas of 6, 7, 8 and 1 pixels; the first three overlap by 6."""
    masks = torch.zeros((4, 5, 5), dtype=torch.bool)
    masks[:3, :2, :3] = masks[1:3, 2, 2] = masks[2, 2, 1] = masks[3, 4, 4] = True
    assert torch.allclose(dice_coefficients(masks[:1], masks), torch.tensor([[1.0, 1.0, 13 / 14, 1 / 7]]))


@pytest.mark.parametrize("times", [1, 2])
def test_a_detection_at_a_threshold_is_one_of_the_surplus(times):
    """Runs with noise find it or not; the file may have it once."""
    model = tiny_model(*FINDS, "MODEL.SPARSE_INST.DECODER.NUM_MASKS", 40, seed=2).requires_grad_(False)
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    model.cls_threshold = sixth_score(model, images) * (1 - 1e-7)
    network = ExportableNetwork(model, max_detections=40)

    def repeated(images):
        rows = [*range(5), *[5] * times, *range(6, 30)]
        return {name: value[:, rows] for name, value in network(images).items()}

    if times == 1:
        assert end_to_end_differences(network, repeated, [], 1e-4, [images])[1] == 5
    else:
        with pytest.raises(SelfCheckError, match="has 7 detections .* lacks 0 of 5"):
            end_to_end_differences(network, repeated, [], 1e-4, [images])


def sixth_score(model, images):
    """Return the sixth best score of the only image, before it is multiplied by the maskness."""
    outputs = model.network(images)
    probs = (outputs["pred_logits"].sigmoid().amax(2) * outputs["pred_scores"][..., 0].sigmoid()).sqrt()[0]
    return float(probs.sort(descending=True).values[5])


def test_a_detection_at_a_threshold_may_be_missing():
    """Detections below it shift by a row; every other one is compared."""
    model = tiny_model(*FINDS, "MODEL.SPARSE_INST.DECODER.NUM_MASKS", 40, seed=2).requires_grad_(False)
    network = ExportableNetwork(model, max_detections=40)
    images = [torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))]
    _, num_all = end_to_end_differences(network, network, [], 1e-4, images)
    # The float32 network finds it, the file does not.
    threshold = sixth_score(model, images[0])
    found = []
    for value in (threshold * (1 - 1e-7), threshold * (1 + 1e-6)):
        changed = copy.deepcopy(model)
        changed.cls_threshold = value
        found.append(ExportableNetwork(changed, max_detections=40))
    counts = [int((each(images[0])["scores"] > 0).sum()) for each in found]
    assert counts == [6, 5]
    worst, num_compared = end_to_end_differences(*found, [], 1e-4, images)
    assert max(worst.values()) < 1e-4 and num_compared == 5 < num_all


@pytest.mark.parametrize(("variant", "seed"), [("solo", 1), ("solo", 2), ("decoupled", 1), ("solov2", 0)])
def test_weights_in_float16_may_change_candidates_and_order(variant, seed):
    """Scores move by 0.006, and the detections at thresholds and at the largest number are others."""
    model = tiny_solo(variant, seed=seed).requires_grad_(False)
    half = ExportableNetwork(copy.deepcopy(model).half().float(), max_detections=30)
    worst, num_compared = end_to_end_differences(ExportableNetwork(model, max_detections=30), half, SHAPES, 0.02)
    check_differences(worst, 0.02, MASK_BOUNDS["float16"])
    assert worst["scores"] > 1e-3 and num_compared > 30


def test_weights_in_float16_may_change_a_crop():
    """YOLACT crops masks in cells of 4 pixels; the left side of a box moves from 40.01 to 39.99."""
    model = spread_scores(tiny_yolact(seed=5)).requires_grad_(False)
    half = ExportableNetwork(copy.deepcopy(model).half().float(), max_detections=30)
    network = ExportableNetwork(model, max_detections=30)
    worst, num_compared = end_to_end_differences(network, half, [(2, 64, 64)], 0.02)
    check_differences(worst, 0.02, MASK_BOUNDS["float16"])
    assert worst["worst_mask"] > 0.1 and num_compared > 40


@pytest.mark.parametrize(("variant", "seed"), [("solo", 2), ("solov2", 0)])
def test_a_pixel_at_its_threshold_changes_the_score_of_its_mask(variant, seed):
    """Rounding of 2e-6 moves a score by more than the bound of 1e-4; the check leaves such detections out."""
    model = tiny_solo(variant, seed=seed).requires_grad_(False)

    def engine(images):
        generator = torch.Generator().manual_seed(99)
        outputs = {
            name: value + 2e-6 * value.abs().max() * (2 * torch.rand(value.shape, generator=generator) - 1)
            for name, value in model.network(images).items()
        }
        return model.dense_detections(outputs, tuple(images.shape[-2:]), 30)

    worst, num_compared = end_to_end_differences(ExportableNetwork(model, max_detections=30), engine, SHAPES, 1e-4)
    check_differences(worst, 1e-4, MASK_BOUNDS["float32"])
    assert num_compared > 90


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_batch_that_was_frozen_is_found(tmp_path, engine):
    """The metadata promise any batch; the file takes 2 images."""
    onnx = pytest.importorskip("onnx", reason="the package onnx is not installed")
    pytest.importorskip(engine, reason=f"the package {engine} is not installed")
    value = lambda name: onnx.helper.make_tensor_value_info(name, 1, [2, 3, "h", "w"])  # noqa: E731
    nodes = [onnx.helper.make_node("Relu", ["images"], ["masks"])]
    graph = onnx.helper.make_graph(nodes, "g", [value("images")], [value("masks")])
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), tmp_path / "m.onnx")
    network = ExportableNetwork(
        SimpleNamespace(network=lambda x: {"masks": x.relu()}, pixel_mean=[0.0] * 3, ranks_instances=False)
    )

    def differences(batch):
        metadata = SimpleNamespace(batch=batch, has_deform_conv=False)
        exported = open_network(tmp_path / "m.onnx", metadata, engine, 1, ["CPUExecutionProvider"])
        return output_differences(network, exported, check_shapes(32, None, batch, (64, 64)), "float32")

    assert differences(2) == {"masks": 0.0}
    with pytest.raises(SelfCheckError, match="The engine fails for images .1, 3, 64, 64."):
        differences(None)


@pytest.mark.parametrize(
    ("ranks_instances", "precision", "share", "end"),
    [
        (False, "float32", None, "(at most 0.0001)"),
        (True, "float32", 0.95, "(at most 0.0001; of the 95 % of the instances that differ least)"),
        (True, "int8", 0.1, "(their AP decides; of the 10 % of the instances that differ least)"),
    ],
)
def test_the_share_of_compared_instances_is_printed_and_stored(capsys, ranks_instances, precision, share, end):
    network = ExportableNetwork(tiny_model().requires_grad_(False))
    network.model.ranks_instances = ranks_instances
    figures, _ = export_run._check_outputs(network, network, [(1, 64, 64)], precision, [])
    assert figures.get("compared_share") == share and capsys.readouterr().out.endswith(f"{end}\n")
