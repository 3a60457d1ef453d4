"""Shared by all benchmarks: settings to compare, checks of them, measurements, tables, and how a command runs."""

import argparse
import contextlib
import json
import logging
import platform
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from tabulate import tabulate
from torch import nn

from sparseinst.checkpoint.atomic_write import write_text_atomically
from sparseinst.config.arguments import check_least
from sparseinst.engine.console import report_error
from sparseinst.engine.run_setup import log_to_console
from sparseinst.modeling.meta_arch import InstanceSegmenter
from sparseinst.runtime.optimize import OptimizedSegmenter

# Spin until the parent has ended, also where the parent is killed.
_SPIN = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(10**6))"


def check_segmenter(model: nn.Module) -> None:
    """Raise ValueError where a model is neither an InstanceSegmenter nor an optimized copy of one."""
    if not isinstance(model, InstanceSegmenter | OptimizedSegmenter):
        raise ValueError(f"MODEL.META_ARCHITECTURE is {type(model).__name__}; expected an InstanceSegmenter")


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return the last parts of each path, as few as distinguish it from the other paths."""

    def name(path: Path) -> str:
        for count in range(1, len(path.parts) + 1):
            end = path.parts[-count:]
            if sum(other.parts[-count:] == end for other in paths) == 1:
                return Path(*end).as_posix()
        return path.as_posix()

    return [name(path) for path in paths]


def check_distinct(flag: str, names: Sequence[str]) -> None:
    """Raise ValueError where a name is given twice: the figures of one would replace those of the other."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"{flag}: {', '.join(repeated)} is given more than once; each needs a name of its own")


def apply_setting(cfg: CfgNode, setting: str, named: Mapping[str, str], section: str) -> tuple[str, CfgNode, list[str]]:
    """Return a config with one of the settings of ``--compare``.

    Args:
        cfg: not changed.
        setting: one of ``named``, or NAME='KEY VALUE ...'; keys are full names, or those below ``section``.
        named: KEY VALUE pairs by name.
        section: of the config, as "SOLVER".

    Returns:
        The name of the setting, its config (not frozen), and the full names of the keys that it sets.

    Raises:
        ValueError: an unknown setting, an unknown key, or a value of the wrong type.
    """
    name, is_own, text = setting.partition("=")
    if not is_own and name not in named:
        raise ValueError(f"--compare {name}: there are {', '.join(named)}, and NAME='KEY VALUE'")
    own_cfg = cfg.clone()
    own_cfg.defrost()
    try:
        words = shlex.split(text if is_own else named[name])
        if len(words) % 2:
            raise ValueError(f"expected NAME='KEY VALUE ...', such as mine='{section}.KEY VALUE'; found {text!r}")
        keys = [key if key.partition(".")[0] in cfg else f"{section}.{key}" for key in words[::2]]
        own_cfg.merge_from_list([word for pair in zip(keys, words[1::2]) for word in pair])
    except (KeyError, AssertionError, ValueError) as error:
        raise ValueError(f"--compare {setting}: {error}") from error
    return name, own_cfg, keys


def machine(cfg: CfgNode) -> str:
    """Return the name of the processor or GPU of MODEL.DEVICE, and PyTorch's version."""
    if cfg.MODEL.DEVICE.startswith("cuda"):
        device = torch.cuda.get_device_name(torch.device(cfg.MODEL.DEVICE))
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.is_file() else []
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        device = f"{[*models, platform.processor() or platform.machine()][0]}, {torch.get_num_threads()} threads"
    return f"{device}, PyTorch {torch.__version__.partition('+')[0]}"


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Run processes that spin, on the processors of this one, in a with statement."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            process = subprocess.Popen([sys.executable, "-I", "-S", "-c", _SPIN])
            stack.callback(process.wait)
            stack.callback(process.kill)
        yield


class Measurement(NamedTuple):
    """The time and memory of one setting.

    Attributes:
        stages: seconds (repetitions,) by stage.
        totals: seconds (repetitions,).
        batch_size: images in a repetition.
        peak_bytes: largest memory use; None: not measured.
        more: further figures of the command, by name.
    """

    stages: dict[str, np.ndarray]
    totals: np.ndarray
    batch_size: int
    peak_bytes: int | None
    more: dict[str, Any]


def report(measurements: Mapping[str, Measurement]) -> dict[str, dict]:
    """Return the figures of each setting, for a JSON file. Ratios are relative to the first setting."""
    baseline = next(iter(measurements.values())).totals
    return {
        name: {
            **{stage: percentiles(1e3 * seconds, "_ms") for stage, seconds in measured.stages.items()},
            **measured.more,
            "images_per_second": measured.batch_size / float(np.median(measured.totals)),
            "peak_mb": None if measured.peak_bytes is None else measured.peak_bytes / 2**20,
            "times_as_fast_as_first": percentiles(baseline / measured.totals),
        }
        for name, measured in measurements.items()
    }


def table(figures: Mapping[str, dict]) -> str:
    """Return the figures of `report` as a table, times in ms: median (5th, 95th percentile)."""
    first = next(iter(figures))
    rows = [
        [key.replace("_", " ").replace("as first", f"as {first}"), *(_cell(each[key]) for each in figures.values())]
        for key in figures[first]
    ]
    return tabulate(rows, headers=["", *figures], tablefmt="github", disable_numparse=True)


def percentiles(values: np.ndarray, unit: str = "") -> dict[str, float]:
    """Return the median, the 5th and the 95th percentile."""
    low, median, high = np.percentile(values, [5, 50, 95])
    return {f"median{unit}": float(median), f"p5{unit}": float(low), f"p95{unit}": float(high)}


def _cell(value: Any) -> str:
    if value is None:
        return "not measured"
    if not isinstance(value, dict):
        return f"{value:.2f}"
    if "median" in value or "median_ms" in value:
        digits = 1 if "median_ms" in value else 2
        median, low, high = (f"{figure:.{digits}f}" for figure in value.values())
        return f"{median} ({low}, {high})"
    return ", ".join(f"{name} {figure:.1f}" for name, figure in value.items())


def run_command(
    args: argparse.Namespace, run: Callable[[argparse.Namespace], Any], errors: tuple[type[Exception], ...] = ()
) -> int:
    """Call ``run``, and write its result to --json. Return 0; 1 after one of ``errors``."""
    log_to_console(logging.WARNING)
    try:
        check_least(args, {"--threads": 1})
        torch.set_num_threads(args.threads or torch.get_num_threads())
        figures = run(args)
        if getattr(args, "json", None) is not None:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(args.json, json.dumps(figures, indent=1) + "\n")
    except errors as error:
        return report_error(error)
    return 0
