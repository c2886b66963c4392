"""A policy for pairs of a chosen and a rejected example, as in direct preference optimization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from gradnorm_ext.policies.policy import Stateful

if TYPE_CHECKING:
    from gradnorm_ext.stats import Stats

SPACES = ("probability", "parameter")


@dataclass(frozen=True)
class PairBalance(Stateful):
    """Chosen and rejected examples of a DPO pair pull equally hard: ``[B]`` weights whose mean is 1 in every pair.

        w_chosen = 2 ρ / (1 + ρ),    w_rejected = 2 / (1 + ρ),    ρ within [1 / clip, clip]

        "parameter":    ρ = ‖g_rejected‖ / ‖g_chosen‖         both then have one gradient norm
        "probability":  ρ = π_chosen / π_rejected             of the probabilities per token, exp(mean log-probability)

    A pair's two log-probabilities have gradients of opposite sign and one factor in DPO's loss, so that only ρ tells how
    hard each is pulled. In the space of probabilities the plain loss pulls the rejected one harder by
    π_chosen / π_rejected; evening that out is the idea of AdaDPO (arXiv 2605.28440). In the space of parameters the
    ratio is that of the gradients, which nobody has published: derived for this package. So is the normalisation to a
    mean of 1, and the factor σ(-margin) stays the plain loss's.

    The first half of the batch is the chosen examples, the second half the rejected ones in the same order, as in TRL.
    A pair of which a norm is 0 or a figure is not finite gets ones.

    Args:
        space: where to balance. "probability" is fed inside the observe block: ``policy.feed(log_probability)``.
        clip: how far from 1 the ratio may go, a number >= 1.

    Raises:
        ValueError: another space or clip; when called, an odd number of examples, or log-probabilities of another
            number of examples.
        RuntimeError: "probability" where nothing was fed since the last call.

    Example:
        >>> from types import SimpleNamespace
        >>> PairBalance("parameter")(SimpleNamespace(example_norm=torch.tensor([1., 8., 1.5, 4.])))
        tensor([1.2000, 0.6667, 0.8000, 1.3333])
    """

    space: Literal["probability", "parameter"]
    clip: float = 2.0
    weighs: ClassVar[Literal["tasks", "examples"]] = "examples"

    def __post_init__(self) -> None:
        if self.space not in SPACES:
            raise ValueError(f"PairBalance: space must be one of {', '.join(SPACES)}, got {self.space!r}")
        if not self.clip >= 1:
            raise ValueError(f"PairBalance: clip must be a number >= 1, got {self.clip!r}; 2 lets ρ be 1/2 to 2")

    def feed(self, log_probability: Tensor) -> None:
        """``[B]``: the mean log-probability of each example's tokens in the block under way."""
        self.state.fed = (log_probability.detach(),)

    def __call__(self, stats: Stats) -> Tensor:
        norm = stats.example_norm
        if len(norm) % 2:
            raise ValueError(
                f"PairBalance: the batch must be pairs, the chosen examples and then the rejected, got {len(norm)} "
                "examples; leave no example without its other"
            )
        if self.space == "parameter":
            chosen, rejected = norm.chunk(2)
            ratio = torch.where((chosen > 0) & (rejected > 0), rejected / chosen, torch.nan)
        else:
            (log_probability,) = self.state.take("PairBalance", "feed(log_probability)")
            if log_probability.shape != norm.shape:
                raise ValueError(
                    f"PairBalance: log_probability must be {list(norm.shape)}, one per example, got "
                    f"{list(log_probability.shape)}; feed the mean over each example's tokens"
                )
            chosen, rejected = log_probability.to(norm).chunk(2)
            ratio = (chosen - rejected).exp()
        known = chosen.isfinite() & rejected.isfinite() & ~ratio.isnan()
        ratio = torch.where(known, ratio, 1).clamp(1 / self.clip, self.clip)
        return torch.cat([2 * ratio / (1 + ratio), 2 / (1 + ratio)])
