"""The checker: what a user runs once on a new model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradnorm_ext.layers import Plan
from gradnorm_ext.meter import Given, Meter


@dataclass(frozen=True)
class Check:
    """What :func:`check` found.

    Attributes:
        relative_error: for every trainable parameter the largest difference over the examples between the measured
            squared norm and autograd's, relative to the example's squared norm over all parameters.
        tolerance: what rounding explains in the dtype that was computed in.
        differing: the parameters beyond the tolerance; empty where the model is measured right.
    """

    relative_error: dict[str, float]
    tolerance: float

    @property
    def differing(self) -> list[str]:
        return [name for name, error in self.relative_error.items() if not error <= self.tolerance]

    def __str__(self) -> str:
        worst = max(self.relative_error.values())
        if not self.differing:
            count = len(self.relative_error)
            return f"check: all {count} trainable parameters agree with autograd, largest relative error {worst:.1e}"
        lines = [f"  {name}: relative error {self.relative_error[name]:.1e}" for name in self.differing]
        return "\n".join([f"check: {len(lines)} parameters differ from autograd beyond {self.tolerance:.1e}:", *lines])


def check(
    model: nn.Module, loss: Callable[[Any], Tensor], *inputs: Any, backend: str = "auto", **observe_options: Any
) -> Check:
    """Compare a model's measured norms with autograd, one example at a time; print and return the differences.

    Works on a copy of the model in float64 and in eval mode (dropout would make every pass another function). The
    output's gradient is taken once for the whole batch and held fixed; then every example is run alone through the model
    and its slice of that gradient is propagated back.

    Args:
        model: the model; not changed.
        loss: a function of the model's output that returns the scalar that training calls ``backward()`` on.
        inputs: the model's arguments. Tensors whose first size is that of the first one are batched and are sliced;
            the rest is passed as it is.
        backend: as of :class:`Meter`.
        observe_options: of :meth:`Meter.observe`.

    Raises:
        ValueError: no batched tensor among the inputs, or an output without a batch dimension.
        RuntimeError: as of :meth:`Meter.observe`.

    Example:
        >>> found = check(nn.Linear(3, 2), lambda y: y.square().sum(), torch.ones(4, 3))
        check: all 2 trainable parameters agree with autograd, largest relative error ...
        >>> found.differing
        []
    """
    copied = copy.deepcopy(model).double().eval()
    for parameter in copied.parameters():
        parameter.grad = None
    inputs = pytree.tree_map(lambda leaf: leaf.double() if _is_floating(leaf) else leaf, inputs)
    batched = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    if not batched:
        raise ValueError("check: an input must be a tensor with the examples as its first dimension, got none")
    examples = len(batched[0])
    tasks = observe_options.get("tasks")
    if tasks is not None and len(tasks) != examples:
        raise ValueError(
            f"check: tasks must have one entry per example of the first input, got {len(tasks)} for {examples}; pass the "
            "batched input first"
        )
    measured = _measured(copied, loss, inputs, backend, observe_options)
    expected = _one_at_a_time(copied, loss, inputs, examples)
    total = sum(expected.values(), torch.zeros(examples, dtype=torch.float64)).clamp(
        min=torch.finfo(torch.float64).tiny
    )
    errors = {name: float(((measured[name] - expected[name]).abs() / total).max()) for name in expected}
    found = Check(errors, tolerance=torch.finfo(torch.float64).eps ** 0.5)
    print(found)
    return found


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _measured(
    model: nn.Module,
    loss: Callable[[Any], Tensor],
    inputs: tuple[Any, ...],
    backend: str,
    observe_options: dict[str, Any],
) -> dict[str, Tensor]:
    tasks = observe_options.get("tasks")
    meter = Meter(model, tasks=1 if tasks is None else int(torch.as_tensor(tasks).max()) + 1, backend=backend)
    with meter.block("check", Plan(), cast("Given", observe_options), always_verify=True) as block:
        loss(model(*inputs)).backward()
    block.observation.forget()
    model.zero_grad()
    return {name: sqnorm.double() for name, sqnorm in meter.parameter_sqnorm.items()}


def _one_at_a_time(
    model: nn.Module, loss: Callable[[Any], Tensor], inputs: tuple[Any, ...], examples: int
) -> dict[str, Tensor]:
    output, spec = pytree.tree_flatten(model(*inputs))
    fixed = [leaf.detach().requires_grad_() if _is_floating(leaf) and leaf.requires_grad else leaf for leaf in output]
    leaves = [i for i, leaf in enumerate(fixed) if isinstance(leaf, Tensor) and leaf.requires_grad]
    for i in leaves:
        if fixed[i].dim() == 0 or len(fixed[i]) != examples:
            raise ValueError(
                f"check: the model's outputs must have the {examples} examples as their first dimension, got "
                f"{list(fixed[i].shape)}; let the model return its outputs and `loss` the scalar"
            )
    value = loss(pytree.tree_unflatten(fixed, spec))
    of_outputs = torch.autograd.grad(value, [fixed[i] for i in leaves], allow_unused=True)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sqnorms = {name: torch.zeros(examples, dtype=torch.float64) for name in parameters}
    for b in range(examples):
        alone = pytree.tree_map(functools.partial(_one_example, b, examples), inputs)
        outputs = pytree.tree_leaves(model(*alone))
        pairs = [(outputs[i], g[b : b + 1]) for i, g in zip(leaves, of_outputs, strict=True) if g is not None]
        gradients = torch.autograd.grad(
            [y for y, _ in pairs], list(parameters.values()), [g for _, g in pairs], allow_unused=True
        )
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                sqnorms[name][b] = gradient.square().sum()
    return sqnorms


def _one_example(b: int, examples: int, leaf: Any) -> Any:
    return leaf[b : b + 1] if isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == examples else leaf
