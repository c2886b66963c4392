"""Functions that no rule knows, with ``on_unsupported="vmap"``: exact, at the price of a backward pass per example.

A function of parameters alone (a weight norm, ``B @ A``, ``exp`` of a temperature) gives a *derived* parameter: a tap
whose uses are measured by the rules of their functions, and whose gradients are taken back to the parameters one example
at a time when the block closes.

A function of parameters and activations is differentiated by itself: an example's gradient is what its backward gives
for the output gradient with all other examples' entries zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradnorm_ext.gradients import Pullback, group_members, one_hot_mask
from gradnorm_ext.layers.calls import Backward, Call, first_order, no_autocast
from gradnorm_ext.layers.layouts import Layout
from gradnorm_ext.layers.observation import Observation, Use
from gradnorm_ext.layers.taps import Tap, saving_themselves


def unruled(func: Callable[..., Any], name: str, leaves: Sequence[Any], spec: Any, result: Any) -> Any:
    """What a function of taps gives that no rule knows: a derived tap, or an output differentiated by itself."""
    taps = [leaf for leaf in leaves if isinstance(leaf, Tap)]
    observation = taps[0].observation
    met = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, Tap)]
    derived = any(tap.is_derived for tap in taps)
    if not any(_may_be_batched(observation, leaf, derived) for leaf in met):
        return pytree.tree_map(functools.partial(_derived, taps, _named(observation, taps, name, met)), result)

    outputs, out_spec = pytree.tree_flatten(result)
    where = [
        i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and (isinstance(leaf, Tap) or leaf.requires_grad)
    ]

    def run(*tensors: Tensor) -> list[Any]:
        given = [leaf.value if isinstance(leaf, Tap) else leaf for leaf in leaves]
        for i, tensor in zip(where, tensors, strict=True):
            given[i] = tensor
        args, kwargs = pytree.tree_unflatten(given, spec)
        found: list[Any] = pytree.tree_leaves(func(*args, **kwargs))
        return found

    layouts = [
        observation.layout(out, min(1, max(0, out.dim() - 1)), taps[0].slot.name, name)
        for out in outputs
        if isinstance(out, Tensor) and out.is_floating_point()
    ]
    uses: list[Use | None] = []
    for i in where:
        use = leaves[i].use(name, layouts[0]) if isinstance(leaves[i], Tap) else None
        uses.append(use)
    tensors = [leaves[i] for i in where]
    found = differentiated(observation, run, tensors, uses, [_like(layouts[0], one) for one in tensors], layouts)
    for i, out in enumerate(outputs):
        if isinstance(out, Tensor) and out.is_floating_point():
            outputs[i] = found.pop(0)
    return pytree.tree_unflatten(outputs, out_spec)


Tap.unruled = unruled


def _like(of_output: Layout, tensor: Tensor) -> Layout | None:
    """Of an input: the output's layout where it has the same sizes, else one of its own, or None."""
    shape = tuple(tensor.shape[: max(1, tensor.dim() - 1)])
    if shape == of_output.shape:
        return of_output
    return of_output.examples.layout_of(shape)


def _may_be_batched(observation: Observation, tensor: Tensor, derived: bool) -> bool:
    """An activation, or data: not a buffer, a frozen parameter or of sizes that show no batch.

    What a derived parameter meets is a constant of its derivation unless it is known to be data.
    """
    if tensor.requires_grad:
        return True
    assert observation.batch is not None
    if observation.is_constant(tensor) or tensor.dim() == 0:
        return False
    if derived and not observation.is_data(tensor):
        return False
    return observation.batch.kind_of(tensor.shape, observation.sources.rows_per_example) is not None


def _named(observation: Observation, taps: Sequence[Tap], name: str, met: Sequence[Tensor]) -> str:
    """The function that a derived parameter comes from, with what it took for a constant although its sizes show the batch."""
    batch = observation.batch
    assert batch is not None
    if told := next((tap.derived_by for tap in taps if _TAKEN in tap.derived_by), ""):
        return told
    for one in met:
        shows = one.dim() > 0 and batch.kind_of(one.shape, observation.sources.rows_per_example) is not None
        if shows and not (observation.is_data(one) or observation.is_constant(one)):
            return f"{name} ({list(one.shape)} was {_TAKEN}: give it to a module as an argument)"
    return name


_TAKEN = "taken for a constant, since no module was given it"


def _derived(taps: Sequence[Tap], name: str, leaf: Any) -> Any:
    if not (isinstance(leaf, Tensor) and leaf.requires_grad):
        return leaf
    slots = list(dict.fromkeys(slot for tap in taps for slot in (tap.slot, *tap.others)))
    return Tap.of(taps[0].observation, slots[0], leaf, ("derived",), tuple(slots[1:]), derived_by=name)


def differentiated(
    observation: Observation,
    run: Callable[..., Sequence[Any]],
    tensors: Sequence[Tensor],
    uses: Sequence[Use | None],
    of_tensors: Sequence[Layout | None],
    layouts: Sequence[Layout],
) -> list[Tensor]:
    """The floating-point outputs of ``run(*tensors)``, of these layouts; ``uses`` are of those that are parameters.

    ``of_tensors``: the layouts of those that are not; None where their sizes say nothing.
    """
    call = Call(observation, layouts[0], *uses)
    plain = [tensor if use is None else use.operand for tensor, use in zip(tensors, uses, strict=True)]
    found = _Unruled.apply(call, run, (tuple(of_tensors), tuple(layouts)), len(plain), *plain, *call.probes)
    return list(found)


class _Unruled(torch.autograd.Function):
    """The function itself, with a graph of its own that the backward goes through as often as it has to."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        run: Callable[..., Sequence[Any]],
        layouts: tuple[tuple[Layout | None, ...], tuple[Layout, ...]],
        count: int,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        with torch.enable_grad(), saving_themselves():
            inputs = [tensor.detach().requires_grad_() for tensor in tensors[:count] if tensor is not None]
            outputs = [out for out in run(*inputs) if isinstance(out, Tensor) and out.is_floating_point()]
        ctx.call, ctx.inputs, ctx.outputs = call, inputs, outputs
        ctx.of_inputs, ctx.of_outputs = layouts
        ctx.set_materialize_grads(False)
        return tuple(out.detach() for out in outputs)

    @staticmethod
    @first_order
    def backward(ctx: Any, *g: Tensor | None) -> tuple[Any, ...]:
        call: Call = ctx.call
        count = len(ctx.inputs)
        gradients: list[Tensor | None] = [None] * count
        probes: list[Tensor | None] = [None] * count
        with no_autocast(ctx.outputs[0].device):
            run = Backward(ctx, call)
            outputs = zip(ctx.outputs, g, ctx.of_outputs, strict=True)
            graph = _Graph(ctx.inputs, [(out, one, at) for out, one, at in outputs if one is not None])
            met = [i for i in range(count) if call.uses[i] is None and ctx.needs_input_grad[4 + i]]
            found = graph.vjp(met, None) if met else []
            for i, gradient in zip(met, found, strict=True):
                gradients[i] = gradient
            tested = [(i, gradient, ctx.of_inputs[i]) for i, gradient in zip(met, found, strict=True)]
            run.tag_all([one for one in tested if one[2] is not None])
            measured = [i for i in range(count) if call.uses[i] is not None]
            sweep = functools.cache(functools.partial(graph.sqnorms, measured))
            for place, i in enumerate(measured):
                term = Pullback(
                    functools.partial(graph.vjp_one, i),
                    functools.partial(_row, sweep, place),
                    graph.sizes,
                    ctx.inputs[i],
                    call.segments,
                )
                gradients[i], probes[i] = run.deliver(i, 4 + i, functools.partial(_itself, term))
        return None, None, None, None, *gradients, *probes


def _row(sweep: Callable[[], Tensor], place: int) -> Tensor:
    return sweep()[place]


def _itself(term: Pullback) -> Pullback:
    return term


class _Graph:
    """From outputs with gradients and layouts back to inputs, any number of times."""

    def __init__(self, inputs: Sequence[Tensor], outputs: Sequence[tuple[Tensor, Tensor, Layout]]) -> None:
        self.inputs, self.outputs = inputs, outputs

    def vjp(self, which: Sequence[int], weight: Tensor | None) -> list[Tensor]:
        """The gradients of these inputs, every example's output gradient times its weight."""
        gradients = [g if weight is None else layout.scaled(g, weight.to(g.dtype)) for _, g, layout in self.outputs]
        found = torch.autograd.grad(
            [out for out, _, _ in self.outputs],
            [self.inputs[i] for i in which],
            gradients,
            retain_graph=True,
            materialize_grads=True,
        )
        return list(found)

    def vjp_one(self, which: int, weight: Tensor | None) -> Tensor:
        return self.vjp([which], weight)[0]

    def sqnorms(self, which: Sequence[int]) -> Tensor:
        """``[inputs, columns]``."""
        segments = self.outputs[0][2].segments
        columns = []
        for members in group_members(segments):
            gradients = self.vjp(which, one_hot_mask(members, segments))
            columns.append(torch.stack([gradient.square().sum() for gradient in gradients]))
        return torch.stack(columns, 1)

    def sizes(self) -> Tensor:
        """``[B]``: the sum of the absolute values of each example's output gradient."""
        sizes = [layout.per_example(g.abs(), torch.Size(()), "reference") for _, g, layout in self.outputs]
        return torch.stack(sizes).sum(0)


def recurrent_module(observation: Observation, module: nn.RNNBase, input: Any, hx: Any = None) -> Any:
    """RNN, LSTM and GRU, whose layers read their weights from a list of the module's own."""
    names, found_weights = module._flat_weights_names, module._flat_weights
    named = [(name, weight) for name, weight in zip(names, found_weights, strict=True) if weight is not None]
    weights: list[Tensor] = [weight for _, weight in named]
    slots = [observation.slot_of(module, name, weight) if weight.requires_grad else None for name, weight in named]
    trainable = [slot for slot in slots if slot is not None]
    if not trainable:
        return NotImplemented
    kind = type(module).__name__
    if not observation.derives:
        raise RuntimeError(
            f"{observation.who}: no rule for {kind} of {trainable[0].name}, which is trainable; make the Meter with "
            'on_unsupported="vmap" to have it differentiated one example at a time, or freeze it'
        )
    if not isinstance(input, Tensor) or input.dim() != 3:
        raise RuntimeError(
            f"{observation.who}: {kind} of {trainable[0].name} must be given a tensor of three dimensions, got "
            f"{type(input).__name__}{'' if not isinstance(input, Tensor) else list(input.shape)}; pad packed sequences "
            "and give single ones a batch dimension"
        )
    states, spec = pytree.tree_flatten(() if hx is None else hx)
    plain = vars(type(module))["_gradnorm_base"]

    def run(*tensors: Tensor) -> list[Any]:
        own = {name: vars(module).get(name) for name in ("_flat_weights", "_update_flat_weights")}
        # The module would put its parameters back in the list.
        vars(module).update(_flat_weights=list(tensors[1 + len(states) :]), _update_flat_weights=lambda: None)
        try:
            states_again = None if hx is None else pytree.tree_unflatten(tensors[1 : 1 + len(states)], spec)
            found: list[Any] = pytree.tree_leaves(plain.forward(module, tensors[0], states_again))
        finally:
            vars(module).update(own)
            if own["_update_flat_weights"] is None:
                del vars(module)["_update_flat_weights"]
        return found

    at = observation.layout(input, 1, trainable[0].name, kind)
    assert observation.batch is not None
    if (at.kind == "leading") != module.batch_first and input.shape[0] == input.shape[1]:
        at.correct()
    layers = module.num_layers * (2 if module.bidirectional else 1)
    states_at = Layout("second", (layers, observation.batch.count), observation.batch)
    uses: list[Use | None] = [None] * (1 + len(states))
    for slot, weight in zip(slots, weights, strict=True):
        uses.append(None if slot is None else observation.use(slot, weight, (), kind, at))
    tensors = [input, *states, *weights]
    of_tensors = [at] + [states_at] * len(states) + [None] * len(weights)
    outputs = [at] + [states_at] * (2 if isinstance(module, nn.LSTM) else 1)
    found = differentiated(observation, run, tensors, uses, of_tensors, outputs)
    return found[0], (found[1] if len(outputs) == 2 else (found[1], found[2]))


Tap.modules.update(dict.fromkeys((nn.RNN.forward, nn.LSTM.forward, nn.GRU.forward), recurrent_module))
