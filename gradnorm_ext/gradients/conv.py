"""Products of images with what they see of an input: the weight gradient of a convolution."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gradnorm_ext.backends import find, serves
from gradnorm_ext.gradients.outer import Outer
from gradnorm_ext.gradients.per_sample import PerSampleGrads
from gradnorm_ext.gradients.rows import one_hot_mask, row_abs_sums
from gradnorm_ext.gradients.term import GradientTerm
from gradnorm_ext.im2col import Im2col
from gradnorm_ext.reference import accumulator
from gradnorm_ext.segments import Segments


@dataclass(frozen=True)
class Im2colOuter:
    """An `Outer` whose ``x`` is what windows see of images, ``[images, *sizes, channels]``."""

    images: Tensor
    windows: Im2col
    g: Tensor
    segments: Segments
    backend: str

    def sqnorm(self) -> Tensor:
        run = find("im2col_sqnorm", self.images.device.type, self.backend)
        return run(self.images, self.windows, self.g, self.segments)  # type: ignore[no-any-return]

    def wgrad(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        run = find("im2col_wgrad", self.images.device.type, self.backend)
        return run(self.images, self.windows, self.g, self.segments, weight=weight)  # type: ignore[no-any-return]

    def per_group(self, out: Tensor) -> tuple[Tensor, Tensor]:
        run = find("im2col_wgrad", self.images.device.type, self.backend)
        tasks, count = self.segments.groups.levels[-1], self.segments.groups.counts[-1]
        of_rows = self.images, self.windows, self.g, self.segments
        return out, run(*of_rows, outputs=tasks, n_outputs=count, out=out)[1]


class Geometry(NamedTuple):
    """How a convolution's windows lie, in the order of torch's arguments."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class ConvGrad(GradientTerm):
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
        weight_shape: ``[out, in / groups, *kernel]``; ``[in, out / groups, *kernel]`` where transposed.
        segments: the images of each example.
    """

    fuses_groups = True

    x: Tensor
    g: Tensor
    weight_shape: torch.Size
    geometry: Geometry
    segments: Segments
    backend: str

    held = 1 << 24  # entries of the images' gradients at once
    unfolded = 1 << 18  # entries of images unfolded at once: what a core's cache holds
    in_cache = 1 << 20  # likewise, of an image's rows that a backend looks through windows at

    @property
    def shape(self) -> torch.Size:
        return self.weight_shape

    @property
    def like(self) -> Tensor:
        return self.x

    def compact(self) -> PerSampleGrads | ConvGrad:
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
            sums = find("segment_sum", sums.device.type, self.backend)(sums, self.segments)
        return PerSampleGrads(sums, self.segments, self.backend).shaped(self.shape)

    def sqnorm(self) -> Tensor:
        if rows := self._rows():
            return rows.sqnorm()
        return functools.reduce(torch.add, [part.sqnorm() for _, part in self._parts()])

    def wgrad(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if rows := self._rows():
            total, sqnorm = rows.wgrad(weight)
            return self._weight_shaped(total), sqnorm
        totals, sqnorms = zip(*(part.wgrad(weight) for _, part in self._parts()), strict=True)
        return self._weight_shaped(torch.cat(totals)), functools.reduce(torch.add, sqnorms)

    def per_group(self, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out = self.empty_groups() if out is None else out
        if rows := self._rows():
            of_groups = out.new_empty(len(out), self.shape[0], self.shape[1:].numel())
            _, sqnorm = rows.per_group(of_groups)
            return out.copy_(self._weight_shaped(of_groups)), sqnorm
        sqnorms = []
        for channels, part in self._parts():
            sums, groups = self._weight_shaped(part.grads), self.segments.groups.levels[-1]
            out[:, channels] = sums.new_zeros(len(out), *sums.shape[1:]).index_add_(0, groups, sums)
            sqnorms.append(part.sqnorm())
        return out, functools.reduce(torch.add, sqnorms)

    def grad(self, weight: Tensor | None = None) -> Tensor:
        g = self.g
        if weight is not None:
            g = g * self.segments.per_row(weight.to(g.dtype), len(g)).view(-1, *[1] * (g.dim() - 1))
        unused, mask = g.new_empty(()).expand(self.shape), [False, True, False]
        gradients = torch.ops.aten.convolution_backward(g, self.x, unused, None, *self.geometry, mask)
        return gradients[1]  # type: ignore[no-any-return]

    def grad_of_segments(self, members: Tensor) -> Tensor:
        return self.grad(one_hot_mask(members, self.segments))

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        return self.x, self.g

    def row_abs_sums(self) -> Tensor:
        return row_abs_sums(self.g.flatten(1))

    def sqnorm_of_sum(self, others: Sequence[ConvGrad], sums: Sequence[PerSampleGrads]) -> Tensor:
        """The norms of the sum of several uses of one weight."""
        norms, images = [], max(len(one.x) for one in (self, *others))
        for of_uses in zip(*(one._parts(images) for one in (self, *others)), strict=True):
            channels = of_uses[0][0]
            parts = [self._weight_shaped(part.grads) for _, part in of_uses] + [one.grads[:, channels] for one in sums]
            norms.append(PerSampleGrads(functools.reduce(torch.add, parts), self.segments, self.backend).sqnorm())
        return functools.reduce(torch.add, norms)

    @property
    def _sides(self) -> tuple[Tensor, Tensor]:
        """The images that are seen, and those whose entries see."""
        return (self.g, self.x) if self.geometry.transposed else (self.x, self.g)

    def _weight_shaped(self, gradient: Tensor) -> Tensor:
        """From ``[..., channels, kernel · inner channels]`` to ``[..., *shape]``."""
        kernel = self.shape[2:]
        apart: Tensor = gradient.unflatten(-1, (*kernel, self.shape[1]))
        return apart.movedim(-1, -1 - len(kernel))

    def _rows(self) -> Outer | Im2colOuter | None:
        """As one outer product, where that is the cheaper way."""
        seen, seeing = self._sides
        positions, device = seeing[0, 0].numel(), seen.device.type
        looks_through = self.in_cache >= positions * self.shape[1:].numel() and serves(
            "im2col_wgrad", device, self.backend
        )
        unfolded_are_smaller = positions < self.shape[0]
        if self.geometry.groups > 1 or not (looks_through or unfolded_are_smaller):
            return None
        images, segments = self._channels_last(seen, 1), self.segments.finer(positions)
        rows = seeing.flatten(2).transpose(1, 2).flatten(0, 1)
        if not looks_through:
            return Outer(self._windows(images, 0).flatten(0, 1), rows, segments, self.backend)
        dtype, images = accumulator(seen.dtype), images[:, 0].contiguous()
        windows = Im2col.of(images, seeing.shape[2:], self.geometry.stride, self.shape[2:], self.geometry.dilation)
        return Im2colOuter(images.to(dtype), windows, rows.to(dtype), segments, self.backend)

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

    def _parts(self, images: int = 0) -> Iterator[tuple[slice, PerSampleGrads]]:
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

    def _of_channels(self, channels: slice, groups: range) -> PerSampleGrads:
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
            sums = find("segment_sum", sums.device.type, self.backend)(sums, self.segments)
        return PerSampleGrads(sums.view(examples, -1, entries), self.segments, self.backend)
