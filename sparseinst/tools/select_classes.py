"""Select classes of a COCO json: ``python -m sparseinst.tools.select_classes JSON person --output person.json``.

All images stay, including those without an object of these classes, because an evaluation counts false positives there.
"""

import argparse
import json
import sys
from pathlib import Path

from sparseinst.engine.console import prepare_console, with_exit_codes


def select_classes(content: dict, names: list[str]) -> dict:
    """Return the same data set with these classes only.

    Args:
        content: COCO's instances format; not changed.
        names: of the categories to keep; their order and their ids stay those of ``content``.

    Returns:
        ``content`` with fewer ``categories`` and ``annotations``.

    Raises:
        ValueError: ``categories`` does not have a name.
    """
    present = [category["name"] for category in content["categories"]]
    unknown = [name for name in names if name not in present]
    if unknown:
        raise ValueError(f"The json has no class {', '.join(map(repr, unknown))}; it has {', '.join(present)}")
    categories = [category for category in content["categories"] if category["name"] in names]
    ids = {category["id"] for category in categories}
    annotations = [a for a in content.get("annotations", []) if a["category_id"] in ids]
    return {**content, "categories": categories, "annotations": annotations}


def build_parser() -> argparse.ArgumentParser:
    """Return the command's argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path, help="COCO json to read")
    parser.add_argument("classes", nargs="+", metavar="CLASS", help="names of the categories to keep")
    parser.add_argument("--output", type=Path, required=True, help="COCO json to write")
    return parser


@with_exit_codes()
def main(argv: list[str] | None = None) -> int:
    """Run the command with argv (default ``sys.argv``); return 0, or 1 after an error in arguments or files."""
    args = build_parser().parse_args(argv)
    prepare_console()
    from sparseinst.checkpoint.atomic_write import write_text_atomically
    from sparseinst.data.coco_json import load_checked_json

    if args.output.exists():
        raise ValueError(f"{args.output} already exists; remove it, or change --output")
    selected = select_classes(load_checked_json(args.json)[0], args.classes)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(args.output, json.dumps(selected))
    with_objects = len({annotation["image_id"] for annotation in selected["annotations"]})
    print(
        f"{args.output}: {len(selected['annotations'])} objects of {', '.join(args.classes)} in {with_objects} of "
        f"{len(selected['images'])} images"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
