"""What every policy is: what it weighs, what it may remember, and the checks that the policies share."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gradnorm_ext.stats import Stats

Policy: TypeAlias = "Callable[[Stats], Tensor]"
WEIGHS = ("tasks", "examples")


def weighs_of(policy: Any) -> Literal["tasks", "examples"]:
    """What a policy's weights are of: its attribute ``weighs``, "tasks" where it has none.

    Raises:
        TypeError: the policy cannot be called, or is a class rather than one of its objects.
        ValueError: ``weighs`` is neither "tasks" nor "examples".

    Example:
        >>> from gradnorm_ext.policies import ClipExamples
        >>> weighs_of(ClipExamples(1.0)), weighs_of(lambda stats: torch.ones_like(stats.task_norm))
        ('examples', 'tasks')
    """
    if isinstance(policy, type):
        name = policy.__name__
        raise TypeError(f"policy: must be an object that can be called, got the class {name}; write {name}(...)")
    if not callable(policy):
        raise TypeError(
            f"policy: must be a function from statistics to weights, got {policy!r}; pass one of gradnorm_ext.policies"
        )
    weighs = getattr(policy, "weighs", "tasks")
    if weighs == "tasks":
        return "tasks"
    if weighs == "examples":
        return "examples"
    raise ValueError(f"policy: weighs must be one of {', '.join(WEIGHS)}, got {weighs!r}; set it to what it weighs")


class State:
    """What a policy remembers from step to step: tensors by name, none before its first call.

    Example:
        >>> state = State()
        >>> state.get("PiKE", "total", torch.zeros(2))
        tensor([0., 0.])
        >>> state.update(torch.tensor(True), total=torch.tensor([1., 2.]))
        >>> state.tensors
        {'total': tensor([1., 2.])}
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.fed: tuple[Tensor, ...] | None = None  # of the block under way, not saved

    def get(self, who: str, name: str, initial: Tensor) -> Tensor:
        """The tensor of this name, on the device of ``initial``, which it is at first."""
        tensor = self.tensors.get(name)
        if tensor is None:
            tensor = initial
        elif tensor.shape != initial.shape:
            raise ValueError(
                f"{who}: its state must be of {len(initial)}, as what it is called with, got one of {len(tensor)}; "
                "make a new policy, or load the state of a run with the same tasks"
            )
        self.tensors[name] = tensor = tensor.to(initial.device)
        return tensor

    def update(self, finite: Tensor, **tensors: Tensor) -> None:
        """Remember these; if the step is not ``finite`` (it will be skipped) the old ones stay."""
        for name, tensor in tensors.items():
            self.tensors[name] = torch.where(finite, tensor.detach(), self.tensors[name])

    def take(self, who: str, call: str) -> tuple[Tensor, ...]:
        """What was fed since the last time, once."""
        fed, self.fed = self.fed, None
        if fed is None:
            raise RuntimeError(
                f"{who}: {call} must run in every observe block before it closes, got none since the last; "
                "call it between forward and backward"
            )
        return fed


@dataclass(frozen=True)
class Stateful:
    """A policy with a ``state``. ``Reweighted`` saves it in its ``state_dict`` and loads it from there.

    Any policy with methods ``state_dict`` and ``load_state_dict`` is saved likewise. A state belongs to one run: two
    optimizers need two policies.
    """

    state: State = field(default_factory=State, init=False, repr=False, compare=False)

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name."""
        return dict(self.state.tensors)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.state.tensors = {name: tensor.clone() for name, tensor in state.items()}


def check_number(
    policy: str, name: str, value: Any, *, advice: str, above: bool = False, infinite: bool = False
) -> None:
    """Refuse a parameter that is not a number >= 0 (``above``: > 0), finite unless ``infinite`` is allowed too."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (number and (value > 0 if above else value >= 0) and (infinite or value < math.inf)):
        kind = "a number" if infinite else "a finite number"
        raise ValueError(f"{policy}: {name} must be {kind} {'>' if above else '>='} 0, got {value!r}; {advice}")


def task_norm_of(policy: str, stats: Stats) -> Tensor:
    """``stats.task_norm``, which a block need not have measured."""
    if stats.task_norm is None:
        raise ValueError(
            f"{policy}: stats.task_norm must have been measured, got None; "
            'let the policy weigh "tasks", or give the meter more than one task'
        )
    return stats.task_norm


def task_gram_of(policy: str, stats: Stats) -> Tensor:
    """``stats.task_gram``, which is measured only where asked for."""
    if stats.task_gram is None:
        raise ValueError(f"{policy}: stats.task_gram must have been measured, got None; pass gram=True to the meter")
    return stats.task_gram
