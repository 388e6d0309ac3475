"""A process that sees a smaller CPU, and so do all of its libraries: ours, torch, oneDNN, MKL, ONNX Runtime."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).with_name("cpu_mask.cpp")
LIBRARY = Path(__file__).resolve().parents[1] / "build" / "cpu_mask.so"
FLAGS = ("-O1", "-shared", "-fPIC")
VARIABLE = "BENCHMARK_CPU"
TIERS = ("avx2", "avx2_vnni", "avx512", "avx512_vnni")


def is_on(tier: str) -> bool:
    return os.environ.get(VARIABLE) == tier


def environment_without() -> dict[str, str]:
    """For programs that handle faults themselves, as compilers do."""
    return {name: value for name, value in os.environ.items() if name not in (VARIABLE, "LD_PRELOAD")}


def start_again(tier: str, arguments: Sequence[str]) -> None:
    """Replaces this process by the same command on a CPU that ends with ``tier`` (Linux, x86-64)."""
    LIBRARY.parent.mkdir(exist_ok=True)
    subprocess.run([os.environ.get("CXX", "c++"), *FLAGS, str(SOURCE), "-o", str(LIBRARY)], check=True)
    environment = os.environ | {VARIABLE: tier, "LD_PRELOAD": str(LIBRARY)}
    os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *arguments], environment)
