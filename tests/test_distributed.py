"""DDP, FSDP2 and tensor parallelism on processes of their own, against autograd on all their examples in one."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from divided import (
    CLOSE,
    EXAMPLES,
    OF_RANK,
    RANKS,
    TASKS,
    Truth,
    assert_gradients,
    assert_same_on_all_ranks,
    ddp,
    fsdp,
    make_case,
    whole,
)
from oracle import Case, Transformer, relative, square_loss, token_loss
from test_checkpoints import KINDS
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from worlds import run_world

from gradnorm_ext import IMTLG, ClipExamples, InverseNorm, Meter, Reweighted


def check_meter(rank: int, wrap, head: str = "own") -> None:
    case = make_case(head)
    truth, part = Truth(case), OF_RANK[rank]
    for ranks in ("unbiased", "exact"):
        model = wrap(copy.deepcopy(case.model))
        meter = Meter(model, tasks=2, ranks=ranks, per_layer=True)
        for _ in range(2):
            model.zero_grad()
            with meter.observe(tasks=TASKS[part]):
                case.loss(model(case.x[part]), case.y[part]).backward()
            stats = meter.stats
            assert relative(stats.example_norm, truth.example_norm[part]) <= CLOSE
            assert_gradients(model, truth.weighted(torch.ones(EXAMPLES)))
            sqnorm, unbiased, variance = truth.estimates(OF_RANK if ranks == "unbiased" else (slice(None),))
            assert relative(stats.task_sqnorm, sqnorm) <= CLOSE
            assert relative(stats.task_sqnorm_unbiased, unbiased) <= CLOSE
            assert relative(stats.task_variance, variance) <= CLOSE
            assert stats.task_units.tolist() == stats.task_count.tolist() == TASKS.bincount().tolist()
            assert_same_on_all_ranks(torch.stack([stats.task_norm, stats.task_sqnorm_unbiased, stats.task_variance]))
            of_layers = sum(layer.task_sqnorm for layer in stats.layers.values())
            assert relative(of_layers, stats.task_sqnorm) <= CLOSE
        if ranks == "exact":
            assert relative(stats.task_norm, truth.task_norm) <= CLOSE


def check_meters_of_ddp(rank: int) -> None:
    for head in ("own", "tied", "functional"):
        check_meter(rank, ddp, head)


def check_meters_of_fsdp(rank: int) -> None:
    check_meter(rank, fsdp)
    check_meter(rank, fsdp, "tied")
    check_meter(rank, lambda model: fsdp(model, reshard=False))


def check_two_passes(rank: int, wrap) -> None:
    case, part = make_case(), OF_RANK[rank]
    truth = Truth(case)
    bound = float(truth.example_norm.median())
    for policy, ranks in ((InverseNorm(), "unbiased"), (InverseNorm(), "exact"), (ClipExamples(bound), "unbiased")):
        model = wrap(copy.deepcopy(case.model))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        optimizer = Reweighted(optimizer, model, policy, passes=2, tasks=2, ranks=ranks)
        for _ in range(2):  # the first also verifies itself
            optimizer.zero_grad()
            with optimizer.observe(tasks=TASKS[part]):
                optimizer.backward(case.loss(model(case.x[part]), case.y[part]))
            if policy.weighs == "tasks":
                norm = truth.task_norm if ranks == "exact" else truth.estimates()[0].clamp(min=0).sqrt()
                of_task = (1 / norm) / (1 / norm).mean()
                assert_same_on_all_ranks(optimizer.weights)
                weights = of_task[TASKS]
            else:
                weights = (bound / truth.example_norm).clamp(max=1)
            assert_gradients(model, truth.weighted(weights))
        optimizer.step()
        for parameter in model.parameters():
            assert_same_on_all_ranks(whole(parameter.detach()))


def check_two_passes_of_ddp(rank: int) -> None:
    check_two_passes(rank, ddp)


def check_two_passes_of_fsdp(rank: int) -> None:
    check_two_passes(rank, fsdp)


def check_next_step(rank: int, wrap) -> None:
    case, part = make_case(), OF_RANK[rank]
    truth = Truth(case)
    model = wrap(copy.deepcopy(case.model))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    optimizer = Reweighted(optimizer, model, InverseNorm(), apply="next_step", tasks=2)
    norm = truth.estimates()[0].sqrt()
    for weights in (torch.ones(2, dtype=torch.float64), (1 / norm) / (1 / norm).mean()):
        with optimizer.observe(tasks=TASKS[part]):
            case.loss(model(case.x[part]), case.y[part]).backward()
        assert relative(optimizer.weights, weights) <= CLOSE
        assert_same_on_all_ranks(optimizer.weights.double())
        assert_gradients(model, truth.weighted(weights[TASKS]))
        optimizer.step()
        optimizer.zero_grad()


def check_next_step_of_ddp(rank: int) -> None:
    check_next_step(rank, ddp)


def check_next_step_of_fsdp(rank: int) -> None:
    check_next_step(rank, fsdp)


def gram_of(gradients: list[dict[str, torch.Tensor]], tasks: torch.Tensor) -> torch.Tensor:
    flat = torch.stack([torch.cat([g.flatten() for g in of.values()]) for of in gradients])
    of_task = torch.zeros(2, flat.shape[1], dtype=flat.dtype).index_add_(0, tasks, flat)
    return of_task @ of_task.T


def check_gram(rank: int, wrap) -> None:
    """The tasks' inner products over all ranks, and the policies that need them."""
    case, part = make_case("tied"), OF_RANK[rank]
    truth = Truth(case)
    gram = gram_of(truth.gradients, TASKS)
    weights = IMTLG()(SimpleNamespace(task_gram=gram, task_count=TASKS.bincount()))
    for how in (None, {"passes": 2}, {"apply": "next_step"}):
        model = wrap(copy.deepcopy(case.model))
        observer = Meter(model, tasks=2, gram=True, ranks="exact", per_layer=how is None)
        if how is not None:
            observer = Reweighted(torch.optim.SGD(model.parameters(), 0.0), observer, IMTLG(), **how)
        for block in range(2):
            model.zero_grad()
            with observer.observe(tasks=TASKS[part]):
                loss = case.loss(model(case.x[part]), case.y[part])
                loss.backward() if how is None else observer.backward(loss)
            assert relative(observer.stats.task_gram, gram) <= CLOSE
            assert_same_on_all_ranks(observer.stats.task_gram)
            if how is None:
                of_layers = sum(layer.task_gram for layer in observer.stats.layers.values())
                assert relative(of_layers, gram) <= CLOSE
                continue
            expected = torch.ones(2) if "apply" in how and block == 0 else weights
            assert relative(observer.weights, expected) <= 10 * CLOSE  # a system of equations away
            assert_same_on_all_ranks(observer.weights.double())
            assert_gradients(model, truth.weighted(expected[TASKS]), 10 * CLOSE)


def check_estimated_gram(rank: int, wrap) -> None:
    """By the pairs of examples of two tasks that met on a rank; where none did, nothing is known."""
    case, part = make_case(), OF_RANK[rank]
    truth = Truth(case)
    flat = torch.stack([torch.cat([g.flatten() for g in of.values()]) for of in truth.gradients])
    for tasks, prompts in (
        (TASKS, None),
        (TASKS, torch.tensor([0, 1, 2, 3, 4, 5, 5])),
        ((torch.arange(7) > 2).long(), None),
    ):
        met = pairs = 0
        units = torch.arange(EXAMPLES) if prompts is None else prompts
        count = [len(units[tasks == k].unique()) for k in range(2)]
        for of_rank in OF_RANK:
            here = tasks[of_rank]
            met += float(flat[of_rank][here == 0].sum(0) @ flat[of_rank][here == 1].sum(0))
            pairs += len(units[of_rank][here == 0].unique()) * len(units[of_rank][here == 1].unique())
        expected = count[0] * count[1] * met / pairs if pairs else float("nan")
        model = wrap(copy.deepcopy(case.model))
        meter = Meter(model, tasks=2, gram=True)
        for _ in range(2):
            with meter.observe(tasks=tasks[part], prompts=None if prompts is None else prompts[part]):
                case.loss(model(case.x[part]), case.y[part]).backward()
            gram = meter.stats.task_gram
            assert torch.equal(gram.diagonal(), meter.stats.task_sqnorm)
            assert torch.equal(gram, gram.T) or not pairs
            found = float(gram[0, 1])
            assert abs(found - expected) <= CLOSE * abs(float(truth.task_norm.prod())) or (found != found and not pairs)
            if pairs:
                assert_same_on_all_ranks(gram)


def check_exact_tasks(rank: int, wrap) -> None:
    """The gradients of several blocks, of other sizes on every rank, as of one batch."""
    case, part = make_case(), OF_RANK[rank]
    truth = Truth(case)
    model = wrap(copy.deepcopy(case.model))
    meter = Meter(model, tasks=2, exact_tasks=True, ranks="exact")
    for _ in range(2):
        meter.reset()
        for some in (slice(part.start, part.start + 2), slice(part.start + 2, part.stop), slice(0, 0)):
            with meter.observe(tasks=TASKS[some]):
                case.loss(model(case.x[some]), case.y[some]).backward()
        stats = meter.stats
        _, unbiased, variance = truth.estimates((slice(None),))
        assert relative(stats.example_norm, truth.example_norm[part]) <= CLOSE
        assert relative(stats.task_norm, truth.task_norm) <= CLOSE
        assert relative(stats.task_gram, gram_of(truth.gradients, TASKS)) <= CLOSE
        assert relative(stats.task_sqnorm_unbiased, unbiased) <= CLOSE
        assert relative(stats.task_variance, variance) <= CLOSE
        assert stats.task_units.tolist() == stats.task_count.tolist() == TASKS.bincount().tolist()
        assert_same_on_all_ranks(torch.stack([stats.task_norm, stats.task_sqnorm_unbiased, stats.task_variance]))


def check_sums_over_ranks_of_ddp(rank: int) -> None:
    check_gram(rank, ddp)
    check_estimated_gram(rank, ddp)
    check_exact_tasks(rank, ddp)


def check_sums_over_ranks_of_fsdp(rank: int) -> None:
    check_gram(rank, fsdp)
    check_exact_tasks(rank, fsdp)


def check_missing_tasks_and_an_empty_rank(rank: int, wrap) -> None:
    """Rank 0 has one task only, then nothing at all."""
    case = make_case(examples=4)
    tasks = torch.tensor([0, 0, 1, 1])
    for of_rank in ((slice(0, 2), slice(2, 4)), (slice(0, 0), slice(0, 4))):
        part, truth = of_rank[rank], Truth(case, tasks)
        prompts, rewards = torch.arange(4), torch.tensor([0.0, 1.0, 1.0, 0.5])
        for ranks in ("unbiased", "exact"):
            model = wrap(copy.deepcopy(case.model))
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            optimizer = Reweighted(optimizer, model, InverseNorm(), passes=2, tasks=2, ranks=ranks)
            for _ in range(2):
                optimizer.zero_grad()
                with optimizer.observe(tasks=tasks[part], prompts=prompts[part], rewards=rewards[part]):
                    optimizer.backward(case.loss(model(case.x[part]), case.y[part]))
                norm = truth.task_norm if ranks == "exact" else truth.estimates(of_rank)[0].sqrt()
                assert relative(optimizer.stats.task_norm, norm) <= CLOSE
                weights = (1 / norm) / (1 / norm).mean()
                assert_gradients(model, truth.weighted(weights[tasks]))
                reward = optimizer.stats.reward
                assert reward.task_mean.tolist() == [0.5, 0.75] and reward.task_share.tolist() == [0.5, 0.5]
            optimizer.step()


def check_an_empty_rank_of_ddp(rank: int) -> None:
    check_missing_tasks_and_an_empty_rank(rank, ddp)


def check_an_empty_rank_of_fsdp(rank: int) -> None:
    check_missing_tasks_and_an_empty_rank(rank, fsdp)


def check_ranks_by_themselves(rank: int) -> None:
    """Still verified in step with the others."""
    case, part = make_case(), OF_RANK[rank]
    truth = Truth(case, ranks=1)
    model = fsdp(copy.deepcopy(case.model))
    meter = Meter(model, tasks=2, ranks="local")
    for _ in range(2):
        with meter.observe(tasks=TASKS[part]):
            case.loss(model(case.x[part]), case.y[part]).backward()
        assert relative(meter.stats.example_norm, truth.example_norm[part]) <= CLOSE
        assert meter.stats.task_count.tolist() == TASKS[part].bincount().tolist()


def check_units_that_no_rank_can_compare(rank: int) -> None:
    """One example of each task on either rank: no pair, hence no estimate; exact norms are there."""
    case = make_case(examples=4)
    tasks, part = torch.tensor([0, 1, 0, 1]), slice(2 * rank, 2 * rank + 2)
    truth = Truth(case, tasks)
    for ranks in ("unbiased", "exact"):
        model = ddp(copy.deepcopy(case.model))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        optimizer = Reweighted(optimizer, model, lambda stats: 1 / stats.task_norm, passes=2, tasks=2, ranks=ranks)
        with optimizer.observe(tasks=tasks[part]):
            optimizer.backward(case.loss(model(case.x[part]), case.y[part]))
        if ranks == "exact":
            assert relative(optimizer.stats.task_norm, truth.task_norm) <= CLOSE
            optimizer.step()
        else:
            with pytest.raises(RuntimeError, match="the policy must return finite weights"):
                optimizer.step()


def check_accumulation(rank: int, wrap, no_sync) -> None:
    """Two blocks of different sizes, only the second of which reduces."""
    case, part = make_case(), OF_RANK[rank]
    truth = Truth(case)
    model = wrap(copy.deepcopy(case.model))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer = Reweighted(optimizer, model, ClipExamples(float(truth.example_norm.median())), passes=2)
    start = part.start
    for _ in range(2):
        optimizer.zero_grad()
        for last, some in ((False, slice(start, start + 1)), (True, slice(start + 1, part.stop))):
            with nullcontext() if last else no_sync(model), optimizer.observe():
                optimizer.backward(case.loss(model(case.x[some]), case.y[some]))
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(True)
            assert relative(optimizer.stats.example_norm, truth.example_norm[some]) <= CLOSE
        weights = (float(truth.example_norm.median()) / truth.example_norm).clamp(max=1)
        assert_gradients(model, truth.weighted(weights))


def fsdp_no_sync(model: nn.Module) -> nullcontext:
    model.set_requires_gradient_sync(False)
    return nullcontext()


def check_accumulation_of_ddp(rank: int) -> None:
    check_accumulation(rank, ddp, lambda model: model.no_sync())


def check_accumulation_of_fsdp(rank: int) -> None:
    check_accumulation(rank, fsdp, fsdp_no_sync)


class WithUnused(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.unused = model, nn.Linear(3, 3).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


def check_options_of_ddp(rank: int) -> None:
    case, part = make_case(), OF_RANK[rank]
    truth = Truth(case)
    bound = float(truth.example_norm.median())
    weights = (bound / truth.example_norm).clamp(max=1)
    for options in ({"find_unused_parameters": True}, {"gradient_as_bucket_view": True}, {}):
        inner = copy.deepcopy(case.model)
        model = DistributedDataParallel(WithUnused(inner) if "find_unused_parameters" in options else inner, **options)
        if not options:
            model.register_comm_hook(torch.distributed.group.WORLD, fp16_compress_hook)
        optimizer = Reweighted(torch.optim.SGD(model.parameters(), 0.0), model, ClipExamples(bound), passes=2)
        for _ in range(3):
            optimizer.zero_grad(set_to_none="gradient_as_bucket_view" not in options)
            with optimizer.observe():
                optimizer.backward(case.loss(model(case.x[part]), case.y[part]))
            assert relative(optimizer.stats.example_norm, truth.example_norm[part]) <= CLOSE, options
            expected = truth.weighted(weights)
            found = {n.removeprefix("module.").removeprefix("model."): p.grad for n, p in model.named_parameters()}
            close = CLOSE if options else 2e-3  # what half precision rounds
            for name, gradient in expected.items():
                assert float((found[name] - gradient).abs().max()) <= close, (options, name)
            optimizer.step()


class Branch(nn.Module):
    """A layer that only the examples of the first rank pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.more, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.more(h)) if bool((x[:, 0] > 0).all()) else h)


def check_layers_that_one_rank_uses(rank: int) -> None:
    torch.manual_seed(1)
    x, y = torch.randn(EXAMPLES, 6), torch.randn(EXAMPLES, 2)
    x[:, 0] = x[:, 0].abs() * torch.where(torch.arange(EXAMPLES) < OF_RANK[0].stop, 1, -1)
    case, part = Case(Branch(), x, y, square_loss).to(torch.float64), OF_RANK[rank]
    truth = Truth(case)
    for ranks in ("unbiased", "exact"):
        model = DistributedDataParallel(copy.deepcopy(case.model), find_unused_parameters=True)
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        optimizer = Reweighted(optimizer, model, InverseNorm(), passes=2, tasks=2, ranks=ranks)
        for _ in range(2):
            optimizer.zero_grad()
            with optimizer.observe(tasks=TASKS[part]):
                optimizer.backward(case.loss(model(case.x[part]), case.y[part]))
            assert relative(optimizer.stats.example_norm, truth.example_norm[part]) <= CLOSE
            norm = truth.task_norm if ranks == "exact" else truth.estimates()[0].clamp(min=0).sqrt()
            assert relative(optimizer.stats.task_norm, norm) <= CLOSE
            assert_gradients(model, truth.weighted(optimizer.weights[TASKS]))


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module, kind: str) -> None:
        super().__init__()
        self.block, self.options = block, KINDS[kind]

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.block, h, **self.options)


def check_checkpointed_blocks(rank: int, wrap) -> None:
    """What a block's backward computes again FSDP2 gathers again."""
    part = OF_RANK[rank]
    for kind in ("reentrant", "not reentrant", "selective by policy"):
        case = make_case()
        for i, block in enumerate(case.model.blocks):
            case.model.blocks[i] = Checkpointed(block, kind)
        truth = Truth(case)
        for how in ({"passes": 2}, {"apply": "next_step"}):
            model = wrap(copy.deepcopy(case.model))
            plain = torch.optim.SGD(model.parameters(), 0.0)
            optimizer = Reweighted(plain, model, InverseNorm(), tasks=2, ranks="exact", **how)
            for _ in range(2):
                optimizer.zero_grad()
                with optimizer.observe(tasks=TASKS[part]):
                    optimizer.backward(case.loss(model(case.x[part]), case.y[part]))
                assert relative(optimizer.stats.example_norm, truth.example_norm[part]) <= CLOSE, (kind, how)
                assert relative(optimizer.stats.task_norm, truth.task_norm) <= CLOSE
                assert_gradients(model, truth.weighted(optimizer.weights[TASKS]))


def check_checkpointed_blocks_of_ddp(rank: int) -> None:
    check_checkpointed_blocks(rank, ddp)


def check_checkpointed_blocks_of_fsdp(rank: int) -> None:
    check_checkpointed_blocks(rank, fsdp)


def check_a_divide_factor(rank: int) -> None:
    """Gradients that are added up instead of averaged."""
    case, part = make_case(), OF_RANK[rank]
    truth = Truth(case, ranks=1)
    model = fsdp(copy.deepcopy(case.model))
    for module in (model, *model.blocks):
        module.set_gradient_divide_factor(1.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    optimizer = Reweighted(optimizer, model, InverseNorm(), passes=2, tasks=2, ranks="exact")
    with optimizer.observe(tasks=TASKS[part]):
        optimizer.backward(case.loss(model(case.x[part]), case.y[part]))
    assert relative(optimizer.stats.example_norm, truth.example_norm[part]) <= CLOSE
    assert relative(optimizer.stats.task_norm, truth.task_norm) <= CLOSE
    assert_gradients(model, truth.weighted(optimizer.weights[TASKS]))


def check_a_static_graph(rank: int) -> None:
    case, part = make_case(), OF_RANK[rank]
    truth = Truth(case)
    model = DistributedDataParallel(copy.deepcopy(case.model), static_graph=True)
    plain = torch.optim.SGD(model.parameters(), 0.0)
    optimizer = Reweighted(plain, model, InverseNorm(), passes=2, tasks=2)
    with pytest.raises(RuntimeError, match="DDP with static_graph=True"), optimizer.observe(tasks=TASKS[part]):
        pass
    optimizer = Reweighted(plain, model, InverseNorm(), apply="next_step", tasks=2)
    weights = torch.ones(2)
    for _ in range(3):
        optimizer.zero_grad()
        with optimizer.observe(tasks=TASKS[part]):
            case.loss(model(case.x[part]), case.y[part]).backward()
        assert relative(optimizer.stats.example_norm, truth.example_norm[part]) <= CLOSE
        assert_gradients(model, truth.weighted(optimizer.weights[TASKS]))
        optimizer.step()
    assert not torch.equal(optimizer.weights.float(), weights)


def check_options_of_fsdp(rank: int) -> None:
    """CPU offload, meta-device initialisation, frozen parts, bfloat16 parameters, two groups in one, a checkpoint."""
    case, part = make_case(), OF_RANK[rank]
    truth = Truth(case)
    bound = float(truth.example_norm.median())
    weights = (bound / truth.example_norm).clamp(max=1)

    def on_meta(model: nn.Module) -> nn.Module:
        with torch.device("meta"):
            empty = fsdp(Transformer().double())
        empty.to_empty(device="cpu")
        state = model.state_dict()
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        set_model_state_dict(empty, state, options=StateDictOptions(full_state_dict=True))
        return empty

    for wrap in (lambda model: fsdp(model, offload_policy=CPUOffloadPolicy(pin_memory=False)), on_meta, fully_shard):
        model = wrap(copy.deepcopy(case.model))
        optimizer = Reweighted(torch.optim.SGD(model.parameters(), 0.0), model, ClipExamples(bound), passes=2)
        for _ in range(2):
            optimizer.zero_grad()
            with optimizer.observe():
                optimizer.backward(case.loss(model(case.x[part]), case.y[part]))
            assert relative(optimizer.stats.example_norm, truth.example_norm[part]) <= CLOSE
            assert_gradients(model, truth.weighted(weights))
            optimizer.step()


class Split(nn.Module):
    """What DTensor splits: a vocabulary, columns and rows of products with and without bias, norms of parts of sequences.

    Most sizes are odd: parts differ.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm1, self.norm2 = nn.Embedding(13, 9), nn.LayerNorm(9), nn.RMSNorm(9)
        self.up, self.down, self.head = nn.Linear(9, 11), nn.Linear(11, 9), nn.Linear(9, 15, bias=False)
        self.gate, self.back = nn.Linear(9, 12, bias=False), nn.Linear(12, 9, bias=False)
        self.own, self.place = nn.Linear(9, 9), nn.Parameter(torch.randn(9))  # not split

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.tokens(ids) + self.place
        h = h + self.down(torch.tanh(self.up(self.norm1(h))))
        h = h + self.back(torch.tanh(self.gate(self.norm2(h))))
        return self.head(torch.tanh(self.own(h)))


def split(model: nn.Module, mesh, sequence: bool, embedding: str) -> nn.Module:
    rows = Shard(1) if sequence else Replicate()
    into, out_of = ColwiseParallel(input_layouts=rows), RowwiseParallel(output_layouts=rows)
    whole = {"input_layouts": Replicate(), "output_layouts": rows}
    plan = {
        "tokens": RowwiseParallel(**whole) if embedding == "rows" else ColwiseParallel(**whole),
        **{"up": into, "gate": into, "down": out_of, "back": out_of},
        "head": ColwiseParallel(input_layouts=rows, output_layouts=Replicate()),
        **({name: SequenceParallel() for name in ("norm1", "norm2")} if sequence else {}),
    }
    return parallelize_module(model, mesh, plan)


def check_split_layers(mesh, wrap, data_ranks: int, part: slice, sequence: bool) -> None:
    torch.manual_seed(0)
    shape = EXAMPLES, 6 if sequence else 5  # torch's own plan needs sequences in equal parts
    x, y = (torch.randint(0, 13, shape, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    case = Case(Split(), x, y, token_loss).to(torch.float64)
    if sequence:  # a layer that is not split would see this rank's rows only, in its gradient as in its norms
        case.model.own.requires_grad_(False)
        case.model.place.requires_grad_(False)
    truth = Truth(case, ranks=data_ranks)
    bound = float(truth.example_norm.median())
    for embedding in ("rows", "columns") if data_ranks == 1 else ("rows",):
        for how in (None, {}, {"passes": 2}, {"apply": "next_step"}) if data_ranks == 1 else ({"passes": 2},):
            model = wrap(split(copy.deepcopy(case.model), mesh, sequence, embedding))
            observer = Meter(model, tasks=2)
            if how is not None:
                policy = InverseNorm() if "apply" in how else ClipExamples(bound)
                observer = Reweighted(torch.optim.SGD(model.parameters(), 0.0), observer, policy, **how)
            for _ in range(2):
                model.zero_grad()
                with observer.observe(tasks=TASKS[part]):
                    loss = case.loss(model(case.x[part]), case.y[part])
                    loss.backward() if how is None else observer.backward(loss)
                assert relative(observer.stats.example_norm, truth.example_norm[part]) <= CLOSE, (how, embedding)
                if data_ranks == 1:
                    assert relative(observer.stats.task_norm, truth.task_norm) <= CLOSE
                weights = torch.ones(EXAMPLES)
                if how is not None:
                    weights = observer.weights[TASKS] if "apply" in how else (bound / truth.example_norm).clamp(max=1)
                assert_gradients(model, truth.weighted(weights))


def check_tensor_parallel(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for sequence in (False, True):
        check_split_layers(mesh, lambda model: model, 1, slice(None), sequence)


class Gain(nn.Module):
    """A norm of its own, as transformers' models have: no rule expects a DTensor here."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x


def check_split_layers_without_a_rule(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Sequential(nn.Linear(8, 8), Gain())
    model = parallelize_module(model, mesh, {"1": SequenceParallel()})
    with (
        pytest.raises(RuntimeError, match=r"no rule for 1\.weight of Gain, which is trainable and split"),
        Meter(model).observe(),
    ):
        model(torch.randn(2, 4, 8))
    model = parallelize_module(nn.Sequential(nn.Linear(8, 8)), mesh, {"0": RowwiseParallel()})
    with pytest.raises(RuntimeError, match=r"of whole parameters, got 0\.weight"), Meter(model, gram=True).observe():
        model(torch.randn(2, 4, 4))


def check_fsdp_of_tensor_parallel(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "split"))
    for sequence in (False, True):
        wrap = lambda model: fully_shard(model, mesh=mesh["data"])  # noqa: E731
        check_split_layers(mesh["split"], wrap, 2, OF_RANK[rank // 2], sequence)


def check_replicated_shards(rank: int) -> None:
    """Two machines that each shard the model between them would have: examples are divided among all four."""
    case = make_case()
    of_rank = (slice(0, 3), slice(3, 4), slice(4, 5), slice(5, 7))
    truth, part = Truth(case, ranks=4), of_rank[rank]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for ranks in ("unbiased", "exact"):
        model = fsdp(copy.deepcopy(case.model), mesh=mesh)
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        optimizer = Reweighted(optimizer, model, InverseNorm(), passes=2, tasks=2, ranks=ranks)
        for _ in range(2):
            optimizer.zero_grad()
            with optimizer.observe(tasks=TASKS[part]):
                optimizer.backward(case.loss(model(case.x[part]), case.y[part]))
            assert relative(optimizer.stats.example_norm, truth.example_norm[part]) <= CLOSE
            norm = truth.task_norm if ranks == "exact" else truth.estimates(of_rank)[0].clamp(min=0).sqrt()
            assert relative(optimizer.stats.task_norm, norm) <= CLOSE
            assert_gradients(model, truth.weighted(optimizer.weights[TASKS]))


def check_refusals(rank: int) -> None:
    case, part = make_case(), OF_RANK[rank]
    for wrap in (ddp, fsdp):
        model = wrap(copy.deepcopy(case.model))
        for options in ({"scope": "layer"},) + (({},) if wrap is fsdp else ()):
            optimizer = Reweighted(torch.optim.SGD(model.parameters(), 0.1), model, InverseNorm(), tasks=2, **options)
            with (
                pytest.raises(RuntimeError, match="gradients are reduced during backward"),
                optimizer.observe(tasks=TASKS),
            ):
                pass
        plain = torch.optim.SGD(model.parameters(), 0.1)
        for meter in (
            Meter(model, tasks=2, exact_tasks=True),
            Reweighted(plain, model, IMTLG(), tasks=2, gram=True, passes=2),
        ):
            with pytest.raises(ValueError, match="summed over the 2 ranks for every task"), meter.observe(tasks=TASKS):
                pass
        meter = Meter(model, tasks=2, exact_tasks=True, per_layer=True, ranks="exact")
        with pytest.raises(ValueError, match="only the whole model's sums"), meter.observe(tasks=TASKS):
            pass
        mixing = Reweighted(
            torch.optim.SGD(model.parameters(), 0.1), model, InverseNorm(), tasks=2, exact_tasks=True, ranks="exact"
        )
        with pytest.raises(RuntimeError, match="gradients are reduced during backward"), mixing.observe(tasks=TASKS):
            pass
        local = Reweighted(torch.optim.SGD(model.parameters(), 0.1), model, InverseNorm(), tasks=2, ranks="local")
        with pytest.raises(RuntimeError, match="must weigh alike"), local.observe(tasks=TASKS):
            pass
    model = ddp(copy.deepcopy(case.model))
    with model.join(), pytest.raises(RuntimeError, match="every rank must run every block, got DDP's join context"):
        Meter(model).observe().__enter__()
    flattened = FullyShardedDataParallel(copy.deepcopy(case.model), device_id=torch.device("cpu"))
    for observer in (Meter(flattened), Reweighted(torch.optim.SGD(flattened.parameters()), flattened, InverseNorm())):
        refused = pytest.raises(RuntimeError, match=r"tensors of their own, got the model \(FullyShardedDataParallel\)")
        with refused, observer.observe():
            pass
    for wrap in (ddp, lambda model: fully_shard(model)):
        model = wrap(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 2)))
        refused = pytest.raises(RuntimeError, match=r"must be formed there, got (module\.)?0\.parametrizations")
        with refused, Meter(model, on_unsupported="vmap").observe():
            model(torch.randn(5, 4)).square().sum().backward()
    plain = copy.deepcopy(case.model)
    optimizer = Reweighted(torch.optim.SGD(plain.parameters(), 0.1), plain, InverseNorm(), tasks=2)
    with pytest.raises(RuntimeError, match="neither DDP nor FSDP2"), optimizer.observe(tasks=TASKS):
        pass
    alone = Reweighted(torch.optim.SGD(plain.parameters(), 0.1), plain, InverseNorm(), tasks=2, ranks="local")
    with alone.observe(tasks=TASKS[part]):
        case.loss(plain(case.x[part]), case.y[part]).backward()


def test_ddp_measures_and_weighs_as_one_process_would(tmp_path):
    checks = [check_meters_of_ddp, check_two_passes_of_ddp, check_next_step_of_ddp, check_an_empty_rank_of_ddp]
    checks += [
        check_units_that_no_rank_can_compare,
        check_accumulation_of_ddp,
        check_options_of_ddp,
        check_a_static_graph,
    ]
    checks += [check_layers_that_one_rank_uses, check_checkpointed_blocks_of_ddp]
    checks += [check_sums_over_ranks_of_ddp, check_refusals]
    run_world(RANKS, checks, tmp_path)


def test_fsdp2_measures_and_weighs_as_one_process_would(tmp_path):
    checks = [check_meters_of_fsdp, check_two_passes_of_fsdp, check_next_step_of_fsdp, check_an_empty_rank_of_fsdp]
    checks += [check_accumulation_of_fsdp, check_options_of_fsdp, check_ranks_by_themselves]
    checks += [check_checkpointed_blocks_of_fsdp, check_a_divide_factor, check_sums_over_ranks_of_fsdp]
    run_world(RANKS, checks, tmp_path)


def test_layers_that_dtensor_splits_are_measured_whole(tmp_path):
    run_world(2, [check_tensor_parallel, check_split_layers_without_a_rule], tmp_path)


def test_fsdp2_over_tensor_parallel_layers_and_over_replicas(tmp_path):
    run_world(4, [check_fsdp_of_tensor_parallel, check_replicated_shards], tmp_path)
