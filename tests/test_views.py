"""What the report draws of quantized activations: samples, values and levels, attention, sensitivity."""

import pytest
import torch
from torch import nn

from torchquant import quantize_, views
from torchquant.activations import Site
from torchquant.calibrate import Calibration
from torchquant.demo.digits_vit import DigitsViT
from torchquant.nn.quantizers import DynamicQuantizer, SubsetQuantizer, TableQuantizer, UniformQuantizer
from torchquant.quantizers.sulq import sulq_fit


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uniform(bits: int = 4, scale: float = 0.25) -> UniformQuantizer:
    return UniformQuantizer(bits, torch.tensor(scale), torch.tensor(2.0 ** (bits - 1)))


@pytest.mark.parametrize(
    ("batch", "sizes"),
    [
        (torch.zeros(6, 2), [2]),
        ({"a": torch.zeros(6, 2), "b": torch.zeros(6)}, [2, 2]),
        ((torch.zeros(6, 2), [torch.zeros(6)], "text"), [2, 2]),
        ((torch.zeros(6, 2), torch.zeros(5, 2)), [6, 5]),  # no common first dimension: taken whole
        ((torch.zeros(6, 2), torch.tensor(3.0)), [6, None]),
    ],
)
def test_first_samples_of_any_batch(batch, sizes):
    part = views.few(Calibration([batch, batch]), 2)
    assert [t.shape[0] if t.dim() else None for t in views.tensors_of(part.batches)] == sizes


def test_no_samples_from_what_can_be_run_only_as_a_whole():
    assert views.few(Calibration(lambda model: None), 2) is None
    assert views.few(Calibration(iter([torch.zeros(2)])), 2) is None
    assert views.few(Calibration([]), 2) is None


def test_levels_are_what_the_quantizer_gives():
    x, quantizer = 3 * normal(500, 4), uniform()
    drawn = views.bars(quantizer, x)
    assert sum(drawn["counts"]) == x.numel()
    assert quantizer(x).unique().tolist() == drawn["levels"]
    assert drawn["low"] < drawn["levels"][0] and drawn["levels"][-1] < drawn["high"] and not drawn["log2"]


@pytest.mark.parametrize("variant", ["zero_exact", "log2", "log_sqrt2"])
def test_powers_of_two_are_drawn_by_their_exponents(variant):
    x = (4 * normal(40, 32)).softmax(-1)
    x[0, 0] = 0.0
    eta, thresholds, exponents = sulq_fit(x, bits=3, variant=variant)
    quantizer = TableQuantizer(3, thresholds, exponents, eta)
    drawn = views.bars(quantizer, x)
    assert drawn["log2"] and sum(drawn["counts"]) == x.numel()
    values = torch.tensor(drawn["levels"]).exp2()
    given = quantizer(x).unique()
    assert all(float((values - value).abs().min()) < 1e-5 for value in given[given > 1e-5])


@pytest.mark.parametrize(
    "quantizer",
    [
        DynamicQuantizer(3, "token"),
        UniformQuantizer(3, torch.tensor([1.0, 2.0, 0.5, 4.0]), torch.tensor([3.0, 4.0, 2.0, 5.0])),
    ],
)
def test_ranges_of_their_own_are_drawn_in_codes(quantizer):
    x = normal(64, 4)
    values, levels, unit = views.placed(quantizer, x)
    assert levels.tolist() == list(range(8)) and "each with its own" in unit
    assert torch.equal(values.round().clamp(0, 7).to(torch.uint8), quantizer.codes(x))


def test_subsets_are_drawn_normalized():
    x, levels = normal(2, 3, 5, 5), torch.tensor([-1.0, -0.25, 0.0, 0.5])
    values, shown, _ = views.placed(SubsetQuantizer(2, levels), x)
    assert torch.equal(shown, levels) and values.shape == x.shape and float(values.abs().max()) <= 1
    values, shown, unit = views.placed(SubsetQuantizer(2, torch.stack([levels, levels / 2, levels / 4])), x)
    assert torch.equal(shown, levels) and values.shape == (2, 5, 5) and "first channel" in unit


def test_constant_values_have_bars_too():
    drawn = views.bars(uniform(), torch.zeros(5, 5))
    assert sum(drawn["counts"]) == 25


def test_head_that_changed_most_is_found():
    before = {"a": torch.rand(2, 3, 3), "b": torch.rand(2, 3, 3)}
    after = {name: value.clone() for name, value in before.items()}
    after["a"][0] += 0.01
    after["b"][1] *= 1.5
    found = views.most_changed(before, after)
    assert (found["name"], found["head"]) == ("b", 1) and found["change"] == pytest.approx(0.5)
    assert torch.allclose(torch.tensor(found["after"]), after["b"][1], atol=1e-4)
    assert views.most_changed({}, after) == {}


def test_sensitivity_is_the_change_of_the_output():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x = normal(16, 4)
    changed = nn.Linear(4, 8)
    quantizer = uniform(3)
    with torch.no_grad():
        found = views.sensitivity(
            model,
            Calibration([x]),
            {"0": (model[0], lambda: changed)},
            {"2": Site("2", "input", 3, model[2])},
            {"2": quantizer},
        )
        wanted = model(x)
        weights, inputs = model[2](changed(x).relu()), model[2](quantizer(model[:2](x)))
    for got, output in ((found["0"]["weights"], weights), (found["2"]["input"], inputs)):
        assert got == pytest.approx(float((output - wanted).norm() / wanted.norm()), rel=1e-5)


def test_nothing_is_measured_without_samples():
    assert views.measure(nn.Linear(2, 2), None, {}, {}, {}) == {}
    assert views.measure(nn.Linear(2, 2), Calibration(lambda model: None), {}, {}, {"": uniform()}) == {}


def test_a_model_that_takes_no_single_sample_is_quantized_without_figures(caplog):
    class Whole(nn.Module):
        def forward(self, x):
            assert len(x) == 9, "nine at a time"
            return x

    model = Whole()
    sites = {"": Site("", "input", 4, model)}
    assert views.measure(model, Calibration([torch.zeros(9, 2)]), {}, sites, {"": uniform()}) == {}
    assert "no figures of activations: AssertionError: nine at a time" in caplog.text


def test_quantize_fills_the_details():
    model = DigitsViT().eval()
    report = quantize_(model, "W4A4", [torch.rand(16, 8, 8)], method="rtn", progress=False)
    details = report.details
    assert set(details["activations"]) == {found.name for found in report.activations}
    assert list(details["sensitivity"])[:4] == [
        "embed",
        "blocks.0.attn.qkv",
        "blocks.0.attn.proj",
        "blocks.0.attn.product",
    ]
    assert set(details["sensitivity"]["blocks.1.attn.product"]) == {"query", "key", "value", "softmax"}
    assert all(0 < change < 1 for parts in details["sensitivity"].values() for change in parts.values())
    attention = details["attention"]
    assert attention["name"] in ("blocks.0.attn", "blocks.1.attn")
    assert torch.allclose(torch.tensor(attention["before"]).sum(1), torch.ones(16), atol=1e-2)
