"""Find the checkpoints of OUTPUT_DIR that --resume continues from."""

import re
from collections.abc import Collection
from pathlib import Path

from sparseinst.checkpoint.files import WeightsFileError, read_weights_file

RECORD = "last_checkpoint"


def find_checkpoint(folder: str | Path, tried: Collection[Path] = ()) -> tuple[Path | None, str]:
    """Find the checkpoint to resume from: the one that ``last_checkpoint`` names, else that of the highest iteration.

    File times are not read: copies and clocks change them.

    Args:
        folder: of the checkpoints.
        tried: checkpoints that cannot be read.

    Returns:
        The path, None without another checkpoint; and the reason of the choice where ``last_checkpoint`` is
        missing or wrong, else "".
    """
    folder = Path(folder)
    record = folder / RECORD
    try:
        name = record.read_text(encoding="utf-8").strip()
        problem = f"names {name[:100]!r}, but its folder has no such file"
    except (OSError, UnicodeDecodeError) as error:
        name = ""
        problem = "is missing" if isinstance(error, FileNotFoundError) else "cannot be read"
    is_recorded = bool(name) and _is_file(folder / name)
    if is_recorded and folder / name not in tried:
        return folder / name, ""
    found = {path: _iteration(path) for path in folder.glob("model_*.pth") if path not in tried and _is_file(path)}
    if not found:
        return None, ""
    # The final checkpoint has the iteration of the last periodic one.
    newest = max(found, key=lambda path: (found[path], path.name))
    if is_recorded:
        return newest, ""
    return newest, f"{record} {problem}: {newest.name} is taken, which holds the highest iteration, {found[newest]}"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long a name, a circular link, a zero byte
        return False


def _iteration(path: Path) -> int:
    """Return the iteration after which a checkpoint was saved; -1 where it has none or cannot be read."""
    if numbered := re.fullmatch(r"model_(\d{7})\.pth", path.name):
        return int(numbered[1])
    try:
        content = read_weights_file(path).content
    except WeightsFileError:
        return -1
    iteration = content.get("iteration") if isinstance(content, dict) else None
    return iteration if type(iteration) is int else -1
