"""Renamed keys, IMPORTS, and what a config says about a model of any family."""

import pytest
import yaml
from detectron2.config import get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from torch import nn

from sparseinst import config
from sparseinst.config import add_sparse_inst_config, load_config
from tests.tiny_model import tiny_cfg


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("key", "value", "new"),
    [
        ("MODEL.SPARSE_INST.OUTPUT_MASK_FORMAT", "rle", "MODEL.OUTPUT.MASK_FORMAT"),
        ("MODEL.SPARSE_INST.MAX_MASK_GIB", "1.0", "MODEL.OUTPUT.MAX_MASK_GIB"),
        ("MODEL.SPARSE_INST.INFERENCE.ENGINE", "openvino", "RUNTIME.ENGINE"),
        ("MODEL.SPARSE_INST.INFERENCE.CUDA_GRAPHS", "True", "CUDA graphs were removed"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model", "SOLVER.CLIP_TOTAL_NORM"),
    ],
)
def test_renamed_keys_are_refused_on_a_command_line(key, value, new):
    with pytest.raises(ValueError, match=f"KEY VALUE overrides.*{key}.*{new}"):
        load_config("quick/shapes", [key, value])


def test_the_newest_file_of_a_chain_wins(tmp_path, caplog):
    write(tmp_path / "new.yaml", "RUNTIME: {FUSE: false, COMPILE: true}\n")
    path = write(tmp_path / "old.yaml", "_BASE_: new.yaml\nMODEL: {SPARSE_INST: {INFERENCE: {FUSE: true}}}\n")
    cfg = load_config(path)
    assert (cfg.RUNTIME.FUSE, cfg.RUNTIME.COMPILE) == (True, True)
    (warning,) = [record.getMessage() for record in caplog.records if "renamed" in record.getMessage()]
    assert "old.yaml" in warning and "new.yaml" not in warning
    again = load_config(write(tmp_path / "newer.yaml", "_BASE_: old.yaml\nRUNTIME: {FUSE: false}\n"))
    assert again.RUNTIME.FUSE is False


@pytest.mark.parametrize(
    ("clip", "norm"),
    [
        ("{ENABLED: true, CLIP_TYPE: full_model, CLIP_VALUE: 3}", 3.0),
        ("{ENABLED: false, CLIP_TYPE: full_model, CLIP_VALUE: 3.0}", 0.0),
        # Our base clips at 10; these were written when it did so by CLIP_GRADIENTS.
        ("{ENABLED: false}", 0.0),
        ("{CLIP_VALUE: 5.0}", 5.0),
        ("{ENABLED: true, CLIP_TYPE: norm}", 10.0),
    ],
)
def test_full_model_clipping_is_translated(tmp_path, clip, norm):
    base = config.get_config_file("Base-SparseInst")
    cfg = load_config(write(tmp_path / "mine.yaml", f"_BASE_: {base}\nSOLVER: {{CLIP_GRADIENTS: {clip}}}\n"))
    assert norm == cfg.SOLVER.CLIP_TOTAL_NORM
    assert cfg.SOLVER.CLIP_GRADIENTS.ENABLED == ("norm" in clip) and cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE != "full_model"


def test_the_published_mapper_key_is_accepted(tmp_path):
    path = write(tmp_path / "a.yaml", "MODEL: {SPARSE_INST: {DATASET_MAPPER: DatasetMapper}}\n")
    assert config.dataset_mapper(load_config(path)) == ("INPUT.DATASET_MAPPER", "DatasetMapper")
    cfg = load_config("quick/shapes", ["MODEL.SPARSE_INST.DATASET_MAPPER", "DatasetMapper"])
    assert config.dataset_mapper(cfg)[1] == "DatasetMapper"


def test_imports_run_first_and_are_saved(tmp_path, caplog, monkeypatch):
    code = "def add_config(cfg):\n    cfg.MODEL.MINE = 1\n"
    module = write(tmp_path / "mine.py", code)
    path = write(tmp_path / "a.yaml", "IMPORTS: [mine.py, json]\nMODEL: {MINE: 2}\n")
    cfg = load_config(path)
    assert cfg.MODEL.MINE == 2 and cfg.IMPORTS == [module, "json"]
    assert sum("runs the code of" in record.getMessage() for record in caplog.records) == 1
    (tmp_path / "saved").mkdir()
    again = load_config(write(tmp_path / "saved" / "config.yaml", cfg.dump()))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())
    monkeypatch.chdir(tmp_path)
    assert load_config("quick/shapes", ["IMPORTS", "['mine.py']"]).IMPORTS == [module]


@pytest.mark.parametrize(
    ("imports", "message"),
    [
        ("[no_such_module_of_mine]", "'no_such_module_of_mine'.*cannot be imported: ModuleNotFoundError"),
        ("[broken.py]", "broken.py'.*RuntimeError: two lines"),
        ("text", "IMPORTS is 'text'; expected a list"),
        ("[1]", "IMPORTS is .*; expected a list"),
    ],
)
def test_imports_that_fail_are_one_line(tmp_path, imports, message):
    write(tmp_path / "broken.py", "raise RuntimeError('two\\nlines')\n")
    with pytest.raises(ValueError, match=f"a.yaml.*{message}") as caught:
        load_config(write(tmp_path / "a.yaml", f"IMPORTS: {imports}\n"))
    assert "\n" not in str(caught.value)


@META_ARCH_REGISTRY.register()
class ToyOfAnotherFamily(nn.Module):
    num_classes_key = "MODEL.RETINANET.NUM_CLASSES"


def test_a_model_declares_its_keys():
    cfg = tiny_cfg()
    assert config.num_classes(cfg) == ("MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 3)
    assert config.max_instances(cfg) == ("MODEL.SPARSE_INST.DECODER.NUM_MASKS", 6)
    assert config.max_detections(cfg) == ("MODEL.SPARSE_INST.MAX_DETECTIONS", 100)
    cfg.MODEL.META_ARCHITECTURE = "ToyOfAnotherFamily"
    assert config.num_classes(cfg) == ("MODEL.RETINANET.NUM_CLASSES", 80) and config.max_instances(cfg) is None
    # Detectron2's own class declares nothing.
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    assert config.num_classes(cfg) == ("MODEL.ROI_HEADS.NUM_CLASSES", 80) and config.max_instances(cfg) is None
    assert config.max_detections(cfg) == ("TEST.DETECTIONS_PER_IMAGE", 100)
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    assert config.num_classes(cfg) is None
    cfg.MODEL.META_ARCHITECTURE = "SparseInts"
    with pytest.raises(ValueError, match="MODEL.META_ARCHITECTURE is 'SparseInts'; it must be one of .*SparseInst"):
        config.num_classes(cfg)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.SPARSE_INST.DECODER.NAME", "MyDecodr"), ("MODEL.SPARSE_INST.ENCODER.NAME", "X"),
        ("MODEL.SPARSE_INST.ENCODER.NORM", "X"), ("MODEL.RESNETS.NORM", "BatchNorm"),
        ("MODEL.BACKBONE.NAME", "resnet50"), ("MODEL.SPARSE_INST.MATCHER.NAME", "Hungarian"),
        ("MODEL.SPARSE_INST.LOSS.NAME", "X"), ("MODEL.SPARSE_INST.MASK_THRESHOLD", float("nan")),
        ("MODEL.PIXEL_STD", [0.0, 1.0, 1.0]), ("SOLVER.MAX_ITER", 0),
    ],
)  # fmt: skip
def test_values_that_cannot_be_used_name_their_key(key, value):
    with pytest.raises(ValueError, match=f"^{key} is .*must be"):
        build_model(tiny_cfg(key, value))


def test_defaults_are_stock_plus_ours():
    cfg = get_cfg()
    add_sparse_inst_config(cfg)
    assert "INFERENCE" not in cfg.MODEL.SPARSE_INST and cfg.RUNTIME.ENGINE == "torch" and cfg.IMPORTS == []
