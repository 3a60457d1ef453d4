"""What a load must fill: all of a trained model, most of the backbone where a training starts; and what it says."""

import logging
import pickle
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import nn

import sparseinst
from sparseinst.checkpoint import SparseInstCheckpointer, WeightsFileError, checkpointer_from_config
from tests.checkpoint.sources import backbone_model, randomise
from tests.checkpoint.test_files import flip_byte
from tests.saved_model import no_random_weights
from tests.tiny_model import tiny_cfg, tiny_model

STATE_DICTS = Path(__file__).resolve().parents[1] / "state_dicts"
DECODER = "MODEL.SPARSE_INST.DECODER."


@pytest.fixture
def lines(caplog):
    """What is logged, a line for each record; Detectron2's and fvcore's too."""
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records]


def start(model, path, coverage=0.9, **arguments):
    checkpointer = SparseInstCheckpointer(model, min_backbone_coverage=coverage, **arguments)
    checkpointer.resume_or_load(str(path), resume=False)
    return checkpointer.coverage


def save(state, path):
    torch.save({"model": state}, path)
    return path


def published_configs():
    """Names of state dicts and of their configs; some architectures have only one with crops."""
    root = Path(sparseinst.__file__).parents[1] / "configs"
    for path in sorted(STATE_DICTS.glob("*.txt")):
        configs = [name for name in (path.stem, f"{path.stem}_aug") if (root / f"{name}.yaml").is_file()]
        if configs:
            yield pytest.param(path, configs[0], id=path.stem)


@pytest.mark.parametrize(("published", "config"), list(published_configs()))
def test_published_checkpoints_fit_exactly(published, config, tmp_path, lines):
    state = {}
    for line in published.read_text().splitlines():
        name, _, rest = line.partition(" ")
        shape, _, dtype = rest.rpartition(" ")
        size = [int(number) for number in shape.strip("()").split(",") if number]
        state[name] = torch.full(size, 0.5).to(getattr(torch, dtype))
    cfg = get_cfg()
    sparseinst.add_sparse_inst_config(cfg)
    cfg.merge_from_file(sparseinst.get_config_file(config))
    cfg.MODEL.DEVICE = "cpu"
    with no_random_weights():
        model = build_model(cfg)
    checkpointer = checkpointer_from_config(cfg, model)
    assert checkpointer.load(str(save(state, tmp_path / "published.pth"))) == {}
    coverage = checkpointer.coverage
    assert coverage.missing == coverage.left_over == coverage.classifier == coverage.mismatched == []
    assert all((value == 0.5).all() for value in model.state_dict().values() if value.is_floating_point())
    assert not [line for line in lines() if "not found" in line or "not used" in line or "HAS TENSORS" in line]


def test_the_report_of_a_pretrained_backbone(tmp_path, lines):
    state = randomise(backbone_model()).backbone.state_dict()
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    state["stem.fc.weight"] = torch.zeros(1000, 256)
    del state["res4.1.conv2.norm.bias"]
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    coverage = start(model, save(state, tmp_path / "R-18.pth"))
    total = len(state)
    assert coverage.of_backbone() == (total - 1, total)
    assert coverage.missing[0] == "backbone.res4.1.conv2.norm.bias"
    (report,) = [line for line in lines() if line.startswith("From ")]
    assert report.splitlines() == [
        f"From {tmp_path / 'R-18.pth'} (ResNet of Detectron2):",
        f"  backbone: {total - 1} of {total} tensors",
        "  nothing for encoder, decoder: initial values",
        "  not filled: 1 (backbone.res4.1.conv2.norm.bias)",
        "  left out, the classifier: 1 (stem.fc.weight)",
    ]
    for name, value in model.state_dict().items():
        expected = state.get(name.removeprefix("backbone."), before[name])
        assert torch.equal(value, expected), name
    # Detectron2's pages about the same.
    assert not [line for line in lines() if "not found in the checkpoint" in line or "not used by the model" in line]


def test_names_that_do_not_match_are_an_error_unless_allowed(tmp_path, lines):
    state = backbone_model().backbone.state_dict()
    path = save({f"net.{name}": value for name, value in state.items()}, tmp_path / "renamed.pth")
    model = tiny_model()
    with pytest.raises(ValueError) as raised:
        start(model, path)
    message = str(raised.value)
    assert "\n" not in message and str(path) in message
    assert "fills 0 of the backbone's 75 tensors" in message and "90% are wanted" in message
    assert "Not filled: 75, the first: backbone.stem.conv1.weight, " in message
    assert "not taken: 75, the first: net.stem.conv1.weight, " in message
    assert message.endswith("set MODEL.MIN_BACKBONE_COVERAGE 0.0 to start from what fits")
    assert start(model, path, coverage=0.0).backbone_share == 0
    assert any("The training starts because" in line and "fills 0 of" in line for line in lines())
    # The checkpointer can be used again after an error.
    checkpointer = SparseInstCheckpointer(model, min_backbone_coverage=0.9)
    for _ in range(2):
        with pytest.raises(ValueError, match="fills 0 of"):
            checkpointer.load(str(path), checkpointables=[])


def test_the_share_that_is_asked_for(tmp_path):
    state = backbone_model().backbone.state_dict()
    names = [name for name in state if not name.endswith("num_batches_tracked")]
    path = save({name: state[name] for name in names[:60]}, tmp_path / "part.pth")
    assert len(names) == 75
    assert start(tiny_model(), path, coverage=0.8).backbone_share == 0.8
    with pytest.raises(ValueError, match="fills 60 of the backbone's 75 tensors, where 81% are wanted"):
        start(tiny_model(), path, coverage=0.81)
    for wrong in (90, -0.1):
        with pytest.raises(ValueError, match="MODEL.MIN_BACKBONE_COVERAGE"):
            SparseInstCheckpointer(tiny_model(), min_backbone_coverage=wrong)


@pytest.mark.parametrize(
    ("key", "value", "layers"),
    [
        ("NUM_CLASSES", 5, ["cls_score"]),
        ("NUM_MASKS", 9, ["iam_conv"]),
        ("KERNEL_DIM", 4, ["mask_kernel", "projection"]),
        ("INST.DIM", 8, ["0", "iam_conv", "fc", "cls_score", "mask_kernel", "objectness"]),
        # Maps, and what is made of the joined vectors.
        ("GROUPS", 4, ["iam_conv", "fc", "cls_score", "mask_kernel", "objectness"]),
    ],
)
def test_heads_of_another_shape_are_skipped_with_a_line_each(tmp_path, lines, key, value, layers):
    trained = tiny_model(seed=1)
    path = save(trained.state_dict(), tmp_path / "trained.pth")
    model = tiny_model(DECODER + key, value)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    coverage = start(model, path)

    names = [mismatch.name for mismatch in coverage.mismatched]
    assert {name.split(".")[-2] for name in names} == set(layers)
    assert coverage.missing == names and coverage.left_over == []
    for name, tensor in model.state_dict().items():
        expected = before[name] if name in names else trained.state_dict()[name]
        assert torch.equal(tensor, expected), name
    for name in names:
        (line,) = [line for line in lines() if name in line and not line.startswith("From ")]
        assert line.startswith("Not loaded, starts from initial values: ")
        found, expected = (tuple(source.state_dict()[name].shape) for source in (trained, model))
        assert f"{name} is {found} in the file and {expected} in the model (" in line and key in line

    # Evaluated or resumed, such a model would be half random.
    with pytest.raises(ValueError, match=rf"lacks {len(names)} of the model's .*{key}"):
        SparseInstCheckpointer(model, min_backbone_coverage=0.9).load(str(path))


def test_a_trained_model_must_be_whole(tmp_path, lines):
    model = tiny_model()
    state = model.state_dict()
    counters = [name for name in state if name.endswith("num_batches_tracked")]
    extra = {"pixel_mean": torch.zeros(3), "decoder.inst_branch.softmax_bias": torch.ones(1)}
    kept = {name: value for name, value in state.items() if name not in counters} | extra
    path = save(kept, tmp_path / "a.pth")
    checkpointer = SparseInstCheckpointer(model)
    checkpointer.load(str(path))
    assert checkpointer.coverage.missing == []
    (warning,) = [line for line in lines() if "HAS TENSORS THAT THE MODEL DOES NOT HAVE" in line]
    assert "1 (decoder.inst_branch.softmax_bias)" in warning

    # Statistics of norms are no parameters, and as needed.
    del kept["backbone.res3.0.conv1.norm.running_var"]
    with pytest.raises(ValueError, match=r"lacks 1 of the model's \d+ tensors.*res3.0.conv1.norm.running_var"):
        checkpointer.load(str(save(kept, path)))
    # resume_or_load without a training to start.
    with pytest.raises(ValueError, match="lacks 1 of"):
        checkpointer.resume_or_load(str(path), resume=False)


def test_frozen_norms_need_weights(tmp_path, lines):
    frozen = ("MODEL.RESNETS.NORM", "FrozenBN")
    start(tiny_model(), "")
    assert not [line for line in lines() if "FROZEN" in line]
    start(tiny_model(*frozen), "")
    (warning,) = [line for line in lines() if "PARTS OF THE BACKBONE ARE FROZEN" in line]
    assert "60, the first: backbone.stem.conv1.norm.weight" in warning
    start(tiny_model("MODEL.BACKBONE.FREEZE_AT", 1), "")
    assert "5, the first: backbone.stem.conv1.weight" in lines()[-1]

    # More than 90 % of the tensors, and a norm that would never normalise. Detectron2 fills such a gap in silence.
    state = backbone_model(*frozen).backbone.state_dict()
    del state["res4.1.conv2.norm.running_var"]
    path = save(state, tmp_path / "gap.pth")
    with pytest.raises(ValueError, match="frozen.*1 .backbone.res4.1.conv2.norm.running_var"):
        start(tiny_model(*frozen), path)
    start(tiny_model(*frozen), path, coverage=0.0)
    assert any("The training starts because" in line for line in lines())
    # A gap in what trains is only reported.
    state = backbone_model(*frozen).backbone.state_dict()
    del state["res4.1.conv2.weight"]
    assert start(tiny_model(*frozen), save(state, path)).missing[0] == "backbone.res4.1.conv2.weight"


def test_frozen_norms_of_timm_are_known(lines):
    pytest.importorskip("timm", reason="the norms are this package's")
    timm_backbone = (
        "MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.OUT_FEATURES", ["res3", "res4"], "MODEL.TIMM.NORM",
    )  # fmt: skip
    start(tiny_model(*timm_backbone, "FrozenBN"), "")
    (warning,) = [line for line in lines() if "PARTS OF THE BACKBONE ARE FROZEN" in line]
    assert "the first: backbone.bn1.weight, " in warning
    start(tiny_model(*timm_backbone, "BN"), "")
    assert len([line for line in lines() if "FROZEN" in line]) == 1


def test_random_weights_of_an_evaluation_are_told(lines):
    assert SparseInstCheckpointer(tiny_model()).load("") == {}
    assert any("THE WEIGHTS ARE RANDOM" in line for line in lines())


def test_trusted_weights(tmp_path):
    class_of_settings = nn.Linear(2, 3)
    model = tiny_model()
    path = tmp_path / "with_code.pth"
    torch.save({"model": model.state_dict(), "settings": class_of_settings}, path)
    cfg = tiny_cfg()
    with pytest.raises(WeightsFileError, match="MODEL.TRUSTED_WEIGHTS"):
        checkpointer_from_config(cfg, model).load(str(path))
    cfg.MODEL.TRUSTED_WEIGHTS = True
    assert set(checkpointer_from_config(cfg, model).load(str(path))) == {"settings"}


def test_files_without_tensors(tmp_path):
    (tmp_path / "numbers.pkl").write_bytes(pickle.dumps([1, 2]))
    torch.save({"model": {"epoch": 3}, "optimizer": {}}, tmp_path / "empty.pth")
    for name, found in (("numbers.pkl", "a list"), ("empty.pth", "the entries model, optimizer")):
        with pytest.raises(WeightsFileError, match=f"{name} holds no tensors by name.*{found}"):
            start(tiny_model(), tmp_path / name)


def test_any_model_and_both_checkpointers(tmp_path):
    # Without a backbone; saved by either, loaded by the other.
    source, model = nn.Linear(2, 3), nn.Linear(2, 3)
    SparseInstCheckpointer(source, str(tmp_path)).save("ours", note="kept")
    assert DetectionCheckpointer(model).load(str(tmp_path / "ours.pth")) == {"note": "kept"}
    assert torch.equal(model.weight, source.weight)
    nn.init.zeros_(model.weight)
    DetectionCheckpointer(source, str(tmp_path)).save("theirs", note="kept")
    assert SparseInstCheckpointer(model).load(str(tmp_path / "theirs.pth")) == {"note": "kept"}
    assert torch.equal(model.weight, source.weight)
    assert start(model, tmp_path / "theirs.pth").backbone_share == 1


def test_a_model_whose_names_do_not_load_is_an_error(tmp_path):
    model = nn.Linear(2, 3)
    path = save(model.state_dict(), tmp_path / "a.pth")
    model.register_load_state_dict_pre_hook(lambda _, state, *__: state.pop("weight"))
    with pytest.raises(RuntimeError, match=r"does not load the state dict that it saves.*1 \(weight\)"):
        SparseInstCheckpointer(model).load(str(path))


def test_resuming_passes_over_a_checkpoint_with_a_flipped_byte(tmp_path, lines):
    model = nn.Linear(2, 3)
    checkpointer = SparseInstCheckpointer(model, str(tmp_path))
    checkpointer.save("model_0000001", iteration=1)
    checkpointer.save("model_0000003", iteration=3)
    flip_byte(tmp_path / "model_0000003.pth", "data/0")
    assert checkpointer.resume_or_load("", resume=True) == {"iteration": 1}
    (warning,) = [line for line in lines() if line.startswith("Cannot resume from")]
    assert "model_0000003.pth" in warning and "file 'archive/data/0'" in warning


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize(("key", "expected"), [("auto", "averaged"), ("averaged", "averaged"), ("raw", "raw")])
def test_evaluation_and_training_take_the_same_of_two_sets_of_weights(tmp_path, lines, is_training, key, expected):
    cfg = tiny_cfg("MODEL.EMA_WEIGHTS", key)
    states = {"raw": tiny_model(seed=1).state_dict(), "averaged": tiny_model(seed=2).state_dict()}
    path = tmp_path / "both.pth"
    torch.save({"model": states["raw"], "model_ema": states["averaged"]}, path)
    model = tiny_model()
    checkpointer = checkpointer_from_config(cfg, model, is_training=is_training)
    checkpointer.resume_or_load(str(path), resume=False)
    assert torch.equal(
        model.decoder.inst_branch.iam_conv.weight, states[expected]["decoder.inst_branch.iam_conv.weight"]
    )
    (line,) = [line for line in lines() if "holds averaged (EMA) and raw weights" in line]
    entry = {"raw": "the entry model;", "averaged": "the entry model_ema;"}[expected]
    assert f"the {expected} ones are loaded, {entry}" in line and "MODEL.EMA_WEIGHTS" in line


def test_the_key_for_averaged_weights_is_checked(tmp_path):
    path = save(nn.Linear(2, 3).state_dict(), tmp_path / "raw.pth")
    with pytest.raises(ValueError, match="MODEL.EMA_WEIGHTS is 'ema'; it must be one of auto, averaged, raw"):
        SparseInstCheckpointer(nn.Linear(2, 3), ema_weights="ema")
    with pytest.raises(WeightsFileError, match="MODEL.EMA_WEIGHTS is averaged, and .*raw.pth has no averaged weights"):
        SparseInstCheckpointer(nn.Linear(2, 3), ema_weights="averaged").load(str(path))
    SparseInstCheckpointer(nn.Linear(2, 3), ema_weights="raw").load(str(path))


def test_raw_weights_are_wanted_from_a_file_with_an_average_only(tmp_path, lines):
    path = tmp_path / "average.pth"
    torch.save({"model_ema": nn.Linear(2, 3).state_dict()}, path)
    SparseInstCheckpointer(nn.Linear(2, 3)).load(str(path))
    assert "averaged (EMA)" not in "".join(lines())
    SparseInstCheckpointer(nn.Linear(2, 3), ema_weights="raw").load(str(path))
    assert any("average.pth holds averaged (EMA) weights only, the entry model_ema" in line for line in lines())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_in_weights_are_told(tmp_path, lines, value):
    model = tiny_model()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = save(state, tmp_path / "weights.pth")
    SparseInstCheckpointer(model).load(str(path))
    assert not [line for line in lines() if "NaN" in line]
    state["backbone.res3.0.conv1.weight"][:2, 0, 0, 0] = value
    state["decoder.inst_branch.cls_score.bias"][0] = value
    save(state, path)
    for checkpointer in (SparseInstCheckpointer(model), SparseInstCheckpointer(model, min_backbone_coverage=0.9)):
        checkpointer.resume_or_load(str(path), resume=False)
    warnings = [line for line in lines() if "HAS NaN OR Inf in 2 of " in line]
    assert len(warnings) == 2
    assert "the first: backbone.res3.0.conv1.weight, 2 of 73728 values" in warnings[0]
