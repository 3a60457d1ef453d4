"""SOLO and SOLOv2 as Detectron2 models: inputs, outputs, keys, names, optimization, registries."""

import math

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, build_model

from sparseinst.modeling.solo import model as solo_model
from sparseinst.modeling.solo.dynamic_head import SOLOv2Head
from sparseinst.modeling.solo.heads import SOLO_HEAD_REGISTRY
from sparseinst.ops.coordinates import coordinate_channels
from sparseinst.runtime.optimize import optimize_for_inference
from sparseinst.structures.rle_masks import RLEMasks
from tests.modeling.solo.tiny_solo import VARIANTS, tiny_solo, tiny_solo_cfg
from tests.tiny_model import random_input

# Low, so that random weights give detections.
LOW = ("SCORE_THRESHOLD", 0.3)


def low(variant):
    node = f"MODEL.{VARIANTS[variant][0].upper()}"
    return f"{node}.{LOW[0]}", LOW[1]


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


def test_predictions(variant):
    model = tiny_solo(variant, *low(variant))
    inputs = [random_input(50, 70), {**random_input(64, 40, seed=1), "height": 128, "width": 80}]
    with torch.no_grad():
        results = model(inputs)
    for result, size in zip(results, [(50, 70), (128, 80)]):
        instances = result["instances"]
        assert instances.image_size == size and instances.pred_masks.shape == (len(instances), *size)
        assert len(instances) > 0 and instances.pred_masks.flatten(1).any(1).all()
        assert (instances.scores.diff() <= 0).all()
        boxes = instances.pred_boxes.tensor
        for mask, box in zip(instances.pred_masks, boxes):
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    with torch.no_grad(), model.output_as(mask_format="rle"):
        encoded = model(inputs)[1]["instances"].pred_masks
    assert isinstance(encoded, RLEMasks)
    assert torch.equal(torch.from_numpy(encoded.__array__()), results[1]["instances"].pred_masks)


def test_an_image_does_not_depend_on_its_batch(variant):
    model = tiny_solo(variant, *low(variant))
    first, second = random_input(64, 96), random_input(64, 96, seed=1)
    with torch.no_grad():
        alone, together = model([first])[0]["instances"], model([second, first])[1]["instances"]
    assert torch.allclose(alone.scores, together.scores, atol=1e-5)


def test_training_mode_changes_no_output(variant):
    """tests/parity compares the outputs of a training step, whose norms are as frozen as these."""
    model = tiny_solo(variant, "MODEL.RESNETS.NORM", "FrozenBN")
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = model.network(images), model.train().network(images)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_optimized_equals_the_model(variant):
    model = tiny_solo(variant)
    optimized = optimize_for_inference(model)
    for size in ((1, 3, 64, 96), (2, 3, 96, 64)):
        images = torch.randn(size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = model.network(images)
        for name, value in optimized.network(images).items():
            assert (value - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max(), name


@pytest.mark.parametrize("name", ["solo", "solov2"])
def test_openvino(name):
    pytest.importorskip("openvino", reason="the package openvino (extra 'openvino') is not installed")
    model = tiny_solo(name)
    optimized = optimize_for_inference(model, engine="openvino")
    assert type(optimized._network).__name__ == "OpenVINONetwork"
    images = torch.randn((2, 3, 96, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.network(images)
    for output, value in optimized.network(images).items():
        assert (value - expected[output]).abs().max() <= 1e-3 * expected[output].abs().max(), output


@pytest.mark.parametrize("name", ["solo", "decoupled", "solov2"])
def test_exported_for_other_sizes(name):
    model = tiny_solo(name)

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, images):
            return self.model.network(images)

    # The coarsest map is p6: a side of one pixel would be another graph.
    height, width = torch.export.Dim("height", min=3, max=64), torch.export.Dim("width", min=3, max=64)
    dynamic = ({0: torch.export.Dim("batch", min=1, max=8), 2: 32 * height, 3: 32 * width},)
    exported = torch.export.export(Network(), (torch.randn(2, 3, 128, 96),), dynamic_shapes=dynamic).module()
    for size in ((2, 3, 128, 96), (1, 3, 192, 128), (3, 3, 96, 160)):
        images = torch.randn(size)
        with torch.no_grad():
            expected, found = model.network(images), exported(images)
        for output, value in expected.items():
            assert torch.allclose(found[output], value, rtol=1e-4, atol=1e-5), output


def test_drawn_outputs_give_the_wanted_detections(variant):
    model = tiny_solo(variant)
    images = model.preprocess([random_input(256, 256)])
    with torch.no_grad():
        outputs = model.network(images.tensor)
        drawn = model.example_outputs(outputs, 8, 0.05)
        instances = model.postprocess(drawn, [{}], images)[0]["instances"]
    assert {name: value.shape for name, value in drawn.items()} == {name: v.shape for name, v in outputs.items()}
    assert len(instances) == 8
    shares = instances.pred_masks.flatten(1).float().mean(1)
    assert 0.01 < shares.median() < 0.2
    with pytest.raises(ValueError, match="this head can draw 0 to"):
        model.example_outputs(outputs, 1000, 0.05)


def test_coordinates_are_appended_x_first():
    coordinates = coordinate_channels(torch.zeros(1, 4, 2, 5))
    assert coordinates[0, 0].tolist() == [[-1, -0.5, 0, 0.5, 1]] * 2 and coordinates[0, 1, :, 0].tolist() == [-1, 1]


def test_initial_weights(variant):
    torch.manual_seed(0)
    model = build_model(tiny_solo_cfg(variant))
    prior = -math.log(99)
    assert torch.allclose(model.head.cate_pred.bias, torch.tensor(prior))
    assert model.head.cate_tower[0].weight.std().item() == pytest.approx(0.01, rel=0.1)
    if variant.startswith("solov2"):
        assert (model.head.kernel_pred.bias == 0).all()
    else:
        predictors = getattr(model.head, "mask_pred", None) or model.head.mask_pred_x
        assert torch.allclose(predictors[0].bias, torch.tensor(prior))


@pytest.mark.parametrize(
    ("name", "opts", "message"),
    [
        ("solo", ("MODEL.SOLO.NUM_GRIDS", [10, 8]), "MODEL.SOLO: each level needs one value"),
        ("solo", ("MODEL.SOLO.MASK_THRESHOLD", 45.0), "MODEL.SOLO.MASK_THRESHOLD is 45.0"),
        ("solov2", ("MODEL.SOLOV2.NMS.TYPE", "soft"), "MODEL.SOLOV2.NMS.TYPE is 'soft'"),
        ("solov2", ("MODEL.SOLOV2.NUM_CLASSES", 0), "MODEL.SOLOV2.NUM_CLASSES is 0"),
        ("solov2", ("MODEL.SOLOV2.HEAD", "Mine"), "MODEL.SOLOV2.HEAD is 'Mine'.*SOLOv2Head"),
        ("solov2", ("MODEL.SOLOV2.IN_FEATURES", ["p2", "p3", "p4", "p5", "p7"]), r"IN_FEATURES has \['p7'\]"),
        ("solo", ("MODEL.SOLO.SCALE_RANGES", [[9, 1]] * 5), "MODEL.SOLO.SCALE_RANGES"),
    ],
)
def test_refused_by_name(name, opts, message):
    with pytest.raises(ValueError, match=message):
        build_model(tiny_solo_cfg(name, *opts))


def test_a_registered_head_is_named_in_the_config():
    @SOLO_HEAD_REGISTRY.register()
    class MyHead(SOLOv2Head):
        pass

    try:
        model = build_model(tiny_solo_cfg("solov2", "MODEL.SOLOV2.HEAD", "MyHead"))
        assert type(model.head) is MyHead
    finally:
        del SOLO_HEAD_REGISTRY._obj_map["MyHead"]


def test_another_solov2_that_was_registered_first(monkeypatch, caplog):
    monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "SOLOv2", object)
    name = solo_model.SOLOv2.__name__
    try:
        solo_model._register_solov2()
        assert META_ARCH_REGISTRY.get("SOLOv2Segmenter") is solo_model.SOLOv2
        assert sum("SOLOv2Segmenter" in record.getMessage() for record in caplog.records) == 1
    finally:
        solo_model.SOLOv2.__name__ = name
        META_ARCH_REGISTRY._obj_map.pop("SOLOv2Segmenter", None)


def test_a_head_of_the_other_architecture_is_refused():
    for variant, key, head in (("solo", "MODEL.SOLO.HEAD", "SOLOv2Head"), ("solov2", "MODEL.SOLOV2.HEAD", "SOLOHead")):
        with pytest.raises(ValueError, match=f"{head} is not a head of SOLO"):
            build_model(tiny_solo_cfg(variant, key, head))


@pytest.mark.parametrize(
    ("features", "message"),
    [([], "it must be one or more"), (["p2", "p9"], "it must be one or more"), (["p2", "p4"], "each must be twice")],
)
def test_mask_features_that_do_not_fit(features, message):
    with pytest.raises(ValueError, match=rf"MASK_FEATURES.IN_FEATURES is .*{message}"):
        build_model(tiny_solo_cfg("solov2", "MODEL.SOLOV2.MASK_FEATURES.IN_FEATURES", features))


def test_images_are_padded_to_the_largest_stride():
    model = tiny_solo("solo", "MODEL.SOLO.STRIDES", [4, 8, 16, 32, 64]).train()
    losses = model([random_input(96, 160, num_instances=2)])
    assert model.preprocess([random_input(96, 160)]).tensor.shape[-2:] == (128, 192)
    assert all(loss.isfinite() for loss in losses.values())


def test_autocast_of_the_caller_does_not_reach_areas_and_overlaps(variant):
    model = tiny_solo(variant, *low(variant))
    images = model.preprocess([random_input(64, 96)])
    with torch.no_grad():
        outputs = model.network(images.tensor)
        expected = model.postprocess(outputs, [{}], images)[0]["instances"]
        with torch.autocast("cpu", torch.bfloat16):
            found = model.postprocess(outputs, [{}], images)[0]["instances"]
    assert torch.equal(found.scores, expected.scores) and torch.equal(found.pred_masks, expected.pred_masks)
