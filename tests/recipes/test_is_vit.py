"""I&S-ViT: the stages of the training, what they may touch, and that the quantized model is the one trained."""

import copy

import pytest
import torch
from recipes.small_vit import calibration, check_failure_changes_nothing, network, quantized_error
from torch import nn

from torchquant.recipes.is_vit import is_vit
from torchquant.recipes.sos import Recorded, Training, joined, random_batches

SHORT = Training(rate=2e-3, iterations=30, batch=16)


@pytest.fixture(scope="module")
def trained():
    model = network()
    quantized = copy.deepcopy(model)
    report = is_vit(quantized, calibration(), "W3A3", sos=SHORT, progress=False)
    return model, quantized, report


def test_every_unit_is_trained_twice_and_no_loss_rises(trained):
    losses = trained[2].details["sos"]
    units = ["embed", "blocks.0", "blocks.1", "head"]
    assert list(losses["activations"]) == list(losses["weights"]) == units
    for stage in losses.values():
        assert all(last <= first for first, last in stage.values())
        assert all(stage[block][1] < 0.95 * stage[block][0] for block in units[1:3])


def test_report(trained):
    report = trained[2]
    assert {layer.method for layer in report.layers} == {"sos"} and report.not_ok == 0
    assert {a.quantizer for a in report.activations if a.kind == "softmax"} == {"sulq"}


def output_of(model: nn.Module, block: int) -> torch.Tensor:
    found = []
    handle = model.blocks[block].register_forward_hook(lambda m, a, output: found.append(output))
    with torch.no_grad():
        model(torch.cat(calibration()))
    handle.remove()
    return found[0]


def test_the_model_is_the_one_that_was_trained(trained):
    """The last unit's loss, measured again on the quantized model: grids, codes, biases and order of blocks agree."""
    model, quantized, report = trained
    for block in (0, 1):
        ours, float_ones = (output_of(each, block) for each in (quantized, model))
        loss = nn.functional.mse_loss(ours, float_ones).item()
        assert loss == pytest.approx(report.details["sos"]["weights"][f"blocks.{block}"][1], rel=1e-3)


def test_layer_norms_are_not_trained(trained):
    untrained = network()
    is_vit(untrained, calibration(), "W3A3", sos=False, progress=False)
    for name in ("blocks.0.norm1", "blocks.1.norm2"):
        for key in ("weight", "bias"):
            ours = getattr(trained[1].get_submodule(name), key)
            assert torch.equal(ours, getattr(untrained.get_submodule(name), key))


def test_training_helps():
    alone = quantized_error(is_vit, "W3A3", sos=False)
    assert quantized_error(is_vit, "W3A3", sos=SHORT) < 0.9 * alone


def test_parameters_that_others_hold_are_not_written():
    model = network()
    held = [(p, p.detach().clone()) for p in model.parameters()]
    is_vit(model, calibration(), "W4A4", sos=Training(1e-3, 3, 8), progress=False)
    assert all(torch.equal(p, value) for p, value in held)


def test_a_rate_that_spoils_everything_is_undone():
    model = network()
    report = is_vit(model, calibration(), "W4A4", sos=Training(1e3, 2, 8), progress=False)
    losses = report.details["sos"]["activations"]
    assert all(first == last for first, last in losses.values())


def test_groups_are_refused():
    with pytest.raises(ValueError, match=r"is_vit: sos quantizes whole rows, got groups in embed, blocks"):
        is_vit(network(), calibration(), "W4A4g8", progress=False)


@pytest.mark.parametrize("where", ["sos.add_trained", "is_vit.reparameterize_layernorms"])
def test_a_failure_changes_nothing(monkeypatch, where):
    how = Training(1e-3, 2, 8)
    check_failure_changes_nothing(is_vit, monkeypatch, f"torchquant.recipes.{where}", sos=how)


def test_samples_are_drawn_from_all_calls():
    calls = [Recorded((torch.full((4, 2), float(i)),), {}, torch.full((4, 3), float(i))) for i in range(3)]
    batches = random_batches(joined(calls), 6, torch.Generator().manual_seed(0))
    drawn = [next(batches) for _ in range(8)]
    assert all(len(set(call.args[0][:, 0].tolist()) | {0.0, 1.0, 2.0}) == 3 for call in drawn)
    assert all(torch.equal(call.args[0][:, 0], call.target[:, 0]) for call in drawn)
    assert len({value for call in drawn for value in call.args[0][:, 0].tolist()}) == 3


def test_calls_with_several_tensors_stay_whole():
    calls = [Recorded((torch.zeros(4, 2), torch.zeros(1)), {}, torch.zeros(4, 3)) for _ in range(3)]
    assert len(joined(calls)) == 3
    batch = next(random_batches(joined(calls), 2, torch.Generator().manual_seed(0)))
    assert batch.args[0].shape == (4, 2)
