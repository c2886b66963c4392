"""Mean, deviation, count and extremes of values by segment: sorted, then one launch in float64."""

import torch
import triton
import triton.language as tl
from gradnorm_ext.triton_kernels.registration import operation
from torch import Tensor

_BLOCK_SEGMENTS, _BLOCK_VALUES = 32, 16  # groups of rewards are many and short


def segment_std(values: Tensor, ids: Tensor, count: int, *, ddof: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`gradnorm_ext.ops.segment_std`."""
    mean, std, low, high = values.new_empty(4, count)
    number = ids.new_empty(count)
    _segment_std(values, ids, ddof, mean, std, number, low, high)
    return mean, std, number, low, high


@operation(
    """segment_std(Tensor values, Tensor ids, int ddof, Tensor(a!) mean, Tensor(b!) std, Tensor(c!) count, Tensor(d!) low,
        Tensor(e!) high) -> ()"""
)
def _segment_std(values, ids, ddof, mean, std, count, low, high) -> None:
    segments = len(count)
    if segments == 0:
        return
    ids, order = torch.sort(ids, stable=True)
    offsets = torch.searchsorted(ids, torch.arange(segments + 1, device=ids.device))
    _segment_std_kernel[(triton.cdiv(segments, _BLOCK_SEGMENTS),)](
        *(values[order], offsets, mean, std, count, low, high, segments, ddof),
        BLOCK_SEGMENTS=_BLOCK_SEGMENTS,
        BLOCK_VALUES=_BLOCK_VALUES,
    )


@triton.jit(do_not_specialize=["segments", "ddof"])
def _segment_std_kernel(
    values_ptr,
    offsets_ptr,
    mean_ptr,
    std_ptr,
    count_ptr,
    low_ptr,
    high_ptr,
    segments,
    ddof,
    BLOCK_SEGMENTS: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64) * BLOCK_SEGMENTS + tl.arange(0, BLOCK_SEGMENTS)
    exists = segment < segments
    begin = tl.load(offsets_ptr + segment, mask=exists, other=0)
    count = tl.load(offsets_ptr + segment + 1, mask=exists, other=0) - begin
    longest = tl.max(count, 0)
    nothing = tl.zeros((BLOCK_SEGMENTS, BLOCK_VALUES), tl.float64)

    total, unordered = nothing, tl.zeros((BLOCK_SEGMENTS, BLOCK_VALUES), tl.int32)
    low, high = nothing + float("inf"), nothing - float("inf")
    for first in range(0, longest, BLOCK_VALUES):
        place = first + tl.arange(0, BLOCK_VALUES)
        mask = place[None, :] < count[:, None]
        value = tl.load(values_ptr + begin[:, None] + place[None, :], mask=mask, other=0.0).to(tl.float64)
        total += value
        unordered += (value != value).to(tl.int32)
        low = tl.where(mask & (value < low), value, low)
        high = tl.where(mask & (value > high), value, high)
    mean = tl.sum(total, 1) / tl.maximum(count, 1)

    squares = nothing
    for first in range(0, longest, BLOCK_VALUES):
        place = first + tl.arange(0, BLOCK_VALUES)
        mask = place[None, :] < count[:, None]
        value = tl.load(values_ptr + begin[:, None] + place[None, :], mask=mask, other=0.0).to(tl.float64)
        squares += tl.where(mask, (value - mean[:, None]) * (value - mean[:, None]), 0.0)
    freedom = count - ddof
    variance = tl.sum(squares, 1) / tl.maximum(freedom, 1)

    nan = float("nan")
    holds_nan = tl.sum(unordered, 1) > 0
    tl.store(mean_ptr + segment, tl.where(count > 0, mean, nan), mask=exists)
    tl.store(std_ptr + segment, tl.where(freedom > 0, tl.sqrt(variance), nan), mask=exists)
    tl.store(count_ptr + segment, count, mask=exists)
    tl.store(low_ptr + segment, tl.where(holds_nan, nan, tl.min(low, 1)), mask=exists)
    tl.store(high_ptr + segment, tl.where(holds_nan, nan, tl.max(high, 1)), mask=exists)
