"""ERQ: the regressions lower the errors, the switches do what they say, failures change nothing."""

import pytest
import torch
from recipes.small_vit import calibration, check_failure_changes_nothing, network, quantized_error

from torchquant.recipes.erq import Wqer, erq
from torchquant.recipes.repq_vit import repq_vit

NEVER_NORMED = ("blocks.0.attn.proj", "blocks.1.fc2")  # layers that no LayerNorm feeds


def layer_errors(scheme: str = "W3A3", **options) -> float:
    """Geometric mean of the layers' output errors, relative to rounding's."""
    return erq(network(), calibration(), scheme, progress=False, **options).mean_ratio()


def test_without_both_halves_it_is_the_baseline():
    assert quantized_error(erq, aqer=False, wqer=False) == pytest.approx(quantized_error(repq_vit))
    assert layer_errors(aqer=False, wqer=False) == pytest.approx(1)


def test_each_half_helps():
    both, aqer, wqer = layer_errors(), layer_errors(wqer=False), layer_errors(aqer=False)
    assert both < 0.95 * aqer and both < 0.95 * wqer and max(aqer, wqer) < 1


def test_layers_have_lower_errors_than_by_rounding():
    report = erq(network(), calibration(), "W3A3", progress=False)
    assert len(report.layers) == 10 and report.not_ok == 0
    assert {layer.method for layer in report.layers} == {"erq"}
    assert all(layer.error < layer.error_rtn for layer in report.layers)


def test_aqer_gives_new_biases_and_wqer_alone_keeps_them():
    model, both, weights = network(), network(), network()
    erq(both, calibration(), "W3A3", progress=False)
    report = erq(weights, calibration(), "W3A3", aqer=False, progress=False)
    assert {layer.method for layer in report.layers} == {"wqer"}
    for name in NEVER_NORMED:
        bias = model.get_submodule(name).bias
        assert torch.equal(weights.get_submodule(name).bias, bias)
        assert not torch.equal(both.get_submodule(name).bias, bias)


def test_an_endless_ridge_leaves_the_weights_alone():
    endless, without = network(), network()
    erq(endless, calibration(), "W3A3", ridge=1e9, wqer=False, progress=False)
    repq_vit(without, calibration(), "W3A3", progress=False)
    for name in NEVER_NORMED:
        ours, theirs = endless.get_submodule(name), without.get_submodule(name)
        assert torch.equal(ours.dequantized_weight(), theirs.dequantized_weight())
        assert not torch.equal(ours.bias, theirs.bias)  # what is left of Aqer


@pytest.mark.parametrize("wqer", [True, Wqer(refine="best"), Wqer(refine="none", solver="columnwise", shrink=None)])
def test_the_ridge_may_be_chosen_on_held_out_batches(wqer):
    assert layer_errors(ridge="auto", wqer=wqer) < 0.9


def test_one_batch_cannot_be_divided():
    with pytest.raises(ValueError, match=r"erq: ridge='auto' needs calibration data of at least two batches"):
        erq(network(), calibration(1), "W3A3", ridge="auto", progress=False)


def test_the_measured_softmax_quantizer_is_the_best_of_all():
    report = erq(network(), calibration(), "W3A3", softmax="measured", progress=False)
    errors = report.details["softmax"]
    chosen = {a.quantizer for a in report.activations if a.kind == "softmax"}
    assert set(errors) == {"log2", "log_sqrt2", "sulq", "uniform"} and chosen == {min(errors, key=errors.get)}


@pytest.mark.parametrize("where", ["add_solution", "reparameterize_layernorms", "solve_weights"])
def test_a_failure_changes_nothing(monkeypatch, where):
    check_failure_changes_nothing(erq, monkeypatch, f"torchquant.recipes.erq.{where}")
