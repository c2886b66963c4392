"""Linears of torchao in float8, emulated on the CPU: measured through what they are given before it is rounded."""

import copy
import dataclasses

import oracle
import pytest
import torch
from torch import nn

from gradnorm_ext import ClipExamples, Meter, Reweighted

float8 = pytest.importorskip("torchao.float8")  # optional

EXAMPLES = torch.arange(4)
CONFIGS = {
    name: dataclasses.replace(float8.Float8LinearConfig.from_recipe_name(name), emulate=True)
    for name in ("tensorwise", "rowwise", "rowwise_with_gw_hp")
}


def make(config):
    """The Transformer of the tests, whose blocks' linears are in float8; and the same in float64."""
    torch.manual_seed(0)
    model = oracle.Transformer(width=16)
    x, y = torch.randint(1, 13, (4, 6)), torch.randint(0, 13, (4, 6))
    wide = oracle.Case(copy.deepcopy(model).double(), x, y, oracle.token_loss)
    float8.convert_to_float8_training(
        model, config=config, module_filter_fn=lambda module, name: name.startswith("blocks")
    )
    assert sum(isinstance(module, float8.float8_linear.Float8Linear) for module in model.modules()) == 8
    return oracle.Case(model, x, y, oracle.token_loss), oracle.per_example_gradients(wide)


def flat(gradients):
    return torch.cat([gradients[name].double().flatten() for name in sorted(gradients)])


@pytest.mark.parametrize("how", ({}, {"passes": 2}), ids=("one pass", "two passes"))
@pytest.mark.parametrize("config", CONFIGS)
def test_errs_at_most_twice_as_much_as_torchao(config, how):
    case, truth = make(CONFIGS[config])
    norms = oracle.group_norms(truth, EXAMPLES, 4)
    bound = float(norms.median())
    plain = oracle.per_example_gradients(case)
    plain_norms = oracle.group_norms(plain, EXAMPLES, 4)
    output = case.model(case.x).detach()
    optimizer = Reweighted(torch.optim.SGD(case.model.parameters()), case.model, ClipExamples(bound), **how)

    def mixed(gradients, norms):
        return sum((bound / n).clamp(max=1) * flat(of) for n, of in zip(norms, gradients, strict=True))

    for _ in range(2):  # the first also verifies itself
        optimizer.zero_grad()
        with optimizer.observe():
            logits = case.model(case.x)
            assert torch.equal(logits, output)
            optimizer.backward(case.loss(logits, case.y))
        assert oracle.relative(optimizer.stats.example_norm, norms) <= 2 * oracle.relative(plain_norms, norms)
        right = mixed(truth, norms)
        found = flat({name: p.grad for name, p in case.model.named_parameters()})
        assert float((found - right).norm()) <= 2 * float((mixed(plain, plain_norms) - right).norm())


def test_weights_that_are_gathered_in_float8_are_refused():
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    float8.convert_to_float8_training(
        model, config=float8.Float8LinearConfig(emulate=True, enable_fsdp_float8_all_gather=True)
    )
    refused = pytest.raises(
        RuntimeError, match=r"no rule for 0\.weight, which is trainable and a WeightWithDynamicFloat8"
    )
    with refused, Meter(model).observe():
        model(torch.randn(4, 16)).square().sum().backward()
