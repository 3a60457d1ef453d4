"""Where the demo writes: names that differ, and files that are the same by another name."""

import logging
from pathlib import Path

import pytest

from sparseinst.inference.output_files import check_image_folder, check_not_read, find_images, output_names, write_file


def test_output_names_are_unlike_whatever_the_case():
    paths = [Path(name) for name in ("x/a.png", "y/A.PNG", "z/a.bmp", "z/a_2.png", "w/a.jpg")]
    assert output_names(paths) == ["a.png", "A_3.PNG", "a_4.png", "a_2.png", "a.jpg"]
    # The same letter, written as one character and as two.
    composed, decomposed = "\u00e4.png", "a\u0308.png"
    assert output_names([Path("x") / composed, Path("y") / decomposed]) == [composed, "a\u0308_2.png"]


def test_many_images_of_one_name():
    # In linear time: 3,000 names took 27 s.
    names = output_names([Path(f"/d/{index}/image.jpg") for index in range(20_000)])
    assert names[0] == "image.jpg" and names[-1] == "image_20000.jpg" and len(set(names)) == 20_000


def test_a_file_is_the_same_by_whatever_name(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("content")
    (tmp_path / "below").mkdir()
    (tmp_path / "hard.json").hardlink_to(file)
    (tmp_path / "soft.json").symlink_to(file)
    for name in ("a.json", "below/../a.json", "hard.json", "soft.json"):
        with pytest.raises(ValueError, match=f"--json .*{name} would overwrite the input"):
            check_not_read("--json", tmp_path / name, ["", None, "timm://resnet18", tmp_path / "other", file])
    check_not_read("--json", tmp_path / "b.json", ["", None, "timm://resnet18", file])
    # Neither is there.
    with pytest.raises(ValueError, match="would overwrite"):
        check_not_read("--json", tmp_path / "below" / ".." / "new", [tmp_path / "new"])


def test_folders_that_can_be_written_to(tmp_path):
    picture = tmp_path / "in" / "a.png"
    picture.parent.mkdir()
    picture.write_bytes(b"")
    check_image_folder(tmp_path / "in" / "out", [picture])
    check_image_folder(tmp_path / "new", [picture])
    (tmp_path / "in" / "iams").mkdir()
    check_image_folder(tmp_path, [picture])


def test_writing_replaces_the_whole_file(tmp_path):
    file = tmp_path / "new" / "a.bin"
    write_file(file, b"longer content")
    write_file(file, b"short")
    assert file.read_bytes() == b"short" and [path.name for path in file.parent.iterdir()] == ["a.bin"]


def test_folders_name_the_formats_that_are_not_read(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("sparseinst"), "propagate", True)
    names = ["a.jpg", "b.jfif", "c.avif", "d.gif", "e.mpo", "f.jp2", "g.JPE", "h.dib"]
    for name in [*names, "x.eps", "y.ICO", "notes.txt"]:
        (tmp_path / name).touch()
    with caplog.at_level(logging.WARNING, logger="sparseinst"):
        assert [path.name for path in find_images([str(tmp_path)])] == names
    (record,) = caplog.records
    assert "2 files of formats that are not read are left out (the first: x.eps)" in record.getMessage()
