"""Save a checkpoint and end the training on SIGTERM or Ctrl-C."""

import logging
import os
import signal
import time
from types import FrameType, TracebackType

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Clusters, terminals and the launcher each signal every process. Signals within this time are one request.
SECONDS_OF_ONE_REQUEST = 2


class TrainingInterrupted(BaseException):
    """Raised after a signal to end a training whose checkpoint is saved.

    Not an Exception, so that error handlers do not catch it.

    Attributes:
        signal: number of the signal.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal = signal_number


class SignalWatch:
    """Record SIGTERM and SIGINT inside a ``with`` block; a second request to stop ends the process as usual.

    Works in the process that entered the block, and only in its main thread.

    Attributes:
        received: number of the first signal, or None.
        raises_at_once: raise TrainingInterrupted on the signal, without waiting for the end of a step. Set it between
            steps, for example during an evaluation.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._received_at = 0.0
        self.raises_at_once = False
        self._process: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "SignalWatch":
        self._process = os.getpid()
        self.received = None
        try:
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        except ValueError:  # not in the main thread
            logger.warning("Signals are not watched outside the main thread: SIGTERM saves no checkpoint")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # the parent ends a worker that inherited this handler
        if self.received is not None:
            if time.monotonic() - self._received_at < SECONDS_OF_ONE_REQUEST:
                return
            for other, handler in self._previous.items():
                signal.signal(other, handler)
            os.kill(os.getpid(), number)
            return
        self.received = number
        self._received_at = time.monotonic()
        # A cluster ends the data workers, too; PyTorch's handler would raise in the middle of the step.
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        if self.raises_at_once:
            raise TrainingInterrupted(number)


class SaveOnSignal(HookBase):
    """Save a checkpoint and end the training on all ranks, after the step in which any rank received a signal.

    Must be the last hook, so that the other hooks have completed the step.

    Args:
        watch: entered while the training runs.
        checkpointer: the one of PeriodicCheckpointer.
    """

    def __init__(self, watch: SignalWatch, checkpointer: DetectionCheckpointer) -> None:
        self._watch = watch
        self._checkpointer = checkpointer

    def after_step(self) -> None:
        """Save and raise TrainingInterrupted after a request to stop."""
        if self.trainer.stop_requested:
            self.save()
            # Ranks without a signal of their own report SIGTERM, as from a scheduler.
            raise TrainingInterrupted(self._watch.received or signal.SIGTERM)

    def save(self) -> None:
        """Save the state after the step ``trainer.iter``."""
        iteration = self.trainer.iter
        self._checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
