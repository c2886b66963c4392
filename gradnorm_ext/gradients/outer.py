"""Outer products of rows: the weight gradient of a linear layer, whole or for some columns at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gradnorm_ext import reference
from gradnorm_ext.backends import find, serves
from gradnorm_ext.gradients.per_sample import PerSampleGrads
from gradnorm_ext.gradients.rows import concat_rows, row_abs_sums, rows_of
from gradnorm_ext.gradients.term import GradientTerm
from gradnorm_ext.gradients.tied import TiedHead
from gradnorm_ext.segments import Segments


@dataclass(frozen=True)
class Outer(GradientTerm):
    """A gradient of outer products, ``Σ_r g[r] x[r]ᵀ``, shaped ``[g's width, x's width]``.

    Where the weight is stored transposed, the sides are exchanged: ``swapped``, and ``x`` is the output's gradient.
    """

    fuses_groups = compresses = True

    x: Tensor
    g: Tensor
    segments: Segments
    backend: str
    swapped: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.g.shape[1], self.x.shape[1]

    @property
    def like(self) -> Tensor:
        return self.x

    def sqnorm(self) -> Tensor:
        run = find("outer_sqnorm", self.x.device.type, self.backend)
        return run(self.x, self.g, self.segments)  # type: ignore[no-any-return]

    def wgrad(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        run = find("outer_wgrad", self.x.device.type, self.backend)
        return run(self.x, self.g, self.segments, weight=weight)  # type: ignore[no-any-return]

    def wgrad_in(self, dtype: torch.dtype, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if dtype != self.x.dtype or dtype.itemsize != 2:  # others are not rounded
            return self.wgrad(weight)
        run = find("outer_wgrad", self.x.device.type, self.backend)
        out = self.x.new_empty(self.shape)
        return run(self.x, self.g, self.segments, weight=weight, out=out)  # type: ignore[no-any-return]

    def grad(self, weight: Tensor | None = None) -> Tensor:
        where = "outer_sum", self.x.device.type, self.backend
        run = find(*where) if serves(*where) else reference.outer_sum
        return run(self.x, self.g, self.segments, weight=weight)

    def per_group(self, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        run = find("outer_wgrad", self.x.device.type, self.backend)
        tasks, count = self.segments.groups.levels[-1], self.segments.groups.counts[-1]
        out = self.empty_groups() if out is None else out
        return out, run(self.x, self.g, self.segments, outputs=tasks, n_outputs=count, out=out)[1]

    def grad_of_segments(self, members: Tensor) -> Tensor:
        rows = rows_of(members, self.segments)
        return self.g[rows].t() @ self.x[rows]

    def _columns(self, ids: Tensor, rows: slice | Tensor) -> Tensor:
        return self.g[rows].index_select(1, ids) if isinstance(rows, slice) else self.g[rows[:, None], ids]

    def compress_for(self, lookups: Sequence[tuple[Tensor, Segments]], sqnorm: Tensor) -> TiedHead:
        return TiedHead.of(sqnorm, self.x, self.g.shape[1], self._columns, self.segments, lookups)

    def without_views(self, views: Sequence[str], adjoint: Callable[[Tensor], Tensor]) -> Outer | None:
        """Transposes exchange the sides."""
        if any(view != "t" for view in views):
            return None
        return self if len(views) % 2 == 0 else self.transposed()

    def transposed(self) -> Outer:
        return Outer(self.g, self.x, self.segments, self.backend, not self.swapped)

    def merge(self, other: Outer) -> Outer:
        """The rows of both."""
        segments, join = concat_rows(self.segments, other.segments)
        return Outer(join(self.x, other.x), join(self.g, other.g), segments, self.backend)

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        return self.x, self.g

    def row_abs_sums(self) -> Tensor:
        return row_abs_sums(self.x if self.swapped else self.g)


class ChunkedGradient(Protocol):
    """An output gradient ``[rows, out]`` that is formed for some columns at a time, in parts that cover all of them."""

    def parts(self) -> Iterator[tuple[slice, Tensor]]: ...

    def columns(self, ids: Tensor) -> Tensor: ...

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class ChunkedOuter(GradientTerm):
    """An `Outer` whose output gradient is never there as a whole.

    Different columns of it make different rows of the gradient: squared norms and inner products of the parts add up.
    """

    fuses_groups = compresses = True

    x: Tensor
    g: ChunkedGradient
    out: int
    segments: Segments
    backend: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.out, self.x.shape[1]

    @property
    def like(self) -> Tensor:
        return self.x

    def _outers(self) -> Iterator[tuple[slice, Outer]]:
        for part, g in self.g.parts():
            yield part, Outer(self.x, g, self.segments, self.backend)

    def sqnorm(self) -> Tensor:
        return functools.reduce(torch.add, [outer.sqnorm() for _, outer in self._outers()])

    def wgrad(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        totals, sqnorms = zip(*(outer.wgrad(weight) for _, outer in self._outers()), strict=True)
        return torch.cat(totals), functools.reduce(torch.add, sqnorms)

    def grad(self, weight: Tensor | None = None) -> Tensor:
        return torch.cat([outer.grad(weight) for _, outer in self._outers()])

    def per_group(self, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out = self.empty_groups() if out is None else out
        sqnorms = []
        for part, outer in self._outers():
            of_groups, sqnorm = outer.per_group()
            out[:, part] = of_groups
            sqnorms.append(sqnorm)
        return out, functools.reduce(torch.add, sqnorms)

    def gram(self) -> Tensor:
        return functools.reduce(torch.add, [outer.gram() for _, outer in self._outers()])

    def grad_of_segments(self, members: Tensor) -> Tensor:
        return torch.cat([outer.grad_of_segments(members) for _, outer in self._outers()])

    def compress_for(self, lookups: Sequence[tuple[Tensor, Segments]], sqnorm: Tensor) -> TiedHead:
        def columns(ids: Tensor, rows: slice | Tensor) -> Tensor:
            return self.g.columns(ids)[rows]

        return TiedHead.of(sqnorm, self.x, self.out, columns, self.segments, lookups)

    def bias_grads(self) -> PerSampleGrads:
        """Each segment's gradient of a bias."""
        run = find("segment_sum", self.x.device.type, self.backend)
        return PerSampleGrads(
            torch.cat([run(g, self.segments) for _, g in self.g.parts()], 1), self.segments, self.backend
        )

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        return self.g.saved_tensors

    def row_abs_sums(self) -> Tensor:
        return functools.reduce(torch.add, [outer.row_abs_sums() for _, outer in self._outers()])
