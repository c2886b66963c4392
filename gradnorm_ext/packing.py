"""Packed batches: where each example begins, from what data collators say."""

from __future__ import annotations

import torch
from torch import Tensor


def cu_seqlens(position_ids: Tensor) -> Tensor:
    """Where the examples of a packed batch begin, from positions that start again at 0 with each.

    What ``Meter.observe(cu_seqlens=...)`` takes, for batches that bring ``position_ids`` alone
    (``DataCollatorWithFlattening`` of transformers, TRL's padding-free collators). Collators that bring ``cu_seq_lens_q``
    have it already.

    Args:
        position_ids: ``[N]`` or ``[1, N]`` integers, 0 at the first token of every example and nowhere else.

    Returns:
        ``[B + 1]`` int64.

    Raises:
        ValueError: positions of another shape, or that do not count up from 0.

    Example:
        >>> cu_seqlens(torch.tensor([[0, 1, 2, 0, 0, 1]]))
        tensor([0, 3, 4, 6])
    """
    flat = position_ids.reshape(-1)
    starts = (flat == 0).nonzero()[:, 0]
    if position_ids.dim() > 2 or (position_ids.dim() == 2 and len(position_ids) != 1):
        raise ValueError(
            f"cu_seqlens: position_ids must be [N] or [1, N], got {list(position_ids.shape)}; a batch with several rows is "
            "not packed, or pass observe(example_ids=...)"
        )
    offsets = torch.cat([starts, starts.new_tensor([len(flat)])])
    expected = torch.arange(len(flat), device=flat.device)
    if len(starts):
        expected = expected - starts.repeat_interleave(offsets.diff())
    if not len(starts) or starts[0] != 0 or not torch.equal(flat.long(), expected):
        raise ValueError(
            f"cu_seqlens: position_ids must count up from 0 in every example, got {flat[:8].tolist()}...; tell rows apart "
            "with observe(example_ids=...)"
        )
    return offsets
