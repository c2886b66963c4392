"""What one use of a parameter adds to its gradient, per example: kept as rows (outer, lookup) or as small sums.

Where no form fits, a gradient is what a backward pass of its own
gives (pulled). Every contribution offers the same: `sqnorm` (squared norms per segment and group), `wgrad` (the gradient,
optionally weighted, and the norms from the same pass), `total` (the weighted gradient alone), `gram` (the inner products
of the gradients of the coarsest groups, the tasks), and `kept` (what must not change until it is used).
`combined_sqnorm` squares the *sum* of several contributions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradnorm_ext.backends import find
from gradnorm_ext.reference import accumulator
from gradnorm_ext.segments import Segments


@dataclass(frozen=True)
class Outer:
    """A gradient of outer products, ``Σ_r g[r] x[r]ᵀ``, shaped ``[g's width, x's width]``.

    Where the weight is stored transposed, the sides are exchanged: ``swapped``, and ``x`` is the output's gradient.
    """

    x: Tensor
    g: Tensor
    segments: Segments
    backend: str
    swapped: bool = False

    def sqnorm(self) -> Tensor:
        run = find("outer_sqnorm", self.x.device.type, self.backend)
        return run(self.x, self.g, self.segments)  # type: ignore[no-any-return]

    def wgrad(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        run = find("outer_wgrad", self.x.device.type, self.backend)
        return run(self.x, self.g, self.segments, weight=weight)  # type: ignore[no-any-return]

    def by_group(self, out: Tensor) -> Tensor:
        """The norms; the gradient of each group of the coarsest level goes to ``out``."""
        run = find("outer_wgrad", self.x.device.type, self.backend)
        tasks, count = self.segments.groups.levels[-1], self.segments.groups.counts[-1]
        return run(self.x, self.g, self.segments, outputs=tasks, n_outputs=count, out=out)[1]  # type: ignore[no-any-return]

    def total(self, weight: Tensor | None = None) -> Tensor:
        if weight is None:
            return self.g.t() @ self.x
        of_row = per_row(weight.to(self.g.dtype), self.segments)[:, None]
        if self.x.shape[1] < self.g.shape[1]:  # scale the narrower side
            return self.g.t() @ (self.x * of_row)
        return (self.g * of_row).t() @ self.x

    def by_new_group(self) -> tuple[Tensor, Tensor]:
        """The gradient of each group of the coarsest level, and the norms."""
        shape = self.segments.groups.counts[-1], self.g.shape[1], self.x.shape[1]
        out = self.x.new_empty(shape, dtype=accumulator(self.x.dtype))
        return out, self.by_group(out)

    def gram(self) -> Tensor:
        return gram_of(self.by_new_group()[0])

    def transposed(self) -> Outer:
        return Outer(self.g, self.x, self.segments, self.backend, not self.swapped)

    def of_column(self, rows: Tensor) -> Tensor:
        return self.g[rows].t() @ self.x[rows]

    @property
    def kept(self) -> tuple[Tensor, ...]:
        return self.x, self.g

    def fingerprint(self) -> Tensor:
        return _size_of_rows(self.x if self.swapped else self.g)


@dataclass(frozen=True)
class Lookup:
    """An embedding table's gradient, ``dw[ids[r]] += g[r]``, shaped ``[vocabulary, g's width]``."""

    ids: Tensor
    g: Tensor
    vocabulary: int
    padding_idx: int | None
    segments: Segments
    backend: str

    def sqnorm(self) -> Tensor:
        run = find("lookup_sqnorm", self.g.device.type, self.backend)
        return run(self.ids, self.g, self.vocabulary, self.segments, padding_idx=self.padding_idx)  # type: ignore[no-any-return]

    def wgrad(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        run = find("lookup_wgrad", self.g.device.type, self.backend)
        rows = self.ids, self.g, self.vocabulary, self.segments
        return run(*rows, padding_idx=self.padding_idx, weight=weight)  # type: ignore[no-any-return]

    def total(self, weight: Tensor | None = None) -> Tensor:
        g = self.live_g
        if weight is not None:
            g = g * per_row(weight.to(g.dtype), self.segments)[:, None]
        return g.new_zeros(self.vocabulary, g.shape[1]).index_add_(0, self.ids, g)

    def gram(self) -> Tensor:
        """Only the entries that were looked up have a gradient."""
        looked_up, ids = torch.unique(self.ids, return_inverse=True)
        run = find("lookup_wgrad", self.g.device.type, self.backend)
        tasks, count = self.segments.groups.levels[-1], self.segments.groups.counts[-1]
        rows = ids, self.live_g, len(looked_up), self.segments
        return gram_of(run(*rows, outputs=tasks, n_outputs=count)[0])

    def of_column(self, rows: Tensor) -> Tensor:
        g = self.live_g[rows]
        return g.new_zeros(self.vocabulary, g.shape[1]).index_add_(0, self.ids[rows], g)

    @property
    def live_g(self) -> Tensor:
        """The output gradient without the rows of the padding entry, which learns nothing."""
        return self.g if self.padding_idx is None else self.g.masked_fill((self.ids == self.padding_idx)[:, None], 0)

    @property
    def kept(self) -> tuple[Tensor, ...]:
        return self.ids, self.g

    def fingerprint(self) -> Tensor:
        return _size_of_rows(self.g)


@dataclass(frozen=True)
class Sums:
    """A gradient small enough to be formed per segment: ``sums [S, *shape of the parameter]``."""

    sums: Tensor
    segments: Segments
    backend: str

    @property
    def flat(self) -> Tensor:
        return self.sums.reshape(self.segments.count, -1)

    def sqnorm(self) -> Tensor:
        run = find("sums_sqnorm", self.sums.device.type, self.backend)
        return run(self.flat, self.segments)  # type: ignore[no-any-return]

    def wgrad(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        run = find("sums_wgrad", self.sums.device.type, self.backend)
        total, sqnorm = run(self.flat, self.segments, weight=weight)
        return total.view(self.sums.shape[1:]), sqnorm

    def total(self, weight: Tensor | None = None) -> Tensor:
        total = self.sums.sum(0) if weight is None else torch.tensordot(weight.to(self.sums.dtype), self.sums, 1)
        return total.view(self.sums.shape[1:])

    def gram(self) -> Tensor:
        tasks, count = self.segments.groups.levels[-1], self.segments.groups.counts[-1]
        return gram_of(self.flat.new_zeros(count, self.flat.shape[1]).index_add_(0, tasks, self.flat))

    def of_segments(self, segments: Tensor) -> Tensor:
        return self.sums[segments].sum(0)

    @property
    def kept(self) -> tuple[Tensor, ...]:
        return (self.sums,)

    def fingerprint(self) -> Tensor:
        return self.flat.abs().sum(1)


@dataclass(frozen=True)
class Pulled:
    """A gradient that only a backward pass knows: one pass for each sum of examples that is asked for.

    ``pull(weight [B] or None)`` gives the gradient of the weighted sum of the examples; ``norms()`` all squared norms, in
    one sweep for all parameters of the function; ``sizes [B]``: how large each example's output gradient is.
    """

    pull: Callable[[Tensor | None], Tensor]
    norms: Callable[[], Tensor]
    sizes: Callable[[], Tensor]
    segments: Segments

    def sqnorm(self) -> Tensor:
        return self.norms()

    def wgrad(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.pull(weight), self.norms()

    def total(self, weight: Tensor | None = None) -> Tensor:
        return self.pull(weight)

    def gram(self) -> Tensor:
        count = self.segments.groups.counts[-1]
        return gram_of(torch.stack([self.of_segments(task) for task in members_of_columns(self.segments)[-count:]]))

    def of_segments(self, segments: Tensor) -> Tensor:
        return self.pull(chosen(segments, self.segments))

    @property
    def kept(self) -> tuple[Tensor, ...]:
        return ()

    def fingerprint(self) -> Tensor:
        return self.sizes()


Contribution = Outer | Lookup | Sums | Pulled


def chosen(members: Tensor, segments: Segments) -> Tensor:
    """``[S]``: 1 for the segments that are meant, else 0."""
    return torch.zeros(segments.count, device=members.device).index_fill_(0, members, 1)


def _size_of_rows(g: Tensor) -> Tensor:
    return g.abs().sum(1, dtype=accumulator(g.dtype))


def per_row(weight: Tensor, segments: Segments) -> Tensor:
    """A weight per segment as one per row."""
    if segments.length is not None:
        return weight.repeat_interleave(segments.length)
    return weight.repeat_interleave(segments.offsets.diff())


@dataclass(frozen=True)
class Placed:
    """A contribution and how the tensor that was used came from its parameter.

    ``views`` names the steps (nothing: the parameter itself; "t": its transpose); ``adjoint`` turns a gradient of the
    tensor that was used into one of the parameter.
    """

    contribution: Contribution
    views: tuple[str, ...]
    adjoint: Callable[[Tensor], Tensor]

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
    uses = [one.in_parameter_space() for one in placed]
    if all(not one.views and not isinstance(one.contribution, Pulled) for one in uses):
        outers = [one.contribution for one in uses if isinstance(one.contribution, Outer)]
        lookups = [one.contribution for one in uses if isinstance(one.contribution, Lookup)]
        sums = [one.contribution for one in uses if isinstance(one.contribution, Sums)]
        if not sums and (outers or lookups):
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
    of_row = torch.cat([per_row(torch.arange(count, device=one.offsets.device), one) for one in (first, second)])
    order = torch.argsort(of_row, stable=True)
    segments = Segments(first.offsets + second.offsets, None, groups)
    return segments, lambda one, other: torch.cat([one, other]).index_select(0, order)


def _rows_of(members: Tensor, segments: Segments) -> Tensor:
    of_row = per_row(torch.arange(segments.count, device=members.device), segments)
    return torch.isin(of_row, members).nonzero()[:, 0]


def members_of_columns(segments: Segments) -> list[Tensor]:
    """Of every entry of a sqnorm vector: its segments."""
    device = segments.offsets.device
    columns = [torch.tensor([s], device=device) for s in range(segments.count)]
    for ids, count in zip(segments.groups.levels, segments.groups.counts, strict=True):
        columns += [(ids == group).nonzero()[:, 0] for group in range(count)]
    return columns


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
    def of(outer: Outer, ids: Sequence[tuple[Tensor, Segments]]) -> TiedOuter:
        """``ids``: of every lookup, example by example."""
        entries = []
        for members, rows in _columns(outer.segments):
            looked_up = torch.unique(torch.cat([one[_rows_of(members, segments)] for one, segments in ids]))
            entries.append((looked_up, outer.g[rows][:, looked_up].t() @ outer.x[rows]))
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
        of_rows = isinstance(one, (Outer, Lookup))
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


def gram_of(gradients: Tensor) -> Tensor:
    """``[K, K]``: the inner products of ``gradients [K, ...]``, summed in runs that lose no digits."""
    run = 4096
    flat = gradients.flatten(1)
    whole = flat.shape[1] // run * run
    runs = flat[:, :whole].unflatten(1, (-1, run)).transpose(0, 1)
    rest = flat[:, whole:]
    gram: Tensor = (runs @ runs.mT).double().sum(0) + rest @ rest.T
    return gram.to(flat.dtype)
