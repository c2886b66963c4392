"""An embedding table's gradient and norms: rows sorted by segment and id, then one sum for every run of equal ids.

Every row of the table is written by one program, and every run has one place for its square: no atomics, hence the same
bits every time, and nothing as large as ``[segments, vocabulary]``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradnorm_ext.triton_kernels.registration import accumulator, constexpr_of, operation, sqnorm_length
from gradnorm_ext.triton_kernels.segment_sum import scaled_segment_sum

_TILE = 4096


def lookup_sqnorm(ids: Tensor, g: Tensor, vocabulary: int, segments, *, padding_idx: int | None = None) -> Tensor:
    """See :func:`gradnorm_ext.ops.lookup_sqnorm`."""
    return _run(ids, g, vocabulary, segments, padding_idx, None, None, None)


def lookup_wgrad(
    ids: Tensor,
    g: Tensor,
    vocabulary: int,
    segments,
    *,
    padding_idx: int | None = None,
    weight: Tensor | None = None,
    outputs: Tensor | None = None,
    n_outputs: int = 1,
) -> tuple[Tensor, Tensor]:
    """See :func:`gradnorm_ext.ops.lookup_wgrad`; ``outputs [S]``: which of ``n_outputs`` gradients a segment joins."""
    dw = g.new_zeros(n_outputs, vocabulary, g.shape[1], dtype=accumulator(g.dtype))
    sqnorm = _run(ids, g, vocabulary, segments, padding_idx, weight, outputs, dw)
    return dw if outputs is not None else dw[0], sqnorm


def _run(ids, g, vocabulary, segments, padding_idx, weight, outputs, dw) -> Tensor:
    sqnorm = g.new_zeros(sqnorm_length(segments), dtype=accumulator(g.dtype))
    groups = segments.groups
    padding_idx = -1 if padding_idx is None else padding_idx
    given = (padding_idx, segments.offsets, list(groups.levels), list(groups.counts), weight, outputs, dw, sqnorm)
    _lookup_wgrad(ids, g, vocabulary, *given)
    return sqnorm


@operation(
    """lookup_wgrad(Tensor ids, Tensor g, int vocabulary, int padding_idx, Tensor offsets, Tensor[] levels, int[] counts,
        Tensor? weight, Tensor? outputs, Tensor(a!)? dw, Tensor(b!) sqnorm) -> ()"""
)
def _lookup_wgrad(ids, g, vocabulary, padding_idx, offsets, levels, counts, weight, outputs, dw, sqnorm) -> None:
    if g.numel() == 0:
        return
    # The segment of every row, without waiting for the device.
    segment = torch.bucketize(torch.arange(len(ids), device=ids.device), offsets[1:], right=True)
    first = 0
    for level, count in ((None, len(offsets) - 1), *zip(levels, counts, strict=True)):
        group = segment if level is None else level[segment]
        keys, order = torch.sort(group * vocabulary + ids, stable=True)
        squares = _sum_runs(keys, order, g, vocabulary, padding_idx, None, None)
        # Sorted by group, the runs of a group lie side by side.
        bounds = torch.searchsorted(keys, torch.arange(count + 1, device=keys.device) * vocabulary)
        sums = squares.new_empty(count, squares.shape[1])
        scaled_segment_sum(None, squares, None, None, bounds, sums, block_rows=32)
        torch.sum(sums, 1, out=sqnorm[first : first + count])
        first += count
    if dw is not None:
        keys, order = torch.sort(ids if outputs is None else outputs[segment] * vocabulary + ids, stable=True)
        of_row = None if weight is None else weight[segment]
        _sum_runs(keys, order, g, vocabulary, padding_idx, of_row, dw)


def _sum_runs(keys, order, g, vocabulary, padding_idx, weight, dw) -> Tensor | None:
    """Sums the rows of every run of equal keys: into ``dw``, or, without one, only their squares, which it returns.

    ``squares [rows, blocks]`` has a run's at its first row and zeros elsewhere.
    """
    rows, width = g.shape
    # Most ids occur once or twice in a segment. A table's rows gather more, where ids are few.
    block_rows = 4
    block_columns = min(_TILE // block_rows, triton.next_power_of_2(width))
    blocks = triton.cdiv(width, block_columns)
    squares = g.new_empty(rows, blocks, dtype=accumulator(g.dtype)) if dw is None else None
    ends = torch.searchsorted(keys, keys, right=True)
    _sum_runs_kernel[rows, blocks](
        *(keys, ends, order, g, g if weight is None else weight, squares if dw is None else dw),
        *(width, *g.stride(), vocabulary, padding_idx),
        ACCUMULATOR=constexpr_of(g.dtype),
        HAS_WEIGHT=weight is not None,
        HAS_DW=dw is not None,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
    )
    return squares


@triton.jit(do_not_specialize=["padding_idx"])
def _sum_runs_kernel(
    keys_ptr,
    ends_ptr,
    order_ptr,
    g_ptr,
    weight_ptr,
    out_ptr,
    width,
    stride_row,
    stride_column,
    vocabulary,
    padding_idx,
    ACCUMULATOR: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_DW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    begin = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    key = tl.load(keys_ptr + begin)
    previous = tl.load(keys_ptr + tl.maximum(begin - 1, 0))
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), ACCUMULATOR)
    is_run = ((begin == 0) | (key != previous)) & (key % vocabulary != padding_idx)
    if is_run:
        end = tl.load(ends_ptr + begin)
        for first in range(begin, end, BLOCK_ROWS):
            places = first + tl.arange(0, BLOCK_ROWS)
            inside = places < end
            rows = tl.load(order_ptr + places, mask=inside, other=0)
            mask = inside[:, None] & (columns < width)[None, :]
            g = tl.load(g_ptr + rows[:, None] * stride_row + columns[None, :] * stride_column, mask=mask, other=0.0)
            g = g.to(ACCUMULATOR)
            if HAS_WEIGHT:
                g *= tl.load(weight_ptr + rows, mask=inside, other=0.0).to(ACCUMULATOR)[:, None]
            total += g
    summed = tl.sum(total, 0)
    if HAS_DW:
        if is_run:
            tl.store(out_ptr + key * width + columns, summed, mask=columns < width)
    else:
        tl.store(out_ptr + begin * tl.num_programs(1) + tl.program_id(1), tl.sum(summed * summed, 0))
