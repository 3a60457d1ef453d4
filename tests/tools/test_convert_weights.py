"""The command that describes weights files and converts them to Detectron2 checkpoints."""

import logging
import pickle

import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer

from sparseinst.tools import convert_weights
from tests.checkpoint.sources import randomise
from tests.tiny_model import tiny_cfg, tiny_model


@pytest.fixture
def folder(tmp_path):
    """With a config file and torchvision's ResNet-18."""
    (tmp_path / "tiny.yaml").write_text(tiny_cfg().dump())
    torch.save(randomise(torchvision.models.resnet18()).state_dict(), tmp_path / "resnet18.pth")
    return tmp_path


def convert(folder, *more, source="resnet18.pth", output="converted.pth"):
    return convert_weights.main(
        ["--input", str(folder / source), "--config-file", str(folder / "tiny.yaml"),
         "--output", str(folder / output), *more]
    )  # fmt: skip


def refused(capsys, function, *args, **kwargs) -> str:
    assert function(*args, **kwargs) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert printed.out == ""
    return printed.err


def test_converts_for_the_stock_checkpointer(folder, capsys, caplog):
    convert(folder)
    out = capsys.readouterr().out
    assert "backbone: 75 of 75 tensors" in out and "ResNet of torchvision" in out
    assert "nothing for encoder, decoder" in out and "the classifier: 2 (fc.weight, fc.bias)" in out
    assert sorted(path.name for path in folder.iterdir()) == ["converted.pth", "resnet18.pth", "tiny.yaml"]

    content = torch.load(folder / "converted.pth", weights_only=True)
    assert set(content) == {"model", "__author__"}
    model = tiny_model()
    with caplog.at_level(logging.WARNING):
        DetectionCheckpointer(model).load(str(folder / "converted.pth"))
    assert "backbone" not in caplog.text.split("not found in the checkpoint:")[1]
    source = torch.load(folder / "resnet18.pth", weights_only=True)
    assert torch.equal(model.backbone.res3[0].shortcut.weight, source["layer2.0.downsample.0.weight"])
    assert torch.equal(model.backbone.stem.conv1.norm.running_var, source["bn1.running_var"])


def test_nothing_is_overwritten_unasked(folder, capsys):
    (folder / "converted.pth").write_text("mine")
    assert "--force" in refused(capsys, convert, folder)
    assert (folder / "converted.pth").read_text() == "mine"
    convert(folder, "--force")
    assert "model" in torch.load(folder / "converted.pth", weights_only=True)
    capsys.readouterr()
    before = (folder / "resnet18.pth").read_bytes()
    assert "is the input" in refused(capsys, convert, folder, "--force", output="resnet18.pth")
    assert (folder / "resnet18.pth").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "names", "message"),
    [
        ((), {"output": "converted.pkl"}, "must end in .pth"),
        ((), {"output": "no such folder/converted.pth"}, "folder that does not exist"),
        ((), {"source": "tiny.yaml"}, "tiny.yaml is a text file"),
        ((), {"source": "none.pth"}, "none.pth', which does not exist"),
        (("--opts", "MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.RES2_OUT_CHANNELS", "256"), {}, "of the backbone's"),
        (("--opts", "MODEL.NO_SUCH_KEY", "50"), {}, "NO_SUCH_KEY"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(folder, capsys, more, names, message):
    before = {path.name for path in folder.iterdir()}
    assert message in refused(capsys, convert, folder, *more, **names)
    assert {path.name for path in folder.iterdir()} == before


def test_an_interrupted_writing_leaves_nothing(folder, monkeypatch, capsys):
    def full_disk(content, file):
        file.write(b"part")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    assert "No space left" in refused(capsys, convert, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["resnet18.pth", "tiny.yaml"]


def test_without_a_config_the_file_is_described(folder, capsys):
    arrays = {"stem.conv1.weight": torch.zeros(2, 3).numpy(), "res2.0.conv1.weight": torch.zeros(4).numpy()}
    (folder / "R.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "me"}))
    convert_weights.main(["--input", str(folder / "R.pkl")])
    assert capsys.readouterr().out.splitlines() == [
        f"{folder / 'R.pkl'}: pickle of numpy arrays, 0.0 MB",
        "  2 tensors of 0.00 million values, in the entry 'model'",
        "  names: ResNet of Detectron2",
        "  other entries: __author__",
        "    stem.conv1.weight (2, 3) float32",
        "    res2.0.conv1.weight (4,) float32",
    ]
    convert_weights.main(["--input", str(folder / "resnet18.pth")])
    out = capsys.readouterr().out
    assert "PyTorch file, " in out and "122 tensors of 11.70 million" in out and out.endswith("    ...\n")

    assert "go together" in refused(capsys, convert_weights.main, ["--input", "a", "--output", "b.pth"])


def test_code_in_a_file_needs_the_flag(folder, capsys):
    content = {"state_dict": torch.load(folder / "resnet18.pth"), "settings": torch.nn.Linear(1, 1)}
    torch.save(content, folder / "whole.pth")
    assert "MODEL.TRUSTED_WEIGHTS" in refused(capsys, convert, folder, source="whole.pth")
    convert(folder, "--trusted", source="whole.pth")
    convert_weights.main(["--input", str(folder / "whole.pth"), "--trusted"])
    assert "in the entry 'state_dict'" in capsys.readouterr().out
