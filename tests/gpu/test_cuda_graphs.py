"""A network in CUDA graphs against the same network without: equal for every size, more of them than are kept."""

import pytest
import torch

from sparseinst.modeling.cuda_graphs import MAX_GRAPHS
from sparseinst.modeling.optimization import optimize_for_inference
from tests.tiny_model import tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("compile", [False, True])
def test_equal_for_every_size(precision, compile):
    model = tiny_model("MODEL.DEVICE", "cuda")
    plain = optimize_for_inference(model, precision=precision, compile=compile)
    graphed = optimize_for_inference(model, precision=precision, compile=compile, cuda_graphs=True)
    for width in [*range(32, 32 * (MAX_GRAPHS + 3), 32), 32, 32]:
        images = torch.randn(2, 3, 64, width, device="cuda")
        expected, found = plain.network(images), graphed.network(images)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-3, rtol=1e-3)
