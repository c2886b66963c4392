"""``python -m gradnorm_ext``: what a bug report needs; ``python -m gradnorm_ext operations``: the table of docs/operations.md."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
import traceback

import torch

import gradnorm_ext
from gradnorm_ext import backends
from gradnorm_ext.operations import OPERATIONS

SIZES = ((1, 1024, 1024), (16, 1024, 1024), (128, 256, 1024), (512, 256, 4096))  # rows per segment, out, in


def operations() -> str:
    """The table of operations, and which backends have a function for each, in Markdown."""
    columns = {"native, CPU": "native", "native, CUDA": "native_cuda", "Triton": "triton_kernels"}
    modules = [importlib.import_module(f"gradnorm_ext.{name}") for name in columns.values()]
    rows = [f"| operation | gives | serves | {' | '.join(columns)} |", f"|---|---|---|{':-:|' * len(columns)}"]
    for operation in OPERATIONS.values():
        has = ("●" if hasattr(module, operation.name) else "" for module in modules)
        serves = ", ".join(f"`{name}`" for name in operation.serves)
        rows.append(f"| {' | '.join((f'`{operation.name}`', operation.gives, serves, *has))} |")
    return "\n".join(rows)


def main() -> int:
    """Print versions, backends, what serves each operation, and the methods chosen; 1 where a backend is broken."""
    print(f"gradnorm_ext {gradnorm_ext.__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in ("torch", "numpy", "triton", "transformers"):
        print(f"  {package} {_version(package)}")
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"
    print(f"  torch built for CUDA {torch.version.cuda}, {cuda}; {torch.get_num_threads()} CPU threads")
    print(f"backends (GRADNORM_BACKEND: {backends.choose('auto')})")
    broken = False
    for name in backends.MODULES:
        try:
            module = backends.load(name)
        except Exception as error:
            broken = True
            print(f"  {name}: BROKEN ({''.join(traceback.format_exception_only(error)).strip()})")
            continue
        if isinstance(module, str):
            print(f"  {name}: absent ({module})")
        else:
            has = sum(hasattr(module, operation) for operation in OPERATIONS)
            print(f"  {name}: present, {has} of {len(OPERATIONS)} operations")
    if broken:
        return 1
    for device in ("cpu", "cuda"):
        print(f"on {device}" + ("" if device == "cpu" or torch.cuda.is_available() else " (no device here)"))
        for operation in OPERATIONS:
            print(f"  {operation} by {backends.explain(operation, device, backends.choose('auto'))}")
    native = backends.load("native")
    if not isinstance(native, str):
        for line in native.build_info():
            print(f"  {line}")
        for rows, d, p in SIZES:
            methods = {native.outer_method(rows, d, p, with_dw) for with_dw in (True, False)}
            both = [f"{native.outer_method(rows, d, p, w)} {'with' if w else 'without'} dw" for w in (True, False)]
            chosen = next(iter(methods)) if len(methods) == 1 else ", ".join(both)
            print(f"  outer, {rows} rows a segment, weight {d} x {p}: {chosen}")
    return 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    try:
        code = 0
        if sys.argv[1:] == ["operations"]:
            print(operations())
        else:
            code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # a reader such as `head` has seen enough; at exit Python would flush to it once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)
