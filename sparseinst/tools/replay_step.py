"""Repeat a training step whose loss or gradient was not finite, from the folder that the training has left.

``python -m sparseinst.tools.replay_step output/nonfinite_0000012_rank0`` prints the losses and the first module whose
output is not finite. Exit code 0 where it is found again, 1 where all is finite.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sparseinst.engine.step_record import replay_step


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="nonfinite_ITERATION_rankR in the training's OUTPUT_DIR")
    parser.add_argument("--device", default="", help="where to compute; by default the config's MODEL.DEVICE")
    return parser


def cli(argv: Sequence[str] | None = None) -> None:
    """The command."""
    args = build_parser().parse_args(argv)
    try:
        finding, losses = replay_step(args.folder, args.device)
    except ValueError as error:
        sys.exit(f"error: {error}")
    for name, loss in losses.items():
        print(f"{name} {loss}")
    if finding is None:
        sys.exit("Everything is finite: it cannot be found again on this machine")
    print(f"First that is not finite: {finding}")


if __name__ == "__main__":
    cli()
