"""Define the arguments that all commands with ``--compare`` share; imports nothing that takes long."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from sparseinst.config.arguments import add_config_arguments, add_opts_argument


def add_common_arguments(
    parser: argparse.ArgumentParser,
    named: Mapping[str, str],
    section: str,
    repetitions: int,
    warmup: int,
    **config_file: object,
) -> None:
    """Add the arguments of all commands with ``--compare``; the numbers are defaults, the rest is of --config-file."""
    add = parser.add_argument
    add_config_arguments(parser, **config_file)
    add(
        "--repetitions", type=int, default=repetitions, metavar="N", help=f"counted repetitions (default {repetitions})"
    )
    add("--warmup", type=int, default=warmup, metavar="N", help=f"repetitions before them (default {warmup})")
    add("--threads", type=int, metavar="N", help="threads of PyTorch on the CPU")
    add("--compare", nargs="+", metavar="SETTING", default=["configured"],
        help=f"settings to run in turn in one process: {', '.join(named)}, or NAME='KEY VALUE ...' with full keys or "
        f"keys below {section}. Ratios are relative to the first")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    add_opts_argument(parser)
