"""What a user meets first: a build for another torch, a missing build, an instruction set that is not there."""

import os
import subprocess
import sys

import pytest

import torchquant
from torchquant._load import same_release

IMPORT_WITH_BUILD = """
import sys, types
{before}
try:
    import torchquant
except ImportError as error:
    print(error)
loaded = "torchquant._C" in sys.modules or "libtorchquant" in open("/proc/self/maps").read()
print("library loaded" if loaded else "library not loaded")
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)


def test_library_for_another_torch_is_refused_before_it_is_loaded():
    fake = "sys.modules['torchquant._build'] = types.SimpleNamespace(torch_version='1.13.1+cpu', cuda_version='')"
    lines = run_python(IMPORT_WITH_BUILD.format(before=fake)).stdout.splitlines()
    assert len(lines) == 2, lines
    assert lines[0].startswith("torchquant: built for torch 1.13.1+cpu, found torch 2.")
    assert "pip install --no-build-isolation --force-reinstall" in lines[0]
    assert lines[1] == "library not loaded"


def test_missing_build_says_how_to_build():
    lines = run_python(IMPORT_WITH_BUILD.format(before="sys.modules['torchquant._build'] = None")).stdout.splitlines()
    assert lines == [
        "torchquant: not built; run `pip install --no-build-isolation .` in its source folder",
        "library not loaded",
    ]


@pytest.mark.parametrize(
    ("built", "found", "same"),
    [
        ("2.13.0+cpu", "2.13.1+cu130", True),
        ("2.13.0", "2.13.0", True),
        ("2.12.1", "2.13.0", False),
        ("2.1.0", "2.13.0", False),
        ("2.13.0", "3.13.0", False),
    ],
)
def test_same_release_ignores_patch_and_local_version(built: str, found: str, same: bool):
    assert same_release(built, found) is same


@pytest.mark.parametrize("tier", torchquant._C.cpu_tiers())
def test_environment_chooses_the_tier(tier: str):
    result = run_python("import torchquant; print(torchquant._C.cpu_tier())", TORCHQUANT_CPU_ISA=tier)
    assert result.stdout.strip() == tier, result.stderr


def test_unknown_tier_is_one_readable_line_at_import():
    result = run_python("import torchquant", TORCHQUANT_CPU_ISA="nonsense")
    have = ", ".join(torchquant._C.cpu_tiers())
    assert result.returncode == 1  # an exception, not std::terminate
    assert result.stderr.splitlines()[-1] == (
        f"ImportError: torchquant: TORCHQUANT_CPU_ISA: must be a tier that this CPU has ({have}), got 'nonsense'"
    )


def test_absent_tier_is_refused_and_the_tier_in_use_stays():
    before = torchquant._C.cpu_tier()
    with pytest.raises(ValueError, match="must be a tier that this CPU has .*, got 'sse1'"):
        torchquant._C.set_cpu_tier("sse1")
    assert torchquant._C.cpu_tier() == before
