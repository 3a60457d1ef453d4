"""The demo overwrites no input, and writes nothing outside of the output folder."""

import numpy as np
import pytest

from sparseinst.inference import VideoWriter
from tests.tools.demo_scenes import ground_truth_json, pixels_of, run, save_scene

pytestmark = pytest.mark.usefixtures("loggers_as_before", "no_window")


def test_no_input_is_overwritten(tmp_path, config_file, capsys):
    picture, truth = save_scene(tmp_path / "in" / "a.png"), ground_truth_json(tmp_path)
    with VideoWriter(tmp_path / "in" / "clip.mp4", 10) as writer:
        writer.write(np.zeros((32, 32, 3), np.uint8))
    (tmp_path / "folder").symlink_to(tmp_path / "in")
    (tmp_path / "hard.mp4").hardlink_to(tmp_path / "in" / "clip.mp4")
    (tmp_path / "soft.mp4").symlink_to(tmp_path / "in" / "clip.mp4")
    (tmp_path / "soft.json").symlink_to(truth)
    (tmp_path / "truth_of_x_images.json").hardlink_to(truth)
    (tmp_path / "names").mkdir()
    (tmp_path / "names" / "a.png").symlink_to(picture)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    pictures = ["--input", picture, "--ground-truth", truth]
    video = ["--video-input", tmp_path / "in" / "clip.mp4"]
    commands = [
        [*pictures, "--output", tmp_path / "folder"],
        [*pictures, "--output", tmp_path / "out" / ".." / "in"],
        # The input is named by a link that lies where its drawing would.
        ["--input", tmp_path / "names" / "a.png", "--output", tmp_path / "names"],
        [*pictures, "--json", truth],
        [*pictures, "--json", tmp_path / "soft.json"],
        [*pictures, "--json", tmp_path / "truth_of_x.json"],
        [*pictures, "--json", picture],
        [*pictures, "--json", config_file],
        [*pictures, "--json", tmp_path / "model.pth"],
        [*video, "--json", tmp_path / "in" / "clip.mp4"],
        [*video, "--output", tmp_path / "hard.mp4"],
        [*video, "--output", tmp_path / "soft.mp4"],
        [*video, "--output", tmp_path / "in"],
    ]
    (tmp_path / "out").mkdir()
    for arguments in commands:
        assert run(config_file, *arguments) == 2, arguments
        assert "would overwrite" in (message := capsys.readouterr().err) or "would be overwritten" in message, message
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_links_in_the_output_folder_are_replaced_not_followed(tmp_path, config_file):
    picture = save_scene(tmp_path / "in" / "a.png")
    hard = save_scene(tmp_path / "in" / "b.png")
    others = [tmp_path / name for name in ("other.json", "other.mp4")]
    for other in others:
        other.write_text("not ours")
    with VideoWriter(tmp_path / "in" / "clip.mp4", 10) as writer:
        writer.write(np.zeros((32, 32, 3), np.uint8))
    output = tmp_path / "out"
    output.mkdir()
    (output / "a.png").symlink_to(picture)
    (output / "b.png").hardlink_to(hard)
    (output / "found.json").symlink_to(others[0])
    (output / "clip.mp4").symlink_to(others[1])
    before = picture.read_bytes(), hard.read_bytes()
    assert run(config_file, "--input", picture, hard, "--output", output, "--json", output / "found.json") == 0
    assert run(config_file, "--video-input", tmp_path / "in" / "clip.mp4", "--output", output) == 0
    assert (picture.read_bytes(), hard.read_bytes()) == before
    assert [other.read_text() for other in others] == ["not ours"] * 2
    assert not any(path.is_symlink() for path in output.iterdir())
    assert pixels_of(output / "a.png").shape == (480, 640, 3)
    assert not list(tmp_path.rglob("*.part"))


def test_a_folder_of_activation_maps_elsewhere_is_refused(tmp_path, config_file, capsys):
    picture = save_scene(tmp_path / "in" / "a.png")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "iams").symlink_to(tmp_path / "elsewhere")
    assert run(config_file, "--input", picture, "--output", tmp_path / "out", "--show-iams") == 2
    assert "outside of --output" in capsys.readouterr().err
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    "name",
    [
        "..png",
        "...png",
        " .png",
        "-.png",
        "..\\..\\evil.png",
        "a\nb.png",
        "%s.png",
        "~.png",
        "ä☃.png",
        "no suffix",
        "..",
    ],
)
def test_whatever_its_name_a_drawing_stays_in_the_folder(tmp_path, config_file, name):
    if name == "..":
        # As a folder: its pictures.
        save_scene(tmp_path / "in" / "a.png")
        (tmp_path / "in" / "below").mkdir()
        picture = tmp_path / "in" / "below" / ".."
    else:
        path = save_scene(tmp_path / "a.png")
        (tmp_path / "in").mkdir()
        picture = path.rename(tmp_path / "in" / name)
    before = {path for path in tmp_path.rglob("*")}
    assert run(config_file, "--input", picture, "--output", tmp_path / "deep" / "out") == 0
    (drawn,) = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert drawn.parent == tmp_path / "deep" / "out" and pixels_of(drawn).shape == (480, 640, 3)


@pytest.mark.parametrize("flag", ["--output", "--json"])
def test_what_cannot_be_written_is_named(tmp_path, config_file, capsys, flag):
    picture = save_scene(tmp_path / "in" / "a.png")
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "below" / ("x.json" if flag == "--json" else "out")
    assert run(config_file, "--input", picture, flag, target) == 2
    message = capsys.readouterr().err
    assert f"error: Cannot write {target}" in message and "Not a directory" in message
    # A folder that has the drawing's name.
    (tmp_path / "out" / "a.png").mkdir(parents=True)
    assert run(config_file, "--input", picture, "--output", tmp_path / "out") == 2
    assert "Cannot write" in capsys.readouterr().err and not list(tmp_path.rglob("*.part"))
