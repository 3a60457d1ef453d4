"""The package as users get it: wheel, versions, and what is said where something is missing."""

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import sparseinst

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the checkout: a build leaves files in its folder."""
    work = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "build", "dist", "output", "datasets", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, work / "source", ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(work), str(work / "source")], check=True)
    return next(work.glob("*.whl"))


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a virtual environment with the wheel and this one's libraries, which does not see the checkout."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site_packages = Path(subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip())
    # The folder that a .pth file names is importable; .pth files in it, such as an editable install's, are not read.
    (site_packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(site_packages), str(wheel)], check=True)
    return python


def run_elsewhere(python: Path | str, *arguments: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([python, *arguments], cwd=folder, capture_output=True, text=True)


def pinned_versions() -> dict[str, str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pins = [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]
    return {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}


def pinned_detectron2() -> str:
    return re.search(r"^DETECTRON2 := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1)


def required(metadata: Message, extra: str) -> list[Requirement]:
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    return [requirement for requirement in requirements if _belongs(requirement, extra)]


def _belongs(requirement: Requirement, extra: str) -> bool:
    if requirement.marker is None:
        return extra == ""
    return extra != "" and requirement.marker.evaluate({"extra": extra})


def test_wheel_holds_package_and_configs_and_nothing_else(wheel: Path) -> None:
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "sparseinst").rglob("*.py")}
    configs = [path for path in (ROOT / "configs").rglob("*") if path.suffix in (".yaml", ".py")]
    assert any(path.suffix == ".yaml" for path in configs)
    expected |= {f"sparseinst/{path.relative_to(ROOT)}" for path in configs}
    page = ROOT / "sparseinst" / "serving" / "page"
    expected |= {str(path.relative_to(ROOT)) for path in page.iterdir()}
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == expected


def test_wheel_has_the_version_and_the_licence(wheel: Path, metadata: Message) -> None:
    assert metadata["Version"] == sparseinst.__version__
    with zipfile.ZipFile(wheel) as archive:
        assert any(name.endswith("/LICENSE") for name in archive.namelist())


def test_wheel_has_the_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/entry_points.txt"))
        assert "[console_scripts]\nsparseinst = sparseinst.__main__:main" in archive.read(name).decode()


def test_version_is_written_in_one_place() -> None:
    files = [ROOT / "setup.py", ROOT / "pyproject.toml", *(ROOT / "sparseinst").rglob("*.py")]
    assigned = [path for path in files if re.search(r"""version_*\s*=\s*["']\d""", path.read_text())]
    assert assigned == [ROOT / "sparseinst" / "__init__.py"]


@pytest.mark.parametrize("extra", ["", "headless", "timm", "small-data", "serve", "dev"])
def test_pins_are_within_the_ranges(metadata: Message, extra: str) -> None:
    pins = pinned_versions()
    requirements = required(metadata, extra)
    assert requirements
    for requirement in requirements:
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), str(requirement)


def test_detectron2_and_opencv_are_not_required(metadata: Message) -> None:
    everything = {Requirement(text).name for text in metadata.get_all("Requires-Dist")} | set(pinned_versions())
    assert not [name for name in everything if "detectron2" in name]
    assert not [requirement.name for requirement in required(metadata, "") if "opencv" in requirement.name]
    assert [requirement.name for requirement in required(metadata, "headless")] == ["opencv-python-headless"]
    assert [requirement.name for requirement in required(metadata, "gui")] == ["opencv-python"]


@pytest.mark.parametrize(
    "tool",
    [
        "train_net",
        "demo",
        "make_shapes",
        "analyze_model",
        "convert_weights",
        "select_classes",
        "check_dataset",
        "benchmark",
        "benchmark_training",
        "benchmark_video",
        "serve",
    ],
)
def test_tools_run_from_another_folder(clean_python: Path, tmp_path: Path, tool: str) -> None:
    result = run_elsewhere(clean_python, "-m", f"sparseinst.tools.{tool}", "--help", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout


def test_installed_package_finds_its_configs(clean_python: Path, tmp_path: Path) -> None:
    code = """
import sparseinst
from detectron2.config import get_cfg
path = sparseinst.get_config_file("sparse_inst_r50_giam")
cfg = get_cfg()
sparseinst.add_sparse_inst_config(cfg)
cfg.merge_from_file(path)
print(sparseinst.__file__, path, cfg.MODEL.META_ARCHITECTURE, sep="\\n")
"""
    result = run_elsewhere(clean_python, "-c", code, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    package, config, meta_architecture = result.stdout.splitlines()[-3:]
    installed = clean_python.parent.parent
    assert Path(package).is_relative_to(installed)
    assert Path(config).is_relative_to(installed)
    assert meta_architecture == "SparseInst"


def test_import_loads_neither_torch_nor_detectron2() -> None:
    code = "import sys, sparseinst; print(sorted({'torch', 'detectron2'} & sys.modules.keys()))"
    result = run_elsewhere(sys.executable, "-c", code, folder=ROOT)
    assert result.stdout == "[]\n", result.stderr


def test_the_config_function_registers_everything() -> None:
    code = """
from detectron2.config import get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, build_model
from sparseinst import add_sparse_inst_config, get_config_file
cfg = get_cfg()
add_sparse_inst_config(cfg)
cfg.merge_from_file(get_config_file("sparse_inst_r50_giam"))
cfg.MODEL.DEVICE = "cpu"
names = ["build_cspnet_backbone", "build_pyramid_vision_transformer", "build_timm_backbone"]
assert all(name in BACKBONE_REGISTRY for name in names)
print(type(build_model(cfg)).__name__, "SparseInst" in META_ARCH_REGISTRY)
"""
    result = run_elsewhere(sys.executable, "-c", code, folder=ROOT)
    assert result.stdout.splitlines()[-1:] == ["SparseInst True"], result.stderr


def test_missing_detectron2_says_how_to_get_it() -> None:
    # None in sys.modules is Python's own way to make an import fail.
    code = "import sys; sys.modules['detectron2'] = None; import sparseinst"
    result = run_elsewhere(sys.executable, "-c", code, folder=ROOT)
    assert result.returncode == 1
    message = result.stderr.split("\nImportError: ")[-1]
    assert "https://detectron2.readthedocs.io/en/latest/tutorials/install.html" in message
    assert pinned_detectron2() in message


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make_install(**settings: Path | str) -> str:
    """What a `make install` that must fail says; its first line, the others are make's own."""
    command = ["make", "--no-print-directory", "install", *(f"{name}={value}" for name, value in settings.items())]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    return result.stderr.splitlines()[0]


def python_that_fails(folder: Path, word: str) -> Path:
    """A Python that fails where `word` stands in its arguments."""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\ncase "$*" in *{word}*) exit 1;; esac\nexec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return script


@needs_make
def test_make_names_an_unsupported_python(tmp_path: Path) -> None:
    line = make_install(VENV=tmp_path / "venv", PYTHON=python_that_fails(tmp_path, "version_info"))
    assert "needs Python 3.10 to 3.13" in line and sys.version.split()[0] in line


@needs_make
def test_make_says_that_no_python_is_there(tmp_path: Path) -> None:
    assert "needs Python 3.10 to 3.13, and the PATH has none" in make_install(VENV=tmp_path / "venv", PYTHON="")


@needs_make
def test_make_names_the_package_of_a_missing_venv_module(tmp_path: Path) -> None:
    line = make_install(VENV=tmp_path / "venv", PYTHON=python_that_fails(tmp_path, "ensurepip"))
    assert f"apt install python3.{sys.version_info[1]}-venv" in line


@needs_make
def test_make_leaves_a_folder_that_is_no_environment_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert f"{tmp_path} is there, but has no bin/python" in make_install(VENV=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@needs_make
def test_make_says_how_much_disk_it_takes(tmp_path: Path) -> None:
    line = make_install(VENV=tmp_path / "venv", PYTHON=sys.executable, DISK_GB="1000000")
    assert "The installation takes 1000000 GB" in line
