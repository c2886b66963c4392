"""Squared norms and inner products of the *sum* of several uses of one parameter.

``‖Σ_u G_u[s]‖²`` is not ``Σ_u ‖G_u[s]‖²``. Where the uses' forms have a product of their own for it, `_CLOSED_FORMS` names
it; the sums of any others are formed, one after the other.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradnorm_ext.gradients.conv import Convolved
from gradnorm_ext.gradients.lookup import Lookup
from gradnorm_ext.gradients.outer import Outer, Parted
from gradnorm_ext.gradients.per_sample import Sums
from gradnorm_ext.gradients.rows import columns, gram_of, members_of_columns
from gradnorm_ext.gradients.term import GradientTerm
from gradnorm_ext.gradients.tied import TiedOuter
from gradnorm_ext.segments import Segments

_ByForm = dict[type, list[Any]]


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
    """A term and how the tensor that was used came from its parameter.

    ``views`` names the steps (nothing: the parameter itself; "t": its transpose); ``adjoint`` turns a gradient of the
    tensor that was used into one of the parameter. ``place`` is None where that is no view (a cast, ``1 + w``).
    """

    term: GradientTerm
    views: tuple[str, ...]
    adjoint: Callable[[Tensor], Tensor]
    place: Place | None = None

    def in_parameter_space(self) -> Placed:
        """The same with its views undone, where that is cheap."""
        if not self.views:
            return self
        term = self.term.undo_views(self.views, self.adjoint)
        return self if term is None else Placed(term, (), _itself)


def _itself(gradient: Tensor) -> Tensor:
    return gradient


def compressed(placed: Placed, lookups: Sequence[tuple[Tensor, Segments]]) -> Placed | None:
    """A head tied to lookups of the whole parameter, with what their cross term needs in place of its rows.

    None where the head is of another form, or of a part of the parameter.
    """
    placed = placed.in_parameter_space()
    head = None if placed.views else placed.term.tied_to(lookups)
    return None if head is None else Placed(head, (), _itself)  # type: ignore[arg-type]  # it only ever meets lookups


def combined_sqnorm(placed: Sequence[Placed]) -> Tensor:
    """Squared norms of the sum of several terms of one parameter."""
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
    if len({one.place for one in placed}) == len({type(one.term) for one in placed}) == 1 and placed[0].place:
        placed = [Placed(one.term, (), _itself) for one in placed]  # all of the same entries
    uses = [one.in_parameter_space() for one in placed]
    if any(use.views for use in uses):
        return _dense_sqnorm(uses)
    if len(uses) == 1:
        return uses[0].term.sqnorm()
    by_form: _ByForm = defaultdict(list)
    for use in uses:
        by_form[type(use.term)].append(use.term)
    closed_form = _CLOSED_FORMS.get(frozenset(by_form))
    found = None if closed_form is None else closed_form(by_form)
    return _dense_sqnorm(uses) if found is None else found


def _joined(terms: Sequence[Any]) -> Any:
    return functools.reduce(lambda one, other: one.joined(other), terms)


def _joined_sqnorm(terms: _ByForm) -> Tensor:
    (of_one_form,) = terms.values()
    sqnorm: Tensor = _joined(of_one_form).sqnorm()
    return sqnorm


def _convolved_sqnorm(terms: _ByForm) -> Tensor:
    first, *others = terms[Convolved]
    sqnorm: Tensor = first.together(others, terms.get(Sums, []))
    return sqnorm


def _tied_outer_sqnorm(terms: _ByForm) -> Tensor:
    lookups = terms[Lookup]
    head = _joined(terms[Outer]).tied_to([(lookup.ids, lookup.segments) for lookup in lookups])
    return tied_sqnorm(head, _joined(lookups))


def _tied_parted_sqnorm(terms: _ByForm) -> Tensor | None:
    lookups, (head, *others) = terms[Lookup], terms[Parted]
    if others:
        return None
    return tied_sqnorm(head.tied_to([(lookup.ids, lookup.segments) for lookup in lookups]), _joined(lookups))


def _compressed_sqnorm(terms: _ByForm) -> Tensor:
    (head,) = terms[TiedOuter]
    return tied_sqnorm(head, _joined(terms[Lookup]))


_CLOSED_FORMS: dict[frozenset[type], Callable[[_ByForm], Tensor | None]] = {
    frozenset({Outer}): _joined_sqnorm,
    frozenset({Lookup}): _joined_sqnorm,
    frozenset({Sums}): _joined_sqnorm,
    frozenset({Convolved}): _convolved_sqnorm,
    frozenset({Convolved, Sums}): _convolved_sqnorm,
    frozenset({Outer, Lookup}): _tied_outer_sqnorm,
    frozenset({Parted, Lookup}): _tied_parted_sqnorm,
    frozenset({TiedOuter, Lookup}): _compressed_sqnorm,
}


def tied_sqnorm(head: TiedOuter, lookup: Lookup) -> Tensor:
    """``‖G_head + G_embedding‖² = ‖G_head‖² + ‖G_embedding‖² + 2⟨G_head, G_embedding⟩``, per column."""
    g, cross = lookup.live_g, []
    for (looked_up, of_head), (_, rows) in zip(head.entries, columns(lookup.segments), strict=True):
        where = torch.searchsorted(looked_up, lookup.ids[rows])
        of_embedding = of_head.new_zeros(of_head.shape).index_add_(0, where, g[rows].to(of_head.dtype))
        cross.append((of_head * of_embedding).sum())
    return head.norms + lookup.sqnorm() + 2 * torch.stack(cross).to(head.norms.dtype)


def _dense_sqnorm(uses: Sequence[Placed]) -> Tensor:
    """The general case, exact and slow: every column's gradient is formed, one after the other."""
    columns = members_of_columns(uses[0].term.segments)
    return torch.stack([_dense_gradient(uses, members).square().sum() for members in columns])


def _dense_gradient(uses: Sequence[Placed], members: Tensor) -> Tensor:
    return functools.reduce(torch.add, [use.adjoint(use.term.of_segments(members)) for use in uses])


def combined_gram(placed: Sequence[Placed]) -> Tensor:
    """Inner products of the tasks' gradients, each the sum of several terms of one parameter."""
    uses = [one.in_parameter_space() for one in placed]
    if len(uses) == 1 and not uses[0].views:
        return uses[0].term.gram()
    segments = uses[0].term.segments
    tasks = members_of_columns(segments)[-segments.groups.counts[-1] :]
    return gram_of(torch.stack([_dense_gradient(uses, task) for task in tasks]))
