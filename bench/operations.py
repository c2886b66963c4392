"""The cases of ``run.py ops``: the operations, their sizes, and the bytes they have to move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from models import TASKS
from torch import Tensor

import gradnorm_ext
from gradnorm_ext import backends, ops
from gradnorm_ext.segments import Groups, Segments


@dataclass(frozen=True)
class Size:
    """``segments`` of ``length`` rows each, which are ``inputs`` (a lookup's vocabulary) and ``outputs`` wide."""

    group: str  # when it is run: quick, small or all
    name: str
    segments: int
    length: int
    inputs: int
    outputs: int

    @property
    def rows(self) -> int:
        return self.segments * self.length


@dataclass(frozen=True)
class Operation:
    """A function of `ops` (its name up to a space), what it is given, and what it has to do.

    ``bytes`` is what must be read and written at least; None for products of matrices, whose work is
    2 · rows · inputs · outputs floating point operations.
    """

    name: str
    arguments: Callable[[Size, torch.Generator], dict[str, Any]]
    sizes: tuple[Size, ...]
    bytes: Callable[[Size], int] | None = None

    def run(self, arguments: dict[str, Any], backend: str) -> tuple[Tensor, ...]:
        function = getattr(ops, self.name.partition(" ")[0])  # looked up at each call: a test puts a wrong one there
        outputs = function(**arguments, backend=backend)
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


@dataclass(frozen=True)
class OfRewards(Operation):
    """`reward_stats`, which takes its backend from the environment: beside sums also sorting, and a dozen figures."""

    def run(self, arguments: dict[str, Any], backend: str) -> tuple[Tensor, ...]:
        with mock.patch.object(backends, "DEFAULT", backend):
            stats = gradnorm_ext.reward_stats(**arguments)
        return stats.mean, stats.std, stats.task_mean, stats.task_std_mean, stats.task_std_p10


def outer(size: Size, random: torch.Generator) -> dict[str, Any]:
    x, g = (torch.randn(size.rows, width, generator=random) for width in (size.inputs, size.outputs))
    return {"x": x, "g": g, "segments": Segments.equal(size.segments, size.length)}


def outer_by_group(size: Size, random: torch.Generator) -> dict[str, Any]:
    groups = Groups.of(size.segments, [(torch.arange(size.segments) % TASKS, TASKS)])
    segments = Segments.equal(size.segments, size.length, groups)
    return {**outer(size, random), "segments": segments, "by_group": True}


def lookup(size: Size, random: torch.Generator) -> dict[str, Any]:
    ids = torch.randint(size.inputs, (size.rows,), generator=random)
    ids[::7] = ids[0]  # tokens repeat
    g = torch.randn(size.rows, size.outputs, generator=random)
    return {"ids": ids, "g": g, "vocabulary": size.inputs, "segments": Segments.equal(size.segments, size.length)}


def product(size: Size, random: torch.Generator) -> dict[str, Any]:
    shift, scale = torch.randn(2, size.rows, generator=random)
    return {**outer(size, random), "shift": shift, "scale": scale}


def sums(size: Size, random: torch.Generator) -> dict[str, Any]:
    g = torch.randn(size.rows, size.outputs, generator=random)
    return {"g": g, "segments": Segments.equal(size.segments, size.length)}


def rewards(size: Size, random: torch.Generator) -> dict[str, Any]:
    ids = torch.arange(size.rows) % size.segments
    return {"values": torch.randn(size.rows, generator=random), "ids": ids, "count": size.segments}


def groups(size: Size, random: torch.Generator) -> dict[str, Any]:
    prompts = torch.arange(size.rows) // size.length
    return {"rewards": torch.rand(size.rows, generator=random), "prompts": prompts, "tasks": prompts % TASKS}


def mixed(size: Size, random: torch.Generator) -> dict[str, Any]:
    order = torch.randperm(size.rows, generator=random)
    return {name: of[order] for name, of in groups(size, random).items()}


def logits(size: Size, random: torch.Generator) -> dict[str, Any]:
    labels = torch.randint(size.outputs, (size.rows,), generator=random)
    return {"logits": torch.randn(size.rows, size.outputs, generator=random), "labels": labels}


OUTER = (
    Size("quick", "tiny", 4, 3, 5, 7),
    Size("small", "gpt up", 8, 128, 256, 1024),
    Size("small", "mlp hidden", 256, 1, 1024, 1024),
    Size("all", "gpt head", 8, 128, 256, 4096),
    Size("all", "gpt512 up", 4, 512, 256, 1024),
)
LOOKUP = (
    Size("quick", "tiny", 4, 3, 5, 7),
    Size("small", "gpt tokens", 8, 128, 4096, 256),
    Size("all", "gpt512 tokens", 4, 512, 4096, 256),
)
VECTOR = (
    Size("quick", "tiny", 4, 3, 7, 7),
    Size("small", "gpt norm", 8, 128, 256, 256),
    Size("small", "mlp hidden", 256, 1, 1024, 1024),
    Size("all", "gpt512 norm", 4, 512, 256, 256),
)
REWARDS = (
    Size("quick", "tiny", 4, 3, 1, 1),
    Size("small", "64 prompts", 64, 8, 1, 1),
    Size("all", "65536 prompts", 65536, 16, 1, 1),
)

GROUPS = (
    Size("quick", "tiny", 4, 3, 1, 1),
    Size("small", "a million", 125_000, 8, 1, 1),
)
LOGITS = (
    Size("quick", "tiny", 4, 3, 1, 7),
    Size("small", "32k classes", 4, 64, 1, 32768),
    Size("all", "256k classes", 1, 64, 1, 262144),
)

OPERATIONS = (
    Operation("outer_sqnorm", outer, OUTER),
    Operation("outer_wgrad", outer, OUTER),
    Operation("outer_wgrad by_group", outer_by_group, OUTER),
    # An id is 8 bytes; the table's gradient is written once.
    Operation("lookup_sqnorm", lookup, LOOKUP, lambda s: s.rows * (8 + 4 * s.outputs)),
    Operation("lookup_wgrad", lookup, LOOKUP, lambda s: s.rows * (8 + 4 * s.outputs) + 4 * s.inputs * s.outputs),
    # x, g, and a shift and a scale per row.
    Operation("scale_wgrad", product, VECTOR, lambda s: s.rows * (8 * s.outputs + 8)),
    Operation("bias_wgrad", sums, VECTOR, lambda s: s.rows * 4 * s.outputs),
    # A value and its id; per segment a count of 8 bytes and four other figures.
    Operation("segment_std", rewards, REWARDS, lambda s: s.rows * (4 + 8) + s.segments * (8 + 4 * 4)),
    # A reward, two ids, and which prompt it is among them.
    OfRewards("reward_stats", groups, GROUPS, lambda s: s.rows * (4 + 3 * 8)),
    OfRewards("reward_stats mixed", mixed, GROUPS, lambda s: s.rows * (4 + 3 * 8)),
    # The logits once, a label and two figures a row, or three a class.
    Operation("logit_scores", logits, LOGITS, lambda s: s.rows * (4 * s.outputs + 8 + 2 * 4)),
    Operation("logit_gradient_rates", logits, LOGITS, lambda s: s.rows * (4 * s.outputs + 8) + s.outputs * (8 + 2 * 4)),
)
