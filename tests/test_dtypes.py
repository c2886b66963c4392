"""Half, bfloat16, mixed and automatic precision: sums of squares neither overflow nor lose digits."""

from contextlib import nullcontext

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradnorm_ext import ClipExamples, Meter, Reweighted

BACKENDS = ("reference", "native")
EXAMPLES = torch.arange(4)


class Narrow(nn.Module):
    """Embedding, norms, linear layers, free parameters: one of each form; the head in float32 where ``mixed``."""

    def __init__(self, mixed=False):
        super().__init__()
        self.tokens, self.norm = nn.Embedding(13, 8), nn.LayerNorm(8)
        self.up, self.scale, self.down = nn.Linear(8, 16), nn.RMSNorm(16), nn.Linear(16, 8, bias=False)
        self.shift, self.head, self.mixed = nn.Parameter(torch.randn(8)), nn.Linear(8, 13), mixed

    def forward(self, ids):
        h = self.norm(self.tokens(ids)) + self.shift
        h = h + self.down(self.scale(torch.tanh(self.up(h))))
        return self.head(h.float() if self.mixed else h)

    def narrowed(self, dtype):
        self.to(dtype)
        if self.mixed:
            self.head.float()
        return self


def loss(logits, y):
    return F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="sum")


def errors(case, narrow, autocast, backend):
    """The largest error of the measured norms and of plain torch's, one example at a time, against float64."""
    wide = case.to(torch.float64)
    wide.model.load_state_dict({name: value.double() for name, value in narrow.model.state_dict().items()})
    wide.model.mixed = False
    truth = oracle.group_norms(oracle.per_example_gradients(wide), EXAMPLES, 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = oracle.group_norms(oracle.per_example_gradients(narrow), EXAMPLES, 4)
        narrow.model.zero_grad()
        meter = Meter(narrow.model, backend=backend)
        with meter.observe():
            narrow.run().backward()
    assert meter.stats.example_norm.dtype == torch.float32
    return oracle.relative(meter.stats.example_norm, truth), oracle.relative(plain, truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # of plain torch, where autocast meets RMSNorm
@pytest.mark.parametrize("kind", ("half", "bfloat16", "mixed", "autocast"))
def test_errs_at_most_twice_as_much_as_plain_torch(kind, backend):
    torch.manual_seed(0)
    model = Narrow(mixed=kind == "mixed")
    case = oracle._tokens(model)
    case.loss = loss
    dtype = {"half": torch.float16, "autocast": torch.float32}.get(kind, torch.bfloat16)
    narrow = oracle.Case(model.narrowed(dtype), case.x, case.y, loss)
    found, plain = errors(case, narrow, kind == "autocast", backend)
    assert found <= 2 * max(plain, float(torch.finfo(torch.bfloat16 if kind != "half" else dtype).eps) / 8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_squares_beyond_half_do_not_overflow(backend):
    layer = nn.Linear(64, 64).half()
    x, g = torch.full((2, 8, 64), 30.0).half(), torch.full((2, 8, 64), 300.0).half()  # 300 squared is beyond 65504
    meter = Meter(layer, backend=backend)
    with meter.observe():
        layer(x).backward(g)
    weight, bias = (8 * 30.0 * 300.0) * 64, 8 * 300.0 * 8
    torch.testing.assert_close(meter.stats.example_norm, torch.full((2,), (weight**2 + bias**2) ** 0.5))
    assert bool(meter.stats.finite)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_small_squares_are_not_lost_in_bfloat16(backend):
    layer = nn.Linear(1, 1, bias=False).bfloat16()
    x, g = torch.ones(2, 4096, 1).bfloat16(), torch.ones(2, 4096, 1).bfloat16()
    x[:, 0], table = 256.0, nn.Embedding(2, 512).bfloat16()
    meter = Meter(layer, backend=backend)
    with meter.observe():
        layer(x).backward(g)
    assert meter.stats.example_norm.tolist() == [4351.0, 4351.0]  # in bfloat16, 256 + 1 is 256
    of_table = Meter(table, backend=backend)
    with of_table.observe():
        table(torch.zeros(2, 1000, dtype=torch.long)).sum().backward()
    torch.testing.assert_close(of_table.stats.example_norm, torch.full((2,), 1000 * 512**0.5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_clipped_gradients_of_narrow_parameters_are_of_their_dtype(dtype, backend):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)
    x, g = torch.randn(4, 6).to(dtype), torch.randn(4, 2).to(dtype)
    optimizer = Reweighted(torch.optim.SGD(model.parameters()), model, ClipExamples(0.5), backend=backend)
    for _ in range(2):
        model.zero_grad()
        with optimizer.observe():
            model(x).backward(g)
    wide = [p.grad.double() for p in model.parameters()]
    assert all(p.grad.dtype == dtype for p in model.parameters())
    model.double()
    expected = [torch.zeros_like(p) for p in model.parameters()]
    for b in range(4):
        model.zero_grad()
        model(x[b : b + 1].double()).backward(g[b : b + 1].double() * optimizer.weights[b])
        for total, p in zip(expected, model.parameters(), strict=True):
            total += p.grad
    for found, right in zip(wide, expected, strict=True):
        assert float((found - right).norm() / right.norm()) < 16 * torch.finfo(dtype).eps  # a sum of four, rounded


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_total_of_five_million_parameters_agrees_with_float64(backend):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1500, 1700), nn.Tanh(), nn.Linear(1700, 1500))
    assert sum(p.numel() for p in model.parameters()) > 5e6
    x = torch.randn(2, 3, 1500)
    meter = Meter(model, backend=backend)
    with meter.observe():
        model(x).square().sum().backward()
    total = sum(p.grad.double().square().sum() for p in model.parameters())
    assert abs(float(meter.stats.task_norm[0].double() ** 2 / total) - 1) < 1e-6


class Cast(nn.Module):
    """A weight that is multiplied in a narrower dtype, several times: cast for each of them, or once for all."""

    def __init__(self, narrow, once):
        super().__init__()
        self.weight, self.inner, self.narrow, self.once = nn.Parameter(torch.randn(8)), nn.Linear(8, 8), narrow, once

    def forward(self, x):
        cast = self.weight.to(self.narrow)
        for _ in range(3):
            weight = cast if self.once else self.weight.to(self.narrow)
            x = torch.tanh(self.inner((x.to(self.narrow) * weight).type_as(x)))
        return x


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize(("wide", "narrow"), [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)], ids=str)
def test_a_weight_cast_and_used_several_times_is_measured_and_an_unseen_use_still_found(wide, narrow, once, penalty):
    torch.manual_seed(0)
    model, x = Cast(narrow, once).to(wide), torch.randn(5, 7, 8, dtype=wide)
    meter, parameter = Meter(model), model.weight
    message = "got a gradient that its seen uses account for only in part"
    with pytest.raises(RuntimeError, match=message) if penalty else nullcontext(), meter.observe():
        (model(x).square().sum() + penalty * parameter.square().sum()).backward()
    if not penalty:
        truth = oracle.per_example_gradients(oracle.Case(model, x, x, lambda out, _: out.square().sum()))
        found, expected = meter.stats.example_norm, oracle.group_norms(truth, torch.arange(5), 5)
        assert oracle.relative(found, expected) < 8 * torch.finfo(narrow).eps
