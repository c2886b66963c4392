"""Hooks that users put on parameters: norms are of gradients as hooks leave them, which is how they reach ``.grad``.

A hook is applied to the gradient of every example, prompt and task. That is what each adds to ``.grad`` only if the hook
is linear (a mask, a scale): the examples' hooked gradients must add up to the hooked sum, or the hook is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradnorm_ext.gradients import ViewedTerm, combined_gradient, group_members

Hook = Callable[[Tensor], Tensor | None]


def hooks_of(parameter: Tensor, ours: Sequence[Any] = ()) -> tuple[Hook, ...]:
    """A parameter's hooks but for ours, given by their handles."""
    hooks = parameter._backward_hooks
    if not hooks:
        return ()
    known = {handle.id for handle in ours}
    return tuple(hook for key, hook in hooks.items() if key not in known)


def hooked(hooks: Sequence[Hook], gradient: Tensor) -> Tensor:
    """What hooks make of a gradient."""
    gradient = gradient.clone()  # a hook may write to it
    for hook in hooks:
        changed = hook(gradient)
        gradient = gradient if changed is None else changed
    return gradient


class HookedGradients:
    """The gradients that several uses of a parameter have together, as its hooks leave them."""

    def __init__(
        self, who: str, name: str, parameter: Tensor, hooks: Sequence[Hook], uses: Sequence[ViewedTerm]
    ) -> None:
        self.who, self.name, self.parameter, self.hooks, self.uses = who, name, parameter, hooks, uses
        self.columns = group_members(uses[0].term.segments)

    @torch.no_grad()
    def sqnorms(self) -> Tensor:
        """Squared norms by column, once the hooks are known to be linear."""
        found, total, size = [], torch.zeros_like(self.parameter), 0.0
        plain = torch.zeros_like(self.parameter)
        examples = self.uses[0].term.segments.count
        for column, members in enumerate(self.columns):
            before = self._before(members)
            after = self._hooked(before)
            found.append(after.double().square().sum())
            if column < examples:
                plain, total = plain + before, total + after
                size += float(found[-1].sqrt())
        self._refuse_nonlinear(plain, total, size, examples)
        return torch.stack(found)

    @torch.no_grad()
    def of_tasks(self, tasks: int) -> Tensor:
        """``[tasks, *shape]``."""
        return torch.stack([self._hooked(self._before(members)) for members in self.columns[-tasks:]])

    def _before(self, members: Tensor) -> Tensor:
        return combined_gradient(self.uses, members).view_as(self.parameter).to(self.parameter.dtype)

    def _hooked(self, gradient: Tensor) -> Tensor:
        found = hooked(self.hooks, gradient)
        if found.shape != gradient.shape:
            raise self._refusal(f"one that makes {list(found.shape)} of {list(gradient.shape)}")
        return found

    def _refuse_nonlinear(self, plain: Tensor, total: Tensor, size: float, examples: int) -> None:
        difference = float((self._hooked(plain) - total).double().norm())
        if not difference <= 8 * (examples + 1) * torch.finfo(plain.dtype).eps * size and torch.isfinite(plain).all():
            raise self._refusal("one by which the gradients of examples add up to another sum")

    def _refusal(self, got: str) -> RuntimeError:
        names = ", ".join(getattr(hook, "__qualname__", type(hook).__name__) for hook in self.hooks)
        return RuntimeError(
            f"{self.who}: hooks on parameters must be linear (a mask, a scale), for each example's part of .grad to be known, "
            f"got {got} ({names} on {self.name}); change the gradient after the block, in .grad, or freeze the parameter"
        )
