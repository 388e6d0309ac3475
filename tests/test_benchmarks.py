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


def section(name: str, text: str) -> str:
    from benchmarks.report import SECTION

    first, last = (marker.format(name) for marker in SECTION)
    return f"{first}\n{text}\n{last}\n"


def test_every_shaped_case_runs_and_is_written_between_the_markers(tmp_path: Path) -> None:
    from benchmarks.__main__ import main

    page, data = tmp_path / "page.md", tmp_path / "data.json"
    page.write_text("before\n" + section("results", "old") + "between\n" + section("activations", "old") + "after\n")
    cases = [
        "gram",
        "comq",
        "greedy",
        "comq-default",
        "gptq",
        "magr",
        "prox",
        "erq",
        "dynamic",
        "histogram",
        "sulq",
        "subset",
    ]
    assert main([*cases, "--shape", "40x24", "--rounds", "2", "--write", str(page), "--json", str(data)]) == 0

    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("activations -->\nafter\n") and "old" not in text
    assert text.index("| gram |") < text.index("between\n") < text.index("| erq |")
    results = json.loads(data.read_text())["results"]
    assert {result["shape"] for result in results} == {"(40, 24)", "(6304 tokens, 24)"}
    assert all(f"| {result['case']} |" in text for result in results)
    for result in results:
        assert result["rounds"] == 2 and result["peer_best"] > 0
        assert result["ratio_low"] <= result["ratio"] <= result["ratio_high"]


def test_linear_writes_its_own_table_and_leaves_the_others(tmp_path: Path) -> None:
    from benchmarks.__main__ import main

    page, data = tmp_path / "page.md", tmp_path / "data.json"
    page.write_text(section("results", "operators") + section("linear", "stale"))
    options = ["--rounds", "2", "--write", str(page), "--json", str(data)]
    assert main(["linear", "--shape", "1x128x48", "--shape", "5x64x80", *options]) == 0

    text = page.read_text()
    assert section("results", "operators") in text and "stale" not in text and text.endswith("linear -->\n")
    results = json.loads(data.read_text())["results"]
    assert {result["shape"] for result in results} == {"1x128x48 cold", "1x128x48 hot", "5x64x80"}
    compared = {(result["case"], result["peer"]) for result in results}
    assert {("linear, W2A8", "torch float32"), ("linear, W4A16", "torch float32")} <= compared
    for result in results:
        assert result["peer_best"] > 0 and result["ratio_low"] <= result["ratio"] <= result["ratio_high"]


def test_linear_cuda_without_a_gpu_leaves_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from benchmarks.__main__ import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    page = tmp_path / "page.md"
    page.write_text(section("linear-cuda", "measured elsewhere"))
    assert main(["linear-cuda", "--write", str(page)]) == 0
    assert page.read_text() == section("linear-cuda", "measured elsewhere")
    assert "linear-cuda: not run, torch sees no GPU" in capsys.readouterr().out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_linear_cuda_checks_and_writes_its_table(tmp_path: Path) -> None:
    from benchmarks.__main__ import main

    page = tmp_path / "page.md"
    page.write_text(section("linear-cuda", "stale"))
    assert main(["linear-cuda", "--shape", "3x256x128", "--rounds", "2", "--write", str(page)]) == 0
    text = page.read_text()
    assert "stale" not in text and "| 3x256x128 | W4A16 g128 |" in text and "| cuBLAS float16 |" in text


def test_a_wrong_linear_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import bench_linear
    from benchmarks.harness import CheckFailed
    from torchquant import kernels

    product = kernels.quantized_linear
    monkeypatch.setattr(kernels, "quantized_linear", lambda *args, **options: 1.25 * product(*args, **options))
    with pytest.raises(CheckFailed, match=r"linear: W2A8 is 0.2\d off, rounded inputs explain"):
        next(bench_linear.races((3, 64, 48), 1))


def test_a_peer_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from benchmarks import bench_linear, race

    for package in ("onnxruntime", "torchao"):
        monkeypatch.setitem(sys.modules, package, None)
    one = next(bench_linear.races((3, 64, 48), 1))
    outcome = race.run_race(one, 1)
    assert "ONNX Runtime float32" in one.absent and "torchao int8 dynamic" in one.absent
    assert "Not run: ONNX Runtime float32: " in race.absentees([outcome])
    cells = dict((cells[0], cells[1]) for cells in bench_linear.peer_rows([outcome]))
    assert cells["ONNX Runtime float32"] == "-" and cells["torch float32"].endswith("(1)")


def test_convolutions_are_checked_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import bench_conv
    from benchmarks.bench_conv import Layer
    from benchmarks.harness import CheckFailed
    from torchquant import kernels

    layers = (Layer(6, 8, 12, channels_last=True), Layer(7, 8, 12, 3, 2), Layer(7, 8, 8, 5, groups=8))
    monkeypatch.setattr(bench_conv, "LAYERS", layers)
    results, text = bench_conv.run((), 1, 1, lambda line: None)
    assert {result.shape for result in results} == {layer.name for layer in layers}
    assert {"conv, W4A8, static", "conv, W8A8, codes", "conv, W4A16, dynamic"} <= {result.case for result in results}
    assert "torch float32" in {result.peer for result in results}
    assert "| depthwise 5x5, 7x7, 8 to 8 | W4A8, static |" in text

    convolution = kernels.quantized_conv2d
    monkeypatch.setattr(kernels, "quantized_conv2d", lambda *args, **options: 1.25 * convolution(*args, **options))
    with pytest.raises(CheckFailed, match=r"conv: W4A8, static is 0.25 off"):
        bench_conv.make_race(layers[0], 1)


def test_networks_are_checked_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import bench_networks

    monkeypatch.setattr(bench_networks, "NETWORKS", [lambda: bench_networks.deit_s(depth=1, dim=48)])
    monkeypatch.setattr(bench_networks, "BATCHES", [2])
    results, text = bench_networks.run((), 1, 1, lambda line: None)
    names = ("W4A8, static", "W4A8, static, TorchScript", "W4A8, dynamic", "W4A16")
    assert {result.case for result in results} == {f"networks, {name}" for name in names}
    assert "torch float32" in {result.peer for result in results}
    assert "| DeiT-S, random weights, batch 2 | 1 | torch float32 |" in text


def test_a_slow_peer_is_timed_in_some_rounds_only() -> None:
    import time

    from benchmarks.race import Race, Runner, against, run_race

    runners = [
        Runner("ours", lambda: None, "ours"),
        Runner("float", lambda: time.sleep(1e-3), "float32"),
        Runner("slow", lambda: time.sleep(0.12), "int8"),
    ]
    outcome = run_race(Race("case", "shape", runners, threads=2), 4)
    assert against(outcome, "ours", "float").rounds == 4
    assert against(outcome, "ours", "slow").rounds == 2


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
