"""The evaluations of a training: the best model, resuming, and early stopping."""

import json

import pytest
import torch
from detectron2.utils.events import EventStorage

from sparseinst.engine.hooks import EvaluationHook
from sparseinst.engine.trainer import Trainer
from tests.engine.test_trainer import make_cfg
from tests.shapes_data import register_shapes


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    return register_shapes(folder, "hook_train"), register_shapes(folder, "hook_val", 4, seed=1)


def with_scores(trainer, scores):
    """Let the evaluations of a trainer return these AP in turn."""
    (hook,) = [hook for hook in trainer._hooks if isinstance(hook, EvaluationHook)]
    hook._evaluate = lambda: {"segm": {"AP": next(scores)}}
    return hook


def test_a_resumed_run_keeps_the_best_score_and_the_number_of_checkpoints(shapes, tmp_path):
    opts = ("SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.MAX_CHECKPOINTS", 2, "TEST.EVAL_PERIOD", 2)
    scores = iter([30.0, 20.0, 25.0, 25.0, 40.0])

    def train(max_iter, resume):
        trainer = Trainer(make_cfg(shapes, tmp_path, *opts, "SOLVER.MAX_ITER", max_iter))
        with_scores(trainer, scores)
        trainer.resume_or_load(resume=resume)
        trainer.train()
        return torch.load(tmp_path / "model_best.pth")["iteration"]

    assert train(2, resume=False) == 1  # 30
    # A resumed run repeats the last evaluation, which may have been interrupted: 20. Then 25, at the end.
    assert train(4, resume=True) == 1
    # 25 again, then 40 at the end.
    assert train(5, resume=True) == 4
    names = {path.name for path in tmp_path.glob("model_*.pth")}
    assert names == {"model_0000003.pth", "model_0000004.pth", "model_best.pth", "model_final.pth"}


def test_the_best_checkpoint_of_the_last_step_resumes_at_the_next_step(shapes, tmp_path):
    opts = ("TEST.EVAL_PERIOD", 2, "DATASETS.TEST", shapes[1:])
    trainer = Trainer(make_cfg(shapes, tmp_path, *opts, "SOLVER.MAX_ITER", 2))
    with_scores(trainer, iter([30.0, 30.0]))
    trainer.train()
    assert torch.load(tmp_path / "model_best.pth")["trainer"]["iteration"] == 1
    (tmp_path / "last_checkpoint").write_text("model_best.pth")
    resumed = Trainer(make_cfg(shapes, tmp_path, *opts, "SOLVER.MAX_ITER", 4))
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 2


def test_a_training_ends_where_it_no_longer_improves(shapes, tmp_path, caplog):
    caplog.set_level("INFO", "sparseinst.engine.hooks")
    opts = ("TEST.EVAL_PERIOD", 1, "TEST.PATIENCE", 2, "SOLVER.MAX_ITER", 8, "SOLVER.CHECKPOINT_PERIOD", 1)
    scores = iter([10.0, 30.0, 20.0, 30.0, 40.0])
    trainer = Trainer(make_cfg(shapes, tmp_path, *opts))
    with_scores(trainer, scores)
    trainer.train()
    # Two evaluations after 30 were not better; the fifth score is not asked for.
    assert trainer.steps_done == trainer.max_iter == 4 and next(scores) == 40.0
    assert "ends. model_best.pth has 30.0000, of iteration 1" in caplog.text
    assert torch.load(tmp_path / "model_best.pth")["iteration"] == 1
    final = torch.load(tmp_path / "model_final.pth")
    assert final["iteration"] == 3 and final["trainer"]["iteration"] == 3
    assert json.loads((tmp_path / "metrics.json").read_text().splitlines()[-1])["iteration"] == 3

    # Resuming repeats the last evaluation, and ends again; a better score lets it go on.
    for score, steps in ((25.0, 4), (50.0, 8)):
        resumed = Trainer(make_cfg(shapes, tmp_path, *opts))
        with_scores(resumed, iter([score, 60.0, 70.0, 80.0, 90.0]))
        resumed.resume_or_load(resume=True)
        resumed.train()
        assert resumed.steps_done == steps
        final = torch.load(tmp_path / "model_final.pth")
        assert final["iteration"] == final["trainer"]["iteration"] == steps - 1
    assert torch.load(tmp_path / "model_best.pth")["iteration"] == 7


def test_without_patience_it_goes_on(shapes, tmp_path):
    trainer = Trainer(make_cfg(shapes, tmp_path, "TEST.EVAL_PERIOD", 1, "SOLVER.MAX_ITER", 4))
    with_scores(trainer, iter([40.0, 30.0, 20.0, 10.0]))
    trainer.train()
    assert trainer.steps_done == 4


def run_evaluations(trainer, hook, iterations):
    """Return after which of the evaluations the training ends."""
    trainer.ends_early = False
    with EventStorage() as trainer.storage:
        return [hook._run(iteration) or trainer.ends_early for iteration in iterations]


def test_an_evaluation_that_a_resumed_run_repeats_counts_once(shapes, tmp_path):
    trainer = Trainer(make_cfg(shapes, tmp_path, "TEST.EVAL_PERIOD", 1, "TEST.PATIENCE", 2))
    hook = with_scores(trainer, iter([30.0, 20.0]))
    assert run_evaluations(trainer, hook, (0, 1)) == [False, False]
    resumed = with_scores(trainer, iter([20.0, 25.0]))
    resumed.load_state_dict(hook.state_dict())
    assert run_evaluations(trainer, resumed, (1, 2)) == [False, True]


def test_the_best_model_holds_its_own_evaluation(shapes, tmp_path):
    trainer = Trainer(make_cfg(shapes, tmp_path, "TEST.EVAL_PERIOD", 1, "TEST.PATIENCE", 1))
    hook = with_scores(trainer, iter([30.0]))
    saved = []
    hook._checkpointer.save = lambda name, **_: saved.append(dict(hook.state_dict()))
    run_evaluations(trainer, hook, (0,))
    resumed = with_scores(trainer, iter([30.0]))
    resumed.load_state_dict(saved[0])
    assert run_evaluations(trainer, resumed, (0,)) == [False]


def test_patience_begins_with_the_first_ap_above_0(shapes, tmp_path):
    trainer = Trainer(make_cfg(shapes, tmp_path, "TEST.EVAL_PERIOD", 1, "TEST.PATIENCE", 2))
    hook = with_scores(trainer, iter([0.0, 0.0, float("nan"), 0.0, 1.0, 0.5, 0.5]))
    assert run_evaluations(trainer, hook, range(7)) == [False] * 6 + [True]
