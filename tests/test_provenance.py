"""Rows that were selected, cut or moved: the graph says whose they are."""

import oracle
import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu

from gradnorm_ext import InverseNorm, Meter, Reweighted

EXACT = 1e3 * torch.finfo(torch.float64).eps
WIDTH, EXAMPLES = 6, 4
TASKS = torch.tensor([0, 1, 1, 0])

SELECTIONS = {
    "mask": lambda h, keep: h[keep],
    "mask of flat rows": lambda h, keep: h.reshape(-1, WIDTH)[keep.reshape(-1)],
    "ids in another order": lambda h, keep: h.view(-1, WIDTH)[keep.reshape(-1).nonzero()[:, 0].flip(0)],
    "ids of one dimension": lambda h, keep: h[:, torch.tensor([2, 0, 2])].reshape(-1, WIDTH),
    "index_select": lambda h, keep: h.flatten(0, 1).index_select(0, torch.tensor([5, 5, 0, 15])),
    "as many rows as examples": lambda h, keep: h.flatten(0, 1)[torch.tensor([0, 1, 2, 13])],
    "all but the last": lambda h, keep: h[:, :-1].reshape(-1, WIDTH),
    "the last ones": lambda h, keep: h[:, -2:, :].contiguous().view(-1, WIDTH),
    "position first": lambda h, keep: h.transpose(0, 1)[1:].reshape(-1, WIDTH),
    "permuted": lambda h, keep: h[None].permute(2, 0, 1, 3)[::2].reshape(-1, WIDTH),
    "some examples": lambda h, keep: h[1:3],
    "some examples, flat": lambda h, keep: h[2:].reshape(-1, WIDTH),
    "twice": lambda h, keep: h[keep][torch.tensor([0, 3, 3, 1])][1:],
    "one position": lambda h, keep: h[:, 2],
    "repeated": lambda h, keep: h[:, :1].expand(-1, 3, -1).reshape(-1, WIDTH),
}


class Selecting(nn.Module):
    def __init__(self, select):
        super().__init__()
        self.lift, self.norm, self.select = nn.Linear(3, WIDTH), nn.LayerNorm(WIDTH), select
        self.inner, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x, keep):
        h = self.select(self.norm(torch.tanh(self.lift(x))), keep)
        return self.head(torch.tanh(self.inner(h)))


def gradients_of(model, x, keep):
    """Each example's gradients, from the rows that are its own: ids go the way of the rows."""
    owners = torch.arange(EXAMPLES, dtype=x.dtype).view(-1, 1, 1).expand(*x.shape[:2], WIDTH).clone()
    owners = model.select(owners, keep)[..., 0]
    return oracle.gradients_of(model, [lambda b=b: model(x, keep)[owners == b].square().sum() for b in range(EXAMPLES)])


def batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(EXAMPLES, 5, 3, generator=generator, dtype=torch.float64)
    keep = torch.rand(EXAMPLES, 5, generator=generator) < 0.6
    keep[1] = False  # an example without a row
    return x, keep


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("length", (5, EXAMPLES))
def test_equals_autograd_one_example_at_a_time(name, length):
    torch.manual_seed(0)
    model, (x, keep) = Selecting(SELECTIONS[name]).double(), batch()
    x, keep = x[:, :length], keep[:, :length]
    gradients = gradients_of(model, x, keep)
    meter = Meter(model, tasks=2)
    optimizer = Reweighted(torch.optim.SGD(model.parameters(), 0.0), model, InverseNorm(), tasks=2)
    for observer in (meter, meter, optimizer):
        model.zero_grad()
        with observer.observe(tasks=TASKS):
            model(x, keep).square().sum().backward()
        stats = observer.stats
        norms = oracle.group_norms(gradients, torch.arange(EXAMPLES), EXAMPLES)
        assert oracle.relative(stats.example_norm, norms) < EXACT
        assert oracle.relative(stats.task_norm, oracle.group_norms(gradients, TASKS, 2)) < EXACT
    for key, parameter in model.named_parameters():
        weights = optimizer.weights[TASKS]
        expected = sum(w * g[key] for w, g in zip(weights, gradients, strict=True))
        torch.testing.assert_close(parameter.grad, expected)


def test_the_selection_may_change_from_block_to_block():
    torch.manual_seed(0)
    model, (x, keep) = Selecting(SELECTIONS["mask"]).double(), batch()
    meter = Meter(model)
    for counted in (7, EXAMPLES, 5 * EXAMPLES, 1, 2 * EXAMPLES):  # also as many rows as examples, or as all have
        order = torch.randperm(keep.numel())
        keep = torch.zeros(keep.numel(), dtype=torch.bool).index_fill_(0, order[:counted], True).view(keep.shape)
        gradients = gradients_of(model, x, keep)
        with meter.observe():
            model(x, keep).square().sum().backward()
        norms = oracle.group_norms(gradients, torch.arange(EXAMPLES), EXAMPLES)
        assert oracle.relative(meter.stats.example_norm, norms) < EXACT


def test_packed_rows_that_a_mask_selects():
    torch.manual_seed(0)
    model, lengths = Selecting(SELECTIONS["mask"]).double(), [3, 1, 4, 2]
    document = torch.repeat_interleave(torch.arange(EXAMPLES), torch.tensor(lengths))[torch.randperm(10)]
    x, keep = torch.randn(1, 10, 3, dtype=torch.float64), torch.rand(1, 10) < 0.7
    owners = document[keep[0]]
    gradients = oracle.gradients_of(
        model, [lambda b=b: model(x, keep)[owners == b].square().sum() for b in range(EXAMPLES)]
    )
    meter = Meter(model)
    with meter.observe(example_ids=document):
        model(x, keep).square().sum().backward()
    norms = oracle.group_norms(gradients, torch.arange(EXAMPLES), EXAMPLES)
    assert oracle.relative(meter.stats.example_norm, norms) < EXACT


def test_rows_that_mix_examples_are_refused():
    def mixed(h, keep):
        return (h + h.flip(0))[keep]

    model, (x, keep) = Selecting(mixed).double(), batch()
    with pytest.raises(RuntimeError, match=r"do not belong to one example each"), Meter(model).observe():
        model(x, keep).square().sum().backward()


def test_where_saved_tensors_are_hooked_nothing_is_looked_at():
    model, (x, keep) = Selecting(SELECTIONS["mask"]).double(), batch()
    message = r"the rows of inner.weight must belong .* offloading"
    with pytest.raises(ValueError, match=message), Meter(model).observe(), save_on_cpu():
        model(x, keep)
