"""Restore the loggers that a command sets up for the whole process, because other tests need theirs as they were."""

import contextlib
import logging


@contextlib.contextmanager
def loggers_restored():
    """Restore handlers, levels and propagation at the end of a with statement."""
    loggers = [logging.getLogger(name) for name in ("fvcore", "detectron2", "sparseinst")]
    before = [(logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers
        logger.propagate = propagate
        logger.setLevel(level)
