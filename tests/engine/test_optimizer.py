"""Parameter groups, learning rate, gradient clipping."""

import pytest
import torch
from torch import nn

from sparseinst.engine.optimizer import (
    IMPLEMENTATIONS,
    build_optimizer,
    clip_total_norm,
    learning_rate,
    parameter_groups,
    parameter_names,
    resumed_state,
    scale_to_processes,
)
from sparseinst.engine.progress import learning_rate_groups
from tests.tiny_model import tiny_cfg, tiny_model


class _Model(nn.Module):
    """Names that say nothing: a norm called `bn`, a convolution called `norm`."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential()
        self.backbone.norm = nn.Conv2d(1, 1, 1)
        self.backbone.bn = nn.BatchNorm2d(1)
        self.head = nn.Linear(1, 1)
        self.frozen = nn.Linear(1, 1).requires_grad_(False)
        self.tied = self.head


def settings_by_name(model, groups):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_groups_by_module_type():
    model = _Model()
    groups = parameter_groups(
        model, base_lr=1.0, weight_decay=0.05, weight_decay_bias=0.01, bias_lr_factor=2.0, backbone_multiplier=0.1
    )
    expected = {
        "backbone.norm.weight": (0.1, 0.05),
        "backbone.norm.bias": (0.2, 0.01),
        "backbone.bn.weight": (0.1, 0.0),
        "backbone.bn.bias": (0.2, 0.0),
        "head.weight": (1.0, 0.05),
        "head.bias": (2.0, 0.01),
    }
    found = settings_by_name(model, groups)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values), name


def test_a_feature_pyramid_learns_as_the_heads():
    """No weights fill it, so it must not be slowed down as the backbone inside."""
    model = nn.ModuleDict({"backbone": nn.ModuleDict({"bottom_up": nn.Linear(9, 9), "fpn": nn.Linear(8, 8)})})
    model["head"] = nn.Linear(2, 2)
    groups = parameter_groups(model, base_lr=1.0, weight_decay=0.0, backbone_multiplier=0.1)
    rates = {name: rate for name, (rate, _) in settings_by_name(model, groups).items()}
    assert {name: rate for name, rate in rates.items() if "weight" in name} == {
        "backbone.bottom_up.weight": 0.1,
        "backbone.fpn.weight": 1.0,
        "head.weight": 1.0,
    }
    optimizer = torch.optim.SGD(groups, lr=1.0)
    logged = {name: groups[index]["lr"] for name, index in learning_rate_groups(model, optimizer).items()}
    assert logged == {"lr_heads": 1.0, "lr_backbone": 0.1}


def test_biases_are_decayed_as_weights_by_default():
    model = tiny_model()
    cfg = tiny_cfg("SOLVER.WEIGHT_DECAY", 0.05)
    found = settings_by_name(model, build_optimizer(cfg, model).param_groups)
    assert found["decoder.inst_branch.cls_score.bias"][1] == 0.05
    assert found["backbone.stem.conv1.weight"][1] == 0.05
    assert found["backbone.stem.conv1.norm.weight"][1] == 0
    assert found.keys() == dict(model.named_parameters()).keys()


def test_optimizers():
    model = _Model()
    optimizer = build_optimizer(tiny_cfg(), model)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["betas"] == (0.9, 0.999) and optimizer.defaults["eps"] == 1e-8
    optimizer = build_optimizer(tiny_cfg("SOLVER.OPTIMIZER", "SGD", "SOLVER.MOMENTUM", 0.8), model)
    assert type(optimizer) is torch.optim.SGD and optimizer.defaults["momentum"] == 0.8
    with pytest.raises(ValueError, match="SOLVER.OPTIMIZER"):
        build_optimizer(tiny_cfg("SOLVER.OPTIMIZER", "LAMB"), model)


def test_learning_rate_follows_the_batch():
    cfg = tiny_cfg("SOLVER.BASE_LR", 0.01, "SOLVER.IMS_PER_BATCH", 8)
    assert learning_rate(cfg) == 0.01
    cfg.SOLVER.REFERENCE_BATCH_SIZE = 64
    assert learning_rate(cfg) == pytest.approx(0.01 / 8)
    assert build_optimizer(cfg, _Model()).param_groups[0]["lr"] == pytest.approx(0.01 / 8)


def test_the_schedule_follows_the_number_of_processes():
    opts = ("SOLVER.REFERENCE_WORLD_SIZE", 4, "SOLVER.IMS_PER_BATCH", 8, "SOLVER.MAX_ITER", 100)
    cfg = scale_to_processes(tiny_cfg(*opts), 2)
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER) == (4, 200)
    assert scale_to_processes(tiny_cfg(), 2) == tiny_cfg()


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("SOLVER.REFERENCE_BATCH_SIZE", 8), "both scale SOLVER.BASE_LR: set one of them to 0"),
        (("SOLVER.IMS_PER_BATCH", 7), "IMS_PER_BATCH 7 cannot be divided by SOLVER.REFERENCE_WORLD_SIZE 4"),
        (("SOLVER.CHECKPOINT_PERIOD", 1), "CHECKPOINT_PERIOD 1 becomes 0 where SOLVER.REFERENCE_WORLD_SIZE 4 .* 16"),
        (("TEST.EVAL_PERIOD", 2), "EVAL_PERIOD 2 becomes 0"),
    ],
)
def test_what_the_number_of_processes_cannot_scale(opts, message):
    with pytest.raises(ValueError, match=message):
        scale_to_processes(tiny_cfg("SOLVER.REFERENCE_WORLD_SIZE", 4, "SOLVER.IMS_PER_BATCH", 8, *opts), 16)


@pytest.mark.parametrize("clip_type", ["total", "norm", "value"])
def test_gradient_clipping(clip_type):
    # Two parameters with gradients 30 and 40: a joint norm of 50. SGD with learning rate 1 moves them by the
    # clipped gradients.
    model = nn.ModuleDict({"a": nn.Linear(1, 1, bias=False), "b": nn.Linear(1, 1, bias=False)})
    cfg = tiny_cfg(
        "SOLVER.OPTIMIZER", "SGD", "SOLVER.MOMENTUM", 0.0, "SOLVER.BASE_LR", 1.0, "SOLVER.WEIGHT_DECAY", 0.0,
        *(() if clip_type == "total" else ("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE",
                                           5.0, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip_type)),
    )  # fmt: skip
    optimizer = build_optimizer(cfg, model)
    parameters = [model["a"].weight, model["b"].weight]
    before = [parameter.item() for parameter in parameters]
    for parameter, gradient in zip(parameters, (30.0, 40.0)):
        parameter.grad = torch.full_like(parameter, gradient)
    if clip_type == "total":
        clip_total_norm(parameters, 5.0)
    optimizer.step()
    moved = [old - parameter.item() for old, parameter in zip(before, parameters)]
    assert moved == pytest.approx([3.0, 4.0] if clip_type == "total" else [5.0, 5.0], rel=1e-4)


def test_a_negative_norm_is_refused():
    for value in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="SOLVER.CLIP_TOTAL_NORM is"):
            build_optimizer(tiny_cfg("SOLVER.CLIP_TOTAL_NORM", value), _Model())


def parameter_with_gradient():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, -4.0])
    return parameter


# The known norm is used, here a wrong one; Inf stands for squares that overflow.
@pytest.mark.parametrize(("norm", "factor"), [(None, 1 / 5), (50.0, 1 / 50), (float("inf"), 0.0)])
def test_all_gradients_are_scaled_by_one_factor(norm, factor):
    parameter = parameter_with_gradient()
    clip_total_norm([parameter, nn.Parameter(torch.zeros(1))], 1.0, None if norm is None else torch.tensor(norm))
    assert parameter.grad.tolist() == pytest.approx([3 * factor, -4 * factor], rel=1e-5)


@pytest.mark.parametrize("norm", [5.0, 5.0 - 2e-6, 5.0 + 2e-6, 1e-7, 0.0])
@pytest.mark.parametrize("max_norm", [5.0, 1e-6, 5.0 - 1e-6])
def test_gradients_that_are_small_enough_are_left_alone(max_norm, norm):
    # To the bit what PyTorch's multiplication with a factor of at most 1 gives.
    ours, torchs = parameter_with_gradient(), parameter_with_gradient()
    clip_total_norm([ours], max_norm, torch.tensor(norm))
    nn.utils.clip_grads_with_norm_([torchs], max_norm, torch.tensor(norm))
    assert torch.equal(ours.grad, torchs.grad)


def test_nothing_is_multiplied_by_one():
    parameter = parameter_with_gradient()
    # The number of times that it was changed in place.
    before = parameter.grad._version
    clip_total_norm([parameter], 5.1)
    assert parameter.grad._version == before
    clip_total_norm([parameter], 4.9)
    assert parameter.grad._version > before


CLIPS = {
    "none": (),
    "total": ("SOLVER.CLIP_TOTAL_NORM", 0.5),
    **{
        clip_type: (
            "SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip_type,
            "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.5,
        )
        for clip_type in ("norm", "value")
    },
}  # fmt: skip


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))


def train(implementation, name, clip, with_scaler, broken_steps=(), model=None, num_steps=4, state=None):
    """Weights after a few steps as the trainer takes them, and the optimizer."""
    model = small_net() if model is None else model
    cfg = tiny_cfg(
        "SOLVER.OPTIMIZER", name, "SOLVER.OPTIMIZER_IMPLEMENTATION", implementation, "SOLVER.BASE_LR", 0.01,
        *CLIPS[clip],
    )  # fmt: skip
    optimizer = build_optimizer(cfg, model)
    if state is not None:
        optimizer.load_state_dict(state)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=with_scaler)
    for index in range(num_steps):
        x = torch.arange(12.0).view(4, 3) * (index + 1)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16, enabled=with_scaler):
            loss = model(x).float().square().mean() * (float("inf") if index in broken_steps else 1)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if cfg.SOLVER.CLIP_TOTAL_NORM:
            clip_total_norm(model.parameters(), cfg.SOLVER.CLIP_TOTAL_NORM)
        scaler.step(optimizer)
        scaler.update()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), optimizer


@pytest.mark.parametrize("name", ["ADAMW", "SGD"])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("with_scaler", [False, True])
@pytest.mark.parametrize("implementation", ["foreach", "fused"])
def test_implementations_give_the_same_weights(implementation, name, clip, with_scaler):
    expected, _ = train("for-loop", name, clip, with_scaler)
    found, optimizer = train(implementation, name, clip, with_scaler)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert all(group[implementation] for group in optimizer.param_groups)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_step_that_is_not_finite_is_skipped(implementation, clip):
    before, _ = train(implementation, "ADAMW", clip, True, num_steps=1)
    after, optimizer = train(implementation, "ADAMW", clip, True, broken_steps=(1,), num_steps=2)
    assert torch.equal(before, after)
    assert {state["step"].item() for state in optimizer.state.values()} == {1}
    expected, _ = train("for-loop", "ADAMW", clip, True, broken_steps=(1,))
    assert torch.allclose(train(implementation, "ADAMW", clip, True, broken_steps=(1,))[0], expected, 1e-5, 1e-6)


@pytest.mark.parametrize(("first", "second"), [("for-loop", "fused"), ("fused", "for-loop"), ("auto", "foreach")])
@pytest.mark.parametrize("name", ["ADAMW", "SGD"])
def test_a_run_is_resumed_with_another_implementation(first, second, name):
    model = small_net()
    _, optimizer = train(first, name, "total", False, model=model, num_steps=2)
    saved = optimizer.state_dict()
    found, optimizer = train(second, name, "total", False, model=model, num_steps=2, state=saved)
    own = IMPLEMENTATIONS[second]
    assert all(group[key] == value for group in optimizer.param_groups for key, value in own.items())
    assert all(group["lr"] == 0.01 for group in optimizer.param_groups)
    model = small_net()
    _, optimizer = train(first, name, "total", False, model=model, num_steps=2)
    expected, _ = train(first, name, "total", False, model=model, num_steps=2, state=optimizer.state_dict())
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_other_groups_than_the_checkpoints_are_told_by_the_optimizer():
    _, optimizer = train("auto", "ADAMW", "none", False)
    state = optimizer.state_dict()
    state["param_groups"].append(state["param_groups"][0])
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(state)


def test_unknown_implementations():
    with pytest.raises(ValueError, match="SOLVER.OPTIMIZER_IMPLEMENTATION is 'fast'; it must be one of .*'fused'"):
        build_optimizer(tiny_cfg("SOLVER.OPTIMIZER_IMPLEMENTATION", "fast"), _Model())


def trained(*opts):
    """The optimizer of a tiny model after a step, with a schedule at a tenth of the base rate; and its names."""
    model = tiny_model("SOLVER.CLIP_TOTAL_NORM", 0.0, *opts)
    optimizer = build_optimizer(tiny_cfg(*opts), model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
        group["lr"] *= 0.1
    optimizer.step()
    return optimizer, parameter_names(optimizer, model)


DECAY = ("SOLVER.WEIGHT_DECAY", 0.05, "SOLVER.WEIGHT_DECAY_NORM", 0.0)


def test_an_unchanged_state_is_resumed_bit_for_bit():
    optimizer, names = trained(*DECAY)
    saved = optimizer.state_dict()
    for saved_names in (names, None):
        state = resumed_state(optimizer, saved, names, saved_names)
        assert state["state"] is saved["state"] and state["param_groups"] == saved["param_groups"]


@pytest.mark.parametrize(
    ("opts", "setting", "key"),
    [
        (("SOLVER.BASE_LR", 0.5), "initial_lr", "SOLVER.BASE_LR"),
        (("SOLVER.WEIGHT_DECAY", 0.25), "weight_decay", "SOLVER.WEIGHT_DECAY"),
    ],
)
def test_changed_settings_are_taken_and_said(opts, setting, key, caplog):
    saved, names = trained(*DECAY)
    optimizer, _ = trained(*DECAY, *opts)
    state = resumed_state(optimizer, saved.state_dict(), names, names)
    assert {group[setting] for group in state["param_groups"]} == {group[setting] for group in optimizer.param_groups}
    for group in state["param_groups"]:
        # The place in the schedule stays.
        assert group["lr"] == pytest.approx(0.1 * group["initial_lr"])
    (record,) = [record for record in caplog.records if "--resume" in record.getMessage()]
    assert key in record.getMessage() and f"{opts[1]:g} from now on" in record.getMessage()


def test_other_groups_of_the_same_parameters_keep_their_state():
    # With weight decay 0 there is one group where there were two.
    saved, saved_names = trained(*DECAY)
    optimizer, names = trained(*DECAY, "SOLVER.WEIGHT_DECAY", 0.0)
    assert len(names) == 1 < len(saved_names)
    state = resumed_state(optimizer, saved.state_dict(), names, saved_names)["state"]
    index_of = {name: index for index, name in enumerate(name for part in saved_names for name in part)}
    for index, name in enumerate(names[0]):
        assert state[index] is saved.state_dict()["state"][index_of[name]], name
    # A checkpoint without names.
    with pytest.raises(ValueError, match="parameters in 2 groups, and this config gives .* in 1.*SOLVER keys"):
        resumed_state(optimizer, saved.state_dict(), names)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("SOLVER.OPTIMIZER", "SGD"), "SOLVER.OPTIMIZER is SGD, but the checkpoint has the state of ADAMW"),
        (("SOLVER.AMSGRAD", True), "SOLVER.AMSGRAD is True, but the checkpoint was trained with False"),
    ],
)
def test_another_optimizer_is_refused(opts, message):
    saved, names = trained()
    optimizer, _ = trained(*opts)
    with pytest.raises(ValueError, match=message):
        resumed_state(optimizer, saved.state_dict(), names, names)
