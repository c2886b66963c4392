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
class PerSampleGrads(GradientTerm):
    """A gradient small enough to be formed per segment: ``grads [S, *shape of the parameter]``."""

    grads: Tensor
    segments: Segments
    backend: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.grads.shape[1:])

    @property
    def like(self) -> Tensor:
        return self.grads

    def shaped(self, shape: Sequence[int]) -> PerSampleGrads:
        if self.grads.dim() == 1 + len(shape) == 2:
            return self
        return PerSampleGrads(self.grads.view(-1, *shape), self.segments, self.backend)

    @property
    def flat(self) -> Tensor:
        return self.grads if self.grads.dim() == 2 else self.grads.reshape(self.segments.count, -1)

    def sqnorm(self) -> Tensor:
        run = find("per_sample_sqnorm", self.grads.device.type, self.backend)
        return run(self.flat, self.segments)  # type: ignore[no-any-return]

    def wgrad(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        run = find("per_sample_wgrad", self.grads.device.type, self.backend)
        total, sqnorm = run(self.flat, self.segments, weight=weight)
        return total if self.grads.dim() == 2 else total.view(self.shape), sqnorm

    def grad(self, weight: Tensor | None = None) -> Tensor:
        total = self.grads.sum(0) if weight is None else torch.tensordot(weight.to(self.grads.dtype), self.grads, 1)
        return total.view(self.shape)

    def per_group(self, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        of_groups = self._of_groups()
        return of_groups if out is None else out.copy_(of_groups), self.sqnorm()

    def gram(self) -> Tensor:
        return gram_of(self._of_groups())

    def _of_groups(self) -> Tensor:
        return self.grads.new_zeros(self.group_shape).index_add_(0, self.segments.groups.levels[-1], self.grads)

    def grad_of_segments(self, members: Tensor) -> Tensor:
        return self.grads[members].sum(0)

    def per_segment(self) -> Tensor:
        return self.grads

    def without_views(self, views: Sequence[str], adjoint: Callable[[Tensor], Tensor]) -> PerSampleGrads:
        sums = torch.stack([adjoint(one) for one in self.grads.unbind(0)]) if len(self.grads) else self.grads
        return PerSampleGrads(sums, self.segments, self.backend)

    def merge(self, other: PerSampleGrads) -> PerSampleGrads:
        """The sums of both."""
        return PerSampleGrads(self.grads + other.grads, self.segments, self.backend)

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        return (self.grads,)

    def row_abs_sums(self) -> Tensor:
        return self.flat.abs().sum(1)

    def expand_to_rows(self, factor: Tensor) -> Tensor:
        return factor
