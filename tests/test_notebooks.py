"""The notebooks as they lie in the repository: executed, with pictures, and free of what only one machine knows.

That they run is tested by ``make test``, which executes them on small data (``pytest --nbmake examples``).
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|tmp|usr|opt|work|Users|private|var)/\w|[A-Z]:\\\\\w")
LARGEST = 1_000_000  # bytes


@pytest.fixture(params=["imagenet_vit.ipynb", "superresolution.ipynb"])
def path(request: pytest.FixtureRequest) -> Path:
    return EXAMPLES / request.param


def code_cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def test_executed_from_top_to_bottom(path: Path) -> None:
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [out for cell in cells for out in cell["outputs"] if out["output_type"] == "error"]


def test_shows_its_results(path: Path) -> None:
    outputs = [out for cell in code_cells(path) for out in cell["outputs"]]
    printed = "".join("".join(out["text"]) for out in outputs if out["output_type"] == "stream")
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    assert "0 not ok" in printed and printed.count("equal: True") == 3
    assert len(pictures) >= 5


def test_small_and_without_paths_of_a_machine(path: Path) -> None:
    assert path.stat().st_size < LARGEST
    for cell in code_cells(path):
        for out in cell["outputs"]:
            text = json.dumps({key: value for key, value in out.get("data", out).items() if key != "image/png"})
            assert not MACHINE_PATH.search(text), text[:300]
