"""Convolutions and transposed convolutions of one, two and three dimensions: one function, and a rule for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradnorm_ext.gradients import ConvGrad, Geometry, GradientTerm
from gradnorm_ext.layers.calls import Backward, Call, Observed, first_order, no_autocast, summed, tapped_call
from gradnorm_ext.layers.taps import Tap
from gradnorm_ext.reference import accumulator


class _Convolution(Observed):
    """``y[n, o, p] = Σ_ck w[o, c, k] x[n, c, stride p + dilation k - padding] + b[o]``, or its transpose."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        dtype: torch.dtype | None,
        *probes: Tensor | None,
    ) -> Tensor:
        ctx.call, ctx.geometry, ctx.x_dtype = call, geometry, x.dtype
        if dtype is not None:
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        ctx.save_for_backward(x, weight)
        return torch.convolution(x, weight, bias, *geometry)

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        call: Call = ctx.call
        with no_autocast(g.device):
            run = Backward(ctx, call)
            dx = None
            if ctx.needs_input_grad[1]:
                mask = [True, False, False]
                dx = torch.ops.aten.convolution_backward(g, x, weight, None, *ctx.geometry, mask)[0].to(ctx.x_dtype)
                run.tag(dx)

            def weight_gradient() -> GradientTerm:
                x_images, g_images = (call.layout.rows_of(side).view_as(side) for side in (x.detach(), g))
                geometry, segments = ctx.geometry, call.segments
                return ConvGrad(x_images, g_images, weight.shape, geometry, segments, run.backend).compact()

            def bias_gradient() -> GradientTerm:
                of_images = g.flatten(2).sum(2, dtype=accumulator(g.dtype))
                return summed(call.layout.rows_of(of_images), call.segments, run.backend)

            dw, of_weight = run.deliver(0, 2, weight_gradient)
            db, of_bias = run.deliver(1, 3, bias_gradient)
        return None, dx, dw, db, None, None, of_weight, of_bias


def _convolve(x: Any, weight: Any, bias: Any, geometry: Geometry, function: str) -> Any:
    taps = [tap for tap in (weight, bias) if isinstance(tap, Tap)]
    if isinstance(x, Tap) or any(tap.looked_up or tap.is_met_by_constant(x) for tap in taps):
        return NotImplemented
    if x.dim() != weight.dim():
        raise taps[0].refusal(f"{function} (of an input without a batch dimension)")
    call, weight, bias = tapped_call(x, weight, bias, function, x.dim() - 1)
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else None
    return _Convolution.apply(call, x, weight, bias, geometry, dtype, *call.probes)


def _each(size: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return sizes * dimensions if len(sizes) == 1 else sizes


def convolution(dimensions: int) -> Callable[..., Any]:
    """The rule of ``conv1d``, ``conv2d`` or ``conv3d``."""

    def rule(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Any:
        spread = _each(dilation, dimensions)
        if padding == "same" and max(_each(stride, dimensions)) == 1:
            reach = [d * (k - 1) for d, k in zip(spread, weight.shape[2:], strict=True)]
            if any(r % 2 for r in reach):  # the odd entry goes to the right, as in torch
                input = F.pad(input, [side for r in reversed(reach) for side in (0, r % 2)])
            padding = [r // 2 for r in reach]
        elif padding == "valid":
            padding = 0
        elif isinstance(padding, str):
            return NotImplemented  # and torch says why not
        sizes = _each(stride, dimensions), _each(padding, dimensions), spread
        return _convolve(input, weight, bias, Geometry(*sizes, False, (0,) * dimensions, groups), f"conv{dimensions}d")

    return rule


def transposed_convolution(dimensions: int) -> Callable[..., Any]:
    """The rule of ``conv_transpose1d``, ``conv_transpose2d`` or ``conv_transpose3d``."""

    def rule(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        dilation: int | Sequence[int] = 1,
    ) -> Any:
        steps, sides, spread, more = (_each(size, dimensions) for size in (stride, padding, dilation, output_padding))
        geometry = Geometry(steps, sides, spread, True, more, groups)
        return _convolve(input, weight, bias, geometry, f"conv_transpose{dimensions}d")

    return rule
