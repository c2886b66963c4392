"""A gradient that only a backward pass of its own gives, where no form fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradnorm_ext.gradients.rows import chosen, gram_of, members_of_columns
from gradnorm_ext.segments import Segments


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

    def by_new_group(self) -> tuple[Tensor, Tensor]:
        """As of `Outer`."""
        return self._of_tasks(), self.norms()

    def gram(self) -> Tensor:
        return gram_of(self._of_tasks())

    def _of_tasks(self) -> Tensor:
        count = self.segments.groups.counts[-1]
        return torch.stack([self.of_segments(task) for task in members_of_columns(self.segments)[-count:]])

    def of_segments(self, segments: Tensor) -> Tensor:
        return self.pull(chosen(segments, self.segments))

    @property
    def kept(self) -> tuple[Tensor, ...]:
        return ()

    def fingerprint(self) -> Tensor:
        return self.sizes()
