"""The base class of the models: options of the output, parts of a training step, and what a subclass implements."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from sparseinst.modeling.meta_arch import InstanceSegmenter, OutputOptions
from sparseinst.runtime.optimize import optimize_for_inference
from sparseinst.structures.rle_masks import RLEMasks
from tests.tiny_model import random_input, tiny_cfg, tiny_model

METHODS = ("network", "prepare_targets", "loss_counts", "losses", "postprocess")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def segmenter(backbone=None, **arguments):
    """Return a model whose methods do nothing."""
    own = type("Own", (InstanceSegmenter,), {name: lambda self, *args: {} for name in METHODS})
    result = own(**{"pixel_mean": [1.0, 2.0, 3.0], "pixel_std": [2.0, 2.0, 4.0], **arguments})
    if backbone is not None:
        result.backbone = backbone
    return result


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"mask_format": "polygon"}, "MODEL.OUTPUT.MASK_FORMAT is 'polygon'"),
        ({"max_mask_gib": 0}, "MODEL.OUTPUT.MAX_MASK_GIB is 0"),
        ({"max_mask_gib": float("nan")}, "MODEL.OUTPUT.MAX_MASK_GIB is nan"),
        ({"score_threshold": -0.1}, "MODEL.OUTPUT.SCORE_THRESHOLD is -0.1"),
        ({"score_threshold": 1.5}, "MODEL.OUTPUT.SCORE_THRESHOLD is 1.5"),
        ({"score_threshold": float("nan")}, "MODEL.OUTPUT.SCORE_THRESHOLD is nan"),
    ],
)
def test_options_out_of_range(model, options, key):
    with pytest.raises(ValueError, match=key):
        OutputOptions(**options)
    before = model.output
    with pytest.raises(ValueError, match=key), model.output_as(**options):
        pass
    assert model.output is before


def test_options_of_the_config():
    cfg = tiny_cfg(
        "MODEL.OUTPUT.MASK_FORMAT", "rle", "MODEL.OUTPUT.MAX_MASK_GIB", 2.0, "MODEL.OUTPUT.SCORE_THRESHOLD", 0.5
    )
    assert OutputOptions.from_config(cfg) == OutputOptions("rle", 2.0, 0.5, False)
    assert OutputOptions.from_config(tiny_cfg(), with_maps=True) == OutputOptions(with_maps=True)


def test_changed_options_are_restored_after_an_exception(model):
    before = model.output
    with pytest.raises(KeyError), model.output_as(score_threshold=0.5), model.output_as(mask_format="rle"):
        assert model.output == OutputOptions("rle", score_threshold=0.5)
        raise KeyError
    assert model.output is before


def test_changed_options_reach_an_optimized_model_and_not_the_original(model):
    optimized = optimize_for_inference(model)
    x = [random_input()]
    with optimized.output_as(mask_format="rle", with_maps=True), torch.no_grad():
        assert optimized.output.mask_format == "rle" and model.output == OutputOptions()
        instances = optimized(x)[0]["instances"]
        assert isinstance(instances.pred_masks, RLEMasks) and instances.has("pred_iams") and len(instances)
    instances = optimized(x)[0]["instances"]
    assert isinstance(instances.pred_masks, torch.Tensor) and not instances.has("pred_iams")


@pytest.mark.parametrize("missing", METHODS)
def test_every_method_has_to_be_implemented(missing):
    own = type("Own", (InstanceSegmenter,), {name: lambda self: None for name in METHODS if name != missing})
    with pytest.raises(TypeError, match=missing):
        own(pixel_mean=[0.0], pixel_std=[1.0])


@pytest.mark.parametrize(("mean", "std"), [([0.0, 0.0], [1.0]), ([0.0, 0.0], [1.0, 0.0])])
def test_pixel_statistics_that_do_not_fit(mean, std):
    with pytest.raises(ValueError, match=r"MODEL.PIXEL_MEAN .* MODEL.PIXEL_STD"):
        segmenter(pixel_mean=mean, pixel_std=std)


def test_images_are_normalized_then_padded_for_model_and_backbone():
    backbone = nn.Identity()
    backbone.size_divisibility = 12
    model = segmenter(backbone, size_divisibility=8)
    images = model.preprocess([{"image": torch.full((3, 5, 30), 5)}, {"image": torch.full((3, 7, 7), 5)}])
    assert images.image_sizes == [(5, 30), (7, 7)] and images.tensor.shape == (2, 3, 24, 48)
    # (5 - mean) / std of each channel.
    assert images.tensor[0, :, 4, 29].tolist() == [2.0, 1.5, 0.5]
    assert images.tensor[0, :, 5:].abs().sum() == 0 and images.tensor[0, :, :, 30:].abs().sum() == 0
    backbone.padding_constraints = {"square_size": 96}
    assert model.preprocess([{"image": torch.zeros(3, 5, 30)}]).tensor.shape == (1, 3, 96, 96)


def test_every_part_has_the_counts_of_all(model):
    batches = [[random_input(64, 64, 2)], [random_input(64, 64, 9, seed=1), random_input(64, 64, 0, seed=2)]]
    parts = model.prepare_parts(batches)
    # The tiny model has six masks, so that at most six of the nine instances are matched.
    assert [{name: int(count) for name, count in part.counts.items()} for part in parts] == [
        {"num_instances": 11, "num_matched": 8}
    ] * 2
    assert [len(part.targets) for part in parts] == [1, 2]
    assert [part.images.tensor.shape for part in parts] == [(1, 3, 64, 64), (2, 3, 64, 64)]


def test_a_part_is_not_prepared_again(model, monkeypatch):
    trained = copy.deepcopy(model).train()
    batch = [random_input(64, 64, 2)]
    (part,) = trained.prepare_parts([batch])
    expected = trained(batch)
    for name in ("preprocess", "prepare_targets"):
        monkeypatch.setattr(trained, name, None)
    losses = trained(batch, part)
    assert all(torch.allclose(losses[name], value) for name, value in expected.items())


def test_the_training_network_runs_only_with_gradients(model):
    trained = copy.deepcopy(model).train()
    calls = []

    def network(images):
        calls.append(len(images))
        return trained.network(images)

    trained.set_training_network(network)
    batch = [random_input(64, 64, 2)]
    trained(batch)
    assert calls == [1]
    with torch.no_grad():
        trained(batch)
        trained.eval()(batch)
    assert calls == [1]


@pytest.mark.parametrize("mask_format", ["bitmask", "rle"])
def test_a_score_threshold_equals_filtering_afterwards(model, mask_format):
    x = [random_input(50, 70, seed=3)]
    with torch.no_grad(), model.output_as(mask_format=mask_format):
        everything = model(x)[0]["instances"]
        threshold = float(everything.scores[len(everything) // 2])
        with model.output_as(score_threshold=threshold):
            found = model(x)[0]["instances"]
    expected = everything[everything.scores > threshold]
    assert 0 < len(expected) < len(everything)
    assert torch.equal(found.scores, expected.scores) and torch.equal(found.pred_classes, expected.pred_classes)
    assert np.array_equal(np.asarray(found.pred_masks), np.asarray(expected.pred_masks))
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
