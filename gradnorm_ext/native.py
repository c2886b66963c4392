"""Every operation in C++ (csrc/), and the method outer products take; `gradnorm_ext.ops` says what each one means."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

import gradnorm_ext._C as _C  # importing it registers the kernels; where it is absent the error names it
from gradnorm_ext import native_cuda, reference
from gradnorm_ext.im2col import Im2col
from gradnorm_ext.operations import OPERATIONS, kernel_name
from gradnorm_ext.reference import accumulator
from gradnorm_ext.segments import Segments

DEVICES = ("cpu", "cuda") if _C.with_cuda else ("cpu",)
DEVICE_MODULES = {"cuda": native_cuda}  # whose functions run there; the others' are here

_MANY = 32  # rows: a product of our own over so many is nearly as fast as over more
_CONVERTED = 1 << 22  # logits of half precision held in float32 at once

_library = torch.library.Library("gradnorm", "DEF")


def define(schema: str) -> None:
    """Make torch know an operator of ours, whose kernels write into tensors that their caller made."""
    _library.define(" ".join(schema.split()))
    torch.library.register_fake(
        f"gradnorm::{kernel_name(schema)}", lambda *_: None, lib=_library
    )  # nothing to describe


for _operation in OPERATIONS.values():
    for _schema in _operation.kernels:
        define(_schema)

_kernels = torch.ops.gradnorm


def build_info() -> list[str]:
    """What the compiled part was built with, a line each."""
    cuda = f"{_C.cuda_compiler} for {_C.cuda_architectures}" if _C.with_cuda else "none"
    runs = _C.cuda_problem()
    return [
        f"compiler: {_C.compiler}",
        f"fused product on the CPU: {_C.cpu_product}, of {', '.join(_C.cpu_products) or 'none'}",
        f"cuda: {cuda}",
        f"cuda kernels here: {f'cannot run ({runs})' if runs else 'can run'}",
        f"outer products by wgmma: {'built, for Hopper' if _C.with_cutlass else 'left out: no CUTLASS headers at build'}",
        f"built against torch {_C.torch_version}",
    ]


def outer_method(rows_per_segment: float, d: int, p: int, with_dw: bool, amx: bool = _C.cpu_product_always) -> str:
    """The cheaper way to the norms of segments of one layer with a ``[d, p]`` weight: "gram" or "direct".

    Counted per row, in multiply-adds of a large matrix product of torch's:

        gram      (1.5 rows_per_segment + 75) (p + d) / 2
        direct    9 / rows_per_segment p d                  beside dW, which is formed anyway
                  (9 / rows_per_segment + 0.95) p d         without dW; 0.45 where the processor has AMX

    A small matrix product is slower (1.5) and has to be set up (75); squaring and adding a segment's tile costs as much
    as 9 multiply-adds an entry. Fitted on 2026-11-21 to segments of 2 to 256 rows, 1024 rows in all, at 256²,
    1024 x 256, 4096 x 256, 768² and 1024²: one thread of a Xeon (AVX-512, AMX), torch 2.13, MKL.

    Args:
        rows_per_segment: rows of a segment, or Σ rows² / Σ rows over segments that differ.
        d, p: the weight's shape, ``[out, in]``.
        with_dw: whether the weight gradient is wanted beside the norms.
        amx: whether products are those of the processor's matrix unit.

    Example:
        >>> outer_method(8, 1024, 1024, True), outer_method(512, 1024, 1024, True)
        ('gram', 'direct')
    """
    gram = (1.5 * rows_per_segment + 75) * (p + d) / 2
    dw = 0.45 if amx else 0.95
    direct = (9 / max(rows_per_segment, 1) + (0 if with_dw else dw)) * p * d
    return "gram" if gram < direct else "direct"


def outer_sqnorm(x: Tensor, g: Tensor, segments: Segments) -> Tensor:
    """See :func:`gradnorm_ext.ops.outer_sqnorm`."""
    return _outer(_rows(x), _rows(g), segments, None, None, None)


def outer_wgrad(
    x: Tensor,
    g: Tensor,
    segments: Segments,
    *,
    weight: Tensor | None = None,
    outputs: Tensor | None = None,
    n_outputs: int = 1,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> tuple[Tensor, Tensor]:
    """See :func:`gradnorm_ext.ops.outer_wgrad`; ``outputs [S]``: which of ``n_outputs`` gradients a segment joins."""
    x, g = _rows(x), _rows(g)
    shape = (n_outputs, g.shape[1], x.shape[1])
    in_place = out is not None and out.dtype == x.dtype and not accumulate
    dw = out.view(shape) if out is not None and in_place else x.new_empty(shape)
    sqnorm = _outer(x, g, segments, weight, outputs, dw)
    if out is not None and not in_place:
        dw = out.view(shape).add_(dw) if accumulate else out.view(shape).copy_(dw)
    return dw if outputs is not None else dw[0], sqnorm


def outer_sum(x: Tensor, g: Tensor, segments: Segments, *, weight: Tensor | None = None) -> Tensor:
    """See :func:`gradnorm_ext.reference.outer_sum`."""
    few = weight is not None and len(x) < _MANY * segments.count  # a product for each segment would be slow
    if not _fuses_all(x) or few or len(x) == 0:
        return reference.outer_sum(x, g, segments, weight=weight)
    return _sum(_rows(x), _rows(g), segments, weight, x.new_empty(g.shape[1], x.shape[1]))


def _sum(x: Tensor, g: Tensor, segments: Segments, weight: Tensor | None, out: Tensor) -> Tensor:
    groups, nothing = segments.groups, x.new_empty(segments.count)
    weight, no_columns = _vector(weight, x.dtype), groups.columns[:0]
    _kernels.outer_wgrad(x, g, segments.offsets, groups.walk, no_columns, None, weight, out[None], nothing, False)
    return out


def im2col_sqnorm(images: Tensor, windows: Im2col, g: Tensor, segments: Segments) -> Tensor:
    """:func:`outer_sqnorm` of the rows that windows see."""
    return _windows(images, windows, _rows(g), segments, None, None, None)


def im2col_wgrad(
    images: Tensor,
    windows: Im2col,
    g: Tensor,
    segments: Segments,
    *,
    weight: Tensor | None = None,
    outputs: Tensor | None = None,
    n_outputs: int = 1,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`outer_wgrad` of the rows that windows see; ``images`` ``[images, *sizes, channels]`` are contiguous."""
    shape = n_outputs, g.shape[1], math.prod(windows.kernel) * images.shape[-1]
    dw = images.new_empty(shape) if out is None else out.view(shape)
    sqnorm = _windows(images, windows, _rows(g), segments, weight, outputs, dw)
    return dw if outputs is not None else dw[0], sqnorm


def _windows(
    images: Tensor,
    windows: Im2col,
    g: Tensor,
    segments: Segments,
    weight: Tensor | None,
    outputs: Tensor | None,
    dw: Tensor | None,
) -> Tensor:
    d, p = g.shape[1], math.prod(windows.kernel) * images.shape[-1]
    if outer_method(len(g) / max(1, segments.count), d, p, dw is not None) == "gram":
        return _outer(windows.rows(images), g, segments, weight, outputs, dw)
    groups, sqnorm = segments.groups, images.new_zeros(segments.columns)
    _clear_absent(dw, outputs, segments)
    weight, packed = _vector(weight, images.dtype), windows.packed(images)
    offsets, walk, columns = segments.offsets, groups.walk, groups.columns
    _kernels.im2col_wgrad(images, packed, g, offsets, walk, columns, outputs, weight, dw, sqnorm)
    return sqnorm


def _clear_absent(dw: Tensor | None, outputs: Tensor | None, segments: Segments) -> None:
    """Zeros for the outputs without rows, which the kernels do not write."""
    if dw is not None and outputs is not None:
        for empty in set(range(len(dw))) - _walk_of(segments).present(outputs):
            dw[empty] = 0


def _fuses_all(x: Tensor) -> bool:
    """Whether a product of our own is the fastest for any number of rows."""
    return _C.cpu_product_always and x.dtype == torch.float32


@functools.lru_cache(64)
def _whole(rows: int) -> Segments:
    return Segments.equal(1, rows)


def lookup_sqnorm(
    ids: Tensor, g: Tensor, vocabulary: int, segments: Segments, *, padding_idx: int | None = None
) -> Tensor:
    """See :func:`gradnorm_ext.ops.lookup_sqnorm`."""
    return _lookup(ids, _rows(g), segments, padding_idx, None, None, None)


def lookup_wgrad(
    ids: Tensor,
    g: Tensor,
    vocabulary: int,
    segments: Segments,
    *,
    padding_idx: int | None = None,
    weight: Tensor | None = None,
    outputs: Tensor | None = None,
    n_outputs: int = 1,
) -> tuple[Tensor, Tensor]:
    """See :func:`gradnorm_ext.ops.lookup_wgrad`; ``outputs`` as of :func:`outer_wgrad`."""
    g = _rows(g)
    dw = g.new_zeros(n_outputs if outputs is not None else 1, vocabulary, g.shape[1])
    sqnorm = _lookup(ids, g, segments, padding_idx, weight, outputs, dw)
    return dw if outputs is not None else dw[0], sqnorm


def segment_scale_grad(
    x: Tensor, g: Tensor, segments: Segments, *, shift: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """See :func:`gradnorm_ext.ops.segment_scale_grad`."""
    x, g = _rows(x), _rows(g)
    out = g.new_empty(segments.count, g.shape[1])
    _kernels.segment_scale_grad(x, g, _vector(shift, x.dtype), _vector(scale, x.dtype), segments.offsets, out)
    return out


def segment_sum(g: Tensor, segments: Segments) -> Tensor:
    """See :func:`gradnorm_ext.ops.segment_sum`."""
    g = _rows(g)
    if segments.length == 1:
        return g
    out = g.new_empty(segments.count, g.shape[1])
    _kernels.segment_sum(g, segments.offsets, out)
    return out


def per_sample_sqnorm(grads: Tensor, segments: Segments) -> Tensor:
    """See :func:`gradnorm_ext.ops.per_sample_sqnorm`."""
    return _per_sample(grads, segments, None, None)


def per_sample_wgrad(grads: Tensor, segments: Segments, *, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`gradnorm_ext.ops.per_sample_wgrad`."""
    dw = grads.new_empty(grads.shape[1])
    return dw, _per_sample(grads, segments, weight, dw)


def _per_sample(grads: Tensor, segments: Segments, weight: Tensor | None, dw: Tensor | None) -> Tensor:
    sqnorm, groups = grads.new_empty(segments.columns), segments.groups
    weight = _vector(weight, grads.dtype)
    _kernels.per_sample_wgrad(grads.contiguous(), segments.offsets, groups.walk, groups.columns, weight, dw, sqnorm)
    return sqnorm


def segment_std(values: Tensor, ids: Tensor, count: int, *, ddof: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`gradnorm_ext.ops.segment_std`."""
    mean, std, low, high = values.new_empty(4, count)
    number = ids.new_empty(count)
    _kernels.segment_std(values.contiguous(), ids.contiguous(), ddof, mean, std, number, low, high)
    return mean, std, number, low, high


def logit_scores(logits: Tensor, labels: Tensor, *, ignore_index: int) -> tuple[Tensor, Tensor]:
    """See :func:`gradnorm_ext.ops.logit_scores`."""
    figures = logits.new_empty(2, len(logits), dtype=accumulator(logits.dtype))
    for rows, part in _blocks(logits):
        _kernels.logit_scores(part, labels[rows].contiguous(), ignore_index, *figures[:, rows].unbind())
    return figures[0], figures[1]


def logit_gradient_rates(logits: Tensor, labels: Tensor, *, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`gradnorm_ext.ops.logit_gradient_rates`."""
    count = labels.new_zeros(logits.shape[1])
    up, down = logits.new_zeros(2, logits.shape[1], dtype=torch.float64)
    for rows, part in _blocks(logits):
        _kernels.logit_gradient_rates(part, labels[rows].contiguous(), ignore_index, count, up, down)
    dtype = accumulator(logits.dtype)
    return count, up.to(dtype), down.to(dtype)


def _blocks(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The rows as the kernels take them, in blocks where that means a copy: logits are too large for another whole one."""
    if logits.dtype in (torch.float32, torch.float64) and (logits.shape[1] <= 1 or logits.stride(1) == 1):
        yield slice(0, len(logits)), logits
        return
    block = max(1, _CONVERTED // max(1, logits.shape[1]))
    for first in range(0, len(logits), block):
        rows = slice(first, min(first + block, len(logits)))
        yield rows, _rows(logits[rows])


def _rows(rows: Tensor) -> Tensor:
    """As the kernels take them: float32 or float64, one row after the other, its entries side by side."""
    if rows.dtype != torch.float64:
        rows = rows.float()
    return rows if rows.shape[1] <= 1 or rows.stride(1) == 1 else rows.contiguous()


def _vector(vector: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if vector is None else vector.to(dtype).contiguous()


def _lookup(
    ids: Tensor,
    g: Tensor,
    segments: Segments,
    padding_idx: int | None,
    weight: Tensor | None,
    outputs: Tensor | None,
    dw: Tensor | None,
) -> Tensor:
    groups = segments.groups
    sqnorm = g.new_zeros(segments.columns)
    padding_idx = -1 if padding_idx is None else padding_idx
    weight = _vector(weight, g.dtype)
    offsets, walk, columns = segments.offsets, groups.walk, groups.columns
    _kernels.lookup_wgrad(ids.contiguous(), g, offsets, walk, columns, outputs, weight, padding_idx, dw, sqnorm)
    return sqnorm


@dataclass(frozen=True)
class _Part:
    """A partition of the rows, its members one after the other: the segments, or a level's groups in walk order."""

    offsets: Tensor
    columns: Tensor  # where in a sqnorm vector its members' entries are
    count: int
    rows_per_segment: float  # Σ rows² / Σ rows: the gram method pays by the pair


@dataclass(eq=False)
class _Walk:
    """Segments in walk order: every group's rows lie side by side once the rows are taken in the order ``rows``."""

    parts: list[_Part]  # the segments, in their own order, and every level, in walk order
    rows: Tensor | None  # [R], None where the rows are in walk order already
    order: Tensor  # [S]
    own: Tensor  # [S]: 0, 1, ..., the walk of what was brought into walk order
    offsets: Tensor  # of the segments in walk order
    columns: list[Tensor]  # [L, S], then without the first level, and so on
    onwards: list[Tensor]  # the columns of each part and all coarser ones
    outputs_present: set[int] | None = None  # `present`, once it was asked for
    methods: dict[tuple[int, int, bool, int], int] = field(default_factory=dict)  # `by_gram`, by its arguments

    def present(self, outputs: Tensor) -> set[int]:
        """Which outputs any rows go to."""
        if self.outputs_present is None:  # one answer: outputs are the coarsest level
            self.outputs_present = set(outputs[self.parts[0].offsets.diff() > 0].tolist())
        return self.outputs_present

    def by_gram(self, d: int, p: int, with_dw: bool, changes: int) -> int:
        """How many parts, from the finest on, take the gram method, where weights change so often along the walk."""
        key = d, p, with_dw, changes
        if key not in self.methods:
            self.methods[key] = len(self.parts)
            for n, part in enumerate(self.parts):
                # Segments of one group are multiplied as one, unless their weights differ: then dW is formed apart.
                if outer_method(part.rows_per_segment, d, p, with_dw and (n == 0 or changes < part.count)) == "direct":
                    self.methods[key] = n
                    break
        return self.methods[key]

    @staticmethod
    def of(segments: Segments) -> _Walk:
        order, columns = segments.groups.walk, segments.groups.columns
        own = torch.arange(segments.count)
        lengths = segments.offsets.diff()
        walked = lengths[order]
        offsets = _offsets(walked)
        rows = None
        if not torch.equal(order, own):
            moved = segments.offsets[:-1][order] - offsets[:-1]
            rows = torch.arange(int(offsets[-1])) + torch.repeat_interleave(moved, walked)
        parts = [_Part(segments.offsets, own, segments.count, _rows_per_segment(lengths))]
        columns = columns[:, order].contiguous()
        for level in columns:
            members, member = torch.unique_consecutive(level, return_inverse=True)
            sizes = lengths.new_zeros(len(members)).index_add_(0, member, walked)
            parts.append(_Part(_offsets(sizes), members, len(members), _rows_per_segment(sizes)))
        coarser = [columns[level:] for level in range(len(parts))]
        onwards = [torch.cat([part.columns for part in parts[n:]]) for n in range(len(parts))]
        return _Walk(parts, rows, order, own, offsets, coarser, onwards)


_WHOLE = Segments.equal(1, 1)

# All layers of an observe block share their segments, and what is worked out here with them.
_walks: weakref.WeakKeyDictionary[Segments, _Walk] = weakref.WeakKeyDictionary()


def _walk_of(segments: Segments) -> _Walk:
    walk = _walks.get(segments)
    if walk is None:
        walk = _walks[segments] = _Walk.of(segments)
    return walk


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _rows_per_segment(lengths: Tensor) -> float:
    return float(lengths.square().sum()) / max(1, int(lengths.sum()))


def _outer(
    x: Tensor, g: Tensor, segments: Segments, weight: Tensor | None, outputs: Tensor | None, dw: Tensor | None
) -> Tensor:
    """Fill ``dw [n_outputs, d, p]`` and return ``sqnorm``; from the finest on, levels of short groups go by gram."""
    (rows, p), d, groups = x.shape, g.shape[1], segments.groups
    sqnorm = x.new_zeros(segments.columns)
    if rows == 0 or p == 0 or d == 0:
        if dw is not None:
            dw.zero_()
        return sqnorm
    walk = _walk_of(segments)
    _clear_absent(dw, outputs, segments)
    weight = _vector(weight, x.dtype)
    changes = -1
    n_gram = walk.by_gram(d, p, dw is not None, changes)
    if n_gram == 0:
        _kernels.outer_wgrad(x, g, segments.offsets, groups.walk, groups.columns, outputs, weight, dw, sqnorm, True)
        return sqnorm
    if weight is not None:
        weight = weight[walk.order]
        changes = int(weight.diff().count_nonzero())
        n_gram = walk.by_gram(d, p, dw is not None, changes)

    _kernels.outer_sqnorm(x, g, segments.offsets, sqnorm.narrow(0, 0, segments.count))
    if outputs is not None:
        outputs = outputs[walk.order]
    if walk.rows is not None:
        x, g = x.index_select(0, walk.rows), g.index_select(0, walk.rows)
    for part in walk.parts[1:n_gram]:
        norms = x.new_empty(part.count)
        _kernels.outer_sqnorm(x, g, part.offsets, norms)
        sqnorm.index_copy_(0, part.columns, norms)

    left = walk.parts[n_gram].count if n_gram < len(walk.parts) else 0
    order, columns = walk.own, walk.columns[n_gram - 1]
    if left == 1 and dw is not None and outputs is None and changes < 0 and not _fuses_all(x):
        # One group of all rows: its gradient is dW, and a pass over dW costs less than multiplying tile by tile.
        torch.mm(g.t(), x, out=dw[0])
        return sqnorm.index_fill_(0, walk.onwards[n_gram], _per_sample(dw.view(1, -1), _WHOLE, None, None)[0])
    if changes < left:
        _kernels.outer_wgrad(x, g, walk.offsets, order, columns, outputs, weight, dw, sqnorm, False)
        return sqnorm
    if left:
        _kernels.outer_wgrad(x, g, walk.offsets, order, columns, None, None, None, sqnorm, False)
    if dw is not None:
        if weight is not None:
            g = g * torch.repeat_interleave(weight, walk.offsets.diff())[:, None]
        if outputs is None:
            if _fuses_all(x):
                _sum(x, g, _whole(len(x)), None, dw[0])
            else:
                torch.mm(g.t(), x, out=dw[0])
        else:
            nothing = sqnorm.new_empty(segments.columns)
            _kernels.outer_wgrad(x, g, walk.offsets, order, columns[:0], outputs, None, dw, nothing, False)
    return sqnorm
