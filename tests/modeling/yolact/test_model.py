"""YOLACT as a Detectron2 model: inputs, outputs, targets, norms, initial weights, registries, engines."""

import math

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch.nn import functional as F

from sparseinst.modeling.yolact.heads import YOLACT_HEAD_REGISTRY, MaskIoUHead, YOLACTHead
from sparseinst.modeling.yolact.model import YOLACT
from sparseinst.runtime.optimize import optimize_for_inference
from sparseinst.structures.rle_masks import RLEMasks
from tests.modeling.yolact.tiny_yolact import NUM_CLASSES, PLUS, SIDE, tiny_yolact, tiny_yolact_cfg
from tests.tiny_model import random_input

# Random weights give each class about a quarter.
ALL = ("MODEL.YOLACT.SCORE_THRESHOLD", 0.0)


@pytest.fixture(scope="module")
def plus():
    return tiny_yolact(*PLUS, *ALL)


def test_predictions():
    model = tiny_yolact(*ALL)
    inputs = [random_input(50, 70), {**random_input(64, 40, seed=1), "height": 128, "width": 80}]
    with torch.no_grad():
        results = model(inputs)
    for result, size in zip(results, [(50, 70), (128, 80)]):
        instances = result["instances"]
        assert instances.image_size == size and instances.pred_masks.shape == (len(instances), *size)
        assert 0 < len(instances) <= 100 and instances.pred_masks.flatten(1).any(1).all()
        assert (instances.scores.diff() <= 0).all() and not instances.has("pred_class_scores")
        boxes = instances.pred_boxes.tensor
        assert (boxes >= 0).all() and (boxes <= torch.tensor([size[1], size[0]] * 2)).all()
    with torch.no_grad(), model.output_as(mask_format="rle"):
        encoded = model(inputs)[1]["instances"].pred_masks
    assert isinstance(encoded, RLEMasks)
    assert torch.equal(torch.from_numpy(encoded.__array__()), results[1]["instances"].pred_masks)


def test_two_scores_of_plus(plus):
    with torch.no_grad():
        (result,) = plus([random_input(50, 70)])
    instances = result["instances"]
    assert (instances.scores <= instances.pred_class_scores).all() and (instances.scores.diff() <= 0).all()
    assert not torch.equal(instances.scores, instances.pred_class_scores)


def test_the_image_is_squashed_as_floats():
    model = tiny_yolact("INPUT.FORMAT", "RGB")
    image = random_input(30, 100)["image"]
    images = model.preprocess([{"image": image}, {"image": image.float()}])
    assert images.tensor.shape == (2, 3, SIDE, SIDE) and images.image_sizes == [(30, 100)] * 2
    expected = F.interpolate(image[None].float(), (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=False)
    mean, std = torch.tensor([123.68, 116.78, 103.94]), torch.tensor([58.40, 57.12, 57.38])
    assert torch.allclose(images.tensor[0], ((expected[0].permute(1, 2, 0) - mean) / std).permute(2, 0, 1), atol=1e-6)
    assert torch.equal(images.tensor[0], images.tensor[1])
    square = torch.rand(3, SIDE, SIDE) * 255
    assert torch.allclose(model.preprocess([{"image": square}]).tensor[0, 0], (square[0] - 123.68) / 58.40)


def test_an_image_does_not_depend_on_its_batch():
    model = tiny_yolact(*ALL)
    first, second = random_input(64, 96), random_input(40, 40, seed=1)
    with torch.no_grad():
        alone, together = model([first])[0]["instances"], model([second, first])[1]["instances"]
    assert torch.allclose(alone.scores, together.scores, atol=1e-5)


def test_targets_follow_the_image():
    """Ground truth at any size gives the targets of the same ground truth at the square's size."""
    model = tiny_yolact()
    masks = torch.zeros(2, 32, 128, dtype=torch.bool)
    masks[0, 8:24, 16:64], masks[1, 0:8, 96:128] = True, True
    boxes = torch.tensor([[16.0, 8, 64, 24], [96, 0, 128, 8]])
    wide = Instances((32, 128), gt_classes=torch.tensor([0, 2]), gt_masks=masks, gt_boxes=Boxes(boxes))
    square_masks = masks.repeat_interleave(2, dim=1)[:, :, ::2]
    square = Instances(
        (64, 64), gt_classes=wide.gt_classes, gt_masks=square_masks,
        gt_boxes=Boxes(boxes * torch.tensor([0.5, 2, 0.5, 2])),
    )  # fmt: skip
    without_boxes = Instances((64, 64), gt_classes=wide.gt_classes, gt_masks=square_masks)
    inputs = [
        {"image": torch.zeros(3, *instances.image_size), "instances": instances}
        for instances in (wide, square, without_boxes)
    ]
    targets = model.prepare_targets(inputs, model.preprocess(inputs))
    for other in targets[1:]:
        assert torch.equal(targets[0].labels, other.labels)
        assert torch.equal(targets[0].gt_masks, other.gt_masks) and torch.equal(targets[0].sem_seg, other.sem_seg)
        assert torch.allclose(targets[0].gt_boxes, other.gt_boxes)
    assert targets[0].gt_masks.shape == (2, 16, 16) and targets[0].gt_masks.sum((1, 2)).tolist() == [8 * 6, 4 * 4]
    # 8 x 8 cells: class 1 has no object.
    assert targets[0].sem_seg.flatten(1).sum(1).tolist() == [4 * 3, 0, 2 * 2]


def test_semantic_targets_are_resized_as_published():
    model = tiny_yolact().train()
    # A cross that covers 28 of a cell's 64 pixels, and its center: bilinear resizing keeps it, an average does not.
    masks = torch.zeros(1, 64, 64)
    masks[0, 19:21, 16:24] = masks[0, 16:24, 19:21] = 1
    instances = Instances((64, 64), gt_classes=torch.tensor([1]), gt_masks=masks)
    inputs = [{"image": torch.zeros(3, 64, 64), "instances": instances}]
    (target,) = model.prepare_targets(inputs, model.preprocess(inputs))
    assert target.sem_seg.nonzero().tolist() == [[1, 2, 2]]


def test_thin_objects_and_crowds():
    model = tiny_yolact()
    masks = torch.zeros(2, SIDE, SIDE, dtype=torch.bool)
    masks[0, 10:40, 10:13], masks[1, 10:40, 40:48] = True, True
    boxes = torch.tensor([[10.0, 10, 13.99, 40], [40.0, 10, 48, 40]])
    instances = Instances((SIDE, SIDE), gt_classes=torch.tensor([0, 1]), gt_masks=masks, gt_boxes=Boxes(boxes))
    x = {"image": torch.zeros(3, SIDE, SIDE), "instances": instances}
    plain, crowded = model.prepare_targets(
        [x, {**x, "crowd_boxes": torch.tensor([[0.0, 0, SIDE, SIDE]])}], model.preprocess([x, x])
    )
    # Less than 4 pixels wide: not learned, in no target.
    assert plain.gt_boxes.shape == (1, 4) and not plain.sem_seg[0].any() and plain.sem_seg[1].any()
    assert set(plain.labels[plain.is_positive].tolist()) == {1}
    assert torch.equal(plain.is_positive, crowded.is_positive)
    assert (crowded.labels == NUM_CLASSES).sum() < (plain.labels == NUM_CLASSES).sum()
    # Crowds alone.
    (only,) = model.prepare_targets(
        [{**x, "instances": instances[:0], "crowd_boxes": torch.tensor([[0.0, 0, SIDE, SIDE]])}],
        model.preprocess([x]),
    )
    assert not only.is_positive.any() and (only.labels == -1).any() and not only.sem_seg.any()


@pytest.mark.parametrize("counts", [(0,), (0, 0), (3, 0)])
def test_images_without_objects_are_trained(counts):
    model = tiny_yolact().train()
    losses = model([random_input(40, 60, count, seed=count) for count in counts])
    assert all(loss.isfinite() for loss in losses.values()) and losses["loss_cls"] > 0
    assert (losses["loss_box"] == 0) == (not any(counts))
    sum(losses.values()).backward()
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)


def test_objects_without_masks_are_refused_by_name():
    x = random_input(40, 60, 2)
    x["instances"].remove("gt_masks")
    with pytest.raises(ValueError, match="2 instances have no gt_masks"):
        tiny_yolact().train()([x])


def test_few_images_freeze_the_batch_norms():
    few = tiny_yolact_cfg("SOLVER.IMS_PER_BATCH", 5)
    model = build_model(few).train()
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms and not any(norm.training or norm.weight.requires_grad for norm in norms)
    (warning,) = YOLACT.training_warnings(few)
    assert "Batch norms are frozen: 5 images" in warning
    for opts in (("SOLVER.IMS_PER_BATCH", 6), ("MODEL.YOLACT.FREEZE_NORM_BELOW", 0, "SOLVER.IMS_PER_BATCH", 1)):
        model = build_model(tiny_yolact_cfg(*opts)).train()
        norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        assert all(norm.training and norm.weight.requires_grad for norm in norms)
        assert not list(YOLACT.training_warnings(tiny_yolact_cfg(*opts)))
    # Of eight images in two parts four go through a pass.
    assert build_model(tiny_yolact_cfg("SOLVER.ACCUMULATE_STEPS", 2)).freeze_norms
    assert "SQUARE_ANCHORS" in next(YOLACT.training_warnings(tiny_yolact_cfg("MODEL.YOLACT.SQUARE_ANCHORS", True)))


def test_initial_weights():
    model = tiny_yolact()
    for part in (model.protonet, model.head, model.sem_seg_head, model.backbone.top_block, model.backbone.fpn_output3):
        for module in part.modules():
            if isinstance(module, torch.nn.Conv2d):
                fan = (module.in_channels + module.out_channels) * module.kernel_size[0] ** 2
                bound = math.sqrt(6 / fan)
                assert module.weight.abs().max() <= bound and module.weight.abs().max() > 0.9 * bound
                assert not module.bias.any()


def test_training_outputs_have_semantic_segmentation_only_in_training():
    model = tiny_yolact()
    images = torch.randn(1, 3, SIDE, SIDE)
    with torch.no_grad():
        evaluated, trained = model.network(images), model.train().network(images)
    assert trained.keys() - evaluated.keys() == {"sem_seg_logits"}
    without = tiny_yolact("MODEL.YOLACT.LOSS.SEM_SEG_WEIGHT", 0.0).train()
    assert without.sem_seg_head is None and "loss_sem_seg" not in without([random_input(40, 60, 2)])


def test_the_pyramid_takes_exact_sizes():
    model = tiny_yolact("INPUT.SQUARE_SIZE", 75)
    with torch.no_grad():
        levels = model.backbone(torch.randn(1, 3, 75, 75))
    assert [level.shape[-1] for level in levels.values()] == [10, 5, 3, 2, 1] == model.grid_sizes
    assert all((levels[name] >= 0).all() for name in ("p3", "p4", "p5")) and (levels["p6"] < 0).any()
    assert model.backbone.size_divisibility == 0
    assert {name: shape.stride for name, shape in model.backbone.output_shape().items()} == {
        "p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128
    }  # fmt: skip


def test_the_mask_iou_head():
    head = MaskIoUHead(80)
    assert sum(parameter.numel() for parameter in head.parameters()) == 108560
    sides = []
    for index in range(1, 6):
        getattr(head, f"conv{index}").register_forward_hook(lambda *args: sides.append(args[2].shape[-1]))
    ious = head(torch.rand(2, 138, 138))
    assert sides == [68, 33, 16, 7, 3] and ious.shape == (2, 80) and (ious >= 0).all()
    assert torch.equal(head.bfloat16()(torch.rand(2, 138, 138)).isfinite(), torch.ones(2, 80, dtype=torch.bool))


@pytest.mark.parametrize("variant", ["v1", "plus"])
def test_optimized_equals_the_model(variant, plus):
    model = plus if variant == "plus" else tiny_yolact(*ALL)
    optimized = optimize_for_inference(model)
    images = torch.randn((2, 3, model.side, model.side), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.network(images)
    for name, value in optimized.network(images).items():
        assert (value - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max(), name
    half = optimize_for_inference(model, precision="bfloat16")
    with torch.no_grad():
        assert len(half([random_input(50, 70)])[0]["instances"]) > 0


def test_openvino():
    pytest.importorskip("openvino", reason="the package openvino (extra 'openvino') is not installed")
    model = tiny_yolact()
    optimized = optimize_for_inference(model, engine="openvino")
    assert type(optimized._network).__name__ == "OpenVINONetwork"
    images = torch.randn((2, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.network(images)
    for output, value in optimized.network(images).items():
        assert (value - expected[output]).abs().max() <= 1e-3 * expected[output].abs().max(), output


def test_exported_at_its_size():
    model = tiny_yolact("INPUT.SQUARE_SIZE", 75)

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, images):
            return self.model.network(images)

    batch = {0: torch.export.Dim("batch", min=1, max=8)}
    exported = torch.export.export(Network(), (torch.randn(2, 3, 75, 75),), dynamic_shapes=(batch,)).module()
    images = torch.randn(3, 3, 75, 75)
    with torch.no_grad():
        expected, found = model.network(images), exported(images)
    for output, value in expected.items():
        assert torch.allclose(found[output], value, rtol=1e-4, atol=1e-5), output


def test_drawn_outputs_give_the_wanted_detections(plus):
    for model in (tiny_yolact("INPUT.SQUARE_SIZE", 128), plus):
        images = model.preprocess([random_input(256, 256)])
        with torch.no_grad():
            outputs = model.network(images.tensor)
            drawn = model.example_outputs(outputs, 8, 0.05)
            instances = model.postprocess(drawn, [{}], images)[0]["instances"]
        assert {name: value.shape for name, value in drawn.items()} == {name: v.shape for name, v in outputs.items()}
        assert len(instances) == 8
        assert 0.01 < instances.pred_masks.flatten(1).float().mean(1).median() < 0.2
        with pytest.raises(ValueError, match="this model can draw 0 to"):
            model.example_outputs(outputs, 100_000, 0.05)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("INPUT.SQUARE_SIZE", 0), "INPUT.SQUARE_SIZE is 0"),
        (("MODEL.YOLACT.MASK_IOU_ON", True), "INPUT.SQUARE_SIZE is 64.*need 63"),
        (("MODEL.YOLACT.NMS.TYPE", "soft"), "MODEL.YOLACT.NMS.TYPE is 'soft'"),
        (("MODEL.YOLACT.HEAD", "Mine"), "MODEL.YOLACT.HEAD is 'Mine'.*YOLACTHead"),
        (("MODEL.YOLACT.PROTOTYPE_NET.NAME", "Mine"), "PROTOTYPE_NET.NAME is 'Mine'.*ProtoNet"),
        (("MODEL.YOLACT.LOSS.NAME", "Mine"), "LOSS.NAME is 'Mine'.*YOLACTCriterion"),
        (("MODEL.YOLACT.MATCHER.IOU_THRESHOLDS", [0.5, 0.4]), "IOU_THRESHOLDS is"),
        (("MODEL.FPN.IN_FEATURES", ["res3", "res5"]), "MODEL.FPN.IN_FEATURES is .*twice the stride"),
        (("MODEL.YOLACT.ANCHOR_SIZES", [24, 48]), "MODEL.FPN.IN_FEATURES is .*at most 2"),
        (("MODEL.MASK_ON", False), "MODEL.MASK_ON is False"),
    ],
)
def test_refused_by_name(opts, message):
    with pytest.raises(ValueError, match=message):
        build_model(tiny_yolact_cfg(*opts))


def test_a_backbone_of_other_sizes_is_refused_by_name():
    model = tiny_yolact()
    with pytest.raises(ValueError, match="INPUT.SQUARE_SIZE 64 the backbone's features have other sides"):
        model.postprocess({"class_logits": torch.zeros(1, 5, 4)}, [{}], model.preprocess([random_input()]))


def test_a_registered_head_is_named_in_the_config():
    @YOLACT_HEAD_REGISTRY.register()
    class MyHead(YOLACTHead):
        pass

    try:
        assert type(tiny_yolact("MODEL.YOLACT.HEAD", "MyHead").head) is MyHead
    finally:
        del YOLACT_HEAD_REGISTRY._obj_map["MyHead"]


@pytest.mark.parametrize("opts", [(), PLUS])
def test_classes_of_a_checkpoint(opts):
    state = build_model(tiny_yolact_cfg(*opts)).state_dict()
    assert YOLACT.trained_keys(state) == {"MODEL.YOLACT.NUM_CLASSES": NUM_CLASSES}
    assert YOLACT.trained_keys({"res2.0.conv1.weight": torch.zeros(1)}) == {}


def test_autocast_of_the_caller_does_not_reach_boxes_and_masks():
    model = tiny_yolact(*ALL)
    images = model.preprocess([random_input(64, 96)])
    with torch.no_grad():
        outputs = model.network(images.tensor)
        expected = model.postprocess(outputs, [{}], images)[0]["instances"]
        with torch.autocast("cpu", torch.bfloat16):
            found = model.postprocess(outputs, [{}], images)[0]["instances"]
    assert torch.equal(found.scores, expected.scores) and torch.equal(found.pred_masks, expected.pred_masks)
