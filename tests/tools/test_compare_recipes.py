"""The comparison of recipes, with trainings that write what the command reads."""

import json
import re
from pathlib import Path

import cv2
import pytest

from sparseinst import get_config_file
from sparseinst.tools import compare_recipes


@pytest.fixture
def trainings(tmp_path, monkeypatch):
    """Replace the trainings: record each command; the mean iteration takes 2 s, with "slow" in the folder 4 s."""
    commands = []
    monkeypatch.chdir(tmp_path)
    for name in ("train.json", "val.json"):
        Path(name).write_text("{}")

    def train(command, **_):
        commands.append(command)
        values = dict(zip(command, command[1:]))
        folder = Path(values["OUTPUT_DIR"])
        if "broken" in str(folder):
            return 1
        seconds = 4.0 if "slow" in str(folder) else 2.0
        # Most iterations are faster than their mean.
        lines = [{"iteration": 0, "total_loss": 1.0}, {"iteration": 19, "time": 0.1, "mean_time": 9.0}]
        lines.append({"iteration": 39, "time": 0.1, "mean_time": seconds})
        (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if folder.name != "pace":
            figures = {"AP": 10.0 * int(values["SEED"]), "AP50": 60.0, "AP75": 20.0}
            (folder / "results.json").write_text(json.dumps({"results": {"segm": figures}}))
        return 0

    monkeypatch.setattr(compare_recipes.subprocess, "call", train)
    return commands


DATA = ("train.json", "train", "val.json", "val")


def run(tmp_path, *args, data=DATA):
    fixed = ["--data", "cells", *data, "--minutes", "1", "--jobs", "1", "--output", str(tmp_path)]
    return compare_recipes.main([*fixed, *args])


BASE = get_config_file("small_data/efficientnet_lite0")
RECIPES = ("--recipe", "fast: small_data/efficientnet_lite0", "--recipe", "slow: small_data/published_recipe SEED 7")


def test_each_recipe_has_the_iterations_of_its_time(tmp_path, trainings, capsys):
    assert run(tmp_path, *RECIPES, "--seeds", "1", "2") == 0
    rows = json.loads((tmp_path / "comparison.json").read_text())["rows"]
    assert [(row["recipe"], row["iterations"], row["AP"]) for row in rows] == [
        ("fast", 30, [10.0, 20.0]), ("slow", 15, [10.0, 20.0])
    ]  # fmt: skip
    assert "| cells | slow | 1 | 1.0 | 15 | 15.0 (10.0, 20.0) | 60.0 | 20.0 |" in capsys.readouterr().out
    # Two short trainings without an evaluation, then two seeds of each.
    assert len(trainings) == 6 and [command[-1] for command in trainings] == ["0"] * 6
    paces = [command for command in trainings if "pace" in command[command.index("OUTPUT_DIR") + 1]]
    assert len(paces) == 2 and not any("val.json" in command for command in paces)
    last = dict(zip(trainings[-1], trainings[-1][1:]))
    # The schedule of 500 iterations with steps at 389 and 463 is scaled; the seed is the run's.
    # So is a warm-up (20) of more than half of the training.
    assert (
        last["SOLVER.WARMUP_ITERS"] == "1"
        and last["SOLVER.STEPS"] == "(12, 14)"
        and last["SEED"] == "2"
        and last["--test-images"] == "val"
    )


def test_ap_over_time(tmp_path, trainings, capsys):
    plot = tmp_path / "curves.png"
    arguments = ("--seeds", "1", "2", "--plot", str(plot), "--minutes", "3", "1")
    assert run(tmp_path, *RECIPES, *arguments) == 0
    rows = json.loads((tmp_path / "comparison.json").read_text())["rows"]
    assert [(row["recipe"], row["minutes"], row["iterations"], row["seeds"]) for row in rows] == [
        ("fast", 1, 30, [1, 2]), ("fast", 3, 90, [1, 2]), ("slow", 1, 15, [1, 2]), ("slow", 3, 45, [1, 2])
    ]  # fmt: skip
    assert cv2.imread(str(plot)).shape[0] > 200
    # The time of an iteration is measured once.
    assert len(trainings) == 2 + 8
    assert run(tmp_path, *RECIPES, *arguments, "--iterations", "5") == 2
    assert "--plot draws AP over --minutes" in capsys.readouterr().err


def test_equal_iterations_need_no_time(tmp_path, trainings, capsys):
    assert run(tmp_path, *RECIPES, "--seeds", "1", "--iterations", "50") == 0
    assert len(trainings) == 2 and "| cells | slow |  | 3.3 | 50 |" in capsys.readouterr().out


def test_what_is_done_is_not_repeated(tmp_path, trainings):
    run(tmp_path, *RECIPES, "--seeds", "1")
    done = len(trainings)
    assert run(tmp_path, *RECIPES, "--seeds", "1", "2") == 0
    assert len(trainings) == done + 2 and all("seed2" in " ".join(command) for command in trainings[done:])


SETTINGS = Path("cells/fast/settings.json")


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize(
    ("files", "overrides", "data", "message"),
    [
        ({}, " SOLVER.BASE_LR 0.01", DATA, "SOLVER.BASE_LR 0.002, but this command has 0.01"),
        ({}, "", ["other.json", *DATA[1:]], "data --train-json train.json .*, but this command has --train-json other"),
        ({"train.json": "[]"}, "", DATA, "SHA-256 of train.json 44136.*, but this command has 4f53c"),
        ({"val.json": "[]"}, "", DATA, "SHA-256 of val.json 44136"),
        ({"mine.yaml": f"_BASE_: {BASE}"}, "", DATA, "SOLVER.MAX_ITER 20, but this command has 500"),
    ],
)
def test_another_recipe_or_data_under_a_known_name_are_refused(
    tmp_path, trainings, capsys, files, overrides, data, message, interrupted
):
    for name, text in {"mine.yaml": f"_BASE_: {BASE}\nSOLVER: {{MAX_ITER: 20}}", "other.json": "{}"}.items():
        Path(name).write_text(text)
    assert run(tmp_path, "--recipe", "fast: mine.yaml", "--seeds", "1") == 0
    done, recorded = len(trainings), SETTINGS.read_text()
    if interrupted:
        Path("cells/fast/1min/seed1/results.json").unlink()
    for name, text in files.items():
        Path(name).write_text(text)
    # A new recipe is not recorded either.
    assert run(tmp_path, *RECIPES[2:], "--recipe", f"fast: mine.yaml{overrides}", "--seeds", "1", data=data) == 2
    printed = capsys.readouterr().err
    assert re.match(f"error: {tmp_path}/cells/fast holds runs with {message}", printed) and printed.count("\n") == 1
    assert "Give --recipe or --data another name, choose another --output, or delete" in printed
    assert SETTINGS.read_text() == recorded and len(trainings) == done and not Path("cells/slow").exists()


def test_a_comparison_of_an_earlier_version_is_refused_until_it_is_accepted(tmp_path, trainings, capsys):
    run(tmp_path, *RECIPES[:2], "--seeds", "1")
    done, recorded = len(trainings), SETTINGS.read_text()
    SETTINGS.unlink()
    assert run(tmp_path, *RECIPES[:2], "--seeds", "1") == 2
    printed = capsys.readouterr().err
    assert "cells/fast holds runs without settings.json" in printed and "write {} into" in printed
    assert printed.count("\n") == 1
    SETTINGS.write_text("{}")
    assert run(tmp_path, *RECIPES[:2], "--seeds", "1") == 0
    # From now on the settings are known.
    assert SETTINGS.read_text() == recorded and len(trainings) == done


def test_settings_that_trained_nothing_are_replaced(tmp_path, trainings):
    run(tmp_path, "--recipe", "broken: small_data/efficientnet_lite0", "--seeds", "1")
    recipe = ("--recipe", "broken: small_data/efficientnet_lite0 SOLVER.BASE_LR 0.01")
    assert run(tmp_path, *recipe, "--seeds", "1") == 1
    assert json.loads(Path("cells/broken/settings.json").read_text())["SOLVER.BASE_LR"] == "0.01"


def test_another_import_changes_no_recipe(tmp_path, trainings):
    assert run(tmp_path, *RECIPES[:2], "--seeds", "1") == 0
    for text in ("", "# Changed.\n"):
        Path("mine.py").write_text(text)
        assert run(tmp_path, *RECIPES, "--seeds", "1", "--import", "mine.py") == 0


def test_a_time_whose_measurement_was_interrupted_is_measured_anew(tmp_path, trainings, monkeypatch):
    pace = tmp_path / "cells" / "fast" / "pace"
    pace.mkdir(parents=True)
    (pace / "model_final.pth").touch()
    train = compare_recipes.subprocess.call

    def resume(command, **options):
        # A finished training writes no metrics when it is resumed.
        folder = Path(dict(zip(command, command[1:]))["OUTPUT_DIR"])
        return 0 if (folder / "model_final.pth").exists() else train(command, **options)

    monkeypatch.setattr(compare_recipes.subprocess, "call", resume)
    assert run(tmp_path, *RECIPES[:2], "--seeds", "1") == 0


@pytest.mark.parametrize("length", [("--iterations", "2"), ("--minutes", "0.05")])
def test_runs_without_a_time_are_in_the_table(tmp_path, trainings, monkeypatch, capsys, length):
    train = compare_recipes.subprocess.call

    def train_briefly(command, **options):
        train(command, **options)
        folder = Path(dict(zip(command, command[1:]))["OUTPUT_DIR"])
        if folder.name != "pace":
            # Detectron2 measures no time before the third iteration.
            (folder / "metrics.json").write_text(json.dumps({"iteration": 1, "total_loss": 1.0}) + "\n")
        return 0

    monkeypatch.setattr(compare_recipes.subprocess, "call", train_briefly)
    assert run(tmp_path, *RECIPES[:2], "--seeds", "1", *length) == 0
    assert "| nan | 2 | 10.0 (10.0) |" in capsys.readouterr().out
    assert json.loads((tmp_path / "comparison.json").read_text())["rows"][0]["AP"] == [10.0]


def test_a_measurement_without_a_time_fails_its_runs_alone(tmp_path, trainings, monkeypatch, capsys):
    train = compare_recipes.subprocess.call

    def train_on_a_full_disk(command, **options):
        code = train(command, **options)
        if "cells/slow/pace" in " ".join(map(str, command)):
            (tmp_path / "cells" / "slow" / "pace" / "metrics.json").unlink()
        return code

    monkeypatch.setattr(compare_recipes.subprocess, "call", train_on_a_full_disk)
    assert run(tmp_path, *RECIPES, "--seeds", "1") == 1
    output = capsys.readouterr().out
    assert "no time of an iteration, see" in output and "| cells | fast | 1 | 1.0 | 30 |" in output


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path, trainings, capsys):
    recipes = ("--recipe", "broken: small_data/efficientnet_lite0", *RECIPES[:2])
    assert run(tmp_path, *recipes, "--seeds", "1") == 1
    output = capsys.readouterr().out
    assert "no time of an iteration, see" in output and "| cells | fast | 1 | 1.0 | 30 |" in output


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_time_that_cannot_be_measured_is_tried_once_for_all_seeds(tmp_path, trainings, capsys, jobs):
    arguments = (*RECIPES[:2], "--seeds", "1", "2", "3", "--jobs", jobs)
    assert run(tmp_path, "--recipe", "broken: small_data/efficientnet_lite0", *arguments) == 1
    assert sum("cells/broken" in " ".join(command) for command in trainings) == 1
    assert capsys.readouterr().out.count("no time of an iteration, see") == 3
    # The next start of the command tries again.
    run(tmp_path, "--recipe", "broken: small_data/efficientnet_lite0", *arguments)
    assert sum("cells/broken" in " ".join(command) for command in trainings) == 2


LIMITS = ("--recipe", "crowded: small_data/efficientnet_lite0_crowded", "--recipe")


def test_recipes_whose_ap_counts_other_numbers_of_detections_are_named(tmp_path, trainings, capsys):
    assert run(tmp_path, *LIMITS, "Mask R-CNN: small_data/mask_rcnn", "--seeds", "1", "2") == 0
    note = (
        "Note: on cells, AP counts the best detections of an image: 400 of crowded (MODEL.SPARSE_INST.MAX_DETECTIONS), "
        "{} of Mask R-CNN (TEST.DETECTIONS_PER_IMAGE). For a fair comparison, set these keys to one value\n"
    )
    output = capsys.readouterr().out
    # Before the first training, and below the table.
    assert output.startswith(note.format(100)) and output.endswith("|\n" + note.format(100))
    # A training raises the limit for its data, and records it.
    saved = tmp_path / "cells" / "Mask_R-CNN" / "1min" / "seed1" / "config.yaml"
    for limit in (250, 400):
        saved.write_text(f"_BASE_: {get_config_file('small_data/mask_rcnn')}\nTEST: {{DETECTIONS_PER_IMAGE: {limit}}}")
        run(tmp_path, *LIMITS, "Mask R-CNN: small_data/mask_rcnn", "--seeds", "1", "2")
        assert capsys.readouterr().out.count(note.format(limit)) == 2 * (limit != 400)


def test_recipes_with_one_limit_have_no_note(tmp_path, trainings, capsys):
    recipes = (*LIMITS, "Mask R-CNN: small_data/mask_rcnn TEST.DETECTIONS_PER_IMAGE 400")
    assert run(tmp_path, *recipes, "--seeds", "1") == 0
    # COCO's AP counts 100.
    assert run(tmp_path / "other", *RECIPES[:2], "--recipe", f"few: {BASE} MODEL.SPARSE_INST.MAX_DETECTIONS 50") == 0
    assert "Note" not in capsys.readouterr().out


def test_without_test_data_a_part_of_the_training_data_is_kept():
    data = compare_recipes.parse_data(["mine", "a.json", "a"])
    assert data.arguments == ["--train-json", "a.json", "--train-images", "a", "--val-share", "0.25"]


@pytest.mark.parametrize(
    "args, message",
    [
        (["--recipe", "small_data/efficientnet_lite0"], "expected 'NAME: CONFIG [KEY VALUE ...]'"),
        (["--recipe", "a: small_data/efficientnet_lite0 SEED"], "expected 'NAME: CONFIG [KEY VALUE ...]'"),
        (["--recipe", "a:"], "expected 'NAME: CONFIG [KEY VALUE ...]'"),
        (["--recipe", "a: b", "--data", "x", "y"], "2 values; expected 3 or 5"),
        ([*RECIPES, "--recipe", "a: no_such_config"], "no_such_config"),
        ([*RECIPES, "--iterations", "5", "--recipe", "a: no_such_config"], "no_such_config"),
        (["--recipe", "a: small_data/efficientnet_lite0 SOLVER.NO_SUCH_KEY 1"], "SOLVER.NO_SUCH_KEY"),
        ([*RECIPES, "--iterations", "0"], "--iterations is 0; it must be at least 1"),
        ([*RECIPES, "--jobs", "0"], "--jobs is 0; it must be at least 1"),
        ([*RECIPES, "--seeds", "1", "-1"], "--seeds is -1; it must be at least 0"),
        ([*RECIPES, "--minutes", "1", "0"], "--minutes is 0; it must be above 0"),
        ([*RECIPES, "--minutes", "nan"], "--minutes is nan; it must be above 0"),
        ([*RECIPES, "--minutes", "inf"], "--minutes is inf; it must be above 0, and finite"),
        ([*RECIPES, "--recipe", "fast: small_data/yolact"], "cells/fast/1min/seed1 belongs to several runs"),
        ([*RECIPES, "--data", "x", "no_such.json", "train"], "no_such.json"),
        ([*RECIPES, "--plot", "."], "--plot . is a folder"),
        ([*RECIPES, "--plot", f"{__file__}/curves.png"], __file__),
    ],
)
def test_wrong_arguments_end_before_any_training(tmp_path, trainings, capsys, args, message):
    assert run(tmp_path, *args) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.startswith("error: ") and printed.count("\n") == 1
    assert trainings == []


def test_times_and_seeds_given_twice_are_trained_once(tmp_path, trainings):
    assert run(tmp_path, *RECIPES[:2], "--seeds", "2", "1", "2", "--minutes", "1", "1.0") == 0
    # The measurement of the time, then two seeds.
    assert len(trainings) == 1 + 2


def test_the_folder_of_the_plot_is_made_before_the_trainings(tmp_path, trainings, monkeypatch):
    train, plot = compare_recipes.subprocess.call, tmp_path / "new" / "curves.png"
    found = []
    monkeypatch.setattr(
        compare_recipes.subprocess, "call", lambda *args, **kw: found.append(plot.parent.is_dir()) or train(*args, **kw)
    )
    assert run(tmp_path / "out", *RECIPES[:2], "--seeds", "1", "--plot", str(plot)) == 0
    assert found == [True, True] and plot.is_file()


def test_data_without_annotations_have_no_ap(tmp_path, trainings, capsys):
    assert run(tmp_path, *RECIPES[:2], "--seeds", "1") == 0
    results = tmp_path / "cells" / "fast" / "1min" / "seed1" / "results.json"
    results.write_text(json.dumps({"results": {}}))
    assert run(tmp_path, *RECIPES[:2], "--seeds", "1") == 0
    assert "| nan (nan) |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "iterations", "steps", "warmup"),
    [("published_recipe", 6, "(5,)", 0), ("published_recipe", 1, "()", 0), ("published_recipe", 500, "(389, 463)", 20),
     ("published_recipe SOLVER.WARMUP_ITERS 1000", 1900, "(1478, 1759)", 1000)],
)  # fmt: skip
def test_the_schedule_of_other_iterations(config, iterations, steps, warmup, tmp_path, trainings):
    recipe = ("--recipe", f"x: small_data/{config}")
    assert run(tmp_path, *recipe, "--seeds", "1", "--iterations", str(iterations)) == 0
    values = dict(zip(trainings[-1], trainings[-1][1:]))
    # The recipe's own key precedes that of the schedule.
    assert (values["SOLVER.STEPS"], values["SOLVER.WARMUP_ITERS"]) == (steps, str(warmup))
