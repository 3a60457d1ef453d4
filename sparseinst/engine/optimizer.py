"""The optimizer that the SOLVER keys ask for."""

import logging
from collections.abc import Iterable
from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import maybe_add_gradient_clipping, reduce_param_groups
from torch import nn

logger = logging.getLogger(__name__)

# What SOLVER.OPTIMIZER_IMPLEMENTATION asks torch's optimizers for.
IMPLEMENTATIONS = {
    "auto": {},
    "for-loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}

NORM_MODULES = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW or SGD, as SOLVER.OPTIMIZER says, which clips each parameter where SOLVER.CLIP_GRADIENTS says so.

    CLIP_TYPE "full_model", of all gradients together, is done before a step: see :func:`build_full_model_clip`.
    Gradients that a GradScaler has enlarged must be unscaled before the step, whatever the implementation: a fused
    optimizer would do so by itself, but only after the clipping.

    Args:
        cfg: the SOLVER keys are read.
        model: its parameters that require a gradient are optimized.

    Raises:
        ValueError: an unknown SOLVER.OPTIMIZER or SOLVER.OPTIMIZER_IMPLEMENTATION.
    """
    solver = cfg.SOLVER
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
    return optimizer if _clips_full_model(cfg) else maybe_add_gradient_clipping(cfg, optimizer)


class FullModelClip(NamedTuple):
    """Scales all gradients alike where the norm of all of them together is too large.

    Attributes:
        parameters: whose gradients it scales.
        max_norm: what the norm is brought down to.
        norm_type: 2.0 for the Euclidean norm.
    """

    parameters: list[nn.Parameter]
    max_norm: float
    norm_type: float

    def __call__(self, euclidean_norm: torch.Tensor | None = None) -> None:
        """To be called when the gradients are complete, and unscaled.

        Args:
            euclidean_norm: of all gradients, a scalar on their device, where it has been taken already.
        """
        norm = euclidean_norm
        if norm is None or self.norm_type != 2:
            gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
            norm = nn.utils.get_total_norm(gradients, self.norm_type)
        # PyTorch multiplies by min(1, max_norm / (norm + 1e-6)), also by 1. Another device would be waited for.
        if norm.device.type == "cpu" and norm + 1e-6 <= self.max_norm:
            return
        nn.utils.clip_grads_with_norm_(self.parameters, self.max_norm, norm)


def build_full_model_clip(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> FullModelClip | None:
    """What clips before each step; None where SOLVER.CLIP_GRADIENTS has no CLIP_TYPE "full_model"."""
    if not _clips_full_model(cfg):
        return None
    clip = cfg.SOLVER.CLIP_GRADIENTS
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return FullModelClip(parameters, clip.CLIP_VALUE, clip.NORM_TYPE)


def _clips_full_model(cfg: CfgNode) -> bool:
    return cfg.SOLVER.CLIP_GRADIENTS.ENABLED and cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE == "full_model"


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
    """A state dict holds the implementation of the run that saved it; a resumed run keeps the one it was built with."""
    groups = [
        {**saved, **{key: own[key] for key in ("foreach", "fused") if key in own}}
        for saved, own in zip(state_dict["param_groups"], optimizer.param_groups)
    ]
    # Of other numbers of groups the optimizer tells by itself.
    return {**state_dict, "param_groups": groups + state_dict["param_groups"][len(groups) :]}


def learning_rate(cfg: CfgNode) -> float:
    """SOLVER.BASE_LR, times IMS_PER_BATCH / REFERENCE_BATCH_SIZE where the latter is not 0."""
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
    """Parameter groups by the type of module that owns the parameter, not by its name.

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
    groups = []
    for name, parameter, module in _owned_parameters(model):
        is_bias = name.endswith("bias")
        lr = base_lr
        decay = weight_decay
        if is_bias:
            lr *= bias_lr_factor
            decay = weight_decay if weight_decay_bias is None else weight_decay_bias
        if isinstance(module, NORM_MODULES):
            decay = weight_decay_norm
        if name.startswith("backbone."):
            lr *= backbone_multiplier
        groups.append({"params": [parameter], "lr": lr, "weight_decay": decay})
    return reduce_param_groups(groups)


def _owned_parameters(model: nn.Module) -> Iterable[tuple[str, nn.Parameter, nn.Module]]:
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                yield f"{module_name}.{name}".lstrip("."), parameter, module
