"""``torchquant demo --vit``, cut down, and what it promises."""

import json

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("font_caladea")

from torchquant.cli import main
from torchquant.demo import compare_vit, glyph_vit, glyphs, text_recogniser
from torchquant.demo.compare_vit import BASELINE, BEST, METHODS, SPREAD_METHODS, Result
from torchquant.report import Report


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    return main(["demo", "--vit", "--quick", "--bits", "3", "--out", str(folder)]), folder


def test_every_method_is_tried(demo):
    code, folder = demo
    found = json.loads((folder / "vit.json").read_text())
    assert code == 0
    assert [(r["scheme"], r["method"]) for r in found["results"]] == [("W3A3", name) for name in METHODS]
    assert [r["method"] for r in found["spread"]] == list(SPREAD_METHODS)
    assert all(r["figures"]["KL"] >= -1e-6 for r in found["results"])


def test_the_softmax_quantizer_with_the_least_error_is_taken(demo):
    results = json.loads((demo[1] / "vit.json").read_text())["results"]
    best = next(r for r in results if r["method"] == BEST)
    assert best["softmax"] == min(best["tried"], key=best["tried"].get)


def test_the_page_holds_the_tables(demo):
    page = (demo[1] / "vit.html").read_text()
    for text in ("I&amp;S-ViT, SULQ", "Spread channels", "Softmax quantizers", "ERQ at W3A3, layer by layer"):
        assert text in page, text


def result(scheme: str, method: str, accuracy: float, divergence: float = 0.1) -> Result:
    return Result(scheme, method, 0, {"accuracy %": accuracy, "KL": divergence}, 1.0, "log2", Report([]))


def test_promises_are_checked():
    results = [result("W3A3", BASELINE, 80), result("W4A4", BASELINE, 90, 0.05), result("W4A4", "ERQ", 90, 0.06)]
    results += [result("W3A3", "ERQ", 85.5), result("W3A3", "I&S-ViT", 84.5), result("W3A3", BEST, 87)]
    uneven = [result("W4A4", "min-max", 9), result("W4A4", BASELINE, 90)]
    found = compare_vit.promises(results, uneven)
    assert [passed for *_, passed in found] == [True, False, True, False, True]
    assert "+4.50" in str(compare_vit.check_table(found)) and "FAIL" in str(compare_vit.check_table(found))


def test_spread_channels_change_nothing_but_the_channels():
    model = glyph_vit.GlyphViT(dim=32, depth=2, heads=2).eval()
    wide = compare_vit.spread_channels(model, seed=0)
    x, _ = glyphs.pictures(4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(wide(x), model(x), atol=1e-4)
    gamma = wide.blocks[0].norm1.weight.abs()
    assert gamma.max() / gamma.median() > 5


def test_the_text_recogniser_is_quantized_as_a_convolutional_network():
    from torchquant import quantize_

    made = text_recogniser.load(steps=2, judged=250)
    with torch.no_grad():
        for scheme, most in (("W8A8", 0.01), ("W4A8", 0.2)):
            model = text_recogniser.TextRecogniser().eval()
            model.load_state_dict(made.model.state_dict())
            report = quantize_(model, scheme, made.calibration[:2], progress=False)
            assert [layer.type for layer in report.layers] == ["Conv2d"] * 3 + ["Linear"] * 2
            assert report.not_ok == 0 and made.judge(model)["KL"] < most
