"""Parameters, multiply-adds and activations of models: ``python -m sparseinst.tools.analyze_model --help``."""

import argparse
import json
import sys
from pathlib import Path

import yaml
from tabulate import tabulate

from sparseinst.config import load_config
from sparseinst.engine.analysis import Analysis, Cost, analyze_config


def parts_table(analysis: Analysis) -> str:
    """One model's parts as a markdown table, with the decoder's sum and the total."""
    costs = dict(analysis.parts)
    decoder_costs = [cost for name, cost in costs.items() if name.startswith("decoder: ")]
    costs |= {"decoder": Cost(*map(sum, zip(*decoder_costs))), "total": analysis.total}
    return _table("part", costs)


def models_table(analyses: dict[str, Analysis]) -> str:
    """Several models' totals, by name, as a markdown table."""
    return _table("model", {name: analysis.total for name, analysis in analyses.items()})


def _table(heading: str, costs: dict[str, Cost]) -> str:
    rows = [
        [name, cost.parameters / 1e6, cost.multiply_adds / 1e9, cost.activations / 1e6] for name, cost in costs.items()
    ]
    headers = [heading, "parameters, M", "multiply-adds, G", "activations, M"]
    return tabulate(rows, headers=headers, floatfmt=("", ".2f", ".1f", ".1f"), tablefmt="github")


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="python -m sparseinst.tools.analyze_model", description=__doc__)
    parser.add_argument(
        "--config-file",
        required=True,
        nargs="+",
        metavar="NAME",
        help="YAML file, or the name of one that comes with the package; of several, a table with one line each",
    )
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of the image, before padding (default: a photograph of 480 x 640 as the config's tests resize it)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the counts to FILE, a list with a dict a model"
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides, last"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command. No data and no weights are read, and nothing runs on a GPU.

    Args:
        argv: the arguments after the program's name; ``sys.argv``'s where None.

    Returns:
        Exit code: 0, or 1 where a config does not give a model that can be analysed.
    """
    args = build_parser().parse_args(argv)
    # Here it is no news that there is no GPU.
    opts = [*args.opts, "MODEL.DEVICE", "cpu"]
    analyses: dict[str, Analysis] = {}
    for config_file in args.config_file:
        try:
            analyses[config_file] = analyze_config(load_config(config_file, opts), args.size)
        # Detectron2's builders and registries tell of wrong keys by any of these; ImportError: timm is missing.
        except (ValueError, KeyError, AssertionError, RuntimeError, ImportError, OSError, yaml.YAMLError) as error:
            message = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
            print(f"error: {config_file}: {message or type(error).__name__}", file=sys.stderr)
            return 1

    if len(analyses) == 1:
        print(parts_table(*analyses.values()))
    else:
        print(models_table({Path(name).stem: analysis for name, analysis in analyses.items()}))
    print()
    sizes = sorted({analysis.size for analysis in analyses.values()})
    for size in sizes:
        names = [Path(name).stem for name, analysis in analyses.items() if analysis.size == size]
        of_whom = f": {', '.join(names)}" if len(sizes) > 1 else ""
        print(f"One image of {size[0]} x {size[1]} pixels, padding included{of_whom}")
    for name, analysis in analyses.items():
        if analysis.uncounted:
            print(f"warning: {name}: counted as zero: {', '.join(analysis.uncounted)}", file=sys.stderr)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps([_as_dict(*item) for item in analyses.items()], indent=2) + "\n")
    return 0


def _as_dict(name: str, analysis: Analysis) -> dict:
    return {
        "config_file": name,
        "size": analysis.size,
        **analysis.total._asdict(),
        "parts": {part: cost._asdict() for part, cost in analysis.parts.items()},
        "uncounted": analysis.uncounted,
    }


if __name__ == "__main__":
    sys.exit(main())
