"""Layers that get no rows at all (an expert that nobody chose, an empty mask), in the first block and in any later one."""

import pytest
import right_or_refused
import torch
import torch.nn.functional as F
from test_in_place_on_outputs import Attention, Channels, Ids, Of, Recurrent
from torch import nn

B, T, D = 4, 3, 6

LAYERS = {
    "Linear": lambda: nn.Linear(D, D),
    "Linear without bias": lambda: nn.Linear(D, D, bias=False),
    "Linear by F": lambda: Of(F.linear, (D, D), (D,)),
    "matmul": lambda: Of(torch.matmul, (D, D)),
    "addmm": lambda: Of(lambda x, w, b: torch.addmm(b, x, w), (D, D), (D,)),
    "Bilinear": lambda: nn.Bilinear(D, D, D),
    "Embedding": lambda: Ids(nn.Embedding(9, D)),
    "LayerNorm": lambda: nn.LayerNorm(D),
    "RMSNorm": lambda: nn.RMSNorm(D),
    "PReLU": lambda: nn.PReLU(D),
    "mul": lambda: Of(torch.mul, (D,)),
    "add": lambda: Of(torch.add, (D,)),
    "div": lambda: Of(torch.div, (D,)),
    "sub": lambda: Of(torch.sub, (D,)),
    "GroupNorm": lambda: nn.GroupNorm(2, D),
    "two of them": lambda: nn.Sequential(nn.Linear(D, D), nn.ReLU(inplace=True), nn.LayerNorm(D), nn.Linear(D, D)),
    "einsum": lambda: Of(lambda x, w: torch.einsum("rd,de->re", x, w), (D, D)),
    "where": lambda: Of(lambda x, w: torch.where(x > 0, x, w), (D,)),
}
UNFOLLOWED = (
    "Bilinear",
    "Embedding",
    "GroupNorm",
    "PReLU",
    "einsum",
)  # of rows that were selected, no rule knows whose
BATCHED = {
    "MultiheadAttention": lambda: Attention(batch_first=True),
    "MultiheadAttention [T, B]": lambda: Attention(),
    "Conv1d": lambda: Channels(nn.Conv1d(D, D, 1)),
    "ConvTranspose1d": lambda: Channels(nn.ConvTranspose1d(D, D, 1)),
    "GRU": Recurrent,
    "Linear of [B, T, d]": lambda: nn.Linear(D, D),
    "EmbeddingBag": lambda: Of(lambda x, w: F.embedding_bag((x[..., 0] * 9).abs().long() % 9, w)[:, None], (9, D)),
}


class Chosen(nn.Module):
    """A layer for the rows of a mask, added to where they came from."""

    def __init__(self, layer, how):
        super().__init__()
        self.first, self.layer, self.last, self.how = nn.Linear(D, D), layer, nn.Linear(D, 2), how

    def forward(self, x, mask):
        h = self.first(x).sin()
        rows = (h[mask], h[mask].cos()) if isinstance(self.layer, nn.Bilinear) else (h[mask],)
        y = self.layer(*rows)
        if self.how == "index_add":
            h = h.flatten(0, 1).index_add(0, mask.flatten().nonzero()[:, 0], y).view(h.shape)
        elif self.how == "masked_scatter":
            h = h.masked_scatter(mask[..., None].expand_as(h), y)
        else:
            h = h * 1
            h[mask] = y
        return self.last(h.tanh()).square().flatten(1).sum(1)


class Sliced(nn.Module):
    """A layer of the last few positions, which may be none."""

    def __init__(self, layer):
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(D, D), layer, nn.Linear(D, 2)

    def forward(self, x, mask):
        h = self.first(x).sin()
        some = int(mask.sum() > 0)
        y = self.layer(h[:, :some]) if some or not isinstance(self.layer, Channels) else h[:, :0]
        return self.last(torch.cat([h, y], 1).tanh()).square().flatten(1).sum(1)


EMPTY = torch.zeros(B, T, dtype=torch.bool)
FULL = torch.tensor([[True, False, False], [False, True, True], [True, True, False], [False, False, True]])
ORDERS = {"at first": (EMPTY, FULL, EMPTY), "later": (FULL, EMPTY, FULL), "always": (EMPTY, EMPTY)}


def check(model, mode, on, masks):
    """All blocks of one run: none may be refused."""
    x, tasks = torch.randn(B, T, D, dtype=torch.float64), torch.tensor([0, 1, 0, 1])
    policy = lambda s: torch.ones(2, dtype=s.task_norm.dtype)  # noqa: E731
    observer = right_or_refused.observer_of(model, mode, policy, tasks=2, on_unsupported=on)
    for mask in masks:
        truth = right_or_refused.contributions(model, lambda mask=mask: model(x, mask))
        model.zero_grad()
        right_or_refused.block(observer, lambda mask=mask: model(x, mask), tasks=tasks)
        norms = torch.stack([torch.cat([g.flatten() for g in one]).norm() for one in truth])
        torch.testing.assert_close(observer.stats.example_norm, norms)
        for p, *of_examples in zip(model.parameters(), *truth, strict=True):
            torch.testing.assert_close(torch.zeros_like(p) if p.grad is None else p.grad, sum(of_examples))
        if mode != "Meter":
            observer.step()


@pytest.mark.parametrize("masks", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("how", ["index_put", "index_add", "masked_scatter"])
@pytest.mark.parametrize("layer", LAYERS)
def test_selected_rows_may_be_none(layer, how, masks):
    if layer in UNFOLLOWED and masks is not ORDERS["always"]:
        return
    check(Chosen(LAYERS[layer](), how).double(), "Meter", "vmap" if layer == "einsum" else "error", masks)


@pytest.mark.parametrize("masks", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("mode", right_or_refused.REWEIGHTED)
@pytest.mark.parametrize("layer", ["Linear", "LayerNorm", "div", "mul", "two of them"])
def test_also_where_the_step_is_reweighted(layer, mode, masks):
    check(Chosen(LAYERS[layer](), "index_put").double(), mode, "error", masks)


@pytest.mark.parametrize("mode", ["Meter", "same_step", "passes"])
@pytest.mark.parametrize("masks", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("layer", BATCHED)
def test_positions_may_be_none(layer, masks, mode):
    model = Sliced(BATCHED[layer]()).double()
    try:
        for mask in masks:
            model(torch.randn(B, T, D, dtype=torch.float64), mask).sum().backward()
    except RuntimeError:
        return  # plain torch has no such call
    check(model, mode, "vmap" if layer == "GRU" else "error", masks)
