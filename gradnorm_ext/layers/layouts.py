"""How the rows of a tensor belong to examples: the hypotheses, and what follows from each.

Rows are assigned to examples on evidence, and this is the one place where it is written down. A tensor's sizes, its
features set aside, are compared with the number of examples B:

1. *leading*: the first size is B. The other inner sizes are the example's rows.
2. *second*: the second size is B, and ``observe(batch_dim=1)`` says so, or the first is not B and an input of the
   model has the batch in front (a sequence-first layer in a batch-first model).
3. *flat*: ``B * T`` rows in batch-major order (``x.view(B * T, d)``), where some tensor of the same block is known to
   have T rows per example: the model's input or the input of an earlier use. *flat, second*: the same rows in the order
   of ``[T, B]``.
4. *packed*: as many rows as ``cu_seqlens`` or ``example_ids`` speak of, and whose those say. Where ``example_ids`` speak of rows
   of several kinds (images beside tokens), their number tells which; the row test tries the others where that is not enough.
5. *followed*: the graph leads from rows that were selected (``h[mask]``, ``h[:, :-1]`` as flat rows) to rows that are
   known (`gradnorm_ext.layers.provenance`).
6. *shared*: no batch dimension (a position table's ids). Taken for a lookup whose ids have another first size than B,
   for every later lookup of that table with as many dimensions, and where 1 was tried and refuted. The gradient is
   taken where the looked-up rows meet the batch, so that it arrives per example.

1 to 5 are hypotheses until the *row test* (`gradnorm_ext.layers.row_test`) has passed. Where it fails and the
sizes allow another of them (T == B; either order of flat rows), that one is tested in its place, before anything is
measured, and remembered for this use.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from gradnorm_ext.backends import find
from gradnorm_ext.segments import Groups, Segments

Kind = Literal["leading", "second", "flat", "flat, second", "packed", "followed"]


@dataclass(frozen=True, eq=False)
class Packing:
    """Whose the rows of a packed batch are.

    Attributes:
        offsets: ``[B + 1]``: where each example's rows begin, once they are in ``order``.
        order: ``[R]``: the rows, example by example; None where they are in that order already.
        rows: R.
        label: what these rows are called, where there are several kinds.
        named: that is the name of an argument of the model.
    """

    offsets: Tensor
    order: Tensor | None
    rows: int
    label: str = ""
    named: bool = False

    @staticmethod
    def of_lengths(offsets: Tensor, rows: int) -> Packing:
        return Packing(offsets, None, rows)

    @staticmethod
    def of_ids(ids: Tensor, examples: int, label: str = "", named: bool = False) -> Packing:
        """From one example id per row, in any order."""
        lengths = torch.zeros(examples, dtype=torch.int64, device=ids.device).index_add_(0, ids, torch.ones_like(ids))
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return Packing(offsets, torch.argsort(ids, stable=True), len(ids), label, named)


@dataclass(eq=False)
class Examples:
    """The examples of a block: how many, their groups, and what was said of where they are.

    ``packing``: of a batch that is packed. ``kinds``: of further kinds of rows beside a batch that is not.
    """

    count: int
    groups: Groups
    batch_dim: int = 0
    packing: Packing | None = None
    kinds: tuple[Packing, ...] = ()
    _packed: dict[tuple[str, int, int], Segments] = field(default_factory=dict, repr=False)

    def segments(self, rows: int) -> Segments:
        """The segments of ``rows`` rows in batch-major order, equally many per example."""
        return self.groups.equal(rows // max(1, self.count))

    def packed(self, packing: Packing, inner: int) -> Segments:
        """The segments of packed rows, of ``inner`` rows each."""
        key = packing.label, packing.rows, inner
        if key not in self._packed:
            self._packed[key] = Segments(packing.offsets * inner, None, self.groups)
        return self._packed[key]

    def told(self, shape: Sequence[int]) -> list[Packing]:
        """What was said of rows of these sizes."""
        said = self.kinds if self.packing is None else (self.packing, *self.kinds)
        return [packing for packing in said if _prefix(shape, packing.rows) is not None]

    def kind_of(self, shape: Sequence[int], rows_per_example: set[int]) -> Kind | None:
        """Which hypothesis speaks for a tensor of these sizes, its features set aside; None: none does."""
        first = shape[0] if shape else 0
        if self.packing is not None and _prefix(shape, self.packing.rows) is not None:
            return "packed"
        is_second = len(shape) > 1 and shape[1] == self.count
        if is_second and (self.batch_dim == 1 or first != self.count):
            return "second"
        if first == self.count:
            return "leading"
        if self.kinds and self.told(shape):
            return "packed"
        if first and self.count and first % self.count == 0 and math.prod(shape) // self.count in rows_per_example:
            return "flat, second" if self.batch_dim == 1 else "flat"
        return None

    def layout_of(self, shape: tuple[int, ...], rows_per_example: set[int] | None = None) -> Layout | None:
        """The layout of a tensor of these sizes; None: no hypothesis speaks for it."""
        kind = self.kind_of(shape, rows_per_example or set())
        return None if kind is None else Layout(kind, shape, self)

    def allows(self, kind: Kind, shape: Sequence[int]) -> bool:
        """Whether rows of these sizes can be of a kind that was proven for others."""
        if kind == "packed":
            return bool(self.told(shape))
        if kind == "leading":
            return bool(shape) and shape[0] == self.count
        if kind == "second":
            return len(shape) > 1 and shape[1] == self.count
        return kind != "followed" and math.prod(shape) % self.count == 0


def _prefix(shape: Sequence[int], rows: int) -> int | None:
    """How many of the first sizes make up ``rows``."""
    product = 1
    for end, size in enumerate(shape, 1):
        product *= size
        if product == rows:
            return end
    return None


@dataclass(eq=False)
class Layout:
    """Of one call: the kind its tensors have, and their sizes without the features. The row test may correct it.

    ``anchored``: the call consumes an argument of the model, or what was made of one row by row.
    ``source``: the argument, ``"derived"`` of other data, ``""`` of an activation; None where it is not known.
    ``reordered``: the rows are an argument's in another order.
    ``own``: whose the rows are, where they are those of this call only.
    ``told``: the caller has said whose they are.
    ``fixed``: no other hypothesis fits what the rows meet.
    ``others``: what else was said of rows of these sizes, or the graph says.
    """

    kind: Kind
    shape: tuple[int, ...]
    examples: Examples
    anchored: bool = False
    source: str | None = None
    reordered: bool = False
    corrected: bool = False
    own: Packing | None = None
    told: bool = False
    fixed: bool = False
    others: tuple[tuple[Kind, Packing | None], ...] = ()

    @staticmethod
    def of_owners(owners: Tensor, examples: Examples) -> Layout:
        """Of rows whose examples are known one by one, in any order and number."""
        packing = Packing.of_ids(owners.reshape(-1), examples.count)
        return Layout("followed", tuple(owners.shape), examples, own=packing)

    @property
    def packing(self) -> Packing:
        return self.own or self.examples.told(self.shape)[0]

    @property
    def owners(self) -> Tensor:
        """The example of every row, in the shape of the rows."""
        example = torch.arange(self.examples.count, device=self.examples.groups.walk.device)
        if self.kind == "second":
            return example.view(1, -1, *[1] * (len(self.shape) - 2)).expand(self.shape)
        if self.kind == "flat, second":
            return example.repeat(self.rows // len(example)).view(self.shape)
        if self.kind in ("packed", "followed"):
            of_row = example.repeat_interleave(self.packing.offsets.diff(), output_size=self.packing.rows)
            if self.packing.order is not None:
                of_row = torch.empty_like(of_row).index_copy_(0, self.packing.order, of_row)
            return of_row.repeat_interleave(self.rows // max(1, self.packing.rows)).view(self.shape)
        return example.repeat_interleave(self.rows // len(example)).view(self.shape)

    @property
    def rows(self) -> int:
        return math.prod(self.shape)

    @property
    def alternative(self) -> Kind | None:
        """Which other hypothesis the same sizes allow."""
        if self.fixed:
            return None
        if self.others:
            return self.others[0][0]
        both = not self.anchored and len(self.shape) > 1 and self.shape[0] == self.shape[1] == self.examples.count
        others: dict[Kind, Kind] = {"flat": "flat, second", "flat, second": "flat"}
        if both:
            others |= {"leading": "second", "second": "leading"}
        return others.get(self.kind)

    @property
    def is_flat(self) -> bool:
        """Whether a count of rows is all the sizes show."""
        return self.kind in ("flat", "flat, second")

    @property
    def is_packed(self) -> bool:
        """Whether it is known of each row whose it is."""
        return self.kind in ("packed", "followed")

    @property
    def is_told(self) -> bool:
        """Whether the caller has said whose the rows are."""
        return self.told or self.kind == "packed"

    @property
    def _packed_segments(self) -> Segments:
        return self.examples.packed(self.packing, 1) if self.kind == "packed" else self.segments

    def proves(self, rows_per_example: set[int]) -> bool:
        """Whether the sizes leave no other choice: ``[B]`` alone may be positions, where some example has B of them."""
        if self.is_flat or self.kind == "followed" or self.alternative is not None:
            return False
        return (
            self.anchored or self.kind == "packed" or len(self.shape) > 1 or self.examples.count not in rows_per_example
        )

    def correct(self) -> None:
        """Take the alternative."""
        assert self.alternative is not None
        if self.others:
            (self.kind, self.own), self.others = self.others[0], (*self.others[1:], (self.kind, self.own))
        else:
            self.kind, self.corrected = self.alternative, not self.corrected
        for cached in ("segments", "in_order"):
            self.__dict__.pop(cached, None)

    @functools.cached_property
    def segments(self) -> Segments:
        """The segments of what `rows_of` returns."""
        if self.kind == "packed":
            return self.examples.packed(self.packing, self.rows // max(1, self.packing.rows))
        if self.kind == "followed":
            return Segments(self.packing.offsets, None, self.examples.groups)
        return self.examples.segments(self.rows)

    @functools.cached_property
    def in_order(self) -> bool:
        """Whether rows lie example by example already."""
        return self.kind in ("leading", "flat") or (self.is_packed and self.packing.order is None)

    def rows_of(self, tensor: Tensor) -> Tensor:
        """``[rows, features]`` of a tensor of these sizes and its features, example by example."""
        inner = tensor.shape[len(self.shape) :].numel()
        if self.in_order:
            return tensor.reshape(-1, inner)
        if self.kind == "second":
            return tensor.transpose(0, 1).reshape(-1, inner)
        if self.kind == "flat, second":
            return tensor.reshape(-1, self.examples.count, inner).transpose(0, 1).reshape(-1, inner)
        assert self.packing.order is not None
        rows = self.packing.rows
        return (
            tensor.reshape(rows, -1).index_select(0, self.packing.order).view(-1, inner)
            if rows
            else tensor.view(-1, inner)
        )

    def ids_of(self, ids: Tensor) -> Tensor:
        """``[rows]``: `rows_of` a tensor without features."""
        return self.rows_of(ids.unsqueeze(-1)).squeeze(-1)

    def scaled(self, tensor: Tensor, factor: Tensor) -> Tensor:
        """A tensor of these sizes, or one that has only its batch in the same place, times its example's factor."""
        count = self.examples.count
        if not tensor.numel():
            return tensor
        if self.kind == "second":
            return tensor * factor.view(1, count, *[1] * (tensor.dim() - 2))
        if self.kind == "flat, second":
            return (tensor.reshape(-1, count, tensor[0].numel()) * factor[:, None]).view_as(tensor)
        if self.is_packed:
            packing = self.packing
            of_row = factor.repeat_interleave(packing.offsets.diff())
            if packing.order is not None:
                of_row = torch.empty_like(of_row).index_copy_(0, packing.order, of_row)
            return (tensor.reshape(packing.rows, -1) * of_row[:, None]).view_as(tensor)
        return (tensor.reshape(count, -1) * factor[:, None]).view_as(tensor)

    def meets(self, shape: Sequence[int], dimensions: int) -> bool:
        """Whether an operand of this shape, broadcast to so many dimensions, is the same for every example."""
        aligned = [1] * (dimensions - len(shape)) + list(shape)
        if self.kind == "second":
            return aligned[1] == 1
        if self.is_packed:
            prefix = _prefix(self.shape, self.packing.rows)
            return all(size == 1 for size in aligned[:prefix])
        return aligned[0] == 1

    def fix_unless_another_meets(self, shape: Sequence[int], dimensions: int) -> None:
        """Leave no alternative in which such an operand is not the same for every example."""
        if self.alternative is not None:
            other = replace(self)
            other.correct()
            self.fixed = not other.meets(shape, dimensions)

    def per_example(self, gradient: Tensor, shape: torch.Size, backend: str) -> Tensor:
        """A broadcast operand's gradient, summed over everything but the examples: ``[B, *shape]``."""
        count = self.examples.count
        aligned = [1] * (gradient.dim() - len(shape)) + list(shape)
        if count == 1:
            return gradient.sum_to_size(shape)[None]
        if not gradient.numel():
            return gradient.new_zeros(count, *shape)
        if self.is_packed:
            packing = self.packing
            prefix = _prefix(self.shape, packing.rows)
            by_row = gradient.reshape(packing.rows, *gradient.shape[prefix:]).sum_to_size(
                [packing.rows, *aligned[prefix:]]
            )
            rows = by_row.reshape(packing.rows, -1)
            if packing.order is not None:
                rows = rows.index_select(0, packing.order)
            sums: Tensor = find("segment_sum", rows.device.type, backend)(rows, self._packed_segments)
            return sums.view(count, *shape)
        if self.kind == "second":
            by_example = gradient.movedim(1, 0).unsqueeze(2)
        elif self.kind == "flat, second":
            by_example = gradient.reshape(-1, count, *gradient.shape[1:]).movedim(1, 0)
        else:
            by_example = gradient.reshape(count, gradient.shape[0] // count, *gradient.shape[1:])
        return by_example.sum_to_size([count, *aligned]).view(count, *shape)
