"""A head tied to embeddings: what its cross term with the lookups needs, in place of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradnorm_ext.gradients.rows import groups_of_segments
from gradnorm_ext.reference import accumulator
from gradnorm_ext.segments import Segments

_HELD = 1 << 24  # entries of the output's gradient that are held at a time
_SHORT = 512  # rows that are multiplied with each other at least: fewer take no less time


@dataclass(frozen=True)
class TiedHead:
    """A head tied to embeddings: its own norms, and of its gradient the rows of those entries that were looked up.

    Kept from the head's backward to the end of the block in place of its rows. ``levels``: of the segments, then of each
    level of groups, sorted keys ``group * vocabulary + id [k]`` of all that was looked up, and the gradient that the
    group's rows give that entry, ``[k, width]``.
    """

    norms: Tensor
    vocabulary: int
    levels: list[tuple[Tensor, Tensor]]

    @staticmethod
    def of(
        norms: Tensor,
        x: Tensor,
        vocabulary: int,
        columns: Callable[[Tensor, slice | Tensor], Tensor],
        segments: Segments,
        lookups: Sequence[tuple[Tensor, Segments]],
    ) -> TiedHead:
        """``columns(ids, rows)``: these of the output's gradient, at these rows; ``lookups``: each one's ids."""
        levels = []
        finite = x.isfinite().all(1)
        x = x.masked_fill(~finite[:, None], 0)  # a row that is not finite reaches its own groups alone: by its g

        def gradient(ids: Tensor, rows: slice | Tensor, alike: Tensor | None) -> Tensor:
            g = columns(ids, rows).masked_fill(~finite[rows, None], torch.nan)
            return _product(g if alike is None else g.where(alike, 0), x[rows])

        ids = torch.cat([one.reshape(-1) for one, _ in lookups]).long()
        of_lookup = torch.cat([of_rows.of_rows(one.numel()) for one, of_rows in lookups])
        of_row = segments.of_rows(len(x))
        lengths = [of_rows.length for _, of_rows in lookups]
        per_segment = None if None in lengths else sum(length for length in lengths if length is not None)
        for level, (of_segment, count) in enumerate(groups_of_segments(segments)):
            keys = of_segment[of_lookup] * vocabulary + ids
            groups = of_segment[of_row]
            found = []
            if _may_look_at(keys):
                keys = keys.unique()
                ends = torch.searchsorted(keys, torch.arange(1, count + 1) * vocabulary).tolist()
                for group, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
                    members = (groups == group).nonzero()[:, 0]
                    found.append(gradient(keys[begin:end] % vocabulary, members, None))
            else:
                keys = keys.sort().values
                for part, rows in _parts(len(keys), len(x), segments, per_segment if level == 0 else None):
                    of_part = keys[part] // vocabulary
                    alike = None if count == 1 else groups[rows, None] == of_part
                    found.append(gradient(keys[part] % vocabulary, rows, alike))
            levels.append((keys, torch.cat(found) if found else x.new_zeros(0, x.shape[1])))
        return TiedHead(norms, vocabulary, levels)

    def sqnorm(self) -> Tensor:
        return self.norms


def _may_look_at(tensor: Tensor) -> bool:
    """Whether its numbers are known without waiting for a device."""
    return tensor.device.type == "cpu"


def _parts(keys: int, rows: int, segments: Segments, per_segment: int | None) -> Iterator[tuple[slice, slice]]:
    """Parts of the sorted keys, and the rows that may be of their groups, as far as sizes tell; with `_HELD` of both.

    ``per_segment``: how many keys each segment has, where these are the groups and all have equally many.
    """
    if per_segment is None or segments.length is None:
        step = max(1, _HELD // max(rows, 1))
        yield from ((slice(at, at + step), slice(None)) for at in range(0, keys, step))
        return
    together = max(1, _SHORT // max(segments.length, per_segment, 1))  # segments
    for first in range(0, segments.count, together):
        last = min(first + together, segments.count)
        of_rows = slice(first * segments.length, last * segments.length)
        step = max(1, _HELD // max(of_rows.stop - of_rows.start, 1))
        for at in range(first * per_segment, last * per_segment, step):
            yield slice(at, min(at + step, last * per_segment)), of_rows


def _product(g: Tensor, x: Tensor) -> Tensor:
    """``g.T @ x`` with sums in float32, or float64."""
    if g.is_cuda and g.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(g.t(), x, out_dtype=torch.float32)
    dtype = accumulator(g.dtype)
    return g.t().to(dtype) @ x.to(dtype)
