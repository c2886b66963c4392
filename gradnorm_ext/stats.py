"""What was measured: gradient norms of examples, prompts and tasks, and what follows from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

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
        task_variance: ``[K]``: the total variance of a unit's gradient, ``tr Σ``, likewise without bias:
            ``(Σ ‖u‖² - ‖Σ u‖² / n) / (n - 1)``; NaN below two units.
        task_units: ``[K]``, int64: n, how many units each task had.
        task_count: ``[K]``, examples per task in the batch.
        tasks: ``[B]``, the task of each example.
        prompts: ``[B]``, each example's index into ``prompt_norm``; None where no prompts were given.
        task_names: the names of the tasks, for logs.
        layers: with ``per_layer=True``, the same figures for each module that owns parameters.
        reward: the reward statistics, where rewards were given.
        finite: a boolean scalar: all norms (and rewards) are finite.
        task_gram: ``[K, K]``: the inner products of the tasks' gradients, whose diagonal is ``task_norm²``; None until
            measured. Of several ranks with ``ranks="unbiased"`` estimates, which need not be of any gradients: its diagonal
            is ``task_sqnorm``, and NaN stands where two tasks met on no rank.
        task_sqnorm: ``[K]``: of several ranks, the estimate that ``task_norm`` is the root of, which may be negative;
            else None.
    """

    example_norm: Tensor
    prompt_norm: Tensor | None
    task_norm: Tensor | None
    task_sqnorm_unbiased: Tensor
    task_variance: Tensor
    task_units: Tensor
    task_count: Tensor
    tasks: Tensor
    prompts: Tensor | None
    task_names: tuple[str, ...]
    layers: Mapping[str, Stats] = field(default_factory=dict)
    reward: RewardStats | None = None
    finite: Tensor = field(default_factory=lambda: torch.tensor(True))
    task_gram: Tensor | None = None
    task_sqnorm: Tensor | None = None

    @property
    def noise_scale(self) -> Tensor:
        """``[K]``: ``tr Σ / ‖E u‖²``, the number of units at which noise and signal are equal.

        McCandlish et al., arXiv 1812.06162, with single units as the small batch. NaN where the estimate of the
        denominator is not positive. A ratio of two noisy figures: average both over steps, then divide, as
        :class:`~gradnorm_ext.History` and :meth:`merged` do.
        """
        signal = self.task_sqnorm_unbiased
        return torch.where(signal > 0, self.task_variance / signal, torch.nan)

    @property
    def task_norm_ratio(self) -> Tensor | None:
        """The largest task norm over the smallest, of the tasks that are present: a scalar; None without task norms.

        Infinite where a task that is present has no gradient; NaN where none has one, or a norm is NaN.
        """
        if self.task_norm is None:
            return None
        present = self.task_count > 0
        largest = torch.where(present, self.task_norm, -torch.inf).max()
        ratio = largest / torch.where(present, self.task_norm, torch.inf).min()
        return torch.where(present.any(), ratio, torch.nan)

    @property
    def task_cosine(self) -> Tensor | None:
        """``[K, K]``: the cosines between the tasks' gradients, ``G_jk / sqrt(G_jj G_kk)``; None until G was measured.

        NaN for a task without gradient.
        """
        if self.task_gram is None:
            return None
        norm = self.task_gram.diagonal().sqrt()
        return (self.task_gram / norm / norm[:, None]).clamp(-1, 1)

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
        task_gram: Tensor | None = None,
    ) -> Stats:
        """From one vector of squared norms: examples, then prompts where given, then tasks where ``has_tasks``."""
        n_tasks = len(task_names)
        examples, of_prompts, of_tasks = sqnorms.split([len(tasks), n_prompts, n_tasks if has_tasks else 0])
        units, task_of_unit = (of_prompts, task_of_prompt) if task_of_prompt is not None else (examples, tasks)
        of_units = torch.stack([torch.ones_like(units), units])
        n, square = sqnorms.new_zeros(2, n_tasks).index_add_(1, task_of_unit, of_units).unbind()
        unbiased = variance = sqnorms.new_full((n_tasks,), torch.nan)
        if has_tasks:
            unbiased, variance = _estimates(of_tasks, square, n)
        task_units = task_count = n.long()
        if task_of_prompt is not None:
            task_count = torch.zeros_like(task_units).index_add_(0, tasks, torch.ones_like(tasks))
        norms = sqnorms.sqrt()
        finite = torch.isfinite(norms).all()
        if reward is not None:
            finite = finite & torch.isfinite(torch.as_tensor(reward.mean)).all().to(sqnorms.device, non_blocking=True)
        return Stats(
            example_norm=norms[: len(tasks)],
            prompt_norm=norms[len(tasks) : len(tasks) + n_prompts] if prompts is not None else None,
            task_norm=norms[len(tasks) + n_prompts :] if has_tasks else None,
            task_sqnorm_unbiased=unbiased,
            task_variance=variance,
            task_units=task_units,
            task_count=task_count,
            tasks=tasks,
            prompts=prompts,
            task_names=task_names,
            layers=layers or {},
            reward=reward,
            finite=finite,
            task_gram=task_gram,
        )

    @staticmethod
    def merged(blocks: Sequence[Stats], task_gram: Tensor | None = None) -> Stats:
        """The statistics of several blocks as those of one: of the micro-batches of a step.

        Examples and prompts are put one after the other, and reward figures formed anew over all of them. The unbiased
        figures stay unbiased, averaged over blocks i with n_i units in the proportions in which they are known best
        where noise prevails, the numerator and the denominator of ``noise_scale`` apart:

            task_sqnorm_unbiased = Σ n_i (n_i - 1) a_i / Σ n_i (n_i - 1)      a_i, v_i: the blocks' own figures
            task_variance        = Σ (n_i - 1) v_i / Σ (n_i - 1)

        The loss must weigh a unit alike in every block. ``task_norm`` and ``task_gram`` are None: the norm of a sum over
        blocks is no function of the blocks' norms. Where the sums were kept (``Meter(exact_tasks=True)``) their inner
        products make all these figures those of one batch.

        Args:
            blocks: of one meter, at least one. No prompt's examples may be spread over several blocks: they share a
                baseline, so that its parts are no independent units. This is checked where rewards were given.
            task_gram: ``[K, K]``: the inner products of the tasks' gradients, each summed over the blocks.

        Raises:
            ValueError: no block, other tasks, prompts, rewards or layers in some blocks only, a prompt in two blocks.

        Example:
            >>> import torch, gradnorm_ext
            >>> model, blocks = torch.nn.Linear(1, 1, bias=False), []
            >>> meter = gradnorm_ext.Meter(model)
            >>> for x in (torch.tensor([[1.], [3.]]), torch.tensor([[2.], [2.], [2.]])):
            ...     with meter.observe():
            ...         model(x).sum().backward()
            ...     blocks.append(meter.stats)
            >>> Stats.merged(blocks).task_sqnorm_unbiased       # (2·3 + 6·4) / (2 + 6)
            tensor([3.7500])
        """
        if not blocks:
            raise ValueError("Stats.merged: at least one block must be given, got none; append stats after each block")
        first = blocks[0]
        for block in blocks:
            for (name, one), other in zip(first._kind().items(), block._kind().values(), strict=True):
                if one != other:
                    raise ValueError(
                        f"Stats.merged: all blocks must have the same {name}, got {one} and {other}; observe all blocks "
                        "with one meter and the same arguments"
                    )
        units = torch.stack([block.task_units for block in blocks])
        rewards = [block.reward for block in blocks if block.reward is not None]
        offsets = [0]
        for block in blocks:
            offsets.append(offsets[-1] + (0 if block.prompt_norm is None else len(block.prompt_norm)))
        n = units.sum(0)
        if task_gram is None:
            of_tasks = None
            unbiased = _average([block.task_sqnorm_unbiased for block in blocks], units * (units - 1))
            variance = _average([block.task_variance for block in blocks], (units - 1).clamp(min=0))
        else:
            of_tasks = task_gram.diagonal()
            square = torch.stack([block._unit_squares() for block in blocks]).sum(0)
            unbiased, variance = _estimates(of_tasks, square, n)
        return Stats(
            example_norm=torch.cat([block.example_norm for block in blocks]),
            prompt_norm=_joined([block.prompt_norm for block in blocks]),
            task_norm=None if of_tasks is None else of_tasks.sqrt(),
            task_sqnorm_unbiased=unbiased,
            task_variance=variance,
            task_units=n,
            task_count=torch.stack([block.task_count for block in blocks]).sum(0),
            tasks=torch.cat([block.tasks for block in blocks]),
            prompts=_joined(
                [None if b.prompts is None else b.prompts + o for b, o in zip(blocks, offsets, strict=False)]
            ),
            task_names=first.task_names,
            layers={name: Stats.merged([block.layers[name] for block in blocks]) for name in first.layers},
            reward=RewardStats.merged(rewards) if rewards else None,
            finite=torch.stack([block.finite for block in blocks]).all(),
            task_gram=task_gram,
        )

    def weighted(self, weights: Tensor, of: Literal["tasks", "examples"]) -> Stats:
        """What would have been measured if the gradients of the ``of`` ("tasks" or "examples") had these weights.

        Exact for weights of tasks. Under weights of examples the norm of a sum is another one, and what depends on it is
        gone: prompt and task norms and G are None, the unbiased figures NaN. Rewards stay; layers are left out.

        Args:
            weights: ``[K]`` for tasks, ``[B]`` for examples.

        Example:
            >>> import torch, gradnorm_ext
            >>> model = torch.nn.Linear(1, 1, bias=False)
            >>> with gradnorm_ext.Meter(model, tasks=2) as meter, meter.observe(tasks=[0, 1]):
            ...     model(torch.tensor([[3.], [1.]])).sum().backward()
            >>> meter.stats.weighted(torch.tensor([0.5, 1.5]), "tasks").task_norm
            tensor([1.5000, 1.5000])
        """
        size = weights.abs()
        if of == "examples":
            nan = torch.full_like(self.task_sqnorm_unbiased, torch.nan)
            return dataclasses.replace(
                self,
                example_norm=size * self.example_norm,
                prompt_norm=None,
                prompts=None,
                task_norm=None,
                task_sqnorm=None,
                task_sqnorm_unbiased=nan,
                task_variance=nan,
                task_gram=None,
                layers={},
            )
        prompt_norm = None
        if self.prompt_norm is not None:
            prompt_norm = size[self._task_of_prompt()] * self.prompt_norm
        return dataclasses.replace(
            self,
            example_norm=size[self.tasks] * self.example_norm,
            prompt_norm=prompt_norm,
            task_norm=None if self.task_norm is None else size * self.task_norm,
            task_sqnorm=None if self.task_sqnorm is None else size.square() * self.task_sqnorm,
            task_sqnorm_unbiased=size.square() * self.task_sqnorm_unbiased,
            task_variance=size.square() * self.task_variance,
            task_gram=None if self.task_gram is None else weights * weights[:, None] * self.task_gram,
            layers={},
        )

    def prompt_signal(self, factor: Tensor) -> Tensor:
        """How strong a policy gradient each prompt can have: ``std · sqrt(mean over its examples of ‖∇ log π‖²)``, ``[P]``.

        Bounds the norm of the gradient of the prompt's expected reward (Cauchy-Schwarz, derived for this package). An
        example's ‖∇ log π‖ is its gradient's norm without the factor that the loss has before ``log π``; where that
        factor is 0 it is unknown and left out. 0 for prompts whose rewards are all equal; NaN where nothing is known.

        Args:
            factor: ``[B]``: what the loss multiplies each example's ``log π`` with, of either sign: in GRPO its
                advantage over the number of tokens or examples that the loss is a mean of.

        Raises:
            ValueError: statistics without rewards, a factor of another shape.

        Example:
            >>> import torch, gradnorm_ext
            >>> model = torch.nn.Linear(1, 1, bias=False)
            >>> advantage = torch.tensor([1., -1.])
            >>> with gradnorm_ext.Meter(model) as meter, meter.observe(prompts=[0, 0], rewards=[2., 0.]):
            ...     (advantage[:, None] * model(torch.tensor([[3.], [4.]]))).sum().backward()
            >>> meter.stats.prompt_signal(advantage)            # sqrt(2) · sqrt((3² + 4²) / 2)
            tensor([5.])
        """
        if self.reward is None:
            raise ValueError(
                "Stats.prompt_signal: the statistics must hold rewards, got None; pass rewards= and prompts= to observe"
            )
        if factor.shape != self.example_norm.shape:
            raise ValueError(
                f"Stats.prompt_signal: factor must be [{len(self.example_norm)}], one per example, got "
                f"{list(factor.shape)}; pass what the loss multiplies each example's log-probability with"
            )
        size = factor.detach().abs().to(self.example_norm)
        return self.reward.signal(torch.where(size > 0, self.example_norm / size, torch.nan))

    def log_dict(self, prefix: str = "gradnorm/") -> dict[str, float]:
        """Plain floats for a logger; waits for the device, once. Keys: ``<prefix>task/<name>/norm`` and so on.

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
        scalars = {}
        if len(self.example_norm):
            scalars = {"example_norm/mean": self.example_norm.mean(), "example_norm/max": self.example_norm.max()}
        if self.task_norm_ratio is not None and len(self.task_names) > 1:
            scalars["task_norm_ratio"] = self.task_norm_ratio
        of_tasks: dict[str, Tensor | None] = {
            "norm": self.task_norm,
            "sqnorm_unbiased": self.task_sqnorm_unbiased,
            "variance": self.task_variance,
            "noise_scale": self.noise_scale,
            "examples": self.task_count,
        }
        if self.reward is not None:
            of_tasks |= {
                "reward": self.reward.task_mean,
                "reward_std": self.reward.task_std_mean,
                "zero_std_share": self.reward.task_zero_std_share,
                "realised_share": self.reward.task_realised_share,
            }
        for figure, values in of_tasks.items():
            if values is not None:
                scalars |= {f"task/{name}/{figure}": values[k] for k, name in enumerate(self.task_names)}
        if (cosine := self.task_cosine) is not None:
            for j, one in enumerate(self.task_names):
                scalars |= {f"cosine/{one}/{other}": cosine[j, k] for k, other in enumerate(self.task_names) if k > j}
        return {prefix + name: value for name, value in zip(scalars, _floats(list(scalars.values())), strict=True)}

    def _task_of_prompt(self) -> Tensor:
        assert self.prompt_norm is not None and self.prompts is not None
        of_prompt = torch.zeros(len(self.prompt_norm), dtype=torch.int64, device=self.tasks.device)
        return of_prompt.scatter_(0, self.prompts, self.tasks)

    def _unit_squares(self) -> Tensor:
        """``[K]``: Σ ‖u‖² over each task's units."""
        units, tasks = self.example_norm, self.tasks
        if self.prompt_norm is not None:
            units, tasks = self.prompt_norm, self._task_of_prompt()
        return units.new_zeros(len(self.task_names)).index_add_(0, tasks, units.square())

    def _kind(self) -> dict[str, object]:
        """What all blocks must have in common to be merged."""
        given = {"prompts": self.prompts, "rewards": self.reward}
        return {
            "tasks": list(self.task_names),
            **{name: "none" if value is None else "some" for name, value in given.items()},
            "layers": list(self.layers),
        }


def _estimates(of_tasks: Tensor, of_units: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Without bias, of the squared norm of each sum of n units and the sum of their squared norms: ‖E u‖² and tr Σ."""
    others, known = n - 1, n > 1
    expected = torch.where(known, (of_tasks - of_units) / (n * others), torch.nan)
    return expected, torch.where(known, (of_units - of_tasks / n) / others, torch.nan)


def _average(values: Sequence[Tensor], shares: Tensor) -> Tensor:
    """Σ shares · values / Σ shares, where a value without a share may be NaN."""
    total = torch.where(shares > 0, shares * torch.stack(list(values)), 0).sum(0)
    return total / shares.sum(0)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    return torch.cat([part for part in parts if part is not None]) if parts[0] is not None else None


def _floats(scalars: Sequence[Tensor]) -> list[float]:
    """Scalars as floats, with one transfer from each device: rewards may lie on the host."""
    floats = [0.0] * len(scalars)
    for device in {scalar.device for scalar in scalars}:
        there = [i for i, scalar in enumerate(scalars) if scalar.device == device]
        for i, value in zip(there, torch.stack([scalars[i].double() for i in there]).tolist(), strict=True):
            floats[i] = value
    return floats
