"""Every layer of `oracle.LAYERS` where something is unusual: half of it frozen, one example, autocast, bfloat16."""

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from gradnorm_ext import Meter

EXACT = 1e3 * torch.finfo(torch.float64).eps


def agrees(case, blocks=2, **options):
    meter = Meter(case.model, **options)
    for _ in range(blocks):
        with meter.observe():
            case.run().backward()
        count = len(case.x)
        expected = oracle.group_norms(oracle.per_example_gradients(case), torch.arange(count), count)
        assert oracle.relative(meter.stats.example_norm, expected) < EXACT


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("name", oracle.LAYERS)
def test_what_is_frozen_is_not_measured(name, frozen):
    case = oracle.make(name).to(torch.float64)
    for parameter, tensor in case.model.named_parameters():
        tensor.requires_grad_(frozen not in parameter.rpartition(".")[2])
    if not any(p.requires_grad for p in case.model.parameters()):
        pytest.skip(f"nothing but {frozen} parameters")
    agrees(case)


@pytest.mark.parametrize("name", oracle.LAYERS)
def test_one_example_is_a_batch(name):
    case = oracle.make(name).to(torch.float64)
    agrees(oracle.Case(case.model, case.x[:1], case.y[:1], case.loss))


# torch 2.13's autocast does not know bilinear functions on CPUs: there is nothing to compare with
@pytest.mark.parametrize("name", [name for name in oracle.LAYERS if "bilinear" not in name])
def test_autocast_is_close_and_keeps_the_parameters_dtype(name):
    case = oracle.make(name)
    examples = torch.arange(len(case.x))
    expected = oracle.group_norms(oracle.per_example_gradients(case), examples, len(examples))
    with torch.autocast("cpu", torch.bfloat16):
        plain = oracle.group_norms(oracle.per_example_gradients(case), examples, len(examples))
        case.model.zero_grad()
        meter = Meter(case.model)
        with meter.observe():
            case.run().backward()
    floor = torch.finfo(torch.bfloat16).eps
    assert oracle.relative(meter.stats.example_norm, expected) <= 2 * max(oracle.relative(plain, expected), floor)
    assert all(p.grad.dtype == torch.float32 for p in case.model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["free parameters", *oracle.LAYERS])
def test_bfloat16_errs_at_most_twice_as_much_as_plain_torch(name):
    case = oracle.make(name).to(torch.bfloat16)
    examples = torch.arange(len(case.x))
    exact = oracle.per_example_gradients(case.to(torch.float64))
    truth = oracle.group_norms(exact, examples, len(examples))
    plain = oracle.group_norms(oracle.per_example_gradients(case), examples, len(examples))
    meter = Meter(case.model)
    with meter.observe():
        case.run().backward()
    floor = torch.finfo(torch.bfloat16).eps
    assert oracle.relative(meter.stats.example_norm, truth) <= 2 * max(oracle.relative(plain, truth), floor)


def test_slices_that_share_no_entry_are_measured_apart(monkeypatch):
    from gradnorm_ext.gradients import several

    def slow(uses):
        raise AssertionError("formed column by column")

    monkeypatch.setattr(several, "_dense_sqnorm", slow)
    agrees(oracle.make("attention to another sequence").to(torch.float64))


class Slices(nn.Module):
    """Pieces of one matrix: apart, overlapping, twice the same, interleaved columns, and a cast of the whole."""

    def __init__(self, pieces):
        super().__init__()
        self.w, self.pieces = nn.Parameter(torch.randn(6, 4)), pieces

    def forward(self, x):
        return sum(
            torch.tanh(F.linear(x, piece) if piece.shape[1] == 4 else x[:, :2] @ piece.t()).sum(1)
            for piece in self.pieces(self.w)
        )[:, None]


@pytest.mark.parametrize(
    "pieces",
    [
        lambda w: w.chunk(3),
        lambda w: (*w.split([2, 4]), w[:2]),
        lambda w: (w[:3], w[2:5], w[5:]),
        lambda w: (w[::2], w[1::2]),
        lambda w: w.chunk(2, 1),
        lambda w: (w[:2], w.t()[:, 2:].t(), w),
        lambda w: [*w.unflatten(0, (2, 3))],
        lambda w: (w[:2], (1 + w)[2:]),
        lambda w: (-w[:4], w),
    ],
)
def test_pieces_of_one_parameter(pieces):
    torch.manual_seed(0)
    agrees(oracle.Case(Slices(pieces), torch.randn(3, 4), torch.randn(3, 1), oracle.square_loss).to(torch.float64))


class TiedToSlices(nn.Module):
    """A head tied to embeddings that look up a part of its matrix, or a view of it with other entries in front."""

    def __init__(self, *tables):
        super().__init__()
        self.tokens, self.inner, self.tables = nn.Parameter(torch.randn(13, 4)), nn.Linear(4, 4), tables

    def forward(self, x):
        looked_up = sum(F.embedding(x % len(table), table) for table in (cut(self.tokens) for cut in self.tables))
        return F.linear(torch.tanh(self.inner(looked_up)), self.tokens)


@pytest.mark.parametrize(
    "tables",
    [
        (lambda w: w[3:],),
        (lambda w: w[:9], lambda w: w),
        (lambda w: w[::2], lambda w: w[1::2]),
        (lambda w: w.reshape(-1)[8:48].view(10, 4),),
        (lambda w: w.float().double(),),
    ],
)
def test_a_head_tied_to_lookups_in_a_part_of_it(tables):
    torch.manual_seed(0)
    case = oracle.Case(
        TiedToSlices(*tables), torch.randint(0, 13, (4, 6)), torch.randint(0, 13, (4, 6)), oracle.token_loss
    )
    agrees(case.to(torch.float64))


@pytest.mark.parametrize("examples", [1, 3, 4, 5])
def test_pruned_layers_are_refused_or_derived(examples):
    """A mask is no activation, though one of its sizes be that of the batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    for layer in (model[0], model[2], model[4]):
        prune.random_unstructured(layer, "weight", amount=0.4)
        prune.random_unstructured(layer, "bias", amount=1)
    x = torch.randn(examples, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"no rule for linear.* of 0.(weight|bias)_orig"), Meter(model).observe():
        model(x).square().sum().backward()
    expected = []
    for one in x.split(1):
        model.zero_grad()
        model(one).square().sum().backward()
        expected.append(torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt())
    meter = Meter(model, on_unsupported="vmap")
    with meter.observe():
        model(x).square().sum().backward()
    torch.testing.assert_close(meter.stats.example_norm, torch.stack(expected))


@pytest.mark.parametrize(
    "layer",
    [
        lambda: parametrizations.weight_norm(nn.Conv1d(3, 4, 2)),
        lambda: parametrizations.weight_norm(nn.ConvTranspose1d(3, 4, 2), dim=1),
        lambda: parametrizations.spectral_norm(nn.Conv1d(3, 40, 2)).eval(),
        lambda: parametrizations.orthogonal(nn.Conv1d(3, 4, 2)),
        lambda: parametrizations.weight_norm(nn.GroupNorm(3, 3), dim=None),
    ],
)
def test_parametrized_layers_are_measured_where_derived_parameters_are(layer):
    torch.manual_seed(0)
    model = oracle.Convolutions(nn.Conv1d(3, 3, 1), layer())
    outputs = model(torch.randn(1, 3, 5)).shape[1]
    case = oracle.Case(model, torch.randn(3, 3, 5), torch.randn(3, outputs), oracle.square_loss)
    agrees(case.to(torch.float64), on_unsupported="vmap")
