"""The cases of ``run.py step``: ways to train, ours and what one would write without us."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from models import TASKS, Problem, example_losses
from torch import Tensor, nn

from gradnorm_ext import IMTLG, ClipExamples, InverseNorm, Meter, Reweighted, Stats

Training = tuple[torch.optim.Optimizer, Callable[[], dict[str, Tensor]]]  # the second fills .grad and returns norms


@dataclass(frozen=True)
class Variant:
    """``start`` is given a problem and what ``policy`` makes of it.

    ``bounds`` are the ratios to the plain step that must be met: of the time on each model, then of the memory on the
    worst; a figure without one, or with None, is for comparison.
    """

    start: Callable[[Problem, Any], Training]
    policy: Callable[[Problem], Any] = lambda _: None
    bounds: tuple[float | None, ...] = ()

    def begin(self, problem: Problem) -> Training:
        return self.start(problem, self.policy(problem))

    def step(self, problem: Problem) -> Callable[[], None]:
        """One whole step of training, to be called again and again."""
        optimizer, backward = self.begin(problem)

        def step() -> None:
            optimizer.zero_grad()
            backward()
            optimizer.step()

        return step


def plain(problem: Problem, _: None) -> Training:
    def backward() -> dict[str, Tensor]:
        problem.losses().mean().backward()
        return {}

    return adamw(problem), backward


def metered(problem: Problem, _: None, *, tasks: int = 1) -> Training:
    meter = Meter(problem.model, tasks=tasks)

    def backward() -> dict[str, Tensor]:
        with meter.observe(tasks=problem.tasks if tasks > 1 else None):
            problem.losses().mean().backward()
        return norms_of(meter.stats, tasks)

    return adamw(problem), backward


def reweighted(problem: Problem, policy: Any, *, tasks: int = 1, **options: Any) -> Training:
    optimizer = Reweighted(adamw(problem), problem.model, policy, tasks=tasks, **options)

    def backward() -> dict[str, Tensor]:
        with optimizer.observe(tasks=problem.tasks if tasks > 1 else None):
            optimizer.backward(problem.losses().mean())
        return norms_of(optimizer.stats, tasks)

    return optimizer, backward


def per_example(problem: Problem, policy: Any) -> Training:
    """Every example's gradient by torch.func, all of them in memory at once."""
    # torch 2.13 runs attention under vmap in a loop over the examples, and says so.
    warnings.filterwarnings("ignore", message="There is a performance drop")
    parameters = dict(problem.model.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        outputs = torch.func.functional_call(problem.model, parameters, (x[None],))
        return example_losses(outputs, y[None]).sum() / len(problem.tasks)

    gradients_of = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def backward() -> dict[str, Tensor]:
        detached = {name: parameter.detach() for name, parameter in parameters.items()}
        gradients = gradients_of(detached, problem.inputs, problem.targets)
        norm = torch.stack([torch.func.vmap(norm_of)(one) for one in gradients.values()]).norm(dim=0)
        weights = policy(SimpleNamespace(example_norm=norm))
        for name, parameter in parameters.items():
            parameter.grad = torch.tensordot(weights, gradients[name], 1)
        return {"example_norm": norm}

    return adamw(problem), backward


def per_task(problem: Problem, policy: Any, *, forwards: int) -> Training:
    """Every task's gradient by a backward of its own, after one forward of the batch or one of each task's part."""
    parameters = list(problem.model.parameters())
    members = [(problem.tasks == task).nonzero()[:, 0] for task in range(TASKS)]
    parts = [problem.part(examples) for examples in members]

    def backward() -> dict[str, Tensor]:
        losses = problem.losses() if forwards == 1 else None
        gradients = []
        for part, examples in zip(parts, members, strict=True):
            loss = (part.losses() if losses is None else losses[examples]).sum() / len(problem.tasks)
            gradients.append(torch.autograd.grad(loss, parameters, retain_graph=losses is not None))
        norm = torch.stack([torch.stack([norm_of(one) for one in task]).norm() for task in gradients])
        weights = policy(SimpleNamespace(task_norm=norm, task_count=problem.tasks.bincount()))
        for parameter, *of_tasks in zip(parameters, *gradients, strict=True):
            parameter.grad = sum(weight * one for weight, one in zip(weights, of_tasks, strict=True))
        return {"task_norm": norm}

    return adamw(problem), backward


def two_backwards(problem: Problem, _: None) -> Training:
    """A backward to the activations and then a whole one: two passes before a norm is taken."""
    first = next(module for module in problem.model.modules() if module._parameters)
    outputs: list[Tensor] = []
    first.register_forward_hook(lambda module, inputs, output: outputs.append(output))

    def backward() -> dict[str, Tensor]:
        loss = problem.losses().mean()
        torch.autograd.grad(loss, outputs.pop(), retain_graph=True)
        loss.backward()
        return {}

    return adamw(problem), backward


class _ByExample(torch.autograd.Function):
    """A linear layer whose weight gradient is added up from the library's product of each example."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        dw = torch.zeros_like(weight)
        for of_x, of_g in zip(x, g, strict=True):
            dw.addmm_(of_g.t(), of_x)
        dx = g @ weight if ctx.needs_input_grad[0] else None
        return dx, dw, g.flatten(0, 1).sum(0) if ctx.needs_input_grad[2] else None


def products_by_example(problem: Problem, _: None) -> Training:
    """The plain step with weight gradients from one product an example, where it has several rows; no norms."""

    def forward(layer: nn.Linear, x: Tensor) -> Tensor:
        return _ByExample.apply(x, layer.weight, layer.bias) if x.dim() == 3 else F.linear(x, layer.weight, layer.bias)

    for module in problem.model.modules():
        if type(module) is nn.Linear:
            module.forward = partial(forward, module)
    return plain(problem, None)


def norm_of(gradient: Tensor) -> Tensor:
    """Of rows first: torch 2.13's float32 norm of a million numbers at once is off by 1e-5, and would be refused."""
    return gradient.norm(dim=-1).norm()


def norms_of(stats: Stats, tasks: int) -> dict[str, Tensor]:
    norms = {"example_norm": stats.example_norm, "task_norm": stats.task_norm if tasks > 1 else None}
    return {name: norm for name, norm in norms.items() if norm is not None}


def adamw(problem: Problem) -> torch.optim.Optimizer:
    return torch.optim.AdamW(problem.model.parameters(), lr=1e-4)


def clip(problem: Problem) -> ClipExamples:
    return ClipExamples(problem.median_norm)


def even_out(_: Problem) -> InverseNorm:
    return InverseNorm()


def even_out_projections(_: Problem) -> IMTLG:
    return IMTLG()


VARIANTS = {
    "plain": Variant(plain),
    "meter": Variant(metered, bounds=(1.05, 1.03, 1.05, 1.25, 1.05)),
    "meter_tasks": Variant(partial(metered, tasks=TASKS), bounds=(1.08, 1.06, 1.10, None, 1.10)),
    "same_step_examples": Variant(partial(reweighted, apply="same_step"), clip, (1.16, 1.28, 1.25, None, 1.20)),
    "same_step_tasks": Variant(
        partial(reweighted, apply="same_step", tasks=TASKS), even_out, (1.12, 1.12, 1.25, None, 1.30)
    ),
    "next_step_tasks": Variant(
        partial(reweighted, apply="next_step", tasks=TASKS), even_out, (1.08, 1.06, 1.10, None, 1.05)
    ),
    "two_passes_examples": Variant(partial(reweighted, passes=2), clip, (1.60, 1.60, 1.60, None, None)),
    "gram_tasks": Variant(
        partial(reweighted, tasks=TASKS, gram=True), even_out_projections, (1.15, None, None, None, None)
    ),
    "products_by_example": Variant(products_by_example),
    "two_backwards": Variant(two_backwards),
    "vmap_examples": Variant(per_example, clip),
    "backward_per_task": Variant(partial(per_task, forwards=1), even_out),
    "batch_per_task": Variant(partial(per_task, forwards=TASKS), even_out),
}
