"""Whose a tensor's rows are, read from the graph that made it: rows that were selected, cut or moved keep their owners.

A head over ``h[mask]`` or over ``h[:, :-1]`` gets rows whose count says nothing about examples. The graph does: it leads
from the rows, through nodes that only rearrange, to a tensor whose rows are known, and each node says what it did. This
is evidence of what happened, not a guess from sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradnorm_ext.layers.layouts import Layout

Shape = tuple[int, ...]


class Followed(NamedTuple):
    """Whose rows are.

    Attributes:
        owners: each row's example, in the shape of the rows.
        regular: they are in batch-major order, equally many.
        picked: an index tensor has chosen them.
    """

    owners: Tensor
    regular: bool
    picked: bool


def follow(
    tensor: Tensor, layout_of: Callable[[Shape], Layout | None] | None, *, unselected: bool = False
) -> Followed | None:
    """The owners of a tensor's rows, its last dimension set aside, or None where the graph does not say.

    ``layout_of`` knows the rows of a shape that shows the batch; without it the graph must lead to an observed function.
    ``unselected``: also where all rows are there.
    """
    steps: list[tuple[Any, Shape, Shape]] = []
    node, shape = tensor.grad_fn, tuple(tensor.shape)
    selects = False
    while node is not None and (known := _layout_at(node, shape)) is None:
        name = node.name()
        if name in _ELEMENTWISE:
            operands = [one for one, _ in node.next_functions if one is not None and _shape_after(one) == shape]
            if not operands:
                break
            node = operands[0]
            continue
        if name not in _STEPS or (name in _SAVING and _saved_tensors_are_hooked()):
            break
        before = node.next_functions[0][0]
        if before is None or not (source := _shape_after(before)):
            break
        if source[-1] != shape[-1] and not (_STEPS[name] is _view and _splits(source, shape)):
            break
        steps.append((node, source, shape))
        selects |= name in _SELECTING
        node, shape = before, source
    known = None if node is None else _layout_at(node, shape)
    if known is None and layout_of is not None:
        steps, known = _nearest(steps, layout_of)
        selects = any(step.name() in _SELECTING for step, _, _ in steps)
    if known is None or not (selects or unselected or known.kind == "followed"):
        return None
    owners, regular = known.owners, known.kind in ("leading", "flat")
    for step, source, shape in reversed(steps):
        found = _STEPS[step.name()](step, owners, source, shape) if owners.shape == source[:-1] else None
        if found is None or found.shape != shape[:-1]:
            return None
        owners = found
        regular = regular and step.name() not in _MOVING and _keeps_batch(step, source)
    picked = known.kind == "followed" or any(step.name() in _SAVING for step, _, _ in steps)
    return Followed(owners, regular, picked)


def _nearest(
    steps: list[tuple[Any, Shape, Shape]], layout_of: Callable[[Shape], Layout | None]
) -> tuple[list[tuple[Any, Shape, Shape]], Layout | None]:
    """The steps up to the nearest tensor whose sizes show the batch: what lies before it may have been reordered."""
    for end, (_, source, _) in enumerate(steps, 1):
        known = layout_of(source[:-1])
        if known is not None and not known.is_flat:
            return steps[:end], known
    known = layout_of(steps[-1][1][:-1]) if steps else None
    return steps, known


def _shape_after(node: Any) -> Shape:
    """The shape of what a node made."""
    metadata = node._input_metadata
    return tuple(metadata[0].shape) if len(metadata) == 1 else ()


def _layout_at(node: Any, shape: Shape) -> Layout | None:
    """Of the output of a function that was observed itself."""
    layout = getattr(getattr(node, "call", None), "layout", None)
    return layout if isinstance(layout, Layout) and layout.shape == shape[:-1] else None


def _saved_tensors_are_hooked() -> bool:
    """Inside a checkpoint or with offloaded activations: looking at what a node saved would compute or move it."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _keeps_batch(step: Any, source: Shape) -> bool:
    """Whether a slice or selection is of rows inside every example."""
    if step.name() not in ("SliceBackward0", "SelectBackward0"):
        return True
    return len(source) > 2 and _signed(step._saved_dim) > 0


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number


def _dim(number: int, shape: Shape) -> int:
    signed = _signed(number)
    return signed + len(shape) if signed < 0 else signed


def _same(step: Any, owners: Tensor, source: Shape, shape: Shape) -> Tensor | None:
    return owners


def _view(step: Any, owners: Tensor, source: Shape, shape: Shape) -> Tensor | None:
    if _splits(source, shape):
        return owners.reshape(*owners.shape, *[1] * (len(shape) - len(source))).expand(shape[:-1])
    return owners.reshape(shape[:-1])


def _splits(source: Shape, shape: Shape) -> bool:
    """Whether the last dimension was taken apart, as into heads."""
    kept = len(source) - 1
    return len(shape) > len(source) and shape[:kept] == source[:-1] and math.prod(shape[kept:]) == source[-1]


def _slice(step: Any, owners: Tensor, source: Shape, shape: Shape) -> Tensor | None:
    dim = _dim(step._saved_dim, source)
    if dim == owners.dim():
        return None
    which = slice(_signed(step._saved_start), _signed(step._saved_end), step._saved_step)
    return owners[(slice(None),) * dim + (which,)]


def _select(step: Any, owners: Tensor, source: Shape, shape: Shape) -> Tensor | None:
    dim = _dim(step._saved_dim, source)
    return None if dim == owners.dim() else owners.select(dim, _signed(step._saved_index))


def _transpose(step: Any, owners: Tensor, source: Shape, shape: Shape) -> Tensor | None:
    one, other = _dim(step._saved_dim0, source), _dim(step._saved_dim1, source)
    return None if owners.dim() in (one, other) else owners.transpose(one, other)


def _permute(step: Any, owners: Tensor, source: Shape, shape: Shape) -> Tensor | None:
    dims = [_dim(d, source) for d in step._saved_dims]
    return owners.permute(dims[:-1]) if dims[-1] == owners.dim() else None


def _expand(step: Any, owners: Tensor, source: Shape, shape: Shape) -> Tensor | None:
    return owners.expand(shape[:-1])


def _index(step: Any, owners: Tensor, source: Shape, shape: Shape) -> Tensor | None:
    indices = step._saved_indices
    covered = sum(1 if i is None or i.dtype not in (torch.bool, torch.uint8) else i.dim() for i in indices)
    if covered > owners.dim():
        return None
    return owners[tuple(slice(None) if i is None else i for i in indices)]


def _index_select(step: Any, owners: Tensor, source: Shape, shape: Shape) -> Tensor | None:
    dim = _dim(step._saved_dim, source)
    return None if dim == owners.dim() else owners.index_select(dim, step._saved_index)


_STEPS: dict[str, Callable[[Any, Tensor, Shape, Shape], Tensor | None]] = {
    **dict.fromkeys(("CloneBackward0", "ToCopyBackward0", "AliasBackward0"), _same),
    **dict.fromkeys(("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"), _view),
    **dict.fromkeys(("UnsqueezeBackward0", "SqueezeBackward0", "SqueezeBackward1", "SqueezeBackward2"), _view),
    "SliceBackward0": _slice,
    "SelectBackward0": _select,
    "TransposeBackward0": _transpose,
    "PermuteBackward0": _permute,
    "ExpandBackward0": _expand,
    "IndexBackward0": _index,
    "IndexSelectBackward0": _index_select,
}
_SAVING = {"IndexBackward0", "IndexSelectBackward0"}
_SELECTING = {*_SAVING, "SliceBackward0", "SelectBackward0"}
_MOVING = {*_SAVING, "TransposeBackward0", "PermuteBackward0", "ExpandBackward0"}
_ELEMENTWISE = {
    f"{name}Backward0"
    for name in ("Add", "Sub", "Mul", "Div", "Gelu", "Silu", "Relu", "Tanh", "Sigmoid", "NativeDropout", "Neg")
}
