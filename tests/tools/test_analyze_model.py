"""The command that says what models cost: tables, JSON, and clear errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparseinst.benchmarks.complexity import analyze_config
from sparseinst.tools import analyze_model
from tests.tiny_model import tiny_cfg

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_cfg().dump())
    return str(path)


def cells(output: str) -> dict[str, list[str]]:
    """Rows of the first markdown table, by their first cell."""
    rows = [line.strip("|").split("|") for line in output.splitlines() if line.startswith("|") and "---" not in line]
    return {name.strip(): [cell.strip() for cell in row] for name, *row in rows}


def test_one_config_is_a_table_of_parts(config, capsys, caplog):
    opts = ["--opts", "MODEL.DEVICE", "cuda"]
    assert analyze_model.main(["--config-file", config, "--size", "250", "300", *opts]) == 0
    printed = capsys.readouterr()
    table = cells(printed.out)
    complexity = analyze_config(tiny_cfg(), (250, 300))
    assert list(table) == ["part", *(name for name in complexity.modules if name), "total"]
    assert {"backbone", "encoder", "decoder", "decoder.inst_branch", "decoder.mask_branch"} < table.keys()
    for name, cost in (("total", complexity.modules[""]), ("decoder", complexity.modules["decoder"])):
        figures = [cost.parameters / 1e6, cost.multiply_adds / 1e9, cost.activations / 1e6]
        assert [float(cell) for cell in table[name]] == pytest.approx(figures, abs=0.051)
    assert printed.out.endswith("\nOne image of 256 x 320 pixels, padding included\n")
    # Not a word of the GPU that need not be there.
    assert printed.err == "" and caplog.text == ""


def test_several_configs_are_a_table_of_models(config, tmp_path, capsys):
    wide = tmp_path / "wide.yaml"
    wide.write_text(tiny_cfg("MODEL.SPARSE_INST.ENCODER.NUM_CHANNELS", 512, "INPUT.MIN_SIZE_TEST", 96).dump())
    assert analyze_model.main(["--config-file", config, str(wide)]) == 0
    output = capsys.readouterr().out
    table = cells(output)
    assert list(table) == ["model", "tiny", "wide"]
    assert table["model"] == ["parameters, M", "multiply-adds, G", "activations, M"]
    assert float(table["wide"][0]) > float(table["tiny"][0])
    assert "64 x 96 pixels, padding included: tiny" in output and "96 x 128 pixels, padding included: wide" in output


def test_the_json_has_what_the_library_counts(config, tmp_path):
    path = tmp_path / "new" / "costs.json"
    opts = ["--opts", "MODEL.SPARSE_INST.DECODER.NUM_MASKS", "8"]
    assert analyze_model.main(["--config-file", config, config, "--json", str(path), *opts]) == 0
    written = json.loads(path.read_text())
    complexity = analyze_config(tiny_cfg("MODEL.SPARSE_INST.DECODER.NUM_MASKS", 8))
    assert len(written) == 2 and written[0] == {
        "config_file": config,
        "size": [64, 96],
        **complexity.modules[""]._asdict(),
        "parts": {name: cost._asdict() for name, cost in complexity.modules.items() if name},
        "uncounted": list(complexity.uncounted),
    }


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config-file", "no_such_config"], "no_such_config"),
        (["--size", "0", "64"], "(0, 64)"),
        (["--opts", "MODEL.NO_SUCH_KEY", "1"], "NO_SUCH_KEY"),
        (["--opts", "MODEL.BACKBONE.NAME", "no_such_backbone"], "no_such_backbone"),
        (["--opts", "MODEL.META_ARCHITECTURE", "ProposalNetwork"], "META_ARCHITECTURE"),
        (["--opts", "MODEL.RESNETS.RES2_OUT_CHANNELS", "256"], "RES2_OUT_CHANNELS"),
        (["--opts", "MODEL.SPARSE_INST.ENCODER.IN_FEATURES", "[p2]"], "IN_FEATURES"),
    ],
)
def test_errors_are_one_line(config, capsys, args, message):
    files = [] if args[0] == "--config-file" else ["--config-file", config]
    assert analyze_model.main([*files, *args]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert message in printed.err


def test_a_file_that_is_not_yaml(tmp_path, capsys):
    path = tmp_path / "broken.yaml"
    path.write_text("MODEL: [\n")
    assert analyze_model.main(["--config-file", str(path)]) == 1
    error = capsys.readouterr().err
    assert "broken.yaml" in error and error.count("\n") == 1


def test_timm_is_missing(config, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert analyze_model.main(["--config-file", config, "--opts", "MODEL.BACKBONE.NAME", "build_timm_backbone"]) == 1
    assert "sparseinst[timm]" in capsys.readouterr().err


def test_the_command_line(config, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-m", "sparseinst.tools.analyze_model", "--config-file", config]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "total" in cells(run.stdout)
    assert list(tmp_path.iterdir()) == [Path(config)]
