"""What all benchmarks share: the models they run, the settings they compare, the figures they print."""

import platform
import resource
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import ImageList

# The node of the config that says how a network runs where nothing is trained.
INFERENCE = "MODEL.SPARSE_INST.INFERENCE"


@runtime_checkable
class InstanceSegmenter(Protocol):
    """A model in three stages; SparseInst is one, and so is an optimized copy of it.

    A model may also have ``draw_outputs(outputs, num_objects, median_area, generator)``, which returns outputs of its
    network with drawn objects in them, so that the time of its post-processing does not depend on the weights.
    """

    device: torch.device

    def preprocess(self, batched_inputs: list[dict]) -> ImageList:
        """Normalise and pad images."""

    def network(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run everything that depends on nothing but the padded images."""

    def postprocess(
        self, outputs: dict[str, torch.Tensor], batched_inputs: list[dict], images: ImageList
    ) -> list[dict]:
        """Make instances of the network's outputs."""


def check_segmenter(model: object) -> None:
    """Raise ValueError where a model does not run in the three stages of :class:`InstanceSegmenter`."""
    if not isinstance(model, InstanceSegmenter):
        raise ValueError(
            f"The model is a {type(model).__name__}, which lacks device, preprocess(), network() or "
            "postprocess(): MODEL.META_ARCHITECTURE must name a model that has them"
        )


def apply_setting(cfg: CfgNode, setting: str, named: Mapping[str, str], section: str) -> tuple[str, CfgNode, list[str]]:
    """Return a config with one of the settings of ``--compare`` in it.

    Args:
        cfg: not changed.
        setting: one of ``named``, or NAME='KEY VALUE ...'; keys are full names, or those below ``section``.
        named: KEY VALUE pairs by name.
        section: of the config, as "SOLVER".

    Returns:
        The setting's name, its config, which is not frozen, and the full names of the keys that it sets.

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
        keys = [key if key.partition(".")[0] in cfg else f"{section}.{key}" for key in words[::2]]
        own_cfg.merge_from_list([word for pair in zip(keys, words[1::2], strict=True) for word in pair])
    except (KeyError, AssertionError, ValueError) as error:
        raise ValueError(f"--compare {setting}: {error}") from error
    return name, own_cfg, keys


def check_least(values: Mapping[str, tuple[float, float]]) -> None:
    """Raise ValueError where the value of a flag is below its least value; ``values`` has (value, least) by flag."""
    for flag, (value, least) in values.items():
        if value < least:
            raise ValueError(f"{flag} is {value}; it must be at least {least}")


def machine(cfg: CfgNode) -> str:
    """Return the name of the processor or GPU that MODEL.DEVICE means, and PyTorch's version."""
    if cfg.MODEL.DEVICE.startswith("cuda"):
        device = torch.cuda.get_device_name(torch.device(cfg.MODEL.DEVICE))
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.is_file() else []
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        device = f"{[*models, platform.processor() or platform.machine()][0]}, {torch.get_num_threads()} threads"
    return f"{device}, PyTorch {torch.__version__.partition('+')[0]}"


def summarize(seconds: np.ndarray) -> dict[str, float]:
    """Return median, 5th and 95th percentile in milliseconds."""
    low, median, high = 1e3 * np.percentile(seconds, [5, 50, 95])
    return {"median_ms": float(median), "p5_ms": float(low), "p95_ms": float(high)}


def interval(seconds: np.ndarray) -> str:
    """Return median, 5th and 95th percentile in milliseconds as text."""
    summary = summarize(seconds)
    return f"{summary['median_ms']:.1f} ({summary['p5_ms']:.1f}, {summary['p95_ms']:.1f})"


def ratio(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Return median and percentiles of first over second, repetition by repetition."""
    low, median, high = np.percentile(first / second, [5, 50, 95])
    return {"median": float(median), "p5": float(low), "p95": float(high)}


def resident_bytes(entry: str = "VmHWM") -> int:
    """Return the process's resident memory: "VmRSS" now, "VmHWM" at most so far; without /proc at most so far."""
    status = Path("/proc/self/status")
    if not status.is_file():
        # Of macOS, in bytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # getrusage would include the parent's memory before exec.
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(f"{entry}:"))
    return int(line.split()[1]) * 1024
