"""ONNX Runtime's errors and providers, with a session that is a stub."""

import pytest
import torch

from sparseinst.runtime.onnxruntime import ONNXRuntimeNetwork, with_options


def network_that_raises(monkeypatch, error: Exception) -> ONNXRuntimeNetwork:
    """Return a network whose session raises this error for all images."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")

    class Session:
        def __init__(self, *args, **options):
            pass

        def get_inputs(self):
            return [self]

        def get_outputs(self):
            return []

        def get_providers(self):
            return ["CPUExecutionProvider"]

        def disable_fallback(self):
            pass

        name = "images"

        def run(self, names, inputs):
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "InferenceSession", Session)
        return ONNXRuntimeNetwork(b"")


@pytest.mark.parametrize("name", ["Fail", "RuntimeException", "InvalidArgument", "EPFail"])
def test_an_error_of_the_session_is_a_runtime_error_of_one_line(monkeypatch, name):
    state = pytest.importorskip("onnxruntime.capi.onnxruntime_pybind11_state", reason="onnxruntime is not installed")
    error = getattr(state, name)("Failed to allocate memory\nfor the buffer")
    assert not isinstance(error, RuntimeError)
    with pytest.raises(RuntimeError, match="^ONNX Runtime: Failed to allocate memory for the buffer$") as caught:
        network_that_raises(monkeypatch, error)(torch.zeros(1, 3, 2, 2))
    assert caught.value.__cause__ is error


def test_a_rank_of_torchrun_takes_its_own_gpu(monkeypatch):
    providers = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    # In TF32, the default, float32 would have three digits.
    float32 = {"use_tf32": 0}
    assert with_options(providers) == [(providers[0], {}), (providers[1], float32), (providers[2], {})]
    monkeypatch.setenv("LOCAL_RANK", "2")
    gpu = {"device_id": 2}
    assert with_options(providers) == [(providers[0], gpu), (providers[1], float32 | gpu), (providers[2], {})]


def test_the_session_gets_the_gpu_of_the_rank(monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")
    given = []

    def session(source, options, providers):
        given.append(providers)
        raise RuntimeError("no device")

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="cannot read the model: no device"):
        ONNXRuntimeNetwork(b"", providers=["CUDAExecutionProvider"])
    assert given == [[("CUDAExecutionProvider", {"use_tf32": 0, "device_id": 1})]]
