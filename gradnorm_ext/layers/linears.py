"""Products with a matrix: ``linear``, ``addmm``, ``matmul`` and, of two inputs, ``bilinear``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradnorm_ext.gradients import Outer
from gradnorm_ext.layers.calls import (
    Backward,
    Call,
    Observed,
    first_order,
    module_call,
    no_autocast,
    summed,
    tapped_call,
)
from gradnorm_ext.layers.layouts import Layout
from gradnorm_ext.layers.observation import Observation
from gradnorm_ext.layers.taps import Tap


class _Linear(Observed):
    """``y = x Wᵀ + b``; swapped: ``y = x W + b``. ``dtype`` is autocast's: the weight's gradient keeps the weight's."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        *probes: Tensor | None,
    ) -> Tensor:
        ctx.call, ctx.x_dtype = call, x.dtype
        if not x.dtype == weight.dtype == dtype:
            x, weight = x.to(dtype), weight.to(dtype)
        if bias is not None and bias.dtype != dtype:
            bias = bias.to(dtype)
        ctx.save_for_backward(x, weight)
        y = F.linear(x, weight.t() if call.swapped else weight, bias)
        return y.data if y._is_view() else y  # as a view it could not be written to

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        call: Call = ctx.call
        with no_autocast(g.device):
            run, flat = Backward(ctx, call), g.reshape(-1, g.shape[-1])

            def input_gradient() -> Tensor:
                dx = torch.mm(flat, weight.t() if call.swapped else weight).view(x.shape)
                return dx if dx.dtype == ctx.x_dtype else dx.to(ctx.x_dtype)

            dx = run.tested(input_gradient)
            layout, segments = call.layout, call.segments  # once they are proven
            g_rows, x_rows = flat if layout.in_order else layout.rows_of(g), layout.rows_of(x)
            outer = Outer(x_rows, g_rows, segments, run.backend)
            db, of_bias = run.deliver(1, 3, lambda: summed(g_rows, segments, run.backend))
            dw, of_weight = run.deliver(0, 2, lambda: outer.transposed() if call.swapped else outer)
            dx = run.last(dx, input_gradient)
        return None, dx, dw, db, None, of_weight, of_bias


def multiply_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    function: str,
    *,
    swapped: bool = False,
    layout: Layout | None = None,
) -> Any:
    """The rule of every product with a matrix; ``layout``: where it is known what the rows are."""
    if isinstance(x, Tap) or weight.dim() != 2 or (isinstance(bias, Tensor) and bias.dim() != 1):
        return NotImplemented
    taps = [tap for tap in (weight, bias) if isinstance(tap, Tap)]
    if any(tap.looked_up or tap.is_met_by_constant(x) for tap in taps):
        return NotImplemented
    if isinstance(weight, Tap) and bias is None and _is_identity(taps[0].observation, x):
        return weight if swapped else weight.viewed(Tensor.t, "t")
    call, weight, bias = tapped_call(x, weight, bias, function, layout=layout, swapped=swapped)
    return _apply_linear(call, x, weight, bias)


def _is_identity(observation: Observation, x: Tensor) -> bool:
    """Whether this is no batch but asks for the matrix itself, as DoRA does."""
    if x.requires_grad or x.dim() != 2 or x.shape[0] != x.shape[1] or observation.is_input(x):
        return False
    return torch.equal(x, torch.eye(len(x), dtype=x.dtype, device=x.device))


def _apply_linear(call: Call, x: Tensor, weight: Any, bias: Tensor | None) -> Any:
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    else:
        dtype = x.dtype if x.dtype == weight.dtype else torch.result_type(x, weight)
    return _Linear.apply(call, x, weight, bias, dtype, *call.probes)


def linear_module(observation: Observation, module: nn.Linear, input: Tensor) -> Any:
    """`linear` without the detour through taps."""
    if type(input) is Tensor and not input.requires_grad and _is_identity(observation, input):
        return NotImplemented
    if (found := module_call(observation, module, input, "linear")) is None:
        return NotImplemented
    call, weight, bias = found
    return _apply_linear(call, input, weight, bias)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    return multiply_rows(input, weight, bias, "linear")


def addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    return NotImplemented if beta != 1 or alpha != 1 else multiply_rows(mat1, mat2, input, "addmm", swapped=True)


def matmul(input: Tensor, other: Tensor) -> Any:
    """``x W``, or ``W x``, which is ``(xᵀ Wᵀ)ᵀ``."""
    if isinstance(other, Tap):
        return multiply_rows(input, other, None, "matmul", swapped=True)
    if input.dim() != 2 or other.dim() < 3:
        return NotImplemented
    y = multiply_rows(other.mT, input, None, "matmul")
    return y if y is NotImplemented else y.mT.contiguous()  # as torch returns it: some callers view it


def mm(input: Tensor, mat2: Tensor) -> Any:
    return matmul(input, mat2)


class _Bilinear(Observed):
    """``y[r, o] = Σ_ij w[o, i, j] x₁[r, i] x₂[r, j] + b[o]``, of ``x = [x₁, x₂]``."""

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, *probes: Tensor | None) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(x, weight)
        first, second = x.split(weight.shape[1:], -1)
        return F.bilinear(first, second, weight, bias)

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        call: Call = ctx.call
        with no_autocast(g.device):
            run = Backward(ctx, call)
            dx = None
            if ctx.needs_input_grad[1]:
                first, second = x.split(weight.shape[1:], -1)
                between = (g @ weight.flatten(1)).unflatten(-1, weight.shape[1:])  # Σ_o g[o] w[o]
                dx = torch.cat([(between @ second[..., None])[..., 0], (first[..., None, :] @ between)[..., 0, :]], -1)
                run.tag(dx)
            g_rows = call.layout.rows_of(g)

            def weight_gradient() -> Outer:
                one, other = call.layout.rows_of(x.detach()).split(weight.shape[1:], -1)
                pairs = (one[:, :, None] * other[:, None, :]).flatten(1)
                return Outer(pairs, g_rows, call.segments, run.backend)

            dw, of_weight = run.deliver(0, 2, weight_gradient)
            db, of_bias = run.deliver(1, 3, lambda: summed(g_rows, call.segments, run.backend))
        return None, dx, dw, db, of_weight, of_bias


def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    taps = [tap for tap in (weight, bias) if isinstance(tap, Tap)]
    if isinstance(input1, Tap) or isinstance(input2, Tap) or any(tap.looked_up for tap in taps):
        return NotImplemented
    if any(tap.is_met_by_constant(input1) and tap.is_met_by_constant(input2) for tap in taps):
        return NotImplemented
    both = torch.cat([input1, input2], -1)  # the row test goes up through one input
    if torch.is_autocast_enabled(both.device.type):
        both = both.to(torch.result_type(both, weight))  # as autocast does on GPUs; on CPUs plain torch refuses
    call, weight, bias = tapped_call(both, weight, bias, "bilinear")
    return _Bilinear.apply(call, both, weight, bias, *call.probes)
