"""Sums of rows per segment, ``out[s] = Σ_{r in s} g[r]``, or of products of rows (`segment_scale_grad`), in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradnorm_ext.triton_kernels.registration import FILLS_A_GPU, accumulator, constexpr_of, operation

_TILE = 4096  # entries of a tile: 32 for each thread of 4 warps, 64 bytes in flight in bfloat16


def segment_sum(g: Tensor, segments) -> Tensor:
    """See :func:`gradnorm_ext.ops.segment_sum`."""
    out = g.new_empty(len(segments.offsets) - 1, g.shape[1], dtype=accumulator(g.dtype))
    _segment_sum(g, segments.offsets, out)
    return out


@operation("segment_sum(Tensor g, Tensor offsets, Tensor(a!) out) -> ()")
def _segment_sum(g: Tensor, offsets: Tensor, out: Tensor) -> None:
    scaled_segment_sum(None, g, None, None, offsets, out)


def scaled_segment_sum(
    x: Tensor | None,
    g: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    offsets: Tensor,
    out: Tensor,
    block_rows: int | None = None,
) -> None:
    """``out[s] = Σ_{r in s} g[r] ⊙ (x[r] - shift[r]) scale[r]``, with ones in place of x where there is none."""
    segments, width = out.shape
    if out.numel() == 0:
        return
    rows = len(g) / segments
    if block_rows is None:  # one of few, so that another sequence length hardly ever needs another kernel
        block_rows = 1 if rows <= 2 else 8 if rows <= 16 else 32
    block_columns = min(_TILE // block_rows, triton.next_power_of_2(width))
    programs = segments * triton.cdiv(width, block_columns)
    # Where segments are few and long, several programs share one, and a second pass adds up what they found.
    chunks = max(1, min(FILLS_A_GPU // programs, int(rows) // (4 * block_rows), 1024))
    partial = out if chunks == 1 else out.new_empty(chunks, segments, width)
    _scaled_segment_sum_kernel[segments, triton.cdiv(width, block_columns), chunks](
        *(g if x is None else x, g, g if shift is None else shift, g if scale is None else scale),
        *(offsets, partial, segments, width),
        *(*(g if x is None else x).stride(), *g.stride()),
        ACCUMULATOR=constexpr_of(g.dtype),
        HAS_X=x is not None,
        HAS_SHIFT=shift is not None,
        HAS_SCALE=scale is not None,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
    )
    if chunks > 1:
        torch.sum(partial, 0, out=out)


@triton.jit(do_not_specialize=["segments"])
def _scaled_segment_sum_kernel(
    x_ptr,
    g_ptr,
    shift_ptr,
    scale_ptr,
    offsets_ptr,
    out_ptr,
    segments,
    width,
    stride_x_row,
    stride_x_column,
    stride_g_row,
    stride_g_column,
    ACCUMULATOR: tl.constexpr,
    HAS_X: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    chunk = tl.program_id(2).to(tl.int64)
    begin = tl.load(offsets_ptr + segment)
    end = tl.load(offsets_ptr + segment + 1)
    of_chunk = tl.cdiv(end - begin, tl.num_programs(2))
    begin += chunk * of_chunk
    end = tl.minimum(begin + of_chunk, end)

    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), ACCUMULATOR)
    for first in range(begin, end, BLOCK_ROWS):
        rows = first + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        # What is masked is never read, so that a NaN of the next segment stays there.
        mask = (rows < end)[:, None] & (columns < width)[None, :]
        g = tl.load(
            g_ptr + rows[:, None] * stride_g_row + columns[None, :].to(tl.int64) * stride_g_column, mask=mask, other=0.0
        ).to(ACCUMULATOR)
        if HAS_X:
            x = tl.load(
                x_ptr + rows[:, None] * stride_x_row + columns[None, :].to(tl.int64) * stride_x_column,
                mask=mask,
                other=0.0,
            ).to(ACCUMULATOR)
            if HAS_SHIFT:
                x -= tl.load(shift_ptr + rows, mask=rows < end, other=0.0).to(ACCUMULATOR)[:, None]
            if HAS_SCALE:
                x *= tl.load(scale_ptr + rows, mask=rows < end, other=0.0).to(ACCUMULATOR)[:, None]
            total += g * x
        else:
            total += g
    tl.store(out_ptr + (chunk * segments + segment) * width + columns, tl.sum(total, 0), mask=columns < width)
