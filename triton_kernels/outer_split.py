"""The split method: library products of single segments into a bounded scratch, then one pass over them, for long segments.

The scratch holds all segments' gradients of some rows of the weight. The pass reads it once and yields every norm and
the (weighted) sum.
"""

import torch
import triton
import triton.language as tl
from gradnorm_ext.triton_kernels.library import product
from gradnorm_ext.triton_kernels.registration import constexpr_of
from gradnorm_ext.triton_kernels.walk import Entries
from torch import Tensor

SCRATCH = 1 << 28  # bytes
_BLOCK = 2048


def split(x: Tensor, g: Tensor, entries: Entries, dw: Tensor | None, norms: Tensor, accumulate: bool) -> None:
    """Adds the norms of the entries and their groups to ``norms``; dW is written to or added to ``dw [outputs, d, p]``.

    The entries are segments of a length that is known, so that the library can be told.
    """
    segments, d, p = len(entries.begin), g.shape[1], x.shape[1]
    if not accumulate and dw is not None:
        dw.zero_()
    columns, depth = entries.columns, entries.depth
    if columns is None:
        columns = torch.arange(segments, device=x.device)[None]
    if depth is None:
        depth = torch.ones_like(columns[0])
    height = max(1, min(d, SCRATCH // (segments * p * norms.element_size())))
    memory = norms.new_empty(segments * height * p)
    for top in range(0, d, height):
        rows = g[:, top : top + height].unflatten(0, (segments, -1)).transpose(1, 2)
        size = rows.shape[1] * p
        gradients = memory[: segments * size].view(segments, rows.shape[1], p)
        product(rows, x.unflatten(0, (segments, -1)), gradients)
        blocks = triton.cdiv(size, _BLOCK)
        partial = norms.new_zeros(len(norms), blocks)
        given = (entries.weight, entries.output, dw)
        _split_kernel[(blocks,)](
            *(gradients, columns, depth, *(partial if t is None else t for t in given), partial),
            *(segments, size, d * p, top * p),
            ACCUMULATOR=constexpr_of(norms.dtype),
            LEVELS=triton.next_power_of_2(len(columns)),
            HAS_WEIGHT=entries.weight is not None,
            HAS_OUTPUT=entries.output is not None,
            HAS_DW=dw is not None,
            BLOCK=_BLOCK,
        )
        norms += partial.sum(1)


@triton.jit(do_not_specialize=["segments", "offset"])
def _split_kernel(
    gradients_ptr,
    columns_ptr,
    depth_ptr,
    weight_ptr,
    output_ptr,
    dw_ptr,
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
        value = tl.load(gradients_ptr + segment * size + entries, mask=inside, other=0.0)
        sums += value[None, :]
        ended = level < tl.load(depth_ptr + place)
        column = tl.load(columns_ptr + level * segments + place, mask=ended, other=0)
        squared = tl.sum(sums * sums, 1)
        tl.store(partial_ptr + column * tl.num_programs(0) + block, squared, mask=ended)
        sums = tl.where(ended[:, None], 0.0, sums)
        if HAS_DW:
            if HAS_WEIGHT:
                value *= tl.load(weight_ptr + place).to(ACCUMULATOR)
            total += value
            output = block * 0
            is_last = place + 1 == segments
            if HAS_OUTPUT:
                output = tl.load(output_ptr + place)
                is_last |= tl.load(output_ptr + tl.minimum(place + 1, segments - 1)) != output
            if is_last:
                target = dw_ptr + output * stride_output + offset + entries
                tl.store(target, tl.load(target, mask=inside, other=0.0) + total, mask=inside)
                total = tl.zeros((BLOCK,), ACCUMULATOR)
