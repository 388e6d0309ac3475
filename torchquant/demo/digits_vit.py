"""A thin vision transformer, trained on scikit-learn's handwritten digits in seconds.

It is thin on purpose: with 24 channels nothing is redundant, so the methods differ in accuracy too.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Case, batches, seeded

IMAGE, PATCH, CLASSES, TRAINED_ON = 8, 2, 10, 1000


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, dim))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class DigitsViT(nn.Module):
    """Images ``[B, 8, 8]`` in 0..1 -> logits ``[B, 10]``; 16 patches of 2x2 pixels."""

    def __init__(self, dim: int = 24, depth: int = 2, heads: int = 3) -> None:
        super().__init__()
        self.patch = PATCH  # TorchScript reads no module-level names
        tokens = (IMAGE // PATCH) ** 2
        self.embed = nn.Linear(PATCH * PATCH, dim)
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, dim))
        self.blocks = nn.Sequential(*[Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(1, self.patch, self.patch).unfold(2, self.patch, self.patch).flatten(1, 2).flatten(2)
        x = self.blocks(self.embed(patches) + self.position)
        return self.head(self.norm(x).mean(1))


def digits() -> tuple[Tensor, Tensor]:
    """All 1797 images ``[1797, 8, 8]`` and their labels, in one fixed random order."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(data.images).float()[order] / 16, torch.from_numpy(data.target)[order]


def train(images: Tensor, labels: Tensor, *, steps: int, seed: int) -> DigitsViT:
    with seeded(seed):
        model = DigitsViT()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    for _ in range(steps):
        batch = torch.randint(len(images), (64,), generator=generator)
        noise = 0.1 * torch.randn(64, IMAGE, IMAGE, generator=generator)  # 1000 images alone are learnt by heart
        loss = F.cross_entropy(model(images[batch] + noise), labels[batch], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def load(seed: int = 0, steps: int = 800) -> Case:
    images, labels = digits()
    model = train(images[:TRAINED_ON], labels[:TRAINED_ON], steps=steps, seed=seed)
    tests, answers = images[TRAINED_ON:], labels[TRAINED_ON:]

    def judge(candidate: nn.Module) -> dict[str, Any]:
        return {"accuracy %": 100 * (candidate(tests).argmax(1) == answers).float().mean().item()}

    return Case(
        name="digits ViT",
        about=f"24 channels, 2 blocks, {steps} steps on {TRAINED_ON} digits; accuracy on the other {len(tests)}",
        model=model,
        calibration=batches(images[:512], 128),
        judge=judge,
    )
