"""ONNX (opset 21): integer weights with DequantizeLinear, activations by QuantizeLinear/DequantizeLinear or arithmetic.

Only standard operators. A copy of the model is exported in which every quantized layer and every activation quantizer
is replaced by a twin that says the same in ONNX's words:

=====================================================  ==============================================================
weights of at most 4 bits, of 5 to 8 bits              uint4, uint8
their grid                                             DequantizeLinear per channel or in blocks of ``group_size``
half-integral zero points at 2, 3, 5, 6, 7 bits        doubled codes and zero points, halved scale: exactly the same
zero points that the codes' type cannot hold           ``(Cast(codes) - zero_point) * scale``
uniform activations                                    (Clip,) QuantizeLinear to uint8, DequantizeLinear; or arithmetic
dynamic activations                                    arithmetic: DynamicQuantizeLinear always spans zero, we do not
log family and subsets                                 bisection over the thresholds with Gather, then Gather of values
=====================================================  ==============================================================
"""

import copy
import importlib
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..checkpoint import write_atomically
from ..nn import QuantizedLayer, swap_modules
from ..nn.quantizers import ActivationQuantizer
from .onnx_twins import OPSET, OnnxLayer, twin_of

logger = logging.getLogger("torchquant")

BATCH = "batch"
NEEDED = ("onnx", "onnxscript")
WEIGHT = ("weight_codes", "weight_scale", "weight_zero_point")
LIMIT = 2**31 - 2**20  # bytes of tensors: what protobuf holds, less room for the graph


def export_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = "batch",
    check: bool = True,
    tolerance: float = 1e-2,
) -> None:
    """Write ``model``, in evaluation mode, as one ONNX file that runs in ONNX Runtime without custom operators.

    Args:
        path: of the file, which appears complete or not at all.
        example_inputs: a tensor, a tuple of positional or a dictionary of keyword arguments; needed for tracing.
        dynamic_shapes: ``"batch"``: dimension 0 of every tensor as large as the first one's is free. None: all shapes
            are fixed. Else as for ``torch.export.export``.
        check: run onnx.checker and, where onnxruntime is installed, the example inputs, before the file takes its name.
        tolerance: of that run: ``||got - wanted|| <= tolerance * ||wanted||`` for every output. Sums in another order
            move a few activations over a rounding edge, each by one step of its grid.

    Raises:
        ImportError: onnx or onnxscript is missing. TypeError: a quantizer without ONNX form. ValueError: no example
            inputs, more than 2 GB, or the check fails. RuntimeError: the model cannot be traced.
    """
    if example_inputs is None:
        raise ValueError("export: format 'onnx' needs example_inputs: a tensor, a tuple or a dictionary")
    missing = [name for name in NEEDED if not importable(name)]
    if missing:
        raise ImportError(f"export: format 'onnx' needs {', '.join(missing)}: pip install 'torchquant[onnx]'")
    path = Path(path)
    args, kwargs = arguments(example_inputs)
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        wanted = named_tensors(twin(*args, **kwargs))
        narrow = codes_of(twin := with_twins(twin))
        graph = traced(twin, args, kwargs, dynamic_shapes, list(wanted))
    narrow_and_optimize(graph, narrow)
    size = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    if size > LIMIT:
        raise ValueError(f"export: {path}: tensors of {size} bytes, an ONNX file holds at most {LIMIT}")

    def write(temporary: Path) -> None:
        importlib.import_module("onnx_ir").save(graph, temporary)
        if check:
            check_written(path, temporary, tensors_of((args, kwargs)), list(wanted.values()), tolerance)

    write_atomically(path, write)


def importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)), {}


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def named_tensors(tree: Any) -> dict[str, Tensor]:
    """A model's outputs by the keys of its dictionary, else output_0, output_1 ...; the only one is ``output``."""
    found: dict[str, Tensor] = {}
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, Tensor):
            keys = [str(getattr(part, "key", getattr(part, "idx", part))) for part in path]
            name = "_".join(keys)
            found[name if name and not name[0].isdigit() else f"output_{name}".rstrip("_")] = leaf
    return found


# --- from the model to a graph ---


def with_twins(model: nn.Module) -> nn.Module:
    """``model`` with twins in place of what calls torchquant's operators."""
    kinds = (QuantizedLayer, ActivationQuantizer)
    twins: dict[nn.Module, nn.Module] = {m: twin_of(m) for m in model.modules() if isinstance(m, kinds)}
    swap_modules(model, twins)
    return twins.get(model, model)


def codes_of(model: nn.Module) -> set[str]:
    """Names of the buffers that become uint4."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, OnnxLayer) and m.narrow}
    keys = ("weight_codes", "weight_zero_point")
    found = {(name, key) for name, m in layers.items() for key in keys if getattr(m, key).dtype == torch.uint8}
    return {f"{name}.{key}" if name else key for name, key in found}


def traced(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any, outputs: list[str]
) -> Any:
    """The ONNX graph (an onnx_ir.Model), with every code still a byte."""
    free_batch = isinstance(dynamic_shapes, str)
    if free_batch and dynamic_shapes != BATCH:
        raise ValueError(f"export: dynamic_shapes must be 'batch', None or torch.export's, got {dynamic_shapes!r}")
    if free_batch:
        args, kwargs, dynamic_shapes = with_free_batch(args, kwargs)
    try:
        program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
        options: dict[str, Any] = {"opset_version": OPSET, "output_names": outputs}
        found = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False, **options)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise RuntimeError(
            f"export: the model cannot be traced: {type(cause).__name__}: {cause}\n"
            "Where a shape is to blame, say with dynamic_shapes= which ones are free (None: none)"
        ) from error
    assert found is not None
    if free_batch:
        name_dimension(found.model, BATCH)
    return found.model


def name_dimension(model: Any, name: str) -> None:
    """In place of the tracer's name for the inputs' first free dimension."""
    ir, graph = importlib.import_module("onnx_ir"), model.graph
    shapes = [value.shape for value in graph.inputs if value.shape is not None]
    symbol = next((str(d) for shape in shapes for d in shape if not isinstance(d, int)), None)
    values = [*graph.inputs, *(output for node in graph.all_nodes() for output in node.outputs)]
    for value in values if symbol else ():
        if value.shape is not None:
            dims = [d if isinstance(d, int) else re.sub(rf"\b{symbol}\b", name, str(d)) for d in value.shape]
            value.shape = ir.Shape(dims)


def with_free_batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Inputs to trace with and their dynamic_shapes. A batch of one is doubled: tracing takes size 1 for a constant."""
    size = next((len(t) for t in tensors_of((args, kwargs)) if t.dim()), 0)
    batch = torch.export.Dim(BATCH, min=1)

    def follows(leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == size

    shapes = pytree.tree_map(lambda leaf: {0: batch} if follows(leaf) else None, (args, kwargs))
    if size == 1:
        args, kwargs = pytree.tree_map(lambda leaf: torch.cat([leaf, leaf]) if follows(leaf) else leaf, (args, kwargs))
    return args, kwargs, shapes[0] if args else shapes[1]  # one of the two is empty


def narrow_and_optimize(model: Any, names: set[str]) -> None:
    """Make the named initializers uint4, simplify, and leave out where on this machine the code stood."""
    ir, optimizer = importlib.import_module("onnx_ir"), importlib.import_module("onnxscript.optimizer")
    for name in names & model.graph.initializers.keys():
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(value.const_value.numpy(), dtype=ir.DataType.UINT4, name=name)
        value.dtype = ir.DataType.UINT4

    def keep_small(node: Any) -> bool | None:
        """Folded, codes and grids of small layers would become floats, one for each weight."""
        inputs = [value.name or "" for value in node.inputs if value is not None]
        return False if any(name.endswith(WEIGHT) for name in inputs) else None

    optimizer.optimize_ir(model, should_fold=keep_small)
    model.producer_name, model.producer_version = "torchquant", None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        for part in (node, *node.outputs):
            part.metadata_props.clear()


def check_written(path: Path, temporary: Path, inputs: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    onnx = importlib.import_module("onnx")
    try:
        onnx.checker.check_model(str(temporary), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ValueError(f"export: {path}: onnx.checker refuses the file: {error}") from None
    if not importable("onnxruntime"):
        logger.warning("export: %s: onnxruntime is not installed, so the file was not run", path)
        return
    try:
        got = run(temporary, inputs)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"export: {path}: ONNX Runtime cannot run the file (check=False skips this): {reason}"
        ) from error
    if len(got) != len(wanted):
        raise ValueError(f"export: {path}: the model has {len(wanted)} outputs, the file {len(got)}")
    for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
        change = distance(a, b)
        if not change <= tolerance:
            raise ValueError(
                f"export: {path}: ONNX Runtime computes something else: output {index} differs by {change:.3g} of its "
                f"norm, allowed are {tolerance:g} (tolerance=)"
            )


def run(path: Path, inputs: list[Tensor]) -> list[Tensor]:
    """What the graph says, without ONNX Runtime's own approximations (MatMulNBits in 8-bit integers)."""
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    # Inputs that the model does not look at are in the graph too, in the same order.
    names = [value.name for value in session.get_inputs()]
    feeds = {name: x.detach().cpu().numpy() for name, x in zip(names, inputs, strict=True)}
    return [torch.from_numpy(array) for array in session.run(None, feeds)]


def distance(got: Tensor, wanted: Tensor) -> float:
    """Relative to the norm; infinite when the shapes differ or only one of two is finite."""
    if got.shape != wanted.shape:
        return math.inf
    a, b = got.double(), wanted.detach().cpu().double()
    same = (a == b) | (a.isnan() & b.isnan())  # masked scores are -inf on both sides
    change = torch.where(same, 0.0, a - b).norm() / torch.where(same & ~b.isfinite(), 0.0, b).norm().clamp_min(1e-30)
    return float(change.nan_to_num(math.inf))
