"""In-place functions on what layers return: as in plain torch, measured or refused as torch refuses them."""

import pytest
import right_or_refused
import torch
import torch.nn.functional as F
from torch import nn

from gradnorm_ext import Meter

B, T, D = 4, 3, 6


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, **options)

    def forward(self, x):
        if self.attention.batch_first:
            return self.attention(x, x, x)[0]
        x = x.transpose(0, 1)
        return self.attention(x, x, x)[0].transpose(0, 1)


class Channels(nn.Module):
    """A layer that wants the features in the second place."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.transpose(1, 2)).transpose(1, 2)


class Of(nn.Module):
    """A function of parameters of these sizes."""

    def __init__(self, function, *shapes):
        super().__init__()
        self.function, self.own = function, nn.ParameterList(torch.rand(shape) + 0.5 for shape in shapes)

    def forward(self, x):
        return self.function(x, *(self.own[i] for i in range(len(self.own))))


class Ids(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer((x[..., 0] * 100).long() % 9)


LAYERS = {
    "Linear": lambda: nn.Linear(D, D),
    "Linear without bias": lambda: nn.Linear(D, D, bias=False),
    "Linear by F": lambda: Of(F.linear, (D, D), (D,)),
    "Linear of a view": lambda: Of(lambda x, w, b: F.linear(x, w.t(), b), (D, D), (D,)),
    "frozen weight": lambda: right_or_refused.frozen(nn.Linear(D, D), "weight"),
    "frozen bias": lambda: right_or_refused.frozen(nn.Linear(D, D), "bias"),
    "addmm": lambda: Of(lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w).view(B, T, D), (D, D), (D,)),
    "matmul": lambda: Of(torch.matmul, (D, D)),
    "matmul from the left": lambda: Of(lambda x, w: w @ x, (5, T)),
    "Bilinear": lambda: Of(lambda x, w, b: F.bilinear(x, x.cos(), w, b), (D, D, D), (D,)),
    "Conv1d": lambda: Channels(nn.Conv1d(D, D, 1)),
    "Conv2d": lambda: Of(lambda x, w, b: F.conv2d(x[:, None], w, b), (2, 1, 2, 2), (2,)),
    "ConvTranspose1d": lambda: Channels(nn.ConvTranspose1d(D, D, 2)),
    "Embedding": lambda: Ids(nn.Embedding(9, D, padding_idx=0)),
    "EmbeddingBag": lambda: Ids(nn.EmbeddingBag(9, D)),
    "positions": lambda: Of(lambda x, w: x + F.embedding(torch.arange(T), w), (T, D)),
    "given positions": lambda: Of(lambda x, w: x * F.embedding(torch.arange(T)[None], w).expand(B, -1, -1), (T, D)),
    "LayerNorm": lambda: nn.LayerNorm(D),
    "RMSNorm": lambda: nn.RMSNorm(D),
    "GroupNorm": lambda: Channels(nn.GroupNorm(2, D)),
    "InstanceNorm1d": lambda: Channels(nn.InstanceNorm1d(D, affine=True)),
    "BatchNorm1d": lambda: Channels(nn.BatchNorm1d(D).eval()),
    "PReLU": lambda: Channels(nn.PReLU(D)),
    "MultiheadAttention": lambda: Attention(batch_first=True),
    "MultiheadAttention [T, B]": lambda: Attention(),
    "MultiheadAttention without bias": lambda: Attention(bias=False, batch_first=True),
    "mul": lambda: Of(torch.mul, (D,)),
    "add": lambda: Of(torch.add, (D,)),
    "sub": lambda: Of(lambda x, w: w - x, (D,)),
    "div": lambda: Of(torch.div, (D,)),
    "mul_": lambda: Of(lambda x, w: x.clone().mul_(w), (D,)),
    "where": lambda: Of(lambda x, w: torch.where(x > 0, x, w), (D,)),
    "expand": lambda: Of(lambda x, w: x + w.expand(B, T, D), (1, 1, D)),
    "expand itself": lambda: Of(lambda x, w: w.expand(B, T, D), (1, 1, D)),
    "repeat": lambda: Of(lambda x, w: w.repeat(B, T, 1), (1, 1, D)),
    "einsum": lambda: Of(lambda x, w: torch.einsum("btd,de->bte", x, w), (D, D)),
    "a recurrent layer": lambda: Recurrent(),
    "a vmap rule's split": lambda: Of(lambda x, w: torch.einsum("btd,de->bte", x, w).split(2, 1)[0], (D, D)),
}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(D, D, batch_first=True)

    def forward(self, x):
        return self.layer(x)[0]


def plus(h, x):
    h += 1
    return h


WRITES = {
    "relu_": lambda h, x: F.relu(h, inplace=True),
    "dropout_": lambda h, x: F.dropout(h, 0.0, inplace=True),
    "+= number": plus,
    "+= shortcut": lambda h, x: h.add_(x.sum((1, 2)).view(-1, *[1] * (h.dim() - 1))),
    "mul_": lambda h, x: h.mul_(0.5),
    "masked_fill_": lambda h, x: h.masked_fill_(h > 0.1, 0.2),
    "h[:, 0] = 0": lambda h, x: (h[:, 0].zero_(), h)[1],
    "a view's": lambda h, x: (h.view(-1)[1:].mul_(2), h)[1] if h.is_contiguous() else h.mul_(2),
    "unsqueeze_": lambda h, x: h.unsqueeze_(1),
    "tanh_ twice": lambda h, x: h.tanh_().tanh_(),
}


class Model(nn.Module):
    def __init__(self, layer, write, last=True):
        super().__init__()
        self.first, self.layer, self.write = nn.Linear(D, D), layer, write
        self.last = nn.Linear(1, 2) if last else nn.Identity()

    def forward(self, x):
        h = self.write(self.layer(self.first(x).sin()), x)
        return self.last(h[..., None])


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("layer", LAYERS)
def test_in_place_functions_work_as_in_plain_torch(layer, write):
    on = "vmap" if layer in ("einsum", "a recurrent layer", "a vmap rule's split") else "error"
    model, x = Model(LAYERS[layer](), write).double(), torch.randn(B, T, D, dtype=torch.float64)

    def losses():
        return model(x).square().flatten(1).sum(1)

    try:
        losses().sum().backward()
    except RuntimeError:
        with pytest.raises((RuntimeError, AssertionError), match=r"in-?place|single memory location"):
            right_or_refused.refusal_of(model, losses, on=on)
        return
    assert right_or_refused.refusal_of(model, losses, on=on) is None


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_outputs_lie_in_memory_as_in_plain_torch(layer, channels_last):
    on = "vmap" if layer in ("einsum", "a recurrent layer", "a vmap rule's split") else "error"
    found = []
    model = Model(LAYERS[layer](), lambda h, x: found.append((h.stride(), h.dtype, h.requires_grad)) or h).double()
    x = torch.randn(B, T, D, dtype=torch.float64)
    if channels_last:
        model.first = right_or_refused.Then(model.first, lambda h: h.transpose(1, 2).contiguous().transpose(1, 2))
    model(x).square().sum().backward()
    with Meter(model, on_unsupported=on).observe(tasks=[0] * B):
        model(x).square().sum().backward()
    assert found[0] == found[1]
