"""Runs CMake. Holds no source list and no flags: those are in CMakeLists.txt."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def wants_cuda(torch) -> bool:
    """FORCE_CUDA=1 or 0 decides; otherwise a CUDA build of torch together with nvcc."""
    forced = os.environ.get("FORCE_CUDA")
    if forced is not None:
        return forced == "1"
    from torch.utils.cpp_extension import CUDA_HOME

    return torch.version.cuda is not None and CUDA_HOME is not None


def cuda_arguments() -> list[str]:
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0").replace(" ", ";").replace("+PTX", "")
    return ["-DTORCHQUANT_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=" + archs.replace(".", "")]


class CMakeBuild(build_ext):
    def run(self) -> None:
        import torch

        target = ROOT / "torchquant" if self.inplace else Path(self.build_lib).resolve() / "torchquant"
        build = ROOT / "build" / f"torch{torch.__version__}-{sysconfig.get_config_var('SOABI')}"
        build.mkdir(parents=True, exist_ok=True)
        target.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build),
            f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            "-DTORCHQUANT_PYTHON=ON",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]  # fmt: skip
        if shutil.which("ninja"):
            configure.append("-GNinja")
        if wants_cuda(torch):
            configure += cuda_arguments()
        configure += os.environ.get("TORCHQUANT_CMAKE_ARGS", "").split()
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(["cmake", "--build", str(build), "-j", jobs], check=True)
        (target / "_build.py").write_text(
            "# Written by setup.py: what this build was made for.\n"
            f'torch_version = "{torch.__version__}"\n'
            f'cuda_version = "{torch.version.cuda or ""}"\n'
        )


setup(ext_modules=[Extension("torchquant._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
