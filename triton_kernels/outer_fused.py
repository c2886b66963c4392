"""The fused method: the product that forms dW also squares it, wherever a segment or a group of segments ends.

A program forms one tile of dW. It goes through the *entries* (segments, or several that are never told apart), and through
the rows of each in a pipelined loop; where an entry ends, its tile is squared and added to the tile of the group around it,
whose end is treated likewise, up to dW itself. Two tiles live in registers: the entry's, and the one it is added to. With
groups the others live in memory, where each is touched only when a group ends, one half after the other: a third tile
would not fit.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gradnorm_ext.triton_kernels.chips import Chip, chip_of
from gradnorm_ext.triton_kernels.registration import constexpr_of, is_aligned, uses_tf32
from gradnorm_ext.triton_kernels.walk import Entries

_SCRATCH = 1 << 26  # bytes of the tiles that lie in memory; a larger weight goes in parts


@dataclass(frozen=True)
class Tile:
    """The shape of a program: what it computes at once, by how many warps, and how many loads run ahead.

    ``instructions``: what a warp issues a step besides products, at most; `tests/test_triton_compiled.py` counts them.
    """

    d: int
    p: int
    rows: int
    warps: int
    stages: int
    instructions: int = 250

    @property
    def options(self) -> dict[str, int]:
        return {
            **{"BLOCK_D": self.d, "BLOCK_P": self.p, "BLOCK_ROWS": self.rows, "STAGES": self.stages},
            **{"num_warps": self.warps, "num_stages": self.stages},
        }


def tile(dtype: torch.dtype, tf32: bool, aligned: bool, ordered: bool, three: bool, chip: Chip) -> Tile:
    """The largest that compiles without spilling registers: `tests/test_triton_compiled.py` holds it to that.

    ``aligned``: rows can be copied to shared memory in wide pieces; others pass through registers.
    ``ordered``: a row's place is loaded before the row, which takes half of the stages; the same number of rows runs ahead.
    ``three``: segments are told apart, belong to groups, and have weights of their own: three sums, of which one is in memory.
    """
    if dtype == torch.float64:
        return Tile(32, 32, 16, 4, 2)
    if dtype == torch.float32:
        return Tile(64, 64, 32, 4, 3) if tf32 else Tile(64, 64, 16, 8, 2)
    if not aligned:
        return Tile(64, 64, 32, 4, 3)
    if chip.has_warpgroups:
        p = 64 if three and chip.is_blackwell else 128  # a tile comes from tensor memory whole
        return Tile(128, p, 64, 8, *((7, 165) if ordered else (4, 140)))
    return Tile(128, 128, 32, 8, *((5, 130) if ordered else (3, 110)))


def fused(
    x: Tensor,
    g: Tensor,
    entries: Entries,
    dw: Tensor | None,
    norms: Tensor,
    accumulate: bool,
    total: Tensor | None = None,
) -> None:
    """Writes the norms of the entries and their groups to ``norms``; dW is written to or added to ``dw [outputs, d, p]``.

    ``total``: the last of ``norms``, where the squared norm of the sum of all entries goes, which have no weights then.
    """
    d, p, levels, tf32, chip = g.shape[1], x.shape[1], entries.levels, uses_tf32(x), chip_of(x)
    ordered = entries.order is not None
    shape = tile(x.dtype, tf32, is_aligned(x, g), ordered, levels > 0 and entries.adds is not None, chip)
    tiles = triton.cdiv(d, shape.d) * triton.cdiv(p, shape.p)
    norms = norms[entries.first :]
    if dw is not None and entries.output is not None and not accumulate:
        dw.zero_()  # of a group without rows nothing is written
    # As many tiles at a time as there is scratch for, in whole waves of the chip's multiprocessors.
    at_once = _SCRATCH // (max(1, levels) * shape.d * shape.p * norms.element_size())
    at_once = tiles if levels == 0 else min(tiles, max(1, at_once // chip.multiprocessors) * chip.multiprocessors)
    # All but the last of the norms are written where there are no groups, of which some may have no rows.
    is_written = levels == 0 and isinstance(entries.count, int)
    sizes = at_once * levels * shape.d * shape.p, triton.cdiv(tiles, 16) * 16, len(norms) * tiles
    memory = norms.new_empty(sum(sizes)) if is_written else norms.new_zeros(sum(sizes))
    scratch, of_tiles, partial = memory.split(sizes)
    partial = partial.view(-1, tiles)
    described = entries.length is not None and _can_be_described(x, g, levels, chip)
    rows = (
        (_described(x, entries, shape.rows, shape.p), _described(g, entries, shape.rows, shape.d))
        if described
        else (x, g)
    )
    given = (entries.order, entries.columns, entries.depth, entries.weight, entries.adds, entries.output, dw)
    for first in range(0, tiles, at_once):
        _fused_kernel[(min(at_once, tiles - first),)](
            *(*rows, entries.begin, entries.end, entries.count, entries.length or 0, first),
            *(*(partial if t is None else t for t in given), of_tiles, scratch, partial),
            *(len(entries.begin), p, d, x.stride(0), g.stride(0)),
            ACCUMULATOR=constexpr_of(x.dtype),
            PRECISION="tf32" if tf32 else "ieee",
            DESCRIBED=described,
            COUNT_KNOWN=isinstance(entries.count, int),
            LEVELS=levels,
            HAS_ORDER=ordered,
            HAS_COLUMNS=entries.columns is not None,
            HAS_WEIGHT=entries.weight is not None,
            HAS_ADDS=entries.adds is not None,
            HAS_OUTPUT=entries.output is not None,
            HAS_DW=dw is not None,
            HAS_TOTAL=total is not None,
            ACCUMULATE=accumulate,
            UNIT=16 if is_aligned(x, g) and len(x) * max(x.stride(0), g.stride(0)) < 1 << 36 else 1,
            BANDS=8,
            **shape.options,
        )
    torch.sum(partial, 1, out=norms)
    if total is not None:
        torch.sum(of_tiles[:tiles], 0, out=total[0])


def _can_be_described(x: Tensor, g: Tensor, levels: int, chip: Chip) -> bool:
    """Whether the hardware can fetch tiles of rows by itself (TMA), and Triton keeps its loop: on sm_100, of one level."""
    aligned = all(rows.stride(0) * rows.element_size() % 16 == 0 and rows.data_ptr() % 16 == 0 for rows in (x, g))
    return aligned and x.element_size() == 2 and chip.has_warpgroups and not (levels and chip.is_blackwell)


def _described(rows: Tensor, entries: Entries, block_rows: int, width: int) -> TensorDescriptor:
    """Equally long segments, as a tensor ``[segments, length, width]``: what lies beyond a segment's end reads as zeros."""
    assert entries.length is not None
    sizes, stride = [len(entries.begin), entries.length, rows.shape[1]], rows.stride(0)
    return TensorDescriptor(rows, sizes, [entries.length * stride, stride, 1], [1, block_rows, width])


@triton.jit(do_not_specialize=["count", "length", "first", "entries"])
def _fused_kernel(
    x_ptr,
    g_ptr,
    begin_ptr,
    end_ptr,
    count,
    length,
    first,
    order_ptr,
    columns_ptr,
    depth_ptr,
    weight_ptr,
    adds_ptr,
    output_ptr,
    dw_ptr,
    total_ptr,
    scratch_ptr,
    partial_ptr,
    entries,
    p,
    d,
    stride_x,
    stride_g,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIBED: tl.constexpr,
    COUNT_KNOWN: tl.constexpr,
    LEVELS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_ADDS: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    HAS_DW: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    UNIT: tl.constexpr,
    BANDS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    SUMS: tl.constexpr = (HAS_DW and not HAS_OUTPUT) or HAS_TOTAL
    HALF: tl.constexpr = BLOCK_P // 2
    # Programs that run at the same time share a square of dW: what they read meets in the L2 cache.
    program = first + tl.program_id(0)
    across, down = tl.cdiv(p, BLOCK_P), tl.cdiv(d, BLOCK_D)
    band = program // (BANDS * across)
    height = tl.minimum(down - band * BANDS, BANDS)
    inside_band = program % (BANDS * across)
    i = (band * BANDS + inside_band % height) * BLOCK_D
    j = (inside_band // height) * BLOCK_P
    in_row_g, in_row_x = i + tl.arange(0, BLOCK_D), j + tl.arange(0, BLOCK_P)
    in_tile = (in_row_g < d)[:, None] & (in_row_x < p)[None, :]
    # Beyond its width a row is read from its beginning again, which takes no mask; what comes of it is cleared in the end.
    in_row_g, in_row_x = in_row_g % d, in_row_x % p

    # Offsets inside a tile in memory: those of dW fit 32 bits; of 64 for the scratch, constants become part of the address.
    of_row, of_half = tl.arange(0, BLOCK_D)[:, None], tl.arange(0, HALF)[None, :]
    of_dw, of_scratch = of_row * p + of_half, (of_row * HALF + of_half).to(tl.int64)
    in_low, in_high = (i + of_row < d) & (j + of_half < p), (i + of_row < d) & (j + HALF + of_half < p)
    sum_ptr = scratch_ptr + tl.program_id(0).to(tl.int64) * (LEVELS * BLOCK_D * BLOCK_P) + of_scratch
    partial_ptr += program
    tiles = across * down

    if not COUNT_KNOWN:
        count = tl.load(count)
    outer = tl.zeros((BLOCK_D, BLOCK_P), ACCUMULATOR)
    started = False
    # Where little is done between entries the two loops become one, in which loads run ahead over an entry's end.
    for entry in tl.range(0, count, flatten=DESCRIBED and LEVELS == 0):
        if DESCRIBED:
            begin, end = 0, length
            segment = tl.load(columns_ptr + entry).to(tl.int32) if HAS_COLUMNS else entry
        else:
            begin, end = tl.load(begin_ptr + entry), tl.load(end_ptr + entry)
        own = tl.zeros((BLOCK_D, BLOCK_P), ACCUMULATOR)
        for row in tl.range(begin, end, BLOCK_ROWS, num_stages=STAGES):
            if DESCRIBED:
                g = g_ptr.load([segment, row, i]).reshape(BLOCK_ROWS, BLOCK_D).T
                x = x_ptr.load([segment, row, j]).reshape(BLOCK_ROWS, BLOCK_P)
            else:
                rows = row + tl.arange(0, BLOCK_ROWS)
                inside = tl.arange(0, BLOCK_ROWS) < tl.minimum(end - row, BLOCK_ROWS).to(tl.int32)
                if HAS_ORDER:
                    rows = tl.load(order_ptr + rows)
                if HAS_ORDER and UNIT > 1:  # 32 bits count units: a 64-bit product takes five instructions
                    of_row_g = (rows.to(tl.uint32) * (stride_g // UNIT).to(tl.uint32)).to(tl.int64) * UNIT
                    of_row_x = (rows.to(tl.uint32) * (stride_x // UNIT).to(tl.uint32)).to(tl.int64) * UNIT
                else:
                    of_row_g, of_row_x = rows.to(tl.int64) * stride_g, rows.to(tl.int64) * stride_x
                # Both are masked: a zero times a neighbour's NaN would not be zero.
                g = tl.load(g_ptr + (of_row_g[None, :] + in_row_g[:, None]), mask=inside[None, :], other=0.0)
                x = tl.load(x_ptr + (of_row_x[:, None] + in_row_x[None, :]), mask=inside[:, None], other=0.0)
            own = tl.dot(g, x, own, input_precision=PRECISION, out_dtype=ACCUMULATOR)
        if not DESCRIBED:
            own = tl.where(in_tile, own, 0.0)

        depth = tl.load(depth_ptr + entry) if HAS_COLUMNS else 1
        weight = tl.load(weight_ptr + entry).to(ACCUMULATOR) if HAS_WEIGHT else 1.0
        adds = tl.load(adds_ptr + entry) if HAS_ADDS else LEVELS
        for level in tl.static_range(LEVELS + 1):
            if depth > level:
                ended = own if level == 0 else outer  # no third tile
                column = tl.load(columns_ptr + level * entries + entry) if HAS_COLUMNS else entry
                tl.store(partial_ptr + column.to(tl.int64) * tiles, tl.sum(ended * ended))
                low, high = _halves(ended)
                if HAS_OUTPUT and level == LEVELS:
                    of_group = dw_ptr + (tl.load(output_ptr + entry) * d * p + i.to(tl.int64) * p + j)
                    _write(of_group + of_dw, low, in_low, ACCUMULATE)
                    _write(of_group + of_dw + HALF, high, in_high, ACCUMULATE)
                if SUMS and LEVELS > 0:
                    if adds == level:
                        _add(sum_ptr, low, weight, started)
                        _add(sum_ptr + BLOCK_D * HALF, high, weight, started)
                        started = True
                if level == 0 and LEVELS > 0:
                    outer += own
                if level > 0 and level < LEVELS:
                    group = sum_ptr + level * BLOCK_D * BLOCK_P
                    low = _moved(group, low, depth > level + 1)
                    high = _moved(group + BLOCK_D * HALF, high, depth > level + 1)
                    outer = tl.join(low, high).permute(0, 2, 1).reshape(BLOCK_D, BLOCK_P)
        if LEVELS > 0:
            if depth > 1:
                outer = tl.zeros((BLOCK_D, BLOCK_P), ACCUMULATOR)
        elif SUMS:
            outer += weight * own

    if SUMS:
        if LEVELS > 0:
            low = tl.load(sum_ptr, mask=started, other=0.0)
            high = tl.load(sum_ptr + BLOCK_D * HALF, mask=started, other=0.0)
        else:
            low, high = _halves(outer)
        if HAS_TOTAL:
            tl.store(total_ptr + program, tl.sum(low * low) + tl.sum(high * high))
        if HAS_DW and not HAS_OUTPUT:
            dw_ptr += i.to(tl.int64) * p + j
            _write(dw_ptr + of_dw, low, in_low, ACCUMULATE)
            _write(dw_ptr + of_dw + HALF, high, in_high, ACCUMULATE)


@triton.jit
def _halves(tile):
    """Its left and right columns, which every thread has both of."""
    return tl.split(tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1))


@triton.jit
def _write(target, tile, inside, ACCUMULATE: tl.constexpr):
    """To dW, in its dtype: rounded once."""
    if ACCUMULATE:
        tile += tl.load(target, mask=inside, other=0.0).to(tile.dtype)
    tl.store(target, tile.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _add(target, tile, weight, started):
    """To what is there once it was ``started``."""
    tl.store(target, weight * tile + tl.load(target, mask=started, other=0.0))


@triton.jit
def _moved(source, tile, out):
    """With what is there added to it, and put there unless it goes ``out`` of it."""
    tile += tl.load(source)
    tl.store(source, tl.where(out, 0.0, tile))
    return tile
