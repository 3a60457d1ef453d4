"""Convert labelme, VIA, YOLO or mask files to a COCO json: ``python -m sparseinst.tools.to_coco SOURCE IMAGES ...``.

SOURCE is a folder of labelme files, a VIA project or a folder of them, a folder of YOLO segmentation labels, or a
folder of masks; the format is detected. Masks are named like their image: a.png, a_1.png or a/1.png for a.jpg. Each
value above 0 is an object; where a mask has one such value, or with --values classes, each connected region is an
object. With --values files each mask is one object, also in several parts.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from sparseinst.engine.console import prepare_console, with_exit_codes


def build_parser() -> argparse.ArgumentParser:
    """Return the command's argument parser."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", type=Path, help="folder or file of the annotations")
    add("images", type=Path, help="folder of the images")
    add("--output", type=Path, required=True, help="COCO json to write")
    add("--classes", nargs="+", default=[], help="all class names, in the model's order (default: as found)")
    add("--values", choices=("objects", "classes", "files"), default="objects", help="meaning of a mask's values")
    add("--max-image-pixels", type=int, default=200_000_000, metavar="N", help="as INPUT.MAX_IMAGE_PIXELS")
    return parser


@with_exit_codes()
def main(argv: list[str] | None = None) -> int:
    """Run the command with argv (default ``sys.argv``); return 0, or 1 after an error in arguments or files."""
    args = build_parser().parse_args(argv)
    prepare_console()
    from sparseinst.checkpoint.atomic_write import write_text_atomically
    from sparseinst.data.conversion import convert

    for path in (args.source, args.images):
        if not path.exists():
            raise ValueError(f"{path} does not exist")
    if args.output.exists():
        raise ValueError(f"{args.output} already exists; remove it, or change --output")
    content = convert(args.source, args.images, args.classes, values=args.values, max_pixels=args.max_image_pixels)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(args.output, json.dumps(content))
    counts = Counter(annotation["category_id"] for annotation in content["annotations"])
    shown = ", ".join(f"{category['name']} {counts[category['id']]}" for category in content["categories"])
    print(f"{args.output}: {len(content['annotations'])} objects ({shown}) in {len(content['images'])} images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
