"""The model of sparse_inst_r50_giam.yaml for LazyConfig: ``instantiate(LazyConfig.load(path).model)``."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BasicStem, ResNet

from sparseinst.modeling.sparse_inst.criterion import SparseInstCriterion
from sparseinst.modeling.sparse_inst.decoder import GroupIAMDecoder, InstanceBranch, MaskBranch
from sparseinst.modeling.sparse_inst.encoder import InstanceContextEncoder
from sparseinst.modeling.sparse_inst.matcher import SparseInstMatcher
from sparseinst.modeling.sparse_inst.model import SparseInst

model = L(SparseInst)(
    backbone=L(ResNet)(
        stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
        stages=L(ResNet.make_default_stages)(depth=50, stride_in_1x1=False, norm="FrozenBN"),
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
