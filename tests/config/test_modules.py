"""IMPORTS and --import: how modules are named, found again, refused and reported; the example in demo/."""

import ast
import importlib
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from sparseinst.config import load_config
from sparseinst.tools import train_net
from tests.loggers import loggers_restored
from tests.shapes_data import write_shapes
from tests.tiny_model import tiny_cfg

REPO = Path(__file__).resolve().parents[2]
TOOLS = REPO / "sparseinst" / "tools"
EXAMPLE = REPO / "demo" / "my_decoder.py"
ADDS_A_KEY = "def add_config(cfg):\n    cfg.MODEL.MINE = 1\n"


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["mine", "mine.py", "./mine.py"])
def test_files_are_found_next_to_the_config_and_in_the_working_directory(tmp_path, monkeypatch, name):
    module = write(tmp_path / "a" / "mine.py", ADDS_A_KEY)
    config = write(tmp_path / "a" / "a.yaml", f"IMPORTS: [{name}]\nMODEL: {{MINE: 2}}\n")
    cfg = load_config(config)
    assert cfg.IMPORTS == [module] and cfg.MODEL.MINE == 2
    monkeypatch.chdir(tmp_path / "a")
    assert load_config("quick/shapes", imports=[name]).IMPORTS == [module]
    assert load_config("quick/shapes", ["IMPORTS", f"['{name}']"], imports=["json", name]).IMPORTS == [module, "json"]
    assert load_config(write(tmp_path / "b" / "b.yaml", f"IMPORTS: [{name}]\n")).IMPORTS == [module]
    # A saved config finds the file from anywhere.
    monkeypatch.chdir("/")
    saved = load_config(write(tmp_path / "saved" / "config.yaml", cfg.dump()), imports=["json"])
    assert saved.IMPORTS == [module, "json"] and saved.MODEL.MINE == 2


def test_the_names_are_logged_before_code_runs(tmp_path, caplog):
    write(tmp_path / "first.py", "import logging\nlogging.disable()\n")
    write(tmp_path / "second.py", "")
    try:
        load_config(write(tmp_path / "a.yaml", "IMPORTS: [first.py, second.py]\n"))
    finally:
        logging.disable(logging.NOTSET)
    (record,) = [record for record in caplog.records if "runs the code of" in record.getMessage()]
    assert record.levelname == "WARNING" and "first.py" in record.getMessage() and "second.py" in record.getMessage()


@pytest.mark.parametrize(
    ("text", "opts", "imports"),
    [
        ("IMPORTS: [mine.py]\n", [], []),
        ("_BASE_: base.yaml\n", [], []),
        ("SEED: 1\n", ["IMPORTS", "['mine.py']"], []),
        ("SEED: 1\n", [], ["mine.py"]),
    ],
)
def test_imports_that_are_not_allowed(tmp_path, monkeypatch, text, opts, imports):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine.py", "import pathlib\npathlib.Path('ran').touch()\n")
    write(tmp_path / "base.yaml", "IMPORTS: [mine.py]\n")
    path = write(tmp_path / "a.yaml", text)
    with pytest.raises(ValueError, match=r"a.yaml.*mine\.py.*IMPORTS.*not allowed") as caught:
        load_config(path, opts, imports=imports, allow_imports=False)
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()
    assert load_config(write(tmp_path / "b.yaml", "SEED: 1\n"), allow_imports=False).SEED == 1


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys\nsys.exit('enough')\n", "SystemExit: enough"),
        ("raise SystemExit\n", "SystemExit"),
        ("def f(:\n", "SyntaxError: invalid syntax.*broken.py"),
        ("import not_installed_here\n", "ModuleNotFoundError.*not_installed_here"),
        ("raise KeyError('two\\nlines')\n", "KeyError.*two"),
        ("from sparseinst.modeling.sparse_inst import decoder\n"
         "decoder.SPARSE_INST_DECODER_REGISTRY.register(decoder.GroupIAMDecoder)\n", "already registered"),
        ("def add_config(cfg):\n    cfg.NO.SUCH = 1\n", "AttributeError.*NO"),
    ],
)  # fmt: skip
def test_a_module_whose_code_fails(tmp_path, code, message):
    module = write(tmp_path / "broken.py", code)
    with pytest.raises(ValueError, match=f"a.yaml.*{module}.*cannot be imported: .*{message}") as caught:
        load_config(write(tmp_path / "a.yaml", "IMPORTS: [broken.py]\n"))
    assert "\n" not in str(caught.value)


def test_a_file_that_was_moved(tmp_path):
    write(tmp_path / "new" / "mine.py", ADDS_A_KEY)
    path = write(tmp_path / "config.yaml", f"IMPORTS: [{tmp_path}/old/mine.py]\n")
    with pytest.raises(
        ValueError, match=r"old/mine.py.*does not exist.*config.yaml.*IMPORTS \"\['NEW.py'\]\""
    ) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    assert load_config(path, ["IMPORTS", f"['{tmp_path}/new/mine.py']"]).MODEL.MINE == 1
    with pytest.raises(ValueError, match="'no_such_module'.*ModuleNotFoundError.*or name its .py file"):
        load_config("quick/shapes", imports=["no_such_module"])


def test_no_shipped_config_imports():
    assert not [path for path in (REPO / "configs").rglob("*.yaml") if "IMPORTS" in path.read_text(encoding="utf-8")]


def loads(tool):
    """The calls in a command's files that load a config."""
    files = [TOOLS / f"{tool}{ending}.py" for ending in ("", "_run")]
    nodes = [node for file in files if file.exists() for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    return [call for call in calls if ast.unparse(call.func) in ("load_config", "config_of_run")]


@pytest.mark.parametrize(
    "tool",
    ["train_net", "demo", "benchmark", "benchmark_training", "benchmark_video", "analyze_model", "check_dataset",
     "convert_weights", "compare_recipes", "predict", "export"],
)  # fmt: skip
def test_every_command_with_a_config_takes_import(tool):
    parser = importlib.import_module(f"sparseinst.tools.{tool}").build_parser()
    (action,) = [action for action in parser._actions if "--import" in action.option_strings]
    assert action.dest == "imports" and action.default == []
    assert loads(tool)
    for call in loads(tool):
        arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
        assert {"args.imports", "self._imports"} & set(map(ast.unparse, arguments)), ast.unparse(call)


def test_the_list_of_commands_is_whole():
    listed = test_every_command_with_a_config_takes_import.pytestmark[0].args[1]
    tools = {path.stem.removesuffix("_run") for path in TOOLS.glob("*.py")}
    # A service refuses modules: tests/tools/test_serve.py.
    assert {tool for tool in tools if loads(tool)} == {*listed, "serve"}


def test_arguments_need_argparse_only():
    code = "import sys, sparseinst.config.arguments; sys.exit(bool({'torch', 'detectron2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0


def run_train_net(*args):
    with loggers_restored():
        return train_net.main(train_net.build_parser().parse_args([str(arg) for arg in args]))


def test_the_example_trains_and_is_found_again(tmp_path, monkeypatch):
    name, num_classes = "MODEL.SPARSE_INST.DECODER.NAME", "MODEL.SPARSE_INST.DECODER.NUM_CLASSES"
    opts = [num_classes, 4, "SOLVER.IMS_PER_BATCH", 1, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (), "DATASETS.TEST", ()]
    (tmp_path / "tiny.yaml").write_text(tiny_cfg(*opts, "SOLVER.WARMUP_ITERS", 0).dump())
    train_json, train_images = write_shapes(tmp_path, 2)
    data = ["--train-json", train_json, "--train-images", train_images]
    out = tmp_path / "out"
    monkeypatch.chdir(EXAMPLE.parent)
    run_train_net(
        "--config-file", tmp_path / "tiny.yaml", "--import", "my_decoder.py", *data, "OUTPUT_DIR", out,
        name, "SharpDecoder",
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert saved["IMPORTS"] == [str(EXAMPLE)]
    assert torch.load(out / "model_final.pth", weights_only=True)["iteration"] == 1
    data = ["--test-json", train_json, "--test-images", train_images]
    weights = ["MODEL.WEIGHTS", out / "model_final.pth", "OUTPUT_DIR", tmp_path / "eval"]
    results = run_train_net("--config-file", out / "config.yaml", "--eval-only", *data, *weights)
    assert "AP" in results["segm"]
    # Without the file the name is unknown, and the message lists the known ones.
    forgotten = ["IMPORTS", "[]", name, "SharperDecoder"]
    with pytest.raises(SystemExit, match=f"error: {name} is 'SharperDecoder'.*GroupIAMDecoder.*IMPORTS"):
        run_train_net("--config-file", out / "config.yaml", "--eval-only", *data, *weights, *forgotten)
