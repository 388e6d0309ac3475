"""The portfolio: per row the best of its members, by an objective that is the layer's output error."""

import pytest
import torch

from torchquant.solvers import comq_quantize, dequantize, gptq_quantize, quantization_error, rtn_quantize
from torchquant.solvers.portfolio import Candidate, portfolio_quantize, row_objective, times_gram


def problem(rows=12, columns=20, groups=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (max(groups, 1), 64, columns)
    x = torch.randn(shape, generator=generator) * torch.logspace(0, -1, columns)
    gram = x.transpose(1, 2) @ x
    return torch.randn(rows, columns, generator=generator), gram if groups else gram[0], x


@pytest.mark.parametrize("groups", [0, 3])
def test_objective_with_quantized_inputs_is_the_output_error(groups):
    weight, gram, x = problem(groups=groups)
    noisy = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    blocks = max(groups, 1)
    gram = (noisy.transpose(1, 2) @ noisy).view_as(gram)
    linear = times_gram(weight, (x.transpose(1, 2) @ noisy).view_as(gram))
    found = Candidate("rtn", *rtn_quantize(weight, bits=2, group_size=8))
    values = dequantize(found.codes, found.scale, found.zero_point, group_size=8)
    one, two = (m.double().view(blocks, -1, 20).transpose(1, 2) for m in (weight, values))
    wanted = (x.double() @ one - noisy.double() @ two).square().sum(1).flatten()
    constant = (x.double() @ one - noisy.double() @ one).square().sum(1).flatten()
    got = row_objective(weight, gram, linear, found, 8).double() + constant
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("effort", ["fast", "standard", "high"])
@pytest.mark.parametrize("grid", ["asymmetric", "symmetric"])
def test_every_row_is_at_most_its_best_member(bits, effort, grid):
    weight, gram, _ = problem()
    same = {"bits": bits, "grid": grid, "group_size": 8}
    best = portfolio_quantize(weight, gram, effort=effort, **same)
    start = gptq_quantize(weight, gram, **same)[:3]
    members = [rtn_quantize(weight, **same), start]
    swept = comq_quantize(weight, gram, codes=start[0], scale=start[1], zero_point=start[2], **same)
    members += [swept[:3]] if effort != "high" else []
    members += [comq_quantize(weight, gram, **same)[:3]] if effort == "standard" else []
    error = quantization_error(weight, gram, best.codes, best.scale, best.zero_point, group_size=8)
    torch.testing.assert_close(error, best.error, rtol=1e-4, atol=1e-5)
    for member in members:
        other = quantization_error(weight, gram, *member, group_size=8)
        assert (error <= other * (1 + 1e-4) + 1e-5).all()
    assert sum(best.winners().values()) == 12
    if grid == "symmetric":
        assert (best.zero_point == 2 ** (bits - 1)).all()


def test_groups_are_problems_of_their_own():
    weight, gram, _ = problem(groups=3)
    best = portfolio_quantize(weight, gram, bits=2)
    for b in range(3):
        rows = slice(4 * b, 4 * b + 4)
        alone = portfolio_quantize(weight[rows], gram[b], bits=2)
        torch.testing.assert_close(best.error[rows], alone.error, rtol=1e-3, atol=1e-5)


def test_a_tie_goes_to_the_simplest_member():
    codes = torch.randint(0, 16, (4, 20), generator=torch.Generator().manual_seed(0)).float()
    codes[:, 0], codes[:, 1] = 0, 15
    best = portfolio_quantize(codes - 7, problem()[1], bits=4)
    assert best.winners() == {"rtn": 4}
    assert float(best.error.max()) == 0
