"""What the benchmark commands compare: settings that are named, or given as KEY VALUE pairs."""

import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode


def apply_setting(
    cfg: CfgNode, setting: str, named: Mapping[str, str], section: str, others: Sequence[str] = ()
) -> tuple[str, CfgNode, list[str]]:
    """A config with one of the settings of ``--compare`` in it.

    Args:
        cfg: not changed.
        setting: one of ``named``, or NAME='KEY VALUE ...'; keys are whole ones, or those below ``section``.
        named: KEY VALUE pairs by name.
        section: of the config, as "SOLVER".
        others: further names that the command knows; for the message.

    Returns:
        The setting's name, its config, which is not frozen, and the whole keys that it sets.

    Raises:
        ValueError: no such setting, no such key, or a value of the wrong type.
    """
    name, is_own, text = setting.partition("=")
    if not is_own and name not in named:
        raise ValueError(f"--compare {name}: there are {', '.join([*others, *named])}, and NAME='KEY VALUE'")
    own_cfg = cfg.clone()
    own_cfg.defrost()
    try:
        words = shlex.split(text if is_own else named[name])
        keys = [key if key.partition(".")[0] in cfg else f"{section}.{key}" for key in words[::2]]
        own_cfg.merge_from_list([word for pair in zip(keys, words[1::2], strict=True) for word in pair])
    except (KeyError, AssertionError, ValueError) as error:
        raise ValueError(f"--compare {setting}: {error}") from error
    return name, own_cfg, keys


def machine(cfg: CfgNode) -> str:
    """What it runs on, and PyTorch's version."""
    if cfg.MODEL.DEVICE.startswith("cuda"):
        device = torch.cuda.get_device_name(torch.device(cfg.MODEL.DEVICE))
    else:
        device = f"{_processor()}, {torch.get_num_threads()} threads"
    return f"{device}, PyTorch {torch.__version__.partition('+')[0]}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
