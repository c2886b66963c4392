"""Policies by how the tasks' gradients lie to each other: functions of their K x K Gram matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from gradnorm_ext.policies.policy import task_gram_of

if TYPE_CHECKING:
    from gradnorm_ext.stats import Stats


@dataclass(frozen=True)
class IMTLG:
    """The step's projections onto the tasks' gradients are equal: ``[K]`` weights of mean 1, some perhaps negative.

        v = G⁺ d,    w_k = v_k / mean_j v_j        d = sqrt(diag G),  G⁺ the pseudo-inverse

    IMTL-G of Towards Impartial Multi-task Learning (Liu et al., ICLR 2021), whose weights add up to 1 where these add up
    to the number of tasks; with the pseudo-inverse as in TorchJD, so that gradients may depend on each other. The mean
    is over the tasks that are present; the others get 1, and so do all where the v_j add up to nothing (gradients that
    cancel). Scaling all gradients changes nothing. The factorisation waits for a GPU.

    Raises:
        ValueError: when called, statistics without G.

    Example:
        >>> from types import SimpleNamespace
        >>> IMTLG()(SimpleNamespace(task_gram=torch.tensor([[4., 0.], [0., 1.]]), task_count=torch.tensor([2, 2])))
        tensor([0.6667, 1.3333])
    """

    weighs: ClassVar[Literal["tasks", "examples"]] = "tasks"

    def __call__(self, stats: Stats) -> Tensor:
        gram = task_gram_of("IMTLG", stats)
        present = _present(gram, stats)
        both = present & present[:, None]
        normalised = torch.where(both, gram, 0).double()
        normalised = normalised / normalised.trace()
        normalised = torch.where(present.any(), normalised, 0)
        v = torch.linalg.pinv(normalised, hermitian=True) @ normalised.diagonal().clamp(min=0).sqrt()
        total = v.sum()
        solved = total.abs() > torch.finfo(v.dtype).eps * len(v) * v.abs().sum()
        return torch.where(present & solved, v * (present.sum() / total), 1).to(gram.dtype)


@dataclass(frozen=True)
class Gramian:
    """The weights of any function of the tasks' Gram matrix: ``[K]``, times ``scale``.

        w = scale · weighting(G / trace G)

    Any ``Weighting`` of TorchJD that takes a Gramian will do: MGDA, PCGrad, CAGrad, Nash-MTL, Aligned-MTL, UPGrad,
    FairGrad. G is divided by its trace first: TorchJD takes one with a trace below 1e-4, as language models have, for no
    gradient at all. Tasks that are absent are left out of the matrix and get 1. Where no task is present, or G is not
    finite, all get 1.

    Most of TorchJD's weights add up to about 1: with MGDA, UPGrad or Aligned-MTL, ``scale=K`` makes them comparable to
    the plain step, whose weights add up to K. Which tasks are present is read back, so this waits for a GPU, as TorchJD's
    solvers do.

    Args:
        weighting: from ``[k, k]``, symmetric and positive semi-definite of trace 1 (k tasks are present), to ``[k]``.
        scale: a number or whatever multiplies the weights.

    Raises:
        ValueError: when called, statistics without G, or weights of another shape.
        TypeError: weighting cannot be called.

    Example:
        >>> from types import SimpleNamespace
        >>> stats = SimpleNamespace(task_gram=torch.tensor([[4., 0.], [0., 1.]]), task_count=torch.tensor([2, 2]))
        >>> Gramian(lambda gram: 1 / gram.diagonal(), scale=0.2)(stats)
        tensor([0.2500, 1.0000])
    """

    weighting: Callable[[Tensor], Tensor]
    scale: float = 1.0
    weighs: ClassVar[Literal["tasks", "examples"]] = "tasks"

    def __post_init__(self) -> None:
        if not callable(self.weighting) or isinstance(self.weighting, type):
            raise TypeError(
                f"Gramian: weighting must be a function of a Gram matrix, got {self.weighting!r}; "
                "pass an object, such as torchjd.aggregation.UPGradWeighting()"
            )

    def __call__(self, stats: Stats) -> Tensor:
        gram = task_gram_of("Gramian", stats)
        weights = torch.ones_like(gram[0])
        present = _present(gram, stats).nonzero()[:, 0]
        if len(present) == 0 or not bool(gram.isfinite().all()):
            return weights
        among = gram[present][:, present]
        among = (among + among.t()) / 2  # as it is but for rounding, which may differ between an entry and its mirror
        found = torch.as_tensor(self.weighting(among / among.trace()))
        if found.shape != present.shape:
            raise ValueError(
                f"Gramian: weighting must return {list(present.shape)}, one weight per task that is present, got "
                f"{list(found.shape)} from {self.weighting!r}; make it a function of a matrix of any size"
            )
        weights[present] = self.scale * found.detach().to(weights)
        return weights


def _present(gram: Tensor, stats: Stats) -> Tensor:
    norm = gram.diagonal()
    return (norm > 0) & norm.isfinite() & (stats.task_count > 0)
