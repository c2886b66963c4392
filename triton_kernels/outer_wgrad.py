"""A linear layer's weight gradient and norms: which method does it, and what each needs to know of the segments.

Levels are the segments, then the groups, fine to coarse. From the finest on they go by *gram* (`outer_pairs`) as long as
their members are short; the others by *fused* (`outer_fused`) or *split* (`outer_split`) in one product with dW.
"""

import math

import torch
import triton
from torch import Tensor

from gradnorm_ext.triton_kernels import outer_fused, outer_pairs, outer_split
from gradnorm_ext.triton_kernels.library import product
from gradnorm_ext.triton_kernels.registration import accumulator, operation, sqnorm_length
from gradnorm_ext.triton_kernels.walk import Walk

METHODS = ("auto", "gram", "fused", "split")

_FUSED_SPEED = 0.85  # of a library product
_CLOSING = 54  # rows that could be multiplied in the time that a tile's end takes
_GRAM_SPEED = 0.7  # of a library product
_PASS = 735  # rows that could be multiplied while the split method writes and reads a segment's gradient
_MULTIPROCESSORS = 132


def outer_costs(rows_per_segment: float, d: int, p: int, with_dw: bool, equal: bool) -> dict[str, float]:
    """What each method takes for segments of one layer with a ``[d, p]`` weight, in times of the library's product for dW.

        gram     blocks (blocks + 1) 128² / (2 rows_per_segment) (p + d) / (p d) / 0.7, and 1 for dW
        fused    (1 / 0.85 + 54 / rows_per_segment) × (whole waves of tiles / tiles)
        split    1 + 735 / rows_per_segment, where all segments are equally long

    PREDICTED, NOT MEASURED: for an H200 of 790 TFLOP/s (bfloat16), 4.3 TB/s and 132 multiprocessors, on paper.
    `bench/gpu.sh` measures the three, and bench/NOTES.md is where prediction and outcome are compared.

    Args:
        rows_per_segment: the mean.
        d, p: the weight's shape, ``[out, in]``.
        with_dw: whether the weight gradient is wanted beside the norms.
        equal: whether all segments are known to be equally long.
    """
    rows = max(1.0, rows_per_segment)
    blocks = math.ceil(rows / 128)
    tiles = triton.cdiv(d, 128) * triton.cdiv(p, 128)
    waves = triton.cdiv(tiles, _MULTIPROCESSORS) * _MULTIPROCESSORS / tiles
    costs = {
        "gram": blocks * (blocks + 1) * 128**2 / (2 * rows) * (p + d) / (p * d) / _GRAM_SPEED + with_dw,
        "fused": (1 / _FUSED_SPEED + _CLOSING / rows) * waves,
    }
    return costs | {"split": 1 + _PASS / rows} if equal else costs


def outer_method(rows_per_segment: float, d: int, p: int, with_dw: bool, equal: bool) -> str:
    """The method of the lowest of `outer_costs`.

    Example:
        >>> [outer_method(rows, 4096, 4096, True, True) for rows in (128, 2048, 32768)]
        ['gram', 'fused', 'split']
    """
    costs = outer_costs(rows_per_segment, d, p, with_dw, equal)
    return min(costs, key=lambda method: costs[method])


def outer_sqnorm(x: Tensor, g: Tensor, segments, *, method: str = "auto") -> Tensor:
    """See :func:`gradnorm_ext.ops.outer_sqnorm`; ``method``: one of `METHODS`, for tests and benchmarks."""
    return _run(x, g, segments, None, None, None, False, method)


def outer_wgrad(
    x: Tensor,
    g: Tensor,
    segments,
    *,
    weight: Tensor | None = None,
    outputs: Tensor | None = None,
    n_outputs: int = 1,
    out: Tensor | None = None,
    accumulate: bool = False,
    method: str = "auto",
) -> tuple[Tensor, Tensor]:
    """See :func:`gradnorm_ext.ops.outer_wgrad`; ``outputs [S]``: the coarsest level, for a gradient of each of its groups."""
    shape = (n_outputs, g.shape[1], x.shape[1])
    dw = x.new_empty(shape, dtype=accumulator(x.dtype)) if out is None else out.view(shape)
    sqnorm = _run(x, g, segments, weight, outputs, dw, accumulate, method)
    return dw if outputs is not None else dw[0], sqnorm


def _run(x, g, segments, weight, outputs, dw, accumulate, method) -> Tensor:
    if method not in METHODS or (method == "split" and segments.length is None):
        raise ValueError(
            f"outer_wgrad: method must be one of {', '.join(METHODS)}, and split needs segments of one known length, got "
            f"{method!r} and segments of {segments.length or 'any'} rows"
        )
    sqnorm = x.new_empty(sqnorm_length(segments), dtype=accumulator(x.dtype))
    groups, length = segments.groups, -1 if segments.length is None else segments.length
    weight = None if weight is None else weight.contiguous()
    given = (groups.walk, groups.columns, list(groups.counts), weight, outputs, dw, sqnorm, accumulate)
    _outer_wgrad(x, g, segments.offsets, length, *given, method)
    return sqnorm


@operation(
    """outer_wgrad(Tensor x, Tensor g, Tensor offsets, int length, Tensor walk, Tensor columns, int[] counts,
        Tensor? weight, Tensor? outputs, Tensor(a!)? dw, Tensor(b!) sqnorm, bool accumulate, str method) -> ()"""
)
def _outer_wgrad(x, g, offsets, length, walk, columns, counts, weight, outputs, dw, sqnorm, accumulate, method) -> None:
    if len(x) == 0 or x.shape[1] == 0 or g.shape[1] == 0:
        sqnorm.zero_()
        if dw is not None and not accumulate:
            dw.zero_()
        return
    x, g = (rows if rows.stride(1) == 1 else rows.contiguous() for rows in (x, g))
    norms = sqnorm.new_zeros(len(sqnorm) + 1)  # the last is for those that nobody wants
    walked = Walk.of(len(x), offsets, None if length < 0 else length, walk, columns, counts, weight, outputs)
    if dw is None or dw.dtype == sqnorm.dtype:
        _carry_out(x, g, walked, dw, norms, accumulate, method)
    else:  # sums are formed in float32, and rounded once
        total = torch.empty_like(dw, dtype=sqnorm.dtype)
        _carry_out(x, g, walked, total, norms, False, method)
        dw.add_(total) if accumulate else dw.copy_(total)
    sqnorm.copy_(norms[:-1])


def _carry_out(x, g, walked, dw, norms, accumulate, method) -> None:
    sizes = walked.sizes
    methods = [method] * len(sizes)
    if method == "auto":
        equal = [walked.length is not None, *(False for _ in sizes[1:])]
        shape = (g.shape[1], x.shape[1], dw is not None)
        methods = [outer_method(len(x) / size, *shape, known) for size, known in zip(sizes, equal, strict=True)]
    if methods[0] == "split":
        outer_split.split(x, g, walked.segments(grouped=True), dw, norms, accumulate)
        return

    n_gram = 0
    # Gradients of single groups come out of the fused method alone, and the norms of these groups with them.
    while n_gram < len(sizes) - (walked.outputs is not None) and methods[n_gram] == "gram":
        entries = walked.segments(grouped=False) if n_gram == 0 else walked.groups(n_gram, weighted=False)
        outer_pairs.pairs(x, g, entries, norms, len(x) / sizes[n_gram])
        n_gram += 1
    rest = sizes[n_gram:]
    if dw is None and not rest:
        return
    is_plain = dw is not None and walked.weight is walked.outputs is None
    if is_plain and (not rest or (max(rest) == 1 and not accumulate)):
        product(g.t(), x, dw[0], accumulate)
        if rest:  # one group, of all rows: dW is its gradient
            norms[-1 - len(rest) : -1] = dw.square().sum()
        return
    entries = walked.segments(grouped=True) if n_gram == 0 else walked.groups(n_gram, weighted=dw is not None)
    outer_fused.fused(x, g, entries, dw, norms, accumulate)
