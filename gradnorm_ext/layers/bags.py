"""Bags of embeddings: ``embedding_bag``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradnorm_ext.gradients import Lookup
from gradnorm_ext.layers.calls import Backward, Call, Observed, first_order, no_autocast
from gradnorm_ext.layers.taps import Tap
from gradnorm_ext.segments import Segments


class _EmbeddingBag(Observed):
    """``y[b] = Σ_{r in b} scale[r] W[ids[r]]``; ``ends [bags + 1]``: where the bags' rows begin."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        ids: Tensor,
        ends: Tensor,
        scale: Tensor | None,
        weight: Tensor,
        mode: str,
        padding_idx: int | None,
        probe: Tensor,
    ) -> Tensor:
        ctx.call, ctx.mode, ctx.padding_idx, ctx.vocabulary = call, mode, padding_idx, len(weight)
        ctx.save_for_backward(ids, ends, scale)
        options: dict[str, Any] = {"mode": mode, "padding_idx": padding_idx, "include_last_offset": True}
        return F.embedding_bag(ids, weight, ends, per_sample_weights=scale, **options)

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        ids, ends, scale = ctx.saved_tensors
        call: Call = ctx.call
        with no_autocast(g.device):
            run = Backward(ctx, call)

            def table_gradient() -> Lookup:
                lengths = ends.diff()
                each = torch.arange(len(lengths), device=ids.device)
                bag = torch.repeat_interleave(each, lengths, output_size=len(ids))
                rows = g[bag]
                if ctx.mode == "mean":
                    counted = torch.ones_like(ids) if ctx.padding_idx is None else (ids != ctx.padding_idx).long()
                    number = torch.zeros_like(lengths).index_add_(0, bag, counted).clamp(min=1)
                    rows = rows / number[bag, None].to(g.dtype)
                elif scale is not None:
                    rows = rows * scale[:, None]
                segments = Segments(ends[call.segments.offsets], None, call.segments.groups)
                return Lookup(ids, rows, ctx.vocabulary, ctx.padding_idx, segments, run.backend)

            dw, of_weight = run.deliver(0, 4, table_gradient)
        return None, None, None, None, dw, None, None, of_weight


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    if not isinstance(weight, Tap) or weight.looked_up is not None:
        return NotImplemented
    for option, given in (("max_norm", max_norm), ("scale_grad_by_freq", scale_grad_by_freq), ("sparse", sparse)):
        if given:
            raise weight.refusal(f"embedding_bag with {option}={given}")
    if mode not in ("sum", "mean"):
        raise weight.refusal(f"embedding_bag with mode={mode!r}")
    if per_sample_weights is not None and (mode != "sum" or per_sample_weights.requires_grad):
        raise weight.refusal("embedding_bag with per_sample_weights that are trained or not summed")
    if (input.dim() == 1) != (offsets is not None):
        return NotImplemented  # and torch says why not
    if offsets is None:
        ends = torch.arange(len(input) + 1, device=input.device) * input.shape[1]
    else:
        ends = offsets if include_last_offset else torch.cat([offsets, offsets.new_tensor([len(input)])])
    observation = weight.observation
    bags = input if offsets is None else offsets[: len(ends) - 1]
    layout = observation.layout(bags, bags.dim() - 1, weight.slot.name, "embedding_bag")
    if layout.kind != "leading":
        raise weight.refusal(f"embedding_bag of {len(bags)} bags, where there are {observation.examples} examples,")
    if padding_idx is not None and padding_idx < 0:
        padding_idx += len(weight)
    use = weight.use("embedding_bag", layout)
    ends = ends.long()
    ids, segments = input.reshape(-1).long(), Segments(ends[layout.segments.offsets], None, layout.segments.groups)
    use.lookup_ids, use.lookup_dim = (ids, segments), input.dim()
    call = Call(observation, layout, use)
    scale = None if per_sample_weights is None else per_sample_weights.reshape(-1)
    return _EmbeddingBag.apply(call, ids, ends, scale, use.operand, mode, padding_idx, *call.probes)
