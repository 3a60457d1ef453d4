"""timm's networks, and the published PVTv2, which has other names than timm's."""

from sparseinst.backbones import pvt
from sparseinst.checkpoint.names.source import Source, each

PVT_PUBLISHED = "PVTv2"
PVT_TIMM = "PVTv2 of timm"

RESNET_D = Source("ResNet-D (vd) of timm", frozenset({"conv1.0.weight", "layer1.0.conv1.weight"}))
EFFICIENTNET = Source("EfficientNet or MobileNet of timm", frozenset({"conv_stem.weight", "blocks.0.0.conv_dw.weight"}))
DARKNET = Source("DarkNet of timm", frozenset({"stem.conv1.conv.weight", "stages.0.conv_down.conv.weight"}))
SOURCES = (
    RESNET_D,
    Source(
        PVT_PUBLISHED,
        frozenset({"patch_embed1.proj.weight", "block1.0.attn.q.weight"}),
        renamings={PVT_TIMM: each(pvt.timm_name)},
    ),
    Source(
        PVT_TIMM,
        frozenset({"patch_embed.proj.weight", "stages.0.blocks.0.attn.q.weight"}),
        renamings={PVT_PUBLISHED: each(pvt.published_name)},
    ),
    EFFICIENTNET,
    DARKNET,
)
