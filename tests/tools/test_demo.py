import json
import logging
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from pycocotools import mask as mask_api
from pycocotools.coco import COCO

from sparseinst.config import load_config
from sparseinst.data.ground_truth import GroundTruth
from sparseinst.data.images import DataError
from sparseinst.inference import VideoReader, VideoWriter
from sparseinst.ops.mask_output import MaskMemoryError
from sparseinst.tools import demo_run
from tests.tiny_model import tiny_cfg, tiny_model
from tests.tools.demo_scenes import ground_truth_json, pixels_of, run, save_scene

REPO = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("loggers_as_before", "no_window")


def test_a_picture_is_drawn_in_its_colours(tmp_path, config_file, capsys):
    path = save_scene(tmp_path / "in" / "a.png")
    output = tmp_path / "new" / "out"
    assert run(config_file, "--input", path, "--output", output) == 0
    picture = pixels_of(output / "a.png")
    assert picture.shape == (480, 640, 3)
    # The background keeps its colour; over the red block lies a mask; the blue one is below the threshold.
    assert np.abs(picture[300, 200] - (90, 160, 90)).max() <= 1
    assert np.abs(picture[200, 300] - (250, 20, 20)).max() > 40
    assert np.abs(picture[350, 500] - (20, 20, 250)).max() <= 1
    assert "1 of 1 images" in (printed := capsys.readouterr().out) and str(output) in printed


def test_a_missing_package_is_one_line(tmp_path, config_file, monkeypatch, capsys):
    monkeypatch.setattr(demo_run, "Predictor", Mock(side_effect=ImportError("pip install timm")))
    assert run(config_file, "--input", save_scene(tmp_path / "a.png"), "--output", tmp_path / "out") == 2
    assert capsys.readouterr().err.endswith("error: pip install timm\n")


def test_threshold(tmp_path, config_file):
    path = save_scene(tmp_path / "in" / "a.png")
    assert run(config_file, "--input", path, "--output", tmp_path / "out", "--confidence-threshold", 0.2) == 0
    assert np.abs(pixels_of(tmp_path / "out" / "a.png")[350, 500] - (20, 20, 250)).max() > 40


def test_ground_truth_is_drawn_beside(tmp_path, config_file):
    paths = [save_scene(tmp_path / "in" / "a.png"), save_scene(tmp_path / "other" / "b.png")]
    truth = ground_truth_json(tmp_path)
    assert run(config_file, "--input", *paths, "--output", tmp_path / "out", "--ground-truth", truth) == 0
    both = pixels_of(tmp_path / "out" / "a.png")
    left, right = both[-490:, : both.shape[1] // 2], both[-490:, both.shape[1] // 2 :]
    # The red block is found, at the left; the blue one, whose score is low, is the ground truth, at the right.
    red_at, blue_at = (200, 300), (350, 500)
    assert np.abs(left[red_at] - (250, 20, 20)).max() > 40 and np.abs(left[blue_at] - (20, 20, 250)).max() <= 1
    assert np.abs(right[red_at] - (250, 20, 20)).max() <= 1 and np.abs(right[blue_at] - (20, 20, 250)).max() > 40
    # A picture that the json does not have stands alone.
    assert pixels_of(tmp_path / "out" / "b.png").shape == (480, 640, 3)


def test_ground_truth_of_another_size_is_named(tmp_path, config_file, capsys):
    paths = [save_scene(tmp_path / "in" / "a.png", size=(48, 66)), save_scene(tmp_path / "other" / "b.png")]
    truth, output, file = ground_truth_json(tmp_path), tmp_path / "out", tmp_path / "found.json"
    assert run(config_file, "--input", *paths, "--output", output, "--json", file, "--ground-truth", truth) == 1
    assert "a.png has 48 x 66 pixels" in capsys.readouterr().err
    assert {path.name for path in output.iterdir()} == {"a.png", "b.png"} and len(json.loads(file.read_text())) == 2


def test_ground_truth_of_other_classes_is_refused(tmp_path, config_file, capsys):
    path = save_scene(tmp_path / "in" / "a.png")
    truth = ground_truth_json(tmp_path, ("red thing", "green thing"))
    assert run(config_file, "--input", path, "--output", tmp_path / "out", "--ground-truth", truth) == 2
    assert "green thing" in capsys.readouterr().err
    # Another order of the ids is not.
    truth = ground_truth_json(tmp_path, ("blue thing", "red thing"))
    assert run(config_file, "--input", path, "--output", tmp_path / "out", "--ground-truth", truth) == 0


def test_nothing_found_is_the_plain_picture(tmp_path, config_file):
    path = save_scene(tmp_path / "in" / "a.png", red=False, size=(500, 520))
    assert run(config_file, "--input", path, "--output", tmp_path / "out", "--show-iams") == 0
    assert np.array_equal(pixels_of(tmp_path / "out" / "a.png"), pixels_of(path))
    assert (tmp_path / "out" / "iams" / "a.png").is_file()


def test_folders_globs_and_equal_names(tmp_path, config_file):
    for name in ("one/a.png", "one/b.JPG", "two/a.png", "two/a_2.png", "three/deep/c.bmp"):
        save_scene(tmp_path / name)
    (tmp_path / "one" / "notes.txt").write_text("no picture")
    inputs = [tmp_path / "one", tmp_path / "two" / "*.png", tmp_path / "three" / "**" / "*", tmp_path / "one" / "a.png"]
    assert run(config_file, "--input", *inputs, "--output", tmp_path / "out") == 0
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["a.png", "a_2.png", "a_3.png", "b.JPG", "c.png"]


def test_unreadable_files_are_passed_and_named(tmp_path, config_file, capsys):
    good = [save_scene(tmp_path / "in" / name) for name in ("a.png", "c.png")]
    (tmp_path / "in" / "b.png").write_bytes(b"no picture")
    assert run(config_file, "--input", tmp_path / "in", "--output", tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert "b.png" in captured.err and "2 of 3 images" in captured.out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [path.name for path in good]


def test_json_is_cocos(tmp_path, config_file):
    paths = [save_scene(tmp_path / "in" / "a.png", red=False), save_scene(tmp_path / "in" / "b.png")]
    file = tmp_path / "results" / "found.json"
    # Without --output nothing is drawn, and no window is needed.
    assert run(config_file, "--input", tmp_path / "in", "--json", file, "--confidence-threshold", 0) == 0
    data = COCO(str(tmp_path / "results" / "found_images.json"))
    assert [image["file_name"] for image in data.loadImgs([1, 2])] == [str(path) for path in paths]
    assert [image["height"] for image in data.loadImgs([1, 2])] == [48, 48]
    assert {category["id"]: category["name"] for category in data.loadCats([3, 8])} == {3: "red thing", 8: "blue thing"}
    found = data.loadRes(str(file)).loadAnns([1, 2])
    assert [(x["image_id"], x["category_id"]) for x in found] == [(2, 3), (2, 8)]
    assert np.allclose(found[0]["bbox"], [8, 8, 32, 16], atol=1) and found[0]["score"] == pytest.approx(0.9)
    assert mask_api.area(found[0]["segmentation"]) == pytest.approx(32 * 16, abs=60)


@pytest.fixture
def tiny_config_file(tmp_path):
    """A SparseInst that finds something everywhere."""
    opts = ("MODEL.SPARSE_INST.CLS_THRESHOLD", 0.0, "MODEL.WEIGHTS", str(tmp_path / "tiny.pth"))
    DetectionCheckpointer(tiny_model(*opts), str(tmp_path)).save("tiny")
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_cfg(*opts).dump())
    return str(path)


def test_encoded_masks_give_the_same_files(tmp_path, tiny_config_file):
    save_scene(tmp_path / "in" / "a.png")
    written = []
    for mask_format in ("bitmask", "rle"):
        output = tmp_path / mask_format
        options = ["--confidence-threshold", 0, "--show-iams", "--opts", "MODEL.OUTPUT.MASK_FORMAT"]
        common = ["--input", tmp_path / "in", "--output", output, "--json", output / "found.json"]
        assert run(tiny_config_file, *common, *options, mask_format) == 0
        written.append({path.relative_to(output): path.read_bytes() for path in output.rglob("*") if path.is_file()})
    assert len(written[0]) == 4 and written[0] == written[1]
    assert len(json.loads(written[0][Path("found.json")])) > 1


def test_pictures_whose_masks_are_too_large_are_passed_and_named(tmp_path, tiny_config_file, capsys):
    save_scene(tmp_path / "in" / "large.png", size=(1200, 1000))
    save_scene(tmp_path / "in" / "small.png")
    common = ["--input", tmp_path / "in", "--output", tmp_path / "out", "--confidence-threshold", 0]
    assert run(tiny_config_file, *common, "--opts", "MODEL.OUTPUT.MAX_MASK_GIB", "0.001") == 1
    captured = capsys.readouterr()
    assert "1 of 2 images" in captured.out and (tmp_path / "out" / "small.png").is_file()
    assert "large.png: 6 boolean masks of 1200x1000" in captured.err and "MAX_MASK_GIB" in captured.err


def test_a_frame_whose_masks_are_too_large_ends_the_video(tmp_path, config_file, monkeypatch, capsys):
    with VideoWriter(tmp_path / "clip.mp4", 10) as writer:
        for _ in range(5):
            writer.write(np.full((48, 64, 3), (250, 20, 20), np.uint8))
    calls, predict = [], demo_run.TimedPredictor.predict

    def predict_three(self, image):
        calls.append(image)
        if len(calls) == 4:
            raise MaskMemoryError("9 boolean masks")
        return predict(self, image)

    monkeypatch.setattr(demo_run.TimedPredictor, "predict", predict_three)
    file = tmp_path / "found.json"
    arguments = ["--video-input", tmp_path / "clip.mp4", "--output", tmp_path / "out", "--json", file]
    assert run(config_file, *arguments) == 1
    captured = capsys.readouterr()
    assert "The first 3 frames are in" in captured.out and "frame 4: 9 boolean masks" in captured.err
    assert len(json.loads(file.read_text())) == 3
    with VideoReader(tmp_path / "out" / "clip.mp4") as reader:
        assert len(list(reader)) == 3


def test_the_limit_of_pixels(tmp_path, config_file, capsys):
    path, truth = save_scene(tmp_path / "in" / "a.png"), ground_truth_json(tmp_path)
    arguments = ["--input", path, "--output", tmp_path / "out", "--opts", "INPUT.MAX_IMAGE_PIXELS"]
    assert run(config_file, *arguments, "3071") == 1
    assert "INPUT.MAX_IMAGE_PIXELS is 3071" in capsys.readouterr().err
    with pytest.raises(DataError, match="INPUT.MAX_IMAGE_PIXELS is 3071"):
        GroundTruth(truth, 3071).find(path)


def test_iam_picture(tmp_path, config_file, capsys):
    path = save_scene(tmp_path / "in" / "a.png")
    output = tmp_path / "out"
    assert run(config_file, "--input", path, "--output", output, "--show-iams") == 0
    # One row: the picture, and four maps.
    assert pixels_of(output / "iams" / "a.png").shape == (192 + 22 + 12, 5 * 262 + 6, 3)
    assert (output / "a.png").is_file() and "iams" in capsys.readouterr().out


def test_a_video_is_drawn_frame_by_frame(tmp_path, config_file, capsys):
    clip = tmp_path / "in" / "clip.mp4"
    with VideoWriter(clip, 10) as writer:
        for index in range(6):
            frame = np.full((48, 64, 3), (90, 160, 90), np.uint8)
            frame[8:24, index * 4 : index * 4 + 32] = (250, 20, 20)
            writer.write(frame)
    file = tmp_path / "found.json"
    assert run(config_file, "--video-input", clip, "--output", tmp_path / "out", "--json", file) == 0
    with VideoReader(tmp_path / "out" / "clip.mp4") as reader:
        assert reader.fps == 10
        frames = list(reader)
    assert len(frames) == 6 and frames[0].shape == (48, 64, 3)
    # Rows that no name reaches.
    assert np.abs(frames[0][44, 60].astype(int) - (90, 160, 90)).max() < 40
    images = json.loads((tmp_path / "found_images.json").read_text())["images"]
    assert [image["frame"] for image in images] == [1, 2, 3, 4, 5, 6]
    assert {result["image_id"] for result in json.loads(file.read_text())} == {1, 2, 3, 4, 5, 6}
    assert "6 frames" in capsys.readouterr().out

    assert run(config_file, "--video-input", clip, "--output", tmp_path / "named.mp4") == 0
    assert (tmp_path / "named.mp4").is_file()


def test_masks_below_the_threshold_are_not_made_and_change_nothing(tmp_path, tiny_config_file):
    save_scene(tmp_path / "in" / "a.png")

    def found(threshold, *options):
        file = tmp_path / "found.json"
        common = ["--input", tmp_path / "in", "--json", file, "--confidence-threshold", threshold]
        assert run(tiny_config_file, *common, *options) == 0
        return json.loads(file.read_text())

    everything = found(0)
    scores = sorted((result["score"] for result in everything), reverse=True)
    assert len(scores) > 3
    # At a score itself, and between two.
    for threshold in (scores[1], (scores[1] + scores[2]) / 2, scores[-1]):
        for options in ((), ("--mask-nms", "0.5")):
            expected = [result for result in found(0, *options) if result["score"] >= threshold]
            assert found(threshold, *options) == expected
    with pytest.MonkeyPatch.context() as patch:
        kept = []
        patch.setattr(demo_run, "run_images", lambda args, cfg: kept.append(cfg.MODEL.OUTPUT.SCORE_THRESHOLD) or 0)
        for threshold in (0, 0.5):
            found_nothing = ["--input", "x", "--json", tmp_path / "x.json", "--confidence-threshold", threshold]
            assert run(tiny_config_file, *found_nothing) == 0
        assert run(tiny_config_file, *found_nothing, "--opts", "MODEL.OUTPUT.SCORE_THRESHOLD", "0.7") == 0
        assert kept == [0, pytest.approx(0.4995), 0.7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "{tmp}/none/*.jpg", "--output", "{tmp}/out"], "none/*.jpg"),
        (["--input", "{tmp}/empty", "--output", "{tmp}/out"], "empty"),
        (["--input", "{tmp}/in/a.png", "--output", "{tmp}/in"], "--output"),
        (["--input", "{tmp}/in/iams/a.png", "--output", "{tmp}/in"], "--output"),
        (["--input", "{tmp}/in/a.png", "--output", "{tmp}/out.jpg"], "--output is a folder"),
        (["--input", "{tmp}/in/a.png", "--output", "{tmp}/model.pth"], "must be a folder"),
        (["--input", "{tmp}/in/a.png"], "opencv-python"),
        (["--input", "{tmp}/in/a.png", "--json", "{tmp}/x.json", "--show-iams"], "--output"),
        (["--webcam"], "opencv-python"),
        (["--video-input", "{tmp}/in/none.mp4", "--output", "{tmp}/out"], "none.mp4"),
        (["--video-input", "{tmp}/in/a.png", "--output", "{tmp}/in/a.avi"], ".mp4"),
        (["--video-input", "{tmp}/in/clip.mp4", "--output", "{tmp}/in"], "overwrite"),
        (["--video-input", "{tmp}/in/clip.mp4", "--output", "{tmp}/out", "--show-iams"], "--input"),
        (["--input", "{tmp}/in/a.png", "--output", "{tmp}/out", "--mask-nms", "1.5"], "--mask-nms"),
        (["--input", "{tmp}/in/a.png", "--output", "{tmp}/out", "--confidence-threshold", "50"], "--confidence"),
        (["--input", "{tmp}/in/a.png", "--output", "{tmp}/out", "--opts", "MODEL.WEIGHT", "x"], "MODEL.WEIGHT"),
        (["--input", "{tmp}/in/a.png", "--output", "{tmp}/out", "--opts", "MODEL.WEIGHTS", "x.pth"], "x.pth"),
    ],
)
def test_wrong_arguments_are_told(tmp_path, config_file, capsys, arguments, message):
    save_scene(tmp_path / "in" / "a.png")
    save_scene(tmp_path / "in" / "iams" / "a.png")
    with VideoWriter(tmp_path / "in" / "clip.mp4", 10) as writer:
        writer.write(np.zeros((32, 32, 3), np.uint8))
    (tmp_path / "empty").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run(config_file, *(argument.replace("{tmp}", str(tmp_path)) for argument in arguments)) == 2
    assert message in capsys.readouterr().err
    assert all(path.read_bytes() == content for path, content in before.items())


def test_window(tmp_path, config_file, shown):
    for name in "abcd":
        save_scene(tmp_path / "in" / f"{name}.png")
    assert run(config_file, "--input", tmp_path / "in") == 0
    assert [title for title, _ in shown] == ["a.png", "b.png", "c.png"]
    # OpenCV's windows take BGR.
    assert np.abs(shown[0][1][350, 500].astype(int) - (250, 20, 20)).max() <= 1


def test_without_a_display_there_is_no_window(tmp_path, config_file, shown, monkeypatch, capsys):
    # Qt ends the process there.
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("DISPLAY")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert run(config_file, "--input", save_scene(tmp_path / "in" / "a.png")) == 2
    assert "--output" in capsys.readouterr().err and not shown


def test_webcam(tmp_path, config_file, shown, monkeypatch):
    clip = tmp_path / "clip.mp4"
    with VideoWriter(clip, 10) as writer:
        for _ in range(6):
            writer.write(np.full((48, 64, 3), (90, 160, 90), np.uint8))
    monkeypatch.setattr(demo_run, "VideoReader", lambda source: VideoReader({2: clip}[source]))
    assert run(config_file, "--webcam", 2, "--output", tmp_path / "out") == 0
    assert len(shown) == 3
    with VideoReader(tmp_path / "out" / "webcam.mp4") as reader:
        assert len(list(reader)) == 3


def test_webcam_without_a_window(tmp_path, config_file, no_window, monkeypatch, capsys):
    clip = tmp_path / "clip.mp4"
    with VideoWriter(clip, 10) as writer:
        for _ in range(6):
            writer.write(np.full((48, 64, 3), (90, 160, 90), np.uint8))
    monkeypatch.setattr(demo_run, "VideoReader", lambda source: VideoReader({0: clip}[source]))
    assert run(config_file, "--webcam", "--output", tmp_path / "out") == 0
    assert "6 frames are in" in capsys.readouterr().out
    with VideoReader(tmp_path / "out" / "webcam.mp4") as reader:
        assert len(list(reader)) == 6


def test_a_video_from_an_address(tmp_path, config_file, capsys):
    with VideoWriter(tmp_path / "hall.mp4", 10) as writer:
        for _ in range(6):
            writer.write(np.full((48, 64, 3), (250, 20, 20), np.uint8))
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}/hall.mp4"
        options = ["--output", tmp_path / "out", "--json", tmp_path / "found.json"]
        assert run(config_file, "--video-input", f"http://me:secret@{address}?fps=5", *options) == 0
        assert run(config_file, "--video-input", f"http://me:secret@{address}.none", *options) == 2
        server.shutdown()
    assert (tmp_path / "out" / "hall.mp4").is_file()
    assert f"OpenCV cannot open http://{address}.none" in capsys.readouterr().err
    names = {image["file_name"] for image in json.loads((tmp_path / "found_images.json").read_text())["images"]}
    assert names == {f"http://{address}?fps=5"}


def test_flags_set_the_keys(tmp_path, config_file, monkeypatch):
    seen = []
    monkeypatch.setattr(demo_run, "run_images", lambda args, cfg: seen.append(cfg.MODEL.SPARSE_INST) or 0)
    common = ["--input", "a.png", "--output", tmp_path]
    key = "MODEL.SPARSE_INST.MASK_NMS_THRESHOLD"
    assert run(config_file, *common, "--mask-nms", 0.5, "--show-iams") == 0
    assert run(config_file, *common, "--opts", key, "0.7") == 0
    assert [(keys.MASK_NMS_THRESHOLD, keys.DECODER.OUTPUT_IAM) for keys in seen] == [(0.5, True), (0.7, False)]


def test_load_config(tmp_path, config_file, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.WARNING, "sparseinst"):
        # A name of the package's, a file's path, an override.
        cfg = load_config("sparse_inst_r50_giam", ["INPUT.MIN_SIZE_TEST", "320"])
    assert cfg.MODEL.META_ARCHITECTURE == "SparseInst" and cfg.INPUT.MIN_SIZE_TEST == 320
    assert cfg.MODEL.DEVICE == "cpu" and "running on the CPU" in caplog.text
    caplog.clear()
    assert load_config(config_file).MODEL.META_ARCHITECTURE == "RedSegmenter"
    assert not caplog.text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert load_config("sparse_inst_r50_giam").MODEL.DEVICE == "cuda"


def test_load_config_names_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="no_such_file"):
        load_config("no_such_file.yaml")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("MODEL:\n  SPARSEINST: 1\nVERSION: 2\n")
    with pytest.raises(ValueError, match="wrong.yaml.*SPARSEINST"):
        load_config(str(wrong))
    with pytest.raises(ValueError, match="overrides"):
        load_config("sparse_inst_r50_giam", ["SOLVER.BASE_LR"])


def test_the_script_and_the_module_are_one_command(tmp_path):
    for command in (["demo/demo.py"], ["-m", "sparseinst.tools.demo"]):
        result = subprocess.run(
            [sys.executable, *command, "--help"],
            cwd=REPO,
            env={"PYTHONPATH": str(REPO), "PATH": ""},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        assert "--confidence-threshold" in result.stdout
