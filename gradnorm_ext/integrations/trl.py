"""TRL's GRPOTrainer, DPOTrainer and SFTTrainer, measured, and reweighted where a policy is given. Written for TRL 1.16."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import trl
from torch import Tensor, nn

from gradnorm_ext.integrations.transformers import TASKS, TrainerMixin, task_ids
from gradnorm_ext.policies import MTGRPO, PairBalance, RewardStd
from gradnorm_ext.rewards import reward_stats
from gradnorm_ext.stats import Stats

_PROMPTS, _REWARDS = "gradnorm_prompts", "gradnorm_rewards"  # of a batch of completions, [B] each


class _TRLMixin(TrainerMixin):
    """What TRL's trainers have in common."""

    def _refusals(self) -> Iterable[str]:
        yield from super()._refusals()
        if getattr(self.args, "activation_offloading", False):
            yield (
                "saved activations must stay in the graph, which says whose rows the head scores, got "
                "activation_offloading=True; use gradient_checkpointing"
            )


class GRPOMixin(_TRLMixin):
    """A :class:`TrainerMixin` before ``trl.GRPOTrainer``: an example is a completion, its unit is its prompt.

    Tasks come from the column ``task_column`` of the dataset of prompts, prompts and rewards from the trainer's own
    batch. The log also has, over the whole groups of every generated batch, ``reward/<name>``, ``reward_std/<name>``,
    ``zero_std_share/<name>`` and ``realised_share/<name>`` (see :class:`~gradnorm_ext.RewardStats`); completions that no
    reward function scores are left out, as the trainer leaves them out.

    The trainer shuffles completions before it splits them into micro-batches, so that most prompts lie in several. The
    unbiased figures of such a step are those of whole prompts nevertheless: see :func:`over_split_prompts`.

    A policy that weighs by rewards needs whole groups, ``steps_per_generation=1``.
    """

    _serves: ClassVar[tuple[type, ...]] = (RewardStd, MTGRPO)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._generations = 0  # how many batches were generated
        self._rewards: Tensor | None = None  # of the completions that were scored last, of all processes
        self._prompts: list[Tensor] = []  # of the micro-batches since the last optimizer step
        super().__init__(*args, **kwargs)

    def _task_collator(self, collator: Any, keep: bool) -> Any:
        return collator  # the trainer's batches are lists of rows, which have the column

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        scores: Tensor = super()._calculate_rewards(*args, **kwargs)
        rewards = (scores * self.reward_weights.to(scores)).nansum(1)
        self._rewards = rewards.masked_fill(scores.isnan().all(1), torch.nan).cpu()
        return scores

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        training = self.model.training
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if not training:
            return batch
        assert self._rewards is not None
        rows = len(inputs)
        tasks = torch.zeros(rows, dtype=torch.int64)
        if self.task_column is not None:
            tasks = task_ids(type(self).__name__, inputs, self.task_column, self.task_names)
        groups = len(self._rewards) // self.num_generations
        prompts = self._generations * groups + torch.arange(len(self._rewards)) // self.num_generations
        self._generations += 1
        self._log_rewards(self.accelerator.gather(tasks.to(self.accelerator.device)).cpu(), prompts)
        local = slice(self.accelerator.process_index * rows, (self.accelerator.process_index + 1) * rows)
        return {**batch, TASKS: tasks, _PROMPTS: prompts[local], _REWARDS: self._rewards[local]}

    def _log_rewards(self, tasks: Tensor, prompts: Tensor) -> None:
        assert self._rewards is not None
        scored = ~self._rewards.isnan()
        if not scored.any():
            return
        stats = reward_stats(self._rewards[scored], prompts[scored], tasks[scored], n_tasks=len(self.task_names))
        for k, name in enumerate(self.task_names):
            if stats.task_share[k] > 0:
                metrics = self._metrics["train"]
                metrics[f"reward/{name}"].append(stats.task_mean[k].item())
                metrics[f"reward_std/{name}"].append(stats.task_std_mean[k].item())
                metrics[f"zero_std_share/{name}"].append(stats.task_zero_std_share[k].item())
                metrics[f"realised_share/{name}"].append(stats.task_realised_share[k].item())

    def _given(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        rest = {key: value for key, value in inputs.items() if key not in (TASKS, _PROMPTS, _REWARDS)}
        given = {"tasks": inputs[TASKS], "prompts": inputs[_PROMPTS]}
        if any(isinstance(policy, self._serves) for policy in self._policies()):
            given["rewards"] = inputs[_REWARDS]
        self._prompts.append(inputs[_PROMPTS])
        return given, rest

    def _merged(self) -> tuple[Stats, Tensor | None]:
        stats, weights = super()._merged()
        if len(self._blocks) > 1 and self.args.world_size == 1:  # else every prompt lies in one of them
            blocks = [block for block, _ in self._blocks]
            generation = torch.stack([prompts[0] for prompts in self._prompts]) // self._groups
            parts = [
                over_split_prompts([blocks[i] for i in of], [self._prompts[i] for i in of])
                for of in ((generation == g).nonzero().flatten().tolist() for g in generation.unique())
            ]
            stats = parts[0] if len(parts) == 1 else Stats.merged(parts)
        self._prompts.clear()
        return stats, weights

    @property
    def _groups(self) -> int:
        """How many prompts a generated batch has."""
        groups: int = self.args.generation_batch_size // self.num_generations
        return groups

    def _units_of_a_micro_batch(self) -> int:
        size: int = self.args.per_device_train_batch_size
        return min(self._groups, size if self.args.steps_per_generation > 1 else size // self.num_generations)

    def _refusals(self) -> Iterable[str]:
        yield from super()._refusals()
        args, size = self.args, self.args.per_device_train_batch_size
        if args.world_size > 1 and (args.steps_per_generation > 1 or size % args.num_generations):
            yield (
                f"over {args.world_size} processes all completions of a prompt must lie in one micro-batch, got "
                f"num_generations={args.num_generations}, per_device_train_batch_size={size} and steps_per_generation="
                f"{args.steps_per_generation}; set steps_per_generation to 1, and per_device_train_batch_size to a multiple "
                "of num_generations"
            )
        if self._exact and self.args.steps_per_generation > 1:
            yield (
                "exact_tasks takes what a prompt has in each micro-batch for a unit of its own, got steps_per_generation="
                f"{self.args.steps_per_generation}, which spreads its completions over them; leave exact_tasks out"
            )
        for policy in self._policies():
            if isinstance(policy, self._serves) and self.args.steps_per_generation > 1:
                yield (
                    f"{type(policy).__name__} weighs by the rewards of whole groups, got steps_per_generation="
                    f"{self.args.steps_per_generation}, which spreads a prompt's completions over micro-batches; set it "
                    "to 1, with as large a per_device_train_batch_size"
                )


class DPOMixin(_TRLMixin):
    """A :class:`TrainerMixin` before ``trl.DPOTrainer``: chosen and rejected are two examples, their unit is the pair.

    The chosen examples of a micro-batch come first, then the rejected ones. The log also has ``gradnorm/chosen_norm``
    and ``gradnorm/rejected_norm``, means over examples. :class:`~gradnorm_ext.PairBalance` may be the policy in either
    space; what it must be fed comes from the trainer's own forward.
    """

    _serves: ClassVar[tuple[type, ...]] = (PairBalance,)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._sizes: list[int] = []  # of the micro-batches since the last optimizer step
        super().__init__(*args, **kwargs)

    def _given(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        given, rest = super()._given(inputs)
        pairs = len(rest["input_ids"]) // 2
        self._sizes.append(2 * pairs)
        if TASKS in inputs:
            given["tasks"] = given["tasks"].repeat(2)
        given["prompts"] = torch.arange(pairs).repeat(2)
        for policy in self._policies():
            if isinstance(policy, PairBalance) and policy.space == "probability":
                assert self._block is not None
                self._block.callback(self.model.register_forward_hook(_Feeder(policy)).remove)
        return given, rest

    def _of_examples(self, stats: Stats) -> dict[str, Tensor]:
        chosen, rejected = zip(*(block.chunk(2) for block in stats.example_norm.split(self._sizes)), strict=True)
        self._sizes.clear()
        return {**super()._of_examples(stats), "chosen_norm": torch.cat(chosen), "rejected_norm": torch.cat(rejected)}


class SFTMixin(_TRLMixin):
    """A :class:`TrainerMixin` before ``trl.SFTTrainer``: an example is a row of the dataset.

    ``packing=True`` is refused: it cuts and joins rows and drops their other columns, so that nothing says which tokens
    are whose. ``padding_free=True`` (several whole rows in one) is measured row by row.
    """

    def _refusals(self) -> Iterable[str]:
        yield from super()._refusals()
        if getattr(self.args, "packing", False):
            yield (
                "a row of the dataset must stay one example, got packing=True, which cuts and joins rows and drops their "
                "tasks; set packing=False (padding_free=True saves padding as well)"
            )
        padding_free = getattr(self, "padding_free", getattr(self.args, "padding_free", False))
        if padding_free and self.args.pad_to_multiple_of is not None:
            yield (
                "every token must belong to an example, got padding_free=True with pad_to_multiple_of="
                f"{self.args.pad_to_multiple_of}, whose padding does not; leave one of them out"
            )


class GRPOTrainer(GRPOMixin, trl.GRPOTrainer):
    """``trl.GRPOTrainer``, measured: :class:`GRPOMixin`, with the arguments of :class:`TrainerMixin`."""


class DPOTrainer(DPOMixin, trl.DPOTrainer):
    """``trl.DPOTrainer``, measured: :class:`DPOMixin`, with the arguments of :class:`TrainerMixin`."""


class SFTTrainer(SFTMixin, trl.SFTTrainer):
    """``trl.SFTTrainer``, measured: :class:`SFTMixin`, with the arguments of :class:`TrainerMixin`."""


def over_split_prompts(blocks: Sequence[Stats], prompts: Sequence[Tensor]) -> Stats:
    """The statistics of micro-batches over which the examples of a step's prompts were spread at random.

    A unit u_p is all that prompt p contributes to the step, which no micro-batch shows whole. The products of two
    examples' gradients are known where both lie in one micro-batch, and of M shuffled examples in micro-batches of
    m_1, m_2, ... any two do with the same chance; so that, averaged over the shuffles,

        ⟨Σu, Σu⟩ - Σ ‖u‖²  =  c Σ_i (‖Σ u_i‖² - Σ ‖u_i‖²)      c = M (M - 1) / Σ m_i (m_i - 1),  u_i: u's part in i
        Σ ‖u‖²             =  Σ ‖g‖² + c Σ_i (Σ ‖u_i‖² - Σ ‖g‖²)                     g: of a single example

    from which ``task_sqnorm_unbiased`` and ``task_variance`` of whole prompts follow, without bias. Derived for this
    package.

    Args:
        blocks: of one meter, with prompts; the loss must weigh an example alike in all of them.
        prompts: of each block, ``[B]``: equal ids for the examples of one prompt, across blocks as well.

    Returns:
        Those of all examples; norms of prompts and tasks are None, which no micro-batch knows.
    """
    own, within, cross = (torch.zeros_like(blocks[0].task_sqnorm_unbiased) for _ in range(3))
    for block in blocks:
        assert block.prompt_norm is not None and block.prompts is not None
        task_of_prompt = torch.zeros_like(block.prompt_norm, dtype=torch.int64).scatter_(0, block.prompts, block.tasks)
        examples = torch.zeros_like(own).index_add_(0, block.tasks, block.example_norm.square())
        parts = torch.zeros_like(own).index_add_(0, task_of_prompt, block.prompt_norm.square())
        pairs = block.task_units * (block.task_units - 1)
        own, within = own + examples, within + parts - examples
        cross = cross + torch.where(pairs > 0, pairs * block.task_sqnorm_unbiased, 0)
    merged = Stats.merged([dataclasses.replace(block, prompt_norm=None, prompts=None, layers={}) for block in blocks])
    sizes = torch.tensor([len(block.example_norm) for block in blocks], dtype=torch.float64)
    scale = float(sizes.sum() * (sizes.sum() - 1) / (sizes * (sizes - 1)).sum())
    distinct, index = torch.cat(list(prompts)).unique(return_inverse=True)
    task = torch.zeros_like(distinct).scatter_(0, index, merged.tasks.to(index.device))
    units = torch.bincount(task, minlength=len(own)).to(own.device)
    apart, square = scale * cross / (units * (units - 1)), own + scale * within
    return dataclasses.replace(
        merged,
        task_sqnorm_unbiased=torch.where(units > 1, apart, torch.nan),
        task_variance=torch.where(units > 1, square / units - apart, torch.nan),
        task_units=units,
    )


class _Feeder:
    """A forward hook that feeds a policy the mean log-probability of every example's tokens."""

    def __init__(self, policy: PairBalance) -> None:
        self.policy = policy

    def __call__(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        if torch.is_grad_enabled():  # not the reference's pass through the same model
            total = outputs.log_probs.detach().sum(1)
            self.policy.feed(total / outputs.label_mask.sum(1).clamp(min=1))
