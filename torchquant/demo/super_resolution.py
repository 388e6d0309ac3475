"""A small EDSR (1707.02921), trained on the spot on scikit-image's bundled pictures, that doubles a picture's size."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import seeded
from .trained import content_key, trained

SCALE = 2
# In scikit-image's wheel, so that nothing is downloaded.
TRAINING = (
    "motorcycle_left.png", "rocket.jpg", "retina.jpg", "ihc.png", "hubble_deep_field.jpg", "brick.png", "grass.png",
    "gravel.png", "coins.png", "moon.png", "page.png", "text.png", "cell.png", "clock_motion.png",
)  # fmt: skip
UNSEEN = ("astronaut.png", "chelsea.png", "coffee.png", "camera.png")
CHANNELS, BLOCKS = 32, 8
STEPS, BATCH, PATCH, RATE = 1500, 8, 32, 1e-3  # patches are measured in the small picture
CALIBRATION_PATCHES = 32
PROTOCOL = (
    f"x{SCALE}, PSNR / SSIM on the Y channel (ITU-R BT.601, 16..235) of 8-bit pictures, {SCALE} pixels cropped at each "
    "border; small pictures by Pillow's bicubic filter; SSIM with an 11x11 Gaussian window, sigma 1.5; mean over "
    f"{', '.join(UNSEEN)} (not trained on)"
)


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


class SmallEDSR(nn.Module):
    """``[B, 3, H, W]`` in 0..1 -> ``[B, 3, 2H, 2W]``: EDSR with 32 channels and 8 blocks instead of 64 and 16."""

    def __init__(self, channels: int = CHANNELS, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.Sequential(
            *[Block(channels) for _ in range(blocks)], nn.Conv2d(channels, channels, 3, padding=1)
        )
        self.upsampler = nn.Sequential(nn.Conv2d(channels, SCALE**2 * channels, 3, padding=1), nn.PixelShuffle(SCALE))
        self.tail = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x - 0.5)
        return self.tail(self.upsampler(x + self.body(x))) + 0.5


@dataclass
class Picture:
    name: str
    large: Tensor  # [3, 2H, 2W] in 0..1
    small: Tensor  # [3, H, W]


def picture(name: str) -> Picture:
    import numpy
    from PIL import Image
    from skimage import data

    large = Image.open(Path(data.__file__).parent / name).convert("RGB")
    width, height = (side - side % SCALE for side in large.size)
    large = large.crop((0, 0, width, height))
    small = large.resize((width // SCALE, height // SCALE), Image.Resampling.BICUBIC)
    tensors = [torch.from_numpy(numpy.array(p)).permute(2, 0, 1).float() / 255 for p in (large, small)]
    return Picture(name, *tensors)


def middle(source: Picture, side: int) -> Picture:
    """The middle ``side x side`` pixels of the small picture, and what belongs to them."""
    top, left = ((length - side) // 2 for length in source.small.shape[1:])
    large = source.large[:, SCALE * top : SCALE * (top + side), SCALE * left : SCALE * (left + side)]
    return Picture(source.name, large, source.small[:, top : top + side, left : left + side])


def bicubic(small: Tensor) -> Tensor:
    """What every method must beat: ``[3, H, W]`` -> ``[3, 2H, 2W]``."""
    import numpy
    from PIL import Image

    pixels = (small * 255).round().byte().permute(1, 2, 0).numpy()
    large = Image.fromarray(pixels).resize((SCALE * small.shape[2], SCALE * small.shape[1]), Image.Resampling.BICUBIC)
    return torch.from_numpy(numpy.array(large)).permute(2, 0, 1).float() / 255


# --- training ---


def patches(pictures: Sequence[Picture], count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random pieces, mirrored and turned: ``[count, 3, size, size]`` and ``[count, 3, 2 size, 2 size]``."""
    small: list[Tensor] = []
    large: list[Tensor] = []
    for _ in range(count):
        source = pictures[int(torch.randint(len(pictures), (), generator=generator))]
        turns = int(torch.randint(4, (), generator=generator))
        mirrored = bool(torch.randint(2, (), generator=generator))
        top, left = (int(torch.randint(side - size + 1, (), generator=generator)) for side in source.small.shape[1:])
        for kept, whole, factor in ((small, source.small, 1), (large, source.large, SCALE)):
            y, x, length = top * factor, left * factor, size * factor
            piece = whole[:, y : y + length, x : x + length].rot90(turns, (1, 2))
            kept.append(piece.flip(2) if mirrored else piece)
    return torch.stack(small), torch.stack(large)


def train(pictures: Sequence[Picture], *, steps: int, seed: int, blocks: int = BLOCKS) -> SmallEDSR:
    with seeded(seed):
        model = SmallEDSR(blocks=blocks)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for _ in range(steps):
        small, large = patches(pictures, BATCH, PATCH, generator)
        loss = F.l1_loss(model(small), large)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def load(cache: Path | None, *, steps: int = STEPS, seed: int = 0, blocks: int = BLOCKS) -> tuple[nn.Module, Tensor]:
    """The trained network, from ``cache`` if it was trained before, and patches ``[32, 3, 32, 32]`` to calibrate on."""
    pictures = [picture(name) for name in TRAINING]
    settings = {"steps": steps, "seed": seed, "blocks": blocks, "batch": BATCH, "patch": PATCH, "rate": RATE}
    key = content_key(settings, [Block, SmallEDSR, patches, train], [p.large for p in pictures])
    model = trained(
        "edsr",
        key,
        lambda: SmallEDSR(blocks=blocks),
        lambda: train(pictures, steps=steps, seed=seed, blocks=blocks),
        cache,
    )
    calibration, _ = patches(pictures, CALIBRATION_PATCHES, PATCH, torch.Generator().manual_seed(seed + 1))
    return model, calibration


# --- judging ---


def luma(x: Tensor) -> Tensor:
    """Y of ``[3, H, W]`` in 0..1 after rounding to 8 bits, borders cropped, ``[H', W']`` float64 in 16..235."""
    red, green, blue = ((x.clamp(0, 1) * 255).round().double() / 255)[:, SCALE:-SCALE, SCALE:-SCALE]
    return 16 + 65.481 * red + 128.553 * green + 24.966 * blue


def psnr(x: Tensor, wanted: Tensor) -> float:
    error = (luma(x) - luma(wanted)).square().mean()
    return float(10 * torch.log10(255**2 / error))


def ssim(x: Tensor, wanted: Tensor) -> float:
    a, b = luma(x)[None, None], luma(wanted)[None, None]
    distance = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-distance.square() / (2 * 1.5**2))
    window = (line[:, None] * line)[None, None] / line.sum() ** 2
    mean_a, mean_b, square_a, square_b, product = (F.conv2d(t, window) for t in (a, b, a * a, b * b, a * b))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    variances, covariance = square_a - mean_a**2 + square_b - mean_b**2, product - mean_a * mean_b
    above = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float((above / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))).mean())


@torch.no_grad()
def judge(model: nn.Module | None, pictures: Sequence[Picture]) -> dict[str, float]:
    """Means over the pictures; None: bicubic interpolation."""
    made = [bicubic(p.small) if model is None else model(p.small[None])[0] for p in pictures]
    return {
        "PSNR": sum(psnr(x, p.large) for x, p in zip(made, pictures, strict=True)) / len(pictures),
        "SSIM": sum(ssim(x, p.large) for x, p in zip(made, pictures, strict=True)) / len(pictures),
    }
