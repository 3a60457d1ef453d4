"""One model for several threads and images of several sizes: each call returns its own image's answer."""

import sys
import threading

import numpy as np
import pytest
import torch

from sparseinst.inference import Predictor
from sparseinst.runtime import compile as compiling
from sparseinst.runtime.optimize import optimize_for_inference
from tests.tiny_model import random_input, tiny_cfg, tiny_model

SIZES = ((64, 96), (96, 64), (64, 64), (128, 96))
NUM_THREADS, ROUNDS = 3, 4


@pytest.fixture
def quick_switches(request):
    before = sys.getswitchinterval()
    # Compilation would take ten seconds.
    sys.setswitchinterval(1e-4 if request.node.callspec.params["engine"] == "compile" else 1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(work):
    """Call work(thread number) in several threads; raise the first error."""
    errors = []

    def run(number):
        try:
            work(number)
        # Handed to the test's own thread.
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("engine", ["torch", "optimized", "bfloat16", "compile", "openvino", "onnxruntime"])
def test_every_engine_returns_each_thread_its_own_answer(engine, monkeypatch, quick_switches):
    for package in {"openvino": ["openvino"], "onnxruntime": ["onnxscript", "onnxruntime"]}.get(engine, []):
        pytest.importorskip(package, reason=f"the package {package} is not installed")
    model = tiny_model()
    real_compile = torch.compile
    # Inductor would take a minute.
    monkeypatch.setattr(compiling.torch, "compile", lambda network, **kwargs: real_compile(network, backend="eager"))
    engines = {name: {"engine": name} for name in ("openvino", "onnxruntime")}
    options = {**engines, "compile": {"compile": True}, "bfloat16": {"precision": "bfloat16"}}
    runner = model if engine == "torch" else optimize_for_inference(model, **options.get(engine, {}))
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(1, 3, *SIZES[index % len(SIZES)], generator=generator) for index in range(8)]
    with torch.no_grad():
        expected = [runner.network(image) for image in images]

    def work(number):
        with torch.no_grad():
            for index in np.random.default_rng(number).permutation(len(images) * ROUNDS) % len(images):
                found = runner.network(images[index])
                for name, value in expected[index].items():
                    # Another image's answer differs by more than a tenth.
                    assert (found[name] - value).abs().max() <= 1e-3 * value.abs().max(), (index, name)

    in_threads(work)


def test_output_options_belong_to_a_thread():
    model = tiny_model("MODEL.SPARSE_INST.CLS_THRESHOLD", -1.0)
    optimized = optimize_for_inference(model)
    both_inside = threading.Barrier(NUM_THREADS, timeout=20)

    def work(number):
        formats = ("rle", "bitmask", "rle")
        with torch.no_grad(), optimized.output_as(mask_format=formats[number], score_threshold=0.1 * number):
            both_inside.wait()
            assert optimized.output.score_threshold == 0.1 * number
            masks = optimized([random_input()])[0]["instances"].pred_masks
            assert isinstance(masks, torch.Tensor) == (number == 1)
            both_inside.wait()
        assert optimized.output.mask_format == "bitmask"

    in_threads(work)
    assert not optimized.model._output_of_thread


def test_a_training_model_stays_in_evaluation_mode_until_the_last_thread_is_done():
    model = tiny_model().train()
    predictor = Predictor(tiny_cfg(), model=model)
    first_is_done = threading.Event()
    inside = threading.Barrier(2, timeout=20)
    network = model.network

    def slow_network(images):
        inside.wait()
        if threading.current_thread().name == "slow":
            first_is_done.wait(20)
        # In training mode the running statistics would change, and the outputs have one entry more.
        assert not model.training
        return network(images)

    model.network = slow_network
    image = np.zeros((64, 64, 3), np.uint8)
    errors = []

    def call():
        try:
            predictor([image])
        except AssertionError as error:
            errors.append(error)

    slow = threading.Thread(target=call, name="slow")
    slow.start()
    predictor([image])
    first_is_done.set()
    slow.join()
    assert not errors and model.training
