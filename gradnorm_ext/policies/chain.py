"""One policy after another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from gradnorm_ext.policies.policy import Policy, weighs_of

if TYPE_CHECKING:
    from gradnorm_ext.stats import Stats


@dataclass(frozen=True, init=False)
class Chain:
    """Policies in turn: each sees the gradients as the ones before it have weighted them. Products of weights.

        w = w¹ · w² · ...        w² of the statistics of the gradients times w¹, and so on

    Weights of tasks are exact to pass on (:meth:`~gradnorm_ext.Stats.weighted`). After weights of examples the norm of a
    task is unknown, so a policy that asks for it must come first: ``Chain(InverseNorm(), ClipExamples(1.0))``. The chain
    weighs examples if one of its policies does, ``[B]``, else tasks, ``[K]``.

    Args:
        policies: at least one; also plain functions.

    Raises:
        ValueError: no policy; when called, weights of a wrong shape.

    Example:
        >>> from gradnorm_ext import Meter
        >>> from gradnorm_ext.policies import ClipExamples, InverseNorm
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> with Meter(model, tasks=2) as meter, meter.observe(tasks=[0, 1, 1]):
        ...     model(torch.tensor([[4.], [1.], [1.]])).sum().backward()
        >>> Chain(InverseNorm(), ClipExamples(2.0))(meter.stats)      # of norms 4, 1, 1: first 2.67, 1.33, 1.33
        tensor([0.5000, 1.3333, 1.3333])
    """

    policies: tuple[Policy, ...]

    def __init__(self, *policies: Policy) -> None:
        if not policies:
            raise ValueError("Chain: at least one policy must be given, got none; Equal() weighs all alike")
        for policy in policies:
            weighs_of(policy)
        object.__setattr__(self, "policies", policies)

    @property
    def weighs(self) -> Literal["tasks", "examples"]:
        """What the weights are of."""
        return "examples" if any(weighs_of(policy) == "examples" for policy in self.policies) else "tasks"

    def __call__(self, stats: Stats) -> Tensor:
        seen, product = stats, torch.ones_like(stats.example_norm if self.weighs == "examples" else stats.task_count)
        for policy in self.policies:
            of = weighs_of(policy)
            weights = torch.as_tensor(policy(seen)).detach().to(stats.example_norm)
            expected = stats.task_count.shape if of == "tasks" else stats.example_norm.shape
            if weights.shape != expected:
                raise ValueError(
                    f"Chain: a policy must return one weight for each of its {of}, {list(expected)}, got "
                    f"{list(weights.shape)} from {policy!r}; set its attribute `weighs` to what it returns"
                )
            seen = seen.weighted(weights, of)
            product = product * (weights[stats.tasks] if of == "tasks" and self.weighs == "examples" else weights)
        return product

    def state_dict(self) -> dict[str, Any]:
        """The states of those policies that have one, by their place."""
        return {str(i): policy.state_dict() for i, policy in self._stateful()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        own = dict(self._stateful())
        if {str(i) for i in own} != set(state):
            raise ValueError(
                f"Chain: the state must be of policies {sorted(own)}, got {sorted(map(int, state))}; "
                "make the chain of the same policies"
            )
        for i, policy in own.items():
            policy.load_state_dict(state[str(i)])

    def _stateful(self) -> list[tuple[int, Any]]:
        return [(i, policy) for i, policy in enumerate(self.policies) if hasattr(policy, "load_state_dict")]
