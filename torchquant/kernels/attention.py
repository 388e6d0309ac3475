"""Attention whose quantized probabilities never lie in memory."""

import torch
from torch import Tensor


def quantized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    thresholds: Tensor | None = None,
    exponents: Tensor | None = None,
    eta: Tensor | None = None,
    softmax_scale: Tensor | None = None,
    softmax_zero_point: Tensor | None = None,
    softmax_bits: int = 8,
    scale: float | None = None,
    is_causal: bool = False,
    query_scale: Tensor | None = None,
    query_zero_point: Tensor | None = None,
    query_bits: int = 8,
    key_scale: Tensor | None = None,
    key_zero_point: Tensor | None = None,
    key_bits: int = 8,
    value_scale: Tensor | None = None,
    value_zero_point: Tensor | None = None,
    value_bits: int = 8,
    output_scale: Tensor | None = None,
    output_zero_point: Tensor | None = None,
    output_bits: int = 8,
) -> Tensor:
    """``quantize(softmax(q k^T scale + mask)) v``, some rows at a time: no tensor of L x S elements.

    A probability p becomes ``2**exponents[code] - eta`` with the code that :func:`sulq_quantize` has for p, or
    ``(code - zero_point) * scale`` with that of :func:`uniform_quantize`, or stays. The same bits on every CPU tier and
    with any number of threads. CPU only, no gradient.

    Args:
        q: float32, float16 or bfloat16 ``[..., L, D]``; work is in float32. Or uint8, as k and v then: the codes that
            :func:`uniform_quantize` gives on the three grids below.
        k, v: of q's dtype, ``[..., S, D]`` and ``[..., S, Dv]``; leading dimensions broadcast.
        mask: broadcastable to ``[..., L, S]``: bool, True where a key takes part, or floating, added. A row without any
            key has probability 0 everywhere.
        thresholds, exponents, eta: a table as from :func:`sulq_fit`, float32.
        softmax_scale, softmax_zero_point, softmax_bits: a uniform grid, float32 of one value each.
        scale: of the scores; default ``D**-0.5``.
        is_causal: row i takes part with keys 0..i; instead of a mask.
        query_scale, query_zero_point, query_bits, key_...: uniform grids of q and k, float32 of one value each; both or
            none. Of codes also one for each row, ``[..., L, 1]`` and ``[..., S, 1]`` as :func:`dynamic_quantize` gives.
        value_scale, value_zero_point, value_bits: that of v. With a grid for each row the product with v is in floats.
        output_scale, output_zero_point, output_bits: one for the output, which is then uint8 codes.

    Returns:
        ``[..., L, Dv]`` in q's dtype (float32 for codes). Probabilities are exact to a few ulp, and 0 where they are
        under 2**-124 of the row's largest. Where a score is NaN, its row gets NaN (with a table: code 0, as NaN in
        :func:`sulq_quantize`).

    Raises:
        ValueError: shapes that do not fit, a mask with is_causal, falling thresholds, half a quantizer or two of them,
            or a NaN or Inf in what has a grid.
        TypeError: wrong dtype. NotImplementedError: not on the CPU.
    """
    return torch.ops.torchquant.quantized_attention(
        q,
        k,
        v,
        mask,
        thresholds=thresholds,
        exponents=exponents,
        eta=eta,
        softmax_scale=softmax_scale,
        softmax_zero_point=softmax_zero_point,
        softmax_bits=softmax_bits,
        scale=scale,
        is_causal=is_causal,
        query_scale=query_scale,
        query_zero_point=query_zero_point,
        query_bits=query_bits,
        key_scale=key_scale,
        key_zero_point=key_zero_point,
        key_bits=key_bits,
        value_scale=value_scale,
        value_zero_point=value_zero_point,
        value_bits=value_bits,
        output_scale=output_scale,
        output_zero_point=output_zero_point,
        output_bits=output_bits,
    )


@torch.library.register_fake("torchquant::quantized_attention")
def _(q, k, v, mask=None, **options):  # type: ignore[no-untyped-def]
    leading = [x.shape[:-2] for x in (q, k, v, mask) if x is not None]
    dtype = torch.float32 if q.dtype == torch.uint8 else q.dtype
    dtype = dtype if options.get("output_scale") is None else torch.uint8
    return q.new_empty((*torch.broadcast_shapes(*leading), q.shape[-2], v.shape[-1]), dtype=dtype)
