"""Functions of entries: a parameter times, plus, minus or under a batch it is broadcast to, or a function of it alone."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from gradnorm_ext.gradients import GradientTerm, Lookup
from gradnorm_ext.layers.calls import (
    Backward,
    Call,
    Observed,
    first_order,
    is_row,
    no_autocast,
    normalised_product,
    spread,
    summed,
)
from gradnorm_ext.layers.observation import Use
from gradnorm_ext.layers.taps import LookedUp, Tap, saving_themselves


class _Product(Observed):
    """``y = x ⊙ w``, broadcast."""

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, weight: Tensor, probe: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        call: Call = ctx.call
        with no_autocast(g.device):
            run = Backward(ctx, call)
            dx = None
            if ctx.needs_input_grad[1]:
                dx = (g * weight).sum_to_size(x.shape).to(x.dtype)
                run.tag(dx)

            def scale_gradient() -> GradientTerm:
                if is_row(weight.shape, g.shape) and x.shape == g.shape:
                    return normalised_product(x, g, call, None, None).shaped(weight.shape)
                return spread(g * x, weight.shape, call)

            dw, of_weight = run.deliver(0, 2, scale_gradient)
        return None, dx, dw, of_weight


class _Sum(Observed):
    """``y = x + w``, broadcast; or ``y = x + W[ids]`` for ids that all examples share (a position table)."""

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, operand: Tensor, looked_up: LookedUp | None, probe: Tensor) -> Tensor:
        added = operand if looked_up is None else looked_up.rows
        ctx.call, ctx.x_shape, ctx.x_dtype, ctx.added_shape = call, x.shape, x.dtype, added.shape
        ctx.looked_up, ctx.vocabulary = looked_up, len(operand) if looked_up else 0
        return x + added

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        call: Call = ctx.call
        with no_autocast(g.device):
            run = Backward(ctx, call)
            dx = None
            if ctx.needs_input_grad[1]:
                dx = g.sum_to_size(ctx.x_shape).to(ctx.x_dtype)
                run.tag(dx)

            def gradient() -> GradientTerm:
                if ctx.looked_up is not None:
                    per_example = call.layout.per_example(g, ctx.added_shape, run.backend)
                    return _shared_lookup(per_example, ctx.looked_up, ctx.vocabulary, call)
                if is_row(ctx.added_shape, g.shape):
                    return summed(call.layout.rows_of(g), call.segments, run.backend).shaped(ctx.added_shape)
                return spread(g, ctx.added_shape, call)

            dw, of_operand = run.deliver(0, 2, gradient)
        return None, dx, dw, None, of_operand


def _shared_lookup(per_example: Tensor, looked_up: LookedUp, vocabulary: int, call: Call) -> Lookup:
    ids = looked_up.ids.reshape(-1).repeat(call.segments.count)
    rows = looked_up.rows_of(per_example).flatten(0, 1)
    segments = call.observation.segments(len(ids))
    return Lookup(ids, rows, vocabulary, looked_up.padding_idx, segments, call.observation.backend)


def _meet(tap: Tap, other: Any, function: str) -> tuple[Call, Use] | None:
    """The call of an elementwise function of a parameter and a batched tensor, or None where they do not meet so."""
    observation = tap.observation
    if tap.is_unmeasurable or not isinstance(other, Tensor) or isinstance(other, Tap) or observation.is_constant(other):
        return None
    if tap.is_met_by_constant(other):
        return None
    shape = torch.broadcast_shapes(tap.shape, other.shape)
    alone = observation.examples is not None and observation.examples <= 1
    if not alone and (other.dim() != len(shape) or not shape):
        return None
    layout = observation.layout(other.expand(shape), 1 if len(shape) > 1 else 0, tap.slot.name, function)
    if not alone and not layout.meets(tap.shape, len(shape)):
        return None
    if not observation.traces:  # sizes that are compared there become guards of the graph
        layout.fix_unless_another_meets(tap.shape, len(shape))
    use = tap.use(function, layout, sums=True)
    if tap.looked_up is not None:
        observation.look_up(use, tap.looked_up.ids)
    return Call(observation, layout, use), use


def multiply(input: Any, other: Any) -> Any:
    tap, factor = (input, other) if isinstance(input, Tap) else (other, input)
    if tap.looked_up is not None:
        return NotImplemented
    if type(factor) in (int, float) and factor == 0:
        return tap.value * factor  # to nobody's gradient: a parameter that all ranks have to use
    if (meeting := _meet(tap, factor, "mul")) is None:
        return _curved(tap, factor, lambda value: value * factor)
    call, use = meeting
    return _Product.apply(call, factor, use.operand, *call.probes)


class _Curve(torch.autograd.Function):
    """A function of each entry whose slopes are known; nothing is saved that a backward would free."""

    @staticmethod
    def forward(ctx: Any, entries: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.slope = slope
        return value.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        return (g * ctx.slope).to(ctx.slope.dtype), None, None


def _curved(tap: Any, others: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """What a function of each entry makes of a parameter and constants."""
    if not isinstance(tap, Tap) or tap.looked_up is not None or tap.observation.derives:
        return NotImplemented
    if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(others)):
        return NotImplemented
    with torch.enable_grad(), saving_themselves():
        entries = tap.value.detach().requires_grad_()
        value = function(entries)
        if value.shape != tap.shape:
            return NotImplemented
        (slope,) = torch.autograd.grad(value.sum(), entries)
    return tap.viewed(lambda entries: _Curve.apply(entries, value.detach(), slope), "curved")


def curve_rule(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of each entry by itself: ``exp``, ``softplus``."""

    def curve(input: Any, *args: Any, **kwargs: Any) -> Any:
        return _curved(input, (args, kwargs), lambda value: function(value, *args, **kwargs))

    return curve


def add(input: Any, other: Any, *, alpha: float = 1) -> Any:
    if alpha != 1:
        other = multiply(other, alpha) if isinstance(other, Tap) else other * alpha
        if other is NotImplemented:
            return NotImplemented
    tap, addend = (input, other) if isinstance(input, Tap) else (other, input)
    if not isinstance(tap, Tap):  # what was scaled by zero
        return input + other
    if not isinstance(addend, Tensor):  # 1 + w: its gradient is the parameter's
        return NotImplemented if tap.looked_up else tap.viewed(lambda value: value + addend, "add")
    if (meeting := _meet(tap, addend, "add")) is None:
        return NotImplemented
    call, use = meeting
    return _Sum.apply(call, addend, use.operand, tap.looked_up, *call.probes)


def negative(input: Tap) -> Any:
    return NotImplemented if input.looked_up is not None else input.viewed(torch.neg, "negative")


def subtract(input: Any, other: Any, *, alpha: float = 1) -> Any:
    """``x - w`` and ``w - x``: sums with what is negative."""
    if isinstance(input, Tap) and isinstance(other, Tap):
        return NotImplemented
    if alpha != 1:
        return add(input, other, alpha=-alpha)
    if isinstance(input, Tap):
        return add(input, -other)
    minus = negative(other)
    return NotImplemented if minus is NotImplemented else add(input, minus)


def subtract_from(input: Any, other: Any, *, alpha: float = 1) -> Any:
    return subtract(other, input, alpha=alpha)


class _Quotient(Observed):
    """``y = x / w``, broadcast."""

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, weight: Tensor, probe: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(x, weight)
        return x / weight

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        call: Call = ctx.call
        with no_autocast(g.device):
            run = Backward(ctx, call)
            dx = None
            if ctx.needs_input_grad[1]:
                dx = (g / weight).sum_to_size(x.shape).to(x.dtype)
                run.tag(dx)
            dw, of_weight = run.deliver(0, 2, lambda: spread(-g * ((x / weight) / weight), weight.shape, call))
        return None, dx, dw, of_weight


def divide(input: Any, other: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None:
        return NotImplemented
    if isinstance(input, Tap):
        return _curved(input, other, lambda value: value / other)
    if other.looked_up is not None or (meeting := _meet(other, input, "div")) is None:
        return NotImplemented
    call, use = meeting
    return _Quotient.apply(call, input, use.operand, *call.probes)


def prelu(input: Any, weight: Any) -> Any:
    """``max(x, 0) + w min(x, 0)``, with a weight for each channel or one for all."""
    if isinstance(input, Tap) or weight.looked_up is not None or weight.dim() > 1:
        return NotImplemented
    if weight.numel() > 1:
        shape = -1, *[1] * (input.dim() - 2)
        weight = weight.viewed(lambda value: value.view(shape), "reshape")
    negative_part = multiply(input.clamp(max=0), weight)
    return NotImplemented if negative_part is NotImplemented else F.relu(input) + negative_part


class _Choice(Observed):
    """``y = w where mask else x``, broadcast."""

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, weight: Tensor, mask: Tensor, probe: Tensor) -> Tensor:
        ctx.call, ctx.x_shape, ctx.x_dtype, ctx.weight_shape = call, x.shape, x.dtype, weight.shape
        ctx.save_for_backward(mask)
        return torch.where(mask, weight, x)

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        (mask,) = ctx.saved_tensors
        call: Call = ctx.call
        with no_autocast(g.device):
            run = Backward(ctx, call)
            dx = None
            if ctx.needs_input_grad[1]:
                dx = g.masked_fill(mask, 0).sum_to_size(ctx.x_shape).to(ctx.x_dtype)
                run.tag(dx)
            dw, of_weight = run.deliver(0, 2, lambda: spread(g.masked_fill(~mask, 0), ctx.weight_shape, call))
        return None, dx, dw, None, of_weight


def _chosen(mask: Any, tap: Tap, other: Any) -> Any:
    """The parameter where a mask is set, else an activation: a mask token."""
    if not isinstance(mask, Tensor) or isinstance(mask, Tap) or mask.dtype != torch.bool or tap.looked_up is not None:
        return NotImplemented
    if not isinstance(other, Tensor):
        other = tap.value.detach().new_full(torch.broadcast_shapes(mask.shape, tap.shape), other)
    shape = torch.broadcast_shapes(tap.shape, other.shape)
    if torch.broadcast_shapes(shape, mask.shape) != shape or (meeting := _meet(tap, other, "where")) is None:
        return NotImplemented
    call, use = meeting
    return _Choice.apply(call, other, use.operand, mask, *call.probes)


def where(condition: Any, input: Any, other: Any) -> Any:
    """Of a parameter and an activation, or of a bias per pair of positions and a mask."""
    if isinstance(condition, Tap) or (isinstance(input, Tap) and isinstance(other, Tap)):
        return NotImplemented
    tap = input if isinstance(input, Tap) else other
    if tap.looked_up is None:
        return _chosen(condition, tap, other) if tap is input else _chosen(~condition, tap, input)
    given = given_to_batch(tap)
    if given is NotImplemented:
        return NotImplemented
    return torch.where(condition, given, other) if tap is input else torch.where(condition, input, given)


def where_method(input: Any, condition: Any, other: Any) -> Any:
    return where(condition, input, other)


def masked_fill(input: Any, mask: Any, value: Any) -> Any:
    return _chosen(mask, value, input) if isinstance(value, Tap) and not isinstance(input, Tap) else NotImplemented


def copy_(input: Any, other: Any, non_blocking: bool = False) -> Any:
    """A parameter written over an activation, broadcast."""
    if isinstance(input, Tap) or torch.broadcast_shapes(input.shape, other.shape) != input.shape:
        return NotImplemented
    written = add(torch.zeros_like(input, dtype=other.dtype), other)
    return NotImplemented if written is NotImplemented else input.copy_(written)


def fill_(input: Any, value: Any) -> Any:
    return copy_(input, value) if isinstance(value, Tap) and value.dim() == 0 else NotImplemented


def set_item(input: Any, index: Any, value: Any) -> Any:
    """``x[index] = w``: of a mask, or of a part of x."""
    if not isinstance(value, Tap) or isinstance(input, Tap):
        return NotImplemented
    if is_view_index(index):
        return copy_(input[index], value)
    if not isinstance(index, Tensor) or index.dtype != torch.bool or value.dim() > input.dim() - index.dim():
        return NotImplemented
    mask = index.view(*index.shape, *[1] * (input.dim() - index.dim()))
    chosen = _chosen(mask, value, input.clone())
    return NotImplemented if chosen is NotImplemented else input.copy_(chosen)


def is_view_index(index: Any) -> bool:
    """Whether ``x[index]`` is a view of x, none of whose entries is there twice."""
    if isinstance(index, tuple):
        return all(is_view_index(one) for one in index)
    if isinstance(index, Tensor):
        return index.dim() == 0 and index.dtype != torch.bool
    return index is None or index is ... or isinstance(index, (Integral, slice, torch.SymInt))


def in_place(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of a function that writes its result into its first argument, an activation."""

    def write(input: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(input, Tap):
            return NotImplemented
        result = rule(input.clone(), *args, **kwargs)  # a backward may need what it was
        return result if result is NotImplemented else input.copy_(result)

    return write


def given_to_batch(tap: Tap) -> Any:
    """Rows that all examples share, ``[1, ...]``, as each example's own: ``[B, ...]``."""
    batch = tap.observation.batch
    if batch is None or batch.packing is not None or tap.looked_up is None or tap.dim() < 2:
        return NotImplemented
    zeros = tap.value.new_zeros(()).expand(batch.count, *tap.shape[1:])
    if tap.shape[0] != 1 or (meeting := _meet(tap, zeros, "expand")) is None:
        return NotImplemented
    call, use = meeting
    return _Sum.apply(call, zeros, use.operand, tap.looked_up, *call.probes)


_T = Tensor
CURVES: tuple[Callable[..., Any], ...] = (
    *(torch.exp, _T.exp, torch.log, _T.log, torch.sqrt, _T.sqrt, torch.rsqrt, _T.rsqrt, torch.square, _T.square),
    *(torch.sigmoid, _T.sigmoid, torch.tanh, _T.tanh, F.softplus, F.silu, F.relu, torch.relu, _T.relu),
    *(torch.pow, _T.pow, _T.__pow__, torch.reciprocal, _T.reciprocal, torch.abs, _T.abs, torch.clamp, _T.clamp),
)
