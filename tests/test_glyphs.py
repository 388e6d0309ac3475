"""Pictures of characters, the networks that read them, and networks that are kept once trained."""

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")
pytest.importorskip("font_caladea")

from torchquant.demo import glyph_vit, glyphs
from torchquant.demo.trained import content_key, trained


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_faces_that_judge_are_not_trained_on():
    training, judging = glyphs.face_files(glyphs.TRAINING_FACES), glyphs.face_files(glyphs.JUDGING_FACES)
    assert len(training) == 25 and len(judging) == 14
    assert not {path.name.split("-")[0] for path in training} & {path.name.split("-")[0] for path in judging}


@pytest.mark.parametrize("judging", [False, True])
def test_every_character_of_every_face_is_drawn_inside_its_paper(judging):
    atlas = glyphs.atlas(judging)
    assert atlas.flatten(2).sum(2).min() > 20  # the thinnest hyphen
    edge = torch.cat([atlas[..., 0, :], atlas[..., -1, :], atlas[..., 0], atlas[..., -1]], -1)
    assert edge.sum() == 0
    for face in atlas:  # no character is another one's twin
        assert len({picture.numpy().tobytes() for picture in face}) == len(glyphs.CHARACTERS)


def test_pictures_follow_from_the_seed():
    first, labels = glyphs.pictures(64, generator(3))
    again, _ = glyphs.pictures(64, generator(3))
    assert torch.equal(first, again) and not torch.equal(first, glyphs.pictures(64, generator(4))[0])
    assert first.shape == (64, 1, glyphs.SIZE, glyphs.SIZE) and first.isfinite().all()
    assert labels.min() >= 0 and labels.max() < len(glyphs.CHARACTERS)


def test_a_missing_package_is_named():
    with pytest.raises(FileNotFoundError, match=r"package no_such_fonts is not installed; it comes with"):
        glyphs.face_files({"no_such_fonts/files": ("A.ttf",)})
    with pytest.raises(FileNotFoundError, match=r"no such font file: Caladea-Wide\.ttf"):
        glyphs.face_files({"font_caladea/files": ("Caladea-Wide.ttf",)})


def small_vit() -> nn.Module:
    return glyph_vit.GlyphViT(dim=32, depth=1, heads=2)


def test_training_is_repeatable():
    first, second = (glyph_vit.train(small_vit, steps=3, seed=1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_the_vit_learns(monkeypatch):
    monkeypatch.setattr(glyphs, "CHARACTERS", "AX-")  # the whole task takes minutes
    glyphs.atlas.cache_clear()
    try:
        trained_one = glyph_vit.train(small_vit, steps=60, seed=1, rate=3e-3)
        pictures, labels = glyphs.pictures(256, generator(9), judging=True)
    finally:
        glyphs.atlas.cache_clear()
    with torch.no_grad():
        assert (trained_one(pictures).argmax(1) == labels).float().mean() > 0.7


def test_a_network_is_trained_once(tmp_path):
    calls = []

    def train() -> nn.Module:
        calls.append(1)
        return nn.Linear(3, 2)

    key = content_key({"steps": 1}, [generator])
    first = trained("net", key, lambda: nn.Linear(3, 2), train, tmp_path)
    second = trained("net", key, lambda: nn.Linear(3, 2), train, tmp_path)
    assert len(calls) == 1 and torch.equal(first.weight, second.weight) and not second.training
    trained("net", content_key({"steps": 2}, [generator]), lambda: nn.Linear(3, 2), train, tmp_path)
    assert len(calls) == 2


def test_the_float_network_is_judged_against_itself():
    made = glyph_vit.load(seed=0, steps=2, judged=300)
    with torch.no_grad():
        figures = made.judge(made.model)
        other = made.judge(glyph_vit.GlyphViT())
    assert figures["KL"] == pytest.approx(0, abs=1e-6) and other["KL"] > 1e-4
    assert "other faces" in made.about and sum(map(len, made.calibration)) == glyph_vit.CALIBRATION
