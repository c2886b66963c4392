"""Policies by the size of gradients: of tasks, and of examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from gradnorm_ext.policies.policy import Stateful, check_number, task_norm_of

if TYPE_CHECKING:
    from gradnorm_ext.stats import Stats


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
        check_number("InverseNorm", "power", self.power, advice="1 evens the norms out, 0 leaves them")

    def __call__(self, stats: Stats) -> Tensor:
        norm = task_norm_of("InverseNorm", stats)
        present = (norm > 0) & norm.isfinite() & (stats.task_count > 0)
        least = torch.where(present, norm, torch.inf).min()
        raw = torch.where(present, (least / norm) ** self.power, 0)  # from 0 to 1: nothing overflows
        return torch.where(present, raw * (present.sum() / raw.sum()), 1)


@dataclass(frozen=True)
class GradNorm(Stateful):
    """Tasks that learn slowly get larger gradients: ``[K]`` weights of mean 1, which move a little at every step.

        L = Σ_k | w_k d_k - target_k |        target_k = mean_j(w_j d_j) · r_k^alpha, held constant
        w ← max(0, w - rate · ∂L/∂w / mean_j d_j),  then divided by its mean

    ``d = stats.task_norm``, and r_k is the relative inverse training rate: the loss of task k over its first loss,
    divided by the mean of that over the tasks. GradNorm (Chen et al., arXiv 1711.02257). The paper takes the step with
    the network's optimizer, which the size of L hardly matters to; here the division by the mean norm sees to that, and
    ``d`` is of all parameters rather than of the last shared layer. Its losses say little in reinforcement learning,
    where progress is in the rewards; with ``best`` the loss is ``best - stats.reward.task_mean`` (a choice of this
    package), without it losses are fed:

        with optimizer.observe(tasks=tasks):
            losses = ...                                # [K], NaN for a task that is absent
            policy.feed(losses.detach())
            losses.nansum().backward()

    A task that is absent keeps its weight and its rate. Scaling all gradients, or one task's losses, changes nothing.

    Args:
        alpha: how strongly the slow are favoured, a finite number >= 0; 0 evens the norms out.
        rate: how far weights move in a step, a finite number > 0.
        best: the reward of a task that is solved; None: losses are fed.
        decay: how much of the running mean of a task's loss a step keeps, in [0, 1); 0, as in the paper, takes the
            loss of the batch. For noisy rewards.

    Raises:
        ValueError: another alpha, rate or decay; when called, statistics without task norms, or without rewards where
            ``best`` was given; a state of another number of tasks.
        RuntimeError: called without ``best`` where nothing was fed since the last call.

    Example:
        >>> from types import SimpleNamespace
        >>> policy = GradNorm(alpha=0.0, rate=0.1)
        >>> policy.feed(torch.tensor([2., 2.]))
        >>> policy(SimpleNamespace(task_norm=torch.tensor([3., 1.]), task_count=torch.tensor([4, 4]),
        ...                        finite=torch.tensor(True)))
        tensor([0.8947, 1.1053])
    """

    alpha: float = 1.5
    rate: float = 0.025
    best: float | None = None
    decay: float = 0.0
    weighs: ClassVar[Literal["tasks", "examples"]] = "tasks"

    def __post_init__(self) -> None:
        check_number("GradNorm", "alpha", self.alpha, advice="0 evens the norms out, 1.5 favours the slow")
        check_number("GradNorm", "rate", self.rate, above=True, advice="0.025 takes tens of steps")
        check_number("GradNorm", "decay", self.decay, advice="0 takes every batch's loss as it is")
        if self.decay >= 1:
            raise ValueError(f"GradNorm: decay must lie in [0, 1), got {self.decay}; 0.9 averages over ten steps")

    def feed(self, losses: Tensor) -> None:
        """The losses of the tasks, ``[K]``, in the block under way; NaN where a task is absent."""
        self.state.fed = (losses.detach(),)

    def __call__(self, stats: Stats) -> Tensor:
        norm = task_norm_of("GradNorm", stats)
        loss = self._losses(stats).to(norm, non_blocking=True)
        if loss.shape != norm.shape:
            raise ValueError(f"GradNorm: losses must be {list(norm.shape)}, one per task, got {list(loss.shape)}")
        known = (stats.task_count > 0) & loss.isfinite()

        unknown = torch.full_like(norm, torch.nan)
        first, level = (self.state.get("GradNorm", name, unknown) for name in ("first", "level"))
        seen = ~first.isnan()
        level = torch.where(known, torch.where(seen, self.decay * level + (1 - self.decay) * loss, loss), level)
        first = torch.where(known & ~seen, loss, first)
        progress = (level / first).clamp(min=0)  # a reward above `best` is as good as the best
        tells = progress.isfinite()
        relative = progress * tells.sum() / torch.where(tells, progress, 0).sum()
        relative = torch.where(relative.isfinite(), relative, 1)

        weights = self.state.get("GradNorm", "weights", torch.ones_like(norm))
        present = (stats.task_count > 0) & norm.isfinite()
        size, mean = torch.where(present, norm, 0), _mean(norm, present)
        gap = weights * size - _mean(weights * size, present) * relative**self.alpha
        moved = (weights - self.rate * gap.sign() * size / mean).clamp(min=0)
        moved = torch.where(present & moved.isfinite(), moved, weights)
        moved = torch.where(moved.sum() > 0, moved * (len(moved) / moved.sum()), 1)
        self.state.update(stats.finite, first=first, level=level, weights=moved)
        return self.state.tensors["weights"]

    def _losses(self, stats: Stats) -> Tensor:
        if self.best is None:
            return self.state.take("GradNorm", "feed(losses)")[0]
        if stats.reward is None:
            raise ValueError(
                "GradNorm: with best= the statistics must hold rewards, got None; "
                "pass rewards= and prompts= to observe, or feed losses"
            )
        return self.best - stats.reward.task_mean


def _mean(values: Tensor, present: Tensor) -> Tensor:
    return torch.where(present, values, 0).sum() / present.sum()


@dataclass(frozen=True)
class PiKE(Stateful):
    """Tasks with a strong and clear gradient count more and more: ``[K]`` weights of mean 1.

        w_k ← w_k · exp( zeta1 · ‖∇L_k‖² - zeta2 · σ_k² / (2 b) ),  then divided by its mean

    PiKE (arXiv 2502.06244), which samples tasks by these weights (``TaskSampler.shares = policy(stats)`` does so); as
    weights of gradients they act likewise in the mean. ``‖∇L_k‖²`` is ``stats.task_sqnorm_unbiased``, ``σ_k²``
    ``stats.task_variance``, and b the units (prompts or examples) of the whole batch. A task with fewer than two units
    keeps its weight.

    Args:
        zeta1, zeta2: per squared gradient norm, so they grow by c² where gradients shrink by c; finite numbers >= 0.

    Raises:
        ValueError: another zeta; when called, a state of another number of tasks.

    Example:
        >>> from types import SimpleNamespace
        >>> PiKE(zeta1=1.0, zeta2=1.0)(SimpleNamespace(
        ...     task_sqnorm_unbiased=torch.tensor([1., 0.]), task_variance=torch.tensor([8., 8.]),
        ...     task_units=torch.tensor([2, 2]), finite=torch.tensor(True)))
        tensor([1.4621, 0.5379])
    """

    zeta1: float
    zeta2: float
    weighs: ClassVar[Literal["tasks", "examples"]] = "tasks"

    def __post_init__(self) -> None:
        for name in ("zeta1", "zeta2"):
            advice = "1 over a typical squared gradient norm is a start"
            check_number("PiKE", name, getattr(self, name), advice=advice)

    def __call__(self, stats: Stats) -> Tensor:
        signal, noise = stats.task_sqnorm_unbiased, stats.task_variance / (2 * stats.task_units.sum())
        logs = self.state.get("PiKE", "log_weights", torch.zeros_like(signal))
        step = self.zeta1 * signal - self.zeta2 * noise
        logs = logs + torch.where(step.isfinite(), step, 0)
        self.state.update(stats.finite, log_weights=logs - logs.max())
        return len(logs) * self.state.tensors["log_weights"].softmax(0)


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
        check_number(
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
class NormalizeExamples:
    """Every example contributes a gradient of nearly one norm: ``[B]`` weights, 1 where all norms are equal.

        w_i = m (1 + stability) / (‖g_i‖ + stability · m)        m = mean of the norms that are neither 0 nor infinite

    Automatic clipping (AUTO-S of Bu et al., arXiv 2206.07136) has R / (‖g_i‖ + γ) with constants R and γ and adds noise;
    here both are in units of the batch's own mean norm, so that scaling all gradients changes no weight. A zero norm
    and one that is not finite get 1.

    Args:
        stability: what keeps an example with hardly any gradient from being blown up: its weight is at most
            ``1 + 1 / stability``. A finite number > 0.

    Raises:
        ValueError: another stability.

    Example:
        >>> from types import SimpleNamespace
        >>> NormalizeExamples(stability=0.5)(SimpleNamespace(example_norm=torch.tensor([1., 3., 0.])))
        tensor([1.5000, 0.7500, 1.0000])
    """

    stability: float = 0.01
    weighs: ClassVar[Literal["tasks", "examples"]] = "examples"

    def __post_init__(self) -> None:
        check_number("NormalizeExamples", "stability", self.stability, above=True, advice="0.01 bounds weights by 101")

    def __call__(self, stats: Stats) -> Tensor:
        norm = stats.example_norm
        live = (norm > 0) & norm.isfinite()
        relative = norm / (torch.where(live, norm, 0).sum() / live.sum())
        return torch.where(live, (1 + self.stability) / (relative + self.stability), 1)
