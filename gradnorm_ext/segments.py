"""Which rows belong together: rows into segments (examples), segments into nested groups (prompts, then tasks)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Groups:
    """Coarser and coarser partitions of the same segments, each nested in the next.

    Attributes:
        levels: fine to coarse, each ``[S]`` int64: the group of every segment.
        counts: how many groups each level has; a group may be empty.
        walk: ``[S]`` int64: the segments in an order in which every group of every level is contiguous.
        columns: ``[L, S]`` int64: ``levels`` as entries of a ``sqnorm`` vector, which holds the S segments first,
            then the groups of each level in turn.

    Example:
        >>> groups = Groups.of(4, [(torch.tensor([1, 0, 1, 0]), 2)])
        >>> groups.walk.tolist(), groups.columns.tolist()
        ([1, 3, 0, 2], [[5, 4, 5, 4]])
    """

    levels: tuple[Tensor, ...]
    counts: tuple[int, ...]
    walk: Tensor
    columns: Tensor
    _equal: dict[int, Segments] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(segments: int, levels: Sequence[tuple[Tensor, int]] = (), device: torch.device | str = "cpu") -> Groups:
        """The groups of ``segments`` segments, from ``(ids, count)`` pairs, fine to coarse, each nested in the next."""
        walk = torch.arange(segments, device=device)
        columns = torch.empty(len(levels), segments, dtype=torch.int64, device=device)
        first = segments
        for level, (ids, count) in enumerate(levels):
            walk = walk[torch.argsort(ids[walk], stable=True)]
            columns[level] = ids + first
            first += count
        return Groups(tuple(ids for ids, _ in levels), tuple(count for _, count in levels), walk, columns)

    def equal(self, length: int) -> Segments:
        """These segments with ``length`` rows each; made once, as is what backends work out with them."""
        if length not in self._equal:
            if len(self._equal) == 64:  # as many lengths as batches: nothing comes back
                self._equal.clear()
            self._equal[length] = Segments.equal(len(self.walk), length, self, self.walk.device)
        return self._equal[length]


@dataclass(frozen=True, eq=False)
class Segments:
    """Rows ``offsets[s]`` to ``offsets[s + 1]`` belong to segment ``s``.

    Attributes:
        offsets: ``[S + 1]`` int64, not decreasing, from 0 to the number of rows.
        length: the rows of every segment where all have equally many (known without looking at the device), else None.
        groups: the coarser partitions of the same rows.

    Example:
        >>> Segments.equal(2, 3).offsets.tolist()
        [0, 3, 6]
        >>> Segments.from_lengths(torch.tensor([2, 0, 1])).offsets.tolist()
        [0, 2, 2, 3]
    """

    offsets: Tensor
    length: int | None
    groups: Groups

    @staticmethod
    def equal(count: int, length: int, groups: Groups | None = None, device: torch.device | str = "cpu") -> Segments:
        """``count`` segments of ``length`` rows each."""
        offsets = torch.arange(count + 1, device=device) * length
        return Segments(offsets, length, groups or Groups.of(count, device=device))

    @staticmethod
    def from_lengths(lengths: Tensor, groups: Groups | None = None) -> Segments:
        """Segments of the given lengths, one after the other."""
        offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64, device=lengths.device)
        torch.cumsum(lengths, 0, out=offsets[1:])
        return Segments(offsets, None, groups or Groups.of(len(lengths), device=lengths.device))

    def finer(self, rows: int) -> Segments:
        """The same segments, of ``rows`` rows in place of each."""
        if self.length is not None:
            return self.groups.equal(self.length * rows)
        return Segments(self.offsets * rows, None, self.groups)

    @functools.cached_property
    def count(self) -> int:
        """How many segments there are."""
        return len(self.offsets) - 1

    def per_row(self, values: Tensor, rows: int | None = None) -> Tensor:
        """A value per segment as one per row; without the number of ``rows``, ragged ones wait for the device."""
        if self.length is not None:
            return values.repeat_interleave(self.length)
        return values.repeat_interleave(self.offsets.diff(), output_size=rows)

    def of_rows(self, rows: int) -> Tensor:
        """Each row's segment, ``[rows]``."""
        return self.per_row(torch.arange(self.count, device=self.offsets.device), rows)

    @functools.cached_property
    def columns(self) -> int:
        """The length of a ``sqnorm`` vector: the segments and all groups."""
        return self.count + sum(self.groups.counts)

    @functools.cached_property
    def lengths(self) -> list[int]:
        """The rows of each segment, on the host."""
        if self.length is not None:
            return [self.length] * self.count
        lengths: list[int] = self.offsets.diff().tolist()
        return lengths
