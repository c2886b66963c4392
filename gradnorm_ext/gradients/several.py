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

from gradnorm_ext.backends import find
from gradnorm_ext.gradients.conv import ConvGrad
from gradnorm_ext.gradients.lookup import Lookup
from gradnorm_ext.gradients.outer import ChunkedOuter, Outer
from gradnorm_ext.gradients.per_sample import PerSampleGrads
from gradnorm_ext.gradients.rows import gram_of, group_members, groups_of_segments
from gradnorm_ext.gradients.term import GradientTerm
from gradnorm_ext.gradients.tied import TiedHead
from gradnorm_ext.segments import Segments

_ByForm = dict[type, list[Any]]


class StridedView(NamedTuple):
    """Where a view lies in its parameter's memory."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.offset + 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))


@dataclass(frozen=True)
class ViewedTerm:
    """A term and how the tensor that was used came from its parameter.

    ``views`` names the steps (nothing: the parameter itself; "t": its transpose); ``adjoint`` turns a gradient of the
    tensor that was used into one of the parameter. ``strided_view`` is None where that is no view (a cast, ``1 + w``).
    """

    term: GradientTerm
    views: tuple[str, ...]
    adjoint: Callable[[Tensor], Tensor]
    strided_view: StridedView | None = None

    def of_parameter(self) -> ViewedTerm:
        """The same with its views undone, where that is cheap."""
        if not self.views:
            return self
        term = self.term.without_views(self.views, self.adjoint)
        return self if term is None else ViewedTerm(term, (), _itself)


def _itself(gradient: Tensor) -> Tensor:
    return gradient


def compress_tied_head(
    head: ViewedTerm, lookups: Sequence[tuple[Tensor, Segments]], sqnorm: Tensor
) -> ViewedTerm | None:
    """A head tied to lookups of the whole parameter, with what their cross term needs in place of its rows.

    ``sqnorm``: its own norms. None where it is of a part of the parameter.
    """
    head = head.of_parameter()
    tied = None if head.views else head.term.compress_for(lookups, sqnorm)
    return None if tied is None else ViewedTerm(tied, (), _itself)  # type: ignore[arg-type]  # it only ever meets lookups


def combined_sqnorm(uses: Sequence[ViewedTerm]) -> Tensor:
    """Squared norms of the sum of several terms of one parameter."""
    return functools.reduce(torch.add, [_overlapping_sqnorm(some) for some in _disjoint_slices(uses)])


def _disjoint_slices(uses: Sequence[ViewedTerm]) -> list[list[ViewedTerm]]:
    """The uses in groups that share no entry of the parameter: there the squared norms do add up."""
    located = [(one.strided_view, one) for one in uses if one.strided_view is not None]
    if len(located) < len(uses):
        return [list(uses)]
    groups: list[list[ViewedTerm]] = []
    end = -1
    for view, one in sorted(located, key=lambda pair: pair[0].offset):
        if view.offset < end:
            groups[-1].append(one)
        else:
            groups.append([one])
        end = max(end, view.end)
    return groups


def _overlapping_sqnorm(uses: Sequence[ViewedTerm]) -> Tensor:
    views, forms = {use.strided_view for use in uses}, {type(use.term) for use in uses}
    if len(views) == len(forms) == 1 and None not in views:
        uses = [ViewedTerm(use.term, (), _itself) for use in uses]  # all of the same entries
    uses = [use.of_parameter() for use in uses]
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


def _merged(terms: Sequence[Any]) -> Any:
    return functools.reduce(lambda one, other: one.merge(other), terms)


def _merged_sqnorm(terms: _ByForm) -> Tensor:
    (of_one_form,) = terms.values()
    sqnorm: Tensor = _merged(of_one_form).sqnorm()
    return sqnorm


def _conv_sqnorm(terms: _ByForm) -> Tensor:
    first, *others = terms[ConvGrad]
    sqnorm: Tensor = first.sqnorm_of_sum(others, terms.get(PerSampleGrads, []))
    return sqnorm


def _tied_outer_sqnorm(terms: _ByForm) -> Tensor:
    lookups = terms[Lookup]
    return _with_lookups(_merged(terms[Outer]), lookups)


def _tied_chunked_sqnorm(terms: _ByForm) -> Tensor | None:
    lookups, (head, *others) = terms[Lookup], terms[ChunkedOuter]
    if others:
        return None
    return _with_lookups(head, lookups)


def _with_lookups(head: Outer | ChunkedOuter, lookups: Sequence[Lookup]) -> Tensor:
    tied = head.compress_for([(lookup.ids, lookup.segments) for lookup in lookups], head.sqnorm())
    return tied_sqnorm(tied, _merged(lookups))


def _compressed_sqnorm(terms: _ByForm) -> Tensor:
    (head,) = terms[TiedHead]
    return tied_sqnorm(head, _merged(terms[Lookup]))


_CLOSED_FORMS: dict[frozenset[type], Callable[[_ByForm], Tensor | None]] = {
    frozenset({Outer}): _merged_sqnorm,
    frozenset({Lookup}): _merged_sqnorm,
    frozenset({PerSampleGrads}): _merged_sqnorm,
    frozenset({ConvGrad}): _conv_sqnorm,
    frozenset({ConvGrad, PerSampleGrads}): _conv_sqnorm,
    frozenset({Outer, Lookup}): _tied_outer_sqnorm,
    frozenset({ChunkedOuter, Lookup}): _tied_chunked_sqnorm,
    frozenset({TiedHead, Lookup}): _compressed_sqnorm,
}


def tied_sqnorm(head: TiedHead, lookup: Lookup) -> Tensor:
    """``‖G_head + G_embedding‖² = ‖G_head‖² + ‖G_embedding‖² + 2⟨G_head, G_embedding⟩``, per column."""
    g, segments = lookup.live_g, lookup.segments
    cross: list[Tensor] = []
    of_row = segments.of_rows(len(g))
    sums = find("segment_sum", g.device.type, lookup.backend)
    for (of_segment, count), (keys, of_head) in zip(groups_of_segments(segments), head.levels, strict=True):
        key = of_segment[of_row] * head.vocabulary + lookup.ids
        products = torch.linalg.vecdot(of_head[torch.searchsorted(keys, key)], g.to(of_head.dtype))
        of_segments = sums(products[:, None], segments)[:, 0]
        if cross:  # sums over a group's segments; where there is none of another group, nothing of it is added
            is_member = of_segment == torch.arange(count, device=g.device)[:, None]
            of_segments = of_segments.where(is_member, 0).sum(1)
        cross.append(of_segments)
    return head.norms + lookup.sqnorm() + 2 * torch.cat(cross).to(head.norms.dtype)


def _dense_sqnorm(uses: Sequence[ViewedTerm]) -> Tensor:
    """The general case, exact and slow: every column's gradient is formed, one after the other."""
    columns = group_members(uses[0].term.segments)
    return torch.stack([combined_gradient(uses, members).square().sum() for members in columns])


def combined_gradient(uses: Sequence[ViewedTerm], members: Tensor) -> Tensor:
    """The gradient that several terms have together, of some segments."""
    return functools.reduce(torch.add, [use.adjoint(use.term.grad_of_segments(members)) for use in uses])


def combined_gram(uses: Sequence[ViewedTerm]) -> Tensor:
    """Inner products of the tasks' gradients, each the sum of several terms of one parameter."""
    uses = [use.of_parameter() for use in uses]
    if len(uses) == 1 and not uses[0].views:
        return uses[0].term.gram()
    segments = uses[0].term.segments
    tasks = group_members(segments)[-segments.groups.counts[-1] :]
    return gram_of(torch.stack([combined_gradient(uses, task) for task in tasks]))
