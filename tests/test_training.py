"""What training loops do around a block: scaled losses, accumulation over batches that differ, a kill and a resume."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracle import Transformer, relative
from torch import nn

from gradnorm_ext import ClipExamples, GradNorm, InverseNorm, Meter, PiKE, Reweighted, Stats

TASKS = torch.tensor([0, 1, 0, 1])


def make(dtype=torch.float32):
    torch.manual_seed(0)
    model = Transformer().to(dtype)
    return model, torch.randint(1, 13, (4, 6)), torch.randint(0, 13, (4, 6))


def loss_of(model, x, y):
    return F.cross_entropy(model(x).float().flatten(0, 1), y.flatten(), reduction="sum")


@pytest.mark.parametrize("scale", (1.0, 2.0**16, 2.0**24))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # of plain torch, where autocast meets RMSNorm
def test_a_scaled_loss_under_autocast_gives_the_norms_of_the_loss(dtype, scale):
    """Powers of two change no digit, unless half precision overflows: then the norms say so."""
    model, x, y = make()
    found = []
    for factor in (1.0, scale):
        meter = Meter(model, tasks=2)
        model.zero_grad()
        with meter.observe(tasks=TASKS, loss_scale=factor), torch.autocast("cpu", dtype):
            (factor * loss_of(model, x, y)).backward()
        found.append(meter.stats)
        assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    if dtype == torch.float16 and scale == 2.0**24:
        assert not bool(found[1].finite)
        return
    slack = 2 * torch.finfo(torch.float16).eps if dtype == torch.float16 else 1e-6  # what is subnormal without a scale
    assert relative(found[1].example_norm, found[0].example_norm) <= slack
    assert relative(found[1].task_norm, found[0].task_norm) <= slack and bool(found[1].finite)


@pytest.mark.parametrize(
    "options", ({"passes": 2}, {"apply": "next_step"}, {}), ids=("passes", "next_step", "same_step")
)
def test_a_step_that_a_grad_scaler_skips_leaves_no_trace(options):
    model, x, y = make()
    policy = PiKE(zeta1=1e-3, zeta2=1e-3)
    optimizer = Reweighted(torch.optim.Adam(model.parameters(), 1e-2), model, policy, tasks=2, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=1000)
    states = []
    for step in range(4):
        with optimizer.observe(tasks=TASKS, loss_scale=scaler.get_scale()):
            loss = loss_of(model, x, y) * (torch.inf if step == 2 else 1)
            optimizer.backward(scaler.scale(loss))
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        own = optimizer.state_dict()["gradnorm"]
        states.append(
            [
                *(p.detach().clone() for p in model.parameters()),
                own["history"]["sums"].clone(),
                own["next_weights"].clone(),
                *(t.clone() for t in policy.state_dict().values()),
            ]
        )
    assert not bool(optimizer.history.rows()[2 * 2]["norm"] < float("inf"))
    assert all(torch.equal(a, b) for a, b in zip(states[1], states[2], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(states[2][:4], states[3][:4], strict=True))
    assert scaler.get_scale() == 2.0**15


def test_master_weights_in_float32_beside_parameters_in_bfloat16():
    """The optimizer's parameters are copies, as with apex's O2: gradients are handed over after the block."""
    model, x, y = make(torch.bfloat16)
    meter = Meter(model, tasks=2)
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.SGD(masters, 0.1)
    plain = copy.deepcopy(model)
    loss_of(plain, x, y).backward()
    with meter.observe(tasks=TASKS):
        loss_of(model, x, y).backward()
    for master, parameter in zip(masters, model.parameters(), strict=True):
        master.grad = parameter.grad.float()
    before = [master.detach().clone() for master in masters]
    optimizer.step()
    assert meter.stats.example_norm.dtype == torch.float32
    for master, old, parameter in zip(masters, before, plain.parameters(), strict=True):
        size = float(parameter.grad.abs().max())
        torch.testing.assert_close(
            (old - master.detach()) / 0.1, parameter.grad.float(), rtol=0, atol=4 * 2**-8 * size + 1e-5
        )


@pytest.mark.parametrize("policy", (None, ClipExamples(0.02)), ids=("measured", "clipped"))
def test_blocks_of_any_size_accumulate_to_one(policy):
    """A mean over the tokens of the whole batch, which its parts are divided by, as HF's trainers do."""
    model, x, y = make(torch.float64)
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.7
    tokens = int(mask.sum())

    def part_of_loss(some):
        losses = F.cross_entropy(model(x[some]).flatten(0, 1), y[some].flatten(), reduction="none")
        return (losses.view(y[some].shape) * mask[some]).sum() / tokens

    found = []
    for parts in ((slice(0, 4),), (slice(0, 1), slice(1, 4)), (slice(0, 2), slice(2, 3), slice(3, 4))):
        model.zero_grad()
        plain = torch.optim.SGD(model.parameters(), 0.1)
        observer = Meter(model, tasks=2) if policy is None else Reweighted(plain, model, policy, tasks=2)
        stats = []
        for some in parts:
            with observer.observe(tasks=TASKS[some]):
                part_of_loss(some).backward()
            stats.append(observer.stats)
        norms = Stats.merged(stats).example_norm
        found.append((norms, torch.cat([p.grad.flatten() for p in model.parameters()])))
    close = 1e3 * torch.finfo(torch.float64).eps
    for norms, gradient in found[1:]:
        assert relative(norms, found[0][0]) <= close and relative(gradient, found[0][1]) <= close


RUN = """
import os, sys, torch
sys.path.insert(0, {tests!r})
from test_training import *
train({how!r}, {path!r}, die_at={die_at!r})
"""


def train(how, path, die_at=None):
    """Six steps, from the checkpoint where there is one; killed between backward and step number ``die_at``."""
    torch.set_num_threads(1)
    model, x, y = make()
    options, policy = {
        "same_step": ({}, GradNorm(best=1.0)),
        "passes": ({"passes": 2}, PiKE(zeta1=1e-3, zeta2=1e-3)),
        "next_step": ({"apply": "next_step"}, InverseNorm()),
    }[how]
    optimizer = Reweighted(torch.optim.AdamW(model.parameters(), 1e-2), model, policy, tasks=2, **options)
    first, saved = 0, Path(path, "checkpoint.pt")
    if saved.exists():
        state = torch.load(saved)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    for step in range(first, 6):
        rewards = torch.rand(4, generator=torch.Generator().manual_seed(step))
        with optimizer.observe(tasks=TASKS, prompts=TASKS, rewards=rewards):
            optimizer.backward(loss_of(model, x.roll(step, 1), y))
        if step == die_at:
            os._exit(9)
        optimizer.step()
        optimizer.zero_grad()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
        torch.save(state, saved)


@pytest.mark.parametrize("how", ("same_step", "passes", "next_step"))
def test_a_run_that_was_killed_before_its_step_resumes_bit_for_bit(how, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    train(how, whole)
    code = RUN.format(tests=str(Path(__file__).parent), how=how, path=str(killed), die_at=3)
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    train(how, killed)
    states = [torch.load(folder / "checkpoint.pt") for folder in (whole, killed)]
    flat = [torch.utils._pytree.tree_leaves(state) for state in states]
    for one, other in zip(*flat, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


class Rolled(nn.Module):
    """Gives every example its neighbour's activations."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)).roll(1, 0))


def test_rows_of_another_example_are_found_out_in_float16():
    torch.manual_seed(0)
    model = Rolled()
    refused = pytest.raises(RuntimeError, match="rows that do not belong to one example each")
    with refused, Meter(model).observe(), torch.autocast("cpu", torch.float16):
        model(torch.randn(4, 6)).float().square().sum().mul(2.0**8).backward()


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_a_first_block_that_overflows_verifies_nothing():
    model, x, y = make()
    meter = Meter(model, tasks=2)
    for scale in (2.0**40, 2.0**4):
        with meter.observe(tasks=TASKS, loss_scale=scale), torch.autocast("cpu", torch.float16):
            (loss_of(model, x, y) * scale).backward()
        assert bool(meter.stats.finite) == (scale == 2.0**4)
        assert meter.memory.unverified != bool(meter.stats.finite)
        assert bool(meter.memory.verified) == bool(meter.stats.finite)
