"""QConv2d: the packed kernel and the float product agree, whatever pads and whatever the quantizer."""

import copy

import pytest
import torch
from helpers import assert_same, scripted
from nn.float_layers import LAYERS
from torch import nn

from torchquant.nn import QConv2d, from_float, layout
from torchquant.nn.quantizers import DynamicQuantizer, UniformQuantizer
from torchquant.solvers import rtn_quantize

QUANTIZERS = {
    "integral": UniformQuantizer(4, torch.tensor(0.3), torch.tensor(7.0)),
    "fractional": UniformQuantizer(8, torch.tensor(0.02), torch.tensor(127.5)),
    "out of range": UniformQuantizer(4, torch.tensor(0.3), torch.tensor(-5.0)),
    "dynamic": DynamicQuantizer(8, granularity="tensor"),
    "dynamic symmetric": DynamicQuantizer(4, granularity="tensor", symmetric=True),
    "tokens": DynamicQuantizer(8, granularity="token"),
    "channels": UniformQuantizer(8, torch.full((4,), 0.05), torch.full((4,), 128.0), axis=1),
}
CONVS = {
    "plain": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "no bias": lambda: nn.Conv2d(4, 6, (1, 3), bias=False),
    "grouped": lambda: nn.Conv2d(4, 6, 3, padding=2, groups=2, dilation=2),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4),
    "same": lambda: nn.Conv2d(4, 6, (2, 3), padding="same"),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", groups=4),
}


def quantized(module, bits=4, group_size=0):
    codes, scale, zero_point = rtn_quantize(layout.to_matrix(module), bits=bits, group_size=group_size)
    return from_float(module, codes, scale, zero_point, bits, group_size)


def simulated(layer, x):
    """The float product: a layer without a packed weight."""
    twin = copy.deepcopy(layer)
    twin.kernel_weight = twin.kernel_weight.new_empty(0)
    with torch.no_grad():
        return twin(x)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("quantizer", [None, *QUANTIZERS])
@pytest.mark.parametrize("conv", CONVS)
def test_packed_kernel_and_float_products_agree(conv, quantizer):
    layer = quantized(CONVS[conv](), group_size=0 if conv == "depthwise" else 5)
    layer.input_quantizer = None if quantizer is None else QUANTIZERS[quantizer].copy()
    x = torch.randn(2, 4, 9, 10) + 0.5
    assert layer.kernel_runs(x) and not layer.kernel_runs(x.clone().requires_grad_())
    got, wanted = layer(x), simulated(layer, x)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-4)
    last = layer(x.to(memory_format=torch.channels_last))
    if conv != "circular" and quantizer in (None, "integral", "fractional", "out of range"):
        assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, wanted, rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(layer(x.double()).float(), wanted, rtol=1e-4, atol=2e-4)


def test_picture_without_a_batch_dimension():
    layer, x = quantized(nn.Conv2d(4, 6, 3)), torch.randn(4, 6, 7)
    torch.testing.assert_close(layer(x), layer(x[None])[0], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("name", [name for name in LAYERS if isinstance(LAYERS[name][0], nn.Conv2d)])
def test_padding_of_every_origin(name):
    module, shape = LAYERS[name]
    layer = quantized(module)
    layer.input_quantizer = QUANTIZERS["out of range"].copy()
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x), simulated(layer, x), rtol=1e-4, atol=2e-4)


def test_kernel_weight_follows_the_layer():
    for groups in (1, 4):
        layer = quantized(nn.Conv2d(4, 4, 3, groups=groups))
        x, wanted = torch.randn(1, 4, 6, 6), layer.kernel_weight.clone()
        assert wanted.numel() and "kernel_weight" not in layer.state_dict()
        fresh = QConv2d.empty_like(nn.Conv2d(4, 4, 3, groups=groups), 4, 0)
        fresh.load_state_dict(layer.state_dict())
        assert_same(fresh(x), layer(x))
        assert copy.deepcopy(layer).to("meta").kernel_weight.numel() == 0
        assert torch.equal(layer.to(torch.bfloat16).kernel_weight, wanted) and layer.kernel_grid.dtype == torch.float32


@pytest.mark.parametrize("conv", ["plain", "same", "reflect", "depthwise"])
@pytest.mark.parametrize("quantizer", [None, "integral", "dynamic"])
def test_torchscript_and_export_run_the_kernel(conv, quantizer):
    layer = quantized(CONVS[conv]()).eval()
    layer.input_quantizer = None if quantizer is None else QUANTIZERS[quantizer].copy()
    x = torch.randn(2, 4, 9, 10)
    assert_same(scripted(layer)(x), layer(x))
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert any("quantized_conv2d" in str(node.target) for node in exported.graph.nodes)
    more = torch.randn(3, 4, 9, 10)
    assert_same(exported.module()(more), layer(more))


def test_gradients_flow_through_the_float_product():
    layer, x = quantized(nn.Conv2d(4, 6, 3)), torch.randn(1, 4, 6, 6, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
