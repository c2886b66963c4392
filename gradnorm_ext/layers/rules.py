"""One rule per torch function that may consume a parameter: its gradient and norms, by the forms of `gradnorm_ext.gradients`.

A rule is called in place of the function, with at least one `Tap` among its arguments. It returns what the function
returns, or NotImplemented where it does not know the call. To support another function: write its autograd.Function,
whose backward hands `Observation.deliver` a contribution, and list the rule at the end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradnorm_ext.gradients import GradientTerm, Lookup
from gradnorm_ext.layers.attention import multi_head_attention_forward
from gradnorm_ext.layers.bags import embedding_bag
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
from gradnorm_ext.layers.convolutions import convolution, transposed_convolution
from gradnorm_ext.layers.layouts import Examples, Layout
from gradnorm_ext.layers.linears import addmm, bilinear, linear, linear_module, matmul
from gradnorm_ext.layers.normalizations import batch_norm, group_norm, instance_norm, layer_norm, layer_norm_module
from gradnorm_ext.layers.observation import Observation, Use
from gradnorm_ext.layers.taps import LookedUp, Tap, saving_themselves


class _Embedding(Observed):
    """``y[r] = W[ids[r]]``."""

    @staticmethod
    def forward(ctx: Any, call: Call, ids: Tensor, weight: Tensor, padding_idx: int | None, probe: Tensor) -> Tensor:
        ctx.call, ctx.padding_idx, ctx.vocabulary = call, padding_idx, len(weight)
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight)

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        (ids,) = ctx.saved_tensors
        call: Call = ctx.call
        with no_autocast(g.device):
            run = Backward(ctx, call)
            rows = call.layout.ids_of(ids), call.layout.rows_of(g)
            dw, of_weight = run.deliver(
                0, 2, lambda: Lookup(*rows, ctx.vocabulary, ctx.padding_idx, call.segments, run.backend)
            )
        return None, None, dw, None, of_weight


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if not isinstance(weight, Tap) or weight.looked_up is not None or weight.dim() != 2:
        return NotImplemented
    for option, given in (("max_norm", max_norm), ("scale_grad_by_freq", scale_grad_by_freq), ("sparse", sparse)):
        if given:
            raise weight.refusal(f"embedding with {option}={given}")
    if padding_idx is not None and padding_idx < 0:
        padding_idx += len(weight)
    observation = weight.observation
    if _is_shared(observation, weight, input):
        return weight.looked_up_rows(F.embedding(input, weight.value, padding_idx), input, padding_idx)
    layout = observation.layout(input, 0, weight.name, "embedding")
    use = weight.use("embedding", layout)
    input = observation.look_up(use, input)
    use.needs_proof = True  # these may be positions, of a table that all examples share
    call = Call(observation, layout, use)
    return _Embedding.apply(call, input, use.operand, padding_idx, *call.probes)


def _is_shared(observation: Observation, weight: Tap, ids: Tensor) -> bool:
    """Whether looked-up ids have no batch dimension (`Observation`, hypothesis 3)."""
    batch = observation.batch
    assert batch is not None
    if (weight.name, ids.dim()) in observation.memory.shared_lookups:
        return True
    if batch.count <= 1:
        return False
    if batch.packing is not None and ids.numel() == batch.packing.rows:
        return False
    if observation.is_input(ids) and batch.kind_of(ids.shape, observation.rows_per_example) is not None:
        return False
    return ids.dim() <= batch.batch_dim or ids.shape[batch.batch_dim] != batch.count


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Any:
    """The normalised input is an activation like any other; only the scale is a parameter's business."""
    return multiply(F.rms_norm(input, normalized_shape, None, eps), weight)


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
    if not isinstance(other, Tensor) or isinstance(other, Tap) or observation.is_constant(other):
        return None
    if tap.is_met_by_constant(other):
        return None
    shape = torch.broadcast_shapes(tap.shape, other.shape)
    alone = observation.examples is not None and observation.examples <= 1
    if not alone and (other.dim() != len(shape) or not shape):
        return None
    layout = observation.layout(other.expand(shape), 1 if len(shape) > 1 else 0, tap.name, function)
    if not alone and not layout.meets(tap.shape, len(shape)):
        return None
    use = tap.use(function, layout, sums=True)
    use.needs_proof = not other.requires_grad  # that may be no data, but a constant with a size of B
    if tap.looked_up is not None:
        observation.look_up(use, tap.looked_up.ids)
    return Call(observation, layout, use), use


def multiply(first: Any, second: Any) -> Any:
    tap, other = (first, second) if isinstance(first, Tap) else (second, first)
    if tap.looked_up is not None:
        return NotImplemented
    if (meeting := _meet(tap, other, "mul")) is None:
        return _curved(tap, other, lambda value: value * other)
    call, use = meeting
    return _Product.apply(call, other, use.operand, *call.probes)


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


def _curve_rule(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of each entry by itself: ``exp``, ``softplus``."""

    def curve(tap: Any, *args: Any, **kwargs: Any) -> Any:
        return _curved(tap, (args, kwargs), lambda value: function(value, *args, **kwargs))

    return curve


def add(first: Any, second: Any, *, alpha: float = 1) -> Any:
    tap, other = (first, second) if isinstance(first, Tap) else (second, first)
    if alpha != 1:
        return NotImplemented
    if not isinstance(other, Tensor):  # 1 + w: its gradient is the parameter's
        return NotImplemented if tap.looked_up else tap.viewed(lambda value: value + other, "add")
    if (meeting := _meet(tap, other, "add")) is None:
        return NotImplemented
    call, use = meeting
    return _Sum.apply(call, other, use.operand, tap.looked_up, *call.probes)


def negative(tap: Tap) -> Any:
    return NotImplemented if tap.looked_up is not None else tap.viewed(torch.neg, "negative")


def subtract(first: Any, second: Any, *, alpha: float = 1) -> Any:
    """``x - w`` and ``w - x``: sums with what is negative."""
    if alpha != 1 or (isinstance(first, Tap) and isinstance(second, Tap)):
        return NotImplemented
    if isinstance(first, Tap):
        return add(first, -second)
    minus = negative(second)
    return NotImplemented if minus is NotImplemented else add(first, minus)


def subtract_from(first: Any, second: Any) -> Any:
    return subtract(second, first)


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


def divide(first: Any, second: Any, **rounding: Any) -> Any:
    if isinstance(first, Tap) and not rounding:
        return _curved(first, second, lambda value: value / second)
    if (
        rounding
        or isinstance(first, Tap)
        or second.looked_up is not None
        or (meeting := _meet(second, first, "div")) is None
    ):
        return NotImplemented
    call, use = meeting
    return _Quotient.apply(call, first, use.operand, *call.probes)


def prelu(input: Any, weight: Any) -> Any:
    """``max(x, 0) + w min(x, 0)``, with a weight for each channel or one for all."""
    if isinstance(input, Tap) or weight.looked_up is not None or weight.dim() > 1:
        return NotImplemented
    if weight.numel() > 1:
        shape = -1, *[1] * (input.dim() - 2)
        weight = weight.viewed(lambda value: value.view(shape), "reshape")
    negative_part = multiply(input.clamp(max=0), weight)
    return NotImplemented if negative_part is NotImplemented else F.relu(input) + negative_part


class _Expand(Observed):
    """``y[b] = w`` for every example: a class token given to the batch."""

    @staticmethod
    def forward(ctx: Any, call: Call, weight: Tensor, shape: torch.Size, probe: Tensor) -> Tensor:
        ctx.call, ctx.weight_shape = call, weight.shape
        return weight.expand(shape)

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        call: Call = ctx.call
        run = Backward(ctx, call)
        dw, of_weight = run.deliver(0, 1, lambda: spread(g, ctx.weight_shape, call))
        return None, dw, None, of_weight


def expand(tap: Tap, *sizes: Any) -> Any:
    """``w.expand(B, ...)``: from here on every example has its own copy, whose gradient arrives by itself."""
    shape, batch = tap.value.expand(*sizes).shape, tap.observation.batch
    own = (1,) * (len(shape) - tap.dim()) + tap.shape
    assert batch is not None
    if tap.looked_up is not None and shape == (batch.count, *tap.shape[1:]):
        return _given(tap)
    if tap.looked_up is not None or not shape:
        return NotImplemented
    if shape[0] == batch.count and own[0] == 1:
        layout = Layout("leading", shape[:1], batch)
    elif len(shape) > 1 and shape[0] == 1 and shape[1] == batch.count and own[1] == 1:
        layout = Layout("second", shape[:2], batch)
    else:
        return _expand_to_packed(tap, own, shape, batch)
    use = tap.use("expand", layout, sums=True)
    call = Call(tap.observation, layout, use)
    return _Expand.apply(call, use.operand, shape, *call.probes)


def _expand_to_packed(tap: Tap, own: Sequence[int], shape: torch.Size, batch: Examples) -> Any:
    """``w.expand(1, ..., R, ...)`` to packed rows, wherever they are: attention sinks."""
    rows = None if batch.packing is None else batch.packing.rows
    places = [i for i, (before, after) in enumerate(zip(own, shape, strict=True)) if before == 1 and after == rows]
    if len(places) != 1:
        return NotImplemented
    moved = tap.viewed(lambda value: value.view(own).movedim(places[0], 0), "permute")
    layout = Layout("packed", (shape[places[0]],), batch)
    use = moved.use("expand", layout, sums=True)
    rest = [size for i, size in enumerate(shape) if i != places[0]]
    given = _Expand.apply(
        *(Call(tap.observation, layout, use), use.operand, torch.Size([*layout.shape, *rest])),
        tap.observation.probe_rows[use.slot.index],
    )
    return given.movedim(0, places[0])


def repeat(tap: Tap, *sizes: Any) -> Any:
    """`expand` and a copy, where only dimensions of size one are repeated."""
    times = _flat(sizes)
    own = (1,) * (len(times) - tap.dim()) + tap.shape
    if any(size != 1 and count != 1 for size, count in zip(own, times, strict=True)):
        return NotImplemented
    expanded = expand(tap, *(size * count for size, count in zip(own, times, strict=True)))
    return expanded if expanded is NotImplemented else expanded.contiguous()


def _in_place(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of a function that writes its result into its first argument, an activation."""

    def write(x: Any, other: Any, **options: Any) -> Any:
        if isinstance(x, Tap):
            return NotImplemented
        result = rule(x.clone(), other, **options)  # a backward may need what x was
        return result if result is NotImplemented else x.copy_(result)

    return write


def _view_rule(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A function that only rearranges or casts: what comes out is as much the parameter as what went in."""

    def view(tap: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(tap, Tap):
            return NotImplemented
        if name == "slice" and any(isinstance(a, list) or (isinstance(a, Tensor) and a.dim()) for a in _flat(args)):
            return _gathered(tap, *args)
        how = functools.partial(_called, function, args, kwargs)
        if tap.looked_up is not None and name != "cast":
            return tap.rearranged(how(tap.value), how)
        return tap.viewed(how, name)

    return view


def _called(function: Callable[..., Any], args: Any, kwargs: Any, value: Tensor) -> Tensor:
    result: Tensor = function(value, *args, **kwargs)
    return result


def _gathered(tap: Tap, *index: Any) -> Any:
    """``table[ids]``: a lookup."""
    ids = index[0]
    is_lookup = len(index) == 1 and isinstance(ids, Tensor) and not ids.is_floating_point() and ids.dtype != torch.bool
    return embedding(ids, tap) if is_lookup and tap.looked_up is None and tap.dim() == 2 else NotImplemented


def _slices_rule(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that cuts a tensor in pieces: each of them is a slice of the parameter."""

    def slices(tap: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(tap, Tap) or tap.looked_up is not None:
            return NotImplemented
        pieces = enumerate(function(tap.value, *args, **kwargs))
        return tuple(
            tap.viewed(functools.partial(_piece, function, args, kwargs, i), "slice", one) for i, one in pieces
        )

    return slices


def _piece(function: Callable[..., Any], args: Any, kwargs: Any, which: int, value: Tensor) -> Tensor:
    result: Tensor = function(value, *args, **kwargs)[which]
    return result


def _given(tap: Tap) -> Any:
    """Rows that all examples share, ``[1, ...]``, as each example's own: ``[B, ...]``."""
    batch = tap.observation.batch
    if batch is None or batch.packing is not None or tap.looked_up is None or tap.dim() < 2:
        return NotImplemented
    zeros = tap.value.new_zeros(()).expand(batch.count, *tap.shape[1:])
    if tap.shape[0] != 1 or (meeting := _meet(tap, zeros, "expand")) is None:
        return NotImplemented
    call, use = meeting
    use.needs_proof = False  # the batch is made here
    return _Sum.apply(call, zeros, use.operand, tap.looked_up, *call.probes)


def where(condition: Any, first: Any, second: Any) -> Any:
    """Of a bias per pair of positions and a mask."""
    given = [_given(one) if isinstance(one, Tap) else one for one in (first, second)]
    if isinstance(condition, Tap) or any(one is NotImplemented for one in given):
        return NotImplemented
    return torch.where(condition, *given)


def scaled_dot_product_attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **options: Any
) -> Any:
    """With a bias per pair of positions."""
    batched = isinstance(attn_mask, Tap) and query.shape[0] == attn_mask.observation.examples
    mask = _given(attn_mask) if batched else NotImplemented
    if mask is NotImplemented or any(isinstance(one, Tap) for one in (query, key, value)):
        return NotImplemented
    return F.scaled_dot_product_attention(query, key, value, mask, *args, **options)


def _flat(args: Any) -> list[Any]:
    return [leaf for arg in args for leaf in (arg if isinstance(arg, tuple) else (arg,))]


_T = Tensor
VIEWS: dict[str, tuple[Callable[..., Any], ...]] = {
    "t": (_T.t, torch.t, _T.T.__get__, _T.mT.__get__),  # type: ignore[attr-defined]
    "permute": (_T.transpose, torch.transpose, _T.permute, torch.permute, _T.movedim, torch.movedim),
    "reshape": (
        *(_T.view, _T.reshape, torch.reshape, _T.flatten, torch.flatten, _T.unflatten, _T.view_as, _T.reshape_as),
        *(_T.unsqueeze, torch.unsqueeze, _T.squeeze, torch.squeeze),
    ),
    "slice": (_T.__getitem__, _T.narrow, torch.narrow, _T.select, torch.select),
    "cast": (
        *(_T.to, _T.float, _T.double, _T.half, _T.bfloat16, _T.type, _T.contiguous, _T.clone, torch.clone, _T.cpu),
        *(_T.cuda, _T.type_as, _T.requires_grad_),
    ),
}

SLICES: tuple[Callable[..., Any], ...] = (
    *(_T.split, torch.split, _T.chunk, torch.chunk, _T.unbind, torch.unbind, _T.tensor_split, torch.tensor_split),
    *(_T.split_with_sizes, torch.split_with_sizes),
)

CURVES: tuple[Callable[..., Any], ...] = (
    *(torch.exp, _T.exp, torch.log, _T.log, torch.sqrt, _T.sqrt, torch.rsqrt, _T.rsqrt, torch.square, _T.square),
    *(torch.sigmoid, _T.sigmoid, torch.tanh, _T.tanh, F.softplus, F.silu, F.relu, torch.relu, _T.relu),
    *(torch.pow, _T.pow, _T.__pow__, torch.reciprocal, _T.reciprocal, torch.abs, _T.abs, torch.clamp, _T.clamp),
)

_RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: linear,
    torch.addmm: addmm,
    **dict.fromkeys((torch.matmul, torch.mm, _T.matmul, _T.mm, _T.__matmul__), matmul),
    **{function: convolution(n) for n, function in enumerate((F.conv1d, F.conv2d, F.conv3d), 1)},
    **{
        function: transposed_convolution(n)
        for n, function in enumerate((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), 1)
    },
    F.multi_head_attention_forward: multi_head_attention_forward,
    F.bilinear: bilinear,
    F.embedding: embedding,
    F.embedding_bag: embedding_bag,
    F.layer_norm: layer_norm,
    F.group_norm: group_norm,
    F.instance_norm: instance_norm,
    F.batch_norm: batch_norm,
    **dict.fromkeys((F.rms_norm, torch.rms_norm), rms_norm),  # the second in graphs
    **dict.fromkeys((torch.mul, _T.mul, _T.__mul__, _T.__rmul__, torch.multiply), multiply),
    **dict.fromkeys((_T.mul_, _T.__imul__), _in_place(multiply)),
    **dict.fromkeys((torch.add, _T.add, _T.__add__, _T.__radd__), add),
    **dict.fromkeys((_T.add_, _T.__iadd__), _in_place(add)),
    **dict.fromkeys((torch.sub, _T.sub, _T.__sub__, torch.subtract), subtract),
    **dict.fromkeys((_T.sub_, _T.__isub__), _in_place(subtract)),
    **dict.fromkeys((_T.__rsub__, torch.rsub), subtract_from),
    **dict.fromkeys((torch.neg, _T.neg, _T.__neg__, torch.negative), negative),
    **dict.fromkeys((torch.div, _T.div, _T.__truediv__, torch.true_divide), divide),
    **dict.fromkeys((_T.div_, _T.__itruediv__), _in_place(divide)),
    F.prelu: prelu,
    **dict.fromkeys((torch.where, _T.where), where),
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    **{function: _curve_rule(function) for function in CURVES},
    _T.expand: expand,
    _T.repeat: repeat,
    **{function: _view_rule(function, name) for name, functions in VIEWS.items() for function in functions},
    **{function: _slices_rule(function) for function in SLICES},
    _T.__iter__: lambda tap: iter(_slices_rule(torch.unbind)(tap)),
}
Tap.rules.update(_RULES)
Tap.modules.update({nn.Linear.forward: linear_module, nn.LayerNorm.forward: layer_norm_module})
