import math

import pytest
import torch

from sparseinst.runtime.output_difference import relative_differences


def outputs(num=20):
    generator = torch.Generator().manual_seed(0)
    return {
        "scores": torch.randn(2, num, 1, generator=generator),
        "masks": 10 * torch.randn(2, num, 8, 12, generator=generator),
    }


def test_differences_by_hand():
    expected = {"a": torch.tensor([[1.0, -4.0]]), "zeros": torch.zeros(1, 2)}
    found = {"a": torch.tensor([[1.0, -3.0]]), "zeros": torch.tensor([[0.0, 0.5]])}
    assert relative_differences(found, expected, False, "float32") == {"a": 0.25, "zeros": 0.5}


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16", "int8"])
def test_ranked_instances_are_compared_in_any_order(precision):
    expected = outputs()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    found = {name: value[:, order] for name, value in expected.items()}
    assert max(relative_differences(found, expected, True, precision).values()) == 0
    assert min(relative_differences(found, expected, False, precision).values()) > 0.1


@pytest.mark.parametrize(("precision", "allowed"), [("float32", 1), ("float16", 10), ("bfloat16", 18)])
def test_only_some_instances_may_be_others(precision, allowed):
    expected = outputs()
    for number, is_equal in ((allowed, True), (allowed + 1, False)):
        found = {name: value.clone() for name, value in expected.items()}
        found["masks"][1, :number] *= -1
        worst = max(relative_differences(found, expected, True, precision).values())
        assert worst == 0 if is_equal else worst > 0.1


@pytest.mark.parametrize("ranks_instances", [False, True])
def test_one_number_that_is_not_finite_is_found(ranks_instances):
    expected = outputs()
    found = {name: value.clone() for name, value in expected.items()}
    found["masks"][0, 3, 2, 1] = math.nan
    assert math.isnan(relative_differences(found, expected, ranks_instances, "bfloat16")["masks"])
