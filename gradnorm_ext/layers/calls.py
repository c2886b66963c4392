"""What every rule shares: the call that consumes parameters, one run of its backward, and sums of its rows.

A rule's autograd.Function gets a `Call` first and the probe rows last. Its backward makes a `Backward`, computes ``dx``
and shows it to `Backward.tag`, and hands `Backward.deliver` what the use adds to the parameter's gradient.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge

from gradnorm_ext.backends import find
from gradnorm_ext.gradients import GradientTerm, PerSampleGrads
from gradnorm_ext.layers.layouts import Layout
from gradnorm_ext.layers.observation import Observation, Use
from gradnorm_ext.layers.taps import Tap
from gradnorm_ext.reference import accumulator
from gradnorm_ext.segments import Segments


class Input(NamedTuple):
    """A tensor that a function was given, as far as its gradient has to be like it."""

    shape: Sequence[int]
    dtype: torch.dtype
    device: torch.device
    is_parameter: bool


class Call:
    """What a function's backward has to know: the uses it feeds, in the order of their probe rows."""

    def __init__(self, observation: Observation, layout: Layout, *uses: Use | None, swapped: bool = False) -> None:
        self.observation, self.layout, self.uses, self.swapped = observation, layout, uses, swapped
        self.inputs: list[Input | None] = []  # of the function, in a compiler's trace

    @property
    def segments(self) -> Segments:
        return self.layout.segments

    @property
    def measures(self) -> bool:
        """Whether the backward that is running is for the parameters: not so that of ``torch.autograd.grad(y, x)``."""
        node = self.observation.probe_node
        return node is not None and bool(torch._C._will_engine_execute_node(node))

    @property
    def probes(self) -> list[Tensor | None]:
        return [None if use is None else self.observation.probe_rows[use.slot.index] for use in self.uses]


def tapped_call(
    x: Tensor,
    weight: Any,
    bias: Any,
    function: str,
    features: int = 1,
    *,
    layout: Layout | None = None,
    swapped: bool = False,
) -> tuple[Call, Any, Any]:
    """The call of a function of a weight and a bias, at least one of them a tap, and what it computes with.

    ``features``: how many of x's last dimensions are no rows; ``layout``: where it is known what the rows are.
    """
    taps = [tap for tap in (weight, bias) if isinstance(tap, Tap)]
    observation = taps[0].observation
    layout = layout or observation.layout(x, features, taps[0].slot.name, function)
    uses = [tap.use(function, layout) if isinstance(tap, Tap) else None for tap in (weight, bias)]
    weight, bias = (use.operand if use else plain for use, plain in zip(uses, (weight, bias), strict=True))
    return Call(observation, layout, *uses, swapped=swapped), weight, bias


def module_call(
    observation: Observation, module: nn.Module, x: Any, function: str, features: int = 1
) -> tuple[Call, Tensor, Tensor | None] | None:
    """The call of a module that consumes its ``weight`` and ``bias`` once, and what it computes with.

    None where these are not two trainable parameters (one, where there is no bias): the taps see what they are.
    """
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if type(x) is not Tensor or weight is None or (bias is None and "bias" not in module._parameters):
        return None
    slot = observation.slot_of(module, "weight", weight)
    bias_slot = None if bias is None else observation.slot_of(module, "bias", bias)
    if slot is None or not weight.requires_grad or (bias is not None and (bias_slot is None or not bias.requires_grad)):
        return None
    layout = observation.layout(x, features, slot.name, function)
    use = observation.use(slot, weight, (), function, layout)
    if bias is None or bias_slot is None:
        return Call(observation, layout, use, None), use.operand, None
    bias_use = observation.use(bias_slot, bias, (), function, layout)
    return Call(observation, layout, use, bias_use), use.operand, bias_use.operand


class Observed(torch.autograd.Function):
    """A rule's function; its first input is the `Call`."""

    @classmethod
    def apply(cls, call: Call, *inputs: Any) -> Any:
        if call.observation.traces:
            values = [use.value for use in call.uses if use is not None]
            call.inputs = [
                Input(x.shape, x.dtype, x.device, any(x is value for value in values))
                if isinstance(x, Tensor)
                else None
                for x in (call, *inputs)
            ]
        if torch._C._are_functorch_transforms_active():
            return super().apply(call, *inputs)  # refuses: torch.func knows no rule for it
        return super(torch.autograd.Function, cls).apply(call, *inputs)  # type: ignore[misc]  # past what only torch.func needs


class Backward:
    """One run of a function's backward: delivers terms and starts the row test."""

    def __init__(self, ctx: Any, call: Call) -> None:
        self.ctx, self.call, self.backend = ctx, call, call.observation.backend
        self.needs_gradient: Sequence[bool] = ctx.needs_input_grad  # makes a tuple whenever it is read
        self.measures = call.measures

    def deliver(
        self, which: int, argument: int, make: Callable[[], GradientTerm]
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of an argument and of its probe row: by its use's rule, or plainly where nothing observes it."""
        needed = self.needs_gradient[argument]
        use = self.call.uses[which]
        if use is not None and self.measures:
            observation = self.call.observation
            if observation.examples == 0:
                return observation.deliver_nothing(use, needed)
            return observation.deliver(use, make(), needed)
        if needed:
            return make().grad(), None
        return None, None

    def tested(self, input_gradient: Callable[[], Tensor]) -> Tensor | None:
        """The gradient of the first tensor argument, where the test of what lies upstream has to come first; else None."""
        if not (self.needs_gradient[1] and self.call.observation.verify):
            return None
        dx = input_gradient()
        self.tag(dx)
        return dx

    def last(self, dx: Tensor | None, input_gradient: Callable[[], Tensor]) -> Tensor | None:
        """The same, if it was not formed: between two large products, which fill the caches, Python is slow."""
        return input_gradient() if dx is None and self.needs_gradient[1] else dx

    def tag(self, *inputs: Tensor) -> None:
        """Test what lies upstream of the function's first tensor arguments, whose gradients these are."""
        if self.call.observation.verify:
            self.tag_all([(place, dx, self.call.layout) for place, dx in enumerate(inputs)])

    def tag_all(self, inputs: Sequence[tuple[int, Tensor, Layout]]) -> None:
        """The same for tensor arguments anywhere among them, by their places, each with a layout of its own."""
        observation = self.call.observation
        if inputs and observation.verify and self.measures:
            uses = [use for use in self.call.uses if use is not None]
            tested = [(GradientEdge(*self.ctx.next_functions[place]), dx, layout) for place, dx, layout in inputs]
            observation.row_test.start_from_use(tested, uses)


def first_order(backward: Any) -> Any:
    """A backward that no graph leads through: `once_differentiable`, whose detour is left out where no graph is asked for."""
    refusing = once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Any) -> Any:
        call = getattr(ctx, "call", None)
        if call is not None and call.observation.traces:
            return call.observation.backward(backward, ctx, gradients)
        return refusing(ctx, *gradients) if torch.is_grad_enabled() else backward(ctx, *gradients)

    return run


_AS_IT_IS = contextlib.nullcontext()


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Backward passes compute in the dtypes they are given, also where they run inside an autocast block."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _AS_IT_IS


def summed(g_rows: Tensor, segments: Segments, backend: str) -> PerSampleGrads:
    return PerSampleGrads(find("segment_sum", g_rows.device.type, backend)(g_rows, segments), segments, backend)


def normalised_product(x: Tensor, g: Tensor, call: Call, shift: Tensor | None, scale: Tensor | None) -> PerSampleGrads:
    x, g = (call.layout.rows_of(t) for t in (x.to(g.dtype), g))
    shift, scale = (None if t is None else call.layout.rows_of(t).squeeze(1).to(g.dtype) for t in (shift, scale))
    backend = call.observation.backend
    sums = find("segment_scale_grad", g.device.type, backend)(x, g, call.segments, shift=shift, scale=scale)
    return PerSampleGrads(sums, call.segments, backend)


def is_row(shape: torch.Size, of: torch.Size) -> bool:
    """Whether a parameter of this shape has one entry per entry of the last dimension."""
    return len(of) > 1 and shape[-1:] == of[-1:] and shape.numel() == of[-1]


def spread(g: Tensor, shape: torch.Size, call: Call) -> PerSampleGrads:
    """The gradient of a broadcast operand of this shape, whose entries meet many of g's."""
    backend = call.observation.backend
    return PerSampleGrads(call.layout.per_example(g.to(accumulator(g.dtype)), shape, backend), call.segments, backend)
