"""Log-probability of each row's label and the squared norm of its gradient at the logits, in one pass and one launch."""

import triton
import triton.language as tl
from torch import Tensor

from gradnorm_ext.triton_kernels.registration import accumulator, constexpr_of, operation

_BLOCK = 4096  # logits at a time: 32 for each thread of 4 warps, 64 bytes in flight in bfloat16


def logit_scores(logits: Tensor, labels: Tensor, *, ignore_index: int) -> tuple[Tensor, Tensor]:
    """See :func:`gradnorm_ext.ops.logit_scores`."""
    # Each for itself: whether a row of a matrix is aligned depends on the number of rows, and makes another kernel.
    log_probability, w = (logits.new_empty(len(logits), dtype=accumulator(logits.dtype)) for _ in range(2))
    _logit_scores(logits, labels, ignore_index, log_probability, w)
    return log_probability, w


@operation("logit_scores(Tensor logits, Tensor labels, int ignored, Tensor(a!) log_probability, Tensor(b!) w) -> ()")
def _logit_scores(logits: Tensor, labels: Tensor, ignored: int, log_probability: Tensor, w: Tensor) -> None:
    if len(logits):
        _logit_scores_kernel[(len(logits),)](
            *(logits, labels, log_probability, w, logits.shape[1], ignored, *logits.stride(), labels.stride(0)),
            ACCUMULATOR=constexpr_of(logits.dtype),
            BLOCK=block_of(logits),
        )


def block_of(logits: Tensor) -> int:
    """How many logits of a row are taken at a time."""
    return min(_BLOCK, triton.next_power_of_2(logits.shape[1]))


@triton.jit(do_not_specialize=["ignored"])
def _logit_scores_kernel(
    logits_ptr,
    labels_ptr,
    log_probability_ptr,
    w_ptr,
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
    if label == ignored:
        tl.store(log_probability_ptr + row, 0.0)
        tl.store(w_ptr + row, 0.0)
    else:
        row_ptr = logits_ptr + row * stride_row
        _, others, squares, below = softmax_sums(row_ptr, label, vocabulary, stride_column, ACCUMULATOR, BLOCK)
        total = others + tl.exp(below)
        # log(1 + x) where 1 + x rounds: x log(u) / (u - 1), u = 1 + x rounded
        rounded = 1 + others
        log1p = tl.where(rounded == 1, others, others * tl.log(rounded) / tl.where(rounded == 1, 1, rounded - 1))
        tl.store(log_probability_ptr + row, tl.where(below == 0, -log1p, below - tl.log(total)))
        tl.store(w_ptr + row, (others * others + squares) / (total * total))


@triton.jit
def softmax_sums(row_ptr, label, vocabulary, stride_column, ACCUMULATOR: tl.constexpr, BLOCK: tl.constexpr):
    """Of one row: the largest logit, Σ exp and Σ exp² of all but the label's relative to it, and how far the label's is.

    The sums are scaled down whenever a larger logit comes, so that one pass suffices. The label's is left out of them:
    1 - p taken as a difference would be rounding alone where the model is sure.
    """
    top = tl.full((), float("-inf"), ACCUMULATOR)
    others = tl.zeros((), ACCUMULATOR)
    squares = tl.zeros((), ACCUMULATOR)
    for first in range(0, vocabulary, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = column < vocabulary
        logit = tl.load(row_ptr + column.to(tl.int64) * stride_column, mask=mask, other=float("-inf")).to(ACCUMULATOR)
        larger = tl.maximum(top, tl.max(logit, 0))
        shift = tl.where(larger == float("-inf"), 0, larger)  # nothing but masked classes so far
        scale = tl.exp(top - shift)
        exponential = tl.where(column == label, 0, tl.exp(logit - shift))
        others = others * scale + tl.sum(exponential, 0)
        squares = squares * scale * scale + tl.sum(exponential * exponential, 0)
        top = larger
    below = tl.load(row_ptr + label * stride_column).to(ACCUMULATOR) - top
    return top, others, squares, below
