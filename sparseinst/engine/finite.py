"""Losses and gradients that are not finite: told by all processes together, before they reach the weights."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn

from sparseinst.engine.first_non_finite import all_finite, find_first_non_finite
from sparseinst.engine.step_record import AMP_DTYPES, StepStart, save_step

logger = logging.getLogger(__name__)

ACTIONS = ("stop", "skip")
# Skipped steps that are saved; each takes the weights' size on the disk. The one that stops is saved besides.
MAX_SAVED_SKIPS = 3
MAX_NAMES = 4
# A scale at which the gradient scaler does not enlarge: what overflows here is not the scaler's doing.
UNSCALED = 1.0


class NonFiniteStepError(FloatingPointError):
    """A loss or a gradient is not finite, and the step must not be taken."""


class Verdict(NamedTuple):
    """What all processes do with a step.

    Attributes:
        take_step: update the weights; False: skip the step, gradients are to be dropped.
        also: of each of the caller's own flags, whether it is set on any process.
        losses: this process's, on the host.
        gradient_norm: the Euclidean norm of all gradients together, as a gradient scaler has left them; a scalar on
            their device. It overflows before they do.
    """

    take_step: bool
    also: list[bool]
    losses: dict[str, torch.Tensor]
    gradient_norm: torch.Tensor


def any_rank(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Whether each flag is set on any process: every process gets the same answer, by one small all_reduce.

    Args:
        flags: as many on every process.
        device: where the processes' backend exchanges tensors.
    """
    if comm.get_world_size() == 1:
        return list(flags)
    votes = torch.tensor([int(flag) for flag in flags], device=device)
    torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX)
    return [bool(vote) for vote in votes.tolist()]


class FiniteGuard:
    """Looks at the losses and gradients of each step, and stops or skips where one is not finite.

    Then, and only then, the step is repeated under hooks for the first module whose output was not finite. What is
    needed to repeat it once more is saved to OUTPUT_DIR/nonfinite_ITERATION_rankR. Gradients that only a gradient
    scaler has made overflow are left to the scaler, which skips the step itself and lowers its scale.

    Args:
        cfg: SOLVER.NONFINITE, SOLVER.AMP, OUTPUT_DIR; the whole is saved with a step.
        model: without DistributedDataParallel.
        grad_scaler: enabled or not.

    Raises:
        ValueError: a key of SOLVER.NONFINITE that cannot be used.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, grad_scaler: torch.amp.GradScaler) -> None:
        nonfinite, amp = cfg.SOLVER.NONFINITE, cfg.SOLVER.AMP
        if nonfinite.ACTION not in ACTIONS:
            raise ValueError(f"SOLVER.NONFINITE.ACTION is {nonfinite.ACTION!r}; it must be one of {ACTIONS}")
        if nonfinite.MAX_SKIPS < 0:
            raise ValueError(f"SOLVER.NONFINITE.MAX_SKIPS is {nonfinite.MAX_SKIPS}; it must be at least 0")
        self.max_skips = nonfinite.MAX_SKIPS if nonfinite.ACTION == "skip" else 0
        self.max_scaler_skips = nonfinite.MAX_SKIPS
        self.cfg = cfg
        self.model = model
        # To look for them in all modules would take a part of each step.
        self._parameters = list(model.parameters())
        self.grad_scaler = grad_scaler
        self.device = torch.device(cfg.MODEL.DEVICE)
        self.amp_dtype = AMP_DTYPES[amp.DTYPE] if amp.ENABLED else None
        self.start = StepStart(model, self.device)
        self.num_saved = 0
        # How many steps were skipped: in all, and one after the other until now; by the scaler those alone where it
        # did not enlarge.
        self.counts = {"skipped": 0, "in_row": 0, "scaler_skipped": 0, "scaler_in_row": 0}

    def start_step(self) -> None:
        """To be called before the step's first forward pass."""
        self.start.record()

    def check(
        self,
        losses: dict[str, torch.Tensor],
        batches: list[list[dict]],
        normalizer: tuple,
        iteration: int,
        also: Sequence[bool] = (),
    ) -> Verdict:
        """To be called after the step's last backward pass, before the gradients are unscaled; by all processes.

        Args:
            losses: the step's scalars, not scaled, without a graph.
            batches, normalizer: what the model was called with.
            iteration: for the messages.
            also: flags of the caller's own that go into the same exchange.

        Raises:
            NonFiniteStepError: on all processes, with the same message.
        """
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        any_loss, any_gradient, also, host_losses = self._look(losses, gradients, norm, also)
        take_step = not any_loss and not any_gradient
        if take_step:
            self.counts.update(in_row=0, scaler_in_row=0)
        elif not any_loss and self._is_left_to_scaler(iteration):
            take_step = True
        else:
            self._stop_or_skip(losses, batches, normalizer, iteration, with_gradients=not any_loss)
        return Verdict(take_step, also, host_losses, norm)

    def _look(
        self,
        losses: dict[str, torch.Tensor],
        gradients: list[torch.Tensor],
        norm: torch.Tensor,
        also: Sequence[bool],
    ) -> tuple[bool, bool, list[bool], dict[str, torch.Tensor]]:
        """Whether a loss, and a gradient, is not finite on any process; the flags likewise; the losses on the host."""
        values = torch.stack([*losses.values(), norm])
        is_bad = ~torch.isfinite(values)
        # Filled in, not copied: a copy to a GPU waits for it.
        flags = [is_bad[:-1].any(), is_bad[-1], *(torch.full_like(is_bad[0], flag) for flag in also)]
        votes = torch.stack(flags).to(values.dtype)
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX)
        # One wait for the device, whatever the number of losses, parameters and processes.
        host_values, votes = torch.cat([values, votes]).cpu().split([len(values), len(votes)])
        any_loss, any_gradient, *also = votes.bool().tolist()
        if any_gradient:
            # Squares can overflow where no gradient does: the largest entry, which takes longer, cannot.
            largest = nn.utils.get_total_norm(gradients, norm_type=math.inf).item()
            (any_gradient,) = any_rank([not math.isfinite(largest)], self.device)
        return any_loss, any_gradient, also, dict(zip(losses, host_values))

    def _is_left_to_scaler(self, iteration: int) -> bool:
        """Count a step that the gradient scaler is going to skip; False where it has had its chances."""
        if not self.grad_scaler.is_enabled():
            return False
        scale = self.grad_scaler.get_scale()
        if scale <= UNSCALED and self.counts["scaler_in_row"] >= self.max_scaler_skips:
            return False
        self.counts["scaler_skipped"] += 1
        self.counts["scaler_in_row"] += scale <= UNSCALED
        get_event_storage().put_scalar("nonfinite/scaler_skips", self.counts["scaler_skipped"], smoothing_hint=False)
        logger.info("Iteration %d: a gradient overflows at the loss scale %g; the scaler lowers it", iteration, scale)
        return True

    def _stop_or_skip(
        self,
        losses: dict[str, torch.Tensor],
        batches: list[list[dict]],
        normalizer: tuple,
        iteration: int,
        with_gradients: bool,
    ) -> None:
        stops = with_gradients and self.grad_scaler.is_enabled() or self.counts["in_row"] >= self.max_skips
        saves = stops or self.num_saved < MAX_SAVED_SKIPS
        self.num_saved += saves
        report = self._report(losses, batches, normalizer, iteration, with_gradients, saves)
        self.start.restore_statistics()
        # Waits for the others, so that none is ended by an error here while it still writes.
        reports = [text for text in comm.all_gather(report) if text]
        what = "gradient" if with_gradients else "loss"
        text = "\n".join([f"A {what} is not finite at iteration {iteration}.", *(reports or ["On no process alone."])])
        if stops:
            in_row = max(self.counts["in_row"], self.counts["scaler_in_row"])
            raise NonFiniteStepError(
                f"{text}\n{in_row} steps in a row were skipped before it (SOLVER.NONFINITE.MAX_SKIPS). Lower SOLVER."
                "BASE_LR, enable SOLVER.CLIP_GRADIENTS, or train without SOLVER.AMP; SOLVER.NONFINITE.ACTION skip goes "
                "on without such steps"
            )
        self.counts["skipped"] += 1
        self.counts["in_row"] += 1
        get_event_storage().put_scalar("nonfinite/skipped_steps", self.counts["skipped"], smoothing_hint=False)
        logger.warning("%s\nThe step is skipped: %d in all, %d in a row", text, *list(self.counts.values())[:2])

    def _report(
        self,
        losses: dict[str, torch.Tensor],
        batches: list[list[dict]],
        normalizer: tuple,
        iteration: int,
        with_gradients: bool,
        saves: bool,
    ) -> str:
        """What this process has to say; "" where all was finite on it. All processes come here together."""
        # It draws the same random numbers, so what comes after it does too.
        self.start.restore()
        loss_scale = self.grad_scaler.get_scale() if with_gradients else 1.0
        finding, _ = find_first_non_finite(
            self.model,
            batches,
            normalizer,
            device=self.device,
            amp_dtype=self.amp_dtype,
            loss_scale=loss_scale,
            with_gradients=with_gradients,
        )
        bad_losses = [f"{name} {loss.item()}" for name, loss in losses.items() if not all_finite(loss)]
        # Of several processes, each has the mean of all gradients: whose it was, the repetition says.
        is_alone = comm.get_world_size() == 1
        if not bad_losses and finding is None and not (with_gradients and is_alone):
            return ""
        lines = [f"Process {comm.get_rank()} of {comm.get_world_size()}: " + (", ".join(bad_losses) or "finite losses")]
        if with_gradients:
            names = [name for name, p in self.model.named_parameters() if p.grad is not None and not all_finite(p.grad)]
            lines.append(f"  parameters whose gradient is not finite: {_first(names)}")
        lines.append(f"  first that is not finite: {finding or 'nothing, when the step was repeated'}")
        if finding and len(batches) > 1:
            lines.append(f"  in part {finding.batch + 1} of {len(batches)} of the step (SOLVER.ACCUMULATE_STEPS)")
        files = [str(x.get("file_name", "an image without file_name")) for batch in batches for x in batch]
        lines.append(f"  images: {', '.join(files)}")
        if saves:
            lines.append(f"  {self._save(batches, normalizer, iteration, loss_scale, with_gradients, lines)}")
        return "\n".join(lines)

    def _save(
        self,
        batches: list[list[dict]],
        normalizer: tuple,
        iteration: int,
        loss_scale: float,
        with_gradients: bool,
        lines: list[str],
    ) -> str:
        folder = Path(self.cfg.OUTPUT_DIR) / f"nonfinite_{iteration:07d}_rank{comm.get_rank()}"
        command = f"python -m sparseinst.tools.replay_step {folder}"
        self.start.restore_statistics()
        try:
            save_step(
                folder,
                cfg=self.cfg,
                model=self.model,
                batches=batches,
                normalizer=normalizer,
                random_state=self.start.random_state,
                loss_scale=loss_scale,
                with_gradients=with_gradients,
                text="\n".join([f"Iteration {iteration}", *lines, f"This repeats the step: {command}", ""]),
            )
        except OSError as error:
            return f"the step cannot be saved: {error}"
        return f"saved; this repeats it: {command}"

    def state_dict(self) -> dict:
        """The counts."""
        return dict(self.counts)

    def load_state_dict(self, state_dict: dict) -> None:
        """Take what :meth:`state_dict` gave."""
        self.counts.update(state_dict)


def _first(names: list[str]) -> str:
    rest = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {rest} more" if rest > 0 else "")
