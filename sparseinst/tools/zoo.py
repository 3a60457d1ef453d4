"""List the published checkpoints, or download one: ``python -m sparseinst.tools.zoo [NAME]``.

Every command takes a name as MODEL.WEIGHTS sparseinst://NAME and downloads the file itself. This command does so in
advance, for example on another machine.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from sparseinst.engine.console import prepare_console, with_exit_codes


def build_parser() -> argparse.ArgumentParser:
    """Return the command's argument parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "name",
        nargs="?",
        help="download this one and print its path: a listed name, or anything that MODEL.WEIGHTS takes, such as "
        "hf://OWNER/NAME/FILE",
    )
    return parser


def list_checkpoints() -> str:
    """Return a table of the published checkpoints: name, whether it is cached, address."""
    from sparseinst.checkpoint.downloads import find_download
    from sparseinst.checkpoint.published import CHECKPOINTS, terms_of_use

    downloads = {name: find_download(f"sparseinst://{name}") for name in CHECKPOINTS}
    width = max(map(len, downloads))
    lines = []
    for name, download in downloads.items():
        state = "cached" if download.path.is_file() else "-"
        lines.append(f"{name:{width}}  {state:6}  {download.address}  {terms_of_use(download.address)}".rstrip())
    folder = next(iter(downloads.values())).path.parent
    return "\n".join([f"{'checkpoint':{width}}  {'':6}  address", *lines, f"cached in {folder} as NAME.pth"])


@with_exit_codes()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0, or 1 after an error."""
    args = build_parser().parse_args(argv)
    prepare_console()
    # Importing torch would slow down --help.
    from sparseinst.checkpoint import find_weights

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("sparseinst").setLevel(logging.INFO)
    if args.name:
        print(find_weights(args.name if "://" in args.name else f"sparseinst://{args.name}"))
    else:
        print(list_checkpoints())
    return 0


if __name__ == "__main__":
    sys.exit(main())
