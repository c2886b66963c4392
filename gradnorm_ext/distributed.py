"""Several processes with examples of their own: which they are, and how their figures become those of all.

The engines are PyTorch's: DDP and FSDP2 reduce gradients, DTensor splits layers. What is added here are a few numbers per
task and block, and `agree`, by which ranks stay in step where verifying takes collectives (FSDP2).
"""

from __future__ import annotations

import atexit
import dataclasses
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradnorm_ext.rewards import RewardStats
from gradnorm_ext.stats import Stats

How = Literal["unbiased", "exact", "local"]


_begun: set[Any] = set()  # reductions that nobody has waited for


@atexit.register
def _wait_for_begun() -> None:
    """Other ranks wait for this one's part; and a thread that is in one when the interpreter is gone aborts the process."""
    for work in list(_begun):
        with suppress(RuntimeError):  # of ranks that have failed: nobody asks for these figures any more
            work.wait()


@dataclass(frozen=True)
class Ranks:
    """The processes among which the batch is divided.

    Attributes:
        groups: the process groups to reduce over, one after the other (two where FSDP2 also replicates).
        divisor: what the engine divides the sum of the ranks' gradients by.
        exact: norms of tasks are those of gradients summed over the ranks; else estimates from each rank's norms.
        engine: "ddp", "fsdp" or, where a process group was given and neither is there, "other".
        one_backward: DDP with a static graph reduces after the first backward to its output, whatever that was for.
    """

    groups: tuple[Any, ...]
    divisor: float
    exact: bool
    engine: Literal["ddp", "fsdp", "other"]
    one_backward: bool = False

    @property
    def size(self) -> int:
        size = 1
        for group in self.groups:
            size *= dist.get_world_size(group)
        return size

    def total(self, tensor: Tensor, op: Any = None) -> Tensor:
        """The sum over the ranks (or another reduction), in place; waits for them."""
        return self.begin_total(tensor, op)()

    def begin_total(self, tensor: Tensor, op: Any = None) -> Callable[[], Tensor]:
        """The same, begun: what is returned waits for the ranks. All of them begin, any may leave the waiting out."""
        op = dist.ReduceOp.SUM if op is None else op
        *inner, last = self.groups
        for group in inner:  # a sum of these sums cannot begin before
            dist.all_reduce(tensor, op, group)
        work = dist.all_reduce(tensor, op, last, async_op=True)
        _begun.add(work)

        def arrived() -> Tensor:
            try:
                work.wait()
            finally:
                _begun.discard(work)
            return tensor

        return arrived

    def same(self, tensor: Tensor) -> Tensor:
        """The first rank's tensor, on every rank."""
        tensor = tensor.contiguous().clone()
        for group in reversed(self.groups):
            dist.broadcast(tensor, group_src=0, group=group)
        return tensor

    def agree(self, *numbers: int) -> list[int]:
        """The largest of each number over the ranks; waits for them."""
        device = "cpu" if dist.get_backend(self.groups[0]) == "gloo" else torch.accelerator.current_accelerator()
        agreed: list[int] = self.total(torch.tensor(numbers, device=device), dist.ReduceOp.MAX).tolist()
        return agreed

    def together(self, stats: Stats) -> Stats:
        """A rank's statistics with the tasks' figures of all ranks; examples, prompts and their norms stay its own.

        With S_r = Σ‖u‖² over the n_r units u of a rank and T_r = ‖Σ u‖², both exact there, and sums over the ranks r:

            task_sqnorm_unbiased = Σ (T_r - S_r) / Σ n_r (n_r - 1)         task_variance = Σ (S_r - T_r / n_r) / Σ (n_r - 1)
            task_sqnorm = Σ S_r + n (n - 1) task_sqnorm_unbiased,  n = Σ n_r

        The last estimates ``‖Σ u‖²`` over all ranks without bias, as units of one task are alike. Where no rank has two
        units of a task that has several, nothing tells, and all three are NaN. With ``exact``, T is ‖Σ u‖² of all ranks.

        The sums are on their way when this returns; whoever reads a figure of all ranks waits for them (`Arriving`).
        """
        parts = [stats, *stats.layers.values()]
        of_parts = torch.stack([_sums(part, self.exact) for part in parts])
        reward, sent = stats.reward, of_parts.flatten()
        if reward is not None:
            sent = torch.cat([sent, self._reward_sums(reward, sent.device).flatten()])
        arrived = self.begin_total(sent)

        def whole() -> Stats:
            of_all, of_rewards = arrived().split([of_parts.numel(), sent.numel() - of_parts.numel()])
            of_each = zip(parts, of_all.view_as(of_parts).unbind(), strict=True)
            found = [_whole(part, sums, self.exact) for part, sums in of_each]
            layers = dict(zip(stats.layers, found[1:], strict=True))
            rewards = None if reward is None else _whole_reward(reward, of_rewards.view(8, -1))
            return dataclasses.replace(found[0], layers=layers, reward=rewards)

        return Arriving(stats, arrived, whole)

    def _reward_sums(self, reward: RewardStats[Tensor], device: torch.device) -> Tensor:
        """``[8, K]`` float64: what adds up over ranks. The best and the worst rewards of all are asked for before."""
        n_tasks, known = len(reward.task_mean), reward.count > reward.ddof
        rewards = reward.rewards.double()
        extremes = torch.stack([rewards.max(), -rewards.min()]) if len(rewards) else rewards.new_full((2,), -torch.inf)
        high, low = self.total(extremes.to(device), dist.ReduceOp.MAX).to(rewards.device).unbind()
        low, spread = -low, high != -low
        of_prompts = [torch.ones_like(reward.std), known, torch.where(known, reward.std, 0), reward.zero_std]
        of_prompts += [reward.zero_std & (reward.mean == end) & spread for end in (high, low)]
        sums = rewards.new_zeros(8, n_tasks)
        sums[:6].index_add_(1, reward.task, torch.stack([each.double() for each in of_prompts]))
        of_examples = torch.stack([torch.ones_like(rewards), rewards])
        sums[6:].index_add_(1, reward.task[reward.prompt_of], of_examples)
        return sums.to(device)


class _Figure:
    """A figure of all ranks, formed when it is first read; from then on the instance has it, and goes before this."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, stats: Arriving | None, owner: type) -> Any:
        if stats is None:
            return self
        Arriving.form(stats)  # another thread may have made it a Stats by now
        return vars(stats)[self.name]


class Arriving(Stats):
    """A rank's statistics while the sums over the ranks are on their way.

    Examples, prompts and their norms are there. The first read of any other figure waits for the ranks and forms all of
    them, whereupon this is a `Stats` like others; so does a copy and a pickle. Where a rank has failed, it raises.
    """

    task_norm = _Figure()
    task_sqnorm_unbiased = _Figure()
    task_variance = _Figure()
    task_units = _Figure()
    task_count = _Figure()
    layers = _Figure()
    reward = _Figure()
    finite = _Figure()
    task_gram = _Figure()
    task_sqnorm = _Figure()

    def __init__(self, own: Stats, arrived: Callable[[], Any], whole: Callable[[], Stats]) -> None:
        """``own``: this rank's; ``arrived`` waits for the ranks, and ``whole`` makes their statistics of it."""
        there = {name: value for name, value in vars(own).items() if name not in vars(Arriving)}
        vars(self).update(there, _arrived=arrived, _whole=whole, _lock=threading.Lock())

    def wait(self) -> None:
        """Wait for the ranks, once: where one has failed, this raises, and later reads of figures do."""
        if (arrived := vars(self).pop("_arrived", None)) is not None:
            arrived()

    def form(self) -> None:
        """Wait for the ranks and become what they have measured."""
        lock = vars(self).get("_lock")  # absent: another thread has formed it
        with lock or nullcontext():
            if (whole := vars(self).get("_whole")) is None:
                return
            with torch.inference_mode(False), torch.no_grad():
                formed = whole()
            vars(self).update(vars(formed))
            object.__setattr__(self, "__class__", Stats)
            for name in ("_arrived", "_whole", "_lock"):
                vars(self).pop(name, None)

    def __reduce_ex__(self, protocol: Any) -> Any:
        Arriving.form(self)
        return self.__reduce_ex__(protocol)


@dataclass(frozen=True)
class Shards:
    """A model under FSDP2, whose backward takes collectives."""

    ranks: Ranks | None  # None: there is but one process
    groups: Sequence[Any]  # FSDP2's records of what is sharded together
    _shards: dict[int, Tensor] = field(default_factory=dict)

    def agree(self, *numbers: int) -> list[int]:
        """The largest of each number over the ranks."""
        return list(numbers) if self.ranks is None else self.ranks.agree(*numbers)

    def shard_of(self, parameter: Any) -> Tensor | None:
        """This rank's part of a parameter that is whole between FSDP2's hooks."""
        if id(parameter) not in self._shards:  # FSDP2 makes the whole one when it first gathers it, and then keeps it
            gathered = (one for group in self.groups for one in group.fsdp_params if hasattr(one, "_unsharded_param"))
            self._shards.update({id(one._unsharded_param): one.sharded_param for one in gathered})
        return self._shards.get(id(parameter))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A backward inside another: what is whole now stays so for the outer one, and nothing is reduced."""
        before = [(group, group.reduce_grads, group.reshard_after_backward) for group in self.groups]
        whole = [(group, group._training_state) for group in self.groups if group.is_unsharded]
        for group in self.groups:
            group.reduce_grads = False
            group.reshard_after_backward = group.reshard_after_backward and not group.is_unsharded
        try:
            yield
        finally:
            for group, reduce_grads, reshard_after_backward in before:
                group.reduce_grads, group.reshard_after_backward = reduce_grads, reshard_after_backward
            for group, state in whole:
                group._training_state = state


def _sums(stats: Stats, exact: bool) -> Tensor:
    """``[8, K]`` float64: what adds up over ranks; with a Gram matrix of this rank's, ``[8 + 2 K, K]``."""
    n, count = stats.task_units.double(), stats.task_count.double()
    units, task_of_unit = stats.example_norm, stats.tasks
    if stats.prompt_norm is not None and stats.prompts is not None:
        units, task_of_unit = stats.prompt_norm, torch.zeros_like(stats.prompt_norm, dtype=torch.int64)
        task_of_unit.scatter_(0, stats.prompts, stats.tasks)
    square = torch.zeros_like(n).index_add(0, task_of_unit, units.double().square())
    whole = square if exact or stats.task_norm is None else stats.task_norm.double().square()
    # Below two units both are 0 but for rounding, which is all that would be left where no rank has two.
    apart, spread = (torch.where(n > 1, figure, 0) for figure in (whole - square, square - whole / n))
    bad = (~stats.finite).to(n).expand_as(n)
    sums = torch.stack([n, count, square, apart, n * (n - 1), spread, (n - 1).clamp(min=0), bad])
    if stats.task_gram is None or exact:
        return sums
    both = n * n[:, None]
    return torch.cat([sums, torch.where(both > 0, stats.task_gram.double(), 0), both])


def _whole(stats: Stats, sums: Tensor, exact: bool) -> Stats:
    n, count, square, apart, pairs, spread, free, bad = sums[:8].unbind()
    figures: dict[str, Tensor | None] = {}
    if stats.task_norm is not None:
        dtype = stats.task_norm.dtype
        if exact:
            sqnorm = stats.task_norm.double().square()
            unbiased, variance = (sqnorm - square) / (n * (n - 1)), (square - sqnorm / n) / (n - 1)
        else:
            unbiased, variance = apart / pairs, spread / free
            sqnorm = torch.where(n > 1, square + n * (n - 1) * unbiased, square)
        figures = {
            "task_norm": sqnorm.clamp(min=0).sqrt().to(dtype),
            "task_sqnorm": sqnorm.to(dtype),
            "task_sqnorm_unbiased": torch.where(n > 1, unbiased, torch.nan).to(dtype),
            "task_variance": torch.where(n > 1, variance, torch.nan).to(dtype),
        }
        if stats.task_gram is not None and not exact:
            met, of_pairs = sums[8:].chunk(2)
            both = n * n[:, None]
            gram = torch.where(both > 0, both * met / of_pairs, 0)
            figures["task_gram"] = gram.diagonal_scatter(sqnorm).to(dtype)
    counts = {"task_units": n.long(), "task_count": count.long(), "finite": bad.sum() == 0}
    return dataclasses.replace(stats, **figures, **counts)  # type: ignore[arg-type]


def _whole_reward(reward: RewardStats[Tensor], sums: Tensor) -> RewardStats[Tensor]:
    """The tasks' figures over the prompts of all ranks; percentiles do not add up and are NaN."""
    prompts, groups, std, zero, best, worst, count, total = sums.to(reward.mean.device).unbind()
    live = prompts - zero
    figures = {
        "task_mean": total / count,
        "task_std_mean": std / groups,
        "task_std_p10": torch.full_like(total, torch.nan),
        "task_zero_std_share": zero / prompts,
        "task_all_best_share": best / prompts,
        "task_all_worst_share": worst / prompts,
        "task_share": prompts / prompts.sum(),
        "task_realised_share": live / live.sum(),
    }
    return dataclasses.replace(reward, **{name: value.to(reward.mean.dtype) for name, value in figures.items()})  # type: ignore[arg-type]


def empty_rewards(rewards: Tensor, n_tasks: int) -> RewardStats[Tensor]:
    """The figures of no rewards, of a rank without examples."""
    nothing = rewards if rewards.is_floating_point() else rewards.double()
    none, nan = nothing.long(), nothing.new_full((n_tasks,), torch.nan)
    return RewardStats(
        **dict.fromkeys(("prompt", "task", "count", "prompt_of"), none),
        **dict.fromkeys(("mean", "std", "std_error", "rewards"), nothing),
        **dict.fromkeys(("zero_std", "all_best", "all_worst"), none.bool()),
        **{field.name: nan for field in dataclasses.fields(RewardStats) if field.name.startswith("task_")},
        ddof=1,
    )


def find_ranks(who: str, modules: Sequence[tuple[str, nn.Module]], how: How | None, process_group: Any) -> Ranks | None:
    """The processes that have other examples of the same model, None where there are none or ``how`` is "local".

    Those of the process group that is given, else of the DDP or of FSDP2's mesh among the model's modules.

    Raises:
        RuntimeError: FSDP1, whose flat parameters hide the layers'; DDP's join context; parts of the model sharded
            differently.
    """
    if not dist.is_available() or not dist.is_initialized() or how == "local":
        return None
    ddp = [module for _, module in modules if isinstance(module, DistributedDataParallel)]
    sharded = sharded_modules(modules)
    for name, module in modules:
        if type(module).__name__ == "FullyShardedDataParallel":
            raise RuntimeError(
                f"{who}: parameters must be tensors of their own, got {name or 'the model'} (FullyShardedDataParallel), "
                "which flattens them; shard with torch.distributed.fsdp.fully_shard"
            )
    groups: tuple[Any, ...]
    divisor: float | None
    if sharded:
        found = {_of_mesh(group) for module in sharded for group in parameter_groups(module)}
        if len(found) != 1:
            raise RuntimeError(
                f"{who}: all of the model must be sharded over one mesh with one gradient divide factor, got {len(found)}; "
                'shard it alike, or measure each rank by itself with ranks="local"'
            )
        groups, divisor = found.pop()
        engine: Literal["ddp", "fsdp", "other"] = "fsdp"
    elif ddp:
        if ddp[0]._join_config.enable:
            raise RuntimeError(
                f"{who}: every rank must run every block, got DDP's join context; give a rank that has run out of "
                "examples an empty batch, observe(tasks=[])"
            )
        groups, divisor, engine = (ddp[0].process_group,), None, "ddp"
    elif process_group is not None:
        groups, divisor, engine = (process_group,), None, "other"
    else:
        return None
    if process_group is not None:
        groups = (process_group,)
    ranks = Ranks(groups, 1.0, how == "exact", engine, any(module.static_graph for module in ddp))
    return None if ranks.size == 1 else dataclasses.replace(ranks, divisor=float(divisor or ranks.size))


def split_among(model: nn.Module) -> int:
    """How many processes have parts of the same layers and the same examples (tensor parallelism); else 1."""
    meshes = [getattr(parameter, "device_mesh", None) for parameter in model.parameters()]
    return max((mesh.size() for mesh in meshes if mesh is not None), default=1)


def splits_layers(modules: Sequence[tuple[str, nn.Module]], shards: Shards | None) -> bool:
    """Whether layers are split among processes that have the same examples (tensor parallelism), under FSDP2 or not."""
    if shards is not None:
        return any(one.is_dtensor for group in shards.groups for one in group.fsdp_params)
    parameters = (p for _, module in modules for p in module._parameters.values())
    return any(hasattr(p, "device_mesh") for p in parameters)


def sharded_modules(modules: Sequence[tuple[str, nn.Module]]) -> list[nn.Module]:
    """Those that FSDP2's ``fully_shard`` was called on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [module for _, module in modules if isinstance(module, fsdp.FSDPModule)]


def parameter_groups(module: Any) -> list[Any]:
    """FSDP2's own record of what it shards together; before torch 2.11 there was one of each module."""
    state = module._get_fsdp_state()
    several: list[Any] | None = getattr(state, "_fsdp_param_groups", None)
    return several if several is not None else [one for one in [state._fsdp_param_group] if one is not None]


def _of_mesh(group: Any) -> tuple[tuple[Any, ...], float | None]:
    """Of an FSDP2 parameter group: the process groups its examples are divided among, and what gradients are divided by."""
    names = ("replicate_process_group", "shard_process_group")  # the outer dimension of the mesh first
    found = tuple(getattr(group.mesh_info, name) for name in names if getattr(group.mesh_info, name, None) is not None)
    return found, group.gradient_divide_factor
