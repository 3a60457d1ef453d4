"""Check the arguments of the command `export`."""

import argparse

from sparseinst.runtime.export import FORMATS, InputRule
from sparseinst.runtime.quantize import import_nncf
from sparseinst.tools.export import DYNAMIC


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for arguments that exclude each other."""
    target = FORMATS[args.format]
    if args.precision not in target.precisions:
        supported = "; ".join(f"{name}: {', '.join(each.precisions)}" for name, each in FORMATS.items())
        raise ValueError(f"--precision {args.precision} is not supported by --format {args.format}; {supported}")
    if args.end_to_end:
        _check_end_to_end(args)
    if args.precision == "int8":
        if not (args.calibration and args.test_json):
            raise ValueError(
                "--precision int8 needs --calibration, images like those that the model will see, and --test-json with "
                "--test-images, because its AP decides whether the file is good"
            )
        if args.format == "openvino":
            import_nncf()
    elif args.calibration:
        raise ValueError(f"--calibration is for --precision int8; --precision is {args.precision}")
    if bool(args.test_json) != bool(args.test_images) and not args.end_to_end:
        raise ValueError("--test-json and --test-images go together")


def _check_end_to_end(args: argparse.Namespace) -> None:
    found = ""
    if not FORMATS[args.format].end_to_end:
        found = f"--format {args.format}"
    elif args.precision == "int8":
        found = "--precision int8"
    elif args.test_json:
        found = "--test-json, which computes the AP of the network's outputs"
    if found:
        formats = " or ".join(name for name, each in FORMATS.items() if each.end_to_end)
        raise ValueError(
            f"--end-to-end is not supported with {found}; supported are --format {formats} with --precision float32 or "
            "float16, without --test-json"
        )


def split_size(given: list[str]) -> tuple[list[str], list[str]]:
    """Return the values of --size, and the KEY VALUE pairs that follow them."""
    number = 1 if given[0] == DYNAMIC else 2
    size = given[:number]
    if size != [DYNAMIC] and (len(size) < 2 or not all(map(str.isdecimal, size))):
        raise ValueError(f"--size is {' '.join(size)}; it must be dynamic, or HEIGHT WIDTH in pixels, such as 640 864")
    return size, given[number:]


def chosen_size(given: list[str], rule: InputRule) -> tuple[int, int] | None:
    """Read --size. None: dynamic."""
    if rule.fixed_size is not None:
        fixed = " ".join(map(str, rule.fixed_size))
        if given != fixed.split():
            raise ValueError(f"--size is {' '.join(given)}; this model supports {fixed}, its own size, only")
        return rule.fixed_size
    if given == [DYNAMIC]:
        return None
    sides = [int(side) if side.isdecimal() else 0 for side in given]
    if len(sides) != 2 or min(sides) < 1 or any(side % rule.divisibility for side in sides):
        raise ValueError(
            f"--size is {' '.join(given)}; it must be dynamic, or HEIGHT WIDTH in multiples of {rule.divisibility}"
        )
    return tuple(sides)


def chosen_number(given: str | None) -> int:
    """Read --end-to-end. 0: it was not given."""
    if given is None:
        return 0
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"--end-to-end is {given!r}; it must be a whole number from 1 on")
    return int(given)


def chosen_batch(given: str) -> int | None:
    """Read --batch. None: dynamic."""
    if given == DYNAMIC:
        return None
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"--batch is {given}; it must be dynamic, or a number from 1 on")
    return int(given)
