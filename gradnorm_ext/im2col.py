"""What the windows of a convolution see of its images: the rows of an outer product, without copies of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Im2col(NamedTuple):
    """What windows see of images ``[images, *sizes, channels]``: of each the rows ``[positions, kernel · channels]``.

    Tuples have an entry per dimension; ``step`` and ``spread`` count in elements, from one position or one entry of the
    kernel to the next.
    """

    positions: tuple[int, ...]
    step: tuple[int, ...]
    kernel: tuple[int, ...]
    spread: tuple[int, ...]

    @staticmethod
    def of(
        images: Tensor, positions: Sequence[int], stride: Sequence[int], kernel: Sequence[int], dilation: Sequence[int]
    ) -> Im2col:
        lines = images.stride()[1:-1]
        step = tuple(s * line for s, line in zip(stride, lines, strict=True))
        spread = tuple(d * line for d, line in zip(dilation, lines, strict=True))
        return Im2col(tuple(positions), step, tuple(kernel), spread)

    def rows(self, images: Tensor) -> Tensor:
        """All of them, in memory of their own."""
        shape = len(images), *self.positions, *self.kernel, images.shape[-1]
        seen = images.as_strided(shape, (images[0].numel(), *self.step, *self.spread, 1))
        return seen.reshape(math.prod(shape[: 1 + len(self.positions)]), -1)

    def packed(self, images: Tensor) -> Tensor:
        """As the kernel takes it: dimensions that are missing come first."""
        sizes = [images[0].numel(), images.shape[-1]]
        for of_each, missing in zip(self, (1, 0, 1, 0), strict=True):
            sizes += [missing] * (3 - len(of_each)) + list(of_each)
        return torch.tensor(sizes)
