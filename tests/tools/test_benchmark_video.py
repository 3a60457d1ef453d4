import numpy as np
import pytest
import torch
from PIL import Image

from sparseinst.benchmarks.inference import DrawnObjects
from sparseinst.data import images
from sparseinst.inference import VideoWriter
from sparseinst.runtime import exported_model
from sparseinst.tools import benchmark_video
from tests.runtime.test_exported_files import onnx_file
from tests.tiny_model import random_input, tiny_cfg, tiny_model


@pytest.fixture
def arguments(tmp_path):
    with VideoWriter(tmp_path / "clip.mp4", 10) as writer:
        for _ in range(5):
            writer.write(np.zeros((48, 64, 3), np.uint8))
    (tmp_path / "tiny.yaml").write_text(tiny_cfg().dump())
    arguments = ["--config-file", tmp_path / "tiny.yaml", "--video", tmp_path / "clip.mp4", "--detections", 3]
    return [str(argument) for argument in [*arguments, "--repetitions", 1, "--objects", 4, "--image", 60, 80]]


@pytest.fixture
def image_arguments(tmp_path, arguments):
    for index, size in enumerate([(48, 64), (30, 90), (60, 80)]):
        Image.fromarray(np.zeros((*size, 3), np.uint8)).save(tmp_path / f"{index}.png")
    # Without --objects and --image.
    return [*arguments[:2], "--input", str(tmp_path), *arguments[4 : arguments.index("--objects")]]


def test_table(arguments, capsys):
    threads = torch.get_num_threads()
    assert benchmark_video.main([*arguments, "--frames", "4", "--threads", str(threads)]) == 0
    printed = capsys.readouterr().out
    assert "4 frames of 48x64" in printed and "4 objects on an image of 60x80" in printed
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line[0:1] == "|"]
    assert [row[0] for row in rows[2:]] == ["model alone", "demo"]
    assert rows[2][2] == "1.00" and all(float(row[1]) > 0 for row in rows[2:])


def test_predict_on_images(tmp_path, image_arguments, capsys):
    before = sorted(tmp_path.iterdir())
    assert benchmark_video.main([*image_arguments, "--frames", "2"]) == 0
    printed = capsys.readouterr().out
    assert "2 images of 30x90 to 48x64" in printed and "Drawing" not in printed
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line[0:1] == "|"]
    assert [row[0] for row in rows[2:]] == ["model alone", "predict"] and float(rows[3][1]) > 0
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("source", ["video", "images"])
def test_an_exported_file_runs_in_its_engine_at_its_size(tmp_path, request, monkeypatch, source):
    arguments = request.getfixturevalue({"video": "arguments", "images": "image_arguments"}[source])
    path = onnx_file(tmp_path / "model.onnx", size=[96, 128])
    network, seen = tiny_model().network, []

    def run(images):
        # The padding is 0, the images are not.
        seen.append((tuple(images.shape), (images != 0).float().mean().item()))
        return network(images)

    monkeypatch.setattr(exported_model, "open_network", lambda *args: run)
    assert benchmark_video.main([*arguments, "--frames", "1", "--opts", "MODEL.WEIGHTS", str(path)]) == 0
    assert {shape for shape, _ in seen} == {(1, 3, 96, 128)} and max(filled for _, filled in seen) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--frames", "0"], "--frames is 0"),
        (["--detections", "7"], "NUM_MASKS allows 0 to 6"),
        (["--threads", "-1"], "--threads is -1"),
        (["--objects", "7"], "NUM_MASKS allows 0 to 6"),
        (["--video", "none.mp4"], "video file none.mp4 does not exist"),
    ],
)
def test_wrong_arguments_are_told(arguments, options, message, capsys):
    assert benchmark_video.main([*arguments, *options]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--detections", "7"], "NUM_MASKS allows 0 to 6"),
        (["--objects", "4"], "--objects is about drawing, which --input does not time; leave it out"),
        (["--image", "60", "80"], "--image is about drawing"),
    ],
)
def test_wrong_arguments_end_before_images_are_decoded(image_arguments, options, message, capsys, monkeypatch):
    decoded = []
    monkeypatch.setattr(images, "read_image", lambda name, **_: decoded.append(name))
    assert benchmark_video.main([*image_arguments, *options]) == 1
    assert message in capsys.readouterr().err and decoded == []


def test_too_many_detections_are_told_before_frames_are_decoded(arguments, capsys, monkeypatch):
    monkeypatch.setattr(benchmark_video, "_cut", None)
    assert benchmark_video.main([*arguments, "--detections", "7"]) == 1
    assert "NUM_MASKS allows 0 to 6" in capsys.readouterr().err


def test_so_many_objects_are_found():
    model = DrawnObjects(tiny_model(), 3).eval()
    for num_detections in (3, 5):
        model.num_detections = num_detections
        with torch.no_grad():
            assert len(model([random_input(64, 96)])[0]["instances"]) == num_detections
