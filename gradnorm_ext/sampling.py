"""Which examples come next: batch samplers for a DataLoader that follow weights, rewards and their spread.

    sampler = TaskSampler(tasks_of_dataset, batch_size=32, seed=0)
    for batch in DataLoader(dataset, batch_sampler=sampler):
        with optimizer.observe(tasks=batch.tasks, prompts=batch.prompts, rewards=batch.rewards):
            ...
        sampler.shares = policy(optimizer.stats)        # PiKE's weights, or any others, from the next batch on
        sampler.update(optimizer.stats.reward)          # keep the tasks' shares of the prompts that teach something

Figures from a GPU are fetched, which waits for it. A DataLoader with workers draws some batches ahead: these do not know
yet what was set since, and a stored state counts them as drawn.
"""

from __future__ import annotations

import numbers
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from gradnorm_ext.rewards import RewardStats


def shares_by_size(tasks: Tensor | Sequence[int], power: float = 1.0) -> Tensor:
    """Shares of the tasks by the number of their examples: ``n_k^power / Σ_j n_j^power``, ``[K]`` float64.

    ``power=1`` is proportional sampling, 0 uniform over tasks, -1 inverse; between 0 and 1 it is known as temperature
    sampling. A task without examples gets 0.

    Example:
        >>> shares_by_size([0, 0, 0, 1]), shares_by_size([0, 0, 0, 1], power=-1)
        (tensor([0.7500, 0.2500], dtype=torch.float64), tensor([0.2500, 0.7500], dtype=torch.float64))
    """
    size = torch.bincount(_ids("shares_by_size", tasks)).double()
    raw = torch.where(size > 0, size**power, 0)
    return raw / raw.sum()


class _Batches(Sampler[list[int]]):
    """Batches of indices that are drawn one by one from a generator, and go on from a stored state."""

    def __init__(self, who: str, items: int, batch_size: int, batches: int | None, seed: int) -> None:
        for name, value in {"batch_size": batch_size, "batches": batches}.items():
            if value is not None and (not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{who}: {name} must be an integer >= 1, got {value!r}; pass how many")
        self.batch_size = batch_size
        self.batches = batches if batches is not None else max(1, items // batch_size)
        self._generator = torch.Generator().manual_seed(seed)
        self._drawn = 0  # of the epoch under way
        self._resumed = False

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        if not self._resumed:
            self._drawn = 0
        self._resumed = False
        while self._drawn < self.batches:
            self._drawn += 1
            yield self._draw()
        self._drawn = 0

    def state_dict(self) -> dict[str, Any]:
        """What is needed to draw on as if nothing had happened: also in the middle of an epoch."""
        return {"generator": self._generator.get_state(), "drawn": self._drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned; the next iteration is the rest of its epoch."""
        self._generator.set_state(state["generator"])
        self._drawn, self._resumed = state["drawn"], True

    @abstractmethod
    def _draw(self) -> list[int]: ...


class TaskSampler(_Batches):
    """Batches in which the tasks have given shares: a batch sampler of a DataLoader.

        counts: b = batch_size draws, each for the task that is furthest behind its shares, now and in earlier batches
        or, with ``exact=False``, multinomial draws by the shares

    Each task's examples come in an order of their own, shuffled, each once before any comes twice.

    Where prompts with equal rewards are dropped, tasks lose different parts of their share. ``update`` learns which
    part of a task's prompts is kept, and from then on

        shares used ∝ shares_k / kept_k

    so that the shares hold among what is kept: the aim of the ratio-preserving sampler of MT-GRPO (arXiv 2602.05547),
    by way of expected rather than refilled batches.

    Args:
        tasks: the task of every example of the data set, ``[N]`` integers from 0.
        batch_size: examples in a batch.
        shares: ``[K]``, from 0 on, not all 0, of any sum; None: proportional to the number of examples. To be set at
            any time: ``sampler.shares = policy(stats)``, ``= stats.reward.task_std_mean``, ``= shares_by_size(tasks, -1)``.
        exact: whether the tasks' counts follow the shares as closely as whole numbers can.
        batches: of an epoch; None: N // batch_size.
        decay: how much of the running mean of the part that is kept an ``update`` keeps, in [0, 1).
        most: the correction multiplies no share by more than this over another's, a number >= 1.
        seed: of all random numbers.

    Raises:
        ValueError: shares that are negative, not finite, all 0, of another number of tasks, or above 0 for a task
            without examples; other arguments out of range.

    Example:
        >>> sampler = TaskSampler([0, 0, 0, 0, 1, 1], batch_size=4, shares=[0.5, 0.5], batches=2)
        >>> [sum(index >= 4 for index in batch) for batch in sampler]
        [2, 2]
    """

    def __init__(
        self,
        tasks: Tensor | Sequence[int],
        batch_size: int,
        *,
        shares: Tensor | Sequence[float] | None = None,
        exact: bool = True,
        batches: int | None = None,
        decay: float = 0.9,
        most: float = 10.0,
        seed: int = 0,
    ) -> None:
        ids = _ids("TaskSampler", tasks)
        super().__init__("TaskSampler", len(ids), batch_size, batches, seed)
        if not 0 <= decay < 1:
            raise ValueError(f"TaskSampler: decay must lie in [0, 1), got {decay}; 0 believes the last batch")
        if not most >= 1:
            raise ValueError(f"TaskSampler: most must be a number >= 1, got {most}; 1 corrects nothing")
        self.exact, self.decay, self.most = exact, decay, most
        self._members = [(ids == task).nonzero()[:, 0] for task in range(int(ids.max()) + 1)]
        self._order = [self._shuffled(members) for members in self._members]
        self._position = [0] * len(self._members)
        self._behind = torch.zeros(len(self._members), dtype=torch.float64)
        self._kept = torch.zeros(2, len(self._members), dtype=torch.float64)  # of its mean: total and mass
        self.shares = shares_by_size(ids) if shares is None else shares

    @property
    def shares(self) -> Tensor:
        """``[K]`` float64, of sum 1."""
        return self._shares

    @shares.setter
    def shares(self, shares: Tensor | Sequence[float]) -> None:
        given = torch.as_tensor(shares).detach().double().cpu()
        if given.shape != self._behind.shape:
            raise ValueError(
                f"TaskSampler: shares must be [{len(self._behind)}], one per task, got {list(given.shape)}; "
                "make a new sampler for more tasks"
            )
        if not (given.isfinite().all() and (given >= 0).all() and given.sum() > 0):
            raise ValueError(
                f"TaskSampler: shares must be finite and >= 0, and not all 0, got {given.tolist()}; "
                "put 0 for a task that is to rest"
            )
        for task, members in enumerate(self._members):
            if given[task] > 0 and len(members) == 0:
                raise ValueError(f"TaskSampler: a task with a share must have examples, got none of task {task}")
        self._shares = given / given.sum()

    @property
    def kept(self) -> Tensor:
        """``[K]``: the part of each task's prompts that is kept, by the updates so far; 1 where unknown."""
        mean = self._kept[0] / self._kept[1]
        return torch.where(mean.isnan(), 1.0, mean)

    @property
    def shares_used(self) -> Tensor:
        """``[K]``: the shares of what is drawn, so that ``shares`` are those of what is kept."""
        used = self.shares / torch.maximum(self.kept, self.kept.max() / self.most)
        return used / used.sum()

    def update(self, reward: RewardStats[Any]) -> None:
        """Learn from a batch which part of each task's prompts has rewards that differ."""
        kept = 1 - torch.as_tensor(reward.task_zero_std_share).detach().double().cpu()
        if kept.shape != self._behind.shape:
            raise ValueError(
                f"TaskSampler: the rewards must be of {len(self._behind)} tasks, got {len(kept)}; pass n_tasks to reward_stats"
            )
        known = torch.stack([kept, torch.ones_like(kept)])
        self._kept = torch.where(kept.isnan(), self._kept, self.decay * self._kept + (1 - self.decay) * known)

    def state_dict(self) -> dict[str, Any]:
        own = {
            "shares": self._shares,
            "behind": self._behind,
            "kept": self._kept,
            "order": self._order,
            "position": self._position,
        }
        return {**super().state_dict(), **{key: _copied(value) for key, value in own.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if [len(order) for order in state["order"]] != [len(members) for members in self._members]:
            raise ValueError(
                "TaskSampler: the state must be of the same data set, got one with other numbers of examples per task; "
                "make the sampler of the same tasks"
            )
        super().load_state_dict(state)
        for key in ("shares", "behind", "kept", "order", "position"):
            setattr(self, f"_{key}", _copied(state[key]))

    def _draw(self) -> list[int]:
        used = self.shares_used
        if self.exact:
            self._behind += self.batch_size * used
            counts = [0] * len(used)
            for _ in range(self.batch_size):
                task = int(self._behind.masked_fill(used == 0, -torch.inf).argmax())
                self._behind[task] -= 1
                counts[task] += 1
        else:
            draws = torch.multinomial(used, self.batch_size, replacement=True, generator=self._generator)
            counts = torch.bincount(draws, minlength=len(used)).tolist()
        batch = [index for task, count in enumerate(counts) for index in self._next(task, count)]
        return [batch[i] for i in torch.randperm(len(batch), generator=self._generator).tolist()]

    def _next(self, task: int, count: int) -> list[int]:
        indices: list[int] = []
        while len(indices) < count:
            if self._position[task] == len(self._order[task]):
                self._order[task], self._position[task] = self._shuffled(self._members[task]), 0
            first = self._position[task]
            taken = self._order[task][first : first + count - len(indices)].tolist()
            self._position[task] += len(taken)
            indices += taken
        return indices

    def _shuffled(self, members: Tensor) -> Tensor:
        return members[torch.randperm(len(members), generator=self._generator)]


class PromptSampler(_Batches):
    """Batches of prompts whose rewards vary: a batch sampler of a DataLoader over prompts.

        probability[p] ∝ max(std[p], floor · mean std)^power        std: the running mean of the prompt's reward deviation

    A batch holds each prompt at most once, every one ``repeats`` times in a row. A prompt that was not seen yet counts
    like the mean of those that were. Prompts whose rewards are all equal have no policy gradient (Razin et al., arXiv
    2503.15477); ``floor`` has them looked at now and then, for that may change. Derived for this package.

    Args:
        prompts: how many there are in the data set.
        batch_size: distinct prompts in a batch, at most ``prompts``.
        repeats: how often each comes: the size of a GRPO group, where the loader is to repeat prompts.
        power: how much the deviation matters; 0 draws all alike.
        floor: the least deviation that counts, as a part of the mean one, a number > 0.
        decay: how much of a prompt's running mean an ``update`` keeps, in [0, 1).
        batches: of an epoch; None: prompts // batch_size.
        seed: of all random numbers.

    Raises:
        ValueError: arguments out of range; a batch of more prompts than there are.

    Example:
        >>> from gradnorm_ext import reward_stats
        >>> sampler = PromptSampler(3, batch_size=1, floor=0.1)
        >>> sampler.update(reward_stats(torch.tensor([1., 0., 1., 1.]), torch.tensor([0, 0, 2, 2])))
        >>> sampler.probability                             # the second was not seen, the third has equal rewards
        tensor([0.6452, 0.3226, 0.0323], dtype=torch.float64)
    """

    def __init__(
        self,
        prompts: int,
        batch_size: int,
        *,
        repeats: int = 1,
        power: float = 1.0,
        floor: float = 0.1,
        decay: float = 0.5,
        batches: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__("PromptSampler", prompts, batch_size, batches, seed)
        if batch_size > prompts:
            raise ValueError(
                f"PromptSampler: a batch must have at most {prompts} prompts, got {batch_size}; each comes once in a batch"
            )
        if not (power >= 0 and floor > 0 and 0 <= decay < 1 and repeats >= 1):
            raise ValueError(
                "PromptSampler: power must be >= 0, floor > 0, decay in [0, 1) and repeats >= 1, got "
                f"{power}, {floor}, {decay} and {repeats}"
            )
        self.repeats, self.power, self.floor, self.decay = repeats, power, floor, decay
        self._std = torch.full((prompts,), torch.nan, dtype=torch.float64)

    @property
    def probability(self) -> Tensor:
        """``[prompts]`` float64, of sum 1: of the first draw of a batch. ``1 / (prompts · probability)`` corrects for it."""
        known = ~self._std.isnan()
        mean = torch.where(known, self._std, 0).sum() / known.sum()
        if not mean > 0:  # nothing is known, or nothing varies
            return torch.full_like(self._std, 1 / len(self._std))
        weight = (torch.where(known, self._std, mean) / mean).clamp(min=self.floor) ** self.power
        return weight / weight.sum()

    def update(self, reward: RewardStats[Any]) -> None:
        """Learn the deviations of a batch, whose prompts' ids are their indices in the data set."""
        prompt, std = torch.as_tensor(reward.prompt).cpu(), torch.as_tensor(reward.std).detach().double().cpu()
        if len(prompt) and not 0 <= int(prompt.min()) <= int(prompt.max()) < len(self._std):
            raise ValueError(
                f"PromptSampler: prompts must lie in [0, {len(self._std)}), got {int(prompt.min())} to "
                f"{int(prompt.max())}; take their indices in the data set for ids"
            )
        before = self._std[prompt]
        mixed = torch.where(before.isnan(), std, self.decay * before + (1 - self.decay) * std)
        self._std[prompt] = torch.where(std.isnan(), before, mixed)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "std": self._std.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["std"].shape != self._std.shape:
            raise ValueError(
                f"PromptSampler: the state must be of {len(self._std)} prompts, got one of {len(state['std'])}; "
                "make the sampler for the same data set"
            )
        super().load_state_dict(state)
        self._std = state["std"].clone()

    def _draw(self) -> list[int]:
        drawn = torch.multinomial(self.probability, self.batch_size, replacement=False, generator=self._generator)
        indices: list[int] = drawn.repeat_interleave(self.repeats).tolist()
        return indices


def _ids(who: str, tasks: Tensor | Sequence[int]) -> Tensor:
    ids = torch.as_tensor(tasks).cpu()
    if ids.dim() != 1 or len(ids) == 0 or ids.is_floating_point() or ids.dtype == torch.bool or int(ids.min()) < 0:
        raise ValueError(
            f"{who}: tasks must be at least one integer >= 0 per example, got {list(ids.shape)} of {ids.dtype}"
            + (f" from {int(ids.min())}" if ids.dim() == 1 and len(ids) else "")
            + "; number the tasks from 0"
        )
    return ids.long()


def _copied(value: Any) -> Any:
    return (
        [_copied(one) for one in value]
        if isinstance(value, list)
        else value.clone()
        if isinstance(value, Tensor)
        else value
    )
