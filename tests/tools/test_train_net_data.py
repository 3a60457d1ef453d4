"""A user's json alone: the number of classes, the part to evaluate on, and the checkpoint's values afterwards."""

import json
import re
import shutil

import pytest
import torch
import yaml

from sparseinst.data import recipes
from sparseinst.engine.trainer import Trainer
from sparseinst.tools import train_net
from tests.loggers import loggers_restored
from tests.shapes_data import write_shapes

NUM_CLASSES = "MODEL.SPARSE_INST.DECODER.NUM_CLASSES"
NUM_MASKS = "MODEL.SPARSE_INST.DECODER.NUM_MASKS"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three of the four shapes; the first image has 40 objects, more than the quick recipe's NUM_MASKS."""
    folder = tmp_path_factory.mktemp("data")
    json_file, images = write_shapes(folder, 8)
    content = json.loads(open(json_file).read())
    content["categories"] = content["categories"][:3]
    kept = [entry for entry in content["annotations"] if entry["category_id"] <= 3 and not entry["iscrowd"]]
    kept += [{**kept[0]} for _ in range(40 - sum(entry["image_id"] == kept[0]["image_id"] for entry in kept))]
    content["annotations"] = [{**entry, "id": index + 1} for index, entry in enumerate(kept)]
    with open(json_file, "w") as file:
        json.dump(content, file)
    return json_file, images


@pytest.fixture
def other_names(data, tmp_path):
    content = json.loads(open(data[0]).read())
    for category, name in zip(content["categories"], ("cat", "dog", "cow")):
        category["name"] = name
    (tmp_path / "other.json").write_text(json.dumps(content))
    return tmp_path / "other.json"


def main(*args):
    with loggers_restored():
        return train_net.main(train_net.build_parser().parse_args(["--config-file", "quick/shapes", *map(str, args)]))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "output"
    flags = ["--train-json", data[0], "--train-images", data[1], "--val-share", "0.25"]
    results = main(*flags, "SOLVER.MAX_ITER", 1, "OUTPUT_DIR", output)
    return output, flags, results


def test_no_key_needs_to_be_typed(trained):
    output, _, results = trained
    assert "segm" in results
    log = (output / "log.txt").read_text()
    assert f"{NUM_CLASSES} 3, the classes of DATASETS.TRAIN" in log and f"{NUM_MASKS} 40, the most objects" in log
    assert "6 images of" in log and "2 are evaluated on" in log
    # Not those of the images that were trained on.
    assert "not drawn" not in log and (output / "val_predictions.jpg").is_file()
    assert json.loads((output / "classes.json").read_text())["names"] == ["disc", "triangle", "cross"]


def test_the_checkpoint_gives_the_numbers(trained, data, tmp_path):
    output, flags, _ = trained
    weights = ["MODEL.WEIGHTS", output / "model_final.pth", "OUTPUT_DIR", tmp_path]
    test = ["--eval-only", "--test-json", data[0], "--test-images", data[1]]
    assert "segm" in main(*test, *weights)
    log = (tmp_path / "log.txt").read_text()
    assert f"{NUM_CLASSES} 3, from the checkpoint" in log and f"{NUM_MASKS} 40, from the checkpoint" in log
    # The same part again.
    assert "segm" in main("--eval-only", *flags, *weights)
    for args, message in (
        ([*test, *weights, NUM_CLASSES, 5], f"{NUM_CLASSES} is 5, but the checkpoint"),
        (["--eval-only", *flags[:4], *weights], "--eval-only has no data to evaluate on"),
        ([*flags, "--resume", "OUTPUT_DIR", output, NUM_MASKS, 50], f"{NUM_MASKS} is 50, but the checkpoint .* 40"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(*args)
        error = str(caught.value)
        assert error.startswith("error: ") and re.search(message, error), error


def test_another_json_takes_the_place_of_the_share_of_the_config(trained, data, tmp_path):
    output, _, _ = trained
    test = ["--config-file", output / "config.yaml", "--eval-only"]
    json_flags = ["--test-json", data[0], "--test-images", data[1]]
    weights = ["MODEL.WEIGHTS", output / "model_final.pth", "OUTPUT_DIR", tmp_path]
    for flags, num_images in (([], 2), (json_flags, 8)):
        assert "segm" in main(*test, *flags, *weights)
        speed = json.loads((tmp_path / "results.json").read_text())["speed"]
        assert speed["num_batches"] + speed["warmup_batches"] == num_images
    # The user gave both.
    for flags, opts in ((["--val-share", 0.25], []), ([], ["DATASETS.VAL_SHARE", 0.25])):
        with pytest.raises(SystemExit, match="are both given"):
            main(*test, *json_flags, *flags, *weights, *opts)


def test_an_evaluation_leaves_the_config_of_the_training(trained, data, tmp_path):
    output = shutil.copytree(trained[0], tmp_path / "run")
    saved = (output / "config.yaml").read_text()
    weights = output / "model_final.pth"
    test = ["--eval-only", "--test-json", data[0], "--test-images", data[1]]
    main("--config-file", output / "config.yaml", *test, "MODEL.WEIGHTS", weights, "OUTPUT_DIR", output)
    assert (output / "config.yaml").read_text() == saved
    evaluated = yaml.safe_load((output / "inference" / "config.yaml").read_text())
    assert evaluated["DATASETS"]["TEST_JSON"] == str(data[0]) and evaluated["MODEL"]["WEIGHTS"] == str(weights)


def test_a_run_whose_weights_are_refused_saves_no_config(trained, other_names, data, tmp_path):
    output = shutil.copytree(trained[0], tmp_path / "run")
    saved, log = (output / "config.yaml").read_text(), (output / "log.txt").read_text()
    flags = ["--train-json", other_names, "--train-images", data[1], "OUTPUT_DIR", output]
    with pytest.raises(SystemExit, match="was trained on the classes"):
        main("--resume", *flags)
    assert (output / "config.yaml").read_text() == saved
    assert len((output / "log.txt").read_text()) > len(log)
    torch.save({"model": {"backbone.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(SystemExit, match="other.pth"):
        main(*flags[:-1], tmp_path / "new", "MODEL.WEIGHTS", tmp_path / "other.pth")
    assert (tmp_path / "new" / "log.txt").is_file() and not (tmp_path / "new" / "config.yaml").exists()


def test_the_config_is_saved_before_the_first_iteration(data, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "train", lambda self: {"saved": (tmp_path / "config.yaml").is_file()})
    assert main("--train-json", data[0], "--train-images", data[1], "OUTPUT_DIR", tmp_path) == {"saved": True}


def test_other_names_of_classes_stop_with_both_lists(trained, other_names, data, tmp_path):
    output, _, _ = trained
    with pytest.raises(SystemExit) as caught:
        main(
            "--eval-only", "--test-json", other_names, "--test-images", data[1],
            "MODEL.WEIGHTS", output / "model_final.pth", "OUTPUT_DIR", tmp_path / "out",
        )  # fmt: skip
    error = str(caught.value)
    assert "3 classes [disc, triangle, cross]" in error and "3 classes [cat, dog, cow]" in error


def test_a_training_json_alone_never_names_coco(data, tmp_path):
    output = tmp_path / "out"
    results = main("--train-json", data[0], "--train-images", data[1], "SOLVER.MAX_ITER", 1, "OUTPUT_DIR", output)
    log = (output / "log.txt").read_text()
    assert results == {} and log.count("The training has no evaluation") == 1 and "coco_2017" not in log


def test_a_recipe_without_other_keys(data, tmp_path, monkeypatch):
    """The log says which recipe was taken and why, and once that nothing is evaluated."""
    pytest.importorskip("timm", reason="the package timm (extra 'small-data') is not installed")
    flags = ["--recipe", "auto", "--train-json", data[0], "--train-images", data[1]]
    one_step = ["SOLVER.MAX_ITER", "1", "SOLVER.IMS_PER_BATCH", "1", "OUTPUT_DIR", str(tmp_path / "output")]
    with loggers_restored():
        assert train_net.main(train_net.build_parser().parse_args([*flags, *one_step])) == {}
    log = (tmp_path / "output" / "log.txt").read_text()
    assert log.count("Recipe auto: small_data/efficientnet_lite0_crowded, because 95 % of the images") == 1
    assert log.count("no evaluation and no early stopping") == 1
    monkeypatch.setattr(recipes, "PACKAGES", ("torch", "no_such_package"))
    with pytest.raises(SystemExit, match="--recipe needs the packages no_such_package, .*sparseinst.small-data"):
        train_net.main(train_net.build_parser().parse_args([*flags, *one_step]))
