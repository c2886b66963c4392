"""The table of operations: a row for each, from which backends, reports and tests take what there is.

An operation is its row here, its meaning and checks in `ops`, its definition in `reference`, and a function of the same
name and arguments in every backend that carries it out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gradnorm_ext.im2col import Im2col
from gradnorm_ext.segments import Groups, Segments

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Operation:
    """A row of the table.

    Attributes:
        name: of the operation, and of the functions that carry it out.
        gives: what it returns, in a few words.
        serves: the forms of gradients (`gradnorm_ext.gradients`) and other callers that need it.
        examples: from a device to calls of a backend's function, small, which together give every option.
        kernels: the schemas of its operators in C++, which write into tensors that their caller made.
    """

    name: str
    gives: str
    serves: tuple[str, ...]
    examples: Callable[[str], tuple[Arguments, ...]]
    kernels: tuple[str, ...] = ()


OPERATIONS: dict[str, Operation] = {}


def add(operation: Operation) -> None:
    """Put a row into the table.

    Raises:
        ValueError: there is an operation of that name.
    """
    if operation.name in OPERATIONS:
        raise ValueError(
            f"gradnorm_ext: an operation must have a name of its own, got {operation.name}; choose another"
        )
    OPERATIONS[operation.name] = operation


def kernel_name(schema: str) -> str:
    """The operator's name.

    Example:
        >>> kernel_name("segment_sum(Tensor g, Tensor offsets, Tensor(a!) out) -> ()")
        'segment_sum'
    """
    return schema.partition("(")[0]


_ROWS, _SEGMENTS, _IN, _OUT, _VALUES = 10, 3, 6, 4, 7


def _random(device: str, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.rand(shape, generator=generator).sub(0.5).to(device)


def _segments(device: str) -> Segments:
    """Three, of which one is empty, in two groups, of which none is."""
    groups = Groups.of(_SEGMENTS, [(torch.tensor([1, 1, 0], device=device), 2)], device)
    return Segments.from_lengths(torch.tensor([3, 0, 7], device=device), groups)


def _ids(device: str) -> torch.Tensor:
    return torch.tensor([0, 5, 5, 2, 6, 2, 2, 1, 0, 5], device=device)


def _weighted_or_by_group(device: str, rows: Arguments) -> tuple[Arguments, ...]:
    """The calls of an operation that returns gradients and norms."""
    segments = _segments(device)
    of_groups = {"outputs": segments.groups.levels[-1], "n_outputs": segments.groups.counts[-1]}
    return {**rows, "weight": _random(device, _SEGMENTS)}, {**rows, **of_groups}


def _outer(device: str, wider: int = 1) -> Arguments:
    rows = {"x": _random(device, _ROWS, wider * _IN), "g": _random(device, _ROWS, wider * _OUT)}
    if device == "cuda":
        rows = {name: tensor.bfloat16() for name, tensor in rows.items()}  # what every backend multiplies there
    return {**rows, "segments": _segments(device)}


def _windows(device: str) -> Arguments:
    images, g = _random(device, 2, 7, 3), _random(device, _ROWS, _OUT)
    windows = Im2col.of(images, positions=(5,), stride=(1,), kernel=(3,), dilation=(1,))
    return {"images": images, "windows": windows, "g": g, "segments": _segments(device)}


def _lookup(device: str) -> Arguments:
    g = _random(device, _ROWS, _OUT)
    return {"ids": _ids(device), "g": g, "vocabulary": _VALUES, "segments": _segments(device), "padding_idx": 2}


def _product(device: str) -> tuple[Arguments, ...]:
    x, g = _random(device, _ROWS, _IN), _random(device, _ROWS, _IN).square()
    plain = {"x": x, "g": g, "segments": _segments(device)}
    return {**plain, "shift": _random(device, _ROWS), "scale": _random(device, _ROWS)}, plain


def _sum(device: str) -> tuple[Arguments, ...]:
    return ({"g": _random(device, _ROWS, _OUT), "segments": _segments(device)},)


def _grads(device: str) -> Arguments:
    return {"grads": _random(device, _SEGMENTS, _OUT), "segments": _segments(device)}


def _values(device: str) -> tuple[Arguments, ...]:
    given = {"values": _random(device, _ROWS), "ids": _ids(device), "count": _VALUES}
    return {**given, "ddof": 1}, {**given, "ddof": 0}


def _logits(device: str) -> tuple[Arguments, ...]:
    return ({"logits": _random(device, _ROWS, _VALUES), "labels": _ids(device), "ignore_index": 6},)


_OUTER_FUSED = """outer_fused(Tensor x, Tensor g, Tensor begin, Tensor end, Tensor unit, Tensor inner, Tensor? outer,
    Tensor? output, Tensor? weight, int p, int d, int units, int kernel, Tensor(a!)? dw, Tensor(b!) norms) -> ()"""

for _row in (
    Operation(
        "outer_sqnorm",
        "norms of sums of outer products",
        serves=("Outer", "ChunkedOuter", "GroupedOuter", "ConvGrad"),
        examples=lambda device: (_outer(device), _outer(device, wider=16)),
        kernels=("outer_sqnorm(Tensor x, Tensor g, Tensor offsets, Tensor(a!) sqnorm) -> ()",),
    ),
    Operation(
        "outer_wgrad",
        "sums of outer products, weighted or per group, and their norms",
        serves=("Outer", "ChunkedOuter", "GroupedOuter", "ConvGrad"),
        examples=lambda device: _weighted_or_by_group(device, _outer(device)),
        kernels=(
            """outer_wgrad(Tensor x, Tensor g, Tensor offsets, Tensor walk, Tensor columns, Tensor? outputs,
    Tensor? weight, Tensor(a!)? dw, Tensor(b!) sqnorm, bool segment_norms) -> ()""",
            _OUTER_FUSED,
        ),
    ),
    Operation(
        "outer_sum",
        "sums of outer products, without norms",
        serves=("Outer", "ChunkedOuter"),
        examples=lambda device: ({**_outer(device), "weight": _random(device, _SEGMENTS)}, _outer(device)),
    ),
    Operation(
        "outer_gram",
        "inner products of the groups' sums of outer products",
        serves=("ops",),
        examples=lambda device: (_outer(device),),
    ),
    Operation(
        "im2col_sqnorm",
        "as `outer_sqnorm`, of the rows that a convolution's windows see",
        serves=("ConvGrad",),
        examples=lambda device: (_windows(device),),
    ),
    Operation(
        "im2col_wgrad",
        "as `outer_wgrad`, of the rows that a convolution's windows see",
        serves=("ConvGrad",),
        examples=lambda device: _weighted_or_by_group(device, _windows(device)),
        kernels=(
            """im2col_wgrad(Tensor images, Tensor windows, Tensor g, Tensor offsets, Tensor walk, Tensor columns,
    Tensor? outputs, Tensor? weight, Tensor(a!)? dw, Tensor(b!) sqnorm) -> ()""",
        ),
    ),
    Operation(
        "lookup_sqnorm",
        "norms of embedding gradients",
        serves=("Lookup",),
        examples=lambda device: (_lookup(device),),
    ),
    Operation(
        "lookup_wgrad",
        "embedding gradients, weighted or per group, and their norms",
        serves=("Lookup",),
        examples=lambda device: _weighted_or_by_group(device, _lookup(device)),
        kernels=(
            """lookup_wgrad(Tensor ids, Tensor g, Tensor offsets, Tensor walk, Tensor columns, Tensor? outputs,
    Tensor? weight, int padding_idx, Tensor(a!)? dw, Tensor(b!) sqnorm) -> ()""",
            """lookup_wgrad_sorted(Tensor ids, Tensor place, Tensor? row, Tensor segment, Tensor offsets, Tensor g,
    Tensor walk, Tensor columns, Tensor? outputs, Tensor? weight, int padding_idx, Tensor(a!)? dw, Tensor(b!) sqnorm)
    -> ()""",
        ),
    ),
    Operation(
        "segment_scale_grad",
        "each segment's gradient of a scale",
        serves=("PerSampleGrads",),
        examples=_product,
        kernels=(
            "segment_scale_grad(Tensor x, Tensor g, Tensor? shift, Tensor? scale, Tensor offsets, Tensor(a!) out) -> ()",
        ),
    ),
    Operation(
        "segment_sum",
        "each segment's gradient of a bias",
        serves=("PerSampleGrads", "ConvGrad", "ChunkedOuter", "Lookup"),
        examples=_sum,
        kernels=("segment_sum(Tensor g, Tensor offsets, Tensor(a!) out) -> ()",),
    ),
    Operation(
        "per_sample_sqnorm",
        "norms of gradients given per segment",
        serves=("PerSampleGrads", "ConvGrad"),
        examples=lambda device: (_grads(device),),
    ),
    Operation(
        "per_sample_wgrad",
        "sum of gradients given per segment, weighted, and their norms",
        serves=("PerSampleGrads", "ConvGrad"),
        examples=lambda device: ({**_grads(device), "weight": _random(device, _SEGMENTS)}, _grads(device)),
        kernels=(
            """per_sample_wgrad(Tensor grads, Tensor offsets, Tensor walk, Tensor columns, Tensor? weight, Tensor(a!)? dw,
    Tensor(b!) sqnorm) -> ()""",
        ),
    ),
    Operation(
        "segment_std",
        "mean, deviation, count and range of each segment's values",
        serves=("reward_stats", "group_advantages"),
        examples=_values,
        kernels=(
            """segment_std(Tensor values, Tensor ids, int ddof, Tensor(a!) mean, Tensor(b!) std, Tensor(c!) count,
    Tensor(d!) low, Tensor(e!) high) -> ()""",
            """segment_std_sorted(Tensor values, Tensor order, Tensor offsets, int ddof, Tensor(a!) mean, Tensor(b!) std,
    Tensor(c!) count, Tensor(d!) low, Tensor(e!) high) -> ()""",
        ),
    ),
    Operation(
        "logit_scores",
        "each label's log-probability, and its gradient's norm at the logits",
        serves=("logit_scores",),
        examples=_logits,
        kernels=(
            "logit_scores(Tensor logits, Tensor labels, int ignored, Tensor(a!) log_probability, Tensor(b!) w) -> ()",
        ),
    ),
    Operation(
        "logit_gradient_rates",
        "how much cross-entropy pushes each class up and down",
        serves=("logit_gradient_rates", "GSA"),
        examples=_logits,
        kernels=(
            """logit_gradient_rates(Tensor logits, Tensor labels, int ignored, Tensor(a!) count, Tensor(b!) up,
    Tensor(c!) down) -> ()""",
        ),
    ),
):
    add(_row)
