"""Uses that no rule knows, differentiated one example at a time (``on_unsupported="vmap"``)."""

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from gradnorm_ext import ClipExamples, InverseNorm, Meter, Reweighted

EXACT = 1e3 * torch.finfo(torch.float64).eps
WIDTH, EXAMPLES = 4, 4  # as many as there are features: sizes alone tell nothing


class Recurrent(nn.Module):
    def __init__(self, kind, from_zero=False, **options):
        super().__init__()
        self.from_zero = from_zero
        self.lift, self.cell = nn.Linear(3, WIDTH), getattr(nn, kind)(WIDTH, 5, **options)
        self.start = nn.Linear(3, 5).requires_grad_(not from_zero)
        self.head = nn.Linear(10 if options.get("bidirectional") else 5, 2)
        self.states = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)

    def forward(self, x):
        first = torch.tanh(self.start(x[:, 0])).expand(self.states, -1, -1)
        state = (first, first.cos()) if isinstance(self.cell, nn.LSTM) else first
        rows = torch.tanh(self.lift(x))
        if not self.cell.batch_first:
            rows = rows.transpose(0, 1)
        h, last = self.cell(rows) if self.from_zero else self.cell(rows, state)
        h = h if self.cell.batch_first else h.transpose(0, 1)
        last = last[1] if isinstance(last, tuple) else last
        return torch.cat([self.head(h).flatten(1), last.transpose(0, 1).flatten(1)], 1)


class Wrapped(nn.Module):
    """A linear layer that something is done to, between two ordinary ones; or the last of all."""

    def __init__(self, change, last=False, width=WIDTH):
        super().__init__()
        self.first, self.middle = nn.Linear(3, width), change(nn.Linear(width, width))
        self.last = None if last else nn.Linear(width, 2)

    def forward(self, x):
        h = self.middle(torch.tanh(self.first(x)))
        return h.flatten(1) if self.last is None else self.last(torch.tanh(h)).flatten(1)


class LowRank(nn.Linear):
    """LoRA merged into the weight, as a subclass of Linear."""

    def __init__(self):
        super().__init__(WIDTH, WIDTH)
        self.weight.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, WIDTH)), nn.Parameter(torch.randn(WIDTH, 2))

    def forward(self, x):
        return F.linear(x, self.weight + 0.5 * (self.b @ self.a), self.bias)


class Contractions(nn.Module):
    """einsum, products with the parameter on the left, divisions, temperatures, gathered experts, a mask token."""

    def __init__(self):
        super().__init__()
        self.lift, self.wide = nn.Linear(3, WIDTH), nn.Parameter(torch.randn(WIDTH, 2, WIDTH))
        self.left, self.temperature = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.tensor(0.3))
        self.scale, self.token = nn.Parameter(torch.rand(WIDTH) + 1), nn.Parameter(torch.randn(WIDTH))
        self.experts, self.gate = nn.Parameter(torch.randn(3, WIDTH, WIDTH)), nn.Linear(WIDTH, 3)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x):
        h = torch.tanh(self.lift(x))
        h = torch.where((x[..., :1] > 0.5), self.token, h)
        h = torch.einsum("btd,dhe->bthe", h, self.wide).sum(2)
        h = torch.tanh(self.left @ h) / self.scale
        weight = torch.softmax(self.gate(h) * self.temperature.exp(), -1)
        routed = torch.einsum("bte,btd,edf->btf", weight, h, self.experts)
        return self.head(torch.tanh(routed + h @ self.experts[1])).flatten(1)


class Tangled(nn.Module):
    """A parameter used as it is and derived, twice and transposed; a scalar likewise."""

    def __init__(self):
        super().__init__()
        self.lift, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)
        self.weight, self.gate = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        h, weight = torch.tanh(self.lift(x)), torch.tanh(self.weight)
        h = F.linear(h, weight) + F.linear(torch.tanh(h), weight.t()) + F.linear(h, self.weight)
        return self.head(torch.tanh(h * self.gate.exp() * self.gate)).flatten(1)


class Checkpointed(nn.Module):
    """A derived parameter and a function without a rule inside a checkpoint, whose tensors are gone when the block closes."""

    def __init__(self):
        super().__init__()
        self.lift, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)
        self.weight, self.other = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.randn(WIDTH, WIDTH))

    def inner(self, h):
        h = torch.tanh(F.linear(h, torch.tanh(self.weight)))
        return torch.tanh(torch.einsum("btd,de->bte", h, self.other))

    def forward(self, x):
        h = checkpoint(self.inner, torch.tanh(self.lift(x)), use_reentrant=False)
        return self.head(h).flatten(1)


def spectral(layer):
    return parametrizations.spectral_norm(layer, n_power_iterations=1).eval()  # in eval mode: no power iteration


def pruned(layer):
    prune.random_unstructured(layer, "weight", amount=0.4)
    return layer


def case_of(model, tokens=5):
    torch.manual_seed(2)
    x = torch.randn(EXAMPLES, tokens, 3, dtype=next(model.parameters()).dtype)
    with torch.no_grad():
        y = torch.randn_like(model(x))
    return oracle.Case(model, x, y, oracle.square_loss)


MAKERS = {
    "RNN": lambda: Recurrent("RNN", batch_first=True),
    "LSTM": lambda: Recurrent("LSTM", batch_first=True, num_layers=2),
    "LSTM, from zero": lambda: Recurrent("LSTM", from_zero=True, batch_first=True),
    "GRU, from zero, sequence first": lambda: Recurrent("GRU", from_zero=True),
    "LSTM, sequence first": lambda: Recurrent("LSTM"),
    "LSTM, projected": lambda: Recurrent("LSTM", batch_first=True, proj_size=0, bias=False),
    "GRU, both ways": lambda: Recurrent("GRU", batch_first=True, bidirectional=True),
    "weight norm": lambda: Wrapped(parametrizations.weight_norm),
    "weight norm, last": lambda: Wrapped(parametrizations.weight_norm, last=True),
    "spectral norm": lambda: Wrapped(spectral, width=5),
    "orthogonal": lambda: Wrapped(parametrizations.orthogonal),
    "pruned": lambda: Wrapped(pruned),
    "pruned, last": lambda: Wrapped(pruned, last=True),
    "low rank": lambda: Wrapped(lambda _: LowRank()),
    "contractions": Contractions,
    "tangled": Tangled,
    "checkpointed": Checkpointed,
}


@pytest.fixture(params=MAKERS)
def case(request):
    torch.manual_seed(0)
    return case_of(MAKERS[request.param]()).to(torch.float64)


@pytest.mark.parametrize("tokens", (5, EXAMPLES))
def test_equals_autograd_one_example_at_a_time(case, tokens):
    if tokens == EXAMPLES and isinstance(case.model, Contractions):
        pytest.skip("its parameter on the left is for 5 tokens")
    case = case_of(case.model, tokens).to(torch.float64)
    gradients = oracle.per_example_gradients(case)
    tasks = torch.tensor([0, 1, 1, 0])
    meter = Meter(case.model, tasks=2, gram=True, on_unsupported="vmap")
    for _ in range(2):
        case.model.zero_grad()
        with meter.observe(tasks=tasks):
            case.run().backward()
        flat = torch.stack([torch.cat([one.flatten() for one in g.values()]) for g in gradients])
        of_tasks = torch.zeros(2, flat.shape[1], dtype=flat.dtype).index_add_(0, tasks, flat)
        torch.testing.assert_close(meter.stats.task_gram, of_tasks @ of_tasks.T)
        norms = oracle.group_norms(gradients, torch.arange(EXAMPLES), EXAMPLES)
        assert oracle.relative(meter.stats.example_norm, norms) < EXACT
        assert oracle.relative(meter.stats.task_norm, oracle.group_norms(gradients, tasks, 2)) < EXACT
        for name, parameter in case.model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad, sum(g[name] for g in gradients))


@pytest.mark.parametrize("apply", ("same_step", "two passes", "next_step"))
@pytest.mark.parametrize("policy", (InverseNorm(), ClipExamples(0.5)))
def test_reweighted_gradients_are_those_of_the_loop(case, policy, apply):
    if apply == "next_step" and policy.weighs == "examples":
        pytest.skip("weights of the next step are of tasks")
    gradients = oracle.per_example_gradients(case)
    tasks = torch.tensor([0, 1, 1, 0])
    optimizer = torch.optim.SGD(case.model.parameters(), 0.0)
    timing = {"passes": 2} if apply == "two passes" else {"apply": apply}
    optimizer = Reweighted(optimizer, case.model, policy, tasks=2, on_unsupported="vmap", **timing)
    for _ in range(2):
        case.model.zero_grad()
        with optimizer.observe(tasks=tasks):
            optimizer.backward(case.run())
        weights = optimizer.weights if policy.weighs == "examples" else optimizer.weights[tasks]
        for name, parameter in case.model.named_parameters():
            if parameter.requires_grad:
                expected = sum(w * g[name] for w, g in zip(weights, gradients, strict=True))
                torch.testing.assert_close(parameter.grad, expected.to(parameter.grad))
        optimizer.step()


@pytest.mark.parametrize("name", MAKERS)
def test_without_the_option_the_use_is_refused_by_name(name):
    torch.manual_seed(0)
    case = case_of(MAKERS[name]())
    meter = Meter(case.model)
    with pytest.raises(RuntimeError, match=r'no rule for .* on_unsupported="vmap"'), meter.observe():
        case.run().backward()


def test_a_constant_with_as_many_rows_as_examples_is_no_batch():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(EXAMPLES, 3))

        def forward(self, x):
            return F.linear(x, self.weight * torch.tensor([[1.0], [0.0], [2.0], [1.0]]))

    case = case_of(nn.Sequential(Masked(), nn.Flatten()))
    for option in ("error", "vmap"):
        meter = Meter(case.model, on_unsupported=option)
        with (
            pytest.raises(RuntimeError, match=r"0.weight"),
            meter.observe(),
        ):
            case.run().backward()


def test_a_function_of_a_parameter_and_a_constant_of_that_size_is_refused_where_it_may_be_a_batch():
    torch.manual_seed(0)
    case = case_of(Wrapped(spectral, width=EXAMPLES))  # meets copies of buffers, which nothing tells from data
    meter = Meter(case.model, on_unsupported="vmap")
    with pytest.raises(RuntimeError, match=r"original .* do not belong to one example each"), meter.observe():
        case.run().backward()


def test_packed_sequences_are_refused():
    model = nn.LSTM(3, 4, batch_first=True)
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(2, 5, 3), [5, 3], batch_first=True)
    meter = Meter(model, tasks=2, on_unsupported="vmap")
    message = "LSTM of weight_ih_l0 must be given a tensor of three dimensions, got PackedSequence"
    with pytest.raises(RuntimeError, match=message), meter.observe(tasks=[0, 1]):
        model(packed)


def test_other_values_of_the_option_are_refused():
    with pytest.raises(ValueError, match=r"on_unsupported must be .* got 'ignore'"):
        Meter(nn.Linear(2, 2), on_unsupported="ignore")


class OnRows(nn.Module):
    """Functions without a rule that work on each row by itself, so that rows may lie anywhere."""

    def __init__(self):
        super().__init__()
        self.lift, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)
        self.wide, self.temperature = nn.Parameter(torch.randn(WIDTH, 2, WIDTH)), nn.Parameter(torch.tensor(0.3))
        self.normed = parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        h = torch.einsum("...d,dhe->...he", torch.tanh(self.lift(x)), self.wide).sum(-2)
        return self.head(torch.tanh(self.normed(torch.tanh(h) * self.temperature.exp())))


LAYOUTS = ["packed", "packed, one more dimension", "mixed", "sequence first, 5", f"sequence first, {EXAMPLES}"]


@pytest.mark.parametrize("timing", [{}, {"passes": 2}, {"gram": True}], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_every_layout(layout, timing):
    torch.manual_seed(0)
    model, lengths = OnRows().double(), [3, 1, 4, 4]
    if layout.startswith("sequence first"):
        owner = torch.arange(EXAMPLES).expand(int(layout[-1]), EXAMPLES)
        told = {"batch_dim": 1}
    else:
        owner = torch.repeat_interleave(torch.arange(EXAMPLES), torch.tensor(lengths))
        owner = owner[torch.randperm(len(owner))] if layout == "mixed" else owner
        told = {"example_ids": owner} if layout == "mixed" else {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)}
        owner = owner[None] if layout == "packed, one more dimension" else owner
    x = torch.randn(*owner.shape, 3, dtype=torch.float64)
    gradients = oracle.gradients_of(
        model, [lambda b=b: model(x[owner == b][None]).square().sum() for b in range(EXAMPLES)]
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    optimizer = Reweighted(optimizer, model, ClipExamples(1.0), tasks=2, on_unsupported="vmap", **timing)
    for _ in range(2):
        model.zero_grad()
        with optimizer.observe(tasks=[0, 1, 1, 0], **told):
            optimizer.backward(model(x).square().sum())
        norms = oracle.group_norms(gradients, torch.arange(EXAMPLES), EXAMPLES)
        assert oracle.relative(optimizer.stats.example_norm, norms) < EXACT
        norms = oracle.group_norms(gradients, torch.tensor([0, 1, 1, 0]), 2)
        assert oracle.relative(optimizer.stats.task_norm, norms) < EXACT
        for name, parameter in model.named_parameters():
            expected = sum(w * g[name] for w, g in zip(optimizer.weights, gradients, strict=True))
            torch.testing.assert_close(parameter.grad, expected)


def test_what_was_taken_for_a_constant_is_named():
    """Data that the model makes of its input, where a derived parameter meets it."""

    class Standardised(nn.Conv2d):
        def forward(self, x):
            weight = self.weight / self.weight.std((1, 2, 3), keepdim=True)
            return F.relu(F.conv2d(F.pad(x, (1, 1, 1, 1)), weight, self.bias))

    model, x = Standardised(3, 4, 3), torch.randn(5, 3, 8, 8)
    message = r"no rule for conv2d \(\[5, 3, 10, 10\] was taken for a constant, since no module was given it"
    with pytest.raises(RuntimeError, match=message), Meter(model, on_unsupported="vmap").observe():
        model(x).square().sum().backward()
