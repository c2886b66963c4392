"""What the tests compare with: autograd, one example at a time; and the models they compare on."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Case:
    """A model, a batch for it, and a loss that is a sum of per-example terms."""

    model: nn.Module
    x: Tensor
    y: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]

    def to(self, dtype: torch.dtype) -> Case:
        x = self.x.to(dtype) if self.x.is_floating_point() else self.x
        y = self.y.to(dtype) if self.y.is_floating_point() else self.y
        return Case(copy.deepcopy(self.model).to(dtype), x, y, self.loss)

    def on(self, device: torch.device | str) -> Case:
        return Case(copy.deepcopy(self.model).to(device), self.x.to(device), self.y.to(device), self.loss)

    def run(self) -> Tensor:
        return self.loss(self.model(self.x), self.y)


def gradients_of(model: nn.Module, losses: Iterable[Callable[[], Tensor | None]]) -> list[dict[str, Tensor]]:
    """What each loss alone adds to ``.grad``: each runs the model and returns a loss, or runs its backward as well."""
    found = []
    for run in losses:
        model.zero_grad()
        loss = run()
        if loss is not None:
            loss.backward()
        found.append({name: _gradient(p) for name, p in model.named_parameters() if p.requires_grad})
    model.zero_grad()
    return found


def per_example_gradients(case: Case) -> list[dict[str, Tensor]]:
    """Each example's gradients, from a forward and a backward of its own."""
    model = copy.deepcopy(case.model)

    def loss_of(i: int) -> Tensor:
        return case.loss(model(case.x[i : i + 1]), case.y[i : i + 1])

    return gradients_of(model, [functools.partial(loss_of, i) for i in range(len(case.x))])


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()


def weighted(gradients: list[dict[str, Tensor]], weights: Tensor) -> dict[str, Tensor]:
    """The examples' gradients times their weights, added up."""
    return {name: sum(w * of[name] for w, of in zip(weights, gradients, strict=True)) for name in gradients[0]}


def same_norms(
    stats: Any, gradients: list[dict[str, Tensor]], tasks: Tensor | None = None, within: float = 1e3
) -> None:
    """A block's statistics have the norms of the examples' gradients and of the tasks'.

    ``within``: roundings of float64.
    """
    examples, close = torch.arange(len(gradients)), within * torch.finfo(torch.float64).eps
    assert relative(stats.example_norm, group_norms(gradients, examples, len(gradients))) < close
    if tasks is not None:
        assert relative(stats.task_norm, group_norms(gradients, tasks, len(stats.task_norm))) < close


def group_norms(gradients: list[dict[str, Tensor]], ids: Tensor, count: int) -> Tensor:
    """The norm of every group's summed gradient, in float64."""
    norms = []
    for group in range(count):
        members = [gradients[i] for i in (ids == group).nonzero()[:, 0].tolist()]
        norms.append(
            sum(sum(g[name].double() for g in members).square().sum() for name in gradients[0]) if members else 0
        )
    return torch.stack([torch.as_tensor(norm, dtype=torch.float64) for norm in norms]).sqrt()


def relative(found: Tensor, truth: Tensor) -> float:
    """The largest difference relative to the largest true value."""
    return float((found.double() - truth.double()).abs().max() / truth.double().abs().max())


def token_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy, a mean over tokens and a sum over examples."""
    return (
        F.cross_entropy(
            logits.flatten(0, 1).float() if logits.dtype == torch.bfloat16 else logits.flatten(0, 1),
            y.flatten(),
            reduction="none",
        )
        .view(y.shape)
        .mean(1)
        .sum()
    )


def square_loss(output: Tensor, y: Tensor) -> Tensor:
    return (output.flatten(1) - y).square().sum()


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(width), Attention(width, heads), nn.RMSNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A small GPT; the head is a module of its own, tied as a module, or the embedding's weight used by `F.linear`."""

    def __init__(self, head: str = "own", vocabulary: int = 13, width: int = 8, length: int = 6) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width, padding_idx=0), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, 2) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = None if head == "functional" else nn.Linear(width, vocabulary, bias=False)
        if head == "tied":
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            h = block(h)
        h = self.norm(h)
        return F.linear(h, self.tokens.weight) if self.head is None else self.head(h)


class Mixer(nn.Module):
    """An MLP-Mixer over ``[B, T, d]``: one linear layer sees the tokens as its features."""

    def __init__(self, tokens: int = 5, width: int = 6) -> None:
        super().__init__()
        self.norm, self.across = nn.LayerNorm(width), nn.Linear(tokens, tokens)
        self.along, self.head = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return self.head((x + F.gelu(self.along(x))).mean(1))


class FreeParameters(nn.Module):
    """A class token, a position table as a parameter, layer scales, an HF-like RMS norm and the ``1 + w`` kind."""

    def __init__(self, length: int = 5, width: int = 6) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, length + 3, width))
        self.scale, self.shifted = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width) * 0.1)
        self.free = nn.Parameter(torch.randn(width, width))
        self.gate = nn.Parameter(torch.tensor(0.7))
        self.list = nn.ParameterList([nn.Parameter(torch.randn(width))])
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions[:, : x.shape[1] + 1]
        x = self.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        x = x * (1.0 + self.shifted.type_as(x)) + self.list[0]
        x = x + torch.tanh(x @ self.free) * self.gate
        return self.head(x[:, 0])


class FlatRows(nn.Module):
    """``[B·T, d]`` inside, and one module called twice."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first, self.twice, self.head = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x.reshape(-1, x.shape[-1])))
        h = torch.tanh(self.twice(torch.tanh(self.twice(h))))
        return self.head(h.view_as(x).mean(1))


class TwoPaddings(nn.Module):
    """One table looked up twice, each time with another padding entry, and used as the head or not."""

    def __init__(self, tied: bool, vocabulary: int = 13, width: int = 6) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.mix, self.tied = nn.Linear(width, width), tied
        self.head = None if tied else nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        first, second = (F.embedding(one, self.table.weight, p) for one, p in ((ids, 1), (ids.flip(1), 5)))
        h = torch.tanh(self.mix(first * second + second))
        return F.linear(h, self.table.weight) if self.head is None else self.head(h)


class ManyInnerDimensions(nn.Module):
    """``[B, H, W, d]`` with a bias added on its own and a product with a ``[W, 1]`` parameter, W = d."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.lift, self.norm = nn.Linear(width, width, bias=False), nn.LayerNorm(width, bias=False)
        self.bias, self.column = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width, 1))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh((self.norm(self.lift(x)) + self.bias) * self.column).mean((1, 2)))


class Convolutions(nn.Module):
    """A chain of convolutions with an activation after each, and its mean over the positions."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.flatten(2).mean(2)


class Normalizations(nn.Module):
    """Images through a linear map of their channels, then a normalization with scales and shifts of its own."""

    def __init__(self, norm: nn.Module, channels: int) -> None:
        super().__init__()
        self.mix, self.norm, self.head = nn.Linear(channels, channels), norm, nn.Linear(channels, 2)
        for parameter in norm.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.mix(x.movedim(1, -1)).movedim(-1, 1))
        return self.head(torch.tanh(h).flatten(2).mean(2))


def _normalization(norm: nn.Module, *shape: int, steps: int = 0) -> Case:
    case = _floats(Normalizations(norm, shape[1]), *shape, outputs=2)
    for _ in range(steps):  # running statistics that are not those of the start
        norm(torch.randn(shape))
    case.model.eval() if steps else case.model.train()
    return case


class Attending(nn.Module):
    """Torch's attention of a sequence to itself or, where ``other`` is wider or shorter, to one made of it."""

    def __init__(self, other: tuple[int, int] | None = None, causal: bool = False, weights: bool = False, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, **options)
        for parameter in self.attention.parameters():
            nn.init.normal_(parameter, std=0.5)
        self.widen = nn.Linear(6, other[1]) if other else None
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
        self.other, self.causal, self.weights = other, causal, weights

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        seen = torch.tanh(self.widen(x[:, : self.other[0]])) if self.widen is not None and self.other else h
        mask = h.new_ones(len(h[0]), len(seen[0]), dtype=torch.bool).triu(1) if self.causal else None
        padding = (torch.arange(len(seen[0]), device=x.device) > 1) & (x[:, :1, 0] > 0) if self.causal else None
        if not self.attention.batch_first:
            h, seen = h.transpose(0, 1), h.transpose(0, 1) if seen is h else seen.transpose(0, 1)
        seen = h if self.other is None else seen
        y, seen_weights = self.attention(
            h, seen, seen, key_padding_mask=padding, attn_mask=mask, need_weights=self.weights
        )
        if seen_weights is not None:
            y = y * (
                1 + seen_weights.square().sum((1, 2)).view(-1, 1, 1).movedim(0, 0 if self.attention.batch_first else 1)
            )
        if not self.attention.batch_first:
            y = y.transpose(0, 1)
        return self.head(torch.tanh(y).mean(1))


class AttendingFrames(nn.Module):
    """Videos ``[B, T, S, E]`` whose frames attend to themselves, B·T at a time, and whose places do, B·S at a time."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.space, self.time = (nn.MultiheadAttention(4, 2, batch_first=batch_first) for _ in range(2))

    def attend(self, attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1) if attention.batch_first else x.flatten(0, 1).transpose(0, 1)
        y = attention(rows, rows, rows.sin(), need_weights=False)[0]
        return (y if attention.batch_first else y.transpose(0, 1)).unflatten(0, x.shape[:2])

    def forward(self, x: Tensor) -> Tensor:
        h = self.attend(self.space, self.mix(x))
        h = h + self.attend(self.time, h.transpose(1, 2)).transpose(1, 2)
        return self.head(torch.tanh(h).mean((1, 2)))


class Layered(nn.Module):
    """Torch's transformer layers: an encoder's, and a decoder's that looks at what it made."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        options = {"nhead": 2, "dim_feedforward": 8, "dropout": 0.0, "batch_first": batch_first}
        self.encoder = nn.TransformerEncoderLayer(4, norm_first=batch_first, **options)
        self.decoder = nn.TransformerDecoderLayer(4, activation="gelu", **options)
        self.head, self.batch_first = nn.Linear(4, 2), batch_first

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.batch_first else x.transpose(0, 1)
        y = self.decoder(h.sin(), self.encoder(h))
        return self.head(y.mean(1 if self.batch_first else 0))


class Bilinear(nn.Module):
    """Two maps of the input meet in a bilinear layer, which is called twice."""

    def __init__(self, outputs: int = 2, bias: bool = True) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 3), nn.Linear(4, 5)
        self.meet = nn.Bilinear(3, 5, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        one, other = torch.tanh(self.one(x)), torch.tanh(self.other(x))
        y = self.meet(one, other) * self.meet(one.cos(), other.sin())
        return y if y.dim() == 2 else y.mean(1)


class Activations(nn.Module):
    """`nn.PReLU` with one slope and with one for each channel, the latter twice."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix, self.one = nn.Linear(channels, channels), nn.PReLU()
        self.each, self.head = nn.PReLU(channels, 0.7), nn.Linear(channels, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(self.mix(x.movedim(1, -1)).movedim(-1, 1) - 0.1)
        h = self.each(self.each(h.sin()) - h.cos())
        return self.head(h.flatten(2).mean(2) if h.dim() > 2 else h)


class Bags(nn.Module):
    """Bags of embeddings: ids as rows, or flat with offsets, which come as the input."""

    def __init__(self, tied: bool = False, weighted: bool = False, **options) -> None:
        super().__init__()
        self.bags = nn.EmbeddingBag(11, 4, **options)
        self.head, self.tied, self.weighted = nn.Linear(4, 2), tied, weighted

    def forward(self, x: Tensor) -> Tensor:
        weights = x.to(self.head.weight.dtype).cos() if self.weighted else None
        if self.tied:  # the same ids as one row of flat bags
            h = self.bags(x.flatten(), torch.arange(0, x.numel(), x.shape[1], device=x.device))
            return self.head(torch.tanh(h)) + F.linear(h, self.bags.weight)[:, :2]
        return self.head(torch.tanh(self.bags(x, per_sample_weights=weights)))


class Elementwise(nn.Module):
    """Scales, shifts and temperatures on images ``[B, C, H, W]``, some of them written in place."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.centre, self.gamma = (
            nn.Parameter(torch.randn(channels, 1, 1)),
            nn.Parameter(torch.rand(channels, 1, 1) + 1),
        )
        self.temperature, self.floor = nn.Parameter(torch.tensor(1.7)), nn.Parameter(torch.randn(1))
        self.token, self.scale = nn.Parameter(torch.randn(1, 1, channels)), nn.Parameter(torch.randn(channels))
        self.experts = nn.Parameter(torch.randn(2, channels, 2))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x - self.centre) * self.gamma
        h = (self.centre - h) / self.temperature
        h.mul_(self.gamma)
        h -= self.floor
        h = torch.cat([self.token.repeat(len(x), 1, 1), h.flatten(2).mT], 1) / (2 + self.scale)
        h += -self.scale
        return sum(torch.tanh(h.mean(1) @ expert) for expert in self.experts) + h[:, 0] @ self.experts[0]


class Adapted(nn.Linear):
    """LoRA as a subclass of the frozen layer that it adapts; its up-projection starts at zero no more."""

    def __init__(self, width: int, rank: int = 2) -> None:
        super().__init__(width, width)
        self.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(rank, width)), nn.Parameter(torch.randn(width, rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5 * F.linear(F.linear(x, self.down), self.up)


class Adapters(nn.Module):
    """LoRA as child modules beside a frozen layer, and as products of free parameters."""

    def __init__(self, width: int = 4, rank: int = 2) -> None:
        super().__init__()
        self.base, self.subclass = nn.Linear(width, width).requires_grad_(False), Adapted(width)
        self.adapters = nn.ModuleDict(
            {"down": nn.Linear(width, rank, bias=False), "up": nn.Linear(rank, width, bias=False)}
        )
        self.a, self.b = nn.Parameter(torch.randn(rank, width)), nn.Parameter(torch.randn(width, rank))
        self.head = nn.Linear(width, 2).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.base(x) + 2 * self.adapters["up"](self.adapters["down"](x)))
        h = self.subclass(h) + (h @ self.a.T @ self.b.T)
        return self.head(torch.tanh(h).mean(1))


class Curved(nn.Module):
    """Scales and shifts that are functions of parameters, as state space models and adapters have them; one used twice."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(width, width), nn.Linear(width, 2)
        self.rate, self.step = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))
        self.magnitude, self.gate = nn.Parameter(torch.rand(width) + 1), nn.Parameter(torch.tensor(0.3))
        self.register_buffer("norms", torch.rand(width) + 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mix(x) * -torch.exp(self.rate.to(x.dtype))
        h = torch.tanh(h * F.softplus(self.step[None, :]) + 0.5 * self.step)
        scale = (self.magnitude / self.norms).view(1, -1)
        h = (scale - 1) * h + scale * torch.cos(h) * 0.3
        return self.head(h * torch.tanh(self.gate) ** 2).mean(1)


class PairBias(nn.Module):
    """Attention with a learned bias for every pair of positions, the same for all examples, that two layers share."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(width, 3 * width) for _ in range(2))
        self.lift, self.bias, self.head = nn.Linear(3, width), nn.Embedding(7, heads), nn.Linear(width, 2)
        self.places, self.heads = nn.Parameter(torch.randn(9, width)), heads

    def forward(self, x: Tensor) -> Tensor:
        position = torch.arange(x.shape[1], device=x.device)
        bias = self.bias((position[:, None] - position).clamp(-3, 3) + 3).permute(2, 0, 1)[None]
        h = torch.tanh(self.lift(x)) + self.places[(position + 1)[None]]
        q, k, v = self.split(self.first(h))
        h = h + (torch.softmax(q @ k.mT + bias, -1) @ v).transpose(1, 2).flatten(2)
        mask = torch.where((position[:, None] >= position)[None, None], bias, -1e9)
        h = h + F.scaled_dot_product_attention(*self.split(self.second(h)), mask).transpose(1, 2).flatten(2)
        h = h + F.scaled_dot_product_attention(*self.split(self.second(h)), bias.contiguous()).transpose(1, 2).flatten(
            2
        )
        return self.head(h).mean(1)

    def split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))


class Frames(nn.Module):
    """Videos ``[B, T, C, H, W]`` whose frames are convolved as a batch of B·T images, one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.head = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x.flatten(0, 1)))
        h = torch.tanh(self.twice(h))
        h = h + F.interpolate(torch.tanh(self.twice(h[..., ::2, ::2])), h.shape[2:])
        return self.head(h.mean((2, 3)).unflatten(0, x.shape[:2]).mean(1))


def _tokens(model: nn.Module, examples: int = 4, length: int = 6, vocabulary: int = 13) -> Case:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (examples, length), generator=generator)
    ids[:, 1::3] = ids[:, :1]  # repeated ids
    y = torch.randint(0, vocabulary, (examples, length), generator=generator)
    return Case(model, ids, y, token_loss)


def _bags(model: nn.Module) -> Case:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 11, (4, 5), generator=generator)
    ids[1] = ids[3] = 2  # bags of nothing but padding, where 2 is that, and of padding and one other
    ids[3, 2] = 7
    ids[:, -1] = torch.tensor([10, 2, 10, 2])
    return Case(model, ids, torch.randn(4, 2, generator=generator), square_loss)


def _floats(model: nn.Module, *shape: int, outputs: int) -> Case:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(shape, generator=generator), torch.randn(shape[0], outputs, generator=generator)
    return Case(model, x, y, square_loss)


def _hf(kind: str) -> Case:
    import transformers

    common = {"vocab_size": 13, "attn_implementation": "sdpa"}
    llama = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "gpt2":
        config = transformers.GPT2Config(
            n_embd=16, n_layer=2, n_head=4, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **common
        )
        inner: nn.Module = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            num_key_value_heads=2,
            max_position_embeddings=16,
            tie_word_embeddings=kind == "llama_tied",
            **llama,
            **common,
        )
        inner = transformers.LlamaForCausalLM(config)
    return _tokens(Logits(inner))


class Logits(nn.Module):
    """A Hugging Face model as a function of ids."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 9, bias=False), nn.Tanh(), nn.Linear(9, 3))


LAYERS: dict[str, Callable[[], Case]] = {
    "conv1d": lambda: _floats(
        Convolutions(
            nn.Conv1d(3, 5, 4, padding="same"),
            nn.Conv1d(5, 4, 3, stride=2, padding=2, dilation=2, padding_mode="circular", bias=False),
            nn.Conv1d(4, 7, 1, padding="valid"),
            nn.Conv1d(7, 2, 5, padding=4),
        ),
        *(5, 3, 9),
        outputs=2,
    ),
    "conv2d": lambda: _floats(
        Convolutions(
            nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(0, 1)),
            nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", groups=4),
            nn.Conv2d(4, 6, (1, 3), dilation=(1, 2), padding="same", groups=2),
            nn.Conv2d(6, 40, 3, padding=1, padding_mode="replicate"),
            nn.Conv2d(40, 2, 2, padding=2),
        ),
        *(4, 3, 8, 6),
        outputs=2,
    ),
    "conv3d": lambda: _floats(
        Convolutions(nn.Conv3d(2, 3, (2, 1, 3), padding=(1, 0, 1)), nn.Conv3d(3, 2, 2, stride=(1, 2, 1))),
        *(3, 2, 3, 4, 3),
        outputs=2,
    ),
    "transposed convolutions, 1d": lambda: _floats(
        Convolutions(
            nn.ConvTranspose1d(2, 30, 3, stride=2, padding=1, output_padding=1),
            nn.ConvTranspose1d(30, 4, 2, groups=2, bias=False),
            nn.ConvTranspose1d(4, 2, 3, dilation=3, output_padding=2, stride=2),
        ),
        *(3, 2, 4),
        outputs=2,
    ),
    "transposed convolutions, 2d": lambda: _floats(
        Convolutions(nn.ConvTranspose2d(3, 6, (2, 3), stride=(1, 2), groups=3), nn.ConvTranspose2d(6, 2, 1)),
        *(3, 3, 3, 2),
        outputs=2,
    ),
    "transposed convolutions, 3d": lambda: _floats(
        Convolutions(nn.ConvTranspose3d(2, 2, 2, stride=2, padding=1), nn.ConvTranspose3d(2, 2, (1, 2, 2))),
        *(2, 2, 2, 3, 2),
        outputs=2,
    ),
    "convolved frames": lambda: _floats(Frames(), 3, 4, 2, 7, 6, outputs=2),
    "group norm": lambda: _normalization(nn.GroupNorm(3, 6), 4, 6, 5),
    "group norm, one group, images": lambda: _normalization(nn.GroupNorm(1, 3), 3, 3, 4, 2),
    "instance norm 1d": lambda: _normalization(nn.InstanceNorm1d(4, affine=True), 4, 4, 5),
    "instance norm 2d": lambda: _normalization(nn.InstanceNorm2d(3, affine=True), 4, 3, 2, 5),
    "instance norm 3d, running statistics": lambda: _normalization(
        nn.InstanceNorm3d(2, affine=True, track_running_stats=True), 3, 2, 2, 3, 2, steps=2
    ),
    "batch norm 1d in eval mode": lambda: _normalization(nn.BatchNorm1d(4), 5, 4, 3, steps=2),
    "batch norm 3d in eval mode": lambda: _normalization(nn.BatchNorm3d(2), 3, 2, 2, 2, 3, steps=2),
    "layer norm of several dimensions": lambda: _normalization(nn.LayerNorm((5, 3)), 4, 6, 5, 3),
    "layer norm of everything": lambda: _normalization(nn.LayerNorm((3, 2, 2), bias=False), 3, 3, 2, 2),
    "attention": lambda: _floats(Attending(batch_first=True), 3, 4, 6, outputs=2),
    "attention, sequence first": lambda: _floats(Attending(causal=True, bias=False), 3, 4, 6, outputs=2),
    "attention, as many examples as positions": lambda: _floats(Attending(), 4, 4, 6, outputs=2),
    "attention, batch first, as many examples as positions": lambda: _floats(
        Attending(batch_first=True, weights=True), 4, 4, 6, outputs=2
    ),
    "attention to another sequence": lambda: _floats(Attending((3, 6), batch_first=True), 3, 4, 6, outputs=2),
    "attention to a wider sequence": lambda: _floats(
        Attending((3, 5), batch_first=True, kdim=5, vdim=5, weights=True), 4, 4, 6, outputs=2
    ),
    "attention with more keys": lambda: _floats(
        Attending((3, 6), causal=True, add_bias_kv=True, add_zero_attn=True), 4, 4, 6, outputs=2
    ),
    "attention with more keys, batch first": lambda: _floats(
        Attending(batch_first=True, causal=True, add_bias_kv=True, weights=True), 3, 4, 6, outputs=2
    ),
    "attention in frames": lambda: _floats(AttendingFrames(batch_first=True), 3, 2, 5, 4, outputs=2),
    "attention in frames, sequence first": lambda: _floats(AttendingFrames(batch_first=False), 3, 2, 3, 4, outputs=2),
    "transformer layers": lambda: _floats(Layered(batch_first=True), 3, 5, 4, outputs=2),
    "transformer layers, sequence first": lambda: _floats(Layered(batch_first=False), 3, 3, 4, outputs=2),
    "bilinear": lambda: _floats(Bilinear(), 4, 4, outputs=2),
    "bilinear of sequences": lambda: _floats(Bilinear(bias=False), 3, 5, 4, outputs=2),
    "prelu": lambda: _floats(Activations(4), 4, 4, outputs=2),
    "prelu of images": lambda: _floats(Activations(3), 3, 3, 2, 4, outputs=2),
    "embedding bag": lambda: _bags(Bags()),
    "embedding bag, sums with padding": lambda: _bags(Bags(mode="sum", padding_idx=2)),
    "embedding bag, means with padding": lambda: _bags(Bags(padding_idx=-1)),
    "embedding bag, weighted": lambda: _bags(Bags(mode="sum", weighted=True)),
    "embedding bag with offsets, tied": lambda: _bags(Bags(tied=True, padding_idx=2)),
    "scales, shifts and temperatures": lambda: _floats(Elementwise(), 4, 3, 2, 3, outputs=2),
    "scales of as many channels as examples": lambda: _floats(Elementwise(), 3, 3, 3, 3, outputs=2),
    "functions of scales": lambda: _floats(Curved(), 4, 5, 4, outputs=2),
    "functions of as many scales as examples": lambda: _floats(Curved(), 4, 4, 4, outputs=2),
    "a bias per pair of positions": lambda: _floats(PairBias(), 4, 5, 3, outputs=2),
    "adapters": lambda: _floats(Adapters(), 4, 4, 4, outputs=2),
}

MAKERS: dict[str, Callable[[], Case]] = {
    "mlp": lambda: _floats(_mlp(), 6, 7, outputs=3),
    "transformer": lambda: _tokens(Transformer()),
    "transformer, tied head": lambda: _tokens(Transformer("tied")),
    "transformer, functional head": lambda: _tokens(Transformer("functional")),
    "mixer": lambda: _floats(Mixer(), 4, 5, 6, outputs=3),
    "free parameters": lambda: _floats(FreeParameters(), 4, 5, 6, outputs=2),
    "flat rows, module twice": lambda: _floats(FlatRows(), 4, 5, 6, outputs=2),
    "two paddings": lambda: _tokens(TwoPaddings(tied=False)),
    "two paddings, tied head": lambda: _tokens(TwoPaddings(tied=True)),
    "many inner dimensions": lambda: _floats(ManyInnerDimensions(), 3, 2, 4, 4, outputs=2),
    **LAYERS,
    "llama": lambda: _hf("llama"),
    "llama, tied": lambda: _hf("llama_tied"),
    "gpt2": lambda: _hf("gpt2"),
}


def make(name: str) -> Case:
    """One of `MAKERS`, always with the same weights and data."""
    torch.manual_seed(0)
    return MAKERS[name]()
