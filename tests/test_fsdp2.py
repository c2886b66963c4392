"""What FSDP2 is used with: precision policies, frozen parts, checkpoints of torch.distributed."""

from __future__ import annotations

import copy
import dataclasses
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from divided import (
    CLOSE,
    EXAMPLES,
    OF_RANK,
    RANKS,
    TASKS,
    Truth,
    assert_gradients,
    fsdp,
    gradients_of,
    make_case,
    whole,
)
from oracle import Adapted, Case, group_norms, relative, token_loss
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from worlds import run_world

from gradnorm_ext import ClipExamples, InverseNorm, Meter, PiKE, Reweighted


def one_by_one(model: nn.Module, case: Case) -> list[dict[str, torch.Tensor]]:
    """Plain torch's, every rank with the same example: what each contributes to the reduced gradient."""
    found = []
    for i in range(len(case.x)):
        model.zero_grad()
        case.loss(model(case.x[i : i + 1]), case.y[i : i + 1]).backward()
        found.append({name: gradient.double() / RANKS for name, gradient in gradients_of(model).items()})
    model.zero_grad()
    return found


def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradients[name].double().flatten() for name in sorted(gradients)])


def mixed(gradients: list[dict[str, torch.Tensor]], weights: torch.Tensor) -> torch.Tensor:
    return sum(w * flat(of) for w, of in zip(weights, gradients, strict=True))


BFLOAT16 = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
PRECISIONS = (
    BFLOAT16,
    {**BFLOAT16, "cast_forward_inputs": False},
    {"param_dtype": torch.bfloat16},  # gradients are reduced in bfloat16 too
    {"param_dtype": torch.float16, "reduce_dtype": torch.float32},
)


def check_precision_policies(rank: int) -> None:
    """Errors against float64, one example at a time, are at most twice plain torch's under the same policy."""
    part, every = OF_RANK[rank], torch.arange(EXAMPLES)
    wide = make_case()
    narrow = Case(copy.deepcopy(wide.model).float(), wide.x, wide.y, lambda out, y: token_loss(out.float(), y))
    wide.model.load_state_dict({name: value.double() for name, value in narrow.model.state_dict().items()})
    truth = Truth(wide)
    bound = float(truth.example_norm.median())

    for options in PRECISIONS:

        def wrapped(options=options) -> nn.Module:
            model, policy = copy.deepcopy(narrow.model), MixedPrecisionPolicy(**options)
            for block in model.blocks:
                fully_shard(block, mp_policy=policy)
            return fully_shard(model, mp_policy=dataclasses.replace(policy, output_dtype=torch.float32))

        plain = one_by_one(wrapped(), narrow)
        plain_norm = group_norms(plain, every, EXAMPLES)
        rounding = float(torch.finfo(options["param_dtype"]).eps) / 8
        allowed = 2 * max(relative(plain_norm, truth.example_norm), rounding)

        def weigh(norms: torch.Tensor) -> torch.Tensor:
            return (bound / norms).clamp(max=1)

        def off(found: torch.Tensor, weights: torch.Tensor) -> float:
            right = mixed(truth.gradients, weights)
            return float((found - right).norm() / right.norm())

        for how in (None, {"passes": 2}, {"apply": "next_step"}):
            model = wrapped()
            observer = Meter(model, tasks=2, ranks="exact")
            weights = naive = torch.ones(EXAMPLES)
            if how is not None:
                policy = InverseNorm() if "apply" in how else ClipExamples(bound)
                observer = Reweighted(torch.optim.SGD(model.parameters(), 0.0), model, policy, tasks=2, **how)
                if policy.weighs == "examples":
                    weights, naive = weigh(truth.example_norm), weigh(plain_norm)
            for _ in range(2):  # the first also verifies itself
                model.zero_grad()
                with observer.observe(tasks=TASKS[part]):
                    loss = narrow.loss(model(narrow.x[part]), narrow.y[part])
                    loss.backward() if how is None else observer.backward(loss)
                assert relative(observer.stats.example_norm, truth.example_norm[part]) <= allowed, (options, how)
                assert observer.stats.example_norm.dtype == torch.float32
                if how is None:
                    of_tasks = relative(group_norms(plain, TASKS, 2), truth.task_norm)
                    assert relative(observer.stats.task_norm, truth.task_norm) <= 2 * max(of_tasks, rounding)
                elif "apply" in how:
                    weights = naive = observer.weights[TASKS].double()
                found = gradients_of(model)
                assert all(gradient.dtype == torch.float32 for gradient in found.values())
                error, of_plain = off(flat(found), weights), off(mixed(plain, naive), weights)
                assert error <= 2 * max(of_plain, rounding), (options, how, error, of_plain)


def freeze_a_block(case: Case) -> None:
    case.model.blocks[0].requires_grad_(False)


def freeze_some(case: Case) -> None:
    """In every group something, also the first and the last parameter."""
    block = case.model.blocks[1]
    for frozen in (case.model.tokens.weight, case.model.norm.bias, block.norm1.weight, block.attention.qkv.bias):
        frozen.requires_grad_(False)
    case.model.head.weight.requires_grad_(False)


def adapt(case: Case) -> None:
    """Only LoRA's parameters are trained."""
    case.model.requires_grad_(False)
    for block in case.model.blocks:
        width = block.attention.out.in_features
        block.attention.out = Adapted(width).double()


def check_frozen_parts(rank: int) -> None:
    part = OF_RANK[rank]
    for freeze in (freeze_a_block, freeze_some, adapt):
        case = make_case()
        torch.manual_seed(2)
        freeze(case)
        truth = Truth(case)
        bound = float(truth.example_norm.median())
        for reshard in (True, False):
            for how in (None, {"passes": 2}, {"apply": "next_step"}):
                model = fsdp(copy.deepcopy(case.model), reshard)
                observer = Meter(model, tasks=2, ranks="exact")
                weights = torch.ones(EXAMPLES)
                if how is not None:
                    policy = InverseNorm() if "apply" in how else ClipExamples(bound)
                    observer = Reweighted(torch.optim.SGD(model.parameters(), 0.0), model, policy, tasks=2, **how)
                    weights = (bound / truth.example_norm).clamp(max=1)
                for _ in range(2):
                    model.zero_grad()
                    with observer.observe(tasks=TASKS[part]):
                        loss = case.loss(model(case.x[part]), case.y[part])
                        loss.backward() if how is None else observer.backward(loss)
                    assert relative(observer.stats.example_norm, truth.example_norm[part]) <= CLOSE
                    if how is None:
                        assert relative(observer.stats.task_norm, truth.task_norm) <= CLOSE
                    elif "apply" in how:
                        weights = observer.weights[TASKS]
                    assert_gradients(model, truth.weighted(weights))
                    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


class Constant(nn.Module):
    """Adds what a trained layer makes of a frozen table, which has as many rows as there are examples."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.own = nn.Parameter(torch.randn(4, 8), requires_grad=False), nn.Linear(8, 8)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.own(self.table)


def check_frozen_tables(rank: int) -> None:
    """A frozen parameter is no batch, although FSDP2 keeps it in other memory each time."""
    model = nn.Sequential(nn.Linear(8, 8), Constant())
    fully_shard(model[1])
    fully_shard(model)
    for _ in range(2):
        with (
            pytest.raises(RuntimeError, match=r"1\.own\.weight \(linear, rows \[4\]\) was used with rows that do not"),
            Meter(model).observe(),
        ):
            model(torch.randn(4, 4, 8)).square().sum().backward()


def check_checkpoints(rank: int) -> None:
    """Saved, loaded into another model and gone on with: the same weights bit for bit, and the same running means."""
    case, part = make_case(), OF_RANK[rank]
    whole_state = StateDictOptions(full_state_dict=True, cpu_offload=True)

    def make(seed: int, how: dict, policy) -> tuple[nn.Module, Reweighted]:
        model = copy.deepcopy(case.model)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(seed))
        model = fsdp(model)
        groups = [{"params": list(model.blocks.parameters()), "lr": 2e-2}, {"params": list(model.head.parameters())}]
        return model, Reweighted(torch.optim.AdamW(groups, 1e-2), model, policy, tasks=2, **how)

    def train(model: nn.Module, optimizer: Reweighted, steps: range) -> list[torch.Tensor]:
        for step in steps:
            with optimizer.observe(tasks=TASKS[part]):
                optimizer.backward(case.loss(model(case.x[part].roll(step, 1)), case.y[part]))
            optimizer.step()
            optimizer.zero_grad()
        state = optimizer.state_dict()["gradnorm"]
        own = [state["history"]["sums"], state["next_weights"], *state.get("policy", {}).get("state", {}).values()]
        return [*(whole(p.detach()).clone() for p in model.parameters()), *own]

    folder = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder)
    for index, (how, policy) in enumerate(
        (({"apply": "next_step"}, InverseNorm), ({"passes": 2}, lambda: PiKE(zeta1=1e-3, zeta2=1e-3)))
    ):
        model, optimizer = make(1, how, policy())
        train(model, optimizer, range(2))
        saved = get_state_dict(model, optimizer)
        dcp.save(dict(zip(("model", "optimizer"), saved, strict=True)), checkpoint_id=f"{folder[0]}/{index}")
        in_one = copy.deepcopy(get_state_dict(model, optimizer, options=whole_state))  # steps are not copied
        expected = train(model, optimizer, range(2, 4))

        model, optimizer = make(2, how, policy())
        loaded = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(loaded, checkpoint_id=f"{folder[0]}/{index}")
        set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        assert optimizer.history.steps == 2 and "gradnorm" not in optimizer.param_groups[0]
        found = train(model, optimizer, range(2, 4))
        assert len(found) == len(expected) and all(map(torch.equal, found, expected))

        model, optimizer = make(3, how, policy())
        options = dataclasses.replace(whole_state, broadcast_from_rank0=True)
        states = in_one if rank == 0 else ({}, {})
        set_model_state_dict(model, states[0], options=options)
        set_optimizer_state_dict(model, optimizer, states[1], options=options)
        found = train(model, optimizer, range(2, 4))
        assert all(map(torch.equal, found, expected))


def test_precision_frozen_parts_and_checkpoints(tmp_path):
    checks = [check_precision_policies, check_frozen_parts, check_frozen_tables, check_checkpoints]
    run_world(RANKS, checks, tmp_path)
