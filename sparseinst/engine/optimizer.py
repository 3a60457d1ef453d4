"""Build the optimizer of the SOLVER keys."""

import logging
from collections.abc import Iterable

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping, reduce_param_groups
from torch import nn

from sparseinst.config import check_keys, value

logger = logging.getLogger(__name__)

# Arguments of torch's optimizers by SOLVER.OPTIMIZER_IMPLEMENTATION.
IMPLEMENTATIONS = {
    "auto": {},
    "for-loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}

# Settings of parameter groups that a resumed run takes from its config, and the keys behind them.
RESUMED_SETTINGS = {
    "initial_lr": "the learning rate (SOLVER.BASE_LR and its factors)",
    "weight_decay": "SOLVER.WEIGHT_DECAY",
    "momentum": "SOLVER.MOMENTUM",
    "nesterov": "SOLVER.NESTEROV",
}


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build AdamW or SGD, as SOLVER.OPTIMIZER says, with Detectron2's clipping by parameter (SOLVER.CLIP_GRADIENTS).

    Unscale the gradients of a GradScaler before the step: a fused optimizer unscales them only after clipping.

    Args:
        cfg: the SOLVER keys are read.
        model: its parameters that require a gradient are optimized.

    Raises:
        ValueError: SOLVER.OPTIMIZER, OPTIMIZER_IMPLEMENTATION or CLIP_TOTAL_NORM has an unknown or negative value.
    """
    solver = cfg.SOLVER
    check_keys(cfg, "SOLVER.OPTIMIZER", "SOLVER.OPTIMIZER_IMPLEMENTATION", "SOLVER.CLIP_TOTAL_NORM")
    options = IMPLEMENTATIONS[solver.OPTIMIZER_IMPLEMENTATION]
    base_lr = learning_rate(cfg)
    groups = parameter_groups(
        model,
        base_lr=base_lr,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        backbone_multiplier=solver.BACKBONE_MULTIPLIER,
    )
    if solver.OPTIMIZER == "ADAMW":
        optimizer = torch.optim.AdamW(groups, lr=base_lr, amsgrad=solver.AMSGRAD, **options)
    else:
        optimizer = torch.optim.SGD(groups, lr=base_lr, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV, **options)
    optimizer.register_load_state_dict_pre_hook(_keep_implementation)
    return maybe_add_gradient_clipping(cfg, optimizer)


def clip_total_norm(parameters: Iterable[nn.Parameter], max_norm: float, norm: torch.Tensor | None = None) -> None:
    """Scale all gradients by one factor, so that the Euclidean norm of all of them together is at most ``max_norm``.

    Call it when the gradients are complete and unscaled.

    Args:
        parameters: those without a gradient are ignored.
        max_norm: above 0.
        norm: the norm, a scalar on the gradients' device, where it is known already.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    if norm is None:
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    # PyTorch also multiplies by a factor of 1. Reading the norm synchronizes other devices.
    if norm.device.type == "cpu" and norm + 1e-6 <= max_norm:
        return
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)


def _keep_implementation(optimizer: torch.optim.Optimizer, state_dict: dict) -> dict:
    """Replace the implementation that a state dict was saved with by the one that the optimizer was built with."""
    groups = [
        {**saved, **{key: own[key] for key in ("foreach", "fused") if key in own}}
        for saved, own in zip(state_dict["param_groups"], optimizer.param_groups)
    ]
    # The optimizer itself refuses another number of groups.
    return {**state_dict, "param_groups": groups + state_dict["param_groups"][len(groups) :]}


def parameter_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    """Return the names of the parameters in each group of an optimizer."""
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    return [[name_of[parameter] for parameter in group["params"]] for group in optimizer.param_groups]


def resumed_state(
    optimizer: torch.optim.Optimizer, saved: dict, names: list[list[str]], saved_names: list[list[str]] | None = None
) -> dict:
    """Return a saved optimizer state with the settings that the optimizer was built with; log those that changed.

    Learning rates keep their position in the schedule. Without a change the state is the saved one, bit for bit.

    Args:
        optimizer: with a scheduler, which sets ``initial_lr``.
        saved: its state dict in a checkpoint; groups have ``initial_lr``.
        names: of `parameter_names`.
        saved_names: the names of the saved groups; None where the checkpoint does not have them.

    Raises:
        ValueError: the saved state is that of another optimizer or of other parameters.
    """
    own, old = optimizer.state_dict()["param_groups"], saved["param_groups"]
    if (kind := _kind(own[0])) != (saved_kind := _kind(old[0])):
        raise ValueError(
            f"--resume: SOLVER.OPTIMIZER is {kind}, but the checkpoint has the state of {saved_kind}: set "
            f"SOLVER.OPTIMIZER {saved_kind}, or start a new run with the checkpoint as MODEL.WEIGHTS"
        )
    if own[0].get("amsgrad") != old[0].get("amsgrad"):
        raise ValueError(
            f"--resume: SOLVER.AMSGRAD is {own[0]['amsgrad']}, but the checkpoint was trained with "
            f"{old[0]['amsgrad']}: set SOLVER.AMSGRAD {old[0]['amsgrad']}"
        )
    rate_of = {group.get("initial_lr", group["lr"]): group["lr"] for group in old}
    factor = next((rate / initial for initial, rate in rate_of.items() if initial), 1.0)
    groups = [{**group, "lr": rate_of.get(group["initial_lr"], group["initial_lr"] * factor)} for group in own]
    for setting, key in RESUMED_SETTINGS.items():
        before, now = ({group[setting] for group in groups_ if setting in group} for groups_ in (old, own))
        if before and before != now:
            found = [", ".join(f"{value:g}" for value in sorted(values)) for values in (before, now)]
            logger.warning("--resume: %s changed: %s in the checkpoint, %s from now on", key, *found)
    return {"state": _state_in_order(saved, names, saved_names), "param_groups": groups}


def _kind(group: dict) -> str:
    return "ADAMW" if "betas" in group else "SGD"


def _state_in_order(saved: dict, names: list[list[str]], saved_names: list[list[str]] | None) -> dict:
    """Return the saved state by the indices of the optimizer's own groups, which settings divide differently."""
    old = [group["params"] for group in saved["param_groups"]]
    index_of = {name: index for part, indices in zip(saved_names or [], old) for name, index in zip(part, indices)}
    ordered = [name for part in names for name in part]
    if saved_names != names and set(index_of) == set(ordered):
        state = saved["state"]
        return {new: state[index_of[name]] for new, name in enumerate(ordered) if index_of[name] in state}
    if [len(indices) for indices in old] != [len(part) for part in names]:
        raise ValueError(
            f"--resume: the checkpoint's optimizer has {sum(map(len, old))} parameters in {len(old)} groups, and this "
            f"config gives {len(ordered)} in {len(names)}. MODEL.BACKBONE.FREEZE_AT, norms and the SOLVER keys of "
            "learning rates and weight decay must be those of the interrupted run"
        )
    return saved["state"]


def scale_to_processes(cfg: CfgNode, num_processes: int) -> CfgNode:
    """Return the config with batch, learning rate and schedule scaled from SOLVER.REFERENCE_WORLD_SIZE processes.

    Raises:
        ValueError: REFERENCE_BATCH_SIZE scales the learning rate too, or a key cannot be scaled.
    """
    solver = cfg.SOLVER
    reference = f"SOLVER.REFERENCE_WORLD_SIZE {solver.REFERENCE_WORLD_SIZE}"
    if solver.REFERENCE_WORLD_SIZE and solver.REFERENCE_BATCH_SIZE:
        raise ValueError(
            f"{reference} and SOLVER.REFERENCE_BATCH_SIZE {solver.REFERENCE_BATCH_SIZE} both scale SOLVER.BASE_LR: set "
            "one of them to 0"
        )
    if solver.REFERENCE_WORLD_SIZE and solver.IMS_PER_BATCH % solver.REFERENCE_WORLD_SIZE:
        raise ValueError(f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} cannot be divided by {reference}: change one")
    scaled = DefaultTrainer.auto_scale_workers(cfg, num_processes)
    for key in ("SOLVER.MAX_ITER", "SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD"):
        if (before := value(cfg, key)) and not value(scaled, key):
            raise ValueError(
                f"{key} {before} becomes 0 where {reference} is scaled to {num_processes} processes: set a larger {key}"
            )
    return scaled


def learning_rate(cfg: CfgNode) -> float:
    """Return SOLVER.BASE_LR, times IMS_PER_BATCH / REFERENCE_BATCH_SIZE where the latter is not 0."""
    solver = cfg.SOLVER
    if not solver.REFERENCE_BATCH_SIZE:
        return solver.BASE_LR
    scaled = solver.BASE_LR * solver.IMS_PER_BATCH / solver.REFERENCE_BATCH_SIZE
    logger.info(
        f"Learning rate {scaled:g}: SOLVER.BASE_LR {solver.BASE_LR:g} * IMS_PER_BATCH {solver.IMS_PER_BATCH} / "
        f"REFERENCE_BATCH_SIZE {solver.REFERENCE_BATCH_SIZE}"
    )
    return scaled


def parameter_groups(
    model: nn.Module,
    *,
    base_lr: float,
    weight_decay: float,
    weight_decay_norm: float = 0.0,
    weight_decay_bias: float | None = None,
    bias_lr_factor: float = 1.0,
    backbone_multiplier: float = 1.0,
) -> list[dict]:
    """Group the parameters by learning rate and weight decay.

    Detectron2's function identifies the parameters of norms. Its groups are not used: they give
    ``weight_decay_bias`` to norms, and biases of the backbone no ``backbone_multiplier``.

    Args:
        model: parameters that do not require a gradient are left out.
        base_lr: learning rate.
        weight_decay: of weights.
        weight_decay_norm: of weights and biases of normalization layers.
        weight_decay_bias: of all other biases; None: as weights.
        bias_lr_factor: factor of all biases' learning rate.
        backbone_multiplier: factor of the learning rate of parameters under `backbone_prefix`.

    Returns:
        Parameter groups of torch's optimizers, one for each combination of settings.
    """
    marked = get_default_optimizer_params(model, weight_decay=0.0, weight_decay_norm=1.0)
    norms = {parameter for group in marked if group["weight_decay"] for parameter in group["params"]}
    # Detectron2's list of norms lacks this one.
    norms.update(p for module in model.modules() if isinstance(module, nn.RMSNorm) for p in module.parameters())
    groups, prefix = [], backbone_prefix(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_bias = name.endswith("bias")
        lr = base_lr * bias_lr_factor if is_bias else base_lr
        decay = weight_decay_bias if is_bias and weight_decay_bias is not None else weight_decay
        groups.append(
            {
                "params": [parameter],
                "lr": lr * backbone_multiplier if name.startswith(prefix) else lr,
                "weight_decay": weight_decay_norm if parameter in norms else decay,
            }
        )
    return reduce_param_groups(groups)


def backbone_prefix(model: nn.Module) -> str:
    """Return the start of the names of the backbone's parameters, without a feature pyramid, which no weights fill."""
    pyramid = "backbone.bottom_up."
    return pyramid if any(name.startswith(pyramid) for name, _ in model.named_parameters()) else "backbone."
