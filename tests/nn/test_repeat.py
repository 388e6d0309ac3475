"""Repeated calls: what forward would give, as long as nothing has changed that it looks at."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from helpers import assert_same, random
from nn.test_mlp import Mlp
from small_models import run
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from torchquant.nn import QLinear
from torchquant.nn.quantizers import DynamicQuantizer, UniformQuantizer
from torchquant.nn.repeat import OperatorCalls, RepeatedCall


class Counted(QLinear):
    """Says how often Python computed an output."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = []

    def forward(self, x):
        self.calls.append(1)
        return super().forward(x)


def layer(columns=32, rows=20, quantizer=True):
    codes = torch.randint(0, 16, (rows, columns), generator=random(0), dtype=torch.uint8)
    scale = 0.01 + torch.rand(rows, 1, generator=random(1)) / 50
    made = Counted.from_float(nn.Linear(columns, rows), codes, scale, torch.full((rows, 1), 8.0), 4).eval()
    if quantizer:
        made.input_quantizer = UniformQuantizer(8, torch.tensor(0.03), torch.tensor(128.0))
    return made


def inputs(*shape, seed=3):
    return torch.randn(shape or (5, 32), generator=random(seed))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def is_repeated(module, x):
    """Whether module(x) comes without forward; it must be what forward gives."""
    wanted = module.forward(x)
    before = len(module.calls)
    assert_same(module(x), wanted)
    return len(module.calls) == before


@torch.no_grad()
def settled(**kwargs):
    module, x = layer(**kwargs), inputs()
    for _ in range(2):
        module(x)
    assert is_repeated(module, x)
    return module


def test_the_second_call_is_watched_and_the_third_repeated():
    module, x = layer(), inputs()
    assert [is_repeated(module, x) for _ in range(4)] == [False, False, True, True]
    assert is_repeated(module, inputs(seed=4))


@pytest.mark.parametrize(
    "x", [inputs(6, 32), inputs(5, 1, 32), inputs().half(), inputs().double(), inputs().to(torch.float64)[:1]]
)
def test_other_inputs_are_computed(x):
    module = settled()
    assert not is_repeated(module, x) and is_repeated(module, inputs())


def test_another_kind_of_input_takes_over():
    module, x = settled(), inputs(1, 32)
    assert [is_repeated(module, x) for _ in range(4)] == [False, False, True, True]  # calls 3 to 6, watched: 4
    assert not is_repeated(module, inputs())


def set_output_grid(module):
    module.output_scale, module.output_zero_point = torch.tensor(0.1), torch.tensor(128.0)


CHANGES = {
    "a buffer": lambda m: setattr(m, "bias", m.bias + 1),
    "a buffer in the dict": lambda m: m._buffers.update(bias=m.bias + 1),
    "the quantizer's buffer": lambda m: setattr(m.input_quantizer, "scale", torch.tensor(0.1)),
    "the quantizer's bits": lambda m: setattr(m.input_quantizer, "bits", 4),
    "the quantizer": lambda m: setattr(m, "input_quantizer", DynamicQuantizer(8)),
    "no quantizer": lambda m: setattr(m, "input_quantizer", None),
    "codes as outputs": set_output_grid,
    "an attribute": lambda m: setattr(m, "output_bits", 4),
    "its own forward": lambda m: setattr(m, "forward", lambda x: m.calls.append(1) or x + 1),
    "training": lambda m: m.train(),
    "a dtype": lambda m: m.half(),
    "a hook": lambda m: m.register_forward_hook(lambda *_: None),
    "a hook ahead": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "a hook inside": lambda m: m.input_quantizer.register_forward_hook(lambda *_: None),
    "loaded": lambda m: m.load_state_dict({k: v + 1 if k == "bias" else v for k, v in m.state_dict().items()}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_noticed(name):
    module, x = settled(), inputs()
    CHANGES[name](module)
    assert not is_repeated(module, x)
    again = [is_repeated(module, x) for _ in range(3)]
    assert again[-1] or name == "its own forward"


def test_hooks_of_all_modules_see_every_call():
    module, x, seen = settled(), inputs(), []
    for register in (register_module_forward_hook, register_module_forward_pre_hook):
        handle = register(lambda m, *_: seen.append(m is module))
        module(x)
        handle.remove()
    assert seen.count(True) == 2


def test_new_contents_of_a_tensor_are_seen():
    module, x = settled(), inputs()
    before = module(x)
    module.bias.add_(1)
    module.input_quantizer.scale.mul_(2)
    assert is_repeated(module, x) and not torch.equal(module(x), before)


def test_tensors_lent_for_one_call():
    module, x = settled(), inputs()
    before, calls = module(x), len(module.calls)
    other = torch.func.functional_call(module, {"bias": module.bias + 1}, (x,))
    torch.testing.assert_close(other, before + 1)
    assert len(module.calls) == calls + 1
    assert_same(module(x), before)


def test_gradients_and_inference_mode():
    module, x = settled(), inputs()
    with torch.enable_grad():
        assert not is_repeated(module, x)
        assert settled(quantizer=False)(x.clone().requires_grad_()).requires_grad
    with torch.inference_mode():
        assert is_repeated(module, x)  # a tensor from outside
        inside = [is_repeated(module, inputs()) for _ in range(8)]
        assert not inside[0] and inside[-1]


def test_modes_see_every_call():
    module, x = settled(), inputs()

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    for mode in (Functions(), OperatorCalls()):
        with mode:
            assert not is_repeated(module, x)
    with OperatorCalls() as seen:
        module(x)
    assert [str(call[0]) for call in seen.calls] == ["torchquant.quantized_linear.default"]


def test_traces_have_the_operator():
    module, x = settled(), inputs()
    traced = torch.jit.trace(module, (x,))
    assert "quantized_linear" in str(traced.inlined_graph)
    assert_same(traced(2 * x), module(2 * x))


def test_subclasses_of_tensors_are_computed():
    class Other(torch.Tensor):
        pass

    module = settled()
    before = len(module.calls)
    assert type(module(inputs().as_subclass(Other))) is Other and len(module.calls) == before + 1


def test_errors_are_those_of_forward():
    module, bad = settled(), inputs() / 0
    with pytest.raises(ValueError, match="quantized_linear: x must be finite"):
        module(bad)
    assert is_repeated(module, inputs())


def test_copies_find_out_for_themselves():
    module, x = settled(), inputs()
    for twin in (copy.deepcopy(module), copy.copy(module), pickle.loads(pickle.dumps(module))):
        assert not is_repeated(twin, x)
        twin.output_scale, twin.output_zero_point = torch.tensor(0.1), torch.tensor(128.0)
        twin.output_bits = 4
        assert not is_repeated(twin, x)


def test_several_operators_are_never_repeated():
    module = layer()
    module.input_quantizer = DynamicQuantizer(8, "tensor")
    assert not any(is_repeated(module, inputs()) for _ in range(20))


def test_without_a_quantizer_and_with_grids_of_tokens():
    module, x = settled(quantizer=False), inputs()
    module.input_quantizer = DynamicQuantizer(8)
    assert [is_repeated(module, x) for _ in range(4)] == [False, False, True, True]


def test_a_module_goes_when_its_last_reference_goes():
    module = settled()
    gone = weakref.ref(module)
    gc.disable()
    try:
        del module
        assert gone() is None
    finally:
        gc.enable()


def test_a_module_that_knows_its_owner_is_collected():
    module = settled()
    module.input_quantizer.__dict__["owner"] = module
    module(inputs())
    module(inputs()), module(inputs())
    assert is_repeated(module, inputs())
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


def test_threads_share_a_module():
    module, xs = settled(), [inputs(seed=seed) for seed in range(8)]
    wanted, found = [module(x) for x in xs], [None] * 8

    def work(i):
        with torch.no_grad():
            for _ in range(50):
                found[i] = module(xs[i])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert_same(found, wanted)


def test_what_lies_inside_a_fused_module():
    """Of an MLP only the outermost call is made; a hook anywhere inside brings all of them back."""
    model = nn.Sequential(Mlp(), nn.LayerNorm(24)).eval()
    xs = [torch.randn(2, 40, 24, generator=random(seed)) for seed in range(3)]
    run(model, "W4A8", xs, method="rtn")
    wanted = model(xs[0])
    for _ in range(3):
        assert_same(model(xs[0]), wanted)
    mlp = model[0]
    assert isinstance(mlp, RepeatedCall) and mlp.repeat(mlp, xs[0]) is not None
    seen = []
    for part in (mlp.act, mlp.fc1, mlp.fc2.input_quantizer):
        handle = part.register_forward_hook(lambda *_: seen.append(1))
        model(xs[0])
        assert mlp.repeat(mlp, xs[0]) is None
        handle.remove()
    assert len(seen) == 2  # the quantizer's work is done in the kernel
    mlp.fc2 = nn.Linear(50, 24)
    assert not torch.equal(model(xs[0]), wanted)
