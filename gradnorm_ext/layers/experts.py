"""Experts of a mixture, as transformers has them: matrices in one parameter, ``[experts, out, in]``, each row with its own.

The rows are brought in an order of our own, by expert and then by example, so that whose each is stays known from the
router's choice on; a gradient's norm is then one of (expert, example) pairs, whose squares add up over experts. This
replaces the loop over experts (eager), the grouped and the batched product alike.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradnorm_ext.backends import find
from gradnorm_ext.gradients import ExpertRouting, GroupedOuter, PerSampleGrads
from gradnorm_ext.layers.calls import Backward, Call, first_order, no_autocast
from gradnorm_ext.layers.layouts import Layout
from gradnorm_ext.layers.observation import Observation
from gradnorm_ext.layers.taps import Tap


class _Experts(torch.autograd.Function):
    """``y[r] = W[e] x[r] + b[e]`` for the rows r of expert e; swapped: W is stored ``[experts, in, out]``."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        routing: ExpertRouting,
        dtype: torch.dtype,
        *probes: Tensor | None,
    ) -> Tensor:
        ctx.call, ctx.routing, ctx.x_dtype = call, routing, x.dtype
        x, weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, weight)
        y = _products(x, weight if call.swapped else weight.mT, routing)
        return y if bias is None else y + bias.to(dtype)[routing.expert]

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        call: Call = ctx.call
        routing: ExpertRouting = ctx.routing
        with no_autocast(g.device):
            run = Backward(ctx, call)
            g = g.contiguous()
            dx = None
            if ctx.needs_input_grad[1]:
                dx = _products(g, weight.mT if call.swapped else weight, routing).to(ctx.x_dtype)
                run.tag(dx)

            def weight_gradient() -> GroupedOuter:
                if call.swapped:
                    return GroupedOuter(g, x.detach(), routing, call.segments, run.backend, swapped=True)
                return GroupedOuter(x.detach(), g, routing, call.segments, run.backend)

            def bias_gradient() -> PerSampleGrads:
                sums = find("segment_sum", g.device.type, run.backend)(g, routing.segments)
                by_example = sums.view(routing.experts, call.segments.count, -1).transpose(0, 1)
                return PerSampleGrads(by_example, call.segments, run.backend)

            dw, of_weight = run.deliver(0, 2, weight_gradient)
            db, of_bias = run.deliver(1, 3, bias_gradient)
        return None, dx, dw, db, None, None, of_weight, of_bias


def _products(x: Tensor, matrices: Tensor, routing: ExpertRouting) -> Tensor:
    """``x[r] M[e]`` of matrices ``[experts, in, out]``."""
    aligned = all(size * x.element_size() % 16 == 0 for size in matrices.shape[1:])
    if x.dtype in (torch.float32, torch.bfloat16, torch.float16) and aligned and len(x):
        grouped: Tensor = F.grouped_mm(x, matrices, offs=routing.ends)
        return grouped
    parts = x.split(routing.ends.diff(prepend=routing.ends.new_zeros(1)).tolist())
    return torch.cat([rows @ matrix for rows, matrix in zip(parts, matrices.unbind(0), strict=True)])


_OPTIONS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_is_expert_parallel", "_apply_gate")


def experts_module(observation: Observation, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of any experts class of transformers 5, whatever ``experts_implementation`` says."""
    if kwargs or len(args) != 3 or not all(hasattr(module, option) for option in _OPTIONS):
        return NotImplemented
    hidden_states, top_k_index, top_k_weights = args
    options: Any = module
    slots = {name: observation.slots.get(id(p)) for name, p in module.named_parameters(recurse=False)}
    trained = [slot.name for slot in slots.values() if slot is not None]
    if not trained or type(hidden_states) is not Tensor or hidden_states.dim() != 2:
        return NotImplemented
    if options._is_expert_parallel:
        raise RuntimeError(
            f"{observation.who}: the experts of {trained[0]} must be on one device, got expert parallelism; turn it off, or "
            "freeze them"
        )
    layout = observation.layout(hidden_states, 1, trained[0], "experts")
    k, batch = top_k_index.shape[-1], layout.examples
    expert, owner = top_k_index.reshape(-1), layout.owners.repeat_interleave(k)
    order = (expert * batch.count + owner).argsort(stable=True)
    first: str = "gate_up_proj" if options.has_gate else "up_proj"
    routing = ExpertRouting.of(expert[order], owner[order], len(module._parameters[first]), batch.groups)  # type: ignore[arg-type]
    rows = Layout.of_owners(owner[order], batch)
    autocast = torch.is_autocast_enabled(hidden_states.device.type)
    eager = getattr(options.config, "_experts_implementation", None) == "eager"

    def linear(x: Tensor, name: str) -> Tensor:
        parameters = [module._parameters[name], module._parameters.get(f"{name}_bias")]
        uses = []
        for parameter, slot in zip(parameters, (slots[name], slots.get(f"{name}_bias")), strict=True):
            uses.append(None if slot is None else observation.use(slot, parameter, (), "experts", rows))  # type: ignore[arg-type]
        call = Call(observation, rows, *uses, swapped=bool(options.is_transposed))
        weight, bias = (p if u is None else u.operand for p, u in zip(parameters, uses, strict=True))
        assert weight is not None
        dtype = torch.get_autocast_dtype(x.device.type) if autocast and eager else weight.dtype
        y: Tensor = _Experts.apply(call, x, weight, bias, routing, dtype, *call.probes)
        return y

    h = linear(hidden_states[order // k], first)
    y = linear(options._apply_gate(h) if options.has_gate else options.act_fn(h), "down_proj")
    if options.has_post_expert_norm:
        y = options.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1)[order, None]
    of_token = y[torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))]
    return of_token.unflatten(0, (-1, k)).sum(1).to(hidden_states.dtype)


Tap.modules_with["_apply_gate"] = experts_module
