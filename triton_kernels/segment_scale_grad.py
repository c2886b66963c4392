"""Sums of products of rows per segment, ``out[s] = Σ_{r in s} g[r] ⊙ (x[r] - shift[r]) scale[r]``, in one launch."""

from torch import Tensor

from gradnorm_ext.triton_kernels.registration import accumulator, operation
from gradnorm_ext.triton_kernels.segment_sum import scaled_segment_sum


def segment_scale_grad(
    x: Tensor, g: Tensor, segments, *, shift: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """See :func:`gradnorm_ext.ops.segment_scale_grad`."""
    out = g.new_empty(len(segments.offsets) - 1, g.shape[1], dtype=accumulator(g.dtype))
    shift, scale = (None if rows is None else rows.contiguous() for rows in (shift, scale))
    _segment_scale_grad(x, g, shift, scale, segments.offsets, out)
    return out


@operation("segment_scale_grad(Tensor x, Tensor g, Tensor? shift, Tensor? scale, Tensor offsets, Tensor(a!) out) -> ()")
def _segment_scale_grad(
    x: Tensor, g: Tensor, shift: Tensor | None, scale: Tensor | None, offsets: Tensor, out: Tensor
) -> None:
    scaled_segment_sum(x, g, shift, scale, offsets, out)
