"""Steps whose loss or gradient is not finite: what is said, saved, skipped, and left as it was."""

import logging
import re

import pytest
import torch
from detectron2.engine import HookBase
from torch import nn

from sparseinst.engine.finite import NonFiniteStepError, any_rank
from sparseinst.engine.first_non_finite import INPUT, find_first_non_finite
from sparseinst.engine.step_record import STEP_FILE, replay_step
from sparseinst.engine.trainer import Trainer
from sparseinst.modeling.training_network import recompute_activations
from sparseinst.tools.replay_step import cli
from tests.shapes_data import register_shapes
from tests.tiny_model import random_input, tiny_cfg, tiny_model


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return register_shapes(tmp_path_factory.mktemp("shapes"), "finite_train")


@pytest.fixture
def make_trainer(shapes, tmp_path):
    def make(*opts):
        torch.manual_seed(0)
        return Trainer(
            tiny_cfg(
                "DATASETS.TRAIN", (shapes,), "DATASETS.TEST", (), "MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4,
                "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 4, "SOLVER.WARMUP_ITERS", 0, "SOLVER.STEPS", (),
                "SOLVER.BASE_LR", 1e-3, "SEED", 3, "OUTPUT_DIR", str(tmp_path), *opts,
            )
        )  # fmt: skip

    return make


def break_output(trainer, iterations):
    """Makes the encoder's output NaN in these iterations."""

    def spoil(module, args, output):
        return output * float("nan") if trainer.iter in iterations else output

    return trainer.model.encoder.fusion.register_forward_hook(spoil)


def break_gradient(trainer, iterations):
    """The outputs stay as they are, the gradient does not."""

    def spoil(module, args, output):
        if trainer.iter in iterations and output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("inf"))

    return trainer.model.encoder.fusion.register_forward_hook(spoil)


class AfterStep(HookBase):
    def __init__(self, function):
        self.after_step = function


def state_of(trainer):
    """Copies of weights, running statistics and the optimizer's moments."""
    moments = [v.clone() for state in trainer.optimizer.state.values() for v in state.values()]
    return {**{name: v.clone() for name, v in trainer.model.state_dict().items()}, **dict(enumerate(moments))}


def test_flags_of_one_process_are_its_own():
    assert any_rank([True, False, True], torch.device("cpu")) == [True, False, True]


def test_the_error_names_what_is_known_and_the_step_can_be_repeated(make_trainer, tmp_path, capsys):
    trainer = make_trainer()
    with torch.no_grad():
        trainer.model.encoder.fusion.weight.fill_(3e38)
    before = state_of(trainer)
    with pytest.raises(NonFiniteStepError) as caught:
        trainer.train()
    message = str(caught.value)
    assert isinstance(caught.value, FloatingPointError)
    assert "loss is not finite at iteration 0" in message and "loss_ce nan" in message
    assert "the output of encoder.fusion (Conv2d), whose input was finite" in message
    assert all(x["file_name"] in message for x in trainer.batches[0])
    # Nothing has moved: not the running statistics either, though the forward pass was there.
    after = state_of(trainer)
    assert all(torch.equal(value, after[name]) for name, value in before.items())

    folder = tmp_path / "nonfinite_0000000_rank0"
    assert f"python -m sparseinst.tools.replay_step {folder}" in message
    saved = torch.load(folder / STEP_FILE, weights_only=True)
    assert all(torch.equal(value, before[name]) for name, value in saved["model"].items())
    assert [x["file_name"] for x in saved["batches"][0]] == [x["file_name"] for x in trainer.batches[0]]
    assert torch.equal(saved["batches"][0][0]["image"], trainer.batches[0][0]["image"])
    assert "iteration 0" in (folder / "README.txt").read_text().lower()
    finding, losses = replay_step(folder)
    assert str(finding) in message and losses["loss_ce"] != losses["loss_ce"]
    cli([str(folder)])
    assert str(finding) in capsys.readouterr().out


def test_a_gradient_that_is_not_finite_is_found_and_repeated(make_trainer, tmp_path):
    # An image of the mean colour: zeros as far as the decoder, however large the weights; not so their gradient.
    trainer = make_trainer("MODEL.RESNETS.NORM", "FrozenBN")
    with torch.no_grad():
        trainer.model.encoder.fusion.weight.fill_(1e25)
        trainer.model.encoder.fpn_outputs[1].weight.fill_(1e25)
        for name, parameter in trainer.model.encoder.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    x = random_input(64, 64, num_instances=2)
    x["image"] = trainer.model.pixel_mean.expand(3, 64, 64).clone()
    trainer._loader_iter = iter([[x]])
    before = state_of(trainer)
    with pytest.raises(NonFiniteStepError, match="A gradient is not finite at iteration 0") as caught:
        trainer.train()
    message = str(caught.value)
    assert "finite losses" in message and "parameters whose gradient is not finite: " in message
    assert all(torch.equal(value, state_of(trainer)[name]) for name, value in before.items())
    finding, losses = replay_step(tmp_path / "nonfinite_0000000_rank0")
    assert finding.what.startswith("the gradient of ") and finding.name.startswith("encoder.")
    assert f"first that is not finite: {finding}" in message
    assert all(value < float("inf") for value in losses.values())


def test_the_first_gradient_is_found_in_backward_order(make_trainer):
    trainer = make_trainer()
    break_gradient(trainer, [0])
    with pytest.raises(NonFiniteStepError) as caught:
        trainer.train()
    assert "first that is not finite: the gradient of the output of encoder.fusion (Conv2d)" in str(caught.value)
    assert "backbone.stem.conv1.weight" in str(caught.value) and " more" in str(caught.value)
    assert "decoder" not in str(caught.value)


class FailsOnce(nn.Module):
    """Fails for the random numbers that its first call draws, and for no others."""

    def __init__(self):
        super().__init__()
        self.unlucky = None
        self.draws = []

    def forward(self, features):
        draw = torch.rand(3)
        self.draws.append(draw)
        self.unlucky = draw if self.unlucky is None else self.unlucky
        return features * (float("inf") if torch.equal(draw, self.unlucky) else 1)


def test_the_step_is_repeated_with_its_random_numbers_and_training_goes_on_with_the_next(make_trainer):
    draws = {}
    for action in ("plain", "skip"):
        trainer = make_trainer("SOLVER.NONFINITE.ACTION", "skip", "SOLVER.MAX_ITER", 2, "INPUT.RANDOM_FLIP", "none")
        module = trainer.model.encoder.ppm = FailsOnce()
        if action == "plain":
            module.unlucky = torch.zeros(3)
        trainer._loader_iter = iter([[random_input(num_instances=2)]] * 2)
        trainer.train()
        draws[action] = module.draws
        assert trainer.finite_guard.counts["skipped"] == (action == "skip")
    first, again, second = draws["skip"]
    assert torch.equal(first, again)
    assert torch.equal(first, draws["plain"][0]) and torch.equal(second, draws["plain"][1])


@pytest.mark.parametrize("breaks", [break_output, break_gradient])
def test_a_skipped_step_leaves_all_as_it_was_and_is_counted(make_trainer, caplog, breaks):
    trainer = make_trainer("SOLVER.NONFINITE.ACTION", "skip", "SOLVER.OPTIMIZER", "ADAMW")
    breaks(trainer, [1, 3])
    states, files = [], []
    trainer.register_hooks([AfterStep(lambda: states.append(state_of(trainer)))])
    trainer.register_hooks([AfterStep(lambda: files.append(trainer.batches[0][0]["file_name"]))])
    with caplog.at_level(logging.WARNING, "sparseinst"):
        trainer.train()
    for before, after, is_skipped in zip(states, states[1:], [True, False, True]):
        same = [torch.equal(value, after[name]) for name, value in before.items()]
        assert all(same) if is_skipped else not any(same[:3])
    assert all(torch.isfinite(value).all() for value in states[-1].values())
    warnings = [record.getMessage() for record in caplog.records if "The step is skipped" in record.getMessage()]
    assert len(warnings) == 2 and files[1] in warnings[0] and "2 in all, 1 in a row" in warnings[1]
    assert [value for value, _ in trainer.storage.history("nonfinite/skipped_steps").values()] == [1, 2]
    assert len(trainer.storage.history("total_loss").values()) == 2
    assert trainer.state_dict()["nonfinite"]["skipped"] == 2
    resumed = make_trainer()
    resumed.load_state_dict(trainer.state_dict())
    assert resumed.finite_guard.counts == trainer.finite_guard.counts


def test_too_many_skips_in_a_row_stop(make_trainer, tmp_path):
    trainer = make_trainer("SOLVER.NONFINITE.ACTION", "skip", "SOLVER.NONFINITE.MAX_SKIPS", 4, "SOLVER.MAX_ITER", 20)
    break_output(trainer, [1, 2, 3, 5, 6, 7, 8, 9])
    with pytest.raises(NonFiniteStepError, match="(?s)at iteration 9.*\n4 steps in a row") as caught:
        trainer.train()
    assert "first that is not finite: the output of encoder.fusion" in str(caught.value)
    # Not every skipped step takes up the disk; the last always does.
    names = sorted(path.name for path in tmp_path.glob("nonfinite_*"))
    assert names == [f"nonfinite_{iteration:07d}_rank0" for iteration in (1, 2, 3, 9)]


def test_what_only_the_scaler_makes_overflow_is_left_to_the_scaler(make_trainer):
    trainer = make_trainer("SOLVER.AMP.ENABLED", True, "SOLVER.MAX_ITER", 9, "SOLVER.NONFINITE.MAX_SKIPS", 0)
    # Overflows where the scaled gradient is large: from 65536 to 2048, no longer at 1024.
    trainer.model.encoder.fusion.register_forward_hook(
        lambda module, args, output: (
            output.register_hook(
                lambda gradient: gradient * (float("inf") if trainer.grad_scaler.get_scale() > 1500 else 1)
            )
            and None
        )
    )
    trainer.train()
    assert trainer.finite_guard.counts == {"skipped": 0, "in_row": 0, "scaler_skipped": 6, "scaler_in_row": 0}
    assert trainer.grad_scaler.get_scale() == 1024
    assert len(trainer.storage.history("total_loss").values()) == 9


def test_what_overflows_at_every_scale_stops(make_trainer):
    trainer = make_trainer("SOLVER.AMP.ENABLED", True, "SOLVER.MAX_ITER", 100, "SOLVER.NONFINITE.MAX_SKIPS", 3)
    break_gradient(trainer, range(100))
    # 16 halvings from 65536 to 1, and three chances more.
    with pytest.raises(NonFiniteStepError, match="A gradient is not finite at iteration 19"):
        trainer.train()
    assert trainer.grad_scaler.get_scale() == 1 / 8


def test_a_loss_that_is_not_finite_is_not_the_scalers_doing(make_trainer):
    trainer = make_trainer("SOLVER.AMP.ENABLED", True, "SOLVER.NONFINITE.ACTION", "skip", "SOLVER.MAX_ITER", 3)
    break_output(trainer, [1])
    scales = []
    trainer.register_hooks([AfterStep(lambda: scales.append(trainer.grad_scaler.get_scale()))])
    trainer.train()
    assert trainer.finite_guard.counts["skipped"] == 1 and scales[0] == scales[1]


def test_masks_that_are_not_finite_reach_a_loss(make_trainer):
    # One prediction's mask alone, which nothing else would match.
    trainer = make_trainer()

    def spoil(module, args, output):
        output["pred_masks"].data[:, 0] = float("nan")

    trainer.model.decoder.register_forward_hook(spoil)
    with pytest.raises(NonFiniteStepError, match="loss_mask nan") as caught:
        trainer.train()
    assert "the output of decoder (GroupIAMDecoder), whose input was finite" in str(caught.value)


def test_the_part_of_an_accumulated_step_is_named(make_trainer):
    trainer = make_trainer("SOLVER.ACCUMULATE_STEPS", 2)
    calls = []

    def spoil(module, args, output):
        calls.append(1)
        return output * float("nan") if len(calls) % 2 == 0 else output

    trainer.model.encoder.fusion.register_forward_hook(spoil)
    with pytest.raises(NonFiniteStepError, match="in part 2 of 2") as caught:
        trainer.train()
    assert all(x["file_name"] in str(caught.value) for batch in trainer.batches for x in batch)


def test_a_folder_that_cannot_be_written_is_told_with_the_rest(make_trainer, tmp_path):
    trainer = make_trainer()
    (tmp_path / "nonfinite_0000000_rank0").write_text("in the way")
    break_output(trainer, [0])
    with pytest.raises(NonFiniteStepError, match="the step cannot be saved: .*nonfinite_0000000_rank0") as caught:
        trainer.train()
    assert "the output of encoder.fusion" in str(caught.value)


def test_a_folder_without_a_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))} has no step.pth and no config.yaml"):
        replay_step(tmp_path)
    with pytest.raises(SystemExit, match="error: .* has no step.pth"):
        cli([str(tmp_path)])


@pytest.mark.parametrize(("key", "value"), [("ACTION", "ignore"), ("MAX_SKIPS", -1)])
def test_refused_by_name(make_trainer, key, value):
    with pytest.raises(ValueError, match=f"SOLVER.NONFINITE.{key}"):
        make_trainer(f"SOLVER.NONFINITE.{key}", value)


def test_where_all_is_finite_nothing_is_found_and_nothing_stays():
    model = tiny_model().train()
    batches = [[random_input(num_instances=2)], [random_input(num_instances=1, seed=1)]]
    finding, losses = find_first_non_finite(model, batches, device=torch.device("cpu"), with_gradients=True)
    assert finding is None and set(losses) == {"loss_ce", "loss_objectness", "loss_dice", "loss_mask"}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_a_parameter_and_an_input_that_are_not_finite_are_told():
    model = tiny_model().train()
    x = random_input(num_instances=2)
    torch.nn.init.constant_(model.encoder.fusion.bias, float("nan"))
    finding, _ = find_first_non_finite(model, [[x]], device=torch.device("cpu"))
    assert str(finding) == "the output of encoder.fusion (Conv2d), whose input was finite, but not its bias"
    # Between the modules: Detectron2's Conv2d convolves, then calls its norm.
    torch.nn.init.constant_(model.backbone.stem.conv1.weight, float("inf"))
    finding, _ = find_first_non_finite(model, [[x]], device=torch.device("cpu"))
    assert str(finding) == "a value inside backbone.stem.conv1 (Conv2d), whose input was finite, but not its weight"
    x["image"] = x["image"].float().fill_(float("inf"))
    finding, _ = find_first_non_finite(model, [[x]], device=torch.device("cpu"))
    assert str(finding) == "the input of the whole model (SparseInst)"


def test_gradients_whose_squares_alone_overflow_are_finite(make_trainer):
    trainer = make_trainer("MODEL.SPARSE_INST.LOSS.CLASS_WEIGHT", 1e25, "SOLVER.MAX_ITER", 1)
    trainer.train()
    assert len(trainer.storage.history("total_loss").values()) == 1
    squares = sum(parameter.grad.square().sum() for parameter in trainer.model.parameters())
    assert squares == float("inf")


def test_activations_that_are_recomputed_do_not_confuse_the_search():
    model = tiny_model().train()
    recompute_activations(model, ["backbone.*", "encoder", "decoder.*_branch"])
    fine, broken = random_input(num_instances=2), random_input(num_instances=2)
    broken["image"] = broken["image"].float()
    broken["image"][0, 5, 5] = float("nan")
    finding, _ = find_first_non_finite(
        model, [[fine], [broken]], device=torch.device("cpu"), with_gradients=True
    )  # fmt: skip
    assert (finding.batch, finding.what, finding.name) == (1, INPUT, "")
    assert find_first_non_finite(model, [[fine]], device=torch.device("cpu"), with_gradients=True)[0] is None


def test_the_search_runs_the_network_that_hooks_can_watch():
    model = tiny_model().train()

    def compiled(images):
        raise AssertionError("hooks do not see this one")

    model.training_network = compiled
    with torch.no_grad():
        model.encoder.fusion.bias.fill_(float("nan"))
    finding, _ = find_first_non_finite(
        model, [[random_input(num_instances=2)]], device=torch.device("cpu"), with_gradients=True
    )  # fmt: skip
    assert finding.name == "encoder.fusion"
    assert model.training_network is compiled


def test_metrics_are_taken_from_what_the_guard_copied(make_trainer):
    trainer = make_trainer("SOLVER.MAX_ITER", 1)
    verdicts = []
    check = trainer.finite_guard.check
    trainer.finite_guard.check = lambda *args, **kwargs: verdicts.append(check(*args, **kwargs)) or verdicts[-1]
    written = []
    trainer.write_metrics = lambda losses, *_: written.append(losses)
    trainer.train()
    assert written[0] is verdicts[0].losses
    assert {"loss_ce", "loss_mask", "loss_dice", "loss_objectness"} == written[0].keys()
