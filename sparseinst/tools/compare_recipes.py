"""Train recipes on data sets for equal times, and print a table of their AP.

    python -m sparseinst.tools.compare_recipes --minutes 10 --seeds 1 2 3 \\
        --data nuclei nuclei/train.json nuclei/images nuclei/val.json nuclei/images \\
        --recipe "recipe: small_data/efficientnet_lite0" \\
        --recipe "Mask R-CNN: small_data/mask_rcnn" \\
        --output output/comparison

Each recipe gets the iterations that fit into the time, measured by a short training on the same data, or those of
--iterations; its steps are scaled to them, and a warm-up of more than half of them. With several --minutes, --plot
draws AP over time. Each training runs in a process of one thread; evaluations do not count. Runs that have results
are not repeated, interrupted ones are continued, and the command can be given again with more times, seeds, recipes
or data. A changed recipe or json is refused; changed images, modules of --import or versions of this package are not
noticed.
"""

import argparse
import hashlib
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from sparseinst.config.arguments import add_import_argument, check_least
from sparseinst.engine.console import EXIT_NOT_RUN, prepare_console, with_exit_codes

# Iterations of the training that measures the time of one.
PACE_ITERATIONS = 40
FIGURES = ("AP", "AP50", "AP75")
# Output of a run.
CONSOLE = "console.txt"
# Of a recipe on a data set.
SETTINGS = "settings.json"


class Data(NamedTuple):
    """A data set: its name, and the arguments of the training command."""

    name: str
    arguments: list[str]


class Recipe(NamedTuple):
    """A config with overrides: its name in the table, config file, and KEY VALUE pairs."""

    name: str
    config_file: str
    overrides: list[str]


class Run(NamedTuple):
    """One training; its minutes are None where --iterations is given."""

    data: Data
    recipe: Recipe
    minutes: float | None
    seed: int


def build_parser() -> argparse.ArgumentParser:
    """Return the command's argument parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--data",
        action="append",
        required=True,
        nargs="+",
        metavar="NAME TRAIN_JSON TRAIN_IMAGES [TEST_JSON TEST_IMAGES]",
        help="a data set; without test data, a quarter of the images is held out (--val-share 0.25); can be repeated",
    )
    add(
        "--recipe",
        action="append",
        required=True,
        metavar="'NAME: CONFIG [KEY VALUE ...]'",
        help="a config file or its name, with overrides; can be repeated",
    )
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N", help="default: 1 2 3")
    add(
        "--minutes",
        type=float,
        nargs="+",
        default=[10.0],
        help="of training, for each run; default 10",
    )
    add("--iterations", type=int, metavar="N", help="of each run, in place of --minutes")
    add("--jobs", type=int, default=2, metavar="N", help="runs at the same time (default 2)")
    add_import_argument(parser)
    add("--plot", type=Path, metavar="PNG", help="draw AP over the minutes of training, with the range of the seeds")
    add("--output", required=True, type=Path, metavar="FOLDER", help="gets a folder for each run, and comparison.json")
    return parser


def parse_data(values: Sequence[str]) -> Data:
    """Return the data set of one ``--data``. Raise ValueError on another number of values."""
    if len(values) not in (3, 5):
        raise ValueError(f"--data {shlex.join(values)}: {len(values)} values; expected 3 or 5, see --help")
    flags = ["--train-json", "--train-images", "--test-json", "--test-images"][: len(values) - 1]
    arguments = [part for pair in zip(flags, values[1:]) for part in pair]
    return Data(values[0], arguments if len(values) == 5 else [*arguments, "--val-share", "0.25"])


def parse_recipe(value: str) -> Recipe:
    """Return the recipe of one ``--recipe``. Raise ValueError where a name or a value is missing."""
    name, found, rest = value.partition(":")
    config_file, *overrides = shlex.split(rest) or [""]
    if not found or not name.strip() or not config_file or len(overrides) % 2:
        raise ValueError(f"--recipe {value!r}: expected 'NAME: CONFIG [KEY VALUE ...]'")
    return Recipe(name.strip(), config_file, overrides)


class Comparison:
    """Trainings of every recipe on every data set with every seed, in one folder.

    Args:
        data, recipes, minutes, seeds: whose combinations are trained; repeated minutes and seeds count once.
        folder: gets DATA/RECIPE/MINUTESmin/seedN or DATA/RECIPE/ITERATIONSit/seedN for each run.
        iterations: of one training, in place of the minutes.
        imports: modules that the recipes need.

    Raises:
        ValueError: two runs have the same folder.
    """

    def __init__(
        self,
        data: Sequence[Data],
        recipes: Sequence[Recipe],
        minutes: Sequence[float],
        seeds: Sequence[int],
        folder: Path,
        iterations: int | None = None,
        imports: Sequence[str] = (),
    ) -> None:
        lengths = [None] if iterations is not None else sorted(set(minutes))
        # Seeds last, so that a table of all recipes is there early.
        self.runs = [
            Run(one, recipe, length, seed)
            for seed in dict.fromkeys(seeds)
            for length in lengths
            for one in data
            for recipe in recipes
        ]
        self.folder, self._iterations, self._imports = folder, iterations, imports
        # Folders of recipes whose time could not be measured.
        self._failed: set[Path] = set()
        folders = Counter(map(self.folder_of, self.runs))
        if shared := [str(path) for path, count in folders.items() if count > 1]:
            raise ValueError(f"{shared[0]} belongs to several runs; give each --data and each --recipe another name")

    def folder_of(self, run: Run) -> Path:
        """Return the OUTPUT_DIR of a run."""
        length = f"{self._iterations}it" if run.minutes is None else f"{run.minutes:g}min"
        return self._recipe_folder(run) / length / f"seed{run.seed}"

    def _recipe_folder(self, run: Run) -> Path:
        return self.folder / run.data.name / run.recipe.name.replace(" ", "_")

    def record_settings(self) -> None:
        """Write the settings of each recipe on each data set into its folder, before anything is trained.

        Raises:
            ValueError: a config is wrong, or a folder holds runs whose settings are others or unknown.
            ImportError: a config needs a package that is not installed.
            OSError: a json cannot be read, or a folder cannot be written to.
        """
        from sparseinst.checkpoint import write_text_atomically

        folders = {self._recipe_folder(run): run for run in self.runs}
        settings = {folder: self._settings(run) for folder, run in folders.items()}
        # All are checked before the first one is written.
        for folder, new in settings.items():
            _check_settings(folder, new)
        for folder, new in settings.items():
            folder.mkdir(parents=True, exist_ok=True)
            write_text_atomically(folder / SETTINGS, json.dumps(new, indent=2) + "\n")

    def _settings(self, run: Run) -> dict[str, str]:
        """Return what the figures of a recipe on a data set depend on: arguments, content of the jsons, config."""
        from sparseinst import load_config
        from sparseinst.config.explicit import keys_of
        from sparseinst.config.model_keys import value

        cfg = load_config(run.recipe.config_file, run.recipe.overrides, imports=self._imports)
        arguments = run.data.arguments
        jsons = [path for flag, path in zip(arguments[::2], arguments[1::2]) if flag.endswith("-json")]
        digests = {f"SHA-256 of {path}": hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in jsons}
        # --import is given for all recipes, and only one of them may need it.
        keys = {key: str(value(cfg, key)) for key in keys_of(cfg) if key != "IMPORTS"}
        return {"data": shlex.join(arguments), **digests, **keys}

    def train_all(self, jobs: int) -> int:
        """Train what has no results yet, ``jobs`` runs at a time. Return how many runs failed."""
        waiting = [run for run in self.runs if self.figures(run) is None]
        start, failed = time.monotonic(), 0
        # The iterations of a recipe on a data set are measured in parallel, as the trainings run.
        with ThreadPoolExecutor(jobs) as pool:
            pairs = {(run.data.name, run.recipe.name): run for run in waiting}
            list(pool.map(self.iterations, pairs.values()))
            # Minutes of training; with --iterations all runs count the same.
            lengths = [run.minutes or 1 for run in waiting]
            for index, (run, error) in enumerate(zip(waiting, pool.map(self._train, waiting)), 1):
                elapsed = time.monotonic() - start
                left = elapsed / sum(lengths[:index]) * sum(lengths[index:]) / 60
                failed += bool(error)
                figures = error or "AP {:.1f}, AP50 {:.1f}, AP75 {:.1f}".format(*self.figures(run))
                print(f"[{index}/{len(waiting)}, {left:.0f} min left] {self.folder_of(run)}: {figures}", flush=True)
        return failed

    def iterations(self, run: Run) -> int:
        """Return the iterations of a recipe that fit into the time on a data set; measured once. 0: it cannot train."""
        if run.minutes is None:
            return self._iterations
        folder = self._recipe_folder(run)
        path = folder / "pace.json"
        if folder in self._failed:
            return 0
        if not path.is_file():
            overrides = ["SOLVER.MAX_ITER", PACE_ITERATIONS, "SOLVER.STEPS", "()", "DATASETS.TEST", "()"]
            arguments = run.data.arguments[:4]
            # Start again: an interrupted measurement may have no times.
            shutil.rmtree(folder / "pace", ignore_errors=True)
            error = self._run_training(run, folder / "pace", arguments, overrides)
            seconds = _seconds_of_iteration(folder / "pace")
            if error or math.isnan(seconds):
                self._failed.add(folder)
                return 0
            path.write_text(json.dumps({"seconds": seconds}))
        return max(1, round(60 * run.minutes / json.loads(path.read_text())["seconds"]))

    def figures(self, run: Run) -> tuple[float, ...] | None:
        """Return AP, AP50 and AP75 of the masks of a finished run, in percent; None of another one."""
        path = self.folder_of(run) / "results.json"
        if not path.is_file():
            return None
        results = json.loads(path.read_text())["results"].get("segm", {})
        return tuple(results.get(name, math.nan) for name in FIGURES)

    def measured_minutes(self, run: Run) -> float:
        """Return how long the iterations of a finished run took: their mean time, times their number; or NaN."""
        return self.iterations(run) * _seconds_of_iteration(self.folder_of(run)) / 60

    def print_limits(self) -> None:
        """Print a line for each data set where AP counts more detections of an image for some recipes than for others.

        A run's own config is read where it exists, because a training raises the limit for crowded data.
        """
        from sparseinst import config, load_config
        from sparseinst.evaluation.coco_evaluation import MAX_DETECTIONS

        limits: dict[str, dict[str, tuple[int, str]]] = {}
        for run in self.runs:
            found, recipe = limits.setdefault(run.data.name, {}), run.recipe
            if recipe.name not in found:
                saved = self.folder_of(run) / "config.yaml"
                given = (str(saved),) if saved.is_file() else (recipe.config_file, recipe.overrides)
                key, most = config.max_detections(load_config(*given, imports=self._imports)) or ("no key", 0)
                found[recipe.name] = max(most, MAX_DETECTIONS), key
        for data, found in limits.items():
            if len({limit for limit, _ in found.values()}) > 1:
                counts = ", ".join(f"{limit} of {name} ({key})" for name, (limit, key) in found.items())
                print(f"Note: on {data}, AP counts the best detections of an image: {counts}. For a fair comparison, "
                      "set these keys to one value", flush=True)  # fmt: skip

    def table(self) -> tuple[list[dict], str]:
        """Return the means over the finished seeds of each recipe and data set, as rows and as a Markdown table."""
        groups: dict[tuple, list[Run]] = {}
        for run in self.runs:
            if self.figures(run):
                groups.setdefault((run.data.name, run.recipe.name, run.minutes), []).append(run)
        order = list(dict.fromkeys((run.data.name, run.recipe.name, run.minutes) for run in self.runs))
        rows = []
        for group in sorted(groups, key=lambda group: (order.index((*group[:2], order[0][2])), group[2] or 0)):
            runs = groups[group]
            figures = {name: [self.figures(run)[index] for run in runs] for index, name in enumerate(FIGURES)}
            names = dict(zip(("data", "recipe", "minutes"), group))
            measured = {"measured_minutes": [round(self.measured_minutes(run), 2) for run in runs]}
            counts = {"iterations": self.iterations(runs[0]), "seeds": [run.seed for run in runs]}
            rows.append({**names, **measured, **counts, **figures})
        lines = ["| data | recipe | minutes | measured | iterations | AP | AP50 | AP75 |", "|---" * 8 + "|"]
        for row in rows:
            cells = [f"{statistics.mean(row[name]):.1f}" for name in FIGURES]
            cells[0] += f" ({', '.join(f'{value:.1f}' for value in row['AP'])})"
            minutes = "" if row["minutes"] is None else f"{row['minutes']:g}"
            times = f"{minutes} | {statistics.mean(row['measured_minutes']):.1f}"
            lines.append(f"| {row['data']} | {row['recipe']} | {times} | {row['iterations']} | {' | '.join(cells)} |")
        return rows, "\n".join(lines)

    def _train(self, run: Run) -> str:
        """Train and evaluate one run. Return an empty text, or what went wrong."""
        iterations = self.iterations(run)
        if not iterations:
            return f"no time of an iteration, see {self._recipe_folder(run) / 'pace' / CONSOLE}"
        return self._run_training(run, self.folder_of(run), run.data.arguments, self._schedule(run.recipe, iterations))

    def _schedule(self, recipe: Recipe, iterations: int) -> list[object]:
        from sparseinst import load_config

        solver = load_config(recipe.config_file, recipe.overrides, imports=self._imports).SOLVER
        scale, warmup = iterations / solver.MAX_ITER, solver.WARMUP_ITERS
        steps = tuple(sorted({at for step in solver.STEPS if 0 < (at := round(step * scale)) < iterations}))
        warmup = round(min(1, scale) * warmup) if 2 * warmup > iterations else warmup
        return ["SOLVER.MAX_ITER", iterations, "SOLVER.STEPS", str(steps), "SOLVER.WARMUP_ITERS", warmup]

    def _run_training(self, run: Run, folder: Path, arguments: Sequence[str], overrides: Sequence[object]) -> str:
        command = [sys.executable, "-m", "sparseinst.tools.train_net", "--config-file", run.recipe.config_file]
        fixed = ["OUTPUT_DIR", folder, "SEED", run.seed, "DATALOADER.NUM_WORKERS", 0, "TEST.EVAL_PERIOD", 0]
        command += [part for name in self._imports for part in ("--import", name)]
        command += ["--resume", *arguments, *run.recipe.overrides, *overrides, *fixed]
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / CONSOLE, "a") as console:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            code = subprocess.call(list(map(str, command)), stdout=console, stderr=console, env=environment)
        return f"exit code {code}, see {folder / CONSOLE}" if code else ""


def _check_settings(folder: Path, settings: dict[str, str]) -> None:
    """Raise ValueError where a folder holds runs whose settings are others or unknown."""
    from sparseinst.data.json_file import read_json

    path = folder / SETTINGS
    # Each training writes a json before its first iteration.
    if all(file == path for file in folder.rglob("*.json")):
        return
    remedy = f"Give --recipe or --data another name, choose another --output, or delete {folder}"
    if not path.is_file():
        raise ValueError(
            f"{folder} holds runs without {SETTINGS}, which earlier versions did not write: their recipe and data are "
            f"unknown. {remedy}. If recipe and data have not changed, write {{}} into {path} to keep the runs"
        )
    for key, old in read_json(path).items():
        # Only one of two versions, or of two lists of --import, may have a key.
        if (new := settings.get(key, old)) != old:
            raise ValueError(f"{folder} holds runs with {key} {old}, but this command has {new}. {remedy}")


def _seconds_of_iteration(folder: Path) -> float:
    """Return the mean time of the iterations of a training; NaN without one, as after fewer than three iterations."""
    from sparseinst.engine.metrics_file import METRICS_FILE, read_metrics

    times = [entry["mean_time"] for entry in read_metrics(folder / METRICS_FILE) if "mean_time" in entry]
    return times[-1] if times else math.nan


@with_exit_codes(EXIT_NOT_RUN)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0; 1 where a run failed; 2 where the arguments are wrong or a file cannot be written."""
    args = build_parser().parse_args(argv)
    prepare_console()
    comparison = _checked_comparison(args)
    comparison.print_limits()
    failed = comparison.train_all(args.jobs)
    rows, table = comparison.table()
    (args.output / "comparison.json").write_text(json.dumps({"rows": rows}, indent=2) + "\n")
    print(table)
    comparison.print_limits()
    if args.plot and rows:
        from sparseinst.visualization.plots import draw_ap_over_time

        args.plot.write_bytes(draw_ap_over_time(rows))
    return 1 if failed else 0


def _checked_comparison(args: argparse.Namespace) -> Comparison:
    """Return the comparison of a command line, and make the folders of its output.

    Raises:
        ValueError: the arguments or a config are wrong.
        ImportError: a config needs a package that is not installed.
        OSError: a json cannot be read, or a folder cannot be made.
    """
    data, recipes = list(map(parse_data, args.data)), list(map(parse_recipe, args.recipe))
    check_least(args, {"--iterations": 1, "--jobs": 1, "--seeds": 0})
    for minutes in args.minutes:
        if not 0 < minutes < math.inf:
            raise ValueError(f"--minutes is {minutes:g}; it must be above 0, and finite")
    if args.plot and args.iterations is not None:
        raise ValueError("--plot draws AP over --minutes; remove --iterations")
    if args.plot and args.plot.is_dir():
        raise ValueError(f"--plot {args.plot} is a folder")
    comparison = Comparison(data, recipes, args.minutes, args.seeds, args.output, args.iterations, imports=args.imports)
    comparison.record_settings()
    for folder in [args.output, *([args.plot.parent] if args.plot else [])]:
        folder.mkdir(parents=True, exist_ok=True)
    return comparison


if __name__ == "__main__":
    sys.exit(main())
