"""Rows added to entries of a table: the gradient of an embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradnorm_ext.backends import find
from gradnorm_ext.gradients.rows import _size_of_rows, gram_of
from gradnorm_ext.segments import Segments


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
            g = g * self.segments.per_row(weight.to(g.dtype))[:, None]
        return g.new_zeros(self.vocabulary, g.shape[1]).index_add_(0, self.ids, g)

    def gram(self) -> Tensor:
        """Only the entries that were looked up have a gradient."""
        looked_up, ids = torch.unique(self.ids, return_inverse=True)
        run = find("lookup_wgrad", self.g.device.type, self.backend)
        tasks, count = self.segments.groups.levels[-1], self.segments.groups.counts[-1]
        rows = ids, self.live_g, len(looked_up), self.segments
        return gram_of(run(*rows, outputs=tasks, n_outputs=count)[0])

    def by_new_group(self) -> tuple[Tensor, Tensor]:
        """As of `Outer`."""
        run = find("lookup_wgrad", self.g.device.type, self.backend)
        tasks, count = self.segments.groups.levels[-1], self.segments.groups.counts[-1]
        rows = self.ids, self.live_g, self.vocabulary, self.segments
        return run(*rows, outputs=tasks, n_outputs=count)  # type: ignore[no-any-return]

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
