"""The tasks' Gram matrix, and a subset of the modules as a proxy, against a backward for each example."""

import oracle
import pytest
import torch
from torch import nn

from gradnorm_ext import IMTLG, ClipExamples, InverseNorm, Meter, Reweighted

EXACT = 1e3 * torch.finfo(torch.float64).eps
K = 3


def ids(case):
    return torch.tensor([(2 * i + 1) % K for i in range(len(case.x))])


def of_tasks(gradients, tasks, names=None):
    """``[K, n]``: every task's gradient of the named parameters, laid out in a row."""
    names = list(gradients[0]) if names is None else names
    rows = [torch.cat([g[name].flatten() for name in names]) for g in gradients]
    return torch.zeros(K, len(rows[0]), dtype=rows[0].dtype).index_add_(0, tasks, torch.stack(rows))


def assert_gram(found, gradients):
    expected = gradients @ gradients.T
    assert float((found - expected).abs().max()) <= EXACT * float(expected.abs().max())


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("name", oracle.MAKERS)
def test_gram_is_that_of_separate_backwards(name, backend):
    case = oracle.make(name).to(torch.float64)
    gradients, tasks = oracle.per_example_gradients(case), ids(case)
    meter = Meter(case.model, tasks=K, gram=True, per_layer=True, backend=backend)
    for _ in range(2):
        case.model.zero_grad()
        with meter.observe(tasks=tasks):
            case.run().backward()
        assert_gram(meter.stats.task_gram, of_tasks(gradients, tasks))
        torch.testing.assert_close(meter.stats.task_gram.diagonal().sqrt(), meter.stats.task_norm)
        norms = oracle.group_norms(gradients, torch.arange(len(case.x)), len(case.x))
        assert oracle.relative(meter.stats.example_norm, norms) < EXACT
        for parameter, total in case.model.named_parameters():
            if total.requires_grad:
                torch.testing.assert_close(total.grad, sum(g[parameter] for g in gradients))
    layers = sum(layer.task_gram for layer in meter.stats.layers.values())
    torch.testing.assert_close(layers, meter.stats.task_gram)


TIMINGS = [{}, {"gradient_budget": 0}, {"passes": 2}, {"apply": "next_step"}]


@pytest.mark.parametrize("timing", TIMINGS, ids=str)
@pytest.mark.parametrize("name", ["mlp", "transformer", "transformer, tied head", "free parameters", "gpt2"])
def test_a_policy_of_the_gram_matrix_weighs_by_it(name, timing):
    case = oracle.make(name).to(torch.float64)
    gradients, tasks = oracle.per_example_gradients(case), ids(case)
    optimizer = torch.optim.SGD(case.model.parameters(), 0.0)
    optimizer = Reweighted(optimizer, case.model, IMTLG(), tasks=K, gram=True, **timing)
    for _ in range(2):
        optimizer.zero_grad()
        with optimizer.observe(tasks=tasks):
            optimizer.backward(case.run())
        assert_gram(optimizer.stats.task_gram, of_tasks(gradients, tasks))
        if timing.get("apply") != "next_step":
            torch.testing.assert_close(optimizer.weights, IMTLG()(optimizer.stats))
        for parameter, total in case.model.named_parameters():
            expected = sum(w * g[parameter] for w, g in zip(optimizer.weights[tasks], gradients, strict=True))
            torch.testing.assert_close(total.grad, expected.to(total.grad))
        optimizer.step()


def test_a_single_task_with_weights_per_example_has_a_gram_matrix_too():
    case = oracle.make("mlp").to(torch.float64)
    optimizer = torch.optim.SGD(case.model.parameters(), 0.0)
    optimizer = Reweighted(optimizer, case.model, ClipExamples(1.0), gram=True)
    with optimizer.observe():
        case.run().backward()
    total = sum(torch.cat([g.flatten() for g in one.values()]) for one in oracle.per_example_gradients(case))
    torch.testing.assert_close(optimizer.stats.task_gram, total.square().sum().view(1, 1))


PROXIES = [
    ("blocks.1.*", "blocks.1."),
    ("head", "head."),
    (["norm.weight", "blocks.0.up"], ("norm.weight", "blocks.0.up.")),
]


@pytest.mark.parametrize(("modules", "prefix"), PROXIES, ids=str)
@pytest.mark.parametrize("options", [*TIMINGS, None], ids=str)
def test_a_subset_of_the_modules_is_measured_and_all_are_weighed(modules, prefix, options):
    case = oracle.make("transformer").to(torch.float64)
    gradients, tasks = oracle.per_example_gradients(case), ids(case)
    names = [name for name in gradients[0] if name.startswith(prefix)]
    subset = [{name: g[name] for name in names} for g in gradients]
    norms = oracle.group_norms(subset, tasks, K)
    meter = Meter(case.model, tasks=K, gram=True, modules=modules)
    optimizer = torch.optim.SGD(case.model.parameters(), 0.0)
    optimizer = None if options is None else Reweighted(optimizer, meter, InverseNorm(), **options)
    for _ in range(2):
        case.model.zero_grad()
        with (optimizer or meter).observe(tasks=tasks):
            loss = case.run()
            loss.backward() if optimizer is None else optimizer.backward(loss)
        assert oracle.relative(meter.stats.task_norm, norms) < EXACT
        assert_gram(meter.stats.task_gram, of_tasks(gradients, tasks, names))
        weights = torch.ones(len(tasks)) if optimizer is None else optimizer.weights[tasks]
        for parameter, total in case.model.named_parameters():
            expected = sum(w * g[parameter] for w, g in zip(weights, gradients, strict=True))
            torch.testing.assert_close(total.grad, expected.to(total.grad))
    if optimizer is None:
        assert sorted(meter.parameter_sqnorm) == sorted(names)


def test_modules_that_name_nothing_are_refused():
    with pytest.raises(
        ValueError, match=r"modules must name a trainable parameter, got heads, .* none of 0.weight, 0.bias"
    ):
        Meter(nn.Sequential(nn.Linear(2, 2)), modules="heads")


def test_a_proxy_has_no_norms_for_each_layer():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match='scope="layer" weighs each parameter by its own norms, got modules='):
        Reweighted(torch.optim.SGD(model.parameters()), model, ClipExamples(1.0), scope="layer", modules="1")
