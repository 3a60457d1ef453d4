"""What commands write to the terminal, and that they survive a terminal which is closed."""

import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from sparseinst.engine import console
from tests.shapes_data import write_shapes
from tests.tiny_model import tiny_cfg

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [(None, 0, ""), (ValueError("wrong"), 2, "error: wrong\n"), (KeyboardInterrupt(), 130, "Interrupted\n")],
)
def test_exit_codes_of_commands(error, code, line, capsys):
    @console.with_exit_codes(2)
    def main(argv):
        if error is not None:
            raise error
        return len(argv)

    assert main([]) == code and capsys.readouterr().err == line


@pytest.mark.parametrize(("command", "code"), [("serve", 1), ("demo", 2), ("predict", 2)])
def test_commands_without_opencv_name_the_extra(command, code, tmp_path):
    """In a process of its own, because this one has imported OpenCV."""
    (tmp_path / "config.yaml").write_text(tiny_cfg().dump())
    config = ["--config-file", str(tmp_path / "config.yaml")]
    arguments = {
        "serve": ["--weights", "model.pth", *config],
        "demo": [*config, "--input", "a.png", "--output", "out"],
        "predict": [*config, "--input", "a.png", "--output", "out.jsonl"],
    }
    script = (
        "import sys\n"
        "sys.modules['cv2'] = None\n"
        "from sparseinst.__main__ import main\n"
        f"sys.exit(main({[command, *arguments[command]]}))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == code, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: OpenCV cannot be imported (") and "pip install 'sparseinst[headless]'" in line


def test_a_broken_pipe_takes_everything():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        stream = console._LastingStream(pipe)
        for _ in range(3):
            stream.write("x" * 100_000)
            stream.flush()
            print("y", file=stream, flush=True)
        stream.detach()


def test_warnings_of_others_are_hidden_here_and_in_started_processes(monkeypatch):
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:mine")
    code = """
import warnings
warnings.warn("`torch.jit.script` is deprecated. Please switch", FutureWarning)
warnings.warn("another one", FutureWarning)
"""
    with warnings.catch_warnings(record=True) as caught:
        console.hide_foreign_warnings()
        console.hide_foreign_warnings()
        exec(code)
    assert [str(warning.message) for warning in caught] == ["another one"]
    assert os.environ["PYTHONWARNINGS"].startswith("ignore:mine,")
    assert os.environ["PYTHONWARNINGS"].count("`torch.jit.") == 1
    started = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "another one" in started.stderr and "jit" not in started.stderr


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, console.SPIN_COUNT),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, None),
    ],
)
def test_waiting_threads_sleep_early_unless_the_user_says_otherwise(given, expected, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "PYTHONWARNINGS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(console, "survive_closed_streams", lambda: None)
    with warnings.catch_warnings():
        console.prepare_console()
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_records_for_the_log_file_only(capsys):
    logger = logging.getLogger("test_console")
    seen = []
    others = logging.Handler()
    others.emit = lambda record: seen.append(record.getMessage())
    logger.addHandler(logging.StreamHandler(sys.stdout))
    logger.addHandler(others)
    with console.only_in_log_file("test_console"):
        logger.warning("long")
    logger.warning("short")
    assert seen == ["long", "short"]
    assert capsys.readouterr().out == "short\n"


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    folder = tmp_path_factory.mktemp("console")
    opts = ("MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 2)
    cfg = tiny_cfg(*opts, "SOLVER.STEPS", (), "SOLVER.WARMUP_ITERS", 0, "DATALOADER.NUM_WORKERS", 0)
    (folder / "tiny.yaml").write_text(cfg.dump())
    train_json, train_images = write_shapes(folder, 6)
    test_json, test_images = write_shapes(folder, 3, seed=1, split="test")
    command = f"'{sys.executable}' train_net.py --config-file {folder}/tiny.yaml --train-json {train_json}"
    return f"{command} --train-images {train_images} --test-json {test_json} --test-images {test_images}"


def shell(line):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    environment.pop("PYTHONWARNINGS", None)
    return subprocess.run(["bash", "-c", line], cwd=REPO, env=environment, capture_output=True, text=True, timeout=300)


def test_the_terminal_shows_the_training(training, tmp_path):
    result = shell(f"{training} --num-gpus 2 --dist-url auto OUTPUT_DIR {tmp_path}")
    assert result.returncode == 0, result.stderr
    lines = (result.stderr + result.stdout).splitlines()
    first = next(number for number, line in enumerate(lines) if " iter: " in line)
    assert first < 40, lines[:first]
    assert "arning" not in result.stderr and "No CUDA runtime" not in result.stderr
    log = (tmp_path / "log.txt").read_text()
    for text in ("Environment info:", "Running with full config:", "Model:\n"):
        assert text in log and text not in result.stdout
    assert "segm" in json.loads((tmp_path / "results.json").read_text())["results"] and "segm" in result.stdout
    assert (tmp_path / "model_final.pth").is_file()


@pytest.mark.parametrize("streams", ["2>&1 | true; exit ${PIPESTATUS[0]}", "<&- >&- 2>&-"])
def test_a_training_survives_closed_streams(training, tmp_path, streams):
    result = shell(f"{training} OUTPUT_DIR {tmp_path} {streams}")
    assert result.returncode == 0 and result.stderr == ""
    assert "segm" in json.loads((tmp_path / "results.json").read_text())["results"]
    assert (tmp_path / "model_final.pth").is_file()
