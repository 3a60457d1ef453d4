"""Print parameters, multiply-adds and activations of models: ``sparseinst analyze --config-file NAME``."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparseinst.config.arguments import CONFIG_HELP, add_config_arguments, add_opts_argument
from sparseinst.engine.console import prepare_console, report_error, with_exit_codes

if TYPE_CHECKING:
    from sparseinst.benchmarks.complexity import Cost


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    several = f"{CONFIG_HELP}; several give a table with a line each"
    add_config_arguments(parser, nargs="+", metavar="NAME", help=several)
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"),
        help="size of the image before padding (default: a photograph of 480 x 640, resized by INPUT.MIN_SIZE_TEST)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts to FILE: a list, a dict per model")
    add_opts_argument(parser)
    return parser


@with_exit_codes()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, without data, weights or GPU. Return 0, or 1 where a model cannot be built or analyzed."""
    args = build_parser().parse_args(argv)
    prepare_console()
    import yaml

    from sparseinst.benchmarks.complexity import analyze_config
    from sparseinst.checkpoint.atomic_write import write_text_atomically
    from sparseinst.config import load_config

    # Avoids the warning about a missing GPU.
    opts = [*args.opts, "MODEL.DEVICE", "cpu"]
    found = []
    for config_file in args.config_file:
        try:
            cfg = load_config(config_file, opts, imports=args.imports)
            found.append((config_file, analyze_config(cfg, args.size)))
        # Detectron2's builders and registries raise any of these for wrong keys, and ImportError without timm.
        except (ValueError, KeyError, AssertionError, RuntimeError, ImportError, OSError, yaml.YAMLError) as error:
            message = str(error.args[0] if isinstance(error, KeyError) else error)
            return report_error(f"{config_file}: {message or type(error).__name__}")
    if len(found) == 1:
        modules = found[0][1].modules
        print(_table("part", {name: cost for name, cost in modules.items() if name} | {"total": modules[""]}))
    else:
        print(_table("model", {Path(name).stem: complexity.modules[""] for name, complexity in found}))
    print()
    sizes = sorted({complexity.size for _, complexity in found})
    for size in sizes:
        names = [Path(name).stem for name, complexity in found if complexity.size == size]
        models = f": {', '.join(names)}" if len(sizes) > 1 else ""
        print(f"One image of {size[0]} x {size[1]} pixels, padding included{models}")
    if args.json is not None:
        report = [
            {"config_file": name, "size": complexity.size, **complexity.modules[""]._asdict()}
            | {"parts": {part: cost._asdict() for part, cost in complexity.modules.items() if part}}
            | {"uncounted": complexity.uncounted}
            for name, complexity in found
        ]
        try:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(args.json, json.dumps(report, indent=2) + "\n")
        except OSError as error:
            return report_error(f"--json: {error}")
    return 0


def _table(heading: str, costs: dict[str, "Cost"]) -> str:
    from tabulate import tabulate

    rows = [[name, *(count / unit for count, unit in zip(cost, (1e6, 1e9, 1e6)))] for name, cost in costs.items()]
    headers = [heading, "parameters, M", "multiply-adds, G", "activations, M"]
    return tabulate(rows, headers=headers, floatfmt=("", ".2f", ".1f", ".1f"), tablefmt="github")


if __name__ == "__main__":
    sys.exit(main())
