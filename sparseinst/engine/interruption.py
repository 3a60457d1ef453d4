"""A training that is asked to stop, by SIGTERM or Ctrl-C, saves a checkpoint and ends."""

import logging
import os
import signal
import time
from types import FrameType, TracebackType

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Clusters and terminals send to every process, and so does the process that launched them: that is one request.
SECONDS_OF_ONE_REQUEST = 2


class TrainingInterrupted(BaseException):
    """Ends a training that a signal asked to stop, after its checkpoint was saved.

    Not an Exception: no handler of errors is to swallow it.

    Attributes:
        signal: the number of the signal.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal = signal_number


class SignalWatch:
    """Notes SIGTERM and SIGINT while it is entered; a second request to stop ends the process as usual.

    Only in the process and the thread that entered it; elsewhere than in the main thread signals cannot be watched.

    Attributes:
        received: number of the first signal, or None.
        raises_at_once: whether a signal raises TrainingInterrupted where it strikes, as between steps, when the weights
            are whole and much time may pass until the next step.
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
            return  # a worker, which inherited this; its parent ends it
        if self.received is not None:
            if time.monotonic() - self._received_at < SECONDS_OF_ONE_REQUEST:
                return
            for other, handler in self._previous.items():
                signal.signal(other, handler)
            os.kill(os.getpid(), number)
            return
        self.received = number
        self._received_at = time.monotonic()
        if self.raises_at_once:
            raise TrainingInterrupted(number)


class SaveOnSignal(HookBase):
    """After the step in which a signal came to any rank: a checkpoint, and the end of the training on all ranks.

    The last of the hooks, so that what the others keep is saved as after a whole step.

    Args:
        watch: entered while the training runs.
        checkpointer: as PeriodicCheckpointer's.
    """

    def __init__(self, watch: SignalWatch, checkpointer: DetectionCheckpointer) -> None:
        self._watch = watch
        self._checkpointer = checkpointer

    def after_step(self) -> None:
        """Raises TrainingInterrupted where it is time."""
        if self.trainer.stop_requested:
            self.save()
            # On the ranks that got none, as where it came from a scheduler.
            raise TrainingInterrupted(self._watch.received or signal.SIGTERM)

    def save(self) -> None:
        """Save the training as it is after the step ``trainer.iter``."""
        iteration = self.trainer.iter
        self._checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
