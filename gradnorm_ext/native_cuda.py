"""The operations that `native` carries out on CUDA tensors: what their kernels (csrc/kernels/cuda) need is made here.

Rows keep their dtype, float16 and bfloat16 included; sums are formed in float32, or in float64 for float64. Everything
is worked out on the device, in tensors as long as there are segments or rows: nothing waits for it.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

import gradnorm_ext._C as _C
from gradnorm_ext.reference import accumulator
from gradnorm_ext.segments import Segments

METHODS = ("mma", "wgmma", "wgmma_wide")  # of the fused product (OuterKernel): from sm_80 on; on Hopper, in two tiles

_LOOKS = 1 << 24  # ids that are looked at, segments x values, before sorting them pays; not measured

_kernels = torch.ops.gradnorm


def has_wgmma() -> bool:
    """Whether this build has the fused product for Hopper, which needs the headers of CUTLASS."""
    return _C.with_cutlass


@contextlib.contextmanager
def launching(operation: str, device: torch.device) -> Iterator[None]:
    """What a kernel could not do (no driver, no code for this architecture, a launch that fails), as one clear error."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "an error without a message"
        raise RuntimeError(
            f"{operation}: the native CUDA kernel must run on {_name(device)}, got: {reason}; "
            "set GRADNORM_BACKEND=triton, or build gradnorm_ext for that device"
        ) from error


def _name(device: torch.device) -> str:
    if not torch.cuda.is_available():
        return f"{device} (no CUDA device)"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{device} ({torch.cuda.get_device_name(device)}, sm_{major}{minor})"


def outer_sqnorm(x: Tensor, g: Tensor, segments: Segments, *, method: str = "mma") -> Tensor:
    """See :func:`gradnorm_ext.ops.outer_sqnorm`; ``method``: one of `METHODS`, for tests and benchmarks."""
    return _outer("outer_sqnorm", x, g, segments, None, None, None, method)


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
    method: str = "mma",
) -> tuple[Tensor, Tensor]:
    """See :func:`gradnorm_ext.ops.outer_wgrad`; ``outputs [S]``: the coarsest level, for a gradient of each of its groups."""
    shape = (n_outputs, g.shape[1], x.shape[1])
    in_place = out is not None and out.dtype == torch.float32 and not accumulate
    dw = out.view(shape) if out is not None and in_place else x.new_empty(shape, dtype=torch.float32)
    sqnorm = _outer("outer_wgrad", x, g, segments, weight, outputs, dw, method)
    if out is not None and not in_place:
        dw = out.view(shape).add_(dw) if accumulate else out.view(shape).copy_(dw)
    return dw if outputs is not None else dw[0], sqnorm


def _outer(
    operation: str,
    x: Tensor,
    g: Tensor,
    segments: Segments,
    weight: Tensor | None,
    outputs: Tensor | None,
    dw: Tensor | None,
    method: str,
) -> Tensor:
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(
            f"{operation}: the native CUDA kernel multiplies float16 or bfloat16, got {x.dtype}; cast the rows, or set "
            "GRADNORM_BACKEND=triton"
        )
    if method not in METHODS or (method != "mma" and not has_wgmma()):
        raise ValueError(
            f"{operation}: method must be one of {', '.join(METHODS if has_wgmma() else METHODS[:1])} (wgmma where the build "
            f"found the headers of CUTLASS), got {method!r}; use mma"
        )
    p, d, kernel = x.shape[1], g.shape[1], METHODS.index(method)
    if len(x) == 0 or p == 0 or d == 0:
        if dw is not None:
            dw.zero_()
        return x.new_zeros(segments.columns, dtype=torch.float32)
    if outputs is not None and dw is not None:
        dw.zero_()  # of an output without segments nothing is written
    walk, x, g = Walk.of(segments, len(x)), _padded(x), _padded(g)
    norms = x.new_zeros(segments.columns, _C.outer_parts(d, p, kernel), dtype=torch.float32)
    for inner, outer, forms_dw in _products(len(segments.groups.levels), weight is not None, dw is not None):
        coarsest = inner if outer is None else outer
        output = weights = None
        if forms_dw:
            output = None if outputs is None else outputs[segments.groups.walk]
            weights = None if weight is None else weight[segments.groups.walk].float()
        with launching(operation, x.device):
            _kernels.outer_fused(
                *(x, g, walk.begin, walk.end, walk.unit(coarsest), walk.ends(inner)),
                *(None if outer is None else walk.ends(outer), output, weights, p, d),
                *((segments.count, *segments.groups.counts)[coarsest], kernel, dw if forms_dw else None, norms),
            )
    return norms.sum(1)


def _products(levels: int, is_weighted: bool, with_dw: bool) -> list[tuple[int, int | None, bool]]:
    """Which levels (0: the segments) each launch takes the norms of, one or two neighbours, and whether it forms dW.

    A second level leaves no registers for a weighted total. Without weights dW is the sum over the coarsest level.

    Example:
        >>> _products(1, False, True), _products(2, True, True)
        ([(0, 1, True)], [(0, None, True), (1, 2, False)])
    """
    first: list[tuple[int, int | None, bool]] = []
    rest = list(range(levels + 1))
    if with_dw and (is_weighted or levels == 0):
        first, rest = [(0, None, True)], rest[1:]
    elif with_dw:
        first, rest = [(levels - 1, levels, True)], rest[:-2]
    return first + [(level, level + 1 if level + 1 in rest else None, False) for level in rest[::2]]


def _padded(rows: Tensor) -> Tensor:
    """With zeros up to a multiple of 8 columns, every row on a multiple of 16 bytes."""
    width = rows.shape[1]
    lie_apart = rows.stride(1) == 1 and rows.stride(0) >= width  # not one row expanded, which TMA does not read
    if lie_apart and all(size % 8 == 0 for size in (width, rows.stride(0), rows.data_ptr() // 2)):
        return rows
    padded = rows.new_zeros(len(rows), -(-width // 8) * 8)
    padded[:, :width] = rows
    return padded


def lookup_sqnorm(
    ids: Tensor, g: Tensor, vocabulary: int, segments: Segments, *, padding_idx: int | None = None
) -> Tensor:
    """See :func:`gradnorm_ext.ops.lookup_sqnorm`."""
    return _lookup("lookup_sqnorm", ids, g, segments, padding_idx, None, None, None)


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
    """See :func:`gradnorm_ext.ops.lookup_wgrad`; ``outputs [S]``: which of ``n_outputs`` gradients a segment joins."""
    dw = g.new_zeros(n_outputs, vocabulary, g.shape[1], dtype=accumulator(g.dtype))
    sqnorm = _lookup("lookup_wgrad", ids, g, segments, padding_idx, weight, outputs, dw)
    return dw if outputs is not None else dw[0], sqnorm


def _lookup(
    operation: str,
    ids: Tensor,
    g: Tensor,
    segments: Segments,
    padding_idx: int | None,
    weight: Tensor | None,
    outputs: Tensor | None,
    dw: Tensor | None,
) -> Tensor:
    g = rows_of(g)
    sqnorm = g.new_zeros(segments.columns, dtype=accumulator(g.dtype))
    if g.numel() == 0:
        return sqnorm
    walk, groups = Walk.of(segments, len(g)), segments.groups
    sorted_ids, place = torch.sort(ids if walk.row is None else ids[walk.row], stable=True)
    given = (groups.walk, groups.columns, outputs, vector_of(weight, sqnorm.dtype))
    padding_idx = -1 if padding_idx is None else padding_idx
    with launching(operation, g.device):
        _kernels.lookup_wgrad_sorted(
            *(sorted_ids, place, walk.row, walk.segment, walk.offsets, g, *given, padding_idx, dw, sqnorm)
        )
    return sqnorm


def segment_scale_grad(
    x: Tensor, g: Tensor, segments: Segments, *, shift: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """See :func:`gradnorm_ext.ops.segment_scale_grad`."""
    x, g, dtype = rows_of(x), rows_of(g), accumulator(g.dtype)
    out = g.new_empty(segments.count, g.shape[1], dtype=dtype)
    with launching("segment_scale_grad", g.device):
        _kernels.segment_scale_grad(x, g, vector_of(shift, dtype), vector_of(scale, dtype), segments.offsets, out)
    return out


def segment_sum(g: Tensor, segments: Segments) -> Tensor:
    """See :func:`gradnorm_ext.ops.segment_sum`."""
    dtype = accumulator(g.dtype)
    if segments.length == 1:
        return g.to(dtype)
    g = rows_of(g)
    out = g.new_empty(segments.count, g.shape[1], dtype=dtype)
    with launching("segment_sum", g.device):
        _kernels.segment_sum(g, segments.offsets, out)
    return out


def per_sample_sqnorm(grads: Tensor, segments: Segments) -> Tensor:
    """See :func:`gradnorm_ext.ops.per_sample_sqnorm`."""
    return _per_sample("per_sample_sqnorm", grads, segments, None, None)


def per_sample_wgrad(grads: Tensor, segments: Segments, *, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`gradnorm_ext.ops.per_sample_wgrad`."""
    dw = grads.new_empty(grads.shape[1])
    return dw, _per_sample("per_sample_wgrad", grads, segments, weight, dw)


def _per_sample(operation: str, grads: Tensor, segments: Segments, weight: Tensor | None, dw: Tensor | None) -> Tensor:
    sqnorm, groups = grads.new_empty(segments.columns), segments.groups
    given = (grads.contiguous(), segments.offsets, groups.walk, groups.columns, vector_of(weight, grads.dtype))
    with launching(operation, grads.device):
        _kernels.per_sample_wgrad(*given, dw, sqnorm)
    return sqnorm


def segment_std(values: Tensor, ids: Tensor, count: int, *, ddof: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`gradnorm_ext.ops.segment_std`."""
    values, ids = values.contiguous(), ids.contiguous()
    mean, std, low, high = values.new_empty(4, count)
    number = ids.new_empty(count)
    with launching("segment_std", values.device):
        if len(values) * count <= _LOOKS:
            _kernels.segment_std(values, ids, ddof, mean, std, number, low, high)
        else:
            ids, order = torch.sort(ids, stable=True)
            offsets = torch.searchsorted(ids, torch.arange(count + 1, device=ids.device))
            _kernels.segment_std_sorted(values, order, offsets, ddof, mean, std, number, low, high)
    return mean, std, number, low, high


def rows_of(rows: Tensor) -> Tensor:
    """As the kernels take them: one row after the other, its entries side by side."""
    return rows if rows.shape[1] <= 1 or rows.stride(1) == 1 else rows.contiguous()


def vector_of(vector: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """One number for each row or segment, as the kernels take it."""
    return None if vector is None else vector.to(dtype).contiguous()


class Walk:
    """Segments in walk order, where every group's rows lie side by side: a row's *place* is where it is in that order.

    Attributes:
        begin, end: ``[S]``: the rows of each segment of the walk.
        offsets: ``[S + 1]``: its places.
    """

    def __init__(self, segments: Segments, rows: int) -> None:
        groups = segments.groups
        self._rows, self._in_place = rows, not groups.levels
        self._walk = groups.walk
        self.begin, self.end = segments.offsets[:-1][self._walk], segments.offsets[1:][self._walk]
        self.offsets = torch.cat([self.end.new_zeros(1), (self.end - self.begin).cumsum(0)])
        self._columns = torch.cat([self._walk[None], groups.columns[:, self._walk]])
        self._ends: dict[int, Tensor] = {}
        self._units: dict[int, Tensor] = {}

    @staticmethod
    def of(segments: Segments, rows: int) -> Walk:
        """Made once for all layers of an observe block, which share their segments."""
        walk = _walks.get(segments)
        if walk is None:
            walk = _walks[segments] = Walk(segments, rows)
        return walk

    def ends(self, level: int) -> Tensor:
        """``[S]``: where the norm of the member of ``level`` (0: the segment) belongs that ends there; -1: it goes on."""
        if level not in self._ends:
            columns = self._columns[level]
            ends = torch.ones_like(columns, dtype=torch.bool)
            ends[:-1] = columns[1:] != columns[:-1]
            self._ends[level] = torch.where(ends, columns, -1)
        return self._ends[level]

    def unit(self, level: int) -> Tensor:
        """``[S]``: the place where the member of ``level`` begins that a segment is part of."""
        if level not in self._units:
            begins = torch.ones_like(self._walk, dtype=torch.bool)
            begins[1:] = self.ends(level)[:-1] >= 0
            self._units[level] = torch.where(begins, self.offsets[:-1], 0).cummax(0).values
        return self._units[level]

    @functools.cached_property
    def row(self) -> Tensor | None:
        """``[R]``: the row at each place; None where it is itself."""
        if self._in_place:
            return None
        moved = self._at_places(self.begin - self.offsets[:-1])
        return torch.arange(self._rows, device=moved.device) + moved

    @functools.cached_property
    def segment(self) -> Tensor:
        """``[R]``: the segment of the row at each place."""
        return self._at_places(self._walk)

    def _at_places(self, of_segment: Tensor) -> Tensor:
        return torch.repeat_interleave(of_segment, self.end - self.begin, output_size=self._rows)


_walks: weakref.WeakKeyDictionary[Segments, Walk] = weakref.WeakKeyDictionary()
