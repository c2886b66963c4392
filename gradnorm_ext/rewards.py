"""What the rewards of sampled groups say: their spread per prompt, what it means for each task, and advantages."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, NoReturn, overload

import numpy as np
import torch
from torch import Tensor

from gradnorm_ext import backends, ops

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import TypeVar

    Array = TypeVar("Array", Tensor, NDArray[Any], default=Tensor)
else:
    from typing import TypeVar

    Array = TypeVar("Array")

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
SCALES = ("group", "batch", "none")


@dataclass(frozen=True)
class RewardStats(Generic[Array]):
    """The rewards of every prompt's examples, and of every task's prompts. Made by :func:`reward_stats`.

    Per prompt, ``[P]``, in ascending order of the prompts' ids; ``G`` is the number of the prompt's examples:

    Attributes:
        prompt: the ids, int64.
        task: the task of each prompt, int64; 0 where no tasks were given.
        count: G, int64.
        mean: the mean reward, in the rewards' units, as ``std`` and ``std_error`` are.
        std: sqrt(Σ (r - mean)² / (G - ddof)); exactly 0 for equal rewards, NaN where G <= ddof.
        std_error: the standard error of ``std``, sqrt(Var(s²)) / (2 s) with Var(s²) = (m4 - s⁴ (G-3)/(G-1)) / G,
            m4 = Σ (r - mean)⁴ / G and s² the variance of ddof 1 (the delta method on the variance of a sample
            variance, derived for this package); with ``ddof=0`` it shrinks as ``std`` does. NaN where G < 2 or s = 0.
        zero_std: bool: G >= 2 and the largest reward equals the smallest: the prompt's policy gradient vanishes. Never
            decided by ``std == 0``, which float noise turns into a spread. A group of one is not ``zero_std`` (its
            spread is unknown), though it has no signal either; nor is a group with a NaN.
        all_best: bool: ``zero_std``, and the constant reward is the batch's largest. Where all rewards of the batch
            are equal nothing tells best from worst, and both this and ``all_worst`` are False. The batch's extremes
            are taken over all tasks, NaN left out: tasks whose rewards have different ranges want a call each.
        all_worst: bool: ``zero_std``, and the constant reward is the batch's smallest.

    Per example, ``[N]``:

    Attributes:
        prompt_of: the position in ``prompt`` of each example's prompt, int64.
        rewards: what came, floating.

    Per task, ``[K]``; a share is a fraction from 0 to 1, and a task without prompts has NaN but for its two shares of
    the prompts, which are 0:

    Attributes:
        task_mean: the mean reward of the task's examples.
        task_std_mean: the mean of ``std`` over the task's prompts with G > ddof; NaN if there are none.
        task_std_p10: the 10th percentile of the same, interpolated linearly (``numpy.percentile``).
        task_zero_std_share: how many of the task's prompts are ``zero_std``; likewise ``task_all_best_share`` and
            ``task_all_worst_share``.
        task_share: how many of all prompts are the task's.
        task_realised_share: how many of the prompts that are not ``zero_std`` are the task's: its share of the batch
            after filtering. NaN where every prompt is ``zero_std``.

    A NaN reward makes the prompt's mean, std and standard error NaN, its task's figures but ``task_share``, and every
    task's ``task_realised_share``, whose denominator is then unknown.
    """

    prompt: Array
    task: Array
    count: Array
    mean: Array
    std: Array
    std_error: Array
    zero_std: Array
    all_best: Array
    all_worst: Array
    prompt_of: Array
    task_mean: Array
    task_std_mean: Array
    task_std_p10: Array
    task_zero_std_share: Array
    task_all_best_share: Array
    task_all_worst_share: Array
    task_share: Array
    task_realised_share: Array
    rewards: Array
    ddof: int

    @property
    def vanished(self) -> Array:
        """The ids of the prompts whose rewards are all equal; looking at them waits for the device."""
        ids: Array = self.prompt[self.zero_std]
        return ids

    def signal(self, score_norm: Array) -> Array:
        """How strong a policy gradient each prompt can have, ``[P]``, in the rewards' units times the score's.

            signal[p] = std[p] · sqrt( mean_{i of p} score_norm[i]² )

        It bounds the norm of the gradient of the prompt's expected reward, by Cauchy-Schwarz: derived for this package,
        tighter than the bounds by the standard deviation alone of Razin et al. (arXiv 2503.15477). 0 where all rewards
        are equal, NaN where ``std`` or all of the prompt's scores are unknown.

        Args:
            score_norm: ``[N]``: ‖∇ log π‖ of each example, or a bound: sqrt of its W-score, times a bound of the
                logits' Jacobian. Of the rewards' kind; NaN where unknown.

        Raises:
            ValueError: another shape.

        Example:
            >>> reward_stats(torch.tensor([2., 0.]), torch.tensor([0, 0])).signal(torch.tensor([3., 4.]))
            tensor([5.])
        """
        if score_norm.shape != self.prompt_of.shape:
            raise ValueError(
                f"RewardStats.signal: score_norm must be [{len(self.prompt_of)}], one per example, got "
                f"{list(score_norm.shape)}; pass ‖∇ log π‖ of each"
            )
        score = torch.as_tensor(score_norm).double()
        std, zero_std, prompt_of = (
            torch.as_tensor(each).to(score.device, non_blocking=True)
            for each in (self.std, self.zero_std, self.prompt_of)
        )
        known = (~score.isnan()).double()
        square = score.new_zeros(2, len(std)).index_add_(
            1, prompt_of, torch.stack([score.nan_to_num().square(), known])
        )
        signal = torch.where(zero_std, 0.0, std * (square[0] / square[1]).sqrt()).to(std.dtype)
        return signal.numpy() if isinstance(score_norm, np.ndarray) else signal

    @staticmethod
    def merged(blocks: Sequence[RewardStats[Array]]) -> RewardStats[Array]:
        """The figures of all blocks' rewards together, as if they had come as one batch.

        Args:
            blocks: at least one, of one kind and ``ddof``; a task's number is the same in all.

        Raises:
            ValueError: examples of one prompt in several blocks.

        Example:
            >>> blocks = [reward_stats(torch.tensor([1., 0.]), torch.tensor([p, p])) for p in (0, 1)]
            >>> RewardStats.merged(blocks).prompt
            tensor([0, 1])
        """
        first_seen: dict[int, int] = {}
        for block, stats in enumerate(blocks):
            for prompt in stats.prompt.tolist():
                if first_seen.setdefault(prompt, block) != block:
                    raise ValueError(
                        f"RewardStats.merged: a prompt's examples must lie in one block, got prompt {prompt} in blocks "
                        f"{first_seen[prompt]} and {block}; keep groups together, or number prompts across blocks"
                    )
        if not first_seen:  # no examples at all: nothing to form anew
            return blocks[0]
        join = np.concatenate if isinstance(blocks[0].rewards, np.ndarray) else torch.cat
        return reward_stats(
            join([stats.rewards for stats in blocks]),
            join([stats.prompt[stats.prompt_of] for stats in blocks]),
            join([stats.task[stats.prompt_of] for stats in blocks]),
            ddof=blocks[0].ddof,
            n_tasks=max(len(stats.task_mean) for stats in blocks),
        )


@overload
def reward_stats(
    rewards: Tensor,
    prompts: Tensor,
    tasks: Tensor | None = None,
    *,
    ddof: int = 1,
    n_tasks: int | None = None,
    group_size: int | None = None,
) -> RewardStats[Tensor]: ...
@overload
def reward_stats(
    rewards: NDArray[Any],
    prompts: NDArray[Any],
    tasks: NDArray[Any] | None = None,
    *,
    ddof: int = 1,
    n_tasks: int | None = None,
    group_size: int | None = None,
) -> RewardStats[NDArray[Any]]: ...
def reward_stats(
    rewards: Any,
    prompts: Any,
    tasks: Any = None,
    *,
    ddof: int = 1,
    n_tasks: int | None = None,
    group_size: int | None = None,
) -> RewardStats[Any]:
    """The spread of the rewards of every prompt's examples, and what it says about each task.

        std[p] = sqrt( Σ_{i of p} (rewards[i] - mean[p])² / (G[p] - ddof) )        formed in float64

    A prompt whose rewards are all equal gives every example an advantage of zero, and its policy gradient vanishes
    (Razin et al., arXiv 2503.15477, bound it by the cube root of the rewards' variance; their code takes ``ddof=1``).

    Args:
        rewards: ``[N]``, floating, integer or bool; torch tensors on one device, or NumPy arrays, all three alike.
        prompts: ``[N]`` integers, any values: examples with equal ids were sampled from one prompt.
        tasks: ``[N]`` integers from 0, one task per prompt, or None: everything is one task.
        ddof: 1 for the sample's standard deviation, 0 for the population's.
        n_tasks: how many tasks there are, where the batch may lack some; None: the largest one given, plus 1.
        group_size: how many examples every prompt must have, so that a group that was split across micro-batches is
            found out: its parts have other means and deviations than the whole. None: any number.

    Returns:
        :class:`RewardStats` of what came: tensors on the rewards' device, or arrays. Floating figures are float64 for
        float64, integer and bool rewards (these are converted to float64), else float32.

    Raises:
        TypeError: neither all tensors nor all arrays, or a dtype other than those above.
        ValueError: no examples, sizes or devices that differ, a task out of range, a prompt in two tasks, a group of
            another size than ``group_size``.

    On a GPU this waits for the device: how many prompts there are is read back.

    Example:
        >>> rewards = torch.tensor([1., 0., 0.9, 0.9, 0., 0.])
        >>> stats = reward_stats(rewards, torch.tensor([7, 7, 3, 3, 5, 5]), torch.tensor([0, 0, 1, 1, 1, 1]))
        >>> stats.prompt, stats.std, stats.vanished
        (tensor([3, 5, 7]), tensor([0.0000, 0.0000, 0.7071]), tensor([3, 5]))
        >>> stats.task_share, stats.task_realised_share
        (tensor([0.3333, 0.6667]), tensor([1., 0.]))
    """
    arrays, rewards, prompts, tasks = _tensors("reward_stats", rewards, prompts, tasks)
    if isinstance(ddof, bool) or not isinstance(ddof, numbers.Integral) or ddof not in (0, 1):
        raise ValueError(f"reward_stats: ddof must be 0 or 1, got {ddof!r}; pass 1 for the sample's standard deviation")
    if n_tasks is not None and (
        isinstance(n_tasks, bool) or not isinstance(n_tasks, numbers.Integral) or int(n_tasks) < 1
    ):
        raise ValueError(f"reward_stats: n_tasks must be an integer >= 1, got {n_tasks!r}; pass the number of tasks")
    n_tasks = None if n_tasks is None else int(n_tasks)

    rewards = rewards.detach()
    native = rewards.device.type == "cpu" and _has_native()
    stats = (_native_stats if native else _stats)(rewards, prompts, tasks, n_tasks, int(ddof))
    _check_group_size("reward_stats", stats.prompt, stats.count, group_size)
    return _numpy(stats) if arrays else stats


@overload
def group_advantages(
    rewards: Tensor,
    prompts: Tensor,
    *,
    scale: Literal["group", "batch", "none"] = "group",
    eps: float = 1e-6,
    group_size: int | None = None,
) -> Tensor: ...
@overload
def group_advantages(
    rewards: NDArray[Any],
    prompts: NDArray[Any],
    *,
    scale: Literal["group", "batch", "none"] = "group",
    eps: float = 1e-6,
    group_size: int | None = None,
) -> NDArray[Any]: ...
def group_advantages(
    rewards: Any,
    prompts: Any,
    *,
    scale: Literal["group", "batch", "none"] = "group",
    eps: float = 1e-6,
    group_size: int | None = None,
) -> Any:
    """Advantage of every example over the others of its prompt.

        A[i] = (r[i] - mean of its prompt) / (std + eps)        formed in float64

    ``std`` (ddof 1) is that of the prompt's rewards for ``scale="group"``, as in GRPO; that of all rewards of the batch
    for ``"batch"``, as in LitePPO; and for ``"none"`` nothing is divided, as in Dr. GRPO. The methods are named as is
    common, not compared with the formulas in their papers; ``eps`` differs between implementations, as their code
    shows: TRL has 1e-4, verl 1e-6, OpenRLHF 1e-9.

    Equal rewards give exactly 0, whatever their rounding: in plain float32 the mean of many rewards of 0.9 is not 0.9,
    and the difference is divided by little more than ``eps``. A group of one gives 0 too (verl takes mean 0 and std 1
    there, which hands back the reward). A NaN makes its prompt's
    advantages NaN, and with ``"batch"`` everybody's but those of equal rewards.

    Args:
        rewards: ``[N]``, floating, integer or bool; a torch tensor or a NumPy array.
        prompts: ``[N]`` integers, of the same kind: examples with equal ids were sampled from one prompt.
        scale: what to divide by.
        eps: added to the standard deviation, in the rewards' units.
        group_size: as of :func:`reward_stats`: a group of which a part is missing has another mean.

    Returns:
        ``[N]``, of the rewards' kind: float64 for float64, integer and bool rewards, else float32. No gradient flows.

    Raises:
        TypeError, ValueError: as :func:`reward_stats`; another ``scale``; a negative or infinite ``eps``.

    Example:
        >>> group_advantages(torch.tensor([1., 0., 0.9, 0.9]), torch.tensor([0, 0, 1, 1]))
        tensor([ 0.7071, -0.7071,  0.0000,  0.0000])
        >>> group_advantages(np.array([3, 1, 5]), np.array([0, 0, 1]), scale="none")
        array([ 1., -1.,  0.])
    """
    arrays, rewards, prompts, _ = _tensors("group_advantages", rewards, prompts, None)
    if scale not in SCALES:
        raise ValueError(
            f"group_advantages: scale must be one of {', '.join(SCALES)}, got {scale!r}; pass none for Dr. GRPO's"
        )
    if isinstance(eps, bool) or not isinstance(eps, numbers.Real) or not 0 <= eps < math.inf:
        raise ValueError(f"group_advantages: eps must be a finite number >= 0, got {eps!r}; pass 1e-6")

    exact = rewards.detach().double()
    prompt, prompt_of = torch.unique(prompts, return_inverse=True)
    group = ops.segment_std(exact, prompt_of, len(prompt), ddof=1)
    _check_group_size("group_advantages", prompt, group.count, group_size)
    advantages = exact - group.mean[prompt_of]
    if scale == "group":
        advantages = advantages / (group.std[prompt_of] + eps)
    elif scale == "batch":
        advantages = advantages / (ops.segment_std(exact, torch.zeros_like(prompt_of), 1, ddof=1).std + eps)
    advantages = torch.where((group.low == group.high)[prompt_of], 0.0, advantages)
    advantages = advantages.to(_figures(rewards.dtype))
    return advantages.numpy() if arrays else advantages


def _check_group_size(who: str, prompt: Tensor, count: Tensor, group_size: int | None) -> None:
    if group_size is None:
        return
    if isinstance(group_size, bool) or not isinstance(group_size, numbers.Integral) or group_size < 1:
        raise ValueError(f"{who}: group_size must be an integer >= 1, got {group_size!r}; pass the samples per prompt")
    wrong = (count != int(group_size)).nonzero()
    if len(wrong):
        p = int(wrong[0])
        raise ValueError(
            f"{who}: every prompt must have {group_size} examples, got {int(count[p])} of prompt {int(prompt[p])}; "
            "its group was split across micro-batches: call this on whole groups"
        )


class _Groups(NamedTuple):
    """Per prompt, in float64 and with ddof 1; ``constant``: all rewards are equal, and ``mean`` is exactly theirs."""

    prompt: Tensor
    prompt_of: Tensor
    size: Tensor
    mean: Tensor
    std: Tensor
    std_error: Tensor
    constant: Tensor


def _groups(rewards: Tensor, prompts: Tensor) -> _Groups:
    exact = rewards.detach().double()
    prompt, prompt_of = torch.unique(prompts, return_inverse=True)
    group = ops.segment_std(exact, prompt_of, len(prompt), ddof=1)
    fourth_power = (exact - group.mean[prompt_of]).pow(4)
    fourth_moment = ops.segment_std(fourth_power, prompt_of, len(prompt), ddof=1).mean
    size = group.count.double()
    variance_error = ((fourth_moment - group.std.pow(4) * (size - 3) / (size - 1)) / size).clamp(min=0).sqrt()
    constant = group.low == group.high
    mean = torch.where(constant, group.low, group.mean)  # a rounded sum of equal numbers need not divide back
    return _Groups(prompt, prompt_of, group.count, mean, group.std, variance_error / (2 * group.std), constant)


def _has_native() -> bool:
    return backends.choose("auto") in ("auto", "native") and not isinstance(backends.load("native"), str)


def _native_stats(
    rewards: Tensor, prompts: Tensor, tasks: Tensor | None, n_tasks: int | None, ddof: int
) -> RewardStats:
    from gradnorm_ext import _C  # here, not above: it may not have been built

    exact = rewards if rewards.dtype in (torch.float32, torch.float64) else rewards.float()
    of_task = None if tasks is None else tasks.numpy()
    figures = _C.reward_stats(exact.numpy(), prompts.numpy(), of_task, n_tasks=n_tasks, ddof=ddof)
    refused = figures.pop("refused")
    if tasks is not None and refused >= 0:
        _task_count(tasks, n_tasks)  # refuses a task out of range, wherever it is
        _refuse_torn(prompts, tasks, refused)
    tensors = {name: torch.from_numpy(array) for name, array in figures.items()}
    return RewardStats(**tensors, rewards=rewards.clone(), ddof=ddof)


def _stats(rewards: Tensor, prompts: Tensor, tasks: Tensor | None, n_tasks: int | None, ddof: int) -> RewardStats:
    """The definition, and what runs on a GPU."""
    n_tasks = _task_count(tasks, n_tasks)
    groups = _groups(rewards, prompts)
    task = torch.zeros_like(groups.prompt)
    if tasks is not None:
        task.scatter_reduce_(0, groups.prompt_of, tasks, "amin", include_self=False)
        differs = task[groups.prompt_of] != tasks
        if bool(differs.any()):
            _refuse_torn(prompts, tasks, int(differs.nonzero()[0, 0]))
    return _stats_of(rewards, groups, task, n_tasks, ddof)


def _refuse_torn(prompts: Tensor, tasks: Tensor, example: int) -> NoReturn:
    prompt = int(prompts[example])
    lowest, highest = (int(task) for task in tasks[prompts == prompt].aminmax())
    raise ValueError(
        f"reward_stats: a prompt must lie in one task, got prompt {prompt} in tasks {lowest} and {highest}; "
        "give each task's prompts ids of their own"
    )


def _stats_of(rewards: Tensor, groups: _Groups, task: Tensor, n_tasks: int, ddof: int) -> RewardStats:
    exact = rewards.detach().double()
    prompt, prompt_of, count, mean, std, std_error, constant = groups
    zero_std = constant & (count >= 2)
    std, std_error = torch.where(zero_std, 0.0, std), torch.where(zero_std, torch.nan, std_error)
    if ddof == 0:
        shrink = ((count - 1) / count.double()).sqrt()
        std, std_error = torch.where(constant, 0.0, std * shrink), std_error * shrink

    highest = torch.where(exact.isnan(), -torch.inf, exact).max()
    lowest = torch.where(exact.isnan(), torch.inf, exact).min()
    telling = zero_std & (highest > lowest)
    all_best, all_worst = telling & (mean == highest), telling & (mean == lowest)

    task_of = task[prompt_of]
    spoiled = _total(exact.isnan(), task_of, n_tasks) > 0
    size = _total(torch.ones_like(task), task, n_tasks).double()
    live = _total(~zero_std, task, n_tasks).double()
    with_std = torch.where(count > ddof, task, n_tasks)  # the others go to a segment that is dropped

    dtype = _figures(rewards.dtype)

    def figure(of_task: Tensor) -> Tensor:
        return torch.where(spoiled, torch.nan, of_task).to(dtype)

    return RewardStats(
        prompt=prompt,
        task=task,
        count=count,
        mean=mean.to(dtype),
        std=std.to(dtype),
        std_error=std_error.to(dtype),
        zero_std=zero_std,
        all_best=all_best,
        all_worst=all_worst,
        prompt_of=prompt_of,
        task_mean=figure(_mean(exact, task_of, n_tasks)),
        task_std_mean=figure(_mean(std, with_std, n_tasks + 1)[:n_tasks]),
        task_std_p10=figure(_percentile(std, with_std, n_tasks + 1, 0.1)[:n_tasks]),
        task_zero_std_share=figure(_total(zero_std, task, n_tasks) / size),
        task_all_best_share=figure(_total(all_best, task, n_tasks) / size),
        task_all_worst_share=figure(_total(all_worst, task, n_tasks) / size),
        task_share=(size / len(prompt)).to(dtype),
        task_realised_share=torch.where(spoiled.any(), torch.nan, live / live.sum()).to(dtype),
        rewards=rewards.clone(),
        ddof=ddof,
    )


def _figures(rewards: torch.dtype) -> torch.dtype:
    """The dtype of what is returned; everything is formed in float64."""
    return torch.float64 if rewards == torch.float64 else torch.float32


def _total(flags: Tensor, ids: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64, device=ids.device).index_add_(0, ids, flags.long())


def _mean(values: Tensor, ids: Tensor, count: int) -> Tensor:
    figures = ops.segment_std(values, ids, count, ddof=1)
    return torch.where(figures.count > 0, figures.mean, torch.nan)


def _percentile(values: Tensor, ids: Tensor, count: int, q: float) -> Tensor:
    order = torch.argsort(values)
    order = order[torch.argsort(ids[order], stable=True)]
    ranked = values[order]
    size = _total(torch.ones_like(ids), ids, count)
    first, last = size.cumsum(0) - size, (size - 1).clamp(min=0)
    rank = q * last.double()
    below = rank.floor().long()
    inside = len(values) - 1  # the position looked up for an empty segment
    low = ranked[(first + below).clamp(max=inside)]
    high = ranked[(first + torch.minimum(below + 1, last)).clamp(max=inside)]
    largest = ranked[(first + last).clamp(max=inside)]  # NaN sorts last
    found = torch.where(largest.isnan(), torch.nan, torch.lerp(low, high, rank - below))
    return torch.where(size > 0, found, torch.nan)


def _tensors(who: str, rewards: Any, prompts: Any, tasks: Any) -> tuple[bool, Tensor, Tensor, Tensor | None]:
    """Whether arrays came, and what came as checked tensors: floating rewards and int64 ids."""
    given = {"rewards": rewards, "prompts": prompts} | ({} if tasks is None else {"tasks": tasks})
    names = _listed(list(given))
    arrays = isinstance(rewards, np.ndarray)
    if not all(isinstance(value, np.ndarray if arrays else Tensor) for value in given.values()):
        got = _listed([type(value).__name__ for value in given.values()])
        raise TypeError(
            f"{who}: {names} must be all torch tensors or all NumPy arrays, got {got}; "
            "convert them with torch.as_tensor or numpy.asarray"
        )
    if rewards.ndim != 1 or any(value.shape != rewards.shape for value in given.values()):
        got = _listed([str(list(value.shape)) for value in given.values()])
        raise ValueError(
            f"{who}: {names} must be one-dimensional and equally long, got {got}; pass one entry per example"
        )
    if len(rewards) == 0:
        raise ValueError(f"{who}: rewards must have at least one example, got [0]; skip empty batches")
    tensors = {name: (_from_numpy(who, name, value) if arrays else value) for name, value in given.items()}
    if len({value.device for value in tensors.values()}) > 1:
        got = _listed([str(value.device) for value in tensors.values()])
        raise ValueError(f"{who}: {names} must be on one device, got {got}; move them to the rewards' device")
    rewards = tensors.pop("rewards")
    if rewards.dtype not in FLOATS:
        if rewards.dtype not in (*INTEGERS, torch.bool):
            raise TypeError(f"{who}: rewards must be floating, integer or bool, got {rewards.dtype}; cast them")
        rewards = rewards.double()
    for name, ids in tensors.items():
        if ids.dtype not in INTEGERS:
            raise TypeError(f"{who}: {name} must be integers that fit int64, got {ids.dtype}; cast them")
        tensors[name] = ids.long()
    return arrays, rewards, tensors["prompts"], tensors.get("tasks")


def _from_numpy(who: str, name: str, array: NDArray[Any]) -> Tensor:
    """A copy where it must be: torch warns of an array that is read-only, and has no unsigned or foreign byte orders."""
    ids = name != "rewards"
    if array.dtype.kind not in ("iu" if ids else "fiub") or (ids and not np.can_cast(array.dtype, np.int64)):
        allowed = "integers that fit int64" if ids else "floating, integer or bool"
        raise TypeError(f"{who}: {name} must be {allowed}, got {array.dtype}; cast them")
    single = array.dtype.kind == "f" and array.dtype.itemsize <= 4
    wanted = array.astype(np.int64 if ids else np.float32 if single else np.float64, copy=False)
    usable = wanted.flags.writeable and wanted.flags.c_contiguous
    return torch.from_numpy(wanted if usable else wanted.copy())


def _numpy(stats: RewardStats) -> RewardStats[NDArray[Any]]:
    figures = {field.name: getattr(stats, field.name) for field in fields(stats)}
    arrays: dict[str, Any] = {name: one.numpy() if isinstance(one, Tensor) else one for name, one in figures.items()}
    return RewardStats(**arrays)


def _task_count(tasks: Tensor | None, n_tasks: int | None) -> int:
    """How many tasks there are, after the check that all ids are below it."""
    if tasks is None:
        return n_tasks or 1
    lowest, highest = (int(id) for id in torch.stack(torch.aminmax(tasks)))
    if lowest < 0:
        raise ValueError(f"reward_stats: tasks must not be negative, got {lowest}; number the tasks from 0")
    if n_tasks is None:
        return highest + 1
    if highest >= n_tasks:
        raise ValueError(
            f"reward_stats: tasks must lie in [0, {n_tasks}), got {lowest} to {highest}; pass a larger n_tasks"
        )
    return n_tasks


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
