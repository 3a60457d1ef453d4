"""PyTorch and safetensors files whose claims are not true: refused before anything believes them."""

import argparse
import json
import pickle
import struct
import zipfile
from collections import Counter, OrderedDict

import pytest
import torch
from torch import nn

from sparseinst.checkpoint import WeightsFileError, read_weights_file

REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
HOOKS = b"ccollections\nOrderedDict\n)R"


def integer(value):
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def storage(num_elements, key="0", kind="FloatStorage", view=b""):
    name = b"ctorch\n" + kind.encode() + b"\n"
    return b"(" + text("storage") + name + text(key) + text("cpu") + integer(num_elements) + view + b"tQ"


def tensor(stored, offset=0, size=(2,), stride=(1,), hooks=HOOKS):
    size, stride = (b"(" + b"".join(map(integer, numbers)) + b"t" for numbers in (size, stride))
    return REBUILD + b"(" + stored + integer(offset) + size + stride + b"\x89" + hooks + b"tR"


def state(*tensors):
    return b"\x80\x02}(" + b"".join(text(str(index)) + value for index, value in enumerate(tensors)) + b"u."


def write_zip(path, pickled, stored=bytes(8), compression=zipfile.ZIP_STORED, names=("0",)):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name in names:
            archive.writestr(f"archive/data/{name}", stored)
        archive.writestr("archive/version", "3\n")
    return path


def refused(path, message):
    with pytest.raises(WeightsFileError, match=f"{path.name}.*{message}"):
        read_weights_file(path)


def test_true_claims(tmp_path):
    base = torch.arange(12.0)
    module = nn.Linear(2, 3)
    content = {
        "views": [base[3:].reshape(3, 3), base.reshape(3, 4).t(), base[::2]], "expanded": torch.ones(1).expand(5),
        "empty": torch.zeros(0, 3), "scalar": torch.tensor(2), "parameter": nn.Parameter(torch.ones(2)),
        "dtypes": [torch.ones(3).to(dtype) for dtype in (torch.bfloat16, torch.int8, torch.bool, torch.complex64)],
        "state": module.state_dict(), "optimizer": torch.optim.SGD(module.parameters(), 0.1, momentum=0.9).state_dict(),
        "counter": Counter([1, 1]), "size": torch.Size([1, 2]), "dtype": torch.float16, "set": {1, 2}, "bytes": b"\xff",
        "args": argparse.Namespace(lr=0.1), "device": torch.device("cpu"), "complex": 1j, "array": bytearray(b"ab"),
    }  # fmt: skip
    assert isinstance(content["state"], OrderedDict) and hasattr(content["state"], "_metadata")
    for zipped in (True, False):
        torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        read = read_weights_file(tmp_path / "a.pth").content
        assert list(read) == list(content)
        for value, expected in zip(read["views"], content["views"]):
            assert torch.equal(value, expected)
        assert read["dtypes"][1].tolist() == [1, 1, 1] and read["bytes"] == b"\xff"
        torch.testing.assert_close(dict(read["state"]), dict(content["state"]))
    # Types that the older format does not have.
    torch.save(
        {"a": torch.ones(3, dtype=torch.uint16), "b": torch.ones(3).to(torch.float8_e5m2)[1:]}, tmp_path / "a.pth"
    )
    read = read_weights_file(tmp_path / "a.pth").content
    assert read["a"].tolist() == [1, 1, 1] and read["b"].float().tolist() == [1, 1]


def test_a_file_written_by_hand_is_read(tmp_path):
    # So that what is refused below is refused for its one flaw.
    path = write_zip(tmp_path / "a.pth", state(tensor(storage(2)), tensor(storage(2), 1, (1, 1), (5, 5))))
    assert [value.tolist() for value in read_weights_file(path).content.values()] == [[0, 0], [[0]]]


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        # Read as far as claimed, this would be another process's memory, or the end of this one.
        (state(tensor(storage(2**34), size=(1,))), "storage '0' claims 68719476736 bytes, and has 8"),
        (state(tensor(storage(3))), "storage '0' claims 12 bytes, and has 8"),
        (state(tensor(storage(2, "1"))), "storage '1' claims 8 bytes, and has 0"),
        (state(tensor(storage(-1))), "a storage without a type, a length or a key"),
        (state(tensor(storage(2)), tensor(storage(1), size=(1,))), "storage '0' claims two lengths"),
        (state(tensor(storage(2), 1)), "needs 3 elements, and 2 are stored"),
        (state(tensor(storage(2), -1)), "whose size and strides are none"),
        (state(tensor(storage(2), 0, (2, 2), (2, 1))), "needs 4 elements, and 2 are stored"),
        (state(tensor(storage(2), 0, (2,), (1, 1))), "whose size and strides are none"),
        (state(tensor(storage(2), 0, (2**40,), (0,))), "claims 4398046511104 bytes"),
        (state(tensor(storage(2), 0, (2**50, 2**50), (0, 0))), "claims .* bytes"),
        (state(tensor(storage(2), hooks=b"}K\x01ctorch\nfloat32\ns")), "one that should call something"),
        (state(tensor(b"K\x01")), "a tensor without a storage"),
        (b"\x80\x02ctorch\nFloatStorage\n" + integer(2**40) + b"\x85R.", "it calls torch.FloatStorage"),
        (b"\x80\x02ctorch\nTensor\n" + integer(2**40) + b"\x85R.", "it names torch.Tensor"),
        (b"\x80\x02cbuiltins\nbytearray\n" + integer(2**40) + b"\x85R.", "bytes that are not given as such"),
        (b"\x80\x02ccollections\nOrderedDict\n)R}" + text("items") + b"K\x01sb.", "attributes to a OrderedDict"),
        (b"\x80\x02K\x01Q.", "something else than a storage"),
        (b"\x80\x02}(K\x01K\x01\x86q\x00h\x00\x86K\x01u.", "a key of type tuple"),
    ],
)  # fmt: skip
def test_false_claims_in_a_zip_file(tmp_path, pickled, message):
    refused(write_zip(tmp_path / "a.pth", pickled), message)


def test_zip_files_that_are_not_as_they_seem(tmp_path):
    pickled = state(tensor(storage(2)))
    path = write_zip(tmp_path / "a.pth", pickled, compression=zipfile.ZIP_DEFLATED)
    refused(path, "its entries are compressed")
    refused(write_zip(path, pickled, names=("0", "a", "A")), "two entries have one name")
    write_zip(path, pickled)
    path.write_bytes(b"PK\3\4" + bytes(100) + path.read_bytes())
    refused(path, "its list of entries is not where it says")
    write_zip(path, pickled)
    path.write_bytes(path.read_bytes() + b"more")
    refused(path, "does not end as PyTorch's files do")
    # One entry's data as that of all others: small as a file, and large once read.
    stored = bytes(1000)
    write_zip(path, state(tensor(storage(250))), stored, names=tuple("0123456789"))
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        first = archive.getinfo("archive/data/0").header_offset
        cut_from, cut_to = archive.getinfo("archive/data/1").header_offset, archive.start_dir
    entries = bytes(data[cut_to:])
    start = 0
    for _ in range(13):
        start = entries.find(b"PK\1\2", start)
        if start < 0:
            break
        offset = struct.unpack_from("<L", entries, start + 42)[0]
        if offset > first:
            entries = entries[: start + 42] + struct.pack("<L", first) + entries[start + 46 :]
        start += 4
    end = struct.pack("<L", cut_from)
    path.write_bytes(data[:cut_from] + entries[:-6] + end + entries[-2:])
    refused(path, "together larger than the file")


def write_legacy(path, pickled, keys, data):
    parts = [pickle.dumps(value, protocol=2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    path.write_bytes(b"".join(parts) + pickled + pickle.dumps(keys, protocol=2) + data)
    return path


def test_claims_in_a_file_of_the_format_before_1_6(tmp_path):
    data = struct.pack("<q2f", 2, 1, 2)
    path = tmp_path / "a.pth"
    write_legacy(path, state(tensor(storage(2, view=b"N"))), ["0"], data)
    assert read_weights_file(path).content["0"].tolist() == [1, 2]
    view = b"(" + text("v") + integer(1) + integer(1) + b"t"
    write_legacy(path, state(tensor(storage(2, view=view), size=(1,))), ["0"], data)
    assert read_weights_file(path).content["0"].tolist() == [2]
    view = b"(" + text("v") + integer(1) + integer(2) + b"t"
    refused(write_legacy(path, state(tensor(storage(2, view=view))), ["0"], data), "a part of a storage that is not in")
    refused(write_legacy(path, state(tensor(storage(2**40, view=b"N"))), ["0"], data), "storage '0' claims")
    refused(write_legacy(path, state(tensor(storage(2, view=b"N"))), [], data), "list of what follows")
    refused(write_legacy(path, state(tensor(storage(2, view=b"N"))), ["0"], data[:-1]), "more data than follow")
    refused(write_legacy(path, state(tensor(storage(2, view=b"N"), 1)), ["0"], data), "needs 3 elements")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [2**40, 2**10]}, "claims 4503599627370496 bytes, and has 8"),
        ({"shape": [3]}, "claims 12 bytes, and has 8"),
        ({"shape": [-2]}, "no list of whole numbers"),
        ({"shape": 2}, "no list of whole numbers"),
        ({"data_offsets": [0, 2**40]}, "not within the file's 8 bytes"),
        ({"data_offsets": [8, 0]}, "not within"),
        ({"data_offsets": [0]}, "not within"),
        ({"dtype": "F9"}, "has dtype 'F9'; known are"),
        ({"dtype": [1]}, "has dtype"),
    ],
)
def test_false_claims_in_a_safetensors_file(tmp_path, changes, message):
    pytest.importorskip("safetensors", reason="asked for before the file is looked at")
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    path = tmp_path / "a.safetensors"
    for changed in (entry, {**entry, **changes}):
        header = json.dumps({"a": changed, "__metadata__": {"by": "me"}}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
        if changed == entry:
            assert read_weights_file(path).content["a"].tolist() == [0, 0]
    refused(path, message)


def test_safetensors_headers_that_are_none(tmp_path):
    pytest.importorskip("safetensors", reason="asked for before the file is looked at")
    path = tmp_path / "a.safetensors"
    for length, header, message in (
        (2**31, b"{}", "its header claims 2147483648 bytes, and 2 follow"),
        (100_005, b'{"a":' + b"[" * 100_000, "nested too deeply"),
        (2, b"{x", "a.safetensors"),
        (8, b'{"a": 1}', "the tensor 'a' has no dtype"),
        (9, b'{"\xff": {}}', "a.safetensors"),
    ):
        path.write_bytes(struct.pack("<Q", length) + header)
        refused(path, message)
