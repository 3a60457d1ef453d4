"""Encoder and decoder rewritten for inference: the same function with fewer multiplications.

Results differ by float32 rounding only. In the encoder, the output convolution of each level and its share of the
fusion have only linear resizing between them, so they become one convolution. In the decoder, the first
convolutions of both branches become one. Letters: sparseinst.structures.
"""

import torch
from torch import nn
from torch.nn import functional as F

from sparseinst.ops.coordinates import append_coordinates


class FusedEncoder(nn.Module):
    """Compute what an InstanceContextEncoder computes.

    The encoder convolves each level to width C, resizes it to the finest grid and fuses all of them by a 1x1
    convolution. Resizing works on each channel alone, so it can follow the fusion, and then both convolutions are one.

    Args:
        encoder: in eval mode, without norms.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.in_features = encoder.in_features
        self.fpn_laterals = encoder.fpn_laterals
        self.ppm = encoder.ppm
        self.outputs = nn.ModuleList()
        # The fusion numbers its input from the finest level, the lists from the deepest.
        shares = encoder.fusion.weight.flatten(1).split(encoder.num_channels, dim=1)[::-1]
        bias = encoder.fusion.bias.clone()
        for output, share in zip(encoder.fpn_outputs, shares):
            conv = nn.Conv2d(encoder.num_channels, encoder.num_channels, 3, padding=1, bias=False)
            # Products in float64, so that the weights are rounded once.
            weight = torch.einsum("om,mihw->oihw", share.double(), output.weight.double())
            conv.weight = nn.Parameter(weight.to(share.dtype), requires_grad=False)
            bias += (share.double() @ output.bias.double()).to(bias.dtype)
            self.outputs.append(conv)
        self.outputs[-1].bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """Fuse the levels as the encoder does."""
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
    """Compute what one of the IAM decoders computes.

    The first convolutions of both branches become one. The coordinate channels are convolved apart and added, which
    saves a copy of the features.

    Args:
        decoder: in eval mode, first convolutions without norms. Its parts are shared, not copied.
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        first = [decoder.inst_branch.inst_convs[0], decoder.mask_branch.mask_convs[0]]
        weight, bias = (torch.cat([getattr(conv, name) for conv in first]) for name in ("weight", "bias"))
        self.widths = [conv.out_channels for conv in first]
        self.conv = nn.Conv2d(weight.shape[1] - 2, len(weight), 3, padding=1, bias=False)
        self.conv.weight = nn.Parameter(weight[:, 2:].contiguous(), requires_grad=False)
        self.register_buffer("coordinate_weight", weight[:, :2].contiguous())
        self.register_buffer("bias", bias)

    def forward(self, features: torch.Tensor, with_iams: bool = False) -> dict[str, torch.Tensor]:
        """Decode the encoder's map as the decoder does."""
        coordinates = append_coordinates(features[:1, :0])
        coordinate_map = F.conv2d(coordinates, self.coordinate_weight, self.bias, padding=1)
        joint = F.relu_(self.conv(features) + coordinate_map)
        inst_features, mask_features = joint.split(self.widths, dim=1)
        # Each branch continues after its first convolution and ReLU.
        inst_branch, mask_branch = self.decoder.inst_branch, self.decoder.mask_branch
        instances = inst_branch.predict(inst_branch.inst_convs[2:](inst_features))
        mask_features = mask_branch.projection(mask_branch.mask_convs[2:](mask_features))
        return self.decoder.combine(instances, mask_features, with_iams)
