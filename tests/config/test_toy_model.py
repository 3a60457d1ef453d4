"""A user's own meta-architecture trains and is evaluated without a line of the package that knows it."""

import torch
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from torch import nn

from sparseinst.data.coco_json import log_data_warnings, register_user_datasets
from sparseinst.engine.trainer import Trainer
from sparseinst.inference import Predictor
from tests.shapes_data import write_shapes
from tests.tiny_model import tiny_cfg


@META_ARCH_REGISTRY.register()
class OneMaskForAll(nn.Module):
    """Declares no key: its single mask is the upper half of the image."""

    def __init__(self, cfg):
        super().__init__()
        self.score = nn.Parameter(torch.tensor(0.5))

    @property
    def device(self):
        return self.score.device

    def forward(self, batched_inputs):
        if self.training:
            return {"loss_score": (self.score - 1).square()}
        return [{"instances": self._predict(x["height"], x["width"])} for x in batched_inputs]

    def _predict(self, height, width):
        masks = torch.zeros(1, height, width, dtype=torch.bool)
        masks[:, : height // 2] = True
        boxes = Boxes(torch.tensor([[0.0, 0.0, width, height // 2]]))
        scores, classes = self.score.detach()[None], torch.tensor([0])
        return Instances((height, width), pred_masks=masks, scores=scores, pred_classes=classes, pred_boxes=boxes)


def test_train_evaluate_and_predict(tmp_path):
    data_json, images = write_shapes(tmp_path, 4)
    cfg = tiny_cfg(
        "MODEL.META_ARCHITECTURE", "OneMaskForAll", "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 2,
        "SOLVER.STEPS", (), "SOLVER.ACCUMULATE_STEPS", 2, "OUTPUT_DIR", str(tmp_path / "out"),
        "DATASETS.TRAIN_JSON", data_json, "DATASETS.TRAIN_IMAGES", images,
        "DATASETS.TEST_JSON", data_json, "DATASETS.TEST_IMAGES", images, "MODEL.MIN_BACKBONE_COVERAGE", 0.0,
    )  # fmt: skip
    (tmp_path / "out").mkdir()
    register_user_datasets(cfg)
    log_data_warnings(cfg)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    assert "segm" in trainer.train()
    cfg.MODEL.WEIGHTS = str(tmp_path / "out" / "model_final.pth")
    (instances,) = Predictor(cfg)([torch.zeros(20, 30, 3, dtype=torch.uint8).numpy()])
    assert instances.pred_masks.shape == (1, 20, 30)
