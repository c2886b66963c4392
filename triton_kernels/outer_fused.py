"""The fused method: the product that forms dW also squares it, wherever a segment or a group of segments ends.

A program forms one tile of dW. It walks all rows, block by block, in one pipelined loop; where an *entry* (a segment, or
several that are never told apart) ends, its tile is squared and added to the tile of the group around it, whose end is
treated likewise, up to dW itself. Two tiles live in registers: the entry's, and the one it is added to. With groups the
others live in memory, where each is touched only when a group ends.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from gradnorm_ext.triton_kernels.registration import constexpr_of, is_aligned, is_hopper, uses_tf32
from gradnorm_ext.triton_kernels.walk import Entries
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """The shape of a program: what it computes at once, by how many warps, and how many loads run ahead."""

    d: int
    p: int
    rows: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        return {
            **{"BLOCK_D": self.d, "BLOCK_P": self.p, "BLOCK_ROWS": self.rows, "STAGES": self.stages},
            **{"num_warps": self.warps, "num_stages": self.stages},
        }


def tile(dtype: torch.dtype, tf32: bool, levels: int, ordered: bool, aligned: bool, hopper: bool) -> Tile:
    """The largest that compiles without spilling registers: `tests/test_triton_compiled.py` holds it to that.

    ``ordered``: a row's place is loaded before the row, which takes half of the stages; the same number of rows runs ahead.
    ``aligned``: rows can be copied to shared memory in wide pieces; others pass through registers.
    """
    if dtype == torch.float64:
        return Tile(32, 32, 16, 4, 2)
    if dtype == torch.float32:
        return Tile(64, 64, 32, 4, 3) if tf32 else Tile(64, 64, 16, 8, 2)
    if not aligned:
        return Tile(64, 64, 32, 4, 3)
    # Two accumulators of 128 x 128 are half of the register file. Where a third is added to in memory they must be smaller.
    p = 64 if levels else 128
    if hopper:
        return Tile(128, p, 64, 8, 7 if ordered else 4)
    return Tile(128, p, 32, 8, 5 if ordered else 3)


def fused(x: Tensor, g: Tensor, entries: Entries, dw: Tensor | None, norms: Tensor, accumulate: bool) -> None:
    """Adds the norms of the entries and their groups to ``norms``; dW is written to or added to ``dw [outputs, d, p]``."""
    d, p, levels, tf32 = g.shape[1], x.shape[1], entries.levels, uses_tf32(x)
    shape = tile(x.dtype, tf32, levels, entries.order is not None, is_aligned(x, g), is_hopper(x))
    tiles = triton.cdiv(d, shape.d) * triton.cdiv(p, shape.p)
    partial = norms.new_zeros(len(norms), tiles)
    scratch = norms.new_zeros(max(0, levels - 1), tiles, shape.d * shape.p)
    in_registers = levels == 0 and entries.output is None
    if dw is not None and not in_registers and not accumulate:
        dw.zero_()
    steps = entries.blocks(shape.rows)
    given = (entries.order, entries.columns, entries.depth, entries.weight, entries.adds, entries.output, dw)
    _fused_kernel[(tiles,)](
        *(x, g, entries.begin, entries.end, steps, *(partial if t is None else t for t in given), scratch, partial),
        *(len(entries.begin), p, d, x.stride(0), g.stride(0)),
        ACCUMULATOR=constexpr_of(x.dtype),
        PRECISION="tf32" if tf32 else "ieee",
        STEPS_KNOWN=isinstance(steps, int),
        LEVELS=levels,
        HAS_ORDER=entries.order is not None,
        HAS_COLUMNS=entries.columns is not None,
        HAS_WEIGHT=entries.weight is not None,
        HAS_ADDS=entries.adds is not None,
        HAS_OUTPUT=entries.output is not None,
        HAS_DW=dw is not None,
        IN_REGISTERS=in_registers,
        ACCUMULATE=accumulate,
        BANDS=8,
        **shape.options,
    )
    norms += partial.sum(1)


@triton.jit(do_not_specialize=["steps", "entries"])
def _fused_kernel(
    x_ptr,
    g_ptr,
    begin_ptr,
    end_ptr,
    steps,
    order_ptr,
    columns_ptr,
    depth_ptr,
    weight_ptr,
    adds_ptr,
    output_ptr,
    dw_ptr,
    scratch_ptr,
    partial_ptr,
    entries,
    p,
    d,
    stride_x,
    stride_g,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
    STEPS_KNOWN: tl.constexpr,
    LEVELS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_ADDS: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    HAS_DW: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BANDS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Programs that run at the same time share a square of dW: what they read meets in the L2 cache.
    program, tiles = tl.program_id(0), tl.num_programs(0)
    across, down = tl.cdiv(p, BLOCK_P), tl.cdiv(d, BLOCK_D)
    band = program // (BANDS * across)
    height = tl.minimum(down - band * BANDS, BANDS)
    inside_band = program % (BANDS * across)
    i = (band * BANDS + inside_band % height) * BLOCK_D
    j = (inside_band // height) * BLOCK_P
    in_row_g, in_row_x = i + tl.arange(0, BLOCK_D), j + tl.arange(0, BLOCK_P)
    in_d, in_p = in_row_g < d, in_row_x < p
    in_tile = in_d[:, None] & in_p[None, :]
    # Offsets inside a tile fit 32 bits; 64 would take the registers that the tiles need.
    of_tile = tl.arange(0, BLOCK_D)[:, None] * p + tl.arange(0, BLOCK_P)[None, :]
    of_scratch = tl.arange(0, BLOCK_D)[:, None] * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    scratch_ptr += program.to(tl.int64) * (BLOCK_D * BLOCK_P)
    dw_ptr += i.to(tl.int64) * p + j

    if not STEPS_KNOWN:
        steps = tl.load(steps)
    entry = steps * 0
    row, end = tl.load(begin_ptr), tl.load(end_ptr)
    own = tl.zeros((BLOCK_D, BLOCK_P), ACCUMULATOR)
    outer = tl.zeros((BLOCK_D, BLOCK_P), ACCUMULATOR)
    for _ in tl.range(0, steps, num_stages=STAGES):
        rows = row + tl.arange(0, BLOCK_ROWS)
        inside = rows < end
        if HAS_ORDER:
            rows = tl.load(order_ptr + rows, mask=inside, other=0)
        # Both are masked: a zero times a neighbour's NaN would not be zero.
        g_mask, x_mask = inside[None, :] & in_d[:, None], inside[:, None] & in_p[None, :]
        g = tl.load(g_ptr + (rows[None, :] * stride_g + in_row_g[:, None]), mask=g_mask, other=0.0)
        x = tl.load(x_ptr + (rows[:, None] * stride_x + in_row_x[None, :]), mask=x_mask, other=0.0)
        own = tl.dot(g, x, own, input_precision=PRECISION, out_dtype=ACCUMULATOR)

        row += BLOCK_ROWS
        ends = row >= end
        if ends:
            depth = tl.load(depth_ptr + entry) if HAS_COLUMNS else 1
            weight = tl.load(weight_ptr + entry).to(ACCUMULATOR) if HAS_WEIGHT else 1.0
            adds = tl.load(adds_ptr + entry) if HAS_ADDS else LEVELS
            dw_tile = dw_ptr
            if HAS_OUTPUT:
                dw_tile += tl.load(output_ptr + entry) * d * p
            for level in tl.static_range(LEVELS + 1):
                if depth > level:
                    ended = own if level == 0 else outer  # no third tile
                    column = tl.load(columns_ptr + level * entries + entry) if HAS_COLUMNS else entry
                    squared = tl.sum(tl.sum(ended * ended, 1), 0)
                    tl.store(partial_ptr + column.to(tl.int64) * tiles + program, squared)
                    if HAS_DW and not IN_REGISTERS:
                        if adds == level:
                            added = weight * ended
                            if ACCUMULATE or not HAS_OUTPUT or HAS_WEIGHT:  # else nothing else is added to it
                                added += tl.load(dw_tile + of_tile, mask=in_tile, other=0.0)
                            tl.store(dw_tile + of_tile, added, mask=in_tile)
                    if level == 0 and LEVELS > 0:
                        outer += own
                    if level > 0 and level < LEVELS:
                        group = scratch_ptr + (level - 1) * tiles.to(tl.int64) * (BLOCK_D * BLOCK_P) + of_scratch
                        outer += tl.load(group)
                        tl.store(group, tl.where(depth > level + 1, 0.0, outer))
            if LEVELS > 0:
                if depth > 1:
                    outer = tl.zeros((BLOCK_D, BLOCK_P), ACCUMULATOR)
            if HAS_DW and IN_REGISTERS:
                outer += weight * own
            own = tl.zeros((BLOCK_D, BLOCK_P), ACCUMULATOR)
        # Not in the branch above: the loads that run ahead follow these, and must not wait for a product.
        entry = tl.minimum(entry + ends.to(entry.dtype), entries - 1)
        row = tl.where(ends, tl.load(begin_ptr + entry), row)
        end = tl.load(end_ptr + entry)

    if HAS_DW and IN_REGISTERS:
        dw_tile = dw_ptr + of_tile
        if ACCUMULATE:
            outer += tl.load(dw_tile, mask=in_tile, other=0.0)
        tl.store(dw_tile, outer, mask=in_tile)
