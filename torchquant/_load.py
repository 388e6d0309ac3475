"""Loads the operator library after checking that it was built for the torch that is here."""

import torch


def same_release(built: str, found: str) -> bool:
    return built.split("+")[0].split(".")[:2] == found.split("+")[0].split(".")[:2]


def load() -> None:
    try:
        from . import _build  # type: ignore[attr-defined]
    except ImportError:
        raise ImportError("torchquant: not built; run `pip install --no-build-isolation .` in its source folder") from None
    if not same_release(_build.torch_version, torch.__version__):
        raise ImportError(
            f"torchquant: built for torch {_build.torch_version}, found torch {torch.__version__}; "
            "reinstall it with `pip install --no-build-isolation --force-reinstall --no-deps torchquant`"
        )
    from . import _C  # noqa: F401


load()
