"""A user's training data are evaluated on a user's data or not at all."""

import pytest

from sparseinst.config import load_config
from sparseinst.data.evaluation_data import choose_evaluation_data

TRAIN = ["DATASETS.TRAIN_JSON", "'train.json'", "DATASETS.TRAIN_IMAGES", "'train'"]
TEST = ["DATASETS.TEST_JSON", "'test.json'", "DATASETS.TEST_IMAGES", "'test'"]


def choose(*opts, file="sparse_inst_r50_giam"):
    cfg = load_config(file, list(opts))
    notes = choose_evaluation_data(cfg)
    return cfg.DATASETS.TEST, cfg.DATASETS.TEST_JSON, notes


@pytest.mark.parametrize("file", ["sparse_inst_r50_giam", "quick/shapes"])
def test_no_evaluation_is_said_once(file):
    test, test_json, (note,) = choose(*TRAIN, file=file)
    assert (test, test_json) == ((), "") and "--val-share 0.2" in note and "--test-json" in note


def test_data_that_the_user_named_stay():
    assert choose(*TRAIN, *TEST)[1:] == ("test.json", [])
    assert choose(*TRAIN, "DATASETS.TEST", "('mine',)", file="quick/shapes") == (("mine",), "", [])
    assert choose()[0] == ("coco_2017_val",)
    assert choose(file="quick/shapes")[1] == "datasets/shapes/val.json"
    # --eval-only.
    assert choose(*TEST)[1:] == ("test.json", [])


def test_a_registered_training_set_replaces_that_of_a_shipped_file():
    cfg = load_config("quick/shapes", ["DATASETS.TRAIN", "('mine',)"])
    choose_evaluation_data(cfg)
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TRAIN_JSON) == (("mine",), "")


def test_val_share_needs_training_data_and_nothing_else():
    share = ["DATASETS.VAL_SHARE", "0.2"]
    assert choose(*TRAIN, *share, file="quick/shapes")[1:] == ("", [])
    with pytest.raises(ValueError, match="--val-share .* and --test-json .* are both given"):
        choose(*TRAIN, *TEST, *share)
    with pytest.raises(ValueError, match="--train-json, which is missing"):
        choose(*share)
