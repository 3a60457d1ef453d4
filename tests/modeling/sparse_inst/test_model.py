"""The meta-architecture: what goes in, what comes out, and what is refused."""

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from detectron2.structures import BitMasks, Instances, PolygonMasks
from detectron2.utils.registry import Registry

from sparseinst.modeling.sparse_inst.criterion import SPARSE_INST_CRITERION_REGISTRY
from sparseinst.modeling.sparse_inst.decoder import SPARSE_INST_DECODER_REGISTRY, GroupIAMDecoder
from sparseinst.modeling.sparse_inst.encoder import SPARSE_INST_ENCODER_REGISTRY
from sparseinst.modeling.sparse_inst.matcher import SPARSE_INST_MATCHER_REGISTRY
from sparseinst.modeling.sparse_inst.postprocessing import detect
from sparseinst.ops.mask_output import MaskMemoryError
from sparseinst.structures.gt_masks import gt_masks_tensor
from sparseinst.structures.rle_masks import RLEMasks
from tests.tiny_model import random_input, tiny_cfg, tiny_model

LOSSES = {"loss_ce", "loss_objectness", "loss_dice", "loss_mask"}
DECODERS = ["BaseIAMDecoder", "GroupIAMDecoder", "GroupIAMSoftDecoder"]


def check_prediction(instances, size):
    assert instances.image_size == size
    count = len(instances)
    assert instances.pred_boxes.tensor.shape == (count, 4)
    assert instances.pred_masks.shape == (count, *size) and instances.pred_masks.dtype == torch.bool
    assert instances.scores.shape == (count,) and (instances.scores.diff() <= 0).all()
    assert instances.pred_classes.shape == (count,) and instances.pred_classes.dtype == torch.int64
    assert instances.pred_masks.flatten(1).any(1).all()
    assert torch.equal(instances.pred_boxes.tensor, BitMasks(instances.pred_masks).get_bounding_boxes().tensor)


@pytest.mark.parametrize("decoder", DECODERS)
def test_predictions(decoder):
    model = tiny_model("MODEL.SPARSE_INST.DECODER.NAME", decoder)
    inputs = [{**random_input(50, 70), "height": 100, "width": 33}, random_input(64, 31, seed=1)]
    with torch.no_grad():
        results = model(inputs)
    check_prediction(results[0]["instances"], (100, 33))
    check_prediction(results[1]["instances"], (64, 31))
    assert len(results[0]["instances"]) > 1


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_parameter_is_trained(decoder):
    torch.manual_seed(0)
    model = build_model(tiny_cfg("MODEL.SPARSE_INST.DECODER.NAME", decoder)).train()
    losses = model([random_input(num_instances=3), random_input(40, 80, num_instances=2, seed=1)])
    assert set(losses) == LOSSES
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        if not name.endswith("softmax_bias"):
            assert (parameter.grad != 0).any(), name


@pytest.mark.parametrize("counts", [(0, 0), (0, 2), (9, 1)])
def test_images_without_instances_and_with_more_than_masks(counts):
    model = tiny_model().train()
    inputs = [random_input(num_instances=count, seed=i) for i, count in enumerate(counts)]
    for x in inputs:
        if len(x["instances"]) == 0:
            x["instances"].remove("gt_masks")  # as Detectron2's mapper leaves it
    losses = model(inputs)
    sum(losses.values()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_nothing_found_has_all_fields():
    model = tiny_model("MODEL.SPARSE_INST.CLS_THRESHOLD", 1.0)
    instances = model([random_input()])[0]["instances"]
    assert len(instances) == 0
    check_prediction(instances, (50, 70))


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (33, 32), (31, 1)])
def test_odd_sizes(size):
    model = tiny_model()
    with torch.no_grad():
        check_prediction(model([random_input(*size)])[0]["instances"], size)


def test_preprocessing_normalises_then_pads_with_zeros():
    model = tiny_model()
    x = random_input(50, 70)
    images = model.preprocess([x, random_input(20, 97, seed=1)])
    assert images.tensor.shape == (2, 3, 64, 128)
    assert images.image_sizes == [(50, 70), (20, 97)]
    mean, std = model.pixel_mean, model.pixel_std
    torch.testing.assert_close(images.tensor[0, :, :50, :70], (x["image"] - mean) / std)
    assert (images.tensor[0, :, 50:] == 0).all() and (images.tensor[0, :, :, 70:] == 0).all()


def test_targets_are_padded_then_reduced():
    model = tiny_model().train()
    x = random_input(50, 70)
    masks = torch.zeros(2, 50, 70, dtype=torch.bool)
    masks[0, :4, :8] = True  # one cell high, two wide
    masks[1, 1:3, 1:2] = True  # of the cell's four central pixels one column: a half
    x["instances"] = Instances((50, 70), gt_classes=torch.tensor([1, 2]), gt_masks=BitMasks(masks))
    (targets,) = model.prepare_targets([x], model.preprocess([x]))
    assert targets.gt_masks.shape == (2, 16, 24)
    expected = torch.zeros(2, 16, 24)
    expected[0, 0, :2] = 1
    expected[1, 0, 0] = 0.5
    torch.testing.assert_close(targets.gt_masks, expected)
    assert targets.gt_classes.tolist() == [1, 2]


def test_antialiased_targets_are_the_share_of_each_cell():
    model = tiny_model("MODEL.SPARSE_INST.ANTIALIASED_TARGETS", True).train()
    x = random_input(50, 70)
    masks = torch.zeros(2, 50, 70, dtype=torch.bool)
    masks[0, 0, 0] = True  # one of the cell's sixteen pixels, at its corner: bilinearly nothing
    masks[1, 2:6, 4:8] = True  # half of a cell, and half of the one below
    x["instances"] = Instances((50, 70), gt_classes=torch.tensor([1, 2]), gt_masks=BitMasks(masks))
    (targets,) = model.prepare_targets([x], model.preprocess([x]))
    expected = torch.zeros(2, 16, 24)
    expected[0, 0, 0] = 1 / 16
    expected[1, :2, 1] = 0.5
    torch.testing.assert_close(targets.gt_masks, expected)


def test_ground_truth_of_any_type():
    polygons = [[np.array([10.0, 10.0, 30.0, 10.0, 30.0, 20.0, 10.0, 20.0])]]
    instances = Instances((50, 70), gt_classes=torch.tensor([0]), gt_masks=PolygonMasks(polygons))
    expected = torch.zeros(1, 50, 70, dtype=torch.bool)
    expected[0, 10:20, 10:30] = True
    assert torch.equal(gt_masks_tensor(instances), expected)
    for masks in (BitMasks(expected), expected, expected.float()):
        instances.gt_masks = masks
        assert torch.equal(gt_masks_tensor(instances).bool(), expected)
    empty = Instances((50, 70), gt_classes=torch.zeros(0, dtype=torch.int64))
    assert gt_masks_tensor(empty).shape == (0, 50, 70)
    empty.gt_masks = PolygonMasks([])
    assert gt_masks_tensor(empty).shape == (0, 50, 70)


def test_ground_truth_that_is_refused():
    instances = Instances((50, 70), gt_classes=torch.tensor([0]))
    with pytest.raises(ValueError, match="MODEL.MASK_ON"):
        gt_masks_tensor(instances)
    instances.gt_masks = torch.zeros(1, 25, 70)
    with pytest.raises(ValueError, match="25, 70"):
        gt_masks_tensor(instances)
    instances.gt_masks = [[1]]
    with pytest.raises(ValueError, match="list"):
        gt_masks_tensor(instances)


def test_activation_maps_of_the_kept_instances():
    model = tiny_model("MODEL.SPARSE_INST.DECODER.OUTPUT_IAM", True)
    x = random_input(50, 70)
    with torch.no_grad():
        instances = model([x])[0]["instances"]
        outputs = model.network(model.preprocess([x]).tensor)
    # Two groups; the mask grid of 64x96 is 16x24, of which the image covers 13x18 cells.
    assert instances.pred_iams.shape == (len(instances), 2, 13, 18)
    maps = outputs["pred_iam"][0].unflatten(0, (2, 6)).transpose(0, 1)[..., :13, :18]
    detections = detect(
        outputs["pred_logits"][0], outputs["pred_scores"][0, :, 0], outputs["pred_masks"][0],
        padded_size=(64, 96), image_size=(50, 70), output_size=(50, 70),
        cls_threshold=0.005, mask_threshold=0.45, max_detections=100,
    )  # fmt: skip
    assert detections.prediction_idx.tolist() != sorted(detections.prediction_idx.tolist())
    assert torch.equal(instances.pred_iams, maps[detections.prediction_idx])
    assert not tiny_model()([x])[0]["instances"].has("pred_iams")


def test_a_batch_of_one_size_gives_what_each_image_gives():
    model = tiny_model()
    inputs = [random_input(seed=i) for i in range(3)]
    with torch.no_grad():
        together = model(inputs)
        for x, result in zip(inputs, together):
            alone, instances = model([x])[0]["instances"], result["instances"]
            torch.testing.assert_close(alone.scores, instances.scores)
            assert torch.equal(alone.pred_masks, instances.pred_masks)


def test_encoded_masks_are_the_boolean_ones():
    inputs = [{**random_input(50, 70), "height": 100, "width": 33}, random_input(64, 31, seed=1)]
    plain, encoded = tiny_model(), tiny_model("MODEL.OUTPUT.MASK_FORMAT", "rle")
    with torch.no_grad():
        for expected, found in zip(plain(inputs), encoded(inputs)):
            expected, found = expected["instances"], found["instances"]
            assert isinstance(found.pred_masks, RLEMasks) and found.pred_masks.image_size == expected.image_size
            assert len(found) > 1 and np.array_equal(np.asarray(found.pred_masks), expected.pred_masks.numpy())
            assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
            assert torch.equal(found.scores, expected.scores)
        nothing = tiny_model("MODEL.OUTPUT.MASK_FORMAT", "rle", "MODEL.SPARSE_INST.CLS_THRESHOLD", 1.0)(inputs)[0][
            "instances"
        ]
    assert len(nothing) == 0 and len(nothing.pred_masks) == 0


def test_boolean_masks_beyond_the_limit_are_refused_by_name():
    # 6 masks of 1000 x 1000 pixels are 0.0056 GiB.
    x = {**random_input(), "height": 1000, "width": 1000}
    with torch.no_grad():
        assert len(tiny_model("MODEL.OUTPUT.MAX_MASK_GIB", 0.0057)([x])[0]["instances"]) == 6
        model = tiny_model("MODEL.OUTPUT.MAX_MASK_GIB", 0.005)
        with pytest.raises(MaskMemoryError, match="^6 boolean masks of 1000x1000.*MAX_MASK_GIB"):
            model([x])
        with pytest.raises(MaskMemoryError, match="^large.jpg: 6 boolean masks"):
            model([{**x, "file_name": "large.jpg"}])
        # Encoded masks are within the limit until all of them are decoded at once.
        with model.output_as(mask_format="rle"):
            masks = model([x])[0]["instances"].pred_masks
        assert len(list(masks)) == 6
        with pytest.raises(MaskMemoryError, match="^6 boolean masks of 1000x1000.*MAX_MASK_GIB"):
            np.asarray(masks)


def test_another_mask_format_is_refused():
    with pytest.raises(ValueError, match="MODEL.OUTPUT.MASK_FORMAT is 'polygon'.*'bitmask', 'rle'"):
        tiny_model("MODEL.OUTPUT.MASK_FORMAT", "polygon")


def test_inputs_are_not_changed():
    model = tiny_model().train()
    x = random_input(num_instances=2)
    image, masks = x["image"].clone(), x["instances"].gt_masks.tensor.clone()
    keys = set(x)
    model([x])
    model.eval()([x])
    assert set(x) == keys and torch.equal(x["image"], image) and torch.equal(x["instances"].gt_masks.tensor, masks)


def test_the_losses_of_parts_add_up_to_those_of_the_whole():
    # Norms with batch statistics tie the images of a batch together, so without them.
    model = tiny_model("MODEL.RESNETS.NORM", "FrozenBN").train()
    inputs = [random_input(num_instances=count, seed=count) for count in (1, 4, 2)]
    whole = model(inputs)
    batches = [inputs[:1], inputs[1:]]
    parts = [model(batch, part) for batch, part in zip(batches, model.prepare_parts(batches))]
    for name in LOSSES:
        torch.testing.assert_close(parts[0][name] + parts[1][name], whole[name])
    # A user's decoder need not say how many masks it predicts.
    expected = [dict(part.counts) for part in model.prepare_parts(batches)]
    model.decoder, scale_factor = torch.nn.Sequential(model.decoder), model.decoder.scale_factor
    model.decoder.scale_factor = scale_factor
    assert [part.counts for part in model.prepare_parts(batches)] == expected


def test_pixel_statistics_follow_the_model_and_stay_out_of_checkpoints():
    model = tiny_model()
    assert not any("pixel" in name for name in model.state_dict())
    assert model.to(torch.float64).pixel_mean.dtype == torch.float64
    assert model.device == torch.device("cpu")


def test_norms_in_the_head():
    model = tiny_model(
        "MODEL.SPARSE_INST.ENCODER.NORM", "GN",
        "MODEL.SPARSE_INST.ENCODER.NUM_CHANNELS", 32,
        "MODEL.SPARSE_INST.DECODER.NORM", "GN",
        "MODEL.SPARSE_INST.DECODER.INST.DIM", 32,
        "MODEL.SPARSE_INST.DECODER.MASK.DIM", 32,
    ).train()  # fmt: skip
    sum(model([random_input(num_instances=2)]).values()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_mask_on_false_is_refused_by_name():
    with pytest.raises(ValueError, match="MODEL.MASK_ON"):
        build_model(tiny_cfg("MODEL.MASK_ON", False))


def test_features_that_the_backbone_does_not_give():
    with pytest.raises(ValueError, match="ENCODER.IN_FEATURES.*RESNETS.OUT_FEATURES"):
        build_model(tiny_cfg("MODEL.SPARSE_INST.ENCODER.IN_FEATURES", ["res3", "res5"]))


def test_two_keys_beside_the_defaults_build_a_model():
    from detectron2.config import get_cfg

    from sparseinst import add_sparse_inst_config

    cfg = get_cfg()
    add_sparse_inst_config(cfg)
    cfg.merge_from_list(["MODEL.META_ARCHITECTURE", "SparseInst", "MODEL.DEVICE", "cpu"])
    cfg.merge_from_list(["MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"]])
    model = build_model(cfg)
    assert model.decoder.inst_branch.fc is None and model.decoder.mask_branch.projection.out_channels == 128


class _StridedBackbone(Backbone):
    def __init__(self):
        super().__init__()
        self.convs = torch.nn.ModuleList(torch.nn.Conv2d(3, 8, 1, stride=stride) for stride in (5, 10, 20, 40))

    @property
    def size_divisibility(self):
        return 40

    def output_shape(self):
        return {f"c{i}": ShapeSpec(channels=8, stride=5 * 2**i) for i in range(4)}

    def forward(self, images):
        return {f"c{i}": conv(images) for i, conv in enumerate(self.convs)}


@pytest.mark.parametrize("num_levels", [2, 3, 4])
def test_any_backbone(num_levels, monkeypatch):
    monkeypatch.setattr(BACKBONE_REGISTRY, "_obj_map", dict(BACKBONE_REGISTRY._obj_map))
    BACKBONE_REGISTRY.register()(_build_strided := type("Strided", (), {"__new__": lambda cls, *_: _StridedBackbone()}))
    model = tiny_model(
        "MODEL.BACKBONE.NAME", _build_strided.__name__,
        "MODEL.SPARSE_INST.ENCODER.IN_FEATURES", [f"c{i}" for i in range(num_levels)],
    )  # fmt: skip
    with torch.no_grad():
        images = model.preprocess([random_input(50, 70)])
        assert images.tensor.shape[-2:] == (160, 160)  # a multiple of 32 and of 40
        check_prediction(model([random_input(50, 70)])[0]["instances"], (50, 70))
    sum(model.train()([random_input(num_instances=2)]).values()).backward()


@pytest.mark.parametrize(
    ("registry", "key", "base"),
    [
        (SPARSE_INST_ENCODER_REGISTRY, "ENCODER.NAME", "InstanceContextEncoder"),
        (SPARSE_INST_DECODER_REGISTRY, "DECODER.NAME", "GroupIAMDecoder"),
        (SPARSE_INST_MATCHER_REGISTRY, "MATCHER.NAME", "SparseInstMatcher"),
        (SPARSE_INST_CRITERION_REGISTRY, "LOSS.NAME", "SparseInstCriterion"),
    ],
)
def test_users_register_their_own(registry: Registry, key, base):
    name = f"My{base}"
    if name not in registry:
        registry.register(type(name, (registry.get(base),), {}))
    model = build_model(tiny_cfg(f"MODEL.SPARSE_INST.{key}", name))
    parts = (model.encoder, model.decoder, model.criterion.matcher, model.criterion)
    assert name in [type(part).__name__ for part in parts]


def test_published_paths():
    model = tiny_model()
    assert isinstance(model.decoder, GroupIAMDecoder)
    for path in ("backbone", "encoder", "decoder.inst_branch", "decoder.mask_branch", "criterion"):
        assert isinstance(model.get_submodule(path), torch.nn.Module)
