"""Whether a model's norms and gradients are right or refused, in any mode, against autograd one example at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gradnorm_ext import Meter, Reweighted

MODES = ("Meter", "next_step", "same_step", "passes", "by layer")
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
    options = {"on_unsupported": on, "tasks": 2, "backend": backend}
    if mode == "Meter":
        meter = observer = Meter(model, **options)
    else:
        given = {"next_step": {"apply": "next_step"}, "passes": {"passes": 2}, "by layer": {"scope": "layer"}}.get(
            mode, {}
        )
        optimizer = torch.optim.SGD(trained(model), 0.0)
        observer = meter = Reweighted(optimizer, model, lambda stats: WEIGHTS.to(stats.task_norm), **given, **options)
    for block in range(blocks):
        model.zero_grad()
        try:
            with observer.observe(tasks=tasks):
                loss = losses().sum()
                observer.backward(loss) if mode == "passes" else loss.backward()
        except (RuntimeError, ValueError) as error:
            assert str(error).startswith(("Meter: ", "Reweighted: ")), f"a foreign error: {error}"
            return str(error)
        plain = mode == "Meter" or (mode == "next_step" and block == 0)
        weights = [1.0 if plain else float(WEIGHTS[task]) for task in tasks]
        assert_close(meter.stats.example_norm, norms, "norms", narrow)
        for (name, p), *of_examples in zip(named(model), *truth, strict=True):
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            assert_close(
                gradient, sum(w * g for w, g in zip(weights, of_examples, strict=True)), f".grad of {name}", narrow
            )
        if mode != "Meter":
            meter.step()
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
