"""What is installed here and what the operator library was built for. Works also where that library refuses to load."""

import importlib.metadata
import os
import platform
import sys
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

OPTIONAL = ("jinja2", "matplotlib", "transformers", "scikit-learn", "scikit-image", "efficientnet-lite-pytorch")


def facts() -> dict[str, str]:
    import torch

    found = {
        "torchquant": version_of("torchquant"),
        "torch": torch.__version__,
        "python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        **build_facts(),
        **cpu_facts(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
        "devices": ", ".join(["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))]),
    }
    return {**found, **{name: version_of(name) for name in OPTIONAL}}


def build_facts() -> dict[str, str]:
    try:
        from . import _build  # type: ignore[attr-defined,unused-ignore]
    except ImportError:
        return {"built for": "nothing: the operator library is not built"}
    return {"built for": f"torch {_build.torch_version}, CUDA {_build.cuda_version or 'none'}"}


def cpu_facts() -> dict[str, str]:
    library = sys.modules.get("torchquant._C")
    if library is None:
        return {"operators": "not loaded"}
    return {
        "operators": f"loaded, {'with' if library.with_cuda else 'without'} CUDA",
        "cpu tiers": ", ".join(library.cpu_tiers()),
        "cpu tier in use": library.cpu_tier(),
    }


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def as_text(found: dict[str, str]) -> str:
    width = max(map(len, found))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in found.items())


def is_command_line() -> bool:
    """Whether this process is ``torchquant ...`` or ``python -m torchquant ...``."""
    as_module = any(pair == ("-m", "torchquant") for pair in pairwise(sys.orig_argv))
    return as_module or Path(sys.argv[0]).stem == "torchquant"


def exit_with(error: ImportError) -> NoReturn:
    """The command line cannot be reached when the package does not import, so a failed load ends here, in one line."""
    if "diagnose" in sys.argv or "diagnose" in sys.orig_argv:
        print(as_text({**facts(), "operators": f"not loaded: {error}"}))
    else:
        print(error, file=sys.stderr)
    sys.exit(1)
