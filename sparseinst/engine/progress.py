"""Report the progress of a training on the console."""

import datetime
import logging
import threading
import time

import torch
from detectron2.engine import HookBase
from torch import nn

from sparseinst.engine.optimizer import backbone_prefix

logger = logging.getLogger(__name__)

# Iterations between two lines.
PERIOD = 20
# Most seconds without a line, also inside a step.
MAX_SILENCE = 12.0
# Seconds between two looks of the thread.
POLL = 1.0


class Progress(HookBase):
    """Log losses, time, epochs and learning rates; store the learning rates as lr_heads and lr_backbone.

    ``mean_time`` is stored too: the mean of the iterations so far without the first ones, seconds.

    Replaces Detectron2's CommonMetricPrinter, whose first line comes after 20 iterations (140 s at 7 s an iteration on
    a CPU), and which logs one learning rate without telling whose. Here the first iteration has a line, no line comes
    later than MAX_SILENCE seconds after the one before, and a thread says what a longer step waits for.

    Args:
        model: without DistributedDataParallel; the backbone's parameters are named ``backbone.*``.
        iterations_per_epoch: None: epochs are not logged.
    """

    def __init__(self, model: nn.Module, iterations_per_epoch: float | None = None) -> None:
        self._model = model
        self._iterations_per_epoch = iterations_per_epoch
        self._groups: dict[str, int] = {}
        self._batches: object = None
        self._train_start = self._last_line = time.monotonic()
        # None between two steps, when other hooks log.
        self._step_start: float | None = None
        self._ended = threading.Event()

    def before_train(self) -> None:
        """Start the thread."""
        self._groups = learning_rate_groups(self._model, self.trainer.optimizer)
        self._train_start = self._last_line = time.monotonic()
        self._ended.clear()
        threading.Thread(target=self._watch, name="progress", daemon=True).start()

    def after_train(self) -> None:
        """End the thread."""
        self._step_start = None
        self._ended.set()

    def before_step(self) -> None:
        """Store the learning rates of the step."""
        groups = self.trainer.optimizer.param_groups
        rates = {name: groups[index]["lr"] for name, index in self._groups.items()}
        self.trainer.storage.put_scalars(**rates, smoothing_hint=False)
        self._batches = getattr(self.trainer, "batches", None)
        self._step_start = time.monotonic()

    def after_step(self) -> None:
        """Log a line at the first, the last and every 20th iteration, or after MAX_SILENCE seconds."""
        self._step_start = None
        done, start = self.trainer.iter + 1, self.trainer.start_iter
        is_due = done % PERIOD == 0 or done in (start + 1, self.trainer.max_iter)
        if is_due or time.monotonic() - self._last_line > MAX_SILENCE:
            logger.info(self._line(done))
            self._last_line = time.monotonic()

    def _line(self, done: int) -> str:
        storage, max_iter = self.trainer.storage, self.trainer.max_iter
        latest = storage.latest_with_smoothing_hint(PERIOD)
        losses = [f"{name}: {value:.4g}" for name, (value, _) in latest.items() if "loss" in name]
        if "time" in latest:
            seconds = storage.history("time").median(1000)
            # How many iterations fit into a time depends on the mean; slow iterations leave the median as it is.
            storage.put_scalar("mean_time", storage.history("time").global_avg(), smoothing_hint=False)
        else:
            # IterationTimer leaves out the first iterations.
            seconds = (time.monotonic() - self._train_start) / (done - self.trainer.start_iter)
        eta = seconds * (max_iter - done)
        storage.put_scalar("eta_seconds", eta, smoothing_hint=False)
        parts = [f"eta: {datetime.timedelta(seconds=int(eta))}", f"iter: {done}/{max_iter}"]
        if self._iterations_per_epoch:
            epoch, epochs = done / self._iterations_per_epoch, max_iter / self._iterations_per_epoch
            parts.append(f"epoch: {epoch:.2f}/{epochs:.2f}")
        parts += [*losses, f"time: {seconds:.3f} s"]
        if "data_time" in latest:
            parts.append(f"data_time: {latest['data_time'][0]:.3f} s")
        parts += [f"{name}: {latest[name][0]:.3g}" for name in self._groups]
        if torch.cuda.is_available():
            parts.append(f"max_mem: {torch.cuda.max_memory_allocated() / 2**20:.0f}M")
        return "  ".join(parts)

    def _watch(self) -> None:
        """Log a line where a step takes long; the time between two of them doubles."""
        logged_step, silence = None, MAX_SILENCE
        while not self._ended.wait(POLL):
            start = self._step_start
            if start is None:
                continue
            if start != logged_step:
                silence = MAX_SILENCE
            now = time.monotonic()
            if now - max(self._last_line, start) < silence:
                continue
            is_reading = hasattr(self.trainer, "batches") and self.trainer.batches is self._batches
            logger.info(
                "iter: %d/%d  %s for %.0f s",
                self.trainer.iter + 1,
                self.trainer.max_iter,
                "waiting for images" if is_reading else "computing the step",
                now - start,
            )
            logged_step, silence, self._last_line = start, 2 * silence, now


def learning_rate_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Return the index of the parameter group that holds the largest parameter: of the heads, of the backbone.

    Args:
        model: all parameters outside of its `backbone_prefix` belong to the heads.
        optimizer: of the model.

    Returns:
        "lr_heads" and "lr_backbone"; a part without a trained parameter has no entry.
    """
    group_of = {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
    largest: dict[str, nn.Parameter] = {}
    prefix = backbone_prefix(model)
    for name, parameter in model.named_parameters():
        part = "lr_backbone" if name.startswith(prefix) else "lr_heads"
        if id(parameter) in group_of and (part not in largest or parameter.numel() > largest[part].numel()):
            largest[part] = parameter
    return {part: group_of[id(largest[part])] for part in ("lr_heads", "lr_backbone") if part in largest}
