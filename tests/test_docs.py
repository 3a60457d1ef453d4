"""README, CONTRIBUTING and docs/: their example runs, and their links and images exist."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from sparseinst import load_config
from sparseinst.checkpoint.published import CHECKPOINTS
from sparseinst.inference import VideoReader, VideoWriter
from tests.tiny_model import random_input, tiny_cfg, tiny_model

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TARGET = re.compile(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"")


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_images_exist(page):
    broken = []
    for match in TARGET.finditer(page.read_text()):
        link = match[1] or match[2]
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        is_missing = not target.exists() or (anchor and anchor not in anchors(target))
        if is_missing and not link.startswith("https://"):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_config_files_in_commands_exist(page):
    names = re.findall(r"--config-file (\S+)", page.read_text())
    files = [name for name in names if name.startswith("configs/") and "my_config" not in name and "*" not in name]
    assert not [name for name in files if not (ROOT / name.strip("`")).is_file()]


def test_every_extra_is_explained():
    extras = re.search(r"extras_require=\{(.*?)^    \}", (ROOT / "setup.py").read_text(), re.DOTALL | re.MULTILINE)[1]
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "getting_started.md").read_text(), re.MULTILINE)
    explained = {name for row in rows for name in re.findall("`(.*?)`", row)}
    assert set(re.findall(r'^        "([\w-]+)":', extras, re.MULTILINE)) - explained == set()


def test_addresses_of_yolact_are_those_of_the_checkpoints():
    page = (ROOT / "docs" / "yolact.md").read_text()
    rows = re.findall(r"^\| \[(yolact_\w+)\].*\((https://huggingface.co/\S+)\) \|$", page, re.MULTILINE)
    published = {name: address for name, address in CHECKPOINTS.items() if name.startswith("yolact/")}
    assert {f"yolact/{name}": address.replace("https://huggingface.co/", "hf://").replace("/resolve/main", "")
            for name, address in rows} == published  # fmt: skip


def test_example_of_frames_one_by_one_runs(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "inference.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "stream(" in block]
    monkeypatch.chdir(tmp_path)
    opts = ("MODEL.SPARSE_INST.CLS_THRESHOLD", 0.0, "MODEL.WEIGHTS", "")
    Path("tiny.yaml").write_text(tiny_cfg(*opts).dump())
    torch.save({"model": tiny_model(*opts).state_dict()}, "model_final.pth")
    with VideoWriter("clip.mp4", 10) as writer:
        for _ in range(4):
            writer.write(np.full((48, 64, 3), 90, np.uint8))
    code = code.replace("sparse_inst_r50_giam", "tiny.yaml").replace("> 0.5", "> 0")
    exec(code, {})
    with VideoReader("drawn.mp4") as reader:
        assert len(list(reader)) == 4
    results = json.loads(Path("found.json").read_text())
    assert {result["image_id"] for result in results} == {1, 2, 3, 4}


def code_blocks(language):
    section = (ROOT / "README.md").read_text().split("## Extend")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def test_readme_example_of_a_decoder_runs(tmp_path):
    configs = tmp_path / "configs"
    shutil.copytree(ROOT / "configs", configs)
    (decoder,), (config,) = code_blocks("python"), code_blocks("yaml")
    # The same file for every test, because a name is registered once in a process.
    example = ROOT / "demo" / "my_decoder.py"
    assert example.read_text() == decoder
    (configs / "my_config.yaml").write_text(config.replace("my_decoder.py", str(example)))
    opts = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]
    model = build_model(load_config(str(configs / "my_config.yaml"), opts))
    assert type(model.decoder).__name__ == "SharpDecoder"
    losses = model.train()([random_input(64, 96, num_instances=2)])
    assert set(losses) == {"loss_ce", "loss_mask", "loss_dice", "loss_objectness"}
    (prediction,) = model.eval()([random_input(64, 96)])
    assert prediction["instances"].image_size == (64, 96)
