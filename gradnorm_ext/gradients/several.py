"""Squared norms and inner products of the *sum* of several uses of one parameter."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gradnorm_ext.gradients.conv import Convolved
from gradnorm_ext.gradients.grouped import Routed
from gradnorm_ext.gradients.lookup import Lookup
from gradnorm_ext.gradients.outer import Outer, Parted
from gradnorm_ext.gradients.per_sample import Sums
from gradnorm_ext.gradients.pullback import Pulled
from gradnorm_ext.gradients.rows import _rows_of, gram_of, members_of_columns
from gradnorm_ext.gradients.term import Contribution
from gradnorm_ext.segments import Segments


class Place(NamedTuple):
    """Where a view lies in its parameter's memory."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.offset + 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))


@dataclass(frozen=True)
class Placed:
    """A contribution and how the tensor that was used came from its parameter.

    ``views`` names the steps (nothing: the parameter itself; "t": its transpose); ``adjoint`` turns a gradient of the
    tensor that was used into one of the parameter. ``place`` is None where that is no view (a cast, ``1 + w``).
    """

    contribution: Contribution
    views: tuple[str, ...]
    adjoint: Callable[[Tensor], Tensor]
    place: Place | None = None

    def in_parameter_space(self) -> Placed:
        """The same with its views undone, where that is cheap: transposes exchange an outer product's sides."""
        if isinstance(self.contribution, Outer) and self.views and all(view == "t" for view in self.views):
            outer = self.contribution if len(self.views) % 2 == 0 else self.contribution.transposed()
            return Placed(outer, (), lambda gradient: gradient)
        if isinstance(self.contribution, Sums) and self.views:
            sums = self.contribution.sums
            placed = torch.stack([self.adjoint(one) for one in sums.unbind(0)]) if len(sums) else sums
            return Placed(
                Sums(placed, self.contribution.segments, self.contribution.backend), (), lambda gradient: gradient
            )
        return self


def combined_sqnorm(placed: Sequence[Placed]) -> Tensor:
    """Squared norms of the sum of several contributions to one parameter: ``‖Σ_u G_u[s]‖²``, not ``Σ_u ‖G_u[s]‖²``."""
    return functools.reduce(torch.add, [_overlapping_sqnorm(uses) for uses in _apart(placed)])


def _apart(placed: Sequence[Placed]) -> list[list[Placed]]:
    """The uses in groups that share no entry of the parameter: there the squared norms do add up."""
    located = sorted(((one.place, one) for one in placed if one.place is not None), key=lambda pair: pair[0].offset)
    if len(located) < len(placed):
        return [list(placed)]
    groups: list[list[Placed]] = []
    end = -1
    for place, one in located:
        if place.offset < end:
            groups[-1].append(one)
        else:
            groups.append([one])
        end = max(end, place.end)
    return groups


def _overlapping_sqnorm(placed: Sequence[Placed]) -> Tensor:
    if len({one.place for one in placed}) == len({type(one.contribution) for one in placed}) == 1 and placed[0].place:
        placed = [Placed(one.contribution, (), lambda gradient: gradient) for one in placed]  # all of the same entries
    uses = [one.in_parameter_space() for one in placed]
    if all(not one.views and not isinstance(one.contribution, Pulled) for one in uses):
        outers = [one.contribution for one in uses if isinstance(one.contribution, Outer)]
        lookups = [one.contribution for one in uses if isinstance(one.contribution, Lookup)]
        sums = [one.contribution for one in uses if isinstance(one.contribution, Sums)]
        convolved = [one.contribution for one in uses if isinstance(one.contribution, Convolved)]
        parted = [one.contribution for one in uses if isinstance(one.contribution, Parted)]
        if len(parted) == 1 and lookups and len(lookups) == len(uses) - 1:
            return tied_sqnorm(TiedOuter.of(parted[0], [(lookup.ids, lookup.segments) for lookup in lookups]), lookups)
        if parted or any(isinstance(one.contribution, Routed) for one in uses):
            return _dense_sqnorm(uses)
        if convolved and not outers and not lookups:
            return convolved[0].together(convolved[1:], sums)
        if not sums and not convolved and (outers or lookups):
            outer = functools.reduce(_concatenated_outer, outers) if outers else None
            if not outer:
                return functools.reduce(_concatenated_lookup, lookups).sqnorm()
            if not lookups:
                return outer.sqnorm()
            return tied_sqnorm(TiedOuter.of(outer, [(lookup.ids, lookup.segments) for lookup in lookups]), lookups)
        elif sums and not outers and not lookups:
            return dataclasses.replace(sums[0], sums=functools.reduce(torch.add, [one.sums for one in sums])).sqnorm()
    return _dense_sqnorm(uses)


def _concatenated_outer(first: Outer, second: Outer) -> Outer:
    segments, join = _concatenated(first.segments, second.segments)
    return Outer(join(first.x, second.x), join(first.g, second.g), segments, first.backend)


def _concatenated_lookup(first: Lookup, second: Lookup) -> Lookup:
    segments, join = _concatenated(first.segments, second.segments)
    ids, g = join(first.ids, second.ids), join(first.live_g, second.live_g)
    return Lookup(ids, g, first.vocabulary, None, segments, first.backend)  # each has its own padding entry


def _concatenated(first: Segments, second: Segments) -> tuple[Segments, Callable[[Tensor, Tensor], Tensor]]:
    """The segments of two uses' rows, and how to bring the rows of each into their order."""
    count, groups = first.count, first.groups
    if first.length is not None and second.length is not None:

        def interleave(*parts: Tensor) -> Tensor:
            return torch.cat([rows.reshape(count, len(rows) // count, *rows.shape[1:]) for rows in parts], 1).flatten(
                0, 1
            )

        return groups.equal(first.length + second.length), interleave
    of_row = torch.cat([one.per_row(torch.arange(count, device=one.offsets.device)) for one in (first, second)])
    order = torch.argsort(of_row, stable=True)
    segments = Segments(first.offsets + second.offsets, None, groups)
    return segments, lambda one, other: torch.cat([one, other]).index_select(0, order)


def _columns(segments: Segments) -> list[tuple[Tensor, Tensor]]:
    """Of every entry of a sqnorm vector: its segments and its rows."""
    return [(members, _rows_of(members, segments)) for members in members_of_columns(segments)]


@dataclass(frozen=True)
class TiedOuter:
    """A head tied to embeddings: its own norms, and of its gradient the rows of those entries that were looked up.

    Kept from the head's backward to the end of the block in place of its rows: for every column of the norms the
    distinct ids looked up there, ``[u]``, and the head's gradient of those entries, ``[u, width]``.
    """

    norms: Tensor
    entries: list[tuple[Tensor, Tensor]]

    @staticmethod
    def of(outer: Outer | Parted, ids: Sequence[tuple[Tensor, Segments]]) -> TiedOuter:
        """``ids``: of every lookup, example by example."""
        entries = []
        for members, rows in _columns(outer.segments):
            looked_up = torch.unique(torch.cat([one[_rows_of(members, segments)] for one, segments in ids]))
            entries.append((looked_up, outer.entries(rows, looked_up)))
        return TiedOuter(outer.sqnorm(), entries)


def tied_sqnorm(head: TiedOuter, lookups: Sequence[Lookup]) -> Tensor:
    """``‖G_head + G_embedding‖² = ‖G_head‖² + ‖G_embedding‖² + 2⟨G_head, G_embedding⟩``, per column."""
    lookup = functools.reduce(_concatenated_lookup, lookups)
    g, cross = lookup.live_g, []
    for (looked_up, of_head), (_, rows) in zip(head.entries, _columns(lookup.segments), strict=True):
        where = torch.searchsorted(looked_up, lookup.ids[rows])
        of_embedding = of_head.new_zeros(of_head.shape).index_add_(0, where, g[rows].to(of_head.dtype))
        cross.append((of_head * of_embedding).sum())
    return head.norms + lookup.sqnorm() + 2 * torch.stack(cross).to(head.norms.dtype)


def _dense_sqnorm(uses: Sequence[Placed]) -> Tensor:
    """The general case, exact and slow: every column's gradient is formed, one after the other."""
    members = members_of_columns(uses[0].contribution.segments)
    return torch.stack([_dense_gradient(uses, column).square().sum() for column in members])


def _dense_gradient(uses: Sequence[Placed], members: Tensor) -> Tensor:
    total: Tensor | None = None
    for use in uses:
        one = use.contribution
        of_rows = isinstance(one, (Outer, Parted, Lookup))
        part = use.adjoint(
            one.of_column(_rows_of(members, one.segments)) if of_rows else one.of_segments(members)  # type: ignore[union-attr]
        )
        total = part if total is None else total + part
    assert total is not None
    return total


def combined_gram(placed: Sequence[Placed]) -> Tensor:
    """Inner products of the tasks' gradients, each the sum of several contributions to one parameter."""
    uses = [one.in_parameter_space() for one in placed]
    if len(uses) == 1 and not uses[0].views:
        return uses[0].contribution.gram()
    segments = uses[0].contribution.segments
    tasks = members_of_columns(segments)[-segments.groups.counts[-1] :]
    return gram_of(torch.stack([_dense_gradient(uses, task) for task in tasks]))
