"""torchvision's ResNets; timm has the same names."""

from torch import nn

from sparseinst.checkpoint.names import detectron2
from sparseinst.checkpoint.names.source import Source, by_patterns, number


def _explain(backbone: nn.Module, target_family: str) -> str:
    if target_family == detectron2.RESNET.family and detectron2.stride_in_1x1(backbone):
        return "its blocks have their stride in the 3x3 convolution; set MODEL.RESNETS.STRIDE_IN_1X1 False"
    return ""


RESNET = Source(
    "ResNet of torchvision or timm",
    frozenset({"conv1.weight", "layer1.0.conv1.weight"}),
    renamings={
        detectron2.RESNET.family: by_patterns(
            (r"^(?!layer)", "stem."),
            (r"^layer(\d)\.", number("res{}.", 1)),
            (r"\bbn(\d)\.", r"conv\1.norm."),
            (r"\bdownsample\.0\.", "shortcut."),
            (r"\bdownsample\.1\.", "shortcut.norm."),
        )
    },
    explain=_explain,
)
SOURCES = (RESNET,)
