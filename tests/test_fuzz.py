"""Small models drawn at random, against autograd one example at a time: right, or refused with the reason.

`pytest tests/test_fuzz.py` draws 300 models, and 100 of other layouts; with GRADNORM_FUZZ=10000 in the environment, as many
as that of each.
"""

import os

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from gradnorm_ext import ClipExamples, Meter, Reweighted

EXACT = 1e3 * torch.finfo(torch.float64).eps
# What may be refused: as many positions as examples, which may leave it open whose the rows are.
REASONS = ("do not belong to one example each", "do not say in which order they are", "must belong to the batch's")


class Scaled(nn.Module):
    """A free parameter that meets the activations."""

    def __init__(self, shape, function):
        super().__init__()
        self.free, self.function = nn.Parameter(torch.randn(shape)), function

    def forward(self, x):
        return self.function(x, self.free)


class Repeated(nn.Module):
    """One module, several times, with a residual."""

    def __init__(self, inner, times):
        super().__init__()
        self.inner, self.times = inner, times

    def forward(self, x):
        for _ in range(self.times):
            x = x + torch.tanh(self.inner(x))
        return x


class Around(nn.Module):
    """A module between two rearrangements of its rows."""

    def __init__(self, inner, there, back):
        super().__init__()
        self.inner, self.there, self.back = inner, there, back

    def forward(self, x):
        return self.back(self.inner(self.there(x)), x)


class Positions(nn.Module):
    def __init__(self, length, width):
        super().__init__()
        self.table = nn.Embedding(length, width)

    def forward(self, x):
        return x + self.table(torch.arange(x.shape[1]))


LAYERS = {
    "linear": lambda t, d: nn.Linear(d, d),
    "linear without bias": lambda t, d: nn.Linear(d, d, bias=False),
    "layer norm": lambda t, d: nn.LayerNorm(d),
    "rms norm": lambda t, d: nn.RMSNorm(d),
    "tanh": lambda t, d: nn.Tanh(),
    "scale": lambda t, d: Scaled((d,), lambda x, w: x * w),
    "shift": lambda t, d: Scaled((t, d), lambda x, w: x + w),
    "gate": lambda t, d: Scaled((), lambda x, w: w * x),
    "column": lambda t, d: Scaled((1, t, 1), lambda x, w: x * w),
    "product": lambda t, d: Scaled((d, d), lambda x, w: x @ w),
    "positions": lambda t, d: Positions(t, d),
    "twice": lambda t, d: Repeated(nn.Linear(d, d), 2),
    "norm three times": lambda t, d: Repeated(nn.LayerNorm(d), 3),
    "across positions": lambda t, d: Around(nn.Linear(t, t), lambda x: x.mT, lambda y, _: y.mT),
    "sequence first": lambda t, d: Around(nn.Linear(d, d), lambda x: x.transpose(0, 1), lambda y, _: y.transpose(0, 1)),
    "flat": lambda t, d: Around(nn.Linear(d, d), lambda x: x.flatten(0, 1), lambda y, x: y.view_as(x)),
    "convolution": lambda t, d: Around(nn.Conv1d(d, d, 3, padding="same"), lambda x: x.mT, lambda y, _: y.mT),
    "depthwise": lambda t, d: Around(nn.Conv1d(d, d, 2, padding="same", groups=d), lambda x: x.mT, lambda y, _: y.mT),
    "convolution twice": lambda t, d: Repeated(nn.Conv1d(t, t, 3, padding=1, bias=False), 2),
    "frozen": lambda t, d: nn.Linear(d, d).requires_grad_(False),
    "frozen bias": lambda t, d: _freeze(nn.Linear(d, d), "bias"),
}


def _freeze(layer, name):
    getattr(layer, name).requires_grad_(False)
    return layer


class Drawn(nn.Module):
    def __init__(self, names, vocabulary, length, width, pooled):
        super().__init__()
        self.lift = nn.Embedding(vocabulary, width) if vocabulary else nn.Linear(3, width)
        self.layers = nn.ModuleList(LAYERS[name](length, width) for name in names)
        self.head, self.pooled = nn.Linear(width, 2), pooled

    def forward(self, x):
        x = self.lift(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1) if self.pooled else x).flatten(1)


@st.composite
def cases(draw):
    names = draw(st.lists(st.sampled_from(sorted(LAYERS)), max_size=5))
    examples, length, width = (draw(st.integers(1, 5)) for _ in range(3))
    vocabulary = draw(st.sampled_from([0, 7]))
    torch.manual_seed(draw(st.integers(0, 999)))
    model = Drawn(names, vocabulary, length, width, draw(st.booleans()))
    x = torch.randint(0, 7, (examples, length)) if vocabulary else torch.randn(examples, length, 3)
    y = torch.zeros(examples, 2 if model.pooled else 2 * length)
    return oracle.Case(model, x, y, oracle.square_loss).to(torch.float64)


@settings(
    max_examples=int(os.environ.get("GRADNORM_FUZZ", "300")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(cases(), st.sampled_from(["reference", "native"]), st.sampled_from(["one pass", "two passes"]), st.data())
def test_drawn_models_are_measured_right_or_refused_with_a_reason(case, backend, timing, data):
    examples = len(case.x)
    tasks = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=examples, max_size=examples)))
    gradients = oracle.per_example_gradients(case)
    meter = Meter(case.model, tasks=2, backend=backend)
    truth = oracle.group_norms(gradients, torch.arange(examples), examples)
    of_tasks = oracle.group_norms(gradients, tasks, 2)
    scale = truth.max() + torch.finfo(torch.float64).tiny
    for attempt in range(3):
        case.model.zero_grad()
        try:
            with meter.observe(tasks=tasks):
                case.run().backward()
        except (RuntimeError, ValueError) as error:
            assert any(reason in str(error) for reason in REASONS) and examples == case.x.shape[1], error
            if attempt == 2 or "run the batch again" not in str(error):
                return
            continue
        assert float((meter.stats.example_norm - truth).abs().max()) <= EXACT * scale
        assert float((meter.stats.task_norm - of_tasks).abs().max()) <= EXACT * scale * examples
    case.model.zero_grad()
    optimizer = torch.optim.SGD(case.model.parameters(), 0.1)
    passes = 1 if timing == "one pass" else 2
    optimizer = Reweighted(optimizer, meter, ClipExamples(float(truth.median()) + 1e-3), passes=passes)
    with optimizer.observe(tasks=tasks):
        optimizer.backward(case.run())
    for name, parameter in case.model.named_parameters():
        if parameter.requires_grad:
            expected = sum(w * g[name] for w, g in zip(optimizer.weights, gradients, strict=True))
            found = torch.zeros_like(expected) if parameter.grad is None else parameter.grad
            assert float((found - expected).norm()) <= EXACT * scale * examples, name


POINTWISE = [
    *("linear", "linear without bias", "layer norm", "rms norm", "tanh", "scale", "gate", "product"),
    *("twice", "norm three times", "frozen", "frozen bias"),
]
TIMINGS = [{}, {"passes": 2}, {"scope": "layer"}, {"gradient_budget": 0}]


class Rows(nn.Module):
    """Layers that work on each row by itself, so that rows may lie anywhere."""

    def __init__(self, names, width):
        super().__init__()
        self.lift = nn.Embedding(7, width)
        self.layers = nn.ModuleList(LAYERS[name](1, width) for name in names)
        self.head = nn.Linear(width, 2)

    def forward(self, ids):
        h = self.lift(ids)
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


@st.composite
def laid_out(draw):
    """A model, its ids, what `observe` is told, and which rows are whose."""
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    torch.manual_seed(draw(st.integers(0, 999)))
    model = Rows(draw(st.lists(st.sampled_from(POINTWISE), max_size=4)), draw(st.integers(1, 4))).double()
    layout = draw(st.sampled_from(["sequence first", "packed", "packed, one more dimension", "mixed"]))
    if layout == "sequence first":
        length, examples = lengths[0], len(lengths)
        owner = torch.arange(examples).expand(length, examples)
        return model, torch.randint(0, 7, (length, examples)), {"batch_dim": 1}, owner
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    told = {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)}
    if layout == "mixed":
        owner = owner[torch.randperm(len(owner))]
        told = {"example_ids": owner}
    if layout == "packed, one more dimension":
        owner = owner[None]
    return model, torch.randint(0, 7, owner.shape), told, owner


@settings(
    max_examples=int(os.environ.get("GRADNORM_FUZZ", "100")), deadline=None, suppress_health_check=list(HealthCheck)
)
@given(laid_out(), st.sampled_from(["reference", "native"]), st.sampled_from(TIMINGS), st.data())
def test_drawn_layouts_and_timings_are_right(drawn, backend, timing, data):
    model, ids, told, owner = drawn
    examples = int(owner.max()) + 1
    tasks = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=examples, max_size=examples)))
    losses = [lambda b=b: model(ids[owner == b][None]).square().sum() for b in range(examples)]
    gradients = oracle.gradients_of(model, losses)
    of_tasks, truth = (
        oracle.group_norms(gradients, tasks, 2),
        oracle.group_norms(gradients, torch.arange(examples), examples),
    )
    scale = truth.max() + torch.finfo(torch.float64).tiny
    policy = by_layer if timing.get("scope") == "layer" else ClipExamples(float(truth.median()) + 1e-3)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    optimizer = Reweighted(optimizer, model, policy, tasks=2, backend=backend, **timing)
    for _ in range(2):
        model.zero_grad()
        with optimizer.observe(tasks=tasks, **told):
            optimizer.backward(model(ids).square().sum())
        assert float((optimizer.stats.example_norm - truth).abs().max()) <= EXACT * scale
        assert float((optimizer.stats.task_norm - of_tasks).abs().max()) <= EXACT * scale * examples
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                weights = optimizer.layer_weights[name] if timing.get("scope") == "layer" else optimizer.weights
                expected = sum(w * g[name] for w, g in zip(weights, gradients, strict=True))
                assert float((parameter.grad - expected).norm()) <= EXACT * scale * examples, name


def by_layer(stats):
    return 1 / (1 + stats.example_norm)


by_layer.weighs = "examples"


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_every_layer_of_the_draw_is_measured_on_sizes_that_are_plain(name):
    torch.manual_seed(0)
    case = oracle._floats(Drawn([name, "linear"], 0, 3, 4, True), 5, 3, 3, outputs=2).to(torch.float64)
    gradients = oracle.per_example_gradients(case)
    meter = Meter(case.model)
    with meter.observe():
        case.run().backward()
    assert oracle.relative(meter.stats.example_norm, oracle.group_norms(gradients, torch.arange(5), 5)) < EXACT
