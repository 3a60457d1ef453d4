"""Pickles of arrays that ask for more than they hold: refused before anything is allocated, hashed or called."""

import io
import pickle
import struct
import tracemalloc

import numpy as np
import pytest

from sparseinst.checkpoint import WeightsFileError, read_weights_file
from sparseinst.checkpoint.arrays import ArrayUnpickler

RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tC\x01btR"
FLOATS = b"cnumpy\ndtype\n(X\x02\x00\x00\x00f4K\x00K\x01tR"
FROM_BUFFER = b"cnumpy.core.numeric\n_frombuffer\n"


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def array(shape, dtype, data):
    """An array's pickle, of pickles of its parts."""
    return RECONSTRUCT + b"(K\x01" + shape + dtype + b"\x89" + data + b"tb"


def laughs(levels, last):
    """Tuples of one another, twice each, and an instruction on the last: its hash takes 2 to the power of levels."""
    doubled = b"".join(b"q%ch%c\x86" % (n, n) for n in range(levels))
    return last % (b"K\x01" + doubled)


MEGABYTE = b"B" + struct.pack("<I", 2**20) + bytes(2**20)
HOSTILE = {
    "memo of 2**31": (b"]r\xff\xff\xff\x7f.", None),
    "text of 2**60": (b"\x8d" + struct.pack("<Q", 2**60) + b"a.", "1152921504606846976 bytes should follow"),
    "text of 2**31": (b"X" + struct.pack("<I", 2**31) + b"a.", "2147483648 bytes should follow"),
    "text of less than nothing": (b"T" + struct.pack("<i", -1) + b".", "-1 bytes should follow"),
    "bytes of 2**40": (b"\x8e" + struct.pack("<Q", 2**40) + b"a.", "1099511627776 bytes should follow"),
    "bytearray of 2**40": (b"\x96" + struct.pack("<Q", 2**40) + b"a.", "1099511627776 bytes should follow"),
    "integer of 2**31 bytes": (b"\x8b" + struct.pack("<i", 2**31 - 1) + b"a.", "2147483647 bytes should follow"),
    "integer of many digits": (b"L" + b"9" * 10_000 + b"L\n.", "Exceeds the limit"),
    "tuples as a key": (b"}" + laughs(60, b"%sK\x01s."), "a key of type tuple"),
    "tuples in a set": (b"\x8f(" + laughs(60, b"%s\x90."), "a key of type tuple"),
    "tuples in a frozenset": (b"(" + laughs(60, b"%s\x91."), "a key of type tuple"),
    "tuples in a set by its name": (b"cbuiltins\nset\n]" + laughs(60, b"%sa\x85R."), "a key of type tuple"),
    "keys of one hash": (
        b"}(" + b"".join(b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + b"N" for n in range(9)) + b"u.",
        "a huge number",
    ),
    "lists in lists": (b"]" * 10_000 + b"a" * 9_999 + b".", "nested more than 64 deep"),
    "a list in itself": (b"]q\x00h\x00a.", "nested more than 64 deep, or in a circle"),
    "array of 2**40": (
        b"}" + text("a") + array(b"\x8a\x06" + (2**40).to_bytes(6, "little") + b"\x85", FLOATS, b"C\x04abcd") + b"s.",
        "takes 4398046511104 bytes, of which there are 4",
    ),
    "array of a negative size": (array(b"J\xff\xff\xff\xff\x85", FLOATS, b"C\x04abcd") + b".", "whose shape is none"),
    "array of an endless size": (
        array(b"\x8a\x09" + (2**64).to_bytes(9, "little") + b"K\x00\x86", FLOATS, b"C\x00") + b".",
        "whose shape is none",
    ),
    "array made at once": (b"cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85\x85R.", "it calls numpy.ndarray"),
    "array of objects": (pickle.dumps(np.array([1, "a"], dtype=object)), "an array of type O8"),
    "array of fields": (pickle.dumps(np.zeros(2, "f4,i8")), "an array of type V12"),
    "array of an unknown type": (array(b"K\x01\x85", FLOATS.replace(b"f4", b"f3"), b"C\x03abc") + b".", "TypeError"),
    "one block as many arrays": (
        b"](" + MEGABYTE + b"q\x000"
        + (FROM_BUFFER + b"(h\x00" + FLOATS + b"J\x00\x00\x04\x00\x85" + text("C") + b"tR") * 9
        + b"e.", "more than 3 times the size",
    ),
    "one text as many bytes": (
        b"](X" + struct.pack("<I", 2**20) + b"a" * 2**20 + b"q\x000"
        + (b"c_codecs\nencode\nh\x00" + text("latin1") + b"\x86R") * 9 + b"e.", "more than 3 times the size",
    ),
    "instruction that is none": (b"\xff.", "the instruction"),
    "call of a number": (b"K\x01)R.", "it calls a int"),
    "state for a list": (b"]}b.", "it gives a state to a list"),
    "items for a number": (b"K\x01K\x02a.", "items for a list are given to a int"),
    "key without a value": (b"}(K\x01u.", "a key without a value"),
    "outside": (b"K\x01Q.", "something outside"),
    "extension": (b"\x82\x01.", "the instruction"),
    "nothing": (b".", "pop from empty list"),
    "no mark": (b"t.", "pop from empty list"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_asks_for_more_than_it_holds_is_refused(tmp_path, name):
    content, message = HOSTILE[name]
    path = tmp_path / "weights.pkl"
    path.write_bytes(b"\x80\x02" + content)
    tracemalloc.start()
    if message is None:
        assert read_weights_file(path).content == []
    else:
        with pytest.raises(WeightsFileError, match=f"weights.pkl.*{message}"):
            read_weights_file(path)
    # Of the traced memory, which numpy's arrays are in too.
    assert tracemalloc.get_traced_memory()[1] < 10 * len(content) + 2**21
    tracemalloc.stop()


@pytest.mark.parametrize("protocol", range(6))
def test_every_kind_of_value_is_read(protocol):
    values = [
        0, -1, 255, 65535, 2**31 - 1, -(2**40), 2**200, 1.5, float("inf"), None, True, False, "", "é\n'\\", "x" * 300,
        (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], {}, {1: {"a": [2]}, None: (3,)}, {1, "a"}, b"", b"\xff\0" * 200,
        bytearray(b"ab") if protocol == 5 else 0, frozenset([1]) if protocol >= 4 else 0,
    ]  # fmt: skip
    shared = ["once"]
    data = pickle.dumps([*values, shared, shared], protocol=protocol)
    *read, first, second = ArrayUnpickler(io.BytesIO(data), len(data)).load()
    assert read == values and [type(value) for value in read] == [type(value) for value in values]
    assert first == shared and first is second


def test_arrays_of_all_number_types_and_orders():
    arrays = [
        np.arange(6, dtype=f"{order}{kind}").reshape(2, 3)
        for order in "<>" for kind in ("f2", "f4", "f8", "i1", "i2", "i8", "u1", "u4", "c8")
    ]  # fmt: skip
    arrays += [np.array([True, False]), np.zeros((2, 0)), np.array(1.5), np.asfortranarray(arrays[0])]
    for protocol in range(6):
        data = pickle.dumps([*arrays, np.float32(2), np.int64(3)], protocol=protocol)
        *read, a, b = ArrayUnpickler(io.BytesIO(data), len(data)).load()
        for value, expected in zip(read, arrays, strict=True):
            # numpy itself reads the foreign byte order as this machine's.
            assert value.dtype.newbyteorder("=") == expected.dtype.newbyteorder("=") and np.array_equal(value, expected)
        assert (a, b) == (2, 3)


def test_strings_of_python_2():
    data = (
        b"(dp0\nS'w\\xe9\\x00\\''\np1\ncnumpy.core.multiarray\n_reconstruct\np2\n(cnumpy\nndarray\n(I0\ntS'b'\ntRp3\n"
    )
    data += b"(I1\n(I2\ntcnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\n"
    data += b"S'\\x00\\x00\\x80?\\x00\\x00\\x00@'\ntbs."
    (value,) = ArrayUnpickler(io.BytesIO(data), len(data)).load().items()
    assert value[0] == "wé\0'" and value[1].tolist() == [1, 2]
