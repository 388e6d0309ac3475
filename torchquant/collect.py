"""Hooks that turn what layers receive into statistics: Grams, and which parameters are used past the layers."""

import weakref
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .calibrate import Calibration, logger
from .nn import layout
from .nn.swap import swapped
from .statistics import cross_gram_accumulate_

RECENT = 8  # inputs remembered within a forward; layers that share one are called one after the other
PRODUCTS = {F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose2d, F.multi_head_attention_forward}


@dataclass
class Stats:
    """What a solver needs to know of a layer's inputs."""

    gram: Tensor  # [K, K], with groups [groups, K, K]
    tokens: int = 0
    calls: int = 0
    cross: Tensor | None = None  # X^T X~ of float and quantized inputs, shaped as the Gram
    energy: Tensor | None = None  # [N] squared float outputs, sum over tokens; only together with cross
    sums: Tensor | None = None  # [2, K] or [2, B, K] float64, of float and quantized inputs: for a bias that may change
    mean_energy: float = 0.0  # squared float outputs that centring the inputs took away


@dataclass
class Observed:
    """How the layers were reached, in the order of their first calls."""

    order: list[str] = field(default_factory=list)
    foreign: set[str] = field(default_factory=set)  # forward() is not the product that the layer's class stands for
    parameters: set[str] = field(default_factory=set)  # used by F.linear and the like


class ParameterUse(TorchFunctionMode):
    """Records which parameters reach a product, by storage: slices of a stacked weight count as the weight."""

    def __init__(self, model: nn.Module, used: set[str]) -> None:
        super().__init__()
        self.used = used
        self.names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter.dim() >= 2 and not parameter.is_meta:
                self.names.setdefault(parameter.untyped_storage().data_ptr(), []).append(name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            for value in args:
                if isinstance(value, Tensor):
                    self.used.update(self.names.get(value.untyped_storage().data_ptr(), ()))
        return func(*args, **(kwargs or {}))


def input_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(x, Tensor):
        raise ValueError(f"calibration: layer {name!r} was called without a tensor, got {type(x).__name__}")
    return x


@contextmanager
def observing(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[Observed]:
    """Fill an ``Observed`` from the forwards that run inside the with block."""
    seen = Observed()

    def hook(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if name in seen.order:
            return
        seen.order.append(name)
        if isinstance(module, nn.ConvTranspose2d) and len(args) + len(kwargs) > 1:
            seen.foreign.add(name)  # called with output_size
        if not layout.is_known(module):
            expected = layout.apply(module, input_of(name, args, kwargs))
            same = isinstance(output, Tensor) and output.shape == expected.shape
            if not (same and torch.allclose(output, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))):
                seen.foreign.add(name)

    with ExitStack() as stack:
        for name, module in layers.items():
            handle = module.register_forward_hook(
                lambda m, a, k, out, name=name: hook(name, m, a, k, out), with_kwargs=True
            )
            stack.callback(handle.remove)
        stack.enter_context(ParameterUse(model, seen.parameters))
        yield seen


class Sampler:
    """At most ``limit`` tokens a layer, drawn evenly from the batches; the same rows for float and quantized inputs."""

    def __init__(self, limit: int | None, batches: int, seed: int) -> None:
        self.limit, self.seed = limit, seed
        self.per_call = None if limit is None else (-(-limit // batches) if batches else limit)

    def __call__(self, name: str, module: nn.Module, x: Tensor, taken: int, call: int) -> Tensor:
        """The rows of ``x`` to use, pictures for convolutions; ``taken`` tokens were used before."""
        if self.limit is None or self.per_call is None:
            return x
        conv = layout.geometry(module)
        rows = x.reshape(-1, x.shape[-1]) if conv is None else layout.batched(x, tuple(module.kernel_size))  # type: ignore
        tokens = 1 if conv is None else layout.tokens_of(module, rows[:1])
        left = min(self.per_call, self.limit - taken)
        quota = left if conv is None else max(left // max(tokens, 1), int(taken == 0))
        if quota >= rows.shape[0]:
            return rows
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{name}/{call}".encode()))
        index = torch.randperm(rows.shape[0], generator=generator)[: max(quota, 0)].sort().values
        return rows[index.to(x.device)]


class Event(NamedTuple):
    """A tensor that was added to a Gram a moment ago."""

    tensor: "weakref.ref[Tensor]"
    key: tuple[Any, ...]
    kind: tuple[Any, ...]
    stats: Stats
    call: int


class SharingBroken(Exception):
    """Layers that began with the same inputs went separate ways."""


class GramHooks:
    """One Gram for every layer; siblings that receive the very same tensor (q, k, v; gate, up) share one.

    The first call decides who shares: same parent, same geometry, same live tensor at the same version. Later calls are
    checked, and SharingBroken is raised when partners no longer see the same inputs.
    """

    def __init__(self, layers: Mapping[str, nn.Module], sampler: Sampler, *, share: bool) -> None:
        self.layers, self.sampler, self.share = layers, sampler, share
        self.stats: dict[str, Stats] = {}
        self.seen: dict[str, int] = {}
        self.recent: deque[Event] = deque(maxlen=RECENT)
        self.kinds = {name: (name.rpartition(".")[0], layout.signature(module)) for name, module in layers.items()}

    def hook(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = input_of(name, args, kwargs)
        version = 0 if x.is_inference() else x._version
        key = (x.data_ptr(), version, tuple(x.shape), tuple(x.stride()), x.dtype)
        event = next((e for e in self.recent if e.key == key and e.tensor() is not None), None) if self.share else None
        if name not in self.stats:
            joins = event is not None and event.call == 1 == event.stats.calls and event.kind == self.kinds[name]
            self.seen[name] = 0
            self.stats[name] = event.stats if joins and event is not None else self.new_stats(module, x)
        stats = self.stats[name]
        if event is not None and event.stats is stats and event.call == self.seen[name] + 1:
            self.seen[name] += 1
            return
        if self.seen[name] != stats.calls:
            raise SharingBroken(name)
        add_input(name, module, stats, self.sampler(name, module, x, stats.tokens, stats.calls))
        stats.calls += 1
        self.seen[name] = stats.calls
        self.recent.append(Event(weakref.ref(x), key, self.kinds[name], stats, stats.calls))

    def new_stats(self, module: nn.Module, x: Tensor) -> Stats:
        return Stats(layout.new_gram(module, x.device))

    def finish(self) -> dict[str, Stats]:
        for name, stats in self.stats.items():
            if self.seen[name] != stats.calls:
                raise SharingBroken(name)
        return {name: stats for name, stats in self.stats.items() if stats.tokens > 0}


def add_input(name: str, module: nn.Module, stats: Stats, x: Tensor) -> None:
    if x.numel() == 0:
        return
    try:
        stats.tokens += layout.accumulate_gram(stats.gram, module, x)
    except (TypeError, ValueError) as error:
        check_finite(name, x)
        raise ValueError(f"calibration: layer {name!r}: {error}") from error
    # A NaN or Inf reaches the diagonal, which is far smaller than the input.
    if not bool(stats.gram.diagonal(dim1=-2, dim2=-1).isfinite().all()):
        check_finite(name, x)
        raise ValueError(f"calibration: the squared input of layer {name!r} overflows float32")


def check_finite(name: str, x: Tensor) -> None:
    if not bool(x.isfinite().all()):
        raise ValueError(f"calibration: the input of layer {name!r} holds NaN or Inf")


@contextmanager
def hooked(layers: Mapping[str, nn.Module], hook: Any) -> Iterator[None]:
    """``hook(name, module, args, kwargs)`` before every call of a layer."""
    with ExitStack() as stack:
        for name, module in layers.items():
            handle = module.register_forward_pre_hook(
                lambda m, args, kwargs, name=name: hook(name, m, args, kwargs), with_kwargs=True
            )
            stack.callback(handle.remove)
        yield


def collect_grams(
    model: nn.Module, layers: Mapping[str, nn.Module], data: Calibration, *, max_tokens: int | None, seed: int
) -> tuple[dict[str, Stats], Observed]:
    """One pass: every layer's Gram of the float model's inputs. Layers without tokens are left out of the result."""
    sampler = Sampler(max_tokens, len(data), seed)
    for share in (True, False):
        hooks = GramHooks(layers, sampler, share=share)
        try:
            with observing(model, layers) as seen, hooked(layers, hooks.hook):
                data.run(model)
            return hooks.finish(), seen
        except SharingBroken as broken:
            if data.once:
                raise ValueError(
                    f"calib: layer {broken} stopped receiving the inputs it shared with its neighbours, so the data "
                    "must be run through again: pass a list or a DataLoader instead of an iterator"
                ) from None
            logger.info("calibration: layer %s stopped sharing its inputs; again with one Gram per layer", broken)
    raise AssertionError("unreachable: without sharing nothing breaks")


class PairHooks:
    """Grams of quantized inputs, and their products with the float inputs of the same tokens.

    Every call of the model is run twice: before it, with the float layers in place (their inputs are kept), then as it
    stands, with the quantized ones. One batch of one stage's inputs is alive at a time.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        quantized: Mapping[nn.Module, nn.Module],
        sampler: Sampler,
        quantizers: Mapping[str, nn.Module],
    ) -> None:
        self.layers, self.quantized, self.sampler, self.quantizers = layers, quantized, sampler, quantizers
        self.kept: dict[str, list[Tensor]] = {name: [] for name in layers}
        self.stats: dict[str, Stats] = {}
        self.float_pass = False

    def before_model(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if self.float_pass:
            return
        self.kept = {name: [] for name in self.layers}
        self.float_pass = True
        try:
            with swapped(model, {new: old for old, new in self.quantized.items()}):
                model(*args, **kwargs)
        finally:
            self.float_pass = False

    def hook(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = input_of(name, args, kwargs)
        if self.float_pass:
            self.kept[name].append(x.detach().clone())
            return
        before = self.kept[name].pop(0) if self.kept[name] else None
        if before is None or before.shape != x.shape:
            raise ValueError(
                f"calibration: layer {name!r} sees other tokens in the quantized than in the float model (the model "
                "itself is not called, or it routes tokens); use inputs='float'"
            )
        add_rows(self.stats, self.sampler, self.quantizers, name, module, before, x)


def add_rows(
    found: dict[str, Stats],
    sampler: Sampler,
    quantizers: Mapping[str, nn.Module],
    name: str,
    module: nn.Module,
    before: Tensor,
    x: Tensor,
) -> None:
    """One call of a layer. ``before``: its input in the float model; ``x``: now, before its quantizer if it has one."""
    stats = found.setdefault(name, Stats(layout.new_gram(module, x.device)))
    before, x = (sampler(name, module, t, stats.tokens, stats.calls) for t in (before, x))
    if name in quantizers:
        x = quantizers[name](x)
        add_sums(module, stats, before, x)
    add_input(name, module, stats, x)
    add_pair(module, stats, before, x)
    stats.calls += 1


def add_sums(module: nn.Module, stats: Stats, before: Tensor, x: Tensor) -> None:
    if x.numel() == 0:
        return
    columns = torch.stack([layout.unfold(module, t).double().sum(-2) for t in (before, x)])
    stats.sums = columns if stats.sums is None else stats.sums + columns


def add_pair(module: nn.Module, stats: Stats, before: Tensor, x: Tensor) -> None:
    """cross += X^T X~, energy += the squared float outputs. Convolutions go picture by picture: im2col is large."""
    if stats.cross is None:
        stats.cross = torch.zeros_like(stats.gram)
        stats.energy = torch.zeros(layout.rows_of(module), dtype=torch.float64, device=x.device)
    conv = layout.geometry(module)
    matrix = layout.to_matrix(module).float()
    groups = layout.groups_of(module)
    cross = stats.cross if stats.cross.dim() == 3 else stats.cross[None]
    pictures: Iterable[tuple[Tensor, Tensor]] = [(before, x)]
    if conv is not None:
        kernel = tuple(module.kernel_size)  # type: ignore[arg-type]
        pictures = zip(layout.batched(before, kernel).split(1), layout.batched(x, kernel).split(1), strict=True)
    for old, new in pictures:
        columns, other = (layout.unfold(module, t).view(groups, -1, matrix.shape[1]) for t in (old, new))
        for b in range(groups):
            cross_gram_accumulate_(cross[b], columns[b], other[b])
        outputs = columns @ matrix.view(groups, -1, matrix.shape[1]).transpose(1, 2)  # [groups, T, N / groups]
        stats.energy += outputs.double().square().sum(1).flatten()  # type: ignore[operator]


def collect_pairs(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    quantized: Mapping[nn.Module, nn.Module],
    data: Calibration,
    *,
    max_tokens: int | None,
    seed: int,
    quantizers: Mapping[str, nn.Module] | None = None,
) -> dict[str, Stats]:
    """Statistics of one stage's layers, with everything in ``quantized`` (float -> quantized module) swapped in.

    ``quantizers``: of the inputs of these layers, by name.
    """
    hooks = PairHooks(layers, quantized, Sampler(max_tokens, len(data), seed), quantizers or {})
    with swapped(model, quantized), hooked(layers, hooks.hook):
        handle = model.register_forward_pre_hook(hooks.before_model, with_kwargs=True)
        try:
            data.run(model, f"calibration of {next(iter(layers), '')}")
        finally:
            handle.remove()
    return {name: stats for name, stats in hooks.stats.items() if stats.tokens > 0}


def collect_own(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    quantizers: Mapping[str, nn.Module],
    data: Calibration,
    *,
    max_tokens: int | None,
    seed: int,
) -> dict[str, Stats]:
    """One pass of the float model: each layer's inputs before and after its own quantizer, and no other error."""
    sampler = Sampler(max_tokens, len(data), seed)
    found: dict[str, Stats] = {}

    def hook(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = input_of(name, args, kwargs)
        add_rows(found, sampler, quantizers, name, module, x, x)

    with hooked(layers, hook):
        data.run(model)
    return {name: stats for name, stats in found.items() if stats.tokens > 0}


def stages(model: nn.Module, order: Sequence[str]) -> list[list[str]]:
    """Layers that are quantized together, in execution order: the blocks of the longest list of equal blocks, and every
    other layer on its own."""
    prefixes = longest_blocks(model, order)
    block_of = {name: next((p for p in prefixes if name.startswith(p + ".")), name) for name in order}
    result: dict[str, list[str]] = {}
    for name in order:
        result.setdefault(block_of[name], []).append(name)
    return list(result.values())


def longest_blocks(model: nn.Module, layers: Sequence[str]) -> list[str]:
    best: list[str] = []
    for name, container in model.named_modules():
        children = list(container.named_children())
        if not isinstance(container, (nn.ModuleList, nn.Sequential)) or len({type(c) for _, c in children}) != 1:
            continue
        prefixes = [f"{name}.{key}" if name else key for key, _ in children]
        used = [p for p in prefixes if any(layer.startswith(p + ".") for layer in layers)]
        if len(used) > max(len(best), 1):
            best = used
    return best
