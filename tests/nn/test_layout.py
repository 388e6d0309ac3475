"""The matrix that stands for a layer, its Gram and its unfolded input, against the layer's own output."""

import pytest
import torch
from nn.float_layers import LAYERS
from torch import nn

from torchquant.nn import layout


@pytest.fixture(params=list(LAYERS), name="case")
def case_fixture(request):
    module, shape = LAYERS[request.param]
    return module, torch.randn(shape, generator=torch.Generator().manual_seed(0))


def rows_of(module, out):
    """The layer's output without bias as [groups, positions, N / groups]."""
    groups = layout.groups_of(module)
    if isinstance(module, nn.Linear):
        return (out - module.bias).reshape(1, -1, out.shape[-1])
    out = (
        (out - module.bias.view(-1, *[1] * (out.dim() - 2))).movedim(1, -1).reshape(-1, groups, out.shape[1] // groups)
    )
    return out.transpose(0, 1)


def test_unfolded_input_times_matrix_is_the_layer(case):
    module, x = case
    groups = layout.groups_of(module)
    matrix = layout.to_matrix(module)
    columns = layout.unfold(module, x).reshape(groups, -1, matrix.shape[1])
    found = columns @ matrix.view(groups, -1, matrix.shape[1]).transpose(1, 2)
    with torch.no_grad():
        torch.testing.assert_close(found, rows_of(module, module(x)), rtol=1e-4, atol=1e-5)


def test_gram_is_that_of_the_unfolded_input(case):
    module, x = case
    gram = layout.new_gram(module, x.device)
    tokens = layout.accumulate_gram(gram, module, x)
    columns = layout.unfold(module, x)
    torch.testing.assert_close(gram, columns.transpose(-1, -2) @ columns, rtol=1e-4, atol=1e-4)
    assert tokens == columns.shape[-2]


def test_picture_without_batch():
    module = nn.Conv2d(3, 4, 3)
    x = torch.randn(3, 6, 6)
    alone, batch = layout.new_gram(module, x.device), layout.new_gram(module, x.device)
    assert layout.accumulate_gram(alone, module, x) == layout.accumulate_gram(batch, module, x[None]) == 16
    assert torch.equal(alone, batch)


def test_transposed_weight_round_trip():
    weight = torch.randn(6, 2, 3, 4)
    matrix = layout.transposed_to_matrix(weight, 3)
    assert torch.equal(layout.transposed_from_matrix(matrix, list(weight.shape), 3), weight)


def test_own_forward_is_known_or_not():
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    assert all(layout.is_known(module) for module, _ in LAYERS.values())
    assert not layout.is_known(Scaled(3, 3))
