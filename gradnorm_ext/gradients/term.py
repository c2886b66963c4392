"""What one use of a parameter adds to its gradient: the protocol of all forms."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from gradnorm_ext.gradients.rows import gram_of
from gradnorm_ext.gradients.tied import TiedHead
from gradnorm_ext.reference import accumulator
from gradnorm_ext.segments import Segments

if TYPE_CHECKING:
    from typing_extensions import Self


class GradientTerm(Protocol):
    """A gradient of rows that belong to segments, in the form in which its norms are cheapest.

    Forms are frozen dataclasses. S segments, K groups of the coarsest level (the tasks); *norms* are squared norms
    ``[columns]``: of every segment, then of the groups of each level.
    """

    segments: Segments
    compresses: ClassVar[bool] = False  # `compress_for` is there
    fuses_groups: ClassVar[bool] = False  # one product gives the gradients of all groups and all norms

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the gradient."""

    @property
    @abstractmethod
    def like(self) -> Tensor:
        """A tensor with the dtype and the device that the gradient is computed from."""

    @abstractmethod
    def sqnorm(self) -> Tensor:
        """The norms."""

    @abstractmethod
    def wgrad(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The gradient, of segments times ``weight [S]``, and the norms without it, from one pass."""

    def wgrad_in(self, dtype: torch.dtype, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`wgrad`, whose gradient is already rounded to ``dtype`` where the operation writes that; else it is as it was."""
        return self.wgrad(weight)

    @abstractmethod
    def grad(self, weight: Tensor | None = None) -> Tensor:
        """The gradient alone."""

    @abstractmethod
    def per_group(self, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``[K, *shape]``: the gradient of each group of the coarsest level, in ``out`` if given; and the norms."""

    @abstractmethod
    def grad_of_segments(self, members: Tensor) -> Tensor:
        """The gradient of the segments ``members``."""

    @property
    @abstractmethod
    def saved_tensors(self) -> tuple[Tensor, ...]:
        """What must not change until it is used."""

    @abstractmethod
    def row_abs_sums(self) -> Tensor:
        """Of each row the sum of the absolute values of its output gradient: what scales as the row does."""

    def expand_to_rows(self, factor: Tensor) -> Tensor:
        """A factor per segment as one per entry of `row_abs_sums`."""
        return self.segments.per_row(factor)

    def per_segment(self) -> Tensor:
        """``[S, *shape]``: each segment's gradient, one after the other where the form does not have them."""
        each = torch.arange(self.segments.count, device=self.like.device)
        if not len(each):
            return self.like.new_zeros(0, *self.shape)
        return torch.stack([self.grad_of_segments(one) for one in each.split(1)])

    def gram(self) -> Tensor:
        """``[K, K]``: inner products of the groups' gradients."""
        return gram_of(self.per_group()[0])

    def without_views(self, views: Sequence[str], adjoint: Callable[[Tensor], Tensor]) -> GradientTerm | None:
        """The term as one of the parameter that ``views`` lead from; None where that is not cheap."""
        return None

    def compress_for(self, lookups: Sequence[tuple[Tensor, Segments]], sqnorm: Tensor) -> TiedHead | None:
        """What the cross term with lookups of the same entries needs of this term, beside its norms; None: its rows."""
        return None

    def clone_saved(self) -> Self:
        """The same in memory of its own: a compiled graph writes over what it has no more use for."""
        fields: Any = self  # every form is a dataclass
        parts = {one.name: getattr(self, one.name) for one in dataclasses.fields(fields)}
        own = {name: part.clone() for name, part in parts.items() if isinstance(part, Tensor)}
        return dataclasses.replace(fields, **own)  # type: ignore[no-any-return]

    def empty_groups(self) -> Tensor:
        """Memory for `per_group`."""
        return self.like.new_empty(self.group_shape, dtype=accumulator(self.like.dtype))

    @property
    def group_shape(self) -> tuple[int, ...]:
        """Of what `per_group` gives."""
        return self.segments.groups.counts[-1], *self.shape
