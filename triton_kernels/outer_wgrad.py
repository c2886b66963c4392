"""A linear layer's weight gradient and norms: which method does it, and what each needs to know of the segments.

Levels are the segments, then the groups, fine to coarse. From the finest on they go by *gram* (`outer_pairs`) as long as
their members are short; the others by *fused* (`outer_fused`) or *split* (`outer_split`) in one product with dW. A level
with one member is none: its gradient is the sum that dW is.
"""

import functools
import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from gradnorm_ext.triton_kernels import outer_fused, outer_pairs, outer_split
from gradnorm_ext.triton_kernels.chips import H200, Chip, chip_of
from gradnorm_ext.triton_kernels.library import product
from gradnorm_ext.triton_kernels.registration import accumulator, operation, sqnorm_length
from gradnorm_ext.triton_kernels.walk import Walk

METHODS = ("auto", "gram", "fused", "split", "grouped")

# Guesses of what kernels reach, on any chip; none was measured.
_REACHED = 0.85  # of what a unit of the chip does at most, in a loop of ours
_LIBRARY = 0.8  # of the products at most, by the library
_LATENCY = 800  # cycles from a loop's first load to its first product


def outer_costs(
    rows_per_segment: float,
    d: int,
    p: int,
    with_dw: bool,
    equal: bool,
    groups: Sequence[float] = (),
    weighted: bool = False,
    chip: Chip = H200,
) -> dict[str, float]:
    """What each method takes for one layer with a ``[d, p]`` weight, in times of the library's product for dW.

    A step of a loop takes the longest of: its products, its bytes from the L2 cache, its instructions. Where a segment
    or a group ends, a tile is squared, and moved where it lies in memory; a loop begins again when loads have arrived.

        gram     pairs of blocks of rows, (p + d) / 64 steps each; and 1 for dW
        fused    whole waves of tiles, each of all segments' steps and ends
        split    1, and 8 bytes of memory for each entry of a segment's gradient; where all segments are equally long
        grouped  1, and 4 bytes; and 1 for dW; where the chip has it

    With groups, ``"gram of n, then fused"`` is the first for the n finest levels and the second for the others.

    PREDICTED, NOT MEASURED: bench/NOTES.md is where prediction and outcome are compared.

    Args:
        rows_per_segment: the mean.
        d, p: the weight's shape, ``[out, in]``, in two-byte numbers.
        with_dw: whether the weight gradient is wanted beside the norms.
        equal: whether all segments are known to be equally long.
        groups: the mean rows of the groups of each level, fine to coarse; of levels with more than one member.
        weighted: whether dW has a weight for each segment, or is one for each group, so that no plain product forms it.
        chip: what all of this runs on.
    """
    levels = [max(1.0, rows) for rows in (rows_per_segment, *groups)]
    plain = d * p / (chip.products * _LIBRARY * chip.multiprocessors)  # cycles a row

    def fused(n: int) -> float:
        return _fused_cycles(levels[n:], d, p, with_dw, equal and n == 0, n > 0, chip) / plain

    gram = [_gram_cycles(rows, d, p, chip) / plain for rows in levels]
    # The sums of one level's squares are read as they were written, in two bytes or four.
    passes = {n_bytes: n_bytes * d * p / levels[0] / (chip.memory_bytes * _REACHED) / plain for n_bytes in (4, 8)}
    only_sum = with_dw * (_fused_cycles(levels[-1:], d, p, True, False, True, chip) / plain if weighted else 1)
    costs = {"gram": sum(gram) + only_sum, "fused": fused(0)}
    costs |= {f"gram of {n}, then fused": sum(gram[:n]) + fused(n) for n in range(1, len(levels))}
    if equal:
        costs["split"] = 1 + passes[8]
    if chip.has_grouped_product:
        costs["grouped"] = 1 + passes[4] + with_dw
    return costs


def _fused_cycles(levels: list[float], d: int, p: int, with_dw: bool, equal: bool, ordered: bool, chip: Chip) -> float:
    """A row's, of the fused method for levels of so many rows a member."""
    tile = outer_fused.tile(torch.bfloat16, False, True, ordered, False, chip)
    step = _step_cycles(tile.d, tile.p, tile.rows, tile.warps * tile.instructions, chip)
    # Each entry of a tile is squared and added; in groups' tiles, read and written as well.
    entries = tile.d * tile.p
    ends = 4 * entries / (32 * 4)  # four instructions an entry, of which four schedulers issue 32 each a cycle
    moved = 2 * 4 * entries / (chip.l2_bytes * _REACHED)
    flows = equal and chip.has_warpgroups and len(levels) == 1  # from one segment into the next
    cycles = math.ceil(levels[0] / tile.rows) * step / levels[0] + (ends + (0 if flows else _LATENCY)) / levels[0]
    cycles += sum((ends + moved * (with_dw or n + 1 < len(levels))) / rows for n, rows in enumerate(levels[1:], 1))
    tiles = triton.cdiv(d, tile.d) * triton.cdiv(p, tile.p)
    return triton.cdiv(tiles, chip.multiprocessors) * cycles


def _gram_cycles(rows: float, d: int, p: int, chip: Chip) -> float:
    """A row's, of the gram method for members of so many rows."""
    tile = outer_pairs.tile(torch.bfloat16, False, rows, True, chip)
    step = _step_cycles(tile.rows, tile.rows, tile.width, tile.warps * tile.instructions, chip)
    blocks = math.ceil(rows / tile.rows)
    steps = math.ceil(p / tile.width) + math.ceil(d / tile.width)
    pair = steps * step + 2 * _LATENCY + 4 * tile.rows**2 / (32 * 4)
    return blocks * (blocks + 1) / 2 * pair / rows / chip.multiprocessors


def _step_cycles(a: int, b: int, depth: int, instructions: float, chip: Chip) -> float:
    """Of a product ``[a, depth] @ [depth, b]`` of two-byte numbers that come from the L2 cache, on one multiprocessor."""
    return max(a * b * depth / chip.products, 2 * (a + b) * depth / chip.l2_bytes, instructions / 4) / _REACHED


@functools.lru_cache(maxsize=4096)
def outer_method(
    rows_per_segment: float,
    d: int,
    p: int,
    with_dw: bool,
    equal: bool,
    groups: tuple[float, ...] = (),
    weighted: bool = False,
    chip: Chip = H200,
    impossible: tuple[str, ...] = (),
) -> str:
    """The method of the lowest of `outer_costs`, but for those that are impossible.

    Example:
        >>> [outer_method(rows, 4096, 4096, True, True) for rows in (128, 1024, 2048)]
        ['gram', 'gram', 'split']
        >>> outer_method(2048, 4096, 4096, True, False)  # not known to be equally long
        'fused'
    """
    costs = outer_costs(rows_per_segment, d, p, with_dw, equal, groups, weighted, chip)
    return min((method for method in costs if method not in impossible), key=lambda method: costs[method])


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
    is_plain = weight is outputs is None
    if (
        method not in METHODS
        or (method == "split" and segments.length is None)
        or (method == "grouped" and not is_plain)
    ):
        raise ValueError(
            f"outer_wgrad: method must be one of {', '.join(METHODS)}; split needs segments of one known length, and grouped "
            f"a gradient that is their plain sum, got {method!r}, segments of {segments.length or 'any'} rows and "
            f"{'no weights' if is_plain else 'weights or groups'}; use auto"
        )
    sqnorm = x.new_empty(sqnorm_length(segments) + 1, dtype=accumulator(x.dtype))  # the last: of those nobody wants
    groups, length = segments.groups, -1 if segments.length is None else segments.length
    weight = None if weight is None else weight.contiguous()
    given = (groups.walk, groups.columns, list(groups.counts), weight, outputs, dw, sqnorm, accumulate)
    _outer_wgrad(x, g, segments.offsets, length, *given, method)
    return sqnorm[:-1]


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
    outputs = None if dw is not None and len(dw) == 1 else outputs
    kept = len(counts)
    while kept and counts[kept - 1] == 1 and weight is None:
        kept -= 1
    norms = sqnorm[: len(walk) + sum(counts[:kept]) + 1]
    total = norms[-1:] if kept < len(counts) else None  # without weights, there is none that nobody wants
    walked = Walk.of(len(x), offsets, None if length < 0 else length, walk, columns, counts[:kept], weight, outputs)
    _carry_out(x, g, walked, dw, norms, total, accumulate, method)
    if len(counts) > kept + 1:
        sqnorm[len(norms) : -1] = total


def _carry_out(x, g, walked, dw, norms, total, accumulate, method) -> None:
    sizes, is_plain = walked.sizes, walked.weight is walked.outputs is None
    by_gram = {"fused": 0} | {f"gram of {n}, then fused": n for n in range(1, len(sizes))}  # how many levels
    if walked.outputs is None:
        by_gram["gram"] = len(sizes)
    elif method == "gram":  # a group's own gradient comes out of the fused method alone, and its norm with it
        method = [*by_gram][-1]
    if method == "auto":
        rows, equal = [len(x) / size for size in sizes], walked.length is not None
        with_dw = dw is not None or total is not None
        impossible = () if is_plain and outer_split.can_group(x, g, len(walked.walk)) else ("grouped",)
        impossible += () if walked.outputs is None else ("gram",)
        shape = g.shape[1], x.shape[1]
        method = outer_method(rows[0], *shape, with_dw, equal, tuple(rows[1:]), not is_plain, chip_of(x), impossible)
    if method in ("split", "grouped"):
        norms.zero_()
    if method == "split":
        outer_split.split(x, g, walked.segments(grouped=True), dw, norms, accumulate, total)
        return
    if method == "grouped":
        outer_split.grouped(x, g, walked.offsets, walked.segments(grouped=True), norms, total)
        if dw is not None:
            product(g.t(), x, dw[0], accumulate)
        return

    n_gram = by_gram[method]
    if n_gram > 1 or (n_gram == len(sizes) and total is not None):
        # Of groups without rows nothing is written, and a total is added to.
        norms[len(walked.walk) :].zero_()
    for level in range(n_gram):
        entries = walked.segments(grouped=False) if level == 0 else walked.groups(level, weighted=False)
        outer_pairs.pairs(x, g, entries, norms, len(x) / sizes[level])
    if n_gram < len(sizes) or (dw is not None and not is_plain):
        entries = walked.segments(grouped=True) if n_gram == 0 else walked.groups(n_gram, weighted=dw is not None)
        outer_fused.fused(x, g, entries, dw, norms, accumulate, total)
    elif dw is not None:
        _sum(x, g, dw[0], accumulate, total)
    elif total is not None:
        outer_fused.fused(x, g, walked.all_rows(), None, total, False)


def _sum(x: Tensor, g: Tensor, dw: Tensor, accumulate: bool, total: Tensor | None) -> None:
    """dW by the library's product; its squared norm, before it is rounded or added to anything, goes to ``total``."""
    if total is None:
        product(g.t(), x, dw, accumulate)
        return
    in_place = dw.dtype == total.dtype and not accumulate
    height = len(dw) if in_place else max(1, outer_split.SCRATCH // (dw.shape[1] * total.element_size()))
    for top in range(0, len(dw), height):
        rows = dw[top : top + height]
        found = rows if in_place else torch.empty_like(rows, dtype=total.dtype)
        product(g[:, top : top + height].t(), x, found)
        total += torch.linalg.vector_norm(found).square()
        if not in_place:
            rows.add_(found) if accumulate else rows.copy_(found)
