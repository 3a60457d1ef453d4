"""A local Ray with two actors writes the lines that one process of `sparseinst predict` writes."""

import json
import os
import time

import numpy as np
import pytest
import torch

from sparseinst import load_config
from sparseinst.inference.prediction_lines import list_images
from sparseinst.inference.ray_stage import PredictStage
from sparseinst.tools import predict
from tests.tiny_model import tiny_cfg, tiny_model
from tests.tools.demo_scenes import save_scene

ray = pytest.importorskip("ray")
NUM_IMAGES = 9


@pytest.fixture(scope="module")
def local_ray():
    # One core for each actor, and one for reading.
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray")
    for index in range(NUM_IMAGES):
        save_scene(folder / "in" / f"{index}.png", (90, 100 + 10 * index, 90), size=(48 + index, 64))
    save_scene(folder / "in" / "_a.png", (90, 100, 90), size=(48, 64))
    save_scene(folder / "in" / "more" / "b.png", (90, 100, 90), size=(48, 64))
    (folder / "in" / "notes.txt").write_text("no image")
    (folder / "in" / "broken.png").write_bytes(b"no image")
    opts = ("MODEL.SPARSE_INST.CLS_THRESHOLD", 0.0, "MODEL.WEIGHTS", str(folder / "model.pth"))
    torch.save({"model": tiny_model(*opts[:2]).state_dict()}, folder / "model.pth")
    (folder / "config.yaml").write_text(tiny_cfg(*opts).dump())
    return folder


def lines_of_one_process(folder):
    output = folder / "one.jsonl"
    arguments = ["--config-file", folder / "config.yaml", "--input", folder / "in", "--output", output]
    assert predict.main([str(argument) for argument in arguments]) == 1
    return [json.loads(line) for line in output.read_text().splitlines()[1:]]


class NotingStage(PredictStage):
    """Also returns the process of the actor, after a pause in which the other actor gets a batch."""

    def __call__(self, batch):
        time.sleep(0.5)
        return super().__call__(batch) | {"process": np.full(len(batch["path"]), os.getpid())}


def test_two_actors_give_the_lines_of_one_process(local_ray, workspace):
    cfg = load_config(str(workspace / "config.yaml"))
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    files = ray.data.read_binary_files(list_images([str(workspace / "in")]), include_paths=True)
    rows = files.map_batches(NotingStage, fn_constructor_args=(cfg,), concurrency=2, batch_size=2).take_all()
    assert len({row["process"] for row in rows}) == 2
    found = {row["path"]: json.loads(row["line"]) for row in rows}
    expected = {line["file_name"]: line for line in lines_of_one_process(workspace)}
    assert list(found) == list(expected) and len(found) == NUM_IMAGES + 2
    assert "it is not an image" in found[str(workspace / "in" / "broken.png")]["error"]
    assert sum(len(line.get("detections", [])) for line in found.values()) > NUM_IMAGES
    assert found == expected
