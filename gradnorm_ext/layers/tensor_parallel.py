"""Layers that DTensor splits: each rank measures its own part by the rules of whole layers, on local tensors.

    column-wise    x whole, W and b in parts of the output        the parts' squared norms add up over the ranks
    row-wise       x and W in parts of the input, b whole         likewise; b as it is
    sequence       x in parts of the rows, w and b whole          examples' gradients are summed over the ranks first
    embedding      W in parts of the width or of the vocabulary   the parts' squared norms add up

The sums of squared norms are taken once, when the block closes (`Observation.norms`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradnorm_ext.layers.linears import linear_module
from gradnorm_ext.layers.normalizations import layer_norm_module
from gradnorm_ext.layers.observation import Observation
from gradnorm_ext.layers.taps import Tap


class _Parts:
    """A module's parameters on one mesh dimension, and how its input and output pass between it and the local rules."""

    def __init__(self, observation: Observation, module: nn.Module) -> None:
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        self.observation, self.module = observation, module
        self.dtensor, self.partial, self.replicate, self.shard = DTensor, Partial(), Replicate(), Shard
        self.mesh = module._parameters["weight"].device_mesh  # type: ignore[union-attr]
        if self.mesh.ndim != 1:
            raise self.refusal(f"a mesh of {self.mesh.ndim} dimensions")

    def refusal(self, got: str) -> RuntimeError:
        names = ", ".join(
            slot.name
            for name, p in self.module._parameters.items()
            if p is not None and (slot := self.observation.slot_of(self.module, name, p)) is not None
        )
        return RuntimeError(
            f"{self.observation.who}: a layer that is split among ranks must be a Linear split by columns or rows, an "
            f"Embedding, or a LayerNorm or RMSNorm of a sequence in parts, got {got} at {names} "
            f"({type(self.module).__name__}); use ColwiseParallel, RowwiseParallel or SequenceParallel, or freeze it"
        )

    def placement(self, tensor: Any) -> Any:
        if not isinstance(tensor, self.dtensor):
            raise self.refusal("an input that is no DTensor")
        return tensor.placements[0]

    def parameter(self, name: str, *, rows_apart: bool = False) -> Any:
        """The local part, as a tap where it is trainable."""
        parameter: Any = self.module._parameters.get(name)
        if parameter is None:
            return None
        placement = self.placement(parameter)
        local = parameter.to_local(grad_placements=[placement])
        slot = self.observation.slot_of(self.module, name, parameter) if parameter.requires_grad else None
        if slot is None:
            return local
        group = self.mesh.get_group()
        slot.split_over = group if placement.is_shard() else None
        slot.rows_over = group if rows_apart else None
        self.observation.check_split(slot)
        return Tap.of(self.observation, slot, local)

    def give(self, local: Tensor, placement: Any, size: int | None = None) -> Tensor:
        """The whole of which this is a part; ``size``: of the dimension that is split, in parts that may differ by one."""
        if size is None:
            given: Tensor = self.dtensor.from_local(local, self.mesh, [placement], run_check=False)
            return given
        shape = list(local.shape)
        shape[placement.dim] = size
        stride = torch.empty(shape, device="meta").stride()
        given = self.dtensor.from_local(
            local, self.mesh, [placement], run_check=False, shape=torch.Size(shape), stride=stride
        )
        return given


def _linear(parts: _Parts, x: Any) -> Tensor:
    of_x, of_weight = parts.placement(x), parts.placement(parts.module._parameters["weight"])
    last = parts.shard(x.dim() - 1)
    if of_weight == parts.shard(0) and of_x.is_replicate():
        local = x.to_local(grad_placements=[parts.partial])
        y = F.linear(local, parts.parameter("weight"), parts.parameter("bias"))
        return parts.give(y, last, parts.module.out_features)  # type: ignore[arg-type]
    if of_weight == parts.shard(1) and of_x == last:
        y = parts.give(F.linear(x.to_local(), parts.parameter("weight")), parts.partial)
        if parts.module._parameters.get("bias") is None:
            return y
        summed: Any = y.redistribute(placements=[parts.replicate])  # type: ignore[attr-defined]
        return parts.give(summed.to_local() + parts.parameter("bias"), parts.replicate)
    raise parts.refusal(f"input {of_x} and weight {of_weight}")


def _normalization(parts: _Parts, x: Any) -> Tensor:
    module: Any = parts.module
    of_x, of_weight = parts.placement(x), parts.placement(module._parameters["weight"])
    rows_apart = of_x.is_shard() and of_x.dim not in (x.dim() - 1, parts.observation.batch_dim)
    if not of_weight.is_replicate() or not (of_x.is_replicate() or rows_apart):
        raise parts.refusal(f"input {of_x} and weight {of_weight}")
    weight, shape = parts.parameter("weight", rows_apart=rows_apart), module.normalized_shape
    if isinstance(module, nn.LayerNorm):
        y = F.layer_norm(x.to_local(), shape, weight, parts.parameter("bias", rows_apart=rows_apart), module.eps)
    else:
        y = F.rms_norm(x.to_local(), shape, weight, module.eps)
    return parts.give(y, of_x, x.shape[of_x.dim] if of_x.is_shard() else None)


def _embedding(parts: _Parts, ids: Any) -> Tensor:
    module: Any = parts.module
    table = module._parameters["weight"]
    of_ids, of_weight = parts.placement(ids), parts.placement(table)
    if not of_ids.is_replicate() or not of_weight.is_shard() or module.padding_idx is not None:
        raise parts.refusal(f"ids {of_ids}, weight {of_weight} and padding_idx={module.padding_idx}")
    local, weight = ids.to_local(), parts.parameter("weight")
    if of_weight == parts.shard(1):
        return parts.give(F.embedding(local, weight), parts.shard(ids.dim()), table.shape[1])
    first = parts.mesh.get_local_rank() * -(-table.shape[0] // parts.mesh.size())  # DTensor's parts are torch.chunk's
    own = (local >= first) & (local < first + weight.shape[0])
    rows = F.embedding(torch.where(own, local - first, 0), weight)
    return parts.give(rows.masked_fill(~own.unsqueeze(-1), 0), parts.partial)


def _or_whole(
    split: Callable[[_Parts, Any], Tensor], whole: Callable[[Observation, Any, Any], Any] | None
) -> Callable[..., Any]:
    """A module's rule: that of split layers where its parameters are DTensors, else the one it has."""

    def forward(observation: Observation, module: nn.Module, input: Any, *rest: Any, **options: Any) -> Any:
        if "torch.distributed.tensor" in sys.modules and hasattr(module._parameters.get("weight"), "device_mesh"):
            return split(_Parts(observation, module), input, *rest, **options)
        return NotImplemented if whole is None else whole(observation, module, input, *rest, **options)

    return forward


Tap.modules[nn.Linear.forward] = _or_whole(_linear, linear_module)
Tap.modules[nn.LayerNorm.forward] = _or_whole(_normalization, layer_norm_module)
Tap.modules[nn.RMSNorm.forward] = _or_whole(_normalization, None)
Tap.modules[nn.Embedding.forward] = _or_whole(_embedding, None)
