"""The benchmarks run, check before they time, and write their table: on tiny layers, so that they cannot rot."""

import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_shaped_case_runs_and_is_written_between_the_markers(tmp_path: Path) -> None:
    from benchmarks.__main__ import main
    from benchmarks.report import BEGIN, END

    page, data = tmp_path / "page.md", tmp_path / "data.json"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    cases = ["gram", "comq", "greedy", "comq-default", "gptq", "magr", "prox", "erq", "histogram", "sulq", "subset"]
    assert main([*cases, "--shape", "40x24", "--rounds", "2", "--write", str(page), "--json", str(data)]) == 0

    text = page.read_text()
    assert text.startswith("before\n") and text.endswith(f"{END}\nafter\n") and "old" not in text
    results = json.loads(data.read_text())["results"]
    assert {result["shape"] for result in results} == {"(40, 24)", "(6304 tokens, 24)"}
    assert all(f"| {result['case']} |" in text for result in results)
    for result in results:
        assert result["rounds"] == 2 and result["peer_best"] > 0
        assert result["ratio_low"] <= result["ratio"] <= result["ratio_high"]


def test_a_wrong_result_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import bench_solvers
    from benchmarks.harness import CheckFailed

    def wrong(layer, order):  # type: ignore[no-untyped-def]
        codes, *rest = sweep_once(layer, order)
        codes[0, 5] = (codes[0, 5] + 1) % 16
        return codes, *rest

    sweep_once = bench_solvers.sweep_once
    monkeypatch.setattr(bench_solvers, "sweep_once", wrong)
    with pytest.raises(CheckFailed, match="codes are not those of the data-space algorithm"):
        bench_solvers.comq((40, 24))


def test_a_share_and_an_extra_are_charged_to_the_right_side() -> None:
    from benchmarks.harness import Contest, Peer, compare

    contest = Contest("case", "shape", None, [])  # type: ignore[arg-type]
    table = [{"ours": 2.0, "gram": 1.0, "svd": 4.0, "slow": 5.0}, {"ours": 1.0, "gram": 1.0, "svd": 0.0, "slow": 5.0}]
    result = compare(contest, Peer("slow", lambda: None, share=0.5, ours_plus="gram", plus="svd"), table)
    assert (result.ours_best, result.peer_best) == (2.0, 10.0)
    assert (result.ratio_low, result.ratio, result.ratio_high) == (14 / 3, (14 / 3 + 5) / 2, 5.0)


def test_an_unknown_case_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.__main__ import main

    with pytest.raises(SystemExit):
        main(["gramm"])
    assert "unknown case gramm: choose from gram, comq" in capsys.readouterr().err
