"""The published code's numbers, recorded with parameters, images and ground truth that filling.py makes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances

from sparseinst import add_sparse_inst_config, get_config_file
from sparseinst.ops.coordinates import append_coordinates
from tests.parity import filling
from tests.saved_model import no_random_weights

HERE = Path(__file__).parent
CONFIGS = sorted(path.stem for path in HERE.glob("*.json"))
ARCHITECTURES = sorted(path.stem for path in HERE.parent.joinpath("state_dicts").glob("*.txt"))
# The one architecture that has a config only with crop augmentation.
CONFIG_OF_ARCHITECTURE = {"sparse_inst_r50_dcn_giam": "sparse_inst_r50_dcn_giam_aug"}
# Image height, width; output height, width; instances.
IMAGES = [(150, 203, 120, 170, 5), (128, 160, 256, 320, 3)]
# Zero in theory; what is recorded is rounding noise.
ZERO_GRADIENTS_OF_SOFTMAX = ("decoder.inst_branch.iam_conv.bias", "decoder.inst_branch.softmax_bias")


def build(config):
    cfg = get_cfg()
    add_sparse_inst_config(cfg)
    cfg.merge_from_file(get_config_file(config))
    cfg.MODEL.DEVICE = "cpu"
    with no_random_weights():
        return build_model(cfg)


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
    recorded = json.loads((HERE / f"{request.param}.json").read_text())
    model = build(request.param)
    state = {
        name: torch.from_numpy(filling.tensor(name, tuple(value.shape), recorded["gain"]))
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    return model.eval(), recorded


def make_input(index):
    height, width, output_height, output_width, _ = IMAGES[index]
    image = torch.from_numpy(filling.image(index, height, width))
    return {"image": image, "height": output_height, "width": output_width}


def check_summary(name, tensor, recorded):
    values = tensor.double().flatten().numpy()
    assert list(values.shape) == recorded["shape"], name
    tolerance = 1e-3 * max(abs(recorded["mean"]), recorded["std"])
    samples = values[np.random.RandomState(7).randint(0, values.size, 24)]
    assert abs(values.mean() - recorded["mean"]) <= tolerance, name
    assert abs(values.std(ddof=1) - recorded["std"]) <= tolerance, name
    assert np.abs(samples - recorded["samples"]).max() <= tolerance, name


def test_sizes(case):
    model, recorded = case
    assert len(model.state_dict()) == recorded["num_tensors"]
    assert sum(parameter.numel() for parameter in model.parameters()) == recorded["num_parameters"]


def test_features(case):
    model, recorded = case
    with torch.no_grad():
        features = model.backbone(model.preprocess([make_input(0)]).tensor)
        encoded = model.encoder(features)
        mask_features = model.decoder.mask_branch(append_coordinates(encoded))
    assert set(features) == set(recorded["backbone"])
    for name, feature in features.items():
        check_summary(name, feature, recorded["backbone"][name])
    check_summary("encoder", encoded, recorded["encoder"])
    check_summary("mask features", mask_features, recorded["mask_features"])


def test_detections(case):
    model, recorded = case
    with torch.no_grad():
        instances = model([make_input(0)])[0]["instances"]
    record = recorded["detections"]
    # The published code keeps empty masks; ours drops them.
    rows = [row for row in zip(record["scores"], record["classes"], record["areas"]) if row[2] > 0]
    scores, classes, areas = map(np.array, zip(*rows))
    assert len(rows) > 20
    assert len(instances) >= len(rows)
    found = instances[: len(rows)]
    np.testing.assert_allclose(found.scores.numpy(), scores, rtol=1e-3)
    found_areas = found.pred_masks.sum((1, 2)).numpy()
    # Classes may swap where two scores tie.
    separate = np.r_[True, np.diff(scores) < -1e-5] & np.r_[np.diff(scores) < -1e-5, False]
    assert separate.sum() > 10
    np.testing.assert_array_equal(found.pred_classes.numpy()[separate], classes[separate])
    difference = np.abs(found_areas - areas)[separate]
    assert (difference <= np.maximum(3, 0.002 * areas[separate])).all()


def test_losses_and_gradients(case):
    model, recorded = case
    inputs = []
    for index, (height, width, _, _, count) in enumerate(IMAGES):
        classes, masks = filling.ground_truth(index, height, width, count)
        instances = Instances(
            (height, width), gt_classes=torch.from_numpy(classes), gt_masks=BitMasks(torch.from_numpy(masks))
        )
        inputs.append({**make_input(index), "instances": instances})
    model.train()
    for child in model.children():
        child.eval()
    model.zero_grad()
    losses = model(inputs)
    model.eval()
    assert set(losses) == set(recorded["losses"])
    for name, value in recorded["losses"].items():
        assert losses[name].item() == pytest.approx(value, rel=1e-3), name

    sum(losses.values()).backward()
    parameters = dict(model.named_parameters())
    assert len(recorded["grad_norms"]) > 40
    for name, value in recorded["grad_norms"].items():
        if hasattr(model.decoder.inst_branch, "softmax_bias") and name in ZERO_GRADIENTS_OF_SOFTMAX:
            continue
        assert parameters[name].grad.norm().item() == pytest.approx(value, rel=5e-3), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_state_dict_is_the_published_one(architecture):
    published = (HERE.parent / "state_dicts" / f"{architecture}.txt").read_text().splitlines()
    ours = [
        f"{name} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
        for name, value in build(CONFIG_OF_ARCHITECTURE.get(architecture, architecture)).state_dict().items()
    ]
    assert sorted(ours) == sorted(line for line in published if line)


def test_all_records_are_there():
    assert len(CONFIGS) == 6 and len(ARCHITECTURES) == 13
