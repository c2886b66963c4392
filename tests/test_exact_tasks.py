"""Tasks' gradients summed over the blocks of a step, against one batch and a backward for each example."""

import dataclasses

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradnorm_ext import IMTLG, ClipExamples, InverseNorm, Meter, Reweighted, Stats

EXACT = 1e3 * torch.finfo(torch.float64).eps
K = 3


def parts_of(case, tasks):
    """Two micro-batches, and their tasks."""
    half = len(tasks) // 2
    rows = slice(0, half), slice(half, None)
    return [(dataclasses.replace(case, x=case.x[part], y=case.y[part]), tasks[part]) for part in rows]


def ids(count):
    return torch.tensor([(2 * i + 1) % K for i in range(count)])


def of_tasks(gradients, tasks):
    rows = torch.stack([torch.cat([g.flatten() for g in one.values()]) for one in gradients])
    return torch.zeros(K, rows.shape[1], dtype=rows.dtype).index_add_(0, tasks, rows)


def assert_stats(stats, gradients, tasks):
    expected = of_tasks(gradients, tasks)
    gram = expected @ expected.T
    assert float((stats.task_gram - gram).abs().max()) <= EXACT * float(gram.abs().max())
    assert oracle.relative(stats.task_norm, expected.norm(dim=1)) < EXACT
    assert (
        oracle.relative(stats.example_norm, oracle.group_norms(gradients, torch.arange(len(tasks)), len(tasks))) < EXACT
    )


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("name", oracle.MAKERS)
def test_blocks_of_a_step_are_measured_as_one_batch(name, backend):
    case = oracle.make(name).to(torch.float64)
    gradients, tasks = oracle.per_example_gradients(case), ids(len(case.x))
    meter = Meter(case.model, tasks=K, exact_tasks=True, backend=backend)
    for _ in range(2):
        case.model.zero_grad()
        for part, of_part in parts_of(case, tasks):
            with meter.observe(tasks=of_part):
                part.run().backward()
        assert_stats(meter.stats, gradients, tasks)
        for parameter, total in case.model.named_parameters():
            if total.requires_grad:
                torch.testing.assert_close(total.grad, sum(g[parameter] for g in gradients))
        meter.reset()


def assert_mixture(case, optimizer, gradients, tasks):
    for parameter, total in case.model.named_parameters():
        if total.requires_grad:
            expected = sum(w * g[parameter] for w, g in zip(optimizer.weights[tasks], gradients, strict=True))
            torch.testing.assert_close(total.grad, expected.to(total.grad))


@pytest.mark.parametrize("policy", [InverseNorm(), IMTLG()], ids=str)
@pytest.mark.parametrize("name", oracle.MAKERS)
def test_gradients_are_mixed_by_the_weights_of_the_whole_step(name, policy):
    case = oracle.make(name).to(torch.float64)
    gradients, tasks = oracle.per_example_gradients(case), ids(len(case.x))
    parameters = [p for p in case.model.parameters() if p.requires_grad]
    optimizer = Reweighted(torch.optim.SGD(parameters, 0.0), case.model, policy, tasks=K, exact_tasks=True)
    for _ in range(2):
        optimizer.zero_grad()
        for part, of_part in parts_of(case, tasks):
            with optimizer.observe(tasks=of_part):
                part.run().backward()
        assert_stats(optimizer.stats, gradients, tasks)
        assert_mixture(case, optimizer, gradients, tasks)
        optimizer.step()


def test_unbiased_figures_are_those_of_one_batch():
    case = oracle.make("mlp").to(torch.float64)
    tasks, prompts = torch.tensor([0, 1, 1, 0, 0, 1]), torch.tensor([3, 5, 5, 1, 1, 7])
    whole = Meter(case.model, tasks=2)
    with whole.observe(tasks=tasks, prompts=prompts):
        case.run().backward()
    parted = Meter(case.model, tasks=2, exact_tasks=True)
    for part in (slice(0, 3), slice(3, 6)):
        with parted.observe(tasks=tasks[part], prompts=prompts[part]):
            case.loss(case.model(case.x[part]), case.y[part]).backward()
    for figure in ("task_norm", "task_sqnorm_unbiased", "task_variance", "task_units", "task_count"):
        torch.testing.assert_close(getattr(parted.stats, figure), getattr(whole.stats, figure))


def adapted():
    """A weight that is derived of two parameters, and one that is used with gradients for all its views."""

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.low, self.high = (nn.Parameter(torch.randn(4, 4)) for _ in range(3))

        def forward(self, x):
            return F.linear(F.linear(x, self.base + torch.tanh(self.low) @ self.high), self.base[:2])

    torch.manual_seed(0)
    x, y = torch.randn(5, 4), torch.randn(5, 2)
    return oracle.Case(Adapted(), x, y, oracle.square_loss).to(torch.float64)


def test_derived_weights_have_totals_too():
    case = adapted()
    gradients, tasks = oracle.per_example_gradients(case), ids(5)
    meter = Meter(case.model, tasks=K, exact_tasks=True, on_unsupported="vmap")
    optimizer = Reweighted(torch.optim.SGD(case.model.parameters(), 0.0), meter, InverseNorm())
    for observed in (meter, optimizer):
        for _ in range(2):
            optimizer.zero_grad()
            for part, of_part in parts_of(case, tasks):
                with observed.observe(tasks=of_part):
                    part.run().backward()
            assert_stats(meter.stats, gradients, tasks)
            if observed is meter:
                for name, p in case.model.named_parameters():
                    torch.testing.assert_close(p.grad, sum(g[name] for g in gradients))
            else:
                assert_mixture(case, optimizer, gradients, tasks)


def small():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    optimizer = Reweighted(torch.optim.SGD(model.parameters(), 0.1), model, InverseNorm(), tasks=2, exact_tasks=True)
    x = torch.randn(4, 3, dtype=torch.float64)

    def block(rows, tasks, scale=1.0):
        with optimizer.observe(tasks=tasks, loss_scale=scale):
            (scale * model(x[rows])).square().sum().backward()

    return model, optimizer, block


def test_a_step_and_zero_grad_begin_anew():
    model, optimizer, block = small()
    block(slice(0, 2), [0, 1])
    first = optimizer.stats.task_norm
    for begin in (optimizer.zero_grad, lambda: (optimizer.step(), model.zero_grad())):
        block(slice(2, 4), [0, 1])
        assert optimizer.stats.task_count.tolist() == [2, 2]
        begin()
        with torch.no_grad():
            model.weight.copy_(small()[0].weight), model.bias.copy_(small()[0].bias)
        block(slice(0, 2), [0, 1])
        torch.testing.assert_close(optimizer.stats.task_norm, first)


def test_what_was_in_grad_before_stays():
    model, optimizer, block = small()
    block(slice(0, 2), [0, 1])
    alone = model.weight.grad.clone()
    optimizer.zero_grad()
    model.weight.grad = torch.ones_like(model.weight)
    block(slice(0, 2), [0, 1])
    torch.testing.assert_close(model.weight.grad, 1 + alone)
    block(slice(2, 4), [0, 1])
    both = model.weight.grad.clone()
    optimizer.zero_grad()
    block(slice(0, 2), [0, 1])
    block(slice(2, 4), [0, 1])
    torch.testing.assert_close(both, 1 + model.weight.grad)


def test_hooks_see_the_mixture():
    model, optimizer, block = small()
    seen = []
    model.weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    for _ in range(2):
        optimizer.zero_grad()
        block(slice(0, 2), [0, 1])
        torch.testing.assert_close(seen[-1], model.weight.grad)
        assert float(seen[-1].abs().max()) > 0


def test_a_block_that_fails_leaves_what_came_before_with_its_weights():
    model, optimizer, block = small()
    block(slice(0, 2), [0, 1])
    before = model.weight.grad.clone()
    with pytest.raises(RuntimeError, match="stop"), optimizer.observe(tasks=[0, 1]):
        raise RuntimeError("stop")
    torch.testing.assert_close(model.weight.grad, before)
    block(slice(2, 4), [0, 1])
    after = model.weight.grad.clone()
    optimizer.zero_grad()
    block(slice(2, 4), [0, 1])
    torch.testing.assert_close(after, before + model.weight.grad)


def test_gradients_that_changed_between_blocks_are_refused():
    model, optimizer, block = small()
    block(slice(0, 2), [0, 1])
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(
        RuntimeError, match=r"must not change between them, got another one of weight; begin a new step"
    ):
        block(slice(2, 4), [0, 1])
    optimizer.zero_grad()
    block(slice(2, 4), [0, 1])
    optimizer.step()


def test_loss_scales_are_divided_out_and_must_be_one():
    _, optimizer, block = small()
    block(slice(0, 2), [0, 1])
    block(slice(2, 4), [0, 1])
    plain = optimizer.stats.task_norm
    optimizer.zero_grad()
    block(slice(0, 2), [0, 1], 8.0)
    with pytest.raises(ValueError, match=r"one loss_scale, got 8.0 and 1.0"):
        block(slice(2, 4), [0, 1])
    block(slice(2, 4), [0, 1], 8.0)
    torch.testing.assert_close(optimizer.stats.task_norm, 8 * plain)  # (8 y)² is 64 y², divided by 8


@pytest.mark.parametrize(
    "options", [{"apply": "next_step"}, {"passes": 2}, {"scope": "layer"}, {"policy": ClipExamples(1.0)}], ids=str
)
def test_other_timings_and_policies_of_examples_are_refused(options):
    model = nn.Linear(3, 2)
    policy = options.pop("policy", InverseNorm())
    with pytest.raises(ValueError, match=r"exact_tasks=True mixes the tasks' gradients when a block closes"):
        Reweighted(torch.optim.SGD(model.parameters(), 0.1), model, policy, tasks=2, exact_tasks=True, **options)


def test_merging_with_sums_that_were_kept_gives_exact_figures():
    blocks = []
    model = nn.Linear(1, 1, bias=False)
    meter = Meter(model)
    for x in (torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [2.0], [2.0]])):
        with meter.observe():
            model(x).sum().backward()
        blocks.append(meter.stats)
    exact = Stats.merged(blocks, torch.tensor([[100.0]]))
    assert exact.task_norm.tolist() == [10.0]
    assert exact.task_sqnorm_unbiased.tolist() == pytest.approx([(100 - 22) / 20])
    assert exact.task_variance.tolist() == pytest.approx([(22 - 100 / 5) / 4])
