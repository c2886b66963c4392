"""The gram method: squared norms from pairs of rows, ``Σ_{q, r in s} (x[q]·x[r]) (g[q]·g[r])``, for short segments.

The rows of a segment are cut into blocks. A program multiplies one block with every ``J``-th from itself on: the two
products of a pair of blocks meet in registers, and nothing rows x rows is written.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradnorm_ext.triton_kernels.chips import Chip, chip_of
from gradnorm_ext.triton_kernels.registration import constexpr_of, is_aligned, uses_tf32
from gradnorm_ext.triton_kernels.segment_sum import scaled_segment_sum
from gradnorm_ext.triton_kernels.walk import Entries


@dataclass(frozen=True)
class Tile:
    """A block of rows, how much of their width is multiplied at once, by how many warps, and the loads that run ahead.

    ``instructions``: as of `outer_fused.Tile`.
    """

    rows: int
    width: int
    warps: int
    stages: int
    instructions: int = 140

    @property
    def options(self) -> dict[str, int]:
        return {
            **{"BLOCK_ROWS": self.rows, "BLOCK_WIDTH": self.width, "STAGES": self.stages},
            **{"num_warps": self.warps, "num_stages": self.stages},
        }


def tile(dtype: torch.dtype, tf32: bool, rows_per_segment: float, aligned: bool, chip: Chip) -> Tile:
    """Blocks as long as the segments are, up to what compiles without spilling registers: two accumulators.

    ``aligned``: as of `outer_fused.tile`.
    """
    rows = next((rows for rows in (16, 64) if rows_per_segment <= rows), 128)
    small = (
        16 if chip.capability[0] == 12 else 32
    )  # there Triton 3.6 spills the latter in float64, and 3.9 if not aligned
    if dtype == torch.float64:
        return Tile(min(rows, small), 16, 4, 2)
    if dtype == torch.float32:
        return Tile(min(rows, 64), 32, 4, 3) if tf32 else Tile(min(rows, 64), 16, 8, 2)
    if not aligned:
        return Tile(min(rows, small), 32, 4, 2)
    warps = 8 if rows == 128 else 4
    return Tile(rows, 64, warps, 4) if chip.has_warpgroups else Tile(rows, 32, warps, 3)


def pairs(x: Tensor, g: Tensor, entries: Entries, norms: Tensor, mean_rows: float) -> None:
    """Writes the entries' squared norms to ``norms``; what groups lie around them does not matter."""
    tf32 = uses_tf32(x)
    shape = tile(x.dtype, tf32, mean_rows, is_aligned(x, g), chip_of(x))
    count = len(entries.begin)
    if entries.length is None:  # there is room for any length
        blocks, at_most = len(x) // shape.rows + count, len(x) // shape.rows + 1
    else:
        at_most = max(1, triton.cdiv(entries.length, shape.rows))
        blocks = count * at_most
    partners = 1 if at_most == 1 else 4 if at_most <= 4 else 16  # few, as each number needs a kernel to add up
    partial = norms.new_empty(blocks, partners)
    _pairs_kernel[blocks, partners](
        *(x, g, entries.begin, entries.end, x if entries.order is None else entries.order, partial),
        *(count, at_most, x.shape[1], g.shape[1], x.stride(0), g.stride(0)),
        ACCUMULATOR=constexpr_of(x.dtype),
        PRECISION="tf32" if tf32 else "ieee",
        EQUAL=entries.length is not None,
        HAS_ORDER=entries.order is not None,
        **shape.options,
    )
    if entries.length is None:
        sums = norms.new_empty(count, partners)
        scaled_segment_sum(None, partial, None, None, entries.first_blocks(shape.rows), sums, block_rows=8)
    else:
        sums = partial.view(count, -1)
    if entries.columns is None:
        torch.sum(sums, 1, out=norms[entries.first : entries.first + count])
    else:
        norms[entries.places] = sums.sum(1)


@triton.jit(do_not_specialize=["entries", "blocks_per_entry"])
def _pairs_kernel(
    x_ptr,
    g_ptr,
    begin_ptr,
    end_ptr,
    order_ptr,
    partial_ptr,
    entries,
    blocks_per_entry,
    p,
    d,
    stride_x,
    stride_g,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
    EQUAL: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    block, partner, partners = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    if EQUAL:
        entry = block // blocks_per_entry
        i = block % blocks_per_entry
    else:
        entry, above = block * 0, block * 0 + entries
        while entry + 1 < above:
            middle = (entry + above) // 2
            if tl.load(begin_ptr + middle) // BLOCK_ROWS + middle <= block:
                entry = middle
            else:
                above = middle
        i = block - (tl.load(begin_ptr + entry) // BLOCK_ROWS + entry)
    begin, end = tl.load(begin_ptr + entry), tl.load(end_ptr + entry)
    blocks = tl.cdiv(end - begin, BLOCK_ROWS)
    rows_i = begin + i * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside_i = rows_i < end
    if HAS_ORDER:
        rows_i = tl.load(order_ptr + rows_i, mask=inside_i, other=0)
    total = tl.sum(tl.zeros((1,), ACCUMULATOR), 0)
    for j in range(i + partner, blocks, partners):
        rows_j = begin + j * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        inside_j = rows_j < end
        if HAS_ORDER:
            rows_j = tl.load(order_ptr + rows_j, mask=inside_j, other=0)
        xx = _products(x_ptr, rows_i, inside_i, rows_j, inside_j, p, stride_x,
                       ACCUMULATOR, PRECISION, BLOCK_ROWS, BLOCK_WIDTH, STAGES)  # fmt: skip
        gg = _products(g_ptr, rows_i, inside_i, rows_j, inside_j, d, stride_g,
                       ACCUMULATOR, PRECISION, BLOCK_ROWS, BLOCK_WIDTH, STAGES)  # fmt: skip
        # A pair of different blocks stands for both of its orders.
        total += tl.where(j == i, 1.0, 2.0) * tl.sum(xx * gg)
    tl.store(partial_ptr + block * partners + partner, total)


@triton.jit
def _products(
    rows_ptr,
    rows_i,
    inside_i,
    rows_j,
    inside_j,
    width,
    stride,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    products = tl.zeros((BLOCK_ROWS, BLOCK_ROWS), ACCUMULATOR)
    for first in tl.range(0, width, BLOCK_WIDTH, num_stages=STAGES):
        columns = first + tl.arange(0, BLOCK_WIDTH)
        a = tl.load(
            rows_ptr + (rows_i[:, None] * stride + columns[None, :]),
            mask=inside_i[:, None] & (columns < width)[None, :],
            other=0.0,
        )
        b = tl.load(
            rows_ptr + (rows_j[None, :] * stride + columns[:, None]),
            mask=inside_j[None, :] & (columns < width)[:, None],
            other=0.0,
        )
        products = tl.dot(a, b, products, input_precision=PRECISION, out_dtype=ACCUMULATOR)
    return products
