"""YOLACT in every command: trained in parts and on two ranks, resumed, evaluated, drawn, timed, analyzed, checked."""

import json

import cv2
import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultPredictor, DefaultTrainer
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from sparseinst.config import load_config
from sparseinst.data.coco_json import register_coco_json
from sparseinst.engine.finite import NonFiniteStepError
from sparseinst.engine.trainer import Trainer
from sparseinst.inference import Predictor
from sparseinst.structures.rle_masks import RLEMasks
from sparseinst.tools import analyze_model, benchmark, check_dataset, convert_weights, demo, export, train_net
from tests.checkpoint.test_yolact_names import read as published_tensors
from tests.distributed.ranks import run_ranks
from tests.loggers import loggers_restored
from tests.modeling.yolact.tiny_yolact import PLUS, tiny_yolact, tiny_yolact_cfg
from tests.shapes_data import CLASS_NAMES, write_shapes
from tests.tools.exported import assert_same_detections

NODE = "MODEL.YOLACT"


@pytest.fixture(scope="module", autouse=True)
def loggers():
    with loggers_restored():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder with config.yaml, shapes and an output of two steps."""
    path = tmp_path_factory.mktemp("yolact")
    write_shapes(path, 6)
    cfg = tiny_yolact_cfg(
        "SOLVER.IMS_PER_BATCH", 4, "SOLVER.ACCUMULATE_STEPS", 2, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (),
        "SOLVER.WARMUP_ITERS", 0, "SOLVER.CHECKPOINT_PERIOD", 100, "MODEL.MIN_BACKBONE_COVERAGE", 0.0, "SEED", 1,
        f"{NODE}.NUM_CLASSES", len(CLASS_NAMES), f"{NODE}.FREEZE_NORM_BELOW", 0,
        # The random choice of masks must be resumed, too.
        f"{NODE}.LOSS.MAX_TRAIN_MASKS", 2,
    )  # fmt: skip
    (path / "config.yaml").write_text(cfg.dump())
    train(path, "OUTPUT_DIR", path / "trained")
    return path


def command(folder, *args):
    data = (str(folder / "train.json"), str(folder / "train"))
    return [
        "--config-file", str(folder / "config.yaml"), "--train-json", data[0], "--train-images", data[1],
        "--test-json", data[0], "--test-images", data[1], *map(str, args),
    ]  # fmt: skip


def train(folder, *args):
    return train_net.main(train_net.build_parser().parse_args(command(folder, *args)))


def saved_weights(path):
    return torch.load(path, weights_only=True)["model"]


def of_checkpoint(folder, *opts):
    """Return the keys of the trained checkpoint, with a threshold that lets an untrained model find something."""
    low = (f"{NODE}.SCORE_THRESHOLD", 0.001)
    return ["MODEL.WEIGHTS", str(folder / "trained" / "model_final.pth"), *map(str, (*low, *opts))]


def test_resumed_bit_for_bit(folder, tmp_path):
    train(folder, "OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 1)
    half = saved_weights(tmp_path / "model_final.pth")
    train(folder, "--resume", "OUTPUT_DIR", tmp_path)
    whole, cut = (saved_weights(path / "model_final.pth") for path in (folder / "trained", tmp_path))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    assert not torch.equal(half["head.cls_score.weight"], cut["head.cls_score.weight"])


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_a_step_whose_loss_is_nan_changes_nothing(folder, tmp_path, action):
    register_coco_json(f"yolact_nan_{action}", str(folder / "train.json"), str(folder / "train"))
    cfg = load_config(
        str(folder / "config.yaml"),
        ["DATASETS.TRAIN", (f"yolact_nan_{action}",), "DATASETS.TEST", (), "OUTPUT_DIR", str(tmp_path),
         "SOLVER.NONFINITE.ACTION", action, "SOLVER.MAX_ITER", 1],
    )  # fmt: skip
    trainer = Trainer(cfg)
    trainer.model.protonet.register_forward_hook(lambda module, args, output: output * float("nan"))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    if action == "stop":
        with pytest.raises(NonFiniteStepError, match="the output of protonet"):
            trainer.train()
        assert (tmp_path / "model_nonfinite.pth").is_file()
    else:
        trainer.train()
    after = trainer.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def train_a_rank(config, json_file, images, output):
    register_coco_json(json_file, json_file, images)
    cfg = load_config(
        config,
        ["DATASETS.TRAIN", (json_file,), "DATASETS.TEST", (), "OUTPUT_DIR", output, "SOLVER.ACCUMULATE_STEPS", 1,
         "SOLVER.IMS_PER_BATCH", 2, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False,
         f"{NODE}.LOSS.GLOBAL_NORMALIZATION", True],
    )  # fmt: skip
    seed_all_rng(1 + comm.get_rank())
    trainer = Trainer(cfg)
    trainer.train()
    return dict(trainer.checkpointer.model.named_parameters())


def test_two_ranks_where_one_has_no_objects(folder, tmp_path):
    content = json.loads((folder / "train.json").read_text())
    annotated = content["images"][0]["id"]
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] == annotated]
    json_file = tmp_path / "data.json"
    json_file.write_text(json.dumps(content))
    (tmp_path / "out").mkdir()
    first, second = run_ranks(
        2, train_a_rank, str(folder / "config.yaml"), str(json_file), str(folder / "train"), str(tmp_path / "out")
    )
    assert all(torch.equal(second[name], value) and value.isfinite().all() for name, value in first.items())


def test_evaluated_with_the_speed_table(folder, tmp_path):
    results = train(folder, "--eval-only", "OUTPUT_DIR", tmp_path, *of_checkpoint(folder))
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["results"]["segm"]["AP"] == pytest.approx(results["segm"]["AP"])
    assert list(written["speed"]["stages"]) == ["preprocessing", "network", "post-processing", "total"]


def test_drawn_by_the_demo_with_the_checkpoints_classes(folder, tmp_path):
    image = next((folder / "train").glob("*.jpg"))
    code = demo.main(
        ["--config-file", str(folder / "config.yaml"), "--input", str(image), "--output", str(tmp_path / "out"),
         "--json", str(tmp_path / "results.json"), "--confidence-threshold", "0.0", "--opts", *of_checkpoint(folder)]
    )  # fmt: skip
    assert code == 0
    assert cv2.imread(str(tmp_path / "out" / image.name)) is not None
    results = json.loads((tmp_path / "results.json").read_text())
    assert results and {result["category_id"] for result in results} <= {1, 2, 3, 4}


def test_predicted_as_masks_and_as_rle(folder):
    image = next((folder / "train").glob("*.jpg"))
    cfg = load_config(str(folder / "config.yaml"), of_checkpoint(folder))
    predictor = Predictor(cfg)
    assert predictor.classes.names == CLASS_NAMES
    (instances,) = predictor([image])
    assert len(instances) > 0 and instances.pred_masks.dtype == torch.bool
    cfg.MODEL.OUTPUT.MASK_FORMAT = "rle"
    (encoded,) = Predictor(cfg)([image])
    assert isinstance(encoded.pred_masks, RLEMasks)
    assert torch.equal(torch.from_numpy(encoded.pred_masks.__array__()), instances.pred_masks)
    # Detectron2's predictor resizes by the shortest edge before, in bytes.
    cfg = load_config(str(folder / "config.yaml"), [*of_checkpoint(folder), "INPUT.MIN_SIZE_TEST", "100"])
    pixels = cv2.imread(str(image))
    stock = DefaultPredictor(cfg)(pixels)["instances"]
    assert stock.image_size == pixels.shape[:2] == instances.image_size and len(stock) > 0


def test_timed_and_analyzed(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(tiny_yolact_cfg(*PLUS, "INPUT.SQUARE_SIZE", 256).dump())
    config, size = ["--config-file", str(tmp_path / "config.yaml")], ["--size", "64", "96"]
    path = tmp_path / "speed.json"
    compared = ["--repetitions", "2", "--json", str(path), "--compare", "eager", "configured", "--detections", "5"]
    assert benchmark.main([*config, *size, *compared]) == 0
    settings = json.loads(path.read_text())["batches"][0]["settings"]
    assert {"head", "protonet"} <= settings["configured"]["parts_ms"].keys()
    assert settings["eager"]["network"]["median_ms"] > 0
    assert analyze_model.main([*config, *size]) in (0, None)
    assert "protonet" in capsys.readouterr().out


def test_an_exported_mask_iou_head_scores_the_same(tmp_path):
    """The head runs in post-processing, so the file holds its weights besides the network."""
    (tmp_path / "config.yaml").write_text(tiny_yolact_cfg(*PLUS, f"{NODE}.SCORE_THRESHOLD", 0.26).dump())
    model = tiny_yolact(*PLUS)
    # Random weights predict IoUs of 0.
    model.mask_iou_head.predictor.bias.data += 0.5
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    config, weights = str(tmp_path / "config.yaml"), ["MODEL.WEIGHTS", str(tmp_path / "model.pth")]
    flags = ["--config-file", config, "--format", "torch", "--size", "256", "256", "--output", str(tmp_path)]
    assert export.main([*flags, *weights]) == 0
    image = np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8)
    (expected,) = Predictor(load_config(config, weights))([image])
    predictor = Predictor(tmp_path / "model.pt2")
    assert_same_detections(predictor([image])[0], expected)
    assert sum(each.numel() for each in predictor.model.parameters()) == sum(
        each.numel() for each in model.mask_iou_head.parameters()
    )


def test_other_options_of_a_training(folder, tmp_path):
    train(
        folder, "OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 1, "SOLVER.RECOMPUTE", "['backbone']",
        "TEST.PRECISE_BN.NUM_ITER", 2, "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16",
        "SOLVER.CHANNELS_LAST", True, "VIS_PERIOD", 1, "TEST.PRECISE_BN.ENABLED", True, "SOLVER.ACCUMULATE_STEPS", 1,
    )  # fmt: skip
    assert (tmp_path / "model_final.pth").is_file()


def test_a_published_file_is_converted_for_the_stock_checkpointer(tmp_path, capsys):
    """The file's names are those of tests/state_dicts; its values are random."""
    torch.manual_seed(0)
    state = {
        name: torch.randn(value.shape) if value.is_floating_point() else torch.zeros(value.shape, dtype=value.dtype)
        for name, value in published_tensors("yolact_r50").items()
    }
    torch.save(state, tmp_path / "official.pth")
    output = tmp_path / "converted.pth"
    convert_weights.main(
        ["--input", str(tmp_path / "official.pth"), "--config-file", "yolact/yolact_resnet50", "--output", str(output)]
    )
    assert "YOLACT of the official code" in capsys.readouterr().out
    model = build_model(load_config("yolact/yolact_resnet50", ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]))
    DetectionCheckpointer(model).load(str(output))
    assert torch.equal(model.protonet.conv1.weight, state["proto_net.0.weight"])
    # The official code has the background first.
    classes, official = (
        weight.unflatten(0, (3, 81))
        for weight in (model.head.cls_score.weight, state["prediction_layers.0.conf_layer.weight"])
    )
    assert torch.equal(classes[:, -1], official[:, 0]) and torch.equal(classes[:, :-1], official[:, 1:])


def test_the_data_set_is_checked(folder):
    args = [str(folder / "train.json"), str(folder / "train"), "--config-file", str(folder / "config.yaml")]
    assert check_dataset.main(args) == 0


def test_detectron2s_trainer_and_mapper(folder, tmp_path):
    json_file, images = str(folder / "train.json"), str(folder / "train")
    register_coco_json("yolact_stock", json_file, images)
    cfg = load_config(
        str(folder / "config.yaml"),
        ["DATASETS.TRAIN", ("yolact_stock",), "DATASETS.TEST", (), "OUTPUT_DIR", str(tmp_path),
         "SOLVER.MAX_ITER", 1, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.ACCUMULATE_STEPS", 1, "INPUT.MIN_SIZE_TRAIN", (50,)],
    )  # fmt: skip
    trainer = DefaultTrainer(cfg)
    trainer.train()
    assert np.isfinite(trainer.storage.latest()["total_loss"][0])
    cfg.DATASETS.TEST = ("yolact_stock",)
    results = DefaultTrainer.test(cfg, trainer.model, [COCOEvaluator("yolact_stock", output_dir=str(tmp_path))])
    assert results["segm"]["AP"] >= 0 and results["bbox"]["AP"] >= 0


def test_a_video_is_drawn(folder, tmp_path):
    pixels = cv2.imread(str(next((folder / "train").glob("*.jpg"))))
    writer = cv2.VideoWriter(str(tmp_path / "clip.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 5.0, pixels.shape[1::-1])
    for _ in range(3):
        writer.write(pixels)
    writer.release()
    code = demo.main(
        ["--config-file", str(folder / "config.yaml"), "--video-input", str(tmp_path / "clip.mp4"), "--output",
         str(tmp_path / "drawn.mp4"), "--confidence-threshold", "0.0", "--opts", *of_checkpoint(folder)]
    )  # fmt: skip
    assert code == 0
    assert cv2.VideoCapture(str(tmp_path / "drawn.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 3
