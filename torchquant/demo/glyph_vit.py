"""A vision transformer that reads single characters, trained on the spot in under five minutes on two cores."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import glyphs
from .case import Case, batches, seeded
from .digits_vit import Block
from .trained import content_key, trained

PATCH = 4
STEPS = 2600
BATCH = 64
CALIBRATION = 512  # pictures, in the faces that were trained on
JUDGED = 4000  # pictures, in faces that were not
JUDGED_SEED = 1_000_003  # the same pictures judge every network


class GlyphViT(nn.Module):
    """Pictures ``[B, 1, 24, 24]`` -> logits ``[B, 77]``; 36 overlapping patches, one every 4 pixels."""

    def __init__(self, dim: int = 64, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        tokens = (glyphs.SIZE // PATCH) ** 2
        self.embed = nn.Conv2d(1, dim, 2 * PATCH, PATCH, PATCH // 2)
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, dim))
        self.blocks = nn.Sequential(*[Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, len(glyphs.CHARACTERS))

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.blocks(self.embed(pictures).flatten(2).transpose(1, 2) + self.position)
        return self.head(self.norm(x).mean(1))


def train(make: Callable[[], nn.Module], *, steps: int, seed: int, rate: float = 3e-3) -> nn.Module:
    """``make()`` trained to name the glyph of a picture; the same weights for the same seed."""
    with seeded(seed):
        model = make()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.15)
    for _ in range(steps):
        pictures, labels = glyphs.pictures(BATCH, generator)
        loss = F.cross_entropy(model(pictures), labels, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def load(seed: int = 0, steps: int = STEPS, cache: Path | None = None, judged: int = JUDGED) -> Case:
    """The network of a seed, from ``cache`` if it was trained before."""
    settings = {"steps": steps, "seed": seed}
    code = (GlyphViT, Block, train, glyphs.pictures, glyphs.distorted)
    key = content_key(settings, code, [glyphs.atlas(False)])
    model = trained("glyph-vit", key, GlyphViT, lambda: train(GlyphViT, steps=steps, seed=seed), cache)
    return glyph_case("glyph ViT", "64 channels, 4 blocks", model, steps, seed, judged)


def glyph_case(name: str, about: str, model: nn.Module, steps: int, seed: int, judged: int) -> Case:
    """What any network that reads glyphs is calibrated and judged on."""
    tests, answers = glyphs.pictures(judged, torch.Generator().manual_seed(JUDGED_SEED), judging=True)
    with torch.no_grad():
        reference = in_parts(model, tests).log_softmax(1)

    def judge(candidate: nn.Module) -> dict[str, float]:
        logits = in_parts(candidate, tests)
        accuracy = 100 * (logits.argmax(1) == answers).float().mean().item()
        divergence = F.kl_div(logits.log_softmax(1), reference, reduction="batchmean", log_target=True).item()
        return {"accuracy %": accuracy, "KL": divergence}

    calibration, _ = glyphs.pictures(CALIBRATION, torch.Generator().manual_seed(10_000 + seed))
    return Case(
        name=name,
        about=f"{about}, {steps} steps on {len(glyphs.CHARACTERS)} characters in {len(glyphs.atlas(False))} faces; "
        f"calibrated on {CALIBRATION} pictures, judged on {judged} in {len(glyphs.atlas(True))} other faces",
        model=model,
        calibration=batches(calibration, 32),
        judge=judge,
    )


def in_parts(model: nn.Module, pictures: Tensor) -> Tensor:
    return torch.cat([model(part) for part in pictures.split(250)])
