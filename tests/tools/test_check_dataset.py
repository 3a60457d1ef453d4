"""Test the counts, suggestions and exit codes of check_dataset; test_flaws.py compares it with training."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from sparseinst.data import recipes
from sparseinst.modeling.sparse_inst.target_check import is_on_grid
from sparseinst.structures.mask_window import MaskWindow
from sparseinst.tools import check_dataset
from tests.data.flawed_json import CONTENT, annotation, flawed, write
from tests.red_segmenter import red_segmenter_config
from tests.shapes_data import write_shapes
from tests.tiny_model import tiny_cfg


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_cfg().dump())
    return str(path)


def check(capsys, json_file, images, *args):
    code = check_dataset.main([str(json_file), str(images), *map(str, args)])
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    return code, output.out


def test_counts_by_hand(config_file, tmp_path, capsys):
    content = flawed("none")
    # 1.png: sides 20 and 25; 2.png: 30, 33 and 1; a crowd on 3.png; nothing on 4.png.
    content["annotations"] += [annotation(5, 2, 17, 2, 2, 33), annotation(6, 2, 3, 50, 30, 1)]
    code, output = check(capsys, *write(tmp_path, content), "--config-file", config_file)
    assert code == 0
    assert "4 images, 3 categories, 6 annotations (1 crowds)" in output
    assert "Annotations of each category: disc 1, cross 2, bar 3" in output
    assert "objects per image: median 1, 99th percentile 3, most 3; images without objects: 2 of 4" in output
    assert "80.0% small (below 32 x 32 pixels), 20.0% medium, 0.0% large" in output
    assert "NUM_CLASSES 3; MODEL.SPARSE_INST.DECODER.NUM_MASKS 3 or more" in output and "(it is 6)" in output
    assert "A training sets them by itself, masks up to 500, where neither you nor MODEL.WEIGHTS do\n" in output
    # Resized by 64 / 40: squares of 20, 25, 30, 33 and 1 pixels.
    assert "sqrt(width * height): median 40 pixels, a twentieth below 7.7\n" in output
    assert output.endswith("Nothing here stops a training.\n")


def test_the_levels_and_crops_that_a_training_sets(tmp_path, capsys):
    content = flawed("none")
    content["annotations"][1:3] = [annotation(2, 1, 3, 30, 8, 15), annotation(3, 2, 17, 2, 2, 15)]
    files = write(tmp_path, content)
    small = ["--recipe", "ordinary", "--opts", "INPUT.MIN_SIZE_TRAIN", "(128,)"]
    output = check(capsys, *files, *small)[1]
    reason = r"because for 90 % of the objects sqrt\(width \* height\) is \d+ to \d+ pixels in training"
    assert re.search(rf"MODEL.SPARSE_INST.DECODER.NUM_LEVELS 1 by itself, {reason}, unless MODEL.WEIGHTS", output)
    assert re.search(rf"A training sets INPUT.CROP.ENABLED False by itself, {reason}\n", output)
    evaluation = check(capsys, *files, "--evaluation", *small)[1]
    assert "NUM_LEVELS" not in evaluation and "INPUT.CROP" not in evaluation
    assert "NUM_LEVELS" not in check(capsys, *files, *small, "MODEL.SPARSE_INST.DECODER.NUM_LEVELS", "4")[1]


def test_a_model_of_another_interface(tmp_path, capsys):
    path = tmp_path / "red.yaml"
    path.write_text(red_segmenter_config().dump())
    code, output = check(capsys, *write(tmp_path, flawed("none")), "--config-file", path)
    assert code == 1 and "there are 3 categories, but" in output and "mask grid" not in output


def test_drawn_shapes_in_every_way(tmp_path, capsys):
    files = write_shapes(tmp_path / "shapes", 6)
    reports = [check(capsys, *files, *args) for args in ([], ["--quick"], ["--workers", 2], ["--evaluation"])]
    assert [code for code, _ in reports] == [0] * 4
    assert reports[0][1] == reports[1][1] == reports[2][1]
    assert "NUM_CLASSES 4" in reports[0][1] and reports[3][1].endswith("Nothing here stops an evaluation.\n")


def test_all_broken_images_are_told_in_one_pass(config_file, tmp_path, capsys):
    json_file, images = write(tmp_path)
    (images / "1.png").write_bytes((images / "1.png").read_bytes()[:-300])
    (images / "2.png").unlink()
    Image.new("RGB", (40, 60)).save(images / "3.png")
    (images / "4.png").write_text("not an image")
    strict = ["--config-file", config_file, "--opts", "DATALOADER.MAX_BROKEN_IMAGES"]
    for workers in (0, 2):
        code, output = check(capsys, json_file, images, *strict, 2, "--workers", workers)
        assert code == 1 and "Problems, which stop a training: 5" in output
        assert "4 of 4; a training skips at most DATALOADER.MAX_BROKEN_IMAGES, which is 2: repair" in output
        assert "unreadable image: 2" in output and "1.png: " in output and "4.png: it is not an image" in output
        assert "missing file: 1" in output and "'2.png'" in output
        assert "another image size: 1" in output and "EXIF" in output
        assert output.endswith("A training with these data would stop.\n")
    # Headers alone do not show the first.
    code, output = check(capsys, json_file, images, *strict, 1, "--quick")
    assert code == 1 and "Problems, which stop a training: 4" in output


def test_a_training_skips_some_broken_images(config_file, tmp_path, capsys):
    json_file, images = write(tmp_path)
    for number in (1, 2):
        (images / f"{number}.png").write_text("not an image")
    for limit, expected in ((2, 0), (1, 1)):
        arguments = ["--config-file", config_file, "--opts", "DATALOADER.MAX_BROKEN_IMAGES", limit]
        code, output = check(capsys, json_file, images, *arguments)
        assert code == expected and "unreadable image: 2" in output
        assert f"2 of 4; a training skips at most DATALOADER.MAX_BROKEN_IMAGES, which is {limit}" in output
    for number in (3, 4):
        (images / f"{number}.png").write_text("not an image")
    assert check(capsys, json_file, images, "--config-file", config_file)[0] == 1  # None is left.


def test_kinds_are_capped_and_counted(config_file, tmp_path, capsys):
    content = flawed("none")
    for number in range(10, 40):
        content["annotations"].append({**annotation(number, 1, 3, 0, 0, 9), "segmentation": [[1, 2, 3]]})
    content["annotations"].append({**annotation(77, 1, 3, 0, 0, 9), "segmentation": [[1, 2]]})
    files = write(tmp_path, content)
    code, output = check(capsys, *files, "--config-file", config_file, "--show", 2)
    assert code == 1
    assert "segmentation: 30\n" in output and output.count("a polygon of 3 numbers") == 2 and "and 28 more" in output
    assert "Warnings: 2\n  polygons of fewer than three points: 1\n    annotation 77 ('1.png')" in output


def test_what_only_warns(config_file, tmp_path, capsys):
    content = flawed("none")
    content["images"].append({**content["images"][0], "id": 9})
    content["annotations"] += [annotation(number, 1, 3, 1, 1, 9) for number in range(10, 20)]
    code, output = check(capsys, *write(tmp_path, content), "--config-file", config_file)
    assert code == 0
    assert (
        "'1.png' is named by 2 images" in output
        and "NUM_MASKS 12 and MODEL.SPARSE_INST.MAX_DETECTIONS 100 would hold all" in output
    )


def test_the_recipe_is_that_of_a_training(tmp_path, capsys):
    content = flawed("none")
    content["annotations"] += [annotation(number, 1, 3, 1, 1, 9) for number in range(10, 150)]
    files = write(tmp_path, content)
    code, output = check(capsys, *files, "--quick", "--recipe", "auto")
    assert code == 0 and "\nRecipe auto: small_data/efficientnet_lite0_crowded, because" in output
    assert "neither learns" not in output and "(it is 400)" in output
    # The other recipe finds fewer, until a training raises the keys.
    code, output = check(capsys, *files, "--quick", "--recipe", "ordinary")
    assert "1 of 2 images with objects have more" in output and "neither learns" not in output
    assert "NUM_MASKS 142 and MODEL.SPARSE_INST.MAX_DETECTIONS 142 by itself, up to 500, unless MODEL.WEIGHTS" in output
    both = ["--recipe", "auto", "--config-file", "small_data/yolact"]
    assert check_dataset.main([*map(str, files), *both]) == 2
    assert "both given" in capsys.readouterr().err


def test_a_broken_json_has_a_report_with_any_recipe(tmp_path, capsys):
    content = flawed("none")
    del content["annotations"]
    code, output = check(capsys, *write(tmp_path, content), "--quick", "--recipe", "auto")
    assert code == 1 and "Recipe ordinary, because auto fails: " in output and "would stop" in output


def test_the_packages_of_a_recipe_are_named_as_by_a_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(recipes, "PACKAGES", ("torch", "no_such_package"))
    json_file, images = write(tmp_path, flawed("none"))
    assert check_dataset.main([str(json_file), str(images), "--quick", "--recipe", "auto"]) == 2
    error = capsys.readouterr().err
    assert "error: --recipe needs the packages no_such_package, " in error and "'sparseinst[small-data]'" in error


def test_the_number_of_classes_counts_where_a_config_is_given(config_file, tmp_path, capsys):
    files = write(tmp_path, flawed("one category too many"))
    assert check(capsys, *files)[0] == 0
    code, output = check(capsys, *files, "--config-file", config_file)
    assert code == 1 and "set MODEL.SPARSE_INST.DECODER.NUM_CLASSES 4" in output
    opts = ["--opts", "MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4]
    assert check(capsys, *files, "--config-file", config_file, *opts)[0] == 0


def test_wrong_arguments(tmp_path, capsys):
    json_file, images = write(tmp_path)
    for arguments, message in (
        ([tmp_path / "none.json", images], "none.json"),
        ([json_file, tmp_path / "none"], "none does not exist"),
        ([json_file, images, "--config-file", "no_such_config"], "no_such_config"),
        ([json_file, images, "--opts", "NO.KEY", "1"], "NO.KEY"),
        ([json_file, images, "--workers", "-1"], "--workers"),
    ):
        assert check_dataset.main(list(map(str, arguments))) == 2
        assert message in (error := capsys.readouterr().err) and error.startswith("error: ")
    for key, value, message in (
        ("MODEL.BACKBONE.NAME", "build_none", "MODEL.BACKBONE.NAME is 'build_none'"),
        ("MODEL.SPARSE_INST.ENCODER.IN_FEATURES", "['res9', 'res4']", "ENCODER.IN_FEATURES has ['res9']"),
    ):
        assert check_dataset.main([str(json_file), str(images), "--quick", "--opts", key, value]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert message in error and error.startswith("error: ")
    with pytest.raises(SystemExit) as error:
        check_dataset.main([])
    assert error.value.code == 2


def test_objects_that_the_mask_grid_loses(config_file, tmp_path, capsys):
    # Resized from 40 x 60 to 64 x 96, by 1.6: a square of one pixel covers 1.6, and the grid looks at 2 of 4.
    content = {**CONTENT, "annotations": [annotation(n, 1, 3, n, 10, 1) for n in range(20)]}
    files = write(tmp_path, content)
    code, output = check(capsys, *files, "--config-file", config_file)
    (line,) = [line for line in output.splitlines() if "the mask grid loses" in line]
    num_lost = int(line.split(": ")[1].split(" of 20")[0])
    assert code == 0 and "short side 64" in line and "ANTIALIASED_TARGETS True keeps them" in line
    assert 0 < num_lost < 20
    opts = ["--opts", "MODEL.SPARSE_INST.ANTIALIASED_TARGETS", "True"]
    assert "loses: none, with" in check(capsys, *files, "--config-file", config_file, *opts)[1]


@pytest.mark.parametrize("pixels_per_cell", [4.0, 2.0, 16 / 3])
def test_what_the_grid_shows_is_what_the_whole_mask_s_reduction_shows(pixels_per_cell):
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        mask = np.zeros((96, 128), bool)
        top, left = rng.integers(0, (90, 120))
        height, width = rng.integers(1, 6, 2)
        mask[top : top + height, left : left + width] = rng.random((height, width))[: 96 - top, : 128 - left] < 0.5
        window = MaskWindow(mask, 0, 0).shrink()
        if window is None:
            continue
        cells = (round(96 / pixels_per_cell), round(128 / pixels_per_cell))
        whole = torch.from_numpy(mask)[None, None].float()
        expected = bool(F.interpolate(whole, size=cells, mode="bilinear", align_corners=False).any())
        assert is_on_grid(window, pixels_per_cell) == expected
        seen.add(expected)
    assert seen == {True, False} or pixels_per_cell == 2


def test_a_json_that_is_garbage_ends_in_a_verdict(config_file, tmp_path, capsys):
    text = json.dumps(CONTENT)
    rng = np.random.default_rng(0)
    codes = []
    for _ in range(25):
        damaged = bytearray(text.encode())
        for _ in range(3):
            damaged[rng.integers(len(damaged))] = rng.integers(32, 127)
        json_file, images = write(tmp_path, damaged.decode())
        codes.append(check(capsys, json_file, images)[0])
    assert set(codes) <= {0, 1} and 1 in codes


def test_an_image_of_the_training_s_size(config_file, tmp_path, capsys):
    content = {**CONTENT, "images": [{**CONTENT["images"][0], "height": 64, "width": 96}]}
    content["annotations"] = [annotation(1, 1, 3, 5, 5, 20)]
    json_file, images = write(tmp_path, content)
    Image.new("RGB", (96, 64)).save(images / "1.png")
    code, output = check(capsys, json_file, images, "--config-file", config_file)
    assert code == 0 and "0 of 1 (0.0%)" in output


def test_a_model_of_grids_says_how_the_objects_fit(tmp_path, capsys):
    files = write_shapes(tmp_path / "shapes", 3)
    _, output = check(capsys, *files, "--config-file", "small_data/solov2_light")
    assert "now: 0.0% of the objects in no range" in output and "mask grid" not in output
    assert "with MODEL.SOLOV2.SCALE_RANGES [[1, " in output and "SOLOV2.NUM_GRIDS [" in output
    _, output = check(capsys, *files, "--config-file", "small_data/solov2_light", "--opts",
                      "MODEL.SOLOV2.SCALE_RANGES", [[1, 4], *[[400, 800]] * 4])  # fmt: skip
    assert "now: 100.0% of the objects in no range" in output
    assert "SCALE_RANGES belong to larger images" in output
