"""The LazyConfig of sparse_inst_r50_giam.yaml: ``python train_net.py --config-file lazy/sparse_inst_r50_giam.py``.

Overrides follow as ``train.max_iter=100 dataloader.train.total_batch_size=16``.
"""

import torch
from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader, build_detection_train_loader, get_detection_dataset_dicts
from detectron2.data import transforms as T
from detectron2.evaluation import COCOEvaluator
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from sparseinst.data.augmentations import ResizeShortestEdge
from sparseinst.data.dataset_mapper import SparseInstDatasetMapper
from sparseinst.engine.optimizer import parameter_groups
from sparseinst.modeling.sparse_inst.criterion import SparseInstCriterion
from sparseinst.modeling.sparse_inst.decoder import GroupIAMDecoder, InstanceBranch, MaskBranch
from sparseinst.modeling.sparse_inst.encoder import InstanceContextEncoder
from sparseinst.modeling.sparse_inst.matcher import SparseInstMatcher
from sparseinst.modeling.sparse_inst.model import SparseInst

model = L(SparseInst)(
    backbone=L(ResNet)(
        stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
        stages=L(ResNet.make_default_stages)(depth=50, norm="FrozenBN"),
        out_features=["res3", "res4", "res5"],
    ),
    encoder=L(InstanceContextEncoder)(
        input_shape={
            "res3": ShapeSpec(channels=512, stride=8),
            "res4": ShapeSpec(channels=1024, stride=16),
            "res5": ShapeSpec(channels=2048, stride=32),
        },
        in_features=["res3", "res4", "res5"],
        num_channels=256,
    ),
    decoder=L(GroupIAMDecoder)(
        inst_branch=L(InstanceBranch)(in_channels=256, num_masks=100, num_classes=80, num_groups=4, with_fc=True),
        mask_branch=L(MaskBranch)(in_channels=256),
    ),
    criterion=L(SparseInstCriterion)(matcher=L(SparseInstMatcher)(alpha=0.8, beta=0.2)),
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
                    short_edge_length=[416, 448, 480, 512, 544, 576, 608, 640], max_size=853, sample_style="choice"
                ),
            ],
            image_format="RGB",
        ),
        total_batch_size=64,
        num_workers=6,
    ),
    test=L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="coco_2017_val", filter_empty=False),
        mapper=L(SparseInstDatasetMapper)(
            is_train=False,
            augmentations=[L(ResizeShortestEdge)(short_edge_length=640, max_size=853)],
            image_format="RGB",
        ),
        num_workers=6,
    ),
    evaluator=L(COCOEvaluator)(dataset_name="${..test.dataset.names}", tasks=["bbox", "segm"]),
)

optimizer = L(torch.optim.AdamW)(
    # train_net.py sets params.model.
    params=L(parameter_groups)(base_lr="${..lr}", weight_decay="${..weight_decay}"),
    lr=5e-5,
    weight_decay=0.05,
)

# Shares of train.max_iter: the schedule shrinks with it.
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1, 0.01], milestones=[210_000, 250_000, 270_000]),
    warmup_factor=0.001,
    warmup_length=1000 / 270_000,
    warmup_method="linear",
)

train = dict(
    output_dir="output/lazy/sparse_inst_r50_giam",
    init_checkpoint="detectron2://ImageNetPretrained/torchvision/R-50.pkl",
    max_iter=270_000,
    # Needs a GPU.
    amp=dict(enabled=False),
    ddp=dict(broadcast_buffers=False),
    checkpointer=dict(period=5000, max_to_keep=5),
    eval_period=7330,
    log_period=20,
    device="cuda",
    seed=-1,
    # As SOLVER.CLIP_TOTAL_NORM; 0: off.
    clip_total_norm=10.0,
)
