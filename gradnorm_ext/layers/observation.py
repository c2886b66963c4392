"""One observe block: which parameters were used how, and what their uses' backward passes deliver.

Which row belongs to which example is a hypothesis (`gradnorm_ext.layers.layouts`) until the *tagging test* has passed:
in the first block, in the 10th, 100th and so on, and whenever a use of a new kind appears, the backward runs again from
the most downstream use, every example's gradient scaled by its own power of two. Each row of every use must then scale
bit for bit by the factor of the example it is counted for (nearly, where float16 rounds small numbers). The layout of
that most downstream use itself is taken as its sizes say; where they say only a count of rows, or had to be corrected,
a use upstream whose sizes leave no choice must confirm it.

The *audit* of the same block compares, for every parameter, the gradient that autograd accumulates with the sum of
what the uses delivered: a use that was not seen is an error, not a missing summand.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils import _pytree as pytree

from gradnorm_ext.backends import choose
from gradnorm_ext.layers.contributions import (
    Contribution,
    Convolved,
    Lookup,
    Outer,
    Parted,
    Place,
    Placed,
    Routed,
    Sums,
    TiedOuter,
    combined_gram,
    combined_sqnorm,
    copied,
    gram_of,
    tied_sqnorm,
)
from gradnorm_ext.layers.layouts import Examples, Kind, Layout
from gradnorm_ext.layers.provenance import follow
from gradnorm_ext.reference import accumulator
from gradnorm_ext.segments import Segments

Input = tuple[GradientEdge, Tensor, Layout]  # of a use: where its gradient goes, the gradient, and whose its rows are


class Slot:
    """A trainable parameter in one block: its place in the probe, and what its uses left to be combined."""

    def __init__(self, index: int, name: str, parameter: nn.Parameter, wanted: bool) -> None:
        self.index, self.name, self.parameter = index, name, parameter
        self.wanted = wanted  # measured, not only weighed
        self.uses: list[Use] = []
        self.arrived = 0  # backward passes of uses
        self.measured = False  # by a single use
        self.norms: Tensor | None = None  # by a single use, past the probe
        self.deferred: list[tuple[Use, Contribution | TiedOuter]] = []  # several uses: combined when the block closes
        self.kept: list[tuple[Use, Contribution | Tensor, tuple[int, ...]]] = []  # weighted when the block closes
        self.weights: Tensor | None = None  # per example, where the parameter has its own
        self.hooked = False  # audited in this block
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
    needs_proof: bool = False  # what it meets may have no batch dimension: the tagging test has to pass through it
    fingerprint: Tensor | None = field(default=None, repr=False)
    tagged: bool = False  # the tagging test has passed through it, or has started from it
    confirmed: bool = True  # the test started from it: something upstream proves its layout, where that is needed

    @property
    def key(self) -> tuple[str, str, str, tuple[str, ...]]:
        return self.slot.name, self.function, "shared" if self.shared else self.layout.kind, self.views

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
        late = self.is_derived or (self.observation.plan.keep and not self.slot.hooked)
        return self.value.detach() if late else self.value

    @property
    def place(self) -> Place | None:
        """Where the value lies in the parameter's memory; None where it is not a view of it."""
        value, parameter = self.value, self.slot.parameter
        if hasattr(parameter, "device_mesh"):
            return None
        is_view = value.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
        if not is_view or value.dtype != parameter.dtype:
            return None
        return Place(int(value.storage_offset()), tuple(value.shape), value.stride())

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

    def measured(self, contribution: Contribution) -> Contribution:
        """The contribution whose norms are those of the parameter's gradient."""
        if not self.is_curved:
            return contribution
        assert isinstance(contribution, Sums)
        return replace(contribution, sums=self.adjoint(contribution.sums, several=True))


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

    verified: set[tuple[str, str, str, tuple[str, ...]]] = field(default_factory=set)
    shared_lookups: set[tuple[str, int]] = field(default_factory=set)  # (parameter, dimensions of the ids)
    corrected: dict[tuple[str, str, int], Kind] = field(default_factory=dict)  # (parameter, function, dimensions)
    kinds: dict[tuple[str, str], set[Kind]] = field(default_factory=dict)  # (parameter, function): what was verified
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


def _memory_of(tensor: Tensor) -> int | None:
    """Where a tensor's entries lie; None of one that has none itself: a DTensor, or what a collective has yet to bring."""
    if hasattr(tensor, "device_mesh"):
        return None
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:  # torch's, of wrappers without a storage
        return None


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
        self.derives = derives  # uses without a rule are differentiated one example at a time
        self.constants = functools.cache(constants)  # where the model's buffers and frozen parameters lie
        self.frozen: dict[int, Tensor] = {}  # and where those lie that FSDP2 gathers anew each time
        self.examples: int | None = None
        self.batch: Examples | None = None
        self.weights: Tensor | None = None  # per example
        self.verify = verify
        self.half = False  # something is computed in float16
        self.blurred = False  # the tagging test met numbers that were not finite, and is to be run again
        self.graphs = graphs  # compiled graphs are observed
        self.graphs_audited = False
        self.runs: dict[int, list[Any]] = {}  # of these graphs, by their numbers
        self._of_graphs: Tensor | None = None  # figures that came from there
        self.backward_once = graphs  # also through a selective checkpoint: verifying has to wait for the next block
        self.phase: Literal["norms", "weigh"] | None = None  # of two passes
        self.tagging: Literal["base", "scaled"] | None = None
        self.tag_factor: Tensor | None = None
        self.placing = False
        self.failures: list[str] = []
        self.called_with: list[tuple[int, ...]] = []  # sizes, in a block without examples
        self.refuted: list[Use] = []  # in the running test
        self.proven = False  # in the running test, a use has passed whose sizes leave no choice
        self.refuted_lookups: list[Use] = []  # taken for batched, and not
        self._layouts: dict[tuple[int, ...], Layout] = {}  # of activations, by their sizes
        self._layouts_in_graphs: dict[tuple[Kind, tuple[int, ...]], Layout] = {}
        self.rows_per_example: set[int] = set()  # of tensors that show the batch
        self.inputs: set[int] = set()  # where the model's inputs lie that show the batch
        self.data: set[int] = set()  # where the arguments of modules lie that carry no gradient
        self.budget = plan.budget
        self.at_once = False  # gradient and norms are taken when a backward arrives, and nothing else
        self.measured_uses = 0
        self._hooks: list[Any] = []

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
            if (self.verify or slot.name not in self.memory.audited) and batch.count > 0:
                self._audit(slot)
        if self.graphs and self.probe.device.type == "cpu":  # elsewhere it would wait for the device
            self.audit_graphs()

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

    def look_at_frozen(self, parameter: nn.Parameter) -> None:
        """Under FSDP2 a frozen parameter lies elsewhere whenever it is whole, which is when it is read."""
        if self.shards is not None and not hasattr(parameter, "device_mesh"):
            self.frozen[parameter.untyped_storage().data_ptr()] = parameter

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

    def look_at_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What a module's arguments say; the first ones are the model's inputs."""
        for one in args:
            if isinstance(one, Tensor) and not one.requires_grad and (where := _memory_of(one)) is not None:
                self.data.add(where)
        if not self.rows_per_example:
            self._look_at_inputs(args, kwargs)

    def _look_at_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """How many examples there are, where nothing else says so, and how many rows each."""
        inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim() > 0]
        if self.examples == 0:
            self.called_with += [tuple(t.shape) for t in inputs]
        if self.examples is None:
            self._begin_with([t.shape[self.batch_dim] for t in inputs if t.dim() > self.batch_dim])
        for one in inputs:
            if one.dim() > self.batch_dim and one.shape[self.batch_dim] == self.examples:
                first = one.shape[1 - self.batch_dim] if one.dim() > 1 else 1
                self.rows_per_example |= {first * math.prod(one.shape[2:end]) for end in range(2, one.dim() + 1)}
                if (where := _memory_of(one)) is not None:
                    self.inputs.add(where)

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
        followable = features == 1 and tensor.requires_grad
        if followable and len(shape) == 1 and (followed := self._followed(tensor, shape)) is not None:
            return followed
        if tensor.requires_grad and (known := self._layouts.get(shape)) is not None:
            return known
        kind = self.batch.kind_of(shape, self.rows_per_example)
        if followable and len(shape) > 1 and kind in (None, "second") and (followed := self._followed(tensor, shape)):
            return followed
        if kind is None or (kind == "second" and self.batch_dim == 0 and not self.inputs):
            raise self._unexplained(shape, name)
        layout = Layout(kind, shape, self.batch, anchored=not tensor.requires_grad and self.is_input(tensor))
        layout.of_constant = not tensor.requires_grad and self.is_constant(tensor)
        corrected = self.memory.corrected.get((name, function, len(shape)))
        if corrected is not None and corrected == layout.alternative:
            layout.correct()
        if kind == "leading" or kind == "second":
            self.rows_per_example.add(layout.rows // self.batch.count)
        if tensor.requires_grad and layout.alternative is None:
            self._layouts[shape] = layout  # nothing will be corrected, and nothing but the sizes decided
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
        self.rows_per_example.add(math.prod(shape) // self.batch.count)
        return Layout("leading" if shape[0] == self.examples else "flat", shape, self.batch)

    def _layout_of_sizes(self, shape: tuple[int, ...]) -> Layout | None:
        assert self.batch is not None
        kind = self.batch.kind_of(shape, self.rows_per_example)
        return None if kind is None else Layout(kind, shape, self.batch)

    def is_input(self, tensor: Tensor) -> bool:
        """Whether this is an input of the model that shows the batch, or a view of one."""
        return _memory_of(tensor) in self.inputs

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether this is a buffer or a frozen parameter, which has no batch dimension whatever its sizes."""
        if (where := _memory_of(tensor)) is None:
            return False
        gathered = self.frozen.get(where)
        return where in self.constants() or (
            gathered is not None and gathered.untyped_storage().data_ptr() == where  # else its memory is another's now
        )

    def is_data(self, tensor: Tensor) -> bool:
        """Whether this is known to be no constant: an activation, or an argument of the model or one of its modules."""
        return tensor.requires_grad or _memory_of(tensor) in self.data

    def _unexplained(self, shape: Sequence[int], name: str) -> ValueError:
        assert self.batch is not None
        known = ", ".join(str(self.batch.count * rows) for rows in sorted(self.rows_per_example - {1})) or "none yet"
        packing = self.batch.packing
        packed = f" nor the {packing.rows} packed rows" if packing else ""
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
        use.needs_proof = layout.of_constant
        recomputed = torch._C._current_graph_task_id() != -1 and slot.uses
        if not recomputed:
            slot.uses.append(use)
        if use.key not in self.memory.verified:
            if self.shards is None and not self.backward_once:
                self.verify = self.verify or self.examples != 1
            else:  # ranks that verify alone would wait for the others' collectives
                self.memory.unverified |= not self.verify and (self.examples or 0) > 1
            if self.examples != 0:
                self._audit(slot)
        if self.verify and not self.half:
            self.half = _computes_in_half(value)
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
        self, use: Use, contribution: Contribution, needs_gradient: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """What a use's backward returns for the parameter and for the probe."""
        slot = use.slot
        if self.at_once and needs_gradient and self.tagging is None and self._is_plain(use):
            slot.arrived, slot.measured = 1, True
            self.measured_uses += 1
            formed, measured = contribution.wgrad(self.weights)
            if not self.on_cpu:  # autograd knows which stream they come from
                return self._audited(use, formed), self._counted(measured)
            slot.norms = measured
            return self._audited(use, formed), self._unmeasured
        if slot.rows_over is not None:
            assert isinstance(contribution, Sums)
            contribution = replace(contribution, sums=_sum_over(slot.rows_over, contribution.sums))
        if self.tagging is not None:
            self._tag(use, contribution)
            return None, None
        if self.phase == "weigh":
            return self._audited(use, contribution.total(self.weights) if needs_gradient else None), None
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
        gradient, norms = self._formed(use, contribution, needs_gradient and self.phase is None, apart)
        if several and slot.wanted:
            slot.deferred.append((use, self._thinned(slot, use, contribution)))
        slot.measured = not several
        for follower in use.followers:
            if follower.slot.wanted:
                follower.slot.deferred.append((follower, contribution))
        self.measured_uses += 1
        gradient = self._audited(use, gradient)
        return gradient, self._unmeasured if norms is None else self._counted(norms)

    def _is_plain(self, use: Use) -> bool:
        """Whether this is the only use of a parameter, and of the parameter itself: nearly all are, and cost this."""
        slot = use.slot
        once = len(slot.uses) == 1 and not slot.arrived and slot.wanted
        return once and not use.views and not use.followers and slot.rows_over is None

    def _counted(self, norms: Tensor) -> Tensor:
        """A row of the probe's gradient: the norms, and one use."""
        if norms.dtype != self._one.dtype or norms.device != self._one.device:
            norms = norms.to(self._one)
        return torch.cat([norms, self._one])

    def deliver_nothing(self, use: Use, needs_gradient: bool) -> tuple[Tensor | None, Tensor | None]:
        """What a use's backward returns where this rank has no examples."""
        gradient = torch.zeros_like(use.value) if needs_gradient else None
        if self.tagging is not None or self.phase == "weigh":
            use.tagged = use.tagged or self.tagging == "scaled"
            return gradient, None
        use.slot.arrived += 1
        self.measured_uses += 1
        return self._audited(use, gradient), self._unmeasured

    @property
    def repeats_backward(self) -> bool:
        """Whether the graph is gone through more than once."""
        return self.verify or self.plan.passes == 2 or self.backwards > 1

    def _adds_up(self, slot: Slot) -> bool:
        """Whether a parameter's gradient is of several uses or passes, whose norms are not those of their sum."""
        return len(slot.uses) > 1 or self.backwards > 1

    def _formed(
        self, use: Use, contribution: Contribution, needs_gradient: bool, apart: bool
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
            of_tasks, norms = contribution.by_new_group()
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
        if (
            self.plan.keep
            and not apart
            and isinstance(contribution, (Outer, Parted, Routed, Convolved))
            and (out := self._buffer(slot, contribution)) is not None
        ):
            norms = self._with_gram(contribution.by_group(out), functools.partial(gram_of, out))
            slot.kept.append((use, out, ()))
            return out.sum(0) if needs_gradient else None, norms
        if keep:
            _keep(use, contribution)
            audited = self.plan.keep or slot.hooked
            unweighted = contribution.total() if needs_gradient and audited else None
            return unweighted, None if apart else self._with_gram(measured.sqnorm(), measured.gram)
        if apart:
            return contribution.total(self.weights) if needs_gradient else None, None
        if not needs_gradient or by_layer is not None or use.is_curved:
            norms = self._with_gram(measured.sqnorm(), measured.gram)
            if not needs_gradient:
                return None, norms
            return contribution.total(self.weights if by_layer is None else by_layer(slot.name, norms)), norms
        if self.plan.gram and isinstance(contribution, (Outer, Parted, Routed, Convolved)):
            # The tasks' gradients first: one product for all.
            out, norms = contribution.by_new_group()
            return self._of_known_tasks(out), self._with_gram(norms, functools.partial(gram_of, out))
        total, norms = contribution.wgrad(self.weights)
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
            placed = use.adjoint(gradient)
            slot.delivered = placed if slot.delivered is None else slot.delivered + placed
        return gradient

    def _buffer(self, slot: Slot, contribution: Outer | Parted | Routed | Convolved) -> Tensor | None:
        """Where a parameter's gradients per task go, as far as the budget reaches."""
        if not self.plan.by_task:
            return None
        shape = contribution.segments.groups.counts[-1], *contribution.shape
        dtype = accumulator(contribution.x.dtype)
        size = math.prod(shape) * dtype.itemsize
        kept = sum(tensor.nbytes for tensor in contribution.kept)
        if size > (self.budget if self.plan.gram else min(self.budget, kept)):  # whichever is smaller is kept
            return None
        self.budget -= size
        buffer = self.plan.buffers.get(slot.name)
        if buffer is None or buffer.shape != shape or buffer.dtype != dtype or buffer.device != contribution.x.device:
            buffer = self.plan.buffers[slot.name] = contribution.x.new_empty(shape, dtype=dtype)
        return buffer

    def _thinned(self, slot: Slot, use: Use, contribution: Contribution) -> Contribution | TiedOuter:
        """Of a head tied to embeddings, what their cross term needs, so that its rows can go; else the contribution."""
        lookups = [other.lookup_ids for other in slot.uses if other.lookup_ids is not None]
        whole = self.plan.keep or self.plan.gram or self.backwards > 1
        if len(lookups) != len(slot.uses) - 1 or not isinstance(contribution, (Outer, Parted)) or whole:
            return copied(contribution) if self.graphs else contribution
        placed = Placed(contribution, use.views, use.adjoint).in_parameter_space()
        if placed.views or not isinstance(placed.contribution, (Outer, Parted)):
            return copied(contribution) if self.graphs else contribution
        return TiedOuter.of(placed.contribution, lookups)

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
            if self.tagging is not None or self.placing:
                return None
            delivered, slot.delivered = slot.delivered, None
            given = total
            if hasattr(total, "to_local"):
                total = total.to_local()
            if delivered is None:
                self.failures.append(f"{slot.name} got a gradient from a use that was not seen")
            elif delivered is not total and not torch.equal(delivered, total):
                eps = torch.finfo(total.dtype).eps * (len(slot.uses) + 1)
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

    def run_tagging(self, inputs: Sequence[Input], uses: Sequence[Use]) -> None:
        """The tagging test of everything upstream of a use: called in its backward, with the gradients of its inputs."""
        alone = self.examples == 1 and self.shards is None
        if alone or self.tagging is not None or all(use.tagged for use in uses):
            return
        root = uses[0].layout
        tried: set[Layout] = set()
        assert self.examples is not None
        digits = max(1, math.ceil(math.log(max(1, self.examples), 8)))
        if self.shards is not None:
            (digits,) = self.shards.agree(digits)
        while True:
            with nullcontext() if self.shards is None else self.shards.paused():
                self._run_tagging_once(inputs, digits)
            again = {use.layout for use in self.refuted if use.layout.alternative is not None} - tried
            if not again and self.refuted and not self.proven and root.alternative is not None and root not in tried:
                for layout in tried:  # they were judged by a root that was not right
                    layout.correct()
                tried, again = {root}, {root}
            if not (again if self.shards is None else self.shards.agree(len(again))[0]):
                break
            for layout in again:
                layout.correct()
            tried |= again
        self.failures += [self._not_per_example(use) for use in self.refuted]
        self.refuted_lookups += [use for use in self.refuted if use.lookup_dim and not use.shared]
        for use in uses:
            use.tagged = True
            use.confirmed = self.proven or not (tried or root.is_flat)

    def _not_per_example(self, use: Use) -> str:
        return (
            f"{use.slot.name} ({use.function}, rows {list(use.layout.shape)}) was used with rows that do not belong to one "
            "example each, or not to the example their place says"
        )

    def _run_tagging_once(self, inputs: Sequence[Input], digits: int) -> None:
        assert self.examples is not None
        edges, gradients, layouts = zip(*inputs, strict=True)
        example = torch.arange(self.examples, device=gradients[0].device)
        self.refuted, self.proven = [], False
        try:
            self.tagging = "base"
            self._backward_to_probe(edges, gradients)
            self.tagging = "scaled"
            for digit in range(digits):
                power = ((example // 8**digit) % 8).to(torch.float32)
                factor = self.tag_factor = 2.0 ** (
                    power - 7 if self.half else power
                )  # 1: all that float16 has room for
                scaled = gradients
                if self.examples > 0:
                    each = zip(gradients, layouts, strict=True)
                    scaled = tuple(layout.scaled(g, factor.to(g.dtype)) for g, layout in each)
                self._backward_to_probe(edges, scaled)
        finally:
            self.tagging = None

    def _backward_to_probe(self, edges: Sequence[GradientEdge], gradients: Sequence[Tensor]) -> None:
        torch.autograd.grad(edges, (self.probe,), gradients, retain_graph=True, allow_unused=True)

    def _tag(self, use: Use, contribution: Contribution) -> None:
        fingerprint = contribution.fingerprint()
        if self.tagging == "base":
            use.fingerprint = fingerprint
            return
        assert self.tag_factor is not None and use.fingerprint is not None
        factor = self.tag_factor.to(fingerprint.dtype)
        if isinstance(contribution, (Outer, Parted, Lookup, Convolved)):
            factor = contribution.segments.per_row(factor)
        elif isinstance(contribution, Routed):
            factor = contribution.route.segments.per_row(factor.repeat(contribution.route.experts))
        expected = use.fingerprint * factor
        use.tagged = True
        if torch.equal(fingerprint, expected) or (self.half and self._nearly_equal(fingerprint, expected)):
            proves = use.layout.proves(self.rows_per_example) and (use.layout.anchored or not use.needs_proof)
            self.proven |= proves and bool((fingerprint > 0).any())
        elif not bool(torch.isfinite(fingerprint).all()):
            self.blurred = True
        elif use not in self.refuted:
            self.refuted.append(use)

    def _nearly_equal(self, fingerprint: Tensor, expected: Tensor) -> bool:
        """float16 rounds small numbers to multiples of 2^-24: another example's factor is off by two at least."""
        small = fingerprint.new_tensor(2.0**-10)
        return bool(((fingerprint - expected).abs() <= torch.maximum(expected / 8, small)).all())

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

    def close(self) -> None:
        """Refuse what came to light after the norms were taken, and form the gradients that waited for the end."""
        self.release()
        self._refuse_unproven([])
        if not self.plan.keep:
            self.accumulate_weighted(self.weights)
        self._learn()  # not before: what a second pass refutes is not proven

    def _refuse_unproven(self, used: Sequence[Use]) -> None:
        if self.verify and self.examples is not None and self.examples > 1:
            for use in used:
                if use.needs_proof and use.slot.arrived and not (use.tagged or use.layout.anchored):
                    self.failures.append(self._not_per_example(use))
                    if use.lookup_dim:
                        self.refuted_lookups.append(use)
            self.failures += [
                f"{use.slot.name} ({use.function}, rows {list(use.layout.shape)}) was used with rows whose sizes do not say "
                "in which order they are, and nothing before it whose sizes say so proves it"
                for use in used
                if use.slot.arrived and not (use.confirmed and (use.tagged or not use.layout.is_flat))
            ]
        if not self.failures:
            return
        failures = list(dict.fromkeys(self.failures))
        learnt = ""
        if len(failures) == len({use.slot.name for use in self.refuted_lookups}):
            self.memory.shared_lookups |= {(use.slot.name, use.lookup_dim) for use in self.refuted_lookups}
            learnt = " (from now on it is taken for a table that all examples share: run the batch again)"
        raise RuntimeError(
            f"{self.who}: every use of a trainable parameter must be measured by rules, per example; but "
            f"{'; '.join(failures)}{learnt}; expand inputs without a batch dimension to the batch, read parameters "
            "through their modules, tell what a custom autograd.Function computes with gradnorm_ext.measure_as, or freeze these "
            "parameters"
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
        """The figures of a parameter with several uses."""
        parts = [part for _, part in slot.deferred]
        heads = [part for part in parts if isinstance(part, TiedOuter)]
        if heads:
            lookups = [part for part in parts if isinstance(part, Lookup)]
            return tied_sqnorm(heads[0], lookups).clamp(min=0) if lookups else heads[0].norms
        placed = [
            Placed(part, use.views, use.adjoint, use.place)
            for use, part in slot.deferred
            if not isinstance(part, TiedOuter)
        ]
        return self._with_gram(combined_sqnorm(placed).clamp(min=0), functools.partial(combined_gram, placed))

    def _learn(self) -> None:
        self.memory.blocks += 1
        if self.verify:
            self.memory.unverified = self.blurred
        seen = [slot for slot in self.slots.values() if slot.arrived or slot.deferred]
        if self.examples != 0:
            self.memory.audited |= {slot.name for slot in seen}
        if self.examples is not None and self.examples > 1 and self.verify and not self.blurred:
            self.memory.verified |= {use.key for slot in seen for use in slot.uses}
            for use in (use for slot in seen for use in slot.uses):
                self.memory.kinds.setdefault((use.slot.name, use.function), set()).add(use.layout.kind)
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
                    if versions != tuple(tensor._version for tensor in kept.kept):
                        raise RuntimeError(
                            f"{self.who}: what the backward of {slot.name} kept must not change before the block "
                            "closes, got an in-place change; avoid in-place operations on gradients and activations, "
                            'or use apply="next_step"'
                        )
                    gradient = kept.total(weights if slot.weights is None else slot.weights)
                self._accumulate(use, gradient.view_as(use.value).to(use.value.dtype))
            slot.kept.clear()

    def _accumulate(self, use: Use, gradient: Tensor) -> None:
        if use.value is use.slot.parameter:
            accumulate(use.slot.parameter, gradient)
        else:
            with torch.enable_grad():  # through views
                torch.autograd.backward((use.value,), (gradient,), retain_graph=use.is_derived)

    def release(self) -> None:
        """Take the audit's hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def forget(self) -> None:
        """Let go of rows and uses: they refer to the block and it to them, and would wait for the garbage collector."""
        for slot in self.slots.values():
            for kept in (slot.uses, slot.deferred, slot.kept):
                kept.clear()
        self.slots.clear()
        self.frozen.clear()
        del self.start


def _keep(use: Use, contribution: Contribution) -> None:
    if use.observation.graphs:
        contribution = copied(contribution)
    versions = tuple(kept._version for kept in contribution.kept)
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
