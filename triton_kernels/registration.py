"""How an operation becomes torch's: its schema, its fake, and the function that launches its kernels."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

# TRITON_INTERPRET=1, set before the first import, runs the kernels on the CPU: slow, for tests.
DEVICES = ("cuda", "cpu") if triton.knobs.runtime.interpret else ("cuda",)

FILLS_A_GPU = 2048  # programs: 16 for each of about 128 multiprocessors; more than it has to do no good

_library = torch.library.Library("gradnorm_triton", "DEF")


def operation(schema: str) -> Callable[[Callable], Callable]:
    """Registers a function that writes into tensors its caller made, so that a compiled graph keeps it as one call."""
    schema = " ".join(schema.split())
    name = schema.partition("(")[0]

    def register(launch: Callable) -> Callable:
        def on_its_device(*arguments):
            device = next(a.device for a in arguments if isinstance(a, Tensor))
            with torch.cuda.device(device):  # Triton launches on the current one
                launch(*arguments)

        _library.define(schema)
        _library.impl(name, on_its_device, "CUDA")
        _library.impl(name, launch, "CPU")  # for the interpreter: DEVICES says whether it is there
        torch.library.register_fake(f"gradnorm_triton::{name}", lambda *_: None, lib=_library)
        return getattr(torch.ops.gradnorm_triton, name)

    return register


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are formed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def constexpr_of(dtype: torch.dtype) -> tl.dtype:
    """The accumulator as Triton calls it."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def is_aligned(*rows: Tensor) -> bool:
    """Whether Triton can tell that rows start, and end, at multiples of 16 entries."""
    return all(size % 16 == 0 for tensor in rows for size in (tensor.stride(0), tensor.shape[1], tensor.data_ptr()))


def uses_tf32(rows: Tensor) -> bool:
    """Whether products of these rows may round to TF32, as torch's own switch says."""
    return rows.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def sqnorm_length(segments) -> int:
    """How many entries a ``sqnorm`` vector has."""
    return len(segments.groups.walk) + sum(segments.groups.counts)
