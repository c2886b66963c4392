"""Policies by the rewards of sampled groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from gradnorm_ext.policies.policy import Stateful, check_number

if TYPE_CHECKING:
    from gradnorm_ext.stats import Stats


@dataclass(frozen=True)
class RewardStd:
    """Examples count by how much the rewards of their prompt vary: ``[B]`` weights of mean 1 over all examples.

        w_i = u_i / mean_j u_j,    u_i = std_i^power where std_i > threshold, else 0

    ``std_i`` is the standard deviation of the rewards of example i's prompt; where it is undefined (a group of one, a
    NaN reward) u_i is 0. Where every u_i is 0 the batch says nothing about how to weigh, and all weights are 1: zeros
    would still let an optimizer decay weights and follow its momentum. ``power=0`` only filters. Derived for this
    package from the bound of the policy gradient by the reward's standard deviation (Razin et al., arXiv 2503.15477);
    no paper's formula.

    Args:
        power: a finite number >= 0.
        threshold: in the rewards' units, a finite number >= 0.

    Raises:
        ValueError: another power or threshold; when called, statistics without rewards.

    Example:
        >>> from types import SimpleNamespace
        >>> reward = SimpleNamespace(std=torch.tensor([0.5, 0., 0.25]), prompt_of=torch.tensor([0, 0, 1, 1, 2, 2]))
        >>> RewardStd()(SimpleNamespace(reward=reward, example_norm=torch.ones(6)))
        tensor([2., 2., 0., 0., 1., 1.])
    """

    power: float = 1.0
    threshold: float = 0.0
    weighs: ClassVar[Literal["tasks", "examples"]] = "examples"

    def __post_init__(self) -> None:
        check_number("RewardStd", "power", self.power, advice="0 only filters by the threshold")
        check_number("RewardStd", "threshold", self.threshold, advice="0 drops only prompts whose rewards are equal")

    def __call__(self, stats: Stats) -> Tensor:
        if stats.reward is None:
            raise ValueError(
                "RewardStd: the statistics must hold rewards, got None; pass rewards= and prompts= to observe"
            )
        std = stats.reward.std[stats.reward.prompt_of].to(stats.example_norm, non_blocking=True)  # perhaps on the host
        live = (std > self.threshold) & std.isfinite()
        largest = torch.where(live, std, 0).max()
        raw = torch.where(live, (std / largest) ** self.power, 0)  # from 0 to 1: nothing overflows
        return torch.where(
            live.any(), raw * (raw.new_full((), len(raw)) / raw.sum()), 1
        )  # a tensor: number / tensor rounds twice


@dataclass(frozen=True)
class MTGRPO(Stateful):
    """Tasks whose rewards are low and do not rise count more: ``[K]`` weights of mean 1.

        s_k = I_k + level · J_k        J_k = stats.reward.task_mean,  I_k = J_k - J_k of the last step
        ξ_k ← ξ_k - rate · z_k (s_k - z·s)        z = softmax ξ,  w = K z

    The reweighting of MT-GRPO (arXiv 2602.05547); its I is the improvement of a task, of which the change since the last
    step is this package's reading. The paper pairs it with a sampler that keeps the tasks' shares after
    prompts with equal rewards are dropped: :class:`~gradnorm_ext.sampling.TaskSampler`. A task without a reward in a
    step keeps its ξ and the reward it had. No weight depends on an offset of all rewards.

    Args:
        rate: β of the paper, a finite number > 0.
        level: λ of the paper: how much a low reward counts beside one that does not rise; a finite number >= 0.

    Raises:
        ValueError: another rate or level; when called, statistics without rewards, a state of another number of tasks.

    Example:
        >>> from types import SimpleNamespace
        >>> reward = SimpleNamespace(task_mean=torch.tensor([0.2, 0.8]))
        >>> MTGRPO(rate=4.0, level=1.0)(SimpleNamespace(reward=reward, example_norm=torch.ones(4),
        ...                                             finite=torch.tensor(True)))
        tensor([1.5370, 0.4630])
    """

    rate: float
    level: float
    weighs: ClassVar[Literal["tasks", "examples"]] = "tasks"

    def __post_init__(self) -> None:
        check_number("MTGRPO", "rate", self.rate, above=True, advice="1 is a start for rewards from 0 to 1")
        check_number("MTGRPO", "level", self.level, advice="0 looks at the rise of rewards alone")

    def __call__(self, stats: Stats) -> Tensor:
        if stats.reward is None:
            raise ValueError(
                "MTGRPO: the statistics must hold rewards, got None; pass rewards= and prompts= to observe"
            )
        level = stats.reward.task_mean.to(stats.example_norm, non_blocking=True)  # perhaps on the host
        last = self.state.get("MTGRPO", "last", torch.full_like(level, torch.nan))
        xi = self.state.get("MTGRPO", "xi", torch.zeros_like(level))
        known = level.isfinite()
        rise = torch.where(last.isnan(), 0, level - last)
        score = torch.where(known, rise + self.level * level, 0)
        z = torch.where(known, xi.softmax(0), 0)
        common = (z * score).sum() / z.sum()
        moved = torch.where(known, xi - self.rate * z * (score - common), xi)
        self.state.update(stats.finite, last=torch.where(known, level, last), xi=moved - moved.max())
        return len(xi) * self.state.tensors["xi"].softmax(0)
