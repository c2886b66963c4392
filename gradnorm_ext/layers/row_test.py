"""The row test: every row of every use belongs to the example that it is counted for, as the caller numbers them.

In a block that verifies, the backward runs again from each tensor that the model returned with the batch in front, when
its gradient arrives: once as it is, and once for each base-8 digit of the example's number with every example's gradient
times 2^digit. Multiplying by a power of two is exact, so each row of each use upstream must come out scaled by exactly
its own example's factor (nearly, where float16 rounds small numbers). Functions that only the loss follows start a test in
their own backward. These passes stop at the probe and form no weight gradient.

What a test says holds for the order in which it started. It is the caller's where it started from what the model returned,
or where it arrived at what the model was called with (`Evidence`). A zero says nothing: a use is *proven* by nonzero
gradients of at least two examples, and until then *not yet*.

Whether owners of rows can change with the data, although they passed, is read from the graph (`_Paths`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradnorm_ext.gradients import GradientTerm
from gradnorm_ext.layers.callsites import described
from gradnorm_ext.layers.layouts import Examples, Kind, Layout
from gradnorm_ext.layers.sources import DERIVED, Sources, tensors_in

if TYPE_CHECKING:
    from gradnorm_ext.layers.observation import Observation, Use

Input = tuple[GradientEdge, Tensor, Layout]  # where a gradient goes, the gradient, and whose its rows are
Word = Literal["refuted", "not yet proven", "unknown"]
Evidence = Literal["output", "input", "told", "known"]


@dataclass(eq=False)
class Anchor:
    """A tensor whose examples the caller numbers: what the model returned, or was given and sends a gradient to."""

    name: str
    edge: GradientEdge
    layout: Layout
    returned: bool
    kind: Kind = field(init=False)  # as the caller is taken to mean it, whatever tests make of the layout
    row_sums: Tensor | None = None
    reached: bool = False  # a test from elsewhere has gone through it
    failed: bool = False

    def __post_init__(self) -> None:
        self.kind = self.layout.kind


@dataclass(eq=False)
class _Run:
    """What one test found."""

    seen: dict[Use, Tensor] = field(default_factory=dict)  # of which examples nonzero gradients arrived, ``[B]``
    failed: list[Use] = field(default_factory=list)
    anchors: list[Anchor] = field(default_factory=list)  # that were passed, by nonzero gradients
    blurred: bool = False


@dataclass(frozen=True)
class Verdict:
    """Why a use is refused: its rows are another example's (refuted), or nothing shows that they are not."""

    use: Use
    word: Word
    message: str
    advice: str


_EVIDENCE: dict[Evidence, str] = {
    "output": "a test from what the model returned",
    "input": "a test that led to the model's arguments",
    "told": "a test from rows that the caller told",
    "known": "a test that went through uses proven before",
}
_EXPAND = "expand inputs without a batch dimension to the batch, and keep examples from influencing each other"
_ORDER = "return what the model computes, and give tasks and prompts, in the order of its arguments"
_TELL = (
    "let the model return a tensor with the batch in front that this is part of, or say whose the rows are with "
    "observe(rows_of={...}) or observe(example_ids=...)"
)


class RowTest:
    """The row tests of one block."""

    def __init__(self, observation: Observation) -> None:
        self.observation = observation
        self.running: Literal["base", "scaled"] | None = None
        self.factor: Tensor | None = None  # per example, of the running pass
        self.run = _Run()
        self.half = False  # something is computed in float16
        self.blurred = False  # numbers were not finite: to be run again
        self.anchors: list[Anchor] = []
        self.refuted: list[Use] = []
        self.misplaced: list[str] = []  # of arguments whose examples come out in another order
        self.paths = _Paths(observation.sources, observation.batch_dim)
        self._hooks: list[Any] = []

    # What the caller's order is known of

    def watch_returned(self, result: Any, call: str) -> None:
        """Start a test from each of these tensors that shows the batch in front."""
        for name, one in tensors_in(result):
            self._watch(one, f"{call}{name and '.' + name.lstrip('.')}", returned=True)

    def watch_given(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Look at the gradients that a test sends to the model's arguments."""
        for name, one in named:
            self._watch(one, name, returned=False)

    def _watch(self, tensor: Tensor, name: str, *, returned: bool) -> None:
        batch = self.observation.batch
        if type(tensor) is not Tensor or not tensor.requires_grad or batch is None:
            return
        if batch.count == 0 and self.observation.shards is None:  # which would wait for this rank's tests
            return
        if (layout := layout_in_front(tensor, batch)) is None:
            return
        if returned and layout.kind == "leading":
            picked = self.observation.picked_rows(tensor, layout.shape)
            layout.others = () if picked is None else (("followed", picked),)
        edge = torch.autograd.graph.get_gradient_edge(tensor)
        if any(anchor.edge == edge for anchor in self.anchors):
            return
        anchor = Anchor(name, edge, layout, returned)
        self.anchors.append(anchor)
        self._hooks.append(tensor.register_hook(lambda gradient: self._arrive(anchor, gradient)))

    def _arrive(self, anchor: Anchor, gradient: Tensor) -> None:
        observation = self.observation
        if self.running is not None:
            self._pass(anchor, gradient)
        elif anchor.returned and observation.verify and not observation.placing:
            node = observation.probe_node
            if node is not None and torch._C._will_engine_execute_node(node):
                self.start_from_returned(anchor, gradient)

    # Tests

    @property
    def _alone(self) -> bool:
        return self.observation.examples == 1 and self.observation.shards is None

    def start_from_returned(self, anchor: Anchor, gradient: Tensor) -> None:
        due = not (anchor.reached or anchor.failed)
        if self.observation.shards is not None:  # ranks run the same tests
            due = bool(self.observation.shards.agree(int(due))[0])
        if due and not self._alone:
            self._test([(anchor.edge, gradient, anchor.layout)], (), anchor)

    def start_from_use(self, inputs: Sequence[Input], uses: Sequence[Use]) -> None:
        """The test of everything upstream of a use that no test has reached: called in its backward."""
        if not (self._alone or self.running is not None or all(use.tested for use in uses)):
            self._test(inputs, uses, None)

    def _test(self, inputs: Sequence[Input], roots: Sequence[Use], origin: Anchor | None) -> None:
        observation = self.observation
        root = inputs[0][2]
        tried: dict[Layout, int] = {}  # and how often
        digits = max(1, math.ceil(math.log(max(1, observation.examples or 0), 8)))
        if observation.shards is not None:
            (digits,) = observation.shards.agree(digits)
        self.paths.walk([edge.node for edge, _, _ in inputs])
        while True:
            with nullcontext() if observation.shards is None else observation.shards.paused():
                run = self._run_once(inputs, digits, origin)
            failed = {use.layout for use in run.failed if use.layout.alternative is not None}
            again = {layout for layout in failed if tried.get(layout, 0) < max(1, len(layout.others))}
            if (
                not again
                and run.failed
                and root.alternative is not None
                and root not in tried
                and not self._settles(run)
            ):
                for layout in tried:  # they were judged by a root that was not right
                    layout.correct()
                tried, again = {}, {root}
            if not (again if observation.shards is None else observation.shards.agree(len(again))[0]):
                break
            for layout in again:
                layout.correct()
            tried |= {layout: tried.get(layout, 0) + 1 for layout in again}
        self._conclude(run, roots, root, origin)

    def _settles(self, run: _Run) -> bool:
        """Whether something passed whose sizes leave no choice."""
        rows = self.observation.sources.rows_per_example
        return bool(run.anchors) or any(
            use.layout.proves(rows) and bool(seen.any()) for use, seen in run.seen.items() if use not in run.failed
        )

    def _conclude(self, run: _Run, roots: Sequence[Use], root: Layout, origin: Anchor | None) -> None:
        self.blurred |= run.blurred
        passed = {use: seen for use, seen in run.seen.items() if use not in run.failed}
        evidence = self._evidence(run, passed, roots, root, origin)
        for use, seen in run.seen.items():
            use.tested = True
            if use in run.failed:
                self.refuted.append(use)
                continue
            use.seen = seen if use.seen is None else use.seen | seen
            use.evidence = use.evidence or evidence
        together = None
        for seen in passed.values():
            together = seen if together is None else together | seen
        for use in roots:
            use.tested = True
            use.evidence = use.evidence or evidence
            if together is not None and evidence is not None:
                use.seen = together if use.seen is None else use.seen | together
        if run.failed:
            return
        at_input = any(use.layout.anchored and bool(seen.any()) for use, seen in passed.items())
        for use in (*passed, *roots):
            use.with_input |= at_input
        for anchor in self.anchors:
            if anchor.failed and not anchor.returned and anchor.name not in self.misplaced:
                self.misplaced.append(anchor.name)

    def _evidence(
        self, run: _Run, passed: dict[Use, Tensor], roots: Sequence[Use], root: Layout, origin: Anchor | None
    ) -> Evidence | None:
        """What ties the order of a test to the caller's."""
        if origin is not None and origin.kind == root.kind:
            return "output"
        if any(use.layout.anchored and bool(seen.any()) for use, seen in passed.items()):
            return "input"
        if any(not anchor.returned for anchor in run.anchors):
            return "input"
        if any(use.layout.anchored for use in roots):
            return "input"
        if run.anchors:
            return "output"
        if any(use.layout.is_told for use in (*passed, *roots)):
            return "told"
        if any(_is_settled(use) and bool(seen.any()) for use, seen in passed.items()):
            return "known"
        return None

    def _run_once(self, inputs: Sequence[Input], digits: int, origin: Anchor | None) -> _Run:
        observation = self.observation
        edges, gradients, layouts = zip(*inputs, strict=True)
        example = torch.arange(observation.examples or 0, device=gradients[0].device)
        run = self.run = _Run()
        if origin is not None:
            origin.row_sums = None

        def scaled(factor: Tensor) -> Sequence[Tensor]:
            if len(example) == 0:
                return gradients
            each = zip(gradients, layouts, strict=True)
            return [layout.scaled(g, factor.to(g.dtype)) for g, layout in each]

        try:
            self.running = "base"
            # Times 1, so that the gradients lie in memory as the others do: their sums must round alike.
            self._backward(edges, scaled(torch.ones_like(example, dtype=torch.float32)))
            self.running = "scaled"
            for digit in range(digits):
                power = ((example // 8**digit) % 8).to(torch.float32)
                self.factor = 2.0 ** (power - 7 if self.half else power)  # 1: all that float16 has room for
                self._backward(edges, scaled(self.factor))
        finally:
            self.running = self.factor = None
        if origin in run.anchors:
            run.anchors.remove(origin)
        return run

    def _backward(self, edges: Sequence[GradientEdge], gradients: Sequence[Tensor]) -> None:
        torch.autograd.grad(edges, (self.observation.probe,), gradients, retain_graph=True, allow_unused=True)

    # What a running pass goes through

    def receive(self, use: Use, contribution: GradientTerm) -> None:
        row_sums = contribution.row_abs_sums()
        if self.running == "base":
            use.row_sums = row_sums
            self.run.seen[use] = self._owners(contribution, row_sums)
            return
        assert self.factor is not None and use.row_sums is not None
        expected = use.row_sums * contribution.expand_to_rows(self.factor.to(row_sums.dtype))
        if self._agree(row_sums, expected):
            return
        if not bool(torch.isfinite(row_sums).all()):
            self.run.blurred = True
        elif use not in self.run.failed:
            self.run.failed.append(use)

    def look_at_delivered(self, use: Use, contribution: GradientTerm) -> None:
        """Of which examples a use has a gradient at all, whatever the tests went through."""
        if self._alone:
            return
        row_sums = contribution.row_abs_sums()
        found = self._owners(contribution, row_sums)
        use.delivered_of = found if use.delivered_of is None else use.delivered_of | found

    def _owners(self, contribution: GradientTerm, row_sums: Tensor) -> Tensor:
        """``[B]``: the examples that have a row that is not zero."""
        examples = torch.arange(self.observation.examples or 0, device=row_sums.device)
        owners = contribution.expand_to_rows(examples)
        seen = torch.zeros(len(examples), dtype=torch.bool, device=row_sums.device)
        return seen.index_fill_(0, owners[row_sums != 0], True)

    def receive_nothing(self, use: Use) -> None:
        """Of a rank without examples, or a use without rows."""
        self.run.seen.setdefault(use, torch.zeros(self.observation.examples or 0, dtype=torch.bool))

    def _pass(self, anchor: Anchor, gradient: Tensor) -> None:
        if gradient.shape[: len(anchor.layout.shape)] != anchor.layout.shape:
            return
        row_sums = (
            anchor.layout.rows_of(gradient).abs().sum(1, dtype=torch.promote_types(gradient.dtype, torch.float32))
        )
        if self.running == "base":
            anchor.row_sums = row_sums
            return
        if anchor.row_sums is None or self.factor is None:
            return
        expected = anchor.row_sums * anchor.layout.segments.per_row(self.factor.to(row_sums.dtype))
        if not self._agree(row_sums, expected):
            anchor.failed = bool(torch.isfinite(row_sums).all())
            if anchor in self.run.anchors:
                self.run.anchors.remove(anchor)
        elif anchor not in self.run.anchors and bool((row_sums > 0).any()) and not anchor.failed:
            anchor.reached = True
            self.run.anchors.append(anchor)

    def _agree(self, found: Tensor, expected: Tensor) -> bool:
        if torch.equal(found, expected):
            return True
        if not self.half:
            return False
        # float16 rounds small numbers to multiples of 2^-24: another example's factor is off by two at least.
        small = found.new_tensor(2.0**-10)
        return bool(((found - expected).abs() <= torch.maximum(expected / 8, small)).all())

    # What follows

    def proves(self, use: Use) -> bool:
        """Whether a use of its kind need not be tested in the next block."""
        if use.evidence is None and not use.layout.anchored and not use.layout.is_told:
            return False
        if use.seen is None:  # nothing upstream to test, as of the first layer of a model that returns its loss
            return use.delivered_of is not None and int(use.delivered_of.sum()) > 1
        return int(use.seen.sum()) > 1

    def evidence_of(self, use: Use) -> str:
        """What shows that a use's rows are the caller's, in words."""
        if self._alone:
            return "the batch has one example"
        if use.delivered_of is not None and not bool(use.delivered_of.any()):
            return "not yet proven: its gradient is zero"
        reached = f", by gradients of {int(use.seen.sum())} examples" if use.seen is not None else ""
        if use.evidence is not None:
            down = ", down to its arguments" if use.evidence == "output" and use.with_input else ""
            return f"proven by {_EVIDENCE[use.evidence]}{down}{reached}"
        if use.layout.anchored:
            return "consumes an argument of the model; no test goes upstream of it"
        return "told by the caller" if use.layout.is_told else "not yet proven: no test has reached it"

    def judge(self, uses: Sequence[Use]) -> list[Verdict]:
        """What must be refused of these uses, whose backward has run."""
        if self._alone or self.observation.examples == 0:
            return []
        verdicts = [
            Verdict(
                use,
                "refuted",
                f"{use.place_in_code} was used with rows that do not belong to one example each, or not to the example "
                f"their place says{described(use.called_at)}",
                _EXPAND,
            )
            for use in dict.fromkeys(self.refuted)
        ]
        if self.blurred:
            return verdicts
        for use in uses:
            if use not in self.refuted and use.delivered_of is not None and bool(use.delivered_of.any()):
                found = self._doubt(use)  # a zero is no one's
                if found is not None:
                    word, message, advice = found
                    verdicts.append(Verdict(use, word, f"{message}{described(use.called_at)}", advice))
        return verdicts

    def _doubt(self, use: Use) -> tuple[Word, str, str] | None:
        """What is not known of a use that no test has refuted."""
        layout, name = use.layout, use.place_in_code
        if self.misplaced and use.evidence == "output" and not use.with_input:
            given = ", ".join(self.misplaced)
            return "refuted", f"{given} has the examples in another order than what the model returned", _ORDER
        if layout.reordered and not (use.with_input or layout.is_told):
            return "refuted", f"{name} has the rows of an argument in an order of the model's own", _ORDER
        if not (use.evidence or layout.anchored or layout.is_told or _is_settled(use)):
            return (
                "not yet proven",
                f"of {name} nothing shows that its rows are in the caller's order: no test from what the model returned with "
                "the batch in front has reached it, and it consumes no argument of the model",
                _TELL,
            )
        assert use.delivered_of is not None
        if use.seen is not None and int(use.seen.sum()) < 2 and bool((use.delivered_of & ~use.seen).any()):
            return (
                "not yet proven",
                f"{name} was reached by zeros only, and has a gradient of examples in other ways",
                _TELL,
            )
        if not (layout.is_packed or use.is_known or self._is_steady(use)):
            return (
                "unknown",
                f"the rows of {name} are taken from others, or put among others, as the data say: in the next batch they may "
                "be other examples'",
                _TELL,
            )
        return None

    def _is_steady(self, use: Use) -> bool:
        """Whether structure ties a use's rows to the caller's order, whatever the data are: on one of its sides."""
        if self.paths.reach(use) or use not in self.paths.nodes:
            return True
        layout, sources = use.layout, self.observation.sources
        if not layout.source:
            return self.paths.comes_steadily(use)
        if not layout.anchored:
            return False
        if layout.source != DERIVED and layout.source != sources.first:
            return False
        others = (other for other in self.paths.nodes if other.layout.source not in ("", None, layout.source))
        return not any(other.layout.anchored and self.paths.reach(other) for other in others)

    def release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def _is_settled(use: Use) -> bool:
    """Whether an earlier proof holds for a use: rows that were followed are followed from others, which may not be proven."""
    return use.is_known and use.layout.kind != "followed"


def layout_in_front(tensor: Tensor, batch: Examples) -> Layout | None:
    """The layout of what a model returned or was given, if it shows the batch where the caller says that it is."""
    if tensor.dim() <= batch.batch_dim and not batch.told(tensor.shape):
        return None
    shape = tuple(tensor.shape[: max(1, tensor.dim() - 1)])
    layout = batch.layout_of(shape)
    in_front = ("packed", "leading", "second") if batch.batch_dim == 1 else ("packed", "leading")
    return layout if layout is not None and layout.kind in in_front else None


class _Paths:
    """Which uses a test can reach without passing what places rows as the data say.

    ``h[mask] = rows`` and its like tell by their data, new in every batch, which example gets a row; ``h[order]`` and its
    like which example a row comes from. What lies upstream of them may pass a test in one batch and be wrong in the next.
    """

    def __init__(self, sources: Sources, batch_dim: int) -> None:
        self.sources, self.batch_dim = sources, batch_dim
        self.nodes: dict[Use, Any] = {}  # the graph's node of every use upstream of a test
        self._steady: set[Use] = set()  # that are reached in other ways, too

    def walk(self, nodes: Iterable[Any]) -> None:
        """Go upstream from where a test starts."""
        for node in self._upstream(nodes, self._steady_inputs):
            self._steady.update(_uses_of(node))
        for node in self._upstream(nodes, lambda node: [one for one, _ in node.next_functions]):
            self.nodes |= dict.fromkeys(_uses_of(node), node)

    def reach(self, use: Use) -> bool:
        """Whether a steady way leads from where a test starts to a use."""
        return use in self._steady

    def comes_steadily(self, use: Use) -> bool:
        """Whether a steady way leads from a use to another one, or to what the model was given."""
        following = [one for one, _ in self.nodes[use].next_functions]
        return any(self._is_end(one) for one in self._upstream(following, self._steady_inputs, self._is_end))

    def _is_end(self, node: Any) -> bool:
        return any(True for _ in _uses_of(node)) or node in self.sources.argument_nodes

    @staticmethod
    def _upstream(
        nodes: Iterable[Any], inputs: Callable[[Any], list[Any]], ends: Callable[[Any], bool] = lambda node: False
    ) -> Iterator[Any]:
        waiting, known = list(nodes), set()
        while waiting:
            node = waiting.pop()
            if node is not None and node not in known:
                known.add(node)
                yield node
                if not ends(node):
                    waiting += inputs(node)

    def _steady_inputs(self, node: Any) -> list[Any]:
        """The nodes upstream of this one whose rows it leaves with their examples, whatever the data are."""
        following = [one for one, _ in node.next_functions]
        name = node.name()
        if not (name in _PLACING or name in _PICKING) or node in self.sources.steady_nodes:
            return following
        if hasattr(node, "_saved_dim"):
            dim = int(node._saved_dim)
            if (dim - (1 << 64) if dim >= 1 << 63 else dim) not in (0, self.batch_dim):
                return following
        return following[:1] if name in _PLACING else []


def _uses_of(node: Any) -> Iterator[Use]:
    """The uses of the observed function whose backward a node is."""
    return (use for use in getattr(getattr(node, "call", None), "uses", ()) if use is not None)


_PLACING = {  # rows among others, which stay
    f"{name}Backward0"
    for name in ("MaskedScatter", "IndexPut", "IndexAdd", "IndexCopy", "Scatter", "ScatterAdd", "ScatterReduce", "Put")
}
_PICKING = {
    f"{name}Backward0"
    for name in ("Index", "IndexSelect", "Gather", "MaskedSelect", "Take", "Sort", "Topk", "Embedding")
}
