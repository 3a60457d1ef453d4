"""The LazyConfig of yolact_resnet50.yaml: ``python train_net.py --config-file lazy/yolact_resnet50.py``.

Overrides follow as ``train.max_iter=100 dataloader.train.total_batch_size=8``.
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

from sparseinst.data.dataset_mapper import SparseInstDatasetMapper
from sparseinst.data.ssd_augmentations import Expand, SSDColors, SSDCrop, to_float
from sparseinst.engine.optimizer import parameter_groups
from sparseinst.modeling.auxiliary import SemSegHead
from sparseinst.modeling.yolact.anchors import AnchorSpec
from sparseinst.modeling.yolact.criterion import YOLACTCriterion
from sparseinst.modeling.yolact.fpn import YOLACTPyramid
from sparseinst.modeling.yolact.heads import ProtoNet, YOLACTHead
from sparseinst.modeling.yolact.model import YOLACT

levels = {f"p{level}": ShapeSpec(channels=256, stride=2**level) for level in (3, 4, 5, 6, 7)}

model = L(YOLACT)(
    backbone=L(YOLACTPyramid)(
        bottom_up=L(ResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=64, norm="BN"),
            stages=L(ResNet.make_default_stages)(depth=50, norm="BN", stride_in_1x1=False),
            out_features=["res3", "res4", "res5"],
        ),
        in_features=["res3", "res4", "res5"],
        out_channels=256,
        num_levels=5,
    ),
    protonet=L(ProtoNet)(input_shape=levels["p3"]),
    head=L(YOLACTHead)(input_shape=levels, num_anchors=3, num_classes=80),
    criterion=L(YOLACTCriterion)(),
    sem_seg_head=L(SemSegHead)(in_channels=256, num_classes="${..head.num_classes}"),
    side=550,
    # As published. Set square=False for a training from other weights than the published ones.
    anchors=L(AnchorSpec)(sizes=[24, 48, 96, 192, 384], square=True),
    # Set this to True with fewer than six images per process.
    freeze_norms=False,
    pixel_mean=[123.68, 116.78, 103.94],
    pixel_std=[58.40, 57.12, 57.38],
)

dataloader = dict(
    train=L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="coco_2017_train"),
        mapper=L(SparseInstDatasetMapper)(
            is_train=True,
            augmentations=[
                L(T.ColorTransform)(op=to_float),
                L(SSDColors)(image_format="RGB"),
                L(T.RandomApply)(tfm_or_aug=L(Expand)(color=[123.68, 116.78, 103.94]), prob=0.5),
                L(SSDCrop)(),
                L(T.RandomFlip)(horizontal=True),
                L(T.Resize)(shape=[550, 550]),
            ],
            image_format="RGB",
            annotation_boxes=True,
        ),
        total_batch_size=8,
        num_workers=4,
        aspect_ratio_grouping=False,
    ),
    test=L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="coco_2017_val", filter_empty=False),
        mapper=L(SparseInstDatasetMapper)(is_train=False, augmentations=[], image_format="RGB"),
        num_workers=4,
    ),
    evaluator=L(COCOEvaluator)(dataset_name="${..test.dataset.names}", tasks=["bbox", "segm"]),
)

optimizer = L(torch.optim.SGD)(
    # train_net.py sets params.model.
    params=L(parameter_groups)(base_lr="${..lr}", weight_decay="${..weight_decay}", weight_decay_norm=5e-4),
    lr=0.001,
    momentum=0.9,
    weight_decay=5e-4,
)

# Shares of train.max_iter: the schedule shrinks with it.
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01, 0.001, 0.0001], milestones=[280_000, 600_000, 700_000, 750_000, 800_000]
    ),
    warmup_factor=0.1,
    warmup_length=500 / 800_000,
    warmup_method="linear",
)

train = dict(
    output_dir="output/lazy/yolact_resnet50",
    init_checkpoint="detectron2://ImageNetPretrained/torchvision/R-50.pkl",
    max_iter=800_000,
    # Needs a GPU.
    amp=dict(enabled=False),
    ddp=dict(broadcast_buffers=False),
    checkpointer=dict(period=5000, max_to_keep=5),
    eval_period=14_660,
    log_period=20,
    device="cuda",
    seed=-1,
    # As SOLVER.CLIP_TOTAL_NORM; 0: off.
    clip_total_norm=0.0,
)
