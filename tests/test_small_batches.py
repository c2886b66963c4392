"""Batches of no example and of one, names for tasks: what a sampler's odd batches and a dataset's columns bring."""

import math

import oracle
import pytest
import torch
from torch import nn

from gradnorm_ext import ClipExamples, Equal, InverseNorm, Meter, Reweighted, Stats

LAYERS = {
    "linear": lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)),
    "norms": lambda: nn.Sequential(nn.LayerNorm(6), nn.RMSNorm(6), nn.Linear(6, 3), nn.PReLU()),
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4), nn.Flatten()
    ),
}
POLICIES = {
    "equal": Equal,
    "inverse": InverseNorm,
    "clip": lambda: ClipExamples(1.0),
}
WAYS = [{}, {"passes": 2}, {"apply": "next_step"}]


def built(name):
    torch.manual_seed(0)
    return LAYERS[name]().double()


@pytest.mark.parametrize("rewarded", [False, True])
@pytest.mark.parametrize("options", [{}, {"per_layer": True}, {"gram": True}, {"exact_tasks": True}], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_batch_of_no_examples_has_no_norms_and_changes_no_other(name, options, rewarded):
    model, x = built(name), torch.randn(4, 6, dtype=torch.float64)
    meter, stats = Meter(model, tasks=["math", "code"], **options), []
    for batch in (x[:0], x, x[:0], x):
        tasks = ["math", "code", "code", "math"][: len(batch)]
        given = (
            {"prompts": [0, 1, 1, 0][: len(batch)], "rewards": [1.0, 0.0, 0.5, 1.0][: len(batch)]} if rewarded else {}
        )
        model.zero_grad()
        with meter.observe(tasks=tasks, **given):
            model(batch).square().sum().backward()
        stats.append(meter.stats)
        assert all(len(p.grad) and math.isfinite(p.grad.sum()) for p in model.parameters())
        assert all(not p.grad.any() for p in model.parameters()) or len(batch)
        meter.reset()
    truth = oracle.per_example_gradients(oracle.Case(model, x, x, lambda out, _: out.square().sum()))
    for empty, full in (stats[:2], stats[2:]):
        assert empty.example_norm.shape == (0,) and empty.task_norm.tolist() == [0, 0]
        assert empty.task_sqnorm_unbiased.isnan().all() and empty.task_count.tolist() == [0, 0] and bool(empty.finite)
        assert "gradnorm/example_norm/max" not in empty.log_dict() and empty.log_dict()["gradnorm/task/code/norm"] == 0
        torch.testing.assert_close(full.example_norm, oracle.group_norms(truth, torch.arange(4), 4))
        torch.testing.assert_close(full.task_norm, oracle.group_norms(truth, torch.tensor([0, 1, 1, 0]), 2))
        merged, alone = Stats.merged([empty, full, empty]), Stats.merged([full])
        assert merged.example_norm.equal(full.example_norm)
        torch.testing.assert_close(merged.task_sqnorm_unbiased, alone.task_sqnorm_unbiased, equal_nan=True)
        torch.testing.assert_close(merged.task_variance, alone.task_variance, equal_nan=True)
        assert empty.weighted(torch.ones(2), "tasks").task_norm.tolist() == [0, 0]
        assert len(empty.weighted(torch.ones(0), "examples").example_norm) == 0
        if rewarded:
            assert empty.prompt_signal(torch.ones(0)).shape == (0,)
            assert merged.reward.task_mean.tolist() == full.reward.task_mean.tolist()


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_steps_of_no_examples_leave_running_means_and_weights(policy, way):
    if way.get("apply") == "next_step" and getattr(policy(), "weighs", "tasks") == "examples":
        return
    runs, x = [], torch.randn(4, 6, dtype=torch.float64)
    for sizes in ((4, 4), (4, 0, 4)):
        model = built("linear")
        optimizer = Reweighted(torch.optim.SGD(model.parameters(), 0.01), model, policy(), tasks=2, **way)
        for size in sizes:  # with no momentum and no weight decay, a step of no gradient is none
            optimizer.zero_grad()
            with optimizer.observe(tasks=[0, 1, 1, 0][:size]):
                optimizer.backward(model(x[:size]).square().sum())
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.step()
            assert size or all(p.equal(q) for p, q in zip(before, model.parameters(), strict=True))
        runs.append([optimizer.weights, *map(optimizer.history.mean, ("sqnorm", "sqnorm_unbiased", "variance"))])
        assert optimizer.skipped_steps == 0
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("name", LAYERS)
def test_a_batch_of_one_example(name):
    model, x = built(name), torch.randn(4, 6, dtype=torch.float64)
    truth = oracle.per_example_gradients(oracle.Case(model, x, x, lambda out, _: out.square().sum()))
    meter = Meter(model, tasks=2, gram=True)
    for b in (0, 1, 2, 3, 1):
        with meter.observe(tasks=[b % 2], prompts=[7], rewards=[float(b)]):
            model(x[b : b + 1]).square().sum().backward()
        norm = oracle.group_norms(truth, torch.arange(4), 4)[b]
        torch.testing.assert_close(meter.stats.example_norm, norm[None])
        torch.testing.assert_close(meter.stats.task_norm[b % 2], norm)
        assert meter.stats.task_norm[1 - b % 2] == 0 and meter.stats.task_sqnorm_unbiased.isnan().all()
        assert meter.stats.task_variance.isnan().all() and meter.stats.reward.task_mean[b % 2] == b


@pytest.mark.parametrize("name", ["math", "code"])
def test_tasks_by_name_are_tasks_by_number(name):
    model, x, numbers = built("linear"), torch.randn(3, 6, dtype=torch.float64), {"math": 0, "code": 1}
    meter, found = Meter(model, tasks=["math", "code"]), []
    names = ["code", name, "math"]
    for tasks in (names, tuple(names), [numbers[one] for one in names]):
        with meter.observe(tasks=tasks):
            model(x).square().sum().backward()
        found.append(meter.stats)
    assert all(stats.tasks.equal(found[2].tasks) and stats.task_norm.equal(found[2].task_norm) for stats in found)
