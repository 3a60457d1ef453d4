"""From the tensor names of a weights file to those of a model: explicit renamings, chosen by what both are called."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names
from torch import nn

from sparseinst.backbones import pvt

# Where training scripts put the weights, and averages of them (EMA), which are the ones that they evaluate.
WRAPPERS = ("model", "state_dict", "model_state", "blobs")
AVERAGES = ("state_dict_ema", "model_ema")
# What DistributedDataParallel, torch.compile and Lightning put before every name.
PREFIXES = ("module.", "_orig_mod.", "model.")
BACKBONE = "backbone."
# With a feature pyramid Detectron2 has the backbone one level deeper.
_BACKBONE_PREFIXES = (BACKBONE + "bottom_up.", BACKBONE)
EPS = 1e-5

CAFFE2 = "ResNet of Caffe2"
DETECTRON2 = "ResNet of Detectron2"
RESNET_D = "ResNet-D (vd) of timm"
RESNET = "ResNet of torchvision or timm"
PVT = "PVTv2"
PVT_TIMM = "PVTv2 of timm"
EFFICIENTNET_LITE = "EfficientNet of efficientnet-lite-pytorch"
EFFICIENTNET = "EfficientNet or MobileNet of timm"
DARKNET = "DarkNet of timm"
UNKNOWN = "names of no known family"

# Names that tell a family; the first that has all of its names is it.
_SIGNS = {
    CAFFE2: {"res2_0_branch2a_w"},
    DETECTRON2: {"res2.0.conv1.weight"},
    RESNET_D: {"conv1.0.weight", "layer1.0.conv1.weight"},
    RESNET: {"conv1.weight", "layer1.0.conv1.weight"},
    PVT: {"patch_embed1.proj.weight", "block1.0.attn.q.weight"},
    PVT_TIMM: {"patch_embed.proj.weight", "stages.0.blocks.0.attn.q.weight"},
    EFFICIENTNET_LITE: {"_conv_stem.weight", "_blocks.0._depthwise_conv.weight"},
    EFFICIENTNET: {"conv_stem.weight", "blocks.0.0.conv_dw.weight"},
    DARKNET: {"stem.conv1.conv.weight", "stages.0.conv_down.conv.weight"},
}
# What a classifier has and a backbone has not.
_CLASSIFIER = re.compile(r"(stem\.fc|_?fc|fc1000|pred|head|head_dist|classifier|last_linear|_?conv_head|_bn1|bn2)[._]")


class Converted(NamedTuple):
    """A file's tensors under the model's names.

    Attributes:
        tensors: the tensors; also those that the model does not have.
        origins: the file's own name of each.
        family: whose names the file's backbone has.
        target_family: whose names the model's backbone has.
    """

    tensors: dict[str, torch.Tensor]
    origins: dict[str, str]
    family: str
    target_family: str


def extract_tensors(content: object, averaged: bool = True) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors of a weights file, out of whatever is around them.

    Args:
        content: what the file holds: a state dict, or a dict with one of WRAPPERS or AVERAGES.
        averaged: take averaged weights where there are some.

    Returns:
        The tensors by name, without prefixes that all names share, and the entry that they were found in, "" for none.

    Raises:
        ValueError: there are none.
    """
    entry = ""
    if isinstance(content, Mapping):
        wrappers = AVERAGES + WRAPPERS if averaged else WRAPPERS
        holders = [key for key in wrappers if isinstance(content.get(key), Mapping) and _tensors(content[key])]
        if holders:
            entry = holders[0]
            content = content[entry]
    tensors = _tensors(content) if isinstance(content, Mapping) else {}
    if not tensors:
        found = f"the entries {', '.join(map(str, list(content)[:8]))}" if isinstance(content, Mapping) else "none"
        raise ValueError(
            f"holds no tensors by name; a dict of tensors was expected, or one in an entry {', '.join(WRAPPERS)}. "
            f"Found a {type(content).__name__}, with {found}"
        )
    stripped = True
    while stripped:
        stripped = False
        for prefix in PREFIXES:
            if all(name.startswith(prefix) for name in tensors):
                tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
                stripped = True
    return tensors, entry


def _tensors(state: Mapping) -> dict[str, torch.Tensor]:
    tensors = {}
    # An array under many names is one copy, or a small file could fill the memory.
    copies: dict[int, torch.Tensor] = {}
    for name, value in state.items():
        # Caffe2's files hold the optimizer's momentum too.
        if isinstance(name, str) and not name.endswith("_momentum"):
            if isinstance(value, torch.Tensor):
                tensors[name] = value
            elif isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
                # A copy of its own: a pickle's array may be read-only, or of another byte order.
                if id(value) not in copies:
                    copies[id(value)] = torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
                tensors[name] = copies[id(value)]
    return tensors


def family_of(names: Iterable[str]) -> str:
    """Whose names these are, of a backbone, or of a model with its backbone under ``backbone.``."""
    names = list(names)
    prefix = _backbone_prefix(names)
    backbone = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    return next((family for family, signs in _SIGNS.items() if signs <= backbone), UNKNOWN)


def _backbone_prefix(names: Iterable[str]) -> str:
    """What names of the backbone begin with, among the names of a whole model; "" where there is no such thing."""
    return next((prefix for prefix in _BACKBONE_PREFIXES if any(name.startswith(prefix) for name in names)), "")


def convert(tensors: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> Converted:
    """Give a file's tensors the names of a model.

    A file with names under ``backbone.`` is a model with one; any other is a backbone, or a classifier with one.
    Between families without a renaming, and unknown ones, names stay as they are.

    Args:
        tensors: of the file.
        target: the model's state dict.
    """
    family, target_family = family_of(tensors), family_of(target)
    new_names = {name: name for name in tensors}
    if target_prefix := _backbone_prefix(target):
        prefix = _backbone_prefix(tensors)
        inner = [name for name in tensors if name.startswith(prefix)]
        target_names = {name.removeprefix(target_prefix) for name in target if name.startswith(target_prefix)}
        rename = _RENAMINGS.get((family, target_family), _keep)
        renamed = rename([name.removeprefix(prefix) for name in inner], target_names)
        new_names.update(zip(inner, (target_prefix + name for name in renamed)))

    converted = {new: tensors[name] for name, new in new_names.items()}
    if family == CAFFE2:
        converted.update(_fused_statistics(converted, target))
    return Converted(converted, {new: name for name, new in new_names.items()}, family, target_family)


def is_classifier(name: str) -> bool:
    """Whether a tensor, by the name that its file gives it, belongs to a classifier behind the backbone."""
    return bool(_CLASSIFIER.match(name))


def explain_mismatch(family: str, backbone: nn.Module, target_family: str) -> str:
    """Why weights of a family are not for a backbone although names and shapes may fit; "" where they are.

    Args:
        family: of the file.
        backbone: with the layers that the weights would go to.
        target_family: of the backbone.
    """
    known = UNKNOWN not in (family, target_family)
    if known and family != target_family and (family, target_family) not in _RENAMINGS:
        return f"its names are of another network, {family}, and the backbone's of {target_family}"
    convs = [(name, module) for name, module in backbone.named_modules() if isinstance(module, nn.Conv2d)]
    strided = [(name, conv) for name, conv in convs if max(conv.stride) > 1]
    if family == EFFICIENTNET_LITE and any(any(conv.padding) for _, conv in strided):
        return (
            'it was trained with padding "same", which this network of the same names does not have; '
            "set MODEL.TIMM.NAME to the tf_efficientnet_lite of its size"
        )
    if (family, target_family) == (RESNET, DETECTRON2):
        if any(name.endswith("conv1") and conv.kernel_size == (1, 1) for name, conv in strided):
            return "its blocks have their stride in the 3x3 convolution; set MODEL.RESNETS.STRIDE_IN_1X1 False"
    return ""


_Renaming = Callable[[list[str], set[str]], list[str]]


def _keep(names: list[str], _: set[str]) -> list[str]:
    return names


def _each(rename: Callable[[str], str]) -> _Renaming:
    return lambda names, _: [rename(name) for name in names]


def _by_patterns(*patterns: tuple[str, str | Callable[[re.Match], str]]) -> _Renaming:
    """A renaming that replaces each pattern in each name, one after the other."""

    def rename(names: list[str], _: set[str]) -> list[str]:
        for pattern, replacement in patterns:
            names = [re.sub(pattern, replacement, name) for name in names]
        return names

    return rename


def _number(template: str, shift: int) -> Callable[[re.Match], str]:
    """A replacement that has the number found, shifted, in place of {}."""
    return lambda found: template.format(int(found[1]) + shift)


def _from_caffe2(names: list[str], _: set[str]) -> list[str]:
    return convert_basic_c2_names(names)


def _from_efficientnet_lite(names: list[str], target_names: set[str]) -> list[str]:
    # There the blocks are numbered through, here within their stages.
    found = (re.match(r"blocks\.(\d+)\.(\d+)\.", name) for name in target_names)
    places = sorted({(int(place[1]), int(place[2])) for place in found if place})
    expanded = {name.split(".")[1] for name in names if name.endswith("._expand_conv.weight")}
    layers = {"_depthwise_conv": "conv_dw", "_expand_conv": "conv_pw", "_se_reduce": "se.conv_reduce"}
    layers["_se_expand"] = "se.conv_expand"
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}

    def rename(name: str) -> str:
        parts = name.split(".")
        if parts[0] != "_blocks":
            return ".".join([outer.get(parts[0], parts[0]), *parts[1:]])
        number, layer = int(parts[1]), parts[2]
        if number >= len(places):
            # A stage that the backbone leaves out.
            return name
        is_expanded = parts[1] in expanded
        if layer == "_project_conv":
            layer = "conv_pwl" if is_expanded else "conv_pw"
        elif layer.startswith("_bn"):
            layer = f"bn{int(layer[3:]) + (1 if is_expanded else 0)}"
        return ".".join(["blocks", *map(str, places[number]), layers.get(layer, layer), *parts[3:]])

    return [rename(name) for name in names]


def _fused_statistics(
    converted: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Caffe2's norms have their statistics in weight and bias: only a frozen norm can take them, with mean 0, var 1."""
    added = {}
    for name, weight in converted.items():
        norm = name.removesuffix("weight")
        if name.endswith("norm.weight") and norm + "num_batches_tracked" not in target:
            for statistic, value in (("running_mean", 0.0), ("running_var", 1.0 - EPS)):
                if norm + statistic not in converted:
                    added[norm + statistic] = torch.full_like(weight, value)
    return added


_RENAMINGS: dict[tuple[str, str], _Renaming] = {
    (CAFFE2, DETECTRON2): _from_caffe2,
    (RESNET, DETECTRON2): _by_patterns(
        (r"^(?!layer)", "stem."),
        (r"^layer(\d)\.", _number("res{}.", 1)),
        (r"\bbn(\d)\.", r"conv\1.norm."),
        (r"\bdownsample\.0\.", "shortcut."),
        (r"\bdownsample\.1\.", "shortcut.norm."),
    ),
    (PVT, PVT_TIMM): _each(pvt.timm_name),
    (PVT_TIMM, PVT): _each(pvt.published_name),
    (EFFICIENTNET_LITE, EFFICIENTNET): _from_efficientnet_lite,
}
