"""Downloads of weights: where they come from, where they are cached, and what is said where they fail."""

import errno
import io
import os
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from detectron2.utils.file_io import PathManager

import sparseinst
from sparseinst import model_zoo
from sparseinst.checkpoint import WeightsFileError, check_weights_file, find_weights
from sparseinst.checkpoint.downloads import find_download
from sparseinst.checkpoint.published import CHECKPOINTS
from sparseinst.tools import zoo
from tests.checkpoint.hosts import serve

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3)}
NAME = "sparse_inst_r50_giam_aug"
ID = "1MK8rO3qtA7vN9KVSBdp0VvZHCNq8-bvz"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def redirect(monkeypatch, url):
    """Send what gdown and huggingface_hub ask for to another server."""
    requests = pytest.importorskip("requests", reason="gdown downloads with it")
    pytest.importorskip("huggingface_hub", reason="downloads from Hugging Face")
    monkeypatch.setenv("HF_ENDPOINT", url)
    # Between the retries of huggingface_hub.
    monkeypatch.setattr(time, "sleep", lambda _: None)
    get = requests.Session.get
    monkeypatch.setattr(
        requests.Session,
        "get",
        lambda self, address, **kw: get(self, address.replace("https://drive.google.com", url), **kw),
    )


@pytest.fixture
def host(cache, monkeypatch):
    """In place of all hosts."""
    file = io.BytesIO()
    torch.save(STATE, file)
    with serve(file.getvalue()) as host:
        redirect(monkeypatch, host.url)
        yield host


def assert_is_state(path):
    assert torch.equal(torch.load(path)["a.weight"], STATE["a.weight"])


def files(folder):
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix != ".lock" and path.is_file()
    )


@pytest.mark.parametrize(
    ("weights", "path"),
    [
        (f"sparseinst://{NAME}", f"sparseinst/{NAME}.pth"),
        (f"sparseinst://{NAME}.yaml", f"sparseinst/{NAME}.pth"),
        (f"https://drive.google.com/file/d/{ID}/view?usp=sharing", f"google_drive/{ID}.pth"),
        (f"sparseinst://configs/{NAME}.yaml", f"sparseinst/{NAME}.pth"),
        (f"https://drive.google.com/u/0/uc?id={ID}&export=download", f"google_drive/{ID}.pth"),
        (f"https://drive.google.com/uc?id={ID}", f"google_drive/{ID}.pth"),
        ("https://drive.google.com/uc?export=download&id=confirm", "google_drive/confirm.pth"),
        ("https://drive.google.com/open?id=abc-_1", "google_drive/abc-_1.pth"),
        ("hf://somebody/models/solo/R50.pth", "huggingface/somebody/models/main/solo/R50.pth"),
        ("hf://somebody/models@v1.0/R50.pth", "huggingface/somebody/models/v1.0/R50.pth"),
        ("https://huggingface.co/a/b/resolve/main/R50.pth?download=true", "huggingface/a/b/main/R50.pth"),
        ("https://huggingface.co/a/b/blob/main/R50.pth", "huggingface/a/b/main/R50.pth"),
        ("HOST/folder/../../R50.pth", "folder/R50.pth"),
        ("HOST/R50.pth?id=3&x=/../y#part", "R50.pth_id=3&x=%2F..%2Fy"),
        ("HOST/R50.pth?matching_heuristics=True", "R50.pth"),
    ],
)  # fmt: skip
def test_each_address_is_downloaded_once(host, cache, weights, path):
    weights = weights.replace("HOST", host.url)
    check_weights_file(weights)
    assert not host.requests
    expected = cache / path.replace("&", "%26")
    assert find_weights(weights) == str(expected)
    assert_is_state(expected)
    assert files(cache) == [str(expected.relative_to(cache))]
    assert host.requests
    host.requests.clear()
    assert find_weights(weights) == str(expected) and not host.requests
    if weights.startswith(("sparseinst://", "hf://")):
        # Detectron2's own commands find it too.
        assert PathManager.get_local_path(weights) == str(expected)


def test_the_revision_is_asked_for(host):
    find_weights("hf://somebody/models@v1.0/R50.pth")
    assert {path for _, path in host.requests} == {"/somebody/models/resolve/v1.0/R50.pth"}


@pytest.mark.parametrize("fault", ["page", "short", "gone"])
@pytest.mark.parametrize(
    ("weights", "address", "path"),
    [
        ("https://drive.google.com/uc?id=FAULT", "https://drive.google.com/uc?id=FAULT", "google_drive/FAULT.pth"),
        ("hf://a/b/FAULT.pth", "https://huggingface.co/a/b/resolve/main/FAULT.pth", "huggingface/a/b/main/FAULT.pth"),
        ("HOST/models/FAULT.pth", "HOST/models/FAULT.pth", "models/FAULT.pth"),
    ],
    ids=["drive", "hugging face", "web"],
)  # fmt: skip
def test_a_failed_download_is_one_line_and_leaves_nothing(host, cache, weights, address, path, fault):
    weights, address, path = (
        text.replace("FAULT", fault).replace("HOST", host.url) for text in (weights, address, path)
    )
    with pytest.raises(WeightsFileError) as raised:
        find_weights(weights)
    message = str(raised.value)
    assert "\n" not in message and f"cannot be downloaded from {address} (" in message
    assert message.endswith(f"and save the file as {cache / path}")
    if fault == "short":
        assert re.search(r"\d+ (of|bytes but the server announced) \d+ bytes|Consistency check|peer closed", message), (
            message
        )
    assert files(cache) == []
    # The advice works.
    torch.save(STATE, cache / path)
    assert_is_state(find_weights(weights))


@pytest.mark.parametrize("weights", [f"sparseinst://{NAME}", "hf://a/b/R50.pth"])
def test_without_a_network(cache, monkeypatch, capfd, weights):
    redirect(monkeypatch, "http://127.0.0.1:9")
    # huggingface_hub sets the level of its log when it is imported.
    for module in [module for module in sys.modules if module.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(WeightsFileError, match=r"cannot be downloaded from https://\S+ .*save the file as /.*\.pth$"):
        find_weights(weights)
    assert files(cache) == []
    assert "thrown while requesting" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["mkdir", "replace"])
def test_a_cache_folder_that_is_full(host, cache, monkeypatch, name):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path if name == "mkdir" else os, name, fail)
    expected = rf"from {host.url}/R50.pth cannot be saved as {cache}/R50.pth \(No space left.*FVCORE_CACHE$"
    with pytest.raises(WeightsFileError, match=expected):
        find_weights(f"{host.url}/R50.pth")
    monkeypatch.undo()
    assert files(cache) == []


def test_terms_of_use_are_said(host, cache, monkeypatch, caplog, capsys):
    address = "hf://xinlongwang/SOLO/SOLO_R50_1x.pth"
    find_weights(address)
    assert "give it for non-commercial use only" in caplog.text
    caplog.clear()
    find_weights("hf://a/b/R50.pth")
    assert "commercial" not in caplog.text
    monkeypatch.setitem(CHECKPOINTS, "solo/solo_r50_1x", address)
    names = [line.split()[0] for line in zoo.list_checkpoints().splitlines() if "non-commercial" in line]
    assert "solo/solo_r50_1x" in names and NAME not in names


def test_what_an_interrupted_download_left_is_not_taken(host, cache, monkeypatch):
    path = cache / "models" / "R50.pth"
    leftovers = [path.with_name(".R50.pth.download") / "download", path.with_name(".R50.pth.partial")]
    leftovers[0].parent.mkdir(parents=True)
    for leftover in leftovers:
        leftover.write_bytes(b"half")

    def interrupt(source, target):
        target.write(source.read(100))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", interrupt)
        with pytest.raises(KeyboardInterrupt):
            find_weights(f"{host.url}/models/R50.pth")
    assert not path.exists()
    assert_is_state(find_weights(f"{host.url}/models/R50.pth"))
    assert files(cache) == ["models/R50.pth"]


def test_one_downloads_and_the_others_wait(host):
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(find_weights, [f"{host.url}/models/R50.pth"] * 4))
    assert len(set(paths)) == 1 and len(host.requests) == 1


def test_a_download_that_needs_code_is_left_to_the_reader(host):
    file = io.BytesIO()
    torch.save({"model": STATE, "settings": torch.nn.Linear(1, 1)}, file)
    host.content = file.getvalue()
    assert Path(find_weights(f"{host.url}/R50.pth")).is_file()


@pytest.mark.parametrize(
    ("package", "weights"), [("gdown", f"sparseinst://{NAME}"), ("huggingface_hub", "hf://a/b/c.pth")]
)
def test_without_the_package_the_extra_and_the_path_are_named(cache, monkeypatch, package, weights):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"package {package}.*'sparseinst\[zoo\]'.*save the file as {cache}"):
        find_weights(weights)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("sparseinst://r50", "No published checkpoint is named 'r50'; the names are sparse_inst_r50_base, "),
        ("sparseinst://../../etc/passwd", "No published checkpoint"),
        ("hf://file.pth", "expected hf://OWNER/NAME/FILE"),
        ("hf://a/b/..", None),
        ("https://", "names no file"),
    ],
)
def test_addresses_that_cannot_exist_are_found_before_anything_is_built(cache, weights, message):
    if message:
        with pytest.raises(WeightsFileError, match=message):
            check_weights_file(weights)
    else:
        assert cache in find_download(weights).path.parents


def test_every_published_checkpoint_has_a_config():
    for name, address in CHECKPOINTS.items():
        assert Path(sparseinst.get_config_file(name)).as_posix().endswith(f"/{name}.yaml")
        assert find_download(address).address == model_zoo.get_checkpoint_url(f"{name}.yaml")
    with pytest.raises(ValueError, match="No published checkpoint is named 'quick/shapes'"):
        model_zoo.get_config("quick/shapes", trained=True)


def test_the_address_of_a_checkpoint_is_one_that_a_browser_opens(cache, monkeypatch):
    monkeypatch.setitem(CHECKPOINTS, "folder/a", "hf://a/b/R50.pth")
    address = model_zoo.get_checkpoint_url("folder/a.yaml")
    assert address == "https://huggingface.co/a/b/resolve/main/R50.pth"
    assert find_download(address).path == find_download("hf://a/b/R50.pth").path
    assert model_zoo.get_checkpoint_url(NAME) == f"https://drive.google.com/uc?id={ID}"


def test_the_model_zoo(host, cache, monkeypatch):
    assert sparseinst.model_zoo is model_zoo
    assert model_zoo.get_checkpoint(NAME) == str(cache / "sparseinst" / f"{NAME}.pth")
    assert model_zoo.get_config(NAME, trained=True).MODEL.WEIGHTS == f"sparseinst://{NAME}"
    assert model_zoo.get_config(f"{NAME}.yaml").MODEL.WEIGHTS.startswith("detectron2://")

    source = model_zoo.get("quick/shapes", device="cpu")
    assert source.training
    file = io.BytesIO()
    torch.save({"model": source.state_dict()}, file)
    host.content = file.getvalue()
    monkeypatch.setitem(CHECKPOINTS, "quick/shapes", f"{host.url}/model_final.pth")
    model = model_zoo.get("quick/shapes", trained=True)
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_the_command(host, cache, capsys):
    zoo.main([])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CHECKPOINTS) + 2 and not any("  cached  " in line for line in lines)
    zoo.main([NAME])
    assert capsys.readouterr().out.strip() == str(cache / "sparseinst" / f"{NAME}.pth")
    zoo.main([])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "  cached  " in line]
    assert line.split() == [NAME, "cached", CHECKPOINTS[NAME]]
    assert zoo.main(["r50"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and "No published checkpoint" in printed
