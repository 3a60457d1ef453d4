"""ONNX Runtime: the session's options, and the providers that are refused."""

from types import SimpleNamespace

import pytest

from sparseinst.runtime.onnxruntime import CPU_PROVIDER, ONNXRuntimeNetwork

onnxruntime = pytest.importorskip("onnxruntime", reason="the package onnxruntime (extra 'onnx') is not installed")


def stub_session(started, log=None):
    """Return a session with these providers and the CPU's."""
    return SimpleNamespace(
        get_inputs=lambda: [SimpleNamespace(name="images")],
        get_outputs=lambda: [],
        get_providers=lambda: [*started, CPU_PROVIDER],
        disable_fallback=lambda: log.append("no fallback"),
    )


def test_threads_and_providers_reach_the_session(monkeypatch):
    sessions = []

    def open_session(source, options, providers):
        sessions.append((source, options.intra_op_num_threads, providers))
        return stub_session([name for name, _ in providers], sessions)

    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["A", "B", CPU_PROVIDER])
    ONNXRuntimeNetwork(b"model", threads=3, providers=["B", "A"])
    assert sessions == [(b"model", 3, [("B", {}), ("A", {})]), "no fallback"]


@pytest.mark.parametrize(("providers", "missing"), [(["A"], "A"), (["B", "A", CPU_PROVIDER], "B, A")])
def test_providers_that_do_not_start_are_an_error(monkeypatch, providers, missing):
    """ONNX Runtime itself would go on with the CPU."""
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *args, **options: stub_session([]))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["A", "B", CPU_PROVIDER])
    with pytest.raises(ValueError) as caught:
        ONNXRuntimeNetwork(b"model", providers=providers)
    assert str(caught.value).startswith(f"RUNTIME.PROVIDERS is {providers}; ONNX Runtime cannot start {missing} ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("providers", [[], ["NoSuchProvider"], [CPU_PROVIDER, "NoSuchProvider"]])
def test_providers_that_are_refused(providers):
    with pytest.raises(ValueError) as caught:
        ONNXRuntimeNetwork(b"", providers=providers)
    message = str(caught.value)
    assert message.startswith(f"RUNTIME.PROVIDERS is {providers}; this onnxruntime has ")
    assert CPU_PROVIDER in message.partition(";")[2] and "\n" not in message
