"""Which modules read what other modules made, seen in one run of a model."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .calibrate import tensors_of

SHAPES_ONLY = ("__get__", "size", "dim")  # what these read is no value


@dataclass(frozen=True, eq=False)
class Call:
    module: nn.Module
    input: Tensor
    output: Tensor

    @property
    def in_place(self) -> bool:
        return self.input is self.output


class Dataflow:
    """The calls of some modules, in order, and who read their outputs."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.outputs: list[Tensor] = []  # of the model
        self._readers: dict[int, list[Call | None]] = {}  # of outputs, which are kept: nothing else can have their ids

    def calls_of(self, module: nn.Module) -> list[Call]:
        return [call for call in self.calls if call.module is module]

    def readers(self, call: Call) -> list[Call | None]:
        """Of the call's output, in order; None: something that is none of the modules."""
        readers = self._readers.get(id(call.output), [])
        return readers[readers.index(call) + 1 :] if call.in_place else readers

    def only_reader(self, call: Call) -> Call | None:
        """The module call that alone reads the output: with what it writes in place as its own output."""
        readers = self.readers(call)
        first = readers[0] if readers else None
        return first if first is not None and (len(readers) == 1 or first.in_place) else None


def watch(modules: Collection[nn.Module], call: Callable[[], Any]) -> Dataflow:
    """Run ``call()`` and note what ``modules`` read and make. What happens inside of one of them counts as its own."""
    watching = _Watching()
    with watching.on(modules), watching:
        watching.flow.outputs = list(tensors_of(call()))
    watching.note(watching.flow.outputs, None)
    return watching.flow


class _Watching(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.flow = Dataflow()
        self.depth = 0  # of calls of the modules

    def note(self, read: Any, reader: Call | None) -> None:
        for x in tensors_of(read):
            if id(x) in self.flow._readers:
                self.flow._readers[id(x)].append(reader)

    @contextmanager
    def on(self, modules: Collection[nn.Module]) -> Iterator[None]:
        def enter(module: nn.Module, args: Any) -> None:
            self.depth += 1

        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.depth -= 1
            if self.depth > 0:
                return
            read = list(tensors_of((args, kwargs)))
            if len(read) != 1 or not args or read[0] is not args[0] or not isinstance(output, Tensor):
                return self.note(read, None)
            call = Call(module, read[0], output)
            self.note(read, call)
            self.flow.calls.append(call)
            self.flow._readers.setdefault(id(output), [])

        handles = [module.register_forward_pre_hook(enter) for module in modules]
        handles += [module.register_forward_hook(leave, with_kwargs=True) for module in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.depth == 0 and getattr(func, "__name__", "") not in SHAPES_ONLY:
            self.note((args, kwargs), None)
        return func(*args, **(kwargs or {}))


def outputs_of(model: nn.Module, example: Any) -> list[Tensor]:
    """All tensors that the model gives for one input, a tuple of arguments or a dict of them."""
    with torch.no_grad():
        if isinstance(example, dict):
            return list(tensors_of(model(**example)))
        return list(tensors_of(model(*example) if isinstance(example, tuple) else model(example)))
