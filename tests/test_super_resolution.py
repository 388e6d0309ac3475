"""The super-resolution demonstration: figures against scikit-image's, patches, training, and the whole run cut down."""

import json

import pytest
import torch

pytest.importorskip("skimage")

from torchquant.cli import main
from torchquant.demo import compare_super_resolution
from torchquant.demo import super_resolution as sr


def test_figures_are_those_of_scikit_image():
    from skimage.color import rgb2ycbcr
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    source = sr.picture("chelsea.png")
    other = sr.bicubic(source.small)
    planes = []
    for x in (other, source.large):
        pixels = (x * 255).round().byte().permute(1, 2, 0).numpy()
        planes.append(rgb2ycbcr(pixels)[2:-2, 2:-2, 0])
    assert sr.psnr(other, source.large) == pytest.approx(peak_signal_noise_ratio(*planes, data_range=255), abs=1e-3)
    wanted = structural_similarity(
        *planes, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert sr.ssim(other, source.large) == pytest.approx(wanted, abs=1e-3)
    assert sr.ssim(source.large, source.large) == pytest.approx(1)


def test_pictures_to_judge_on_are_not_trained_on():
    assert not set(sr.TRAINING) & set(sr.UNSEEN)
    assert "motorcycle_right.png" not in sr.UNSEEN  # the other eye of a training picture


def test_patches_show_the_same_place_in_both_sizes():
    pictures = [sr.picture(name) for name in ("rocket.jpg", "coins.png")]
    small, large = sr.patches(pictures, 20, 16, torch.Generator().manual_seed(0))
    assert small.shape == (20, 3, 16, 16) and large.shape == (20, 3, 32, 32)
    shrunk = torch.nn.functional.avg_pool2d(large, 2)
    assert (shrunk - small).abs().mean() < 0.02
    assert (shrunk.flip(3) - small).abs().mean() > 0.03


def test_training_is_repeatable_and_kept(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, calibration = sr.load(tmp_path, steps=3, blocks=1)
    assert torch.equal(torch.rand(3), expected)
    second, same = sr.load(None, steps=3, blocks=1)
    again, _ = sr.load(tmp_path, steps=3, blocks=1)
    for other in (second, again):
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    assert torch.equal(calibration, same) and calibration.shape == (32, 3, 32, 32)
    assert len(list(tmp_path.iterdir())) == 1


def test_the_command_writes_its_tables(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(compare_super_resolution.SAME_VALUES, "max_values", 64)
    assert main(["demo", "--sr", "--quick", "--bits", "4", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert sr.PROTOCOL in printed and "DFSQ, published" in printed and "PASS" in printed
    found = json.loads((tmp_path / "sr.json").read_text())
    assert [r["method"] for r in found["results"]] == [
        "min-max", "percentile", "DFSQ, published", "DFSQ, static", "DFSQ", "DFSQ, gptq+comq",
    ]  # fmt: skip
    assert all(15 < r["PSNR"] < 50 and 0 < r["SSIM"] < 1 for r in found["results"])
    (selection,) = found["selection"]
    assert selection["passed"] and len(selection["ratios"]) == 3 and min(selection["ratios"].values()) >= 1
    page = (tmp_path / "sr.html").read_text()
    assert "Selection of levels" in page and "chelsea.png" in page and "DFSQ at 4 bits, layer by layer" in page
