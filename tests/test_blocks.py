"""Several forwards and backwards in one block, and models that change between blocks."""

import copy
import io
import pickle
import threading
from functools import partial

import oracle
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from gradnorm_ext import ClipExamples, Meter, Reweighted

EXACT = 1e3 * torch.finfo(torch.float64).eps
TASKS = torch.tensor([0, 1, 1, 0])


class PolicyAndValue(nn.Module):
    """A trunk with two heads, and a table looked up by both."""

    def __init__(self, tied=False):
        super().__init__()
        self.tokens, self.trunk = nn.Embedding(9, 6), nn.Linear(6, 6)
        self.policy, self.value, self.unused = nn.Linear(6, 9, bias=False), nn.Linear(6, 1), nn.Linear(6, 6)
        if tied:
            self.policy.weight = self.tokens.weight

    def forward(self, ids):
        h = torch.tanh(self.trunk(self.tokens(ids)))
        return self.policy(h), self.value(h)


def losses(model, ids):
    logits, values = model(ids)
    return logits.square().flatten(1).sum(1).sum(), values.square().flatten(1).sum(1).sum()


def one_forward_two_losses(model, ids, backward):
    first, second = losses(model, ids)
    backward(first + second)


def retained(model, ids, backward):
    first, second = losses(model, ids)
    backward(first, retain_graph=True)
    backward(second)


def chosen_and_rejected_together(model, ids, backward):
    backward(losses(model, ids)[0] - losses(model, ids.flip(1) // 2)[1])


def chosen_and_rejected_apart(model, ids, backward):
    backward(losses(model, ids)[0])
    backward(-losses(model, ids.flip(1) // 2)[1])


def policy_only(model, ids, backward):
    backward(losses(model, ids)[0])


WAYS = {
    one_forward_two_losses: 1,
    retained: 2,
    chosen_and_rejected_together: 1,
    chosen_and_rejected_apart: 2,
    policy_only: 1,
}


def gradients_of(model, way, ids):
    def run(b):
        way(model, ids[b : b + 1], lambda loss, **options: loss.backward(**options))

    return oracle.gradients_of(model, [partial(run, b) for b in range(len(ids))])


@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", ("reference", "native"))
def test_forwards_and_backwards_of_one_block_are_one_gradient(way, tied, backend):
    torch.manual_seed(0)
    model, ids = PolicyAndValue(tied).double(), torch.randint(0, 9, (4, 5))
    gradients = gradients_of(model, way, ids)
    meter = Meter(model, tasks=2, backend=backend)
    clipping = Reweighted(torch.optim.SGD(model.parameters()), model, ClipExamples(5.0), tasks=2, backend=backend)
    for _ in range(2):
        with meter.observe(tasks=TASKS, backwards=WAYS[way]):
            way(model, ids, lambda loss, **options: loss.backward(**options))
        oracle.same_norms(meter.stats, gradients, TASKS)
        model.zero_grad()
        with clipping.observe(tasks=TASKS, backwards=WAYS[way]):
            way(model, ids, lambda loss, **options: loss.backward(**options))
        oracle.same_norms(clipping.stats, gradients, TASKS)
        for name, parameter in model.named_parameters():
            expected = sum(w * g[name] for w, g in zip(clipping.weights, gradients, strict=True))
            found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(found, expected)
        model.zero_grad()


@pytest.mark.parametrize("way", WAYS)
def test_by_layer_forwards_and_backwards_are_one_gradient_too(way):
    torch.manual_seed(0)
    model, ids = PolicyAndValue(tied=True).double(), torch.randint(0, 9, (4, 5))
    gradients = gradients_of(model, way, ids)
    optimizer = Reweighted(torch.optim.SGD(model.parameters()), model, ClipExamples(1.0), tasks=2, scope="layer")
    for _ in range(2):
        model.zero_grad()
        with optimizer.observe(tasks=TASKS, backwards=WAYS[way]):
            way(model, ids, lambda loss, **options: loss.backward(**options))
        oracle.same_norms(optimizer.stats, gradients, TASKS)
        for name, weights in optimizer.layer_weights.items():
            norms = torch.stack([g[name].norm() for g in gradients])
            torch.testing.assert_close(weights, torch.where(norms > 1, 1 / norms, 1.0))
            expected = sum(w * g[name] for w, g in zip(weights, gradients, strict=True))
            torch.testing.assert_close(model.get_parameter(name).grad, expected)
        assert {name for name, g in gradients[0].items() if g.any()} <= optimizer.layer_weights.keys()


def test_more_backward_passes_than_were_said_are_refused():
    model, ids = PolicyAndValue().double(), torch.randint(0, 9, (4, 5))
    meter = Meter(model)
    with pytest.raises(RuntimeError, match=r"say how many .* with observe\(backwards=2\)"), meter.observe():
        retained(model, ids, lambda loss, **options: loss.backward(**options))
    with meter.observe(backwards=2):
        retained(model, ids, lambda loss, **options: loss.backward(**options))


def test_a_gradient_penalty_is_refused():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(4, 3, requires_grad=True)
    meter = Meter(model)
    with pytest.raises(RuntimeError, match="differentiate twice"), meter.observe(backwards=2):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)[0].square().sum().backward()


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def measured(meter, model, x):
    """Measures a block and compares it with autograd."""
    gradients = oracle.gradients_of(model, [lambda one=one: model(one).square().sum() for one in x.split(1)])
    with meter.observe(tasks=TASKS):
        model(x).square().sum().backward()
    oracle.same_norms(meter.stats, gradients, TASKS)
    assert list(meter.parameter_sqnorm) == [n for n, p in model.named_parameters() if p.requires_grad]


def test_a_model_may_change_between_blocks():
    model, x = mlp(), torch.randn(4, 3, dtype=torch.float64)
    meter = Meter(model, tasks=2)
    measured(meter, model, x)
    model[2].requires_grad_(False)
    measured(meter, model, x)
    model[2].weight.requires_grad_(True)
    measured(meter, model, x)
    model.append(nn.Tanh()).append(nn.Linear(2, 5, bias=False).double())
    measured(meter, model, x)
    model[0] = nn.Linear(3, 4).double()
    measured(meter, model, x)
    model[4].weight = nn.Parameter(model[4].weight.detach() * 2)
    measured(meter, model, x)
    model[4].weight = model[2].weight if model[4].weight.shape == model[2].weight.shape else model[4].weight
    measured(meter, model, x)
    model.float()
    with meter.observe(tasks=TASKS):
        model(x.float()).square().sum().backward()
    single = meter.stats.example_norm
    assert single.dtype == torch.float32
    model.double()
    measured(meter, model, x)
    assert oracle.relative(single, meter.stats.example_norm) < 1e3 * torch.finfo(torch.float32).eps


def test_a_parameter_that_gets_a_name_inside_the_block_is_not_missed():
    model, x = mlp(), torch.randn(4, 3, dtype=torch.float64)
    meter = Meter(model, tasks=2)
    with pytest.raises(RuntimeError, match=r"1.weight, 1.bias was added inside the block"), meter.observe(tasks=TASKS):
        model[1] = nn.Linear(4, 4).double()
        model(x).square().sum().backward()
    model.zero_grad()
    measured(meter, model, x)


def test_the_object_itself():
    model, x = mlp(), torch.randn(4, 3, dtype=torch.float64)
    meter = Meter(model, tasks=2)
    keys, names = list(model.state_dict()), [name for name, _ in model.named_modules()]
    seen = []
    model[2].register_forward_hook(lambda module, args, out: seen.append(type(module)))
    model[2].register_forward_pre_hook(lambda module, args: seen.append(isinstance(module, nn.Linear)))
    with meter.observe(tasks=TASKS):
        assert list(model.state_dict()) == keys and [name for name, _ in model.named_modules()] == names
        assert isinstance(model[0], nn.Linear) and model[0].__class__.__name__ == "Linear"
        handle = model[4].register_full_backward_hook(lambda module, gx, gy: seen.append("backward"))
        out = model(x)
        apart = torch.func.functional_call(model, {"0.bias": torch.zeros(4, dtype=torch.float64)}, (x,))
        assert not torch.equal(out, apart)
        out.square().sum().backward()
        handle.remove()
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(mlp()))):
            assert type(copied[0]) is nn.Linear
        buffer = io.BytesIO()
        copy_of = mlp()
        torch.save(copy_of, buffer)
    assert seen[0] is True and issubclass(seen[1], nn.Linear) and "backward" in seen
    model[2]._forward_hooks.clear()
    model[2]._forward_pre_hooks.clear()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    torch.testing.assert_close(loaded(x), model(x))
    assert all(type(module) in (nn.Sequential, nn.Linear, nn.Tanh) for module in loaded.modules())
    measured(meter, model, x)


def test_functional_call_alone_is_measured_for_the_parameters_that_stay():
    model, x = mlp(), torch.randn(4, 3, dtype=torch.float64)
    meter = Meter(model, tasks=2)
    other = {"4.weight": torch.randn(2, 4, dtype=torch.float64)}
    with meter.observe(tasks=TASKS):
        torch.func.functional_call(model, other, (x,)).square().sum().backward()
    with torch.no_grad():
        model[4].weight.copy_(other["4.weight"])
    model[4].weight.requires_grad_(False)
    sqnorms = {n: s for n, s in meter.parameter_sqnorm.items() if n != "4.weight"}
    measured(meter, model, x)
    torch.testing.assert_close(sqnorms, meter.parameter_sqnorm)


def test_pruning_made_permanent_is_an_ordinary_layer():
    model, x = mlp(), torch.randn(4, 3, dtype=torch.float64)
    prune.l1_unstructured(model[2], "weight", 0.5)
    prune.remove(model[2], "weight")
    measured(Meter(model, tasks=2), model, x)


def test_two_models_in_two_threads():
    x, failures = torch.randn(4, 3, dtype=torch.float64), []

    def work(seed):
        try:
            torch.manual_seed(seed)
            model = mlp()
            meter = Meter(model, tasks=2)
            for _ in range(20):
                measured(meter, model, x)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_module_shared_by_two_observed_models_is_refused_and_both_work_after():
    shared = nn.Linear(3, 3)
    one, other = nn.Sequential(shared, nn.Tanh()), nn.Sequential(shared, nn.Linear(3, 2))
    x, first, second = torch.randn(4, 3), Meter(one), Meter(other)
    with first.observe():
        with pytest.raises(RuntimeError, match="a model is observed by one block at a time, got 0"), second.observe():
            other(x).sum().backward()
        one(x).square().sum().backward()
    with second.observe():
        other(x).square().sum().backward()


def test_checkpointing_inside_and_outside_agree():
    model, x = mlp(), torch.randn(4, 3, dtype=torch.float64)
    meter = Meter(model, tasks=2)
    measured(meter, model, x)
    plain = meter.stats.example_norm
    for _ in range(2):
        with meter.observe(tasks=TASKS):
            h = checkpoint(model[1], model[0](x), use_reentrant=False)
            h = checkpoint(lambda h: model[4](model[3](model[2](h))), h, use_reentrant=False)
            h.square().sum().backward()
        torch.testing.assert_close(meter.stats.example_norm, plain)
