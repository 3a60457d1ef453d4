"""Compare the outputs of two networks that are equal but for rounding."""

import math

import torch
from scipy.optimize import linear_sum_assignment

# Share of the instances that two networks have in common, at least, where they rank instances by their own numbers:
# rounding changes their order, and in noise, where all peaks are almost equal, also which ones are among the best.
_SHARES_IN_COMMON = {"float32": 0.95, "float16": 0.5, "bfloat16": 0.1, "int8": 0.1}
# Largest difference of an optimized network over the largest value of the same output.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}
# Values of each output by which an instance is recognized.
_NUM_VALUES = 1024


def compared_share(ranks_instances: bool, precision: str) -> float:
    """Return the least share of the instances that `relative_differences` compares; 1: all instances."""
    return _SHARES_IN_COMMON[precision] if ranks_instances else 1.0


def relative_differences(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], ranks_instances: bool, precision: str
) -> dict[str, float]:
    """Return the largest difference of each output, over the largest value expected. NaN where one is NaN.

    Args:
        found, expected: outputs of equal names and shapes.
        ranks_instances: as in `InstanceSegmenter`. The outputs are (B, N, ...), and the N instances are compared in any
            order, without those that differ most.
        precision: of the network that found them; says how many are compared.
    """
    # An output of zeros has no scale.
    scales = {name: float(value.double().abs().max()) or 1.0 for name, value in expected.items()}
    found, expected = (
        {name: outputs[name].double() / scale for name, scale in scales.items()} for outputs in (found, expected)
    )
    if not ranks_instances or not all(value.isfinite().all() for value in found.values()):
        return {name: float((found[name] - value).abs().max()) for name, value in expected.items()}
    worst = dict.fromkeys(expected, 0.0)
    for index in range(len(next(iter(expected.values())))):
        ones, others = ({name: value[index].flatten(1) for name, value in part.items()} for part in (found, expected))
        costs = sum(torch.cdist(_thinned(ones[name]), _thinned(other), p=1) for name, other in others.items())
        rows, columns = (torch.as_tensor(indices) for indices in linear_sum_assignment(costs.cpu().numpy()))
        # (outputs, N)
        differences = torch.stack([(ones[name][rows] - other[columns]).abs().amax(1) for name, other in others.items()])
        kept = differences.amax(0).argsort()[: math.ceil(compared_share(ranks_instances, precision) * len(rows))]
        for name, difference in zip(others, differences[:, kept].amax(1)):
            worst[name] = max(worst[name], float(difference))
    return worst


def is_close(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], ranks_instances: bool, precision: str = "float32"
) -> bool:
    """Return whether outputs have the expected names and shapes, and differ by `TOLERANCES` at most."""
    if {name: value.shape for name, value in found.items()} != {name: v.shape for name, v in expected.items()}:
        return False
    differences = relative_differences(found, expected, ranks_instances, precision)
    return all(difference <= TOLERANCES[precision] for difference in differences.values())


def _thinned(values: torch.Tensor) -> torch.Tensor:
    """Return some `_NUM_VALUES` columns of (N, V), divided by their number."""
    values = values[:, :: math.ceil(values.shape[1] / _NUM_VALUES)]
    return values / values.shape[1]
