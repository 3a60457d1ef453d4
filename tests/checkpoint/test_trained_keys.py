"""The numbers of classes and of instances, and the class names, of a checkpoint."""

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from sparseinst import config
from sparseinst.checkpoint import SparseInstCheckpointer
from sparseinst.checkpoint.trained_keys import class_names, follow_checkpoint, trained_keys
from tests.tiny_model import placed_model, tiny_cfg, tiny_model

NUM_CLASSES = "MODEL.SPARSE_INST.DECODER.NUM_CLASSES"
NUM_MASKS = "MODEL.SPARSE_INST.DECODER.NUM_MASKS"
MAX_DETECTIONS = "MODEL.SPARSE_INST.MAX_DETECTIONS"
NUM_LEVELS = "MODEL.SPARSE_INST.DECODER.NUM_LEVELS"


def save(path, **content):
    torch.save(content, path)
    return str(path)


@pytest.mark.parametrize(
    ("decoder", "groups"),
    [("BaseIAMDecoder", 4), ("GroupIAMDecoder", 1), ("GroupIAMDecoder", 4), ("GroupIAMSoftDecoder", 2)],
)
def test_shapes_of_tensors_tell_the_numbers(tmp_path, decoder, groups):
    opts = ("MODEL.SPARSE_INST.DECODER.NAME", decoder, "MODEL.SPARSE_INST.DECODER.GROUPS", groups)
    state = tiny_model(*opts, NUM_CLASSES, 5, NUM_MASKS, 11).state_dict()
    # As a wrapper of DistributedDataParallel saves it.
    path = save(tmp_path / "a.pth", model={f"module.{name}": tensor for name, tensor in state.items()})
    assert trained_keys(tiny_cfg(), path) == {NUM_CLASSES: 5, NUM_MASKS: 11}


def test_other_files_say_nothing(tmp_path):
    assert trained_keys(tiny_cfg(), "") == {}
    backbone = tiny_model().backbone.state_dict()
    assert trained_keys(tiny_cfg(), save(tmp_path / "backbone.pth", model=backbone)) == {}
    names = ("decoder.inst_branch.cls_score.weight", "decoder.inst_branch.iam_conv.weight")
    for shape in ((0, 4), (3,), (2, 0, 3, 3)):
        odd = save(tmp_path / "odd.pth", model={name: torch.zeros(shape) for name in names})
        assert trained_keys(tiny_cfg(), odd) == {}


def test_what_a_file_says_counts_less_than_its_tensors(tmp_path):
    state = tiny_model().state_dict()
    said = {NUM_CLASSES: 80, NUM_MASKS: -3, MAX_DETECTIONS: 7, "MODEL.DEVICE": "cuda", "OUTPUT_DIR": 3}
    cfg = tiny_cfg()
    follow_checkpoint(cfg, save(tmp_path / "a.pth", model=state, model_keys=said))
    assert (config.value(cfg, NUM_CLASSES), config.value(cfg, NUM_MASKS), config.value(cfg, MAX_DETECTIONS)) == (
        3,
        6,
        7,
    )
    # Only shapes determine a training that starts with the file.
    path = save(tmp_path / "a.pth", model=state, model_keys=said)
    assert trained_keys(tiny_cfg(), path) == {NUM_CLASSES: 3, NUM_MASKS: 6}
    for wrong in ([1], "x", {MAX_DETECTIONS: True}, {MAX_DETECTIONS: 0}, {MAX_DETECTIONS: "9"}):
        cfg = tiny_cfg()
        follow_checkpoint(cfg, save(tmp_path / "a.pth", model=state, model_keys=wrong))
        assert config.value(cfg, MAX_DETECTIONS) == 100


def test_the_number_of_levels_is_the_checkpoints(tmp_path):
    path = save(tmp_path / "a.pth", model=placed_model(NUM_LEVELS, 2).state_dict())
    cfg = tiny_cfg()
    (note,) = follow_checkpoint(cfg, path)
    assert config.value(cfg, NUM_LEVELS) == 2 and note.startswith(f"{NUM_LEVELS} 2, from the checkpoint")
    # Another number would spoil every box, so it is not free in an evaluation.
    cfg = tiny_cfg()
    config.mark_explicit(cfg, [NUM_LEVELS])
    with pytest.raises(ValueError, match=f"{NUM_LEVELS} is 4, but the checkpoint .* was trained with 2"):
        follow_checkpoint(cfg, path)


def test_a_checkpoint_wins_over_defaults_only(tmp_path):
    state = tiny_model(NUM_CLASSES, 5, NUM_MASKS, 9).state_dict()
    path = save(tmp_path / "a.pth", model=state, model_keys={MAX_DETECTIONS: 9})
    cfg = tiny_cfg()
    notes = follow_checkpoint(cfg, path)
    decoder = cfg.MODEL.SPARSE_INST.DECODER
    assert (decoder.NUM_CLASSES, decoder.NUM_MASKS, cfg.MODEL.SPARSE_INST.MAX_DETECTIONS) == (5, 9, 9)
    assert len(notes) == 3 and f"{NUM_CLASSES} 5, from the checkpoint {path}" in " ".join(notes)
    assert follow_checkpoint(cfg, path) == []

    cfg = tiny_cfg()
    config.mark_explicit(cfg, [NUM_CLASSES])
    with pytest.raises(ValueError, match=f"{NUM_CLASSES} is 3, but the checkpoint .*a.pth was trained with 5"):
        follow_checkpoint(cfg, path)
    # The number of detections is free in an evaluation, and that of the run in a resumed one.
    cfg = tiny_cfg(NUM_CLASSES, 5)
    config.mark_explicit(cfg, [MAX_DETECTIONS])
    follow_checkpoint(cfg, path)
    assert cfg.MODEL.SPARSE_INST.MAX_DETECTIONS == 100
    with pytest.raises(ValueError, match=f"{MAX_DETECTIONS} is 100, but .* 9"):
        follow_checkpoint(cfg, path, for_training=True)


@pytest.mark.parametrize(("decoder", "is_free"), [("PlacedIAMDecoder", True), ("GroupIAMDecoder", False)])
def test_the_number_of_peaks_is_free_in_an_evaluation(tmp_path, decoder, is_free):
    loss = "PlacedCriterion" if is_free else "SparseInstCriterion"
    opts = ("MODEL.SPARSE_INST.DECODER.NAME", decoder, "MODEL.SPARSE_INST.LOSS.NAME", loss)
    state = build_model(tiny_cfg(*opts)).state_dict()
    path = save(tmp_path / "a.pth", model=state, model_keys={NUM_MASKS: 6, MAX_DETECTIONS: 100})
    cfg = tiny_cfg(*opts, NUM_MASKS, 9)
    config.mark_explicit(cfg, [NUM_MASKS])
    for for_training in (False, True):
        if is_free and not for_training:
            assert follow_checkpoint(cfg, path) == [] and cfg.MODEL.SPARSE_INST.DECODER.NUM_MASKS == 9
        else:
            with pytest.raises(ValueError, match=f"{NUM_MASKS} is 9, but .* 6"):
                follow_checkpoint(cfg, path, for_training=for_training)
    # A config that leaves the key out has the checkpoint's number.
    cfg = tiny_cfg(*opts, NUM_MASKS, 9)
    follow_checkpoint(cfg, path)
    assert cfg.MODEL.SPARSE_INST.DECODER.NUM_MASKS == 6


def test_class_names():
    assert class_names({"classes": {"names": ["a", "b"], "category_ids": [1, 2]}}) == ["a", "b"]
    for content in ({}, None, {"classes": ["a"]}, {"classes": {"names": "a"}}, {"classes": {"names": [1]}}):
        assert class_names(content) is None


def test_the_checkpointer_names_the_classes_of_whole_models(tmp_path):
    model = tiny_model()
    path = save(
        tmp_path / "a.pth", model=model.state_dict(), classes={"names": ["a", "b", "c"], "category_ids": [1, 2, 3]}
    )
    SparseInstCheckpointer(model).load(path)
    assert model.class_names == ["a", "b", "c"]
    # Heads that start a training are of other classes.
    SparseInstCheckpointer(model, min_backbone_coverage=0.9).load(path, checkpointables=[])
    assert model.class_names is None
    other = nn.Linear(2, 3)
    SparseInstCheckpointer(other).load(save(tmp_path / "b.pth", model=other.state_dict()))
    assert other.class_names is None
