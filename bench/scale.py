"""What ``run.py scale`` measures: a measured step beside the plain one in every way of training larger models.

Two processes (gloo) for DDP, FSDP2 and tensor parallelism; one for checkpointing, mixed precision, accumulation and
compilation; and how the time that measuring adds grows with the batch, the length, the layers and the tasks.
"""

from __future__ import annotations

import copy
import functools
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from allocator import keep_freed_memory
from models import GPT, TASKS, Problem, example_losses, gpt_problem
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from gradnorm_ext import InverseNorm, Meter, Reweighted
from gradnorm_ext.distributed import Ranks
from gradnorm_ext.layers import observation

RANKS = 2
FIRST = 10  # blocks that are like no later ones: the first and the tenth verify, and between them FSDP2's ranks ask each other
SIZES = {False: {"examples": 8, "length": 128}, True: {"examples": 4, "length": 9}}  # of a process
MODEL: dict[bool, dict[str, int]] = {False: {}, True: {"vocabulary": 17, "width": 16, "heads": 2, "layers": 2}}
Sample = tuple[str, str, str, list[float]]  # case, size, figure, samples


def make(quick: bool, **changes: int) -> Problem:
    torch.manual_seed(0)
    sizes = {**SIZES[quick], **MODEL[quick], **changes}
    random = torch.Generator().manual_seed(1)
    return gpt_problem(random, sizes.pop("examples"), sizes.pop("length"), 1.0, **sizes)


def loss_of(model: nn.Module, problem: Problem, examples: int | None = None) -> Tensor:
    """A mean over the examples, or over as many as the whole batch has."""
    return example_losses(model(problem.inputs), problem.targets).sum() / (examples or len(problem.tasks))


def step_of(model: nn.Module, problem: Problem, how: str, parts: int = 1) -> tuple[Callable[[], None], list[Tensor]]:
    """One step to be repeated, and the examples' norms in each of its blocks.

    ``how``: "plain", "meter", "exact", "next_step" or "two_passes"; ``parts``: blocks that accumulate.
    """
    plain = torch.optim.AdamW(model.parameters(), lr=0.0)  # parameters stay: every step has the same norms
    if how in ("meter", "exact"):
        observer: Any = Meter(model, tasks=TASKS, ranks="exact" if how == "exact" else None)
    elif how != "plain":
        options: dict[str, Any] = {"apply": "next_step"} if how == "next_step" else {"passes": 2}
        observer = Reweighted(plain, model, InverseNorm(), tasks=TASKS, **options)
    else:
        observer = None
    optimizer = observer if isinstance(observer, Reweighted) else plain
    examples, norms = len(problem.tasks), []
    batches = [problem.part(part) for part in torch.arange(examples).chunk(parts)]

    def step() -> None:
        optimizer.zero_grad()
        norms.clear()
        for batch in batches:
            with nullcontext() if observer is None else observer.observe(tasks=batch.tasks):
                loss = loss_of(model, batch, examples)
                optimizer.backward(loss) if optimizer is observer else loss.backward()
            if observer is not None:
                norms.append(observer.stats.example_norm)
        optimizer.step()

    return step, norms


def in_pairs(plain: Callable[[], None], ours: Callable[[], None], runs: int) -> list[float]:
    """Ratios of wall times, in turns and alternating order, after two runs of each."""
    ratios = []
    for run in range(-2, runs):
        taken = {}
        for step in (plain, ours) if run % 2 else (ours, plain):
            start = time.perf_counter()
            step()
            taken[step] = time.perf_counter() - start
        if run >= 0:
            ratios.append(taken[ours] / taken[plain])
    return ratios


# Several processes.


def as_ddp(model: GPT) -> nn.Module:
    return DistributedDataParallel(model)


def as_fsdp(model: GPT, **options: Any) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def as_compiled_ddp(model: GPT) -> nn.Module:
    return DistributedDataParallel(torch.compile(model, fullgraph=True))


def as_compiled_fsdp(model: GPT) -> nn.Module:
    for block in model.blocks:
        block.compile(fullgraph=True)
    return as_fsdp(model)


def as_tensor_parallel(model: GPT, mesh: DeviceMesh | None = None) -> nn.Module:
    """Vocabulary and MLPs are split; attention is not."""
    plan = {
        "tokens": RowwiseParallel(input_layouts=Replicate()),
        "blocks.*.up": ColwiseParallel(),
        "blocks.*.down": RowwiseParallel(),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    return parallelize_module(model, mesh or init_device_mesh("cpu", (RANKS,)), plan)


def as_fsdp_over_tensor_parallel(model: GPT) -> nn.Module:
    """There are two ranks: the layers are split between them, and each is all that its parts are sharded among."""
    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("data", "parts"))
    as_tensor_parallel(model, mesh["parts"])
    return as_fsdp(model, mesh=mesh["data"])


class Engine(NamedTuple):
    wrap: Callable[[GPT], nn.Module]
    hows: tuple[str, ...] = ("meter",)
    divides: bool = True  # ranks have examples of their own


HOWS = ("meter", "next_step", "two_passes")
ENGINES = {
    "ddp": Engine(as_ddp, (*HOWS, "exact")),
    "fsdp2": Engine(as_fsdp, (*HOWS, "exact")),
    "tensor_parallel": Engine(as_tensor_parallel, HOWS, divides=False),
    "fsdp2_tensor_parallel": Engine(as_fsdp_over_tensor_parallel, HOWS, divides=False),
    "ddp_compiled": Engine(as_compiled_ddp),
    "fsdp2_compiled": Engine(as_compiled_fsdp),
}


def of_rank(problem: Problem, rank: int) -> Problem:
    count = len(problem.tasks) // RANKS
    return problem.part(slice(rank * count, (rank + 1) * count))


def measure_ranks(quick: bool, runs: int, refusals: list[str]) -> list[Sample]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (quick, runs, folder), nprocs=RANKS)
        found = torch.load(Path(folder) / "found")
    refusals += found["refusals"]
    samples: list[Sample] = found["samples"]
    return samples


def _process(rank: int, quick: bool, runs: int, folder: str) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    batch = make(quick, examples=RANKS * SIZES[quick]["examples"])
    samples: list[Sample] = []
    refusals = []
    for name, how in [(name, how) for name, engine in ENGINES.items() for how in engine.hows]:
        if quick and name.endswith("_compiled"):  # takes half a minute
            continue
        engine = ENGINES[name]
        whole = batch if engine.divides else make(quick)
        problem = of_rank(batch, rank) if engine.divides else whole
        plain = step_of(engine.wrap(copy.deepcopy(whole.model)), problem, "plain")[0]
        step, norms = step_of(engine.wrap(copy.deepcopy(whole.model)), problem, how)
        with _CountBytes() as sent:
            step()
        for _ in range(FIRST - 1):
            step()
        alone = Meter(copy.deepcopy(whole.model), ranks="local")
        with alone.observe():
            loss_of(alone.model, problem).backward()
        ours = RANKS * norms[0] if engine.divides else norms[0]
        wrong = (ours / alone.stats.example_norm - 1).abs().max().reshape(1)
        dist.all_reduce(wrong, dist.ReduceOp.MAX)
        if not float(wrong) <= 1e-5:
            refusals.append(f"{name}, {how}: norms are off by {float(wrong):.1e} of one process's")
            continue
        dist.barrier()
        samples.append((f"{name}_{how}", "gpt", "time_ratio", in_pairs(plain, step, runs)))
        bytes_sent = ("bytes_per_task", sent.bytes / TASKS) if engine.divides else ("bytes", sent.bytes)
        samples.append((f"{name}_{how}", "gpt", bytes_sent[0], [float(bytes_sent[1])]))
    if rank == 0:
        torch.save({"samples": samples, "refusals": refusals}, f"{folder}/found")
    dist.barrier()
    dist.destroy_process_group()


class _CountBytes:
    """Counts what our own reductions hand to the process groups, beside the engines'."""

    def __init__(self) -> None:
        self.bytes, self.over_ranks, self.over_parts = 0, Ranks.begin_total, observation._sum_over

    def __enter__(self) -> _CountBytes:
        def begin_total(ranks: Ranks, tensor: Tensor, op: Any = None) -> Callable[[], Tensor]:
            self.bytes += tensor.nbytes
            return self.over_ranks(ranks, tensor, op)

        def sum_over(group: Any, tensor: Tensor) -> Tensor:
            self.bytes += tensor.nbytes
            return self.over_parts(group, tensor)

        Ranks.begin_total, observation._sum_over = begin_total, sum_over  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Ranks.begin_total, observation._sum_over = self.over_ranks, self.over_parts  # type: ignore[method-assign]


# One process.


class Checkpointed(nn.Module):
    def __init__(self, model: GPT, options: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, ids: Tensor) -> Tensor:
        model = self.model
        h = model.tokens(ids) + model.positions(torch.arange(ids.shape[1]))
        for block in model.blocks:
            h = checkpoint(block, h, **self.options)
        logits: Tensor = model.head(model.norm(h))
        return logits


class Autocast(nn.Module):
    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits: Tensor = self.model(ids)
        return logits.float()


class Offloaded(nn.Module):
    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        with save_on_cpu():
            logits: Tensor = self.model(ids)
        return logits


SAVED = functools.partial(
    create_selective_checkpoint_contexts, [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
)
ALONE: dict[str, Callable[[GPT], nn.Module]] = {
    "eager": lambda model: model,
    "checkpoint_reentrant": lambda model: Checkpointed(model, {"use_reentrant": True}),
    "checkpoint": lambda model: Checkpointed(model, {"use_reentrant": False}),
    "checkpoint_selective": lambda model: Checkpointed(model, {"use_reentrant": False, "context_fn": SAVED}),
    "offloaded": Offloaded,
    "autocast_bfloat16": Autocast,
    "compiled": lambda model: torch.compile(model, fullgraph=True),  # plain and measured steps are graphs
}
PARTS = {"accumulation": 4}  # blocks before a step, of the eager model


def measure_alone(quick: bool, runs: int, refusals: list[str]) -> list[Sample]:
    samples: list[Sample] = []
    problem = make(quick)
    reference = None
    for name in (*ALONE, *PARTS):
        if quick and name == "compiled":
            continue
        wrap, parts = ALONE.get(name, ALONE["eager"]), PARTS.get(name, 1)
        step, norms = step_of(wrap(copy.deepcopy(problem.model)), problem, "meter", parts)
        for _ in range(FIRST):
            step()
        norm = torch.cat(norms)
        reference = norm if reference is None else reference
        wrong = float((norm / reference - 1).abs().max())
        if not wrong <= (0.05 if name == "autocast_bfloat16" else 1e-5):
            refusals.append(f"{name}: norms are off by {wrong:.1e} of the eager model's")
            continue
        plain = step_of(wrap(copy.deepcopy(problem.model)), problem, "plain", parts)[0]
        samples.append((name, "gpt", "time_ratio", in_pairs(plain, step, runs)))
    return samples


GROWTH: dict[str, tuple[int, ...]] = {
    "examples": (4, 8, 16, 32),
    "length": (32, 64, 128, 256),
    "layers": (2, 4, 8),
    "tasks": (1, 2, 4, 8),
}


def measure_growth(quick: bool, runs: int) -> list[Sample]:
    """Seconds that measuring adds to a step, and the exponent of the fit ``seconds = c · size^exponent`` by least squares."""
    samples: list[Sample] = []
    for dimension, sizes in GROWTH.items():
        added = []
        for size in sizes[:2] if quick else sizes:
            problem = make(quick, **({} if dimension == "tasks" else {dimension: size}))
            meter = Meter(problem.model, tasks=size if dimension == "tasks" else TASKS)
            tasks = torch.arange(len(problem.tasks)) % len(meter.task_names)
            seconds = []
            for run in range(-2, runs):
                taken = []
                for observed in (True, False) if run % 2 else (False, True):
                    problem.model.zero_grad()
                    start = time.process_time()
                    with meter.observe(tasks=tasks) if observed else nullcontext():
                        loss_of(problem.model, problem).backward()
                    taken.append((time.process_time() - start) * (1 if observed else -1))
                if run >= 0:
                    seconds.append(sum(taken))
            samples.append(("growth", f"{dimension}={size}", "added_seconds", seconds))
            added.append((size, statistics.median(seconds)))
        known = [(math.log(size), math.log(seconds)) for size, seconds in added if seconds > 0]
        if len(known) > 1:
            samples.append(("growth", dimension, "exponent", [slope(known)]))
    return samples


def slope(points: Sequence[tuple[float, float]]) -> float:
    x, y = (statistics.fmean(values) for values in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def measure(quick: bool, refusals: list[str]) -> Iterator[Sample]:
    """Everything, as it comes."""
    runs = 3 if quick else 11
    multiprocessing.set_start_method("spawn", force=True)
    torch.set_num_threads(1)
    keep_freed_memory()
    yield from measure_ranks(quick, runs, refusals)
    yield from measure_alone(quick, runs, refusals)
    yield from measure_growth(quick, runs)
