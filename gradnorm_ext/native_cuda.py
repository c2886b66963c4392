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

from gradnorm_ext.reference import accumulator
from gradnorm_ext.segments import Segments

SERVES = ("lookup_sqnorm", "lookup_wgrad", "product_sums", "sum_sums", "sums_sqnorm", "sums_wgrad", "segment_std")

_LOOKS = 1 << 24  # ids that are looked at, segments x values, before sorting them pays; not measured

_kernels = torch.ops.gradnorm


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


def product_sums(
    x: Tensor, g: Tensor, segments: Segments, *, shift: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """See :func:`gradnorm_ext.ops.product_sums`."""
    x, g, dtype = rows_of(x), rows_of(g), accumulator(g.dtype)
    out = g.new_empty(segments.count, g.shape[1], dtype=dtype)
    with launching("product_sums", g.device):
        _kernels.product_sums(x, g, vector_of(shift, dtype), vector_of(scale, dtype), segments.offsets, out)
    return out


def sum_sums(g: Tensor, segments: Segments) -> Tensor:
    """See :func:`gradnorm_ext.ops.sum_sums`."""
    dtype = accumulator(g.dtype)
    if segments.length == 1:
        return g.to(dtype)
    g = rows_of(g)
    out = g.new_empty(segments.count, g.shape[1], dtype=dtype)
    with launching("sum_sums", g.device):
        _kernels.sum_sums(g, segments.offsets, out)
    return out


def sums_sqnorm(sums: Tensor, segments: Segments) -> Tensor:
    """See :func:`gradnorm_ext.ops.sums_sqnorm`."""
    return _sums("sums_sqnorm", sums, segments, None, None)


def sums_wgrad(sums: Tensor, segments: Segments, *, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`gradnorm_ext.ops.sums_wgrad`."""
    dw = sums.new_empty(sums.shape[1])
    return dw, _sums("sums_wgrad", sums, segments, weight, dw)


def _sums(operation: str, sums: Tensor, segments: Segments, weight: Tensor | None, dw: Tensor | None) -> Tensor:
    sqnorm, groups = sums.new_empty(segments.columns), segments.groups
    given = (sums.contiguous(), segments.offsets, groups.walk, groups.columns, vector_of(weight, sums.dtype))
    with launching(operation, sums.device):
        _kernels.sums_wgrad(*given, dw, sqnorm)
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
        columns: ``[L, S]``: where its groups' norms are.
    """

    def __init__(self, segments: Segments, rows: int) -> None:
        groups = segments.groups
        self._rows, self._in_place = rows, not groups.levels
        self._walk = groups.walk
        self.begin, self.end = segments.offsets[:-1][self._walk], segments.offsets[1:][self._walk]
        self.offsets = torch.cat([self.end.new_zeros(1), (self.end - self.begin).cumsum(0)])
        self.columns = groups.columns[:, self._walk]

    @staticmethod
    def of(segments: Segments, rows: int) -> Walk:
        """Made once for all layers of an observe block, which share their segments."""
        walk = _walks.get(segments)
        if walk is None:
            walk = _walks[segments] = Walk(segments, rows)
        return walk

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
