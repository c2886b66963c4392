"""Rows of a term and columns of a norm vector: which belong together, and the inner products of what they sum to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gradnorm_ext.reference import accumulator
from gradnorm_ext.segments import Segments


def rows_of(members: Tensor, segments: Segments) -> Tensor:
    """The rows of these segments."""
    of_row = segments.per_row(torch.arange(segments.count, device=members.device))
    return torch.isin(of_row, members).nonzero()[:, 0]


def groups_of_segments(segments: Segments) -> list[tuple[Tensor, int]]:
    """Of the segments themselves and of each level: every segment's group ``[S]``, and how many groups there are."""
    each = torch.arange(segments.count, device=segments.offsets.device)
    return [(each, segments.count), *zip(segments.groups.levels, segments.groups.counts, strict=True)]


def group_members(segments: Segments) -> list[Tensor]:
    """Of every entry of a sqnorm vector: its segments."""
    device = segments.offsets.device
    columns = [torch.tensor([s], device=device) for s in range(segments.count)]
    for ids, count in zip(segments.groups.levels, segments.groups.counts, strict=True):
        columns += [(ids == group).nonzero()[:, 0] for group in range(count)]
    return columns


def one_hot_mask(members: Tensor, segments: Segments) -> Tensor:
    """``[S]``: 1 for the segments that are meant, else 0."""
    return torch.zeros(segments.count, device=members.device).index_fill_(0, members, 1)


def row_abs_sums(g: Tensor) -> Tensor:
    """The sum of the absolute values of each row."""
    return g.abs().sum(1, dtype=accumulator(g.dtype))


def concat_rows(first: Segments, second: Segments) -> tuple[Segments, Callable[[Tensor, Tensor], Tensor]]:
    """The segments of two uses' rows, and how to bring the rows of each into their order."""
    count, groups = first.count, first.groups
    if first.length is not None and second.length is not None:

        def interleave(*parts: Tensor) -> Tensor:
            by_segment = [rows.reshape(count, len(rows) // count, *rows.shape[1:]) for rows in parts]
            return torch.cat(by_segment, 1).flatten(0, 1)

        return groups.equal(first.length + second.length), interleave
    of_row = torch.cat([one.per_row(torch.arange(count, device=one.offsets.device)) for one in (first, second)])
    order = torch.argsort(of_row, stable=True)
    segments = Segments(first.offsets + second.offsets, None, groups)
    return segments, lambda one, other: torch.cat([one, other]).index_select(0, order)


def gram_of(gradients: Tensor) -> Tensor:
    """``[K, K]``: the inner products of ``gradients [K, ...]``, summed in runs that lose no digits."""
    run = 4096
    flat = gradients.reshape(len(gradients), -1)
    whole = flat.shape[1] // run * run
    runs = flat[:, :whole].unflatten(1, (-1, run)).transpose(0, 1)
    rest = flat[:, whole:]
    gram: Tensor = (runs @ runs.mT).double().sum(0) + rest @ rest.T
    return gram.to(flat.dtype)
