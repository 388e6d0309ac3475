"""Ridge regression against quantized inputs: the float weight that answers for their error (Aqer of ERQ)."""

from collections.abc import Sequence

import torch
from torch import Tensor

RIDGES = tuple(10.0 ** (step / 4) for step in range(-20, 9))  # 1e-5 .. 1e2


def ridge_update(
    weight: Tensor,
    gram: Tensor,
    cross: Tensor,
    *,
    ridge: float,
    bias_column: bool = False,
    penalize_bias: bool = True,
) -> Tensor:
    """The float weight whose outputs on quantized inputs come nearest to those on float inputs (arXiv 2407.06794).

    Minimizes ``|X W^T - Xq V^T|^2 + l |V - W|^2`` over ``V``, from two products of the calibration inputs instead of
    the inputs: ``V^T = (gram + l I)^-1 (cross + l I) W^T``. Equal inputs leave the weight as it is; an input that never
    fires keeps its column. Where ``gram + l I`` is not positive definite, l is raised tenfold (to 1e-6 at least), up
    to three times.

    Args:
        weight: ``W`` ``[N, K]`` float32, float16 or bfloat16.
        gram: ``Xq^T Xq`` of the quantized inputs, ``[K, K]``, or ``[B, K, K]`` for B Grams with N / B consecutive rows
            each; float32 or float64.
        cross: ``Xq^T X``, quantized inputs first, shaped as gram.
        ridge: ``l`` relative to the mean of gram's diagonal; see :func:`ridge_choose`. The released code's
            ``coe`` is an absolute ``l = coe / 10``.
        bias_column: the last column of weight is the bias, the last input is one; it counts not in the mean.
        penalize_bias: the ridge holds the bias back too, as in the released code.

    Returns:
        float32 ``[N, K]``, the same for any number of threads. Computed in float64, but float32 Grams with a ridge of
        0.01 or more in float32: there their own rounding moves the result as much.

    Raises:
        ValueError: wrong shape, device or option, a NaN or Inf, or a gram that is no Gram. TypeError: wrong dtype.
    """
    return torch.ops.torchquant.ridge_update(
        weight, gram, cross, ridge=ridge, bias_column=bias_column, penalize_bias=penalize_bias
    )


def ridge_choose(
    weight: Tensor,
    gram: Tensor,
    cross: Tensor,
    heldout_gram: Tensor,
    heldout_cross: Tensor,
    *,
    ridges: Sequence[float] = RIDGES,
    bias_column: bool = False,
    penalize_bias: bool = True,
) -> tuple[float, Tensor]:
    """The ridge whose update does best on inputs it has not seen; all ridges from one eigendecomposition of gram.

    Split the calibration inputs in two, choose here, then update with the sums of both halves' products.

    Args:
        weight, gram, cross: as for :func:`ridge_update`, from the inputs that the update is fitted to.
        heldout_gram, heldout_cross: the same products of the other inputs.
        ridges: positive candidates.
        bias_column, penalize_bias: as for :func:`ridge_update`.

    Returns:
        The best ridge, and float64 ``[len(ridges)]``: what the update with each ridge adds to the squared output error
        on the held-out inputs. Where none is negative, the weight is better left as it is.

    Raises:
        ValueError: wrong shape, device or option, or a NaN or Inf. TypeError: wrong dtype.
    """
    errors = torch.ops.torchquant.ridge_errors(
        weight,
        gram,
        cross,
        heldout_gram,
        heldout_cross,
        ridges=list(ridges),
        bias_column=bias_column,
        penalize_bias=penalize_bias,
    )
    return float(ridges[int(errors.argmin())]), errors


@torch.library.register_fake("torchquant::ridge_update")
def _(weight, gram, cross, **options):  # type: ignore[no-untyped-def]
    return weight.new_empty(weight.shape, dtype=torch.float32)


@torch.library.register_fake("torchquant::ridge_errors")
def _(weight, gram, cross, heldout_gram, heldout_cross, *, ridges, **options):  # type: ignore[no-untyped-def]
    return weight.new_empty(len(ridges), dtype=torch.float64)
