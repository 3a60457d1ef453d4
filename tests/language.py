"""Search the project's prose for the patterns of language.txt: ``python tests/language.py``. Exit code 1: found some.

The patterns stand for the rules of style in CONTRIBUTING.md. language_exceptions.txt lists the lines that are right.
"""

import io
import re
import sys
import tokenize
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parent
SEARCHED = (
    *("sparseinst/**/*.py", "train_net.py", "demo/*.py", "configs/**/*.py", "configs/**/*.yaml"),
    *(f"sparseinst/serving/page/*.{ending}" for ending in ("html", "js", "css")),
    *(f"examples/**/*.{ending}" for ending in ("py", "cpp", "md", "txt")),
    *("docs/*.md", "README.md", "CONTRIBUTING.md", "Makefile"),
)
# Stands for Python code between comments and strings; no pattern matches it.
_CODE = "\0"


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
    return [re.compile(line.replace(" ", r"\s+(?:(?:#|//|\*) )?"), re.IGNORECASE) for line in _lines(path)]


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
        text = python_prose(text) if file.suffix == ".py" else text
        allowed = [exemption.text for exemption in exemptions if exemption.file == name]
        for start, found in sorted((match.start(), match[0]) for regex in patterns for match in regex.finditer(text)):
            number = text.count("\n", 0, start) + 1
            if not any(part in lines[number - 1] for part in allowed):
                yield f"{name}:{number}: {' '.join(found.split())}"


def python_prose(source: str) -> str:
    """Return comments and strings of Python code in place, all else as _CODE. Adjacent strings read as one sentence."""
    lines = source.splitlines(keepends=True)
    starts = [0, *accumulate(map(len, lines))]
    prose = re.sub(r"\S", _CODE, source)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name = tokenize.tok_name[token.type]
        if name in ("COMMENT", "STRING", "FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END"):
            start, end = (starts[row - 1] + column for row, column in (token.start, token.end))
            text = source[start:end]
            if name in ("STRING", "FSTRING_START"):
                text = re.sub(r"^\w*(\"{3}|'{3}|\"|')", lambda quote: " " * len(quote[0]), text)
            if name in ("STRING", "FSTRING_END"):
                text = re.sub(r"(\"{3}|'{3}|\"|')$", lambda quote: " " * len(quote[0]), text)
            if name == "STRING" and "f" in token.string[:2].lower():
                # Python before 3.12 has one token for an f-string.
                text = re.sub(r"\{[^{}]*\}", lambda part: _CODE * len(part[0]), text)
            prose = prose[:start] + text + prose[end:]
    return prose


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


def main() -> None:
    """Print every match."""
    found = list(find(TESTS.parent, read_patterns(), read_exemptions()))
    if found:
        sys.exit("\n".join([*found, f"{len(found)} matches of tests/language.txt: rewrite them (CONTRIBUTING.md)"]))


if __name__ == "__main__":
    main()
