"""Where examples lie: packed rows, ids in any order, sequence-first models and layers, sizes that happen to be equal."""

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradnorm_ext import InverseNorm, Meter, Reweighted, check

EXACT = 1e3 * torch.finfo(torch.float64).eps
LENGTHS = [3, 1, 5, 2]
WIDTH = 6


class Packed(nn.Module):
    """A transformer over packed rows: attention stays inside a document, as a varlen kernel's would."""

    def __init__(self, tied=False):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(13, WIDTH), nn.Embedding(8, WIDTH)
        self.norm, self.qkv, self.scale = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.RMSNorm(WIDTH)
        self.gate, self.inner = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.randn(2, WIDTH // 2))
        self.head = nn.Linear(WIDTH, 13, bias=not tied)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids, position, document):
        h = self.tokens(ids) + self.positions(position)
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        inside = document.view(-1)[:, None] == document.view(-1)
        h = h + self.gate * F.scaled_dot_product_attention(q, k, v, attn_mask=inside)
        h = self.scale(h).unflatten(-1, (2, WIDTH // 2)) * self.inner
        return self.head(torch.tanh(h.flatten(-2)))


def packed_batch(order, leading):
    torch.manual_seed(1)
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    if order == "mixed":
        document = document[torch.randperm(len(document))]
    position = torch.zeros_like(document)
    for b in range(len(LENGTHS)):
        position[document == b] = torch.arange(LENGTHS[b])
    ids, y = torch.randint(0, 13, (2, len(document)))
    ids[::3] = ids[0]
    shape = [*leading, len(document)]
    return document, (ids.view(shape), position.view(shape), document.view(shape)), y


@pytest.mark.parametrize("backend", ("reference", "native"))
@pytest.mark.parametrize("order", ("one after the other", "mixed"))
@pytest.mark.parametrize("leading", ([], [1]))
@pytest.mark.parametrize("tied", (False, True))
def test_packed_rows(order, leading, tied, backend):
    torch.manual_seed(0)
    model = Packed(tied).double()
    document, inputs, y = packed_batch(order, leading)
    tasks = torch.tensor([0, 1, 1, 0])

    def loss_of(rows):
        rows = rows.nonzero()[:, 0]
        logits = model(*(t.view(-1)[rows].view(*leading, -1) for t in inputs))
        return F.cross_entropy(logits.flatten(0, -2), y[rows], reduction="sum")

    gradients = oracle.gradients_of(model, [lambda b=b: loss_of(document == b) for b in range(len(LENGTHS))])
    meter = Meter(model, tasks=2, backend=backend)
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    where = {"cu_seqlens": offsets} if order != "mixed" else {"example_ids": document.view(*leading, -1)}
    for _ in range(2):
        model.zero_grad()
        with meter.observe(tasks=tasks, **where):
            loss_of(document >= 0).backward()
        oracle.same_norms(meter.stats, gradients, tasks)
    optimizer = Reweighted(torch.optim.SGD(model.parameters(), 0.1), model, InverseNorm(), tasks=2, backend=backend)
    model.zero_grad()
    with optimizer.observe(tasks=tasks, **where):
        loss_of(document >= 0).backward()
    weights = optimizer.weights[tasks]
    for name, parameter in model.named_parameters():
        expected = sum(w * g[name] for w, g in zip(weights, gradients, strict=True))
        torch.testing.assert_close(parameter.grad, expected)


def test_a_pooled_head_has_one_row_an_example_beside_packed_rows():
    model = nn.ModuleDict({"body": nn.Linear(3, 4), "head": nn.Linear(4, 2)}).double()
    document = torch.tensor([0, 0, 1, 2, 2, 2])
    x = torch.randn(6, 3, dtype=torch.float64)

    def outputs(x, document, count):
        h = torch.tanh(model["body"](x))
        return model["head"](h.new_zeros(count, 4).index_add_(0, document, h))

    alone = [
        lambda b=b: (
            outputs(x[document == b], torch.zeros(int((document == b).sum()), dtype=torch.long), 1).square().sum()
        )
        for b in range(3)
    ]
    gradients = oracle.gradients_of(model, alone)
    meter = Meter(model)
    for _ in range(2):
        with meter.observe(cu_seqlens=[0, 2, 3, 6]):
            outputs(x, document, 3).square().sum().backward()
        oracle.same_norms(meter.stats, gradients, torch.zeros(3, dtype=torch.long))


class SequenceFirst(nn.Module):
    """``[T, B]`` throughout, with a position table, rows flattened in that order, and a free parameter per position."""

    def __init__(self, length):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(13, WIDTH), nn.Embedding(8, WIDTH)
        self.mix, self.flat = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.scale = nn.LayerNorm(WIDTH), nn.Parameter(torch.randn(length, 1, WIDTH))
        self.shift, self.head = nn.Parameter(torch.randn(length, 1, 1)), nn.Linear(WIDTH, 13)

    def forward(self, ids):
        h = self.tokens(ids) + self.positions(torch.arange(len(ids))[:, None])
        h = torch.tanh(self.mix(self.norm(h))) * self.scale + self.shift
        h = torch.tanh(self.flat(h.reshape(-1, WIDTH))).view_as(h)
        return self.head(h)


@pytest.mark.parametrize("length", (6, 4, 2))
def test_sequence_first_models(length):
    torch.manual_seed(0)
    model = SequenceFirst(length).double()
    ids, y = torch.randint(0, 13, (2, length, 4))

    def loss_of(examples):
        logits = model(ids[:, examples])
        return F.cross_entropy(logits.flatten(0, 1), y[:, examples].flatten(), reduction="sum")

    gradients = oracle.gradients_of(model, [lambda b=b: loss_of(slice(b, b + 1)) for b in range(4)])
    tasks = torch.tensor([0, 1, 1, 0])
    meter = Meter(model, tasks=2)
    for _ in range(2):
        with meter.observe(tasks=tasks, batch_dim=1):
            loss_of(slice(None)).backward()
        oracle.same_norms(meter.stats, gradients, tasks)


class SequenceFirstInside(nn.Module):
    """Batch-first, with sequence-first layers inside; the last of them works on flat rows, or is the last of all."""

    def __init__(self, last):
        super().__init__()
        self.lift, self.first, self.flat = nn.Linear(3, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.head, self.last = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2), last

    def forward(self, x):
        h = torch.tanh(self.first(torch.tanh(self.lift(x)).transpose(0, 1)))
        h = self.norm(torch.tanh(self.flat(h.reshape(-1, WIDTH))).view_as(h))
        if self.last == "flat":
            return self.head(h.reshape(-1, WIDTH)).view(*h.shape[:2], -1).transpose(0, 1)
        return self.head(h).transpose(0, 1) if self.last == "second" else self.head(h.transpose(0, 1))


@pytest.mark.parametrize("last", ("batch first", "second", "flat"))
@pytest.mark.parametrize("length", (6, 4, 2))
def test_sequence_first_layers_inside_batch_first_models(length, last):
    torch.manual_seed(0)
    case = oracle.Case(
        SequenceFirstInside(last), torch.randn(4, length, 3), torch.randn(4, 2 * length), oracle.square_loss
    ).to(torch.float64)
    gradients = oracle.per_example_gradients(case)
    tasks = torch.tensor([0, 1, 1, 0])
    meter = Meter(case.model, tasks=2)
    for _ in range(2):
        case.model.zero_grad()
        with meter.observe(tasks=tasks):
            case.run().backward()
        oracle.same_norms(meter.stats, gradients, tasks)


def test_a_bias_per_pair_of_positions_is_not_taken_for_a_batch_of_as_many():
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.lift, self.bias = nn.Linear(3, 2 * WIDTH), nn.Embedding(9, 2)

        def forward(self, x):
            q, k = self.lift(x).chunk(2, -1)
            position = torch.arange(x.shape[1])
            bias = self.bias(position[:, None] - position + 4)  # [T, T, heads]
            return torch.softmax((q @ k.transpose(1, 2))[..., None] + bias, 2).flatten(1)

    case = oracle.Case(Biased(), torch.randn(4, 4, 3), torch.randn(4, 32), oracle.square_loss).to(torch.float64)
    gradients = oracle.per_example_gradients(case)
    meter = Meter(case.model)
    with pytest.raises(RuntimeError, match=r"bias.weight .* do not belong to one example each"), meter.observe():
        case.run().backward()
    for _ in range(2):
        with meter.observe():
            case.run().backward()
        oracle.same_norms(meter.stats, gradients, torch.zeros(4, dtype=torch.long))


def test_positions_prove_nothing_where_there_are_as_many_as_examples():
    """Found by the fuzz: with nothing else upstream, a table of positions made a batch look sequence-first."""

    class OnlyPositions(nn.Module):
        def __init__(self):
            super().__init__()
            self.lift, self.norm, self.positions = nn.Linear(3, 1), nn.LayerNorm(1), nn.Embedding(2, 1)
            self.head = nn.Linear(1, 2)

        def forward(self, x):
            return self.head(self.norm(self.lift(x)) + self.positions(torch.arange(2))).flatten(1)

    torch.manual_seed(0)
    case = oracle.Case(OnlyPositions(), torch.randn(2, 2, 3), torch.zeros(2, 4), oracle.square_loss).to(torch.float64)
    meter = Meter(case.model)
    with pytest.raises(RuntimeError, match="a table that all examples share: run the batch again"), meter.observe():
        case.run().backward()
    with meter.observe():
        case.run().backward()
    norms = oracle.group_norms(oracle.per_example_gradients(case), torch.arange(2), 2)
    assert oracle.relative(meter.stats.example_norm, norms) < EXACT


def test_check_knows_the_layouts(capsys):
    torch.manual_seed(0)
    for order in ("one after the other", "mixed"):
        document, inputs, _ = packed_batch(order, [1])
        where = {"example_ids": document} if order == "mixed" else {"cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0)}
        found = check(Packed(), lambda logits: logits.square().sum(), *inputs, tasks=[0, 1, 1, 0], **where)
        assert not found.differing and len(found.relative_error) == 11
    found = check(SequenceFirst(6), lambda logits: logits.square().sum(), torch.randint(0, 13, (6, 4)), batch_dim=1)
    assert not found.differing and len(found.relative_error) == 12
    model = nn.LSTM(3, 4, batch_first=True)
    found = check(model, lambda out: out[0].square().sum(), torch.randn(5, 2, 3), on_unsupported="vmap")
    assert not found.differing and len(found.relative_error) == 4
    assert capsys.readouterr().out.count("agree with autograd") == 4


PACKED = [
    ({"cu_seqlens": [0, 3, 3, 6]}, "cu_seqlens must rise from 0, every example having a row, got [0, 3, 3, 6]"),
    ({"cu_seqlens": [1, 3]}, "cu_seqlens must rise from 0, every example having a row, got [1, 3]"),
    ({"cu_seqlens": [0]}, "cu_seqlens must rise from 0, every example having a row, got [0]"),
    ({"example_ids": [0, 0, 2]}, "example_ids must name each of the 3 examples at least once and no other, got [0, 2]"),
    ({"example_ids": [0, -1]}, "example_ids must name each of the 1 examples at least once and no other, got [-1, 0]"),
    ({"example_ids": [0, 1], "tasks": [0]}, "example_ids must name each of the 1 examples at least once"),
    ({"example_ids": []}, "example_ids must name each of the 0 examples"),
    ({"cu_seqlens": [0, 3], "tasks": [0, 0]}, "must have one entry per example, got tasks of 2, cu_seqlens of 1"),
    ({"cu_seqlens": [0, 3], "example_ids": [0]}, "by cu_seqlens or by example_ids, got both"),
    ({"batch_dim": 2}, "batch_dim must be 0 or 1, got 2"),
    ({"backwards": 0}, "backwards must be a whole number of at least 1, got 0"),
]


@pytest.mark.parametrize(("given", "message"), PACKED)
def test_what_is_said_of_the_rows_must_make_sense(given, message):
    import re

    meter = Meter(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=re.escape(message)), meter.observe(**given):
        pass


def test_rows_beyond_the_packed_ones_are_refused():
    meter = Meter(nn.Linear(3, 2))
    message = r"got rows of shape \[7\], neither 2 in front .* nor the 6 packed rows"
    with pytest.raises(ValueError, match=message), meter.observe(cu_seqlens=[0, 2, 6]):
        meter.model(torch.randn(7, 3))
