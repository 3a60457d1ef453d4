"""Run a command by name: ``sparseinst train --help``, or ``python -m sparseinst train --help``."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import sparseinst


class Command(NamedTuple):
    """A command of sparseinst/tools.

    Attributes:
        module: in sparseinst.tools.
        help: one line.
        arguments: arguments that the name stands for.
    """

    module: str
    help: str
    arguments: tuple[str, ...] = ()


COMMANDS = {
    "train": Command("train_net", "train a model, and evaluate it"),
    "eval": Command("train_net", "evaluate a trained model (train --eval-only)", ("--eval-only",)),
    "demo": Command("demo", "draw predictions on images, videos or a webcam, or write them as COCO results"),
    "predict": Command("predict", "write the predictions of many images as JSON lines; resumable, on many machines"),
    "check": Command("check_dataset", "find every problem in a COCO json and its images"),
    "to-coco": Command("to_coco", "convert labelme, VIA, YOLO or mask files to a COCO json"),
    "select": Command("select_classes", "copy a COCO json with some of its classes"),
    "shapes": Command("make_shapes", "draw the data set of the quickstart"),
    "zoo": Command("zoo", "list or download published checkpoints"),
    "serve": Command("serve", "serve a model: a page for people, POST /predict for programs"),
    "convert": Command("convert_weights", "describe a weights file, or convert it to a Detectron2 checkpoint"),
    "export": Command("export", "export a model to ONNX, OpenVINO, TensorRT or torch.export, and check the file"),
    "analyze": Command("analyze_model", "count parameters, multiply-adds and activations"),
    "compare": Command("compare_recipes", "train recipes for equal times, and print a table of their AP"),
    "benchmark": Command("benchmark", "time a model stage by stage"),
    "benchmark-video": Command("benchmark_video", "compare the speed of demo or predict with the model's"),
    "benchmark-training": Command("benchmark_training", "time training steps"),
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's name; the command parses its own arguments."""
    names = "\n".join(f"  {name:<20}{command.help}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="sparseinst",
        usage="%(prog)s COMMAND ...",
        description="Real-time instance segmentation. `sparseinst COMMAND --help` describes a command.",
        epilog=f"commands:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sparseinst {sparseinst.__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int | None:
    """Run the command that the first argument names, and return its exit code; None: 0."""
    args = build_parser().parse_args(argv)
    command = COMMANDS[args.command]
    module = importlib.import_module(f"sparseinst.tools.{command.module}")
    # Parsers name the program by it.
    sys.argv[0] = f"sparseinst {args.command}"
    run = getattr(module, "cli", None) or module.main
    return run([*command.arguments, *args.arguments])


if __name__ == "__main__":
    sys.exit(main())
