"""Predict many images into a file of JSON lines: ``sparseinst predict --input FOLDER --output FILE``.

The first line of the output identifies the run; each line after it holds the detections of one image, with masks as
RLE. Run the same command again after an interruption: images that have a line are not predicted again. Several
processes share the work under torchrun:

    torchrun --nproc_per_node 4 -m sparseinst predict --config-file ... --input LIST.txt --output OUT.jsonl
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from sparseinst.config.arguments import CONFIG_HELP, add_config_arguments, add_opts_argument
from sparseinst.engine.console import EXIT_INTERRUPTED, EXIT_NOT_RUN, prepare_console, with_exit_codes

# Earlier versions drew under this name.
FLAGS_OF_DEMO = ("--video-input", "--webcam", "--json", "--ground-truth", "--show-iams", "--mask-nms")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_config_arguments(
        parser,
        required=False,
        default="",
        help=f"{CONFIG_HELP}; an exported file (--opts MODEL.WEIGHTS model.onnx) needs none",
    )
    add("--input", nargs="+", required=True, metavar="NAME",
        help="folders, image files, glob patterns, and text files (.txt) with one path in each line")  # fmt: skip
    add("--output", metavar="OUT.jsonl", help="file to write or to continue")
    add("--confidence-threshold", type=float, default=0.0, metavar="S",
        help="lowest score that is written (default 0.0: all that the model returns)")  # fmt: skip
    add(*FLAGS_OF_DEMO, nargs="*", action=_OfDemo, help=argparse.SUPPRESS)
    add_opts_argument(parser)
    return parser


@with_exit_codes(EXIT_NOT_RUN)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        Exit code: 0; 1 where an image could not be used, now or before, unless torchrun started the process, because
        torchrun would end the other processes; 2 where the arguments, the config, the weights or the output prevent a
        run; 130 after Ctrl-C. The output is kept in all cases.
    """
    args = build_parser().parse_args(argv)
    prepare_console()
    check_arguments(args)
    return run(args)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for a wrong value of a flag."""
    if not (args.output or "").endswith(".jsonl"):
        found = f"--output is {args.output}" if args.output else "--output is missing"
        raise ValueError(f"{found}; it must be a file that ends in .jsonl. To draw predictions: `sparseinst demo`")
    if not 0 <= args.confidence_threshold <= 1:
        raise ValueError(f"--confidence-threshold is {args.confidence_threshold}; it must be in [0, 1]")


def run(args: argparse.Namespace) -> int:
    """Predict, and print what was done. Return the exit code; errors as `predict_many`."""
    import logging

    from sparseinst.engine.host_memory import keep_freed_memory_for_inference
    from sparseinst.engine.processes import is_started_by_torchrun, take_gpu_of_rank
    from sparseinst.engine.run_setup import log_to_console
    from sparseinst.inference import Predictor
    from sparseinst.inference.many_images import predict_many
    from sparseinst.inference.output_files import check_not_read
    from sparseinst.inference.prediction_lines import list_images
    from sparseinst.runtime.exported_file import ENGINES
    from sparseinst.runtime.exported_model import config_of_run

    ranks = {}
    if is_started_by_torchrun():
        ranks = {"rank": int(os.environ["RANK"]), "num_ranks": int(os.environ["WORLD_SIZE"])}
    log_to_console(logging.INFO, ranks.get("rank", 0))
    cfg = config_of_run(args.config_file, args.opts, args.imports)
    engine = ENGINES.get(Path(cfg.MODEL.WEIGHTS).suffix)
    # Exported files do not run on MODEL.DEVICE. Ranks may share a GPU in ONNX Runtime.
    if ranks and (engine == "tensorrt" if engine else cfg.MODEL.DEVICE == "cuda"):
        take_gpu_of_rank()
    cfg.MODEL.OUTPUT.MASK_FORMAT = "rle"
    cfg.MODEL.OUTPUT.SCORE_THRESHOLD = max(cfg.MODEL.OUTPUT.SCORE_THRESHOLD, args.confidence_threshold)
    keep_freed_memory_for_inference(cfg)
    names, output = list_images(args.input), Path(args.output)
    check_not_read("--output", output, [*args.input, args.config_file or None, cfg.MODEL.WEIGHTS])
    summary = predict_many(cfg, Predictor(cfg), names, output, **ranks)
    for failure in summary.failures:
        print(failure, file=sys.stderr)
    if summary.num_failed_before:
        print(
            f"{summary.num_failed_before} images had an error before: remove their lines to predict them again",
            file=sys.stderr,
        )
    process = f"rank {ranks['rank']}: " if ranks else ""
    before = f"{summary.num_before} images had a line already; " if summary.num_before else ""
    print(f"{process}{before}{summary.speed}")
    if summary.is_complete:
        print(f"{output}: all {len(names)} images")
    if summary.is_interrupted:
        print("Interrupted. The same command goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 1 if (summary.failures or summary.num_failed_before) and not ranks else 0


class _OfDemo(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, args: object, values: object, flag: str | None) -> NoReturn:
        parser.exit(2, f"error: {flag} belongs to `sparseinst demo`, which draws; `sparseinst predict` writes .jsonl\n")


if __name__ == "__main__":
    sys.exit(main())
