"""What a model costs: operators counted by hand, the sums, the published numbers, the small configs."""

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import Backbone, build_model
from torch import nn
from torch.nn import functional as F
from torchvision.ops import DeformConv2d, deform_conv2d

from sparseinst.benchmarks.complexity import Cost, analyze, analyze_config
from sparseinst.config import load_config
from sparseinst.modeling.sparse_inst.model import SparseInst
from tests.tiny_model import random_input, tiny_cfg, tiny_model

SMALL_CONFIGS = ("sparse_inst_r18_giam", "sparse_inst_mobilenetv3_giam", "sparse_inst_efficientnet_lite0_giam")


class Lone(Backbone):
    """A function, or a module, in a backbone's place."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, images):
        return self.function(images)


def lone_parts(function):
    nothing = {name: nn.Identity() for name in ("encoder", "decoder", "criterion")}
    return {"backbone": Lone(function), **nothing, "pixel_mean": [0, 0, 0], "pixel_std": [1, 1, 1]}


def model_of(function):
    return SparseInst(**lone_parts(function)).eval()


def rows(images):
    """The image (1, 3, 32, 64) as 64 rows of 96."""
    return images.reshape(64, 96)


class Attention(nn.Module):
    """Of 96 queries in 4 heads of dimension 8, each with 24 keys and values."""

    def forward(self, images):
        query = images[:, :, :, :32].reshape(1, 4, 96, 8)
        return F.scaled_dot_product_attention(query, query[:, :, :24], query[:, :, :24])


class OffsetConv(DeformConv2d):
    """Deformable convolution whose offsets come from a convolution."""

    def __init__(self):
        super().__init__(3, 6, 3, stride=2, padding=1, groups=3, bias=False)
        self.offset = nn.Conv2d(3, 18, 3, stride=2, padding=1)

    def forward(self, images):
        return super().forward(images, self.offset(images))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        # 32 * 64 pixels, 3 * 3 * 3 products for each of 5 channels; the bias costs a parameter and no multiply-add.
        (nn.Conv2d(3, 5, 3, padding=1), (3 * 9 * 5 + 5, 2048 * 3 * 9 * 5, 2048 * 5)),
        # Stride 2: 16 * 32 pixels; 3 groups: each output channel sees one input channel.
        (nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=3, bias=False), (9 * 6, 512 * 9 * 6, 512 * 6)),
        # The offsets' convolution, and the deformable one: as many products as a plain one of its shape.
        (OffsetConv(), (54 + 18 * 27 + 18, 512 * (54 + 18 * 27), 512 * (6 + 18))),
        # The modulating mask is free.
        (lambda x: deform_conv2d(x, x.new_zeros(1, 2, 32, 64), x.new_ones(4, 3, 1, 1), mask=x[:, :1]),
         (0, 2048 * 3 * 4, 2048 * 4)),
        # Each of the 32 * 64 input pixels is multiplied by 3 * 2 * 2 weights of each of 4 channels.
        (nn.ConvTranspose2d(3, 4, 2, stride=2, bias=False), (48, 2048 * 3 * 4 * 4, 4 * 2048 * 4)),
        (nn.Linear(64, 10), (650, 96 * 64 * 10, 96 * 10)),
        (lambda x: rows(x) @ rows(x).T, (0, 64 * 96 * 64, 64 * 64)),
        (lambda x: rows(x) @ rows(x)[0], (0, 64 * 96, 64)),
        (lambda x: rows(x)[0] @ rows(x)[1], (0, 96, 1)),
        (lambda x: torch.bmm(x[0], x[0].transpose(1, 2)), (0, 3 * 32 * 64 * 32, 3 * 32 * 32)),
        # fvcore rounds the count of an einsum down by two.
        (lambda x: torch.einsum("bchw,bdhw->bcd", x, x), (0, 3 * 2048 * 3 - 2, 9)),
        # 4 heads: the weights from 8 products each, then the sums of 24 values.
        (Attention(), (0, 4 * (96 * 24 * 8 + 96 * 8 * 24), 4 * (96 * 24 + 96 * 8))),
        # Four products for each of 64 * 128 pixels of 3 channels, which are no activations.
        (nn.Upsample(scale_factor=2, mode="bilinear"), (0, 4 * 3 * 64 * 128, 0)),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Hardswish(True), nn.Softmax(1)), (6, 0, 0)),
        (FrozenBatchNorm2d(3), (0, 0, 0)),
    ],
    ids=[
        "conv", "grouped", "deform", "modulated", "transposed", "linear", "mm", "mv", "dot", "bmm", "einsum",
        "attention", "bilinear", "free", "frozen",
    ],
)  # fmt: skip
def test_by_hand(function, expected):
    analysis = analyze(model_of(function), (32, 64))
    assert analysis.modules.get("backbone", Cost(0, 0, 0)) == expected
    assert analysis.modules.get("", Cost(0, 0, 0)) == expected


def test_an_operator_that_is_not_counted_is_named():
    analysis = analyze(model_of(lambda x: torch.cdist(x[0], x[0], p=1.0)), (32, 64))
    assert analysis.uncounted == ("aten::cdist",)


def test_parts_of_a_tiny_model_by_hand():
    analysis = analyze(tiny_model(), (50, 70))
    # Padded; the decoder's grid has stride 8.
    assert analysis.size == (64, 96)
    cells = 8 * 12
    # 3x3 convolution from 16 features and 2 coordinates, projection to 8.
    mask_branch = Cost(18 * 9 * 16 + 16 + 16 * 8 + 8, cells * (18 * 9 * 16 + 16 * 8), cells * (16 + 8))
    assert analysis.modules["decoder.mask_branch"] == mask_branch
    # Two groups of 6 maps; vectors of 32; 3 classes, kernels of 8, 1 objectness.
    linear = 32 * (32 + 3 + 8 + 1)
    assert analysis.modules["decoder.inst_branch"] == Cost(
        18 * 9 * 16 + 16 + 8 * 9 * 12 + 12 + linear + 32 + 3 + 8 + 1,
        cells * (18 * 9 * 16 + 8 * 9 * 12 + 12 * 16) + 6 * linear,
        cells * (16 + 12) + 12 * 16 + 6 * (32 + 3 + 8 + 1),
    )
    # 6 kernels times 8 features, then four products for each pixel of the doubled grid.
    branches = zip(analysis.modules["decoder.mask_branch"], analysis.modules["decoder.inst_branch"])
    product = Cost(0, cells * 6 * 8 + 4 * 4 * cells * 6, cells * 6)
    assert analysis.modules["decoder"] == Cost(*map(sum, zip(map(sum, branches), product)))
    parts = [analysis.modules[name] for name in ("backbone", "encoder", "decoder")]
    assert analysis.modules[""] == Cost(*map(sum, zip(*parts)))


def test_the_total_has_what_no_part_has():
    class Model(SparseInst):
        def __init__(self):
            super().__init__(**lone_parts(nn.Conv2d(3, 4, 1)))
            self.auxiliary = nn.Conv2d(4, 2, 1, bias=False)

        def network(self, images):
            return self.auxiliary(super().network(images))

    analysis = analyze(Model().eval(), (32, 32))
    assert analysis.modules["auxiliary"] == Cost(8, 1024 * 8, 1024 * 2)
    assert analysis.modules[""] == Cost(16 + 8, 1024 * (12 + 8), 1024 * 6)


def test_the_model_stays_as_it_was():
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    analyze(model, (64, 64))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("size", [(0, 64), (64,), (64, -1)])
def test_sizes_that_cannot_be(size):
    with pytest.raises(ValueError, match="size"):
        analyze(tiny_model(), size)


def test_models_that_cannot_be_analysed():
    with pytest.raises(ValueError, match="eval"):
        analyze(tiny_model().train(), (64, 64))
    with pytest.raises(ValueError, match="META_ARCHITECTURE"):
        analyze(nn.Linear(2, 2), (64, 64))


def test_default_size_is_a_photograph_as_the_tests_resize_it():
    assert analyze_config(tiny_cfg()).size == (64, 96)
    assert analyze_config(tiny_cfg("INPUT.MIN_SIZE_TEST", 320, "INPUT.MAX_SIZE_TEST", 350)).size == (288, 352)
    assert analyze_config(tiny_cfg("INPUT.MIN_SIZE_TEST", 0)).size == (480, 640)


def test_a_config_that_names_weights_and_a_gpu_needs_neither():
    cfg = tiny_cfg("MODEL.DEVICE", "cuda", "MODEL.WEIGHTS", "no_such_file.pth")
    cfg.freeze()
    assert analyze_config(cfg, (32, 32)).modules[""].multiply_adds > 0
    assert cfg.MODEL.DEVICE == "cuda"


@pytest.fixture(scope="module")
def r50():
    return analyze_config(load_config("sparse_inst_r50_giam"))


def test_r50_has_the_published_numbers(r50):
    assert r50.size == (640, 864)
    assert r50.modules[""].parameters / 1e6 == pytest.approx(32.79, abs=0.005)
    counts = [r50.modules[name].multiply_adds / 1e9 for name in ("", "backbone", "encoder", "decoder")]
    assert [round(count, 1) for count in counts] == [99.8, 45.0, 10.5, 44.3]


def test_cspdarknet53_has_the_published_number():
    pytest.importorskip("timm")
    opts = ["MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME", "cspdarknet53"]
    total = analyze_config(load_config("sparse_inst_r50_giam_soft", opts)).modules[""]
    assert round(total.multiply_adds / 1e9, 1) == 108.8


@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_small_configs_cost_a_half_to_a_fifth(name, r50):
    if name != "sparse_inst_r18_giam":
        pytest.importorskip("timm")
    analysis = analyze_config(load_config(name))
    assert analysis.size == r50.size
    assert 2 <= r50.modules[""].multiply_adds / analysis.modules[""].multiply_adds <= 5


@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_small_configs_train_and_predict(name):
    if name != "sparse_inst_r18_giam":
        pytest.importorskip("timm")
    torch.manual_seed(0)
    model = build_model(load_config(name, ["MODEL.DEVICE", "cpu", "MODEL.SPARSE_INST.CLS_THRESHOLD", "0.0"]))
    losses = model([random_input(64, 90, num_instances=2), random_input(60, 64, num_instances=0)])
    sum(losses.values()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert any(name.startswith("backbone.") and gradient.any() for name, gradient in gradients.items())
    with torch.no_grad():
        instances = model.eval()([random_input(50, 70)])[0]["instances"]
    assert instances.image_size == (50, 70) and instances.scores.isfinite().all()
