"""Norms and the (weighted) total of gradients that are given per segment, in one launch and a sum of its partials."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradnorm_ext.triton_kernels.registration import constexpr_of, operation, sqnorm_length
from gradnorm_ext.triton_kernels.remembered import remembered

_BLOCK_ROWS, _BLOCK_COLUMNS = 8, 512


def per_sample_sqnorm(grads: Tensor, segments) -> Tensor:
    """See :func:`gradnorm_ext.ops.per_sample_sqnorm`."""
    return _per_sample(grads, segments, None, None)


def per_sample_wgrad(grads: Tensor, segments, *, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`gradnorm_ext.ops.per_sample_wgrad`."""
    dw = grads.new_empty(grads.shape[1])
    return dw, _per_sample(grads, segments, weight, dw)


def _per_sample(grads: Tensor, segments, weight: Tensor | None, dw: Tensor | None) -> Tensor:
    sqnorm = grads.new_empty(sqnorm_length(segments))
    weight = None if weight is None else weight.contiguous()
    _per_sample_wgrad(grads, segments.groups.walk, segments.groups.columns, weight, dw, sqnorm)
    return sqnorm


@operation(
    "per_sample_wgrad(Tensor grads, Tensor walk, Tensor columns, Tensor? weight, Tensor(a!)? dw, Tensor(b!) sqnorm) -> ()"
)
def _per_sample_wgrad(
    grads: Tensor, walk: Tensor, columns: Tensor, weight: Tensor | None, dw: Tensor | None, sqnorm: Tensor
) -> None:
    segments, width = grads.shape
    if width == 0:
        sqnorm.zero_()
        return
    entries, blocks = len(sqnorm), triton.cdiv(width, _BLOCK_COLUMNS)
    partial = sqnorm.new_empty(entries, blocks)
    if entries + (dw is not None):
        # One dimension of programs: there may be more entries, or more blocks, than a second one can have.
        _per_sample_wgrad_kernel[((entries + (dw is not None)) * blocks,)](
            *(
                grads,
                walk,
                remembered(_ranges, walk, columns, entries),
                grads if weight is None else weight,
                partial if dw is None else dw,
                partial,
            ),
            *(segments, entries, width, blocks, *grads.stride()),
            ACCUMULATOR=constexpr_of(grads.dtype),
            HAS_WEIGHT=weight is not None,
            BLOCK_ROWS=_BLOCK_ROWS,
            BLOCK_COLUMNS=_BLOCK_COLUMNS,
        )
    torch.sum(partial, 1, out=sqnorm)


def _ranges(walk: Tensor, columns: Tensor, entries: int) -> Tensor:
    """``[groups of all levels, 2]``: which part of the walk is each group's."""
    first, size = walk.new_zeros(2, entries - len(walk))
    place = torch.arange(len(walk), device=walk.device)
    for column in columns:
        group = column[walk] - len(walk)
        first.scatter_reduce_(0, group, place, "amin", include_self=False)
        size.index_add_(0, group, torch.ones_like(place))
    return torch.stack([first, first + size], 1)


@triton.jit(do_not_specialize=["segments", "entries"])
def _per_sample_wgrad_kernel(
    sums_ptr,
    walk_ptr,
    ranges_ptr,
    weight_ptr,
    dw_ptr,
    partial_ptr,
    segments,
    entries,
    width,
    blocks,
    stride_row,
    stride_column,
    ACCUMULATOR: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    # A program forms a block of columns of one entry: a segment, a group (of the segments in its range of the walk), or,
    # after all of these, the total.
    program = tl.program_id(0).to(tl.int64)
    entry = program // blocks
    columns = program % blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    begin, end = entry, entry + 1
    if entry >= segments:
        begin, end = entry * 0, entry * 0 + segments
        if entry < entries:
            begin = tl.load(ranges_ptr + 2 * (entry - segments))
            end = tl.load(ranges_ptr + 2 * (entry - segments) + 1)

    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), ACCUMULATOR)
    for first in range(begin, end, BLOCK_ROWS):
        rows = first + tl.arange(0, BLOCK_ROWS)
        inside = rows < end
        if entry >= segments:
            rows = tl.load(walk_ptr + rows, mask=inside, other=0)
        mask = inside[:, None] & (columns < width)[None, :]
        offsets = rows[:, None] * stride_row + columns[None, :] * stride_column
        values = tl.load(sums_ptr + offsets, mask=mask, other=0.0)
        if HAS_WEIGHT and entry == entries:
            values *= tl.load(weight_ptr + rows, mask=inside, other=0.0).to(ACCUMULATOR)[:, None]
        total += values

    summed = tl.sum(total, 0)
    if entry == entries:
        tl.store(dw_ptr + columns, summed, mask=columns < width)
    else:
        tl.store(partial_ptr + program, tl.sum(summed * summed, 0))
