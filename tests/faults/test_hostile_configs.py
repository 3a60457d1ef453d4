"""Config files that were damaged at random, or hold what a config should not, loaded as commands load them."""

import logging
import random
from pathlib import Path

from sparseinst.config import get_config_file, load_config
from tests.faults.hostile import CANARY, damaged, run_cases

CONFIGS = ("sparse_inst_r50_giam", "quick/shapes", "small_data/published_recipe", "whole")
# Put in place of a value, a key or a line.
PIECES = [
    f"!!python/object/apply:os.mkdir ['{CANARY}']", f"!!python/object/new:os.mkdir ['{CANARY}']",
    "!!python/name:os.system ''", "!!python/tuple [1]", "!!int ''", "!!int x", "!!bool x", "!!timestamp x",
    "!!float x", "!!binary =", "!!set {a}", "!!omap [a: 1]", "!!pairs [a: 1]", "!mine x", "2001-99-99", "2001-01-01",
    "1:1:1", ".nan", "-.inf", "1e999", "9" * 5000, "0x" + "f" * 5000, "0b1", "0o9", "~", "yes", "''", "'\0'",
    '"\\ud800"', '"\\0"', "\ufeff", "\x07", "\t", "&a x", "*a", "&a [*a]", "&a {b: *a}", "<<: *a", "<<: {MODEL: 1}",
    "<<: [1]", "? [a]", "? {a: b}\n: 1", "[" * 40, "[" * 3000, "{" * 3000, "- " * 3000, "'" + "(" * 5000 + "'",
    "'" + "-" * 5000 + "1'", "'{[]: 1}'", "'(1j,)'", "'b\"a\"'", "'...'", "'{1, 2}'", "|\n  text", ">-\n  text",
    "---", "...", "%YAML 9.9", "%TAG ! a", "# note", "[]", "{}", "[{}]", "{a: 1}", "1", "1.5", "text", "_BASE_",
    "_BASE_: config.yaml", "_BASE_: http://127.0.0.1:9/a.yaml", "_BASE_: /dev/zero", "_BASE_: [.]", "_BASE_: ~",
    "VERSION: 1", "VERSION: -1", "MODEL: 1", "MODEL: {WEIGHT: 1}", "TEST: AUG_ON", "MODEL.DEVICE: cpu", "1: 2", "? 1",
    "COMPUTED_X: 1", "IMPORTS: [mine]", f"IMPORTS: [{CANARY}.py]", "IMPORTS", "IMPORTS: ~", "IMPORTS: {a: b}",
    "IMPORTS: [1]", "IMPORTS: [antigravity, this]", "IMPORTS: ['']", "IMPORTS: ['\\0.py']",
]  # fmt: skip


def whole(name: str) -> str:
    """A config that inherits from nothing."""
    if name == "whole":
        return load_config("quick/shapes").dump()
    text = Path(get_config_file(name)).read_text(encoding="utf-8")
    return text.replace("../Base-SparseInst.yaml", "base.yaml").replace("Base-SparseInst.yaml", "base.yaml")


def changed_lines(text: str, generator: random.Random) -> str:
    """Values, keys and lines that became other ones."""
    lines = text.splitlines()
    for _ in range(generator.choice((1, 1, 2, 5))):
        place = generator.randrange(len(lines))
        line, piece = lines[place], generator.choice(PIECES)
        key, colon, _ = line.partition(":")
        indent = " " * (len(line) - len(line.lstrip()))
        lines[place : place + 1] = generator.choice(
            (
                [f"{key}{colon} {piece}"], [f"{key}{colon} {piece}"], [f"{indent}{piece}: 1"], [indent + piece],
                [line, indent + piece], [line, line], [" " + line], [], [line, lines[generator.randrange(len(lines))]],
            )
        )  # fmt: skip
        lines = lines or [""]
    return "\n".join(lines) + "\n"


def config_case(generator: random.Random, number: int, folder: Path):
    logging.disable(logging.WARNING)
    text = whole(CONFIGS[number % len(CONFIGS)])
    base = Path(get_config_file("Base-SparseInst")).read_bytes()
    data, opts = text.encode(), []
    kind = generator.choice(("bytes", "lines", "base", "overrides"))
    if kind == "bytes":
        data = damaged(data, generator)
    elif kind == "lines":
        data = changed_lines(text, generator).encode("utf-8", "ignore")
    elif kind == "base":
        base = damaged(base, generator)
    else:
        keys = [line.partition(":")[0].strip() for line in text.splitlines()]
        key = generator.choice(
            (f"SOLVER.{generator.choice(keys)}", "OUTPUT_DIR", "SOLVER.STEPS", "MODEL.DEVICE", "IMPORTS")
        )
        opts = [key, generator.choice(PIECES)]
    (folder / "base.yaml").write_bytes(base)
    path = folder / "config.yaml"
    path.write_bytes(data)
    return kind, lambda: load_config(str(path), opts, allow_imports=False).dump()


def test_damaged_configs_are_read_or_refused(tmp_path):
    run_cases(config_case, tmp_path, short=16, full=600)
