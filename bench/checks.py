"""What must hold before anything is timed: the result is plain torch's in float64, as far as float32 can tell.

The error may be twice that of plain float32 torch. Every ``wrong_*`` returns what is wrong, or None.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from models import TASKS, Problem
from operations import Operation
from torch import Tensor
from variants import Variant

EPSILON = torch.finfo(torch.float32).eps


def wrong_operation(operation: Operation, arguments: dict[str, Any], backend: str) -> str | None:
    """Compares with the reference backend."""
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    plain, exact = operation.run(arguments, "reference"), operation.run(wide, "reference")
    try:
        ours = operation.run(arguments, backend)
    except Exception as error:
        return f"raised {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    outputs = enumerate(zip(ours, plain, exact, strict=True))
    return next(filter(None, (difference(f"output {i}", *output) for i, output in outputs)), None)


def wrong_step(variant: Variant, problem: Problem, oracle: Oracle) -> str | None:
    """Compares norms and gradient with autograd, one example at a time.

    Of the second step, which is what is timed: the first also verifies itself, and has no weights under "next_step".
    """
    try:
        optimizer, backward = variant.begin(problem)
        for _ in range(2):
            optimizer.zero_grad()
            measured = backward()
    except Exception as error:
        return f"raised {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    for name, norms in measured.items():
        error, allowed = (norms - oracle.norms[name]).abs(), 2 * oracle.slack[name] + EPSILON * oracle.norms[name]
        worst = int((error / allowed).argmax())
        if reason := beyond(f"{name}[{worst}]", float(error[worst]), float(allowed[worst])):
            return reason
    gradient = torch.cat([parameter.grad.flatten() for parameter in problem.model.parameters()])
    return difference("the gradient", gradient, *oracle.gradients(variant.policy(problem)))


@dataclass(frozen=True)
class Oracle:
    """The norms by plain autograd, one example at a time in float64, and by how much float32 is off there.

    A norm may be off by what the gradient that it is of is: ``slack[s] = ‖g32[s] - g64[s]‖``.
    """

    problem: Problem
    exact: Problem
    norms: dict[str, Tensor]
    slack: dict[str, Tensor]
    task_gram: Tensor

    @staticmethod
    def of(problem: Problem) -> Oracle:
        exact = problem.double()
        examples, tasks = [], [torch.zeros(2, 1)] * TASKS
        for b, task in enumerate(problem.tasks.tolist()):
            gradient = flat_gradient(exact, example_loss(exact, b))
            error = flat_gradient(problem, example_loss(problem, b)) - gradient
            both = torch.stack([gradient, error])
            examples.append(both.norm(dim=1))
            tasks[task] = tasks[task] + both
        of_examples, of_tasks = torch.stack(examples, 1), torch.stack([both.norm(dim=1) for both in tasks], 1)
        norms, slack = ({"example_norm": of_examples[i], "task_norm": of_tasks[i]} for i in range(2))
        gradients = torch.stack([both[0] for both in tasks])
        return Oracle(problem, exact, norms, slack, gradients @ gradients.T)

    def gradients(self, policy: Any) -> tuple[Tensor, Tensor]:
        """The reweighted gradient: by plain float32 in one backward, and by a loop over the examples in float64."""
        weights = torch.ones(len(self.problem.tasks), dtype=torch.float64)
        if policy is not None:
            count = self.problem.tasks.bincount()
            weights = policy(SimpleNamespace(**self.norms, task_gram=self.task_gram, task_count=count))
            weights = weights[self.problem.tasks] if policy.weighs == "tasks" else weights
        plain = flat_gradient(self.problem, (weights.float() * self.problem.losses()).mean())
        one_by_one = (flat_gradient(self.exact, w * example_loss(self.exact, b)) for b, w in enumerate(weights))
        return plain, sum(one_by_one, torch.zeros(()))


def example_loss(problem: Problem, b: int) -> Tensor:
    return problem.part(slice(b, b + 1)).losses().sum() / len(problem.tasks)


def flat_gradient(problem: Problem, loss: Tensor) -> Tensor:
    return torch.cat([one.flatten() for one in torch.autograd.grad(loss, list(problem.model.parameters()))])


def difference(what: str, ours: Tensor, plain: Tensor, exact: Tensor) -> str | None:
    """The distance to the exact result may be twice plain float32's, and what rounding that result costs."""
    return beyond(what, distance(ours, exact), 2 * distance(plain, exact) + EPSILON * float(exact.double().norm()))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm())


def beyond(what: str, error: float, allowed: float) -> str | None:
    return None if error <= allowed else f"{what} is off by {error:.2e}, at most {allowed:.2e} is rounding"
