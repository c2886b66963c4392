"""Embeddings: rows of a table, one for each id; or, for ids that all examples share, rows to be measured later."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradnorm_ext.gradients import Lookup
from gradnorm_ext.layers.calls import Backward, Call, Observed, first_order, no_autocast
from gradnorm_ext.layers.observation import Observation
from gradnorm_ext.layers.taps import Tap


class _Embedding(Observed):
    """``y[r] = W[ids[r]]``."""

    @staticmethod
    def forward(ctx: Any, call: Call, ids: Tensor, weight: Tensor, padding_idx: int | None, probe: Tensor) -> Tensor:
        ctx.call, ctx.padding_idx, ctx.vocabulary = call, padding_idx, len(weight)
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight)

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        (ids,) = ctx.saved_tensors
        call: Call = ctx.call
        with no_autocast(g.device):
            run = Backward(ctx, call)
            rows = call.layout.ids_of(ids), call.layout.rows_of(g)
            dw, of_weight = run.deliver(
                0, 2, lambda: Lookup(*rows, ctx.vocabulary, ctx.padding_idx, call.segments, run.backend)
            )
        return None, None, dw, None, of_weight


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if not isinstance(weight, Tap) or weight.looked_up is not None or weight.dim() != 2:
        return NotImplemented
    for option, given in (("max_norm", max_norm), ("scale_grad_by_freq", scale_grad_by_freq), ("sparse", sparse)):
        if given:
            raise weight.refusal(f"embedding with {option}={given}")
    if padding_idx is not None and padding_idx < 0:
        padding_idx += len(weight)
    observation = weight.observation
    shared = _is_shared(observation, weight, input)
    layout = None if shared else observation.layout(input, 0, weight.slot.name, "embedding")
    if input.dtype != torch.int64:
        input = input.long()
    if layout is None:
        return weight.looked_up_rows(F.embedding(input, weight.value, padding_idx), input, padding_idx)
    use = weight.use("embedding", layout)
    input = observation.look_up(use, input)
    call = Call(observation, layout, use)
    return _Embedding.apply(call, input, use.operand, padding_idx, *call.probes)


def _is_shared(observation: Observation, weight: Tap, ids: Tensor) -> bool:
    """Whether looked-up ids have no batch dimension (`Observation`, hypothesis 3)."""
    batch = observation.batch
    assert batch is not None
    if (weight.slot.name, ids.dim()) in observation.memory.shared_lookups:
        return True
    if batch.count <= 1 or not ids.numel():
        return False
    if batch.told((ids.numel(),)):
        return False
    if observation.is_input(ids) and batch.kind_of(ids.shape, observation.sources.rows_per_example) is not None:
        return False
    return ids.dim() <= batch.batch_dim or ids.shape[batch.batch_dim] != batch.count
