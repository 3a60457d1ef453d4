"""Atomic writing: errors in the middle, a full disk, and the files that interrupted writers leave."""

import resource
import signal
import subprocess

import pytest
import torch

from sparseinst.checkpoint import OutputError, write_atomically
from sparseinst.checkpoint.atomic_write import remove_partial_files
from tests.faults.child import run_in_child

TENSORS = {"a": torch.arange(200_000)}  # 1.6 MB


def save(path):
    write_atomically(path, lambda file: torch.save(TENSORS, file))


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "model.pth"
    save(path)
    assert torch.equal(torch.load(path)["a"], TENSORS["a"])
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_what_was_there_stays_while_a_writer_works_and_where_it_fails(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        file.flush()
        assert path.read_bytes() == b"old"
        assert [p.name for p in tmp_path.iterdir() if p != path] == [".model.pth.partial"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_an_error_that_is_not_the_disks_is_not_called_so(tmp_path):
    with pytest.raises(RuntimeError, match="own") as caught:
        write_atomically(tmp_path / "x", lambda file: (_ for _ in ()).throw(RuntimeError("own")))
    assert not isinstance(caught.value, OSError)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(OutputError, match="No such file or directory"):
        save(tmp_path / "missing" / "model.pth")


def save_with_little_room(path, room):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    try:
        save(path)
    except OutputError as error:
        print(error)


# Within a tensor; within what torch writes at the end; so little is left that only the names are missing.
@pytest.mark.parametrize("room", [1_000, 800_000, 1_600_000])
def test_no_room(tmp_path, room):
    path = tmp_path / "model.pth"
    path.write_bytes(b"old")
    outcome = run_in_child(save_with_little_room, path, room)
    assert outcome.exit_code == 0, outcome.output
    assert "model.pth cannot be written: File too large" in outcome.output and "GB are free" in outcome.output
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a disk of 1 MB cannot be mounted here: {mounted.stderr.strip()}")
    try:
        path = disk / "model.pth"
        path.write_bytes(b"old")
        with pytest.raises(OutputError, match="No space left on device; 0.00 GB are free") as caught:
            save(path)
        assert str(caught.value).endswith("Make room, or write to another folder (OUTPUT_DIR)")
        assert path.read_bytes() == b"old" and list(disk.iterdir()) == [path]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_partial_files_are_removed_and_nothing_else(tmp_path):
    for name in (".model.pth.partial", "model.pth", ".other", "partial"):
        (tmp_path / name).write_bytes(b"x")
    remove_partial_files(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other", "model.pth", "partial"]
