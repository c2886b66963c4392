"""How to weigh the tasks or examples of a step: a policy is any function from statistics to weights.

A policy is called with a :class:`~gradnorm_ext.stats.Stats` and returns a tensor of weights, by which the gradients are
multiplied before they are added up; weights of one leave the step as it was. Its attribute ``weighs`` says what of:
"tasks", ``[K]``, or "examples", ``[B]``. A plain function without the attribute weighs tasks:

    def by_hand(stats):
        return stats.task_norm.new_tensor([1.0, 0.5])

The ones here wait for no device. A norm that is not finite never becomes a weight: the example or task gets 1, and
skipping the step is left to the optimizer, which sees the norms too.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gradnorm_ext.stats import Stats

Policy: TypeAlias = "Callable[[Stats], Tensor]"
WEIGHS = ("tasks", "examples")


@dataclass(frozen=True)
class Equal:
    """Weights of one for every task: w_k = 1, ``[K]``. The step is as it would be without a policy.

    Example:
        >>> from types import SimpleNamespace
        >>> Equal()(SimpleNamespace(example_norm=torch.tensor([3., 1., 4.]), task_count=torch.tensor([2, 1])))
        tensor([1., 1.])
    """

    weighs: ClassVar[Literal["tasks", "examples"]] = "tasks"

    def __call__(self, stats: Stats) -> Tensor:
        return stats.example_norm.new_ones(stats.task_count.shape)


@dataclass(frozen=True)
class InverseNorm:
    """Tasks with large gradients count less: ``[K]`` weights of mean 1 over the tasks that are present.

        w_k = d_k^(-power) / mean over present j of d_j^(-power)        d = stats.task_norm

    ``power=1`` gives every task a gradient of one norm, ``power=0`` leaves the step as it was. Only the ratios of the
    norms matter. A task is present if it has examples and its norm is neither zero nor infinite nor NaN; the others
    get 1, and so do all where none is present. The common inverse-norm rule of multi-task learning, of no one paper.

    Args:
        power: how strongly norms are evened out, a finite number >= 0.

    Raises:
        ValueError: another power.

    Example:
        >>> from types import SimpleNamespace
        >>> stats = SimpleNamespace(task_norm=torch.tensor([3., 1., 0.]), task_count=torch.tensor([8, 8, 0]))
        >>> InverseNorm()(stats)
        tensor([0.5000, 1.5000, 1.0000])
    """

    power: float = 1.0
    weighs: ClassVar[Literal["tasks", "examples"]] = "tasks"

    def __post_init__(self) -> None:
        _check("InverseNorm", "power", self.power, advice="1 evens the norms out, 0 leaves them")

    def __call__(self, stats: Stats) -> Tensor:
        norm = stats.task_norm
        if norm is None:
            raise ValueError(
                "InverseNorm: stats.task_norm must have been measured, got None; "
                'let the policy weigh "tasks", or give the meter more than one task'
            )
        present = (norm > 0) & norm.isfinite() & (stats.task_count > 0)
        least = torch.where(present, norm, torch.inf).min()
        raw = torch.where(present, (least / norm) ** self.power, 0)  # from 0 to 1: nothing overflows
        return torch.where(present, raw * (present.sum() / raw.sum()), 1)


@dataclass(frozen=True)
class ClipExamples:
    """No example contributes more than a given norm: ``[B]`` weights of at most 1.

        w_i = min(1, max_norm / ‖g_i‖)        g_i = the example's contribution to .grad

    The clipping of DP-SGD (Abadi et al., arXiv 1607.00133), without its noise. A zero norm gets 1.

    Args:
        max_norm: the bound, in the units of ``stats.example_norm``: where the loss is a mean over the batch,
            ``‖g_i‖`` holds a factor of one over its size. A number > 0; infinity clips nothing.

    Raises:
        ValueError: another bound.

    Example:
        >>> from types import SimpleNamespace
        >>> ClipExamples(2.0)(SimpleNamespace(example_norm=torch.tensor([0., 1., 8.])))
        tensor([1.0000, 1.0000, 0.2500])
    """

    max_norm: float
    weighs: ClassVar[Literal["tasks", "examples"]] = "examples"

    def __post_init__(self) -> None:
        _check(
            "ClipExamples",
            "max_norm",
            self.max_norm,
            above=True,
            infinite=True,
            advice="a quantile of stats.example_norm is a start",
        )

    def __call__(self, stats: Stats) -> Tensor:
        norm = stats.example_norm
        clipped = (norm > self.max_norm) & norm.isfinite()  # max_norm / max_norm need not round to 1
        return torch.where(clipped, (self.max_norm / norm).clamp(max=1), 1)


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
        _check("RewardStd", "power", self.power, advice="0 only filters by the threshold")
        _check("RewardStd", "threshold", self.threshold, advice="0 drops only prompts whose rewards are equal")

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


def weighs_of(policy: Any) -> Literal["tasks", "examples"]:
    """What a policy's weights are of: its attribute ``weighs``, "tasks" where it has none.

    Raises:
        TypeError: the policy cannot be called, or is a class rather than one of its objects.
        ValueError: ``weighs`` is neither "tasks" nor "examples".

    Example:
        >>> weighs_of(ClipExamples(1.0)), weighs_of(lambda stats: torch.ones_like(stats.task_norm))
        ('examples', 'tasks')
    """
    if isinstance(policy, type):
        name = policy.__name__
        raise TypeError(f"policy: must be an object that can be called, got the class {name}; write {name}(...)")
    if not callable(policy):
        raise TypeError(
            f"policy: must be a function from statistics to weights, got {policy!r}; pass one of gradnorm_ext.policies"
        )
    weighs = getattr(policy, "weighs", "tasks")
    if weighs == "tasks":
        return "tasks"
    if weighs == "examples":
        return "examples"
    raise ValueError(f"policy: weighs must be one of {', '.join(WEIGHS)}, got {weighs!r}; set it to what it weighs")


def _check(policy: str, name: str, value: Any, *, advice: str, above: bool = False, infinite: bool = False) -> None:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (number and (value > 0 if above else value >= 0) and (infinite or value < math.inf)):
        kind = "a number" if infinite else "a finite number"
        raise ValueError(f"{policy}: {name} must be {kind} {'>' if above else '>='} 0, got {value!r}; {advice}")
