"""Calls of quantized modules without the Python between a module and its operator.

A pass of a small batch through a network spends as long in modules that look up their buffers and ask what they may do
as in some of its products. Most of them come down to one operator call on their input, the same every time.
"""

from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .. import _C


class RepeatedCall(nn.Module):
    """A module whose ``forward(x)``, where it was one call ``operator(x, ...)`` of ours, is that call the next time.

    Watched is the second call of a module in a state, then the fourth, the eighth and so on. What it came down to is
    repeated for inputs of the same shape, dtype and device while gradients are off. The state are the attributes,
    buffers, parameters, submodules and hooks (the very objects) of the module and of all modules in it; contents of
    tensors may change. Modes, traces and compilers see the modules as they are.
    """

    repeat: Any = None
    __jit_ignored_attributes__ = ("repeat",)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # torch.compile counts how often it compiles a code object: each class has its own.
        code = call.__code__.replace(co_name=f"call_{cls.__name__}")
        cls.__call__ = FunctionType(code, call.__globals__)  # type: ignore[method-assign]


def call(self: RepeatedCall, *args: Any, **kwargs: Any) -> Any:
    if len(args) != 1 or kwargs or torch.compiler.is_dynamo_compiling():
        return nn.Module.__call__(self, *args, **kwargs)
    x, repeat = args[0], self.repeat
    if repeat is None:
        repeat = self.repeat = _C.Repeat()
    y = repeat(self, x)
    if y is not None:
        return y
    return watched_call(self, x) if repeat.is_due(x) else nn.Module.__call__(self, x)


def watched_call(module: RepeatedCall, x: Tensor) -> Any:
    with OperatorCalls() as seen:
        y = nn.Module.__call__(module, x)
    module.repeat.keep(list(module.modules()))
    if len(seen.calls) == 1:
        operator, args, kwargs, result = seen.calls[0]
        if operator.namespace == "torchquant" and args and args[0] is x and result is y:
            schema = operator._schema
            module.repeat.keep_call(x, schema.name, schema.overload_name, args[1:], kwargs)
    return y


class OperatorCalls(TorchDispatchMode):
    """Every operator call inside that did something: operator, arguments and result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        returned = len(args) > 0 and result is args[0] and not func._schema.is_mutable  # as y.to(y.dtype) does
        if not returned:
            self.calls.append((func, args, kwargs or {}, result))
        return result
