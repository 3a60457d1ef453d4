"""Networks with random weights that stand in for pretrained ones, and models that are nothing but a backbone."""

import torch
from detectron2.modeling import build_backbone
from torch import nn

from tests.tiny_model import tiny_cfg

IMAGES = torch.rand(1, 3, 96, 64, generator=torch.Generator().manual_seed(0)) * 4 - 2
RESNET_50 = ("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256, "MODEL.RESNETS.STRIDE_IN_1X1", False)


class BackboneOnly(nn.Module):
    """A model with a backbone and no heads."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone


def backbone_model(*opts):
    """In eval mode; the backbone of tests/tiny_model.py with KEY, VALUE, ... on top."""
    return BackboneOnly(build_backbone(tiny_cfg(*opts))).eval()


def timm_backbone_model(name, *features, norm=""):
    features = list(features or ("res3", "res4", "res5"))
    return backbone_model(
        "MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME", name, "MODEL.TIMM.OUT_FEATURES", features,
        "MODEL.TIMM.NORM", norm,
    )  # fmt: skip


def randomise(network, seed=0):
    """Weights that tell every tensor from every other, norms and their statistics too. Returns it, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if tensor.dtype.is_floating_point:
            if tensor.dim() > 1:
                tensor.normal_(std=tensor[0].numel() ** -0.5, generator=generator)
            elif name.endswith("running_var") or name.endswith("weight"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            else:
                tensor.normal_(std=0.1, generator=generator)
    return network.eval()


def features_of(model):
    """The backbone's feature maps by name."""
    with torch.no_grad():
        return model.backbone(IMAGES)


def assert_close(features, expected):
    """All maps equal but for rounding, and none of them trivial."""
    assert len(features) == len(expected)
    for feature, reference in zip(features, expected):
        assert feature.shape == reference.shape and reference.std() > 1e-3
        torch.testing.assert_close(feature, reference, rtol=1e-3, atol=1e-4 * reference.std().item())
