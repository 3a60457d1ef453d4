"""The optimizer that the SOLVER keys ask for."""

import logging
from collections.abc import Iterable

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping, reduce_param_groups
from torch import nn

logger = logging.getLogger(__name__)

# Arguments of torch's optimizers by SOLVER.OPTIMIZER_IMPLEMENTATION.
IMPLEMENTATIONS = {
    "auto": {},
    "for-loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build AdamW or SGD, as SOLVER.OPTIMIZER says, with Detectron2's clipping by parameter (SOLVER.CLIP_GRADIENTS).

    Unscale gradients that a GradScaler has enlarged before the step, with every implementation: a fused optimizer
    unscales by itself, but only after the clipping.

    Args:
        cfg: the SOLVER keys are read.
        model: its parameters that require a gradient are optimized.

    Raises:
        ValueError: SOLVER.OPTIMIZER, OPTIMIZER_IMPLEMENTATION or CLIP_TOTAL_NORM has an unknown or negative value.
    """
    solver = cfg.SOLVER
    if not solver.CLIP_TOTAL_NORM >= 0:
        raise ValueError(f"SOLVER.CLIP_TOTAL_NORM is {solver.CLIP_TOTAL_NORM}; it must be at least 0 (0: off)")
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
    optimizer = _new_optimizer(cfg, groups, base_lr)
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
    # PyTorch multiplies by min(1, max_norm / (norm + 1e-6)), also by 1. Reading the norm synchronises other devices.
    if norm.device.type == "cpu" and norm + 1e-6 <= max_norm:
        return
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)


def _new_optimizer(cfg: CfgNode, groups: list[dict], base_lr: float) -> torch.optim.Optimizer:
    solver = cfg.SOLVER
    name = solver.OPTIMIZER_IMPLEMENTATION
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"SOLVER.OPTIMIZER_IMPLEMENTATION is {name!r}; it must be one of {list(IMPLEMENTATIONS)}")
    implementation = IMPLEMENTATIONS[name]
    if solver.OPTIMIZER == "ADAMW":
        return torch.optim.AdamW(groups, lr=base_lr, amsgrad=solver.AMSGRAD, **implementation)
    if solver.OPTIMIZER == "SGD":
        return torch.optim.SGD(groups, lr=base_lr, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV, **implementation)
    raise ValueError(f'SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}; it must be "ADAMW" or "SGD"')


def _keep_implementation(optimizer: torch.optim.Optimizer, state_dict: dict) -> dict:
    """Replace the implementation that a state dict was saved with by the one that the optimizer was built with."""
    groups = [
        {**saved, **{key: own[key] for key in ("foreach", "fused") if key in own}}
        for saved, own in zip(state_dict["param_groups"], optimizer.param_groups)
    ]
    # The optimizer refuses another number of groups by itself.
    return {**state_dict, "param_groups": groups + state_dict["param_groups"][len(groups) :]}


def learning_rate(cfg: CfgNode) -> float:
    """Return SOLVER.BASE_LR, times IMS_PER_BATCH / REFERENCE_BATCH_SIZE where the latter is not 0."""
    solver = cfg.SOLVER
    if not solver.REFERENCE_BATCH_SIZE:
        return solver.BASE_LR
    scaled = solver.BASE_LR * solver.IMS_PER_BATCH / solver.REFERENCE_BATCH_SIZE
    logger.info(
        "The learning rate follows the batch: SOLVER.BASE_LR %g was chosen for REFERENCE_BATCH_SIZE %d images; "
        "IMS_PER_BATCH is %d, so it is %g",
        solver.BASE_LR,
        solver.REFERENCE_BATCH_SIZE,
        solver.IMS_PER_BATCH,
        scaled,
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

    Detectron2's function says which parameters belong to norms. Its own groups give ``weight_decay_bias`` to norms too,
    and the learning rate of biases without the factor of the backbone.

    Args:
        model: parameters that do not require a gradient are left out.
        base_lr: learning rate.
        weight_decay: of weights.
        weight_decay_norm: of weight and bias of normalisation layers.
        weight_decay_bias: of all other biases; None: as weights.
        bias_lr_factor: factor of all biases' learning rate.
        backbone_multiplier: factor of the learning rate of parameters under ``backbone``.

    Returns:
        As torch's optimizers take them; as few groups as there are different settings.
    """
    marked = get_default_optimizer_params(model, weight_decay=0.0, weight_decay_norm=1.0)
    norms = {parameter for group in marked if group["weight_decay"] for parameter in group["params"]}
    # Detectron2's list of norms lacks this one.
    norms.update(p for module in model.modules() if isinstance(module, nn.RMSNorm) for p in module.parameters())
    groups = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_bias = name.endswith("bias")
        lr = base_lr * bias_lr_factor if is_bias else base_lr
        decay = weight_decay_bias if is_bias and weight_decay_bias is not None else weight_decay
        groups.append(
            {
                "params": [parameter],
                "lr": lr * backbone_multiplier if name.startswith("backbone.") else lr,
                "weight_decay": weight_decay_norm if parameter in norms else decay,
            }
        )
    return reduce_param_groups(groups)
