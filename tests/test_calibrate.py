"""Forms of calibration data, what the hooks collect, and that nothing else changes."""

import logging
import random

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchquant.calibrate import Calibration, calibrating
from torchquant.collect import collect_grams, collect_pairs, longest_blocks, stages
from torchquant.nn import layout


class Attention(nn.Module):
    """q, k and v share their input; out does not."""

    def __init__(self, width=6):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        return self.out(torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2), -1) @ self.v(x))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, mask=None):
        return self.layer(x if mask is None else x * mask)


def batches(count=3, shape=(2, 5, 6), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def grams_of(model, data, *, max_tokens=None, seed=0):
    layers = {name: m for name, m in model.named_modules() if layout.is_quantizable(m)}
    with calibrating(model, seed):
        return collect_grams(model, layers, Calibration(data), max_tokens=max_tokens, seed=seed)


def gram_of(xs):
    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in xs])
    return rows.T @ rows


@pytest.mark.parametrize(
    "form",
    [
        lambda xs: xs,
        lambda xs: (x for x in xs),
        lambda xs: [(x,) for x in xs],
        lambda xs: [(x, torch.zeros(2)) for x in xs],
        lambda xs: [{"input": x} for x in xs],
        lambda xs: DataLoader(TensorDataset(torch.cat(xs), torch.zeros(6)), batch_size=2, shuffle=True),
        lambda xs: lambda model: [model(x) for x in xs],
        lambda xs: torch.cat(xs),
    ],
    ids=["list", "generator", "tuples", "pairs", "dicts", "loader", "forward_loop", "tensor"],
)
def test_every_form_gives_the_same_gram(form):
    xs = batches()
    stats, _ = grams_of(nn.Sequential(nn.Linear(6, 4)), form(xs))
    torch.testing.assert_close(stats["0"].gram, gram_of(xs), rtol=1e-5, atol=1e-5)
    assert stats["0"].tokens == 30


def test_optional_arguments_are_filled_except_from_a_loader():
    x, mask = torch.ones(2, 4), torch.zeros(2, 4)
    listed, _ = grams_of(TwoInputs(), [(x, mask)])
    loaded, _ = grams_of(TwoInputs(), DataLoader(TensorDataset(x, mask), batch_size=2))
    assert listed["layer"].gram.abs().sum() == 0
    torch.testing.assert_close(loaded["layer"].gram, x.T @ x)


def test_dictionaries_lose_the_keys_that_forward_does_not_take(caplog):
    x = torch.ones(2, 4)
    with caplog.at_level(logging.INFO, "torchquant"):
        stats, _ = grams_of(TwoInputs(), [{"x": x, "labels": x}])
    assert stats["layer"].tokens == 2
    assert "forward does not accept labels: left out" in caplog.text
    with pytest.raises(ValueError, match=r"none of the batch's keys \(pixels\) is an argument .* \(mask, x\)"):
        grams_of(TwoInputs(), [{"pixels": x}])


def test_what_is_no_data():
    with pytest.raises(ValueError, match="calib: expected a DataLoader, .* got int"):
        Calibration(3)


def test_layers_with_one_input_share_one_gram():
    model, xs = Attention(), batches()
    stats, seen = grams_of(model, xs)
    assert stats["q"].gram is stats["k"].gram is stats["v"].gram
    assert stats["out"].gram is not stats["q"].gram
    torch.testing.assert_close(stats["q"].gram, gram_of(xs), rtol=1e-5, atol=1e-5)
    assert seen.order == ["q", "k", "v", "out"]


def test_partners_that_part_are_counted_alone():
    class Parting(Attention):
        def forward(self, x):
            return self.q(x) + self.k(x if x[0, 0, 0] > 0 else x * 2)

    xs = [*batches(1), -batches(1)[0]]
    xs.sort(key=lambda x: -x[0, 0, 0].item())
    stats, _ = grams_of(Parting(), xs)
    torch.testing.assert_close(stats["q"].gram, gram_of(xs), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats["k"].gram, gram_of([xs[0], 2 * xs[1]]), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="pass a list or a DataLoader instead of an iterator"):
        grams_of(Parting(), iter(xs))


def test_memory_of_a_freed_input_is_not_taken_for_the_same_input():
    class Chain(nn.Module):
        """Inputs of equal shape, each freed before the next is made: the allocator reuses their addresses."""

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            self.a(x + 1)
            return self.b(x + 2)

    model, x = Chain(), torch.randn(8, 64)
    stats, _ = grams_of(model, [x])
    torch.testing.assert_close(stats["a"].gram, gram_of([x + 1]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stats["b"].gram, gram_of([x + 2]), rtol=1e-4, atol=1e-4)


def test_a_layer_in_two_places_sees_both_inputs():
    layer = nn.Linear(6, 6)
    model, xs = nn.Sequential(layer, nn.Tanh(), layer), batches(1)
    with torch.no_grad():
        second = torch.tanh(layer(xs[0]))
    stats, _ = grams_of(model, xs)
    torch.testing.assert_close(stats["0"].gram, gram_of([xs[0], second]), rtol=1e-5, atol=1e-5)
    assert stats["0"].tokens == 20


def test_max_tokens_bounds_every_layer_and_repeats():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    one, _ = grams_of(model, batches(), max_tokens=7)
    two, _ = grams_of(model, batches(), max_tokens=7)
    other, _ = grams_of(model, batches(), max_tokens=7, seed=1)
    assert one["0"].tokens == one["1"].tokens == 7
    assert torch.equal(one["1"].gram, two["1"].gram)
    assert not torch.equal(one["1"].gram, other["1"].gram)
    pictures, _ = grams_of(nn.Sequential(nn.Conv2d(3, 4, 3)), [torch.randn(8, 3, 5, 5)], max_tokens=30)
    assert pictures["0"].tokens == 27  # three pictures of nine positions


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_inputs_name_the_layer(bad):
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), batches(1)[0]
    with torch.no_grad():
        model[0].bias[2] = bad
    with pytest.raises(ValueError, match="calibration: the input of layer '1' holds NaN or Inf"):
        grams_of(model, [x])


def test_overflow_names_the_layer():
    with pytest.raises(ValueError, match="the squared input of layer '0' overflows float32"):
        grams_of(nn.Sequential(nn.Linear(6, 6)), [torch.full((2, 6), 1e30)])


def test_mode_random_state_and_hooks_are_put_back():
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(), nn.BatchNorm1d(5), nn.Linear(6, 2))
    model[1].eval()
    flags = [m.training for m in model.modules()]
    before, python = torch.get_rng_state(), random.getstate()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    loader = DataLoader(TensorDataset(torch.cat(batches())), batch_size=2, shuffle=True)
    grams_of(model, loader)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


def test_inference_mode_loop():
    def loop(model):
        with torch.inference_mode():
            model(torch.ones(2, 6))

    stats, _ = grams_of(Attention(), loop)
    assert stats["q"].tokens == 2


def test_pairs_of_float_and_quantized_inputs():
    model, xs = nn.Sequential(nn.Linear(6, 6), nn.Conv1d(5, 4, 3, padding=1)), batches()
    halved = nn.Linear(6, 6)
    with torch.no_grad():
        halved.weight.copy_(model[0].weight / 2)
        halved.bias.copy_(model[0].bias / 2)
        float_rows = [layout.unfold(model[1], model[0](x)) for x in xs]
        out = torch.cat([model[1](model[0](x)) - model[1].bias[:, None] for x in xs])
    with calibrating(model, 0):
        data = Calibration(xs)
        stats = collect_pairs(model, {"1": model[1]}, {model[0]: halved}, data, max_tokens=None, seed=0)["1"]
    rows = torch.cat(float_rows)
    torch.testing.assert_close(stats.gram, rows.T @ rows / 4, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stats.cross, rows.T @ rows / 2, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stats.energy.float(), out.square().sum((0, 2)), rtol=1e-4, atol=1e-4)
    assert model[0] is not halved


def test_stages_are_blocks_in_the_order_of_execution():
    model = nn.ModuleDict(
        {
            "blocks": nn.ModuleList(Attention() for _ in range(3)),
            "stem": nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)),
            "head": nn.Linear(6, 2),
        }
    )
    order = ["stem.0", "stem.1", "blocks.0.q", "blocks.0.out", "blocks.1.q", "head"]
    assert longest_blocks(model, order) == ["blocks.0", "blocks.1"]
    found = stages(model, order)
    assert found == [["stem.0"], ["stem.1"], ["blocks.0.q", "blocks.0.out"], ["blocks.1.q"], ["head"]]
