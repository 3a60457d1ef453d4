"""How a training runs the network: the same gradients, statistics and names, whatever was chosen."""

import copy
import functools
import logging

import pytest
import torch
from detectron2.engine import create_ddp_model
from detectron2.modeling import build_model
from detectron2.utils import comm

from sparseinst.engine.recompute import prepare_for_training, recompute_activations
from sparseinst.runtime import compile as compilation
from tests.distributed.ranks import run_ranks
from tests.tiny_model import random_input, tiny_cfg

MOST = ["backbone.*", "encoder", "decoder.*_branch"]


def make_model(norm="BN", **options):
    torch.manual_seed(0)
    model = build_model(tiny_cfg("MODEL.RESNETS.NORM", norm, "MODEL.SPARSE_INST.DECODER.NORM", "BN")).train()
    prepare_for_training(model, **options)
    return model


def make_batch():
    return [random_input(64, 96, 3), random_input(64, 80, 1, seed=1)]


def step(model, batch=None, dtype=None):
    """Gradients and buffers after one step."""
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        losses = model(make_batch() if batch is None else batch)
    sum(losses.values()).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return gradients, {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(found, expected, tolerance=1e-6):
    for values, expected_values in zip(found, expected):
        assert values.keys() == expected_values.keys()
        for name, value in expected_values.items():
            error = (values[name].float() - value.float()).norm()
            assert error <= tolerance * max(value.float().norm(), 1e-3), (name, error)


@pytest.mark.parametrize("patterns", [["encoder"], ["decoder.*_branch"], ["backbone.res?"], ["*"], MOST])
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_recomputed_activations_change_neither_gradients_nor_statistics(patterns, norm, dtype):
    expected = step(make_model(norm), dtype=dtype)
    assert_same(step(make_model(norm, recompute=patterns), dtype=dtype), expected)


def test_activations_are_recomputed_where_something_is_learned():
    model = make_model(recompute=["backbone.res3", "backbone.res3.*", "encoder"])
    calls = []
    parts = {"res2": model.backbone.res2[0].conv1, "res3": model.backbone.res3[0].conv1, "fusion": model.encoder.fusion}
    for name, part in parts.items():
        part.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    step(model)
    # From the last part back. Blocks inside of res3 are not recomputed for themselves a third time.
    assert sorted(calls) == ["fusion", "fusion", "res2", "res3", "res3"]
    calls.clear()
    with torch.no_grad():
        model(make_batch())
        model.eval()(make_batch())
    assert sorted(calls) == ["fusion", "fusion", "res2", "res2", "res3", "res3"]


def test_less_is_kept_for_the_backward_pass():
    def kept_bytes(model):
        kept = {}
        pack = lambda tensor: kept.setdefault(tensor.untyped_storage().data_ptr(), tensor) is None or tensor  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            model.network(torch.ones(2, 3, 64, 96))
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    assert kept_bytes(make_model(recompute=MOST)) < 0.5 * kept_bytes(make_model())


def test_a_copy_recomputes_with_its_own_weights():
    model = make_model(recompute=MOST)
    copied = copy.deepcopy(model)
    torch.nn.init.zeros_(copied.encoder.fusion.weight)
    features = {name: torch.ones(1, 64 * 2**index, 8, 8) for index, name in enumerate(("res2", "res3", "res4"))}
    bias = copied.encoder.fusion.bias.view(1, -1, 1, 1)
    assert torch.equal(copied.encoder(features), bias.expand(1, 16, 8, 8))
    assert not torch.equal(model.encoder(features), copied.encoder(features))


@pytest.mark.parametrize("options", [{"recompute": MOST}, {"compile": True}, {"channels_last": True}])
def test_names_are_those_of_the_plain_model(options):
    plain = make_model()
    assert list(make_model(**options).state_dict()) == list(plain.state_dict())
    plain.load_state_dict(make_model(**options).state_dict())


@pytest.mark.parametrize("pattern", ["backbone.res9", "criterion", "encoder.fpn_laterals", ""])
def test_names_that_fit_nothing(pattern):
    with pytest.raises(ValueError, match="SOLVER.RECOMPUTE has .* There are backbone, backbone.stem"):
        recompute_activations(build_model(tiny_cfg()), ["encoder", pattern])


def rank_gradients():
    """Without recomputing, and with it."""
    found = []
    for patterns in ([], MOST):
        cfg = tiny_cfg("MODEL.RESNETS.NORM", "FrozenBN", "SOLVER.RECOMPUTE", patterns)
        torch.manual_seed(0)
        model = build_model(cfg).train()
        prepare_for_training(model, recompute=cfg.SOLVER.RECOMPUTE)
        ddp_model = create_ddp_model(model, broadcast_buffers=False, device_ids=None)
        sum(ddp_model([random_input(64, 64, 2, seed=comm.get_rank())]).values()).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    return found


def test_recomputed_activations_on_two_ranks():
    first, second = run_ranks(2, rank_gradients)
    assert_same(first[1:], first[:1])
    assert_same(first, second, 0)


@pytest.fixture
def aot_eager(monkeypatch):
    """The compiler's front without its slow end, which makes code."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_a_compiled_network_gives_the_same_gradients_and_statistics(aot_eager):
    expected = step(make_model())
    assert_same(step(make_model(compile=True, recompute=MOST)), expected, 1e-4)


def test_only_what_learns_is_compiled(monkeypatch):
    calls = []

    def compile(network):
        return lambda images: calls.append(len(images)) or network(images)

    monkeypatch.setattr(torch, "compile", compile)
    model = make_model(compile=True)
    step(model)
    assert calls == [2]
    with torch.no_grad():
        model(make_batch())
    model.eval()(make_batch())
    assert calls == [2]


def test_without_a_compiler_a_line_says_so(monkeypatch, caplog):
    def fail(images):
        raise RuntimeError("No working C++ compiler found\nand more")

    monkeypatch.setattr(torch, "compile", lambda network: fail)
    monkeypatch.setattr(logging.getLogger("sparseinst"), "propagate", True)
    with caplog.at_level(logging.WARNING, compilation.__name__):
        found = step(make_model(compile=True))
    assert [record.getMessage() for record in caplog.records] == [
        "torch.compile does not work here, so the network runs as it is: No working C++ compiler found"
    ]
    assert_same(found, step(make_model()), 0)


def test_only_our_model_is_compiled():
    with pytest.raises(ValueError, match="SOLVER.COMPILE is True, and MODEL.META_ARCHITECTURE Linear is not"):
        prepare_for_training(torch.nn.Linear(1, 1), compile=True)
