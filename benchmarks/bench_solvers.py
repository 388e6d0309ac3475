"""The Gram and the coordinate solvers, each against peers and the floor; results are checked first."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from torchquant import comq_quantize, gptq_quantize, quantization_error, rtn_quantize
from torchquant.solvers.portfolio import portfolio_quantize
from torchquant.statistics import gram_accumulate_

from . import peers
from .bench_activations import ACTIVATIONS, TOKENS, dynamic, histogram
from .bench_erq import erq
from .bench_magr import magr, prox
from .bench_subset import CHANNELS, subset
from .bench_sulq import SOFTMAXES, sulq
from .harness import Contest, Floor, Peer, check, read_run
from .layers import LARGE, SHAPES, Layer, Shape, label, layer_of, make_weight, product_floor, some_rows

BITS = 4
SHRINK = (1.0, 0.9, 0.8, 0.65, 0.5)
SWEEPS = 3
SOME_ROWS, FEW_ROWS = 384, 96  # of a large layer, where a slow peer would need minutes
DATA_COORDINATES = 4  # of the data-space loop, whose cost per coordinate is constant; the whole would need minutes
VIT_SHAPES, LARGEST = ((1536, 384), (384, 1536)), (4096, 4096)  # those with figures to reach
CHECKED_ROWS = 16  # of the data-space algorithm in float64
DEIT_S = ((1152, 384), (384, 384), (1536, 384), (384, 1536))  # qkv, projection, fc1, fc2 of each of the 12 blocks
DEIT_S_BLOCKS = 12
AUTO_BITS = (2, 3, 4)


def gram_run(x: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        gram = torch.zeros(x.shape[1], x.shape[1])
        gram_accumulate_(gram, x)
        return gram

    return run


def gram(shape: Shape) -> Contest:
    x, columns = layer_of(shape).x, shape[1]
    wanted = layer_of(shape).gram
    error = float((gram_run(x)() - wanted).abs().max() / wanted.abs().max())
    check(error < 1e-5, f"gram: relative error {error}")
    return Contest(
        "gram",
        f"({x.shape[0]} tokens, {columns})",
        gram_run(x),
        [Peer("X.T @ X", lambda: x.T @ x, target=1.4)],
        product_floor((columns, columns), [("2TK²", 2.0 * x.shape[0] * columns**2)], inner=x.shape[0]),
    )


def tie_band(layer: Layer, scale: Tensor, rows: int) -> Tensor:  # [rows, K]
    """How far float32 sums of K products may move an unrounded code: a code may be the other one within it."""
    noise = 4 * 2.0**-24 * (layer.weight[:rows].double().abs() @ layer.gram.double().abs())
    return 1e-4 + noise / (layer.gram.diagonal().double() * scale[:rows].double())


def check_against_data_space(layer: Layer, result: Sequence[Tensor], order: Tensor) -> None:
    """Each code is the nearest level at its turn in the data-space algorithm (float64), outside the tie band."""
    rows = min(CHECKED_ROWS, layer.shape[0])
    codes, scale, zero = (part[:rows].double() for part in result[:3])
    grid = peers.Grid(scale[:, 0], zero[:, 0], 2**BITS - 1)
    _, position = peers.comq_data_space(
        layer.weight[:rows].double(), layer.x.double(), grid, order[:rows], layer.shape[1], forced=codes
    )
    distance = (codes - position.clamp(0, grid.top)).abs() - 0.5
    wrong = int((distance > tie_band(layer, scale, rows)).sum())
    check(wrong == 0, f"comq: {wrong} codes are not those of the data-space algorithm, outside the tie band")


def equal(codes: Tensor, others: Tensor, least: float, what: str) -> str:
    """Share of equal codes; float32 sums in another order may flip a tie, and a flip moves what follows in its row."""
    share = float((codes == others).float().mean())
    check(share >= least, f"{what}: only {share:.2%} of the codes are equal")
    return f"{share:.2%} of codes equal to the torch loop's"


def sweep_once(layer: Layer, order: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return comq_quantize(layer.weight, layer.gram, bits=BITS, sweeps=1, order=order, update_scale=False, shrink=[1.0])


def data_space_peers(layer: Layer, grid: peers.Grid, order: Tensor, target: float | None) -> list[Peer]:
    """Timed once; compared with our solver plus the Gram, and with our solver alone (widths share a Gram)."""
    coordinates = min(DATA_COORDINATES, layer.shape[1])
    share = coordinates / layer.shape[1]

    def loop() -> Tensor:
        return peers.comq_data_space(layer.weight, layer.x, grid, order, coordinates)[0]

    name = f"data-space loop ({coordinates} of {layer.shape[1]} coordinates)"
    with_gram = Peer(f"{name}; ours plus Gram", loop, share, target, ours_plus="gram")
    return [with_gram, Peer(f"{name}; Gram given", loop, share, timed_as=with_gram.name)]


def comq(shape: Shape) -> Contest:
    """One sweep in the shared order on a fixed scale."""
    layer, some = layer_of(shape), some_rows(shape, SOME_ROWS)
    grid, some_grid = peers.minmax_grid(layer.weight, BITS), peers.minmax_grid(some.weight, BITS)
    order, result = peers.shared_order(layer.weight, layer.gram), sweep_once(layer, "shared")
    check_against_data_space(layer, result, order)

    def loop(tuned: bool) -> Tensor:
        return peers.comq_shared(some.weight, some.gram, some_grid, tuned)

    share = some.shape[0] / shape[0]
    part = "" if share == 1 else f" ({some.shape[0]} of {shape[0]} rows)"
    operations = float(shape[0]) * shape[1] ** 2
    return Contest(
        "comq, shared, 1 sweep",
        label(shape, shape),
        lambda: sweep_once(layer, "shared"),
        [
            *data_space_peers(layer, grid, order, 1000.0 if shape in VIT_SHAPES else None),
            Peer(f"torch loop, addr_{part}", lambda: loop(False), share, 8.0 if shape in VIT_SHAPES else None),
            Peer(f"torch loop, addcmul_{part}", lambda: loop(True), share),
        ],
        product_floor(shape, [("2NK²", 2 * operations), ("NK², done", operations)], 0.6 if shape == LARGEST else None),
        equal(result[0][: some.shape[0]], loop(True), 0.97, "comq"),
        extra={"gram": gram_run(layer.x)},
    )


def greedy(shape: Shape) -> Contest:
    """One sweep, each row in its own order, on a fixed scale."""
    layer = some_rows(shape, SOME_ROWS)
    rows, columns = layer.shape
    coordinates = columns // 16 if columns >= LARGE else columns
    grid, result = peers.minmax_grid(layer.weight, BITS), sweep_once(layer, "greedy")
    order = peers.greedy_order(layer.weight, layer.gram)
    check_against_data_space(layer, result, order)

    def loop() -> Tensor:
        return peers.comq_greedy(layer.weight, layer.gram, grid, coordinates)

    whole = coordinates == columns
    part = "" if whole else f" ({coordinates} of {columns} coordinates)"
    read, amount = read_run(columns**2 * 4 / 2**20)
    return Contest(
        "comq, greedy, 1 sweep",
        label(layer.shape, shape),
        lambda: sweep_once(layer, "greedy"),
        [
            *data_space_peers(layer, grid, order, None),
            Peer(f"torch loop{part}", loop, coordinates / columns, 20.0 if shape in VIT_SHAPES else None),
        ],
        Floor(read, amount, "GB/s, read of as many bytes as H has", (("4NK² bytes", 4.0 * rows * columns**2),)),
        equal(result[0], loop(), 0.97, "comq, greedy") if whole else "",
        extra={"gram": gram_run(layer.x)},
    )


def comq_default(shape: Shape) -> Contest:
    """The defaults: five shrink factors, three sweeps and scale steps each."""
    layer = some_rows(shape, FEW_ROWS)

    def ours() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return comq_quantize(layer.weight, layer.gram, bits=BITS, sweeps=SWEEPS)

    def loop() -> Tensor:
        return peers.comq_search(layer.weight, layer.gram, BITS, SHRINK, SWEEPS)

    ratio = float(quantization_error(layer.weight, layer.gram, *ours()[:3]).sum() / loop().sum())
    check(ratio < 1.01, f"comq: {ratio} times the torch loop's objective")
    operations = 2.0 * layer.weight.numel() * shape[1] * len(SHRINK) * SWEEPS
    return Contest(
        "comq, defaults",
        label(layer.shape, shape),
        ours,
        [Peer("torch loop, addcmul_", loop)],
        product_floor(layer.shape, [("2NK² per sweep and factor", operations)]),
        f"objective {ratio:.4f} of the torch loop's",
    )


def gptq(shape: Shape) -> Contest:
    layer = layer_of(shape)
    grid = peers.minmax_grid(layer.weight, BITS)

    def ours() -> Tensor:
        return gptq_quantize(layer.weight, layer.gram, bits=BITS, shrink=[1.0])[0]

    def loop() -> Tensor:
        return peers.gptq(layer.weight, layer.gram, grid)

    return Contest(
        "gptq",
        label(shape, shape),
        ours,
        [Peer("torch column loop, blocks of 128", loop)],
        product_floor(shape, [("4K³/3 + NK²", 4 / 3 * shape[1] ** 3 + float(shape[0]) * shape[1] ** 2)]),
        equal(ours(), loop(), 0.97, "gptq"),
    )


def auto(bits: int) -> Contest:
    """The portfolio on the four layers of a DeiT-S block, whose twelve blocks are alike."""
    layers = [(make_weight(*shape), layer_of(shape).gram) for shape in DEIT_S]

    def block() -> None:
        for weight, gram in layers:
            portfolio_quantize(weight, gram, bits=bits)

    for weight, gram in layers:
        rounded = quantization_error(weight, gram, *rtn_quantize(weight, bits=bits))
        check((portfolio_quantize(weight, gram, bits=bits).error <= rounded).all(), "auto: worse than rounding")
    return Contest(
        f"auto, {bits} bits, the 48 layers of DeiT-S",
        "qkv, proj, fc1, fc2",
        block,
        [],
        note=f"{len(DEIT_S)} layers measured, times {DEIT_S_BLOCKS}",
        threads=2,
        times=DEIT_S_BLOCKS,
    )


# Name of a case -> from a shape, or for auto from a width; some make several contests on the same data.
CASES: dict[str, Callable[[Shape], Contest | Iterator[Contest]] | Callable[[int], Contest]] = {
    "gram": gram,
    "comq": comq,
    "greedy": greedy,
    "comq-default": comq_default,
    "gptq": gptq,
    "magr": magr,
    "prox": prox,
    "erq": erq,
    "dynamic": dynamic,
    "histogram": histogram,
    "sulq": sulq,
    "subset": subset,
    "auto": auto,
}
# Of cases that have no layer.
OWN_SHAPES: dict[str, Sequence[Shape]] = {
    "dynamic": TOKENS,
    "histogram": ACTIVATIONS,
    "sulq": SOFTMAXES,
    "subset": CHANNELS,
}


def contests(case: str, shapes: Sequence[Shape] | None) -> Iterator[Contest]:
    """Made one after another, so that only one holds its buffers. Without shapes, those of the table."""
    for argument in AUTO_BITS if case == "auto" else shapes or OWN_SHAPES.get(case, SHAPES):
        made = CASES[case](argument)  # type: ignore[arg-type]
        yield from [made] if isinstance(made, Contest) else made
