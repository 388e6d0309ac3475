"""Loads the operator library after checking that it was built for the torch that is here."""

import torch


def same_release(built: str, found: str) -> bool:
    return built.split("+")[0].split(".")[:2] == found.split("+")[0].split(".")[:2]


def load() -> None:
    try:
        from . import _build  # type: ignore[attr-defined,unused-ignore]
    except ImportError:
        raise ImportError(
            "torchquant: not built; run `pip install --no-build-isolation .` in its source folder"
        ) from None
    if not same_release(_build.torch_version, torch.__version__):
        raise ImportError(
            f"torchquant: built for torch {_build.torch_version}, found torch {torch.__version__}; "
            "reinstall it with `pip install --no-build-isolation --force-reinstall --no-deps .` in its source folder"
        )
    from . import _C

    try:
        _C.cpu_tier()  # chosen here, so that a bad TORCHQUANT_CPU_ISA is an error now and not inside the first operator
    except ValueError as error:
        raise ImportError(f"torchquant: {error}") from None


try:
    load()
except ImportError as error:
    from . import diagnose

    if diagnose.is_command_line():
        diagnose.exit_with(error)
    raise
