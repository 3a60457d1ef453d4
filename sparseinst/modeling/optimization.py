"""A SparseInst made fast for inference: one function for evaluation, demo, predictor and benchmark."""

import contextlib
import copy

import torch
from detectron2 import layers
from detectron2.config import CfgNode
from detectron2.structures import ImageList
from torch import nn

from sparseinst.modeling.compilation import Network, compiled
from sparseinst.modeling.cuda_graphs import GraphedNetwork
from sparseinst.modeling.fused import fuse_network
from sparseinst.modeling.sparse_inst import SparseInst
from sparseinst.modeling.winograd import use_winograd

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ENGINES = ("torch", "openvino")
# Sides of the image that finds out what feeds what: small, and a multiple of every stride.
_EXAMPLE_SIZE = (96, 128)


class OptimizedSparseInst(nn.Module):
    """What a SparseInst in eval mode is, with another way to run its network.

    Args:
        model: preprocesses and postprocesses; its parts are those that run, where ``network`` uses them.
        network: normalised, padded images (B, 3, ., .) to the decoder's dict, in float32.
    """

    def __init__(self, model: SparseInst, network: Network) -> None:
        super().__init__()
        self.model = model
        self._network = network
        self.eval()

    @property
    def device(self) -> torch.device:
        """As SparseInst's."""
        return self.model.device

    @property
    def decoder(self) -> nn.Module:
        """As SparseInst's."""
        return self.model.decoder

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """As SparseInst's in eval mode."""
        images = self.preprocess_image(batched_inputs)
        return self.postprocess(self.network(images.tensor), batched_inputs, images)

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """As SparseInst's."""
        return self.model.preprocess_image(batched_inputs)

    def network(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """As SparseInst's, in the way that was chosen."""
        with torch.inference_mode():
            return self._network(images)

    def postprocess(
        self, outputs: dict[str, torch.Tensor], batched_inputs: list[dict], images: ImageList
    ) -> list[dict]:
        """As SparseInst's."""
        return self.model.postprocess(outputs, batched_inputs, images)

    def train(self, mode: bool = True) -> "OptimizedSparseInst":
        """It stays in eval mode whatever is asked for: folded norms cannot learn."""
        return super().train(False)


def optimize_for_inference(
    model: nn.Module,
    *,
    fuse: bool = True,
    channels_last: bool = True,
    winograd: bool = True,
    precision: str = "float32",
    compile: bool = False,
    cuda_graphs: bool = False,
    engine: str = "torch",
) -> nn.Module:
    """A copy of a model whose predictions are the same, and sooner there.

    Args:
        model: a SparseInst, on its device; not changed. A model of another meta-architecture is returned as it is.
        fuse: rewrite the network, see :mod:`sparseinst.modeling.fused`; float32 results move by rounding only.
        channels_last: feature maps in channels-last layout.
        winograd: wide 3x3 convolutions with fewer multiplications, see :mod:`sparseinst.modeling.winograd`; float32
            results move by some 1e-5. Only on the CPU, in float32, with fuse, and with channels_last where PyTorch is
            the engine; elsewhere it changes nothing.
        precision: "float32"; "bfloat16" or "float16": autocast of PyTorch, with the weights of convolutions and linear
            layers held in that type, which autocast would convert at each picture. What autocast leaves in float32
            stays so, the normalisation of activation maps and the pooling among it.
        compile: run the network through ``torch.compile``. It is compiled at the first picture, and once more, then
            for all sizes, at the first one of another size. Without a C++ compiler a line says so, and it runs as it
            is.
        cuda_graphs: record the network's kernels at the first picture of each shape, and replay them; for the 8 shapes
            that came last. Only on CUDA; elsewhere it changes nothing.
        engine: "torch"; "openvino": the network runs in OpenVINO, on the CPU, in float32, compiled once for all sizes.

    Raises:
        ValueError: an unknown name, or a combination that does not exist.
        ImportError: the engine's package is not installed.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"RUNTIME.PRECISION is {precision!r}; it must be one of {list(PRECISIONS)}")
    if engine not in ENGINES:
        raise ValueError(f"RUNTIME.ENGINE is {engine!r}; it must be one of {list(ENGINES)}")
    if not isinstance(model, SparseInst):
        return model
    if engine != "torch" and (precision != "float32" or compile or model.device.type != "cpu"):
        raise ValueError(
            f"RUNTIME.ENGINE {engine} runs on the CPU in float32, without COMPILE; set "
            "MODEL.DEVICE cpu, PRECISION float32 and COMPILE False, or ENGINE torch"
        )
    example = torch.randn(1, 3, *_EXAMPLE_SIZE, generator=torch.Generator().manual_seed(0)).to(model.device)
    model = fuse_network(model, example) if fuse else copy.deepcopy(model).eval().requires_grad_(False)
    if engine == "openvino":
        from sparseinst.modeling.openvino_network import OpenVINONetwork

        if winograd and fuse:
            use_winograd(model)
        return OptimizedSparseInst(model, OpenVINONetwork(model.network, example))
    if channels_last:
        model.to(memory_format=torch.channels_last)
    if winograd and fuse and channels_last and precision == "float32" and model.device.type == "cpu":
        use_winograd(model)
    network: Network = compiled(model.network) if compile else model.network
    dtype = None if precision == "float32" else PRECISIONS[precision]
    if dtype is not None:
        _hold_weights_in(model, dtype)
    device_type = model.device.type

    def run(images: torch.Tensor) -> dict[str, torch.Tensor]:
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        autocast = torch.autocast(device_type, dtype=dtype) if dtype is not None else contextlib.nullcontext()
        with autocast:
            return network(images)

    return OptimizedSparseInst(model, GraphedNetwork(run) if cuda_graphs and device_type == "cuda" else run)


def _hold_weights_in(model: nn.Module, dtype: torch.dtype) -> None:
    # Not of classes derived from these, which may compute with their weights before they use them.
    for module in model.modules():
        if type(module) in (nn.Conv2d, layers.Conv2d, nn.Linear):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)


def optimize_as_configured(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """:func:`optimize_for_inference` as RUNTIME says."""
    keys = cfg.RUNTIME
    return optimize_for_inference(
        model,
        fuse=keys.FUSE,
        channels_last=keys.CHANNELS_LAST,
        winograd=keys.WINOGRAD,
        precision=keys.PRECISION,
        compile=keys.COMPILE,
        engine=keys.ENGINE,
    )
