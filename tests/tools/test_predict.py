"""sparseinst predict: what it writes, skips, refuses and reports."""

import json
import os

import pytest
import torch

from sparseinst import load_config
from sparseinst.engine.processes import take_gpu_of_rank
from sparseinst.inference import Predictor, resumable_file, to_coco_results
from sparseinst.inference.resumable_file import shards
from sparseinst.inference.timed_predictor import TimedPredictor
from sparseinst.tools import predict
from tests.red_segmenter import RedSegmenter
from tests.runtime.test_onnxruntime_errors import network_that_raises
from tests.tools.demo_scenes import save_scene

NAMES = [f"{name}.png" for name in "abcde"]


@pytest.fixture
def images(tmp_path, loggers_as_before):
    """A folder of images of different colors and sizes."""
    for index, name in enumerate(NAMES):
        save_scene(tmp_path / "in" / name, (90, 150 + index, 90), red=index != 2, size=(48 + index, 64))
    return tmp_path / "in"


@pytest.fixture
def predicted(monkeypatch):
    """The heights of the images that the model gets."""
    heights, original = [], TimedPredictor.predict

    def record(self, image):
        heights.append(len(image))
        return original(self, image)

    monkeypatch.setattr(TimedPredictor, "predict", record)
    return heights


def run(config_file, *arguments):
    return predict.main(["--config-file", config_file, *map(str, arguments)])


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_the_predictors_results(images, config_file, tmp_path, capsys):
    output = tmp_path / "new" / "out.jsonl"
    assert run(config_file, "--input", images, "--output", output) == 0
    header, *lines = lines_of(output)
    assert header["categories"] == [{"id": 3, "name": "red thing"}, {"id": 8, "name": "blue thing"}]
    assert header["config"]["MODEL"]["OUTPUT"]["MASK_FORMAT"] == "rle"
    assert header["images"]["count"] == 5 and header["weights"]["file"].endswith("model.pth")
    paths = [str(images / name) for name in NAMES]
    assert [line["file_name"] for line in lines] == paths
    expected = Predictor(load_config(config_file))(paths)
    assert [len(line["detections"]) for line in lines] == [2, 2, 0, 2, 2]
    for line, instances in zip(lines, expected):
        assert (line["height"], line["width"]) == instances.image_size
        results = to_coco_results(instances, 0, [3, 8])
        assert [{"image_id": 0, **detection} for detection in line["detections"]] == results
    printed = capsys.readouterr().out
    assert "5 images in" in printed and f"{output}: all 5 images" in printed


def test_done_images_are_not_predicted_again(images, config_file, tmp_path, predicted, capsys):
    output = tmp_path / "out.jsonl"
    arguments = ["--input", images, "--output", output]
    assert run(config_file, *arguments) == 0
    whole = output.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    # The header and two lines; then with a part of the third.
    for size in (ends[2], ends[2] + 20, ends[3] - 1):
        predicted.clear()
        output.write_bytes(whole[:size])
        assert run(config_file, *arguments) == 0
        assert predicted == [50, 51, 52] and output.read_bytes() == whole
        assert "2 images had a line already; 3 images in" in capsys.readouterr().out
    predicted.clear()
    assert run(config_file, *arguments) == 0 and predicted == [] and output.read_bytes() == whole


def test_one_process_reads_its_file_once(images, config_file, tmp_path, monkeypatch):
    scan, scanned = resumable_file._scan, []
    monkeypatch.setattr(resumable_file, "_scan", lambda path, header: scanned.append(path.name) or scan(path, header))
    for _ in range(2):
        assert run(config_file, "--input", images, "--output", tmp_path / "out.jsonl") == 0
    assert scanned == ["out.jsonl"] * 2


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_processes_of_torchrun(images, config_file, tmp_path, predicted, capsys, monkeypatch, num_ranks):
    arguments = ["--input", images, "--output"]
    assert run(config_file, *arguments, tmp_path / "one.jsonl") == 0
    monkeypatch.setenv("WORLD_SIZE", str(num_ranks))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(num_ranks))
    output = tmp_path / "out.jsonl"
    for rank in range(num_ranks):
        predicted.clear()
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert run(config_file, *arguments, output) == 0
        assert predicted == list(range(48, 53))[rank::num_ranks]
        assert bool(shards(output)) == (rank + 1 < num_ranks)
        assert f"rank {rank}: {len(predicted)} images in" in capsys.readouterr().out
    assert output.read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def test_another_list_config_or_score_is_refused(images, config_file, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    assert run(config_file, "--input", images, "--output", output) == 0
    whole = output.read_bytes()

    def refused(*arguments, source=images):
        capsys.readouterr()
        assert run(config_file, "--input", source, "--output", output, *arguments) == 2
        assert output.read_bytes() == whole
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        return line

    assert "images.count is 5 there and 1 here" in refused(source=images / "a.png")
    assert "config.INPUT.MIN_SIZE_TEST is 60 there and 48 here" in refused("--opts", "INPUT.MIN_SIZE_TEST", "48")
    assert "SCORE_THRESHOLD is 0.0 there and 0.5 here" in refused("--confidence-threshold", "0.5")
    output.write_bytes(whole := b"my notes\n")
    assert "was not written by" in refused()


def test_scores_below_the_threshold_are_left_out(images, config_file, tmp_path):
    # RedSegmenter is none of our own models, whose post-processing drops the low scores.
    output = tmp_path / "out.jsonl"
    assert run(config_file, "--input", images, "--output", output, "--confidence-threshold", "0.5") == 0
    assert [[d["category_id"] for d in line["detections"]] for line in lines_of(output)[1:]] == [[3], [3], [], [3], [3]]


def test_an_image_that_cannot_be_read_has_a_line(images, config_file, tmp_path, capsys, predicted, monkeypatch):
    (images / "b.png").write_bytes(b"no image")
    (tmp_path / "list.txt").write_text(
        "".join(f"{images / name}\n" for name in ["a.png", "b.png", "none.png", "c.png"])
    )
    arguments = ["--input", tmp_path / "list.txt", "--output", tmp_path / "out.jsonl"]
    assert run(config_file, *arguments) == 1
    _, a, b, none, c = lines_of(tmp_path / "out.jsonl")
    assert a["detections"] and not c["detections"]
    assert list(b) == ["file_name", "error"] and "b.png: it is not an image" in b["error"]
    assert "none.png: No such file" in none["error"]
    assert "b.png: it is not an image" in capsys.readouterr().err
    predicted.clear()
    assert run(config_file, *arguments) == 1 and not predicted
    assert "2 images had an error before: remove their lines to predict them again\n" in capsys.readouterr().err
    # torchrun would end the other processes.
    for key, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}.items():
        monkeypatch.setenv(key, str(value))
    assert run(config_file, *arguments[:3], tmp_path / "other.jsonl") == 0


def test_an_image_that_is_too_large_for_the_gpu_has_a_line(images, config_file, tmp_path, capsys, monkeypatch):
    predict_one = TimedPredictor.predict

    def out_of_memory(self, image):
        if len(image) == 49:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 90.00 GiB")
        return predict_one(self, image)

    monkeypatch.setattr(TimedPredictor, "predict", out_of_memory)
    assert run(config_file, "--input", images, "--output", tmp_path / "out.jsonl") == 1
    lines = lines_of(tmp_path / "out.jsonl")[1:]
    assert [index for index, line in enumerate(lines) if "error" in line] == [1]
    assert lines[1]["error"] == "CUDA out of memory. Tried to allocate 90.00 GiB"
    assert f"{images / 'b.png'}: CUDA out of memory. Tried" in capsys.readouterr().err


def fail(monkeypatch, error, heights=None):
    """Let the model raise an error on images of these heights, or on every image."""
    forward = RedSegmenter.forward

    def forward_or_fail(self, inputs):
        if heights is None or inputs[0]["height"] in heights:
            raise error
        return forward(self, inputs)

    monkeypatch.setattr(RedSegmenter, "forward", forward_or_fail)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("[enforce fail at alloc_cpu.cpp]\nnot enough memory"), "at alloc_cpu.cpp] not enough memory"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_an_image_that_the_model_fails_on_has_a_line(
    images, config_file, tmp_path, capsys, monkeypatch, error, message
):
    # The first image too.
    fail(monkeypatch, error, (48, 51))
    arguments = ["--input", images, "--output", tmp_path / "out.jsonl"]
    assert run(config_file, *arguments) == 1
    lines = lines_of(tmp_path / "out.jsonl")[1:]
    assert [index for index, line in enumerate(lines) if "error" in line] == [0, 3]
    assert message in lines[0]["error"] and f"{images / 'a.png'}: " in capsys.readouterr().err
    # A second start does not predict them again.
    assert run(config_file, *arguments) == 1 and lines_of(tmp_path / "out.jsonl")[1:] == lines


def test_an_image_that_onnx_runtime_fails_on_has_a_line(images, config_file, tmp_path, capsys, monkeypatch):
    state = pytest.importorskip("onnxruntime.capi.onnxruntime_pybind11_state", reason="onnxruntime is not installed")
    network = network_that_raises(monkeypatch, state.Fail("[ONNXRuntimeError] : 1 : FAIL :\nno memory"))
    forward = RedSegmenter.forward

    def forward_or_fail(self, inputs):
        return network(torch.zeros(1, 3, 2, 2)) if inputs[0]["height"] == 49 else forward(self, inputs)

    monkeypatch.setattr(RedSegmenter, "forward", forward_or_fail)
    assert run(config_file, "--input", images, "--output", tmp_path / "out.jsonl") == 1
    lines = lines_of(tmp_path / "out.jsonl")[1:]
    assert [index for index, line in enumerate(lines) if "error" in line] == [1]
    assert lines[1]["error"].endswith("ONNX Runtime: [ONNXRuntimeError] : 1 : FAIL : no memory")


def test_a_model_that_always_fails_ends_the_run(images, config_file, tmp_path, capsys, monkeypatch):
    fail(monkeypatch, RuntimeError("no such\ndevice"))
    assert run(config_file, "--input", images, "--output", tmp_path / "out.jsonl") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "fails on every image" in line and "RuntimeError: no such device" in line
    assert len(lines_of(tmp_path / "out.jsonl")) == 1


def test_ranks_and_gpus(images, config_file, tmp_path, capsys, monkeypatch):
    """Two ranks on a machine with one GPU, with the device of the config: the CPU, then CUDA."""
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for key, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(key, str(value))
    arguments = ["--input", images, "--output", tmp_path / "out.jsonl"]
    assert run(config_file, *arguments) == 0 and not taken
    assert run(config_file, *arguments, "--opts", "MODEL.DEVICE", "cuda") == 2 and not taken
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "torchrun started 2 processes on this machine, which has 1 GPUs" in line and "--nproc_per_node" in line
    # The file is not there: an exported file for the CPU asks for no GPU before it is read.
    assert run(config_file, *arguments, "--opts", "MODEL.DEVICE", "cuda", "MODEL.WEIGHTS", "none.onnx") == 2
    assert "'none.onnx', which does not exist" in capsys.readouterr().err and not taken
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    take_gpu_of_rank()
    assert taken == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "drawn"], "--output is drawn; it must be a file that ends in .jsonl"),
        ([], "--output is missing; it must be"),
        (["--output", "x.jsonl", "--show-iams"], "--show-iams belongs to"),
        (["--webcam"], "--webcam belongs to"),
        (["--video-input", "a.mp4", "--output", "drawn"], "--video-input belongs to"),
        (["--output", "drawn", "--json", "a.json"], "--json belongs to"),
        (["--mask-nms", "0.5"], "--mask-nms belongs to"),
        (["--ground-truth", "a.json"], "--ground-truth belongs to"),
    ],
)
def test_arguments_of_demo_name_demo(arguments, message, capsys):
    try:
        code = predict.main(["--config-file", "a.yaml", "--input", "a.png", *arguments])
    except SystemExit as error:
        code = error.code
    printed = capsys.readouterr().err
    assert code == 2 and message in printed and "`sparseinst demo`" in printed
    assert printed.startswith("error: ") and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--confidence-threshold", "2"], "--confidence-threshold is 2.0"),
        (["--opts", "MODEL.WEIGHTS", ""], "MODEL.WEIGHTS is empty"),
        (["--opts", "MODEL.WEIGHTS", "none.pth"], "none.pth"),
        (["--input", "none"], "'none' matches no image"),
    ],
)
def test_errors_are_one_line(images, config_file, tmp_path, capsys, arguments, message):
    output = tmp_path / "out.jsonl"
    assert run(config_file, "--input", images, "--output", output, *arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0] and not output.exists()


def test_an_input_is_not_overwritten(images, config_file, tmp_path, capsys):
    os.link(images / "a.png", tmp_path / "out.jsonl")
    assert run(config_file, "--input", images / "a.png", "--output", tmp_path / "out.jsonl") == 2
    assert "would overwrite the input" in capsys.readouterr().err
