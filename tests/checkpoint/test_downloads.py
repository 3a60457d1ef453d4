"""Weights from Google Drive, Hugging Face and by name, with a local server in place of the hosts."""

import http.server
import threading
from urllib.parse import urlparse

import pytest
import torch

from sparseinst import model_zoo
from sparseinst.checkpoint import WeightsFileError, downloads, find_weights
from sparseinst.checkpoint.names.published import PUBLISHED
from sparseinst.config import get_config_file
from sparseinst.tools import zoo

DRIVE_ID = "1MK8rO3qtA7vN9KVSBdp0VvZHCNq8-bvz"
COMMIT = "a" * 40


class Server(http.server.ThreadingHTTPServer):
    """Answer with ``body``; ``cut``: close the connection after that many bytes."""

    body, cut, requests = b"", None, 0


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self._head()

    def do_GET(self):
        self.server.requests += 1
        self._head()
        self.wfile.write(self.server.body[: self.server.cut])

    def _head(self):
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Disposition", 'attachment; filename="weights.pth"')
        self.send_header("Content-Length", str(len(self.server.body)))
        self.send_header("ETag", '"0123456789abcdef"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    torch.save({"model": {"weight": torch.arange(5000.0)}}, tmp_path / "whole.pth")
    server = Server(("127.0.0.1", 0), Handler)
    server.body = (tmp_path / "whole.pth").read_bytes()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(downloads, "DRIVE_FILE", host + "/uc?id={}")
    monkeypatch.setattr(downloads, "HUB", host)
    yield server
    server.shutdown()
    server.server_close()


ADDRESSES = {
    "gdown": [
        "sparseinst://sparse_inst_r50_giam_aug",
        f"https://drive.google.com/file/d/{DRIVE_ID}/view?usp=sharing",
        f"https://drive.google.com/uc?id={DRIVE_ID}",
    ],
    "huggingface_hub": ["hf://xinlongwang/SOLO/SOLO_R50_1x.pth", "hf://xinlongwang/SOLO@v1.0/folder/model.pth"],
}


@pytest.mark.parametrize(("package", "address"), [(name, each) for name in ADDRESSES for each in ADDRESSES[name]])
def test_a_download_is_cached(server, package, address):
    pytest.importorskip(package, reason=f"the package {package} (extra 'zoo') is not installed")
    path = find_weights(address)
    assert path == str(downloads.cached_file(address))
    assert torch.load(path)["model"]["weight"][-1] == 4999
    requests = server.requests
    assert find_weights(address) == path and server.requests == requests > 0


@pytest.mark.parametrize(("package", "address"), [(name, ADDRESSES[name][0]) for name in ADDRESSES])
@pytest.mark.parametrize("fault", ["a page", "cut off", "shortened", "no network"])
def test_a_failed_download_says_where_to_put_the_file(server, package, address, fault):
    pytest.importorskip(package, reason=f"the package {package} (extra 'zoo') is not installed")
    whole = server.body
    if fault == "a page":
        server.body = b"<!DOCTYPE html><html><title>Sign in</title></html>"
    elif fault == "cut off":
        server.cut = len(whole) // 2
    elif fault == "shortened":
        server.body = whole[: len(whole) // 2]
    else:
        server.shutdown()
        server.server_close()
    with pytest.raises(WeightsFileError, match="cannot be downloaded") as caught:
        find_weights(address)
    target = downloads.cached_file(address)
    message = str(caught.value)
    assert str(target) in message and "\n" not in message and "http" in message
    # Nothing is left that could be taken for the file, nor a part of it.
    assert [path for path in target.parent.rglob("*") if path.is_file() and path.suffix != ".lock"] == []
    target.write_bytes(whole)
    assert find_weights(address) == str(target)


def test_missing_packages_are_named(server, monkeypatch):
    for package, (address, *_) in ADDRESSES.items():
        monkeypatch.setitem(__import__("sys").modules, package, None)
        with pytest.raises(ImportError, match=rf"needs the package {package}.*sparseinst\[zoo\].*put the file at"):
            find_weights(address)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("sparseinst://no_such_model", "no published checkpoint of 'no_such_model'.*sparseinst://sparse_inst_r50_giam"),
        ("hf://xinlongwang/SOLO", "names no file"),
        ("hf://xinlongwang/SOLO/../../../weights.pth", "names no file"),
        ("https://drive.google.com/drive/folders", "has no id"),
    ],
)
def test_wrong_addresses(server, address, message):
    with pytest.raises(WeightsFileError, match=message):
        find_weights(address)
    assert server.requests == 0


def test_every_published_checkpoint_has_a_config_and_a_place():
    places = {downloads.cached_file(f"sparseinst://{name}") for name in PUBLISHED}
    assert None not in places and len(places) == len(PUBLISHED) >= 13
    for name, address in PUBLISHED.items():
        assert urlparse(address).scheme in ("https", "hf")
        if name.startswith("sparse_inst"):
            assert get_config_file(name)


def test_model_zoo(server, monkeypatch):
    name = "sparse_inst_r50_giam_aug"
    assert model_zoo.get_checkpoint_url(f"{name}.yaml") == PUBLISHED[name]
    assert model_zoo.get_config(name, trained=True).MODEL.WEIGHTS == PUBLISHED[name]
    assert model_zoo.get_config_file(name) == get_config_file(name)
    model = model_zoo.get("quick/shapes", device="cpu")
    assert not model.training
    with pytest.raises(ValueError, match="There is no published checkpoint of 'quick/shapes'"):
        model_zoo.get("quick/shapes", trained=True)


def test_the_command(server, capsys):
    pytest.importorskip("gdown", reason="the package gdown (extra 'zoo') is not installed")
    assert zoo.main([]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in PUBLISHED) and "yes" not in listed
    assert zoo.main(["sparse_inst_r50_giam"]) == 0
    assert capsys.readouterr().out.strip() == str(downloads.cached_file("sparseinst://sparse_inst_r50_giam"))
    assert zoo.main([]) == 0 and "yes" in capsys.readouterr().out
    assert zoo.main(["no_such_model"]) == 2 and "error: " in capsys.readouterr().err
