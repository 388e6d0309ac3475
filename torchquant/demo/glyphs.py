"""Pictures of characters in many type faces: what the glyph networks are trained and judged on.

Every face comes inside a pip package (matplotlib's own and the font-* packages of the ``demo`` extra), so the pictures
are the same wherever Pillow is. The families that judge were never trained on.
"""

import importlib.util
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!#%&()*+-/=?@[]"
SIZE = 24  # pixels a side of a picture
FINE = 96  # pixels a side of an undistorted glyph
EM = 64  # pixels of the type size in it
MATPLOTLIB = "matplotlib/mpl-data/fonts/ttf"
TRAINING_FACES = {
    MATPLOTLIB: (
        "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf", "DejaVuSans-BoldOblique.ttf",
        "DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf", "DejaVuSansMono-Oblique.ttf",
        "DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSerif-Italic.ttf",
        "STIXGeneral.ttf", "STIXGeneralBol.ttf", "STIXGeneralItalic.ttf", "STIXGeneralBolIta.ttf",
        "cmr10.ttf", "cmb10.ttf", "cmss10.ttf", "cmtt10.ttf",
    ),
    "font_source_sans_pro/files": tuple(
        f"SourceSansPro-{style}.ttf" for style in ("Light", "Regular", "Bold", "Black", "LightIt", "It", "BoldIt")
    ),
}  # fmt: skip
JUDGING_FACES = {
    "font_caladea/files": tuple(f"Caladea-{style}.ttf" for style in ("Regular", "Bold", "Italic", "BoldItalic")),
    "font_hanken_grotesk/files": tuple(
        f"HankenGrotesk-{style}.otf" for style in ("Light", "Regular", "Bold", "Italic", "BoldItalic")
    ),
    "font_source_serif_pro/files": tuple(
        f"SourceSerifPro-{style}.ttf" for style in ("Light", "Regular", "Bold", "It", "BoldIt")
    ),
}


def face_files(faces: dict[str, tuple[str, ...]]) -> list[Path]:
    """The files of ``faces``, ``{package/folder: names}``, in the given order.

    Raises:
        FileNotFoundError: a package is not installed, or does not hold the file.
    """
    files = []
    for where, names in faces.items():
        package, _, folder = where.partition("/")
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            raise FileNotFoundError(f"glyphs: package {package} is not installed; it comes with torchquant[demo]")
        files += [Path(found.origin).parent / folder / name for name in names]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"glyphs: no such font file: {', '.join(missing)}")
    return files


@lru_cache(maxsize=2)
def atlas(judging: bool) -> Tensor:
    """Every character in every face, ink 1 on paper 0: float32 ``[faces, characters, FINE, FINE]``."""
    from PIL import Image, ImageDraw, ImageFont

    pictures = []
    for path in face_files(JUDGING_FACES if judging else TRAINING_FACES):
        face = ImageFont.truetype(str(path), EM)
        for character in CHARACTERS:
            picture = Image.new("L", (FINE, FINE))
            # All on one base line: a small o differs from a capital O in nothing else.
            ImageDraw.Draw(picture).text((FINE / 2, 0.7 * FINE), character, fill=255, font=face, anchor="ms")
            pictures.append(torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8))
    return torch.stack(pictures).view(-1, len(CHARACTERS), FINE, FINE).float() / 255


def pictures(count: int, generator: torch.Generator, *, judging: bool = False) -> tuple[Tensor, Tensor]:
    """``count`` random glyphs, distorted, ``[count, 1, SIZE, SIZE]`` in about -1..1, and their classes ``[count]``."""
    glyphs = atlas(judging)
    face = torch.randint(len(glyphs), (count,), generator=generator)
    label = torch.randint(len(CHARACTERS), (count,), generator=generator)
    return distorted(glyphs[face, label], generator), label


def distorted(glyphs: Tensor, generator: torch.Generator) -> Tensor:
    """Rotated (12 degrees at most), scaled, sheared and moved a little, reduced to SIZE, then contrast and noise."""
    count = len(glyphs)

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    angle, shear = between(-0.21, 0.21), between(-0.2, 0.2)
    wide, high = between(0.7, 1.0), between(0.7, 1.0)  # of the paper that is seen: the glyph grows by the inverse
    cos, sin = angle.cos(), angle.sin()
    rows = [cos * wide, (shear * cos - sin) * high, between(-0.1, 0.1)]
    rows += [sin * wide, (shear * sin + cos) * high, between(-0.1, 0.1)]
    affine = torch.stack(rows, 1).view(count, 2, 3)
    grid = F.affine_grid(affine, [count, 1, 2 * SIZE, 2 * SIZE], align_corners=False)
    small = F.avg_pool2d(F.grid_sample(glyphs[:, None], grid, align_corners=False), 2)
    ink, paper = between(0.5, 1.0).view(-1, 1, 1, 1), between(-1.0, -0.5).view(-1, 1, 1, 1)
    noise = 0.1 * torch.randn(small.shape, generator=generator)
    return paper + (ink - paper) * small + noise
