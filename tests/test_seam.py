"""A user's meta-architecture goes through every command and engine, and no line of the package knows it.

The model is that of toy_segmenter.py: another loss and another divisor of it than SparseInst's.
"""

import copy
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances

from sparseinst.config import load_config
from sparseinst.inference import Predictor
from sparseinst.modeling.meta_arch import InstanceSegmenter
from sparseinst.runtime.optimize import OptimizedSegmenter, optimize_for_inference
from sparseinst.tools import analyze_model, benchmark, benchmark_training, demo, train_net
from tests.distributed.ranks import run_ranks
from tests.loggers import loggers_restored
from tests.red_segmenter import red_segmenter_config

REPO = Path(__file__).resolve().parents[1]
TOY = Path(__file__).resolve().with_name("toy_segmenter.py")
COLORS = {"red": (230, 40, 40), "green": (40, 210, 40), "blue": (50, 50, 240)}
CONFIG = f"""
IMPORTS: ["{TOY}"]
MODEL: {{META_ARCHITECTURE: ToySegmenter, DEVICE: cpu, PIXEL_MEAN: [110, 110, 110], PIXEL_STD: [60, 60, 60],
        MIN_BACKBONE_COVERAGE: 0.0}}
INPUT: {{FORMAT: RGB, MIN_SIZE_TRAIN: [64], MIN_SIZE_TEST: 64}}
SOLVER: {{IMS_PER_BATCH: 8, ACCUMULATE_STEPS: 2, BASE_LR: 0.01, MAX_ITER: 60, STEPS: [], WARMUP_ITERS: 0}}
DATALOADER: {{NUM_WORKERS: 0}}
SEED: 1
"""


def write_rectangles(folder, split, num_images, seed):
    """Write images of 64 x 80 pixels with a rectangle of each color on gray noise, and their COCO json."""
    rng = np.random.default_rng(seed)
    (folder / split).mkdir(parents=True)
    images, annotations = [], []
    for image_id in range(1, num_images + 1):
        image = rng.integers(80, 140, (64, 80, 3), dtype=np.uint8)
        for category_id, (column, color) in enumerate(zip(rng.permutation([2, 28, 54]), COLORS.values()), start=1):
            x, y, width, height = int(column + rng.integers(4)), int(rng.integers(2, 30)), 20, int(rng.integers(14, 32))
            image[y : y + height, x : x + width] = color
            outline = [x, y, x + width, y, x + width, y + height, x, y + height]
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": image_id, "category_id": category_id, "iscrowd": 0,
                    "segmentation": [outline], "bbox": [x, y, width, height], "area": width * height,
                }
            )  # fmt: skip
        cv2.imwrite(str(folder / split / f"{image_id}.png"), image[:, :, ::-1])
        images.append({"id": image_id, "file_name": f"{image_id}.png", "height": 64, "width": 80})
    categories = [{"id": index, "name": name} for index, name in enumerate(COLORS, start=1)]
    json_file = folder / f"{split}.json"
    json_file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return str(json_file), str(folder / split)


@pytest.fixture(scope="module", autouse=True)
def loggers():
    with loggers_restored():
        yield


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Return the folder with config.yaml, train.json, test.json and their images."""
    folder = tmp_path_factory.mktemp("seam")
    (folder / "config.yaml").write_text(CONFIG)
    write_rectangles(folder, "train", 16, seed=0)
    write_rectangles(folder, "test", 6, seed=1)
    return folder


def command(folder, *args):
    return [
        "--config-file", str(folder / "config.yaml"),
        "--train-json", str(folder / "train.json"), "--train-images", str(folder / "train"),
        "--test-json", str(folder / "test.json"), "--test-images", str(folder / "test"), *map(str, args),
    ]  # fmt: skip


def train_net_main(folder, *args):
    """Run train_net.py in this process."""
    return train_net.main(train_net.build_parser().parse_args(command(folder, *args)))


def saved_weights(path):
    return torch.load(path, weights_only=True)["model"]


@pytest.fixture(scope="module")
def trained(workspace):
    """Train in two accumulated parts a step; return the output folder and the results."""
    output = workspace / "trained"
    return output, train_net_main(workspace, "OUTPUT_DIR", output)


@pytest.fixture(scope="module")
def trained_cfg(workspace, trained):
    return load_config(str(workspace / "config.yaml"), ["MODEL.WEIGHTS", str(trained[0] / "model_final.pth")])


@pytest.fixture(scope="module")
def model(trained_cfg):
    """Return the trained toy in eval mode."""
    model = build_model(trained_cfg).eval()
    model.load_state_dict(saved_weights(trained_cfg.MODEL.WEIGHTS))
    return model


def test_the_package_does_not_know_the_toy(model):
    assert isinstance(model, InstanceSegmenter) and type(model).__name__ == "ToySegmenter"
    assert not [path for path in (REPO / "sparseinst").rglob("*.py") if "toy" in path.read_text().lower()]


def test_it_learns(trained):
    output, results = trained
    assert flatten_results_dict(results)["segm/AP"] > 60
    assert json.loads((output / "classes.json").read_text())["names"] == list(COLORS)


def toy_batch(num_objects):
    """Return an input dict with as many rectangles, all in one batch of one size."""
    generator = torch.Generator().manual_seed(num_objects)
    masks = torch.zeros(num_objects, 64, 64, dtype=torch.bool)
    for index in range(num_objects):
        masks[index, 4 * index : 4 * index + 12, 6 * index : 6 * index + 20] = True
    instances = Instances((64, 64), gt_classes=torch.arange(num_objects) % 3, gt_masks=BitMasks(masks))
    return {"image": torch.randint(256, (3, 64, 64), generator=generator), "instances": instances}


def test_accumulated_parts_equal_one_batch(model):
    whole = copy.deepcopy(model).train()
    # Batch statistics differ between the parts and the whole.
    whole.convs[1].eval()
    parted = copy.deepcopy(whole)
    batch = [toy_batch(number) for number in (1, 0, 5, 2)]
    losses = whole(batch)
    sum(losses.values()).backward()
    totals = 0
    parts = parted.prepare_parts([batch[:1], batch[1:3], batch[3:]])
    for inputs, part in zip((batch[:1], batch[1:3], batch[3:]), parts):
        part_losses = parted(inputs, part)
        sum(part_losses.values()).backward()
        totals += part_losses["loss_cells"].detach()
    assert torch.allclose(totals, losses["loss_cells"], rtol=1e-5)
    for (name, parameter), expected in zip(parted.named_parameters(), whole.parameters()):
        assert torch.allclose(parameter.grad, expected.grad, rtol=1e-4, atol=1e-6), name


def test_resumed_bit_for_bit(workspace, tmp_path):
    train_net_main(workspace, "OUTPUT_DIR", tmp_path / "whole", "SOLVER.MAX_ITER", 4)
    train_net_main(workspace, "OUTPUT_DIR", tmp_path / "cut", "SOLVER.MAX_ITER", 2)
    half = saved_weights(tmp_path / "cut" / "model_final.pth")
    train_net_main(workspace, "--resume", "OUTPUT_DIR", tmp_path / "cut", "SOLVER.MAX_ITER", 4)
    whole, cut = (saved_weights(tmp_path / name / "model_final.pth") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    assert not torch.equal(half["convs.0.weight"], cut["convs.0.weight"])


def test_other_options_of_a_training(workspace, tmp_path):
    train_net_main(
        workspace, "OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 1, "SOLVER.RECOMPUTE", "['convs']", "VIS_PERIOD", 1,
        "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16", "SOLVER.CHANNELS_LAST", True,
        "SOLVER.OPTIMIZER", "SGD", "SOLVER.BACKBONE_MULTIPLIER", 0.5, "TEST.PRECISE_BN.ENABLED", True,
        "TEST.EVAL_PERIOD", 1, "INPUT.DATASET_MAPPER", "DatasetMapper",
    )  # fmt: skip
    assert (tmp_path / "model_best.pth").is_file()


def test_another_number_of_classes_is_refused_with_the_toys_key(workspace, tmp_path):
    with pytest.raises(SystemExit, match="MODEL.TOY_CLASSES"):
        train_net_main(workspace, "OUTPUT_DIR", tmp_path, "MODEL.TOY_CLASSES", 5)


def train_a_rank(*args):
    # Every rank reads the config, which imports the toy.
    train_net_main(*args)
    return {}


def test_two_ranks(workspace, tmp_path):
    run_ranks(2, train_a_rank, workspace, "OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 2)
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert saved["iteration"] == 1 and "convs.0.weight" in saved["model"]
    assert json.loads((tmp_path / "results.json").read_text())["speed"]["num_processes"] == 2


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_evaluated(workspace, trained, tmp_path, engine):
    if engine != "torch":
        pytest.importorskip(engine, reason=f"the package {engine} is not installed")
    weights = trained[0] / "model_final.pth"
    results = train_net_main(
        workspace, "--eval-only", "OUTPUT_DIR", tmp_path, "MODEL.WEIGHTS", weights, "RUNTIME.ENGINE", engine
    )
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["results"]["segm"]["AP"] == pytest.approx(results["segm"]["AP"])
    assert results["segm"]["AP"] == pytest.approx(trained[1]["segm"]["AP"], abs=1)
    assert list(written["speed"]["stages"]) == ["preprocessing", "network", "post-processing", "total"]


def test_drawn_by_the_demo(workspace, trained_cfg, tmp_path):
    image, results = workspace / "test" / "1.png", tmp_path / "results.json"
    code = demo.main(
        ["--config-file", str(workspace / "config.yaml"), "--input", str(image), "--output", str(tmp_path / "out"),
         "--json", str(results), "--opts", "MODEL.WEIGHTS", trained_cfg.MODEL.WEIGHTS]
    )  # fmt: skip
    assert code == 0
    drawing = cv2.imread(str(tmp_path / "out" / "1.png"))
    # Small images are enlarged for the drawing.
    enlarged = cv2.resize(cv2.imread(str(image)), drawing.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    assert (drawing != enlarged).any(2).mean() > 0.05
    assert sorted(result["category_id"] for result in json.loads(results.read_text())) == [1, 2, 3]


@pytest.mark.parametrize(("flag", "name"), [("--show-iams", "activation_maps"), ("--mask-nms=0.5", "mask_nms")])
def test_flags_that_the_toy_does_not_have(workspace, tmp_path, capsys, flag, name):
    image = str(workspace / "test" / "1.png")
    args = ["--config-file", str(workspace / "config.yaml"), "--input", image, "--output", str(tmp_path), flag]
    assert demo.main(args) == 2
    assert f"ToySegmenter has no {name}" in capsys.readouterr().err


@pytest.mark.parametrize("mask_format", ["bitmask", "rle"])
def test_predicted(workspace, trained_cfg, mask_format):
    cfg = trained_cfg.clone()
    cfg.MODEL.OUTPUT.MASK_FORMAT = mask_format
    predictor = Predictor(cfg)
    assert predictor.classes.names == list(COLORS)
    (instances,) = predictor([workspace / "test" / "1.png"])
    masks = torch.as_tensor(np.asarray(instances.pred_masks))
    image = cv2.imread(str(workspace / "test" / "1.png"))[:, :, ::-1].copy()
    for mask, class_index in zip(masks, instances.pred_classes.tolist()):
        truth = torch.from_numpy((image == list(COLORS.values())[class_index]).all(2))
        assert (mask & truth).sum() / (mask | truth).sum() > 0.7
    assert len(instances) == 3


def test_optimized(model):
    optimized = optimize_for_inference(model)
    assert isinstance(optimized, OptimizedSegmenter)
    assert not [module for module in optimized.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for size in ((1, 3, 64, 64), (3, 3, 96, 32)):
        images = torch.randn(size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = model.network(images)["class_logits"]
        assert torch.allclose(optimized.network(images)["class_logits"], expected, rtol=1e-4, atol=1e-4)


def test_openvino(model):
    pytest.importorskip("openvino", reason="the package openvino (extra 'openvino') is not installed")
    optimized = optimize_for_inference(model, engine="openvino")
    for size in ((1, 3, 64, 64), (3, 3, 96, 32)):
        images = torch.randn(size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = model.network(images)["class_logits"]
        assert torch.allclose(optimized.network(images)["class_logits"], expected, rtol=1e-4, atol=1e-4)


def test_timed_by_the_benchmark(workspace, tmp_path):
    path = tmp_path / "speed.json"
    args = ["--config-file", str(workspace / "config.yaml"), "--repetitions", "2", "--size", "64", "80"]
    assert benchmark.main([*args, "--json", str(path), "--compare", "eager", "configured"]) == 0
    settings = json.loads(path.read_text())["batches"][0]["settings"]
    assert settings["configured"]["parts_ms"].keys() == {"convs"}
    assert settings["eager"]["network"]["median_ms"] > 0


def test_a_training_step_is_timed_and_the_model_analyzed(workspace, tmp_path, capsys):
    path = tmp_path / "steps.json"
    args = ["--config-file", str(workspace / "config.yaml"), "--repetitions", "1", "--warmup", "1"]
    # Memory is measured in a process of its own, which has to import the toy too.
    assert benchmark_training.main([*args, "--json", str(path), "--size", "64", "80"]) == 0
    assert json.loads(path.read_text())["settings"]["configured"]["peak_mb"] > 0
    assert analyze_model.main(["--config-file", str(workspace / "config.yaml"), "--size", "64", "80"]) in (0, None)
    assert "convs" in capsys.readouterr().out


def test_any_detectron2_model_trains_and_is_evaluated(workspace, tmp_path):
    """The model of red_segmenter.py is not an InstanceSegmenter."""
    (tmp_path / "config.yaml").write_text(red_segmenter_config().dump())
    content = json.loads((workspace / "test.json").read_text())
    content["categories"] = content["categories"][:2]
    content["annotations"] = [each for each in content["annotations"] if each["category_id"] < 3]
    (tmp_path / "data.json").write_text(json.dumps(content))
    args = train_net.build_parser().parse_args(
        ["--config-file", str(tmp_path / "config.yaml"),
         "--train-json", str(tmp_path / "data.json"), "--train-images", str(workspace / "test"),
         "--test-json", str(tmp_path / "data.json"), "--test-images", str(workspace / "test"),
         "OUTPUT_DIR", str(tmp_path / "out"), "SOLVER.MAX_ITER", "1", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.STEPS", "()",
         "MODEL.MIN_BACKBONE_COVERAGE", "0.0", "DATALOADER.NUM_WORKERS", "0", "VIS_PERIOD", "1"]
    )  # fmt: skip
    assert "segm" in train_net.main(args)
    assert list(json.loads((tmp_path / "out" / "results.json").read_text())["speed"]["stages"]) == ["model", "total"]
    args.opts += ["SOLVER.ACCUMULATE_STEPS", "2", "OUTPUT_DIR", str(tmp_path / "parts")]
    with pytest.raises(SystemExit, match="RedSegmenter is not an InstanceSegmenter"):
        train_net.main(args)
