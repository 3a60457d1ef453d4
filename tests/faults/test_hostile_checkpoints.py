"""Weights files that were damaged at random, of all formats, loaded into a model as commands load them."""

import io
import json
import pickle
import pickletools
import random
import struct
import zipfile
from pathlib import Path

import torch
from torch import nn

from sparseinst.checkpoint import SparseInstCheckpointer
from tests.faults.hostile import damaged, run_cases

FORMATS = ("zip", "legacy", "pickle", "safetensors")
# What stands in a pickle in place of another instruction; some that data does not need, or that ask for much.
INSTRUCTIONS = [
    b"N", b"\x88", b"}", b"]", b")", b"\x8f", b"(", b"t", b"u", b"e", b"s", b"a", b"R", b"b", b"\x81", b"Q", b"0", b"1",
    b"2", b".", b"\x94", b"\x85", b"\x86", b"\x93", b"h\x00", b"h\x05", b"q\x00", b"r\xff\xff\xff\x7f", b"K\xff",
    b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"\x8a\x05\0\0\0\0\1", b"\x8b\xff\xff\xff\x7f",
    b"X\xff\xff\xff\xff", b"\x8d" + b"\xff" * 8, b"\x8e\0\0\0\0\1\0\0\0", b"\x95" + b"\xff" * 8, b"X\x01\0\0\0x",
    b"cbuiltins\nbytearray\n", b"ccollections\nOrderedDict\n", b"ctorch\nFloatStorage\n", b"ctorch\nLongStorage\n",
    b"ctorch\nTensor\n", b"cos\nmkdir\nX\x0c\0\0\0made by code\x85R", b"cnumpy\ndtype\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"cnumpy.core.multiarray\n_reconstruct\n", b"cargparse\nNamespace\n",
    b"(X\x0c\0\0\0made by codeios\nmkdir\n", b"G" + b"\x7f\xf8" + bytes(6),
]  # fmt: skip
NUMBERS = (-1, 0, 2**31, 2**40, 2**63, 1.5, "", None, [], [2**20, 2**20, 2**20], "F64", "I4", {}, True, "__metadata__")


class Small(nn.Module):
    """Something with a backbone, whose files have more structure than numbers."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
        self.head = nn.Linear(3, 2)


def whole(kind: str) -> bytes:
    """A file that is as it should be."""
    torch.manual_seed(0)
    state = Small().state_dict()
    content = {"model": state, "iteration": 7, "classes": {"names": ["a", "b"], "category_ids": [1, 5]}}
    if kind == "safetensors":
        from safetensors.torch import save

        return save(dict(state), {"by": "me"})
    if kind == "pickle":
        return pickle.dumps({**content, "model": {name: value.numpy() for name, value in state.items()}}, protocol=2)
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=kind == "zip")
    return file.getvalue()


def changed_pickle(data: bytes, generator: random.Random) -> bytes:
    """Instructions replaced, put in, left out or repeated, or other numbers; what follows the pickle stays."""
    places = [place for _, _, place in pickletools.genops(data)]
    end = places[-1] + 1
    parts = [data[a:b] for a, b in zip(places, [*places[1:], end])]
    only_numbers = generator.random() < 0.5
    for _ in range(generator.choice((1, 1, 2, 4))):
        if only_numbers:
            place = generator.choice([place for place, part in enumerate(parts) if part[:1] in (b"K", b"M", b"J")])
            parts[place] = b"K%c" % generator.randrange(12)
            continue
        place = generator.randrange(len(parts))
        instruction = generator.choice([generator.choice(INSTRUCTIONS), generator.choice(parts)])
        parts[place : place + generator.randrange(3)] = [instruction] * generator.choice((0, 1, 1, 1, 2, 200))
    return b"".join(parts) + data[end:]


def changed_structure(kind: str, data: bytes, generator: random.Random) -> bytes:
    """A file that is well formed on the outside, and not on the inside."""
    if kind == "pickle":
        return changed_pickle(data, generator)
    if kind == "legacy":
        # The object is the fourth pickle.
        file = io.BytesIO(data)
        for _ in range(3):
            list(pickletools.genops(file))
        start = file.tell()
        return data[:start] + changed_pickle(data[start:], generator)
    if kind == "safetensors":
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length])
        entry = header[generator.choice(list(header))]
        entry[generator.choice(list(entry))] = generator.choice(NUMBERS)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(file, "w") as changed:
        for name in archive.namelist():
            content = archive.read(name)
            if name.endswith("data.pkl"):
                content = changed_pickle(content, generator)
            elif generator.random() < 0.03:
                content = damaged(content, generator)
            if generator.random() < 0.99:
                changed.writestr(name, content)
    return file.getvalue()


def checkpoint_case(generator: random.Random, number: int, folder: Path):
    kind = FORMATS[number % len(FORMATS)]
    data = whole(kind)
    inside = generator.random() < 0.5
    path = folder / generator.choice(("weights.pth", "weights.pkl", "weights.safetensors"))
    path.write_bytes(changed_structure(kind, data, generator) if inside else damaged(data, generator))
    # At the start of a training, or of a model that was trained.
    is_start = generator.random() < 0.5
    checkpointer = SparseInstCheckpointer(Small(), min_backbone_coverage=0.0 if is_start else None)

    def load():
        try:
            checkpointer.load(str(path), checkpointables=[] if is_start else None)
        except ValueError as error:
            # What could fill the memory is refused before it does.
            assert "does not fit into the memory" not in str(error), error
            raise

    return f"{kind}, {'structure' if inside else 'bytes'}", load


def test_damaged_checkpoints_are_read_or_refused(tmp_path):
    run_cases(checkpoint_case, tmp_path, short=16, full=1000)
