"""Numbers of classes and of instances follow from the data where the user set none."""

import json

import pytest
import torch
from detectron2.data import MetadataCatalog

from sparseinst import config
from sparseinst.checkpoint.trained_keys import trained_keys
from sparseinst.config import load_config
from sparseinst.data import register_user_datasets
from sparseinst.data.coco_json import check_num_classes, log_data_warnings
from sparseinst.data.model_keys import follow_data, sides_in_training
from sparseinst.engine.model_keys import set_model_keys
from tests.shapes_data import register_shapes, write_shapes
from tests.tiny_model import placed_model

NUM_CLASSES = "MODEL.SPARSE_INST.DECODER.NUM_CLASSES"
NUM_MASKS = "MODEL.SPARSE_INST.DECODER.NUM_MASKS"
NUM_LEVELS = "MODEL.SPARSE_INST.DECODER.NUM_LEVELS"
MAX_DETECTIONS = "MODEL.SPARSE_INST.MAX_DETECTIONS"
CROPS = "INPUT.CROP.ENABLED"


@pytest.fixture
def data(tmp_path):
    """A function from a number of objects to the overrides of a data set whose first image has as many."""

    def write(num_objects):
        json_file, images = write_shapes(tmp_path, 2)
        content = json.loads(open(json_file).read())
        first = next(entry for entry in content["annotations"] if not entry["iscrowd"])
        content["annotations"] = [{**first, "id": index + 1} for index in range(num_objects)]
        with open(json_file, "w") as file:
            json.dump(content, file)
        return [
            "DATASETS.TRAIN_JSON", repr(json_file), "DATASETS.TRAIN_IMAGES", repr(images), "DATASETS.TEST", "()",
        ]  # fmt: skip

    return write


def follow(opts, trained=(), file="sparse_inst_r50_giam"):
    cfg = load_config(file, [*opts])
    cfg.DATASETS.TEST_JSON = cfg.DATASETS.TEST_IMAGES = ""
    register_user_datasets(cfg)
    notes = follow_data(cfg, lambda: dict.fromkeys(trained, 100))
    keys = cfg.MODEL.SPARSE_INST
    return (keys.DECODER.NUM_CLASSES, keys.DECODER.NUM_MASKS, keys.MAX_DETECTIONS), notes, cfg


def test_the_number_of_classes_is_that_of_the_data(data):
    values, (note,), cfg = follow(data(3))
    assert values == (4, 100, 100)
    assert note.startswith(f"{NUM_CLASSES} 4, the classes of DATASETS.TRAIN 'user_train_") and "80" in note
    check_num_classes(cfg)


def test_an_explicit_number_of_classes_is_checked(data):
    values, notes, cfg = follow([*data(3), NUM_CLASSES, "7"])
    assert values[0] == 7 and notes == []
    with pytest.raises(ValueError, match=f"has 4 classes .*, but {NUM_CLASSES} is 7: set {NUM_CLASSES} 4"):
        check_num_classes(cfg)


@pytest.mark.parametrize(
    ("num_objects", "opts", "trained", "expected"),
    [
        (130, [], [], (130, 130)),
        (700, [], [], (500, 500)),
        # A fine-tuning keeps the decoder that it starts with.
        (130, [], [NUM_MASKS], (100, 100)),
        (130, [NUM_MASKS, "150"], [], (150, 130)),
        (130, [NUM_MASKS, "110"], [], (110, 110)),
        (130, [NUM_MASKS, "9"], [], (9, 100)),
        (130, [MAX_DETECTIONS, "50"], [], (130, 50)),
    ],
)
def test_limits_are_raised_where_the_decoder_is_random(data, caplog, num_objects, opts, trained, expected):
    (_, *values), _, cfg = follow([*data(num_objects), *opts], trained)
    assert tuple(values) == expected
    log_data_warnings(cfg)
    warnings = [record.getMessage() for record in caplog.records if "NUM_MASKS" in record.getMessage()]
    assert len(warnings) == (min(values) < num_objects)
    for warning in warnings:
        assert f"{NUM_MASKS} {num_objects} and {MAX_DETECTIONS} {num_objects} would hold all" in warning


@pytest.mark.parametrize(
    ("sides", "opts", "expected"),
    [
        ([10, 15, 20], [], 1),
        ([2, 20, 30], [], 4),
        # Large objects need the cells of the other levels.
        ([20, 30, 40], [], 4),
        ([10, 15, 20], [NUM_LEVELS, "3"], 3),
    ],
)
def test_objects_of_about_one_size_get_one_level(tmp_path, sides, opts, expected):
    _, notes, cfg = follow([*squares(tmp_path, sides), *opts], file="small_data/efficientnet_lite0")
    assert config.value(cfg, NUM_LEVELS) == expected
    levels = [note for note in notes if note.startswith(NUM_LEVELS)]
    assert len(levels) == (expected == 1)
    for note in levels:
        expected = "because for 90 % of the objects sqrt(width * height) is 41 to 88 pixels in training (the config"
        assert expected in note


@pytest.mark.parametrize(
    ("sides", "opts", "expected"),
    [([2, 20, 30], [], True), ([10, 15, 20], [], False), ([10, 15, 20], [CROPS, "True"], True)],
)
def test_objects_of_about_one_size_are_not_cropped(tmp_path, sides, opts, expected):
    _, notes, cfg = follow([*squares(tmp_path, sides), *opts], file="small_data/efficientnet_lite0")
    assert config.value(cfg, CROPS) == expected
    notes = [note for note in notes if note.startswith(CROPS)]
    assert len(notes) == (not expected)
    assert all("because for 90 % of the objects" in note for note in notes)


def squares(folder, sides, past_the_edge=0):
    """Return the overrides of a data set of squares in two images of two sizes."""
    json_file, images = write_shapes(folder, 2)
    content = json.loads(open(json_file).read())
    entry = content["annotations"][0]
    # Images are resized to a short side of 288 (times 4.5) and a long side of at most 384 (times 0.2).
    first, second = content["images"]
    second.update(height=20 * 64, width=30 * 64)
    content["annotations"] = [
        {**entry, "id": len(sides) * image["id"] + index, "image_id": image["id"], "iscrowd": 0,
         "segmentation": [[scale * x for x in (-past_the_edge, 0, side, 0, side, side, -past_the_edge, side)]]}
        for image, scale in ((first, 1), (second, 20)) for index, side in enumerate(sides)
    ]  # fmt: skip
    with open(json_file, "w") as file:
        json.dump(content, file)
    return ["DATASETS.TRAIN_JSON", repr(json_file), "DATASETS.TRAIN_IMAGES", repr(images), "DATASETS.TEST", "()"]


@pytest.mark.parametrize(
    ("opts", "expected"),
    [
        # By the short side; by the long side, which is at most 320; the square of 256, whose sides are 4 and 2 times.
        (["INPUT.MIN_SIZE_TRAIN", "(64, 96)", "INPUT.MAX_SIZE_TRAIN", "1000"], 15),
        (["INPUT.MIN_SIZE_TRAIN", "(512,)", "INPUT.MAX_SIZE_TRAIN", "320"], 25),
        (["INPUT.SQUARE_SIZE", "256"], 10 * 8**0.5),
    ],
)
def test_sides_at_the_largest_size_of_the_training(opts, expected):
    cfg = load_config("small_data/efficientnet_lite0", opts)
    assert sides_in_training(cfg, [[[10, 64, 128]]]) == pytest.approx([expected])
    assert len(sides_in_training(cfg, [])) == 0


def test_what_lies_outside_of_the_image_is_not_part_of_the_size(tmp_path):
    opts = squares(tmp_path, [10, 15, 20], past_the_edge=100)
    assert config.value(follow(opts, file="small_data/efficientnet_lite0")[2], NUM_LEVELS) == 1


@pytest.mark.parametrize(("sides", "trained"), [([10, 15, 20], 4), ([2, 20, 30], 1)])
def test_a_fine_tuning_keeps_the_levels_of_its_checkpoint(tmp_path, sides, trained):
    weights = tmp_path / "a.pth"
    torch.save({"model": placed_model(NUM_LEVELS, trained).state_dict()}, weights)
    cfg = load_config("small_data/efficientnet_lite0", squares(tmp_path, sides))
    cfg.DATASETS.TEST_JSON = cfg.DATASETS.TEST_IMAGES = ""
    register_user_datasets(cfg)
    follow_data(cfg, lambda: trained_keys(cfg, str(weights)))
    assert config.value(cfg, NUM_LEVELS) == trained
    assert config.value(cfg, CROPS) == (sides == [2, 20, 30])


@pytest.mark.parametrize(("sides", "is_evaluated", "expected"), [
    ([10, 15, 20], False, False), ([2, 20, 30], False, True), ([10, 15, 20], True, True),
])  # fmt: skip
def test_a_resumed_training_crops_as_a_new_one(tmp_path, sides, is_evaluated, expected):
    output = tmp_path / "output"
    output.mkdir()
    torch.save({"model": placed_model(NUM_LEVELS, 3).state_dict()}, output / "model_0000001.pth")
    (output / "last_checkpoint").write_text("model_0000001.pth")
    cfg = load_config("small_data/efficientnet_lite0", squares(tmp_path, sides))
    cfg.OUTPUT_DIR = str(output)
    cfg.DATASETS.TEST_JSON = cfg.DATASETS.TEST_IMAGES = ""
    register_user_datasets(cfg)
    notes = set_model_keys(cfg, eval_only=is_evaluated, resume=True)
    assert (config.value(cfg, CROPS), config.value(cfg, NUM_LEVELS)) == (expected, 3)
    assert any(note.startswith(CROPS) for note in notes) == (not expected)


def test_data_sets_of_unknown_sizes_change_no_level(tmp_path):
    cfg = load_config("small_data/efficientnet_lite0", squares(tmp_path, [10, 15, 20]))
    cfg.DATASETS.TEST_JSON = cfg.DATASETS.TEST_IMAGES = ""
    register_user_datasets(cfg)
    other = register_shapes(tmp_path / "other", "shapes_of_unknown_sizes")
    metadata = MetadataCatalog.get(other)
    del metadata.object_sides
    cfg.DATASETS.TRAIN = (*cfg.DATASETS.TRAIN, other)
    follow_data(cfg, dict)
    assert config.value(cfg, NUM_LEVELS) == 4


def test_decoders_without_levels_have_no_level_to_set(data):
    assert not any(NUM_LEVELS in note for note in follow(data(3))[1])


def test_data_sets_of_which_nothing_is_known_change_nothing():
    cfg = load_config("sparse_inst_r50_giam")
    assert follow_data(cfg, lambda: {}) == [] and config.num_classes(cfg) == (NUM_CLASSES, 80)
