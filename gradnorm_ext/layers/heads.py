"""Heads whose logits are never stored: the log-probabilities of targets, and what else losses need, vocabulary by parts.

Norms of the head's weight are those of an outer product whose one side, the gradient of the logits, is formed again for
some columns of the vocabulary at a time. Rows of the weight that different columns own share nothing, so squared norms
and inner products of the parts add up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gradnorm_ext.gradients import ChunkedOuter
from gradnorm_ext.layers.calls import Backward, Call, first_order, no_autocast, tapped_call
from gradnorm_ext.layers.layouts import Layout
from gradnorm_ext.layers.taps import Tap
from gradnorm_ext.reference import accumulator

_HELD = 1 << 24  # logits held at once


class HeadScores(NamedTuple):
    """What :func:`fused_head` returns: one entry per row, float32 (float64 for float64 rows).

    Attributes:
        log_prob: of the target; differentiable, as are the next three.
        log_partition: ``log Σ_v exp z[v]``.
        entropy: ``-Σ_v p[v] log p[v]``.
        mean_logit: ``Σ_v z[v] / V``.
        log_sum_sq_probs: ``log Σ_v p[v]²``, without gradient.
        is_top1: whether no logit is larger than the target's, nor as large and earlier.
    """

    log_prob: Tensor
    log_partition: Tensor
    entropy: Tensor
    mean_logit: Tensor
    log_sum_sq_probs: Tensor
    is_top1: Tensor


@dataclass(frozen=True)
class _Transform:
    """From products to logits: ``z = softcap tanh(y scale / softcap) / temperature``, without tanh where there is no cap."""

    scale: float
    softcap: float | None
    temperature: float

    def __call__(self, y: Tensor) -> Tensor:
        z = y * self.scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z / self.temperature

    def slope(self, z: Tensor) -> Tensor | float:
        """``dz/dy`` where the logits are z."""
        if self.softcap is None:
            return self.scale / self.temperature
        return (1 - (z * self.temperature / self.softcap).square()) * (self.scale / self.temperature)


def fused_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> HeadScores:
    """A language model's head and what losses make of its logits, without ``[rows, vocabulary]`` being stored.

        z = softcap tanh(scale (hidden Wᵀ + b) / softcap) / temperature        log_prob = z[target] - log Σ_v exp z[v]

    Inside an observe block, weight and bias read from their module are measured as a ``Linear``'s are. With it, a loss on
    log-probabilities that is fused with the head in training code of one's own, or an ``autograd.Function`` of that kind
    (:func:`measure_as`), becomes one that can be measured.

    Args:
        hidden: ``[rows, width]``: the last hidden states, as they are, sliced, or selected by an index or a mask.
        weight, bias: ``[vocabulary, width]`` and ``[vocabulary]`` or None.
        targets: ``[rows]`` int64, in ``[0, vocabulary)``.
        scale, softcap, temperature: as above; no cap by default.

    Returns:
        :class:`HeadScores`.

    Raises:
        ValueError: shapes that do not fit each other.

    Example:
        >>> head = torch.nn.Linear(2, 3, bias=False)
        >>> _ = head.weight.data.zero_()
        >>> fused_head(torch.ones(1, 2), head.weight, None, torch.tensor([1])).log_prob.exp()
        tensor([0.3333], grad_fn=...)
    """
    if (
        hidden.dim() != 2
        or weight.dim() != 2
        or hidden.shape[1] != weight.shape[1]
        or targets.shape != hidden.shape[:1]
    ):
        raise ValueError(
            "fused_head: hidden must be [rows, width], weight [vocabulary, width] and targets [rows], got "
            f"{list(hidden.shape)}, {list(weight.shape)} and {list(targets.shape)}; flatten the rows"
        )
    tapped = isinstance(weight, Tap) or isinstance(bias, Tap)
    with torch._C.DisableTorchFunctionSubclass():
        call = None
        if tapped:
            call, weight, bias = tapped_call(hidden, weight, bias, "fused_head")
        autocast = torch.is_autocast_enabled(hidden.device.type)
        dtype = torch.get_autocast_dtype(hidden.device.type) if autocast else hidden.dtype
        transform = _Transform(scale, softcap, temperature)
        probes = call.probes if call is not None else (None, None)
        found = _FusedHead.apply(call, hidden, weight, bias, targets, transform, dtype, *probes)
    return HeadScores(*found)


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: Call | None,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: _Transform,
        dtype: torch.dtype,
        *probes: Tensor | None,
    ) -> tuple[Tensor, ...]:
        x, wide = hidden.detach().to(dtype), accumulator(dtype)
        rows, vocabulary = len(x), len(weight)
        with no_autocast(x.device):
            largest = x.new_full((rows,), -torch.inf, dtype=wide)
            sums, weighted, squares, total, before = (x.new_zeros(rows, dtype=wide) for _ in range(5))
            before = before.fill_(-torch.inf)
            of_target = x.new_zeros(rows, dtype=wide)
            for part in _parts(rows, vocabulary):
                z = _logits(x, weight, bias, part, transform)
                new = torch.maximum(largest, z.max(1).values)
                shrink = torch.exp(largest - new)
                e = torch.exp(z - new[:, None])
                sums = sums * shrink + e.sum(1)
                weighted = weighted * shrink + (e * z).sum(1)
                squares = squares * shrink.square() + e.square().sum(1)
                total += z.sum(1)
                largest = new
                column = torch.arange(part.start, part.stop, device=x.device)
                of_target += torch.where(column == targets[:, None], z, 0).sum(1)
                earlier = torch.where(column < targets[:, None], z, -torch.inf)
                before = torch.maximum(before, earlier.max(1).values)
            log_partition = largest + torch.log(sums)
            entropy = log_partition - weighted / sums
            log_sum_sq = torch.log(squares) - 2 * torch.log(sums)
        top = (of_target >= largest) & (of_target > before)
        ctx.call, ctx.transform, ctx.dtype = call, transform, dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, targets, log_partition, entropy)
        ctx.mark_non_differentiable(log_sum_sq, top)
        return of_target - log_partition, log_partition, entropy, total / vocabulary, log_sum_sq, top

    @staticmethod
    @first_order
    def backward(ctx: Any, *g: Tensor | None) -> tuple[Any, ...]:
        hidden, weight, bias, targets, log_partition, entropy = ctx.saved_tensors
        call: Call | None = ctx.call
        with no_autocast(hidden.device):
            rows = _LogitGradients(
                *(hidden.detach().to(ctx.dtype), weight.detach(), None if bias is None else bias.detach(), targets),
                *(log_partition, entropy, g[:4], ctx.transform),
            )
            dx = dw = db = of_weight = of_bias = None
            if ctx.needs_input_grad[1]:
                wide = hidden.new_zeros(hidden.shape, dtype=accumulator(ctx.dtype))
                for part, of_part in rows.parts():
                    wide += of_part @ weight[part].to(ctx.dtype)
                dx = wide.to(hidden.dtype)
            if call is None:
                if ctx.needs_input_grad[2]:
                    dw = torch.cat([of_part.t() @ rows.x for _, of_part in rows.parts()]).to(weight.dtype)
                if ctx.needs_input_grad[3]:
                    db = torch.cat([of_part.sum(0) for _, of_part in rows.parts()]).to(weight.dtype)
            else:
                run = Backward(ctx, call)
                if dx is not None:
                    run.tag(dx)
                ordered = rows.by_example(call.layout)
                head = ChunkedOuter(ordered.x, ordered, len(weight), call.segments, run.backend)
                dw, of_weight = run.deliver(0, 2, lambda: head)
                db, of_bias = run.deliver(1, 3, head.bias_grads)
        return None, dx, dw, db, None, None, None, of_weight, of_bias


def _parts(rows: int, vocabulary: int) -> Iterator[slice]:
    columns = max(1, _HELD // max(1, rows))
    for first in range(0, vocabulary, columns):
        yield slice(first, min(first + columns, vocabulary))


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, which: slice | Tensor, transform: _Transform) -> Tensor:
    """Of some columns of the vocabulary, in the dtype that sums are formed in."""
    y = F.linear(x, weight[which].to(x.dtype), None if bias is None else bias[which].to(x.dtype))
    return transform(y.to(accumulator(x.dtype)))


@dataclass(frozen=True)
class _LogitGradients:
    """The gradient of the loss at the products of a head, formed for some columns of the vocabulary at a time."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    log_partition: Tensor
    entropy: Tensor
    g: tuple[Tensor | None, ...]  # of log_prob, log_partition, entropy and mean_logit
    transform: _Transform

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        for part in _parts(len(self.x), len(self.weight)):
            yield part, self._of(part, torch.arange(part.start, part.stop, device=self.x.device))

    def columns(self, ids: Tensor) -> Tensor:
        """``[rows, ids]``."""
        return self._of(ids, ids)

    def _of(self, which: slice | Tensor, ids: Tensor) -> Tensor:
        z = _logits(self.x, self.weight, self.bias, which, self.transform)
        log_p = z - self.log_partition[:, None]
        p, gradient = log_p.exp(), torch.zeros_like(z)
        of_log_prob, of_partition, of_entropy, of_mean = self.g
        if of_log_prob is not None:
            gradient += of_log_prob[:, None] * ((ids == self.targets[:, None]).to(z.dtype) - p)
        if of_partition is not None:
            gradient += of_partition[:, None] * p
        if of_entropy is not None:
            gradient -= of_entropy[:, None] * p * (log_p + self.entropy[:, None])
        if of_mean is not None:
            gradient += of_mean[:, None] / len(self.weight)
        return (gradient * self.transform.slope(z)).to(self.x.dtype)

    def by_example(self, layout: Layout) -> _LogitGradients:
        """The same rows, example by example."""
        g = tuple(None if one is None else layout.ids_of(one) for one in self.g)
        x, targets, partition = layout.rows_of(self.x), layout.ids_of(self.targets), layout.ids_of(self.log_partition)
        entropy = layout.ids_of(self.entropy)
        return _LogitGradients(x, self.weight, self.bias, targets, partition, entropy, g, self.transform)

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        return self.x, self.weight, *([] if self.bias is None else [self.bias])
