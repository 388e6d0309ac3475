"""Small models with attention of every kind that can be rewritten, random weights, and an input for each."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from torchquant.demo.digits_vit import DigitsViT


def library(name: str) -> ModuleType:
    """torchvision, or timm, which imports it. Where its own operators do not load, two schemas have to be there."""
    for operator in ("nms", "qnms"):
        try:
            pytest.importorskip("torchvision")
        except RuntimeError as error:
            if f"torchvision::{operator} does not exist" not in str(error):
                raise
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{operator}", schema)
    return pytest.importorskip(name)


def timm_vit() -> tuple[nn.Module, dict[str, Any]]:
    options = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3}
    model = library("timm").create_model("vit_tiny_patch16_224", qk_norm=True, **options)
    return model, {"x": torch.randn(2, 3, 32, 32)}


def timm_swin() -> tuple[nn.Module, dict[str, Any]]:
    options = {"img_size": 56, "depths": (2, 2), "embed_dim": 16, "num_heads": (2, 4), "num_classes": 10}
    model = library("timm").create_model("swin_tiny_patch4_window7_224", **options)
    return model, {"x": torch.randn(2, 3, 56, 56)}


def timm_beit() -> tuple[nn.Module, dict[str, Any]]:
    options = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 10}
    model = library("timm").create_model("beit_base_patch16_224", **options)
    return model, {"x": torch.randn(2, 3, 32, 32)}


def torchvision_vit() -> tuple[nn.Module, dict[str, Any]]:
    model = library("torchvision").models.VisionTransformer(32, 8, 2, 4, 32, 64)
    return model, {"x": torch.randn(2, 3, 32, 32)}


def torchvision_swin() -> tuple[nn.Module, dict[str, Any]]:
    library("torchvision")
    swin = importlib.import_module("torchvision.models.swin_transformer")
    return swin.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [7, 7]), {"x": torch.randn(2, 3, 60, 52)}  # padded windows


SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}


def hugging_face(name: str, inputs: Callable[[], dict[str, Any]], **config: Any) -> Callable[[], Any]:
    def make() -> tuple[nn.Module, dict[str, Any]]:
        transformers = pytest.importorskip("transformers")
        kind = name.split("For")[0]
        return getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**config)), inputs()

    return make


def pixels(size: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": torch.randn(2, 3, size, size)}


def words() -> dict[str, Any]:
    return {"input_ids": torch.randint(0, 50, (2, 7)), "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3])}


def demo_vit() -> tuple[nn.Module, dict[str, Any]]:
    return DigitsViT(), {"images": torch.rand(2, 8, 8)}


def encoder() -> tuple[nn.Module, dict[str, Any]]:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, 32, batch_first=True), 2)
    return model, {
        "src": torch.randn(2, 5, 24),
        "src_key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2]),
    }


PICTURES = {"image_size": 32, "patch_size": 8}
MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, dict[str, Any]]], str]] = {
    "demo ViT": (demo_vit, "QSelfAttention"),
    "encoder": (encoder, "QMultiheadAttention"),
    "timm ViT": (timm_vit, "QSelfAttention"),
    "timm Swin": (timm_swin, "QWindowAttention"),
    "timm BEiT": (timm_beit, "QFunctionalAttention"),
    "torchvision ViT": (torchvision_vit, "QMultiheadAttention"),
    "torchvision Swin": (torchvision_swin, "QShiftedWindowAttention"),
    "HF ViT": (hugging_face("ViTForImageClassification", pixels(32), **SIZES, **PICTURES), "QFunctionalAttention"),
    "HF DeiT": (hugging_face("DeiTForImageClassification", pixels(32), **SIZES, **PICTURES), "QFunctionalAttention"),
    "HF Swin": (
        hugging_face("SwinForImageClassification", pixels(56), image_size=56, embed_dim=16, depths=[2, 2],
                     num_heads=[2, 4], window_size=7),
        "QFunctionalAttention",
    ),
    "HF BERT": (hugging_face("BertForSequenceClassification", words, **SIZES, vocab_size=50), "QFunctionalAttention"),
    "HF BERT eager": (
        hugging_face("BertForSequenceClassification", words, **SIZES, vocab_size=50, attn_implementation="eager"),
        "QFunctionalAttention",
    ),
    "HF Llama": (
        hugging_face("LlamaForCausalLM", words, **SIZES | {"num_attention_heads": 4}, num_key_value_heads=2),
        "QFunctionalAttention",
    ),
}  # fmt: skip


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """In evaluation mode, with every parameter (biases, tables, norms) off its initial value."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = MODELS[name][0]()
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval(), inputs


def output(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        found = model(**inputs)
    if "src_key_padding_mask" in inputs:  # what padding gives is nobody's business
        return found[~inputs["src_key_padding_mask"]]
    return found if isinstance(found, torch.Tensor) else found.logits
