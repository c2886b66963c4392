"""Every operation in plain torch: its definition, the fallback, and what the other backends are compared with."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gradnorm_ext.segments import Segments

_BLOCK = 1 << 24  # elements of per-segment weight gradients held at once
_LOGITS = 1 << 20  # exponentials of logits held at once


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are formed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def outer_sqnorm(x: Tensor, g: Tensor, segments: Segments) -> Tensor:
    return _outer(x, g, segments, None, None, None)


def outer_wgrad(
    x: Tensor,
    g: Tensor,
    segments: Segments,
    *,
    weight: Tensor | None = None,
    outputs: Tensor | None = None,
    n_outputs: int = 1,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> tuple[Tensor, Tensor]:
    shape = (n_outputs, g.shape[1], x.shape[1])
    dw = x.new_zeros(shape, dtype=accumulator(x.dtype))
    sqnorm = _outer(x, g, segments, weight, outputs, dw)
    if out is not None:
        dw = out.view(shape).add_(dw) if accumulate else out.view(shape).copy_(dw)
    return (dw[0] if outputs is None else dw), sqnorm


def outer_sum(x: Tensor, g: Tensor, segments: Segments, *, weight: Tensor | None = None) -> Tensor:
    """Σ_s weight[s] Σ_{r in s} g[r] x[r]ᵀ ``[d, p]`` in the rows' dtype: a weight gradient without any norm."""
    if weight is None:
        return g.t() @ x
    of_row = segments.per_row(weight.to(g.dtype), len(g))[:, None]
    return g.t() @ (x * of_row) if x.shape[1] < g.shape[1] else (g * of_row).t() @ x  # scale the narrower side


def outer_gram(x: Tensor, g: Tensor, segments: Segments) -> Tensor:
    x, g = x.to(accumulator(x.dtype)), g.to(accumulator(x.dtype))
    groups = segments.groups
    members = groups.counts[-1] if groups.counts else segments.count
    gram = x.new_zeros(members, members)
    for rows in _blocks(x, g, segments):
        of_member = _outer_per_segment(x, rows, segments).flatten(1)
        if groups.levels:
            of_member = of_member.new_zeros(members, of_member.shape[1]).index_add_(0, groups.levels[-1], of_member)
        gram += of_member @ of_member.t()
    return gram


def _blocks(x: Tensor, g: Tensor, segments: Segments) -> tuple[Tensor, ...]:
    """Columns of g, as many as give segments' gradients of a bounded size."""
    return g.split(max(1, _BLOCK // max(1, segments.count * x.shape[1])), 1) if g.shape[1] else ()


def _outer(
    x: Tensor, g: Tensor, segments: Segments, weight: Tensor | None, outputs: Tensor | None, dw: Tensor | None
) -> Tensor:
    x, g = x.to(accumulator(x.dtype)), g.to(accumulator(x.dtype))
    sqnorm = x.new_zeros(segments.columns)
    i = 0
    for rows in _blocks(x, g, segments):
        of_segment = _outer_per_segment(x, rows, segments)
        sqnorm += per_sample_sqnorm(of_segment.flatten(1), segments)
        if dw is not None:
            if weight is not None:
                of_segment = of_segment * weight[:, None, None].to(of_segment.dtype)
            if outputs is None:
                dw[0, i : i + rows.shape[1]] = of_segment.sum(0)
            else:
                dw[:, i : i + rows.shape[1]].index_add_(0, outputs, of_segment)
        i += rows.shape[1]
    return sqnorm


def _outer_per_segment(x: Tensor, g: Tensor, segments: Segments) -> Tensor:
    if segments.length is not None:
        shape = (segments.count, segments.length, -1)
        if segments.length == 0 or segments.count == 0:
            return x.new_zeros(segments.count, g.shape[1], x.shape[1])
        return torch.bmm(g.reshape(shape).transpose(1, 2), x.reshape(shape))
    rows = zip(g.split(segments.lengths), x.split(segments.lengths), strict=True)
    return torch.stack([gs.t() @ xs for gs, xs in rows]) if segments.count else x.new_zeros(0, g.shape[1], x.shape[1])


def per_sample_sqnorm(grads: Tensor, segments: Segments) -> Tensor:
    parts = [grads.square().sum(1)]
    for ids, count in zip(segments.groups.levels, segments.groups.counts, strict=True):
        parts.append(grads.new_zeros(count, grads.shape[1]).index_add_(0, ids, grads).square().sum(1))
    return torch.cat(parts)


def per_sample_wgrad(grads: Tensor, segments: Segments, *, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    dw = grads.sum(0) if weight is None else weight.to(grads.dtype) @ grads
    return dw, per_sample_sqnorm(grads, segments)


def segment_scale_grad(
    x: Tensor, g: Tensor, segments: Segments, *, shift: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    dtype = accumulator(x.dtype)
    x = x.to(dtype)
    if shift is not None:
        x = x - shift.to(dtype)[:, None]
    if scale is not None:
        x = x * scale.to(dtype)[:, None]
    return segment_sum(g.to(dtype) * x, segments)


def segment_sum(g: Tensor, segments: Segments) -> Tensor:
    g = g.to(accumulator(g.dtype))
    if segments.length is not None:
        return g.reshape(segments.count, segments.length, g.shape[1]).sum(1)
    return g.new_zeros(segments.count, g.shape[1]).index_add_(0, _segment_of_row(segments), g)


def _segment_of_row(segments: Segments) -> Tensor:
    return torch.repeat_interleave(
        torch.arange(segments.count, device=segments.offsets.device), segments.offsets.diff()
    )


def lookup_sqnorm(
    ids: Tensor, g: Tensor, vocabulary: int, segments: Segments, *, padding_idx: int | None = None
) -> Tensor:
    g = g.to(accumulator(g.dtype))
    of_row = _segment_of_row(segments)
    if padding_idx is not None:
        g = g * (ids != padding_idx)[:, None]
    parts = []
    for level, count in ((None, segments.count), *zip(segments.groups.levels, segments.groups.counts, strict=True)):
        segment = of_row if level is None else level[of_row]
        key, where = torch.unique(segment * vocabulary + ids, return_inverse=True)
        sums = g.new_zeros(len(key), g.shape[1]).index_add_(0, where, g)
        parts.append(g.new_zeros(count).index_add_(0, key // vocabulary, sums.square().sum(1)))
    return torch.cat(parts)


def lookup_wgrad(
    ids: Tensor,
    g: Tensor,
    vocabulary: int,
    segments: Segments,
    *,
    padding_idx: int | None = None,
    weight: Tensor | None = None,
    outputs: Tensor | None = None,
    n_outputs: int = 1,
) -> tuple[Tensor, Tensor]:
    g = g.to(accumulator(g.dtype))
    sqnorm = lookup_sqnorm(ids, g, vocabulary, segments, padding_idx=padding_idx)
    of_row = _segment_of_row(segments)
    if padding_idx is not None:
        g = g * (ids != padding_idx)[:, None]
    if weight is not None:
        g = g * weight.to(g.dtype)[of_row][:, None]
    if outputs is not None:
        ids = ids + outputs[of_row] * vocabulary
    dw = g.new_zeros(n_outputs * vocabulary, g.shape[1]).index_add_(0, ids, g)
    return (dw if outputs is None else dw.view(n_outputs, vocabulary, -1)), sqnorm


def segment_std(values: Tensor, ids: Tensor, count: int, *, ddof: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    exact = values.double()
    n = torch.zeros(count, dtype=torch.int64, device=values.device).index_add_(0, ids, torch.ones_like(ids))
    mean = exact.new_zeros(count).index_add_(0, ids, exact) / n
    square = exact.new_zeros(count).index_add_(0, ids, (exact - mean[ids]).square())
    std = torch.where(n > ddof, (square / (n - ddof).clamp(min=1)).sqrt(), torch.nan)
    low = values.new_full((count,), torch.inf).scatter_reduce_(0, ids, values, "amin")
    high = values.new_full((count,), -torch.inf).scatter_reduce_(0, ids, values, "amax")
    return mean.to(values.dtype), std.to(values.dtype), n, low, high


def logit_scores(logits: Tensor, labels: Tensor, *, ignore_index: int) -> tuple[Tensor, Tensor]:
    figures = logits.new_zeros(2, len(logits), dtype=accumulator(logits.dtype))
    for rows, _, kept, log_probability, total, others in _softmax_blocks(logits, labels, ignore_index):
        w = ((others.sum(1) / total) ** 2 + others.square().sum(1) / total**2).masked_fill(~kept, 0)
        figures[:, rows] = torch.stack([log_probability.masked_fill(~kept, 0), w])
    return figures[0], figures[1]


def logit_gradient_rates(logits: Tensor, labels: Tensor, *, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    count = labels.new_zeros(logits.shape[1])
    up, down = logits.new_zeros(2, logits.shape[1], dtype=torch.float64)
    for _, label, kept, _, total, others in _softmax_blocks(logits, labels, ignore_index):
        count.index_add_(0, label, kept.long())
        up.index_add_(0, label, (others.sum(1) / total).masked_fill(~kept, 0).double())
        down += (others / total[:, None]).masked_fill(~kept[:, None], 0).sum(0, dtype=torch.float64)
    dtype = accumulator(logits.dtype)
    return count, up.to(dtype), down.to(dtype)


def _softmax_blocks(
    logits: Tensor, labels: Tensor, ignore_index: int
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Blocks of rows: which, their labels (0 where ignored), which are kept, their labels' log-probabilities, the sums of
    the exponentials, and the exponentials of all but the labels' logits."""
    block = max(1, _LOGITS // max(1, logits.shape[1]))
    for first in range(0, len(logits), block):
        rows = slice(first, min(first + block, len(logits)))
        given = labels[rows]
        kept = given != ignore_index
        label = torch.where(kept, given, 0)
        part = logits[rows].to(accumulator(logits.dtype))
        top = part.amax(1)
        exponentials = (part - top[:, None]).exp_()
        at_label = exponentials.gather(1, label[:, None])[:, 0]
        others = exponentials.scatter_(1, label[:, None], 0)
        total = others.sum(1) + at_label
        below = part.gather(1, label[:, None])[:, 0] - top
        log_probability = torch.where(below == 0, -others.sum(1).log1p(), below - total.log())
        yield rows, label, kept, log_probability, total, others
