"""Every operator and a quantized model by every road: TorchScript, export, torch.compile, AOTInductor, C++."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import assert_same, scripted
from recipes.small_vit import calibration, network
from torch import Tensor, nn

import torchquant

ROOT = Path(__file__).resolve().parents[1]
OPS = torch.ops.torchquant


class Gram(nn.Module):
    def forward(self, weight: Tensor, x: Tensor) -> list[Tensor]:
        gram = torch.zeros(x.size(1), x.size(1))
        torch.ops.torchquant.gram_accumulate_(gram, x)
        return [gram]


class CrossGram(nn.Module):
    def forward(self, weight: Tensor, x: Tensor) -> list[Tensor]:
        cross = torch.zeros(x.size(1), 5)
        torch.ops.torchquant.cross_gram_accumulate_(cross, x, x[:, :5])
        return [cross]


class ConvGram(nn.Module):
    def forward(self, weight: Tensor, x: Tensor) -> list[Tensor]:
        gram = torch.zeros(2, 18, 18)
        picture = x[:, :16].reshape(-1, 4, 4, 4)
        torch.ops.torchquant.conv_gram_accumulate_(
            gram, picture, kernel_size=[3, 3], stride=[1, 1], padding=[1, 1], dilation=[1, 1], groups=2
        )
        return [gram]


class RTN(nn.Module):
    def forward(self, weight: Tensor, x: Tensor) -> list[Tensor]:
        codes, scale, zero_point = torch.ops.torchquant.rtn_quantize(
            weight, bits=3, group_size=16, grid="midrise", shrink=[1.0, 0.9]
        )
        return [codes, scale, zero_point]


class MagR(nn.Module):
    def forward(self, weight: Tensor, x: Tensor) -> list[Tensor]:
        return [torch.ops.torchquant.magr_preprocess(weight, x.t() @ x, alpha=1e-2, iters=20, solver="fista")]


class COMQ(nn.Module):
    def forward(self, weight: Tensor, x: Tensor) -> list[Tensor]:
        codes, scale, zero_point, info = torch.ops.torchquant.comq_quantize(
            weight, x.t() @ x, bits=3, group_size=16, sweeps=2, order="greedy"
        )
        return [codes, scale, zero_point, info]


class GPTQ(nn.Module):
    def forward(self, weight: Tensor, x: Tensor) -> list[Tensor]:
        codes, scale, zero_point, info = torch.ops.torchquant.gptq_quantize(
            weight, x.t() @ x, bits=2, damp=0.02, order="activation"
        )
        return [codes, scale, zero_point, info]


class Errors(nn.Module):
    def forward(self, weight: Tensor, x: Tensor) -> list[Tensor]:
        codes, scale, zero_point = torch.ops.torchquant.rtn_quantize(weight, bits=4, group_size=16)
        values = torch.ops.torchquant.dequantize(codes, scale, zero_point, group_size=16)
        error = torch.ops.torchquant.quantization_error(weight, x.t() @ x, codes, scale, zero_point, group_size=16)
        return [values, error]


class Ridge(nn.Module):
    def forward(self, weight: Tensor, x: Tensor) -> list[Tensor]:
        rounded = x.mul(4).round().div(4)
        gram, cross = rounded.t() @ rounded, rounded.t() @ x
        updated = torch.ops.torchquant.ridge_update(weight, gram, cross, ridge=0.01)
        errors = torch.ops.torchquant.ridge_errors(weight, gram, cross, gram, cross, ridges=[0.01, 0.1])
        return [updated, errors]


class Flips(nn.Module):
    def forward(self, weight: Tensor, x: Tensor) -> list[Tensor]:
        codes, scale, zero_point, info, bias = torch.ops.torchquant.flips_quantize(weight, x.t() @ x, bits=3)
        return [codes, scale, zero_point, info, bias]


class Histogram(nn.Module):
    def forward(self, weight: Tensor, x: Tensor) -> list[Tensor]:
        histogram = torch.zeros(3, 4096, dtype=torch.float64)
        torch.ops.torchquant.histogram_accumulate_(histogram, x)
        scale, zero_point = torch.ops.torchquant.histogram_range(histogram, bits=4, rule="mse")
        return [histogram, torch.ops.torchquant.histogram_quantile(histogram, [0.01, 0.99]), scale, zero_point]


class Uniform(nn.Module):
    def forward(self, weight: Tensor, x: Tensor) -> list[Tensor]:
        scale, zero_point = torch.ops.torchquant.uniform_fit(weight, bits=4, granularity="token")
        codes = torch.ops.torchquant.uniform_quantize(weight, scale, zero_point, bits=4)
        return [codes, torch.ops.torchquant.uniform_dequantize(codes, scale, zero_point)]


class Dynamic(nn.Module):
    def forward(self, rows: Tensor, weight: Tensor) -> Tensor:
        codes, scale, zero_point = torch.ops.torchquant.dynamic_quantize(rows, bits=4)
        weight = torch.ops.torchquant.dynamic_fake_quantize(weight, bits=3)
        return torch.ops.torchquant.uniform_dequantize(codes, scale, zero_point) @ weight.T


class SULQ(nn.Module):
    def forward(self, weight: Tensor, x: Tensor) -> list[Tensor]:
        attention = torch.softmax(weight, -1)
        histogram = torch.zeros(3, 4096, dtype=torch.float64)
        torch.ops.torchquant.histogram_accumulate_(histogram, attention)
        eta, thresholds, exponents = torch.ops.torchquant.sulq_fit(histogram, bits=3)
        codes = torch.ops.torchquant.sulq_quantize(attention, thresholds)
        values = torch.ops.torchquant.sulq_dequantize(codes, exponents, eta)
        error = torch.ops.torchquant.sulq_error(histogram, eta, thresholds, exponents)
        v = x[:40, :8].mul(8).round().to(torch.int8)
        product = torch.ops.torchquant.sulq_matmul(codes, exponents, eta, v)
        return [codes, values, error, product, torch.ops.torchquant.sulq_shift_matmul(codes, exponents, v)]


class Subset(nn.Module):
    def forward(self, weight: Tensor, x: Tensor) -> list[Tensor]:
        universe = torch.linspace(-1.0, 1.0, 65)
        levels, sse = torch.ops.torchquant.subset_select(x / x.abs().max(), universe, levels=8)
        codes = torch.ops.torchquant.subset_quantize(weight, levels)
        return [levels, sse, codes, torch.ops.torchquant.subset_dequantize(codes, levels)]


class Attention(nn.Module):
    def forward(self, weight: Tensor, x: Tensor) -> Tensor:
        eta, thresholds, exponents = torch.ops.torchquant.sulq_fit(torch.softmax(x, -1), bits=3)
        return torch.ops.torchquant.quantized_attention(
            weight, x, x[:, :8], thresholds=thresholds, exponents=exponents, eta=eta
        )


class Pack(nn.Module):
    def forward(self, weight: Tensor, x: Tensor) -> list[Tensor]:
        codes = torch.ops.torchquant.rtn_quantize(weight, bits=3)[0]
        packed = torch.ops.torchquant.pack_codes(codes, bits=3)
        return [packed, torch.ops.torchquant.unpack_codes(packed, bits=3, columns=weight.size(1))]


class PackedLinear(nn.Module):
    """The second argument as the weight, so that the dynamic dimension is that of the tokens."""

    def forward(self, tokens: Tensor, weight: Tensor) -> Tensor:
        codes, scale, zero_point = torch.ops.torchquant.rtn_quantize(weight, bits=4, group_size=4)
        packed, grid, levels = torch.ops.torchquant.linear_prepack(codes, scale, zero_point, bits=4, group_size=4)
        outputs, inputs = weight.size(0), weight.size(1)
        return torch.ops.torchquant.quantized_linear(
            tokens, packed, grid, None, bits=4, in_features=inputs, out_features=outputs, group_size=4, levels=levels
        )


class Layers(nn.Module):
    """Operators of several layers: an MLP, attention with its projections (three heads of four channels), a block."""

    def forward(self, rows: Tensor, weight: Tensor) -> list[Tensor]:
        codes, scale, zero_point = torch.ops.torchquant.rtn_quantize(weight[:36], bits=4)
        wide, wide_grid, none = torch.ops.torchquant.linear_prepack(codes, scale, zero_point, bits=4)
        narrow, narrow_grid, none = torch.ops.torchquant.linear_prepack(
            codes[:, :36], scale, zero_point, bits=4, levels=None
        )
        step, zero = torch.ops.torchquant.uniform_fit(weight, bits=8)
        first, second = [wide, wide_grid, none, none, none, none], [narrow, narrow_grid, none, none, step, zero]
        y = torch.ops.torchquant.quantized_mlp(rows, first, [4, 40, 36, 0, 16, 0], second, [4, 36, 36, 0, 8, 0])
        heads, _, _ = torch.ops.torchquant.linear_prepack(codes[:, :12].contiguous(), scale, zero_point, bits=4)
        out = [heads, narrow_grid, none, none, step, zero]
        z = torch.ops.torchquant.quantized_self_attention(
            rows.unsqueeze(0), first, [4, 40, 36, 0, 16, 0], out, [4, 12, 36, 0, 8, 0], [step, step, step],
            [zero, zero, zero], 8, [step, zero], 8, num_heads=3,
        )  # fmt: skip
        numbers = [4, 36, 36, 0, 8, 0]
        block = torch.ops.torchquant.quantized_block(
            rows[:, :36].unsqueeze(0), [step.expand(36), none, none, none], [1e-5, 1e-3], second, numbers, out,
            [4, 12, 36, 0, 8, 0], [step, step, step], [zero, zero, zero], 8, [step, zero], 8, second, numbers, second,
            numbers, num_heads=3,
        )  # fmt: skip
        return [y, z, block]


class IntegerScales(nn.Module):
    def forward(self, weight: Tensor, _x: Tensor) -> Tensor:
        codes, scale, zero_point = torch.ops.torchquant.rtn_quantize(weight, bits=4, group_size=8)
        return torch.ops.torchquant.integer_group_scales(codes, scale, zero_point, bits=4, group_size=8)


class PackedConv(nn.Module):
    def forward(self, rows: Tensor, weight: Tensor) -> Tensor:
        images = rows.view(-1, 10, 2, 2)
        codes, scale, zero_point = torch.ops.torchquant.rtn_quantize(weight, bits=4)
        packed, grid, _ = torch.ops.torchquant.conv_prepack(codes, scale, zero_point, bits=4, kernel_size=[2, 2])
        return torch.ops.torchquant.quantized_conv2d(
            images, packed, grid, None, bits=4, in_channels=10, out_channels=200, kernel_size=[2, 2], padding=[1, 1]
        )


class LayerNorm(nn.Module):
    def forward(self, rows: Tensor, weight: Tensor) -> Tensor:
        scale, zero_point = torch.ops.torchquant.uniform_fit(rows, bits=6)
        return torch.ops.torchquant.quantized_layer_norm(
            rows, weight[0], weight[1], output_scale=scale, output_zero_point=zero_point, output_bits=6, eps=1e-6
        )


# What each program deploys. An operator that is in none of them fails test_every_operator_is_deployed.
PROGRAMS: dict[type[nn.Module], tuple[str, ...]] = {
    Gram: ("gram_accumulate_",),
    CrossGram: ("cross_gram_accumulate_",),
    ConvGram: ("conv_gram_accumulate_",),
    RTN: ("rtn_quantize",),
    MagR: ("magr_preprocess",),
    COMQ: ("comq_quantize",),
    GPTQ: ("gptq_quantize",),
    Errors: ("dequantize", "quantization_error"),
    Ridge: ("ridge_update", "ridge_errors"),
    Flips: ("flips_quantize",),
    Histogram: ("histogram_accumulate_", "histogram_range", "histogram_quantile"),
    Uniform: ("uniform_fit", "uniform_quantize", "uniform_dequantize"),
    Dynamic: ("dynamic_quantize", "dynamic_fake_quantize"),
    SULQ: ("sulq_fit", "sulq_quantize", "sulq_dequantize", "sulq_error", "sulq_matmul", "sulq_shift_matmul"),
    Subset: ("subset_select", "subset_quantize", "subset_dequantize"),
    Attention: ("quantized_attention",),
    Pack: ("pack_codes", "unpack_codes"),
    PackedLinear: ("linear_prepack", "quantized_linear"),
    Layers: ("quantized_mlp", "quantized_self_attention", "quantized_block"),
    IntegerScales: ("integer_group_scales",),
    PackedConv: ("conv_prepack", "quantized_conv2d"),
    LayerNorm: ("quantized_layer_norm",),
}
COMPILED = (Gram, COMQ, Errors)  # seconds each
programs = pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(24, 40, generator=generator), torch.randn(200, 40, generator=generator)


def test_every_operator_is_deployed():
    registered = {
        name.removeprefix("torchquant::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("torchquant::")
    }
    assert registered == {operator for operators in PROGRAMS.values() for operator in operators}


@programs
def test_torchscript_saved_and_loaded(program: type[nn.Module]):
    assert_same(scripted(program())(*inputs()), program()(*inputs()))


@programs
def test_export_with_a_dynamic_shape(program: type[nn.Module]):
    weight, x = inputs()
    rows = torch.export.Dim("rows", min=2)
    exported = torch.export.export(program(), (weight, x), dynamic_shapes=({0: rows}, None), strict=False)
    assert any("torchquant" in str(node.target) for node in exported.graph.nodes)
    other = torch.cat([weight, weight[:7]])
    assert_same(exported.module()(other, x), program()(other, x))


@pytest.mark.parametrize("program", COMPILED, ids=lambda program: program.__name__)
def test_compile_without_a_graph_break(program: type[nn.Module]):
    with torch.no_grad():
        assert_same(torch.compile(program(), fullgraph=True)(*inputs()), program()(*inputs()))


def quantized_cnn() -> tuple[nn.Module, Tensor]:
    """A small model with linear, convolution and depthwise convolution, quantized to 3 bits, and an input for it."""
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, 10),
    ).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    batches = [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(8)]
    torchquant.quantize_(model, "W3A16", batches, method="comq", progress=False)
    return model, torch.randn(4, 3, 8, 8, generator=generator)


def quantized_vit() -> tuple[nn.Module, Tensor]:
    """A vision transformer with weights of 4 bits and activations of 8, attention included, and an input for it."""
    model, batches = network(), calibration()
    torchquant.quantize_(model, "W4A8", batches, method="rtn", progress=False)
    return model, batches[0][:5]


def quantized_mlp() -> tuple[nn.Module, Tensor]:
    """Linear layers between which codes travel."""
    mlp = nn.Sequential(nn.Linear(24, 70), nn.GELU(), nn.Linear(70, 24))
    model = nn.Sequential(nn.LayerNorm(24), mlp, nn.LayerNorm(24), nn.Linear(24, 10)).eval()
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    batches = [torch.randn(4, 9, 24, generator=generator) for _ in range(4)]
    torchquant.quantize_(model, "W4A8", batches, method="rtn", progress=False)
    return model, torch.randn(5, 9, 24, generator=generator)


@pytest.fixture(scope="module", params=[quantized_cnn, quantized_vit, quantized_mlp], ids=["cnn", "vit", "mlp"])
def quantized(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    return request.param()


def road_script(model: nn.Module, x: Tensor, folder: Path) -> Callable[[Tensor], Tensor]:
    return scripted(model)


def road_export(model: nn.Module, x: Tensor, folder: Path) -> Callable[[Tensor], Tensor]:
    torch.export.save(torch.export.export(model, (x,)), folder / "model.pt2")
    return torch.export.load(folder / "model.pt2").module()


def road_compile(model: nn.Module, x: Tensor, folder: Path) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, fullgraph=True)


def road_aoti(model: nn.Module, x: Tensor, folder: Path) -> Callable[[Tensor], Tensor]:
    exported = torch.export.export(model, (x,))
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(folder / "model.pt2"))
    return torch._inductor.aoti_load_package(package)


@pytest.mark.parametrize("road", [road_script, road_export, road_compile, road_aoti], ids=lambda road: road.__name__)
def test_quantized_model(road: Callable, quantized: tuple[nn.Module, Tensor], tmp_path: Path):
    model, x = quantized
    with torch.no_grad():
        wanted = model(x)
        got = road(model, x, tmp_path)(x)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)  # another compiler sums in another order


def program_beside_python(name: str) -> str | None:
    """pip's cmake and ctest lie beside the interpreter."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name)


def test_program_without_python_gives_the_same_codes():
    cmake, ctest = program_beside_python("cmake"), program_beside_python("ctest")
    if cmake is None or ctest is None:
        pytest.skip("needs cmake: pip install cmake")
    build = ROOT / "build" / "example"
    python = f"-DPython_EXECUTABLE={sys.executable}"
    for command in (
        [cmake, "-S", ROOT / "examples" / "cpp", "-B", build, python],
        [cmake, "--build", build],
        [ctest, "--test-dir", build, "--output-on-failure", "--no-tests=error"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
