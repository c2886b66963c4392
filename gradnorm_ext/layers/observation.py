"""One observe block: which parameters were used how, and what their uses' backward passes deliver.

Which row belongs to which example is a hypothesis (`gradnorm_ext.layers.layouts`) until the row test
(`gradnorm_ext.layers.row_test`) has passed: in the first block, in the 10th, 100th and so on, and whenever a use of a
new kind appears, or one that no test has proven yet.

The *audit* of the same block compares, for every parameter, the gradient that autograd accumulates with the sum of
what the uses delivered: a use that was not seen is an error, not a missing summand.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from gradnorm_ext.backends import choose
from gradnorm_ext.gradients import (
    GradientTerm,
    PerSampleGrads,
    StridedView,
    ViewedTerm,
    combined_gram,
    combined_sqnorm,
    compress_tied_head,
    gram_of,
)
from gradnorm_ext.layers.callsites import calling_line
from gradnorm_ext.layers.hooks import Hook, HookedGradients, hooked, hooks_of
from gradnorm_ext.layers.layouts import Examples, Kind, Layout, Packing
from gradnorm_ext.layers.provenance import follow
from gradnorm_ext.layers.row_test import Evidence, RowTest
from gradnorm_ext.layers.sources import DERIVED, Sources, arguments_of, calls_from, memory_of
from gradnorm_ext.reference import accumulator
from gradnorm_ext.segments import Segments


class Slot:
    """A trainable parameter in one block: its place in the probe, and what its uses left to be combined."""

    def __init__(self, index: int, name: str, parameter: nn.Parameter, wanted: bool) -> None:
        self.index, self.name, self.parameter = index, name, parameter
        self.wanted = wanted  # measured, not only weighed
        self.uses: list[Use] = []
        self.arrived = 0  # backward passes of uses
        self.measured = False  # by a single use
        self.norms: Tensor | None = None  # by a single use, past the probe
        self.deferred: list[ViewedTerm] = []  # several uses: combined when the block closes
        self.kept: list[tuple[Use, GradientTerm | Tensor, tuple[int, ...]]] = []  # weighted when the block closes
        self.weights: Tensor | None = None  # per example, where the parameter has its own
        self.hooked = False  # audited in this block
        self.hooks: tuple[Hook, ...] = ()  # the user's
        self.measures_directly = wanted  # where it is used once, with no hooks on it
        self.shard: nn.Parameter | None = None  # FSDP2 puts the whole parameter in place of it
        self.audit_due = False  # audited as soon as it has
        self.split_over: Any = None  # the process group that has the parameter's other parts (tensor parallelism)
        self.rows_over: Any = None  # the one that has the examples' other rows (sequence parallelism)
        self.delivered: Tensor | None = None  # audit: the sum of what the rules gave


@dataclass(eq=False)
class Use:
    """One function call that consumed a parameter (or a view of it)."""

    slot: Slot
    value: Tensor  # what was consumed, connected to the parameter
    views: tuple[str, ...]
    function: str
    layout: Layout
    observation: Observation
    lookup_ids: tuple[Tensor, Segments] | None = None  # of a lookup: what a tied head needs to know beforehand
    lookup_dim: int = 0  # of a lookup: the dimensions of its ids
    shared: bool = False  # looked-up rows that all examples share
    path: tuple[Callable[[Tensor], Tensor], ...] = ()  # from the parameter to the value, where views lead there
    followers: tuple[Use, ...] = ()  # the same use, of the other parameters that ``value`` was derived from
    called_at: tuple[str, int] | None = None  # the line of the caller's code, in a block that verifies
    is_known: bool = False  # an earlier block has proven such uses
    tested: bool = False  # a row test has gone through it, or has started from it
    evidence: Evidence | None = None  # what ties its rows to the caller's order
    with_input: bool = False  # in a test that went through what consumes an argument of the model
    seen: Tensor | None = field(default=None, repr=False)  # ``[B]``: by nonzero gradients of which examples
    delivered_of: Tensor | None = field(default=None, repr=False)  # ``[B]``: which examples have a gradient at all
    row_sums: Tensor | None = field(default=None, repr=False)  # of the running test

    @property
    def key(self) -> tuple[str, str, str, tuple[str, ...]]:
        return self.slot.name, self.function, "shared" if self.shared else self.layout.kind, self.views

    @property
    def place_in_code(self) -> str:
        """The use as a message names it."""
        return f"{self.slot.name} ({self.function}, rows {list(self.layout.shape)})"

    @property
    def is_derived(self) -> bool:
        """Whether the value is a function of parameters, in place of a parameter or its view."""
        return "derived" in self.views

    @property
    def is_curved(self) -> bool:
        """Whether the value is a function of each entry of the parameter, so that norms of gradients are not the same."""
        return "curved" in self.views

    @property
    def operand(self) -> Tensor:
        """What the function computes with: cut off from the parameter where its gradient is formed at the block's end."""
        plan, slot = self.observation.plan, self.slot
        waits = plan.keep or (slot.hooks and plan.layer_weights is not None)  # a hook must not be called with nothing
        late = self.is_derived or (waits and not slot.hooked)
        return self.value.detach() if late else self.value

    @property
    def strided_view(self) -> StridedView | None:
        """Where the value lies in the parameter's memory; None where it is not a view of it."""
        value, parameter = self.value, self.slot.parameter
        if hasattr(parameter, "device_mesh"):
            return None
        is_view = value.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
        if not is_view or value.dtype != parameter.dtype or _overlaps_itself(value):
            return None
        return StridedView(int(value.storage_offset()), tuple(value.shape), value.stride())

    def adjoint(self, gradient: Tensor, *, several: bool = False) -> Tensor:
        """A gradient of the consumed tensor as one of the parameter; ``several``: a stack of them."""
        if not self.views:
            return gradient
        shape = (len(gradient), *self.value.shape) if several else self.value.shape
        self.observation.placing = True  # the audit's hooks on the parameter are not meant by this
        try:
            (placed,) = torch.autograd.grad(
                self.value,
                self.slot.parameter,
                gradient.view(shape).to(self.value.dtype),
                retain_graph=True,
                materialize_grads=True,
                is_grads_batched=several,
            )
        finally:
            self.observation.placing = False
        return placed.to(gradient.dtype)

    def measured(self, contribution: GradientTerm) -> GradientTerm:
        """The contribution whose norms are those of the parameter's gradient."""
        if not self.is_curved:
            return contribution
        sums = self.adjoint(contribution.per_segment(), several=True)
        return PerSampleGrads(sums, contribution.segments, self.observation.backend)

    def viewed(self, contribution: GradientTerm) -> ViewedTerm:
        """The contribution as one to the parameter."""
        return ViewedTerm(contribution, self.views, self.adjoint, self.strided_view)


@dataclass(frozen=True)
class Plan:
    """What the block does besides measuring.

    Attributes:
        gram: also the inner products of the gradients of the coarsest groups, the tasks.
        over_ranks: sums a tensor over the processes, in place: the tasks' gradients are kept until the block closes and
            their inner products are those of the sums.
        totals: where every task's gradient is added up over the blocks of a step, ``[K, *shape]``, by parameter; with
            ``keep`` nothing else is kept.
        passes: 2: one backward for the norms and, once the weights are known, one for the gradients.
        layer_weights: from a parameter's name and its figures to weights per example, ``[B]``: each parameter is
            weighed by its own.
        task_weights: ``[K]``, known beforehand (``apply="next_step"``): weight gradients are formed with them.
        keep: the weights come when the block closes (``apply="same_step"``): nothing reaches ``.grad`` before.
        by_task: the weights will be the tasks'; with ``keep``: form one gradient per task where that is smaller than the
            rows and within ``budget`` bytes.
        buffers: where those gradients are kept from block to block, by parameter: fresh memory would cost as much
            as filling it.
    """

    gram: bool = False
    over_ranks: Callable[[Tensor], Tensor] | None = None
    totals: dict[str, Tensor] | None = None
    passes: Literal[1, 2] = 1
    layer_weights: Callable[[str, Tensor], Tensor] | None = None
    task_weights: Tensor | None = None
    keep: bool = False
    by_task: bool = False
    budget: int = 0
    buffers: dict[str, Tensor] = field(default_factory=dict)

    @property
    def reweights(self) -> bool:
        return self.keep or self.passes == 2 or self.task_weights is not None or self.layer_weights is not None


@dataclass
class Memory:
    """What a Meter learns about its model from block to block."""

    verified: dict[tuple[str, str, str, tuple[str, ...]], set[str]] = field(default_factory=dict)  # and from where
    shared_lookups: set[tuple[str, int]] = field(default_factory=set)  # (parameter, dimensions of the ids)
    corrected: dict[tuple[str, str, int], Kind] = field(default_factory=dict)  # (parameter, function, dimensions)
    kinds: dict[tuple[str, str], set[Kind]] = field(default_factory=dict)  # (parameter, function): what was verified
    uses: dict[str, int] = field(default_factory=dict)  # how many uses of a parameter in one block were verified
    labels: dict[tuple[str, str], str] = field(default_factory=dict)  # which of several kinds of rows, by the same
    picked: set[tuple[str, str]] = field(default_factory=set)  # the same, of rows that index tensors choose
    unobservable: str | None = None  # why the model's compiled graphs run as they were written
    audited: set[str] = field(default_factory=set)  # parameters whose whole gradient was accounted for
    blocks: int = 0  # closed so far
    unverified: bool = False  # there was a use of a new kind that only a later block can verify

    @property
    def due(self) -> bool:
        """Whether the next block verifies itself although nothing looks new: the 10th, the 100th, ..."""
        return str(self.blocks + 1).strip("0") == "1"

    @property
    def asks_ranks(self) -> bool:
        """FSDP2: whether the ranks ask each other, waiting for the device, if the next block is to verify itself."""
        return self.blocks < 10 or self.blocks % 10 == 9


def _computes_in_half(parameter: Tensor) -> bool:
    device = parameter.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    return autocast or parameter.dtype == torch.float16


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two entries may lie in one place of memory, as those of expanded and unfolded tensors do."""
    end = 0  # of what smaller strides reach
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= end:
            return True
        end += stride * (size - 1)
    return False


def _sum_over(group: Any, tensor: Tensor) -> Tensor:
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(tensor, group=group)
    return tensor


class Shards(Protocol):
    """What verifying needs where a backward takes collectives (FSDP2), which all ranks must run alike."""

    def agree(self, *numbers: int) -> list[int]:
        """The largest of each number over the ranks."""

    def paused(self) -> AbstractContextManager[None]:
        """A backward inside another: what the outer one still needs is neither freed nor reduced."""

    def shard_of(self, parameter: Tensor) -> Tensor | None:
        """This rank's part of a parameter that is whole between FSDP2's hooks."""


class Observation:
    """The state of one observe block. `begin` must be called before the first use, when B is known."""

    traces = False  # this is a block, and no compiler's trace of one
    closed = False

    def __init__(
        self,
        who: str,
        parameters: Iterable[tuple[str, nn.Parameter]],
        memory: Memory,
        plan: Plan,
        backend: str,
        start: Callable[[int], None],
        *,
        batch_dim: int = 0,
        backwards: int = 1,
        wanted: Collection[str] | None = None,
        derives: bool = False,
        constants: Callable[[], frozenset[int]] = frozenset,
        verify: bool = False,
        reduces_early: bool = False,
        shards: Shards | None = None,
        rows_of: Mapping[str, Tensor] | None = None,
        places: Mapping[int, tuple[tuple[int, str], ...]] | None = None,
        graphs: bool = False,
    ) -> None:
        self.who, self.memory, self.plan, self.backend = who, memory, plan, choose(backend)
        self.start = start  # calls `begin`, once the number of examples is known
        self.slots = {
            id(p): Slot(i, name, p, wanted is None or name in wanted) for i, (name, p) in enumerate(parameters)
        }
        self.reduces_early = reduces_early  # gradients, in backward: DDP, FSDP2
        self.shards = shards
        self.by_place: dict[tuple[int, str], Slot] = {}  # (module, name), of parameters that FSDP2 exchanges
        for key, found in (places or {}).items():
            if key in self.slots:
                self.slots[key].shard = self.slots[key].parameter
                self.by_place |= dict.fromkeys(found, self.slots[key])
        self.batch_dim, self.backwards = batch_dim, backwards
        self.rows_of = rows_of or {}  # by parameter: each row's example
        self.derives = derives  # uses without a rule are differentiated one example at a time
        self.sources = Sources(constants, gathers=shards is not None)
        self.modules: frozenset[int] = frozenset()  # of the model
        self.inside = False  # a call of a module that came from outside is running
        self.calls = 0  # that came from outside
        self.examples: int | None = None
        self.batch: Examples | None = None
        self.weights: Tensor | None = None  # per example
        self.verify = verify
        self.row_test = RowTest(self)
        self.graphs = graphs  # compiled graphs are observed
        self.graphs_audited = False
        self.runs: dict[int, list[Any]] = {}  # of these graphs, by their numbers
        self._of_graphs: Tensor | None = None  # figures that came from there
        self.backward_once = graphs  # also through a selective checkpoint: verifying has to wait for the next block
        self.phase: Literal["norms", "weigh"] | None = None  # of two passes
        self.placing = False
        self.failures: list[str] = []
        self.called_with: list[tuple[int, ...]] = []  # sizes, in a block without examples
        self._layouts: dict[tuple[int, ...], Layout] = {}  # of activations, by their sizes
        self._layouts_in_graphs: dict[tuple[Kind, tuple[int, ...]], Layout] = {}
        self.budget = plan.budget
        self.at_once = False  # gradient and norms are taken when a backward arrives, and nothing else
        self.measured_uses = 0
        self._hooks: list[Any] = []
        self.taps: dict[int, Any] = {}  # of parameters that were read, by their ids

    def begin(self, batch: Examples, tasks: Tensor) -> None:
        """Fix the examples and their groups, and make the probe: a leaf of zeros whose gradient is the norms."""
        self.batch, self.examples = batch, batch.count
        if self.plan.task_weights is not None:
            self.weights = self.plan.task_weights.to(tasks.device)[tasks]
        plan = self.plan
        self.at_once = not (plan.gram or plan.keep or plan.passes == 2 or self.backwards > 1) and (
            plan.totals is None and plan.layer_weights is None and plan.over_ranks is None
        )
        parameters = [slot.parameter for slot in self.slots.values()]
        self.on_cpu = tasks.device.type == "cpu"
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
        columns = batch.count + sum(batch.groups.counts)
        columns += batch.groups.counts[-1] ** 2 if self.plan.gram else 0
        self.probe = torch.zeros(
            len(parameters), columns + 1, dtype=dtype, device=parameters[0].device, requires_grad=True
        )
        self._one = torch.ones(1, dtype=dtype, device=self.probe.device)  # a use is counted in the last column
        self._unmeasured = torch.cat([self._one.new_zeros(columns), self._one])
        self.probe_rows = self.probe.unbind(0)
        self.probe_node = self.probe_rows[0].grad_fn
        for slot in self.slots.values():
            if slot.parameter._backward_hooks:
                self._look_at_hooks(slot)
            if (self.verify or slot.name not in self.memory.audited) and batch.count > 0:
                self._audit(slot)
        if self.graphs and self.probe.device.type == "cpu":  # elsewhere it would wait for the device
            self.audit_graphs()

    def _look_at_hooks(self, slot: Slot) -> None:
        """Take a parameter's norms as the user's hooks leave its gradient."""
        slot.hooks, slot.measures_directly = hooks_of(slot.parameter), False
        if slot.shard is not None or hasattr(slot.parameter, "device_mesh"):
            raise RuntimeError(
                f"{self.who}: hooks on parameters are applied to gradients per example, which parameters in parts do not have, "
                f"got one on {slot.name}; remove it"
            )

    def slot_of(self, module: nn.Module, name: str, parameter: Tensor) -> Slot | None:
        """The slot of a parameter that is read through a module.

        Between FSDP2's hooks a module has the whole parameter, another object, in place of the shard.
        """
        slot = self.slots.get(id(parameter)) or self.by_place.get((id(module), name))
        return None if slot is None else self._exchanged(slot, parameter)

    def slot_in_graph(self, parameter: Any) -> Slot | None:
        """The slot of a parameter that a compiled graph is given."""
        slot = self.slots.get(id(parameter))
        if slot is None and self.shards is not None and (shard := self.shards.shard_of(parameter)) is not None:
            slot = self.slots.get(id(shard))
        return None if slot is None else self._exchanged(slot, parameter)

    def _exchanged(self, slot: Slot, parameter: Tensor) -> Slot | None:
        """The slot, with the parameter that FSDP2 has put in the shard's place; None where the shard itself is read."""
        if slot.shard is not None:
            if parameter is slot.shard:
                return None  # what FSDP2 itself reads
            if slot.parameter is slot.shard:
                assert isinstance(parameter, nn.Parameter)
                slot.parameter = parameter
                if slot.audit_due:
                    self._audit(slot)
        return slot

    def layout_of_kind(self, kind: Kind, shape: tuple[int, ...]) -> Layout:
        """The layout of rows in a compiled graph: of the kind that was proven, if the sizes allow it."""
        assert self.batch is not None
        known = self._layouts_in_graphs.get((kind, shape))
        if known is None:
            if not self.batch.allows(kind, shape):
                raise self._unexplained(shape, f"a graph that was compiled for {kind} rows")
            known = self._layouts_in_graphs[kind, shape] = Layout(kind, shape, self.batch)
        return known

    def add_figures(self, slot: Slot, row: Tensor) -> None:
        """What a use in a compiled graph gives, in place of the gradient of its row of the probe."""
        if self._of_graphs is None:
            self._of_graphs = torch.zeros_like(self.probe)
        self._of_graphs[slot.index] += row

    def split_read(self, slot: Slot, module: nn.Module) -> RuntimeError:
        """The error for a DTensor that is read where no rule expects one."""
        return RuntimeError(
            f"{self.who}: no rule for {slot.name} of {type(module).__name__}, which is trainable and split among ranks; "
            "let Linear, Embedding, LayerNorm or RMSNorm use it, with DTensors as inputs, or freeze it"
        )

    def wrapped_read(self, slot: Slot, parameter: Tensor) -> RuntimeError:
        """The error for a parameter that is a tensor of another kind, which computes in ways of its own."""
        return RuntimeError(
            f"{self.who}: no rule for {slot.name}, which is trainable and a {type(parameter).__name__}; freeze it, or make the "
            "model with plain parameters (of torchao's float8 linears: without enable_fsdp_float8_all_gather)"
        )

    def check_split(self, slot: Slot) -> None:
        """Refuse what needs the whole gradient of a parameter that has parts on other ranks."""
        if self.plan.totals is not None or self.plan.layer_weights is not None or self.plan.gram:
            raise RuntimeError(
                f"{self.who}: the tasks' gradients and norms by layer are formed of whole parameters, got {slot.name}, which "
                'is split among ranks; leave out gram, exact_tasks, ranks="exact" and scope="layer"'
            )

    def call(self, run: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module's call. Those that come from outside of the model have the caller's order."""
        sources = self.sources
        sources.look_at_data(args)
        if self.inside or torch._C._current_graph_task_id() != -1:  # or a checkpoint computes it again
            if not sources.rows_per_example:
                self._look_at_arguments(arguments_of(module, args, kwargs), of_model=False)
            return run(module, *args, **kwargs)
        of_model = not calls_from(self.modules)
        named = arguments_of(module, args, kwargs)
        self._look_at_arguments(named, of_model=of_model)
        self.inside = True
        try:
            if not (of_model and self.verify and self.batch is not None):
                result = run(module, *args, **kwargs)
            else:
                with sources.following(self.batch):
                    result = run(module, *args, **kwargs)
        finally:
            self.inside = False
        if of_model and self.verify:
            self.calls += 1
            self.row_test.watch_given(named)
            self.row_test.watch_returned(result, "output" if self.calls == 1 else f"output of call {self.calls}")
        return result

    def _look_at_arguments(self, named: Sequence[tuple[str, Tensor]], *, of_model: bool) -> None:
        """How many examples there are, where nothing else says so, and how many rows each."""
        named = [(name, one) for name, one in named if one.dim() > 0]
        if self.examples == 0:
            self.called_with += [tuple(one.shape) for _, one in named]
        if self.examples is None:
            self._begin_with([one.shape[self.batch_dim] for _, one in named if one.dim() > self.batch_dim])
        assert self.batch is not None
        self.sources.look_at_arguments(named, self.batch, of_model=of_model)

    def _begin_with(self, sizes: Sequence[int]) -> None:
        if not sizes or sizes[0] == 0:
            raise ValueError(
                f"{self.who}: the model's first tensor argument must have the examples as its "
                f"{'second' if self.batch_dim else 'first'} dimension, got "
                f"{'an empty batch' if sizes else 'no tensor'}; pass observe(tasks=...) with one entry per example"
            )
        self.start(sizes[0])

    def segments(self, rows: int) -> Segments:
        """The segments of ``rows`` rows in batch-major order, equally many per example."""
        assert self.batch is not None
        return self.batch.segments(rows)

    def layout(self, tensor: Tensor, features: int, name: str, function: str) -> Layout:
        """Which of the hypotheses speaks for a tensor, its last ``features`` dimensions set aside."""
        assert self.batch is not None
        shape = tuple(tensor.shape)[: tensor.dim() - features]
        if self.examples is not None and self.examples <= 1:
            return Layout("leading", shape, self.batch)
        if self.rows_of and (told := self._told_rows(name, shape)) is not None:
            return told
        followable = features == 1 and tensor.requires_grad
        if followable and len(shape) == 1 and (followed := self._followed(tensor, shape)) is not None:
            return followed
        if followable and len(shape) > 1 and (self.verify or (name, function) in self.memory.picked):
            picked = self._picked(tensor, name, function)
            if picked is not None:
                return picked
        if tensor.requires_grad and (known := self._layouts.get(shape)) is not None:
            return known
        kind = self.batch.kind_of(shape, self.sources.rows_per_example)
        if followable and len(shape) > 1 and kind in (None, "second") and (followed := self._followed(tensor, shape)):
            return followed
        if kind is None and 0 in shape:  # whatever they would be
            return Layout.of_owners(torch.empty(shape, dtype=torch.int64, device=tensor.device), self.batch)
        if kind is None or (kind == "second" and self.batch_dim == 0 and not self.sources.arguments):
            raise self._unexplained(shape, name)
        layout = Layout(kind, shape, self.batch, source="")
        if not tensor.requires_grad:
            self._look_at_source(layout, tensor)
        if self.batch.kinds:
            self._look_at_kinds(layout, tensor, name, function)
        corrected = self.memory.corrected.get((name, function, len(shape)))
        if corrected is not None and corrected == layout.alternative:
            layout.correct()
        if layout.kind == "leading" or layout.kind == "second":
            self.sources.rows_per_example.add(layout.rows // self.batch.count)
        if tensor.requires_grad and layout.alternative is None:
            self._layouts[shape] = layout  # nothing will be corrected, and nothing but the sizes decided
        return layout

    def _look_at_source(self, layout: Layout, data: Tensor) -> None:
        """What the data's origin says of its rows."""
        argument = self.sources.argument_of(data)
        if argument is not None:
            kind = argument.kind_of(data, layout.kind, layout.examples.count)
            if kind is not None and layout.alternative == kind:
                layout.correct()
            layout.source, layout.anchored = argument.name, kind == layout.kind
            return
        layout.source = DERIVED
        layout.reordered = self.sources.is_reordered(data)
        steady = layout.kind in ("leading", "second", "packed") and layout.alternative is None
        layout.anchored = steady and self.sources.derivation_of(data) is not None

    def _look_at_kinds(self, layout: Layout, tensor: Tensor, name: str, function: str) -> None:
        """Which of several kinds of rows these are, where their number leaves a choice."""
        said = layout.examples.told(layout.shape)
        argument = None if tensor.requires_grad else self.sources.argument_of(tensor)
        choices: list[tuple[Kind, Packing | None]] = [("packed", packing) for packing in said]
        if layout.kind != "packed":
            at = 0 if argument is not None and argument.name == self.sources.first else len(choices)
            choices.insert(at, (layout.kind, None))
        label = self.memory.labels.get((name, function)) if argument is None else argument.name
        if known := [one for one in choices if (one[1].label if one[1] else "") == label]:
            choices = known
        elif argument is not None:  # which has none of the names that were given
            choices = [one for one in choices if one[1] is None or not one[1].named]
        if choices:
            (layout.kind, layout.own), layout.others = choices[0], tuple(choices[1:])
            layout.anchored = layout.anchored and len(choices) == 1

    def _told_rows(self, name: str, shape: tuple[int, ...]) -> Layout | None:
        """Of rows of which the caller has said, for this parameter, whose they are."""
        assert self.batch is not None
        if (given := self.rows_of.get(name)) is None:
            return None
        if len(given) != math.prod(shape):
            raise ValueError(
                f"{self.who}: rows_of must give one example for each row of {name}, got {len(given)} for rows of shape "
                f"{list(shape)}; give {math.prod(shape)} integers"
            )
        layout = Layout.of_owners(given.view(shape), self.batch)
        layout.told, layout.source = True, None
        return layout

    def _followed(self, tensor: Tensor, shape: tuple[int, ...]) -> Layout | None:
        """Of rows that were selected on their way from where it is known whose they are."""
        assert self.batch is not None
        # Where none were selected, the sizes say as much.
        packed = self.batch.packing is not None and len(shape) > 1
        followed = follow(tensor, self._layout_of_sizes, unselected=packed)
        if followed is None:
            return None
        if not followed.regular:
            return Layout.of_owners(followed.owners, self.batch)
        self.sources.rows_per_example.add(math.prod(shape) // self.batch.count)
        return Layout("leading" if shape[0] == self.examples else "flat", shape, self.batch)

    def _picked(self, tensor: Tensor, name: str, function: str) -> Layout | None:
        """Of rows that an index tensor has taken from examples to others, which sizes do not show: ``h[order]``."""
        assert self.batch is not None
        found = follow(tensor, None)  # its own sizes show the batch as well as those of any other tensor
        if found is None or not found.picked or (self.verify and tensor.grad_fn in self.sources.steady_nodes):
            return None
        self.memory.picked.add((name, function))
        return Layout.of_owners(found.owners, self.batch)

    def picked_rows(self, tensor: Tensor, shape: tuple[int, ...]) -> Packing | None:
        """Whose the rows of what the model returned are, if index tensors have chosen them among others."""
        assert self.batch is not None
        found = follow(tensor, None) if tensor.dim() > 1 else None
        if found is None or found.regular or found.owners.shape != shape:
            return None
        return Packing.of_ids(found.owners.reshape(-1), self.batch.count)

    def _layout_of_sizes(self, shape: tuple[int, ...]) -> Layout | None:
        assert self.batch is not None
        return self.batch.layout_of(shape, self.sources.rows_per_example)

    def is_input(self, tensor: Tensor) -> bool:
        """Whether this is an argument of the model that shows the batch, or a view of one."""
        return self.sources.argument_of(tensor) is not None

    def is_constant(self, tensor: Tensor) -> bool:
        return self.sources.is_constant(tensor)

    def is_data(self, tensor: Tensor) -> bool:
        return self.sources.is_data(tensor)

    def _unexplained(self, shape: Sequence[int], name: str) -> ValueError:
        assert self.batch is not None
        known = (
            ", ".join(str(self.batch.count * rows) for rows in sorted(self.sources.rows_per_example - {1}))
            or "none yet"
        )
        packings = [*([self.batch.packing] if self.batch.packing else []), *self.batch.kinds]
        packed = "".join(f" nor the {packing.rows} {packing.label or 'packed'} rows" for packing in packings)
        return ValueError(
            f"{self.who}: the rows of {name} must belong to the batch's {self.examples} examples, got rows of shape "
            f"{list(shape)}, neither {self.examples} in front nor as many rows as this block's tensors with the batch in "
            f"front ({known}){packed}; give tasks and prompts one entry per example, put the batch first or pass "
            "observe(batch_dim=1), expand inputs without a batch dimension to it, and select rows from what trained layers "
            "made, outside of checkpoints and offloading"
        )

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
        """Write down that ``function`` consumed a parameter. Called once per forward, not for a recomputation of it.

        ``others``: the other parameters that the value was derived from.
        """
        followers = tuple(self.use(other, value, views, function, layout) for other in others) if others else ()
        use = Use(slot, value, views, function, layout, self, shared=shared, followers=followers)
        recomputed = torch._C._current_graph_task_id() != -1 and slot.uses
        if not recomputed:
            slot.uses.append(use)
        known = self.memory.verified.get(use.key)
        use.is_known = (
            known is not None
            and (layout.source is None or layout.source in known)
            and not layout.others
            and len(slot.uses) <= self.memory.uses.get(slot.name, 0)
        ) or not layout.rows
        if not use.is_known:
            if self.shards is None and not self.backward_once:
                self.verify = self.verify or self.examples != 1
            else:  # ranks that verify alone would wait for the others' collectives
                self.memory.unverified |= not self.verify and (self.examples or 0) > 1
            if self.examples != 0:
                self._audit(slot)
        if self.verify:
            use.called_at = calling_line()
            self.row_test.half = self.row_test.half or _computes_in_half(value)
        return use

    def look_up(self, use: Use, ids: Tensor) -> Tensor:
        """Write down which entries a use looks up, in the order of its rows; the ids are returned."""
        use.lookup_dim = ids.dim()
        if use.shared:
            of_rows = ids.reshape(-1).repeat(self.examples or 1)
            use.lookup_ids = of_rows, self.segments(len(of_rows))
        else:
            use.lookup_ids = use.layout.ids_of(ids), use.layout.segments
        return ids

    def deliver(
        self, use: Use, contribution: GradientTerm, needs_gradient: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """What a use's backward returns for the parameter and for the probe."""
        slot = use.slot
        if slot.rows_over is not None:
            sums = _sum_over(slot.rows_over, contribution.per_segment())
            contribution = PerSampleGrads(sums, contribution.segments, self.backend)
        if self.verify:
            if self.row_test.running is not None:
                self.row_test.receive(use, contribution)
                return None, None
            self.row_test.look_at_delivered(use, contribution)
        if self.at_once and needs_gradient and self._is_plain(use):
            slot.arrived, slot.measured = 1, True
            self.measured_uses += 1
            formed, measured = contribution.wgrad_in(use.value.dtype, self.weights)
            if not self.on_cpu:  # autograd knows which stream they come from
                return self._audited(use, formed), self._counted(measured)
            slot.norms = measured
            return self._audited(use, formed), self._unmeasured
        if self.phase == "weigh":
            return self._audited(use, contribution.grad(self.weights) if needs_gradient else None), None
        if self.plan.passes == 2 and self.phase is None:
            raise RuntimeError(
                f"{self.who}: with passes=2 the backward must be the optimizer's, got another one; call "
                "optimizer.backward(loss) in place of loss.backward()"
            )
        slot.arrived += 1
        if slot.measured or (slot.arrived > len(slot.uses) * self.backwards):
            raise RuntimeError(
                f"{self.who}: the backward of {slot.name} must run once per use and after all of its uses in the block, "
                f"got a backward pass after its norm had been taken; run all forwards before one backward, say how many "
                f"backward passes there are with observe(backwards={self.backwards + 1}), or open one observe block for "
                "each"
            )
        several = self._adds_up(slot) or use.is_derived
        apart = several or not slot.wanted  # its norm is not taken here
        lookups = self._tied_lookups(use) if several and slot.wanted and contribution.compresses else None
        needs_gradient = needs_gradient and self.phase is None
        direct = self.plan.totals is None and self.plan.layer_weights is None and not use.is_derived
        gradient: Tensor | None
        norms: Tensor | None = None
        own: Tensor | None
        if lookups is not None and needs_gradient and direct:
            gradient, own = contribution.wgrad_in(use.value.dtype, self.weights)  # one product for both
        else:
            gradient, norms = self._formed(use, contribution, needs_gradient, apart)
            own = None if lookups is None else contribution.sqnorm()
        if several and slot.wanted:
            slot.deferred.append(self._deferred(use, contribution, lookups, own))
        slot.measured = not several
        for follower in use.followers:
            if follower.slot.wanted:
                follower.slot.deferred.append(follower.viewed(contribution))
        self.measured_uses += 1
        gradient = self._audited(use, gradient)
        return gradient, self._unmeasured if norms is None else self._counted(norms)

    def _is_plain(self, use: Use) -> bool:
        """Whether this is the only use of a parameter, and of the parameter itself: nearly all are, and cost this."""
        slot = use.slot
        once = len(slot.uses) == 1 and not slot.arrived and slot.measures_directly
        return once and not use.views and not use.followers and slot.rows_over is None

    def _counted(self, norms: Tensor) -> Tensor:
        """A row of the probe's gradient: the norms, and one use."""
        if norms.dtype != self._one.dtype or norms.device != self._one.device:
            norms = norms.to(self._one)
        return torch.cat([norms, self._one])

    def deliver_nothing(self, use: Use, needs_gradient: bool) -> tuple[Tensor | None, Tensor | None]:
        """What a use's backward returns where this rank has no examples."""
        gradient = torch.zeros_like(use.value) if needs_gradient else None
        if self.row_test.running is not None:
            self.row_test.receive_nothing(use)
            return gradient, None
        if self.phase == "weigh":
            return gradient, None
        use.slot.arrived += 1
        self.measured_uses += 1
        return self._audited(use, gradient), self._unmeasured

    @property
    def repeats_backward(self) -> bool:
        """Whether the graph is gone through more than once."""
        return self.verify or self.plan.passes == 2 or self.backwards > 1

    def _adds_up(self, slot: Slot) -> bool:
        """Whether a parameter's gradient is of several uses or passes, or hooked: norms are taken of the whole."""
        return len(slot.uses) > 1 or self.backwards > 1 or bool(slot.hooks)

    def _formed(
        self, use: Use, contribution: GradientTerm, needs_gradient: bool, apart: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """A use's gradient, or what it is formed of at the block's end, and its norms unless they are taken apart."""
        if use.is_derived and self.reduces_early:
            raise RuntimeError(
                f"{self.who}: gradients that are reduced during backward must be formed there, got {use.slot.name}, which "
                "another parameter is derived from, and whose gradient comes when the block closes; freeze it"
            )
        slot, by_layer = use.slot, self.plan.layer_weights
        if by_layer is not None and use.followers:
            together = ", ".join(follower.slot.name for follower in use.followers)
            raise RuntimeError(
                f'{self.who}: with scope="layer" each parameter has a weight of its own, got {slot.name}, which is used '
                f'only together with {together}; use scope="model"'
            )
        if self.plan.totals is not None:
            of_tasks, norms = contribution.per_group()
            gram: Callable[[], Tensor] = functools.partial(gram_of, of_tasks)
            if use.is_curved and not apart:
                measured = use.measured(contribution)
                norms, gram = measured.sqnorm(), measured.gram
            for one in (use, *use.followers):
                self._add_up(one, of_tasks)
            if use.is_derived and not self.plan.keep:
                _keep(use, contribution)
            figures = None if apart else self._with_gram(norms, gram)
            return self._of_known_tasks(of_tasks) if needs_gradient else None, figures
        keep = self.plan.keep or use.is_derived or (by_layer is not None and apart)
        measured = contribution if apart else use.measured(contribution)
        if self.plan.keep and not apart and (out := self._buffer(slot, contribution)) is not None:
            norms = self._with_gram(contribution.per_group(out)[1], functools.partial(gram_of, out))
            slot.kept.append((use, out, ()))
            return out.sum(0) if needs_gradient else None, norms
        if keep:
            _keep(use, contribution)
            audited = self.plan.keep or slot.hooked
            unweighted = contribution.grad() if needs_gradient and audited else None
            return unweighted, None if apart else self._with_gram(measured.sqnorm(), measured.gram)
        if apart:
            return contribution.grad(self.weights) if needs_gradient else None, None
        if not needs_gradient or by_layer is not None or use.is_curved:
            norms = self._with_gram(measured.sqnorm(), measured.gram)
            if not needs_gradient:
                return None, norms
            return contribution.grad(self.weights if by_layer is None else by_layer(slot.name, norms)), norms
        if self.plan.gram and contribution.fuses_groups:
            # The tasks' gradients first: one product for all.
            out, norms = contribution.per_group()
            return self._of_known_tasks(out), self._with_gram(norms, functools.partial(gram_of, out))
        total, norms = contribution.wgrad_in(use.value.dtype, self.weights)
        return total, self._with_gram(norms, contribution.gram)

    def _of_known_tasks(self, gradients: Tensor) -> Tensor:
        weights = self.plan.task_weights
        return gradients.sum(0) if weights is None else torch.tensordot(weights.to(gradients), gradients, 1)

    def _add_up(self, use: Use, gradients: Tensor) -> None:
        """Add what a use gives every task to the parameter's totals."""
        assert self.plan.totals is not None
        slot, shape = use.slot, (len(gradients), *use.slot.parameter.shape)
        total = self.plan.totals.get(slot.name)
        if total is None:
            total = self.plan.totals[slot.name] = gradients.new_zeros(shape)
        if use.views:
            gradients = torch.stack([use.adjoint(gradient) for gradient in gradients.unbind(0)])
        total += gradients.view(shape)

    def _with_gram(self, norms: Tensor, gram: Callable[[], Tensor]) -> Tensor:
        """The norms and, with ``Plan.gram``, the inner products; over ranks these follow when the block closes."""
        if self.plan.over_ranks is not None:
            assert self.batch is not None
            return torch.cat([norms, norms.new_zeros(self.batch.groups.counts[-1] ** 2)])
        return torch.cat([norms, gram().flatten().to(norms)]) if self.plan.gram else norms

    def _add_parts(self, figures: Tensor) -> None:
        """Of parameters that are split among ranks, add the squared norms of the parts."""
        for group in dict.fromkeys(slot.split_over for slot in self.slots.values() if slot.split_over is not None):
            rows = [slot.index for slot in self.slots.values() if slot.split_over is group]
            figures[rows] = _sum_over(group, figures[rows])

    def task_grams(self, over_ranks: Callable[[Tensor], Tensor] | None) -> Tensor:
        """``[parameters, K, K]``: inner products of the tasks' gradients that were added up in ``Plan.totals``.

        Every rank sums every parameter that is measured, whatever it used, in one order.
        """
        assert self.batch is not None and self.plan.totals is not None
        tasks = self.batch.groups.counts[-1]
        grams = torch.zeros(len(self.slots), tasks, tasks, dtype=self.probe.dtype, device=self.probe.device)
        for slot in self.slots.values():
            gradients = self.plan.totals.get(slot.name)
            if over_ranks is not None and slot.wanted:
                of_all = grams.new_zeros(tasks, slot.parameter.numel())
                gradients = over_ranks(of_all if gradients is None else of_all.copy_(gradients.flatten(1)))
            if gradients is not None and slot.wanted:
                if slot.hooks:
                    each = gradients.view(tasks, *slot.parameter.shape).to(slot.parameter.dtype)
                    gradients = torch.stack([hooked(slot.hooks, one) for one in each])
                grams[slot.index] = gram_of(gradients)
        return grams

    def _audited(self, use: Use, gradient: Tensor | None) -> Tensor | None:
        """The gradient in the shape of what was used, written down where the parameter is audited."""
        if gradient is None:
            return None
        if gradient.shape != use.value.shape or gradient.dtype != use.value.dtype:
            gradient = gradient.view_as(use.value).to(use.value.dtype)
        slot = use.slot
        if slot.hooked:
            placed = use.adjoint(gradient).to(slot.parameter.dtype)  # autograd adds up what a cast brought back
            slot.delivered = placed if slot.delivered is None else slot.delivered + placed
        return gradient

    def _buffer(self, slot: Slot, contribution: GradientTerm) -> Tensor | None:
        """Where a parameter's gradients per task go, as far as the budget reaches."""
        if not (self.plan.by_task and contribution.fuses_groups):
            return None
        shape, device = contribution.group_shape, contribution.like.device
        dtype = accumulator(contribution.like.dtype)
        size = math.prod(shape) * dtype.itemsize
        kept = sum(tensor.nbytes for tensor in contribution.saved_tensors)
        if size > (self.budget if self.plan.gram else min(self.budget, kept)):  # whichever is smaller is kept
            return None
        self.budget -= size
        buffer = self.plan.buffers.get(slot.name)
        if buffer is None or buffer.shape != shape or buffer.dtype != dtype or buffer.device != device:
            buffer = self.plan.buffers[slot.name] = contribution.empty_groups()
        return buffer

    def _tied_lookups(self, use: Use) -> list[tuple[Tensor, Segments]] | None:
        """What the other uses of a head tied to embeddings look up; None where its rows are needed."""
        others = [other for other in use.slot.uses if other is not use]
        lookups = [other.lookup_ids for other in others if other.lookup_ids is not None and not other.views]
        plan = self.plan
        whole = plan.keep or plan.gram or self.backwards > 1 or use.slot.hooks
        return lookups if lookups and len(lookups) == len(others) and not whole else None

    def _deferred(
        self,
        use: Use,
        contribution: GradientTerm,
        lookups: list[tuple[Tensor, Segments]] | None,
        sqnorm: Tensor | None,
    ) -> ViewedTerm:
        """Of a head tied to embeddings, what their cross term needs, so that its rows can go; else the contribution."""
        if lookups is not None and sqnorm is not None:
            tied = compress_tied_head(use.viewed(contribution), lookups, sqnorm)
            if tied is not None:
                return tied
        return use.viewed(contribution.clone_saved() if self.graphs else contribution)

    def _audit(self, slot: Slot) -> None:
        if slot.parameter is slot.shard:
            slot.audit_due = True
        elif not slot.hooked:
            slot.hooked = True
            hook = slot.parameter.register_hook(self._auditor(slot))
            # Before hooks of others, which may change the gradient; the engine goes by the order of insertion.
            hooks = slot.parameter._backward_hooks
            assert hooks is not None
            others = {key: hooks.pop(key) for key in list(hooks) if key != hook.id}
            hooks.update(others)
            self._hooks.append(hook)

    def _auditor(self, slot: Slot) -> Callable[[Tensor], Tensor | None]:
        def compare(total: Tensor) -> Tensor | None:
            if self.row_test.running is not None or self.placing:
                return None
            delivered, slot.delivered = slot.delivered, None
            given = total
            if hasattr(total, "to_local"):
                total = total.to_local()
            if delivered is None and not bool(total.any()):  # 0 * sum(parameters): it has no norm to account for
                pass
            elif delivered is None:
                self.failures.append(f"{slot.name} got a gradient from a use that was not seen")
            elif delivered is not total and not torch.equal(delivered, total):
                eps = _rounding_of_sum(slot, total.dtype) * (len(slot.uses) + 1)
                scale = torch.linalg.vector_norm(delivered.double()) + torch.linalg.vector_norm(total.double())
                if not torch.linalg.vector_norm(delivered.double() - total.double()) <= eps * scale and bool(
                    torch.isfinite(scale)
                ):
                    self.failures.append(f"{slot.name} got a gradient that its seen uses account for only in part")
            waits = self.plan.keep or (self.plan.layer_weights is not None and self._adds_up(slot))
            return torch.zeros_like(given) if waits else None

        return compare

    def audit_graphs(self) -> None:
        """Audit every parameter; where gradients wait until the block closes, none may arrive before."""
        slots = () if self.graphs_audited else self.slots.values()
        self.graphs_audited = True
        for slot in slots:
            if not self.plan.keep:
                self._audit(slot)
            elif not slot.hooked:
                self._hooks.append(slot.parameter.register_hook(functools.partial(self._refuse_gradient, slot)))

    def _refuse_gradient(self, slot: Slot, total: Tensor) -> None:
        if bool(total.any()):
            self.failures.append(f"{slot.name} got a gradient from a use that was not seen")

    def norms_pass(self, loss: Tensor) -> None:
        """The first of two backward passes: norms only, no weight gradient."""
        self.phase = "norms"
        torch.autograd.backward((loss,), inputs=(self.probe,), retain_graph=True)

    def weighted_pass(self, loss: Tensor, weights: Tensor) -> None:
        """The second: weight gradients with a weight per example, ``[B]``."""
        self.phase, self.weights = "weigh", weights
        loss.backward()

    def norms(self) -> Tensor:
        """Check that the block was measured whole, and return its figures.

        ``[parameters, columns]``: squared norms, then with ``Plan.gram`` the entries of the tasks' Gram matrix.
        """
        used = [use for slot in self.slots.values() for use in slot.uses]
        if self.examples is None or not used:
            self._refuse_unproven([])
            raise RuntimeError(
                f"{self.who}: the model must be called with gradients inside the observe block, got no call; put the "
                "forward and the backward inside the block"
            )
        if not self.measured_uses:
            raise RuntimeError(
                f"{self.who}: loss.backward() must run inside the observe block, got a forward without it; call it "
                "before the block ends, and without inputs="
            )
        if self.called_with and all(map(math.prod, self.called_with)):
            raise ValueError(
                f"{self.who}: a block of no examples must have a batch without rows, got a call with "
                f"{list(self.called_with[0])}; call the model with an empty batch, x[:0], or give tasks and prompts one entry "
                "per example"
            )
        self._refuse_unproven(used)
        self._refuse_late_hooks()
        found = [one for one in (self.probe.grad, self._of_graphs) if one is not None]
        counted = functools.reduce(torch.add, found)
        figures: Tensor = counted[:, :-1].clone()
        self._check_use_counts(counted[:, -1])
        if taken := {slot.index: slot.norms for slot in self.slots.values() if slot.norms is not None}:
            figures[list(taken)] = torch.stack(list(taken.values())).to(figures)
        for slot in self.slots.values():
            if slot.deferred:
                figures[slot.index] = self._combined(slot).to(figures)
            if slot.kept and self.plan.layer_weights is not None:
                slot.weights = self.plan.layer_weights(slot.name, figures[slot.index])
        self._add_parts(figures)
        if self.plan.over_ranks is not None:
            grams = self.task_grams(self.plan.over_ranks).flatten(1)
            figures[:, -grams.shape[1] :] = grams
            assert self.plan.totals is not None
            self.plan.totals.clear()  # a second pass would keep them in vain
        return figures

    def _refuse_late_hooks(self) -> None:
        """Hooks that came after norms may have been taken without them."""
        for slot in self.slots.values():
            has_hooks = slot.hooks or slot.parameter._backward_hooks
            if has_hooks and hooks_of(slot.parameter, self._hooks) != slot.hooks:
                raise RuntimeError(
                    f"{self.who}: hooks on parameters must be the same from a block's beginning to its end, got others on "
                    f"{slot.name}; register and remove them outside of the block"
                )

    def close(self) -> None:
        """Refuse what came to light after the norms were taken, and form the gradients that waited for the end."""
        self.release()
        self._refuse_unproven([])
        if not self.plan.keep:
            self.accumulate_weighted(self.weights)
        self._learn()  # not before: what a second pass refutes is not proven

    def _refuse_unproven(self, used: Sequence[Use]) -> None:
        judged = self.row_test.judge([use for use in used if use.slot.arrived]) if self.verify else []
        failures = list(dict.fromkeys([*self.failures, *(f"{one.word}: {one.message}" for one in judged)]))
        if not failures:
            return
        lookups = {one.use for one in judged if one.word == "refuted" and one.use.lookup_dim and not one.use.shared}
        learnt = ""
        if len(failures) == len({use.slot.name for use in lookups}):
            self.memory.shared_lookups |= {(use.slot.name, use.lookup_dim) for use in lookups}
            learnt = " (from now on it is taken for a table that all examples share: run the batch again)"
        advice = list(dict.fromkeys(one.advice for one in judged)) or [_ADVICE]
        raise RuntimeError(
            f"{self.who}: every use of a trainable parameter must be measured by rules, per example; but "
            f"{'; '.join(failures)}{learnt}; {'; or '.join(advice)}"
        )

    def _check_use_counts(self, counted: Tensor) -> None:
        if counted.device.type != "cpu":
            return
        for slot, count in zip(self.slots.values(), counted.tolist(), strict=True):
            if count != slot.arrived or count > len(slot.uses) * self.backwards:
                raise RuntimeError(
                    f"{self.who}: the backward of {slot.name} must run once per use, got {int(count)} passes for "
                    f"{len(slot.uses)} uses; call backward once, or pass observe(backwards=...)"
                )

    def _combined(self, slot: Slot) -> Tensor:
        """The figures of a parameter with several uses, or with hooks."""
        if slot.hooks:
            gradients = HookedGradients(self.who, slot.name, slot.parameter, slot.hooks, slot.deferred)
            tasks = slot.deferred[0].term.segments.groups.counts[-1]
            return self._with_gram(gradients.sqnorms(), lambda: gram_of(gradients.of_tasks(tasks)))
        norms = combined_sqnorm(slot.deferred).clamp(min=0)
        return self._with_gram(norms, functools.partial(combined_gram, slot.deferred))

    def _learn(self) -> None:
        self.memory.blocks += 1
        if self.verify and (self.examples or 0) > 1:
            self.memory.unverified = self.row_test.blurred
        seen = [slot for slot in self.slots.values() if slot.arrived or slot.deferred]
        if self.examples != 0:
            self.memory.audited |= {slot.name for slot in seen}
        if self.examples is not None and self.examples > 1 and self.verify and not self.row_test.blurred:
            for slot in seen:
                self.memory.uses[slot.name] = max(len(slot.uses), self.memory.uses.get(slot.name, 0))
            for use in (use for slot in seen for use in slot.uses):
                if self.row_test.proves(use) and not use.layout.others:
                    self.memory.verified.setdefault(use.key, set()).add(use.layout.source or "")
                    self.memory.kinds.setdefault((use.slot.name, use.function), set()).add(use.layout.kind)
                    if use.layout.examples.kinds:
                        self.memory.labels[use.slot.name, use.function] = use.layout.own.label if use.layout.own else ""
                else:
                    self.memory.unverified |= not use.is_known
        for slot in self.slots.values():
            for use in slot.uses:
                if use.shared and use.lookup_ids is not None:
                    self.memory.shared_lookups.add((slot.name, use.lookup_dim))
                if use.layout.corrected:
                    self.memory.corrected[slot.name, use.function, len(use.layout.shape)] = use.layout.kind

    @torch.no_grad()
    def accumulate_weighted(self, weights: Tensor | None, by_task: Tensor | None = None) -> None:
        """Form the weighted gradient of everything that was kept, and add it to ``.grad``.

        Args:
            weights: ``[B]``; None: all are 1.
            by_task: ``[K]`` where the weights are the tasks'.
        """
        for slot in self.slots.values():
            for use, kept, versions in slot.kept:
                if isinstance(kept, Tensor):
                    assert by_task is not None
                    gradient = torch.mv(kept.flatten(1).t(), by_task.to(kept.dtype))
                else:
                    if versions != tuple(tensor._version for tensor in kept.saved_tensors):
                        raise RuntimeError(
                            f"{self.who}: what the backward of {slot.name} kept must not change before the block "
                            "closes, got an in-place change; avoid in-place operations on gradients and activations, "
                            'or use apply="next_step"'
                        )
                    gradient = kept.grad(weights if slot.weights is None else slot.weights)
                self._accumulate(use, gradient.view_as(use.value).to(use.value.dtype))
            slot.kept.clear()

    def _accumulate(self, use: Use, gradient: Tensor) -> None:
        if use.value is use.slot.parameter:
            accumulate(use.slot.parameter, gradient)
        else:
            with torch.enable_grad():  # through views
                torch.autograd.backward((use.value,), (gradient,), retain_graph=use.is_derived)

    def evidence(self) -> dict[str, list[str]]:
        """By parameter, what each of its uses was proven by in this block."""
        return {
            slot.name: [f"{use.place_in_code}: {self.row_test.evidence_of(use)}" for use in slot.uses]
            for slot in self.slots.values()
        }

    def release(self) -> None:
        """Take the hooks off the parameters and off what the model returned."""
        self.row_test.release()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def forget(self) -> None:
        """Let go of rows and uses: they refer to the block and it to them, and would wait for the garbage collector."""
        for slot in self.slots.values():
            for kept in (slot.uses, slot.deferred, slot.kept):
                kept.clear()
        self.closed = True
        self.slots.clear()
        self.taps.clear()
        del self.start, self.row_test, self.sources


_ADVICE = (
    "read parameters through their modules, tell what a custom autograd.Function computes with gradnorm_ext.measure_as, or "
    "freeze these parameters"
)


def _keep(use: Use, contribution: GradientTerm) -> None:
    if use.observation.graphs:
        contribution = contribution.clone_saved()
    versions = tuple(kept._version for kept in contribution.saved_tensors)
    use.slot.kept.append((use, contribution, versions))


def accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add to ``.grad`` as a backward would, past the parameter's hooks."""
    if parameter._backward_hooks:
        with torch.enable_grad():
            torch.autograd.backward((parameter,), (gradient,))
    elif parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad += gradient


def _rounding_of_sum(slot: Slot, dtype: torch.dtype) -> float:
    """How far autograd rounds a parameter's gradient: what several uses of one cast gave it, it adds up in the cast's dtype."""
    casts = [use.value for use in slot.uses if use.value.dtype != dtype]
    places = [memory_of(cast) for cast in casts]
    shared = (cast.dtype for cast, place in zip(casts, places, strict=True) if place is None or places.count(place) > 1)
    return max(torch.finfo(one).eps for one in (dtype, *shared))
