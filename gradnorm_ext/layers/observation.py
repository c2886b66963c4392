"""One observe block: which parameters were used how, and what their uses' backward passes deliver.

Which row belongs to which example is a hypothesis (`gradnorm_ext.layers.layouts`) until the *tagging test* has passed:
in the first block, in the 10th, 100th and so on, and whenever a use of a new kind appears, the backward runs again from
the most downstream use, every example's gradient scaled by its own power of two. Each row of every use must then scale
bit for bit by the factor of the example it is counted for. The layout of that most downstream use itself is taken as
its sizes say; where they say only a count of rows, or had to be corrected, a use upstream whose sizes leave no choice
must confirm it.

The *audit* of the same block compares, for every parameter, the gradient that autograd accumulates with the sum of
what the uses delivered: a use that was not seen is an error, not a missing summand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradnorm_ext.backends import choose
from gradnorm_ext.layers.contributions import (
    Contribution,
    Convolved,
    Lookup,
    Outer,
    Place,
    Placed,
    TiedOuter,
    combined_sqnorm,
    per_row,
    tied_sqnorm,
)
from gradnorm_ext.layers.layouts import Examples, Kind, Layout
from gradnorm_ext.reference import accumulator
from gradnorm_ext.segments import Segments


class Slot:
    """A trainable parameter in one block: its place in the probe, and what its uses left to be combined."""

    def __init__(self, index: int, name: str, parameter: nn.Parameter) -> None:
        self.index, self.name, self.parameter = index, name, parameter
        self.uses: list[Use] = []
        self.arrived = 0  # backward passes of uses
        self.measured = False  # by a single use, through the probe
        self.deferred: list[tuple[Use, Contribution | TiedOuter]] = []  # several uses: combined when the block closes
        self.kept: list[tuple[Use, Contribution | Tensor, tuple[int, ...]]] = []  # weighted when the block closes
        self.hooked = False  # audited in this block
        self.delivered: Tensor | None = None  # audit: the sum of what the rules gave


@dataclass
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
    fingerprint: Tensor | None = field(default=None, repr=False)
    tagged: bool = False  # the tagging test has passed through it, or has started from it
    confirmed: bool = True  # the test started from it: something upstream proves its layout, where that is needed

    @property
    def key(self) -> tuple[str, str, str, tuple[str, ...]]:
        return self.slot.name, self.function, "shared" if self.shared else self.layout.kind, self.views

    @property
    def operand(self) -> Tensor:
        """What the function computes with: cut off from the parameter where its gradient is formed at the block's end."""
        return self.value.detach() if self.observation.plan.keep and not self.slot.hooked else self.value

    @property
    def place(self) -> Place | None:
        """Where the value lies in the parameter's memory; None where it is not a view of it."""
        value, parameter = self.value, self.slot.parameter
        is_view = value.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
        if not is_view or value.dtype != parameter.dtype:
            return None
        return Place(int(value.storage_offset()), tuple(value.shape), value.stride())

    def adjoint(self, gradient: Tensor) -> Tensor:
        """A gradient of the consumed tensor as one of the parameter."""
        if not self.views:
            return gradient
        self.observation.placing = True  # the audit's hooks on the parameter are not meant by this
        try:
            (placed,) = torch.autograd.grad(
                self.value, self.slot.parameter, gradient.to(self.value.dtype), retain_graph=True
            )
        finally:
            self.observation.placing = False
        return placed.to(gradient.dtype)


@dataclass(frozen=True)
class Plan:
    """What the block does besides measuring.

    Attributes:
        task_weights: ``[K]``, known beforehand (``apply="next_step"``): weight gradients are formed with them.
        keep: the weights come when the block closes (``apply="same_step"``): nothing reaches ``.grad`` before.
        by_task: with ``keep``: form one gradient per task where that is smaller than the rows and within ``budget`` bytes.
        buffers: where those gradients are kept from block to block, by parameter: fresh memory would cost as much
            as filling it.
    """

    task_weights: Tensor | None = None
    keep: bool = False
    by_task: bool = False
    budget: int = 0
    buffers: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Memory:
    """What a Meter learns about its model from block to block."""

    verified: set[tuple[str, str, str, tuple[str, ...]]] = field(default_factory=set)
    shared_lookups: set[tuple[str, int]] = field(default_factory=set)  # (parameter, dimensions of the ids)
    corrected: dict[tuple[str, str, int], Kind] = field(default_factory=dict)  # (parameter, function, dimensions)
    audited: set[str] = field(default_factory=set)  # parameters whose whole gradient was accounted for
    blocks: int = 0  # closed so far

    @property
    def due(self) -> bool:
        """Whether the next block verifies itself although nothing looks new: the 10th, the 100th, ..."""
        return str(self.blocks + 1).strip("0") == "1"


class Observation:
    """The state of one observe block. `begin` must be called before the first use, when B is known."""

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
        always_verify: bool = False,
    ) -> None:
        self.who, self.memory, self.plan, self.backend = who, memory, plan, choose(backend)
        self.start = start  # calls `begin`, once the number of examples is known
        self.slots = {id(p): Slot(i, name, p) for i, (name, p) in enumerate(parameters)}
        self.batch_dim, self.backwards = batch_dim, backwards
        self.examples: int | None = None
        self.batch: Examples | None = None
        self.weights: Tensor | None = None  # per example
        self.verify = always_verify or memory.due
        self.tagging: Literal["base", "scaled"] | None = None
        self.tag_factor: Tensor | None = None
        self.placing = False
        self.failures: list[str] = []
        self.refuted: list[Use] = []  # in the running test
        self.proven = False  # in the running test, a use has passed whose sizes leave no choice
        self.refuted_lookups: list[Use] = []  # taken for batched, and not
        self.rows_per_example: set[int] = set()  # of tensors that show the batch
        self.inputs: set[int] = set()  # where the model's inputs lie
        self.budget = plan.budget
        self.measured_uses = 0
        self._hooks: list[Any] = []

    def begin(self, batch: Examples, tasks: Tensor) -> None:
        """Fix the examples and their groups, and make the probe: a leaf of zeros whose gradient is the norms."""
        self.batch, self.examples = batch, batch.count
        if self.plan.task_weights is not None:
            self.weights = self.plan.task_weights.to(tasks.device)[tasks]
        parameters = [slot.parameter for slot in self.slots.values()]
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
        columns = batch.count + sum(batch.groups.counts)
        self.probe = torch.zeros(
            len(parameters), columns + 1, dtype=dtype, device=parameters[0].device, requires_grad=True
        )
        self._one = torch.ones(1, dtype=dtype, device=self.probe.device)  # a use is counted in the last column
        self._unmeasured = torch.cat([self._one.new_zeros(columns), self._one])
        self.probe_rows = self.probe.unbind(0)
        self.probe_node = self.probe_rows[0].grad_fn
        for slot in self.slots.values():
            if self.verify or slot.name not in self.memory.audited:
                self._audit(slot)

    def look_at_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What the model's inputs say: how many examples there are, where nothing else does, and how many rows each."""
        inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim() > 0]
        if self.examples is None:
            self._begin_with([t.shape[self.batch_dim] for t in inputs if t.dim() > self.batch_dim])
        for one in inputs:
            if one.dim() > self.batch_dim and one.shape[self.batch_dim] == self.examples:
                first = one.shape[1 - self.batch_dim] if one.dim() > 1 else 1
                self.rows_per_example |= {first * math.prod(one.shape[2:end]) for end in range(2, one.dim() + 1)}
                self.inputs.add(one.untyped_storage().data_ptr())

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
        shape = tuple(tensor.shape[: tensor.dim() - features])
        if self.examples == 1:
            return Layout("leading", shape, self.batch)
        kind = self.batch.kind_of(shape, self.rows_per_example)
        if kind is None or (kind == "second" and self.batch_dim == 0 and not self.inputs):
            raise self._unexplained(shape, name)
        layout = Layout(kind, shape, self.batch, anchored=tensor.untyped_storage().data_ptr() in self.inputs)
        corrected = self.memory.corrected.get((name, function, len(shape)))
        if corrected is not None and corrected == layout.alternative:
            layout.correct()
        if kind == "leading" or kind == "second":
            self.rows_per_example.add(layout.rows // self.batch.count)
        return layout

    def _unexplained(self, shape: Sequence[int], name: str) -> ValueError:
        assert self.batch is not None
        known = ", ".join(str(self.batch.count * rows) for rows in sorted(self.rows_per_example - {1})) or "none yet"
        packing = self.batch.packing
        packed = f" nor the {packing.rows} packed rows" if packing else ""
        return ValueError(
            f"{self.who}: the rows of {name} must belong to the batch's {self.examples} examples, got rows of shape "
            f"{list(shape)}, neither {self.examples} in front nor as many rows as this block's tensors with the batch in "
            f"front ({known}){packed}; give tasks and prompts one entry per example, put the batch first or pass "
            "observe(batch_dim=1), and expand inputs without a batch dimension to it"
        )

    def use(
        self, slot: Slot, value: Tensor, views: tuple[str, ...], function: str, layout: Layout, shared: bool = False
    ) -> Use:
        """Write down that ``function`` consumed a parameter. Called once per forward, not for a recomputation of it."""
        use = Use(slot, value, views, function, layout, self, shared=shared)
        recomputed = torch._C._current_graph_task_id() != -1 and slot.uses
        if not recomputed:
            slot.uses.append(use)
        if use.key not in self.memory.verified:
            self.verify = self.verify or self.examples != 1
            self._audit(slot)
        return use

    def deliver(
        self, use: Use, contribution: Contribution, needs_gradient: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """What a use's backward returns for the parameter and for the probe."""
        if self.tagging is not None:
            self._tag(use, contribution)
            return None, None
        slot, keep = use.slot, self.plan.keep
        slot.arrived += 1
        several = len(slot.uses) > 1 or self.backwards > 1
        if slot.measured or (slot.arrived > len(slot.uses) * self.backwards):
            raise RuntimeError(
                f"{self.who}: the backward of {slot.name} must run once per use and after all of its uses in the block, "
                f"got a backward pass after its norm had been taken; run all forwards before one backward, say how many "
                f"backward passes there are with observe(backwards={self.backwards + 1}), or open one observe block for "
                "each"
            )
        gradient: Tensor | None = None
        norms: Tensor | None = None
        if (
            keep
            and not several
            and isinstance(contribution, (Outer, Convolved))
            and (out := self._buffer(slot, contribution)) is not None
        ):
            norms = contribution.by_group(out)
            slot.kept.append((use, out, ()))
            if needs_gradient:
                gradient = out.sum(0)
        elif keep:
            slot.kept.append((use, contribution, tuple(kept._version for kept in contribution.kept)))
            if not several:
                norms = contribution.sqnorm()
            if needs_gradient:
                gradient = contribution.total()
        elif not several and needs_gradient:
            gradient, norms = contribution.wgrad(self.weights)
        elif not several:
            norms = contribution.sqnorm()
        elif needs_gradient:
            gradient = contribution.total(self.weights)
        if several:
            slot.deferred.append((use, self._thinned(slot, use, contribution)))
        else:
            slot.measured = True
        self.measured_uses += 1
        if gradient is not None:
            if gradient.shape != use.value.shape or gradient.dtype != use.value.dtype:
                gradient = gradient.view_as(use.value).to(use.value.dtype)
            if slot.hooked:
                placed = use.adjoint(gradient)
                slot.delivered = placed if slot.delivered is None else slot.delivered + placed
        if norms is None:
            return gradient, self._unmeasured
        if norms.dtype != self._one.dtype or norms.device != self._one.device:
            norms = norms.to(self._one)
        return gradient, torch.cat([norms, self._one])

    def _buffer(self, slot: Slot, contribution: Outer | Convolved) -> Tensor | None:
        """Where a parameter's gradients per task go, as far as the budget reaches."""
        if not self.plan.by_task:
            return None
        shape = contribution.segments.groups.counts[-1], *contribution.shape
        dtype = accumulator(contribution.x.dtype)
        size = math.prod(shape) * dtype.itemsize
        kept = sum(tensor.nbytes for tensor in contribution.kept)
        if size > min(self.budget, kept):  # whichever is smaller is kept
            return None
        self.budget -= size
        buffer = self.plan.buffers.get(slot.name)
        if buffer is None or buffer.shape != shape or buffer.dtype != dtype or buffer.device != contribution.x.device:
            buffer = self.plan.buffers[slot.name] = contribution.x.new_empty(shape, dtype=dtype)
        return buffer

    def _thinned(self, slot: Slot, use: Use, contribution: Contribution) -> Contribution | TiedOuter:
        """Of a head tied to embeddings, what their cross term needs, so that its rows can go; else the contribution."""
        lookups = [other.lookup_ids for other in slot.uses if other.lookup_ids is not None]
        whole = self.plan.keep or self.backwards > 1
        if len(lookups) != len(slot.uses) - 1 or not isinstance(contribution, Outer) or whole:
            return contribution
        placed = Placed(contribution, use.views, use.adjoint).in_parameter_space()
        if placed.views or not isinstance(placed.contribution, Outer):
            return contribution
        return TiedOuter.of(placed.contribution, lookups)

    def _audit(self, slot: Slot) -> None:
        if not slot.hooked:
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
            if delivered is None:
                self.failures.append(f"{slot.name} got a gradient from a use that was not seen")
            elif delivered is not total and not torch.equal(delivered, total):
                eps = torch.finfo(total.dtype).eps * (len(slot.uses) + 1)
                scale = torch.linalg.vector_norm(delivered.double()) + torch.linalg.vector_norm(total.double())
                if not torch.linalg.vector_norm(delivered.double() - total.double()) <= eps * scale and bool(
                    torch.isfinite(scale)
                ):
                    self.failures.append(f"{slot.name} got a gradient that its seen uses account for only in part")
            return torch.zeros_like(total) if self.plan.keep else None

        return compare

    def run_tagging(self, edge: torch.autograd.graph.GradientEdge, dx: Tensor, uses: Sequence[Use]) -> None:
        """The tagging test of everything upstream of a use: called in its backward, with the gradient of its input."""
        if self.examples == 1 or self.tagging is not None or all(use.tagged for use in uses):
            return
        root = uses[0].layout
        tried: set[Layout] = set()
        while True:
            self._run_tagging_once(edge, dx, root)
            again = {use.layout for use in self.refuted if use.layout.alternative is not None} - tried
            if not again and self.refuted and not self.proven and root.alternative is not None and root not in tried:
                for layout in tried:  # they were judged by a root that was not right
                    layout.correct()
                tried, again = {root}, {root}
            if not again:
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

    def _run_tagging_once(self, edge: torch.autograd.graph.GradientEdge, dx: Tensor, root: Layout) -> None:
        assert self.examples is not None
        example = torch.arange(self.examples, device=dx.device)
        self.refuted, self.proven = [], False
        try:
            self.tagging = "base"
            self._backward_to_probe(edge, dx)
            self.tagging = "scaled"
            for digit in range(max(1, math.ceil(math.log(self.examples, 8)))):
                self.tag_factor = 2.0 ** ((example // 8**digit) % 8).to(dx.dtype)
                self._backward_to_probe(edge, root.scaled(dx, self.tag_factor))
        finally:
            self.tagging = None

    def _backward_to_probe(self, edge: torch.autograd.graph.GradientEdge, gradient: Tensor) -> None:
        torch.autograd.grad((edge,), (self.probe,), (gradient,), retain_graph=True, allow_unused=True)

    def _tag(self, use: Use, contribution: Contribution) -> None:
        fingerprint = contribution.fingerprint()
        if self.tagging == "base":
            use.fingerprint = fingerprint
            return
        assert self.tag_factor is not None and use.fingerprint is not None
        factor = self.tag_factor.to(fingerprint.dtype)
        if isinstance(contribution, (Outer, Lookup, Convolved)):
            factor = per_row(factor, contribution.segments)
        expected = use.fingerprint * factor
        use.tagged = True
        if torch.equal(fingerprint, expected):
            self.proven |= use.layout.proves and bool((fingerprint > 0).any())
        elif bool(torch.isfinite(fingerprint).all()) and use not in self.refuted:
            self.refuted.append(use)

    def close(self) -> Tensor:
        """Check that the block was measured whole, and return the squared norms, ``[parameters, columns]``."""
        self.release()
        used = [use for slot in self.slots.values() for use in slot.uses]
        if self.examples is None or not used:
            raise RuntimeError(
                f"{self.who}: the model must be called with gradients inside the observe block, got no call; put the "
                "forward and the backward inside the block"
            )
        if not self.measured_uses:
            raise RuntimeError(
                f"{self.who}: loss.backward() must run inside the observe block, got a forward without it; call it "
                "before the block ends, and without inputs="
            )
        assert self.probe.grad is not None
        self._refuse_unproven(used)
        sqnorms: Tensor = self.probe.grad[:, :-1].clone()
        self._check_use_counts(self.probe.grad[:, -1])
        for slot in self.slots.values():
            if slot.deferred:
                sqnorms[slot.index] = self._combined(slot).to(sqnorms).clamp(min=0)
        self._learn()
        return sqnorms

    def _refuse_unproven(self, used: Sequence[Use]) -> None:
        if self.verify and self.examples != 1:
            for use in used:
                # Ids that are no input of the model may be positions, of a table that all examples share.
                if use.lookup_dim and use.slot.arrived and not (use.shared or use.tagged or use.layout.anchored):
                    self.failures.append(self._not_per_example(use))
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
            "through their modules, or freeze these parameters"
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
        parts = [part for _, part in slot.deferred]
        heads = [part for part in parts if isinstance(part, TiedOuter)]
        if heads:
            lookups = [part for part in parts if isinstance(part, Lookup)]
            return tied_sqnorm(heads[0], lookups) if lookups else heads[0].norms
        return combined_sqnorm(
            [
                Placed(part, use.views, use.adjoint, use.place)
                for use, part in slot.deferred
                if not isinstance(part, TiedOuter)
            ]
        )

    def _learn(self) -> None:
        self.memory.blocks += 1
        seen = [slot for slot in self.slots.values() if slot.arrived]
        self.memory.audited |= {slot.name for slot in seen}
        if self.examples != 1:
            self.memory.verified |= {use.key for slot in seen for use in slot.uses}
        for slot in self.slots.values():
            for use in slot.uses:
                if use.shared and use.lookup_ids is not None:
                    self.memory.shared_lookups.add((slot.name, use.lookup_dim))
                if use.layout.corrected:
                    self.memory.corrected[slot.name, use.function, len(use.layout.shape)] = use.layout.kind

    @torch.no_grad()
    def accumulate_weighted(self, weights: Tensor, by_task: Tensor | None) -> None:
        """Form the weighted gradient of everything that was kept, and add it to ``.grad``.

        Args:
            weights: ``[B]``.
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
                    gradient = kept.total(weights)
                self._accumulate(use, gradient.view_as(use.value).to(use.value.dtype))
            slot.kept.clear()

    def _accumulate(self, use: Use, gradient: Tensor) -> None:
        parameter = use.slot.parameter
        if use.value is not parameter or parameter._backward_hooks:
            torch.autograd.backward((use.value,), (gradient,))  # through views, past hooks
        elif parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad += gradient

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
        del self.start
