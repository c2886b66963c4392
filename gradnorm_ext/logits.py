"""What the softmax says of every token, example and class, without a backward pass and without a copy of the logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gradnorm_ext import ops


@dataclass(frozen=True)
class TokenScores:
    """Figures of every token, shaped as the labels. Made by :func:`logit_scores`.

    Attributes:
        log_probability: log p[y], 0 for tokens without a label.
        w_score: ``‖p - onehot(y)‖²``: the squared norm of the gradient of log p[y] at the token's logits; 0 likewise.
        kept: bool: the token has a label.
    """

    log_probability: Tensor
    w_score: Tensor
    kept: Tensor

    @property
    def el2n(self) -> Tensor:
        """``‖p - onehot(y)‖``: the EL2N score (Paul et al., arXiv 2107.07075) of every token."""
        return self.w_score.sqrt()

    @property
    def example_w_score(self) -> Tensor:
        """``[B]``: the sum over the example's tokens, W.

        An example's ‖∇ log π‖ is at most sqrt(W) times the largest singular value of the logits' Jacobian (derived for
        this package), so ``RewardStats.signal(scores.example_el2n)`` ranks prompts without any gradient.
        """
        return self.w_score.flatten(1).sum(1) if self.w_score.dim() > 1 else self.w_score

    @property
    def example_el2n(self) -> Tensor:
        """``[B]``: sqrt(W), the norm of the gradient of the example's log-probability at all its logits.

        That of Paul et al. where an example has one label.
        """
        return self.example_w_score.sqrt()

    @property
    def example_log_probability(self) -> Tensor:
        """``[B]``: the mean over the example's tokens that have a label, as ``PairBalance("probability")`` is fed."""
        if self.kept.dim() == 1:
            return self.log_probability
        return self.log_probability.flatten(1).sum(1) / self.kept.flatten(1).sum(1)


def logit_scores(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> TokenScores:
    """How far every token's prediction is from its label, in one pass over the logits.

        log_probability = log p[y]        w_score = ‖p - onehot(y)‖² = 1 - 2 p[y] + Σ_v p[v]²        p = softmax(logits)

    No softmax is stored, and logits that are a slice (``logits[:, :-1]``) are not copied either.

    Args:
        logits: ``[B, vocabulary]`` or ``[B, T, vocabulary]``; float64, float32, float16 or bfloat16.
        labels: ``[B]`` or ``[B, T]`` int64: of each position's own prediction, so shift them for a language model.
        ignore_index: the label of tokens without one.

    Returns:
        :class:`TokenScores`, float32 (float64 for float64 logits). No gradient flows.

    Raises:
        ValueError, TypeError: shapes, dtypes or labels other than these.

    Example:
        >>> scores = logit_scores(torch.zeros(1, 2, 2), torch.tensor([[0, -100]]))
        >>> scores.w_score, scores.el2n, scores.example_w_score
        (tensor([[0.5000, 0.0000]]), tensor([[0.7071, 0.0000]]), tensor([0.5000]))
    """
    found = [
        ops.logit_scores(rows, of_rows, ignore_index=ignore_index)
        for rows, of_rows in _pieces("logit_scores", logits, labels)
    ]
    log_probability, w = (torch.cat(parts).view(labels.shape) for parts in zip(*found, strict=True))
    return TokenScores(log_probability, w, labels != ignore_index)


def logit_gradient_rates(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> ops.LogitRates:
    """How much cross-entropy pushes the logit of every class up and down, without a softmax being stored.

        up[v] = Σ_{y = v} (1 - p[v])        down[v] = Σ_{y ≠ v} p[v]        count[v] = #{y = v}

    summed over the tokens with a label: the rates that :class:`~gradnorm_ext.GSA` balances (Guo et al., CVPR 2023).

    Args:
        logits, labels, ignore_index: as of :func:`logit_scores`.

    Returns:
        ``LogitRates(count, up, down)``, ``[vocabulary]`` each: int64, and float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: as :func:`logit_scores`.

    Example:
        >>> logit_gradient_rates(torch.zeros(3, 2), torch.tensor([0, 0, 1])).up
        tensor([1.0000, 0.5000])
    """
    found = [
        ops.logit_gradient_rates(rows, of_rows, ignore_index=ignore_index)
        for rows, of_rows in _pieces("logit_gradient_rates", logits, labels)
    ]
    return ops.LogitRates(*(torch.stack(parts).sum(0) for parts in zip(*found, strict=True)))


def _pieces(who: str, logits: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and their labels: all at once, or example by example where that would copy the logits."""
    if logits.dim() not in (2, 3) or labels.shape != logits.shape[:-1] or len(logits) == 0:
        raise ValueError(
            f"{who}: logits must be [B, vocabulary] or [B, T, vocabulary] with B > 0 and labels the same without the last, "
            f"got {list(logits.shape)} and {list(labels.shape)}; give every position its label"
        )
    logits = logits.detach()
    if logits.dim() == 2:
        yield logits, labels
    elif logits.stride(0) == logits.shape[1] * logits.stride(1):
        yield logits.view(-1, logits.shape[2]), labels.reshape(-1)
    else:
        yield from zip(logits, labels, strict=True)
