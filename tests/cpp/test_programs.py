"""Shows each C++ test that CMake registered (-DTORCHQUANT_TESTS=ON, as `make test` does) as one item here."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BUILD = Path(__file__).resolve().parents[2] / "build"
HOW = "not built: configure with -DTORCHQUANT_TESTS=ON and have GoogleTest (libgtest-dev), or run `make test`"


def ctest() -> str | None:
    beside = Path(sys.executable).with_name("ctest")
    return str(beside) if beside.exists() else shutil.which("ctest")


def newest_build() -> Path | None:
    """The last build that has C++ tests; those under sanitizers are run by `make sanitize`."""
    files = [f for f in BUILD.glob("*/tests/cpp/CTestTestfile.cmake") if "sanitize" not in f.parts[-4]]
    return max(files, key=lambda f: f.stat().st_mtime).parents[2] if files else None


def registered() -> list[str]:
    build, program = newest_build(), ctest()
    if build is None or program is None:
        return []
    listed = subprocess.run([program, "--show-only=json-v1"], cwd=build, capture_output=True, text=True, check=True)
    return [test["name"] for test in json.loads(listed.stdout)["tests"]]


@pytest.mark.parametrize("name", registered() or [pytest.param("", marks=pytest.mark.skip(reason=HOW))])
def test_program(name: str) -> None:
    command = [str(ctest()), "--output-on-failure", "--no-tests=error", "-R", f"^{re.escape(name)}$"]
    done = subprocess.run(command, cwd=newest_build(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
