"""A gradient that only a backward pass of its own gives, where no form fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradnorm_ext.gradients.rows import gram_of, group_members, one_hot_mask
from gradnorm_ext.gradients.term import GradientTerm
from gradnorm_ext.segments import Segments


@dataclass(frozen=True)
class Pullback(GradientTerm):
    """A gradient that only a backward pass knows: one pass for each sum of examples that is asked for.

    ``vjp(weight [B] or None)`` gives the gradient of the weighted sum of the examples; ``norms()`` all squared norms, in
    one sweep for all parameters of the function; ``sizes [B]``: how large each example's output gradient is.
    """

    vjp: Callable[[Tensor | None], Tensor]
    norms: Callable[[], Tensor]
    sizes: Callable[[], Tensor]
    parameter: Tensor
    segments: Segments

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.parameter.shape)

    @property
    def like(self) -> Tensor:
        return self.parameter

    def sqnorm(self) -> Tensor:
        return self.norms()

    def wgrad(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.vjp(weight), self.norms()

    def grad(self, weight: Tensor | None = None) -> Tensor:
        return self.vjp(weight)

    def per_group(self, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        of_groups = self._of_groups()
        return of_groups if out is None else out.copy_(of_groups), self.norms()

    def gram(self) -> Tensor:
        return gram_of(self._of_groups())

    def _of_groups(self) -> Tensor:
        count = self.segments.groups.counts[-1]
        return torch.stack([self.grad_of_segments(group) for group in group_members(self.segments)[-count:]])

    def grad_of_segments(self, members: Tensor) -> Tensor:
        return self.vjp(one_hot_mask(members, self.segments))

    def clone_saved(self) -> Pullback:
        return self

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        return ()

    def row_abs_sums(self) -> Tensor:
        return self.sizes()

    def expand_to_rows(self, factor: Tensor) -> Tensor:
        return factor
