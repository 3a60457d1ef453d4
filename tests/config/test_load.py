"""Config files and overrides of commands: what is wrong is told in one line with the file, and no file runs code."""

import logging
import sys

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparseinst.config import load_config, resolve_config_file


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_file_and_overrides_on_top(tmp_path):
    path = write(tmp_path / "mine.yaml", "VERSION: 2\nSOLVER: {BASE_LR: 0.5, STEPS: [1, 2]}\nMODEL:\n  DEVICE: cpu\n")
    cfg = load_config(path, ["SOLVER.MAX_ITER", "7", "INPUT.FORMAT", "RGB"])
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER) == (0.5, (1, 2), 7)
    assert (cfg.INPUT.FORMAT, cfg.MODEL.DEVICE) == ("RGB", "cpu")
    # Written and read again it is the same.
    again = load_config(write(tmp_path / "dumped.yaml", cfg.dump()))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())


def test_bases_are_read_as_detectron2_reads_them(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "a.yaml", "SOLVER: {BASE_LR: 0.1, MAX_ITER: 1}\n")
    write(tmp_path / "sub" / "b.yaml", "_BASE_: ../a.yaml\nSOLVER: {MAX_ITER: 2}\n")
    path = write(tmp_path / "c.yaml", f"_BASE_: [a.yaml, sub/b.yaml, {tmp_path}/a.yaml]\nSOLVER: {{MOMENTUM: 0.5}}\n")
    solver = load_config(path).SOLVER
    assert (solver.BASE_LR, solver.MAX_ITER, solver.MOMENTUM) == (0.1, 1, 0.5)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config(write(tmp_path / "sub" / "d.yaml", "_BASE_: ~/sub/b.yaml\n")).SOLVER.MAX_ITER == 2
    # An anchor, an alias and a merge are YAML like any other.
    aliased = "SOLVER: &solver {MAX_ITER: 3}\nTEST:\n  AUG: {MIN_SIZES: &sizes [1], MAX_SIZE: 9}\n"
    aliased += "INPUT: {MIN_SIZE_TRAIN: *sizes}\n"
    assert load_config(write(tmp_path / "e.yaml", aliased)).INPUT.MIN_SIZE_TRAIN == (1,)
    assert load_config(write(tmp_path / "f.yaml", "VERSION: 1\nMODEL: {WEIGHT: x.pth}\n")).MODEL.WEIGHTS == "x.pth"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("OUTPUT_DIR: !!python/object/apply:os.mkdir [FOLDER]\n", "object/apply:os.mkdir"),
        ("OUTPUT_DIR: !!python/object/new:os.mkdir [FOLDER]\n", "object/new:os.mkdir"),
        ("MODEL:\n  WEIGHTS: [!!python/name:os.system '']\n", "name:os.system"),
        ("? !!python/object/apply:os.mkdir [FOLDER]\n: 1\n", "object/apply:os.mkdir"),
        ("%TAG !p! tag:yaml.org,2002:python/\n---\nOUTPUT_DIR: !p!object/apply:os.mkdir [FOLDER]\n", "os.mkdir"),
        ("OUTPUT_DIR: !<tag:yaml.org,2002:python/object/apply:os.mkdir> [FOLDER]\n", "object/apply:os.mkdir"),
        ("SOLVER: {STEPS: !!python/tuple [1, 2]}\n", "tuple.*a list for a tuple"),
    ],
)
def test_yaml_that_would_run_code_is_refused(tmp_path, text, name):
    folder = tmp_path / "made by code"
    path = write(tmp_path / "config.yaml", text.replace("FOLDER", str(folder)))
    with pytest.raises(ValueError, match=rf"config.yaml: line \d: !!python/.*{name}"):
        load_config(path)
    # Nor from a base.
    with pytest.raises(ValueError, match=rf"config.yaml: line \d: !!python/.*{name}"):
        load_config(write(tmp_path / "derived.yaml", "_BASE_: config.yaml\n"))
    assert not folder.exists()


def test_python_configs_are_refused(tmp_path):
    folder = tmp_path / "made by code"
    path = write(tmp_path / "config.py", f"import os\nos.mkdir({str(folder)!r})\n")
    for name in (path, "lazy/sparse_inst_r50_giam.py"):
        with pytest.raises(ValueError, match="LazyConfig.*never run here"):
            load_config(name)
    assert not folder.exists()


def laughs(levels, wrap):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} {wrap(', '.join([f'*a{n - 1}'] * 10))}" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds nothing"),
        ("# nothing\n", "holds nothing"),
        ("- 1\n- 2\n", "holds a list"),
        ("just text", "holds a str"),
        ("MODEL: [1\n", "config.yaml: while parsing"),
        ("a: 1\n---\nb: 2\n", "config.yaml: expected a single document"),
        ("MODEL: {DEVICE: cpu}\nMODEL: {MASK_ON: true}\n", "line 2: the key 'MODEL' is given a second time"),
        ("SOLVER: {MAX_ITER: 1, MAX_ITER: 2}\n", "line 1: the key 'MAX_ITER' is given a second time"),
        ("MODEL.DEVICE: cpu\n", "key 'MODEL.DEVICE' has a point; write MODEL:"),
        ("1: 2\n", "the key '1' is not text"),
        ("SOLVER: {yes: 2}\n", "the key 'True' is not text"),
        ("SOLVER: 5\n", "SOLVER is a group of keys, and '5' is not"),
        ("MODEL:\n", "MODEL is a group of keys, and 'None' is not"),
        ("SOLVER: {BASE_LR: high}\n", "config.yaml: Type mismatch.*SOLVER.BASE_LR"),
        ("SOLVER: {BASE_RATE: 1.0}\n", "config.yaml: Non-existent config key: SOLVER.BASE_RATE"),
        ("MODEL: {DEVICE: null}\n", "MODEL.DEVICE is None"),
        ("OUTPUT_DIR: {a: b}\n", "Type mismatch"),
        ("OUTPUT_DIR: 2001-01-01\n", "not a valid type"),
        ("OUTPUT_DIR: 2001-99-01\n", "month must be in"),
        ("VERSION: 3\n", "VERSION is '3'; expected one of"),
        ("VERSION: '2'\n", "VERSION is '2'; expected one of"),
        ("SOLVER: {MAX_ITER: !!int ''}\n", "config.yaml: string index out of range"),
        ("OUTPUT_DIR: !mine x\n", "config.yaml: could not determine a constructor"),
        ("OUTPUT_DIR: '" + "-" * 50_000 + "1'\n", "config.yaml: a value that is nested too deeply"),
        ("SOLVER: {BASE_LR: 1.0" + ":1" * 2000 + "}\n", "config.yaml"),
        ("OUTPUT_DIR: " + "[" * 50_000, "nested too deeply"),
        ("OUTPUT_DIR: " + "[" * 40 + "]" * 40, "Type mismatch"),
        ("\n".join(["a0: &a0 [1]"] + [f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 2000)]),
         "more than 20000 values|nested too deeply"),
        ("a: &a [*a]\n", "more than 20000 values with aliases expanded, or a circle"),
        (laughs(9, lambda items: f"[{items}]"), "more than 20000 values with aliases"),
        (laughs(9, lambda items: f"{{k: [{items}]}}"), "more than 20000 values with aliases"),
        ("m0: &m0 {x: 1}\n" + "\n".join(f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 10)}]}}" for n in range(1, 9)),
         "more than 20000 values with aliases"),
        ("a: &a " + "x" * 50_000 + "\nb: [" + ", ".join(["*a"] * 1000) + "]\n", "Non-existent config key: a"),
        ("_BASE_: config.yaml\n", "config.yaml inherits from itself"),
        ("_BASE_: ./../NAME/config.yaml\n", "config.yaml inherits from itself"),
        ("_BASE_: nowhere.yaml\n", "_BASE_ names 'nowhere.yaml', but the file"),
        ("_BASE_: /dev/zero\n", "_BASE_ names '/dev/zero', but the file"),
        ("_BASE_: http://127.0.0.1:9/a.yaml\n", "expected a file on this machine"),
        ("_BASE_: [detectron2://a.yaml]\n", "expected a file on this machine"),
        ("_BASE_: {a: b}\n", "_BASE_ is .*expected a file"),
        ("_BASE_: [1]\n", "_BASE_ is '1'; expected a file"),
        ('_BASE_: "a\\0b"\n', "does not exist"),
        ("x: &x {_BASE_: config.yaml}\n<<: *x\n", "config.yaml inherits from itself"),
    ],
)  # fmt: skip
def test_files_that_are_no_config(tmp_path, text, message):
    path = write(tmp_path / "config.yaml", text.replace("NAME", tmp_path.name))
    with pytest.raises(ValueError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 2000 + len(path)


def test_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match="config.yaml is not text in UTF-8"):
        load_config(str(path))
    path.write_bytes(b"\x7fELF\x01\x02")
    with pytest.raises(ValueError, match="config.yaml: unacceptable character"):
        load_config(str(path))
    for name in ("nowhere.yaml", "a" * 5000, "a\0b", "", str(tmp_path)):
        with pytest.raises(ValueError, match="No config file"):
            resolve_config_file(name)


def test_a_value_named_full_model():
    assert load_config("Base-SparseInst", ["OUTPUT_DIR", "full_model"]).OUTPUT_DIR == "full_model"


@pytest.mark.parametrize("solver", ["", "5"])
def test_a_base_without_keys_of_the_solver(tmp_path, solver):
    write(tmp_path / "base.yaml", f"SOLVER: {solver}\n")
    path = write(tmp_path / "child.yaml", "_BASE_: base.yaml\nSOLVER: {CLIP_GRADIENTS: {CLIP_VALUE: 3.0}}\n")
    assert load_config(path).SOLVER.CLIP_GRADIENTS.CLIP_VALUE == 3


def test_each_base_is_read_once(tmp_path):
    # 10 to the power of 9 readings, and no circle.
    for level in range(9):
        write(tmp_path / f"{level}.yaml", f"_BASE_: [{', '.join([f'{level + 1}.yaml'] * 10)}]\n")
    write(tmp_path / "9.yaml", "SEED: 1\n")
    assert load_config(str(tmp_path / "0.yaml")).SEED == 1


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["SOLVER.MAX_ITER"], "odd length"),
        (["SOLVER.BASE_RATE", "1"], "Non-existent key: SOLVER.BASE_RATE"),
        (["SOLVER.MAX_ITER.X", "1"], "not iterable"),
        (["MODEL.DEVICE.c", "1"], "KEY VALUE overrides"),
        (["SOLVER.MAX_ITER", "9", "--train-json", "a"], "--train-json is a flag; put flags before the first KEY VALUE"),
        (["", "1"], "Non-existent key"),
        (["_BASE_", "a.yaml"], "can only be used in files"),
        (["SOLVER.MAX_ITER", "many"], "Type mismatch"),
        (["SOLVER", "[]"], "Type mismatch"),
        pytest.param(
            ["OUTPUT_DIR", "-" * 5000 + "1"],
            "KEY VALUE overrides: a value that is nested too deeply",
            marks=pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 reads it as text"),
        ),
        (["OUTPUT_DIR", "-" * 60_000 + "1"], "KEY VALUE overrides: a value that is nested too deeply"),
        (["OUTPUT_DIR", "{[]: 1}"], "unhashable"),
        (["SOLVER.MAX_ITER", "0x" + "f" * 50_000], "cannot be written as YAML"),
        (["SOLVER.STEPS", "(1j,)"], "cannot be written as YAML"),
        (["MODEL.DEVICE", "None"], "MODEL.DEVICE is None"),
    ],
)
def test_overrides_that_are_wrong(opts, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_config("Base-SparseInst", opts)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 2000


CFG = load_config("Base-SparseInst")
KEYS = [f"{group}.{key}" for group in ("MODEL", "SOLVER", "INPUT", "TEST") for key in CFG[group]]
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.dates()
    | st.binary(max_size=10) | st.sampled_from(["1e5", "(1, 2)", "[[", "0x1", "1_0", "~", "'a'", "_BASE_"])
)  # fmt: skip
NAMES = st.sampled_from([*CFG, *CFG.MODEL, *CFG.SOLVER, "_BASE_", "VERSION", "NEW"]) | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | SCALARS, inner, max_size=4)
)
property_test = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def assert_config_or_value_error(path, opts=()):
    logging.disable(logging.WARNING)
    try:
        load_config(path, opts).dump()
    except ValueError:
        pass
    finally:
        logging.disable(logging.NOTSET)


@property_test
@given(st.lists(st.tuples(st.sampled_from(KEYS) | st.text(max_size=20), st.text(max_size=30) | VALUES), max_size=3))
def test_random_overrides_end_in_a_config_or_a_value_error(pairs):
    assert_config_or_value_error("Base-SparseInst", [part for pair in pairs for part in pair])


@property_test
@given(st.dictionaries(NAMES, VALUES, max_size=6))
def test_random_contents_end_in_a_config_or_a_value_error(tmp_path, content):
    assert_config_or_value_error(write(tmp_path / "config.yaml", yaml.safe_dump(content)))


YAML_PIECES = st.sampled_from(
    ["MODEL", "SOLVER", "STEPS", "_BASE_", "config.yaml", "VERSION", ": ", ":", "\n", "\n  ", "- ", "[", "]", "{", "}",
     ", ", "&a ", "*a", "<<", "!!int ", "!!timestamp ", "!!set ", "!!binary ", "!!python/name:os.system ", "!", "'",
     '"', "|\n ", "? ", "1", ".5", "1:1", "0o7", "---\n", "...\n", "%TAG ! x\n", "#", "\t", "~", "=", "2001-01-32"]
)  # fmt: skip


@property_test
@given(st.lists(YAML_PIECES, max_size=15).map("".join) | st.text(max_size=40))
def test_random_yaml_ends_in_a_config_or_a_value_error(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert_config_or_value_error(str(path))
