"""The network rewritten for inference: the same function with less arithmetic. Letters: see structures.py.

Everything here is exact but for the rounding of float32. Norms that no longer learn are folded into convolutions. In
the encoder, the output convolution of each level and its share of the fusion, with nothing but linear resizing between
them, become one convolution. In the decoder, both branches start with one wider convolution, and the coordinate
channels, which are the same for every picture of a size, become a map that is added.
"""

import copy
import logging

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import fuse_conv_bn_weights

from sparseinst.backbones.deform_conv import DeformConv2d
from sparseinst.modeling.sparse_inst.decoder import (
    BaseIAMDecoder,
    GroupIAMDecoder,
    GroupIAMSoftDecoder,
    append_coordinates,
)
from sparseinst.modeling.sparse_inst.encoder import InstanceContextEncoder

logger = logging.getLogger(__name__)

_NORMS = (nn.BatchNorm2d, FrozenBatchNorm2d)
_CONVS = (nn.Conv2d, DeformConv2d)
# Sizes whose coordinate maps are kept; each takes H * W * 2 KB at the published widths.
MAX_SIZES = 16
# Of the largest output; rounding moves them by a hundredth of it.
TOLERANCE = 1e-3
_DECODERS = (BaseIAMDecoder, GroupIAMDecoder, GroupIAMSoftDecoder)


def fuse_network(model: nn.Module, example: torch.Tensor) -> nn.Module:
    """A copy of a SparseInst in eval mode whose ``network`` does less and returns the same.

    Parts of other classes than ours stay as they are, but for their norms.

    Args:
        model: not changed.
        example: (B, 3, h, w), normalised images that are run through the network to find out which convolution feeds
            which norm, and that the results stay.

    Returns:
        The copy, without gradients. It cannot be trained, and its state dict is not that of a checkpoint.
    """
    original, model = model, copy.deepcopy(model).eval().requires_grad_(False)
    with torch.no_grad():
        expected = model.network(example)
        fold_norms(model, lambda: model.network(example))
        if type(model.encoder) is InstanceContextEncoder and _is_linear(
            *model.encoder.fpn_outputs, model.encoder.fusion
        ):
            model.encoder = FusedEncoder(model.encoder)
        if type(model.decoder) in _DECODERS and _is_linear(*_first_convs(model.decoder)):
            model.decoder = FusedDecoder(model.decoder)
        found = model.network(example)
    # What a backbone does between its modules is not seen: it may use a convolution's output beside the norm's.
    if any((found[name] - value).abs().max() > TOLERANCE * value.abs().max() for name, value in expected.items()):
        logger.warning("The network cannot be fused: what it returns would change. It runs as it is")
        return copy.deepcopy(original).eval().requires_grad_(False)
    return model


def fold_norms(module: nn.Module, run) -> int:
    """Fold each batch norm into the convolution whose output it is given, in place.

    Args:
        module: in eval mode.
        run: runs it once.

    Returns:
        How many were folded. A norm whose input comes from elsewhere, or a convolution that feeds several modules,
        stays.
    """
    # Detectron2's convolutions carry their norm.
    count = 0
    for conv in module.modules():
        norm = getattr(conv, "norm", None)
        if isinstance(conv, _CONVS) and isinstance(norm, _NORMS):
            _fold(conv, norm)
            conv.norm = None
            count += 1

    producers: dict[int, nn.Conv2d] = {}
    consumers: dict[nn.Conv2d, list[nn.Module]] = {}
    kept: list[torch.Tensor] = []  # so that no other tensor takes their places in memory

    def note_input(consumer: nn.Module, inputs: tuple) -> None:
        for value in inputs:
            if isinstance(value, torch.Tensor) and id(value) in producers:
                consumers[producers[id(value)]].append(consumer)

    def note_output(conv: nn.Conv2d, inputs: tuple, output: torch.Tensor) -> None:
        producers[id(output)] = conv
        consumers.setdefault(conv, [])
        kept.append(output)

    leaves = [part for part in module.modules() if not any(part.children()) or isinstance(part, _NORMS)]
    handles = [part.register_forward_pre_hook(note_input) for part in leaves]
    handles += [part.register_forward_hook(note_output) for part in module.modules() if isinstance(part, _CONVS)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    for conv, users in consumers.items():
        if len(users) == 1 and isinstance(users[0], _NORMS):
            _fold(conv, users[0])
            _replace(module, users[0], _without_norm(users[0]))
            count += 1
    return count


def _is_captured(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _is_linear(*convs: nn.Conv2d) -> bool:
    """Whether no norm is left, as one that takes its statistics from the picture (GN) is."""
    return all(conv.norm is None for conv in convs)


def _first_convs(decoder: BaseIAMDecoder) -> list[nn.Conv2d]:
    return [decoder.inst_branch.inst_convs[0], decoder.mask_branch.mask_convs[0]]


def _fold(conv: nn.Conv2d, norm: nn.Module) -> None:
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    conv.requires_grad_(False)


def _without_norm(norm: nn.Module) -> nn.Module:
    """What a norm does besides: timm's have an activation of their own."""
    rest = [getattr(norm, name) for name in ("drop", "act") if isinstance(getattr(norm, name, None), nn.Module)]
    return nn.Sequential(*rest) if rest else nn.Identity()


def _replace(module: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)


class FusedEncoder(nn.Module):
    """What an InstanceContextEncoder computes.

    Its outputs are convolved to width C, resized to the finest grid and fused by a convolution of one pixel. Resizing
    works on each channel alone, so it can as well come after the fusion; and then both convolutions are one.

    Args:
        encoder: in eval mode, its norms folded.
    """

    def __init__(self, encoder: InstanceContextEncoder) -> None:
        super().__init__()
        self.in_features = encoder.in_features
        self.fpn_laterals = encoder.fpn_laterals
        self.ppm = encoder.ppm
        self.outputs = nn.ModuleList()
        # The fusion counts its input from the finest level, the lists from the deepest.
        shares = encoder.fusion.weight.flatten(1).split(encoder.num_channels, dim=1)[::-1]
        bias = encoder.fusion.bias.clone()
        for output, share in zip(encoder.fpn_outputs, shares):
            conv = nn.Conv2d(encoder.num_channels, encoder.num_channels, 3, padding=1, bias=False)
            # Products of many terms: in float64, so that the weights are those of exact arithmetic, rounded once.
            weight = torch.einsum("om,mihw->oihw", share.double(), output.weight.double())
            conv.weight = nn.Parameter(weight.to(share.dtype), requires_grad=False)
            bias += (share.double() @ output.bias.double()).to(bias.dtype)
            self.outputs.append(conv)
        self.outputs[-1].bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """As the encoder's."""
        deepest_first = [features[name] for name in reversed(self.in_features)]
        top_down = self.ppm(self.fpn_laterals[0](deepest_first[0]))
        levels = [self.outputs[0](top_down)]
        for feature, lateral, output in zip(deepest_first[1:], self.fpn_laterals[1:], self.outputs[1:]):
            top_down = lateral(feature) + F.interpolate(top_down, size=feature.shape[-2:], mode="nearest")
            levels.append(output(top_down))
        fused = levels[-1]
        for level in levels[:-1]:
            fused = fused + F.interpolate(level, size=fused.shape[-2:], mode="bilinear", align_corners=False)
        return fused


class FusedDecoder(nn.Module):
    """What a decoder of ours computes.

    Args:
        decoder: in eval mode, its norms folded. Its parts are used, not copied.
    """

    def __init__(self, decoder: BaseIAMDecoder) -> None:
        super().__init__()
        self.decoder = decoder
        first = _first_convs(decoder)
        weight, bias = (torch.cat([getattr(conv, name) for conv in first]) for name in ("weight", "bias"))
        self.widths = [conv.out_channels for conv in first]
        self.conv = nn.Conv2d(weight.shape[1] - 2, len(weight), 3, padding=1, bias=False)
        self.conv.weight = nn.Parameter(weight[:, 2:].contiguous(), requires_grad=False)
        self.register_buffer("coordinate_weight", weight[:, :2].contiguous())
        self.register_buffer("bias", bias)
        # By size; the pictures of a data set, or the frames of a video, have few.
        self._coordinate_maps: dict[tuple, torch.Tensor] = {}

    @property
    def output_iam(self) -> bool:
        """Whether ``pred_iam`` is returned too."""
        return self.decoder.output_iam

    @output_iam.setter
    def output_iam(self, value: bool) -> None:
        self.decoder.output_iam = value

    def forward(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """As the decoder's."""
        joint = F.relu_(self.conv(features) + self._coordinate_map(features))
        inst_features, mask_features = joint.split(self.widths, dim=1)
        # Each branch goes on behind its first convolution and ReLU.
        inst_branch, mask_branch = self.decoder.inst_branch, self.decoder.mask_branch
        instances = inst_branch.predict(inst_branch.inst_convs[2:](inst_features))
        return self.decoder.combine(instances, mask_branch.projection(mask_branch.mask_convs[2:](mask_features)))

    def _coordinate_map(self, features: torch.Tensor) -> torch.Tensor:
        """What the first convolutions make of the coordinates, and their bias: (1, both widths, H, W)."""
        if torch.jit.is_tracing() or torch.compiler.is_compiling() or _is_captured(features):
            # A map that was kept would be taken for a constant of every size; a graph would read it after it is gone.
            return self._compute_coordinate_map(features)
        key = (features.shape[-2:], features.dtype, features.device)
        if key not in self._coordinate_maps:
            if len(self._coordinate_maps) >= MAX_SIZES:
                self._coordinate_maps.pop(next(iter(self._coordinate_maps)))
            self._coordinate_maps[key] = self._compute_coordinate_map(features)
        return self._coordinate_maps[key]

    def _compute_coordinate_map(self, features: torch.Tensor) -> torch.Tensor:
        maps = F.conv2d(append_coordinates(features[:1, :0]), self.coordinate_weight, self.bias, padding=1)
        return maps.contiguous(memory_format=torch.channels_last)
