"""Where the demo writes: names that differ, and files that are the same by another name."""

import logging
from pathlib import Path

import pytest

from sparseinst.inference.output_files import (
    check_image_folder,
    check_not_read,
    find_images,
    output_names,
    video_file,
    write_file,
)


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


def test_many_images_in_folders_of_their_own_start_at_once(tmp_path, monkeypatch):
    # Resolving each path took minutes for 50,000.
    paths = [tmp_path / str(index) / "image.jpg" for index in range(50)]
    for path in paths:
        path.parent.mkdir()
        path.touch()
    (tmp_path / "link").symlink_to(paths[0].parent)
    (tmp_path / "1" / "hard.jpg").hardlink_to(paths[1])
    resolved = []
    monkeypatch.setattr(Path, "resolve", lambda path, real=Path.resolve: resolved.append(path) or real(path))
    found = find_images([str(tmp_path / "**" / "image.jpg"), str(tmp_path / "link"), str(tmp_path / "1" / "hard.jpg")])
    assert sorted(found) == sorted([*paths, tmp_path / "1" / "hard.jpg"])
    check_image_folder(tmp_path / "out", found)
    check_not_read("--json", tmp_path / "out.json", found)
    assert len(resolved) < 10


def test_names_of_drawn_videos(tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    assert video_file(tmp_path / "a.mp4", "in/clip.avi") == tmp_path / "a.mp4"
    assert video_file(tmp_path / "folder.mp4", "in/clip.avi").name == "clip.mp4"
    assert video_file(tmp_path, "rtsp://door:554/hall?fps=5").name == "hall.mp4"
    assert video_file(tmp_path, "http://door:8080/").name == "door.mp4"


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
