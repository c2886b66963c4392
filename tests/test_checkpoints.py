"""Activation checkpoints of every kind, and offloaded activations: measured once, in every timing."""

import contextlib
import functools

import pytest
import torch
from oracle import Case, Transformer, group_norms, per_example_gradients, relative, token_loss
from torch import nn
from torch.utils import checkpoint as of_torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from gradnorm_ext import ClipExamples, Meter, Reweighted

CLOSE = 1e3 * torch.finfo(torch.float64).eps
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def save_products(context, function, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if function in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


KINDS = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "without early stop": {"use_reentrant": False, "early_stop": False},
    "selective by policy": {
        "use_reentrant": False,
        "context_fn": functools.partial(create_selective_checkpoint_contexts, save_products),
    },
    "selective by list": {
        "use_reentrant": False,
        "context_fn": functools.partial(create_selective_checkpoint_contexts, list(PRODUCTS)),
    },
    "offloaded": None,
}
TIMINGS = {
    "measured": None,
    "same_step": {},
    "two passes": {"passes": 2},
    "by layer": {"scope": "layer"},
}


class Checkpointed(nn.Module):
    """A Transformer whose blocks are checkpointed, the second one run twice: its parameters have two uses."""

    def __init__(self, options):
        super().__init__()
        self.model, self.options, self.forwards = Transformer("tied"), options, 0

    def run(self, block, h):
        self.forwards += 1
        return block(h)

    def forward(self, ids):
        model = self.model
        h = model.tokens(ids) + model.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in (*model.blocks, model.blocks[1]):
            run = functools.partial(self.run, block)
            h = run(h) if self.options is None else checkpoint(run, h, **self.options)
        return model.head(model.norm(h))


def make(kind):
    torch.manual_seed(0)
    x, y = torch.randint(1, 13, (4, 6)), torch.randint(0, 13, (4, 6))
    return Case(Checkpointed(KINDS[kind]).double(), x, y, token_loss)


@functools.cache
def truth():
    case = make("offloaded")
    gradients = per_example_gradients(case)
    return gradients, group_norms(gradients, torch.arange(4), 4)


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_layers_are_measured_once(kind, timing):
    case, (gradients, norms) = make(kind), truth()
    bound = float(norms.median())
    if timing == "measured":
        observer = Meter(case.model)
    else:
        plain = torch.optim.SGD(case.model.parameters(), 0.1)
        observer = Reweighted(plain, case.model, ClipExamples(bound), **TIMINGS[timing])
    for _ in range(2):  # the first also verifies itself
        case.model.zero_grad()
        offload = torch.autograd.graph.save_on_cpu() if kind == "offloaded" else contextlib.nullcontext()
        with observer.observe(), offload:
            (observer.backward if timing == "two passes" else torch.Tensor.backward)(case.run())
        assert relative(observer.stats.example_norm, norms) <= CLOSE
        if timing == "by layer":
            continue
        weights = torch.ones(4) if timing == "measured" else (bound / norms).clamp(max=1)
        for name, parameter in case.model.named_parameters():
            expected = sum(w * of[name] for w, of in zip(weights, gradients, strict=True))
            assert float((parameter.grad - expected).abs().max()) <= CLOSE * float(norms.max()), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_measured_step_computes_again_what_a_plain_one_does(kind):
    case = make(kind)
    meter = Meter(case.model)
    forwards = []
    for observed in (True, True, False):  # the first verifies itself, and may compute more
        case.model.forwards = 0
        with meter.observe() if observed else contextlib.nullcontext():
            case.run().backward()
        forwards.append(case.model.forwards)
    assert forwards[1] == forwards[2] == (3 if kind == "offloaded" else 6)


def test_what_a_selective_checkpoint_saves_is_used_in_a_block_that_does_not_verify():
    """Saved products are not computed again: torch would refuse to give them out twice."""
    case, products = make("selective by list"), []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            products[-1] += function in PRODUCTS
            return function(*args, **(kwargs or {}))

    meter = Meter(case.model, backend="reference")
    for _ in range(3):
        products.append(0)
        with meter.observe(), Count():
            case.run().backward()
    assert products[2] == products[1] < products[0]


def test_a_new_kind_of_use_after_a_selective_checkpoint_is_verified_in_the_next_block():
    case = make("selective by list")
    model, meter = case.model, Meter(case.model)
    for _ in range(2):
        with meter.observe():
            h = checkpoint(model.model.blocks[0], model.model.tokens(case.x), **KINDS["selective by list"])
            h.square().sum().backward()
    assert not meter.memory.unverified
    with meter.observe():
        h = checkpoint(model.model.blocks[0], model.model.tokens(case.x), **KINDS["selective by list"])
        nn.functional.linear(h.flatten(0, 1), model.model.tokens.weight).square().sum().backward()
    assert meter.memory.unverified
    with meter.observe():
        h = checkpoint(model.model.blocks[0], model.model.tokens(case.x), **KINDS["selective by list"])
        nn.functional.linear(h.flatten(0, 1), model.model.tokens.weight).square().sum().backward()
    assert not meter.memory.unverified


def test_torch_has_its_checkpoints_back_after_a_block():
    before = of_torch.CheckpointFunction, of_torch._checkpoint_without_reentrant_generator
    first, second = (Meter(nn.Linear(2, 2)) for _ in range(2))
    with pytest.raises(ZeroDivisionError), first.observe(), second.observe():
        assert of_torch.CheckpointFunction is not before[0]
        raise ZeroDivisionError
    assert (of_torch.CheckpointFunction, of_torch._checkpoint_without_reentrant_generator) == before
