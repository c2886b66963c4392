"""What was measured: gradient norms of examples, prompts and tasks, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradnorm_ext.rewards import RewardStats


@dataclass(frozen=True)
class Stats:
    """The measurements of one observe block. Tensors, on the model's device, in the units of the loss.

    An example's gradient is its contribution to ``.grad``: the sum over its rows of each layer's Jacobian applied to the
    output gradient of the loss that ``backward()`` ran on. The contributions add up to ``.grad``.

    Attributes:
        example_norm: ``[B]``.
        prompt_norm: ``[P]``, for the distinct prompt ids in ascending order; None where no prompts were given.
        task_norm: ``[K]``: the norm of the *sum* of the task's examples, which is no function of ``example_norm``.
            0 for a task that is absent. None under ``apply="same_step"`` with weights per example and a single task:
            there it would cost the weight gradient once more.
        task_sqnorm_unbiased: ``[K]``: the squared norm of a unit's *expected* gradient,
            ``(‖Σ u‖² - Σ ‖u‖²) / (n (n - 1))`` over the task's n independent units u: its prompts where given, else its
            examples. The raw ``task_norm² / n²`` is too large by the variance over n. May be negative; NaN below two units.
        noise_scale: ``[K]``: ``tr Σ / ‖E u‖²``, the number of units at which noise and signal are equal (McCandlish et
            al., arXiv 1812.06162, with single units as the small batch); NaN where the denominator is not positive.
        task_count: ``[K]``, examples per task in the batch.
        tasks: ``[B]``, the task of each example.
        prompts: ``[B]``, each example's index into ``prompt_norm``; None where no prompts were given.
        task_names: the names of the tasks, for logs.
        layers: with ``per_layer=True``, the same figures for each module that owns parameters.
        reward: the reward statistics, where rewards were given.
        finite: a boolean scalar: all norms (and rewards) are finite.
    """

    example_norm: Tensor
    prompt_norm: Tensor | None
    task_norm: Tensor | None
    task_sqnorm_unbiased: Tensor
    noise_scale: Tensor
    task_count: Tensor
    tasks: Tensor
    prompts: Tensor | None
    task_names: tuple[str, ...]
    layers: Mapping[str, Stats] = field(default_factory=dict)
    reward: RewardStats | None = None
    finite: Tensor = field(default_factory=lambda: torch.tensor(True))

    @staticmethod
    def of(
        sqnorms: Tensor,
        *,
        tasks: Tensor,
        prompts: Tensor | None,
        task_of_prompt: Tensor | None,
        n_prompts: int,
        task_names: tuple[str, ...],
        has_tasks: bool,
        layers: Mapping[str, Stats] | None = None,
        reward: RewardStats | None = None,
    ) -> Stats:
        """From one vector of squared norms: examples, then prompts where given, then tasks where ``has_tasks``."""
        n_tasks = len(task_names)
        examples, of_prompts, of_tasks = sqnorms.split([len(tasks), n_prompts, n_tasks if has_tasks else 0])
        units, task_of_unit = (of_prompts, task_of_prompt) if task_of_prompt is not None else (examples, tasks)
        nan = sqnorms.new_full((n_tasks,), torch.nan)
        n = sqnorms.new_zeros(n_tasks).index_add_(0, task_of_unit, torch.ones_like(units))
        square = sqnorms.new_zeros(n_tasks).index_add_(0, task_of_unit, units)
        pairs = n * (n - 1)
        unbiased = torch.where(n > 1, (of_tasks - square) / pairs, nan) if has_tasks else nan
        variance = torch.where(n > 1, (square - of_tasks / n) / (n - 1), nan) if has_tasks else nan
        finite = torch.isfinite(sqnorms).all()
        if reward is not None:
            finite = finite & torch.isfinite(torch.as_tensor(reward.mean, device=sqnorms.device)).all()
        return Stats(
            example_norm=examples.sqrt(),
            prompt_norm=of_prompts.sqrt() if prompts is not None else None,
            task_norm=of_tasks.sqrt() if has_tasks else None,
            task_sqnorm_unbiased=unbiased,
            noise_scale=torch.where(unbiased > 0, variance / unbiased, nan),
            task_count=torch.zeros(n_tasks, dtype=torch.int64, device=tasks.device).index_add_(
                0, tasks, torch.ones_like(tasks)
            ),
            tasks=tasks,
            prompts=prompts,
            task_names=task_names,
            layers=layers or {},
            reward=reward,
            finite=finite,
        )

    def log_dict(self, prefix: str = "gradnorm/") -> dict[str, float]:
        """Plain floats for a logger; waits for the device. Keys: ``<prefix>task/<name>/norm`` and so on.

        Figures that were not measured are left out.

        Example:
            >>> import torch, gradnorm_ext
            >>> model = torch.nn.Linear(2, 1, bias=False)
            >>> with gradnorm_ext.Meter(model) as meter:
            ...     with meter.observe():
            ...         model(torch.tensor([[3., 4.], [0., 1.]])).sum().backward()
            >>> meter.stats.log_dict()["gradnorm/example_norm/max"]
            5.0
        """
        logged = {
            f"{prefix}example_norm/mean": float(self.example_norm.mean()),
            f"{prefix}example_norm/max": float(self.example_norm.max()),
        }
        for k, name in enumerate(self.task_names):
            if self.task_norm is not None:
                logged[f"{prefix}task/{name}/norm"] = float(self.task_norm[k])
                logged[f"{prefix}task/{name}/sqnorm_unbiased"] = float(self.task_sqnorm_unbiased[k])
                logged[f"{prefix}task/{name}/noise_scale"] = float(self.noise_scale[k])
            logged[f"{prefix}task/{name}/examples"] = float(self.task_count[k])
            if self.reward is not None and self.reward.task_std_mean is not None:
                logged[f"{prefix}task/{name}/reward_std"] = float(self.reward.task_std_mean[k])
                logged[f"{prefix}task/{name}/zero_std_share"] = float(self.reward.task_zero_std_share[k])
        return logged
