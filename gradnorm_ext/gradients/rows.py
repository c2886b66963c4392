"""Rows of a term and columns of a norm vector: which belong together, and the inner products of what they sum to."""

from __future__ import annotations

import torch
from torch import Tensor

from gradnorm_ext.reference import accumulator
from gradnorm_ext.segments import Segments


def _rows_of(members: Tensor, segments: Segments) -> Tensor:
    of_row = segments.per_row(torch.arange(segments.count, device=members.device))
    return torch.isin(of_row, members).nonzero()[:, 0]


def members_of_columns(segments: Segments) -> list[Tensor]:
    """Of every entry of a sqnorm vector: its segments."""
    device = segments.offsets.device
    columns = [torch.tensor([s], device=device) for s in range(segments.count)]
    for ids, count in zip(segments.groups.levels, segments.groups.counts, strict=True):
        columns += [(ids == group).nonzero()[:, 0] for group in range(count)]
    return columns


def chosen(members: Tensor, segments: Segments) -> Tensor:
    """``[S]``: 1 for the segments that are meant, else 0."""
    return torch.zeros(segments.count, device=members.device).index_fill_(0, members, 1)


def _size_of_rows(g: Tensor) -> Tensor:
    return g.abs().sum(1, dtype=accumulator(g.dtype))


def gram_of(gradients: Tensor) -> Tensor:
    """``[K, K]``: the inner products of ``gradients [K, ...]``, summed in runs that lose no digits."""
    run = 4096
    flat = gradients.reshape(len(gradients), -1)
    whole = flat.shape[1] // run * run
    runs = flat[:, :whole].unflatten(1, (-1, run)).transpose(0, 1)
    rest = flat[:, whole:]
    gram: Tensor = (runs @ runs.mT).double().sum(0) + rest @ rest.T
    return gram.to(flat.dtype)
