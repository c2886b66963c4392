"""What one use of a parameter adds to its gradient, per example: kept as rows, as images, or as small sums.

Where no form fits, a gradient is what a backward pass of its own
gives (pulled). Every contribution offers the same: `sqnorm` (squared norms per segment and group), `wgrad` (the gradient,
optionally weighted, and the norms from the same pass), `total` (the weighted gradient alone), `by_new_group` (the
gradients of the coarsest groups, the tasks, and the norms), `gram` (the inner products of the tasks' gradients), and
`kept` (what must not change until it is used).
`combined_sqnorm` squares the *sum* of several contributions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gradnorm_ext import reference
from gradnorm_ext.backends import find, serves
from gradnorm_ext.reference import accumulator
from gradnorm_ext.segments import Groups, Segments
from gradnorm_ext.windows import Windows


@dataclass(frozen=True)
class Outer:
    """A gradient of outer products, ``Σ_r g[r] x[r]ᵀ``, shaped ``[g's width, x's width]``.

    Where the weight is stored transposed, the sides are exchanged: ``swapped``, and ``x`` is the output's gradient.
    """

    x: Tensor
    g: Tensor
    segments: Segments
    backend: str
    swapped: bool = False

    def sqnorm(self) -> Tensor:
        run = find("outer_sqnorm", self.x.device.type, self.backend)
        return run(self.x, self.g, self.segments)  # type: ignore[no-any-return]

    def wgrad(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        run = find("outer_wgrad", self.x.device.type, self.backend)
        return run(self.x, self.g, self.segments, weight=weight)  # type: ignore[no-any-return]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.g.shape[1], self.x.shape[1]

    def by_group(self, out: Tensor) -> Tensor:
        """The norms; the gradient of each group of the coarsest level goes to ``out``, ``[groups, *shape]``."""
        run = find("outer_wgrad", self.x.device.type, self.backend)
        tasks, count = self.segments.groups.levels[-1], self.segments.groups.counts[-1]
        return run(self.x, self.g, self.segments, outputs=tasks, n_outputs=count, out=out)[1]  # type: ignore[no-any-return]

    def total(self, weight: Tensor | None = None) -> Tensor:
        where = "outer_sum", self.x.device.type, self.backend
        run = find(*where) if serves(*where) else reference.outer_sum
        return run(self.x, self.g, self.segments, weight=weight)

    def by_new_group(self) -> tuple[Tensor, Tensor]:
        """The gradient of each group of the coarsest level, and the norms."""
        shape = self.segments.groups.counts[-1], self.g.shape[1], self.x.shape[1]
        out = self.x.new_empty(shape, dtype=accumulator(self.x.dtype))
        return out, self.by_group(out)

    def gram(self) -> Tensor:
        return gram_of(self.by_new_group()[0])

    def transposed(self) -> Outer:
        return Outer(self.g, self.x, self.segments, self.backend, not self.swapped)

    def of_column(self, rows: Tensor) -> Tensor:
        return self.g[rows].t() @ self.x[rows]

    def entries(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Of these rows' gradient the entries that a lookup of ``ids`` shares with it."""
        return self.g[rows][:, ids].t() @ self.x[rows]

    @property
    def kept(self) -> tuple[Tensor, ...]:
        return self.x, self.g

    def fingerprint(self) -> Tensor:
        return _size_of_rows(self.x if self.swapped else self.g)


def copied(contribution: Contribution) -> Contribution:
    """The same in memory of its own: a compiled graph writes over what it has no more use for."""
    parts = {one.name: getattr(contribution, one.name) for one in dataclasses.fields(contribution)}
    own: dict[str, Any] = {name: part.clone() for name, part in parts.items() if isinstance(part, Tensor)}
    return dataclasses.replace(contribution, **own)


class FormedColumns(Protocol):
    """An output gradient ``[rows, out]`` that is formed for some columns at a time, in parts that cover all of them."""

    def parts(self) -> Iterator[tuple[slice, Tensor]]: ...

    def columns(self, ids: Tensor) -> Tensor: ...

    @property
    def kept(self) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class Parted:
    """An `Outer` whose output gradient is never there as a whole.

    Different columns of it make different rows of the gradient: squared norms and inner products of the parts add up.
    """

    x: Tensor
    g: FormedColumns
    out: int
    segments: Segments
    backend: str

    def _outers(self) -> Iterator[tuple[slice, Outer]]:
        for part, g in self.g.parts():
            yield part, Outer(self.x, g, self.segments, self.backend)

    def sqnorm(self) -> Tensor:
        return functools.reduce(torch.add, [outer.sqnorm() for _, outer in self._outers()])

    def wgrad(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        totals, sqnorms = zip(*(outer.wgrad(weight) for _, outer in self._outers()), strict=True)
        return torch.cat(totals), functools.reduce(torch.add, sqnorms)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.out, self.x.shape[1]

    def by_group(self, out: Tensor) -> Tensor:
        """As of `Outer`."""
        sqnorms = []
        for part, outer in self._outers():
            of_groups, sqnorm = outer.by_new_group()
            out[:, part] = of_groups
            sqnorms.append(sqnorm)
        return functools.reduce(torch.add, sqnorms)

    def by_new_group(self) -> tuple[Tensor, Tensor]:
        """As of `Outer`."""
        out = self.x.new_empty(self.segments.groups.counts[-1], *self.shape, dtype=accumulator(self.x.dtype))
        return out, self.by_group(out)

    def total(self, weight: Tensor | None = None) -> Tensor:
        return torch.cat([outer.total(weight) for _, outer in self._outers()])

    def gram(self) -> Tensor:
        return functools.reduce(torch.add, [outer.gram() for _, outer in self._outers()])

    def of_column(self, rows: Tensor) -> Tensor:
        return torch.cat([outer.of_column(rows) for _, outer in self._outers()])

    def entries(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Of these rows' gradient the entries that a lookup of ``ids`` shares with it."""
        return self.g.columns(ids)[rows].t() @ self.x[rows]

    def row_sums(self) -> Sums:
        """Each segment's gradient of a bias."""
        run = find("sum_sums", self.x.device.type, self.backend)
        return Sums(torch.cat([run(g, self.segments) for _, g in self.g.parts()], 1), self.segments, self.backend)

    @property
    def kept(self) -> tuple[Tensor, ...]:
        return self.g.kept

    def fingerprint(self) -> Tensor:
        return functools.reduce(torch.add, [outer.fingerprint() for _, outer in self._outers()])


@dataclass(frozen=True)
class Route:
    """Which expert and example each row belongs to, the rows in the order of experts and, of each, of examples.

    Attributes:
        expert: ``[rows]``.
        ends: ``[experts]`` int32: where each expert's rows end.
        segments: the (expert, example) pairs, ``[experts · B]``; its groups pair experts with prompts and tasks.
        by_expert: the same with one coarser level, the experts.
    """

    expert: Tensor
    ends: Tensor
    segments: Segments
    by_expert: Segments
    experts: int

    @staticmethod
    def of(expert: Tensor, owner: Tensor, experts: int, groups: Groups) -> Route:
        count, device = len(groups.walk), expert.device
        pairs = experts * count
        which = torch.arange(experts, device=device)
        lengths = torch.zeros(pairs, dtype=torch.int64, device=device)
        lengths.index_add_(0, expert * count + owner, torch.ones_like(expert))
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        levels = [
            ((which[:, None] * size + ids).flatten(), experts * size)
            for ids, size in zip(groups.levels, groups.counts, strict=True)
        ]
        coarser = [*levels, (which.repeat_interleave(count), experts)]
        return Route(
            expert,
            offsets[count::count].to(torch.int32),
            Segments(offsets, None, Groups.of(pairs, levels, device)),
            Segments(offsets, None, Groups.of(pairs, coarser, device)),
            experts,
        )


@dataclass(frozen=True)
class Routed:
    """Gradients of experts' matrices, each of the rows that were routed there: ``[experts, g's width, x's width]``.

    ``segments``: of the examples alone. Swapped as of `Outer`.
    """

    x: Tensor
    g: Tensor
    route: Route
    segments: Segments
    backend: str
    swapped: bool = False

    def sqnorm(self) -> Tensor:
        run = find("outer_sqnorm", self.x.device.type, self.backend)
        return self._over_experts(run(self.x, self.g, self.route.segments))

    def wgrad(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        run = find("outer_wgrad", self.x.device.type, self.backend)
        pairs, experts = self.route.by_expert, self.route.experts
        of_pair = None if weight is None else weight.repeat(experts)
        of_expert = pairs.groups.levels[-1]
        total, sqnorm = run(self.x, self.g, pairs, weight=of_pair, outputs=of_expert, n_outputs=experts)
        return total, self._over_experts(sqnorm)

    def _over_experts(self, sqnorm: Tensor) -> Tensor:
        counts = self.segments.count, *self.segments.groups.counts
        of_pairs = sqnorm[: self.route.experts * sum(counts)].split([self.route.experts * n for n in counts])
        return torch.cat([level.view(self.route.experts, -1).sum(0) for level in of_pairs])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.route.experts, self.g.shape[1], self.x.shape[1]

    def by_group(self, out: Tensor) -> Tensor:
        """As of `Outer`."""
        run, pairs = find("outer_wgrad", self.x.device.type, self.backend), self.route.segments
        totals, sqnorm = run(self.x, self.g, pairs, outputs=pairs.groups.levels[-1], n_outputs=pairs.groups.counts[-1])
        out.copy_(totals.unflatten(0, (self.route.experts, -1)).transpose(0, 1))
        return self._over_experts(sqnorm)

    def by_new_group(self) -> tuple[Tensor, Tensor]:
        """As of `Outer`."""
        out = self.x.new_empty(self.segments.groups.counts[-1], *self.shape, dtype=accumulator(self.x.dtype))
        return out, self.by_group(out)

    def total(self, weight: Tensor | None = None) -> Tensor:
        return self.wgrad(weight)[0]

    def gram(self) -> Tensor:
        return gram_of(self.by_new_group()[0])

    def of_segments(self, segments: Tensor) -> Tensor:
        return self.total(chosen(segments, self.segments).to(self.g.dtype))

    @property
    def kept(self) -> tuple[Tensor, ...]:
        return self.x, self.g

    def fingerprint(self) -> Tensor:
        return _size_of_rows(self.x if self.swapped else self.g)


@dataclass(frozen=True)
class Lookup:
    """An embedding table's gradient, ``dw[ids[r]] += g[r]``, shaped ``[vocabulary, g's width]``."""

    ids: Tensor
    g: Tensor
    vocabulary: int
    padding_idx: int | None
    segments: Segments
    backend: str

    def sqnorm(self) -> Tensor:
        run = find("lookup_sqnorm", self.g.device.type, self.backend)
        return run(self.ids, self.g, self.vocabulary, self.segments, padding_idx=self.padding_idx)  # type: ignore[no-any-return]

    def wgrad(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        run = find("lookup_wgrad", self.g.device.type, self.backend)
        rows = self.ids, self.g, self.vocabulary, self.segments
        return run(*rows, padding_idx=self.padding_idx, weight=weight)  # type: ignore[no-any-return]

    def total(self, weight: Tensor | None = None) -> Tensor:
        g = self.live_g
        if weight is not None:
            g = g * self.segments.per_row(weight.to(g.dtype))[:, None]
        return g.new_zeros(self.vocabulary, g.shape[1]).index_add_(0, self.ids, g)

    def gram(self) -> Tensor:
        """Only the entries that were looked up have a gradient."""
        looked_up, ids = torch.unique(self.ids, return_inverse=True)
        run = find("lookup_wgrad", self.g.device.type, self.backend)
        tasks, count = self.segments.groups.levels[-1], self.segments.groups.counts[-1]
        rows = ids, self.live_g, len(looked_up), self.segments
        return gram_of(run(*rows, outputs=tasks, n_outputs=count)[0])

    def by_new_group(self) -> tuple[Tensor, Tensor]:
        """As of `Outer`."""
        run = find("lookup_wgrad", self.g.device.type, self.backend)
        tasks, count = self.segments.groups.levels[-1], self.segments.groups.counts[-1]
        rows = self.ids, self.live_g, self.vocabulary, self.segments
        return run(*rows, outputs=tasks, n_outputs=count)  # type: ignore[no-any-return]

    def of_column(self, rows: Tensor) -> Tensor:
        g = self.live_g[rows]
        return g.new_zeros(self.vocabulary, g.shape[1]).index_add_(0, self.ids[rows], g)

    @property
    def live_g(self) -> Tensor:
        """The output gradient without the rows of the padding entry, which learns nothing."""
        return self.g if self.padding_idx is None else self.g.masked_fill((self.ids == self.padding_idx)[:, None], 0)

    @property
    def kept(self) -> tuple[Tensor, ...]:
        return self.ids, self.g

    def fingerprint(self) -> Tensor:
        return _size_of_rows(self.g)


@dataclass(frozen=True)
class Sums:
    """A gradient small enough to be formed per segment: ``sums [S, *shape of the parameter]``."""

    sums: Tensor
    segments: Segments
    backend: str

    def shaped(self, shape: Sequence[int]) -> Sums:
        if self.sums.dim() == 1 + len(shape) == 2:
            return self
        return Sums(self.sums.view(-1, *shape), self.segments, self.backend)

    @property
    def flat(self) -> Tensor:
        return self.sums if self.sums.dim() == 2 else self.sums.reshape(self.segments.count, -1)

    def sqnorm(self) -> Tensor:
        run = find("sums_sqnorm", self.sums.device.type, self.backend)
        return run(self.flat, self.segments)  # type: ignore[no-any-return]

    def wgrad(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        run = find("sums_wgrad", self.sums.device.type, self.backend)
        total, sqnorm = run(self.flat, self.segments, weight=weight)
        return total if self.sums.dim() == 2 else total.view(self.sums.shape[1:]), sqnorm

    def total(self, weight: Tensor | None = None) -> Tensor:
        total = self.sums.sum(0) if weight is None else torch.tensordot(weight.to(self.sums.dtype), self.sums, 1)
        return total.view(self.sums.shape[1:])

    def by_new_group(self) -> tuple[Tensor, Tensor]:
        """As of `Outer`."""
        return self._of_tasks(), self.sqnorm()

    def gram(self) -> Tensor:
        return gram_of(self._of_tasks())

    def _of_tasks(self) -> Tensor:
        tasks, count = self.segments.groups.levels[-1], self.segments.groups.counts[-1]
        return self.sums.new_zeros(count, *self.sums.shape[1:]).index_add_(0, tasks, self.sums)

    def of_segments(self, segments: Tensor) -> Tensor:
        return self.sums[segments].sum(0)

    @property
    def kept(self) -> tuple[Tensor, ...]:
        return (self.sums,)

    def fingerprint(self) -> Tensor:
        return self.flat.abs().sum(1)


@dataclass(frozen=True)
class Windowed:
    """An `Outer` whose ``x`` is what windows see of images, ``[images, *sizes, channels]``."""

    images: Tensor
    windows: Windows
    g: Tensor
    segments: Segments
    backend: str

    def sqnorm(self) -> Tensor:
        run = find("windows_sqnorm", self.images.device.type, self.backend)
        return run(self.images, self.windows, self.g, self.segments)  # type: ignore[no-any-return]

    def wgrad(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As of `Outer`."""
        run = find("windows_wgrad", self.images.device.type, self.backend)
        return run(self.images, self.windows, self.g, self.segments, weight=weight)  # type: ignore[no-any-return]

    def by_group(self, out: Tensor) -> Tensor:
        """As of `Outer`."""
        run = find("windows_wgrad", self.images.device.type, self.backend)
        tasks, count = self.segments.groups.levels[-1], self.segments.groups.counts[-1]
        of_rows = self.images, self.windows, self.g, self.segments
        return run(*of_rows, outputs=tasks, n_outputs=count, out=out)[1]  # type: ignore[no-any-return]


class Geometry(NamedTuple):
    """How a convolution's windows lie, in the order of torch's arguments."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class Convolved:
    """A convolution's gradient, of each image the products of an output gradient with what it saw of the input.

        dw[o, c, k] = Σ_p g[o, p] x[c, stride p + dilation k - padding]

    In a transposed convolution the input's entries see the output, and ``x`` and ``g`` are exchanged in the formula.

    Small gradients are formed for every image by one call of the library (`compact`). Otherwise what an image's windows
    see are the rows of an outer product: the backend's, where it can look through windows and an image's rows fit in a
    core's cache, or all of them unfolded, where there are few; of other images each one's gradient is formed for as
    many channels at a time as memory allows. Only ``x`` and ``g`` are kept.

    Attributes:
        x: the input, ``[images, channels, *sizes]``.
        g: the output's gradient.
        shape: the weight's, ``[out, in / groups, *kernel]``; ``[in, out / groups, *kernel]`` where transposed.
        segments: the images of each example.
    """

    x: Tensor
    g: Tensor
    shape: torch.Size
    geometry: Geometry
    segments: Segments
    backend: str

    held = 1 << 24  # entries of the images' gradients at once
    unfolded = 1 << 18  # entries of images unfolded at once: what a core's cache holds
    in_cache = 1 << 20  # likewise, of an image's rows that a backend looks through windows at

    def compact(self) -> Sums | Convolved:
        """Each example's gradient, where all of them take no more room than what they come from."""
        images = len(self.x)
        if images * self.shape.numel() > self.x.numel() + self.g.numel():
            return self
        # One image with the channels of all, in as many groups: then torch's sum over images is a sum over one.
        dtype, geometry = accumulator(self.x.dtype), self.geometry._replace(groups=images * self.geometry.groups)
        x, g = (side.to(dtype).flatten(0, 1)[None] for side in (self.x, self.g))
        unused, mask = x.new_empty(images * self.shape[0], *self.shape[1:]), [False, True, False]
        sums = torch.ops.aten.convolution_backward(g, x, unused, None, *geometry, mask)[1].view(images, -1)
        if self.segments.length != 1:
            sums = find("sum_sums", sums.device.type, self.backend)(sums, self.segments)
        return Sums(sums, self.segments, self.backend).shaped(self.shape)

    def sqnorm(self) -> Tensor:
        if rows := self._rows():
            return rows.sqnorm()
        return functools.reduce(torch.add, [part.sqnorm() for _, part in self._parts()])

    def wgrad(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if rows := self._rows():
            total, sqnorm = rows.wgrad(weight)
            return self._placed(total), sqnorm
        totals, sqnorms = zip(*(part.wgrad(weight) for _, part in self._parts()), strict=True)
        return self._placed(torch.cat(totals)), functools.reduce(torch.add, sqnorms)

    def by_group(self, out: Tensor) -> Tensor:
        """As of `Outer`."""
        if rows := self._rows():
            of_groups = out.new_empty(len(out), self.shape[0], self.shape[1:].numel())
            sqnorm = rows.by_group(of_groups)
            out.copy_(self._placed(of_groups))
            return sqnorm
        sqnorms = []
        for channels, part in self._parts():
            sums, groups = self._placed(part.sums), self.segments.groups.levels[-1]
            out[:, channels] = sums.new_zeros(len(out), *sums.shape[1:]).index_add_(0, groups, sums)
            sqnorms.append(part.sqnorm())
        return functools.reduce(torch.add, sqnorms)

    def by_new_group(self) -> tuple[Tensor, Tensor]:
        """As of `Outer`."""
        count = self.segments.groups.counts[-1]
        out = self.x.new_empty(count, *self.shape, dtype=accumulator(self.x.dtype))
        return out, self.by_group(out)

    def gram(self) -> Tensor:
        return gram_of(self.by_new_group()[0])

    def total(self, weight: Tensor | None = None) -> Tensor:
        g = self.g
        if weight is not None:
            g = g * self.segments.per_row(weight.to(g.dtype)).view(-1, *[1] * (g.dim() - 1))
        unused, mask = g.new_empty(()).expand(self.shape), [False, True, False]
        gradients = torch.ops.aten.convolution_backward(g, self.x, unused, None, *self.geometry, mask)
        return gradients[1]  # type: ignore[no-any-return]

    def of_segments(self, segments: Tensor) -> Tensor:
        return self.total(chosen(segments, self.segments))

    @property
    def kept(self) -> tuple[Tensor, ...]:
        return self.x, self.g

    def fingerprint(self) -> Tensor:
        return _size_of_rows(self.g.flatten(1))

    def together(self, others: Sequence[Convolved], sums: Sequence[Sums]) -> Tensor:
        """The norms of the sum of several uses of one weight."""
        norms, images = [], max(len(one.x) for one in (self, *others))
        for of_uses in zip(*(one._parts(images) for one in (self, *others)), strict=True):
            channels = of_uses[0][0]
            parts = [self._placed(part.sums) for _, part in of_uses] + [one.sums[:, channels] for one in sums]
            norms.append(Sums(functools.reduce(torch.add, parts), self.segments, self.backend).sqnorm())
        return functools.reduce(torch.add, norms)

    @property
    def _sides(self) -> tuple[Tensor, Tensor]:
        """The images that are seen, and those whose entries see."""
        return (self.g, self.x) if self.geometry.transposed else (self.x, self.g)

    def _placed(self, gradient: Tensor) -> Tensor:
        """From ``[..., channels, kernel · inner channels]`` to ``[..., *shape]``."""
        kernel = self.shape[2:]
        apart: Tensor = gradient.unflatten(-1, (*kernel, self.shape[1]))
        return apart.movedim(-1, -1 - len(kernel))

    def _rows(self) -> Outer | Windowed | None:
        """As one outer product, where that is the cheaper way."""
        seen, seeing = self._sides
        positions, device = seeing[0, 0].numel(), seen.device.type
        looks_through = self.in_cache >= positions * self.shape[1:].numel() and serves(
            "windows_wgrad", device, self.backend
        )
        unfolded_are_smaller = positions < self.shape[0]
        if self.geometry.groups > 1 or not (looks_through or unfolded_are_smaller):
            return None
        images, segments = self._channels_last(seen, 1), self.segments.finer(positions)
        rows = seeing.flatten(2).transpose(1, 2).flatten(0, 1)
        if not looks_through:
            return Outer(self._windows(images, 0).flatten(0, 1), rows, segments, self.backend)
        dtype, images = accumulator(seen.dtype), images[:, 0].contiguous()
        windows = Windows.of(images, seeing.shape[2:], self.geometry.stride, self.shape[2:], self.geometry.dilation)
        return Windowed(images.to(dtype), windows, rows.to(dtype), segments, self.backend)

    def _channels_last(self, images: Tensor, groups: int) -> Tensor:
        """``[images, groups, *padded sizes, channels]``: what a window sees lies in long runs."""
        apart: Tensor = images.unflatten(1, (groups, -1)).movedim(2, -1)
        if self.shape[2:].numel() == 1 and not any(self.geometry.padding):
            return apart  # each entry is looked at once
        sizes = [size + 2 * p for size, p in zip(images.shape[2:], self.geometry.padding, strict=True)]
        padded = inner = images.new_zeros(*apart.shape[:2], *sizes, apart.shape[-1])
        for i, p in enumerate(self.geometry.padding):
            inner = inner.narrow(2 + i, p, images.shape[2 + i])
        inner.copy_(apart)
        return padded

    def _windows(self, images: Tensor, first: int) -> Tensor:
        """What is seen, ``[images · groups, *sizes, positions, kernel · channels]``: windows but for the ``first`` sizes."""
        kernel, positions = self.shape[2:], self._sides[1].shape[2:]
        for i in range(first, len(kernel)):
            reach = self.geometry.dilation[i] * (kernel[i] - 1) + 1
            images = images.unfold(2 + i, reach, self.geometry.stride[i]).narrow(2 + i, 0, positions[i])
            images = images[..., :: self.geometry.dilation[i]]
        images = images.movedim(2 + len(kernel), -1).flatten(0, 1)
        ends = positions[first:].numel(), kernel[first:].numel() * images.shape[-1]
        windows = images.reshape(*images.shape[: 1 + first], *ends)
        return windows if kernel[first:].numel() == 1 else windows.contiguous()

    def _lines(self) -> list[slice]:
        """For each entry of the kernel's first dimension the lines of the image that it meets."""
        step, spread = self.geometry.stride[0], self.geometry.dilation[0]
        reach = step * (self._sides[1].shape[2] - 1) + 1
        return [slice(spread * k, spread * k + reach, step) for k in range(self.shape[2])]

    def _parts(self, images: int = 0) -> Iterator[tuple[slice, Sums]]:
        """Each example's gradient, ``[S, channels, kernel · inner channels]``, for some of the weight's first dimension.

        As many as fit for so many images, its own by default.
        """
        groups, of_group = self.geometry.groups, self.shape[0] // self.geometry.groups
        channels = max(1, self.held // ((images or len(self.x)) * self.shape[1:].numel()))
        if channels < of_group:
            parts = [(range(i, i + 1), first) for i in range(groups) for first in range(0, of_group, channels)]
        else:
            several = channels // of_group
            parts = [(range(i, min(i + several, groups)), 0) for i in range(0, groups, several)]
        for some, first in parts:
            last = (some.stop - 1) * of_group + min(first + channels, of_group)
            part = slice(some.start * of_group + first, last)
            yield part, self._of_channels(part, some)

    def _of_channels(self, channels: slice, groups: range) -> Sums:
        seen, seeing = self._sides
        inner, entries, positions = self.shape[1], self.shape[1:].numel(), seeing.shape[2:].numel()
        dtype, examples, kernel = accumulator(seen.dtype), self.segments.count, self._lines()
        seen = seen[:, groups.start * inner : groups.stop * inner].to(dtype)
        seeing = seeing[:, channels].to(dtype).reshape(len(seeing) * len(groups), -1, positions)
        gradients = seen.new_empty(len(seeing), seeing.shape[1], len(kernel), entries // len(kernel))
        images = max(1, self.unfolded * len(kernel) // (len(groups) * positions * entries))
        for first in range(0, len(seen), images):
            images_seen = self._channels_last(seen[first : first + images], len(groups))
            lines = self._windows(images_seen, 1)  # one copy for all windows that see a line
            some = slice(first * len(groups), first * len(groups) + len(lines))
            for k, met in enumerate(kernel):
                torch.bmm(seeing[some], lines[:, met].flatten(1, 2), out=gradients[some, :, k])
        sums = gradients.view(len(seen), -1)
        if self.segments.length != 1:
            sums = find("sum_sums", sums.device.type, self.backend)(sums, self.segments)
        return Sums(sums.view(examples, -1, entries), self.segments, self.backend)


@dataclass(frozen=True)
class Pulled:
    """A gradient that only a backward pass knows: one pass for each sum of examples that is asked for.

    ``pull(weight [B] or None)`` gives the gradient of the weighted sum of the examples; ``norms()`` all squared norms, in
    one sweep for all parameters of the function; ``sizes [B]``: how large each example's output gradient is.
    """

    pull: Callable[[Tensor | None], Tensor]
    norms: Callable[[], Tensor]
    sizes: Callable[[], Tensor]
    segments: Segments

    def sqnorm(self) -> Tensor:
        return self.norms()

    def wgrad(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.pull(weight), self.norms()

    def total(self, weight: Tensor | None = None) -> Tensor:
        return self.pull(weight)

    def by_new_group(self) -> tuple[Tensor, Tensor]:
        """As of `Outer`."""
        return self._of_tasks(), self.norms()

    def gram(self) -> Tensor:
        return gram_of(self._of_tasks())

    def _of_tasks(self) -> Tensor:
        count = self.segments.groups.counts[-1]
        return torch.stack([self.of_segments(task) for task in members_of_columns(self.segments)[-count:]])

    def of_segments(self, segments: Tensor) -> Tensor:
        return self.pull(chosen(segments, self.segments))

    @property
    def kept(self) -> tuple[Tensor, ...]:
        return ()

    def fingerprint(self) -> Tensor:
        return self.sizes()


Contribution = Outer | Parted | Routed | Lookup | Sums | Convolved | Pulled


def chosen(members: Tensor, segments: Segments) -> Tensor:
    """``[S]``: 1 for the segments that are meant, else 0."""
    return torch.zeros(segments.count, device=members.device).index_fill_(0, members, 1)


def _size_of_rows(g: Tensor) -> Tensor:
    return g.abs().sum(1, dtype=accumulator(g.dtype))


class Place(NamedTuple):
    """Where a view lies in its parameter's memory."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.offset + 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))


@dataclass(frozen=True)
class Placed:
    """A contribution and how the tensor that was used came from its parameter.

    ``views`` names the steps (nothing: the parameter itself; "t": its transpose); ``adjoint`` turns a gradient of the
    tensor that was used into one of the parameter. ``place`` is None where that is no view (a cast, ``1 + w``).
    """

    contribution: Contribution
    views: tuple[str, ...]
    adjoint: Callable[[Tensor], Tensor]
    place: Place | None = None

    def in_parameter_space(self) -> Placed:
        """The same with its views undone, where that is cheap: transposes exchange an outer product's sides."""
        if isinstance(self.contribution, Outer) and self.views and all(view == "t" for view in self.views):
            outer = self.contribution if len(self.views) % 2 == 0 else self.contribution.transposed()
            return Placed(outer, (), lambda gradient: gradient)
        if isinstance(self.contribution, Sums) and self.views:
            sums = self.contribution.sums
            placed = torch.stack([self.adjoint(one) for one in sums.unbind(0)]) if len(sums) else sums
            return Placed(
                Sums(placed, self.contribution.segments, self.contribution.backend), (), lambda gradient: gradient
            )
        return self


def combined_sqnorm(placed: Sequence[Placed]) -> Tensor:
    """Squared norms of the sum of several contributions to one parameter: ``‖Σ_u G_u[s]‖²``, not ``Σ_u ‖G_u[s]‖²``."""
    return functools.reduce(torch.add, [_overlapping_sqnorm(uses) for uses in _apart(placed)])


def _apart(placed: Sequence[Placed]) -> list[list[Placed]]:
    """The uses in groups that share no entry of the parameter: there the squared norms do add up."""
    located = sorted(((one.place, one) for one in placed if one.place is not None), key=lambda pair: pair[0].offset)
    if len(located) < len(placed):
        return [list(placed)]
    groups: list[list[Placed]] = []
    end = -1
    for place, one in located:
        if place.offset < end:
            groups[-1].append(one)
        else:
            groups.append([one])
        end = max(end, place.end)
    return groups


def _overlapping_sqnorm(placed: Sequence[Placed]) -> Tensor:
    if len({one.place for one in placed}) == len({type(one.contribution) for one in placed}) == 1 and placed[0].place:
        placed = [Placed(one.contribution, (), lambda gradient: gradient) for one in placed]  # all of the same entries
    uses = [one.in_parameter_space() for one in placed]
    if all(not one.views and not isinstance(one.contribution, Pulled) for one in uses):
        outers = [one.contribution for one in uses if isinstance(one.contribution, Outer)]
        lookups = [one.contribution for one in uses if isinstance(one.contribution, Lookup)]
        sums = [one.contribution for one in uses if isinstance(one.contribution, Sums)]
        convolved = [one.contribution for one in uses if isinstance(one.contribution, Convolved)]
        parted = [one.contribution for one in uses if isinstance(one.contribution, Parted)]
        if len(parted) == 1 and lookups and len(lookups) == len(uses) - 1:
            return tied_sqnorm(TiedOuter.of(parted[0], [(lookup.ids, lookup.segments) for lookup in lookups]), lookups)
        if parted or any(isinstance(one.contribution, Routed) for one in uses):
            return _dense_sqnorm(uses)
        if convolved and not outers and not lookups:
            return convolved[0].together(convolved[1:], sums)
        if not sums and not convolved and (outers or lookups):
            outer = functools.reduce(_concatenated_outer, outers) if outers else None
            if not outer:
                return functools.reduce(_concatenated_lookup, lookups).sqnorm()
            if not lookups:
                return outer.sqnorm()
            return tied_sqnorm(TiedOuter.of(outer, [(lookup.ids, lookup.segments) for lookup in lookups]), lookups)
        elif sums and not outers and not lookups:
            return dataclasses.replace(sums[0], sums=functools.reduce(torch.add, [one.sums for one in sums])).sqnorm()
    return _dense_sqnorm(uses)


def _concatenated_outer(first: Outer, second: Outer) -> Outer:
    segments, join = _concatenated(first.segments, second.segments)
    return Outer(join(first.x, second.x), join(first.g, second.g), segments, first.backend)


def _concatenated_lookup(first: Lookup, second: Lookup) -> Lookup:
    segments, join = _concatenated(first.segments, second.segments)
    ids, g = join(first.ids, second.ids), join(first.live_g, second.live_g)
    return Lookup(ids, g, first.vocabulary, None, segments, first.backend)  # each has its own padding entry


def _concatenated(first: Segments, second: Segments) -> tuple[Segments, Callable[[Tensor, Tensor], Tensor]]:
    """The segments of two uses' rows, and how to bring the rows of each into their order."""
    count, groups = first.count, first.groups
    if first.length is not None and second.length is not None:

        def interleave(*parts: Tensor) -> Tensor:
            return torch.cat([rows.reshape(count, len(rows) // count, *rows.shape[1:]) for rows in parts], 1).flatten(
                0, 1
            )

        return groups.equal(first.length + second.length), interleave
    of_row = torch.cat([one.per_row(torch.arange(count, device=one.offsets.device)) for one in (first, second)])
    order = torch.argsort(of_row, stable=True)
    segments = Segments(first.offsets + second.offsets, None, groups)
    return segments, lambda one, other: torch.cat([one, other]).index_select(0, order)


def _rows_of(members: Tensor, segments: Segments) -> Tensor:
    of_row = segments.per_row(torch.arange(segments.count, device=members.device))
    return torch.isin(of_row, members).nonzero()[:, 0]


def members_of_columns(segments: Segments) -> list[Tensor]:
    """Of every entry of a sqnorm vector: its segments."""
    device = segments.offsets.device
    columns = [torch.tensor([s], device=device) for s in range(segments.count)]
    for ids, count in zip(segments.groups.levels, segments.groups.counts, strict=True):
        columns += [(ids == group).nonzero()[:, 0] for group in range(count)]
    return columns


def _columns(segments: Segments) -> list[tuple[Tensor, Tensor]]:
    """Of every entry of a sqnorm vector: its segments and its rows."""
    return [(members, _rows_of(members, segments)) for members in members_of_columns(segments)]


@dataclass(frozen=True)
class TiedOuter:
    """A head tied to embeddings: its own norms, and of its gradient the rows of those entries that were looked up.

    Kept from the head's backward to the end of the block in place of its rows: for every column of the norms the
    distinct ids looked up there, ``[u]``, and the head's gradient of those entries, ``[u, width]``.
    """

    norms: Tensor
    entries: list[tuple[Tensor, Tensor]]

    @staticmethod
    def of(outer: Outer | Parted, ids: Sequence[tuple[Tensor, Segments]]) -> TiedOuter:
        """``ids``: of every lookup, example by example."""
        entries = []
        for members, rows in _columns(outer.segments):
            looked_up = torch.unique(torch.cat([one[_rows_of(members, segments)] for one, segments in ids]))
            entries.append((looked_up, outer.entries(rows, looked_up)))
        return TiedOuter(outer.sqnorm(), entries)


def tied_sqnorm(head: TiedOuter, lookups: Sequence[Lookup]) -> Tensor:
    """``‖G_head + G_embedding‖² = ‖G_head‖² + ‖G_embedding‖² + 2⟨G_head, G_embedding⟩``, per column."""
    lookup = functools.reduce(_concatenated_lookup, lookups)
    g, cross = lookup.live_g, []
    for (looked_up, of_head), (_, rows) in zip(head.entries, _columns(lookup.segments), strict=True):
        where = torch.searchsorted(looked_up, lookup.ids[rows])
        of_embedding = of_head.new_zeros(of_head.shape).index_add_(0, where, g[rows].to(of_head.dtype))
        cross.append((of_head * of_embedding).sum())
    return head.norms + lookup.sqnorm() + 2 * torch.stack(cross).to(head.norms.dtype)


def _dense_sqnorm(uses: Sequence[Placed]) -> Tensor:
    """The general case, exact and slow: every column's gradient is formed, one after the other."""
    members = members_of_columns(uses[0].contribution.segments)
    return torch.stack([_dense_gradient(uses, column).square().sum() for column in members])


def _dense_gradient(uses: Sequence[Placed], members: Tensor) -> Tensor:
    total: Tensor | None = None
    for use in uses:
        one = use.contribution
        of_rows = isinstance(one, (Outer, Parted, Lookup))
        part = use.adjoint(
            one.of_column(_rows_of(members, one.segments)) if of_rows else one.of_segments(members)  # type: ignore[union-attr]
        )
        total = part if total is None else total + part
    assert total is not None
    return total


def combined_gram(placed: Sequence[Placed]) -> Tensor:
    """Inner products of the tasks' gradients, each the sum of several contributions to one parameter."""
    uses = [one.in_parameter_space() for one in placed]
    if len(uses) == 1 and not uses[0].views:
        return uses[0].contribution.gram()
    segments = uses[0].contribution.segments
    tasks = members_of_columns(segments)[-segments.groups.counts[-1] :]
    return gram_of(torch.stack([_dense_gradient(uses, task) for task in tasks]))


def gram_of(gradients: Tensor) -> Tensor:
    """``[K, K]``: the inner products of ``gradients [K, ...]``, summed in runs that lose no digits."""
    run = 4096
    flat = gradients.reshape(len(gradients), -1)
    whole = flat.shape[1] // run * run
    runs = flat[:, :whole].unflatten(1, (-1, run)).transpose(0, 1)
    rest = flat[:, whole:]
    gram: Tensor = (runs @ runs.mT).double().sum(0) + rest @ rest.T
    return gram.to(flat.dtype)
