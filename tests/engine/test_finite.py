"""Steps whose loss or gradient is NaN or Inf: what is reported, saved, repeated, skipped, and left unchanged."""

import logging

import pytest
import torch
from torch import nn

from sparseinst.engine.finite import NonFiniteStepError, find_first_nonfinite
from sparseinst.engine.recompute import recompute_activations
from sparseinst.engine.trainer import Trainer
from tests.shapes_data import register_shapes
from tests.tiny_model import random_input, tiny_cfg, tiny_model

SKIP = ("SOLVER.NONFINITE.ACTION", "skip")
# Small images and two stages: CPUs have no fast convolution in float16.
FLOAT16 = (
    "SOLVER.AMP.ENABLED", True, "INPUT.MIN_SIZE_TRAIN", (32,),
    "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3"], "MODEL.SPARSE_INST.ENCODER.IN_FEATURES", ["res2", "res3"],
)  # fmt: skip
NAN, INF = float("nan"), float("inf")


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


def break_output(trainer, is_bad, value=NAN):
    trainer.model.encoder.fusion.register_forward_hook(
        lambda module, args, output: output * value if is_bad() else None
    )


def break_gradient(trainer, is_bad):
    """Change the gradient and no output."""

    def spoil(module, args, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * (INF if is_bad() else 1))

    trainer.model.encoder.fusion.register_forward_hook(spoil)


def set_scale(trainer, scale):
    trainer.grad_scaler.load_state_dict({**trainer.grad_scaler.state_dict(), "scale": scale})


def state_of(trainer):
    """Return copies of weights, running statistics and the optimizer's moments."""
    moments = [v.clone() for state in trainer.optimizer.state.values() for v in state.values()]
    return {**{name: v.clone() for name, v in trainer.model.state_dict().items()}, **dict(enumerate(moments))}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def stop(trainer, match):
    with pytest.raises(NonFiniteStepError, match=match) as caught:
        trainer.train()
    assert isinstance(caught.value, FloatingPointError)
    return str(caught.value)


def test_an_output_that_overflows_is_named_and_changes_nothing(make_trainer):
    trainer = make_trainer()
    with torch.no_grad():
        trainer.model.encoder.fusion.weight.fill_(3e38)
    before = state_of(trainer)
    message = stop(trainer, "A loss is NaN or Inf at iteration 0")
    assert "loss_ce nan" in message and all(x["file_name"] in message for x in trainer.batches[0])
    assert "the output of encoder.fusion (Conv2d), whose input was finite" in message
    # The running statistics too, though the forward pass moved them.
    assert equal(state_of(trainer), before)


def test_a_gradient_that_overflows_is_named_and_changes_nothing(make_trainer):
    # An image of the mean colour gives zeros up to the decoder, however large the weights, but not a zero gradient.
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
    message = stop(trainer, "A gradient is NaN or Inf at iteration 0")
    assert "finite losses" in message and "parameters whose gradient is NaN or Inf: " in message
    assert "NaN or Inf first in: the gradient of the input of encoder." in message
    assert equal(state_of(trainer), before)


def test_the_first_gradient_is_found_in_backward_order(make_trainer):
    trainer = make_trainer()
    break_gradient(trainer, lambda: True)
    message = stop(trainer, "NaN or Inf first in: the gradient of the output of encoder.fusion")
    assert "backbone.stem.conv1.weight" in message and " more" in message and "decoder" not in message


def test_the_part_of_an_accumulated_step_is_named(make_trainer):
    trainer = make_trainer("SOLVER.ACCUMULATE_STEPS", 2)
    calls = []
    break_output(trainer, lambda: calls.append(1) or len(calls) % 2 == 0)
    message = stop(trainer, "in part 2 of 2")
    assert all(x["file_name"] in message for batch in trainer.batches for x in batch)


def test_masks_that_are_nan_reach_a_loss(make_trainer):
    # The mask of one prediction, which the matcher would not choose.
    trainer = make_trainer()

    def spoil(module, args, output):
        output["pred_masks"].data[:, 0] = NAN

    trainer.model.decoder.register_forward_hook(spoil)
    assert "the output of decoder (GroupIAMDecoder)" in stop(trainer, "loss_mask nan")


@pytest.mark.parametrize(
    ("bad", "opts"), [(0, ()), (2, ()), (1, (*FLOAT16, "SOLVER.MAX_ITER", 2)), (2, ("SOLVER.ACCUMULATE_STEPS", 2))]
)
def test_resume_repeats_the_step_bit_for_bit(make_trainer, tmp_path, bad, opts):
    opts = (*opts, "SOLVER.CHECKPOINT_PERIOD", 2)
    expected = make_trainer(*opts)
    expected.train()
    for path in tmp_path.glob("*"):
        path.unlink()
    messages = []
    for number in range(3):
        trainer = make_trainer(*opts)
        trainer.resume_or_load(resume=number > 0)
        if number < 2:
            break_output(trainer, lambda trainer=trainer: trainer.iter == bad)
            messages.append(stop(trainer, "--resume repeats the step from model_nonfinite.pth"))
            assert (tmp_path / "last_checkpoint").read_text() == "model_nonfinite.pth"
    assert messages[0] == messages[1] and trainer.start_iter == bad
    trainer.train()
    assert equal(state_of(trainer), state_of(expected))


def test_a_checkpoint_that_cannot_be_written_is_reported_with_the_rest(make_trainer, tmp_path):
    trainer = make_trainer()
    (tmp_path / "model_nonfinite.pth").mkdir()
    break_output(trainer, lambda: True)
    message = stop(trainer, "cannot be saved: .*model_nonfinite.pth")
    assert "the output of encoder.fusion" in message


class FailsOnce(nn.Module):
    """Fail for the random numbers that the first call draws, and for no others."""

    def __init__(self, unlucky=None):
        super().__init__()
        self.unlucky = unlucky
        self.draws = []

    def forward(self, features):
        self.draws.append(torch.rand(3))
        self.unlucky = self.draws[0] if self.unlucky is None else self.unlucky
        return features * (INF if torch.equal(self.draws[-1], self.unlucky) else 1)


def test_the_step_is_repeated_with_its_random_numbers_and_training_goes_on_with_the_next(make_trainer):
    draws = []
    for module in (FailsOnce(), FailsOnce(torch.zeros(3))):
        trainer = make_trainer(*SKIP, "SOLVER.MAX_ITER", 2)
        trainer.model.encoder.ppm = module
        trainer._loader_iter = iter([[random_input(num_instances=2)]] * 2)
        trainer.train()
        draws.append(torch.stack(module.draws))
    (first, again, second), expected = draws
    assert torch.equal(first, again) and torch.equal(torch.stack([first, second]), expected)


@pytest.mark.parametrize("breaks", [break_output, break_gradient])
def test_a_skipped_step_leaves_all_as_it_was_and_is_counted(make_trainer, caplog, breaks):
    trainer = make_trainer(*SKIP, "SOLVER.OPTIMIZER", "ADAMW")
    breaks(trainer, lambda: trainer.iter in (1, 3))
    states, files = [], []
    after_step = trainer.after_step
    trainer.after_step = lambda: (
        states.append(state_of(trainer)), files.append(trainer.batches[0][0]["file_name"]), after_step()
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, "sparseinst"):
        trainer.train()
    assert [equal(*pair) for pair in zip(states, states[1:])] == [True, False, True]
    assert all(torch.isfinite(value).all() for value in states[-1].values())
    warnings = [record.getMessage() for record in caplog.records if "The step is skipped" in record.getMessage()]
    assert len(warnings) == 2 and files[1] in warnings[0] and "2 in all, 1 in a row" in warnings[1]
    assert [value for value, _ in trainer.storage.history("nonfinite/skipped_steps").values()] == [1, 2]
    assert len(trainer.storage.history("total_loss").values()) == 2
    resumed = make_trainer()
    resumed.load_state_dict(trainer.state_dict())
    assert resumed.finite_guard.counts == trainer.finite_guard.counts
    assert resumed.finite_guard.counts["skipped"] == 2


def test_too_many_skips_in_a_row_stop(make_trainer):
    trainer = make_trainer(*SKIP, "SOLVER.NONFINITE.MAX_SKIPS", 2, "SOLVER.MAX_ITER", 20)
    break_output(trainer, lambda: trainer.iter in (1, 2, 4, 5, 6))
    assert "the output of encoder.fusion" in stop(trainer, "(?s)at iteration 6.*\n2 steps in a row")


def test_what_only_the_scaler_makes_overflow_is_left_to_the_scaler(make_trainer):
    trainer = make_trainer(*FLOAT16, "SOLVER.MAX_ITER", 5, "SOLVER.NONFINITE.MAX_SKIPS", 0)
    set_scale(trainer, 8192.0)
    # Overflows at the scales from 8192 to 2048, and no longer at 1024.
    break_gradient(trainer, lambda: trainer.grad_scaler.get_scale() > 1500)
    trainer.train()
    assert trainer.finite_guard.counts == {"skipped": 0, "in_row": 0, "scaler_skipped": 3, "scaler_in_row": 0}
    assert trainer.grad_scaler.get_scale() == 1024
    assert len(trainer.storage.history("total_loss").values()) == 5


def test_what_overflows_at_every_scale_stops(make_trainer):
    trainer = make_trainer(*FLOAT16, "SOLVER.MAX_ITER", 100, "SOLVER.NONFINITE.MAX_SKIPS", 3)
    set_scale(trainer, 2.0)
    break_gradient(trainer, lambda: True)
    # One halving to 1, and three more skips.
    stop(trainer, "A gradient is NaN or Inf at iteration 4")
    assert trainer.grad_scaler.get_scale() == 1 / 8


def test_a_loss_that_is_nan_leaves_the_loss_scale_alone(make_trainer):
    trainer = make_trainer(*FLOAT16, *SKIP, "SOLVER.MAX_ITER", 2)
    set_scale(trainer, 16.0)
    break_output(trainer, lambda: trainer.iter == 1)
    trainer.train()
    assert trainer.finite_guard.counts["skipped"] == 1 and trainer.grad_scaler.get_scale() == 16


def test_gradients_whose_squares_alone_overflow_are_finite(make_trainer):
    trainer = make_trainer("MODEL.SPARSE_INST.LOSS.CLASS_WEIGHT", 1e25, "SOLVER.MAX_ITER", 1)
    trainer.train()
    assert len(trainer.storage.history("total_loss").values()) == 1
    assert sum(parameter.grad.square().sum() for parameter in trainer.model.parameters()) == INF


@pytest.mark.parametrize(("key", "value"), [("ACTION", "ignore"), ("MAX_SKIPS", -1)])
def test_refused_by_name(make_trainer, key, value):
    with pytest.raises(ValueError, match=f"SOLVER.NONFINITE.{key}"):
        make_trainer(f"SOLVER.NONFINITE.{key}", value)


class Products(nn.Module):
    """A model of no known kind: the loss is scale * x * weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)

    def forward(self, batch):
        return {"loss": self.second(self.first(batch["x"]) * batch["scale"]).sum()}


@pytest.mark.parametrize(
    ("x", "scale", "weight", "loss_scale", "expected"),
    [
        (1.0, 1.0, 1.0, 1.0, ""),
        (NAN, 1.0, 1.0, 1.0, "the input of the whole model (Products)"),
        (1.0, INF, 1.0, 1.0, "the input of the whole model (Products)"),
        (1e30, 1e30, 1.0, 1.0, "the input of second (Linear)"),
        (1e30, 1.0, 1e30, 1.0, "the output of second (Linear), whose input was finite"),
        (1.0, 1e30, 1e-30, 1e39, "the gradient of the output of the whole model (Products)"),
        (0.0, 1e30, 1e30, 1.0, "the gradient of the output of first (Linear)"),
        (1e5, 1e-3, 1e3, 1e35, "the gradient of the parameter first.weight"),
    ],
)
def test_the_first_module_is_found_in_any_model(x, scale, weight, loss_scale, expected):
    model = Products()
    nn.init.ones_(model.first.weight), nn.init.constant_(model.second.weight, weight)
    fine, bad = ({"x": torch.tensor([[a]]), "scale": torch.tensor(b)} for a, b in ((1.0, 1.0), (x, scale)))
    assert find_first_nonfinite(model, 1, lambda index: model(bad), loss_scale) == expected
    place = ", in part 2 of 2 of the step (SOLVER.ACCUMULATE_STEPS)"
    if expected and loss_scale == 1:
        assert find_first_nonfinite(model, 2, lambda index: model([fine, bad][index])) == expected + place
    assert all(p.grad is None and not p._backward_hooks for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_networks_that_are_recomputed_or_compiled_are_searched():
    model = tiny_model().train()
    batch = [random_input(num_instances=2)]
    recompute_activations(model, ["backbone.*", "encoder", "decoder.*_branch"])
    model.set_training_network(torch.compile(model.network, backend="eager"))
    model(batch)
    assert find_first_nonfinite(model, 1, lambda index: model(batch)) == ""
    with torch.no_grad():
        model.encoder.fusion.bias.fill_(NAN)
    assert find_first_nonfinite(model, 1, lambda index: model(batch)).startswith("the output of encoder.fusion")
