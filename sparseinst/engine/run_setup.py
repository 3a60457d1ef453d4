"""Begin a run: the loggers, the seed and the saved config of one process."""

import argparse
import atexit
import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from sparseinst.checkpoint.atomic_write import write_text_atomically
from sparseinst.engine.console import only_in_log_file
from sparseinst.engine.output_folder import check_no_earlier_run, claimed

logger = logging.getLogger(__name__)

LOGGERS = ("sparseinst", "detectron2", "fvcore")


def log_to_console(level: int, rank: int = 0) -> None:
    """Log to stdout in rank 0, in a command without OUTPUT_DIR."""
    for name in LOGGERS:
        setup_logger(name=name, distributed_rank=rank).setLevel(level)


def save_config(output_dir: str, config_text: str, *, eval_only: bool) -> None:
    """Write OUTPUT_DIR/config.yaml or, with ``eval_only``, OUTPUT_DIR/inference/config.yaml in rank 0.

    Call it after the weights are loaded, so that a refused run leaves the earlier file. Together with `begin_run` it
    replaces Detectron2's default_setup, which empties config.yaml before it writes: a full disk leaves 0 bytes of the
    earlier file, and an evaluation replaces the config of the training.

    Raises:
        OutputError: the file cannot be written; an earlier one is unchanged.
        OSError: the folder cannot be made.
    """
    if comm.is_main_process():
        folder = Path(output_dir, "inference") if eval_only else Path(output_dir)
        folder.mkdir(exist_ok=True)
        write_text_atomically(folder / "config.yaml", config_text)


def set_up_loggers(output_dir: str) -> None:
    """Log to stdout (rank 0) and to OUTPUT_DIR/log.txt; a full disk costs lines of the log and one line on stderr.

    Logging prints a traceback for each line that it cannot write.
    """
    for name in LOGGERS:
        for handler in setup_logger(output_dir, distributed_rank=comm.get_rank(), name=name).handlers:
            handler.handleError = _warn_once
            stream = getattr(handler, "stream", None)
            if stream not in (None, sys.stdout, sys.stderr):
                # Before Detectron2's own atexit function, which would raise.
                atexit.register(_close, stream)


def begin_run(
    args: argparse.Namespace, stack: contextlib.ExitStack, output_dir: str, config_text: str, **settings: Any
) -> None:
    """Hold OUTPUT_DIR until the stack is closed, and call `set_up_loggers` and `set_up_run`.

    Raises:
        ValueError: the folder cannot be written to or is in use, or a new training would overwrite its checkpoints.
    """
    if comm.is_main_process():
        stack.enter_context(claimed(output_dir))
    if not args.eval_only and not args.resume:
        check_no_earlier_run(output_dir)
    set_up_loggers(output_dir)
    set_up_run(args, config_text, **settings)


def set_up_run(args: argparse.Namespace, config_text: str, *, seed: int, cudnn_benchmark: bool) -> None:
    """Log the environment and the config to log.txt alone, and seed this process.

    Args:
        args: of the command line.
        config_text: content for config.yaml.
        seed: of all random numbers; negative: a random one.
        cudnn_benchmark: of torch, in a training.
    """
    rank = comm.get_rank()
    logger.info("Rank of current process: %d. World size: %d", rank, comm.get_world_size())
    with only_in_log_file("sparseinst"):
        logger.info("Environment info:\n%s", collect_env_info())
        logger.info("Command line arguments: %s", args)
        logger.info("Running with full config:\n%s", config_text)
    # Each process has its own random numbers.
    seed_all_rng(None if seed < 0 else seed + rank)
    torch.backends.cudnn.benchmark = cudnn_benchmark and not args.eval_only


_failed: set[type[BaseException] | None] = set()


def _warn_once(record: logging.LogRecord) -> None:
    """Report the first error of each kind of a log's handlers; called while the error is handled."""
    kind, error, _ = sys.exc_info()
    if kind not in _failed:
        _failed.add(kind)
        with contextlib.suppress(OSError, ValueError, AttributeError):
            print(f"WARNING: lines of the log cannot be written and are left out: {error}", file=sys.stderr)


def _close(stream: os.PathLike) -> None:
    with contextlib.suppress(OSError, ValueError):
        stream.close()
