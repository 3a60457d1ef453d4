"""The LazyConfig of solov2_light_448_r50_3x.yaml: ``python train_net.py --config-file lazy/solov2_light_448_r50.py``.

Overrides follow as ``train.max_iter=100 dataloader.train.total_batch_size=16``.
"""

import torch
from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader, build_detection_train_loader, get_detection_dataset_dicts
from detectron2.data import transforms as T
from detectron2.evaluation import COCOEvaluator
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from sparseinst.data.augmentations import ResizeShortestEdge
from sparseinst.data.dataset_mapper import SparseInstDatasetMapper
from sparseinst.engine.optimizer import parameter_groups
from sparseinst.modeling.solo.criterion import SOLOCriterion
from sparseinst.modeling.solo.dynamic_head import MaskFeatureHead, SOLOv2Head
from sparseinst.modeling.solo.model import SOLOv2

pyramid = {f"p{level}": ShapeSpec(channels=256, stride=2**level) for level in (2, 3, 4, 5, 6)}

model = L(SOLOv2)(
    backbone=L(FPN)(
        bottom_up=L(ResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
            stages=L(ResNet.make_default_stages)(depth=50, norm="FrozenBN"),
            out_features=["res2", "res3", "res4", "res5"],
            freeze_at=2,
        ),
        in_features=["res2", "res3", "res4", "res5"],
        out_channels=256,
        top_block=L(LastLevelMaxPool)(),
    ),
    head=L(SOLOv2Head)(
        input_shape=pyramid,
        in_features=["p2", "p3", "p4", "p5", "p6"],
        strides=[8, 8, 16, 32, 32],
        num_grids=[40, 36, 24, 16, 12],
        num_classes=80,
        num_convs=2,
        channels=256,
        kernel_dim=128,
    ),
    mask_feature_head=L(MaskFeatureHead)(
        input_shape=pyramid, in_features=["p2", "p3", "p4", "p5"], channels=128, kernel_dim="${..head.kernel_dim}"
    ),
    criterion=L(SOLOCriterion)(),
    scale_ranges=[[1, 56], [28, 112], [56, 224], [112, 448], [224, 896]],
    pixel_mean=[123.675, 116.280, 103.530],
    pixel_std=[58.395, 57.120, 57.375],
)

dataloader = dict(
    train=L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="coco_2017_train"),
        mapper=L(SparseInstDatasetMapper)(
            is_train=True,
            augmentations=[
                L(T.RandomFlip)(horizontal=True),
                L(ResizeShortestEdge)(
                    short_edge_length=[352, 384, 416, 448, 480, 512], max_size=768, sample_style="choice"
                ),
            ],
            image_format="RGB",
        ),
        total_batch_size=16,
        num_workers=4,
    ),
    test=L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="coco_2017_val", filter_empty=False),
        mapper=L(SparseInstDatasetMapper)(
            is_train=False,
            augmentations=[L(ResizeShortestEdge)(short_edge_length=448, max_size=768)],
            image_format="RGB",
        ),
        num_workers=4,
    ),
    evaluator=L(COCOEvaluator)(dataset_name="${..test.dataset.names}", tasks=["bbox", "segm"]),
)

optimizer = L(torch.optim.SGD)(
    # train_net.py sets params.model.
    params=L(parameter_groups)(base_lr="${..lr}", weight_decay="${..weight_decay}", weight_decay_norm=1e-4),
    lr=0.01,
    momentum=0.9,
    weight_decay=1e-4,
)

# Shares of train.max_iter: the schedule shrinks with it.
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1, 0.01], milestones=[197_910, 241_890, 263_880]),
    warmup_factor=0.01,
    warmup_length=500 / 263_880,
    warmup_method="linear",
)

train = dict(
    output_dir="output/lazy/solov2_light_448_r50",
    init_checkpoint="detectron2://ImageNetPretrained/torchvision/R-50.pkl",
    max_iter=263_880,
    # Needs a GPU.
    amp=dict(enabled=False),
    ddp=dict(broadcast_buffers=False),
    checkpointer=dict(period=5000, max_to_keep=5),
    eval_period=7330,
    log_period=20,
    device="cuda",
    seed=-1,
    # As SOLVER.CLIP_TOTAL_NORM; 0: off.
    clip_total_norm=35.0,
)
