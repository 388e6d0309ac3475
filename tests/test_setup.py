"""What setup.py decides before CMake runs: with CUDA or without, and for which architectures."""

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import setuptools
import torch.utils.cpp_extension

ROOT = Path(__file__).resolve().parents[1]
CUDA_TORCH = SimpleNamespace(__version__="2.13.0+cu130", version=SimpleNamespace(cuda="13.0"))
CPU_TORCH = SimpleNamespace(__version__="2.13.0+cpu", version=SimpleNamespace(cuda=None))


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    for name in ("FORCE_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.fixture
def toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A CUDA_HOME with an nvcc."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", str(tmp_path))
    return tmp_path


def test_cuda_is_built_when_torch_and_nvcc_have_it(setup_py, toolkit, monkeypatch):
    assert setup_py["wants_cuda"](CUDA_TORCH)
    assert not setup_py["wants_cuda"](CPU_TORCH)
    monkeypatch.setenv("FORCE_CUDA", "0")
    assert not setup_py["wants_cuda"](CUDA_TORCH)
    monkeypatch.setenv("FORCE_CUDA", "1")
    assert setup_py["wants_cuda"](CUDA_TORCH)
    (toolkit / "bin" / "nvcc").unlink()
    monkeypatch.delenv("FORCE_CUDA")
    assert not setup_py["wants_cuda"](CUDA_TORCH)


def test_force_cuda_says_what_is_missing(setup_py, toolkit, monkeypatch):
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match="FORCE_CUDA=1 needs a CUDA build of torch, found torch 2.13.0\\+cpu"):
        setup_py["wants_cuda"](CPU_TORCH)
    (toolkit / "bin" / "nvcc").unlink()
    with pytest.raises(SystemExit, match="FORCE_CUDA=1 needs nvcc \\(looked for bin/nvcc in CUDA_HOME="):
        setup_py["wants_cuda"](CUDA_TORCH)
    monkeypatch.setenv("FORCE_CUDA", "yes")
    with pytest.raises(SystemExit, match="FORCE_CUDA must be 0 or 1, got 'yes'"):
        setup_py["wants_cuda"](CUDA_TORCH)


@pytest.mark.parametrize(
    ("given", "passed"), [(None, "8.0;9.0"), ("7.5 8.6+PTX", "7.5;8.6+PTX"), ("9.0", "9.0"), ("8.0,9.0a", "8.0;9.0a")]
)
def test_architectures_are_passed_on(setup_py, monkeypatch, given: str | None, passed: str):
    if given is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    assert setup_py["cuda_arguments"]() == ["-DTORCHQUANT_CUDA=ON", f"-DTORCH_CUDA_ARCH_LIST={passed}"]
