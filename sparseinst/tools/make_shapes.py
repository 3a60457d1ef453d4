"""Write the drawn-shapes data set: ``python -m sparseinst.tools.make_shapes --output datasets/shapes``."""

import argparse
import json
import shutil
import sys
from functools import partial
from pathlib import Path

from tqdm import tqdm

from sparseinst.data.shapes import write_shapes_dataset

SETTINGS_FILE = "shapes_settings.json"
# Raised when the same settings come to give other data, so that an older data set is not taken for a new one.
_GENERATOR_VERSION = 2


def make_shapes(
    output_dir: Path, num_images: dict[str, int], seeds: dict[str, int], size: int, overwrite: bool = False
) -> bool:
    """Write every split below one folder, all or nothing.

    Args:
        output_dir: holds SPLIT.json and SPLIT/ of every split, and the settings.
        num_images: of each split.
        seeds: of each split.
        size: height and width of the images, pixels.
        overwrite: replace a data set that was made with other settings.

    Returns:
        False where the folder already holds what was asked for.

    Raises:
        ValueError: a number is out of range, or the folder holds anything else.
    """
    settings = {"generator": _GENERATOR_VERSION, "num_images": num_images, "seeds": seeds, "size": size}
    if output_dir.exists() and not _may_replace(output_dir, settings, overwrite):
        return False
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    partial_dir = output_dir.with_name(f".{output_dir.name}.partial")
    shutil.rmtree(partial_dir, ignore_errors=True)
    try:
        for split, count in num_images.items():
            bar = partial(tqdm, desc=f"{split} shapes", unit="image")
            write_shapes_dataset(partial_dir, count, seeds[split], size, split=split, progress=bar)
        (partial_dir / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")
        if output_dir.exists():
            shutil.rmtree(output_dir)
        partial_dir.rename(output_dir)
    finally:
        shutil.rmtree(partial_dir, ignore_errors=True)
    return True


def _may_replace(output_dir: Path, settings: dict, overwrite: bool) -> bool:
    """Whether to write the data set: False where it is there already."""
    if not output_dir.is_dir():
        raise ValueError(f"{output_dir} is not a folder; change --output")
    present = {path.name for path in output_dir.iterdir()}
    if not present:
        return True
    if SETTINGS_FILE not in present:
        raise ValueError(f"{output_dir} holds files that are not a data set of drawn shapes; change --output")
    found = json.loads((output_dir / SETTINGS_FILE).read_text())
    if found == settings:
        return False
    if not overwrite:
        raise ValueError(
            f"{output_dir} holds a data set made with {json.dumps(found)}, asked for is {json.dumps(settings)}; "
            "change --output or give --overwrite"
        )
    ours = {SETTINGS_FILE} | {name for split in found["num_images"] for name in (split, f"{split}.json")}
    if present - ours:
        raise ValueError(
            f"{output_dir} holds {sorted(present - ours)} beside the data set, --overwrite would delete them"
        )
    return True


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="python -m sparseinst.tools.make_shapes", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("datasets/shapes"), help="folder to write")
    parser.add_argument("--train", type=int, default=2000, help="images to train on")
    parser.add_argument("--val", type=int, default=200, help="images to evaluate on")
    parser.add_argument("--train-seed", type=int, default=0)
    parser.add_argument("--val-seed", type=int, default=1)
    parser.add_argument("--size", type=int, default=128, help="height and width of the images, pixels")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set made with other settings")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments after the program's name; ``sys.argv``'s where None.

    Returns:
        Exit code: 0, or 2 where the arguments or the folder do not allow it.
    """
    args = build_parser().parse_args(argv)
    num_images = {"train": args.train, "val": args.val}
    seeds = {"train": args.train_seed, "val": args.val_seed}
    try:
        written = make_shapes(args.output, num_images, seeds, args.size, args.overwrite)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{args.output}: {args.train} + {args.val} images{'' if written else ' (already there)'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
