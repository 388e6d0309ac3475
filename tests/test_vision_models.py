"""DeiT-S, ViT-B and Swin-T, Hugging Face's and timm's, with random weights: the whole way from float to file.

Widths, heads and windows are those of the published networks; blocks and pictures are fewer and smaller, so that this
takes seconds. TORCHQUANT_FULL=1 takes all blocks and pictures of 224 x 224.
"""

import os
from collections.abc import Callable

import pytest
import torch
from nn.attention_models import library
from torch import Tensor, nn

import torchquant
from torchquant.nn import QAttention
from torchquant.nn.attention_product import POINTS
from torchquant.nn.base import QuantizedLayer
from torchquant.nn.quantizers import ActivationQuantizer
from torchquant.recipes import erq, is_vit, repq_vit
from torchquant.recipes.sos import Training

FULL = os.environ.get("TORCHQUANT_FULL") == "1"
BLOCKS, SIDE = (12, 224) if FULL else (2, 48)
STAGES, SWIN_SIDE = ([2, 2, 6, 2], 224) if FULL else ([2, 1], 56)  # 56: two stages, and windows that are shifted
CLASSES = 10


class Logits(nn.Module):
    """Hugging Face's models return a record; this is what any other classifier does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=x).logits


def hugging_face(kind: str, **config: object) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    made = getattr(transformers, f"{kind}Config")(num_labels=CLASSES, **config)
    return Logits(getattr(transformers, f"{kind}ForImageClassification")(made))


def hf_deit_s() -> nn.Module:
    size = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    return hugging_face("DeiT", **size, num_hidden_layers=BLOCKS, image_size=SIDE)


def hf_vit_b() -> nn.Module:
    return hugging_face("ViT", num_hidden_layers=BLOCKS, image_size=SIDE)


def hf_swin_t() -> nn.Module:
    return hugging_face("Swin", depths=STAGES, num_heads=[3, 6, 12, 24][: len(STAGES)], image_size=SWIN_SIDE)


def from_timm(name: str, **options: object) -> nn.Module:
    return library("timm").create_model(name, pretrained=False, num_classes=CLASSES, **options)


def timm_deit_s() -> nn.Module:
    return from_timm("deit_small_patch16_224", depth=BLOCKS, img_size=SIDE)


def timm_vit_b() -> nn.Module:
    return from_timm("vit_base_patch16_224", depth=BLOCKS, img_size=SIDE)


def timm_swin_t() -> nn.Module:
    heads = (3, 6, 12, 24)[: len(STAGES)]
    return from_timm("swin_tiny_patch4_window7_224", depths=STAGES, num_heads=heads, img_size=SWIN_SIDE)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "HF DeiT-S": hf_deit_s,
    "HF ViT-B": hf_vit_b,
    "HF Swin-T": hf_swin_t,
    "timm DeiT-S": timm_deit_s,
    "timm ViT-B": timm_vit_b,
    "timm Swin-T": timm_swin_t,
}
Quantize = Callable[[nn.Module, list[Tensor]], torchquant.Report]
WAYS: dict[str, Quantize] = {
    "W4A4": lambda m, x: torchquant.quantize_(m, "W4A4", x, method="gptq", progress=False),
    "W4A8": lambda m, x: torchquant.quantize_(m, "W4A8", x, method="rtn", progress=False),
    "repq_vit": lambda m, x: repq_vit(m, x, "W4A4", progress=False),
    "erq": lambda m, x: erq(m, x, "W4A4", progress=False),
    "is_vit": lambda m, x: is_vit(m, x, "W4A4", sos=Training(iterations=2, batch=2), progress=False),
}
WIDE = ("HF ViT-B", "timm ViT-B")  # layers of 3072 inputs: the cheapest way is enough
CASES = [(m, way) for m in MODELS for way in WAYS if FULL or m not in WIDE or way == "W4A8"]


def build(name: str) -> nn.Module:
    """Attention of a fresh network is all but uniform; larger weights make rows that differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name]().eval()
    with torch.no_grad():
        for layer in (module for module in model.modules() if isinstance(module, nn.Linear)):
            layer.weight *= 2
    return model


def pictures_for(name: str, count: int = 4) -> Tensor:
    side = SWIN_SIDE if "Swin" in name else SIDE
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def blocks_of(name: str) -> int:
    return sum(STAGES) if "Swin" in name else BLOCKS


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize(("name", "way"), CASES, ids=lambda part: part.replace(" ", "-"))
def test_every_layer_and_every_operand_of_attention_is_quantized(name: str, way: str) -> None:
    model, x = build(name), pictures_for(name)
    before = output(model, x)
    report = WAYS[way](model, [x[:2], x[2:]])
    after = output(model, x)
    assert [(layer.name, layer.status) for layer in report.layers if layer.status != "ok"] == []
    products = [module for module in model.modules() if isinstance(module, QAttention)]
    assert len(products) == blocks_of(name)
    for point in POINTS:
        assert all(isinstance(getattr(product, point), ActivationQuantizer) for product in products), point
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    assert len(layers) == len(report.layers) and all(layer.input_quantizer is not None for layer in layers)
    assert len(report.activations) == len(layers) + len(POINTS) * len(products)
    assert not [n for n, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    assert after.shape == before.shape and bool(after.isfinite().all())
    assert 0 < float((after - before).norm() / before.norm()) < (0.4 if way == "W4A8" else 0.8)
    assert {"activations", "attention", "sensitivity"} <= report.details.keys()


@pytest.mark.parametrize("name", ["HF DeiT-S", "HF Swin-T", "timm DeiT-S", "timm Swin-T"])
def test_saved_and_loaded_into_a_fresh_network(name: str, tmp_path) -> None:
    model, x = build(name), pictures_for(name)
    WAYS["W4A8"](model, [x])
    torchquant.save(model, tmp_path)
    again = torchquant.load(tmp_path, MODELS[name]).eval()
    assert torch.equal(output(again, x), output(model, x))


@pytest.mark.parametrize("name", ["HF DeiT-S", "timm Swin-T"])
def test_exported(name: str) -> None:
    model, x = build(name), pictures_for(name, 2)
    WAYS["W4A8"](model, [x])
    program = torch.export.export(model, (x,))
    called = {str(node.target) for node in program.graph.nodes}  # though the LayerNorms' parameters ask for gradients
    assert {"torchquant.quantized_linear.default", "torchquant.quantized_attention.default"} <= called
    assert torch.equal(program.module()(x), output(model, x))
