"""List the published checkpoints, or download some: ``sparseinst zoo``, ``sparseinst zoo sparse_inst_r50_giam_aug``.

MODEL.WEIGHTS sparseinst://NAME downloads a checkpoint where it is needed.
"""

import argparse
import sys
from collections.abc import Sequence

from sparseinst.engine.console import prepare_console


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="download these; none: list all")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 where a checkpoint is unknown or cannot be downloaded."""
    args = build_parser().parse_args(argv)
    prepare_console()
    from tabulate import tabulate

    from sparseinst.checkpoint.downloads import cached_file
    from sparseinst.checkpoint.locations import find_weights
    from sparseinst.checkpoint.names.published import NON_COMMERCIAL, PUBLISHED

    if not args.names:
        rows = [
            (name, address, "non-commercial" * (name in NON_COMMERCIAL), "yes" * cached_file(address).is_file())
            for name, address in PUBLISHED.items()
        ]
        print(tabulate(rows, headers=("MODEL.WEIGHTS sparseinst://...", "address", "use", "cached")))
        return 0
    for name in args.names:
        try:
            print(find_weights(f"sparseinst://{name.removeprefix('sparseinst://')}"))
        except (ValueError, ImportError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
