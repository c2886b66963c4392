"""Compiled models under DDP and FSDP2: measured inside of their graphs, exactly, on every rank."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.distributed as dist
from divided import CLOSE, EXAMPLES, OF_RANK, RANKS, TASKS, Truth, assert_gradients, fsdp, make_case
from oracle import Case, relative, token_loss
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from worlds import run_world

from gradnorm_ext import InverseNorm, Meter, Reweighted


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, fullgraph=True, backend="aot_eager")


def by_blocks(model: nn.Module) -> nn.Module:
    for i, block in enumerate(model.blocks):
        model.blocks[i] = compiled(block)
    return model


def in_place(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        block.compile(fullgraph=True, backend="inductor")
    return model


def ddp(model: nn.Module) -> nn.Module:
    """With buckets of 2 KB, at which Dynamo would cut the graph of a plain step."""
    dist._DEFAULT_FIRST_BUCKET_BYTES = 2048
    return DistributedDataParallel(model, bucket_cap_mb=2**-9)


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp, whole": lambda model: ddp(compiled(model)),
    "ddp, by blocks": lambda model: ddp(by_blocks(model)),
    "fsdp2, by blocks": lambda model: fsdp(by_blocks(model)),
    "fsdp2, in place, inductor": lambda model: fsdp(in_place(model)),
}


def fresh() -> None:
    torch.compiler.reset()
    counters.clear()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def step(observer: Meter | Reweighted, model: nn.Module, case: Case, part: slice) -> None:
    with observer.observe(tasks=TASKS[part]):
        case.loss(model(case.x[part]), case.y[part]).backward()


def check_numbers(rank: int) -> None:
    """The first block verifies; graphs are those of the next one, then of any number of examples."""
    part = OF_RANK[rank]
    for head, ways in (("own", WAYS), ("tied", ("fsdp2, by blocks",))):
        case = make_case(head)
        truth = Truth(case)
        for way in ways:
            fresh()
            model = WAYS[way](copy.deepcopy(case.model))
            meter = Meter(model, tasks=2)
            for block in range(3):
                model.zero_grad()
                step(meter, model, case, part)
                assert relative(meter.stats.example_norm, truth.example_norm[part]) <= CLOSE, (way, block)
                sqnorm, unbiased, variance = truth.estimates()
                assert relative(meter.stats.task_sqnorm, sqnorm) <= CLOSE, (way, block)
                assert relative(meter.stats.task_sqnorm_unbiased, unbiased) <= CLOSE, (way, block)
                assert relative(meter.stats.task_variance, variance) <= CLOSE, (way, block)
                assert_gradients(model, truth.weighted(torch.ones(EXAMPLES)))
                assert graphs() == (block > 0), (way, block)
            assert meter.memory.unobservable is None, way
            case.loss(model(case.x[part]), case.y[part]).backward()  # plain steps have graphs of their own


def check_that_graphs_serve_batches_of_all_sizes(rank: int) -> None:
    """Until a rank has no examples at all, and through the block in which all verify again."""
    case = make_case()
    for way in ("ddp, whole", "fsdp2, by blocks"):
        fresh()
        model = WAYS[way](copy.deepcopy(case.model))
        meter, truth = Meter(model, tasks=2), Truth(case)
        sizes = [3, 3, 4, 1, 6, 7, 0, 4, 5, 3, 2, 3]
        for block, size in enumerate(sizes):
            of_rank = (slice(0, size), slice(size, EXAMPLES))
            model.zero_grad()
            step(meter, model, case, of_rank[rank])
            norms, expected = meter.stats.example_norm, truth.example_norm[of_rank[rank]]
            assert len(norms) == len(expected) and (not len(norms) or relative(norms, expected) <= CLOSE), (way, block)
            assert_gradients(model, truth.weighted(torch.ones(EXAMPLES)))
        assert graphs() > 0
        assert meter.memory.unobservable is None, way


def check_weighted_steps(rank: int) -> None:
    case, part = make_case(), OF_RANK[rank]
    truth = Truth(case)
    for way in ("ddp, by blocks", "fsdp2, by blocks"):
        fresh()
        model = WAYS[way](copy.deepcopy(case.model))
        plain = torch.optim.SGD(model.parameters(), 0.0)
        optimizer = Reweighted(plain, model, InverseNorm(), tasks=2, apply="next_step")
        for _ in range(3):
            optimizer.zero_grad()
            step(optimizer, model, case, part)
            assert_gradients(model, truth.weighted(optimizer.weights[TASKS].double()))
            optimizer.step()
        assert float(optimizer.weights.diff().abs()) > 0.01
        assert graphs() == 1, way


def check_accumulation(rank: int) -> None:
    """Two blocks for one step, reduced once."""
    case, part = make_case(), OF_RANK[rank]
    truth, examples = Truth(case), range(EXAMPLES)[part]
    for way in ("ddp, whole", "fsdp2, by blocks"):
        fresh()
        model = WAYS[way](copy.deepcopy(case.model))
        meter = Meter(model, tasks=2)
        for _ in range(3):
            model.zero_grad()
            for half, last in ((slice(examples[0], examples[0] + 2), False), (slice(examples[0] + 2, part.stop), True)):
                if way.startswith("ddp"):
                    model.require_backward_grad_sync = last
                else:
                    model.set_requires_gradient_sync(last)
                step(meter, model, case, half)
                assert relative(meter.stats.example_norm, truth.example_norm[half]) <= CLOSE, way
            assert_gradients(model, truth.weighted(torch.ones(EXAMPLES)))
        assert graphs() > 0
        assert meter.memory.unobservable is None, way


def check_precision_policy(rank: int) -> None:
    """In bfloat16, errors against float64 are at most twice those of blocks that run the model as it was written."""
    wide, part = make_case(), OF_RANK[rank]
    truth, errors = Truth(wide), {}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    narrow = Case(copy.deepcopy(wide.model).float(), wide.x, wide.y, lambda out, y: token_loss(out.float(), y))
    for way, prepare in (("as written", lambda model: model), ("compiled", by_blocks)):
        fresh()
        model = fsdp(prepare(copy.deepcopy(narrow.model)), mp_policy=policy)
        meter = Meter(model, tasks=2)
        for _ in range(2):
            model.zero_grad()
            step(meter, model, narrow, part)
        assert graphs() == (way == "compiled")
        errors[way] = relative(meter.stats.example_norm, truth.example_norm[part])
    assert errors["compiled"] <= 2 * max(errors["as written"], torch.finfo(torch.bfloat16).eps / 8), errors


def check_what_runs_as_it_was_written(rank: int) -> None:
    """Tasks' gradients that are summed over the ranks when the block closes."""
    case, part = make_case(), OF_RANK[rank]
    truth = Truth(case)
    for way in ("ddp, whole", "fsdp2, by blocks"):
        fresh()
        model = WAYS[way](copy.deepcopy(case.model))
        meter = Meter(model, tasks=2, ranks="exact")
        for _ in range(2):
            model.zero_grad()
            step(meter, model, case, part)
            assert relative(meter.stats.task_norm, truth.task_norm) <= CLOSE, way
            assert_gradients(model, truth.weighted(torch.ones(EXAMPLES)))
        assert graphs() == 0, way


def check_layers_that_are_split(rank: int) -> None:
    """They, too, run as they were written, with FSDP2 around them or without."""
    case = make_case()
    truth = Truth(case, ranks=1)
    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("data", "parts"))
    plan = {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}
    for shard in (lambda model: model, lambda model: fsdp(model, mesh=mesh["data"])):
        fresh()
        model = shard(by_blocks(parallelize_module(copy.deepcopy(case.model), mesh["parts"], plan)))
        meter = Meter(model, tasks=2)
        for _ in range(2):
            model.zero_grad()
            step(meter, model, case, slice(0, EXAMPLES))
            assert relative(meter.stats.example_norm, truth.example_norm) <= CLOSE
            assert_gradients(model, truth.weighted(torch.ones(EXAMPLES)))
        assert graphs() == 0


def test_numbers(tmp_path):
    run_world(RANKS, (check_numbers,), tmp_path)


def test_steps(tmp_path):
    checks = check_that_graphs_serve_batches_of_all_sizes, check_weighted_steps, check_accumulation
    as_written = check_what_runs_as_it_was_written, check_layers_that_are_split
    run_world(RANKS, (*checks, check_precision_policy, *as_written), tmp_path)
