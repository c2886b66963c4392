"""A rank that raises inside a block: the others wait no longer than the process group lets them, and every model is whole."""

from __future__ import annotations

import copy
import datetime
import time

import pytest
import torch
import torch.distributed as dist
from divided import OF_RANK, RANKS, TASKS, make_case
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from worlds import run_world

from gradnorm_ext import InverseNorm, Meter, Reweighted

TIMEOUT = 3.0  # seconds


class BrokenError(Exception):
    """What the last rank raises."""


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: torch.Tensor) -> torch.Tensor:
        return h.clone()

    @staticmethod
    def backward(ctx, g: torch.Tensor) -> torch.Tensor:
        raise BrokenError


class Fails(nn.Module):
    """Between the blocks of a Transformer, where gradients of later parameters may be on their way already."""

    def __init__(self) -> None:
        super().__init__()
        self.where = "nowhere"

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        if self.where == "forward":
            raise BrokenError
        return FailsBackward.apply(h) if self.where == "backward" else h


def ddp(model: nn.Module, group) -> nn.Module:
    return DistributedDataParallel(model, process_group=group)


def fsdp(model: nn.Module, group) -> nn.Module:
    mesh = DeviceMesh.from_group(group, "cpu")
    for block in (model.blocks[0], model.blocks[2]):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def check_failures(rank: int, wrap) -> None:
    case, part = make_case(), OF_RANK[rank]
    case.model.blocks.insert(1, Fails())
    for where, how in (("forward", None), ("backward", {"passes": 2}), ("afterwards", {"apply": "next_step"})):
        # A group of its own: gloo's is of no use after a timeout.
        group = dist.new_group(timeout=datetime.timedelta(seconds=TIMEOUT))
        model = wrap(copy.deepcopy(case.model), group)
        fails = next(module for module in model.modules() if isinstance(module, Fails))
        observer = Meter(model, tasks=2)
        if how is not None:
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            observer = Reweighted(optimizer, model, InverseNorm(), tasks=2, **how)
        classes = [type(module) for module in model.modules()]

        def block(where, model=model, observer=observer, fails=fails, how=how) -> None:
            fails.where = where
            with observer.observe(tasks=TASKS[part]):
                loss = case.loss(model(case.x[part]), case.y[part])
                loss.backward() if how is None else observer.backward(loss)
                if where == "afterwards":
                    raise BrokenError

        block("nowhere")  # the first verifies itself, which is not to be what fails
        dist.barrier()
        start = time.monotonic()
        if rank == RANKS - 1:
            with pytest.raises(BrokenError):
                block(where)
        else:
            with pytest.raises(RuntimeError, match=r"[Tt]imed out|timeout"):
                block("nowhere")
            assert time.monotonic() - start < TIMEOUT + 5, where  # one wait, not one after the other
        assert [type(module) for module in model.modules()] == classes
        assert not any(key.startswith("_gradnorm") for module in model.modules() for key in vars(module))
        assert not any(parameter._backward_hooks for parameter in model.parameters())
        dist.barrier()


def check_failures_of_ddp(rank: int) -> None:
    check_failures(rank, ddp)


def check_failures_of_fsdp(rank: int) -> None:
    check_failures(rank, fsdp)


def test_the_others_wait_no_longer_than_the_group_lets_them(tmp_path):
    run_world(RANKS, [check_failures_of_ddp, check_failures_of_fsdp], tmp_path)
