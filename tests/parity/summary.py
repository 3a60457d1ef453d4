"""Summarize tensors as the parity records do, and compare summaries."""

import numpy as np
import pytest
import torch


def summary(tensor: torch.Tensor) -> dict:
    """Return shape, mean, unbiased standard deviation and 24 values of a tensor."""
    values = tensor.detach().double().flatten().numpy()
    samples = values[np.random.RandomState(7).randint(0, values.size, 24)]
    return {
        "shape": list(tensor.shape),
        "mean": values.mean(),
        "std": values.std(ddof=1),
        "samples": samples.tolist(),
    }


def check_summaries(name, expected, found, relative=1e-3):
    """Compare summaries at any depth of lists and dicts."""
    if isinstance(expected, list):
        assert len(expected) == len(found)
        for index, pair in enumerate(zip(expected, found)):
            check_summaries(f"{name}[{index}]", *pair, relative)
    elif "samples" not in expected:
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            check_summaries(f"{name}.{key}", value, found[key], relative)
    else:
        tolerance = relative * max(abs(expected["mean"]), expected["std"])
        assert found["shape"] == expected["shape"], name
        for key in ("mean", "std", "samples"):
            assert found[key] == pytest.approx(expected[key], abs=tolerance, rel=0), name
