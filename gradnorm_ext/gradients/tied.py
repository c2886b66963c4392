"""A head tied to embeddings: what its cross term with the lookups needs, in place of its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradnorm_ext.gradients.rows import columns, rows_of
from gradnorm_ext.segments import Segments


@dataclass(frozen=True)
class TiedHead:
    """A head tied to embeddings: its own norms, and of its gradient the rows of those entries that were looked up.

    Kept from the head's backward to the end of the block in place of its rows: for every column of the norms the
    distinct ids looked up there, ``[u]``, and the head's gradient of those entries, ``[u, width]``.
    """

    norms: Tensor
    entries: list[tuple[Tensor, Tensor]]

    @staticmethod
    def of(
        norms: Tensor,
        entries: Callable[[Tensor, Tensor], Tensor],
        segments: Segments,
        ids: Sequence[tuple[Tensor, Segments]],
    ) -> TiedHead:
        """``entries(rows, ids)``: the gradient of these entries from these rows; ``ids``: of every lookup."""
        found = []
        for members, rows in columns(segments):
            looked_up = torch.unique(torch.cat([one[rows_of(members, of_rows)] for one, of_rows in ids]))
            found.append((looked_up, entries(rows, looked_up)))
        return TiedHead(norms, found)

    def sqnorm(self) -> Tensor:
        return self.norms
