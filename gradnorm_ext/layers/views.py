"""Views, slices and casts of a parameter, which are as much the parameter as what they are of, and copies for a batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradnorm_ext.layers.calls import Backward, Call, Observed, first_order, spread
from gradnorm_ext.layers.elementwise import given_to_batch, is_view_index
from gradnorm_ext.layers.embeddings import embedding
from gradnorm_ext.layers.layouts import Examples, Layout
from gradnorm_ext.layers.taps import Tap


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


def expand(input: Tap, *size: Any, **named: Any) -> Any:
    """``w.expand(B, ...)``: from here on every example has its own copy, whose gradient arrives by itself."""
    tap = input
    shape, batch = tap.value.expand(*size, **named).shape, tap.observation.batch
    own = (1,) * (len(shape) - tap.dim()) + tap.shape
    assert batch is not None
    if tap.looked_up is not None and shape == (batch.count, *tap.shape[1:]):
        return given_to_batch(tap)
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


def repeat(input: Tap, *size: Any, **named: Any) -> Any:
    """`expand` and a copy, where only dimensions of size one are repeated."""
    tap, times = input, tuple(flattened((*size, *named.values())))
    own = (1,) * (len(times) - tap.dim()) + tap.shape
    if any(size != 1 and count != 1 for size, count in zip(own, times, strict=True)):
        return NotImplemented
    expanded = expand(tap, *(size * count for size, count in zip(own, times, strict=True)))
    return expanded if expanded is NotImplemented else expanded.contiguous()


_FIRST = ("input", "tensor", "self")  # how torch's functions call it


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A function's first argument, wherever it was given, and the others."""
    name = next((name for name in _FIRST if name in kwargs), None)
    if args or name is None:
        return args[0], args[1:], kwargs
    return kwargs[name], (), {other: value for other, value in kwargs.items() if other != name}


def view_rule(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A function that only rearranges or casts: what comes out is as much the parameter as what went in."""

    def view(*args: Any, **kwargs: Any) -> Any:
        tap, rest, named = _first(args, kwargs)
        if not isinstance(tap, Tap):
            return NotImplemented
        if function is Tensor.__getitem__ and not is_view_index(rest[0]):
            return _gathered(tap, *rest)
        how = functools.partial(_called, function, rest, named)
        value = how(tap.value)
        if not value.requires_grad:  # integers, or bits
            return value
        if tap.looked_up is not None and name != "cast":
            return tap.rearranged(value, how)
        return tap.viewed(how, name, value)

    return view


def _called(function: Callable[..., Any], args: Any, kwargs: Any, value: Tensor) -> Tensor:
    result: Tensor = function(value, *args, **kwargs)
    return result


def _gathered(tap: Tap, ids: Any) -> Any:
    """``table[ids]``: a lookup."""
    is_lookup = isinstance(ids, Tensor) and not ids.is_floating_point() and ids.dtype != torch.bool
    return embedding(ids, tap) if is_lookup and tap.looked_up is None and tap.dim() == 2 else NotImplemented


def slices_rule(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that cuts a tensor in pieces: each of them is a slice of the parameter."""

    def slices(*args: Any, **kwargs: Any) -> Any:
        tap, rest, named = _first(args, kwargs)
        if not isinstance(tap, Tap) or tap.looked_up is not None:
            return NotImplemented
        pieces = enumerate(function(tap.value, *rest, **named))
        return tuple(tap.viewed(functools.partial(_piece, function, rest, named, i), "slice", one) for i, one in pieces)

    return slices


def _piece(function: Callable[..., Any], args: Any, kwargs: Any, which: int, value: Tensor) -> Tensor:
    result: Tensor = function(value, *args, **kwargs)[which]
    return result


def flattened(args: Any) -> list[Any]:
    return [leaf for arg in args for leaf in (arg if isinstance(arg, (tuple, list)) else (arg,))]


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
