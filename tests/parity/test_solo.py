"""The published code's numbers of SOLO, Decoupled SOLO and SOLOv2; record.py computes ours from the same formulas."""

import json
from pathlib import Path

import pytest

from tests.parity.record import record
from tests.parity.summary import check_summaries

HERE = Path(__file__).parent / "solo"
CONFIGS = {
    "solo_r50": "solo/solo_r50_3x",
    "decoupled_solo_r50": "solo/decoupled_solo_r50_3x",
    "solov2_r50": "solov2/solov2_r50_3x",
    "solov2_light_512_dcn_r50": "solov2/solov2_light_512_dcn_r50_3x",
}


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
    """Return what is recorded of the published code, and our numbers."""
    return json.loads((HERE / f"{request.param}.json").read_text()), record(CONFIGS[request.param])


def test_sizes(case):
    expected, found = case
    assert found["num_tensors"] == expected["num_tensors"]
    assert found["parameters"] == expected["parameters"]


def test_features_and_outputs(case):
    expected, found = case
    names = [
        name
        for name in ("fpn", "cate_logits", "mask_logits", "mask_logits_x", "mask_logits_y", "kernels", "mask_features")
        if name in expected
    ]
    assert len(names) >= 3
    for name in names:
        check_summaries(name, expected[name], found[name])


def test_targets(case):
    expected, found = case
    assert found["num_positive"] == expected["num_positive"]
    for expected_levels, found_levels in zip(expected["targets"], found["targets"], strict=True):
        for expected_level, found_level in zip(expected_levels, found_levels, strict=True):
            for key in ("cells", "categories", "unique"):
                assert found_level[key] == expected_level[key], key
            assert found_level["mask_sums"] == pytest.approx(expected_level["mask_sums"], abs=1, rel=0)


def test_losses_and_gradients(case):
    expected, found = case
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-3)
    assert found["grad_norms"].keys() == expected["grad_norms"].keys()
    for name, norm in expected["grad_norms"].items():
        if norm >= 1e-3:
            assert found["grad_norms"][name] == pytest.approx(norm, rel=5e-3), name


@pytest.mark.parametrize("thresholds", ["published", "low", "linear"])
def test_detections(case, thresholds):
    expected, found = case
    assert found["candidates"][thresholds] == expected["candidates"][thresholds]
    for recorded, ours in zip(expected["detections"][thresholds], found["detections"][thresholds], strict=True):
        kept = [index for index, area in enumerate(recorded["areas"]) if area > 0]
        assert len(kept) == ours["count"] or recorded["count"] == len(kept) == 100
        missed = sum(not has_twin(recorded, index, ours) for index in kept[:30])
        assert missed <= 2


def has_twin(recorded, index, ours):
    """Return whether we found a detection of the published code: the same class, score, area and box."""
    score, category, area, box = (recorded[name][index] for name in ("scores", "classes", "areas", "boxes"))
    return any(
        category == our_category
        and abs(score - our_score) <= 2e-4
        and abs(area - our_area) <= max(3, 0.002 * area)
        and max(abs(x - y) for x, y in zip(box, our_box)) <= 2
        for our_score, our_category, our_area, our_box in zip(
            *(ours[n] for n in ("scores", "classes", "areas", "boxes"))
        )
    )
