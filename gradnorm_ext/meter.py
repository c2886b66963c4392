"""Measuring: an observe block around forward and backward, and the statistics it leaves."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from gradnorm_ext.distributed import (
    Arriving,
    How,
    Ranks,
    Shards,
    empty_rewards,
    find_ranks,
    parameter_groups,
    sharded_modules,
    splits_layers,
)
from gradnorm_ext.layers import (
    Examples,
    Graphs,
    Interception,
    Memory,
    Observation,
    Packing,
    Plan,
    compiled_modules,
    observe_modules,
    release_modules,
    repeatable_checkpoints,
    whole_graph_backend,
)
from gradnorm_ext.rewards import RewardStats, reward_stats
from gradnorm_ext.segments import Groups
from gradnorm_ext.stats import Stats

Ids = Tensor | Sequence[int]
TaskIds = Tensor | Sequence[int] | Sequence[str]


class Given(TypedDict, total=False):
    """What `Meter.observe` may be told of a batch."""

    tasks: TaskIds | None
    prompts: Ids | None
    rewards: Tensor | Sequence[float] | None
    cu_seqlens: Ids | None
    example_ids: Ids | Sequence[Tensor] | Mapping[str, Ids] | None
    rows_of: Mapping[str, Ids] | None
    batch_dim: int
    backwards: int
    loss_scale: float


@dataclass(frozen=True)
class _Batch:
    """Who the examples of a block are, as far as it was said."""

    examples: int | None
    tasks: Tensor | None
    prompts: Tensor | None
    task_of_prompt: Tensor | None
    n_prompts: int
    reward: RewardStats | None
    packing: Packing | None
    kinds: dict[str, Tensor]
    rows_of: dict[str, Tensor]


class Block:
    """An open observe block."""

    def __init__(self, observation: Observation, stats_of: Callable[[Tensor], Stats]) -> None:
        self.observation = observation
        self.stats_of = stats_of  # from figures as `Observation.norms` gives them
        self.stats: Stats | None = None
        self.figures: Tensor = torch.empty(0)

    def measure(self) -> Stats:
        """Take the norms; the block's backward passes for them are over."""
        self.figures = self.observation.norms().detach()
        self.stats = self.stats_of(self.figures)
        return self.stats


class Meter:
    """Measures the gradient norm of every example, prompt and task in the backward pass that training runs anyway.

        example_norm[b] = ‖ Σ_{r in b} ∂loss/∂θ through row r ‖        task_norm[k] = ‖ Σ_{b in k} gradient of b ‖

    While a block is open, the model's forward runs through observed functions whose backward yields each parameter's
    gradient and its squared norms per example from the same pass over the rows; no per-sample gradient is stored.
    Outside of it the model is untouched. ``.grad`` is what it would be without the Meter, to rounding.

    The first block (and any in which a parameter is used in a new way) also verifies itself, at the price of a few
    backward passes: that every gradient is accounted for and every row belongs to the example it is counted for.

    Args:
        model: any module; the layers that have rules are in docs/coverage.md, what is refused in docs/limits.md.
        tasks: how many tasks there are, or their names.
        modules: patterns of parameters' or modules' names ("model.layers.31.*", "head"): only these are measured, a proxy
            for all of them that costs less; ``Reweighted`` weighs all of them by it. None: all.
        per_layer: also give ``stats.layers``: the same figures for every module that owns parameters.
        gram: also give ``stats.task_gram``, the inner products of the tasks' gradients, exact; a layer's gradients of
            all tasks are in memory at a time. Over ranks with "unbiased" they are estimates, which no policy gets.
        exact_tasks: ``stats`` are of all blocks since the last `reset` (``Reweighted`` resets with every step), as of one
            batch, with ``task_norm`` and ``task_gram`` of the tasks' summed gradients: under gradient accumulation a
            batch's own are only a part. Keeps every task's gradient: K times the parameters' memory. Over ranks it needs
            ``ranks="exact"``, and no ``per_layer``.
        on_unsupported: what becomes of a use of a parameter that no rule knows: "error", or "vmap": that use alone is
            differentiated one example at a time, exact, at the price of a backward pass of it per example.
        ranks: what the tasks' figures are of, where DDP or FSDP2 divides the batch among processes. "unbiased" (None,
            the default, is the same): of all ranks' examples, ``task_norm`` as the root of an unbiased estimate, from 64
            bytes per task and block. "exact": from gradients summed over the ranks for each task, as many bytes as K
            models. "local": of this rank's. Examples' and prompts' norms are always this rank's own.
        process_group: the processes that have other examples of this model, where it is neither under DDP nor FSDP2 or
            is not given as that; it is taken to average gradients.
        backend: "auto" (the fastest that is there; also settable by GRADNORM_BACKEND), "native" or "reference".

    Under DDP and FSDP2 every norm is that of a contribution to the *reduced* ``.grad``: divided by the number of ranks,
    which the engines average over. Every rank must run every block; one without examples with ``tasks=[]``.

    Raises:
        ValueError: no trainable parameter, or no task.
        TypeError: complex parameters.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> meter = Meter(model, tasks=["easy", "hard"])
        >>> with meter.observe(tasks=[0, 1]):
        ...     model(torch.tensor([[3., 4.], [0., 1.]])).sum().backward()
        >>> meter.stats.example_norm, meter.stats.task_norm
        (tensor([5., 1.]), tensor([5., 1.]))
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tasks: int | Sequence[str] = 1,
        modules: str | Sequence[str] | None = None,
        per_layer: bool = False,
        gram: bool = False,
        exact_tasks: bool = False,
        on_unsupported: Literal["error", "vmap"] = "error",
        ranks: How | None = None,
        process_group: Any = None,
        backend: str = "auto",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"Meter: model must be a torch.nn.Module, got {type(model).__name__}; pass the model itself"
            )
        names = tuple(str(k) for k in range(tasks)) if isinstance(tasks, int) else tuple(tasks)
        if not names or len(set(names)) != len(names):
            raise ValueError(
                f"Meter: tasks must be at least one, with distinct names, got {tasks!r}; name each task once"
            )
        if on_unsupported not in ("error", "vmap"):
            raise ValueError(f'Meter: on_unsupported must be "error" or "vmap", got {on_unsupported!r}')
        if ranks not in (None, "unbiased", "exact", "local"):
            raise ValueError(f'Meter: ranks must be "unbiased", "exact" or "local", got {ranks!r}')
        self.model, self.task_names, self.per_layer, self.backend = model, names, per_layer, backend
        self.ranks, self.process_group = ranks, process_group
        self.modules = None if modules is None else (modules,) if isinstance(modules, str) else tuple(modules)
        self.gram, self.exact_tasks, self.on_unsupported = gram, exact_tasks, on_unsupported
        self.totals: dict[str, Tensor] = {}  # with exact_tasks: each parameter's gradients per task since the reset
        self._blocks: list[tuple[float, Stats]] = []  # since then, and their loss scales
        self.memory = Memory()
        self._wanted([name for name, _ in _trainable(named_modules(model))])
        self._stats: Stats | None = None
        self._parameter_sqnorm: tuple[Sequence[str], Sequence[Tensor] | Tensor] = (), ()
        self._last_groups: tuple[bool, Groups] | None = None  # of the last block, and whether it was given ids
        self._closed = False

    @property
    def stats(self) -> Stats:
        """The statistics of the last closed block. Over ranks the first read of a figure of all of them waits for these."""
        if self._stats is None:
            raise RuntimeError(
                "Meter: nothing was measured yet; run forward and backward inside `with meter.observe():`"
            )
        return self._stats

    @property
    def parameter_sqnorm(self) -> dict[str, Tensor]:
        """Of the last closed block, every trainable parameter's squared gradient norms, ``[B]``, by name."""
        return dict(zip(*self._parameter_sqnorm, strict=True))

    @contextmanager
    def observe(
        self,
        *,
        tasks: TaskIds | None = None,
        prompts: Ids | None = None,
        rewards: Tensor | Sequence[float] | None = None,
        cu_seqlens: Ids | None = None,
        example_ids: Ids | Sequence[Tensor] | Mapping[str, Ids] | None = None,
        rows_of: Mapping[str, Ids] | None = None,
        batch_dim: int = 0,
        backwards: int = 1,
        loss_scale: float = 1.0,
    ) -> Iterator[None]:
        """A context manager around the forward and the backward of one batch.

        Args:
            tasks: one integer per example, in ``[0, K)``, or one of the Meter's task names; needed where the Meter has more
                than one task. On the CPU (checked at once, no waiting for the device) or on the model's device.
            prompts: one integer per example, equal for the samples of one prompt; each prompt lies in one task.
            rewards: one number per example, for ``stats.reward``; needs ``prompts``. With NaN among them, what was measured
                is not finite.
            cu_seqlens: ``[B + 1]``, of a packed batch: example b has the rows ``cu_seqlens[b]`` to
                ``cu_seqlens[b + 1]``, at least one. Tensors then have ``[R, ...]`` or ``[1, R, ...]`` rows. What collators
                call ``cu_seq_lens_q``; :func:`gradnorm_ext.cu_seqlens` makes it of ``position_ids``.
            example_ids: the same for rows in any order: each row's example, ``R`` integers of any shape. Of several kinds of
                rows beside a batch that is not packed (images beside tokens, nodes and edges): a list of such tensors, told
                apart by their lengths, or a dict of them by the model's arguments that have these rows. An example may
                have no row of a kind.
            rows_of: for parameters or modules, by name, of whose rows nothing else says whose they are (a scale that only
                the loss sees): each row's example, one integer a row.
            batch_dim: where the model's inputs have the examples: 0, or 1 (sequence-first).
            backwards: how many backward passes the block has at most. With more than one (a loss each for chosen and
                rejected, ``retain_graph``), what the layers' backward needs is kept until the block closes.
            loss_scale: what the loss was multiplied with (a GradScaler's scale); norms are divided by it.

        Raises:
            ValueError, TypeError: ids or rewards of a wrong length, dtype, range or device; BatchNorm in training mode.
            RuntimeError: no forward or backward in the block; a use of a parameter that no rule knows; rows that do not
                belong to one example each. The model is as before and the next block works.
        """
        given: Given = {
            "tasks": tasks,
            "prompts": prompts,
            "rewards": rewards,
            "cu_seqlens": cu_seqlens,
            "example_ids": example_ids,
            "rows_of": rows_of,
            "batch_dim": batch_dim,
            "backwards": backwards,
            "loss_scale": loss_scale,
        }
        with self.block("Meter", Plan(), given) as block:
            yield
        block.observation.forget()

    @contextmanager
    def block(self, who: str, plan: Plan, given: Given, *, always_verify: bool = False) -> Iterator[Block]:
        """`observe` with a plan of what else is to happen: what `Reweighted` and `check` are built on."""
        modules = named_modules(self.model)
        engine = self._engine(who, modules)
        verify = always_verify or self.memory.due or self.memory.unverified
        if (shards := engine.get("shards")) is not None:
            verify = self.memory.asks_ranks and bool(shards.agree(int(verify))[0])
        callbacks = compiled_modules(module for _, module in modules) if _Compilation.exists() else []
        graphs = None
        if callbacks and not verify and not splits_layers(modules, shards):
            graphs = self._graphs_of(plan, given, callbacks)
        with _Compilation(who, graphs, bool(callbacks)) as graphs:
            try:
                with self._opened(who, plan, given, verify, modules, engine, graphs) as block:
                    yield block
            finally:
                if graphs is not None:
                    graphs.observation = None

    def _graphs_of(self, plan: Plan, given: Given, callbacks: Sequence[Any]) -> Graphs | None:
        """The observed graphs of a compiled model; None where this block runs it as it was written."""
        at_once = plan.passes == 1 and plan.layer_weights is None and given.get("backwards", 1) == 1
        summed = self.exact_tasks or self.ranks == "exact"  # tasks' gradients, to be summed over blocks or ranks
        if not (at_once and self.memory.verified) or summed or self.modules is not None:
            return None
        if given.get("rows_of") or _is_several(given.get("example_ids")):
            return None
        backend = None if self.memory.unobservable else whole_graph_backend(callbacks)
        return None if backend is None else Graphs.of(backend)

    @contextmanager
    def _opened(
        self,
        who: str,
        plan: Plan,
        given: Given,
        verify: bool,
        modules: Sequence[tuple[str, nn.Module]],
        engine: dict[str, Any],
        graphs: Graphs | None,
    ) -> Iterator[Block]:
        if self._closed:
            raise RuntimeError(f"{who}: the meter must be open, got one that was closed; make a new Meter")
        if isinstance(self._stats, Arriving):
            Arriving.wait(self._stats)
        loss_scale, batch_dim, backwards = (
            given.get("loss_scale", 1.0),
            given.get("batch_dim", 0),
            given.get("backwards", 1),
        )
        if not loss_scale > 0:
            raise ValueError(f"{who}: loss_scale must be positive, got {loss_scale}; pass the GradScaler's scale")
        if batch_dim not in (0, 1):
            raise ValueError(f"{who}: batch_dim must be 0 or 1, got {batch_dim}; move the batch there")
        if not (isinstance(backwards, int) and backwards >= 1):
            raise ValueError(f"{who}: backwards must be a whole number of at least 1, got {backwards!r}")
        trainable = _trainable(modules)
        parameters, wanted = trainable, None
        if self.modules is not None:
            wanted = self._wanted([name for name, _ in trainable])
            if not plan.reweights:  # weights are for all parameters; where there are none, the others are left alone
                parameters = [one for one in trainable if one[0] in wanted]
        ranks = find_ranks(who, modules, self.ranks, self.process_group)
        if ranks is not None:
            plan, loss_scale = self._over_ranks(who, plan, ranks), loss_scale * ranks.divisor
        if self.gram:
            plan = dataclasses.replace(plan, gram=True)
        if self.exact_tasks:
            plan = dataclasses.replace(plan, totals=self.totals)
            if self._blocks and self._blocks[0][0] != loss_scale:
                raise ValueError(
                    f"{who}: with exact_tasks all blocks of a step must have one loss_scale, got {self._blocks[0][0]} and "
                    f"{loss_scale}; change it between steps"
                )
        _refuse_coupled_examples(who, modules)
        device = _device_of(who, parameters)
        batch = self._batch(who, device, given, ranks)

        def start(examples: int) -> None:
            tasks = self._tasks_of(batch, examples, device)
            groups = self._groups(batch, tasks, plan)
            named = isinstance(given.get("example_ids"), Mapping)
            kinds = tuple(_kind(who, name, ids, examples, named) for name, ids in batch.kinds.items())
            for name, ids in batch.rows_of.items():
                _check_examples(who, f"rows_of[{name!r}]", ids, examples)
            observation.begin(Examples(examples, groups, batch_dim, batch.packing, kinds), tasks)

        observation = Observation(
            who,
            parameters,
            self.memory,
            plan,
            self.backend,
            start,
            batch_dim=batch_dim,
            backwards=backwards,
            wanted=wanted,
            derives=self.on_unsupported == "vmap",
            constants=functools.partial(_constants, modules),
            verify=verify,
            graphs=graphs is not None,
            rows_of=batch.rows_of,
            **engine,
        )
        names = [name for name, _ in parameters]

        def stats_of(figures: Tensor) -> Stats:
            unscaled = figures if loss_scale == 1 else figures / loss_scale**2
            stats = self._make_stats(observation, batch, unscaled, names)
            return stats if ranks is None or self.exact_tasks else ranks.together(stats)

        block = Block(observation, stats_of)
        if batch.examples is not None:
            start(batch.examples)
        if graphs is not None:
            graphs.observation = observation
        observe_modules(modules, observation)
        functions = Interception()
        closed = False
        try:
            try:
                with repeatable_checkpoints(observation):
                    yield block
            finally:
                functions.end()
                release_modules(modules, observation)
            known = {id(p) for _, p in trainable} | {id(slot.parameter) for slot in observation.slots.values()}
            now = _named_parameters(named_modules(self.model))
            if added := [name for name, p in now if p.requires_grad and id(p) not in known]:
                raise RuntimeError(
                    f"{who}: a model must keep its parameters inside an observe block, but {', '.join(added)} was added "
                    "inside the block; change it between blocks"
                )
            if block.stats is None:
                block.measure()
            observation.close()
            stats = self._of_step(block.stats, loss_scale, observation, ranks) if self.exact_tasks else block.stats
            closed = True
        finally:
            observation.release()
            if self.exact_tasks and not closed:
                self.reset()  # the totals hold a part of this block
        self._parameter_sqnorm = names, block.figures[:, : observation.examples] / loss_scale**2
        self._stats = stats

    def _of_step(self, stats: Stats | None, loss_scale: float, observation: Observation, ranks: Ranks | None) -> Stats:
        """Of all blocks since the reset, with this one, as of one batch."""
        assert stats is not None
        self._blocks.append((loss_scale, stats))
        grams = observation.task_grams(None if ranks is None else ranks.total)
        merged = Stats.merged([of_block for _, of_block in self._blocks], grams.sum(0) / loss_scale**2)
        return merged if ranks is None else ranks.together(merged)

    def reset(self) -> None:
        """With ``exact_tasks``: begin a new step; the next block's statistics are its own."""
        self.totals.clear()
        self._blocks.clear()

    def close(self) -> None:
        """End the measuring. The model is untouched outside observe blocks, so there is nothing to undo on it."""
        self._closed = True

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _over_ranks(self, who: str, plan: Plan, ranks: Ranks) -> Plan:
        if not ranks.exact and (self.exact_tasks or (self.gram and plan.reweights)):
            option = "exact_tasks" if self.exact_tasks else "gram"
            raise ValueError(
                f"{who}: {option}=True needs gradients that are summed over the {ranks.size} ranks for every task, got "
                'ranks="unbiased"; pass ranks="exact", or measure each rank by itself with ranks="local"'
            )
        if not ranks.exact:
            return plan
        if self.exact_tasks:  # what the ranks have added up is summed over them when the block closes
            if self.per_layer:
                raise ValueError(
                    f"{who}: with exact_tasks over {ranks.size} ranks only the whole model's sums are formed, got "
                    "per_layer=True; leave one of them out"
                )
            return plan
        return dataclasses.replace(plan, gram=True, totals={}, over_ranks=ranks.total)

    def _engine(self, who: str, modules: Sequence[tuple[str, nn.Module]]) -> dict[str, Any]:
        """What an observation has to know of DDP and FSDP2.

        Whether gradients are reduced during backward, which ranks verify together, and which parameters are exchanged.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return {}
        if any(isinstance(module, nn.parallel.DistributedDataParallel) for _, module in modules):
            return {"reduces_early": True}
        groups = [group for module in sharded_modules(modules) for group in parameter_groups(module)]
        if not groups:
            return {}
        exchanged = {id(one.sharded_param) for group in groups for one in group.fsdp_params}
        places: dict[int, list[tuple[int, str]]] = {}
        for _, module in modules:
            for name, parameter in module._parameters.items():
                if id(parameter) in exchanged:
                    places.setdefault(id(parameter), []).append((id(module), name))
        shards = Shards(find_ranks(who, modules, None, self.process_group), groups)
        return {"places": places, "shards": shards, "reduces_early": True}

    def _batch(self, who: str, device: torch.device, batch: Given, ranks: Ranks | None) -> _Batch:
        tasks, prompts, rewards = batch.get("tasks"), batch.get("prompts"), batch.get("rewards")
        n_tasks = len(self.task_names)
        if tasks is None and n_tasks > 1:
            raise ValueError(
                f"{who}: tasks must be given, one integer per example, since the meter has {n_tasks} tasks, got None; "
                "pass observe(tasks=...)"
            )
        task_ids = None
        if tasks is not None:
            task_ids = _checked_ids(who, "tasks", _numbered(who, tasks, self.task_names), device)
        prompt_ids = None if prompts is None else _checked_ids(who, "prompts", prompts, device)
        given = {"tasks": task_ids, "prompts": prompt_ids}
        reward_values = None
        if rewards is not None:
            reward_values = given["rewards"] = _checked_rewards(who, rewards)
        lengths = {name: len(ids) for name, ids in given.items() if ids is not None}
        packing = None
        several = _is_several(batch.get("example_ids"))
        kinds = _kinds(who, device, batch) if several else {}
        rows_of = self._rows_of(who, device, batch.get("rows_of") or {})
        if batch.get("cu_seqlens") is not None or (batch.get("example_ids") is not None and not several):
            packing = _packing(who, device, batch, next(iter(lengths.values()), None))
            lengths["cu_seqlens" if batch.get("cu_seqlens") is not None else "example_ids"] = len(packing.offsets) - 1
        if len(set(lengths.values())) > 1:
            got = ", ".join(f"{name} of {length}" for name, length in lengths.items())
            raise ValueError(f"{who}: tasks, prompts and rewards must have one entry per example, got {got}")
        examples = next(iter(lengths.values()), None)
        if task_ids is not None and len(task_ids) and task_ids.device.type == "cpu":
            _check_range(who, task_ids, n_tasks)
        prompt_index, task_of_prompt, n_prompts = None, None, 0
        if prompt_ids is not None:
            prompt_index, task_of_prompt, n_prompts = _prompt_groups(who, prompt_ids, task_ids)
        reward = None
        if reward_values is not None:
            if prompt_ids is None:
                raise ValueError(
                    f"{who}: rewards need prompts, one integer per example, got None; pass observe(prompts=...)"
                )
            of_task = None if task_ids is None else task_ids.cpu()
            if examples == 0:
                reward = empty_rewards(reward_values.cpu(), n_tasks)
            else:
                reward = reward_stats(reward_values.cpu(), prompt_ids.cpu(), of_task, n_tasks=n_tasks)
        there = [None if ids is None else _moved(ids, device) for ids in (task_ids, prompt_index, task_of_prompt)]
        return _Batch(examples, there[0], there[1], there[2], n_prompts, reward, packing, kinds, rows_of)

    def _rows_of(self, who: str, device: torch.device, given: Mapping[str, Ids]) -> dict[str, Tensor]:
        """By parameter, the example of each row; what is said of a module holds for all of its parameters."""
        names = [name for name, _ in self.model.named_parameters()] if given else []
        found: dict[str, Tensor] = {}
        for key, ids in given.items():
            meant = [name for name in names if name == key or name.startswith(f"{key}.")]
            if not meant:
                raise ValueError(
                    f"{who}: rows_of must name parameters or modules of the model, got {key!r}, which names none of "
                    f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
                )
            found = dict.fromkeys(meant, _examples_of_rows(who, f"rows_of[{key!r}]", ids, device)) | found
        return found

    def _has_tasks(self, plan: Plan) -> bool:
        # A single task's norm is that of the whole gradient, which is formed anyway unless weights per example come first.
        tasks = len(self.task_names) > 1 or plan.gram or self.exact_tasks or plan.by_task
        return tasks or not (plan.keep or plan.passes == 2)

    def _wanted(self, names: Sequence[str]) -> set[str]:
        """Which parameters are measured."""
        if self.modules is None:
            return set(names)
        patterns = [pattern for one in self.modules for pattern in (one, f"{one}.*")]
        wanted = {name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}
        if not wanted:
            raise ValueError(
                f"Meter: modules must name a trainable parameter, got {', '.join(self.modules)}, which names none of "
                f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
            )
        return wanted

    def _groups(self, batch: _Batch, tasks: Tensor, plan: Plan) -> Groups:
        levels = [] if batch.prompts is None else [(batch.prompts, batch.n_prompts)]
        if self._has_tasks(plan):
            levels.append((tasks, len(self.task_names)))
        given = batch.tasks is not None or batch.prompts is not None
        if self._last_groups is not None and self._last_groups[0] == given:
            last = self._last_groups[1]
            alike = last.walk.device == tasks.device and len(last.walk) == len(tasks)
            # Ids on a device are not looked at; the same ones again keep what backends worked out with the groups.
            if (
                alike
                and last.counts == tuple(count for _, count in levels)
                and (
                    not given
                    or (tasks.device.type == "cpu" and all(map(torch.equal, last.levels, [ids for ids, _ in levels])))
                )
            ):
                return last
        groups = Groups.of(len(tasks), [(ids.clone(), count) for ids, count in levels], tasks.device)
        self._last_groups = given, groups
        return groups

    def _tasks_of(self, batch: _Batch, examples: int, device: torch.device) -> Tensor:
        return batch.tasks if batch.tasks is not None else torch.zeros(examples, dtype=torch.int64, device=device)

    def _make_stats(self, observation: Observation, batch: _Batch, figures: Tensor, names: Sequence[str]) -> Stats:
        assert observation.examples is not None
        n_tasks, has_tasks = len(self.task_names), self._has_tasks(observation.plan)
        columns = observation.examples + batch.n_prompts + (n_tasks if has_tasks else 0)
        common = dict(
            tasks=self._tasks_of(batch, observation.examples, figures.device),
            prompts=batch.prompts,
            task_of_prompt=self._task_of_prompt(batch),
            n_prompts=batch.n_prompts,
            task_names=self.task_names,
            has_tasks=has_tasks,
        )

        def stats(parameters: Tensor, **more: Any) -> Stats:
            total = parameters.sum(0)
            gram = total[columns:].view(n_tasks, n_tasks) if observation.plan.gram else None
            if gram is not None and observation.plan.over_ranks is not None:
                total[columns - n_tasks : columns] = gram.diagonal()
            return Stats.of(total[:columns], task_gram=gram if self.gram else None, **common, **more)  # type: ignore[arg-type]

        layers: dict[str, Stats] = {}
        if self.per_layer and len(figures) == len(names):
            modules: dict[str, list[int]] = {}
            for index, name in enumerate(names):
                modules.setdefault(name.rpartition(".")[0], []).append(index)
            layers = {
                module: stats(
                    figures[rows[0] : rows[-1] + 1]
                    if rows[-1] - rows[0] + 1 == len(rows)
                    else torch.stack([figures[row] for row in rows])  # a list as an index would wait for the device
                )
                for module, rows in modules.items()
            }
        return stats(figures, layers=layers, reward=batch.reward)

    def _task_of_prompt(self, batch: _Batch) -> Tensor | None:
        if batch.prompts is None or batch.task_of_prompt is not None:
            return batch.task_of_prompt
        return torch.zeros(batch.n_prompts, dtype=torch.int64, device=batch.prompts.device)


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """As `nn.Module.named_modules` gives them, in a fraction of the time, which every block pays."""
    found, waiting = {}, [("", model)]
    while waiting:
        name, module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = name, module
            prefix = f"{name}." if name else ""
            waiting += [(prefix + key, child) for key, child in reversed(module._modules.items()) if child is not None]
    return list(found.values())


def _trainable(modules: Sequence[tuple[str, nn.Module]]) -> list[tuple[str, nn.Parameter]]:
    """The trainable parameters and their first names, as `named_parameters` gives them."""
    trainable = [(name, p) for name, p in _named_parameters(modules) if p.requires_grad]
    if not trainable:
        raise ValueError("Meter: the model must have a trainable parameter, got none; unfreeze one")
    for name, p in trainable:
        if not p.is_floating_point():
            raise TypeError(f"Meter: parameters must be real floating point, got {name} of {p.dtype}; freeze it")
    return trainable


def _named_parameters(modules: Sequence[tuple[str, nn.Module]]) -> list[tuple[str, nn.Parameter]]:
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for prefix, module in modules:
        for name, p in module._parameters.items():
            if p is not None and id(p) not in found:
                found[id(p)] = f"{prefix}.{name}" if prefix else name, p
    return list(found.values())


def _constants(modules: Sequence[tuple[str, nn.Module]]) -> frozenset[int]:
    """Where buffers and frozen parameters lie."""
    buffers = (buffer for _, module in modules for buffer in module._buffers.values() if buffer is not None)
    frozen = (p for _, p in _named_parameters(modules) if not p.requires_grad)
    whole = (t for t in (*buffers, *frozen) if not hasattr(t, "device_mesh"))  # a shard has no memory of its own
    return frozenset(t.untyped_storage().data_ptr() for t in whole)


class _Compilation:
    """How compiled functions run while blocks are open: as they were written, or as observed graphs of one model.

    The stance is the process's, and blocks of several threads need not close in the order in which they opened.
    """

    lock = threading.Lock()
    blocks = 0  # that run eagerly
    graphs: Graphs | None = None  # of the open block that does not
    stance: contextlib.AbstractContextManager[Any] | None = None

    def __init__(self, who: str, graphs: Graphs | None, has_compiled: bool) -> None:
        self.who, self.wanted, self.has_compiled = who, graphs, has_compiled
        self.counts = False

    @staticmethod
    def exists() -> bool:
        """Whether anything can be compiled."""
        return "torch._dynamo" in sys.modules

    def __enter__(self) -> Graphs | None:
        cls = _Compilation
        with cls.lock:
            if cls.graphs is not None:
                if self.has_compiled:
                    raise RuntimeError(
                        f"{self.who}: compiled models are observed by one block at a time, got one while another is open; "
                        "close that one first"
                    )
                return None
            if self.wanted is not None and not cls.blocks:
                cls.stance = self._take("default", force_backend=self.wanted.compile)
                cls.graphs = self.wanted
                return self.wanted
            if cls.stance is None and cls.exists():
                cls.stance = self._take("force_eager")
            self.counts = True
            cls.blocks += 1
            return None

    def __exit__(self, *_: object) -> None:
        cls = _Compilation
        with cls.lock:
            if self.counts:
                cls.blocks -= 1
            elif cls.graphs is not None and cls.graphs is self.wanted:
                cls.graphs = None
            if not cls.blocks and cls.graphs is None and cls.stance is not None:
                cls.stance.__exit__(None, None, None)
                cls.stance = None

    @staticmethod
    def _take(stance: str, **options: Any) -> contextlib.AbstractContextManager[Any]:
        refusal = (
            "Meter: an observe block must be opened outside of compiled functions, got one inside of torch.compile; "
            "compile the model, not the training step"
        )
        if torch.compiler.is_compiling():
            raise RuntimeError(refusal)
        with contextlib.ExitStack() as taken:
            if options:  # under DDP Dynamo would cut graphs at the buckets' ends, of copies of the parameters
                taken.enter_context(torch._dynamo.config.patch(optimize_ddp=False))
            try:
                taken.enter_context(torch.compiler.set_stance(stance, **options))
            except RuntimeError as error:
                raise RuntimeError(refusal) from error
            return taken.pop_all()


def _device_of(who: str, parameters: Sequence[tuple[str, nn.Parameter]]) -> torch.device:
    """Where the parameters are computed with: a shard may wait elsewhere."""
    devices: dict[torch.device, str] = {}
    for name, parameter in parameters:
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is None:
            device = parameter.device
        elif mesh.device_type == "cpu":
            device = torch.device("cpu")
        else:
            device = torch.device(mesh.device_type, torch.accelerator.current_device_index())
        if device not in devices:
            devices[device] = name
    if len(devices) > 1:
        raise ValueError(
            f"{who}: trainable parameters must lie on one device, got "
            f"{' and '.join(f'{name} on {device}' for device, name in devices.items())}; move the model to one device, or "
            "freeze what lies on the others"
        )
    return next(iter(devices))


def _moved(ids: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for it.

    What is copied is a copy in pageable memory, which has been read when `to` returns: the caller may write to the ids.
    """
    return ids if ids.device == device else ids.clone().to(device, non_blocking=True)


def _refuse_coupled_examples(who: str, modules: Sequence[tuple[str, nn.Module]]) -> None:
    for name, module in modules:
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise ValueError(
                f"{who}: examples must not influence each other, got {name or 'the model'} ({type(module).__name__}) "
                "in training mode; put it in eval mode, or use GroupNorm or LayerNorm"
            )


def _numbered(who: str, tasks: TaskIds, names: Sequence[str]) -> Ids:
    """Names of tasks as their numbers; numbers as they are."""
    named = not isinstance(tasks, Tensor) and isinstance(tasks, Iterable) and any(isinstance(one, str) for one in tasks)
    if not named:
        return tasks  # type: ignore[return-value]
    numbers = {name: k for k, name in enumerate(names)}
    if isinstance(tasks, str) or not set(tasks) <= numbers.keys():
        unknown = tasks if isinstance(tasks, str) else next(task for task in tasks if task not in numbers)
        expected = "a sequence of names" if isinstance(tasks, str) else f"among {', '.join(map(repr, names))}"
        raise ValueError(
            f"{who}: tasks must be {expected}, got {unknown!r}; give one name or one number per example, and the meter "
            "all names, as tasks=..."
        )
    return [numbers[task] for task in tasks]  # type: ignore[index]


def _checked_rewards(who: str, rewards: Tensor | Sequence[float]) -> Tensor:
    try:
        values = torch.as_tensor(rewards)
    except (RuntimeError, TypeError, ValueError):
        entries = rewards if isinstance(rewards, Iterable) else [rewards]
        found = next((repr(one) for one in entries if not isinstance(one, (int, float))), type(rewards).__name__)
        raise TypeError(
            f"{who}: rewards must be one number per example, got {found}; leave examples without a reward out of "
            "prompts and rewards, or pass float('nan'), which skips the step"
        ) from None
    if values.dim() != 1 or values.is_complex():
        raise ValueError(
            f"{who}: rewards must be one real number per example, got {values.dtype} of shape {list(values.shape)}; "
            "add up the reward functions"
        )
    return values


def _checked_ids(who: str, name: str, ids: Ids, device: torch.device) -> Tensor:
    try:
        tensor = torch.as_tensor(ids)
    except (RuntimeError, TypeError, ValueError):
        entries = ids if isinstance(ids, Iterable) else [ids]
        found = next((repr(one) for one in entries if not isinstance(one, int)), type(ids).__name__)
        raise TypeError(f"{who}: {name} must be integers, got {found}; pass int64 ids") from None
    if tensor.dim() != 1:
        raise ValueError(f"{who}: {name} must be one integer per example, got shape {list(tensor.shape)}; flatten it")
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        raise TypeError(f"{who}: {name} must be integers, got {tensor.dtype}; pass int64 ids")
    if tensor.device.type != "cpu" and tensor.device != device:
        raise ValueError(
            f"{who}: {name} must be on the CPU or on the model's device {device}, got {tensor.device}; move them"
        )
    return tensor.long()


def _is_several(example_ids: Any) -> bool:
    """Whether ``example_ids`` speak of several kinds of rows."""
    if isinstance(example_ids, Mapping):
        return True
    return isinstance(example_ids, (list, tuple)) and any(
        isinstance(one, Tensor) and one.dim() > 0 for one in example_ids
    )


def _kinds(who: str, device: torch.device, batch: Given) -> dict[str, Tensor]:
    """Each kind's example ids, by the caller's name for it."""
    given: Any = batch["example_ids"]
    named = given.items() if isinstance(given, Mapping) else ((str(i), ids) for i, ids in enumerate(given))
    found = {}
    for name, ids in named:
        found[name] = _examples_of_rows(who, f"example_ids[{name!r}]", ids, device)
    lengths = [len(ids) for ids in found.values()]
    if not isinstance(given, Mapping) and len(set(lengths)) < len(lengths):
        raise ValueError(
            f"{who}: kinds of rows are told apart by their numbers, got {lengths}; name the model's arguments that have them: "
            "example_ids={...}"
        )
    return found


def _kind(who: str, name: str, ids: Tensor, examples: int, named: bool) -> Packing:
    _check_examples(who, name, ids, examples)
    return Packing.of_ids(ids, examples, name, named)


def _examples_of_rows(who: str, name: str, ids: Ids, device: torch.device) -> Tensor:
    return _moved(_checked_ids(who, name, torch.as_tensor(ids).reshape(-1), device), device)


def _check_examples(who: str, name: str, ids: Tensor, examples: int) -> None:
    if ids.device.type == "cpu" and len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < examples):
        raise ValueError(
            f"{who}: example ids must lie in [0, {examples}), got {_some(ids.unique())} for {name}; number the examples of the "
            "batch from 0"
        )


def _packing(who: str, device: torch.device, batch: Given, examples: int | None) -> Packing:
    """Whose the rows of a packed batch are; looked at on the host, since a block needs to know how many there are."""
    offsets, ids = batch.get("cu_seqlens"), batch.get("example_ids")
    if offsets is not None and ids is not None:
        raise ValueError(f"{who}: rows are told apart by cu_seqlens or by example_ids, got both; pass one of them")
    if offsets is not None:
        starts = _checked_ids(who, "cu_seqlens", offsets, device).cpu()
        if len(starts) < 2 or int(starts[0]) != 0 or not bool((starts.diff() > 0).all()):
            raise ValueError(
                f"{who}: cu_seqlens must rise from 0, every example having a row, got {_some(starts)}; drop examples "
                "without rows from tasks, prompts, rewards and cu_seqlens"
            )
        return Packing.of_lengths(_moved(starts, device), int(starts[-1]))
    assert ids is not None
    of_row = _checked_ids(who, "example_ids", torch.as_tensor(ids).reshape(-1), device).cpu()
    count = examples if examples is not None else int(of_row.max()) + 1 if len(of_row) else 0
    rows = torch.zeros(max(count, 1), dtype=torch.int64)
    if len(of_row) and int(of_row.min()) >= 0 and int(of_row.max()) < count:
        rows = torch.bincount(of_row, minlength=count)
    if count == 0 or not bool((rows > 0).all()):
        raise ValueError(
            f"{who}: example_ids must name each of the {count} examples at least once and no other, got "
            f"{_some(of_row.unique())}; number the examples of the batch from 0"
        )
    return Packing.of_ids(_moved(of_row, device), count)


def _some(values: Tensor) -> list[int]:
    return values[:8].tolist() + (["..."] if len(values) > 8 else [])


def _check_range(who: str, tasks: Tensor, n_tasks: int) -> None:
    low, high = int(tasks.min()), int(tasks.max())
    if low < 0 or high >= n_tasks:
        raise ValueError(
            f"{who}: tasks must lie in [0, {n_tasks}), got {low} to {high}; give the meter all tasks, as tasks=..."
        )


def _prompt_groups(who: str, prompts: Tensor, tasks: Tensor | None) -> tuple[Tensor, Tensor | None, int]:
    """Each example's index among the distinct prompts, and each prompt's task."""
    distinct, index = torch.unique(prompts.cpu(), return_inverse=True)
    if tasks is None:
        return index, None, len(distinct)
    on_host = tasks.cpu()
    task_of_prompt = torch.zeros(len(distinct), dtype=torch.int64).scatter_(0, index, on_host)
    if not torch.equal(task_of_prompt[index], on_host):
        prompt = int(distinct[index[(task_of_prompt[index] != on_host).nonzero()[0, 0]]])
        members = sorted(set(on_host[prompts.cpu() == prompt].tolist()))
        raise ValueError(
            f"{who}: a prompt must lie in one task, got prompt {prompt} in tasks {members}; give each task's prompts ids "
            "of their own"
        )
    return index, task_of_prompt, len(distinct)
