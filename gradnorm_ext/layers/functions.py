"""Custom autograd Functions that consume parameters: what runs in their place while a block is open.

``Function.apply`` looks past tensor subclasses, so a tap that is handed to it is not seen. Functions that are listed here
are asked first: where an argument is a tap, an *equivalent* made of functions that have rules runs instead. Classes are
found by name among the modules that are loaded; nothing is imported.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from gradnorm_ext.layers.heads import HeadScores, fused_head
from gradnorm_ext.layers.taps import Tap
from gradnorm_ext.reference import accumulator

Equivalent = Callable[..., Any]


def measure_as(function: type[Function], equivalent: Equivalent) -> None:
    """Say what an ``autograd.Function`` that takes trainable parameters computes, so that they can be measured.

    In observe blocks, ``equivalent(*arguments)`` runs in place of ``function.apply(*arguments)`` wherever an argument is a
    trainable parameter read through its module. Without this, the gradient of such a parameter is refused in the first
    block as one "from a use that was not seen".

    Args:
        function: the class.
        equivalent: a function of the same arguments and results, made of functions that have rules (docs/coverage.md):
            ``linear``, ``mul``, ``rms_norm``, :func:`fused_head`, ...

    Raises:
        TypeError: ``function`` is no subclass of ``torch.autograd.Function``.

    Example:
        >>> class Scaled(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x, weight):
        ...         ctx.save_for_backward(x, weight)
        ...         return x * weight
        ...     @staticmethod
        ...     def backward(ctx, g):
        ...         x, weight = ctx.saved_tensors
        ...         return g * weight, (g * x).sum(0)
        >>> measure_as(Scaled, lambda x, weight: x * weight)
    """
    if not (isinstance(function, type) and issubclass(function, Function)):
        raise TypeError(f"measure_as: function must be a class of torch.autograd.Function, got {function!r}; pass it")
    _EQUIVALENTS[f"{function.__module__}.{function.__qualname__}"] = equivalent


class Interception:
    """The listed Functions that are loaded, asked first from here on until `end`."""

    def __init__(self) -> None:
        self.classes: list[type[Function]] = []
        for name, equivalent in _EQUIVALENTS.items():
            module, _, own = name.rpartition(".")
            function = _find(module, own)
            if function is not None:
                _OPEN[function] = _OPEN.get(function, 0) + 1
                if _OPEN[function] == 1:
                    function.apply = staticmethod(functools.partial(_apply, function, equivalent))  # type: ignore[method-assign]
                self.classes.append(function)

    def end(self) -> None:
        for function in self.classes:
            _OPEN[function] -= 1
            if not _OPEN[function]:
                del _OPEN[function]
                del function.apply  # what is inherited is there again
        self.classes.clear()


def _find(module: str, name: str) -> type[Function] | None:
    found = sys.modules.get(module)
    return getattr(found, name, None)


def _apply(function: type[Function], equivalent: Equivalent, *args: Any, **kwargs: Any) -> Any:
    if torch.is_grad_enabled() and any(isinstance(arg, Tap) for arg in (*args, *kwargs.values())):
        return equivalent(*args, **kwargs)
    return super(function, function).apply(*args, **kwargs)  # type: ignore[misc]


def chunked_log_prob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
) -> tuple[Tensor | None, ...]:
    """TRL's: log-probabilities of targets, and of the others what ``outputs`` names."""
    scores = fused_head(
        *(hidden, weight, bias, targets),
        scale=logit_scale,
        softcap=final_logit_softcapping,
        temperature=temperature,
    )
    more = {
        "entropy": scores.entropy,
        "log_sum_sq_probs": scores.log_sum_sq_probs,
        "mean_logits": scores.mean_logit.detach(),
        "is_top1": scores.is_top1,
    }
    return scores.log_prob, *(value if name in outputs else None for name, value in more.items())


def fused_linear_cross_entropy(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    *backend: Any,
) -> tuple[Tensor | None, ...]:
    """Liger's: the loss, its part from the partition function, and the share of tokens whose prediction is right."""
    for option, given in (("ce_weight", ce_weight is not None), ("return_predicted_tokens", return_predicted_tokens)):
        if given:
            tap = next(arg for arg in (weight, bias, _input) if isinstance(arg, Tap))
            raise tap.refusal(f"LigerFusedLinearCrossEntropyFunction with {option}")
    kept = target != ignore_index
    scores: HeadScores = fused_head(_input, weight, bias, target.where(kept, 0), softcap=softcap)
    of_z = lse_square_scale * scores.log_partition.square()
    smooth = label_smoothing * (scores.log_partition - scores.mean_logit)
    loss = -(1 - label_smoothing) * scores.log_prob + smooth + of_z
    if use_token_scaling:
        scale = scores.log_prob.detach().exp()
        loss, of_z = loss * scale, of_z * scale

    def reduced(rows: Tensor) -> Tensor:
        rows = rows.masked_fill(~kept, 0)
        if reduction == "none":
            return rows
        return rows.sum() / kept.sum() if reduction == "mean" else rows.sum()

    right = (scores.is_top1 & kept).float()
    accuracy = right if reduction == "none" else right.sum() / kept.sum()
    return (
        reduced(loss),
        reduced(of_z).detach() if return_z_loss else None,
        accuracy if return_token_accuracy else None,
        None,
    )


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float = 0.0,
    casting_mode: str = "llama",
    in_place: bool = True,
    row_mode: bool | None = None,
) -> Tensor:
    """Liger's: normalised in float32 and scaled in x's dtype (llama), all in float32 (gemma), all in x's dtype (none)."""
    wide = x if casting_mode == "none" else x.to(accumulator(x.dtype))
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if casting_mode == "llama":
        normalised = normalised.to(x.dtype)
    scaled: Tensor = normalised * (weight + offset)
    return scaled.to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Liger's."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def float8_matmul(x: Tensor, weight: Tensor, products: Any, config: Any) -> Tensor:
    """torchao's, ``x @ weight``: computed in float8, differentiated in the precision of its inputs.

    Its own backward rounds gradients to float8 by a scale that all examples share, which no example's norm is of.
    """
    function = sys.modules["torchao.float8.float8_linear"].matmul_with_hp_or_float8_args
    with torch.no_grad():
        value: Tensor = function.apply(x.detach(), weight.detach(), products, config)
    wide = x @ weight
    return value + (wide - wide.detach())


_EQUIVALENTS: dict[str, Equivalent] = {
    "trl.kernels.chunked_logprob.ChunkedLogProbFunction": chunked_log_prob,
    "liger_kernel.ops.fused_linear_cross_entropy.LigerFusedLinearCrossEntropyFunction": fused_linear_cross_entropy,
    "liger_kernel.ops.rms_norm.LigerRMSNormFunction": rms_norm,
    "liger_kernel.ops.layer_norm.LigerLayerNormFunction": layer_norm,
    "torchao.float8.float8_linear.matmul_with_hp_or_float8_args": float8_matmul,
}
_OPEN: dict[type[Function], int] = {}  # in how many open blocks each is asked first
