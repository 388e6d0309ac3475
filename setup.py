"""Runs CMake. Holds no source list and no flags: those are in CMakeLists.txt.

Environment: FORCE_CUDA (0 or 1), TORCH_CUDA_ARCH_LIST ("8.0;9.0"), MAX_JOBS, TORCHQUANT_CMAKE_ARGS (-D...).
"""

import os
import shlex
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
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = CUDA_HOME is not None and (Path(CUDA_HOME) / "bin" / "nvcc").exists()
    forced = os.environ.get("FORCE_CUDA", "")
    if forced not in ("", "0", "1"):
        sys.exit(f"torchquant: FORCE_CUDA must be 0 or 1, got '{forced}'")
    if forced != "1":
        return forced == "" and torch.version.cuda is not None and nvcc
    if torch.version.cuda is None:
        sys.exit(f"torchquant: FORCE_CUDA=1 needs a CUDA build of torch, found torch {torch.__version__}")
    if not nvcc:
        sys.exit(f"torchquant: FORCE_CUDA=1 needs nvcc (looked for bin/nvcc in CUDA_HOME={CUDA_HOME})")
    return True


def cuda_arguments() -> list[str]:
    # torch's CMake package turns this list into nvcc flags and ignores CMAKE_CUDA_ARCHITECTURES.
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0").replace(" ", ";").replace(",", ";")
    return ["-DTORCHQUANT_CUDA=ON", f"-DTORCH_CUDA_ARCH_LIST={archs}"]


class CMakeBuild(build_ext):
    def run(self) -> None:
        import torch

        target = ROOT / "torchquant" if self.inplace else Path(self.build_lib).resolve() / "torchquant"
        build = ROOT / "build" / f"torch{torch.__version__}-{sysconfig.get_config_var('SOABI')}"
        build.mkdir(parents=True, exist_ok=True)
        target.mkdir(parents=True, exist_ok=True)
        # pip installs cmake and ninja beside this interpreter; without an activated environment they are not on PATH.
        os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")
        if shutil.which("cmake") is None:
            sys.exit("torchquant: needs cmake to build; `pip install cmake ninja`")
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build),
            f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            "-DTORCHQUANT_PYTHON=ON",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]  # fmt: skip
        if shutil.which("ninja"):
            configure.append("-GNinja")
        cuda = wants_cuda(torch)
        configure += cuda_arguments() if cuda else ["-DTORCHQUANT_CUDA=OFF"]
        configure += shlex.split(os.environ.get("TORCHQUANT_CMAKE_ARGS", ""))
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(["cmake", "--build", str(build), "-j", jobs], check=True)
        (target / "_build.py").write_text(
            "# Written by setup.py: what this build was made for.\n"
            f'torch_version = "{torch.__version__}"\n'
            f'cuda_version = "{torch.version.cuda if cuda else ""}"\n'
        )


setup(ext_modules=[Extension("torchquant._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
