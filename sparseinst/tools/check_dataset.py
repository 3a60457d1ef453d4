"""Report the problems and the content of a data set: ``python -m sparseinst.tools.check_dataset JSON IMAGES``.

Reads a COCO json and all of its images, reports all problems at once, and prints the keys that a training sets for
the data. Exit code 0: a training runs, perhaps with warnings; 1: the data would stop a training;
2: the arguments are wrong.
"""

import argparse
import sys
from pathlib import Path

from sparseinst.config.arguments import add_config_arguments
from sparseinst.engine.console import EXIT_NOT_RUN, prepare_console, with_exit_codes

DEFAULT_CONFIG = "sparse_inst_r50_giam"


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The table at the top of sparseinst/data/coco_checks.py lists all problems and warnings.",
    )
    add = parser.add_argument
    add("json", type=Path, help="COCO json")
    add("images", type=Path, help="folder of its images")
    meaning = f"config of the training; its number of classes is checked too (default: {DEFAULT_CONFIG})"
    add_config_arguments(parser, required=False, default="", help=meaning)
    add("--recipe", default="", metavar="NAME", help="recipe of the training, no --config-file: as in train")
    add("--evaluation", action="store_true", help="also check the fields that only an evaluation reads")
    add("--quick", action="store_true", help="read only the headers of the image files")
    add("--workers", type=int, default=0, help="additional processes that read images (default: 0)")
    add("--show", type=int, default=5, metavar="N", help="show N problems of each kind (default: 5)")
    add("--opts", nargs="*", default=[], metavar="KEY VALUE", help="override the config")
    return parser


@with_exit_codes(EXIT_NOT_RUN)
def main(argv: list[str] | None = None) -> int:
    """Run the command with argv (default ``sys.argv``).

    Returns:
        Exit code: 0, 1 where a training would stop, 2 where the arguments or the config are wrong.
    """
    args = build_parser().parse_args(argv)
    prepare_console()
    from sparseinst.tools.check_dataset_run import run

    return run(args)


if __name__ == "__main__":
    sys.exit(main())
