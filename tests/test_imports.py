"""Imports run one way, and a family of models is known in its own room only (docs/architecture.md)."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "sparseinst"
FAMILIES = sorted(path.name for path in (ROOT / "modeling").iterdir() if path.is_dir() and path.name != "__pycache__")
SHARED = {"structures", "ops", "config"}
# Room -> rooms that it may import besides itself and SHARED. tools may import everything, and nothing imports tools.
ALLOWED = {
    "structures": set(),
    "ops": {"structures"},
    "modeling.meta_arch": {"structures", "ops"},
    "modeling.auxiliary": SHARED,
    **{f"modeling.{family}": SHARED | {"modeling.meta_arch", "modeling.auxiliary"} for family in FAMILIES},
    "backbones": SHARED,
    "data": SHARED,
    "checkpoint": SHARED | {"backbones"},
    "model_zoo": SHARED | {"checkpoint"},
    "runtime": SHARED | {"modeling.meta_arch"},
    "evaluation": SHARED | {"data"},
    "visualization": SHARED,
    "inference": SHARED | {"runtime", "checkpoint", "data", "visualization"},
    "serving": SHARED | {"inference", "data", "visualization"},
    "engine": SHARED | {"evaluation", "runtime", "data", "checkpoint", "modeling.meta_arch", "visualization"},
    "benchmarks": SHARED | {"engine", "evaluation", "runtime", "data", "modeling.meta_arch"},
}
# Functions that write files, without an import of their own: every room may use them.
LEAVES = {"sparseinst.checkpoint.atomic_write"}
# Places that may name a family: its room, the keys, tables of names, and tables of models and suites.
FAMILY_NAMES = ("config", "checkpoint/names", *(f"modeling/{family}" for family in FAMILIES))
# Modules outside config/ that may name configs, with the reason.
CONFIG_NAMES = {
    "sparseinst.benchmarks.suites": "the table of suites",
    "sparseinst.checkpoint.published": "the table of published checkpoints",
    "sparseinst.data.recipes": "the configs that --recipe auto chooses from",
    "sparseinst.tools.check_dataset": "the default of --config-file",
    "sparseinst.tools.train_net": "an example in an error",
}
CONFIGS = {
    str(path.relative_to(ROOT.parent / "configs").with_suffix(""))
    for path in (ROOT.parent / "configs").rglob("*")
    if path.suffix in (".yaml", ".py")
}
CLASSES = {
    node.name
    for family in FAMILIES
    for path in (ROOT / "modeling" / family).glob("*.py")
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.ClassDef)
}
CONFIG_NODES = tuple(f"MODEL.{family.upper()}" for family in FAMILIES)


def room_of(module):
    parts = module.split(".")[1:]
    if parts == ["__main__"]:
        return "tools"
    if parts[:1] == ["modeling"]:
        return ".".join(parts[:2])
    return parts[0] if parts else ""


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
        yield name.removesuffix(".__init__"), path


def is_module(name):
    path = ROOT.parent / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or path.is_dir()


def strings_of(tree):
    """Yield the strings with their lines, without docstrings."""
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    docstrings = {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value, node.lineno


def imports_of(tree, module):
    # Names for importlib.import_module, and beginnings of such names in f-strings.
    for text, line in strings_of(tree):
        if text.startswith("sparseinst.") and is_module(text.rstrip(".")):
            yield text.rstrip("."), line
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} has a relative import"
            for alias in node.names:
                target = f"{node.module}.{alias.name}"
                yield (target if is_module(target) else node.module), node.lineno


def wrong_arrows(module, tree):
    room = room_of(module)
    for target, line in imports_of(tree, module):
        if target.split(".")[0] != "sparseinst":
            continue
        target_room = room_of(target)
        if target in LEAVES or target_room in ("", room) or room in ("", "modeling"):
            continue
        if room == "config":
            is_allowed = target_room.startswith("modeling.") and target.endswith(".config")
        elif target_room == "tools":
            is_allowed = False
        else:
            is_allowed = room == "tools" or target_room in ALLOWED[room]
        if not is_allowed:
            yield f"{module}:{line} imports {target}"


def family_names(module, tree):
    path = "/".join(module.split(".")[1:])
    if path.startswith(FAMILY_NAMES):
        return
    for node in ast.walk(tree):
        name = getattr(node, "id", None) or getattr(node, "attr", None)
        if name in CLASSES:
            yield f"{module}:{node.lineno} names the class {ast.unparse(node)}"
        elif isinstance(node, ast.Attribute) and node.attr in {family.upper() for family in FAMILIES}:
            yield f"{module}:{node.lineno} reads {ast.unparse(node)}"
    for text, line in strings_of(tree):
        if any(name in text for name in CONFIG_NODES):
            yield f"{module}:{line} has the key {text[:60]!r}"


def config_names(tree):
    for text, line in strings_of(tree):
        words = {re.sub(r"\.(yaml|py)$", "", word) for word in re.findall(r"[\w./-]+", text)}
        yield from ((name, line) for name in sorted(words & CONFIGS))


def test_imports_run_one_way():
    wrong = [arrow for module, path in modules() for arrow in wrong_arrows(module, ast.parse(path.read_text()))]
    assert not wrong, "\n".join(wrong)


def test_every_room_has_a_rule():
    rooms = {room_of(module) for module, _ in modules()}
    assert rooms <= {"", "modeling", "config", "tools", *ALLOWED}
    # Rules of rooms that do not exist hold nothing.
    assert set(ALLOWED) <= rooms


def test_no_rule_is_wider_than_the_imports():
    used = {
        (room_of(module), room_of(target))
        for module, path in modules()
        for target, _ in imports_of(ast.parse(path.read_text()), module)
        if target not in LEAVES
    }
    allowed = {(room, target) for room, targets in ALLOWED.items() for target in targets - SHARED}
    assert not allowed - used


def test_configs_are_named_in_tables_only():
    named = {}
    for module, path in modules():
        for name, line in config_names(ast.parse(path.read_text())):
            named.setdefault(module, []).append(f"{module}:{line} names the config {name}")
    wrong = [each for module in named.keys() - CONFIG_NAMES.keys() for each in named[module]]
    assert not [each for each in wrong if not each.startswith("sparseinst.config.")], "\n".join(wrong)
    assert CONFIG_NAMES.keys() <= named.keys(), "an exception that is not needed"


def test_a_config_name_is_found():
    assert list(config_names(ast.parse("x = 'error: see solov2/solov2_r50_3x.yaml'"))) == [("solov2/solov2_r50_3x", 1)]
    assert not list(config_names(ast.parse("'''As solov2/solov2_r50_3x.'''")))


def test_a_family_is_named_in_its_own_room_only():
    wrong = [name for module, path in modules() for name in family_names(module, ast.parse(path.read_text()))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("sparseinst.ops.masks", "from sparseinst.modeling.meta_arch import InstanceSegmenter"),
        ("sparseinst.runtime.optimize", "from sparseinst.modeling.sparse_inst.model import SparseInst"),
        ("sparseinst.data.loader", "import sparseinst.engine.trainer"),
        ("sparseinst.engine.trainer", "from sparseinst.tools import train_net"),
        ("sparseinst.config.defaults", "from sparseinst.modeling.sparse_inst.model import SparseInst"),
        ("sparseinst.modeling.meta_arch", "def f():\n    from sparseinst.runtime.compile import compiled"),
        ("sparseinst.engine.trainer", "importlib.import_module('sparseinst.tools.train_net')"),
        ("sparseinst.runtime.export", "importlib.import_module(f'sparseinst.engine.{name}')"),
    ],
)
def test_a_wrong_arrow_is_found(module, code):
    assert list(wrong_arrows(module, ast.parse(code)))


@pytest.mark.parametrize(
    "code", ["x = isinstance(model, SparseInst)", "y = cfg.MODEL.SPARSE_INST.LOSS", "z = 'set MODEL.SPARSE_INST.LOSS'"]
)
def test_a_family_outside_its_room_is_found(code):
    assert list(family_names("sparseinst.engine.trainer", ast.parse(code)))
    assert not list(family_names("sparseinst.modeling.sparse_inst.model", ast.parse(code)))
