"""The models the figures are taken on: a small GPT in two sizes, an MLP and a ResNet, each with a fixed start and batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TASKS = 4


@dataclass(frozen=True)
class Problem:
    """A model and the batch it trains on: ``inputs``, ``targets`` and ``tasks`` have one entry per example."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    tasks: Tensor
    median_norm: float  # of an example's contribution to .grad at the initialisation, roughly: clips every other one

    def losses(self) -> Tensor:
        """Each example's loss, ``[B]``."""
        return example_losses(self.model(self.inputs), self.targets)

    def part(self, examples: Tensor | slice) -> Problem:
        """The same model on some of the examples."""
        cut = {name: getattr(self, name)[examples] for name in ("inputs", "targets", "tasks")}
        return replace(self, **cut)

    def double(self) -> Problem:
        """A copy in float64."""
        inputs = self.inputs.double() if self.inputs.is_floating_point() else self.inputs
        return replace(self, model=copy.deepcopy(self.model).double(), inputs=inputs)


def make(name: str, *, quick: bool = False) -> Problem:
    """The problem of that name in `MODELS`; ``quick``: the same kind of model, tiny."""
    torch.manual_seed(0)
    return (QUICK if quick else MODELS)[name].make(torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Model:
    title: str
    runs: int  # pairs of steps in a timing, by default
    make: Callable[[torch.Generator], Problem]


def example_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy, averaged over an example's positions where it has several."""
    losses = F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none")
    return losses.view(len(targets), -1).mean(1)


def gpt_problem(
    random: torch.Generator,
    examples: int,
    length: int,
    median_norm: float,
    *,
    vocabulary: int = 4096,
    width: int = 256,
    heads: int = 4,
    layers: int = 4,
) -> Problem:
    model = GPT(vocabulary, width, heads, layers, length)
    tokens = torch.randint(0, vocabulary, (examples, length), generator=random)
    tokens[:, ::7] = tokens[:, :1]  # repeated tokens, as in text: an embedding row's gradient is then a sum
    targets = torch.randint(0, vocabulary, (examples, length), generator=random)
    return Problem(model, tokens, targets, torch.arange(examples) % TASKS, median_norm)


def mlp_problem(random: torch.Generator, examples: int, widths: tuple[int, ...], median_norm: float) -> Problem:
    layers = [nn.Linear(p, d) for p, d in pairwise(widths)]
    model = nn.Sequential(*(part for layer in layers[:-1] for part in (layer, nn.ReLU())), layers[-1])
    inputs = torch.randn(examples, widths[0], generator=random)
    targets = torch.randint(0, widths[-1], (examples,), generator=random)
    return Problem(model, inputs, targets, torch.arange(examples) % TASKS, median_norm)


def resnet_problem(
    random: torch.Generator, examples: int, size: int, widths: tuple[int, ...], median_norm: float
) -> Problem:
    model = ResNet(widths)
    images = torch.randn(examples, 3, size, size, generator=random)
    targets = torch.randint(0, 10, (examples,), generator=random)
    return Problem(model, images, targets, torch.arange(examples) % TASKS, median_norm)


class ResNet(nn.Module):
    """Two blocks of each width, every width at half the size of the one before, and GroupNorm for BatchNorm."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        blocks = [
            Residual(outer if first else width, width, 2 if first and i else 1)
            for i, (outer, width) in enumerate(zip((widths[0], *widths), widths, strict=False))
            for first in (True, False)
        ]
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.GroupNorm(4, widths[-1])
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.blocks(self.stem(images)))).mean((2, 3)))


class Residual(nn.Module):
    def __init__(self, inner: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, inner), nn.GroupNorm(4, width)
        self.conv1 = nn.Conv2d(inner, width, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.skip = nn.Identity() if stride == 1 else nn.Conv2d(inner, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.relu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.relu(self.norm2(h)))


class GPT(nn.Module):
    def __init__(self, vocabulary: int, width: int, heads: int, layers: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.attention(self.attention_norm(h))
        return h + self.down(F.gelu(self.up(self.mlp_norm(h))))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        batch, length, width = h.shape
        q, k, v = self.qkv(h).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


MODELS = {
    "gpt": Model("GPT B=8 T=128", 15, lambda random: gpt_problem(random, 8, 128, 0.445)),
    "gpt512": Model("GPT B=4 T=512", 9, lambda random: gpt_problem(random, 4, 512, 0.415)),
    "mlp": Model("MLP B=256", 41, lambda random: mlp_problem(random, 256, (784, 1024, 1024, 10), 0.033)),
    "resnet": Model("ResNet B=32", 15, lambda random: resnet_problem(random, 32, 32, (32, 64, 128), 0.485)),
}
_TINY = {"vocabulary": 11, "width": 8, "heads": 2, "layers": 1}
QUICK = {
    "gpt": Model("GPT B=8 T=5", 2, lambda random: gpt_problem(random, 8, 5, 0.154, **_TINY)),
    "gpt512": Model("GPT B=4 T=9", 2, lambda random: gpt_problem(random, 4, 9, 0.194, **_TINY)),
    "mlp": Model("MLP B=8", 2, lambda random: mlp_problem(random, 8, (7, 9, 9, 3), 0.131)),
    "resnet": Model("ResNet B=8", 2, lambda random: resnet_problem(random, 8, 5, (4, 8), 0.387)),
}
