"""The config remembers which keys the user set."""

import copy
import pickle

from sparseinst.config import get_config_file, is_explicit, load_config

NUM_CLASSES = "MODEL.SPARSE_INST.DECODER.NUM_CLASSES"
NUM_MASKS = "MODEL.SPARSE_INST.DECODER.NUM_MASKS"
MAX_DETECTIONS = "MODEL.SPARSE_INST.MAX_DETECTIONS"


def test_files_of_the_package_set_defaults():
    cfg = load_config("quick/shapes")
    assert cfg.MODEL.SPARSE_INST.DECODER.NUM_CLASSES == 4 and not is_explicit(cfg, NUM_CLASSES)


def test_overrides_and_own_files_are_explicit(tmp_path):
    path = tmp_path / "mine.yaml"
    base = get_config_file("quick/shapes")
    path.write_text(f"_BASE_: {base}\nMODEL: {{SPARSE_INST: {{DECODER: {{NUM_MASKS: 9}}}}}}\n")
    (tmp_path / "child.yaml").write_text("_BASE_: mine.yaml\n")
    cfg = load_config(str(tmp_path / "child.yaml"), [NUM_CLASSES, "4"])
    for copied in (cfg, cfg.clone(), copy.deepcopy(cfg), pickle.loads(pickle.dumps(cfg))):
        assert is_explicit(copied, NUM_CLASSES) and is_explicit(copied, NUM_MASKS)
        assert not is_explicit(copied, MAX_DETECTIONS)
    cfg.freeze()
    assert is_explicit(cfg, NUM_CLASSES)
    # The config of an earlier run, which a training writes.
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert is_explicit(load_config(str(tmp_path / "config.yaml")), MAX_DETECTIONS)


def test_the_keys_of_a_group_override_are_explicit():
    cfg = load_config("quick/shapes", ["MODEL.SPARSE_INST", "{'DECODER': {'NUM_CLASSES': 5}, 'MAX_DETECTIONS': 7}"])
    assert cfg.MODEL.SPARSE_INST.DECODER.NUM_CLASSES == 5
    assert is_explicit(cfg, NUM_CLASSES) and is_explicit(cfg, MAX_DETECTIONS) and not is_explicit(cfg, NUM_MASKS)
    # The user's own number stays.
    assert load_config("quick/shapes", ["TEST", "{'DETECTIONS_PER_IMAGE': 9}"]).MODEL.SPARSE_INST.MAX_DETECTIONS == 9


def test_detectron2s_number_of_detections_sets_the_models(tmp_path):
    def most(*opts, file="quick/shapes"):
        return load_config(file, list(opts)).MODEL.SPARSE_INST.MAX_DETECTIONS

    assert most("TEST.DETECTIONS_PER_IMAGE", "300") == 300
    assert most("TEST.DETECTIONS_PER_IMAGE", "300", MAX_DETECTIONS, "50") == 50
    assert most("TEST.DETECTIONS_PER_IMAGE", "100", file="small_data/efficientnet_lite0_crowded") == 400
    (tmp_path / "mine.yaml").write_text(
        f"_BASE_: {get_config_file('quick/shapes')}\nTEST: {{DETECTIONS_PER_IMAGE: 7}}\n"
    )
    cfg = load_config(str(tmp_path / "mine.yaml"))
    assert cfg.MODEL.SPARSE_INST.MAX_DETECTIONS == 7 and is_explicit(cfg, MAX_DETECTIONS)
