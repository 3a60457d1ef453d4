"""The command serve: its config, its errors, and a service that is started and stopped."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi", reason="the extra serve is not installed")

import httpx2  # noqa: E402

from sparseinst.inference import Predictor, read_image  # noqa: E402
from sparseinst.runtime import exported_model  # noqa: E402
from sparseinst.tools import serve, serve_run  # noqa: E402
from tests.runtime.test_exported_files import onnx_file  # noqa: E402
from tests.serving.service import image_bytes, wait_until  # noqa: E402
from tests.tiny_model import tiny_cfg, tiny_model  # noqa: E402

pytestmark = pytest.mark.usefixtures("loggers_as_before")
OPTS = ("MODEL.SPARSE_INST.CLS_THRESHOLD", 0.0)
REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def weights(tmp_path):
    """A trained model's folder: weights, config, classes."""
    (tmp_path / "config.yaml").write_text(tiny_cfg(*OPTS).dump())
    classes = {"names": ["a", "b", "c"], "category_ids": [1, 5, 9]}
    torch.save({"model": tiny_model(*OPTS).state_dict(), "classes": classes}, tmp_path / "model_final.pth")
    return tmp_path / "model_final.pth"


def error_of(capsys, *arguments):
    assert serve.main([*map(str, arguments)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_the_config_of_a_training_is_found(weights):
    predictor = serve_run.predictor_loader(str(weights), None, ["INPUT.MAX_IMAGE_PIXELS", "5000"])()
    assert predictor.classes.category_ids == [1, 5, 9] and predictor.max_image_pixels == 5000


def test_an_exported_model_needs_no_config(tmp_path, monkeypatch):
    path = onnx_file(tmp_path / "m.onnx")
    monkeypatch.setattr(exported_model, "open_network", lambda *args: tiny_model().network)
    for opts, pixels in ((["INPUT.MAX_IMAGE_PIXELS", "5000"], 5000), ([], tiny_cfg().INPUT.MAX_IMAGE_PIXELS)):
        predictor = serve_run.predictor_loader(str(path), None, opts)()
        assert predictor.classes.category_ids == [1, 5, 7] and predictor.max_image_pixels == pixels


def test_an_address_is_passed_on_as_it_is(monkeypatch):
    address = "sparseinst://sparse_inst_r50_giam_aug"
    given = []
    monkeypatch.setattr(serve_run, "load_config", lambda config_file, opts, **options: given.append(opts) or tiny_cfg())
    args = serve.build_parser().parse_args(["--weights", address, "--config-file", "sparse_inst_r50_giam_aug"])
    serve_run.predictor_loader(args.weights, args.config_file, args.opts)
    assert given == [["MODEL.WEIGHTS", address]]


def test_code_of_others_is_refused(weights, capsys, tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    own = tmp_path / "config.yaml"
    own.write_text(own.read_text().replace("IMPORTS: []", "IMPORTS: ['evil.py']"))
    assert "evil.py" in own.read_text()
    assert "(IMPORTS), which is not allowed here" in error_of(capsys, "--weights", weights)
    arguments = [
        "--weights",
        weights,
        "--config-file",
        "quick/shapes.yaml",
        "--opts",
        "IMPORTS",
        f"['{tmp_path}/evil.py']",
    ]
    assert "(IMPORTS), which is not allowed here" in error_of(capsys, *arguments)
    assert not marker.exists()


def test_an_exported_file_with_imports_is_refused_at_the_start(tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    path = tmp_path / "m.onnx"
    # A file that is damaged or appears later is read again by the service, and refused there.
    path.write_bytes(b"damaged")
    load = serve_run.predictor_loader(str(path), None, [])
    onnx_file(path, config=tiny_cfg("IMPORTS", [str(tmp_path / "evil.py")]).dump())
    for refused in (lambda: serve_run.predictor_loader(str(path), None, []), load):
        with pytest.raises(
            ValueError, match=r"m\.onnx has IMPORTS, and the service runs no code of others\. .*Predictor"
        ):
            refused()
    assert not (tmp_path / "ran").exists()


def test_only_the_command_line_trusts_weights(weights, capsys):
    config = weights.parent / "config.yaml"
    config.write_text(config.read_text().replace("TRUSTED_WEIGHTS: false", "TRUSTED_WEIGHTS: true"))
    for arguments in ((), ("--config-file", config)):
        line = error_of(capsys, "--weights", weights, *arguments)
        assert f"{config} sets MODEL.TRUSTED_WEIGHTS to True" in line and "--opts MODEL.TRUSTED_WEIGHTS True" in line
    assert serve_run.predictor_loader(str(weights), None, ["MODEL.TRUSTED_WEIGHTS", "True"])()
    assert serve_run.predictor_loader(str(weights), None, ["MODEL.TRUSTED_WEIGHTS", "False"])()


def test_wrong_arguments_are_one_line(weights, capsys, monkeypatch):
    given = ("--weights", weights)
    assert "elsewhere/config.yaml does not exist: name the config of elsewhere/model.pth by --config-file" in error_of(
        capsys, "--weights", "elsewhere/model.pth"
    )
    assert "--config-file" not in error_of(capsys, *given, "--config-file", "none.yaml")
    for flag, value in (("--workers", 0), ("--max-waiting", -1), ("--port", 70000), ("--timeout", 0),
                        ("--max-upload-mib", "nan"), ("--max-upload-mib", "inf"), ("--port", -1)):  # fmt: skip
        assert flag in error_of(capsys, *given, flag, value)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = error_of(capsys, *given, "--port", port)
        assert f"--host 127.0.0.1 --port {port} cannot be used: " in line
    assert "cannot be used" in error_of(capsys, *given, "--host", "no host")
    monkeypatch.setattr(serve_run, "_PACKAGES", ("fastapi", "no_such_package"))
    assert "needs no_such_package. Install: pip install 'sparseinst[serve]'" in error_of(capsys, *given)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_service_starts_answers_and_stops(weights, stop, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sparseinst", "serve", "--weights", str(weights), "--port", "0"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        lines = iter(process.stdout.readline, "")
        address = next(line.strip() for line in lines if line.startswith("http://127.0.0.1:"))
        wait_until(lambda: httpx2.get(f"{address}/healthz").status_code == 200, 60)
        (tmp_path / "photo.png").write_bytes(image_bytes())
        answer = httpx2.post(f"{address}/predict?threshold=0", content=image_bytes()).json()
        cfg = tiny_cfg(*OPTS, "MODEL.WEIGHTS", str(weights))
        (expected,) = Predictor(cfg)([read_image(tmp_path / "photo.png")], "RGB")
        assert [instance["score"] for instance in answer["instances"]] == expected.scores.tolist()
        process.send_signal(stop)
        rest = "".join(lines)
        assert process.wait(30) == (0 if stop == signal.SIGINT else -signal.SIGTERM)
        assert "Traceback" not in rest, rest
    finally:
        process.kill()
        process.wait()
