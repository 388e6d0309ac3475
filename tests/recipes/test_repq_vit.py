"""The baseline: ranges by percentiles, LayerNorm reparameterization, powers of sqrt(2) after the softmax."""

import copy

import pytest
import torch
from recipes.small_vit import calibration, check_failure_changes_nothing, network, output_error, quantized_error, spread

from torchquant.activations import relative_error
from torchquant.config import Activations
from torchquant.recipes.repq_vit import choose_ranges, repq_vit
from torchquant.steps import observe, preparing, rewrite_attention


def test_every_layer_and_every_attention_operand_is_quantized():
    model = network()
    report = repq_vit(model, calibration(), "W4A4", progress=False)
    assert len(report.layers) == 10 and report.not_ok == 0
    kinds = {(a.kind, a.quantizer) for a in report.activations}
    assert kinds == {
        ("input", "uniform"), ("query", "uniform"), ("key", "uniform"), ("value", "uniform"), ("softmax", "log_sqrt2")
    }  # fmt: skip
    assert report["embed"].bits == report["head"].bits == 8 and report["blocks.0.attn.qkv"].bits == 4


def test_biases_stay():
    model, quantized = network(), network()
    repq_vit(quantized, calibration(), "W3A3", progress=False)
    for name in ("blocks.0.attn.proj", "blocks.1.fc2"):  # those that no LayerNorm feeds
        assert torch.equal(quantized.get_submodule(name).bias, model.get_submodule(name).bias)


def test_more_bits_are_better():
    errors = [quantized_error(repq_vit, scheme) for scheme in ("W3A3", "W4A4", "W8A8")]
    assert errors[0] > 1.5 * errors[1] and errors[1] > 3 * errors[2]


def test_each_range_has_the_best_percentile():
    activations = Activations(range="percentile", softmax="uniform")
    with preparing(network(), calibration(), "W3A3", activations=activations, method="rtn", progress=False) as run:
        rewrite_attention(run)
        observe(run)
        errors = []
        for percentiles in ((0.99,), (0.999,), (0.99, 0.999)):
            choose_ranges(run, percentiles)
            errors.append({n: relative_error(q, run.observed.histograms[n]) for n, q in run.quantizers.items()})
    assert all(errors[2][name] == min(errors[0][name], errors[1][name]) for name in errors[2])
    assert any(errors[0][name] < errors[1][name] for name in errors[2])
    assert any(errors[0][name] > errors[1][name] for name in errors[2])


def test_spread_channels_cost_nothing_with_reparameterization_and_much_without():
    model, wide = network(), spread(network())
    assert output_error(model, wide) < 1e-5
    even, uneven = quantized_error(repq_vit, model=model), quantized_error(repq_vit, model=wide)
    without = Activations(range="percentile", softmax="log_sqrt2", reparameterize=False)
    broken = quantized_error(repq_vit, model=wide, activations=without)
    assert uneven < 1.3 * even and broken > 2 * uneven


def test_a_failure_changes_nothing(monkeypatch):
    check_failure_changes_nothing(repq_vit, monkeypatch, "torchquant.recipes.repq_vit.solve_weights")


def test_the_same_seed_gives_the_same_codes():
    first, second = (network() for _ in range(2))
    for model in (first, second):
        repq_vit(model, copy.deepcopy(calibration()), "W3A3", progress=False)
    states = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in states)


def test_a_wrong_pattern_is_named():
    with pytest.raises(ValueError, match="no_such_layer"):
        repq_vit(network(), calibration(), "W4A4", ignore=["no_such_layer"], progress=False)
