"""Compiled models: the rules run once, while a graph is compiled, and the backward of each is one call in it.

Dynamo hands the graph of a compiled model to a backend. Inside a block that backend is `Graphs`, which makes taps of the
graph's trainable parameters and passes it on to the backend that the user chose, which traces it, forward and backward.
In the trace a rule computes its forward as ever, in operations that a compiler may fuse, and its backward becomes a call
of ``gradnorm::observed_backward``: when the compiled backward arrives there, the rule's own backward runs on what it had
saved, in the block that is open. So a block keeps its books as it does without compilation, and a graph holds for all of
them.

A trace can look neither at numbers nor at where tensors lie. It goes by what blocks that ran eagerly have proven (the first
block, and some later ones, do): by which functions a parameter is consumed, and in which layout (`Memory`). What was not
proven is not traced, nor are functions of a parameter's entries: the graph then runs as Dynamo captured it, with taps,
and the Meter's later blocks do without graphs.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradnorm_ext.layers.calls import Call
from gradnorm_ext.layers.layouts import Examples, Kind, Layout, Packing
from gradnorm_ext.layers.observation import Observation, Plan, Slot, Use
from gradnorm_ext.layers.sources import Sources
from gradnorm_ext.layers.taps import LookedUp, Tap
from gradnorm_ext.segments import Segments

_LIBRARY = torch.library.Library("gradnorm", "FRAGMENT")
_LIBRARY.define(
    "observed_backward(Tensor[] tensors, SymInt[] sizes, int graph, int site) -> Tensor[]",
    tags=(torch.Tag.cudagraph_unsafe,),  # a replay would not keep the block's books
)
_LIBRARY.define("look_up(Tensor ids, SymInt[] rows, int graph, int use) -> Tensor", tags=(torch.Tag.cudagraph_unsafe,))
_graphs: weakref.WeakValueDictionary[int, _Graph] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class UntraceableError(RuntimeError):
    """What only a block that runs eagerly can measure."""


class Graphs:
    """What Dynamo compiles with while a block is open, in place of a backend; graphs serve every Meter and every model.

    Attributes:
        observation: of the open block; there is at most one.
    """

    known: ClassVar[list[Graphs]] = []

    def __init__(self, backend: Callable[..., Any]) -> None:
        self.backend = backend
        self.observation: Observation | None = None

    @staticmethod
    def of(backend: Callable[..., Any]) -> Graphs:
        """The one of this backend: another one would have Dynamo compile everything again."""
        for one in Graphs.known:
            if one.backend == backend:
                return one
        Graphs.known.append(Graphs(backend))
        return Graphs.known[-1]

    def compile(self, module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """A backend of ``torch.compile``."""
        observation = self.observation
        slots = {}
        if observation is not None and torch.is_grad_enabled():
            slots = {i: slot for i, one in enumerate(inputs) if (slot := observation.slot_in_graph(one)) is not None}
        if not slots:
            compiled: Callable[..., Any] = self.backend(module, inputs)
            return compiled
        assert observation is not None
        graph = _Graph(self, module, observation, slots)
        try:
            graph.compiled = self.backend(graph.observed(), inputs)
            graph.check_views()
        except (torch._dynamo.exc.RestartAnalysis, torch._dynamo.exc.SkipFrame):
            raise  # Dynamo's own ways
        except Exception as error:
            graph.refusal = _cause_of(error)
            warnings.warn(
                f"{observation.who}: a compiled graph cannot be observed, and blocks run it as it was written: {graph.refusal}",
                stacklevel=2,
            )
        return graph.run


def compiled_modules(modules: Iterable[nn.Module]) -> list[Any]:
    """Of those modules that were compiled, what Dynamo calls: the way to their backends."""
    found = []
    for module in modules:
        if isinstance(module, torch._dynamo.OptimizedModule):
            found.append(module.dynamo_ctx.callback)
        elif module._compiled_call_impl is not None:
            found.append(inspect.getclosurevars(module._compiled_call_impl).nonlocals.get("callback"))
    return found


def whole_graph_backend(callbacks: Sequence[Any]) -> Callable[..., Any] | None:
    """The backend that all of them were compiled with, if it is one and none may be cut into several graphs.

    Between graphs Python would run that is neither in a graph nor, its arguments being made by one, seen by taps.
    """
    backends = []
    for callback in callbacks:
        whole = False
        while hasattr(callback, "_torchdynamo_orig_backend"):
            whole = whole or getattr(callback, "_one_graph", False)
            callback = callback._torchdynamo_orig_backend
        backends.append(callback if whole else None)
    alike = backends and callable(backends[0]) and all(one == backends[0] for one in backends)
    return backends[0] if alike else None


class _Graph:
    """One graph: where its parameters are, and what was traced of their uses."""

    def __init__(
        self, graphs: Graphs, module: torch.fx.GraphModule, observation: Observation, slots: dict[int, Slot]
    ) -> None:
        self.graphs, self.module, self.number = graphs, module, next(_numbers)
        self.slots = {place: Slot(slot.index, slot.name, slot.parameter, slot.wanted) for place, slot in slots.items()}
        self.place_of = {id(slot): place for place, slot in self.slots.items()}
        self.traced = _Traced(self, observation)
        self.compiled: Callable[..., Any] | None = None
        self.refusal: str | None = None  # why it runs as it was written
        self.audited = False
        self.uses: list[Use] = []
        self.sites: list[_Site] = []
        _graphs[self.number] = self

    def observed(self) -> torch.fx.GraphModule:
        """The graph with taps in place of its parameters."""
        graph = torch.fx.Graph()
        graph.output(graph.graph_copy(self.module.graph, {}))
        placeholders = list(graph.find_nodes(op="placeholder"))
        for old, new in zip(self.module.graph.find_nodes(op="placeholder"), placeholders, strict=True):
            vars(new).update({key: value for key, value in vars(old).items() if key.startswith("_dynamo")})
        with graph.inserting_after(placeholders[-1]):
            for i, place in enumerate(reversed(self.slots)):
                one = placeholders[place]
                first = i == len(self.slots) - 1
                tap = graph.call_function(_tap, (one, self.number, place, first))
                one.replace_all_uses_with(tap, delete_user_cb=lambda user, tap=tap: user is not tap)
        return torch.fx.GraphModule(self.module, graph)

    def check_views(self) -> None:
        """Blocks repeat them, which what belongs to the trace cannot be in."""
        for use in self.uses:
            given = [(view.args, view.keywords) for view in use.path if isinstance(view, functools.partial)]
            of_trace = any(isinstance(leaf, (Tensor, torch.SymInt)) for leaf in pytree.tree_leaves(given))
            if of_trace or len(use.path) != len(use.views):
                raise UntraceableError(f"{use.function} consumes {use.slot.name} by way of a view like another tensor")

    def restart(self) -> None:
        """The graph is traced anew: compilers do so more than once."""
        self.uses.clear()
        self.sites.clear()

    def run(self, *inputs: Any) -> Any:
        """Call the graph, and write down in the open block what it uses."""
        observation = self.graphs.observation
        if observation is None or observation.batch is None:
            raise RuntimeError("Meter: an observed graph must be called inside an observe block, got a call outside")
        found = {place: observation.slot_in_graph(inputs[place]) for place in self.slots}
        slots = {place: slot for place, slot in found.items() if slot is not None}
        refusal = self.refusal or self._mismatch(observation, slots)
        if refusal is not None or self.compiled is None:
            observation.memory.unobservable = refusal
            observation.sources.look_at_data(tuple(one for i, one in enumerate(inputs) if i not in slots))
            taps = {place: Tap.of(observation, slot, inputs[place]) for place, slot in slots.items()}
            return self.module.forward(*(taps.get(i, one) for i, one in enumerate(inputs)))
        if not self.audited:
            observation.audit_graphs()
            self.audited = True
        uses = []
        for traced in self.uses:
            slot, layout = slots[self.place_of[id(traced.slot)]], Layout(traced.layout.kind, (), observation.batch)
            value: Tensor = slot.parameter
            for view in traced.path:
                value = view(value)
            uses.append(observation.use(slot, value, traced.views, traced.function, layout, shared=traced.shared))
        nodes = [torch.autograd.graph.get_gradient_edge(use.slot.parameter).node for use in uses]
        observation.runs.setdefault(self.number, []).append(_Run(uses, nodes, set(range(len(self.sites)))))
        return self.compiled(*inputs)

    def _mismatch(self, observation: Observation, slots: dict[int, Slot]) -> str | None:
        """What keeps a graph from being that of these parameters: one graph may serve several modules.

        Modules that are not observed have graphs of their own, since observed ones have another class.
        """
        if len(slots) < len(self.slots):
            return "one of its parameters is not observed"
        for traced in self.uses:
            slot, kind = slots[self.place_of[id(traced.slot)]], traced.layout.kind
            kinds = observation.memory.kinds.get((slot.name, traced.function), set())
            key = (slot.name, *traced.key[1:])
            if kinds - {kind} or key not in observation.memory.verified:
                return f"{traced.function} of {slot.name} was not verified with {kind} rows"
        return None


@dataclasses.dataclass(frozen=True)
class _Site:
    """A rule's call in a graph: what its backward is given beside tensors and sizes."""

    backward: Callable[..., Any]
    leaves: tuple[Any, ...]  # of what its context had: constants, `_TENSOR` or `_SIZE`
    spec: Any
    needs_input_grad: tuple[bool, ...]
    outputs: tuple[tuple[int, int, torch.dtype, torch.device], ...]  # input, dimensions, ... of what gets a gradient
    parameters: tuple[int, ...]  # among these inputs
    kind: Kind
    dimensions: int  # of the rows
    swapped: bool
    uses: tuple[int | None, ...]


@dataclasses.dataclass
class _Run:
    """One call of a graph in the open block: its uses, and the sites whose backward is still to come."""

    uses: list[Use]
    nodes: list[Any]  # of the uses' parameters, which add up their gradients
    waiting: set[int]


class _Mark:
    """What comes with the call."""


_TENSOR, _SIZE = _Mark(), _Mark()


class _Batch(Examples):
    """The examples as a trace sees them, which must not depend on how many there are."""

    def kind_of(self, shape: Sequence[int], rows_per_example: set[int]) -> Kind | None:
        return "leading"

    def segments(self, rows: int) -> Segments:
        return self.groups.equal(0)  # looked at by no forward

    def packed(self, packing: Packing, inner: int) -> Segments:
        return self.groups.equal(0)


class _Traced:
    """What rules ask of an `Observation`, while a graph is traced."""

    traces = True
    examples = 2  # any number but one
    derives = verify = closed = False

    def __init__(self, graph: _Graph, observation: Observation) -> None:
        assert observation.batch is not None
        batch = observation.batch
        self.graph, self.who, self.backend, self.memory = (
            graph,
            observation.who,
            observation.backend,
            observation.memory,
        )
        self.plan, self.batch = Plan(), _Batch(batch.count, batch.groups, batch.batch_dim)
        self.probe_rows = [None] * len(observation.slots)  # norms leave through the block
        self.sources = Sources(frozenset, gathers=False)

    def is_input(self, tensor: Tensor) -> bool:
        return True

    is_data = is_input

    def is_constant(self, tensor: Tensor) -> bool:
        return False

    def segments(self, rows: int) -> Segments:
        return self.batch.segments(rows)

    def layout(self, tensor: Tensor, features: int, name: str, function: str) -> Layout:
        kinds = self.memory.kinds.get((name, function), set())
        if len(kinds) != 1 or "followed" in kinds:
            seen = f"with rows in {len(kinds)} orders, or selected ones" if kinds else "by no block before"
            raise UntraceableError(f"{function} of {name} was measured {seen}")
        return Layout(next(iter(kinds)), tuple(tensor.shape)[: tensor.dim() - features], self.batch)

    def use(
        self,
        slot: Slot,
        value: Tensor,
        views: tuple[str, ...],
        function: str,
        layout: Layout,
        *,
        shared: bool = False,
        others: Sequence[Slot] = (),
    ) -> Use:
        use = Use(slot, value, views, function, layout, self, shared=shared)  # type: ignore[arg-type]
        if others or "curved" in views:
            raise UntraceableError(f"{function} consumes {slot.name} by way of {', '.join(views) or 'others'}")
        if use.key not in self.memory.verified:
            raise UntraceableError(f"{function} of {slot.name} was verified by no block before")
        self.graph.uses.append(use)
        return use

    def look_up(self, use: Use, ids: Tensor) -> Tensor:
        """Ids that the block gets to know when the graph runs: a tied head asks for them before their backward."""
        if use.shared:
            return ids
        place = self.graph.uses.index(use)
        noted: Tensor = torch.ops.gradnorm.look_up(ids, list(use.layout.shape), self.graph.number, place)
        return noted

    def backward(self, backward: Callable[..., Any], ctx: Any, gradients: Sequence[Any]) -> tuple[Any, ...]:
        """In place of a rule's backward: the call that will run it."""
        call: Call = ctx.call
        state = {name: _opened(value) for name, value in vars(ctx).items() if name != "call"}
        leaves, spec = pytree.tree_flatten((ctx.saved_tensors, tuple(gradients), state))
        given = zip(ctx.needs_input_grad, call.inputs, strict=True)
        outputs = [(i, one) for i, (needed, one) in enumerate(given) if needed and one is not None]
        site = _Site(
            backward,
            tuple(_TENSOR if isinstance(x, Tensor) else _SIZE if isinstance(x, torch.SymInt) else x for x in leaves),
            spec,
            tuple(ctx.needs_input_grad),
            tuple((i, len(one.shape), one.dtype, one.device) for i, one in outputs),
            tuple(i for i, one in outputs if one.is_parameter),
            call.layout.kind,
            len(call.layout.shape),
            call.swapped,
            tuple(None if use is None else self.graph.uses.index(use) for use in call.uses),
        )
        self.graph.sites.append(site)
        found = torch.ops.gradnorm.observed_backward(
            [one for one in leaves if isinstance(one, Tensor)],
            [
                *(size for _, one in outputs for size in one.shape),
                *call.layout.shape,
                *(one for one in leaves if isinstance(one, torch.SymInt)),
            ],
            self.graph.number,
            len(self.graph.sites) - 1,
        )
        of_inputs: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for (i, _), gradient in zip(outputs, found, strict=True):
            of_inputs[i] = gradient
        return tuple(of_inputs)


def _opened(value: Any) -> Any:
    """A context's attribute as a tree whose leaves are tensors, numbers and what does not matter."""
    if isinstance(value, torch.Size):
        return torch.Size, tuple(value)
    if isinstance(value, LookedUp):
        return LookedUp, tuple(getattr(value, field.name) for field in dataclasses.fields(value))
    return value


def _closed(value: Any) -> Any:
    if isinstance(value, tuple) and len(value) == 2 and value[0] is torch.Size:
        return torch.Size(value[1])
    if isinstance(value, tuple) and len(value) == 2 and value[0] is LookedUp:
        return LookedUp(*value[1])
    return value


def _tap(parameter: Tensor, graph: int, place: int, is_first: bool) -> Tap:
    """What stands in a graph between a parameter and what consumes it."""
    observed = _graphs[graph]
    if is_first:
        observed.restart()
    return Tap.of(observed.traced, observed.slots[place], parameter)  # type: ignore[arg-type]


class _Context:
    """What a rule's backward is given as ``ctx``, in a compiled graph."""

    def __init__(self, saved: tuple[Any, ...], needs: tuple[bool, ...], call: Call, state: dict[str, Any]) -> None:
        vars(self).update({name: _closed(value) for name, value in state.items()})
        self.saved_tensors, self.needs_input_grad, self.call = saved, needs, call


class _GraphCall(Call):
    """A call whose backward runs in a compiled graph."""

    measures = False


def _observed_backward(tensors: Sequence[Tensor], sizes: Sequence[int], graph: int, site: int) -> list[Tensor]:
    observed = _graphs[graph]
    observation, of_graph = observed.graphs.observation, observed.sites[site]
    runs = [] if observation is None else [run for run in observation.runs.get(graph, []) if site in run.waiting]
    if observation is None or not runs:
        raise RuntimeError(
            "Meter: loss.backward() must run inside the observe block of its forward, and once, got one outside of it or a "
            "second one; pass observe(backwards=2) for two"
        )
    given, values = iter(tensors), iter(sizes)
    outputs = [(i, [next(values) for _ in range(dims)], dtype) for i, dims, dtype, _ in of_graph.outputs]
    layout = observation.layout_of_kind(of_graph.kind, tuple(next(values) for _ in range(of_graph.dimensions)))
    leaves = [next(given) if x is _TENSOR else next(values) if x is _SIZE else x for x in of_graph.leaves]
    saved, gradients, state = pytree.tree_unflatten(leaves, of_graph.spec)
    uses = [None if i is None else runs[-1].uses[i] for i in of_graph.uses]
    call = _GraphCall(observation, layout, *uses, swapped=of_graph.swapped)
    node = runs[-1].nodes[next(i for i in of_graph.uses if i is not None)]
    call.measures = bool(torch._C._will_engine_execute_node(node))
    if call.measures:
        runs[-1].waiting.remove(site)
        for use in uses:
            if use is not None:
                use.layout = layout
    needs = of_graph.needs_input_grad
    if observation.plan.keep:  # what waits for its weights is not formed
        needs = tuple(needed and i not in of_graph.parameters for i, needed in enumerate(needs))
    found = of_graph.backward(_Context(saved, needs, call, state), *gradients)
    for use, row in zip(uses, found[len(found) - len(uses) :], strict=True):
        if use is not None and row is not None:
            observation.add_figures(use.slot, row)
    theirs = {one.untyped_storage().data_ptr() for one in tensors}
    results = []
    for i, shape, dtype in outputs:
        one = found[i]
        one = tensors[0].new_zeros(shape, dtype=dtype) if one is None else one.to(dtype).view(shape).contiguous()
        results.append(one.clone() if one.untyped_storage().data_ptr() in theirs else one)
    return results


def _look_up(ids: Tensor, rows: Sequence[int], graph: int, use: int) -> Tensor:
    own = ids.clone(memory_format=torch.contiguous_format)
    observation = _graphs[graph].graphs.observation
    if observation is not None:
        looked_up = observation.runs[graph][-1].uses[use]
        if looked_up.lookup_ids is None:  # else a checkpoint computes it again
            looked_up.layout = observation.layout_of_kind(looked_up.layout.kind, tuple(rows))
            observation.look_up(looked_up, own)
    return own


def _like_look_up(ids: Tensor, rows: Sequence[int], graph: int, use: int) -> Tensor:
    return torch.empty_like(ids, memory_format=torch.contiguous_format)


def _like_observed_backward(tensors: Sequence[Tensor], sizes: Sequence[int], graph: int, site: int) -> list[Tensor]:
    values = iter(sizes)
    outputs = _graphs[graph].sites[site].outputs
    return [
        torch.empty([next(values) for _ in range(dims)], dtype=dtype, device=device)
        for _, dims, dtype, device in outputs
    ]


_LIBRARY.impl("look_up", _look_up, "CompositeExplicitAutograd")
_LIBRARY.impl("observed_backward", _observed_backward, "CompositeExplicitAutograd")
torch.library.register_fake("gradnorm::look_up", _like_look_up, lib=_LIBRARY)
torch.library.register_fake("gradnorm::observed_backward", _like_observed_backward, lib=_LIBRARY)


def _cause_of(error: BaseException) -> str:
    while not isinstance(error, UntraceableError) and error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0] if str(error) else type(error).__name__
