"""Draw predictions on images, videos and the webcam: ``sparseinst demo --input photos/ --opts MODEL.WEIGHTS FILE``.

Reading, the model, and drawing with writing overlap. The last line reports how many images or frames per second the
demo processed, and how many the model alone processes, from a decoded image to masks on the host, measured while the
other stages ran. On an idle machine the second figure equals "end to end" of
``python -m sparseinst.tools.benchmark --size HEIGHT WIDTH --detections N`` with as many objects.
"""

import argparse
import sys
from pathlib import Path

from sparseinst.config.arguments import CONFIG_HELP, add_config_arguments, add_opts_argument
from sparseinst.data.image_formats import FORMATS
from sparseinst.engine.console import EXIT_NOT_RUN, prepare_console, with_exit_codes


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add_config_arguments(
        parser,
        required=False,
        default="",
        help=f"{CONFIG_HELP}; an exported file (--opts MODEL.WEIGHTS model.onnx) needs none",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="NAME",
                        help=f"images: files, folders, glob patterns; formats: {', '.join(FORMATS)}")  # fmt: skip
    source.add_argument("--video-input", metavar="FILE", help="a video: a file, or an address (rtsp://, http://)")
    source.add_argument(
        "--webcam",
        type=int,
        nargs="?",
        const=0,
        metavar="INDEX",
        help="a camera (default 0); ends by q or escape in the window, or by Ctrl-C",
    )
    add("--output", type=Path,
        help="folder for images; folder or .mp4 file for a video. Without it and without --json: a window")  # fmt: skip
    add("--confidence-threshold", type=float, default=0.5, help="lowest score that is drawn or written (default 0.5)")
    add("--json", type=Path, metavar="FILE",
        help="write COCO results to FILE, and the image of each image id to STEM_images.json")  # fmt: skip
    add("--ground-truth", type=Path, metavar="JSON", help="draw the objects of this COCO json next to the predictions")
    add("--show-iams", action="store_true", help="draw the activation maps of the instances too")
    add("--mask-nms", type=float, metavar="IOU",
        help="drop the worse of two masks of a class that overlap more than this (default: as configured)")  # fmt: skip
    add_opts_argument(parser)
    return parser


@with_exit_codes(EXIT_NOT_RUN)
def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments after the program's name; None: those of ``sys.argv``.

    Returns:
        Exit code: 0; 1 where an image or its ground truth could not be used, or a frame ended a video; 2 where the
        arguments, the config, the weights or the video prevent a run; 130 after Ctrl-C. All but 2 keep what was done.
    """
    args = build_parser().parse_args(argv)
    prepare_console()
    from sparseinst.tools.demo_run import run

    return run(args)


if __name__ == "__main__":
    sys.exit(main())
