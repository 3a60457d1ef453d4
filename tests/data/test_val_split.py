"""--val-share: one json becomes two data sets, and crops of one photo stay together."""

import json
import logging

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from sparseinst.data import register_user_datasets
from sparseinst.data.coco_json import log_data_warnings
from sparseinst.data.val_split import choose_images, photo_name
from sparseinst.evaluation import build_evaluator
from tests.shapes_data import write_shapes
from tests.tiny_model import tiny_cfg


@pytest.mark.parametrize(
    ("file_name", "photo"),
    [
        ("photo_0001_crop3.jpg", "photo_0001"), ("photo_0001_crop.jpg", "photo_0001"), ("photo_0001.jpg", "photo_0001"),
        ("street_jpg.rf.1a2b3c4d.jpg", "street"), ("street_png.rf.99ff.png", "street"), ("photo_x0_y512.png", "photo"),
        ("photo-x512-y0.png", "photo"), ("photo_tile_3_4.tif", "photo"), ("photo_patch12.tif", "photo"),
        ("photo_r0_c1.png", "photo"), ("photo_row2_col3.png", "photo"), ("photo_0_0_512_512.png", "photo"),
        ("photo_crop2_jpg.rf.0abc.jpg", "photo"), ("a/photo_crop1.png", "a/photo"),
        ("a\\photo_crop1.png", "a/photo"), ("photo_aug_7.png", "photo"), ("photo_flip.png", "photo"),
        # Numbers and words that are not those of crops.
        ("IMG_0001.jpg", "IMG_0001"), ("2024_01_05.jpg", "2024_01_05"), ("escarp.png", "escarp"),
        ("crop1.png", "crop1"), ("apart.jpg", "apart"), ("DSC00012.JPG", "DSC00012"), ("dog (2).jpg", "dog (2)"),
        ("good_part_017.png", "good_part_017"), ("potato_chip_003.jpg", "potato_chip_003"),
        ("cam1_2023_05_01_0001.jpg", "cam1_2023_05_01_0001"),
    ],
)  # fmt: skip
def test_photo_of_a_file_name(file_name, photo):
    assert photo_name(file_name) == photo


def test_photos_are_not_divided():
    names = [f"photo_{photo:04d}_crop{crop}.jpg" for photo in range(20) for crop in range(5)]
    chosen = choose_images(names, 0.2)
    assert len(chosen) == 20
    assert {photo_name(names[i]) for i in chosen}.isdisjoint(photo_name(names[i]) for i in set(range(100)) - chosen)
    # By the names alone, in any order.
    order = list(reversed(names))
    assert {order[i] for i in choose_images(order, 0.2)} == {names[i] for i in chosen}
    # At least one photo on each side.
    assert len(choose_images(names[:10], 0.01)) == 5 and len(choose_images(names[:10], 0.99)) == 5


def test_a_small_photo_does_not_keep_the_others_out():
    names = [f"field{photo}_x{x}_y{y}.png" for photo in range(5) for x in range(10) for y in range(5)]
    # "a" precedes the other photos in the order of their hashes.
    assert len(choose_images([*names, "close_up_a.png"], 0.2)) == 51
    # At least half of the images to train on stay.
    scans = [f"scan4_crop{number}.png" for number in range(99)]
    assert len(choose_images([*scans, "s4aa.png"], 0.7)) == 1


def test_a_split_far_from_the_share_is_named(tmp_path):
    train_json, train_images = write_shapes(tmp_path, 8)
    content = json.loads(open(train_json).read())
    for number, image in enumerate(content["images"]):
        old, image["file_name"] = image["file_name"], "alone.png" if number == 0 else f"photo_crop{number}.png"
        (tmp_path / train_images / old).rename(tmp_path / train_images / image["file_name"])
    with open(train_json, "w") as file:
        json.dump(content, file)
    opts = ("DATASETS.TRAIN_JSON", train_json, "DATASETS.TRAIN_IMAGES", train_images, "OUTPUT_DIR", str(tmp_path))
    cfg = tiny_cfg(*opts, "DATASETS.VAL_SHARE", 0.5)
    register_user_datasets(cfg)
    assert any("1 are evaluated on; images of one photo stay" in warning
               for warning in MetadataCatalog.get(cfg.DATASETS.TEST[0]).data_warnings)  # fmt: skip


def test_numbers_in_brackets():
    # Windows numbers copies of a photo and whole series alike.
    series = [f"{name} ({number}).jpg" for name in ("cat", "dog") for number in range(1, 51)]
    chosen = choose_images(series, 0.2)
    assert len(chosen) == 20 and 0 < len([index for index in chosen if index < 50]) < 20
    copies = [f"{number}{ending}.jpg" for number in range(10) for ending in ("", " (1)", "(2)")]
    chosen = choose_images(copies, 0.2)
    assert len(chosen) == 6 and len({copies[index][0] for index in chosen}) == 2


@pytest.mark.parametrize("share", [-0.1, 1.0, 20.0, float("nan")])
def test_a_share_out_of_range(share):
    with pytest.raises(ValueError, match=r"DATASETS.VAL_SHARE \(--val-share\) is .* in \(0, 1\)"):
        choose_images(["a.png", "b.png"], share)


def test_one_photo_cannot_be_split():
    with pytest.raises(ValueError, match="of one photo .*'a'.*--test-json"):
        choose_images(["a_crop1.png", "a_crop2.png"], 0.5)


def register(folder, share=0.25, edit=None, splits=("TRAIN", "TEST")):
    train_json, train_images = write_shapes(folder, 8)
    if edit is not None:
        content = json.loads(open(train_json).read())
        edit(content)
        with open(train_json, "w") as file:
            json.dump(content, file)
    cfg = tiny_cfg(
        "DATASETS.TRAIN_JSON", train_json, "DATASETS.TRAIN_IMAGES", train_images, "DATASETS.VAL_SHARE", share,
        "OUTPUT_DIR", str(folder / "out"),
    )  # fmt: skip
    register_user_datasets(cfg, splits)
    return cfg


def ids_of(name):
    return [image["image_id"] for image in DatasetCatalog.get(name)]


def test_two_data_sets(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("sparseinst"), "propagate", True)
    cfg = register(tmp_path)
    train, val = ids_of(cfg.DATASETS.TRAIN[0]), ids_of(cfg.DATASETS.TEST[0])
    assert len(train) == 6 and len(val) == 2 and not set(train) & set(val)
    assert set(MetadataCatalog.get(cfg.DATASETS.TEST[0]).num_instances) <= set(val)
    with caplog.at_level(logging.INFO, "sparseinst"):
        log_data_warnings(cfg)
    assert caplog.text.count("6 images of") == caplog.text.count("2 are evaluated on") == 1
    # An evaluation alone finds the same images.
    assert ids_of(register(tmp_path, splits=("TEST",)).DATASETS.TEST[0]) == val


def test_ap_is_that_of_the_part(tmp_path):
    cfg = register(tmp_path)
    evaluator = build_evaluator(cfg, cfg.DATASETS.TEST[0])
    evaluator.reset()
    for image in DatasetCatalog.get(cfg.DATASETS.TEST[0]):
        evaluator._predictions.append(
            [
                {**{key: entry[key] for key in ("bbox", "segmentation", "category_id", "image_id")}, "score": 1.0}
                for entry in evaluator._coco_api.imgToAnns[image["image_id"]]
            ]
        )
        for result in evaluator._predictions[-1]:
            result["segmentation"] = evaluator._coco_api.annToRLE(result)
            result["segmentation"]["counts"] = result["segmentation"]["counts"].decode()
    assert evaluator.evaluate()["segm"]["AP"] == pytest.approx(100)


def test_parts_without_objects_or_classes_are_named(tmp_path):
    val = set(ids_of(register(tmp_path / "a").DATASETS.TEST[0]))

    def keep(content, wanted):
        content["annotations"] = [entry for entry in content["annotations"] if wanted(entry)]

    def warnings(split, *args):
        cfg = register(tmp_path / "a", 0.25, *args)
        return MetadataCatalog.get(cfg.DATASETS[split][0]).data_warnings

    (warning,) = warnings("TEST", lambda content: keep(content, lambda entry: entry["image_id"] not in val))
    assert "2 are evaluated on; the images to evaluate on have no objects" in warning
    others = lambda content: keep(content, lambda entry: (entry["image_id"] in val) == (entry["category_id"] == 1))  # noqa: E731
    (warning,) = (line for line in warnings("TRAIN", others) if "are trained on" in line)
    assert "the images to train on have no object of 1 classes: disc" in warning
    with pytest.raises(ValueError, match="6 images .* those to train on have no objects"):
        register(tmp_path / "a", 0.25, lambda content: keep(content, lambda entry: entry["image_id"] in val))
