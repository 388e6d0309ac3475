"""Whole networks: what quantize_ makes of them against the float network and the int8 of PyTorch and ONNX Runtime."""

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchquant
from torchquant import _C, Activations
from torchquant.demo.case import seeded
from torchquant.demo.digits_vit import Attention
from torchquant.nn import QuantizedLayer, swap_modules

from . import race
from .harness import CheckFailed, Result, Run, check
from .linear_peers import FLOAT32, Unavailable, bound, dynamic_int8, onnx_modules, quiet, session
from .race import Outcome, Race, Runner

PICTURE = (3, 224, 224)
BATCHES = (1, 8)
THREADS = (1, 2)
OPSET = 17
LAST, SCRIPTED = ", channels last", ", TorchScript"
OUTPUT_ERROR = {"float32": 1e-4, "float": 0.05, "int8": 0.3, "4 bit": 0.5}  # of peers, relative to the float network
SAME_ERROR = 0.05  # of ours, relative to float layers of the same weights and inputs: codes of inputs may flip
CALIBRATION_CROPS = 1  # of each of ten pictures
MAX_TOKENS = 1000  # of a layer: speed does not depend on them
# Ranges from every token itself, as the dynamic int8 of the peers; nothing is moved between layers.
DYNAMIC = Activations(dynamic=True, granularity="token", symmetric=True, reparameterize=False, softmax="uniform")


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DeiT(nn.Module):
    """DeiT-S (arXiv 2012.12877): 12 blocks of 384 channels and 6 heads, 197 tokens. Random weights."""

    def __init__(self, dim: int = 384, depth: int = 12, heads: int = 6, patch: int = 16) -> None:
        super().__init__()
        tokens = (PICTURE[1] // patch) ** 2 + 1
        self.embed = nn.Conv2d(3, dim, patch, patch)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, dim))
        self.blocks = nn.Sequential(*[Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 1000)

    def forward(self, pictures: Tensor) -> Tensor:
        patches = self.embed(pictures).flatten(2).transpose(1, 2)
        first = self.class_token.expand(patches.shape[0], -1, -1)
        x = self.blocks(torch.cat([first, patches], dim=1) + self.position)
        return self.head(self.norm(x)[:, 0])


@dataclass(frozen=True)
class Network:
    name: str
    model: nn.Module
    calibration: Tensor  # pictures
    schemes: dict[str, tuple[str, Activations | None]]  # name of ours -> scheme, activations
    peers: dict[str, tuple[str, Callable[["Network", Path], "Candidate"]]]  # name -> group, maker


@dataclass(frozen=True)
class Candidate:
    """One form of a network."""

    call: Callable[[Tensor, int], Run]  # of pictures and a number of threads
    disk: int  # bytes
    memory: int | None = None  # bytes, where it can be known
    unpacked: nn.Module | None = None  # of ours: the same with float layers
    name: str = ""
    group: str = "ours"


# --- forms of a network ---


def tensor_bytes(model: nn.Module) -> int:
    """Of everything that its modules hold, each storage once."""
    held: dict[int, int] = {}
    for module in model.modules():
        for value in [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def torch_candidate(model: nn.Module, folder: Path, dtype: torch.dtype = torch.float32) -> Candidate:
    file = folder / "state.pt"
    torch.save(model.state_dict(), file)
    return Candidate(eager(model, dtype), file.stat().st_size, tensor_bytes(model))


def eager(
    model: nn.Module, dtype: torch.dtype = torch.float32, memory: torch.memory_format = torch.contiguous_format
) -> Callable[[Tensor, int], Run]:
    def call(x: Tensor, threads: int) -> Run:
        own = x.to(dtype=dtype, memory_format=memory)
        return lambda: model(own)

    return call


class Unpacked(nn.Module):
    """A quantized layer as float operators on its quantized input and weight."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        x = x if layer.input_quantizer is None else layer.input_quantizer(x)
        weight, bias = layer.dequantized_weight(), layer.bias
        if weight.dim() == 2:
            return F.linear(x, weight, bias)
        return F.conv2d(layer.pad(x), weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def unpacked(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    swap_modules(model, {layer: Unpacked(layer) for layer in layers})
    return model


def ours(network: Network, name: str, folder: Path) -> Candidate:
    scheme, activations = network.schemes[name]
    model = copy.deepcopy(network.model)
    torchquant.fold_batch_norm_(model, network.calibration[:1])
    torchquant.quantize_(
        model, scheme, [network.calibration], method="rtn", activations=activations, progress=False,
        max_tokens=MAX_TOKENS,
    )  # fmt: skip
    reference = unpacked(model)
    torchquant.pass_codes_(model, network.calibration[:1])
    torchquant.save(model, folder / "ours")
    size = sum(file.stat().st_size for file in (folder / "ours").iterdir())
    memory = torch.channels_last if name.endswith(LAST) else torch.contiguous_format
    run = torchscript(model, network.calibration[:2]) if name.endswith(SCRIPTED) else model
    return Candidate(eager(run, memory=memory), size, tensor_bytes(model), reference, name)


def torchscript(model: nn.Module, example: Tensor) -> nn.Module:
    """Frozen; traced where its own code is none that TorchScript compiles."""
    try:
        return torch.jit.freeze(torch.jit.script(model))
    except RuntimeError:
        return torch.jit.freeze(torch.jit.trace(model, example))


def float32(network: Network, folder: Path) -> Candidate:
    return torch_candidate(network.model, folder)


def folded(network: Network, folder: Path) -> Candidate:
    model = copy.deepcopy(network.model)
    torchquant.fold_batch_norm_(model, network.calibration[:1])
    return torch_candidate(model, folder)


def folded_last(network: Network, folder: Path) -> Candidate:
    made = folded(network, folder)
    model = copy.deepcopy(network.model).to(memory_format=torch.channels_last)
    torchquant.fold_batch_norm_(model, network.calibration[:1])
    return replace(made, call=eager(model, memory=torch.channels_last))


def bfloat16(network: Network, folder: Path) -> Candidate:
    return torch_candidate(copy.deepcopy(network.model).bfloat16(), folder, torch.bfloat16)


def torch_dynamic(network: Network, folder: Path) -> Candidate:
    made = torch_candidate(dynamic_int8(copy.deepcopy(network.model)), folder)
    return replace(made, memory=None)  # packed weights are no tensors


def onnx_candidate(file: Path) -> Candidate:
    content = file.read_bytes()

    def call(x: Tensor, threads: int) -> Run:
        made = session(content, threads)
        outputs = [size for size in made.get_outputs()[0].shape if isinstance(size, int)][-1]
        return bound(made, x, (x.shape[0], outputs))

    return Candidate(call, len(content))


def exported(network: Network, folder: Path) -> Path:
    onnx_modules()
    file = folder / "float.onnx"
    if not file.exists():
        axes = {"pictures": {0: "batch"}, "logits": {0: "batch"}}
        with quiet():
            torch.onnx.export(
                network.model, (network.calibration[:2],), str(file), dynamo=False, opset_version=OPSET,
                input_names=["pictures"], output_names=["logits"], dynamic_axes=axes,
            )  # fmt: skip
    return file


def onnx_float32(network: Network, folder: Path) -> Candidate:
    return onnx_candidate(exported(network, folder))


def saturates() -> bool:
    """Whether ONNX Runtime's products of 8-bit weights leave int16 on this CPU: it advises weights of 7 bits there."""
    return _C.cpu_tier() in ("avx2", "avx512")


def onnx_dynamic(network: Network, folder: Path) -> Candidate:
    file, made = exported(network, folder), folder / "dynamic.onnx"
    with quiet():
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(
            file, made, per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"],
            reduce_range=saturates(),
        )  # fmt: skip
    return onnx_candidate(made)


def onnx_static(network: Network, folder: Path) -> Candidate:
    """Convolutions too, with ranges from the calibration pictures."""
    file, made = exported(network, folder), folder / "static.onnx"
    with quiet():
        from onnxruntime import quantization

        class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self.rows = iter(network.calibration.split(1))

            def get_next(self) -> dict[str, Any] | None:
                row = next(self.rows, None)
                return None if row is None else {"pictures": row.numpy()}

        quantization.quantize_static(
            file, made, Reader(), per_channel=True, weight_type=quantization.QuantType.QInt8,
            activation_type=quantization.QuantType.QUInt8, reduce_range=saturates(),
        )  # fmt: skip
    return onnx_candidate(made)


def onnx_nbits(network: Network, folder: Path) -> Candidate:
    import onnx

    file, made = exported(network, folder), folder / "nbits.onnx"
    with quiet():
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(
            onnx.load(file), bits=4, block_size=128, is_symmetric=True, accuracy_level=4
        )  # fmt: skip
        quantizer.process()
        quantizer.model.save_model_to_file(str(made))
    return onnx_candidate(made)


# --- the networks ---


def deit_s(depth: int = 12, dim: int = 384) -> Network:
    with seeded(0):
        model = DeiT(dim, depth).eval()
        pictures = torch.randn(2, *PICTURE)
    static = {f"W4A8, static{form}": ("W4A8", None) for form in ("", SCRIPTED)}
    schemes = {**static, "W4A8, dynamic": ("W4A8", DYNAMIC), "W4A16": ("W4A16", None)}
    peers: dict[str, Any] = {
        FLOAT32: ("float32", float32),
        "torch bfloat16": ("float", bfloat16),
        "torch dynamic int8": ("int8", torch_dynamic),
        "ONNX Runtime float32": ("float", onnx_float32),
        "ONNX Runtime dynamic int8, s8 per channel": ("int8", onnx_dynamic),
        "ONNX Runtime MatMulNBits 4 bit, block 128": ("4 bit", onnx_nbits),
    }
    return Network("DeiT-S, random weights", model, pictures, schemes, peers)


def efficientnet_lite0() -> Network:
    from torchquant.demo import efficientnet

    pictures = efficientnet.crops(efficientnet.CALIBRATION_PICTURES, CALIBRATION_CROPS, seed=0)
    schemes: dict[str, Any] = {f"{s}{form}": (s, None) for form in ("", LAST, SCRIPTED) for s in ("W8A8", "W4A8")}
    peers: dict[str, Any] = {
        FLOAT32: ("float32", float32),
        "torch float32, BatchNorm folded": ("float", folded),
        f"torch float32, BatchNorm folded{LAST}": ("float", folded_last),
        "ONNX Runtime float32": ("float", onnx_float32),
        "ONNX Runtime static int8, s8 per channel": ("int8", onnx_static),
    }
    return Network("EfficientNet-Lite0", pad_inside(efficientnet.build()), pictures, schemes, peers)


def pad_inside(model: nn.Module) -> nn.Module:
    """Zeros that are the same on both sides are the convolutions' own."""
    for pair in model.modules():
        if isinstance(pair, nn.Sequential) and len(pair) == 2 and isinstance(pair[0], nn.ZeroPad2d):
            left, right, top, bottom = pair[0].padding
            if left == right and top == bottom:
                pair[0], pair[1].padding = nn.Identity(), (top, left)
    return model


NETWORKS: tuple[Callable[[], Network], ...] = (deit_s, efficientnet_lite0)


def candidates(network: Network, folder: Path) -> tuple[list[Candidate], dict[str, str]]:
    """Every form, and why some peers are missing."""
    made, absent = [ours(network, name, folder) for name in network.schemes], {}
    for name, (group, make) in network.peers.items():
        try:
            made.append(replace(make(network, folder), name=name, group=group))
        except (Unavailable, ImportError) as reason:
            absent[name] = str(reason)
    return made, absent


# --- races ---


def outputs_error(form: Candidate, run: Run, x: Tensor, float_outputs: Tensor) -> float:
    """Relative to the float network's outputs; checked before anything is timed."""

    def away(reference: Tensor) -> float:
        output: Any = run()
        return float((output.float() - reference).norm() / reference.norm())

    limit = SAME_ERROR if form.unpacked else OUTPUT_ERROR[form.group]
    error = away(form.unpacked(x) if form.unpacked else float_outputs)
    check(error <= limit, f"networks: {form.name} is {error:.2g} off, allowed are {limit}")
    return away(float_outputs)


def make_race(network: Network, forms: Sequence[Candidate], absent: dict[str, str], batch: int, threads: int) -> Race:
    x = network.calibration.repeat(batch, 1, 1, 1)[:batch]
    reference = network.model(x)
    runners, cells, absent = [], {}, dict(absent)
    with race.threads(threads):
        for form in forms:
            run = form.call(x, threads)
            try:
                error = outputs_error(form, run, x, reference)
            except CheckFailed as reason:
                if form.unpacked is not None:
                    raise
                absent[form.name] = str(reason)
                continue
            runners.append(Runner(form.name, run, form.group, float(batch), "images/s"))
            memory = "" if form.memory is None else f"{form.memory / 1e6:.1f}"
            cells[form.name] = [f"{form.disk / 1e6:.1f}", memory, f"{error:.2g}"]
    label = f"{network.name}, batch {batch}"
    return Race("networks", label, runners, threads, float(batch), None, absent, cells)


def races(make: Callable[[], Network], threads: Sequence[int]) -> Iterator[Race]:
    network = make()
    with tempfile.TemporaryDirectory() as folder, race.threads(max(threads)):
        forms, absent = candidates(network, Path(folder))
    for batch in BATCHES:
        for count in threads:
            yield make_race(network, forms, absent, batch, count)


def thread_counts(threads: int | None) -> list[int]:
    return [threads] if threads else [count for count in THREADS if count <= race.cores()]


@torch.no_grad()
def run(
    shapes: Sequence[object], rounds: int, threads: int | None, show: Callable[[str], None]
) -> tuple[list[Result], str]:
    """All results, and the table as Markdown; ``shapes`` do not apply."""
    outcomes: list[Outcome] = []
    show(race.table(HEADER, []).rstrip())
    for make in NETWORKS:
        for one in races(make, thread_counts(threads)):
            outcomes.append(race.run_race(one, rounds))
            show("\n".join(race.row(cells) for cells in rows(outcomes[-1])))
    text = race.table(HEADER, (cells for outcome in outcomes for cells in rows(outcome))) + race.absentees(outcomes)
    return [result for outcome in outcomes for result in race.results(outcome)], text


HEADER = (
    "network", "threads", "form", "ms: best / median", "images/s", "to torch float32", "to the fastest int8",
    "MB on disk", "MB in memory", "relative error of the outputs",
)  # fmt: skip


def rows(outcome: Outcome) -> Iterator[list[str]]:
    for runner in outcome.race.runners:
        name = runner.name
        int8 = race.ratio_cell(outcome, name, "int8") if runner.group == "ours" else ""
        yield [
            outcome.race.shape, str(outcome.race.threads), name, race.time_cell(outcome, name),
            f"{outcome.rate(name):.3g}", race.ratio_cell(outcome, name, "float32"), int8,
            *outcome.race.cells[name],
        ]  # fmt: skip
