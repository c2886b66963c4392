"""A policy for class-incremental classification: by what every class's logit has been pushed up and down so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from gradnorm_ext import ops
from gradnorm_ext.policies.policy import Stateful, check_number

if TYPE_CHECKING:
    from gradnorm_ext.stats import Stats


@dataclass(frozen=True)
class GSA(Stateful):
    """Examples of classes that were pushed down more than up count more: ``[B]`` weights in (0, 2).

        ratio_j = up_j / down_j,    w_i = 2 / (1 + exp(offset - ratio_{y_i}))

    ``up_j`` adds up ``1 - p_j`` over the examples of class j that came so far, ``down_j`` adds up p_j over all others
    (:func:`~gradnorm_ext.logit_gradient_rates`): how much the gradients at class j's logit pushed it up and down. With
    the defaults these are the weights of the code released with GSA (Guo et al.,
    CVPR 2023, gydpku/GSA); its loss doubles the weighted cross-entropy and adds another of the new classes alone, which
    is left to the caller. ``decay`` is an addition of this package. The softmax is fed inside the observe block:

        with optimizer.observe():
            logits = model(x)
            policy.feed(logits, labels)
            cross_entropy(logits, labels).backward()

    Args:
        classes: the number of classes, with those to come.
        decay: what is kept of the sums from step to step, in (0, 1]; 1 (the default) accumulates.
        offset: the ratio at which the weight is 1.
        warm_up: for how many steps after :meth:`begin_task` the ratios are taken for ``offset``.

    Raises:
        ValueError: another number of classes, decay or warm-up; when fed, shapes that do not fit; when called, labels
            of another number of examples.
        RuntimeError: nothing was fed since the last call.

    Example:
        >>> from types import SimpleNamespace
        >>> policy = GSA(classes=2, warm_up=0)
        >>> policy.feed(torch.tensor([[0., 0.], [0., 0.], [0., 0.]]), torch.tensor([0, 0, 1]))
        >>> policy(SimpleNamespace(example_norm=torch.ones(3), finite=torch.tensor(True)))
        tensor([1.4621, 1.4621, 0.7551])
    """

    classes: int
    decay: float = 1.0
    offset: float = 1.0
    warm_up: int = 5
    weighs: ClassVar[Literal["tasks", "examples"]] = "examples"

    def __post_init__(self) -> None:
        if not isinstance(self.classes, int) or self.classes < 1:
            raise ValueError(f"GSA: classes must be an integer >= 1, got {self.classes!r}; count those to come as well")
        if not 0 < self.decay <= 1:
            raise ValueError(f"GSA: decay must lie in (0, 1], got {self.decay!r}; 1 accumulates")
        check_number("GSA", "warm_up", self.warm_up, advice="0 trusts the first step's ratios")

    def feed(self, logits: Tensor, labels: Tensor) -> None:
        """Logits ``[B, classes]`` and labels ``[B]`` (-100: no label) of the block under way."""
        if logits.shape != (len(labels), self.classes) or labels.dim() != 1:
            raise ValueError(
                f"GSA: logits must be [B, {self.classes}] and labels [B], got {list(logits.shape)} and "
                f"{list(labels.shape)}; make the policy with the classes that the model has"
            )
        rates = ops.logit_gradient_rates(logits.detach(), labels)
        self.state.fed = (labels, torch.stack([rates.up, rates.down]).double())

    def begin_task(self) -> None:
        """New classes come: the ratios are not used for the next ``warm_up`` steps."""
        self.state.tensors.pop("steps", None)

    def __call__(self, stats: Stats) -> Tensor:
        labels, rates = self.state.take("GSA", "feed(logits, labels)")
        if labels.shape != stats.example_norm.shape:
            raise ValueError(
                f"GSA: labels must be {list(stats.example_norm.shape)}, one per example, got {list(labels.shape)}; "
                "feed the logits of the whole block"
            )
        sums = self.state.get("GSA", "sums", torch.zeros_like(rates))
        steps = self.state.get("GSA", "steps", rates.new_zeros(()))
        sums = self.decay * sums + rates
        ratio = (sums[0] / sums[1])[labels.clamp(min=0)]
        used = (labels >= 0) & (steps >= self.warm_up) & ~ratio.isnan()
        self.state.update(stats.finite, sums=sums, steps=steps + 1)
        return torch.where(used, 2 * torch.sigmoid(ratio - self.offset), 1).to(stats.example_norm)
