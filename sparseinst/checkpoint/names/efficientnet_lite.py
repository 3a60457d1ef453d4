"""The EfficientNet-Lite of the Python package efficientnet-lite-pytorch."""

import re

from torch import nn

from sparseinst.checkpoint.names import timm
from sparseinst.checkpoint.names.source import Source

_LAYERS = {
    "_depthwise_conv": "conv_dw",
    "_expand_conv": "conv_pw",
    "_se_reduce": "se.conv_reduce",
    "_se_expand": "se.conv_expand",
}
_OUTSIDE_BLOCKS = {
    "_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier",
}  # fmt: skip


def _rename(names: list[str], target_names: set[str]) -> list[str]:
    # The package numbers the blocks of all stages, timm those within a stage.
    found = (re.match(r"blocks\.(\d+)\.(\d+)\.", name) for name in target_names)
    blocks = sorted({(int(match[1]), int(match[2])) for match in found if match})
    expanded = {name.split(".")[1] for name in names if name.endswith("._expand_conv.weight")}

    def rename(name: str) -> str:
        parts = name.split(".")
        if parts[0] != "_blocks":
            return ".".join([_OUTSIDE_BLOCKS.get(parts[0], parts[0]), *parts[1:]])
        block, layer = int(parts[1]), parts[2]
        if block >= len(blocks):
            # A stage that the backbone leaves out.
            return name
        is_expanded = parts[1] in expanded
        if layer == "_project_conv":
            layer = "conv_pwl" if is_expanded else "conv_pw"
        elif layer.startswith("_bn"):
            layer = f"bn{int(layer[3:]) + is_expanded}"
        return ".".join(["blocks", *map(str, blocks[block]), _LAYERS.get(layer, layer), *parts[3:]])

    return [rename(name) for name in names]


def _explain(backbone: nn.Module, _: str) -> str:
    convs = (module for module in backbone.modules() if isinstance(module, nn.Conv2d))
    if any(max(conv.stride) > 1 and any(conv.padding) for conv in convs):
        return (
            'it was trained with padding "same", which this network of the same names does not have; '
            "set MODEL.TIMM.NAME to the tf_efficientnet_lite of its size"
        )
    return ""


SOURCES = (
    Source(
        "EfficientNet of efficientnet-lite-pytorch",
        frozenset({"_conv_stem.weight", "_blocks.0._depthwise_conv.weight"}),
        renamings={timm.EFFICIENTNET.family: _rename},
        explain=_explain,
    ),
)
