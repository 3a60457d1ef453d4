"""`sparseinst export`: files equal the model on every engine, in every command, and wrong ones are never written."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_api

from sparseinst import load_config
from sparseinst.inference import Predictor, to_coco_results
from sparseinst.runtime.export import ExportableNetwork
from sparseinst.runtime.exported_file import read_metadata
from sparseinst.tools import benchmark, demo, export_run, predict
from tests.loggers import loggers_restored
from tests.runtime.test_threads import in_threads
from tests.shapes_data import write_shapes
from tests.tiny_model import tiny_model
from tests.tools.exported import (
    CLASSES,
    EXAMPLE,
    OPTS,
    assert_example_finds_the_same,
    assert_same_detections,
    load_example,
    photos,
    run_export,
    save_tiny,
)

for package in ("onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(package, reason=f"the package {package} is not installed")
pytestmark = pytest.mark.usefixtures("loggers_as_before", "no_window")
ROOT = Path(__file__).resolve().parents[2]
SUPPORTED = "supported are --format onnx or openvino with --precision float32 or float16, without --test-json"
FILES = {"onnx": "model.onnx", "openvino": "model_openvino/model.xml", "torch": "model.pt2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    save_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def exported(folder):
    """A function that exports to a format once, with dynamic sizes, and returns the file."""

    def export_once(name):
        path = folder / FILES[name]
        if not path.exists():
            with loggers_restored():
                assert run_export(folder, "--format", name, "--output", folder) == 0
        return path

    return export_once


@pytest.fixture(scope="module")
def expected(folder):
    """The predictor of the weights themselves."""
    return Predictor(load_config(str(folder / "config.yaml"), ["MODEL.WEIGHTS", str(folder / "model.pth")]))


@pytest.mark.parametrize("name", FILES)
def test_a_file_predicts_what_the_model_predicts_in_every_thread(exported, expected, name):
    """The images have several sizes, as a server gets them; each thread gets its own image's answer."""
    predictor = Predictor(str(exported(name)))
    assert predictor.classes._asdict() == CLASSES
    images = photos()
    answers = expected(images, "RGB")

    def work(number):
        for index in np.random.default_rng(number).permutation(3 * len(images)) % len(images):
            assert_same_detections(predictor([images[index]], "RGB")[0], answers[index])

    in_threads(work)


@pytest.mark.parametrize("name", ["onnx", "torch"])
def test_a_narrow_image_is_padded_to_the_smallest_size(exported, expected, name):
    """torch.export refuses a side below 64 pixels; the model pads this image to 320x32."""
    narrow = np.random.default_rng(0).integers(0, 256, (300, 20, 3), dtype=np.uint8)
    opts = ["INPUT.MIN_SIZE_TEST", 20, "MODEL.WEIGHTS", str(exported(name))]
    predictor = Predictor(load_config(str(exported("onnx").parent / "config.yaml"), opts))
    (found,) = predictor([narrow], "RGB")
    inputs = {"image": torch.from_numpy(narrow.transpose(2, 0, 1).copy())}
    images = predictor.model.preprocess([inputs])
    assert images.tensor.shape == (1, 3, 320, 64)
    with torch.no_grad():
        outputs = expected.model.network(images.tensor)
        (wanted,) = expected.model.postprocess(outputs, [inputs], images)
    assert_same_detections(found, wanted["instances"])


def test_the_file_describes_itself(exported, folder):
    metadata = read_metadata(exported("onnx"))
    assert metadata.meta_architecture == "SparseInst" and metadata.channel_order == "RGB"
    assert metadata.class_names == CLASSES["names"] and metadata.category_ids == CLASSES["category_ids"]
    assert (metadata.size, metadata.batch, metadata.size_divisibility, metadata.min_side) == (None, None, 32, 64)
    assert (metadata.short_side, metadata.long_side) == (64, 1333)
    assert metadata.postprocessing["cls_threshold"] == 0.3
    assert len(metadata.weights_sha256) == 64
    assert set(metadata.outputs) == {"pred_logits", "pred_scores", "pred_masks"}
    assert all(0 < metadata.self_check[output] <= metadata.self_check["bound"] == 1e-4 for output in metadata.outputs)
    # Neither paths nor names of the machine that exported.
    content = exported("onnx").read_bytes()
    assert str(folder).encode() not in content and str(ROOT).encode() not in content


@pytest.mark.parametrize("name", FILES)
def test_the_demo_needs_no_config_file(exported, expected, tmp_path, name):
    Image.fromarray(photos()[0]).save(tmp_path / "a.png")
    results = tmp_path / "found.json"
    arguments = ["--input", str(tmp_path / "a.png"), "--json", str(results), "--confidence-threshold", "0"]
    assert demo.main([*arguments, "--opts", "MODEL.WEIGHTS", str(exported(name))]) == 0
    found, (wanted,) = json.loads(results.read_text()), expected(photos()[:1], "RGB")
    assert [each["category_id"] for each in found] == [CLASSES["category_ids"][i] for i in wanted.pred_classes] != []
    assert [each["score"] for each in found] == pytest.approx(wanted.scores.tolist(), abs=1e-4)


def test_many_images_need_no_config_file(exported, expected, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for index, image in enumerate(photos()):
        Image.fromarray(image).save(tmp_path / "in" / f"{index}.png")
    output = tmp_path / "found.jsonl"
    arguments = ["--input", str(tmp_path / "in"), "--output", str(output)]
    opts = ["--opts", "MODEL.WEIGHTS", str(exported("onnx"))]
    assert predict.main([*arguments, *opts]) == 0
    header, *lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [category["id"] for category in header["categories"]] == CLASSES["category_ids"]
    for line, instances in zip(lines, expected(photos(), "RGB"), strict=True):
        found = line["detections"]
        assert [each["category_id"] for each in found] == [CLASSES["category_ids"][i] for i in instances.pred_classes]
        assert [each["score"] for each in found] == pytest.approx(instances.scores.tolist(), abs=1e-4)
        masks = np.array([mask_api.decode(each["segmentation"]) for each in found], dtype=bool)
        assert (masks != instances.pred_masks.numpy()).mean() <= 0.001
    # As a kill leaves the file.
    whole = output.read_bytes()
    output.write_bytes(whole[:-20])
    capsys.readouterr()
    assert predict.main([*arguments, *opts]) == 0
    assert output.read_bytes() == whole and "3 images had a line already; 1 images in" in capsys.readouterr().out
    assert predict.main(arguments) == 2 and "--config-file is missing" in capsys.readouterr().err


@pytest.mark.parametrize("name", FILES)
def test_the_benchmark_compares_a_file(exported, folder, capsys, name):
    arguments = ["--config-file", str(folder / "config.yaml"), "--size", "40", "60", "--repetitions", "1"]
    compared = ["--compare", "eager", str(exported(name)), f"mine=MODEL.WEIGHTS {exported(name)}"]
    assert benchmark.main([*arguments, "--detections", "3", *compared]) == 0
    table = capsys.readouterr().out
    assert Path(FILES[name]).name in table and "mine" in table and "times as fast as eager" in table


@pytest.mark.parametrize("name", FILES)
def test_the_service_answers_what_a_file_predicts(exported, tmp_path, name):
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    from sparseinst.tools.serve_run import predictor_loader
    from tests.serving.service import image_bytes, running

    path = exported(name)
    (tmp_path / "photo.png").write_bytes(image_bytes())
    (found,) = Predictor(path)([tmp_path / "photo.png"])
    with running(predictor_loader(str(path), None, []), file=path) as client:
        answer = client.post("/predict?threshold=0", content=image_bytes()).json()["instances"]
    names = dict(zip(CLASSES["category_ids"], CLASSES["names"]))
    results = to_coco_results(found, 1, CLASSES["category_ids"])
    assert answer == [{**result, "category_name": names[result["category_id"]]} for result in results] != []


def test_a_static_file_of_pixels(folder, tmp_path):
    """Images are resized to fit and padded; batches are filled up; the precision of PyTorch is not the file's."""
    flags = ("--size", 64, 96, "--batch", 2, "--input", "image")
    opts = ("RUNTIME.PRECISION", "bfloat16")
    assert run_export(folder, "--format", "onnx", "--output", tmp_path, *flags, opts=opts) == 0
    metadata = read_metadata(tmp_path / "model.onnx")
    assert (metadata.size, metadata.batch, metadata.input) == ([64, 96], 2, "image")
    predictor = Predictor(tmp_path / "model.onnx")
    opts = ["MODEL.WEIGHTS", str(folder / "model.pth"), "INPUT.FIT_SIZE_TEST", "(64, 96)"]
    plain = Predictor(load_config(str(folder / "config.yaml"), opts))
    whole = photos()[1]
    assert_same_detections(predictor([whole], "RGB")[0], plain([whole], "RGB")[0])
    # The portrait is 64x34 pixels in 64x96.
    for image in photos()[1:3]:
        assert_example_finds_the_same(tmp_path / "model.onnx", image)
    inputs = [{"image": torch.from_numpy(np.roll(whole, shift, 1).transpose(2, 0, 1).copy())} for shift in range(3)]
    with torch.no_grad():
        for found, wanted in zip(predictor.model(inputs), plain.model(inputs), strict=True):
            assert_same_detections(found["instances"], wanted["instances"])


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_half_weights(folder, exported, tmp_path, name):
    assert run_export(folder, "--format", name, "--output", tmp_path, "--precision", "float16") == 0
    sizes = [sum(file.stat().st_size for file in (root / FILES[name]).parent.glob("model.*") if file.suffix != ".pth"
                 and file.suffix != ".pt2") for root in (tmp_path, folder) if exported(name)]  # fmt: skip
    assert 0.4 < sizes[0] / sizes[1] < 0.65
    assert read_metadata(tmp_path / FILES[name]).self_check["pred_masks"] > 1e-5


def test_a_file_that_differs_is_not_written(folder, tmp_path, monkeypatch, capsys):
    """The older file stays as it was."""
    old = tmp_path / "model.pt2"
    old.write_text("old")
    open_network = export_run.open_network

    def broken(*args):
        network = open_network(*args)
        return lambda images: {name: value + (name == "pred_scores") for name, value in network(images).items()}

    monkeypatch.setattr(export_run, "open_network", broken)
    assert run_export(folder, "--format", "torch", "--output", tmp_path) == 1
    error = capsys.readouterr().err
    assert "differs from the model in eager float32: pred_scores by" in error and error.count("\n") == 1
    assert old.read_text() == "old" and list(tmp_path.iterdir()) == [old]


@pytest.fixture
def unconverted(monkeypatch):
    """Skip the conversion: the file is empty, and its network the model's own. Return the writer's arguments."""
    calls = []
    monkeypatch.setattr(export_run, "export_program", lambda *args: None)
    monkeypatch.setattr(export_run, "has_deform_conv", lambda program: False)
    monkeypatch.setattr(export_run, "open_network", lambda *args: tiny_model(*OPTS).network)

    def writer(*args):
        calls.append(args)
        return lambda quantization: lambda path, metadata: path.write_text("")

    monkeypatch.setattr(export_run, "converter", writer)
    return calls


@pytest.mark.parametrize(
    ("aps", "code", "message"),
    [
        ([40.0, 39.95], 0, ""),
        ([40.0, 40.2], 1, "The file's AP is 40.20, the model's 40.00: they may differ by 0.1"),
        ([40.0, float("nan")], 1, "The file's AP is nan, the model's 40.00"),
        ([float("nan")] * 2, 2, "train.json gives no AP: it has no annotations, or the model finds nothing"),
        ([None, None], 2, "train.json gives no AP"),
    ],
)
def test_the_aps_are_compared(folder, tmp_path, unconverted, monkeypatch, capsys, aps, code, message):
    values = iter(aps)
    results = lambda *args: {} if (ap := next(values)) is None else {"segm": {"AP": ap}}  # noqa: E731
    monkeypatch.setattr(export_run, "evaluate", results)
    data = write_shapes(tmp_path / "data", 1)
    flags = ("--format", "torch", "--output", tmp_path / "out", "--test-json", data[0], "--test-images", data[1])
    assert run_export(folder, *flags) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == bool(code)


def test_an_output_that_cannot_be_written_is_found_before_the_model_is_built(folder, monkeypatch, capsys):
    monkeypatch.setattr(export_run, "build_model", None)
    assert run_export(folder, "--format", "torch", "--output", folder / "config.yaml" / "new") == 2
    assert capsys.readouterr().err.startswith(f"error: {folder}/config.yaml/new cannot be written: Not a directory")


@pytest.mark.parametrize("where", ["file", "images"])
def test_a_full_disk_is_named_where_it_is_full(folder, tmp_path, unconverted, monkeypatch, capsys, where):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "file":
        monkeypatch.setattr(export_run, "converter", lambda *args: lambda quantization: full)
    else:
        monkeypatch.setattr(export_run, "open_network", full)
    assert run_export(folder, "--format", "torch", "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "No space left" in error and (f"{tmp_path / 'out'} cannot be written" in error) is (where == "file")


@pytest.mark.parametrize("threshold", [0.3, 1.0])
def test_the_last_line_says_whether_detections_were_compared(
    folder, tmp_path, unconverted, monkeypatch, capsys, threshold
):
    """An end-to-end file of a model that finds nothing in random images is compared in images of the user."""
    opts = ("MODEL.SPARSE_INST.CLS_THRESHOLD", threshold)
    network = ExportableNetwork(tiny_model(*OPTS, *opts).requires_grad_(False), max_detections=100)
    monkeypatch.setattr(export_run, "open_network", lambda *args: network)
    written = []
    write = lambda path, metadata: written.append(metadata) or path.write_text("")  # noqa: E731
    monkeypatch.setattr(export_run, "converter", lambda *args: lambda quantization: write)
    Image.fromarray(photos()[1]).save(tmp_path / "a.png")
    flags = ["--format", "onnx", "--size", 64, 96, "--output", tmp_path]
    # The value of --end-to-end is left out.
    for number, images in enumerate([[], ["--test-images", tmp_path]]):
        assert run_export(folder, *flags, *images, "--end-to-end", opts=opts) == 0
        *_, differences, last = capsys.readouterr().out.splitlines()
        assert ("1 batches of --test-images" in differences) == number
        count = written[-1].compared_detections
        finding = f"; {count} detections were compared" if count else ". No class, mask or box was compared, because"
        assert finding in last and (count > 0) is (threshold < 0.9)
        assert written[-1].self_check["boxes"] < 1e-4
    counts = [metadata.compared_detections for metadata in written[1::2]]
    assert not counts[0] or counts[1] > counts[0]


def test_a_deformable_network_is_not_for_cuda(folder, tmp_path, unconverted, monkeypatch, capsys):
    monkeypatch.setattr(export_run, "has_deform_conv", lambda program: True)
    for name in ("torch", "onnx"):
        assert run_export(folder, "--format", name, "--output", tmp_path) == 0
        assert ("Note: deformable convolutions need ONNX of opset 19" in capsys.readouterr().out) is (name == "onnx")


@pytest.mark.parametrize(("short_side", "usual"), [(64, (64, 96)), (20, (64, 64))])
def test_shapes_of_tensorrt_and_of_the_self_check(folder, tmp_path, unconverted, capsys, short_side, usual):
    """The smallest side is 64; a photograph with a short side of 20 pixels is padded to 32x32 by the model."""
    assert run_export(folder, "--format", "torch", "--output", tmp_path, opts=["INPUT.MIN_SIZE_TEST", short_side]) == 0
    # The long side is at most 1333.
    assert unconverted[0][4] == ((1, 3, 64, 64), (1, 3, *usual), (4, 3, 1344, 1344))
    assert f"192x64, 1x{usual[0]}x{usual[1]}:" in capsys.readouterr().out


def test_a_missing_engine_is_found_before_the_work(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(export_run, "export_program", lambda *args: pytest.fail("the work has begun"))
    assert run_export(folder, "--format", "onnx", "--output", tmp_path) == 2
    assert "needs the packages onnx, onnxscript, onnxruntime" in capsys.readouterr().err


def test_a_size_that_was_frozen_is_found(folder, tmp_path, monkeypatch, capsys):
    export_program = export_run.export_program
    frozen = lambda network, divisibility, size, batch: export_program(network, divisibility, (64, 96), batch)  # noqa: E731
    monkeypatch.setattr(export_run, "export_program", frozen)
    assert run_export(folder, "--format", "torch", "--output", tmp_path / "new") == 1
    assert "The engine fails for images (1, 3, 64, 64)" in capsys.readouterr().err
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--format", "torch", "--precision", "float16"), "onnx: float32, float16, int8; openvino: float32, float16,"),
        (("--format", "onnx", "--end-to-end", "50x"), "--end-to-end is '50x'; it must be a whole number from 1 on"),
        (("--format", "onnx", "--end-to-end", 0), "--end-to-end is '0'; it must be a whole number from 1 on"),
        (("--format", "torch", "--end-to-end", 5), f"--end-to-end is not supported with --format torch; {SUPPORTED}"),
        (("--format", "onnx", "--end-to-end", 5, "--precision", "int8"), f"with --precision int8; {SUPPORTED}"),
        (("--format", "onnx", "--end-to-end", 5, "--test-json", "x"), f"of the network's outputs; {SUPPORTED}"),
        (("--format", "onnx", "--size", 50, 64), "--size is 50 64; it must be dynamic, or HEIGHT WIDTH in multiples"),
        (("--format", "onnx", "--end-to-end", 5, "--test-images", "none/"), "error: --test-images: The file or"),
        (("--format", "onnx", "--end-to-end", 5, "--test-images", 2024), "The file or pattern '2024' matches no image"),
        (("--format", "onnx", "--batch", 0), "--batch is 0; it must be dynamic"),
        (("--format", "onnx", "--test-json", "x"), "--test-json and --test-images go together"),
        (("--format", "onnx", "--precision", "int8"), "--precision int8 needs --calibration"),
        (("--format", "onnx", "--calibration", "x"), "--calibration is for --precision int8; --precision is float32"),
        (("--format", "tensorrt"), "TensorRT engines need the package tensorrt and a CUDA device"),
    ],
)  # fmt: skip
def test_refused_with_one_line(folder, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert run_export(folder, *flags, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["640", "640x864", "auto"])
def test_a_size_without_a_width_is_named(folder, tmp_path, capsys, size):
    assert run_export(folder, "--format", "onnx", "--output", tmp_path / "out", "--size", size) == 2
    assert capsys.readouterr().err.startswith(f"error: --size is {size} MODEL.WEIGHTS; it must be dynamic, or HEIGHT")


def test_the_example_pads_a_narrow_image_as_the_predictor(exported):
    example = load_example(exported("onnx"))
    assert example.normalize_and_pad(np.zeros((300, 20, 3), np.uint8)).shape == (1, 3, 320, 64)
    assert example.normalize_and_pad(np.zeros((65, 64, 3), np.uint8)).shape == (1, 3, 96, 64)


def test_the_example_without_torch_finds_the_same(exported, expected, tmp_path):
    """The example runs in a process where torch, Detectron2 and this package cannot be imported."""
    code = (
        "import runpy, sys\n"
        "for name in ('torch', 'detectron2', 'sparseinst', 'PIL'): sys.modules[name] = None\n"
        f"sys.argv = ['x', {str(exported('onnx'))!r}, {str(tmp_path / 'a.png')!r}, '--threshold', '0']\n"
        f"runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')\n"
    )
    for image in photos()[:2]:
        Image.fromarray(image).save(tmp_path / "a.png")
        lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        found = [json.loads(line) for line in lines.splitlines()]
        (instances,) = expected([image], "RGB")
        assert len(found) == len(instances) > 0
        for line, score, index, box, mask in zip(
            found, instances.scores, instances.pred_classes, instances.pred_boxes.tensor, instances.pred_masks
        ):
            assert line["class"] == CLASSES["names"][index] and line["score"] == pytest.approx(float(score), abs=1e-4)
            assert abs(line["area"] - int(mask.sum())) <= 3
            assert np.abs(np.array(line["box"]) - box.numpy()).max() <= 1
    assert len(EXAMPLE.read_text().splitlines()) < 150
