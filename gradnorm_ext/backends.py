"""Which module carries out an operation.

A backend is a module with functions of `reference`'s names and arguments; the table here is the whole registry. Its
``DEVICES`` are those that its functions run on (without it: all), ``DEVICE_MODULES`` the modules that have others for
some of them.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

from gradnorm_ext.operations import OPERATIONS

MODULES = {
    "triton": "gradnorm_ext.triton_kernels",
    "native": "gradnorm_ext.native",
    "reference": "gradnorm_ext.reference",
}
BACKEND_ORDER = {
    "cuda": ("triton", "reference"),  # native's run where asked for: none was measured to beat Triton's yet
    "cpu": ("native", "reference"),
}

DEFAULT = os.environ.get("GRADNORM_BACKEND", "auto")

_MAY_BE_ABSENT = ("gradnorm_ext._C", "triton")  # not built, not installed; present and failing to import is an error


@functools.cache
def load(name: str) -> ModuleType | str:
    """The backend's module, or why it is absent. A backend that is present but broken raises."""
    try:
        return importlib.import_module(MODULES[name])
    except ModuleNotFoundError as missing:
        if missing.name in _MAY_BE_ABSENT:
            return f"no module {missing.name}"
        raise
    except ImportError as broken:
        raise ImportError(
            f"gradnorm_ext: the {name} backend is installed but does not load ({broken}); rebuild it with "
            "`pip install --no-build-isolation --force-reinstall .`, or set GRADNORM_BACKEND=reference"
        ) from broken


def choose(backend: str) -> str:
    """The backend asked for; where that is "auto", the one that GRADNORM_BACKEND named at import."""
    chosen = DEFAULT if backend == "auto" else backend
    if chosen != "auto" and chosen not in MODULES:
        raise ValueError(f"gradnorm_ext: backend must be one of auto, {', '.join(MODULES)}, got {chosen!r}")
    return chosen


def _serving(module: ModuleType, operation: str, device_type: str) -> Callable[..., Any] | None:
    if device_type not in getattr(module, "DEVICES", (device_type,)):
        return None
    on: dict[str, ModuleType] = getattr(module, "DEVICE_MODULES", {})
    return getattr(on.get(device_type, module), operation, None)


@functools.cache
def find(operation: str, device_type: str, backend: str) -> Callable[..., Any]:
    """The function that carries out ``operation`` on ``device_type``: of ``backend``, or of the first that has it."""
    found, _, absent = _search(operation, device_type, backend)
    if found is None:
        raise RuntimeError(
            f"{operation}: no backend runs it on {device_type}, looked at {', '.join(absent)}; set GRADNORM_BACKEND=auto"
        )
    return found


@functools.cache
def serves(operation: str, device_type: str, backend: str) -> bool:
    """Whether `find` finds a function."""
    return _search(operation, device_type, backend)[0] is not None


def explain(operation: str, device_type: str, backend: str) -> str:
    """Which backend carries out ``operation`` on ``device_type``, and why that one.

    Example:
        >>> explain("outer_gram", "cpu", "reference")
        'reference, asked for'
    """
    found, name, absent = _search(operation, device_type, backend)
    if found is None:
        return f"none: {', '.join(absent)}"
    if backend != "auto":
        return f"{name}, asked for"
    why = f"not {', '.join(absent)}" if absent else f"the first of {', '.join(BACKEND_ORDER[device_type])}"
    others = [other for other in MODULES if other not in (name, "reference") and _has(other, operation, device_type)]
    also = f"; where asked for: {', '.join(others)}" if others else ""
    return f"{name}, {why}{also}"


def _search(operation: str, device_type: str, backend: str) -> tuple[Callable[..., Any] | None, str, list[str]]:
    """The function, whose it is, and what was looked at before, with the reason why not."""
    if operation not in OPERATIONS:
        raise ValueError(f"gradnorm_ext: there is no operation {operation}; give it a row in gradnorm_ext.operations")
    names = BACKEND_ORDER.get(device_type, ("reference",)) if backend == "auto" else (backend,)
    absent = []
    for name in names:
        module = load(name)
        if isinstance(module, str):
            absent.append(f"{name} ({module})")
        elif found := _serving(module, operation, device_type):
            return found, name, absent
        else:
            absent.append(f"{name} (has no {operation} for {device_type})")
    return None, "", absent


def _has(name: str, operation: str, device_type: str) -> bool:
    module = load(name)
    return not isinstance(module, str) and _serving(module, operation, device_type) is not None
