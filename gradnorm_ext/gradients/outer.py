"""Outer products of rows: the weight gradient of a linear layer, whole or for some columns at a time."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gradnorm_ext import reference
from gradnorm_ext.backends import find, serves
from gradnorm_ext.gradients.per_sample import Sums
from gradnorm_ext.gradients.rows import _size_of_rows, gram_of
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

    @property
    def shape(self) -> tuple[int, ...]:
        return self.g.shape[1], self.x.shape[1]

    def by_group(self, out: Tensor) -> Tensor:
        """The norms; the gradient of each group of the coarsest level goes to ``out``, ``[groups, *shape]``."""
        run = find("outer_wgrad", self.x.device.type, self.backend)
        tasks, count = self.segments.groups.levels[-1], self.segments.groups.counts[-1]
        return run(self.x, self.g, self.segments, outputs=tasks, n_outputs=count, out=out)[1]  # type: ignore[no-any-return]

    def total(self, weight: Tensor | None = None) -> Tensor:
        where = "outer_sum", self.x.device.type, self.backend
        run = find(*where) if serves(*where) else reference.outer_sum
        return run(self.x, self.g, self.segments, weight=weight)

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

    def entries(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Of these rows' gradient the entries that a lookup of ``ids`` shares with it."""
        return self.g[rows][:, ids].t() @ self.x[rows]

    @property
    def kept(self) -> tuple[Tensor, ...]:
        return self.x, self.g

    def fingerprint(self) -> Tensor:
        return _size_of_rows(self.x if self.swapped else self.g)


class FormedColumns(Protocol):
    """An output gradient ``[rows, out]`` that is formed for some columns at a time, in parts that cover all of them."""

    def parts(self) -> Iterator[tuple[slice, Tensor]]: ...

    def columns(self, ids: Tensor) -> Tensor: ...

    @property
    def kept(self) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class Parted:
    """An `Outer` whose output gradient is never there as a whole.

    Different columns of it make different rows of the gradient: squared norms and inner products of the parts add up.
    """

    x: Tensor
    g: FormedColumns
    out: int
    segments: Segments
    backend: str

    def _outers(self) -> Iterator[tuple[slice, Outer]]:
        for part, g in self.g.parts():
            yield part, Outer(self.x, g, self.segments, self.backend)

    def sqnorm(self) -> Tensor:
        return functools.reduce(torch.add, [outer.sqnorm() for _, outer in self._outers()])

    def wgrad(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        totals, sqnorms = zip(*(outer.wgrad(weight) for _, outer in self._outers()), strict=True)
        return torch.cat(totals), functools.reduce(torch.add, sqnorms)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.out, self.x.shape[1]

    def by_group(self, out: Tensor) -> Tensor:
        """As of `Outer`."""
        sqnorms = []
        for part, outer in self._outers():
            of_groups, sqnorm = outer.by_new_group()
            out[:, part] = of_groups
            sqnorms.append(sqnorm)
        return functools.reduce(torch.add, sqnorms)

    def by_new_group(self) -> tuple[Tensor, Tensor]:
        """As of `Outer`."""
        out = self.x.new_empty(self.segments.groups.counts[-1], *self.shape, dtype=accumulator(self.x.dtype))
        return out, self.by_group(out)

    def total(self, weight: Tensor | None = None) -> Tensor:
        return torch.cat([outer.total(weight) for _, outer in self._outers()])

    def gram(self) -> Tensor:
        return functools.reduce(torch.add, [outer.gram() for _, outer in self._outers()])

    def of_column(self, rows: Tensor) -> Tensor:
        return torch.cat([outer.of_column(rows) for _, outer in self._outers()])

    def entries(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Of these rows' gradient the entries that a lookup of ``ids`` shares with it."""
        return self.g.columns(ids)[rows].t() @ self.x[rows]

    def row_sums(self) -> Sums:
        """Each segment's gradient of a bias."""
        run = find("sum_sums", self.x.device.type, self.backend)
        return Sums(torch.cat([run(g, self.segments) for _, g in self.g.parts()], 1), self.segments, self.backend)

    @property
    def kept(self) -> tuple[Tensor, ...]:
        return self.g.kept

    def fingerprint(self) -> Tensor:
        return functools.reduce(torch.add, [outer.fingerprint() for _, outer in self._outers()])
