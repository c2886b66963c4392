"""Gradients that are small enough to be formed for every segment: biases, normalizations, small convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradnorm_ext.backends import find
from gradnorm_ext.gradients.rows import gram_of
from gradnorm_ext.segments import Segments


@dataclass(frozen=True)
class Sums:
    """A gradient small enough to be formed per segment: ``sums [S, *shape of the parameter]``."""

    sums: Tensor
    segments: Segments
    backend: str

    def shaped(self, shape: Sequence[int]) -> Sums:
        if self.sums.dim() == 1 + len(shape) == 2:
            return self
        return Sums(self.sums.view(-1, *shape), self.segments, self.backend)

    @property
    def flat(self) -> Tensor:
        return self.sums if self.sums.dim() == 2 else self.sums.reshape(self.segments.count, -1)

    def sqnorm(self) -> Tensor:
        run = find("sums_sqnorm", self.sums.device.type, self.backend)
        return run(self.flat, self.segments)  # type: ignore[no-any-return]

    def wgrad(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        run = find("sums_wgrad", self.sums.device.type, self.backend)
        total, sqnorm = run(self.flat, self.segments, weight=weight)
        return total if self.sums.dim() == 2 else total.view(self.sums.shape[1:]), sqnorm

    def total(self, weight: Tensor | None = None) -> Tensor:
        total = self.sums.sum(0) if weight is None else torch.tensordot(weight.to(self.sums.dtype), self.sums, 1)
        return total.view(self.sums.shape[1:])

    def by_new_group(self) -> tuple[Tensor, Tensor]:
        """As of `Outer`."""
        return self._of_tasks(), self.sqnorm()

    def gram(self) -> Tensor:
        return gram_of(self._of_tasks())

    def _of_tasks(self) -> Tensor:
        tasks, count = self.segments.groups.levels[-1], self.segments.groups.counts[-1]
        return self.sums.new_zeros(count, *self.sums.shape[1:]).index_add_(0, tasks, self.sums)

    def of_segments(self, segments: Tensor) -> Tensor:
        return self.sums[segments].sum(0)

    @property
    def kept(self) -> tuple[Tensor, ...]:
        return (self.sums,)

    def fingerprint(self) -> Tensor:
        return self.flat.abs().sum(1)
