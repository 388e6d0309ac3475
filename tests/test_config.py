import pytest

from torchquant.config import COMQ, GPTQ, RTN, Activations, Auto, MagR, Scheme, method_name, parse_method


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("W4A16", Scheme(4)),
        ("w3a16g128", Scheme(3, group_size=128)),
        ("W2A16g64-sym", Scheme(2, group_size=64, symmetric=True)),
        ("W8A16-sym", Scheme(8, symmetric=True)),
        ("W4A4", Scheme(4, 4)),
        ("w3a8g32", Scheme(3, 8, 32)),
        ("W4A8g128-intscale", Scheme(4, 8, 128, integer_scales=True)),
        ("w3a16g64-sym-intscale", Scheme(3, 16, 64, True, True)),
    ],
)
def test_scheme_parses_and_prints_back(text, scheme):
    assert Scheme.parse(text) == scheme
    assert Scheme.parse(str(scheme)) == scheme
    assert Scheme.parse(scheme) is scheme


@pytest.mark.parametrize("text", ["W4", "4", "W4A16g", "W4A16-asym", "", "W4A16g128-sym "])
def test_scheme_that_is_no_scheme(text):
    with pytest.raises(ValueError, match=r"expected W<bits>A<bits>\[g<group size>\]\[-sym\]"):
        Scheme.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("W4A9", r"activation_bits must be 2..8, or 16 \(activations stay float\), got 9"),
        ("W4A1", "activation_bits must be 2..8, or 16 .* got 1"),
        ("W1A16", "weight_bits must be 2..8, got 1"),
        ("W9A16", "weight_bits must be 2..8, got 9"),
        ("W4A16-intscale", "integer_scales needs .*, got 0"),
        ("W4A16g100-intscale", "integer_scales needs .*, got 100"),
        ("W4A16g1024-intscale", "integer_scales needs .*, got 1024"),
    ],
)
def test_scheme_out_of_range(text, message):
    with pytest.raises(ValueError, match=message):
        Scheme.parse(text)


CONFIGS = [
    Scheme(3, group_size=32),
    Scheme(4, 8, 128, integer_scales=True),
    RTN(),
    MagR(alpha=1e-4),
    COMQ(sweeps=2, shrink=(1.0, 0.8)),
    GPTQ(),
    Auto("high"),
    Activations(range="percentile"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c).__name__)
def test_configs_round_trip(config):
    written = config.to_dict()
    assert written["version"] == 1
    assert type(config).from_dict(written) == config
    assert hash(type(config).from_dict(written)) == hash(config)


def test_from_dict_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="COMQ: unknown key speed; known: sweeps, order"):
        COMQ.from_dict({**COMQ().to_dict(), "speed": 3})
    with pytest.raises(ValueError, match="COMQ: this release reads version 1, got 2"):
        COMQ.from_dict({**COMQ().to_dict(), "version": 2})
    with pytest.raises(ValueError, match="COMQ: expected kind 'COMQ', got 'GPTQ'"):
        COMQ.from_dict(GPTQ().to_dict())


@pytest.mark.parametrize(
    "name", ["rtn", "comq", "gptq", "gptq+comq", "magr+comq", "magr+gptq+comq", "magr+rtn", "auto"]
)
def test_method_names(name):
    assert method_name(parse_method(name)) == name


def test_method_lists_and_effort():
    steps = (MagR(alpha=1e-3), COMQ(sweeps=3))
    assert parse_method(list(steps)) == steps
    assert parse_method(COMQ(sweeps=1)) == (COMQ(sweeps=1),)
    assert parse_method("auto", "high") == (Auto("high"),)


@pytest.mark.parametrize("method", ["comq+gptq", "magr", "magr+auto", "rtn+comq", "auto+comq", []])
def test_orders_that_mean_nothing(method):
    with pytest.raises(ValueError, match="method: expected"):
        parse_method(method)


def test_wrong_values():
    with pytest.raises(ValueError, match="method: unknown step 'awq'"):
        parse_method("awq")
    with pytest.raises(ValueError, match="method: expected step configs"):
        parse_method([object()])
    with pytest.raises(ValueError, match="effort must be one of fast, standard, high, got 'max'"):
        parse_method("auto", "max")
    with pytest.raises(ValueError, match="COMQ: order must be one of shared, greedy, semi, cyclic, got 'random'"):
        COMQ(order="random")
    with pytest.raises(ValueError, match="COMQ: grid must be one of asymmetric"):
        COMQ(grid="log")
    with pytest.raises(
        ValueError, match="Activations: range must be one of minmax, percentile, mse, entropy, got 'max'"
    ):
        Activations(range="max")
    with pytest.raises(ValueError, match=r"Activations: percentile must be in \(0.5, 1\], got 0.1"):
        Activations(percentile=0.1)
    with pytest.raises(ValueError, match="Activations: softmax must be one of auto, sulq, .* got 'log'"):
        Activations(softmax="log")
    with pytest.raises(ValueError, match="granularity 'token' has no ranges before run time; it needs dynamic=True"):
        Activations(granularity="token")
    with pytest.raises(ValueError, match="MagR: alpha must be positive, got 0"):
        MagR(alpha=0)
