"""A batch divided among ranks, and what autograd says of it one example at a time in one process."""

from __future__ import annotations

import torch
from oracle import Case, Transformer, group_norms, per_example_gradients, token_loss
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

RANKS = 2
CLOSE = 1e3 * torch.finfo(torch.float64).eps
EXAMPLES = 7
OF_RANK = (slice(0, 3), slice(3, 7))  # uneven
TASKS = torch.tensor([0, 1, 0, 1, 0, 1, 1])


def make_case(head: str = "own", examples: int = EXAMPLES) -> Case:
    random = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    x, y = (torch.randint(1, 13, (examples, 5), generator=random) for _ in range(2))
    return Case(Transformer(head), x, y, token_loss).to(torch.float64)


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp(model: nn.Module, reshard: bool = True, **options) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, reshard_after_forward=reshard, **options)
    return fully_shard(model, reshard_after_forward=reshard, **options)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """By the names that the parameters have in the model that was wrapped and compiled."""
    found = {name: whole(p.grad) for name, p in model.named_parameters() if p.requires_grad}
    return {name.removeprefix("module.").replace("_orig_mod.", ""): gradient for name, gradient in found.items()}


class Truth:
    """Each example's contribution to the averaged gradient, and what follows from it."""

    def __init__(self, case: Case, tasks: torch.Tensor = TASKS, ranks: int = RANKS) -> None:
        one_by_one = per_example_gradients(case)
        self.gradients = [{name: g / ranks for name, g in of.items()} for of in one_by_one]
        self.tasks = tasks
        self.example_norm = group_norms(self.gradients, torch.arange(len(self.gradients)), len(self.gradients))
        self.task_norm = group_norms(self.gradients, tasks, 2)

    def weighted(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            name: sum(w * of[name] for w, of in zip(weights, self.gradients, strict=True)) for name in self.gradients[0]
        }

    def estimates(self, of_rank=OF_RANK) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """task_sqnorm, task_sqnorm_unbiased and task_variance, by the sums over pairs and deviations that define them."""
        flat = torch.stack([torch.cat([g.flatten() for g in of.values()]) for of in self.gradients])
        found = []
        for k in range(2):
            squares = pairs = spread = free = 0.0
            n_pairs = 0
            for part in of_rank:
                units = flat[part][self.tasks[part] == k]
                products = units @ units.T
                squares += float(products.diagonal().sum())
                pairs += float(products.sum() - products.diagonal().sum())
                n_pairs += len(units) * (len(units) - 1)
                if len(units) > 1:
                    spread += float((units - units.mean(0)).square().sum())
                    free += len(units) - 1
            n = int((self.tasks == k).sum())
            unbiased = pairs / n_pairs if n_pairs else float("nan")
            found.append((squares + n * (n - 1) * unbiased, unbiased, spread / free if free else float("nan")))
        return tuple(torch.tensor(each, dtype=torch.float64) for each in zip(*found, strict=True))


def assert_gradients(model: nn.Module, expected: dict[str, torch.Tensor], close: float = CLOSE) -> None:
    size = max(float(g.abs().max()) for g in expected.values())
    for name, found in gradients_of(model).items():
        assert float((found - expected[name]).abs().max()) <= close * size, name


def assert_same_on_all_ranks(tensor: torch.Tensor) -> None:
    parts = [torch.empty_like(tensor) for _ in range(RANKS)]
    torch.distributed.all_gather(parts, tensor.contiguous())
    assert all(torch.equal(part, tensor) for part in parts)
