"""The Trainer of transformers, measured: norms of examples and tasks in its log, and, with a policy, a reweighted step."""

from __future__ import annotations

import inspect
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import transformers
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gradnorm_ext.history import History
from gradnorm_ext.meter import Meter
from gradnorm_ext.optimizer import Reweighted
from gradnorm_ext.packing import cu_seqlens
from gradnorm_ext.policies import GSA, MTGRPO, PairBalance, RewardStd, weighs_of
from gradnorm_ext.stats import Stats

if TYPE_CHECKING:
    from transformers import Trainer as _AnyTrainer
else:
    _AnyTrainer = object  # a mixin: what it calls is the trainer's, which comes after it in the order of classes

TASKS = "gradnorm_tasks"  # of a batch: each example's task, [B] int64
PREFIX = "gradnorm/"
_logger = logging.getLogger(__name__)


class TrainerMixin(_AnyTrainer):
    """Put before a trainer class, it measures every training step in the backward pass that the step runs anyway.

        class MyTrainer(TrainerMixin, transformers.Trainer): ...
        MyTrainer(model, args, train_dataset=dataset, task_column="source")                            # measures
        MyTrainer(model, args, train_dataset=dataset, task_column="source", policy=InverseNorm())      # and reweighs

    Into the trainer's log go, averaged over the steps since the last log, the figures of
    :meth:`~gradnorm_ext.Stats.log_dict`: ``gradnorm/task/<name>/sqnorm_unbiased`` and so on; and
    ``gradnorm/task/<name>/weight`` where a policy weighs. ``trainer.history`` has them step by step, for
    :func:`~gradnorm_ext.report`. Norms are in the units of the loss that the trainer runs ``backward()`` on, which is
    divided by the number of accumulated micro-batches or their tokens; a GradScaler's scale is divided out. Without a
    policy the training is what it is without the mixin.

    Under gradient accumulation a step's figures are those of its micro-batches, merged (:meth:`~gradnorm_ext.Stats.merged`):
    unbiased figures stay unbiased, the norm of a task's summed gradient is left out, and a policy weighs each
    micro-batch by its own statistics. With ``meter_options={"exact_tasks": True}`` all of these are of the step as a whole.
    Evaluation is not measured.

    Under DDP the model is measured as accelerate wraps it: norms are those of contributions to the averaged ``.grad``, and
    figures are of all processes' examples (see ``ranks`` of :class:`~gradnorm_ext.Meter`). A policy's weights must be known
    before gradients are averaged: ``reweighted_options={"apply": "next_step"}``.

    Args:
        args, kwargs: of the trainer.
        task_column: the dataset's column that names each row's task; None: all rows are one task.
        tasks: the tasks' names, in the order of their numbers; None: what the column holds, sorted. A dataset that is
            streamed needs them.
        policy: weighs tasks or examples, as :class:`~gradnorm_ext.Reweighted` has it; None (default): measure only.
        meter_options: of :class:`~gradnorm_ext.Meter`: ``{"modules": "model.layers.31.*", "gram": True}``.
        reweighted_options: of :class:`~gradnorm_ext.Reweighted`: ``{"apply": "next_step"}``.

    Raises:
        ValueError: before a model is loaded: a dataset without the column or with rows that have no task in it; a task that
            is not among ``tasks``; options of the trainer that the measuring cannot follow, by their names.

    Warns:
        UserWarning: figures that can never be formed, with the reason: a task of one row, a batch of one example.
    """

    data_collator: Any  # the trainer's, as are the next two
    optimizer: Any
    _signature_columns: Any
    _serves: ClassVar[tuple[type, ...]] = ()  # policies that need more than norms, and get it here

    def __init__(
        self,
        *args: Any,
        task_column: str | None = None,
        tasks: Sequence[str] | None = None,
        policy: Callable[[Stats], Tensor] | None = None,
        meter_options: Mapping[str, Any] | None = None,
        reweighted_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        who = type(self).__name__
        given = inspect.signature(super().__init__).bind_partial(*args, **kwargs).arguments
        given = {**given.get("kwargs", {}), **given}
        self.task_column, self.policy = task_column, policy
        self.task_names = _task_names(who, given.get("train_dataset"), task_column, tasks)
        self._meter_options, self._reweighted_options = dict(meter_options or {}), dict(reweighted_options or {})
        if policy is None and self._reweighted_options:
            raise ValueError(
                f"{who}: reweighted_options need a policy, got {sorted(self._reweighted_options)} and none; pass policy="
            )
        if self._reweighted_options.get("passes", 1) != 1:
            raise ValueError(f"{who}: the trainer runs backward once, got passes=2; leave it out")
        self.history = History(task_names=self.task_names)
        self._observer: Meter | Reweighted | None = None
        self._block: ExitStack | None = None  # of the training step under way
        self._blocks: list[tuple[Stats, Tensor | None]] = []  # since the last optimizer step, with the weights they got
        self._steps: list[dict[str, Any]] = []  # since the last log: what `_figures` gives
        self._told: set[str] = set()  # tasks whose missing figures were explained
        if (arguments := given.get("args")) is not None:  # else the trainer makes its defaults
            self.args = arguments
            self._refuse_setup(who)
        super().__init__(*args, **kwargs)
        self._refuse_setup(who)  # what came of the arguments, and what accelerate was told
        if isinstance(self.optimizer, Reweighted):
            raise ValueError(f"{who}: the optimizer must be a plain one, got a Reweighted; pass its policy as policy=")
        self._warn_of_single_units(who)

    def get_train_dataloader(self) -> Any:
        """The trainer's, whose batches carry the tasks as well. Evaluation's are left alone."""
        if self.task_column is None:
            return super().get_train_dataloader()
        self._set_signature_columns_if_needed()
        columns, collator = self._signature_columns, self.data_collator
        self._signature_columns = [*columns, self.task_column]
        self.data_collator = self._task_collator(collator, keep=self.task_column in columns)
        try:
            return super().get_train_dataloader()
        finally:
            self._signature_columns, self.data_collator = columns, collator

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The trainer's optimizer, inside of :class:`~gradnorm_ext.Reweighted` where there is a policy."""
        fresh = self.optimizer is None or not isinstance(self._observer, Reweighted)
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if self.policy is not None and fresh:
            optimizer = Reweighted(
                optimizer,
                self.model,
                self.policy,
                tasks=self.task_names,
                **self._meter_options,
                **self._reweighted_options,
            )
            self.optimizer = self._observer = optimizer
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The trainer's, in an observe block from the forward to the end of the backward."""
        try:
            with ExitStack() as self._block:
                loss: Tensor = super().training_step(*args, **kwargs)
        finally:
            self._block = None
        observer = self._observer
        assert observer is not None
        self._blocks.append((observer.stats, observer.weights if isinstance(observer, Reweighted) else None))
        if self.accelerator.sync_gradients:
            self._end_step()
        return loss

    def _prepare_inputs(self, inputs: Any) -> Any:
        """The trainer's; in training this is the last thing before the loss, so that the block opens here."""
        inputs = super()._prepare_inputs(inputs)
        if self._block is None:
            return inputs
        batch, inputs = self._given(inputs)
        scaler = self.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        self._block.enter_context(self._observing().observe(**batch, loss_scale=scale))
        return inputs

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's, with what was measured since the last one."""
        if self.model.training and self._steps:
            logs.update(self._averages())
            self._steps.clear()
        super().log(logs, *args, **kwargs)

    def _given(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a batch says of its examples, as `observe` takes it, and the batch without it."""
        rest = {key: value for key, value in inputs.items() if key != TASKS}
        given = _packed(rest)
        if self.task_column is None:
            return given, rest
        if TASKS not in inputs:
            raise RuntimeError(
                f"{type(self).__name__}: a training batch must carry {TASKS!r}, got {sorted(inputs)}; "
                "if get_train_dataloader is your own, wrap its collate_fn in TaskCollator"
            )
        return given | {"tasks": inputs[TASKS]}, rest

    def _task_collator(self, collator: Callable[[list[Any]], Any], keep: bool) -> Callable[[list[Any]], Any]:
        assert self.task_column is not None
        return TaskCollator(collator, self.task_column, self.task_names, keep=keep)

    def _observing(self) -> Meter | Reweighted:
        meter = self._observer if isinstance(self._observer, Meter) else None
        if self._observer is None or (meter is not None and meter.model not in (self.model, self.model_wrapped)):
            self._observer = Meter(self.model, tasks=self.task_names, **self._meter_options)  # anew after a search
        meter = self._observer.meter if isinstance(self._observer, Reweighted) else self._observer
        if isinstance(self.model_wrapped, DistributedDataParallel) and meter.model is not self.model_wrapped:
            # Accelerate wraps the model after the optimizer was made. What DDP wraps it names module.
            meter.model = self.model_wrapped
            meter.modules = None if meter.modules is None else tuple(f"module.{one}" for one in meter.modules)
        return self._observer

    def _end_step(self) -> None:
        stats, weights = self._merged()
        of = "tasks" if self.policy is None else weighs_of(self.policy)
        self.history.append(stats, weights, of)
        self._steps.append(self._figures(stats, weights, of))
        self._blocks.clear()
        if self._exact and isinstance(self._observer, Meter):
            self._observer.reset()

    @property
    def _exact(self) -> bool:
        return bool(self._meter_options.get("exact_tasks"))

    def _merged(self) -> tuple[Stats, Tensor | None]:
        """The statistics of a step, and the weights its gradients got: of tasks, a mean over micro-batches."""
        if self._exact:  # of all blocks of the step, every time
            return self._blocks[-1]
        blocks, weights = zip(*self._blocks, strict=True)
        stats = blocks[0] if len(blocks) == 1 else Stats.merged(blocks)
        if weights[0] is None:
            return stats, None
        return stats, torch.stack(weights).mean(0) if weighs_of(self.policy) == "tasks" else torch.cat(weights)

    def _figures(self, stats: Stats, weights: Tensor | None, of: str) -> dict[str, Any]:
        """What `_averages` needs of a step; nothing here waits for the device."""
        figures: dict[str, Any] = {"stats": stats, "of_examples": self._of_examples(stats)}
        if weights is not None:
            if of == "examples":
                total = torch.zeros_like(stats.task_sqnorm_unbiased).index_add_(0, stats.tasks, weights)
                weights = total / stats.task_count
            figures["weights"] = weights
        return figures

    def _of_examples(self, stats: Stats) -> dict[str, Tensor]:
        """By name, what the log has means of over a step's examples: this process's."""
        return {"example_norm": stats.example_norm}

    def _means_of_examples(self) -> list[dict[str, float]]:
        """Of every step, the means (and the largest norm) over the examples of all processes."""
        names = list(self._steps[0]["of_examples"])
        values = [step["of_examples"][name] for step in self._steps for name in names]
        parts = torch.stack([torch.stack([v.sum(), torch.ones_like(v).sum(), v.max()]) for v in values])
        parts = parts.view(1, len(self._steps), len(names), 3)
        if self.args.world_size > 1:
            parts = self.accelerator.gather(parts)
        means, largest = (parts[..., 0].sum(0) / parts[..., 1].sum(0)).tolist(), parts[..., 2].amax(0).tolist()
        found = []
        for of_step, top in zip(means, largest, strict=True):
            figures = {PREFIX + name: mean for name, mean in zip(names, of_step, strict=True)}
            figures[PREFIX + "example_norm/mean"] = figures.pop(PREFIX + "example_norm")
            found.append(figures | {PREFIX + "example_norm/max": top[names.index("example_norm")]})
        return found

    def _averages(self) -> dict[str, float]:
        """The log's figures: means over the steps that have them; the noise scale is a quotient of two such means."""
        columns: dict[str, list[float]] = {}
        for step, of_examples in zip(self._steps, self._means_of_examples(), strict=True):
            figures = step["stats"].log_dict(PREFIX) | of_examples
            if "weights" in step:
                weights = zip(self.task_names, step["weights"].tolist(), strict=True)
                figures |= {f"{PREFIX}task/{name}/weight": weight for name, weight in weights}
            absent = [name for name in self.task_names if figures[f"{PREFIX}task/{name}/examples"] == 0]
            for key, value in figures.items():
                if not any(key.startswith(f"{PREFIX}task/{name}/") for name in absent):
                    columns.setdefault(key, []).append(value)
        averages = {key: max(values) if key.endswith("/max") else _mean(values) for key, values in columns.items()}
        for name in self.task_names:
            task = f"{PREFIX}task/{name}/"
            signal = averages.get(task + "sqnorm_unbiased", math.nan)
            if task + "noise_scale" in averages:
                averages[task + "noise_scale"] = averages[task + "variance"] / signal if signal > 0 else math.nan
            if math.isnan(signal) and task + "examples" in averages and name not in self._told:
                self._told.add(name)
                _logger.warning("%s: %ssqnorm_unbiased is NaN in this log: %s", type(self).__name__, task, _REASON)
        if isinstance(self._observer, Reweighted):
            averages[PREFIX + "skipped_steps"] = self._observer.skipped_steps
        return averages

    def _refuse_setup(self, who: str) -> None:
        """Options of the trainer that the measuring cannot follow."""
        for reason in self._refusals():
            raise ValueError(f"{who}: {reason}")

    def _refusals(self) -> Iterable[str]:
        """What must hold, what came, and what to do, of every option that does not fit."""
        args = self.args
        if args.n_gpu > 1:
            yield (
                f"one process must train on one device, got nn.DataParallel over {args.n_gpu}; launch with accelerate or "
                "torchrun, or make one device visible"
            )
        if engine := self._sharding_engine():
            yield f"parameters must be whole on every process, got {engine}; train with one process or DDP"
        if args.torch_compile:
            yield "the model must run eagerly, got torch_compile=True; leave it out"
        if str(getattr(args.optim, "value", args.optim)) in ("lomo", "adalomo"):
            yield f"gradients must be there after the backward, got optim={args.optim}, which steps during it; use another"
        if self.policy is not None and args.world_size > 1:
            yield from self._refusals_of_processes()
        for policy in self._policies():
            needs = next((needs for kind, needs in _NEEDS.items() if isinstance(policy, kind)), None)
            if needs is not None and not isinstance(policy, self._serves):
                yield f"the policy must need no more than norms here, got {type(policy).__name__}, which needs {needs}"

    def _sharding_engine(self) -> str | None:
        """What would divide parameters among processes; before accelerate is set up, by what it will be told."""
        known = hasattr(self, "is_fsdp_enabled")
        deepspeed = self.is_deepspeed_enabled if known else getattr(self.args, "deepspeed", None)
        fsdp = self.is_fsdp_enabled if known else getattr(self.args, "fsdp", None)
        told = (name for name in ("DeepSpeed", "FSDP") if os.environ.get(f"ACCELERATE_USE_{name.upper()}") == "true")
        return "DeepSpeed" if deepspeed else "FSDP" if fsdp else next(told, None)

    def _refusals_of_processes(self) -> Iterable[str]:
        """What a policy cannot do where several processes train one model."""
        count = self.args.world_size
        apply = self._reweighted_options.get("apply", "same_step")
        if weighs_of(self.policy) == "examples":
            yield (
                f"over {count} processes a policy must weigh tasks, got one that weighs examples, whose weights would be "
                "known after gradients are averaged; use one that weighs tasks, or measure only (policy=None)"
            )
        if apply != "next_step":
            yield (
                f"over {count} processes weights must be known before the backward, in which gradients are averaged, got "
                f'apply="{apply}"; pass reweighted_options={{"apply": "next_step"}}, or measure only (policy=None)'
            )
        for policy in self._policies():
            if isinstance(policy, tuple(_NEEDS)) or hasattr(policy, "feed"):
                yield (
                    f"over {count} processes a policy must need no more than norms, got {type(policy).__name__}, which "
                    "each process would feed for itself; use another, or measure only (policy=None)"
                )

    def _policies(self) -> tuple[Any, ...]:
        """The policy, or those of a chain."""
        return getattr(self.policy, "policies", () if self.policy is None else (self.policy,))

    def _units_of_a_micro_batch(self) -> int:
        """How many independent units a micro-batch can hold at most."""
        size: int = self.args.per_device_train_batch_size
        return size

    def _warn_of_single_units(self, who: str) -> None:
        if self._units_of_a_micro_batch() < 2:
            warnings.warn(
                f"{who}: {PREFIX}task/<name>/sqnorm_unbiased, variance and noise_scale will be NaN: {_REASON}; this "
                "trainer's micro-batches hold one (raise per_device_train_batch_size)",
                stacklevel=3,
            )
            self._told.update(self.task_names)


_NEEDS: dict[type, str] = {
    GSA: "the logits and labels of every batch; feed it in a loop of your own",
    RewardStd: "rewards; use GRPOTrainer",
    MTGRPO: "rewards; use GRPOTrainer",
    PairBalance: "pairs of a chosen and a rejected example; use DPOTrainer",
}
_REASON = (
    "it takes two units of a task (prompts or pairs where there are such, else examples) in one micro-batch to tell the "
    "gradient from its noise"
)


class Trainer(TrainerMixin, transformers.Trainer):
    """:class:`transformers.Trainer`, measured; arguments and log as of :class:`TrainerMixin`.

    Example:
        >>> import tempfile, transformers, gradnorm_ext.integrations.transformers as integration
        >>> rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3], "source": source} for source in ("math", "code") * 2]
        >>> model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=9))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     args = transformers.TrainingArguments(
        ...         folder, max_steps=1, per_device_train_batch_size=4, logging_steps=1, report_to="none", use_cpu=True,
        ...         disable_tqdm=True, log_level="error")
        ...     trainer = integration.Trainer(model, args, train_dataset=rows, task_column="source")
        ...     result = trainer.train()                                                    # doctest: +ELLIPSIS
        {...'gradnorm/task/code/norm': ...
        >>> trainer.task_names
        ('code', 'math')
    """


@dataclass(frozen=True)
class TaskCollator:
    """A data collator around a data collator, whose batches carry each example's task.

        batch = collator([row without the column, ...]);    batch["gradnorm_tasks"] = [B] int64, the place of its name in tasks

    Args:
        collator: makes a batch, a mapping, of a list of rows.
        column: of the rows, which holds the task's name, or what ``str`` turns into it.
        tasks: the tasks' names.
        keep: leave the column in the rows, where ``collator`` needs it too.

    Raises:
        ValueError: when called, a row without the column or with another task.

    Example:
        >>> collator = TaskCollator(torch.utils.data.default_collate, "source", ("math", "code"))
        >>> collator([{"x": 1., "source": "code"}, {"x": 2., "source": "math"}])
        {'x': tensor([1., 2.], dtype=torch.float64), 'gradnorm_tasks': tensor([1, 0])}
    """

    collator: Callable[[list[Any]], Any]
    column: str
    tasks: Sequence[str]
    keep: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        ids = task_ids("TaskCollator", rows, self.column, self.tasks)
        if not self.keep:
            rows = [{key: value for key, value in row.items() if key != self.column} for row in rows]
        batch = self.collator(list(rows))
        batch[TASKS] = ids
        return batch


def _packed(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Where the examples of a batch without padding begin, as its collator says: several rows in one."""
    if "cu_seq_lens_q" in inputs:
        return {"cu_seqlens": inputs["cu_seq_lens_q"]}
    positions = inputs.get("position_ids")
    if isinstance(positions, Tensor) and positions.dim() == 2 and len(positions) == 1:
        return {"cu_seqlens": cu_seqlens(positions)}
    return {}


def task_ids(who: str, rows: Sequence[Mapping[str, Any]], column: str, tasks: Sequence[str]) -> Tensor:
    """``[len(rows)]`` int64: the place of each row's task in ``tasks``."""
    place = {name: k for k, name in enumerate(tasks)}
    ids = []
    for row in rows:
        if column not in row:
            raise ValueError(
                f"{who}: every row must have the column {column!r}, got one with {sorted(row)}; name its task"
            )
        name = _name_of(row[column])
        if name not in place:
            raise ValueError(
                f"{who}: {column} must be one of {', '.join(tasks)}, got {row[column]!r}; list every task in tasks="
            )
        ids.append(place[name])
    return torch.tensor(ids)


def _name_of(value: Any) -> str:
    return str(value.item() if hasattr(value, "item") else value)


def _task_names(who: str, dataset: Any, column: str | None, tasks: Sequence[str] | None) -> tuple[str, ...]:
    """The tasks' names; of a dataset that can be looked at, every row is."""
    if column is None:
        if tasks is not None:
            raise ValueError(
                f"{who}: tasks {list(tasks)} need a dataset column that says which rows are theirs, got none; pass "
                "task_column="
            )
        return ("all",)
    if dataset is None:
        raise ValueError(f"{who}: the tasks are a column of train_dataset, got none; pass train_dataset=")
    columns = getattr(dataset, "column_names", None)
    if columns is None:  # a list, a torch dataset, or a stream that does not know its columns
        columns = list(next(iter(dataset), {}))
    if column not in columns:
        raise ValueError(
            f"{who}: train_dataset must have the column {column!r}, got {', '.join(columns) or 'no columns'}; add it, "
            "or pass the column's name as task_column="
        )
    if not hasattr(dataset, "__len__"):
        if tasks is None:
            raise ValueError(
                f"{who}: the tasks of a streamed dataset must be named, got none; pass tasks=[...], every name in {column}"
            )
        return tuple(tasks)
    values = dataset[column] if hasattr(dataset, "column_names") else [dataset[i][column] for i in range(len(dataset))]
    count: dict[str, int] = {}
    for value in values:
        if value is None:
            raise ValueError(f"{who}: every row must have a task, got None in {column}; fill it, or drop such rows")
        count[_name_of(value)] = count.get(_name_of(value), 0) + 1
    names = tuple(sorted(count) if tasks is None else tasks)
    if strange := sorted(set(count) - set(names)):
        raise ValueError(
            f"{who}: {column} must hold {', '.join(names)}, got {', '.join(strange[:4])}"
            f"{', ...' if len(strange) > 4 else ''} as well; list every task in tasks="
        )
    for name in names:
        if count.get(name, 0) < 2:
            warnings.warn(
                f"{who}: {PREFIX}task/{name}/sqnorm_unbiased will be NaN: {_REASON}; train_dataset has {count.get(name, 0)}",
                stacklevel=4,
            )
    return names


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return fmean(known) if known else math.nan
