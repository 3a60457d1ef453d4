"""Files that declare more than they hold, or ask for code: refused in our words, and nothing large is allocated."""

import argparse
import io
import json
import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from sparseinst.checkpoint import WeightsFileError, extract_tensors, read_weights_file
from sparseinst.checkpoint.files import ArrayUnpickler

RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tC\x01btR"
FLOATS = b"cnumpy\ndtype\n(X\x02\x00\x00\x00f4K\x00K\x01tR"


def array(shape, dtype, data):
    """An array's pickle, of pickles of its parts."""
    return RECONSTRUCT + b"(K\x01" + shape + dtype + b"\x89" + data + b"tb"


# A dtype whose flags say that its items are Python objects: numpy itself takes it, and follows the pointers.
OBJECTS = FLOATS + b"(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ftb"
HOSTILE = {
    "memo of 2**31": (b"]r\xff\xff\xff\x7f.", "memo index 2147483647"),
    "text of 2**60": (b"\x8d" + struct.pack("<Q", 2**60) + b"a.", "1152921504606846976 bytes"),
    "text of a negative length": (b"T" + struct.pack("<i", -1) + b".", "byte count < 0"),
    "bytearray of 2**40": (b"\x96" + struct.pack("<Q", 2**40) + b"a.", "1099511627776 bytes"),
    "integer of many digits": (b"L" + b"9" * 10_000 + b"L\n.", "Exceeds the limit"),
    "array of 2**40": (array(b"\x8a\x06\0\0\0\0\0\1\x85", FLOATS, b"C\x04abcd") + b".", "cannot reshape"),
    "array made at once": (b"cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85\x85R.", "not callable"),
    "array of objects": (pickle.dumps(np.array([1, "a"], dtype=object)), "an array of type O8"),
    "array of fields": (pickle.dumps(np.zeros(2, "f4,i8")), "an array of type V12"),
    "array of an unknown type": (array(b"K\x01\x85", FLOATS.replace(b"f4", b"f3"), b"C\x03abc") + b".", "TypeError"),
    "codec": (b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00zip\x86R.", "codec 'zip'"),
    "attributes of a set": (b"c__builtin__\nset\n}X\x01\0\0\0aK\x01sb.", "mappingproxy|attribute"),
    "reference outside": (b"K\x01Q.", "persistent id"),
    "extension": (b"\x82\x01.", "unregistered extension"),
    "unknown instruction": (b"\xff.", "opcode"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles(tmp_path, name):
    content, message = HOSTILE[name]
    path = tmp_path / "weights.pkl"
    path.write_bytes(b"\x80\x02" + content)
    tracemalloc.start()
    with pytest.raises(WeightsFileError, match=f"weights.pkl.*({message})"):
        read_weights_file(path)
    assert tracemalloc.get_traced_memory()[1] < 10 * len(content) + 2**23
    tracemalloc.stop()


def load(data):
    return ArrayUnpickler(io.BytesIO(data)).load()


def test_a_dtype_keeps_its_flags_and_numpy_its_own():
    value = load(array(b"K\x02\x85", OBJECTS, b"C\x08" + bytes(8)) + b".")
    assert not value.dtype.hasobject and value.tolist() == [0, 0] and not np.dtype("f4").hasobject


def test_attributes_do_not_replace_methods():
    content = load(b"ccollections\nOrderedDict\n)R}X\x05\0\0\0itemsK\x01sb.")
    assert isinstance(content, OrderedDict) and list(content.items()) == []


@pytest.mark.parametrize("protocol", range(6))
def test_values_and_arrays_of_every_protocol(protocol):
    values = [
        0, -1, 2**200, 1.5, None, True, "", "é\n'\\", "x" * 300, (), (1, 2), [], {1: {"a": [2]}, None: (3,)}, {1, "a"},
        b"", b"\xff\0" * 200, bytearray(b"ab") if protocol == 5 else 0, frozenset([1]) if protocol >= 4 else 0,
    ]  # fmt: skip
    shared = ["once"]
    *read, first, second = load(pickle.dumps([*values, shared, shared], protocol=protocol))
    assert read == values and [type(value) for value in read] == [type(value) for value in values]
    assert first == shared and first is second

    arrays = [
        np.arange(6, dtype=f"{order}{kind}").reshape(2, 3)
        for order in "<>" for kind in ("f2", "f4", "f8", "i1", "i2", "i8", "u1", "u4", "c8")
    ]  # fmt: skip
    arrays += [np.array([True, False]), np.zeros((2, 0)), np.array(1.5), np.asfortranarray(arrays[0])]
    # As channels_last weights are.
    arrays.append(np.arange(120.0).reshape(2, 3, 4, 5).transpose(0, 3, 1, 2))
    *read, a, b = load(pickle.dumps([*arrays, np.float32(2), np.int64(3)], protocol=protocol))
    for value, expected in zip(read, arrays, strict=True):
        # numpy itself reads the foreign byte order as this machine's.
        assert value.dtype.newbyteorder("=") == expected.dtype.newbyteorder("=") and np.array_equal(value, expected)
    assert (a, b) == (2, 3)


def test_python_2_pickles_of_protocol_0_need_trust(tmp_path):
    data = b"(dp0\nS'w\\xe9\\x00'\np1\nI1\ns."
    (tmp_path / "a.pkl").write_bytes(data)
    with pytest.raises(WeightsFileError, match="a.pkl.*Python 2.*MODEL.TRUSTED_WEIGHTS"):
        read_weights_file(tmp_path / "a.pkl")
    assert read_weights_file(tmp_path / "a.pkl", trusted=True).content == {"wé\0": 1}


@pytest.mark.parametrize("zipped", [True, False])
def test_everything_that_training_scripts_save_with_weights(tmp_path, zipped):
    base, module = torch.arange(12.0), nn.Linear(2, 3)
    content = {
        "views": [base[3:].reshape(3, 3), base.reshape(3, 4).t(), base[::2], torch.ones(1).expand(5)],
        "dtypes": [torch.ones(3).to(dtype) for dtype in (torch.bfloat16, torch.int8, torch.bool, torch.complex64)],
        "state": module.state_dict(), "optimizer": torch.optim.SGD(module.parameters(), 0.1, momentum=0.9).state_dict(),
        "size": torch.Size([1, 2]), "dtype": torch.float16, "set": {1, 2}, "bytes": b"\xff", "complex": 1j,
        "args": argparse.Namespace(lr=0.1), "device": torch.device("cpu"), "array": bytearray(b"ab"),
    }  # fmt: skip
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    read = read_weights_file(tmp_path / "a.pth").content
    assert list(read) == list(content) and read["args"].lr == 0.1
    for value, expected in zip(read["views"], content["views"]):
        assert torch.equal(value, expected)
    torch.testing.assert_close(dict(read["state"]), dict(content["state"]))


def changed(path, old, new):
    """Replace bytes of a zip file's pickle; the rest is written again as it was."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            assert not name.endswith("data.pkl") or data.count(old) >= 1
            archive.writestr(name, data.replace(old, new) if name.endswith("data.pkl") else data)


@pytest.mark.parametrize("num_elements", [124, 0x7FFFFF00])
def test_the_installed_torch_refuses_a_storage_larger_than_its_record(tmp_path, num_elements):
    # Older versions read on into other memory (pytorch#165553). The reader relies on this check.
    path = tmp_path / "a.pth"
    torch.save({"a": torch.zeros(123)}, path)
    changed(path, b"K{", b"J" + struct.pack("<i", num_elements))
    with pytest.raises(WeightsFileError, match="a.pth.*record size .492 bytes. does not match"):
        read_weights_file(path)


def test_a_storage_larger_than_the_rest_of_an_older_file_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.zeros(123)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"K{", b"K\x7c", 1))
    with pytest.raises(WeightsFileError, match="a.pth.*storage has wrong byte size"):
        read_weights_file(path)


def test_a_tensor_outside_its_storage_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.zeros(123, 1)[:, 0]}, path)
    changed(path, b"K{\x85", b"K\x7c\x85")
    with pytest.raises(WeightsFileError, match="a.pth.*resize storage|a.pth.*out of bounds"):
        read_weights_file(path)


def test_a_header_that_is_cut_anywhere_is_refused(tmp_path):
    # Within a number torch raises struct.error.
    path = tmp_path / "a.pth"
    torch.save({"a": torch.zeros(123), "n": 2**20}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    for size in range(20, len(data) - 492):
        path.write_bytes(data[:size])
        with pytest.raises(WeightsFileError, match="a.pth"):
            read_weights_file(path)


def test_zip_files_cannot_unpack_to_more_than_their_size(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.zeros(2000)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    with pytest.raises(WeightsFileError, match="a.pth.*compressed"):
        read_weights_file(path)


def test_only_tensors_that_models_can_copy_are_taken():
    dense = torch.ones(2)
    content = {
        "dense": dense, "sparse": dense.to_sparse(), "meta": torch.ones(2, device="meta"),
        "quantized": torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8),
    }  # fmt: skip
    assert list(extract_tensors(content)[0]) == ["dense"]


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [2**40, 2**10]}, {"shape": [3]}, {"shape": [-2]}, {"shape": 2}, {"data_offsets": [0, 2**40]},
        {"data_offsets": [8, 0]}, {"data_offsets": [0]}, {"dtype": "F9"}, {"dtype": [1]},
    ],
)  # fmt: skip
def test_safetensors_headers_that_do_not_fit_the_file(tmp_path, entry):
    pytest.importorskip("safetensors", reason="reads the file")
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}}).encode()
    path = tmp_path / "a.safetensors"
    for length, data in ((len(header), header + bytes(8)), (2**31, b"{}"), (100_005, b'{"a":' + b"[" * 100_000)):
        path.write_bytes(struct.pack("<Q", length) + data)
        with pytest.raises(WeightsFileError, match="a.safetensors.*damaged"):
            read_weights_file(path)
