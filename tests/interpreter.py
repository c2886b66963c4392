"""Triton's interpreter, mended where it computes something else than the compiled kernel. Importing this mends it."""

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

_dot, _patch_tensor = interpreter.InterpreterBuilder.create_dot, interpreter._patch_lang_tensor


def _float32(operand: interpreter.TensorHandle) -> np.ndarray:
    """bfloat16 is kept as its 16 bits, which are the upper half of a float32."""
    if operand.dtype.scalar == tl.bfloat16:
        return (operand.data.astype(np.uint32) << 16).view(np.float32)
    return operand.data


def _create_dot(self, a, b, d, *options):
    """Products of bfloat16 numbers and not of their bits, as Triton 3.6 to 3.9 have them (issue 11584)."""
    if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
        return _dot(self, a, b, d, *options)
    product = np.matmul(_float32(a), _float32(b), dtype=np.float32)
    return interpreter.TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)


def _create_fp_trunc(self, value, dtype):
    """A float32 rounded to the nearest bfloat16, as the GPU does, and not cut off, as Triton 3.6 to 3.9 have it."""
    if value.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
        return self.cast_impl(value, dtype)
    rounded = torch.from_numpy(np.ascontiguousarray(value.data, dtype=np.float32)).bfloat16()
    return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), dtype.scalar)


def _patch_lang_tensor(tensor, scope):
    """A tensor of one number as the bound of a loop, which Triton 3.6 cannot take from NumPy 2.4 (issue 9171)."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))


interpreter.InterpreterBuilder.create_dot = _create_dot
interpreter.InterpreterBuilder.create_fp_trunc = _create_fp_trunc
if triton.__version__.startswith("3.6."):
    interpreter._patch_lang_tensor = _patch_lang_tensor
