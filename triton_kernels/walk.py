"""Rows in the order in which every group is contiguous, cut into the entries that a kernel goes through.

All of it is worked out on the device, in tensors as long as there are segments (or rows): nobody waits for a length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradnorm_ext.triton_kernels.remembered import remembered

BEYOND = 128  # entries that a block of rows may read past the last


@dataclass(frozen=True)
class Entries:
    """Rows that are never told apart, entry by entry; those after the last that exists have no rows.

    Attributes:
        begin, end: ``[E]``: the rows of each entry.
        count: how many exist: a number, or a tensor of one.
        length: the rows of each, where all have equally many and that is known; else None.
        order: ``[R + BEYOND]`` int32: which row of x and g a row is, or None where it is itself.
        columns: ``[levels + 1, E]``: where in ``sqnorm[first:]`` an entry's norm and those of the groups around it belong,
            fine to coarse; right after its end for a norm that nobody wants. None: entry e's is e, and there are no groups.
        first: where in ``sqnorm`` the norms of these levels begin.
        depth: ``[E]``: how many of these end with the entry, at least 1. None: 1.
        weight: ``[E]``, or None for ones.
        adds: ``[E]``: the coarsest level at which all that ends has one weight. None: the coarsest there is.
        output: ``[E]``: which weight gradient it is part of, or None for the only one.
    """

    begin: Tensor
    end: Tensor
    count: int | Tensor
    length: int | None
    order: Tensor | None = None
    columns: Tensor | None = None
    first: int = 0
    depth: Tensor | None = None
    weight: Tensor | None = None
    adds: Tensor | None = None
    output: Tensor | None = None
    _first_blocks: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def first_blocks(self, rows: int) -> Tensor:
        """``[E + 1]``: from which on entry e has its blocks of so many rows, ``begin // rows + e``: found without a table."""
        if rows not in self._first_blocks:
            index = torch.arange(len(self.begin) + 1, device=self.begin.device)
            self._first_blocks[rows] = torch.cat([self.begin, self.end[-1:]]) // rows + index
        return self._first_blocks[rows]

    @functools.cached_property
    def places(self) -> Tensor:
        """``[E]``: where in ``sqnorm`` the entries' own norms belong."""
        assert self.columns is not None
        return self.first + self.columns[0]

    @property
    def levels(self) -> int:
        """How many levels of groups lie around an entry."""
        return 0 if self.columns is None else len(self.columns) - 1


@dataclass(frozen=True)
class Walk:
    """The rows of ``segments.Segments`` and what is wanted of them; walk, columns and counts as of ``segments.Groups``."""

    rows: int
    offsets: Tensor
    length: int | None
    walk: Tensor
    columns: Tensor
    counts: Sequence[int]
    weight: Tensor | None = None
    outputs: Tensor | None = None
    _made: dict[tuple, Entries] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(
        rows: int,
        offsets: Tensor,
        length: int | None,
        walk: Tensor,
        columns: Tensor,
        counts: Sequence[int],
        weight: Tensor | None = None,
        outputs: Tensor | None = None,
    ) -> Walk:
        """The same for all layers of a block: what is worked out of it is worked out once."""
        return remembered(_of, offsets, rows, length, walk, columns, tuple(counts), weight, outputs)

    @property
    def sizes(self) -> list[int]:
        """How many members each level has: the segments, then the groups, fine to coarse."""
        return [len(self.walk), *self.counts]

    def segments(self, grouped: bool) -> Entries:
        """One entry a segment, where it lies; ``grouped``: in the order of the walk, with the groups around it."""
        return self._once(self._segments, grouped)

    def groups(self, level: int, weighted: bool) -> Entries:
        """One entry a group of a level, from 1, in walk order; ``weighted``: a group is cut where the weight changes.

        Beyond the coarsest level there are only runs of equal weight.
        """
        return self._once(self._groups, level, weighted)

    def _once(self, make: Callable[..., Entries], *how: int | bool) -> Entries:
        key = make.__name__, *how
        if key not in self._made:
            self._made[key] = make(*how)
        return self._made[key]

    def _segments(self, grouped: bool) -> Entries:
        begin, end, count = self.offsets[:-1], self.offsets[1:], len(self.walk)
        if not grouped or (not self.counts and self.outputs is None):
            return Entries(begin, end, count, self.length, weight=self.weight)
        columns = torch.cat([self.walk[None], self._columns])
        return Entries(
            *(begin[self.walk], end[self.walk], count, self.length),
            columns=columns,
            depth=_ends(columns).sum(0),
            weight=self._weight,
            adds=self._adds(columns),
            output=self._outputs,
        )

    def all_rows(self) -> Entries:
        """One entry."""
        return Entries(self.offsets[:1], self.offsets[-1:], 1, self.rows)

    def _groups(self, level: int, weighted: bool) -> Entries:
        first, wanted = sum(self.sizes[:level]), sum(self.sizes[level:])
        columns = self._columns[level - 1 :] - first
        ends = _ends(columns)
        weight = self._weight if weighted else None
        if weight is not None:
            ends = torch.cat([(ends.any(0) | _ends(weight))[None], ends])
            columns = torch.cat([torch.full_like(self.walk, wanted)[None], columns])
        depth = ends.sum(0)
        last = torch.argsort((depth == 0).byte(), stable=True)  # the segments with which an entry ends, in order
        count = (depth > 0).sum()
        exists = torch.arange(len(last), device=last.device) < count
        end = torch.where(exists, self._offsets[1:][last], self.rows)
        adds = self._adds(columns) if weighted else None
        return Entries(
            *(torch.cat([end.new_zeros(1), end[:-1]]), end, count, None),
            order=self._order,
            columns=torch.where(exists, columns[:, last], wanted),
            first=first,
            depth=depth[last],
            weight=None if weight is None else weight[last],
            adds=None if adds is None else adds[last],
            output=None if self._outputs is None else self._outputs[last],
        )

    @functools.cached_property
    def _columns(self) -> Tensor:
        return self.columns[:, self.walk]

    @functools.cached_property
    def _weight(self) -> Tensor | None:
        return None if self.weight is None else self.weight[self.walk]

    @functools.cached_property
    def _outputs(self) -> Tensor | None:
        return None if self.outputs is None else self.outputs[self.walk]

    @functools.cached_property
    def _offsets(self) -> Tensor:
        """Of the segments, once the rows lie in walk order."""
        lengths = self.offsets.diff()[self.walk]
        return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])

    @functools.cached_property
    def _order(self) -> Tensor:
        moved = self.offsets[:-1][self.walk] - self._offsets[:-1]
        lengths = self._offsets.diff()
        row = torch.arange(self.rows, device=self.walk.device)
        order = torch.zeros(self.rows + BEYOND, dtype=torch.int32, device=self.walk.device)
        torch.add(row, torch.repeat_interleave(moved, lengths, output_size=self.rows), out=order[: self.rows])
        return order

    def _adds(self, columns: Tensor) -> Tensor | None:
        weight = self._weight
        if weight is None or len(columns) == 1:
            return None
        low, high = (
            weight.new_zeros(len(columns) - 1, sum(self.sizes)).scatter_reduce_(
                1, columns[1:], weight.expand(len(columns) - 1, -1), extreme, include_self=False
            )
            for extreme in ("amin", "amax")
        )
        return (low == high).gather(1, columns[1:]).sum(0)


def _of(offsets: Tensor, rows: int, length, walk, columns: Tensor, counts: tuple[int, ...], weight, outputs) -> Walk:
    return Walk(rows, offsets.clone(), length, walk, columns[: len(counts)], counts, weight, outputs)


def _ends(values: Tensor) -> Tensor:
    """Where the next entry of the last dimension differs, or there is none."""
    last = values.new_ones(*values.shape[:-1], 1, dtype=torch.bool)
    return torch.cat([values[..., 1:] != values[..., :-1], last], -1)
