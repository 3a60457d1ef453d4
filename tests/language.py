"""Search the project's prose for the patterns of language.txt: ``python tests/language.py``. Exit code 1: found some.

The patterns stand for the rules of style in CONTRIBUTING.md. language_exceptions.txt lists the lines that are right.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parent
SEARCHED = ("sparseinst/**/*.py", "configs/**/*.yaml", "docs/*.md", "README.md", "CONTRIBUTING.md", "Makefile")


class Exemption(NamedTuple):
    """A line that may match a pattern.

    Attributes:
        file: path below the project's root.
        text: part of the line.
        reason: why the line is right.
    """

    file: str
    text: str
    reason: str


def read_patterns(path: Path = TESTS / "language.txt") -> list[re.Pattern]:
    """Read one pattern a line. A space also matches a line break with the next line's indentation and comment sign."""
    return [re.compile(line.replace(" ", r"\s+(?:# )?"), re.IGNORECASE) for line in _lines(path)]


def read_exemptions(path: Path = TESTS / "language_exceptions.txt") -> list[Exemption]:
    """Read one exemption a line. Raises ValueError on a line without file, text and reason."""
    exemptions = []
    for line in _lines(path):
        parts = [part.strip() for part in line.split("|")]
        if len(parts) != 3 or not all(parts):
            raise ValueError(f"{path}: {line!r} is not FILE | TEXT | REASON")
        exemptions.append(Exemption(*parts))
    return exemptions


def find(root: Path, patterns: Sequence[re.Pattern], exemptions: Sequence[Exemption]) -> Iterator[str]:
    """Yield "file:line: matched text" for each match, in the order of the files."""
    for file in sorted({file for glob in SEARCHED for file in root.glob(glob)}):
        name = file.relative_to(root).as_posix()
        text = file.read_text(encoding="utf-8")
        lines = text.splitlines()
        allowed = [exemption.text for exemption in exemptions if exemption.file == name]
        for start, found in sorted((match.start(), match[0]) for regex in patterns for match in regex.finditer(text)):
            number = text.count("\n", 0, start) + 1
            if not any(part in lines[number - 1] for part in allowed):
                yield f"{name}:{number}: {' '.join(found.split())}"


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


def main() -> None:
    """Print every match."""
    found = list(find(TESTS.parent, read_patterns(), read_exemptions()))
    if found:
        sys.exit("\n".join([*found, f"{len(found)} matches of tests/language.txt: rewrite them (CONTRIBUTING.md)"]))


if __name__ == "__main__":
    main()
