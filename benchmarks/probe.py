"""Hardware floors by probe.cpp, compiled with the system's compiler the first time they are asked for."""

import ctypes
import os
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from torchquant import _C

from . import cpu_mask
from .harness import Run

SOURCE = Path(__file__).with_name("probe.cpp")
LIBRARY = Path(__file__).resolve().parents[1] / "build" / "probe.so"
FLAGS = ("-O3", "-std=c++17", "-march=native", "-shared", "-fPIC")
COUNT = 20000  # turns of a loop: about 50 us

# Operations (a multiply and an add are two) of a turn of each loop.
LOOPS = {
    "tdpbusd": 4 * 2 * 16 * 16 * 64,
    "vpdpbusd_zmm": 12 * 128,
    "vpdpbusd_ymm": 12 * 64,
    "vpmaddubsw_zmm": 6 * 128,
    "vpmaddubsw_ymm": 6 * 64,
    "fma_zmm": 12 * 32,
    "fma_ymm": 12 * 16,
    "nop": 48,
}
# The fastest product of bytes that each tier can issue.
INTEGER_LOOPS = {
    "avx2": "vpmaddubsw_ymm",
    "avx2_vnni": "vpdpbusd_ymm",
    "avx512": "vpmaddubsw_zmm",
    "avx512_vnni": "vpdpbusd_zmm",
    "avx512_amx": "tdpbusd",
}


@dataclass(frozen=True)
class Probe:
    """``run()`` does ``amount`` of work."""

    name: str
    run: Run
    amount: float
    unit: str
    registers: bool = True  # no memory


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | str:
    """The compiled probes, or why there are none."""
    if _C.cpu_tier() not in INTEGER_LOOPS:
        return f"no probe for the tier {_C.cpu_tier()}"
    LIBRARY.parent.mkdir(exist_ok=True)
    command = [os.environ.get("CXX", "c++"), *FLAGS, str(SOURCE), "-o", str(LIBRARY)]
    try:
        made = subprocess.run(command, capture_output=True, text=True, env=cpu_mask.environment_without())
    except OSError as error:
        return f"no C++ compiler: {error}"
    if made.returncode != 0:
        return f"probe.cpp does not compile: {made.stderr.splitlines()[0]}"
    loaded = ctypes.CDLL(str(LIBRARY))
    for name in LOOPS:
        getattr(loaded, name).argtypes, getattr(loaded, name).restype = [ctypes.c_int64], None
    loaded.read_bytes.argtypes, loaded.read_bytes.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_uint64
    return loaded


def loop(loaded: ctypes.CDLL, name: str, unit: str) -> Probe:
    return Probe(name, lambda: getattr(loaded, name)(COUNT), float(COUNT * LOOPS[name]), unit)


def integer_peak() -> Probe | None:
    loaded = library()
    return None if isinstance(loaded, str) else loop(loaded, INTEGER_LOOPS[_C.cpu_tier()], "GOP/s")


def float_peak() -> Probe | None:
    loaded = library()
    if isinstance(loaded, str):
        return None
    return loop(loaded, "fma_zmm" if _C.cpu_tier().startswith("avx512") else "fma_ymm", "GFLOP/s")


def nops() -> Probe | None:
    """Falls where another hyperthread shares the core."""
    loaded = library()
    return None if isinstance(loaded, str) else loop(loaded, "nop", "G/s")


def read_rate(size: int) -> Probe | None:
    """Of a buffer of so many bytes: written before, or all its pages would be the one page of zeros."""
    loaded = library()
    if isinstance(loaded, str):
        return None
    buffer: Tensor = torch.randint(1, 255, (max(size // 64, 1) * 64,), dtype=torch.uint8)
    return Probe(
        "read as many bytes as the 4-bit weight has",
        lambda: loaded.read_bytes(buffer.data_ptr(), buffer.numel()),
        float(buffer.numel()),
        "GB/s",
        registers=False,
    )


def peaks(size: int) -> list[Probe]:
    return [probe for probe in (integer_peak(), float_peak(), nops(), read_rate(size)) if probe]
