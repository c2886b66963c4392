"""Multi-head attention: torch's own body, in which the matrix products go to their rule."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradnorm_ext.layers.elementwise import given_to_batch
from gradnorm_ext.layers.layouts import Layout
from gradnorm_ext.layers.linears import multiply_rows
from gradnorm_ext.layers.taps import Tap


def multi_head_attention_forward(query: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The whole function comes here at once; it is run again with taps for parameters and products of our own.

    Its inputs are ``[T, B, E]`` by contract, whatever the model is, and so is what it multiplies: nothing is inferred
    from sizes. Where the second dimension is not the examples (frames of videos), the rows are taken for flat ones, with
    that dimension in front.
    """
    taps = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tap)]
    if isinstance(query, Tap) or any(tap.looked_up for tap in taps):
        return NotImplemented
    batch = taps[0].observation.batch
    assert batch is not None
    attended = query.shape[1] if query.dim() == 3 else 1
    is_known = query.dim() == 3 and attended == batch.count and batch.packing is None

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not (isinstance(weight, Tap) or isinstance(bias, Tap)):
            return F.linear(x, weight, bias)
        rows = x if x.dim() == 3 else x.unflatten(0, (len(x) // max(1, attended), attended))
        if is_known:
            layout = Layout("second", tuple(rows.shape[:2]), batch, anchored=True)
            with torch._C.DisableTorchFunctionSubclass():
                y: Tensor = multiply_rows(rows, weight, bias, "linear", layout=layout)
        else:
            flat = F.linear(rows.transpose(0, 1).flatten(0, 1), weight, bias)
            y = flat.unflatten(0, (attended, len(rows))).transpose(0, 1).contiguous()
        return y.view(*x.shape[:-1], y.shape[-1])

    projections = {name: _with(getattr(F, name), linear=linear) for name in ("_in_projection_packed", "_in_projection")}
    body = _with(
        F.multi_head_attention_forward, linear=linear, has_torch_function=lambda arguments: False, **projections
    )
    with torch._C._EnableTorchFunction():
        return body(query, *args, **kwargs)


def _with(function: Any, **replaced: Any) -> Callable[..., Any]:
    """The same function, with other functions behind some of the names that it calls."""
    scope = {**function.__globals__, **replaced}
    return types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__)


def scaled_dot_product_attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **options: Any
) -> Any:
    """With a bias per pair of positions."""
    batched = isinstance(attn_mask, Tap) and query.shape[0] == attn_mask.observation.examples
    mask = given_to_batch(attn_mask) if batched else NotImplemented
    if mask is NotImplemented or any(isinstance(one, Tap) for one in (query, key, value)):
        return NotImplemented
    return F.scaled_dot_product_attention(query, key, value, mask, *args, **options)
