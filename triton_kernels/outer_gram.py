"""Inner products of the groups' gradients: formed in blocks of rows of the weight, in a bounded scratch, and multiplied."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradnorm_ext.triton_kernels import outer_fused
from gradnorm_ext.triton_kernels.library import product
from gradnorm_ext.triton_kernels.outer_split import SCRATCH
from gradnorm_ext.triton_kernels.registration import accumulator, constexpr_of, operation
from gradnorm_ext.triton_kernels.walk import Walk

_BLOCK = 64  # entries of the gradients multiplied at once
_STRIPES = 512  # programs that share the entries; each has a place of its own for what it finds


def outer_gram(x: Tensor, g: Tensor, segments) -> Tensor:
    """See :func:`gradnorm_ext.ops.outer_gram`."""
    groups, length = segments.groups, -1 if segments.length is None else segments.length
    members = groups.counts[-1] if groups.counts else len(groups.walk)
    gram = x.new_empty(members, members, dtype=accumulator(x.dtype))
    _outer_gram(x, g, segments.offsets, length, groups.walk, groups.columns, list(groups.counts), gram)
    return gram


@operation(
    """outer_gram(Tensor x, Tensor g, Tensor offsets, int length, Tensor walk, Tensor columns, int[] counts,
        Tensor(a!) gram) -> ()"""
)
def _outer_gram(x, g, offsets, length, walk, columns, counts, gram) -> None:
    gram.zero_()
    members, d, p = len(gram), g.shape[1], x.shape[1]
    if gram.numel() == 0 or len(x) == 0 or d == 0 or p == 0:
        return
    outputs = columns[-1] - len(walk) - sum(counts[:-1]) if counts else torch.arange(members, device=walk.device)
    known = length if length >= 0 else None
    walked = Walk(len(x), offsets, known, walk, columns, counts, outputs=outputs)
    entries = walked.groups(len(counts), weighted=False) if counts else walked.segments(grouped=True)
    norms = gram.new_zeros(sum(walked.sizes) + 1)
    height = max(1, min(d, SCRATCH // (members * p * gram.element_size())))
    memory = gram.new_empty(members * height * p)
    for top in range(0, d, height):
        rows = g[:, top : top + height]
        gradients = memory[: members * rows.shape[1] * p].view(members, rows.shape[1], p)
        if known and not counts:
            product(rows.unflatten(0, (members, known)).transpose(1, 2), x.unflatten(0, (members, known)), gradients)
        else:
            outer_fused.fused(x, rows, entries, gradients, norms, False)
        gram += _inner_products(gradients.flatten(1))


def _inner_products(gradients: Tensor) -> Tensor:
    members, size = gradients.shape
    block = min(64, max(16, triton.next_power_of_2(members)))
    stripes, blocks = min(_STRIPES, triton.cdiv(size, _BLOCK)), triton.cdiv(members, block)
    partial = gradients.new_empty(stripes, members, members)
    _inner_products_kernel[stripes, blocks, blocks](
        *(gradients, partial, members, size),
        ACCUMULATOR=constexpr_of(gradients.dtype),
        BLOCK_MEMBERS=block,
        BLOCK=_BLOCK,
    )
    return partial.sum(0)


@triton.jit
def _inner_products_kernel(
    gradients_ptr,
    partial_ptr,
    members,
    size,
    ACCUMULATOR: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    stripe, stripes = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    i = tl.program_id(1) * BLOCK_MEMBERS + tl.arange(0, BLOCK_MEMBERS)
    j = tl.program_id(2) * BLOCK_MEMBERS + tl.arange(0, BLOCK_MEMBERS)
    total = tl.zeros((BLOCK_MEMBERS, BLOCK_MEMBERS), ACCUMULATOR)
    for first in range(stripe * BLOCK, size, stripes * BLOCK):
        entries = first + tl.arange(0, BLOCK)
        inside = entries < size
        a = tl.load(
            gradients_ptr + (i[:, None].to(tl.int64) * size + entries[None, :]),
            mask=(i < members)[:, None] & inside[None, :],
            other=0.0,
        )
        b = tl.load(
            gradients_ptr + (j[None, :].to(tl.int64) * size + entries[:, None]),
            mask=(j < members)[None, :] & inside[:, None],
            other=0.0,
        )
        # Never TF32: the matrix is what cosines of nearly parallel gradients are taken from.
        total = tl.dot(a, b, total, input_precision="ieee", out_dtype=ACCUMULATOR)
    place = (stripe * members + i[:, None]) * members + j[None, :]
    tl.store(partial_ptr + place, total, mask=(i < members)[:, None] & (j < members)[None, :])
