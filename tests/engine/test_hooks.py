"""The drawings of VisualizationHook."""

import pytest
from detectron2.data import MetadataCatalog

from sparseinst.engine import hooks
from tests.tiny_model import random_input, tiny_model


@pytest.mark.parametrize(("decoder", "expected"), [("GroupIAMDecoder", "sigmoid"), ("GroupIAMSoftDecoder", "softmax")])
def test_activation_maps_are_drawn_as_the_model_normalizes_them(decoder, expected, monkeypatch):
    drawn = []
    monkeypatch.setattr(hooks, "draw_iams", lambda *_, normalization="sigmoid": drawn.append(normalization))
    model = tiny_model("MODEL.SPARSE_INST.DECODER.NAME", decoder, "MODEL.SPARSE_INST.CLS_THRESHOLD", 0.0)
    MetadataCatalog.get("hooks_classes").thing_classes = ["a", "b", "c"]
    hook = hooks.VisualizationHook(1, model, "RGB", "hooks_classes")
    assert "activation_maps" in hook.draw(random_input(num_instances=2))
    assert drawn == [expected]
