"""Normalizations: what they scale and shift with is a parameter, what they normalise with is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradnorm_ext.gradients import GradientTerm
from gradnorm_ext.layers.calls import (
    Backward,
    Call,
    Observed,
    first_order,
    module_call,
    no_autocast,
    normalised_product,
    summed,
    tapped_call,
)
from gradnorm_ext.layers.elementwise import multiply
from gradnorm_ext.layers.observation import Observation
from gradnorm_ext.layers.taps import Tap
from gradnorm_ext.reference import accumulator


class _LayerNorm(Observed):
    """``y = (x - mean) / deviation ⊙ w + b`` over the last dimensions, as many as ``shape`` has."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        shape: tuple[int, ...],
        eps: float,
        *probes: Tensor | None,
    ) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.call, ctx.shape = call, shape
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        call: Call = ctx.call
        with no_autocast(g.device):
            run = Backward(ctx, call)
            g = g.contiguous()

            def input_gradient() -> Tensor:
                backward = torch.ops.aten.native_layer_norm_backward.default
                dx: Tensor = backward(g, x, ctx.shape, mean, rstd, weight, bias, [True, False, False])[0]
                return dx

            dx = run.tested(input_gradient)
            dw, of_weight = run.deliver(0, 2, lambda: normalised_product(x, g, call, mean, rstd).shaped(ctx.shape))
            db, of_bias = run.deliver(
                1, 3, lambda: summed(call.layout.rows_of(g), call.segments, run.backend).shaped(ctx.shape)
            )
            dx = run.last(dx, input_gradient)
        return None, dx, dw, db, None, None, of_weight, of_bias


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    taps = [tap for tap in (weight, bias) if isinstance(tap, Tap)]
    if isinstance(input, Tap) or any(tap.looked_up for tap in taps):
        return NotImplemented
    call, weight, bias = tapped_call(input, weight, bias, "layer_norm", len(normalized_shape))
    return _apply_layer_norm(call, input, weight, bias, tuple(normalized_shape), eps)


def _apply_layer_norm(
    call: Call, x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...], eps: float
) -> Any:
    if torch.is_autocast_enabled(x.device.type):
        x, weight, bias = (None if t is None else t.float() for t in (x, weight, bias))  # type: ignore[assignment]
    return _LayerNorm.apply(call, x, weight, bias, shape, eps, *call.probes)


def layer_norm_module(observation: Observation, module: nn.LayerNorm, input: Tensor) -> Any:
    """`layer_norm` without the detour through taps."""
    shape = module.normalized_shape
    if (found := module_call(observation, module, input, "layer_norm", len(shape))) is None:
        return NotImplemented
    call, weight, bias = found
    return _apply_layer_norm(call, input, weight, bias, shape, module.eps)


class _GroupNorm(Observed):
    """``y[n, c] = (x[n, c] - mean[n, group of c]) / deviation ⊙ w[c] + b[c]``."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        groups: int,
        eps: float,
        *probes: Tensor | None,
    ) -> Tensor:
        x = x.contiguous()
        images, channels, entries = len(x), x.shape[1], x.shape[2:].numel()
        y, mean, rstd = torch.native_group_norm(x, weight, bias, images, channels, entries, groups, eps)
        ctx.call = call
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        call: Call = ctx.call
        with no_autocast(g.device):
            run = Backward(ctx, call)
            # One image whose channels are those of all images: then torch's sums over images are sums over one.
            as_one = g.contiguous(), x, mean.view(1, -1), rstd.view(1, -1), weight.repeat(len(x))
            sizes = 1, len(x) * x.shape[1], x.shape[2:].numel(), mean.numel()
            needed = [ctx.needs_input_grad[i + 2] or call.uses[i] is not None for i in range(2)]
            dx, of_scales, of_shifts = torch.ops.aten.native_group_norm_backward(
                *as_one, *sizes, [ctx.needs_input_grad[1], *needed]
            )
            if dx is not None:
                dx = dx.view_as(x)
                run.tag(dx)

            def of_examples(sums: Tensor) -> GradientTerm:
                return summed(call.layout.rows_of(sums.view(x.shape[:2])), call.segments, run.backend)

            dw, of_weight = run.deliver(0, 2, lambda: of_examples(of_scales))
            db, of_bias = run.deliver(1, 3, lambda: of_examples(of_shifts))
        return None, dx, dw, db, None, None, of_weight, of_bias


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Any:
    if weight is None or (found := _operands(input, weight, bias, "group_norm")) is None:
        return NotImplemented
    call, scale, shift = found
    if torch.is_autocast_enabled(input.device.type):
        input, scale, shift = (None if t is None else t.float() for t in (input, scale, shift))  # type: ignore[assignment]
    return _GroupNorm.apply(call, input, scale, shift, num_groups, eps, *call.probes)


class _Affine(Observed):
    """``y[n, c] = x[n, c] ⊙ w[c] + b[c]``."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, x: Tensor, weight: Tensor | None, bias: Tensor | None, *probes: Tensor | None
    ) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(x, weight)
        y = x if weight is None else x * _per_channel(weight, x)
        return y if bias is None else y + _per_channel(bias, x)

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        call: Call = ctx.call
        with no_autocast(g.device):
            run = Backward(ctx, call)
            dx = None
            if ctx.needs_input_grad[1]:
                dx = (g if weight is None else g * _per_channel(weight, g)).to(x.dtype)
                run.tag(dx)

            def over_positions(products: Tensor) -> GradientTerm:
                sums = products.reshape(*x.shape[:2], -1).sum(2, dtype=accumulator(g.dtype))
                return summed(call.layout.rows_of(sums), call.segments, run.backend)

            dw, of_weight = run.deliver(0, 2, lambda: over_positions(g.to(accumulator(g.dtype)) * x))
            db, of_bias = run.deliver(1, 3, lambda: over_positions(g))
        return None, dx, dw, db, of_weight, of_bias


def _per_channel(parameter: Tensor, of: Tensor) -> Tensor:
    return parameter.view(-1, *[1] * (of.dim() - 2))


def _operands(x: Any, weight: Any, bias: Any, function: str) -> tuple[Call, Tensor | None, Tensor | None] | None:
    """The call of a function that scales and shifts channels, ``[images, channels, ...]``, and what it computes with."""
    taps = [tap for tap in (weight, bias) if isinstance(tap, Tap)]
    if (
        isinstance(x, Tap)
        or x.dim() < 2
        or any(tap.looked_up or tap.dim() != 1 or tap.is_met_by_constant(x) for tap in taps)
    ):
        return None
    return tapped_call(x, weight, bias, function, x.dim() - 1)


def _affine(x: Tensor, normalised: Tensor, weight: Any, bias: Any, function: str) -> Any:
    if (found := _operands(x, weight, bias, function)) is None:
        return NotImplemented
    call, scale, shift = found
    return _Affine.apply(call, normalised, scale, shift, *call.probes)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if isinstance(input, Tap):
        return NotImplemented
    normalised = F.instance_norm(input, running_mean, running_var, None, None, use_input_stats, momentum, eps)
    return _affine(input, normalised, weight, bias, "instance_norm")


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Of statistics that are given: those of the batch would make one example's output depend on the others."""
    if isinstance(input, Tap) or training:
        return NotImplemented
    normalised = F.batch_norm(input, running_mean, running_var, None, None, False, momentum, eps)
    return _affine(input, normalised, weight, bias, "batch_norm")


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Any:
    """The normalised input is an activation like any other; only the scale is a parameter's business."""
    return multiply(F.rms_norm(input, normalized_shape, None, eps), weight)
