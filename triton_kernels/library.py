"""Torch's own matrix product, with sums in float32."""

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """``a @ b``, or that of two batches, summed in the dtype of ``out`` where theirs is narrower; written or added to it."""
    wider = {}
    if a.dtype != out.dtype and a.is_cuda:
        wider = {"out_dtype": out.dtype}
    elif a.dtype != out.dtype:  # the interpreter's tests: out_dtype is for CUDA only
        a, b = a.to(out.dtype), b.to(out.dtype)
    if accumulate:
        (torch.baddbmm if a.dim() == 3 else torch.addmm)(out, a, b, **wider, out=out)
    else:
        (torch.bmm if a.dim() == 3 else torch.mm)(a, b, **wider, out=out)
