"""Run a function as the ranks of one training: real processes that exchange through gloo."""

import datetime
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from detectron2.utils import comm

from tests.faults.child import Child

# Longer than any of these tests; what hangs ends with it, in an error.
TIMEOUT = 60


def run_ranks(num_ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(*args)`` in as many processes as there are ranks.

    Returns:
        What each rank returned, by rank; it has to be of types that torch.load knows without running code.
    """
    with tempfile.TemporaryDirectory() as folder:
        children = [Child(_run_rank, Path(folder), rank, num_ranks, function, args) for rank in range(num_ranks)]
        outcomes = [child.wait(TIMEOUT) for child in children]
        for rank, outcome in enumerate(outcomes):
            assert outcome.exit_code == 0, f"rank {rank} of {num_ranks}: {outcome}\n{outcome.output}"
        return [torch.load(Path(folder) / f"{rank}.pth", weights_only=True) for rank in range(num_ranks)]


def _run_rank(folder: Path, rank: int, num_ranks: int, function: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=num_ranks,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    comm.create_local_process_group(num_ranks)
    torch.save(function(*args), folder / f"{rank}.pth")
    comm.synchronize()
    torch.distributed.destroy_process_group()
