"""Gradients that are small enough to be formed for every segment: biases, normalizations, small convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradnorm_ext.backends import find
from gradnorm_ext.gradients.rows import gram_of
from gradnorm_ext.gradients.term import GradientTerm
from gradnorm_ext.segments import Segments


@dataclass(frozen=True)
class Sums(GradientTerm):
    """A gradient small enough to be formed per segment: ``sums [S, *shape of the parameter]``."""

    sums: Tensor
    segments: Segments
    backend: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.sums.shape[1:])

    @property
    def like(self) -> Tensor:
        return self.sums

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
        return total if self.sums.dim() == 2 else total.view(self.shape), sqnorm

    def total(self, weight: Tensor | None = None) -> Tensor:
        total = self.sums.sum(0) if weight is None else torch.tensordot(weight.to(self.sums.dtype), self.sums, 1)
        return total.view(self.shape)

    def per_group(self, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        of_groups = self._of_groups()
        return of_groups if out is None else out.copy_(of_groups), self.sqnorm()

    def gram(self) -> Tensor:
        return gram_of(self._of_groups())

    def _of_groups(self) -> Tensor:
        return self.sums.new_zeros(self.group_shape).index_add_(0, self.segments.groups.levels[-1], self.sums)

    def of_segments(self, members: Tensor) -> Tensor:
        return self.sums[members].sum(0)

    def per_segment(self) -> Tensor:
        return self.sums

    def undo_views(self, views: Sequence[str], adjoint: Callable[[Tensor], Tensor]) -> Sums:
        sums = torch.stack([adjoint(one) for one in self.sums.unbind(0)]) if len(self.sums) else self.sums
        return Sums(sums, self.segments, self.backend)

    def joined(self, other: Sums) -> Sums:
        """The sums of both."""
        return Sums(self.sums + other.sums, self.segments, self.backend)

    @property
    def kept(self) -> tuple[Tensor, ...]:
        return (self.sums,)

    def fingerprint(self) -> Tensor:
        return self.flat.abs().sum(1)

    def expand(self, factor: Tensor) -> Tensor:
        return factor
