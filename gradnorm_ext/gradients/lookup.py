"""Rows added to entries of a table: the gradient of an embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradnorm_ext.backends import find
from gradnorm_ext.gradients.rows import concat_rows, gram_of, row_abs_sums, rows_of
from gradnorm_ext.gradients.term import GradientTerm
from gradnorm_ext.segments import Segments


@dataclass(frozen=True)
class Lookup(GradientTerm):
    """An embedding table's gradient, ``dw[ids[r]] += g[r]``, shaped ``[vocabulary, g's width]``."""

    ids: Tensor
    g: Tensor
    vocabulary: int
    padding_idx: int | None
    segments: Segments
    backend: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.vocabulary, self.g.shape[1]

    @property
    def like(self) -> Tensor:
        return self.g

    def sqnorm(self) -> Tensor:
        run = find("lookup_sqnorm", self.g.device.type, self.backend)
        return run(self.ids, self.g, self.vocabulary, self.segments, padding_idx=self.padding_idx)  # type: ignore[no-any-return]

    def wgrad(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        run = find("lookup_wgrad", self.g.device.type, self.backend)
        rows = self.ids, self.g, self.vocabulary, self.segments
        return run(*rows, padding_idx=self.padding_idx, weight=weight)  # type: ignore[no-any-return]

    def grad(self, weight: Tensor | None = None) -> Tensor:
        g = self.live_g
        if weight is not None:
            g = g * self.segments.per_row(weight.to(g.dtype), len(g))[:, None]
        return g.new_zeros(self.shape).index_add_(0, self.ids, g)

    def gram(self) -> Tensor:
        """Only the entries that were looked up have a gradient."""
        looked_up, ids = torch.unique(self.ids, return_inverse=True)
        return gram_of(self._of_groups(ids, len(looked_up))[0])

    def per_group(self, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        of_groups, sqnorm = self._of_groups(self.ids, self.vocabulary)
        return of_groups if out is None else out.copy_(of_groups), sqnorm

    def _of_groups(self, ids: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
        run = find("lookup_wgrad", self.g.device.type, self.backend)
        tasks, count = self.segments.groups.levels[-1], self.segments.groups.counts[-1]
        return run(ids, self.live_g, vocabulary, self.segments, outputs=tasks, n_outputs=count)  # type: ignore[no-any-return]

    def grad_of_segments(self, members: Tensor) -> Tensor:
        rows = rows_of(members, self.segments)
        g = self.live_g[rows]
        return g.new_zeros(self.shape).index_add_(0, self.ids[rows], g)

    @property
    def live_g(self) -> Tensor:
        """The output gradient without the rows of the padding entry, which learns nothing."""
        return self.g if self.padding_idx is None else self.g.masked_fill((self.ids == self.padding_idx)[:, None], 0)

    def merge(self, other: Lookup) -> Lookup:
        """The rows of both, without those of each one's own padding entry."""
        segments, join = concat_rows(self.segments, other.segments)
        ids, g = join(self.ids, other.ids), join(self.live_g, other.live_g)
        return Lookup(ids, g, self.vocabulary, None, segments, self.backend)

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        return self.ids, self.g

    def row_abs_sums(self) -> Tensor:
        return row_abs_sums(self.g)
