"""The commands' names and parsers: quick, and without PyTorch."""

import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.engine import default_argument_parser

from sparseinst.__main__ import COMMANDS, main
from sparseinst.tools import train_net

REPO = Path(__file__).resolve().parents[2]
TOOLS = sorted(p.stem for p in (REPO / "sparseinst" / "tools").glob("*.py") if "def build_parser" in p.read_text())


def test_the_help_of_every_command_is_quick():
    code = f"""
import contextlib, importlib, sys, time
import sparseinst.__main__
modules = [importlib.import_module(f"sparseinst.tools.{{tool}}") for tool in {TOOLS}]
for run in [sparseinst.__main__.main, *(getattr(module, "cli", None) or module.main for module in modules)]:
    with contextlib.suppress(SystemExit):
        run(["--help"])
        raise AssertionError(run)
assert not {{"torch", "detectron2"}} & sys.modules.keys()
assert time.process_time() < 2
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_trainings_parser_takes_what_detectron2s_takes():
    ours = {action.dest: action for action in train_net.build_parser()._actions}
    for theirs in default_argument_parser()._actions:
        action = ours[theirs.dest]
        for name in ("option_strings", "nargs", "const", "default", "type", "choices", "required"):
            assert getattr(action, name) == getattr(theirs, name), (theirs.dest, name)
    arguments = ["--config-file", "a.yaml", "--eval-only", "--num-gpus", "2", "MODEL.WEIGHTS", "", "--x", "SEED", "1"]
    parsed = vars(default_argument_parser().parse_args(arguments))
    assert vars(train_net.build_parser().parse_args(arguments)).items() >= parsed.items()


def test_every_tool_has_a_name():
    assert set(TOOLS) <= {command.module for command in COMMANDS.values()}


@pytest.mark.parametrize(("name", "before"), [("train", []), ("eval", ["--eval-only"])])
def test_a_name_stands_for_a_tool(name, before, monkeypatch):
    calls = []
    monkeypatch.setattr(train_net, "cli", calls.append)
    monkeypatch.setattr(sys, "argv", ["sparseinst"])
    main([name, "--config-file", "a.yaml", "--help", "SEED", "1"])
    assert calls == [[*before, "--config-file", "a.yaml", "--help", "SEED", "1"]]


def test_help_and_exit_code_of_a_name(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sparseinst"])
    with pytest.raises(SystemExit, match="0"):
        main(["demo", "--help"])
    assert capsys.readouterr().out.startswith("usage: sparseinst demo ")
    assert main(["select", "none.json", "person", "--output", "x.json"]) == 1
    assert "none.json" in capsys.readouterr().err


# For each command arguments that its parser accepts and the command refuses.
CONFIG = ("--config-file", "no_such_config")
REFUSED = {
    "train": CONFIG,
    "eval": CONFIG,
    "demo": (*CONFIG, "--input", "a.png", "--output", "out"),
    "predict": (*CONFIG, "--input", "a.png", "--output", "out.jsonl"),
    "check": ("none.json", "none"),
    "to-coco": ("none", "none", "--output", "out.json"),
    "select": ("none.json", "person", "--output", "out.json"),
    "shapes": ("--output", "out", "--train", "-1"),
    "zoo": ("no_such_checkpoint",),
    "serve": ("--weights", "none.pth"),
    "convert": ("--input", "none.pth"),
    "export": (*CONFIG, "--format", "onnx", "--output", "out"),
    "analyze": CONFIG,
    "compare": ("--data", "x", "y", "--recipe", "a: b", "--output", "out"),
    "benchmark": CONFIG,
    "benchmark-video": (*CONFIG, "--video", "none.mp4"),
    "benchmark-training": CONFIG,
}
# Their exit code 1 is the result of a run: some of the images, the data, the trainings or the exported file is wrong.
WITH_RESULTS = ("demo", "predict", "check", "export", "compare")


def exit_code(arguments):
    try:
        return main(arguments) or 0
    except SystemExit as end:
        # As the interpreter does.
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return 1 if isinstance(end.code, str) else end.code


@pytest.mark.parametrize("name", COMMANDS)
def test_exit_codes_of_errors(name, monkeypatch, tmp_path, capsys, loggers_as_before):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sparseinst"])
    assert exit_code([name, *REFUSED[name]]) == (2 if name in WITH_RESULTS else 1)
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1
    assert exit_code([name, "--no-such-option"]) == 2
    assert "usage: " in capsys.readouterr().err


# A training and the service end in another way: tests/faults and tests/tools/test_serve.py.
@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("train", "eval", "serve")])
def test_ctrl_c(name, monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(f"sparseinst.tools.{COMMANDS[name].module}.prepare_console", interrupted)
    monkeypatch.setattr(sys, "argv", ["sparseinst"])
    try:
        code = exit_code([name, *REFUSED[name]])
    except KeyboardInterrupt:
        pytest.fail("A traceback follows Ctrl-C")
    assert code == 130
    assert capsys.readouterr().err == "Interrupted\n"


def test_an_unknown_name_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["trian"])
    message = capsys.readouterr().err
    assert "'trian'" in message and all(name in message for name in COMMANDS)
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(command.help in printed for command in COMMANDS.values())
