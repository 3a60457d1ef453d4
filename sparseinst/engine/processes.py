"""Start the processes of a training by Detectron2's launch or torchrun, and end them together."""

import argparse
import contextlib
import datetime
import gc
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

import torch
from detectron2.engine import launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

# Set by torchrun.
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# The launcher ends the other ranks within this time after one has failed.
SECONDS_FOR_OTHERS = 5


def is_started_by_torchrun() -> bool:
    """Return whether torchrun has started this process."""
    return all(name in os.environ for name in TORCHRUN_VARIABLES)


def take_gpu_of_rank() -> None:
    """Make the GPU of this rank of torchrun the current one. Raise ValueError where a rank of this machine has none."""
    num_ranks, num_gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if num_ranks > num_gpus:
        raise ValueError(
            f"torchrun started {num_ranks} processes on this machine, which has {num_gpus} GPUs: each needs one. "
            f"Set --nproc_per_node to at most {num_gpus}, or predict with MODEL.DEVICE cpu"
        )
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def check_process_arguments(args: argparse.Namespace) -> None:
    """Check the arguments of a training in several processes.

    Args:
        args: ``num_gpus``, ``num_machines``, ``machine_rank``, ``dist_url`` and ``dist_timeout`` are read.

    Raises:
        ValueError: the message names the flag.
    """
    if args.dist_timeout <= 0:
        raise ValueError(f"--dist-timeout is {args.dist_timeout:g}; it must be above 0, in minutes")
    if is_started_by_torchrun():
        num_local = int(os.environ["LOCAL_WORLD_SIZE"])
        num_machines, rest = divmod(int(os.environ["WORLD_SIZE"]), num_local)
        if rest:
            raise ValueError("torchrun has started different numbers of processes per machine; start as many on each")
        asked = {"--num-gpus": (args.num_gpus, num_local), "--num-machines": (args.num_machines, num_machines)}
        for flag, (number, started) in asked.items():
            if number not in (1, started):
                raise ValueError(f"{flag} is {number}, and torchrun has started {started}: leave out {flag}")
    else:
        num_local, num_machines, url = args.num_gpus, args.num_machines, args.dist_url
        if num_local < 1 or num_machines < 1:
            raise ValueError(f"--num-gpus {num_local} --num-machines {num_machines}: both must be at least 1")
        if not 0 <= args.machine_rank < num_machines:
            raise ValueError(f"--machine-rank is {args.machine_rank}; it must be from 0 to {num_machines - 1}")
        port = re.fullmatch(r"tcp://[^/]+:(\d+)|file://.+|auto", url)
        if num_local * num_machines > 1 and (not port or int(port[1] or 1) > 65535):
            raise ValueError(f"--dist-url is {url}; it must be tcp://HOST:PORT of the first machine, or auto on one")
        if num_machines > 1 and url == "auto":
            raise ValueError("--dist-url is auto; several machines need tcp://HOST:PORT of the first machine")
    if torch.cuda.is_available() and num_local > torch.cuda.device_count():
        raise ValueError(
            f"{num_local} processes were asked for, and this machine has {torch.cuda.device_count()} GPUs: each needs "
            'one. To train on the CPU hide the GPUs: CUDA_VISIBLE_DEVICES=""'
        )


def check_device(device: str) -> None:
    """Raise ValueError for a MODEL.DEVICE that several processes cannot train on."""
    if comm.get_world_size() > 1 and torch.cuda.is_available() and device != "cuda":
        raise ValueError(
            f'MODEL.DEVICE is {device}; several processes on a machine with GPUs need "cuda", and take one each. To '
            'train on the CPU hide the GPUs: CUDA_VISIBLE_DEVICES=""'
        )


def run_processes(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """Call ``main(args)`` in every process of this machine, and end when all have ended.

    If one fails or is killed, the others are ended, and this process exits with one line that names it.

    Args:
        main: a function of an importable module.
        args: checked by `check_process_arguments`; an invalid one ends this process with one line.
    """
    try:
        check_process_arguments(args)
    except ValueError as error:
        sys.exit(f"error: {error}")
    timeout = datetime.timedelta(minutes=args.dist_timeout)
    if is_started_by_torchrun():
        has_gpu = torch.cuda.is_available()
        if has_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if has_gpu else "gloo", init_method="env://", timeout=timeout)
        comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
        comm.synchronize()
        _main_of_rank(main, args)
        return
    if args.num_gpus * args.num_machines == 1:
        main(args)
        return
    with _signals_for_all() as received:
        try:
            launch(
                _main_of_rank,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(main, args),
                timeout=timeout,
            )
        except ProcessRaisedException as error:
            print(error.msg.strip(), file=sys.stderr)
            _exit_for(error, args, "stopped with the exception above")
        except ProcessExitedException as error:
            # A rank that was not ended by a signal has printed the reason.
            if error.signal_name is None:
                sys.exit(error.exit_code)
            _exit_for(error, args, f"was ended by {error.signal_name}")
    if received:
        sys.exit(128 + received[0])


def _main_of_rank(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """Call ``main(args)``, then end the process group and its threads.

    A thread of gloo that still lives when the interpreter ends may abort the process after a complete training
    (pytorch issue 190489). Detectron2's ``comm`` keeps references to two groups that `destroy_process_group` leaves
    alive, and so do reference cycles of the model.
    """
    main(args)
    torch.distributed.destroy_process_group()
    comm._LOCAL_PROCESS_GROUP = None
    # Another Detectron2 may keep none: the training is complete, so nothing here may fail.
    getattr(getattr(comm, "_get_global_gloo_group", None), "cache_clear", bool)()
    gc.collect()


def _exit_for(error: ProcessExitedException | ProcessRaisedException, args: argparse.Namespace, how: str) -> NoReturn:
    rank, num_ranks = args.machine_rank * args.num_gpus + error.error_index, args.num_gpus * args.num_machines
    message = (
        f"error: rank {rank} of {num_ranks} (process {error.error_pid}) {how}; the others on "
        "this machine were ended too. See log.txt and log.txt.rank* in OUTPUT_DIR"
    )
    if args.num_machines > 1:
        message += ". If a connection was lost, the first failure is on another machine: see the logs there"
    sys.exit(message)


@contextlib.contextmanager
def _signals_for_all() -> Iterator[list[int]]:
    """Forward SIGTERM and Ctrl-C to the started processes; yield the list of received signals."""
    received: list[int] = []

    def forward(number: int, frame: object) -> None:
        received.append(number)
        for child in multiprocessing.active_children():
            child.terminate()

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_with_error(message: object) -> NoReturn:
    """End this process with ``error: message``. Where all ranks fail, one rank of each machine prints it."""
    local_rank = comm.get_local_rank()
    if local_rank:
        # The launcher ends the other ranks before they print.
        time.sleep(SECONDS_FOR_OTHERS + local_rank)
    sys.exit(f"error: {message}")
