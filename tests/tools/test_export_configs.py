"""Exports of the published configs, and of what they are for: evaluation, C++, an environment without PyTorch. Slow."""

import itertools
import json
import re
import shutil
import subprocess
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image
from pycocotools import mask as mask_api

from sparseinst import load_config
from sparseinst.inference import Predictor
from sparseinst.runtime.exported_file import read_metadata
from sparseinst.tools import export, train_net
from tests.modeling.solo.tiny_solo import spread_predictions
from tests.shapes_data import write_shapes
from tests.tiny_model import DETAIL
from tests.tools.exported import CLASSES, assert_example_finds_the_same, photos, run_export, save_placed, save_tiny

for package in ("onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(package, reason=f"the package {package} is not installed")
pytestmark = pytest.mark.usefixtures("loggers_as_before")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CONFIGS = (
    "sparse_inst_r50_giam", "sparse_inst_r50vd_dcn_giam", "sparse_inst_pvt_b1_giam", "sparse_inst_cspdarknet53_giam",
    "sparse_inst_mobilenetv3_giam", "quick/shapes", "solov2/solov2_light_448_r18_3x",
    "solo/decoupled_solo_light_r50_3x",
)  # fmt: skip
DECODER = "MODEL.SPARSE_INST.DECODER"
# Tiny models with a PlacedIAMDecoder of three and of four levels.
PLACED = {
    "placed_3_levels": (*DETAIL, f"{DECODER}.NORM", "BN"),
    "placed_4_levels": (
        "MODEL.SPARSE_INST.ENCODER.IN_FEATURES", ["res2", "res3", "res4"], f"{DECODER}.NORM", "GN",
        f"{DECODER}.INST.DIM", 32, f"{DECODER}.MASK.DIM", 32,
    ),
}  # fmt: skip


def assert_same_set(found, expected):
    """Find each expected detection among the others; random weights give almost equal scores, in any order."""
    assert len(found) == len(expected) > 1 and found.image_size == expected.image_size
    rest = torch.ones(len(found), dtype=torch.bool)
    for score, index, mask in zip(expected.scores, expected.pred_classes, expected.pred_masks):
        differences = (found.pred_masks != mask).float().mean((1, 2))
        is_same = rest & (found.pred_classes == index) & ((found.scores - score).abs() < 1e-4)
        best = torch.where(is_same, differences, 2.0).argmin()
        assert is_same[best] and differences[best] <= 0.002, (float(score), int(index), float(differences[best]))
        rest[best] = False


def write_predictions_as_truth(folder, predictor):
    """Write photos and a COCO json whose objects are the predictor's, so that its AP is 100; returns both paths."""
    images, annotations = [], []
    for index, (photo, found) in enumerate(zip(photos()[:2], predictor(photos()[:2]), strict=True)):
        # Their channels are BGR.
        Image.fromarray(photo[..., ::-1]).save(folder / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "height": photo.shape[0], "width": photo.shape[1]})
        for mask, class_index in zip(found.pred_masks.numpy(), found.pred_classes.tolist()):
            rle = mask_api.encode(np.asfortranarray(mask.astype(np.uint8)))
            box, area = mask_api.toBbox(rle).tolist(), int(mask.sum())
            annotations.append(
                {"id": len(annotations) + 1, "image_id": index, "category_id": class_index + 1, "iscrowd": 0,
                 "segmentation": {**rle, "counts": rle["counts"].decode()}, "bbox": box, "area": area}
            )  # fmt: skip
    categories = [{"id": index + 1, "name": name} for index, name in enumerate(predictor.classes.names)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "truth.json").write_text(json.dumps(content))
    return str(folder / "truth.json"), str(folder)


@pytest.mark.parametrize(
    ("config", "name"),
    [*itertools.product(CONFIGS, ["onnx", "openvino"]), ("placed_3_levels", "onnx"), ("placed_4_levels", "openvino")],
)
def test_exported_checked_and_evaluated(config, name, tmp_path, capsys):
    """The file's detections are the model's, and its AP on them is near 100."""
    opts = ["INPUT.MIN_SIZE_TEST", "96", "INPUT.MAX_SIZE_TEST", "160", "MODEL.DEVICE", "cpu"]
    # Of hundreds of candidates many have equal scores, whose order rounding changes, and with it what NMS keeps.
    opts += ["MODEL.SPARSE_INST.CLS_THRESHOLD", "0.0", "MODEL.SOLOV2.NMS.PRE", "20", "MODEL.WEIGHTS"]
    is_placed = config in PLACED
    if is_placed:
        _, config = save_placed(tmp_path, *PLACED[config])
    cfg = load_config(config, [*opts, ""])
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    if is_placed:
        model.load_state_dict(torch.load(tmp_path / "model.pth")["model"])
        assert model.decoder.inst_branch.num_levels > 2
    if cfg.MODEL.META_ARCHITECTURE.startswith("SOLO"):
        spread_predictions(model)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    opts.append(str(tmp_path / "model.pth"))
    flags = ["--config-file", config, "--format", name, "--output", str(tmp_path / "out")]
    predictor = Predictor(cfg, model=model)
    expected = predictor(photos()[:2])
    test_json, test_images = write_predictions_as_truth(tmp_path, predictor)
    assert export.main([*flags, "--test-json", test_json, "--test-images", test_images, *opts]) == 0
    printed = capsys.readouterr().out
    path = printed.split("Written: ")[1].split(",")[0]
    metadata = read_metadata(path)
    assert all(metadata.self_check[output] <= 1e-4 for output in metadata.outputs)
    assert metadata.has_deform_conv is ("dcn" in config)
    if name == "onnx":
        import onnx

        # ONNX Runtime has a CPU kernel of deformable convolutions from 19 on, and CUDA kernels of Resize up to 18.
        opsets = {entry.domain: entry.version for entry in onnx.load(path).opset_import}
        assert opsets[""] == (19 if metadata.has_deform_conv else 18), opsets
    print(json.dumps({"config": config, "format": name, "line": printed.splitlines()[-1], **metadata.self_check}))
    assert metadata.self_check.get("compared_share") == (0.95 if model.ranks_instances else None)
    if is_placed and name == "onnx":
        assert_example_finds_the_same(path, photos()[0])
    for found, wanted in zip(Predictor(path)(photos()[:2]), expected, strict=True):
        assert_same_set(found, wanted)
    aps = re.search(r"AP of the masks: (.*) in eager float32, (.*) of the exported file", printed).groups()
    assert all(float(ap) > 99.8 for ap in aps), aps


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_evaluated_without_a_config_file(name, tmp_path):
    """The AP is near 0 with random weights, so the detections that were evaluated are compared too."""
    save_tiny(tmp_path, "MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4, "MODEL.SPARSE_INST.CLS_THRESHOLD", 0.01)
    content = torch.load(tmp_path / "model.pth")
    data = write_shapes(tmp_path / "data", 4)
    names = [category["name"] for category in json.loads(Path(data[0]).read_text())["categories"]]
    torch.save({**content, "classes": {"names": names, "category_ids": [1, 2, 3, 4]}}, tmp_path / "model.pth")
    assert run_export(tmp_path, "--format", name, "--output", tmp_path) == 0
    path = {"onnx": tmp_path / "model.onnx", "openvino": tmp_path / "model_openvino" / "model.xml"}[name]
    results, detections = [], []
    for weights in (["--config-file", str(tmp_path / "config.yaml"), str(tmp_path / "model.pth")], [str(path)]):
        flags = ["--eval-only", *weights[:-1], "--test-json", data[0], "--test-images", data[1]]
        output = tmp_path / f"run{len(results)}"
        opts = ["MODEL.WEIGHTS", weights[-1], "OUTPUT_DIR", str(output)]
        results.append(train_net.main(train_net.build_parser().parse_args([*flags, *opts])))
        found = json.loads((output / "inference" / "coco_instances_results.json").read_text())
        detections.append(sorted((item["image_id"], item["category_id"], item["score"]) for item in found))
    assert len(detections[0]) == len(detections[1]) > 0
    for expected, found in zip(*detections):
        assert found == (*expected[:2], pytest.approx(expected[2], abs=1e-3))
    assert results[0]["segm"]["AP"] == pytest.approx(results[1]["segm"]["AP"], abs=0.1)


def test_in_an_environment_with_onnxruntime_only(tmp_path):
    save_tiny(tmp_path)
    assert run_export(tmp_path, "--format", "onnx", "--output", tmp_path) == 0
    venv.create(tmp_path / "env", with_pip=True)
    python = str(tmp_path / "env" / "bin" / "python")
    packages = ["numpy", "onnxruntime", "opencv-python-headless"]
    installed = subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"the packages cannot be installed: {installed.stderr.splitlines()[-1]}")
    assert subprocess.run([python, "-c", "import torch"], capture_output=True).returncode
    Image.fromarray(photos()[0]).save(tmp_path / "a.png")
    command = [python, str(EXAMPLES / "onnx_only.py"), str(tmp_path / "model.onnx"), str(tmp_path / "a.png")]
    run = subprocess.run([*command, "--threshold", "0"], capture_output=True, text=True, check=True)
    opts = ["MODEL.WEIGHTS", str(tmp_path / "model.pth")]
    (expected,) = Predictor(load_config(str(tmp_path / "config.yaml"), opts))(photos()[:1], "RGB")
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert [line["class"] for line in found] == [CLASSES["names"][index] for index in expected.pred_classes]
    assert np.allclose([line["score"] for line in found], expected.scores, atol=1e-4)
    # A pixel at the threshold may differ.
    assert np.allclose([line["box"] for line in found], expected.pred_boxes.tensor, atol=1)
    assert np.allclose([line["area"] for line in found], expected.pred_masks.sum((1, 2)), atol=3)


@pytest.mark.parametrize(
    ("save", "mask_nms", "flags"), [(save_tiny, 0.5, ()), (save_placed, 0.0, ("--size", 64, 96))], ids=["maps", "peaks"]
)
def test_end_to_end_in_onnxruntime(tmp_path, save, mask_nms, flags):
    """The self-check compares with the model's own post-processing at several sizes; so does this, by hand, at one."""
    import onnxruntime

    save(tmp_path, "MODEL.SPARSE_INST.MASK_NMS_THRESHOLD", mask_nms)
    assert run_export(tmp_path, "--format", "onnx", "--output", tmp_path, "--end-to-end", 4, *flags) == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    opts = ["MODEL.WEIGHTS", str(tmp_path / "model.pth")]
    predictor = Predictor(load_config(str(tmp_path / "config.yaml"), opts))
    image = photos()[1]
    images = predictor.model.preprocess([{"image": torch.from_numpy(image.transpose(2, 0, 1).copy())}])
    results = session.run(["scores", "classes", "boxes", "masks"], {"images": images.tensor.numpy()})
    scores, classes, boxes, masks = (result[0] for result in results)
    (expected,) = predictor([image], "RGB")
    expected = expected[: (scores > 0).sum()]
    assert len(expected) > 1 and masks.shape == (4, 64, 96)
    assert np.allclose(scores[: len(expected)], expected.scores, atol=1e-4)
    assert classes[: len(expected)].tolist() == expected.pred_classes.tolist()
    assert np.abs(boxes[: len(expected)] - expected.pred_boxes.tensor.numpy()).max() <= 1
    assert (masks[: len(expected)] != expected.pred_masks.numpy()).mean() < 1e-3


def test_half_weights_end_to_end(tmp_path):
    save_tiny(tmp_path)
    flags = ("--precision", "float16", "--size", 64, 96, "--end-to-end")
    assert run_export(tmp_path, "--format", "onnx", "--output", tmp_path, *flags) == 0
    metadata = read_metadata(tmp_path / "model.onnx")
    assert metadata.self_check["bound"] == 0.02 and metadata.self_check["scores"] > 1e-6
    assert metadata.self_check["mask_bound"] == 0.5 and metadata.self_check["worst_mask"] < 0.1
    assert metadata.compared_detections > 2


@pytest.mark.parametrize("mask_nms", [0.0, 0.5])
def test_end_to_end_in_cpp(tmp_path, mask_nms):
    import openvino

    if not (shutil.which("cmake") and shutil.which("c++")):
        pytest.skip("cmake and a C++ compiler are not installed")
    key = "MODEL.SPARSE_INST.MASK_NMS_THRESHOLD"
    save_tiny(tmp_path, key, mask_nms)
    flags = ("--size", 64, 96, "--batch", 1, "--input", "image", "--end-to-end", 4)
    assert run_export(tmp_path, "--format", "openvino", "--output", tmp_path, *flags) == 0
    cmake_dir = Path(openvino.__path__[0]) / "cmake"
    build = tmp_path / "build"
    for command in (["-S", EXAMPLES / "cpp", "-B", build, f"-DOpenVINO_DIR={cmake_dir}"], ["--build", build]):
        subprocess.run(["cmake", *map(str, command)], check=True, capture_output=True)
    image = photos()[1]
    (tmp_path / "a.ppm").write_bytes(b"P6\n96 64\n255\n" + image.tobytes())
    arguments = [build / "detect", tmp_path / "model_openvino" / "model.xml", tmp_path / "a.ppm", "0"]
    lines = subprocess.run([*map(str, arguments)], check=True, capture_output=True, text=True).stdout.splitlines()
    opts = ["MODEL.WEIGHTS", str(tmp_path / "model.pth")]
    (expected,) = Predictor(load_config(str(tmp_path / "config.yaml"), opts))([image], "RGB")
    expected = expected[:4]
    assert len(lines) == len(expected) > 0
    fields = (expected.scores, expected.pred_classes, expected.pred_boxes.tensor, expected.pred_masks)
    for line, score, index, box, mask in zip(lines, *fields):
        values = line.split()
        assert float(values[0]) == pytest.approx(float(score), abs=1e-4) and int(values[1]) == index
        assert [int(value) for value in values[2:6]] == pytest.approx(box.tolist(), abs=1)
        assert abs(int(values[6]) - int(mask.sum())) <= 3
    # An image of swapped channels, and the argument that swaps them.
    (tmp_path / "a.ppm").write_bytes(b"P6\n96 64\n255\n" + image[:, :, ::-1].tobytes())
    swapped = subprocess.run([*map(str, arguments), "bgr"], check=True, capture_output=True, text=True).stdout
    assert swapped.splitlines() == lines
    wrong = subprocess.run([*map(str, arguments[:2]), str(tmp_path / "none.ppm"), "0"], capture_output=True, text=True)
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: ")


def test_random_weights_are_the_same_in_each_export(tmp_path):
    save_tiny(tmp_path)
    hashes = set()
    for index in range(2):
        torch.manual_seed(5 + index)
        flags = ("--format", "torch", "--size", 64, 96, "--output", tmp_path / f"{index}")
        assert run_export(tmp_path, *flags, opts=("MODEL.WEIGHTS", "")) == 0
        hashes.add(read_metadata(tmp_path / f"{index}" / "model.pt2").weights_sha256)
    assert len(hashes) == 1
