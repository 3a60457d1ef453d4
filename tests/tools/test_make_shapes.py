"""Test the command that writes the drawn-shapes data set."""

import json

from sparseinst.tools import make_shapes


def run(folder, *more: str) -> int:
    return make_shapes.main(["--output", str(folder), "--train", "3", "--val", "2", "--size", "64", *more])


def contents(folder) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of every file below a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def test_writes_both_splits_and_nothing_else(tmp_path):
    assert run(tmp_path / "new" / "shapes") == 0
    assert set(contents(tmp_path)) == {
        "new/shapes/shapes_settings.json",
        "new/shapes/train.json",
        "new/shapes/val.json",
        *(f"new/shapes/train/00000{index}.jpg" for index in range(3)),
        *(f"new/shapes/val/00000{index}.jpg" for index in range(2)),
    }
    train, val = (json.loads((tmp_path / "new/shapes" / f"{split}.json").read_text()) for split in ("train", "val"))
    assert (train["info"]["seed"], val["info"]["seed"]) == (0, 1)
    for content in (train, val):
        assert sum(annotation["iscrowd"] for annotation in content["annotations"]) == 1


def test_a_second_run_or_other_settings_leave_the_data_set_as_it_is(tmp_path, capsys):
    (tmp_path / "shapes").mkdir()
    run(tmp_path / "shapes")
    before = contents(tmp_path)
    capsys.readouterr()
    assert run(tmp_path / "shapes") == 0
    assert contents(tmp_path) == before
    assert "already there" in capsys.readouterr().out
    assert run(tmp_path / "shapes", "--val-seed", "5") == 1
    assert "change --output" in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert run(tmp_path / "other", "--val-seed", "5") == 0
    assert json.loads((tmp_path / "other/val.json").read_text())["info"]["seed"] == 5


def test_files_of_the_user_are_kept(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "thesis.txt"):
        assert run(path) == 1
        assert "change --output" in capsys.readouterr().err
    assert list(contents(tmp_path)) == ["thesis.txt"] and (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file" / "shapes") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and str(tmp_path / "file") in error and error.count("\n") == 1


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    write = make_shapes.write_shapes_dataset

    def interrupted(output_dir, num_images, seed, size, *, split, progress):
        if split == "val":
            raise KeyboardInterrupt
        return write(output_dir, num_images, seed, size, split=split, progress=progress)

    monkeypatch.setattr(make_shapes, "write_shapes_dataset", interrupted)
    assert run(tmp_path / "shapes") == 130
    assert list(tmp_path.iterdir()) == []


def test_numbers_out_of_range_leave_nothing(tmp_path, capsys):
    assert run(tmp_path / "shapes", "--val", "0") == 1
    assert "'val'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
