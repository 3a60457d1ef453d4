"""Build the optimizer of the SOLVER keys."""

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

    Unscale the gradients of a GradScaler before the step: a fused optimizer unscales them only after clipping.

    Args:
        cfg: the SOLVER keys are read.
        model: its parameters that require a gradient are optimized.

    Raises:
        ValueError: SOLVER.OPTIMIZER, OPTIMIZER_IMPLEMENTATION or CLIP_TOTAL_NORM has an unknown or negative value.
    """
    solver = cfg.SOLVER
    if not solver.CLIP_TOTAL_NORM >= 0:
        raise ValueError(f"SOLVER.CLIP_TOTAL_NORM is {solver.CLIP_TOTAL_NORM}; it must be at least 0 (0: off)")
    name = solver.OPTIMIZER_IMPLEMENTATION
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"SOLVER.OPTIMIZER_IMPLEMENTATION is {name!r}; it must be one of {list(IMPLEMENTATIONS)}")
    options = IMPLEMENTATIONS[name]
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
    elif solver.OPTIMIZER == "SGD":
        optimizer = torch.optim.SGD(groups, lr=base_lr, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV, **options)
    else:
        raise ValueError(f'SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}; it must be "ADAMW" or "SGD"')
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
        backbone_multiplier: factor of the learning rate of parameters under ``backbone``.

    Returns:
        Parameter groups of torch's optimizers, one for each combination of settings.
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
