"""Which layers of a model are quantized, to what, and why others are not."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrize

from .config import Scheme
from .nn import layout
from .nn.rewrite import is_attention
from .report import LayerReport


@dataclass
class Target:
    """A layer that is to be quantized."""

    name: str
    module: nn.Module
    scheme: Scheme
    explicit: bool = False  # the user gave this layer a scheme of its own


class Patterns:
    """Exact names, ``re:`` patterns (which must match the whole name) and class names; remembers which ones matched."""

    def __init__(self, option: str, patterns: Iterable[str]) -> None:
        self.used: set[str] = set()
        self.rules: dict[str, re.Pattern[str] | None] = {}
        for pattern in patterns:
            try:
                self.rules[pattern] = re.compile(pattern[3:]) if pattern.startswith("re:") else None
            except re.error as error:
                raise ValueError(f"quantize_: {option}: {pattern!r} is not a regular expression: {error}") from None

    def find(self, names: Sequence[str], module: nn.Module) -> str | None:
        """The pattern for a module known under ``names``: exact name first, then regular expression, then class."""
        exact = [p for p, rule in self.rules.items() if rule is None and p in names]
        matching = [p for p, rule in self.rules.items() if rule is not None and any(map(rule.fullmatch, names))]
        by_class = [p for p, rule in self.rules.items() if rule is None and p == type(module).__name__]
        found = [*exact, *matching, *by_class]
        self.used.update(found)
        return found[0] if found else None


def require_used(option: str, unused: Iterable[str], layers: Sequence[str]) -> None:
    missing = ", ".join(map(repr, unused))
    if missing:
        raise ValueError(
            f"quantize_: {option}: {missing} matches no layer; expected an exact name, a 're:' pattern of the whole "
            f"name or a class name; layers: {', '.join(layers[:8])}{' ...' if len(layers) > 8 else ''}"
        )


def select_attention(
    model: nn.Module, scheme: Scheme, overrides: Mapping[str, "str | Scheme | None"], ignore: Sequence[str]
) -> tuple[dict[str, Scheme | None], set[str]]:
    """Every attention module's scheme, None for what is to be left alone; and the patterns that named one."""
    schemes = {pattern: None if value is None else Scheme.parse(value) for pattern, value in overrides.items()}
    chosen, ignored = Patterns("overrides", schemes), Patterns("ignore", ignore)
    found: dict[str, Scheme | None] = {}
    for names, module in modules_with_names(model):
        if is_attention(module):
            left, pattern = ignored.find(names, module) is not None, chosen.find(names, module)
            wanted = scheme if pattern is None else schemes[pattern]
            found[names[0]] = None if left or wanted is None or wanted.activation_bits == 16 else wanted
    return found, chosen.used | ignored.used


def select(
    model: nn.Module,
    scheme: Scheme,
    overrides: Mapping[str, "str | Scheme | None"],
    ignore: Sequence[str],
    used: Collection[str] = (),
) -> tuple[dict[str, Target], list[LayerReport]]:
    """The layers to quantize by name, and those that cannot be, each with its reason.

    A layer that the user ignores, or overrides with None, is in neither. ``used``: patterns that named other modules.
    """
    if isinstance(ignore, str):
        raise ValueError(f"quantize_: ignore must be a sequence of patterns, got the string {ignore!r}")
    schemes = {pattern: None if value is None else Scheme.parse(value) for pattern, value in overrides.items()}
    chosen, ignored = Patterns("overrides", schemes), Patterns("ignore", ignore)
    # Other modules may be named too where the wish is to leave them alone.
    left_alone = Patterns("overrides", [pattern for pattern, value in schemes.items() if value is None])
    owners = weight_owners(model)
    targets: dict[str, Target] = {}
    skipped: list[LayerReport] = []
    layers: list[str] = []
    for names, module in modules_with_names(model):
        is_ignored = ignored.find(names, module) is not None
        if not (layout.is_quantizable(module) or isinstance(module, nn.MultiheadAttention)):
            left_alone.find(names, module)
            continue
        layers.append(names[0])
        pattern = chosen.find(names, module)
        wanted = scheme if pattern is None else schemes[pattern]
        if is_ignored or wanted is None:
            continue
        reason = why_not(names, module, owners)
        if reason is None:
            targets[names[0]] = Target(names[0], module, wanted, pattern is not None)
        else:
            skipped.append(skipped_report(names[0], type(module).__name__, reason))
    require_used("overrides", [p for p in schemes if p not in {*chosen.used, *left_alone.used, *used}], layers)
    require_used("ignore", [p for p in ignore if p not in {*ignored.used, *used}], layers)
    if not targets and not skipped:
        raise ValueError(f"quantize_: {type(model).__name__} has no layer to quantize ({len(layers)} ignored)")
    return targets, skipped


def modules_with_names(model: nn.Module) -> list[tuple[list[str], nn.Module]]:
    """Every module once, with all the names it is registered under."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return [(found, module) for module, found in names.items()]


def weight_owners(model: nn.Module) -> dict[int, list[str]]:
    """Storage address -> the parameters that lie in it, each module's once."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                full = f"{name}.{key}" if name else key
                owners.setdefault(parameter.untyped_storage().data_ptr(), []).append(full)
    return owners


def why_not(names: Sequence[str], module: nn.Module, owners: Mapping[int, list[str]]) -> str | None:
    """The reason why a layer cannot be replaced, None when it can."""
    if isinstance(module, nn.MultiheadAttention):
        return "its in_proj_weight is used through F.linear, not by a layer"
    if "" in names:
        raise ValueError(
            f"quantize_: the model is itself a {type(module).__name__} and cannot be replaced in place: "
            "wrap it in nn.Sequential"
        )
    weight = module._parameters.get("weight")
    if weight is None or parametrize.is_parametrized(module):
        return "its weight is computed by a parametrization"
    if weight.is_meta:
        raise ValueError(f"quantize_: the weight of {names[0]} is on the meta device: load the model first")
    own = {f"{name}.weight" for name in names}
    others = [owner for owner in owners[weight.untyped_storage().data_ptr()] if owner not in own]
    return f"weight tied with {', '.join(others)}" if others else None


def skipped_report(name: str, class_name: str, reason: str) -> LayerReport:
    return LayerReport(name=name, type=class_name, status=f"skipped: {reason}")
