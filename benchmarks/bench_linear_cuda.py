"""A packed low-bit linear layer on a GPU against the BLAS and the low-bit products that can be installed beside it.

Shapes: M tokens, K inputs, N outputs; y = x W^T without bias. A run is a graph of calls, each with a copy of the weight
of its own, as many as exceed the L2 cache: weights come from memory, as layer after layer of a model does.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import linear_peers, race
from .bench_linear import GemmShape, Variant, make_inputs, prepare, relative_error, rounding_error, variants_of
from .harness import Result, Run, check
from .layers import make_weight
from .linear_peers import Unavailable
from .race import Outcome, Race, Runner

SHAPES: tuple[GemmShape, ...] = (
    *((tokens, 8192, 28672) for tokens in (1, 16, 64, 256)),  # a large language model
    *((tokens, 4096, 4096) for tokens in (1, 16)),  # a small one
    (1576, 768, 3072),  # eight pictures in DeiT-B
)
VARIANTS = (
    Variant(2, 128, input_bits=16), Variant(3, 128, input_bits=16), Variant(4, 128, input_bits=16, goals=True),
    Variant(8, input_bits=16), Variant(4, input_bits=16), Variant(4, 128, input_bits=16, zero_points=True),
    Variant(4, levels="tensor", input_bits=16), Variant(4, levels="row", input_bits=16), Variant(4), Variant(4, 128),
)  # fmt: skip
GOALS = {1: 3.0, 16: 3.0, 64: 2.0}  # by M, wanted of 4 bits in groups of 128 against the BLAS's float16
LARGEST_COPIES, EVICTED = 32, 2  # weights of all copies: so many times the L2 cache
COPIED = 1 << 30  # bytes, read and written
EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def now() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


# --- runs ---


@dataclass(frozen=True)
class Calls:
    run: Run
    count: int  # of calls that a run makes
    output: Tensor  # of the first


def in_graph(first: Run, another: Callable[[], Run], weight_bytes: float) -> Calls:
    """The first call and others like it, captured."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = max(1, min(LARGEST_COPIES, math.ceil(EVICTED * cache / weight_bytes)))
    calls = [first, *(another() for _ in range(count - 1))]
    for call in calls:
        call()  # what allocates or tunes itself does so now
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs: list[Any] = [call() for call in calls]
    graph.replay()
    return Calls(partial(replay, graph, calls), count, outputs[0])


def replay(graph: torch.cuda.CUDAGraph, _: Sequence[Run]) -> None:
    """The calls keep the weights alive that the graph reads."""
    graph.replay()


# --- ours and peers ---


def our_calls(x: Tensor, weight: Tensor, variant: Variant) -> tuple[Calls, Tensor, int]:
    first, values, size = prepare(x, weight, variant)
    return in_graph(first, lambda: prepare(x, weight, variant)[0], size), values, size


def blas(x: Tensor, weight: Tensor) -> tuple[Calls, Tensor]:
    low = weight.to(x.dtype)
    make = lambda: (lambda w: lambda: F.linear(x, w))(low.clone())  # noqa: E731
    return in_graph(make(), make, 2.0 * weight.numel()), low.float()


def tinygemm(x: Tensor, weight: Tensor) -> tuple[Calls, Tensor]:
    group = linear_peers.divisor(weight.shape[1], linear_peers.INT4_GROUP)
    codes, scale, values = linear_peers.symmetric_blocks(weight, 4, group)
    grid = torch.stack([scale, torch.zeros_like(scale)], dim=-1).transpose(0, 1).contiguous().to(x.dtype)
    pairs = codes[:, ::2] << 4 | codes[:, 1::2]

    def make() -> Run:
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
        return lambda: torch.ops.aten._weight_int4pack_mm(x, packed, group, grid)

    return in_graph(make(), make, weight.numel() / 2), values


def gemlite(x: Tensor, weight: Tensor) -> tuple[Calls, Tensor]:
    try:
        from gemlite import DType, GemLiteLinear
    except ImportError as error:
        raise Unavailable(str(error)) from error
    rows, columns = weight.shape
    group = linear_peers.divisor(columns, linear_peers.INT4_GROUP)
    codes, scale, values = linear_peers.symmetric_blocks(weight, 4, group)
    kind = DType.FP16 if x.dtype == torch.float16 else DType.BF16

    def make() -> Run:
        layer = GemLiteLinear(4, group, columns, rows, input_dtype=kind, output_dtype=kind)
        layer.pack(codes, scale.to(x.dtype).reshape(-1, 1), torch.full_like(scale, 8).to(x.dtype).reshape(-1, 1))
        return lambda: layer(x)

    return in_graph(make(), make, weight.numel() / 2), values


def int8(x: Tensor, weight: Tensor) -> tuple[Calls, Tensor]:
    """torchao's dynamic int8: its kernels for the activations, then ``_int_mm``."""
    make = lambda: linear_peers.torchao_int8(x, weight.to(x.dtype))  # noqa: E731
    peer = make()
    return in_graph(peer.run, lambda: make().run, weight.numel()), peer.weight.float()


HALF, BFLOAT = torch.float16, torch.bfloat16
Make = Callable[[Tensor, Tensor], tuple[Calls, Tensor]]
# Name -> what it is compared as, the activations' dtype, and how it is made of (x [M, K], weight [N, K]).
PEERS: dict[str, tuple[str, torch.dtype, Make]] = {
    "cuBLAS float16": ("float16", HALF, blas),
    "cuBLAS bfloat16": ("bfloat16", BFLOAT, blas),
    "torch _weight_int4pack_mm, bfloat16, group 128": ("4 bit", BFLOAT, tinygemm),
    "gemlite 4 bit, float16, group 128": ("4 bit", HALF, gemlite),
    "torchao int8 dynamic": ("int8", HALF, int8),
}
FLOAT16 = "cuBLAS float16"


def allowed_error(dtype: torch.dtype, x: Tensor, input_bits: int) -> float:
    floats = 2 * EPSILON[dtype]
    return floats if input_bits == 16 else floats + rounding_error(x.float(), input_bits)


def checked(name: str, x: Tensor, output: Tensor, values: Tensor, allowed: float) -> None:
    error = relative_error(output, x, values)
    check(error <= allowed, f"linear-cuda: {name} is {error:.2g} off, roundings explain {allowed:.2g}")


def our_runner(x: Tensor, weight: Tensor, variant: Variant) -> Runner:
    calls, values, size = our_calls(x, weight, variant)
    checked(variant.name, x, calls.output, values, allowed_error(x.dtype, x, variant.input_bits))
    return Runner(variant.name, calls.run, "ours", bytes=size, calls=calls.count)


def peer_runner(x: Tensor, weight: Tensor, name: str) -> Runner:
    group, dtype, make = PEERS[name]
    low = x.to(dtype)
    try:
        calls, values = make(low, weight)
    except RuntimeError as error:  # of a product that does not take the shape or the GPU
        raise Unavailable(str(error).splitlines()[0]) from error
    bits = 7 if group == "int8" else 16
    checked(name, low, calls.output, values, allowed_error(dtype, low, bits))
    return Runner(name, calls.run, group, calls=calls.count)


def copy_runner() -> Runner:
    """Device memory: bytes read and written."""
    source = torch.empty(COPIED // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return Runner("copy in memory", lambda: target.copy_(source), "floor", float(COPIED), "GB/s")


@lru_cache(maxsize=1)
def weight_of(rows: int, columns: int) -> Tensor:
    return make_weight(rows, columns, device="cuda")


def races(shape: GemmShape) -> Iterator[Race]:
    x, weight = make_inputs(shape).cuda().half(), weight_of(shape[2], shape[1])
    amount = 2.0 * shape[0] * shape[1] * shape[2]
    runners = [our_runner(x, weight, variant) for variant in variants_of(shape[1], VARIANTS)]
    absent = {}
    for name in PEERS:
        try:
            runners.append(peer_runner(x, weight, name))
        except Unavailable as reason:
            absent[name] = str(reason)
    yield Race("linear-cuda", "x".join(map(str, shape)), [*runners, copy_runner()], 1, amount, clock=now, absent=absent)


# --- tables ---

HEADER = (
    "M x K x N", "ours", "us: best / median", "TFLOP/s", "to cuBLAS float16", "to the fastest 4 bit", "to torchao int8",
    "weight read, of the copy's rate",
)  # fmt: skip


def run(
    shapes: Sequence[GemmShape], rounds: int, threads: int | None, show: Callable[[str], None]
) -> tuple[list[Result], str]:
    """All results, and the tables as Markdown, none without a GPU. ``show`` gets every table line as it comes."""
    if not torch.cuda.is_available():
        show("linear-cuda: not run, torch sees no GPU")
        return [], ""
    outcomes: list[Outcome] = []
    show(race.table(HEADER, []).rstrip())
    for shape in shapes or SHAPES:
        for one in races(shape):
            outcomes.append(race.run_race(one, rounds))
            show("\n".join(race.row(cells) for cells in our_rows(outcomes[-1])))
    ours = race.table(HEADER, (cells for outcome in outcomes for cells in our_rows(outcome)))
    names = [*PEERS, "copy in memory"]
    peer_rows = ([name, *(peer_cell(outcome, name) for outcome in outcomes)] for name in names)
    header = ["peers, us (ratio to cuBLAS float16)", *(outcome.race.shape for outcome in outcomes)]
    peers = race.table(header, peer_rows) + race.absentees(outcomes)
    text = f"GPU: {torch.cuda.get_device_name()}, torch {torch.__version__}.\n\n{ours}\n{peers}"
    show(f"\n{peers}")
    return [result for outcome in outcomes for result in race.results(outcome)], text


def our_rows(outcome: Outcome) -> Iterator[list[str]]:
    copy = outcome.rate("copy in memory")
    goals = {variant.name: GOALS.get(int(outcome.race.shape.split("x")[0])) for variant in VARIANTS if variant.goals}
    for runner in outcome.runners("ours"):
        best, middle = outcome.best(runner.name), race.median(outcome.times[runner.name])
        wanted = {"float16": goals.get(runner.name), "4 bit": None, "int8": None}
        yield [
            outcome.race.shape, runner.name, f"{best * 1e6:.1f} / {middle * 1e6:.1f}",
            f"{outcome.race.amount / best / 1e12:.3g}",
            *(race.ratio_cell(outcome, runner.name, group, goal) for group, goal in wanted.items()),
            f"{runner.bytes / best / copy:.2f}",
        ]  # fmt: skip


def peer_cell(outcome: Outcome, name: str) -> str:
    if name in outcome.race.absent:
        return "-"
    if name not in PEERS:
        return f"{outcome.rate(name) / 1e9:.0f} GB/s"
    return f"{outcome.best(name) * 1e6:.1f} ({outcome.best(FLOAT16) / outcome.best(name):.2g})"
