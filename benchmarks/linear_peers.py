"""The peers of a quantized linear layer: what can be installed and called from Python, on as many threads as torch has.
A peer that is not there says why.

Shapes: M tokens, K inputs, N outputs; y = x W^T without bias.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .harness import Run

OPSET, IR = 21, 10
INT4_GROUP = 128


class Unavailable(Exception):
    """Why a peer cannot run here."""


@dataclass(frozen=True)
class LinearPeer:
    """``run()`` gives [M, N]; ``weight`` [N, K] is what it multiplies by, as numbers."""

    run: Run
    weight: Tensor


def number_of_threads() -> int:
    return torch.get_num_threads()


@contextlib.contextmanager
def quiet() -> Any:
    """Without the notices that libraries print when they are imported or converted to."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


# --- torch ---


def torch_float32(x: Tensor, weight: Tensor) -> LinearPeer:
    return LinearPeer(lambda: F.linear(x, weight), weight)


def torch_bfloat16(x: Tensor, weight: Tensor) -> LinearPeer:
    low, w = x.bfloat16(), weight.bfloat16()
    return LinearPeer(lambda: F.linear(low, w), w.float())


def torch_dynamic(engine: str) -> Callable[[Tensor, Tensor], LinearPeer]:
    """``torch.ao.quantization.quantize_dynamic`` of nn.Linear, by one engine."""

    def make(x: Tensor, weight: Tensor) -> LinearPeer:
        before = torch.backends.quantized.engine
        try:
            torch.backends.quantized.engine = engine
            layer = dynamic_int8(nn.Sequential(linear_of(weight)))[0]
        except (RuntimeError, AttributeError) as error:
            raise Unavailable(str(error).splitlines()[0]) from error
        finally:
            torch.backends.quantized.engine = before
        return LinearPeer(lambda: layer(x), layer.weight().dequantize())

    return make


def linear_of(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def dynamic_int8(model: nn.Module) -> Any:
    with quiet():
        from torch.ao.quantization import default_dynamic_qconfig, per_channel_dynamic_qconfig, quantize_dynamic

        per_channel = per_channel_dynamic_qconfig
        wanted = default_dynamic_qconfig if torch.backends.quantized.engine == "qnnpack" else per_channel
        return quantize_dynamic(model, {nn.Linear: wanted}, dtype=torch.qint8)


def symmetric_blocks(weight: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K] with the zero point in their middle, scales [N, K / block], and the values."""
    half = 2 ** (bits - 1)
    blocks = weight.unflatten(1, (-1, block))
    scale = blocks.abs().amax(2).clamp_min(1e-12) / (half - 0.5)
    codes = (blocks / scale[..., None]).round().clamp(-half, half - 1)
    values = codes * scale[..., None]
    return (codes.flatten(1) + half).to(torch.uint8), scale, values.flatten(1)


def torch_int4pack(x: Tensor, weight: Tensor) -> LinearPeer:
    group = divisor(weight.shape[1], INT4_GROUP)
    codes, scale, _ = symmetric_blocks(weight, 4, group)
    low, scale = x.bfloat16(), scale.bfloat16()
    grid = torch.stack([scale, torch.zeros_like(scale)], dim=-1).transpose(0, 1).contiguous()  # [G, N, 2]
    values = ((codes.float() - 8).unflatten(1, (-1, group)) * scale.float()[..., None]).flatten(1)
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    except (RuntimeError, AttributeError) as error:
        raise Unavailable(str(error).splitlines()[0]) from error
    return LinearPeer(lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(low, packed, group, grid), values)


def divisor(columns: int, group: int) -> int:
    """The group size, or on tiny layers the largest power of two that still divides."""
    while columns % group:
        group //= 2
    return group


# --- ONNX Runtime ---


def onnx_modules() -> tuple[Any, Any]:
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise Unavailable(str(error)) from error
    return onnx, onnxruntime


def session(model: Any, threads: int) -> Any:
    """``model``: a path or bytes. Its threads must not go on spinning while others are timed."""
    _, onnxruntime = onnx_modules()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes, not exported under one name
        raise Unavailable(str(error).splitlines()[0]) from error


def bound(run_session: Any, x: Tensor, shape: tuple[int, ...]) -> Run:
    """A call without copies: input and output stay where they are."""
    output = torch.zeros(shape)
    binding = run_session.io_binding()
    name, result = run_session.get_inputs()[0].name, run_session.get_outputs()[0].name
    binding.bind_input(name, "cpu", 0, numpy.float32, list(x.shape), x.data_ptr())
    binding.bind_output(result, "cpu", 0, numpy.float32, list(shape), output.data_ptr())

    def run(x: Tensor = x) -> Tensor:  # keeps x alive
        run_session.run_with_iobinding(binding)
        return output

    return run


def onnx_run(x: Tensor, rows: int, nodes: list[Any], constants: dict[str, Tensor]) -> Run:
    onnx, _ = onnx_modules()
    helper, to_array = onnx.helper, onnx.numpy_helper.from_array
    kind, shape = onnx.TensorProto.FLOAT, (x.shape[0], rows)
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", kind, list(x.shape))],
        [helper.make_tensor_value_info("y", kind, list(shape))],
        [to_array(value.contiguous().numpy(), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR)
    return bound(session(model.SerializeToString(), number_of_threads()), x, shape)


def onnx_float32(x: Tensor, weight: Tensor) -> LinearPeer:
    onnx, _ = onnx_modules()
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])]
    return LinearPeer(onnx_run(x, weight.shape[0], nodes, {"w": weight.T}), weight)


def onnx_dynamic_int8(x: Tensor, weight: Tensor) -> LinearPeer:
    """The nodes that ``onnxruntime.quantization.quantize_dynamic`` writes, which the runtime fuses."""
    onnx, _ = onnx_modules()
    node = onnx.helper.make_node
    scale = weight.abs().amax(1) / 127
    codes = (weight / scale[:, None]).round().to(torch.int8)
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["a", "a_scale", "a_zero"]),
        node("MatMulInteger", ["a", "w", "a_zero", "w_zero"], ["sums"]),
        node("Cast", ["sums"], ["floats"], to=onnx.TensorProto.FLOAT),
        node("Mul", ["a_scale", "w_scale"], ["scale"]),
        node("Mul", ["floats", "scale"], ["y"]),
    ]
    zeros = torch.zeros(len(scale), dtype=torch.int8)
    run = onnx_run(x, len(scale), nodes, {"w": codes.T, "w_zero": zeros, "w_scale": scale})
    return LinearPeer(run, codes.float() * scale[:, None])


def onnx_matmul_nbits(bits: int, block: int) -> Callable[[Tensor, Tensor], LinearPeer]:
    """accuracy_level 4: activations are quantized to 8 bits too."""

    def make(x: Tensor, weight: Tensor) -> LinearPeer:
        onnx, _ = onnx_modules()
        rows, columns = weight.shape
        if columns % block:
            raise Unavailable(f"{columns} columns are not whole blocks of {block}")
        codes, scale, values = symmetric_blocks(weight, bits, block)
        each = 8 // bits
        parts = codes.view(rows, columns // block, block // each, each).int()
        packed = (parts << (torch.arange(each, dtype=torch.int32) * bits)).sum(-1).to(torch.uint8)
        node = onnx.helper.make_node(
            "MatMulNBits", ["x", "w", "scale"], ["y"], domain="com.microsoft", K=columns, N=rows, bits=bits,
            block_size=block, accuracy_level=4,
        )  # fmt: skip
        return LinearPeer(onnx_run(x, rows, [node], {"w": packed, "scale": scale.flatten()}), values)

    return make


# --- torchao ---


def torchao_layer(weight: Tensor, name: str, **options: Any) -> Any:
    with quiet():
        try:
            from torchao import quantization
            from torchao.quantization import granularity
        except ImportError as error:
            raise Unavailable(str(error)) from error
        config = getattr(quantization, name, None)
        if config is None:
            raise Unavailable(f"torchao.quantization has no {name}")
        if "weight_granularity" in options:
            options["weight_granularity"] = granularity.PerAxis(0)
        model = nn.Sequential(linear_of(weight.clone()))
        quantization.quantize_(model, config(**options))
        return model[0]


def torchao_int4(x: Tensor, weight: Tensor) -> LinearPeer:
    """8 bit dynamic activations, 4 bit weights per channel: its config for CPUs. Runs eagerly, as ours does."""
    options = {"weight_dtype": torch.int4, "weight_granularity": None}
    layer = torchao_layer(weight, "Int8DynamicActivationIntxWeightConfig", **options)
    return LinearPeer(lambda: layer(x), layer.weight.dequantize().float())


def torchao_int8(x: Tensor, weight: Tensor) -> LinearPeer:
    layer = torchao_layer(weight, "Int8DynamicActivationInt8WeightConfig")
    return LinearPeer(lambda: layer(x), layer.weight.dequantize().float())


FLOAT32 = "torch float32"

# Name -> what it is compared as, and how it is made of (x [M, K], weight [N, K]).
PEERS: dict[str, tuple[str, Callable[[Tensor, Tensor], LinearPeer]]] = {
    FLOAT32: ("float32", torch_float32),
    "torch bfloat16": ("float", torch_bfloat16),
    "torch dynamic int8 (x86)": ("int8", torch_dynamic("x86")),
    "torch dynamic int8 (onednn)": ("int8", torch_dynamic("onednn")),
    "torch _weight_int4pack_mm_for_cpu, bfloat16, group 128": ("float", torch_int4pack),
    "ONNX Runtime float32": ("float", onnx_float32),
    "ONNX Runtime dynamic int8, s8 per channel": ("int8", onnx_dynamic_int8),
    "ONNX Runtime MatMulNBits 4 bit, block 32": ("4 bit", onnx_matmul_nbits(4, 32)),
    "ONNX Runtime MatMulNBits 4 bit, block 128": ("4 bit", onnx_matmul_nbits(4, 128)),
    "ONNX Runtime MatMulNBits 2 bit, block 32": ("2 bit", onnx_matmul_nbits(2, 32)),
    "ONNX Runtime MatMulNBits 2 bit, block 128": ("2 bit", onnx_matmul_nbits(2, 128)),
    "torchao int8 dynamic": ("int8", torchao_int8),
    "torchao int8 dynamic activations, int4 weights": ("float", torchao_int4),
}
