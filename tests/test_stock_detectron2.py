"""Detectron2's own parts drive the model unchanged: no patches, no subclasses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.data import DatasetMapper, MetadataCatalog, build_detection_test_loader, build_detection_train_loader
from detectron2.engine import BestCheckpointer, DefaultPredictor, DefaultTrainer
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation import COCOEvaluator, LVISEvaluator, inference_on_dataset
from detectron2.modeling import build_model
from detectron2.solver.build import GradientClipType
from detectron2.utils.video_visualizer import VideoVisualizer
from detectron2.utils.visualizer import ColorMode, Visualizer

from sparseinst import add_sparse_inst_config, get_config_file
from sparseinst.config import load_config
from sparseinst.data.dataset_mapper import SparseInstDatasetMapper
from tests.shapes_data import register_shapes
from tests.tiny_model import tiny_cfg, tiny_model

CONFIGS = Path(get_config_file("Base-SparseInst")).parent


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    return register_shapes(folder, "stock_train"), register_shapes(folder, "stock_val", 4, seed=1)


def make_cfg(shapes, output_dir, *opts) -> CfgNode:
    return tiny_cfg(
        "DATASETS.TRAIN", shapes[:1], "DATASETS.TEST", shapes[1:], "MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4,
        "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 3, "SOLVER.STEPS", (), "SOLVER.BASE_LR", 1e-4,
        "SOLVER.WARMUP_ITERS", 0, "OUTPUT_DIR", str(output_dir), "SEED", 1,
        # Low, so that a model that was hardly trained finds something.
        "MODEL.SPARSE_INST.CLS_THRESHOLD", 0.0, "MODEL.SPARSE_INST.MASK_THRESHOLD", 0.001, *opts,
    )  # fmt: skip


def shapes_model():
    return tiny_model("MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_default_trainer_reads_every_yaml(shapes, path):
    cfg = get_cfg()
    add_sparse_inst_config(cfg)
    cfg.merge_from_file(str(path))
    assert GradientClipType(cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE)
    opts = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "DATASETS.TRAIN", shapes[:1], "DATALOADER.NUM_WORKERS", 0]
    cfg.merge_from_list(opts)
    optimizer = DefaultTrainer.build_optimizer(cfg, build_model(cfg))
    assert type(optimizer) is torch.optim.SGD and optimizer.param_groups[0]["lr"] == cfg.SOLVER.BASE_LR
    scheduler = DefaultTrainer.build_lr_scheduler(cfg, optimizer)
    assert 0 < scheduler.get_last_lr()[0] <= cfg.SOLVER.BASE_LR
    loader = DefaultTrainer.build_train_loader(cfg)
    sample = next(iter(loader.dataset))
    assert sample["instances"].has("gt_masks") and sample["image"].shape[0] == 3


def test_default_trainer_takes_a_step_with_the_quick_config(shapes, tmp_path):
    cfg = load_config(
        "quick/shapes",
        ["DATASETS.TRAIN", shapes[:1], "DATASETS.TEST", (), "SOLVER.MAX_ITER", 1, "OUTPUT_DIR", str(tmp_path)],
    )
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=False)
    before = trainer.model.encoder.fusion.weight.detach().clone()
    trainer.train()
    assert torch.isfinite(torch.tensor(trainer.storage.history("total_loss").latest()))
    assert not torch.equal(trainer.model.encoder.fusion.weight, before)
    assert (tmp_path / "model_final.pth").is_file()


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_default_trainer_mapper_eval_hook_and_checkpointers(shapes, tmp_path, mask_format):
    cfg = make_cfg(shapes, tmp_path, "INPUT.MASK_FORMAT", mask_format, "INPUT.CROP.ENABLED", True)
    # Of some random weights nothing is found, and AP is no number.
    torch.manual_seed(0)
    trainer = DefaultTrainer(cfg)
    assert type(trainer.optimizer).__name__ == "SGD"  # always, whatever SOLVER.OPTIMIZER says

    def evaluate():
        evaluator = COCOEvaluator(shapes[1], tasks=("bbox", "segm"), output_dir=str(tmp_path))
        return DefaultTrainer.test(cfg, trainer.model, evaluators=[evaluator])

    trainer.register_hooks([EvalHook(3, evaluate), BestCheckpointer(3, trainer.checkpointer, "segm/AP")])
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert (tmp_path / "model_final.pth").is_file()
    assert trainer.storage.history("segm/AP").latest() >= 0
    reloaded = build_model(cfg)
    DetectionCheckpointer(reloaded).load(str(tmp_path / "model_final.pth"))
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], value), name


def test_default_mapper_with_images_that_have_no_object(shapes, tmp_path):
    cfg = make_cfg(shapes, tmp_path, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False)
    mapper = DatasetMapper(cfg, is_train=True)
    record = {"file_name": next(iter(build_detection_train_loader(cfg)))[0]["file_name"], "annotations": []}
    empty = mapper(record)
    assert not empty["instances"].has("gt_masks")
    losses = shapes_model().train()([empty, empty])
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_default_predictor_and_visualizers(shapes, tmp_path):
    model = shapes_model()
    DetectionCheckpointer(model, str(tmp_path)).save("weights")
    predictor = DefaultPredictor(make_cfg(shapes, tmp_path, "MODEL.WEIGHTS", str(tmp_path / "weights.pth")))
    image = np.random.default_rng(0).integers(256, size=(60, 80, 3), dtype=np.uint8)
    instances = predictor(image)["instances"].to("cpu")
    assert len(instances) > 0 and instances.pred_masks.shape[1:] == (60, 80)
    metadata = MetadataCatalog.get(shapes[1])
    for found in (instances, instances[:0]):
        drawn = Visualizer(image[:, :, ::-1], metadata).draw_instance_predictions(found)
        assert drawn.get_image().shape == image.shape
        video = VideoVisualizer(metadata, ColorMode.IMAGE)
        for _ in range(2):
            assert video.draw_instance_predictions(image, found).get_image().shape == image.shape


def test_coco_evaluator_also_when_nothing_is_found(shapes, tmp_path):
    cfg = make_cfg(shapes, tmp_path)
    loader = build_detection_test_loader(cfg, shapes[1])
    model = shapes_model()
    results = inference_on_dataset(model, loader, COCOEvaluator(shapes[1], output_dir=str(tmp_path)))
    assert {"bbox", "segm"} <= results.keys()
    model.cls_threshold = 1.0
    results = inference_on_dataset(model, loader, COCOEvaluator(shapes[1], tasks=("segm",)))
    assert "segm" in results


def test_lvis_evaluator_writes_our_predictions(shapes, tmp_path):
    pytest.importorskip("lvis", reason="the package lvis is not installed (pip install --no-deps lvis)")
    metadata = MetadataCatalog.get(shapes[1])
    name = "stock_lvis"
    content = json.loads(Path(metadata.json_file).read_text())
    # Without annotations the evaluator stops after its results file: its AP step uses np.float, which numpy 1.24
    # has dropped.
    content["annotations"] = []
    (tmp_path / "lvis.json").write_text(json.dumps(content))
    MetadataCatalog.get(name).set(
        json_file=str(tmp_path / "lvis.json"), evaluator_type="lvis", thing_classes=metadata.thing_classes
    )
    cfg = make_cfg(shapes, tmp_path)
    loader = build_detection_test_loader(cfg, shapes[1])
    inference_on_dataset(shapes_model(), loader, LVISEvaluator(name, output_dir=str(tmp_path)))
    written = json.loads((tmp_path / "lvis_instances_results.json").read_text())
    assert written and {"image_id", "category_id", "bbox", "score", "segmentation"} <= written[0].keys()
    assert {result["category_id"] for result in written} <= {1, 2, 3, 4}


def test_config_adds_keys_and_changes_no_default_but_mask_on():
    stock, ours = get_cfg(), get_cfg()
    add_sparse_inst_config(ours)

    def leaves(node, prefix=""):
        for key, value in node.items():
            if isinstance(value, CfgNode):
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    before, after = dict(leaves(stock)), dict(leaves(ours))
    assert before.keys() < after.keys()
    assert [key for key, value in before.items() if after[key] != value] == ["MODEL.MASK_ON"]
    assert after["MODEL.MASK_ON"] is True


def test_lazy_config_builds_solov2_as_its_yaml_does():
    lazy = LazyConfig.load(get_config_file("lazy/solov2_light_448_r50.py"))
    cfg = load_config("solov2/solov2_light_448_r50_3x", ["MODEL.DEVICE", "cpu"])
    from_lazy, from_yaml = instantiate(lazy.model).eval(), build_model(cfg).eval()
    assert str(from_lazy) == str(from_yaml)
    from_lazy.load_state_dict(from_yaml.state_dict())
    frozen = [
        {name for name, value in model.named_parameters() if not value.requires_grad}
        for model in (from_lazy, from_yaml)
    ]
    assert frozen[0] == frozen[1] and frozen[0]
    assert (from_lazy.grid, from_lazy.detection) == (from_yaml.grid, from_yaml.detection)
    for name in ("cate_weight", "mask_weight", "focal_alpha", "focal_gamma", "global_normalization"):
        assert getattr(from_lazy.criterion, name) == getattr(from_yaml.criterion, name)
    x = {"image": torch.randint(256, (3, 64, 96), dtype=torch.uint8)}
    with torch.no_grad():
        lazy_outputs, yaml_outputs = (model.network(model.preprocess([x]).tensor) for model in (from_lazy, from_yaml))
    assert lazy_outputs.keys() == yaml_outputs.keys()
    for name, output in lazy_outputs.items():
        assert torch.equal(output, yaml_outputs[name]), name


def test_lazy_config_builds_yolact_as_its_yaml_does():
    lazy = LazyConfig.load(get_config_file("lazy/yolact_resnet50.py"))
    cfg = load_config("yolact/yolact_resnet50", ["MODEL.DEVICE", "cpu"])
    from_lazy, from_yaml = instantiate(lazy.model).eval(), build_model(cfg).eval()
    assert str(from_lazy) == str(from_yaml)
    # All parameters of the YAML's model train, as here.
    assert all(value.requires_grad for model in (from_lazy, from_yaml) for value in model.parameters())
    assert torch.equal(from_lazy.anchors, from_yaml.anchors) and from_lazy.side == from_yaml.side
    assert (from_lazy.matcher, from_lazy.detection) == (from_yaml.matcher, from_yaml.detection)
    assert torch.equal(from_lazy.pixel_mean, from_yaml.pixel_mean)
    settings = [
        {key: value for key, value in vars(model.criterion).items() if not key.startswith("_")}
        for model in (from_lazy, from_yaml)
    ]
    assert settings[0] == settings[1]
    found, expected = (
        # Some print as their address alone.
        [str(augmentation).partition(" object at ")[0] for augmentation in augmentations.augs]
        for augmentations in (
            instantiate(lazy.dataloader.train.mapper).augmentations,
            SparseInstDatasetMapper(cfg, is_train=True).augmentations,
        )
    )
    assert found[1:] == expected[1:] and len(found) == 6


def test_lazy_config_builds_the_model_of_its_yaml():
    lazy = LazyConfig.load(get_config_file("lazy/sparse_inst_r50_giam.py"))
    cfg = get_cfg()
    add_sparse_inst_config(cfg)
    cfg.merge_from_file(get_config_file("sparse_inst_r50_giam"))
    cfg.MODEL.DEVICE = "cpu"
    from_lazy, from_yaml = instantiate(lazy.model), build_model(cfg)
    assert str(from_lazy) == str(from_yaml)
    state = from_yaml.state_dict()
    assert {name: value.shape for name, value in from_lazy.state_dict().items()} == {
        name: value.shape for name, value in state.items()
    }
    from_lazy.load_state_dict(state)
    for part in ("criterion", "criterion.matcher", ""):
        settings = [
            {
                key: value
                for key, value in vars(
                    model.get_submodule(part) if "matcher" not in part else model.criterion.matcher
                ).items()
                if isinstance(value, int | float | tuple) and not key.startswith("_")
            }
            for model in (from_lazy, from_yaml)
        ]
        assert settings[0] == settings[1] and settings[0], part
    x = {"image": torch.randint(256, (3, 64, 96), dtype=torch.uint8)}
    with torch.no_grad():
        lazy_instances, yaml_instances = (model.eval()([x])[0]["instances"] for model in (from_lazy, from_yaml))
    assert torch.equal(lazy_instances.scores, yaml_instances.scores)
    assert torch.equal(lazy_instances.pred_masks, yaml_instances.pred_masks)
