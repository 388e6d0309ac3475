"""MagR: to the objective of 200 ISTA steps, and its proximal step alone."""

from torch import Tensor
from torch.autograd.profiler_legacy import profile  # the other one logs each start and stop

from torchquant import magr_preprocess

from . import peers
from .harness import Contest, Peer, Run, check
from .layers import Layer, Shape, label, product_floor, some_rows

ALPHA = 1e-3
ISTA_STEPS = 200  # of the released code
TIMED_STEPS = 40  # of those; all cost the same
FEW_ROWS = 64  # of a large layer
SHORT, LONG = 2, 22  # steps of two runs, whose difference is free of what a call does once
SQUARE = (768, 768)


def run(layer: Layer, solver: str, iters: int) -> Tensor:
    return magr_preprocess(layer.weight, layer.gram, alpha=ALPHA, iters=iters, solver=solver)


def objective(layer: Layer, largest: Tensor, v: Tensor) -> float:
    """1/2 (v - w) H (v - w)^T / lambda_max + alpha max|v|, summed over rows."""
    change = (v - layer.weight).double()
    output = ((change @ (layer.gram.double() / largest)) * change).sum()
    return float(0.5 * output + ALPHA * v.abs().amax(1).double().sum())


def check_ista(layer: Layer, largest: Tensor) -> None:
    """Five steps of ours are five steps of the peer."""
    difference = run(layer, "ista", 5) - peers.magr_ista(layer.weight, layer.gram, largest, ALPHA, 5)
    error = float(difference.abs().max() / layer.weight.abs().max())
    check(error < 1e-3, f"magr: ista is {error} away from the peer")


def fista_steps(layer: Layer, largest: Tensor) -> int:
    """The fewest (in twos) that reach ISTA's objective."""
    goal = objective(layer, largest, run(layer, "ista", ISTA_STEPS))
    for steps in range(30, ISTA_STEPS, 2):
        if objective(layer, largest, run(layer, "fista", steps)) <= goal:
            return steps
    check(False, "magr: fista does not reach ista's objective")
    return ISTA_STEPS


def magr(shape: Shape) -> Contest:
    layer = some_rows(shape, FEW_ROWS)
    largest = peers.largest_eigenvalue(layer.gram)
    check_ista(layer, largest)
    steps, share = fista_steps(layer, largest), TIMED_STEPS / ISTA_STEPS

    def ista() -> Tensor:
        return peers.magr_ista(layer.weight, layer.gram, largest, ALPHA, TIMED_STEPS)

    extra: dict[str, Run] = {"lambda_max": lambda: peers.largest_eigenvalue(layer.gram)}
    name = f"torch ISTA-{ISTA_STEPS} with sort ({TIMED_STEPS} steps timed)"
    rivals = [Peer(name, ista, share, 15.0 if shape == SQUARE else None, plus="lambda_max")]
    if shape == SQUARE:
        extra["svd"] = lambda: peers.largest_by_svd(layer.x)
        rivals.append(Peer(f"the same, lambda_max by SVD of {layer.x.shape[0]} samples", ista, share, plus="svd"))
    return Contest(
        f"magr, fista to ISTA-{ISTA_STEPS}'s objective",
        label(layer.shape, shape),
        lambda: run(layer, "fista", steps),
        rivals,
        product_floor(layer.shape, [("2NK² per step", 2.0 * steps * layer.weight.numel() * shape[1])]),
        f"{steps} steps",
        extra=extra,
    )


def own_seconds(layer: Layer, iters: int) -> float:
    """Time inside the operator less that of the ATen operators it calls."""
    with profile() as events:
        run(layer, "ista", iters)
    own = {event.key: event.self_cpu_time_total for event in events.key_averages()}
    return own["torchquant::magr_preprocess"] * 1e-6


def prox(shape: Shape) -> Contest:
    """What a step of ISTA costs besides its product, from the profile of a short and a long run."""
    layer = some_rows(shape, FEW_ROWS)
    check_ista(layer, peers.largest_eigenvalue(layer.gram))
    last: list[float] = [0.0]

    def profiled() -> None:
        last[0] = (own_seconds(layer, LONG) - own_seconds(layer, SHORT)) / (LONG - SHORT)

    return Contest(
        "magr, prox alone",
        label(layer.shape, shape),
        profiled,
        [Peer("torch.sort", lambda: peers.prox_by_sort(layer.weight, ALPHA), target=50.0)],
        note=f"per step, from steps {SHORT + 1}..{LONG}",
        threads=1,  # the profile sees only the thread that calls
        own_clock=lambda: last[0],
    )
