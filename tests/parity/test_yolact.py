"""The published code's numbers of YOLACT and YOLACT++; record.py computes ours from the same formulas."""

import json
from pathlib import Path

import pytest

from tests.parity.record import record
from tests.parity.summary import check_summaries

HERE = Path(__file__).parent / "yolact"
CONFIGS = {
    "yolact_r50": "yolact/yolact_resnet50",
    "yolact_darknet53": "yolact/yolact_darknet53",
    "yolact_plus_r50": "yolact/yolact_plus_resnet50",
}
# Detections of the published code that are compared, and how many of them may lack a twin.
COMPARED, MOST_MISSED = 60, 1


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
    """Return what is recorded of the published code, and our numbers."""
    return json.loads((HERE / f"{request.param}.json").read_text()), record(CONFIGS[request.param])


def test_every_key_is_recorded(case):
    expected, found = case
    assert expected.keys() - found.keys() == {"model", "largest_mask_logit", "input_by_interpolate_differs"}
    for key in ("size", "num_tensors", "parameters", "candidates", "output_size", "variants", "num_positive"):
        assert found[key] == expected[key], key
    assert found["num_hard_negative"] == expected["num_hard_negative"]


@pytest.mark.parametrize(
    "name",
    ["input", "backbone", "fpn", "prototypes", "class_probs", "box_deltas", "coefficients", "class_logits",
     "sem_seg_logits"],
)  # fmt: skip
def test_features_and_outputs(case, name):
    expected, found = case
    check_summaries(name, expected[name], found[name])


@pytest.mark.parametrize("name", ["backbone_batch_norm_training", "stem_statistics_after_one_step"])
def test_statistics_of_the_batch(case, name):
    expected, found = case
    check_summaries(name, expected[name], found[name], relative=1e-2)


def test_priors(case):
    expected, found = (each["priors"] for each in case)
    for key in ("count", "per_cell", "feature_sizes", "starts", "rows"):
        assert found[key] == expected[key], key
    for ours, theirs in zip(found["cx_cy_w_h"], expected["cx_cy_w_h"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)
    check_summaries("priors", expected["summary"], found["summary"])


def test_matching(case):
    for theirs, ours in zip(*(each["matching"] for each in case), strict=True):
        assert ours.keys() == theirs.keys()
        for key in theirs.keys() - {"box_targets", "forced_below_threshold"}:
            assert ours[key] == theirs[key], key
        check_summaries("box_targets", theirs["box_targets"], ours["box_targets"])
        for ours_forced, forced in zip(ours["forced_below_threshold"], theirs["forced_below_threshold"], strict=True):
            assert ours_forced == pytest.approx(forced, rel=1e-4)


def test_losses_and_gradients(case):
    expected, found = case
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-3)
    assert found["losses_first_10_masks"] == pytest.approx(expected["losses_first_10_masks"], rel=1e-3)
    norms = {"all": expected["grad_norms"], **expected["grad_norms_by_loss"]}
    ours = {"all": found["grad_norms"], **found["grad_norms_by_loss"]}
    assert norms.keys() == ours.keys()
    for loss, of_loss in norms.items():
        assert of_loss.keys() == ours[loss].keys(), loss
        for name, norm in of_loss.items():
            if norm >= 1e-5:
                assert ours[loss][name] == pytest.approx(norm, rel=5e-3), (loss, name)


@pytest.mark.parametrize("variant", ["published", "low", "strict", "strict_second_threshold", "cross_class", "greedy"])
def test_detections(case, variant):
    recorded, ours = (each["detections"][variant] for each in case)
    height, width = case[0]["output_size"]
    # We drop empty masks and clip boxes.
    kept = [index for index, area in enumerate(recorded["areas"]) if area > 0]
    if recorded["count"] == len(recorded["areas"]):
        assert abs(len(kept) - ours["count"]) <= MOST_MISSED
    missed = sum(not has_twin(recorded, index, ours, height, width) for index in kept[:COMPARED])
    assert missed <= MOST_MISSED


def has_twin(recorded, index, ours, height, width):
    """Return whether we found a detection of the published code: the same class, scores, area and box."""
    fields = ["scores", "mask_scores"] if "mask_scores" in recorded else ["scores"]
    area = recorded["areas"][index]
    box = [min(max(value, 0), side) for value, side in zip(recorded["boxes"][index], (width, height) * 2)]
    return any(
        recorded["classes"][index] == ours["classes"][twin]
        and all(abs(recorded[field][index] - ours[field][twin]) <= 1e-3 for field in fields)
        and abs(area - ours["areas"][twin]) <= max(4, 0.01 * area)
        and max(abs(x - y) for x, y in zip(box, ours["boxes"][twin])) <= 0.3
        for twin in range(len(ours["areas"]))
    )
