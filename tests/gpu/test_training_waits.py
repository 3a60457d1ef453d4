"""A training step synchronises with CUDA once: the matcher copies its scores to the host."""

import pytest
import torch
from detectron2.data import DatasetCatalog

from sparseinst.data import SparseInstDatasetMapper
from tests.shapes_data import register_shapes
from tests.tiny_model import tiny_cfg, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def sync_debug_mode():
    yield torch.cuda.set_sync_debug_mode
    torch.cuda.set_sync_debug_mode("default")


def test_only_the_matcher_waits(tmp_path, sync_debug_mode):
    images = DatasetCatalog.get(register_shapes(tmp_path, "waits_train", 2))
    opts = ["MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4]
    model = tiny_model(*opts).cuda().train()
    mapper = SparseInstDatasetMapper(tiny_cfg(*opts), is_train=True)
    batch = [mapper(image) for image in images]
    matcher = model.criterion.matcher

    def waiting_matcher(outputs, targets):
        sync_debug_mode("default")
        pairs = matcher(outputs, targets)
        sync_debug_mode(mode)
        return pairs

    model.criterion.matcher = waiting_matcher
    # Once before, for what is set up at the first call.
    for mode in ("default", "error"):
        sync_debug_mode(mode)
        losses = model(batch)
        sum(losses.values()).backward()
