"""The folder of a run: one run at a time, writable, with room, and no earlier run in it."""

import os
import signal
import sys
import time
from collections import namedtuple

import pytest

from sparseinst.engine import output_folder
from sparseinst.engine.output_folder import check_free_space, check_no_earlier_run, claimed
from tests.faults.child import Child, run_in_child


def hold(folder):
    with claimed(folder):
        print("holding", flush=True)
        time.sleep(60)


def try_to_claim(folder):
    try:
        with claimed(folder):
            pass
    except ValueError as error:
        sys.exit(f"error: {error}")


def test_two_runs_in_one_folder(tmp_path):
    folder = tmp_path / "new" / "run"
    holder = Child(hold, folder)
    while "holding" not in holder.output():
        assert holder.is_alive()
        time.sleep(0.02)
    (folder / ".model_0000001.pth.partial").write_bytes(b"half")
    refused = run_in_child(try_to_claim, folder)
    assert refused.exit_code == 1
    assert f"in use by another run (process {holder.pid})" in refused.output and "OUTPUT_DIR" in refused.output
    # The other run is in the middle of it.
    assert (folder / ".model_0000001.pth.partial").exists()
    # A process that is killed lets go, and what it was writing is removed.
    holder.send(signal.SIGKILL)
    holder.wait(10)
    assert run_in_child(try_to_claim, folder).exit_code == 0
    assert not (folder / ".model_0000001.pth.partial").exists()


def test_a_folder_that_cannot_be_made_or_written_to(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="OUTPUT_DIR.*cannot be written to"), claimed(folder):
            pass
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):
        pytest.skip("this user may write anywhere")
    with pytest.raises(ValueError, match="Permission denied"), claimed(locked):
        pass


def test_checkpoints_of_an_earlier_run(tmp_path):
    check_no_earlier_run(tmp_path)
    check_no_earlier_run(tmp_path / "missing")
    (tmp_path / "model_0000004.pth").write_bytes(b"x")
    with pytest.raises(ValueError, match="model_0000004.pth.*--resume"):
        check_no_earlier_run(tmp_path)


def test_room_for_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda folder: namedtuple("Usage", "free")(3_000_000))
    check_free_space(tmp_path, 2_000_000)
    with pytest.raises(ValueError, match="0.00 GB free.*0.40 GB"):
        check_free_space(tmp_path, 400_000_000)
