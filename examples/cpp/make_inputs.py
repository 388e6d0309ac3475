"""Writes what quantize_layer.cpp reads: layer.pt, a layer that Python quantized; cnn.pt and vit.pt, quantized models.

usage: make_inputs.py FOLDER
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import torchquant
from torchquant.demo.digits_vit import DigitsViT

BITS, GROUP_SIZE = 3, 48


def quantized_layer(generator: torch.Generator) -> dict[str, Tensor]:
    """A layer, its correlated inputs, and what Python made of them."""
    weight = torch.randn(96, 120, generator=generator)
    inputs = torch.randn(700, 120, generator=generator) @ torch.randn(120, 120, generator=generator)
    gram = torch.zeros(120, 120)
    torchquant.gram_accumulate_(gram, inputs)
    codes, scale, zero_point, _ = torchquant.comq_quantize(weight, gram, bits=BITS, group_size=GROUP_SIZE)
    numbers = {"bits": torch.tensor(BITS), "group_size": torch.tensor(GROUP_SIZE)}
    made = {"gram": gram, "codes": codes, "scale": scale, "zero_point": zero_point}
    return {"weight": weight, "inputs": inputs, **made, **numbers}


def quantized_cnn() -> tuple[nn.Module, Tensor]:
    """Weights of 4 bits, depthwise convolution included, and an input."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 8 * 8, 10),
    ).eval()
    torchquant.quantize_(model, "W4A16", [torch.randn(8, 3, 16, 16) for _ in range(4)], method="comq", progress=False)
    return model, torch.randn(4, 3, 16, 16)


def quantized_vit() -> tuple[nn.Module, Tensor]:
    """Weights of 4 bits and activations of 8, those of attention included, and an input."""
    model = DigitsViT(dim=32, depth=2, heads=2).eval()
    torchquant.quantize_(model, "W4A8", [torch.rand(16, 8, 8) for _ in range(4)], method="rtn", progress=False)
    return model, torch.rand(5, 8, 8)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    tensors = quantized_layer(torch.Generator().manual_seed(0))
    for name, (model, x) in {"cnn": quantized_cnn(), "vit": quantized_vit()}.items():
        with torch.inference_mode():
            tensors[f"{name}_inputs"], tensors[f"{name}_outputs"] = x, model(x).clone()
        torch.jit.script(model).save(str(folder / f"{name}.pt"))
    torch.save(tensors, folder / "layer.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
