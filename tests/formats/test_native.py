"""save and load: same numbers back, and one clear error with the model untouched for every kind of damage."""

import json

import pytest
import torch
from torch import nn

from torchquant import formats, quantize_
from torchquant.nn import QConv2d, QConvTranspose2d, QLinear


class Net(nn.Module):
    """Convolutions of several kinds, a buffer, and two names for one embedding."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4, 10)
        self.embed = nn.Embedding(10, 10)
        self.tied = nn.Linear(10, 10, bias=False)
        self.tied.weight = self.embed.weight

    def forward(self, x):
        x = self.up(self.norm(self.depthwise(self.stem(x))))
        return self.tied(self.head(x.mean((2, 3))))


def make(seed=0):
    torch.manual_seed(seed)
    return Net().eval()


@pytest.fixture(name="saved")
def saved_fixture(tmp_path):
    model = make()
    quantize_(model, "W3A16g4", method="rtn", progress=False)
    formats.save(model, tmp_path / "out")
    return model, tmp_path / "out"


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def test_round_trip_into_other_weights(saved):
    model, folder = saved
    other = formats.load(folder, make(seed=1))
    assert torch.equal(other(X), model(X))
    kinds = [type(other.get_submodule(n)) for n in ("stem", "depthwise", "up", "head", "tied")]
    assert kinds == [QConv2d, QConv2d, QConvTranspose2d, QLinear, nn.Linear]
    assert other.tied.weight is other.embed.weight
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_factory_meta_device_and_a_model_already_quantized(saved):
    model, folder = saved
    with torch.device("meta"):
        empty = Net().eval()
    assert torch.equal(formats.load(folder, empty)(X), model(X))
    assert torch.equal(formats.load(folder, lambda: make(5))(X), model(X))
    assert torch.equal(formats.load(folder, model)(X), model(X))


def test_file_is_small_and_tied_weights_are_there_once(saved):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["tied"] == {"tied.weight": "embed.weight"}
    assert config["layers"]["stem"] == {"class": "QConv2d", "bits": 3, "group_size": 4, "dtype": "float32"}
    assert config["quant_method"] == "torchquant"


def test_bfloat16_stays(tmp_path):
    model = nn.Sequential(nn.Linear(8, 4)).to(torch.bfloat16)
    quantize_(model, "W4A16", method="rtn", progress=False)
    formats.save(model, tmp_path)
    other = formats.load(tmp_path, nn.Sequential(nn.Linear(8, 4)))
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    assert other[0].weight.dtype == other[0].bias.dtype == torch.bfloat16
    assert torch.equal(other(x), model(x))


def damage(folder, kind):
    tensors, config = folder / "model.safetensors", folder / "config.json"
    data = bytearray(tensors.read_bytes())
    if kind == "truncated":
        tensors.write_bytes(data[:-10])
    elif kind == "flipped":
        data[-1] ^= 1
        tensors.write_bytes(data)
    elif kind == "missing":
        tensors.unlink()
    elif kind == "garbage":
        tensors.write_bytes(b"no tensors here")
    elif kind == "config":
        config.write_text(config.read_text()[:-20])
    else:
        found = json.loads(config.read_text())
        found["quantization_config"] |= {"version": {"version": 99}, "method": {"quant_method": "gptq"}}[kind]
        config.write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "model.safetensors cannot be used: .*(incomplete|not fully covered|offset|invalid)"),
        ("flipped", "model.safetensors cannot be used: its checksum is not the one in config.json"),
        ("missing", "model.safetensors cannot be used: .*No such file"),
        ("garbage", "model.safetensors cannot be used: .*(header|Header)"),
        ("config", "config.json cannot be read"),
        ("version", "config.json has version 99, this release reads version 1"),
        ("method", "config.json has no quantization_config of quant_method 'torchquant'"),
    ],
)
def test_damage_is_one_error_and_the_model_stays(saved, kind, message):
    _, folder = saved
    damage(folder, kind)
    assert_untouched(folder, make(seed=1), message)


def assert_untouched(folder, model, message):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        formats.load(folder, model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_another_architecture(saved):
    _, folder = saved
    wide, extra, conv, less = make(), make(), make(), make()
    wide.head = nn.Linear(4, 11)
    extra.more = nn.Linear(2, 2)
    conv.head = nn.Conv2d(4, 10, 1)
    del less.norm
    assert_untouched(folder, wide, r"head.weight_packed has shape \[10, 1\], the model \[11, 1\]")
    assert_untouched(folder, extra, "more.weight is missing; more.bias is missing")
    assert_untouched(folder, conv, "layer 'head': the model holds Conv2d, the file QLinear")
    assert_untouched(folder, less, "norm.* is not in the model")
    assert_untouched(folder, nn.Sequential(), "layer 'stem': Sequential has no attribute `stem`")


def test_state_that_is_no_tensor(tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"steps": 3}

    with pytest.raises(ValueError, match="save: 0._extra_state is no tensor but dict"):
        formats.save(nn.Sequential(Odd(2, 2)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_files(saved, monkeypatch):
    model, folder = saved
    before = (folder / "model.safetensors").read_bytes()
    monkeypatch.setattr(formats.native, "same_bits", lambda found, wanted: False)
    with pytest.raises(ValueError, match="does not read back as written: stem.weight_packed"):
        formats.save(model, folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert len(list(folder.iterdir())) == 2
