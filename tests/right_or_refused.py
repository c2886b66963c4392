"""Whether a model's norms and gradients are right or refused, in any mode, against autograd one example at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradnorm_ext import Meter, Reweighted

MODES = {
    "Meter": {},
    "next_step": {"apply": "next_step"},
    "same_step": {"apply": "same_step"},
    "passes": {"passes": 2},
    "by layer": {"scope": "layer"},
}
REWEIGHTED = tuple(MODES)[1:]
WEIGHTS = torch.tensor([0.5, 3.0], dtype=torch.float64)


def contributions(model: nn.Module, losses: Callable[[], Tensor]) -> list[list[Tensor]]:
    """What each example alone adds to ``.grad``, hooks and all."""
    found = []
    for i in range(len(losses())):
        model.zero_grad()
        losses()[i].backward()
        found.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained(model)])
    model.zero_grad()
    return found


def observer_of(model: nn.Module, mode: str, policy: Any, **options: Any) -> Meter | Reweighted:
    """A Meter, or an optimizer that reweights in one of its modes and takes steps of no length."""
    if mode == "Meter":
        return Meter(model, **options)
    return Reweighted(torch.optim.SGD(trained(model), 0.0), model, policy, **MODES[mode], **options)


def block(observer: Meter | Reweighted, losses: Callable[[], Tensor], **given: Any) -> None:
    """One observe block."""
    with observer.observe(**given):
        loss = losses().sum()
        if isinstance(observer, Reweighted) and observer.passes == 2:
            observer.backward(loss)
        else:
            loss.backward()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def refusal_of(
    model: nn.Module,
    losses: Callable[[], Tensor],
    mode: str = "Meter",
    on: str = "error",
    blocks: int = 2,
    narrow: torch.dtype = torch.float64,
    backend: str = "auto",
) -> str | None:
    """None if every figure and gradient of some blocks is right; the message if one is refused; else an AssertionError.

    ``narrow``: the narrowest dtype that the model computes in.
    """
    truth = contributions(model, losses)
    norms = torch.stack([torch.cat([g.flatten() for g in one]).norm() for one in truth])
    tasks = torch.tensor([i % 2 for i in range(len(truth))])
    policy = lambda stats: WEIGHTS.to(stats.task_norm)  # noqa: E731
    observer = observer_of(model, mode, policy, on_unsupported=on, tasks=2, backend=backend)
    for count in range(blocks):
        model.zero_grad()
        try:
            block(observer, losses, tasks=tasks)
        except (RuntimeError, ValueError) as error:
            assert str(error).startswith(("Meter: ", "Reweighted: ")), f"a foreign error: {error}"
            return str(error)
        plain = mode == "Meter" or (mode == "next_step" and count == 0)
        weights = [1.0 if plain else float(WEIGHTS[task]) for task in tasks]
        assert_close(observer.stats.example_norm, norms, "norms", narrow)
        for (name, p), *of_examples in zip(named(model), *truth, strict=True):
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            assert_close(
                gradient, sum(w * g for w, g in zip(weights, of_examples, strict=True)), f".grad of {name}", narrow
            )
        if isinstance(observer, Reweighted):
            observer.step()
    return None


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def assert_close(found: Tensor, expected: Tensor, what: str, narrow: torch.dtype) -> None:
    eps = max(torch.finfo(found.dtype).eps * 1e4, torch.finfo(narrow).eps * 8)
    error = (found.double() - expected.double()).norm()
    assert error <= eps * expected.double().norm(), f"{what}: {found} for {expected}"


def frozen(module: nn.Module, name: str) -> nn.Module:
    """A module one of whose parameters is not trained."""
    module.get_parameter(name).requires_grad_(False)
    return module


class Then(nn.Module):
    """A module, and what is done to its output."""

    def __init__(self, module: nn.Module, what: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.module, self.what = module, what

    def forward(self, x: Tensor) -> Tensor:
        return self.what(self.module(x))
