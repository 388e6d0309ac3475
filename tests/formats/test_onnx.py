"""ONNX files: ONNX Runtime computes what the model computes, from integer weights and standard operators."""

import copy

import pytest
import small_models
import torch
from recipes.small_vit import calibration, network
from torch import nn

import torchquant
from torchquant import Activations, pass_codes_, quantize_
from torchquant.demo.digits_vit import DigitsViT
from torchquant.nn import QLinear, from_float
from torchquant.nn.quantizers import DynamicQuantizer, SubsetQuantizer, TableQuantizer, UniformQuantizer

REASON = "pip install 'torchquant[onnx]'"
onnx = pytest.importorskip("onnx", reason=REASON)
runtime = pytest.importorskip("onnxruntime", reason=REASON)
pytest.importorskip("onnxscript", reason=REASON)

# Layers without an input quantizer take 16-bit integers of each row, ONNX Runtime floats: half of 1 / 32767 of the
# row's largest input, relative to the norm of the outputs.
SUMS = 1e-4
# The same may move an activation over a rounding edge. One code of 3 bits in one of 16 x 16 activations of one of 16
# pictures is 1 / sqrt(16 * 16 * 16) = 1.6 % of a layer's output before the others dilute it.
FLIPS = 1e-2
# ONNX Runtime computes MatMulNBits with inputs rounded to 8 bits, block by block: about 1 / 127 of the largest input.
INTEGER_INPUTS = 2e-2


def export(model, path, example_inputs, **options):
    torchquant.export(model, path, format="onnx", example_inputs=example_inputs, **options)
    return onnx.load(path)


def session(path, optimized=True):
    options = runtime.SessionOptions()
    if not optimized:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def outputs(path, *inputs, optimized=True):
    found = session(path, optimized)
    names = [value.name for value in found.get_inputs()]
    feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return [torch.from_numpy(y) for y in found.run(None, feeds)]


def error(path, model, x, optimized=True):
    with torch.no_grad():
        wanted = model(x)
    (got,) = outputs(path, x, optimized=optimized)
    return float((got - wanted).norm() / wanted.norm())


def types(graph, ending):
    """Data types of the initializers whose names end so."""
    name = onnx.TensorProto.DataType.Name
    return {i.name: name(i.data_type) for i in graph.graph.initializer if i.name.endswith(ending)}


def operators(graph):
    return {node.op_type for node in graph.graph.node}


def pictures(count):
    return torch.cat(calibration(6)[4:])[:count]


def check_vit(model, path, tolerance):
    graph = export(model, path, pictures(16))
    assert {entry.domain for entry in graph.opset_import} == {""} and not graph.functions
    assert "LayerNormalization" in operators(graph) and "Softmax" in operators(graph)
    for batch in (1, 16, 32):
        assert error(path, model, pictures(batch), optimized=False) < tolerance
        assert error(path, model, pictures(batch)) < INTEGER_INPUTS
    return graph


def test_vit_w4a8(tmp_path):
    model = network()
    quantize_(model, "W4A8", calibration(), method="rtn", progress=False)
    graph = check_vit(model, tmp_path / "model.onnx", FLIPS)
    bits = {f"{name}.weight_codes": m.bits for name, m in model.named_modules() if isinstance(m, QLinear)}
    wanted = {name: "UINT4" if width <= 4 else "UINT8" for name, width in bits.items()}  # the first and last layer: 8
    assert types(graph, "weight_codes") == wanted and list(wanted.values()).count("UINT4") == 8
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators(graph)


def test_vit_w4a16g32(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DigitsViT(dim=96, depth=1, heads=2).eval()
    quantized = copy.deepcopy(model)
    quantize_(quantized, "W4A16g32-sym", calibration(), method="rtn", progress=False)
    graph = check_vit(quantized, tmp_path / "model.onnx", SUMS)
    assert list(types(graph, "weight_codes").values()).count("UINT4") >= 4
    blocks = [a.i for node in graph.graph.node for a in node.attribute if a.name == "block_size"]
    assert blocks and set(blocks) == {32}
    export(model, tmp_path / "float.onnx", pictures(16))
    size, float_size = ((tmp_path / name).stat().st_size for name in ("model.onnx", "float.onnx"))
    # 4 bits, a float32 scale and a 4-bit zero point for 32 weights: 5.1 of 32 bits, and the graph
    assert size < 0.3 * float_size


def test_vit_w3a3_with_sulq(tmp_path):
    model = network()
    activations = Activations(softmax="sulq")
    quantize_(model, "W3A3", calibration(), method="rtn", activations=activations, progress=False)
    assert sum(isinstance(m, TableQuantizer) for m in model.modules()) == 2
    graph = check_vit(model, tmp_path / "model.onnx", FLIPS)
    assert {"Greater", "Gather"} <= operators(graph)
    # What quantization itself changes is far more than what the file does.
    with torch.no_grad():
        reference = network()(pictures(32))
        assert (model(pictures(32)) - reference).norm() > 5 * FLIPS * reference.norm()


class Depthwise(nn.Module):
    """Without activations between: ONNX Runtime then makes integer convolutions of them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.head(self.depthwise(self.stem(x)))


@pytest.mark.parametrize("codes_pass", [False, True])
def test_cnn_w8a8_with_a_depthwise_convolution(tmp_path, codes_pass):
    model, path = small_models.make(Depthwise).eval(), tmp_path / "model.onnx"
    quantize_(model, "W8A8", small_models.pictures(), method="rtn", progress=False)
    if codes_pass:  # inside of torch: a file says where values have codes, and its reader decides
        assert pass_codes_(model, small_models.pictures()[0]) == ["stem", "depthwise"]
    assert len(model.depthwise.weight_zero_point.unique()) > 1  # each channel has a zero point of its own
    x = small_models.pictures()[0]
    graph = export(model, path, x)
    assert set(types(graph, "weight_codes").values()) == {"UINT8"}
    for batch in (x, x[:1]):
        assert error(path, model, batch, optimized=False) < FLIPS
        assert error(path, model, batch) < FLIPS


@pytest.mark.parametrize("scheme", ["W4A16g5", "W3A8"])
def test_every_convolution(tmp_path, scheme):
    model = small_models.make(small_models.Cnn).eval()
    quantize_(model, scheme, small_models.pictures(), progress=False)
    x = small_models.pictures()[0]
    graph = export(model, tmp_path / "model.onnx", x)
    assert "UINT4" in types(graph, "weight_codes").values()
    assert error(tmp_path / "model.onnx", model, x[:3]) < (SUMS if scheme == "W4A16g5" else FLIPS)


# --- every grid of weights ---

GRIDS = {  # bits, group size, zero point, type of the codes; what the file says
    "per_channel": (4, 0, lambda s: torch.randint(0, 16, s).float(), "UINT4", "integers"),
    "ragged_blocks": (4, 7, lambda s: torch.randint(0, 16, s).float(), "UINT4", "integers"),
    "one_group": (4, 64, lambda s: torch.full(s, 8.0), "UINT4", "integers"),
    "wide_blocks": (8, 16, lambda s: torch.randint(0, 256, s).float(), "UINT8", "integers"),
    "doubled_2": (2, 0, lambda s: torch.full(s, 1.5), "UINT4", "integers"),
    "doubled_3": (3, 8, lambda s: torch.randint(0, 15, s) / 2, "UINT4", "integers"),
    "doubled_6": (6, 0, lambda s: torch.full(s, 31.5), "UINT8", "integers"),
    "half_4": (4, 0, lambda s: torch.full(s, 7.5), "UINT4", "arithmetic"),
    "half_4_ragged": (4, 7, lambda s: torch.full(s, 7.5), "UINT4", "arithmetic"),
    "half_8": (8, 0, lambda s: torch.full(s, 127.5), "UINT8", "arithmetic"),
    "far": (4, 0, lambda s: torch.randint(-900, 900, s).float(), "UINT4", "arithmetic"),
}


class Grids(nn.Module):
    """A layer for each grid; all see the same input."""

    def __init__(self, make, columns):
        super().__init__()
        self.layers = nn.ModuleDict()
        for name, (bits, group_size, zero_point, _, _) in GRIDS.items():
            groups = -(-columns // group_size) if group_size else 1
            codes = torch.randint(0, 2**bits, (6, columns), dtype=torch.uint8)
            scale = torch.rand(6, groups) / 2**bits + 0.01
            self.layers[name] = from_float(make(), codes, scale, zero_point((6, groups)), bits, group_size)

    def forward(self, x):
        return [layer(x) for layer in self.layers.values()]


MAKERS = {
    "linear": (lambda: nn.Linear(24, 6), 24, (5, 24)),
    "conv": (lambda: nn.Conv2d(6, 6, 3, groups=2, padding=1), 27, (2, 6, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 6, 3, groups=2, stride=2, output_padding=1), 27, (2, 6, 5, 5)),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_weights_on_every_grid(tmp_path, kind):
    make, columns, shape = MAKERS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Grids(make, columns).eval(), torch.randn(shape)
    path = tmp_path / "model.onnx"
    graph = export(model, path, x)
    found = types(graph, "weight_codes")
    dequantized = {node.input[0] for node in graph.graph.node if node.op_type == "DequantizeLinear"}
    for name, (_, _, _, kind_of_codes, way) in GRIDS.items():
        codes = f"layers.{name}.weight_codes"
        assert found[codes] == kind_of_codes and (codes in dequantized) == (way == "integers"), name
    with torch.no_grad():
        wanted = model(x)
    for name, a, b in zip(GRIDS, outputs(path, x, optimized=False), wanted, strict=True):
        assert (a - b).norm() < SUMS * b.norm(), name
    for name, a, b in zip(GRIDS, outputs(path, x), wanted, strict=True):
        assert (a - b).norm() < INTEGER_INPUTS * b.norm(), name


# --- every quantizer of activations ---


def quantizers(x):
    """By name; x is [B, 6, 10]."""
    tensor = torch.tensor
    levels = torch.rand(6, 5).mul(2).sub(1).sort(1).values
    found = {
        "uniform_8": UniformQuantizer(8, tensor(0.02), tensor(120.0)),
        "uniform_3": UniformQuantizer(3, tensor(0.5), tensor(20.0)),
        "uniform_half": UniformQuantizer(4, tensor([0.3]), tensor([7.5])),
        "channels": UniformQuantizer(4, torch.rand(6) + 0.1, torch.arange(6.0), axis=1),
        "far_channels": UniformQuantizer(8, torch.rand(10) / 50 + 0.01, torch.arange(10.0) - 300),
        "subset": SubsetQuantizer(3, levels),
        "subset_shared": SubsetQuantizer(3, levels[0], axis=-1, centre=False),
        "subset_fixed": SubsetQuantizer(3, levels, mean=torch.randn(6), magnitude=torch.rand(6) + 1),
    }
    for variant in torchquant.quantizers.sulq.VARIANTS:
        eta, thresholds, exponents = torchquant.sulq_fit(x.relu(), bits=4, variant=variant)
        found[variant] = TableQuantizer(4, thresholds, exponents, eta, variant)
    for granularity in ("tensor", "token", "channel"):
        for symmetric in (False, True):
            name = f"dynamic_{granularity}_{symmetric}"
            found[name] = DynamicQuantizer(4, granularity, symmetric, axis=1 if granularity == "channel" else -1)
    return nn.ModuleDict(found)


class Every(nn.Module):
    def __init__(self, x):
        super().__init__()
        self.quantizers = quantizers(x)

    def forward(self, x, hard):
        return {name: q(hard if name.startswith("dynamic") else x) for name, q in self.quantizers.items()}


def test_every_quantizer_of_activations(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x, hard = torch.randn(2, 8, 6, 10)
        model = Every(x).eval()
    hard[0, 0] = 3.0  # constant tokens, of either sign and zero
    hard[1, 1], hard[2, 1] = -2.0, 0.0
    hard[2, 2] = 1000 + torch.arange(10) * 1e-4  # a range far from zero
    hard[:, 5] = 0.0  # a constant channel
    path = tmp_path / "model.onnx"
    graph = export(model, path, (x, hard))
    assert not {node.domain for node in graph.graph.node} - {""}
    assert [output.name for output in graph.graph.output] == list(model.quantizers)
    with torch.no_grad():
        wanted = model(x, hard)
    for name, got in zip(wanted, outputs(path, x, hard), strict=True):
        # QuantizeLinear rounds before it adds the zero point, and a mean's last bit may differ: one value on an edge.
        assert ((got - wanted[name]).abs() > 1e-6 * (1 + wanted[name].abs())).sum() <= 1, name
