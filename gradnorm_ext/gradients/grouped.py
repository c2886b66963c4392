"""Outer products of rows that are routed to experts: the gradients of a mixture's matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradnorm_ext.backends import find
from gradnorm_ext.gradients.rows import one_hot_mask, row_abs_sums
from gradnorm_ext.gradients.term import GradientTerm
from gradnorm_ext.segments import Groups, Segments


@dataclass(frozen=True)
class ExpertRouting:
    """Which expert and example each row belongs to, the rows in the order of experts and, of each, of examples.

    Attributes:
        expert: ``[rows]``.
        ends: ``[experts]`` int32: where each expert's rows end.
        segments: the (expert, example) pairs, ``[experts · B]``; its groups pair experts with prompts and tasks.
        by_expert: the same with one coarser level, the experts.
    """

    expert: Tensor
    ends: Tensor
    segments: Segments
    by_expert: Segments
    experts: int

    @staticmethod
    def of(expert: Tensor, owner: Tensor, experts: int, groups: Groups) -> ExpertRouting:
        count, device = len(groups.walk), expert.device
        pairs = experts * count
        which = torch.arange(experts, device=device)
        lengths = torch.zeros(pairs, dtype=torch.int64, device=device)
        lengths.index_add_(0, expert * count + owner, torch.ones_like(expert))
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        levels = [
            ((which[:, None] * size + ids).flatten(), experts * size)
            for ids, size in zip(groups.levels, groups.counts, strict=True)
        ]
        coarser = [*levels, (which.repeat_interleave(count), experts)]
        return ExpertRouting(
            expert,
            offsets[count::count].to(torch.int32),
            Segments(offsets, None, Groups.of(pairs, levels, device)),
            Segments(offsets, None, Groups.of(pairs, coarser, device)),
            experts,
        )


@dataclass(frozen=True)
class GroupedOuter(GradientTerm):
    """Gradients of experts' matrices, each of the rows that were routed there: ``[experts, g's width, x's width]``.

    ``segments``: of the examples alone. Swapped as of `Outer`.
    """

    fuses_groups = True

    x: Tensor
    g: Tensor
    routing: ExpertRouting
    segments: Segments
    backend: str
    swapped: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.routing.experts, self.g.shape[1], self.x.shape[1]

    @property
    def like(self) -> Tensor:
        return self.x

    def sqnorm(self) -> Tensor:
        run = find("outer_sqnorm", self.x.device.type, self.backend)
        return self._over_experts(run(self.x, self.g, self.routing.segments))

    def wgrad(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        run = find("outer_wgrad", self.x.device.type, self.backend)
        pairs, experts = self.routing.by_expert, self.routing.experts
        of_pair = None if weight is None else weight.repeat(experts)
        of_expert = pairs.groups.levels[-1]
        total, sqnorm = run(self.x, self.g, pairs, weight=of_pair, outputs=of_expert, n_outputs=experts)
        return total, self._over_experts(sqnorm)

    def _over_experts(self, sqnorm: Tensor) -> Tensor:
        counts = self.segments.count, *self.segments.groups.counts
        of_pairs = sqnorm[: self.routing.experts * sum(counts)].split([self.routing.experts * n for n in counts])
        return torch.cat([level.view(self.routing.experts, -1).sum(0) for level in of_pairs])

    def grad(self, weight: Tensor | None = None) -> Tensor:
        return self.wgrad(weight)[0]

    def per_group(self, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        run, pairs = find("outer_wgrad", self.x.device.type, self.backend), self.routing.segments
        totals, sqnorm = run(self.x, self.g, pairs, outputs=pairs.groups.levels[-1], n_outputs=pairs.groups.counts[-1])
        out = self.empty_groups() if out is None else out
        out.copy_(totals.unflatten(0, (self.routing.experts, -1)).transpose(0, 1))
        return out, self._over_experts(sqnorm)

    def grad_of_segments(self, members: Tensor) -> Tensor:
        return self.grad(one_hot_mask(members, self.segments).to(self.g.dtype))

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        return self.x, self.g

    def row_abs_sums(self) -> Tensor:
        return row_abs_sums(self.x if self.swapped else self.g)

    def expand_to_rows(self, factor: Tensor) -> Tensor:
        return self.routing.segments.per_row(factor.repeat(self.routing.experts))
