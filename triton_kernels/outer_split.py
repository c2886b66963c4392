"""The split method: library products of single segments into a bounded scratch, then one pass over them, for long segments.

The scratch holds all segments' gradients of some rows of the weight. The pass reads it once and yields every norm and
the (weighted) sum. The grouped method is the same for segments of any lengths and norms alone: torch's grouped product
rounds each segment's gradient to bfloat16, which is half the memory, and too coarse for their sum.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradnorm_ext.triton_kernels.chips import chip_of
from gradnorm_ext.triton_kernels.library import grouped_product, product
from gradnorm_ext.triton_kernels.registration import constexpr_of
from gradnorm_ext.triton_kernels.walk import Entries

SCRATCH = 1 << 28  # bytes
_BLOCK = 2048
_MOST_GROUPS = 1023  # of torch's grouped product


def split(
    x: Tensor,
    g: Tensor,
    entries: Entries,
    dw: Tensor | None,
    norms: Tensor,
    accumulate: bool,
    total: Tensor | None = None,
) -> None:
    """Adds the norms of the entries and their groups to ``norms``; dW is written to or added to ``dw [outputs, d, p]``.

    The entries are segments of a length that is known, so that the library can be told. ``total``: as of `outer_fused.fused`.
    """
    segments = len(entries.begin)
    of_segments = x.unflatten(0, (segments, -1))

    def gradients(rows: Tensor, out: Tensor) -> None:
        product(rows.unflatten(0, (segments, -1)).transpose(1, 2), of_segments, out)

    _split(x, g, entries, gradients, norms.dtype, dw, norms, accumulate, total)


def can_group(x: Tensor, g: Tensor, segments: int) -> bool:
    """Whether torch's grouped product takes the rows as they are, and does so in one kernel."""
    aligned = all(rows.stride(0) % 8 == 0 and rows.data_ptr() % 16 == 0 for rows in (x, g))
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and aligned
        and segments <= _MOST_GROUPS
        and chip_of(x).has_grouped_product
    )


def grouped(x: Tensor, g: Tensor, offsets: Tensor, entries: Entries, norms: Tensor, total: Tensor | None) -> None:
    """Adds the norms of the entries, segments of any lengths, and of their groups to ``norms``."""
    ends = offsets[1:].int()

    def gradients(rows: Tensor, out: Tensor) -> None:
        grouped_product(rows.t(), x, ends, out)

    _split(x, g, entries, gradients, x.dtype, None, norms, False, total)


def _split(
    x: Tensor,
    g: Tensor,
    entries: Entries,
    form: Callable[[Tensor, Tensor], None],
    dtype: torch.dtype,
    dw: Tensor | None,
    norms: Tensor,
    accumulate: bool,
    total: Tensor | None,
) -> None:
    """``form``: the gradients ``[segments, height, p]`` of columns ``[R, height]`` of g, in a dtype."""
    segments, d, p = len(entries.begin), g.shape[1], x.shape[1]
    if dw is not None and entries.output is not None and not accumulate:
        dw.zero_()  # of a group without segments nothing is written
    columns, depth = entries.columns, entries.depth
    if columns is None:
        columns = torch.arange(segments, device=x.device)[None]
    if depth is None:
        depth = torch.ones_like(columns[0])
    height = max(1, min(d, SCRATCH // (segments * p * dtype.itemsize)))
    if height < d and height > 8:
        height -= height % 8  # columns of g begin where wide loads may
    memory = norms.new_empty(segments * height * p, dtype=dtype)
    for top in range(0, d, height):
        rows = g[:, top : top + height]
        size = rows.shape[1] * p
        gradients = memory[: segments * size].view(segments, rows.shape[1], p)
        form(rows, gradients)
        blocks = triton.cdiv(size, _BLOCK)
        partial, of_blocks = norms.new_zeros(len(norms), blocks), norms.new_empty(blocks)
        given = (entries.weight, entries.output, dw)
        _split_kernel[(blocks,)](
            *(gradients, entries.begin, entries.end, columns, depth, *(partial if t is None else t for t in given)),
            *(of_blocks, partial, segments, size, d * p, top * p),
            ACCUMULATOR=constexpr_of(norms.dtype),
            LEVELS=triton.next_power_of_2(len(columns)),
            HAS_WEIGHT=entries.weight is not None,
            HAS_OUTPUT=entries.output is not None,
            HAS_DW=dw is not None,
            HAS_TOTAL=total is not None,
            ACCUMULATE=accumulate,
            BLOCK=_BLOCK,
        )
        norms += partial.sum(1)
        if total is not None:
            total += of_blocks.sum()


@triton.jit(do_not_specialize=["segments", "offset"])
def _split_kernel(
    gradients_ptr,
    begin_ptr,
    end_ptr,
    columns_ptr,
    depth_ptr,
    weight_ptr,
    output_ptr,
    dw_ptr,
    total_ptr,
    partial_ptr,
    segments,
    size,
    stride_output,
    offset,
    ACCUMULATOR: tl.constexpr,
    LEVELS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    HAS_DW: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    entries = block * BLOCK + tl.arange(0, BLOCK)
    inside = entries < size
    level = tl.arange(0, LEVELS)
    sums = tl.zeros((LEVELS, BLOCK), ACCUMULATOR)  # of the segment, and of each group around it
    total = tl.zeros((BLOCK,), ACCUMULATOR)
    for place in range(segments):
        segment = tl.load(columns_ptr + place)  # a segment's norm belongs where the segment is
        written = tl.where(
            tl.load(begin_ptr + place) < tl.load(end_ptr + place), size, 0
        )  # of no rows, nothing need be
        value = tl.load(gradients_ptr + segment * size + entries, mask=entries < written, other=0.0).to(ACCUMULATOR)
        sums += value[None, :]
        ended = level < tl.load(depth_ptr + place)
        column = tl.load(columns_ptr + level * segments + place, mask=ended, other=0)
        squared = tl.sum(sums * sums, 1)
        tl.store(partial_ptr + column * tl.num_programs(0) + block, squared, mask=ended)
        sums = tl.where(ended[:, None], 0.0, sums)
        if HAS_DW or HAS_TOTAL:
            if HAS_WEIGHT:
                value *= tl.load(weight_ptr + place).to(ACCUMULATOR)
            total += value
            if HAS_OUTPUT:
                output = tl.load(output_ptr + place)
                is_last = place + 1 == segments
                is_last |= tl.load(output_ptr + tl.minimum(place + 1, segments - 1)) != output
                if is_last:
                    _write(dw_ptr + output * stride_output + offset + entries, total, inside, ACCUMULATE)
                    total = tl.zeros((BLOCK,), ACCUMULATOR)
    if HAS_TOTAL:
        tl.store(total_ptr + block, tl.sum(total * total))
    if HAS_DW and not HAS_OUTPUT:
        _write(dw_ptr + offset + entries, total, inside, ACCUMULATE)


@triton.jit
def _write(target, sums, inside, ACCUMULATE: tl.constexpr):
    """To dW, in its dtype: rounded once."""
    if ACCUMULATE:
        sums += tl.load(target, mask=inside, other=0.0).to(sums.dtype)
    tl.store(target, sums.to(target.dtype.element_ty), mask=inside)
