"""What a training step started from: kept while it runs, and saved where the step has to be repeated."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Instances
from torch import nn

from sparseinst.checkpoint import read_weights_file
from sparseinst.config import load_config
from sparseinst.engine.first_non_finite import Finding, find_first_non_finite
from sparseinst.modeling.sparse_inst import gt_masks_tensor
from sparseinst.modeling.structures import LossNormalizer

STEP_FILE = "step.pth"
CONFIG_FILE = "config.yaml"
AMP_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class RandomState(NamedTuple):
    """State of torch's random generators.

    Attributes:
        cpu: of the CPU's.
        device: of the model's own device, where that has another one.
    """

    cpu: torch.Tensor
    device: torch.Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> "RandomState":
        """The present state; reading it does not wait for the device."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def set(self, device: torch.device) -> None:
        """Go on from this state."""
        torch.set_rng_state(self.cpu)
        if self.device is not None and device.type == "cuda":
            torch.cuda.set_rng_state(self.device, device)


class StepStart:
    """Random state and running statistics at the start of a step; the weights do not move before its end.

    Args:
        model: without DistributedDataParallel.
        device: the model's.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device = device
        self._norms = [module for module in model.modules() if getattr(module, "track_running_stats", False)]
        self.record()

    def record(self) -> None:
        """Remember what is now."""
        self.random_state = RandomState.now(self.device)
        # Joined: to copy each one takes longer, and a GPU gets as many kernels.
        self._statistics = [torch.cat([buffer.flatten() for buffer in buffers]) for buffers in self._buffers()]

    def restore(self) -> None:
        """Go back to what was recorded."""
        self.random_state.set(self.device)
        self.restore_statistics()

    def restore_statistics(self) -> None:
        """Go back to the recorded running statistics alone."""
        for buffers, joint in zip(self._buffers(), self._statistics):
            for buffer, value in zip(buffers, joint.split([buffer.numel() for buffer in buffers])):
                buffer.copy_(value.view_as(buffer))

    def _buffers(self) -> list[list[torch.Tensor]]:
        """The running statistics, those of one type together. PreciseBN puts others in their place."""
        buffers: dict[torch.dtype, list[torch.Tensor]] = {}
        for norm in self._norms:
            for buffer in norm.buffers(recurse=False):
                buffers.setdefault(buffer.dtype, []).append(buffer)
        return list(buffers.values())


def save_step(
    folder: Path,
    *,
    cfg: CfgNode,
    model: nn.Module,
    batches: list[list[dict]],
    normalizer: tuple,
    random_state: RandomState,
    loss_scale: float,
    with_gradients: bool,
    text: str,
) -> None:
    """Write what :func:`replay_step` needs. No code is in it: torch.load reads it with weights_only.

    Args:
        folder: made where it is not there.
        model: with the weights and running statistics that the step started from.
        batches, normalizer: what the model was called with.
        random_state: what the step started from.
        loss_scale: what the losses were multiplied by before the gradients were computed.
        with_gradients: the losses were finite, and a gradient was not.
        text: for README.txt.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    step = {
        "model": model.state_dict(),
        "batches": [[_to_plain(x) for x in batch] for batch in batches],
        "normalizer": [list(counts) for counts in normalizer],
        "random_state": tuple(random_state),
        "loss_scale": loss_scale,
        "with_gradients": with_gradients,
    }
    try:
        torch.save(step, folder / STEP_FILE)
    except RuntimeError as error:
        # How torch tells of a disk that is full.
        raise OSError(f"{folder / STEP_FILE} cannot be written: {error}") from error
    (folder / CONFIG_FILE).write_text(cfg.dump(), encoding="utf-8")
    (folder / "README.txt").write_text(text, encoding="utf-8")


def replay_step(folder: Path, device: str = "") -> tuple[Finding | None, dict[str, float]]:
    """Repeat a step that :func:`save_step` has written.

    Args:
        folder: what it has written.
        device: where to compute; "": where the step was computed.

    Returns:
        See :func:`find_first_non_finite`.

    Raises:
        ValueError: the folder does not hold such a step.
    """
    missing = [name for name in (STEP_FILE, CONFIG_FILE) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} has no {' and no '.join(missing)}: name a folder nonfinite_ITERATION_rankR")
    cfg = load_config(str(folder / CONFIG_FILE), ["MODEL.DEVICE", device] if device else [])
    _, step = read_weights_file(str(folder / STEP_FILE))
    model = build_model(cfg)
    if cfg.SOLVER.CHANNELS_LAST:
        model.to(memory_format=torch.channels_last)
    model.load_state_dict(step["model"])
    model.train()
    device = torch.device(cfg.MODEL.DEVICE)
    RandomState(*step["random_state"]).set(device)
    return find_first_non_finite(
        model,
        [[_from_plain(x) for x in batch] for batch in step["batches"]],
        [LossNormalizer(*counts) for counts in step["normalizer"]],
        device=device,
        amp_dtype=AMP_DTYPES[cfg.SOLVER.AMP.DTYPE] if cfg.SOLVER.AMP.ENABLED else None,
        loss_scale=step["loss_scale"],
        with_gradients=step["with_gradients"],
    )


def _to_plain(x: dict) -> dict[str, Any]:
    """One image of a batch as tensors, numbers and text."""
    plain = {key: value for key, value in x.items() if isinstance(value, torch.Tensor | int | float | str)}
    if "instances" in x:
        instances = x["instances"]
        plain["instances"] = {
            "image_size": tuple(instances.image_size),
            "gt_classes": instances.gt_classes,
            "gt_masks": gt_masks_tensor(instances),
        }
    return plain


def _from_plain(x: dict[str, Any]) -> dict:
    if "instances" not in x:
        return x
    fields = dict(x["instances"])
    return {**x, "instances": Instances(fields.pop("image_size"), **fields)}
