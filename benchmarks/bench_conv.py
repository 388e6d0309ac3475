"""Packed low-bit convolutions with integer activations against those of PyTorch and ONNX Runtime: layers of
EfficientNet-Lite0 and ResNet-50, one picture.

Ours takes floats, whose integers it makes itself, or codes, and gives floats. The int8 of the peers takes codes and
gives codes, as inside a network of theirs, which leaves ours more to write.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchquant import dequantize, kernels, rtn_quantize
from torchquant.quantizers import uniform_quantize

from . import race
from .bench_linear import rounding_error
from .harness import Result, Run, check
from .layers import make_weight
from .linear_peers import FLOAT32, IR, OPSET, Unavailable, onnx_modules, quiet, session
from .race import Outcome, Race, Runner

GOAL = 1.3  # wanted of 8-bit activations on one thread, against float32
SUMMATION_ERROR = 1e-5  # relative, of sums in float32
NO_CHANNELS_LAST = "ONNX Runtime has convolutions of channels first only"


@dataclass(frozen=True)
class Layer:
    size: int  # of the input, height and width
    channels: int
    outputs: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    channels_last: bool = False

    @property
    def name(self) -> str:
        depthwise = "depthwise " if self.groups > 1 else ""
        stride = f" / {self.stride}" if self.stride > 1 else ""
        last = ", channels last" if self.channels_last else ""
        kernel, size = f"{self.kernel}x{self.kernel}", f"{self.size}x{self.size}"
        return f"{depthwise}{kernel}{stride}, {size}, {self.channels} to {self.outputs}{last}"

    @property
    def geometry(self) -> dict[str, Any]:
        return {"stride": (self.stride,) * 2, "padding": (self.kernel // 2,) * 2, "groups": self.groups}

    @property
    def out(self) -> int:
        return (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    @property
    def operations(self) -> float:
        return 2.0 * self.outputs * self.out**2 * self.channels // self.groups * self.kernel**2

    def laid_out(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)


def depthwise(size: int, channels: int, kernel: int, stride: int = 1) -> Layer:
    return Layer(size, channels, channels, kernel, stride, groups=channels)


POINTWISE = (Layer(56, 64, 256), Layer(14, 112, 672), Layer(28, 40, 240))
SPATIAL = (Layer(56, 64, 64, 3), Layer(28, 128, 128, 3), Layer(224, 3, 32, 3, 2))
DEPTHWISE = (depthwise(112, 32, 3), depthwise(56, 144, 3, 2), depthwise(28, 240, 5), depthwise(14, 672, 5))
LAST = tuple(replace(layer, channels_last=True) for layer in (POINTWISE[0], SPATIAL[0], *DEPTHWISE))
LAYERS: tuple[Layer, ...] = (*POINTWISE, *SPATIAL, *DEPTHWISE, *LAST)


@dataclass(frozen=True)
class Problem:
    layer: Layer
    x: Tensor
    weight: Tensor
    scale: Tensor  # of x's codes
    zero_point: Tensor

    @property
    def codes(self) -> Tensor:
        return self.layer.laid_out(uniform_quantize(self.x, self.scale, self.zero_point, bits=8))

    @property
    def values(self) -> Tensor:
        """That the codes stand for."""
        return (self.codes.float() - self.zero_point) * self.scale

    def exact(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x.double(), weight.double(), None, **self.layer.geometry)


def make_problem(layer: Layer) -> Problem:
    generator = torch.Generator().manual_seed(0)
    spread = torch.exp(0.5 * torch.randn(layer.channels, 1, 1, generator=generator))
    x = torch.randn(1, layer.channels, layer.size, layer.size, generator=generator) * spread
    weight = make_weight(layer.outputs, layer.channels // layer.groups * layer.kernel**2)
    scale = (x.max() - x.min()) / 255
    shape = (layer.outputs, layer.channels // layer.groups, layer.kernel, layer.kernel)
    return Problem(layer, layer.laid_out(x), weight.view(shape), scale, (-x.min() / scale).round())


# --- ours ---


@dataclass(frozen=True)
class Variant:
    bits: int
    input: str  # "static": floats with a given grid; "dynamic": with the sample's; "codes"; "codes to codes"
    input_bits: int = 8

    @property
    def name(self) -> str:
        return f"W{self.bits}A{self.input_bits}, {self.input}"


VARIANTS = (
    Variant(4, "static"), Variant(8, "static"), Variant(4, "dynamic"), Variant(8, "dynamic"),
    Variant(4, "codes"), Variant(8, "codes"), Variant(4, "codes to codes"), Variant(8, "codes to codes"),
    Variant(4, "dynamic", 16),
)  # fmt: skip


def our_runner(problem: Problem, variant: Variant) -> Runner:
    layer, x = problem.layer, problem.codes if variant.input.startswith("codes") else problem.x
    codes, weight_scale, zero = rtn_quantize(problem.weight.flatten(1), bits=variant.bits, grid="symmetric")
    values = dequantize(codes, weight_scale, zero).view(problem.weight.shape)
    own: dict[str, Any] = {"bits": variant.bits, "kernel_size": (layer.kernel,) * 2}
    packed, grid, _ = kernels.conv_prepack(codes, weight_scale, groups=layer.groups, **own)
    own |= {"in_channels": layer.channels, "out_channels": layer.outputs, "input_bits": variant.input_bits}
    if variant.input != "dynamic":
        own |= {"input_scale": problem.scale, "input_zero_point": problem.zero_point}
    if variant.input == "codes to codes":
        scale, zero_point = output_grid(problem)
        own |= {"output_scale": torch.tensor(scale), "output_zero_point": torch.tensor(float(zero_point))}

    def run() -> Tensor:
        return kernels.quantized_conv2d(x, packed, grid, **own, **layer.geometry)

    if variant.input == "codes to codes":
        wanted = problem.exact(problem.values, values)
        allowed = rounding_error((wanted - wanted.mean()).float().flatten(1), 7)  # of the outputs
        check_error(variant.name, (run().float() - zero_point) * scale, wanted, allowed)
        return Runner(variant.name, run, "ours")
    if variant.input == "dynamic":
        allowed, wanted = rounding_error(problem.x.flatten(1), variant.input_bits), problem.exact(problem.x, values)
    else:
        allowed, wanted = SUMMATION_ERROR, problem.exact(problem.values, values)
    check_error(variant.name, run(), wanted, allowed)
    return Runner(variant.name, run, "ours")


def check_error(name: str, y: Tensor, wanted: Tensor, allowed: float) -> None:
    error = float((y.double() - wanted).norm() / wanted.norm())
    check(error <= allowed, f"conv: {name} is {error:.2g} off, allowed are {allowed:.2g}")


# --- peers ---


@dataclass(frozen=True)
class ConvPeer:
    """``outputs()`` are the numbers that the last run's result stands for; ``int8``: those of codes, rounded."""

    run: Run
    outputs: Callable[[], Tensor]
    int8: bool = False


def torch_float32(problem: Problem) -> ConvPeer:
    weight = problem.layer.laid_out(problem.weight)

    def run() -> Tensor:
        return F.conv2d(problem.x, weight, None, **problem.layer.geometry)

    return ConvPeer(run, run)


def int8_weight(problem: Problem) -> tuple[Tensor, Tensor]:
    """Symmetric codes and the scale of each output."""
    scale = problem.weight.abs().amax((1, 2, 3)) / 127
    return (problem.weight / scale.view(-1, 1, 1, 1)).round().to(torch.int8), scale


def output_grid(problem: Problem) -> tuple[float, int]:
    y = F.conv2d(problem.x, problem.weight, None, **problem.layer.geometry)
    scale = float(y.max() - y.min()) / 255
    return scale, round(float(-y.min()) / scale)


def torch_int8(engine: str) -> Callable[[Problem], ConvPeer]:
    """What ``torch.ao.nn.quantized.Conv2d`` calls, by one engine."""

    def make(problem: Problem) -> ConvPeer:
        geometry, grid, before = problem.layer.geometry, output_grid(problem), torch.backends.quantized.engine
        scale, zero_point = float(problem.scale), int(problem.zero_point)
        with quiet():
            x = torch.quantize_per_tensor(problem.x, scale, zero_point, torch.quint8)
        zeros = torch.zeros(problem.layer.outputs, dtype=torch.int64)
        weight_scale = int8_weight(problem)[1].double()
        weight = torch.quantize_per_channel(problem.weight, weight_scale, zeros, 0, torch.qint8)
        try:
            torch.backends.quantized.engine = engine
            packed = torch.ops.quantized.conv2d_prepack(
                weight, None, geometry["stride"], geometry["padding"], (1, 1), geometry["groups"]
            )
            torch.ops.quantized.conv2d(x, packed, *grid)
        except (RuntimeError, AttributeError) as error:
            raise Unavailable(str(error).splitlines()[0]) from error
        finally:
            torch.backends.quantized.engine = before

        def run() -> Tensor:
            y: Tensor = torch.ops.quantized.conv2d(x, packed, *grid)
            return y

        return ConvPeer(run, lambda: run().dequantize(), int8=True)

    return make


def onnx_conv(problem: Problem, operator: str, x: Tensor, constants: dict[str, Tensor]) -> tuple[Run, Tensor]:
    """A call without copies, and where its outputs, of x's type, come."""
    if problem.layer.channels_last:
        raise Unavailable(NO_CHANNELS_LAST)
    onnx, _ = onnx_modules()
    helper, to_array = onnx.helper, onnx.numpy_helper.from_array
    layer, y = problem.layer, torch.zeros((1, problem.layer.outputs, *(problem.layer.out,) * 2), dtype=x.dtype)
    node = helper.make_node(
        operator, ["x", *constants], ["y"], strides=[layer.stride] * 2, pads=[layer.kernel // 2] * 4,
        group=layer.groups,
    )  # fmt: skip
    kind = helper.np_dtype_to_tensor_dtype(x.numpy().dtype)
    described = [helper.make_tensor_value_info(name, kind, list(t.shape)) for name, t in (("x", x), ("y", y))]
    initial = [to_array(value.numpy(), name) for name, value in constants.items()]
    graph = helper.make_graph([node], "conv", described[:1], described[1:], initial)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
    made = session(model.SerializeToString(), torch.get_num_threads())
    binding = made.io_binding()
    binding.bind_input("x", "cpu", 0, x.numpy().dtype, list(x.shape), x.data_ptr())
    binding.bind_output("y", "cpu", 0, x.numpy().dtype, list(y.shape), y.data_ptr())

    def run(x: Tensor = x) -> Tensor:  # keeps x alive, and y
        made.run_with_iobinding(binding)
        return y

    return run, y


def onnx_float32(problem: Problem) -> ConvPeer:
    run, y = onnx_conv(problem, "Conv", problem.x, {"w": problem.weight})
    return ConvPeer(run, lambda: y)


def onnx_int8(problem: Problem) -> ConvPeer:
    codes, weight_scale = int8_weight(problem)
    scale, zero_point = output_grid(problem)
    constants = {
        "x_scale": problem.scale, "x_zero": problem.zero_point.to(torch.uint8),
        "w": codes, "w_scale": weight_scale, "w_zero": torch.zeros(len(codes), dtype=torch.int8),
        "y_scale": torch.tensor(scale), "y_zero": torch.tensor(zero_point, dtype=torch.uint8),
    }  # fmt: skip
    run, y = onnx_conv(problem, "QLinearConv", problem.codes, constants)
    return ConvPeer(run, lambda: (y.float() - zero_point) * scale, int8=True)


# Name -> what it is compared as, and how it is made.
PEERS: dict[str, tuple[str, Callable[[Problem], ConvPeer]]] = {
    FLOAT32: ("float32", torch_float32),
    "torch int8 (x86)": ("int8", torch_int8("x86")),
    "torch int8 (onednn)": ("int8", torch_int8("onednn")),
    "ONNX Runtime float32": ("ONNX Runtime", onnx_float32),
    "ONNX Runtime QLinearConv, s8 per channel": ("int8", onnx_int8),
}


def peer_runner(problem: Problem, name: str) -> Runner:
    group, make = PEERS[name]
    peer = make(problem)
    peer.run()
    if peer.int8:
        codes, scale = int8_weight(problem)
        wanted = problem.exact(problem.values, codes * scale.view(-1, 1, 1, 1))
        allowed = rounding_error((wanted - wanted.mean()).float().flatten(1), 7)  # of the outputs
    else:
        wanted, allowed = problem.exact(problem.x, problem.weight), SUMMATION_ERROR
    check_error(name, peer.outputs(), wanted, allowed)
    return Runner(name, peer.run, group)


# --- races ---


def make_race(layer: Layer, threads: int) -> Race:
    problem, absent = make_problem(layer), {}
    runners = [our_runner(problem, variant) for variant in VARIANTS]
    for name in PEERS:
        try:
            runners.append(peer_runner(problem, name))
        except Unavailable as reason:
            absent[name] = str(reason)
    return Race("conv", layer.name, runners, threads, layer.operations, None, absent)


@torch.no_grad()
def run(
    shapes: Sequence[object], rounds: int, threads: int | None, show: Callable[[str], None]
) -> tuple[list[Result], str]:
    """All results, and the tables as Markdown; ``shapes`` do not apply. ``show`` gets every table line as it comes."""
    outcomes: list[Outcome] = []
    show(race.table(HEADER, []).rstrip())
    with race.threads(threads or 1):
        for layer in LAYERS:
            outcomes.append(race.run_race(make_race(layer, threads or 1), rounds))
            show("\n".join(race.row(cells) for cells in our_rows(outcomes[-1])))
    ours = race.table(HEADER, (cells for outcome in outcomes for cells in our_rows(outcome)))
    peers = f"{PEERS_ABOUT}\n\n{race.table(['layer', *PEERS], map(peer_row, outcomes))}{race.absentees(outcomes)}"
    show(f"\n{peers}")
    return [result for outcome in outcomes for result in race.results(outcome)], f"{ours}\n{peers}"


# --- tables ---

HEADER = (
    "kernel, input, channels", "ours", "ms: best / median", "GOP/s", "to torch float32", "to the fastest int8",
    "to ONNX Runtime float32",
)  # fmt: skip
PEERS_ABOUT = "The peers in the same rounds, ms at best (ratio to torch float32):"


def our_rows(outcome: Outcome) -> Iterator[list[str]]:
    wanted = {variant.name for variant in VARIANTS if variant.input_bits == 8 and outcome.race.threads == 1}
    for runner in outcome.runners("ours"):
        name = runner.name
        yield [
            outcome.race.shape, name, race.time_cell(outcome, name), f"{outcome.rate(name) / 1e9:.3g}",
            race.ratio_cell(outcome, name, "float32", GOAL if name in wanted else None),
            race.ratio_cell(outcome, name, "int8"), race.ratio_cell(outcome, name, "ONNX Runtime"),
        ]  # fmt: skip


def peer_row(outcome: Outcome) -> list[str]:
    return [outcome.race.shape, *(peer_cell(outcome, name) for name in PEERS)]


def peer_cell(outcome: Outcome, name: str) -> str:
    if not any(runner.name == name for runner in outcome.race.runners):
        return "-"
    return f"{outcome.best(name) * 1e3:.4g} ({outcome.best(FLOAT32) / outcome.best(name):.2g})"
