"""(CSP)DarkNet-53 against timm's."""

import pytest
import torch
from detectron2.modeling import build_backbone
from torch import nn

from tests.tiny_model import tiny_cfg

timm = pytest.importorskip("timm", reason="the package timm is not installed (pip install 'sparseinst[timm]')")

ALL = ["csp0", "csp1", "csp2", "csp3", "csp4"]


def build(*opts):
    torch.manual_seed(0)
    return build_backbone(tiny_cfg("MODEL.BACKBONE.NAME", "build_cspnet_backbone", *opts)).eval()


@pytest.mark.parametrize("model", ["darknet53", "cspdarknet53"])
def test_it_is_timms(model):
    theirs = timm.create_model(model).eval()
    for name, parameter in theirs.named_parameters():
        if ".bn." in name:
            nn.init.uniform_(parameter, 0.5, 1.0)
    ours = build("MODEL.CSPNET.NAME", model, "MODEL.CSPNET.OUT_FEATURES", ALL)
    result = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not result.missing_keys and result.unexpected_keys == ["head.fc.weight", "head.fc.bias"]
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours(images)["csp4"], theirs.forward_features(images))
    assert [(shape.channels, shape.stride) for shape in ours.output_shape().values()] == [
        (64, 2), (128, 4), (256, 8), (512, 16), (1024, 32),
    ]  # fmt: skip
    for name, feature in ours(images).items():
        shape = ours.output_shape()[name]
        assert feature.shape[1:] == (shape.channels, 64 // shape.stride, 96 // shape.stride)


@pytest.mark.parametrize("model", ["darknet53", "cspdarknet53"])
def test_published_constants(model):
    backbone = build("MODEL.CSPNET.NAME", model)
    norms = [(name, part) for name, part in backbone.named_modules() if isinstance(part, nn.BatchNorm2d)]
    assert norms and all(norm.eps == 1e-5 and norm.momentum == 0.1 for _, norm in norms)
    for name, norm in norms:
        assert norm.weight.requires_grad and norm.weight.any() != name.endswith("conv2.bn"), name
    slopes = {part.negative_slope for part in backbone.modules() if isinstance(part, nn.LeakyReLU)}
    assert slopes == {0.01}
    # Kaiming's normal initialisation by outputs: 512 * 9 of them.
    convs = dict(backbone.named_modules())
    weight = convs["body.stages_3.conv_down.conv"].weight
    assert weight.std().item() == pytest.approx((2 / (weight.shape[0] * 9)) ** 0.5, rel=0.02)


def test_the_slope_of_darknets_authors():
    backbone = build("MODEL.CSPNET.NEGATIVE_SLOPE", 0.1)
    slopes = {part.negative_slope for part in backbone.modules() if isinstance(part, nn.LeakyReLU)}
    assert slopes == {0.1} and not any(isinstance(part, nn.ReLU) for part in backbone.modules())


@pytest.mark.parametrize("norm", ["", "BN", "FrozenBN", "SyncBN"])
def test_norms(norm):
    backbone = build("MODEL.CSPNET.NAME", "cspdarknet53", "MODEL.CSPNET.NORM", norm)
    norms = [part for part in backbone.modules() if hasattr(part, "running_var")]
    assert all(isinstance(part, nn.SyncBatchNorm) == (norm == "SyncBN") for part in norms)
    trained = any(name.endswith(".bn.weight") for name, _ in backbone.named_parameters())
    assert trained == (norm != "FrozenBN")
    if norm == "FrozenBN":
        assert all(part.weight.all() for part in norms)  # none is zero, which would cut its branch off for ever
    if norm != "SyncBN":  # not on a CPU
        before = build("MODEL.CSPNET.NAME", "cspdarknet53")
        backbone.load_state_dict({k: v for k, v in before.state_dict().items() if k in backbone.state_dict()})
        images = torch.randn(1, 3, 64, 64)
        for name, feature in backbone(images).items():
            torch.testing.assert_close(feature, before(images)[name])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("NAME", "cspresnet50", "MODEL.CSPNET.NAME is 'cspresnet50'.*darknet53"),
        ("OUT_FEATURES", ["csp5"], "MODEL.CSPNET.OUT_FEATURES.*csp5.*csp4"),
        ("NORM", "GN", "darknet53 is 'GN'.*FrozenBN"),
    ],
)
def test_what_is_refused(key, value, message):
    with pytest.raises(ValueError, match=message):
        build(f"MODEL.CSPNET.{key}", value)
