"""How much cross-entropy pushes each class's logit up and down: two passes over the logits, for sums over rows need
every row's own sum first. Each program of the second has a block of classes and a part of the rows, in a fixed order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradnorm_ext.triton_kernels.logit_scores import block_of, softmax_sums
from gradnorm_ext.triton_kernels.registration import FILLS_A_GPU, accumulator, constexpr_of, operation

_BLOCK_ROWS, _BLOCK_CLASSES = 8, 512  # 32 logits for each thread of 4 warps
_RUN = 64  # rows added up in float32 before they go to float64


def logit_gradient_rates(logits: Tensor, labels: Tensor, *, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`gradnorm_ext.ops.logit_gradient_rates`."""
    vocabulary, dtype = logits.shape[1], accumulator(logits.dtype)
    sums = logits.new_zeros(3, vocabulary, dtype=torch.float64)
    _logit_gradient_rates(logits, labels, ignore_index, sums)
    return sums[0].long(), sums[1].to(dtype), sums[2].to(dtype)


@operation("logit_gradient_rates(Tensor logits, Tensor labels, int ignored, Tensor(a!) sums) -> ()")
def _logit_gradient_rates(logits: Tensor, labels: Tensor, ignored: int, sums: Tensor) -> None:
    rows, vocabulary = logits.shape
    if rows == 0:
        return
    top, total, others = (logits.new_empty(rows, dtype=accumulator(logits.dtype)) for _ in range(3))
    _row_sums_kernel[(rows,)](
        *(logits, labels, top, total, others, vocabulary, ignored, *logits.stride(), labels.stride(0)),
        ACCUMULATOR=constexpr_of(logits.dtype),
        BLOCK=block_of(logits),
    )
    blocks = triton.cdiv(vocabulary, _BLOCK_CLASSES)
    parts = max(1, min(FILLS_A_GPU // blocks, triton.cdiv(rows, _RUN)))
    partial = sums.new_empty(parts, *sums.shape)
    _class_sums_kernel[blocks, parts](
        *(logits, labels, top, total, others, partial, rows, vocabulary, ignored, triton.cdiv(rows, parts)),
        *(*logits.stride(), labels.stride(0)),
        ACCUMULATOR=constexpr_of(logits.dtype),
        RUN=_RUN,
        BLOCK_ROWS=_BLOCK_ROWS,
        BLOCK_CLASSES=_BLOCK_CLASSES,
    )
    torch.sum(partial, 0, out=sums)


@triton.jit(do_not_specialize=["ignored"])
def _row_sums_kernel(
    logits_ptr,
    labels_ptr,
    top_ptr,
    total_ptr,
    others_ptr,
    vocabulary,
    ignored,
    stride_row,
    stride_column,
    stride_label,
    ACCUMULATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row * stride_label)
    if label != ignored:
        row_ptr = logits_ptr + row * stride_row
        top, others, _, below = softmax_sums(row_ptr, label, vocabulary, stride_column, ACCUMULATOR, BLOCK)
        tl.store(top_ptr + row, top)
        tl.store(total_ptr + row, others + tl.exp(below))
        tl.store(others_ptr + row, others)


@triton.jit(do_not_specialize=["rows", "ignored", "rows_per_part"])
def _class_sums_kernel(
    logits_ptr,
    labels_ptr,
    top_ptr,
    total_ptr,
    others_ptr,
    partial_ptr,
    rows,
    vocabulary,
    ignored,
    rows_per_part,
    stride_row,
    stride_column,
    stride_label,
    ACCUMULATOR: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)
    part = tl.program_id(1).to(tl.int64)
    exists = column < vocabulary
    first, last = part * rows_per_part, tl.minimum((part + 1) * rows_per_part, rows)
    count = tl.zeros((BLOCK_CLASSES,), tl.float64)
    up, down = count, count
    for begin in range(first, last, RUN):
        run_count = tl.zeros((BLOCK_CLASSES,), ACCUMULATOR)
        run_up, run_down = run_count, run_count
        for offset in range(0, RUN, BLOCK_ROWS):
            row = begin + offset + tl.arange(0, BLOCK_ROWS)
            inside = row < last
            label = tl.load(labels_ptr + row * stride_label, mask=inside, other=ignored)
            kept = inside & (label != ignored)
            top = tl.load(top_ptr + row, mask=kept, other=0.0)
            total = tl.load(total_ptr + row, mask=kept, other=1.0)
            others = tl.load(others_ptr + row, mask=kept, other=0.0)
            mask = kept[:, None] & exists[None, :]
            place = row[:, None] * stride_row + column.to(tl.int64)[None, :] * stride_column
            logit = tl.load(logits_ptr + place, mask=mask, other=float("-inf")).to(ACCUMULATOR)
            is_label = mask & (label[:, None] == column[None, :])
            probability = tl.exp(logit - top[:, None]) / total[:, None]
            run_down += tl.sum(tl.where(mask & (label[:, None] != column[None, :]), probability, 0.0), 0)
            run_up += tl.sum(tl.where(is_label, (others / total)[:, None], 0.0), 0)
            run_count += tl.sum(tl.where(is_label, 1.0, 0.0).to(ACCUMULATOR), 0)
        count += run_count.to(tl.float64)
        up += run_up.to(tl.float64)
        down += run_down.to(tl.float64)
    out_ptr = partial_ptr + part * 3 * vocabulary + column
    tl.store(out_ptr, count, mask=exists)
    tl.store(out_ptr + vocabulary, up, mask=exists)
    tl.store(out_ptr + 2 * vocabulary, down, mask=exists)
