"""Run a model on calibration data in every form it may come in, and leave nothing of the model or the process changed.

Forms:
    - a DataLoader, or any iterable of batches; a single tensor or dictionary is one batch;
    - a callable ``forward_loop(model)`` that runs the model itself.

A tensor is passed as the first argument, a dictionary as keyword arguments (those that ``forward`` accepts). A tuple is
passed in order: from a DataLoader, which usually yields ``(input, target)``, only as many elements as ``forward``
requires; from other iterables as many as it accepts. Use dictionaries where that is not what is meant.
"""

import hashlib
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

logger = logging.getLogger("torchquant")
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Calibration:
    """Calibration data that a model can be run on, once or (after ``keep``) several times."""

    def __init__(self, data: Any, *, progress: bool = False) -> None:
        if isinstance(data, (Tensor, Mapping)):
            data = [data]
        self.loop: Callable[[nn.Module], object] | None = None
        if not isinstance(data, Iterable):
            if not callable(data):
                raise ValueError(
                    "calib: expected a DataLoader, an iterable of tensors, tuples or dicts, or a callable "
                    f"forward_loop(model), got {type(data).__name__}"
                )
            self.loop = data
        self.batches: Iterable[Any] = data if self.loop is None else ()
        self.from_loader = isinstance(data, DataLoader)
        self.progress = progress

    @property
    def once(self) -> bool:
        """True for an iterator, which can be run through only once."""
        return isinstance(self.batches, Iterator)

    def __len__(self) -> int:
        """Number of batches, 0 when unknown."""
        try:
            return len(self.batches)  # type: ignore[arg-type]
        except TypeError:
            return 0

    def keep(self) -> None:
        """Hold the batches in memory, so that several passes see the same ones in the same order."""
        if self.loop is None and not isinstance(self.batches, list):
            self.batches = list(self.batches)

    def run(self, model: nn.Module, what: str = "calibration") -> None:
        """One pass of all data through the model."""
        if self.loop is not None:
            self.loop(model)
            return
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        call = Call(model, fill_optional=not self.from_loader)
        for batch in tqdm(self.batches, desc=what, disable=not self.progress, leave=False):
            args, kwargs = call.arguments(batch)
            model(*to_device(args, device), **to_device(kwargs, device))

    def fingerprint(self) -> str:
        """A hash of every tensor; of a forward_loop only its name can be known."""
        if self.loop is not None:
            return f"forward_loop {getattr(self.loop, '__qualname__', type(self.loop).__qualname__)}"
        self.keep()
        digest = hashlib.sha256()
        for batch in self.batches:
            for tensor in tensors_of(batch):
                digest.update(tensor_bytes(tensor))
        return digest.hexdigest()


class Call:
    """Which of a batch's parts a model's forward takes."""

    def __init__(self, model: nn.Module, *, fill_optional: bool) -> None:
        parameters = inspect.signature(model.forward).parameters.values()
        kinds = {p.kind for p in parameters}
        positional = [p for p in parameters if p.kind in _POSITIONAL]
        required = sum(p.default is inspect.Parameter.empty for p in positional)
        unlimited = inspect.Parameter.VAR_POSITIONAL in kinds
        if fill_optional and unlimited:
            self.most: int | None = None
        else:
            self.most = max(len(positional) if fill_optional else required, 1)
        names = {p.name for p in parameters if p.kind is not inspect.Parameter.POSITIONAL_ONLY}
        self.names = None if inspect.Parameter.VAR_KEYWORD in kinds else names
        self.dropped: set[str] = set()

    def arguments(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if isinstance(batch, Mapping):
            return (), self.keywords(batch)
        if not isinstance(batch, (tuple, list)):
            return (batch,), {}
        if batch and isinstance(batch[0], Mapping):  # (inputs as a dictionary, target)
            return (), self.keywords(batch[0])
        return tuple(batch[: self.most]), {}

    def keywords(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        if self.names is None:
            return dict(batch)
        accepted = {key: value for key, value in batch.items() if key in self.names}
        if not accepted:
            raise ValueError(
                f"calib: none of the batch's keys ({', '.join(map(str, batch))}) is an argument of the model's forward "
                f"({', '.join(sorted(self.names))})"
            )
        new = set(batch) - set(accepted) - self.dropped
        if new:
            self.dropped |= new
            logger.info("calibration: forward does not accept %s: left out", ", ".join(sorted(new)))
        return accepted


def to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(part, device) for key, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(to_device(part, device) for part in value)
    return value


def tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_of(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_of(part)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Shape, dtype and content as bytes; bfloat16, which numpy lacks, goes through its bit pattern."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.zeros(0)
    head = f"{tuple(tensor.shape)} {tensor.dtype} ".encode()
    return memoryview(head + flat.numpy().tobytes())


@contextmanager
def calibrating(model: nn.Module, seed: int) -> Iterator[None]:
    """Evaluation mode without gradients and with random numbers of its own; all of it is put back afterwards.

    The seed makes a shuffled DataLoader repeatable. The fused attention path would bypass the layers' hooks.
    """
    training = {module: module.training for module in model.modules()}
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(seed)
            torch.backends.mha.set_fastpath_enabled(False)
            model.eval()
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, flag in training.items():
            module.training = flag
