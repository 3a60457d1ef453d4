"""Command-line arguments that name a config; of argparse only, so that --help is fast."""

import argparse

CONFIG_HELP = "YAML file, or the name of one that comes with the package"


def add_config_arguments(parser: argparse.ArgumentParser, **config_file: object) -> None:
    """Add --config-file and --import.

    Args:
        parser: of a command that calls `load_config(args.config_file, args.opts, imports=args.imports)`.
        config_file: keyword arguments of ``add_argument`` for --config-file; by default it is required.
    """
    parser.add_argument("--config-file", **{"required": True, "help": CONFIG_HELP, **config_file})
    add_import_argument(parser)


def add_import_argument(parser: argparse.ArgumentParser) -> None:
    """Add --import, whose values are in ``args.imports``."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="run this .py file or dotted module first, for example to register a decoder; it is saved with the config "
        "(IMPORTS). May be repeated",
    )


def add_opts_argument(parser: argparse.ArgumentParser) -> None:
    """Add --opts, which takes all arguments after it."""
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides, last"
    )
