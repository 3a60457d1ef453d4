"""Command-line arguments that name a config, and a check of numbers; of argparse only, so that --help is fast."""

import argparse
from collections.abc import Mapping

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
        help="run this .py file or dotted module first, for example to register a decoder; a training saves it with "
        "the config (IMPORTS). May be repeated",
    )


def add_opts_argument(parser: argparse.ArgumentParser) -> None:
    """Add --opts, which takes all arguments after it."""
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides, last"
    )


def check_least(args: argparse.Namespace, least: Mapping[str, float]) -> None:
    """Raise ValueError where a number of a command line is below the least value of its flag; None is accepted."""
    for flag, bound in least.items():
        given = getattr(args, flag.removeprefix("--").replace("-", "_"))
        value = min(given) if isinstance(given, list) else given
        if value is not None and value < bound:
            raise ValueError(f"{flag} is {value}; it must be at least {bound}")
