"""Describe a weights file, or convert it to a Detectron2 checkpoint for a config.

``python -m sparseinst.tools.convert_weights --input resnet50.pth`` lists format, source and tensors. With
``--config-file`` and ``--output`` it writes a checkpoint with the names of that config's model, which Detectron2's own
checkpointer loads.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparseinst.config.arguments import CONFIG_HELP, add_config_arguments, add_opts_argument
from sparseinst.engine.console import prepare_console, with_exit_codes

if TYPE_CHECKING:
    from detectron2.config import CfgNode

TENSORS_LISTED = 5


def build_parser() -> argparse.ArgumentParser:
    """Return the command's argument parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", required=True, metavar="FILE", help="weights as in MODEL.WEIGHTS: a file, a URL, package://, timm://"
    )
    add_config_arguments(parser, required=False, metavar="CONFIG", help=f"{CONFIG_HELP}: of the model")
    parser.add_argument("--output", metavar="FILE.pth", help="the checkpoint to write")
    parser.add_argument("--force", action="store_true", help="replace --output where it exists")
    parser.add_argument("--trusted", action="store_true", help="as MODEL.TRUSTED_WEIGHTS True")
    add_opts_argument(parser)
    return parser


def describe(weights: str, trusted: bool = False) -> str:
    """Return a description of a weights file: format, family, number of tensors, the first of them.

    Raises:
        ValueError: the file cannot be read, or holds no tensors.
    """
    from sparseinst.checkpoint import describe_names, extract_tensors, find_weights, read_weights_file

    path = find_weights(weights)
    kind, content = read_weights_file(path, trusted)
    tensors, entry = extract_tensors(content, path)
    values = sum(tensor.numel() for tensor in tensors.values())
    lines = [
        f"{weights}: {kind}, {Path(path).stat().st_size / 1e6:.1f} MB",
        f"  {len(tensors)} tensors of {values / 1e6:.2f} million values{f', in the entry {entry!r}' if entry else ''}",
        f"  names: {describe_names(tensors)}",
    ]
    if entry and (others := [str(key) for key in content if key != entry]):
        lines.append(f"  other entries: {', '.join(others)}")
    for name, tensor in list(tensors.items())[:TENSORS_LISTED]:
        lines.append(f"    {name} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}")
    if len(tensors) > TENSORS_LISTED:
        lines.append("    ...")
    return "\n".join(lines)


def convert_file(cfg: "CfgNode", weights: str, output: str, force: bool = False) -> str:
    """Write the tensors that a config's model takes from a file as a Detectron2 checkpoint.

    Args:
        cfg: of the model; MODEL.MIN_BACKBONE_COVERAGE and TRUSTED_WEIGHTS act as in a training.
        weights: as MODEL.WEIGHTS.
        output: file to write; ``.pth``, by which Detectron2 detects the format.
        force: replace an existing file.

    Returns:
        The coverage report.

    Raises:
        ValueError: the file cannot be read, or does not fit the model; ``output`` exists, or is the file itself.
    """
    import torch
    from detectron2.modeling import build_model

    from sparseinst.checkpoint import checkpointer_from_config, find_weights, write_atomically

    target = Path(output)
    if target.suffix != ".pth":
        raise ValueError(f"--output is {output}; its name must end in .pth, by which Detectron2 detects the format")
    if target.is_dir() or (target.exists() and not force):
        raise ValueError(f"--output {output} exists; choose another name, or replace a file with --force")
    source = find_weights(weights)
    if target.exists() and target.samefile(source):
        raise ValueError(f"--output {output} is the input; choose another name")
    if not target.parent.is_dir():
        raise ValueError(f"--output {output} is in a folder that does not exist; make it first")

    model = build_model(cfg)
    checkpointer = checkpointer_from_config(cfg, model, is_training=True)
    checkpointer.load(weights, checkpointables=[])
    coverage = checkpointer.coverage
    if not coverage.filled:
        raise ValueError(f"{weights} has nothing for the model of this config, so there is nothing to write")
    taken = set(coverage.filled)
    state = {name: tensor for name, tensor in model.state_dict().items() if name in taken}
    author = f"sparseinst.tools.convert_weights, from {Path(weights).name}: {coverage.family}"
    write_atomically(target, lambda file: torch.save({"model": state, "__author__": author}, file))
    return coverage.text()


@with_exit_codes()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0, or 1 after an error."""
    args = build_parser().parse_args(argv)
    prepare_console()
    from sparseinst.config import load_config

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if bool(args.config_file) != bool(args.output):
        raise ValueError("--config-file and --output go together; without both, the file is only described")
    if not args.config_file:
        print(describe(args.input, args.trusted))
        return 0
    cfg = load_config(args.config_file, ["MODEL.DEVICE", "cpu", *args.opts], imports=args.imports)
    cfg.MODEL.TRUSTED_WEIGHTS |= args.trusted
    print(convert_file(cfg, args.input, args.output, args.force))
    print(f"Written: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
