"""The checker: what a user runs once on a new model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradnorm_ext.layers import Examples, Layout, Plan
from gradnorm_ext.meter import Given, Meter


@dataclass(frozen=True)
class Check:
    """What :func:`check` found.

    Attributes:
        relative_error: for every trainable parameter the largest difference over the examples between the measured
            squared norm and autograd's, relative to the example's squared norm over all parameters.
        tolerance: what rounding explains in the dtype that was computed in.
        evidence: for every trainable parameter a sentence for each of its uses: the function, the sizes of its rows, and what
            proved that these belong to the examples they were counted for (a test from what the model returned, its
            arguments, the caller's word), or why nothing did yet.
        differing: the parameters beyond the tolerance; empty where the model is measured right.
        unproven: the parameters with a use that nothing has proven yet, such as one whose gradient is zero: the next
            block of training tests it again.
    """

    relative_error: dict[str, float]
    tolerance: float
    evidence: dict[str, list[str]] = field(default_factory=dict)

    @property
    def unproven(self) -> list[str]:
        return [name for name, found in self.evidence.items() if any(": not yet proven: " in one for one in found)]

    @property
    def differing(self) -> list[str]:
        return [name for name, error in self.relative_error.items() if not error <= self.tolerance]

    def __str__(self) -> str:
        worst = max(self.relative_error.values())
        if not self.differing:
            count = len(self.relative_error)
            lines = [f"check: all {count} trainable parameters agree with autograd, largest relative error {worst:.1e}"]
            lines += [f"  {one}" for name in self.unproven for one in self.evidence[name]]
            return "\n".join(lines)
        lines = [f"  {name}: relative error {self.relative_error[name]:.1e}" for name in self.differing]
        return "\n".join([f"check: {len(lines)} parameters differ from autograd beyond {self.tolerance:.1e}:", *lines])


def check(
    model: nn.Module,
    loss: Callable[[Any], Tensor],
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    on_unsupported: Literal["error", "vmap"] = "error",
    backend: str = "auto",
    **observe_options: Any,
) -> Check:
    """Compare a model's measured norms with autograd, one example at a time; print and return the differences.

    Works on a copy of the model in float64 and in eval mode (dropout would make every pass another function). The
    output's gradient is taken once for the whole batch and held fixed; then every example is run alone through the model
    and its slice of that gradient is propagated back. Of a packed batch the model is run whole, and back for each example
    with the output gradients of its rows alone.

    Args:
        model: the model; not changed.
        loss: a function of the model's output that returns the scalar that training calls ``backward()`` on.
        inputs: the model's arguments. Tensors whose first size (second, with ``batch_dim=1``) is that of the first one
            are batched and are sliced; the rest is passed as it is.
        kwargs: arguments by keyword, such as a batch of transformers: ``kwargs={"input_ids": ..., "attention_mask": ...}``.
        on_unsupported: as of :class:`Meter`.
        backend: as of :class:`Meter`.
        observe_options: of :meth:`Meter.observe`.

    Raises:
        ValueError: no batched tensor among the inputs, or an output without a batch dimension.
        RuntimeError: as of :meth:`Meter.observe`.

    Example:
        >>> found = check(nn.Linear(3, 2), lambda y: y.square().sum(), torch.ones(4, 3))
        check: all 2 trainable parameters agree with autograd, largest relative error ...
        >>> found.differing, found.unproven
        ([], [])
        >>> found.evidence["bias"]
        ['bias (linear, rows [4]): proven by a test from what the model returned, down to its arguments, by ...']
    """
    copied = copy.deepcopy(model).double().eval()
    set_experts: Any = getattr(copied, "set_experts_implementation", None)
    if set_experts is not None:  # the grouped products of transformers have no float64
        set_experts("eager")
    for parameter in copied.parameters():
        parameter.grad = None
    given: _Arguments = inputs, dict(kwargs or {})
    given = pytree.tree_map(lambda leaf: leaf.double() if _is_floating(leaf) else leaf, given)
    dim = observe_options.get("batch_dim", 0)
    batched = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor) and leaf.dim() > dim]
    if not batched:
        raise ValueError(
            f"check: an input must be a tensor with the examples as its {'second' if dim else 'first'} dimension, got none"
        )
    tasks, packed = observe_options.get("tasks"), observe_options.keys() & {"cu_seqlens", "example_ids"}
    if tasks is not None and not packed and len(tasks) != batched[0].shape[dim]:
        raise ValueError(
            f"check: tasks must have one entry per example of the first input, got {len(tasks)} for "
            f"{batched[0].shape[dim]}; pass the batched input first"
        )
    measured, evidence, batch = _measured(copied, loss, given, on_unsupported, backend, observe_options)
    examples = batch.count
    expected = _one_at_a_time(copied, loss, given, batch)
    total = sum(expected.values(), torch.zeros(examples, dtype=torch.float64)).clamp(
        min=torch.finfo(torch.float64).tiny
    )
    errors = {name: float(((measured[name] - expected[name]).abs() / total).max()) for name in expected}
    found = Check(errors, tolerance=torch.finfo(torch.float64).eps ** 0.5, evidence=evidence)
    print(found)
    return found


_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _called(model: nn.Module, given: _Arguments) -> Any:
    return model(*given[0], **given[1])


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _measured(
    model: nn.Module,
    loss: Callable[[Any], Tensor],
    given: _Arguments,
    on_unsupported: Literal["error", "vmap"],
    backend: str,
    observe_options: dict[str, Any],
) -> tuple[dict[str, Tensor], dict[str, list[str]], Examples]:
    tasks = observe_options.get("tasks")
    n_tasks = 1 if tasks is None else int(torch.as_tensor(tasks).max()) + 1
    meter = Meter(model, tasks=n_tasks, on_unsupported=on_unsupported, backend=backend)
    with meter.block("check", Plan(), cast("Given", observe_options), always_verify=True) as block:
        loss(_called(model, given)).backward()
    batch = block.observation.batch
    assert batch is not None
    evidence = block.observation.evidence()
    block.observation.forget()
    model.zero_grad()
    return {name: sqnorm.double() for name, sqnorm in meter.parameter_sqnorm.items()}, evidence, batch


def _one_at_a_time(
    model: nn.Module, loss: Callable[[Any], Tensor], given: _Arguments, batch: Examples
) -> dict[str, Tensor]:
    whole, spec = pytree.tree_flatten(_called(model, given))
    fixed = [leaf.detach().requires_grad_() if _is_floating(leaf) and leaf.requires_grad else leaf for leaf in whole]
    leaves = [i for i, leaf in enumerate(fixed) if isinstance(leaf, Tensor) and leaf.requires_grad]
    value = loss(pytree.tree_unflatten(fixed, spec))
    of_outputs = torch.autograd.grad(value, [fixed[i] for i in leaves], allow_unused=True)
    used = [(i, g) for i, g in zip(leaves, of_outputs, strict=True) if g is not None]
    for i, _ in used:
        if _layout(fixed[i], batch) is None:
            raise ValueError(
                f"check: the model's outputs must have the {batch.count} examples as their first dimension, got "
                f"{list(fixed[i].shape)}; let the model return its outputs and `loss` the scalar"
            )
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sqnorms = {name: torch.zeros(batch.count, dtype=torch.float64) for name in parameters}
    for b in range(batch.count):
        if batch.packing is None and not batch.kinds:
            alone = pytree.tree_map(functools.partial(_one_example, b, batch), given)
            outputs = pytree.tree_leaves(_called(model, alone))
            gradients = [g.narrow(batch.batch_dim, b, 1) for _, g in used]
        else:
            outputs, only = whole, torch.zeros(batch.count, dtype=torch.float64)
            only[b] = 1
            gradients = [_layout(g, batch).scaled(g, only) for _, g in used]  # type: ignore[union-attr]
        found = torch.autograd.grad(
            [outputs[i] for i, _ in used], list(parameters.values()), gradients, retain_graph=True, allow_unused=True
        )
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                sqnorms[name][b] = gradient.square().sum()
    return sqnorms


def _layout(output: Tensor, batch: Examples) -> Layout | None:
    """Of an output: as the block said, with the features it may have set aside."""
    dim = batch.batch_dim
    if not batch.told(output.shape) and (output.dim() <= dim or output.shape[dim] != batch.count):
        return None
    shape = tuple(output.shape[: max(1, output.dim() - 1)])
    return batch.layout_of(shape)


def _one_example(b: int, batch: Examples, leaf: Any) -> Any:
    dim = batch.batch_dim
    batched = isinstance(leaf, Tensor) and leaf.dim() > dim and leaf.shape[dim] == batch.count
    return leaf.narrow(dim, b, 1) if batched else leaf
