"""Export a model: ``python -m sparseinst.tools.export --config-file sparse_inst_r50_giam --format onnx --output DIR``.

MODEL.WEIGHTS names the weights. The exported network is compared with the model in eager float32, at sizes and
batches that it was not exported with, before the file is put in place. The file holds config, classes and thresholds:
`Predictor("model.onnx")`, `sparseinst predict` and `sparseinst eval` take it as MODEL.WEIGHTS, without a config file.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sparseinst.config.arguments import add_config_arguments
from sparseinst.engine.console import EXIT_NOT_RUN, prepare_console, with_exit_codes

DYNAMIC = "dynamic"
# Of --end-to-end without a number.
MOST_DETECTIONS = "100"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_config_arguments(parser)
    add("--format", required=True, choices=["onnx", "openvino", "tensorrt", "torch"], help="of the exported file")
    add("--output", type=Path, required=True, metavar="DIR",
        help="folder for model.onnx, model_openvino/model.xml, model.engine or model.pt2")  # fmt: skip
    add("--size", nargs="+", default=[DYNAMIC], metavar="SIZE",
        help="HEIGHT WIDTH of the padded images, or dynamic (default)")  # fmt: skip
    add("--batch", default=DYNAMIC, metavar="N", help="images in a batch, or dynamic (default)")
    add("--precision", default="float32", choices=["float32", "float16", "int8"],
        help="float16: weights in 16 bits; int8: quantized, see --calibration (default float32)")  # fmt: skip
    add("--input", default="normalized", choices=["image", "normalized"],
        help="image: uint8 images, normalized in the graph (default normalized)")  # fmt: skip
    add("--end-to-end", nargs="?", const=MOST_DETECTIONS, metavar="N",
        help="return up to N detections (default 100) as dense tensors, for runtimes without Python; the self-check "
        "compares those in up to 8 of --test-images")  # fmt: skip
    add("--calibration", default="", metavar="FOLDER",
        help="with int8: images like those that the model will see; also a pattern or a list (.txt)")  # fmt: skip
    for name, meaning in (("json", "COCO json: compute the AP of the model and of the file"), ("images", "its images")):
        add(f"--test-{name}", default="", metavar="PATH", help=meaning)
    add("opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="override the config file; last")
    return parser


@with_exit_codes(EXIT_NOT_RUN)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0; 1 where the file differs from the model; 2 after other errors. Both leave no file."""
    args = build_parser().parse_args(argv)
    prepare_console()
    from sparseinst.tools.export_run import run

    return run(args)


if __name__ == "__main__":
    sys.exit(main())
