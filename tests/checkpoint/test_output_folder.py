"""Files of a folder that appear together, or not at all."""

import errno
import os
from unittest import mock

import pytest

from sparseinst.checkpoint.atomic_write import (
    PARTIAL_SUFFIX,
    OutputError,
    as_output_error,
    check_writable,
    output_folder,
)


def test_files_are_replaced_and_others_stay(tmp_path):
    def write(name, text):
        with output_folder(tmp_path) as folder:
            (folder / "model").mkdir()
            (folder / "model" / name).write_text(text)

    def contents():
        return {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}

    write("a", "old")
    users = {"single": "1", "model/user": "2", "model/backup/a": "3", "model.old/a": "4"}
    for name, text in users.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError), output_folder(tmp_path) as folder:
        (folder / "single").write_text("new")
        raise ValueError
    replace = mock.Mock(wraps=os.replace, side_effect=[mock.DEFAULT, OSError(errno.EIO, "broken"), mock.DEFAULT])
    with mock.patch("os.replace", replace), pytest.raises(OutputError, match="cannot be written"):
        write("a", "new")
    assert contents() == users | {"model/a": "old"}
    write("a", "new")
    assert contents() == users | {"model/a": "new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.old", "single"]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"), output_folder(tmp_path / "file" / "out"):
        pass


def test_two_writers_with_one_process_id(tmp_path):
    """Two containers that share a folder can have the same process id."""
    with output_folder(tmp_path / "out") as first, output_folder(tmp_path / "out") as second:
        assert first != second and {first.parent, second.parent} == {tmp_path / "out"}
        assert all(folder.match(f".*{PARTIAL_SUFFIX}") for folder in (first, second))
        (first / "a").write_text("first")
        (second / "b").write_text("second")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "Make room, or write to another folder (--output)"),
        (errno.EDQUOT, "Make room, or write to another folder (--output)"),
        (errno.EROFS, "Write to another folder (--output)"),
    ],
)
def test_room_is_asked_for_where_it_helps(tmp_path, number, remedy):
    with pytest.raises(OutputError) as caught, as_output_error(tmp_path):
        raise OSError(number, os.strerror(number))
    assert str(caught.value).endswith(f". Existing files are unchanged. {remedy}")


@pytest.mark.parametrize("name", ["file", "file/new", "file/new/newer"])
def test_a_check_makes_no_folder(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=f"{name} cannot be written: "):
        check_writable(tmp_path / name)
    for missing in ("new", "new/newer", "."):
        check_writable(tmp_path / missing)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_error_of_reading_is_not_one_of_writing(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="none.png"), output_folder(tmp_path):
        (tmp_path / "none.png").read_bytes()
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OutputError, match="cannot be written: No space"), as_output_error(tmp_path):
        raise full
    replace = mock.Mock(side_effect=full)
    monkeypatch.setattr("sparseinst.checkpoint.atomic_write.os.replace", replace)
    with pytest.raises(OutputError, match="cannot be written: No space"), output_folder(tmp_path) as folder:
        (folder / "a").write_text("new")
    assert not list(tmp_path.iterdir())
