"""Torch's own matrix products, with sums in float32."""

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """``a @ b``, or that of two batches, summed in the dtype of ``out`` where theirs is narrower; written or added to it."""
    wider = {}
    if a.dtype != out.dtype and a.is_cuda:
        wider = {"out_dtype": out.dtype}
    elif a.dtype != out.dtype:  # the interpreter's tests: out_dtype is for CUDA only
        a, b = a.to(out.dtype), b.to(out.dtype)
    elif not a.is_cuda and a.dtype.itemsize == 2:  # there a sum need not be rounded once
        wide = out.float() if accumulate else torch.empty_like(out, dtype=torch.float32)
        product(a, b, wide, accumulate)
        out.copy_(wide)
        return
    if accumulate:
        (torch.baddbmm if a.dim() == 3 else torch.addmm)(out, a, b, **wider, out=out)
    else:
        (torch.bmm if a.dim() == 3 else torch.mm)(a, b, **wider, out=out)


def grouped_product(a: Tensor, b: Tensor, ends: Tensor, out: Tensor) -> None:
    """``out[s] = a[:, rows of s] @ b[rows of s]``, rounded to the dtype of all; where a group has no rows, anything."""
    out.copy_(torch.nn.functional.grouped_mm(a, b, offs=ends))
