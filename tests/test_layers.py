"""The house rules that a machine can check: which way includes and imports point, and where rounding lives."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(p for suffix in ("*.h", "*.cuh", "*.cpp", "*.cu") for p in (ROOT / "csrc").rglob(suffix))
MODULES = sorted((ROOT / "torchquant").rglob("*.py"))
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.M)
IMPORT = re.compile(r"^\s*from\s+(\.+)([\w.]*)\s+import", re.M)
ROUNDING = re.compile(
    r"(\b(std|at)::round_?|\b(nearbyint|l?l?rint)f?|\bl?l?roundf|\b_mm\w*_round\w*|\b__float2int_r\w)\s*\("
)
TORCH = ("ATen/", "c10/", "torch/")
ROOMS = {"statistics", "solvers", "quantizers", "kernels", "training"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room_of(path: str) -> str:
    return path.split("/")[1] if path.startswith("csrc/") and path.count("/") > 1 else ""


def is_leaf(path: Path) -> bool:
    return path.suffix in (".cu", ".cuh") or path.name.endswith(".tier.cpp")


LEAF_HEADERS = {include for path in SOURCES if is_leaf(path) for include in INCLUDE.findall(path.read_text())}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_source_keeps_the_house_rules(path: Path) -> None:
    name, text = name_of(path), path.read_text()
    includes, room = INCLUDE.findall(text), room_of(name)
    upward = [i for i in includes if room_of(i) not in ("", "core", room)]
    assert not upward, f"{name} includes {upward}: rooms share through core, and core knows no room"
    if is_leaf(path) or name in LEAF_HEADERS:
        assert not [i for i in includes if i.startswith(TORCH)], f"{name}: a leaf and its header include no Torch"
    if name != "csrc/core/quant_math.h":
        rounding = ROUNDING.search(re.sub(r"//.*", "", text))
        assert not rounding, f"{name}: {rounding and rounding.group()} rounding lives in core/quant_math.h"


def test_nothing_is_compiled_for_the_machine_that_builds() -> None:
    for path in (ROOT / "CMakeLists.txt", ROOT / "setup.py", ROOT / "Makefile"):
        assert "-march=native" not in path.read_text(), f"{path.name}: CPU tiers are chosen at run time"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_python_imports_point_downward(path: Path) -> None:
    parts = path.relative_to(ROOT / "torchquant").parts
    for dots, module in IMPORT.findall(path.read_text()):
        target = (parts[: len(parts) - len(dots)] + tuple(module.split(".")) + ("",))[0]
        if parts[0] in ROOMS:
            assert target == parts[0], f"{name_of(path)}: a room calls its operators and nothing else, not {target}"
        if parts[0] not in ("recipes", "demo", "cli.py", "__init__.py"):
            assert target != "recipes", f"{name_of(path)}: recipes lie above"
