"""A small convolutional network that reads single characters: the glyph task for convolutions."""

from pathlib import Path

from torch import Tensor, nn

from . import glyphs
from .case import Case
from .glyph_vit import JUDGED, glyph_case, train
from .trained import content_key, trained

STEPS = 1000


class TextRecogniser(nn.Module):
    """Pictures ``[B, 1, 24, 24]`` -> logits ``[B, 77]``."""

    def __init__(self, channels: int = 24) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 1
        for outputs in (channels, 2 * channels, 4 * channels):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
            inputs = outputs
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.hidden = nn.Sequential(nn.Linear(inputs * (glyphs.SIZE // 8) ** 2, 128), nn.ReLU())
        self.head = nn.Linear(128, len(glyphs.CHARACTERS))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.hidden(self.features(pictures)))


def load(seed: int = 0, steps: int = STEPS, cache: Path | None = None, judged: int = JUDGED) -> Case:
    """The network of a seed, from ``cache`` if it was trained before."""
    code = (TextRecogniser, train, glyphs.pictures, glyphs.distorted)
    key = content_key({"steps": steps, "seed": seed}, code, [glyphs.atlas(False)])
    model = trained(
        "text-recogniser", key, TextRecogniser, lambda: train(TextRecogniser, steps=steps, seed=seed), cache
    )
    return glyph_case("text recogniser", "3 convolutions, 2 linear layers", model, steps, seed, judged)
