"""Views of parameters whose entries share memory: their gradients add up before they are the parameter's."""

import pytest
import right_or_refused
import torch
import torch.nn.functional as F
from torch import nn

VIEWS = {
    "expand": ((3,), lambda c: c.expand(5, 3)),
    "expand of a view": ((1, 3), lambda c: c.t().expand(3, 5).t()),
    "broadcast_to": ((3,), lambda c: torch.broadcast_to(c, (5, 3))),
    "expand_as": ((3,), lambda c: c.expand_as(torch.empty(5, 3))),
    "unfold": ((7,), lambda c: c.unfold(0, 3, 1)),
    "unfold apart": ((15,), lambda c: c.unfold(0, 3, 3)),
    "as_strided": ((7,), lambda c: c.as_strided((5, 3), (1, 1))),
    "as_strided apart": ((15,), lambda c: torch.as_strided(c, (5, 3), (1, 5))),
    "broadcast_tensors": ((1, 3), lambda c: torch.broadcast_tensors(c, torch.empty(5, 3))[0]),
    "diagonal": ((5, 3, 5), lambda c: c.diagonal(dim1=0, dim2=2).t()),
    "a column, expanded": ((4, 3), lambda c: c[1].expand(5, 3)),
    "expand and cut": ((3,), lambda c: c.expand(7, 3)[1:6]),
    "meshgrid": ((3,), lambda c: torch.meshgrid(torch.arange(5, dtype=c.dtype), c, indexing="ij")[1]),
}


class Viewed(nn.Module):
    def __init__(self, shape, view, times, last):
        super().__init__()
        self.first, self.c = nn.Linear(3, 3), nn.Parameter(torch.randn(shape))
        self.last = nn.Linear(5, 2) if last else nn.Identity()
        self.view, self.times = view, times

    def forward(self, x):
        h = F.linear(self.first(x).tanh(), self.view(self.c))
        if self.times == 2:
            h = h * F.linear(x.cos(), self.view(self.c))
        if self.times == 3:
            h = h + self.c.flatten()[0]
        return self.last(h.tanh())


@pytest.mark.parametrize("on", ["error", "vmap"])
@pytest.mark.parametrize("mode", right_or_refused.MODES)
@pytest.mark.parametrize(("times", "last"), [(1, True), (1, False), (2, True), (3, True)])
@pytest.mark.parametrize("view", VIEWS)
def test_norms_are_of_the_parameters_gradient(view, times, last, mode, on):
    model = Viewed(*VIEWS[view], times, last).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    refused = right_or_refused.refusal_of(model, lambda: model(x).square().sum(1), mode, on)
    assert refused is None or on == "error" or mode == "by layer", refused


INDICES = {
    "an array": lambda c, np: c[np.array([0, 0, 1])],
    "a list": lambda c, np: c[[0, 0, 1]],
    "a range": lambda c, np: c[range(3)],
    "a tuple of lists": lambda c, np: c[[0, 0], [1, 1]].expand(3, 2).t(),
    "a mask": lambda c, np: c[torch.tensor([True, False, True, True])],
    "an array of truths": lambda c, np: c[np.array([True, False, True, True])],
    "index_select": lambda c, np: c.index_select(0, torch.tensor([0, 0, 1])),
    "gather": lambda c, np: c.gather(0, torch.tensor([[0, 0, 0], [0, 1, 2]])),
    "take": lambda c, np: torch.take(c, torch.tensor([[0, 0, 0], [0, 1, 2]])),
    "a step": lambda c, np: c[::2],
    "an integer array": lambda c, np: c[np.int64(1)].expand(2, 3),
    "another type": lambda c, np: c.view(torch.int64).double(),
}


@pytest.mark.parametrize("on", ["error", "vmap"])
@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_entries_that_are_taken_twice_count_twice(index, on):
    np = pytest.importorskip("numpy")

    class Indexed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.c = nn.Linear(3, 3), nn.Parameter(torch.randn(4, 3))

        def forward(self, x):
            return F.linear(self.first(x), index(self.c, np)).tanh()

    model = Indexed().double()
    x = torch.randn(5, 3, dtype=torch.float64)
    right_or_refused.refusal_of(model, lambda: model(x).square().sum(1), on=on)
