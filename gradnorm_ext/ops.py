"""The operations: what each one means, and the checks on what it is given. Backends carry them out.

Layers reduce to four forms. ``r`` runs over rows, ``s`` over segments, ``x`` is a layer's input, ``g`` the gradient of
the loss at its output. Every ``*_sqnorm`` returns one vector: the squared norm of each segment's gradient, then of each
group's, level after level (:class:`~gradnorm_ext.segments.Segments`); every ``*_wgrad`` returns the weight gradient and
that vector from one pass over the rows. Sums are formed in float32, or in float64 for float64 input.

Every operation takes ``backend``: "auto" (the default: the fastest that is there), "triton", "native" or
"reference".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gradnorm_ext import backends
from gradnorm_ext.reference import accumulator
from gradnorm_ext.segments import Segments

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def outer_sqnorm(x: Tensor, g: Tensor, segments: Segments, *, backend: str = "auto") -> Tensor:
    """Squared norm of each segment's summed outer product.

        out[s] = ‖ Σ_{r in s} g[r] x[r]ᵀ ‖²  =  Σ_{q, r in s} (x[q]·x[r]) (g[q]·g[r])

    The sum is the gradient of a linear layer's weight over the rows of ``s``: one segment per example gives
    per-example norms, one group per task per-task norms.

    Args:
        x: the layer's input, ``[rows, in]``; float64, float32, float16 or bfloat16.
        g: the gradient of the loss at the layer's output, ``[rows, out]``, same dtype.
        segments: which rows are summed together.

    Returns:
        ``[segments + groups]``, float32 (float64 for float64 input), in the loss's units squared.

    Raises:
        ValueError: shapes that do not fit each other or the segments.
        TypeError: a dtype other than the four.

    Example:
        >>> x, g = torch.tensor([[1., 2.], [3., 0.]]), torch.tensor([[1.], [2.]])
        >>> outer_sqnorm(x, g, Segments.equal(2, 1))
        tensor([ 5., 36.])
    """
    _check_rows("outer_sqnorm", segments, x=x, g=g)
    return backends.find("outer_sqnorm", x.device.type, backends.choose(backend))(x, g, segments)  # type: ignore[no-any-return]


def outer_wgrad(
    x: Tensor,
    g: Tensor,
    segments: Segments,
    *,
    weight: Tensor | None = None,
    by_group: bool = False,
    out: Tensor | None = None,
    accumulate: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A linear layer's weight gradient and its segments' squared norms, from one pass over the rows.

        dw = Σ_s weight[s] Σ_{r in s} g[r] x[r]ᵀ        sqnorm as of :func:`outer_sqnorm`, not weighted

    Args:
        x, g, segments: as of :func:`outer_sqnorm`.
        weight: ``[segments]``, or None for ones.
        by_group: one gradient for every group of the coarsest level instead of their sum.
        out: where ``dw`` is written, contiguous, of the returned shape, and of its dtype or that of x, to which the sum
            is then rounded; None makes it.
        accumulate: add ``dw`` to what is in ``out``, as autograd does to a ``.grad`` that is there.

    Returns:
        ``dw [out, in]``, or ``[groups, out, in]`` with ``by_group``; and ``sqnorm``. float32 (float64 for float64), where
        ``out`` does not say otherwise.

    Example:
        >>> x, g = torch.tensor([[1., 2.], [3., 0.]]), torch.tensor([[1.], [2.]])
        >>> outer_wgrad(x, g, Segments.equal(2, 1), weight=torch.tensor([1., 0.]))
        (tensor([[1., 2.]]), tensor([ 5., 36.]))
    """
    _check_rows("outer_wgrad", segments, x=x, g=g)
    outputs, n_outputs = _outputs("outer_wgrad", segments, weight, by_group)
    if out is not None:
        shape, dtype = [*([n_outputs] if by_group else []), g.shape[1], x.shape[1]], accumulator(x.dtype)
        if list(out.shape) != shape or out.dtype not in (dtype, x.dtype) or not out.is_contiguous():
            raise ValueError(
                f"outer_wgrad: out must be contiguous, {shape} of {dtype} or x's dtype, got {list(out.shape)} of {out.dtype}; "
                "make it so"
            )
    elif accumulate:
        raise ValueError("outer_wgrad: accumulate needs out, the gradient to add to; pass it")
    run = backends.find("outer_wgrad", x.device.type, backends.choose(backend))
    return run(  # type: ignore[no-any-return]
        x, g, segments, weight=weight, outputs=outputs, n_outputs=n_outputs, out=out, accumulate=accumulate
    )


def outer_gram(x: Tensor, g: Tensor, segments: Segments, *, backend: str = "auto") -> Tensor:
    """Inner products of the groups' gradients of a linear layer's weight.

        out[k, l] = ⟨ Σ_{r in k} g[r] x[r]ᵀ, Σ_{r in l} g[r] x[r]ᵀ ⟩

    Args:
        x, g: as of :func:`outer_sqnorm`.
        segments: ``k`` and ``l`` are groups of their coarsest level, or segments where there are no groups.

    Returns:
        ``[groups, groups]``, float32 (float64 for float64 input); the diagonal is what :func:`outer_sqnorm` returns.

    Example:
        >>> x, g = torch.tensor([[1., 2.], [3., 0.]]), torch.tensor([[1.], [2.]])
        >>> outer_gram(x, g, Segments.equal(2, 1))
        tensor([[ 5.,  6.],
                [ 6., 36.]])
    """
    _check_rows("outer_gram", segments, x=x, g=g)
    return backends.find("outer_gram", x.device.type, backends.choose(backend))(x, g, segments)  # type: ignore[no-any-return]


def lookup_sqnorm(
    ids: Tensor,
    g: Tensor,
    vocabulary: int,
    segments: Segments,
    *,
    padding_idx: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Squared norm of each segment's gradient of an embedding table.

        out[s] = Σ_v ‖ Σ_{r in s, ids[r] = v} g[r] ‖²        without v = padding_idx

    Args:
        ids: ``[rows]`` int64, in ``[0, vocabulary)``.
        g: the gradient of the loss at the embedding's output, ``[rows, width]``.
        vocabulary: how many rows the table has.
        segments: which rows are summed together.
        padding_idx: the row of the table that gets no gradient.

    Returns:
        ``[segments + groups]``, as of :func:`outer_sqnorm`.

    Example:
        >>> lookup_sqnorm(torch.tensor([5, 5, 1]), torch.ones(3, 1), 8, Segments.equal(1, 3))
        tensor([5.])
    """
    _check_lookup("lookup_sqnorm", ids, g, vocabulary, segments)
    run = backends.find("lookup_sqnorm", g.device.type, backends.choose(backend))
    return run(ids, g, vocabulary, segments, padding_idx=padding_idx)  # type: ignore[no-any-return]


def lookup_wgrad(
    ids: Tensor,
    g: Tensor,
    vocabulary: int,
    segments: Segments,
    *,
    padding_idx: int | None = None,
    weight: Tensor | None = None,
    by_group: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """An embedding table's gradient and its segments' squared norms.

        dw[v] = Σ_s weight[s] Σ_{r in s, ids[r] = v} g[r]        sqnorm as of :func:`lookup_sqnorm`, not weighted

    Args and returns: as of :func:`lookup_sqnorm` and :func:`outer_wgrad`; ``dw [vocabulary, width]``.

    Example:
        >>> lookup_wgrad(torch.tensor([1, 1, 0]), torch.ones(3, 1), 2, Segments.equal(3, 1))
        (tensor([[1.],
                [2.]]), tensor([1., 1., 1.]))
    """
    _check_lookup("lookup_wgrad", ids, g, vocabulary, segments)
    outputs, n_outputs = _outputs("lookup_wgrad", segments, weight, by_group)
    run = backends.find("lookup_wgrad", g.device.type, backends.choose(backend))
    return run(  # type: ignore[no-any-return]
        ids, g, vocabulary, segments, padding_idx=padding_idx, weight=weight, outputs=outputs, n_outputs=n_outputs
    )


def segment_scale_grad(
    x: Tensor,
    g: Tensor,
    segments: Segments,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Each segment's gradient of a layer's scale.

        out[s] = Σ_{r in s} g[r] ⊙ (x[r] - shift[r]) scale[r]

    With a LayerNorm's mean and reciprocal deviation as ``shift`` and ``scale`` the normalised input need not be formed.

    Args:
        x, g: ``[rows, width]``, of one dtype.
        segments: which rows are summed together.
        shift, scale: ``[rows]``, or None for 0 and 1.

    Returns:
        ``[segments, width]``, float32 (float64 for float64 input).

    Example:
        >>> segment_scale_grad(torch.tensor([[2.], [3.]]), torch.ones(2, 1), Segments.equal(1, 2))
        tensor([[5.]])
    """
    _check_rows("segment_scale_grad", segments, x=x, g=g)
    run = backends.find("segment_scale_grad", x.device.type, backends.choose(backend))
    return run(x, g, segments, shift=shift, scale=scale)  # type: ignore[no-any-return]


def scale_sqnorm(
    x: Tensor,
    g: Tensor,
    segments: Segments,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Squared norm of each segment's gradient of a layer's scale: ``out[s] = ‖segment_scale_grad[s]‖²``, groups likewise.

    Example:
        >>> scale_sqnorm(torch.tensor([[2.], [3.]]), torch.ones(2, 1), Segments.equal(1, 2))
        tensor([25.])
    """
    sums = segment_scale_grad(x, g, segments, shift=shift, scale=scale, backend=backend)
    return per_sample_sqnorm(sums, segments, backend=backend)


def scale_wgrad(
    x: Tensor,
    g: Tensor,
    segments: Segments,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A scale's gradient ``dw = Σ_s weight[s] segment_scale_grad[s]`` and its segments' squared norms (not weighted).

    Example:
        >>> scale_wgrad(torch.tensor([[2.], [3.]]), torch.ones(2, 1), Segments.equal(2, 1))
        (tensor([5.]), tensor([4., 9.]))
    """
    sums = segment_scale_grad(x, g, segments, shift=shift, scale=scale, backend=backend)
    return per_sample_wgrad(sums, segments, weight=weight, backend=backend)


def segment_sum(g: Tensor, segments: Segments, *, backend: str = "auto") -> Tensor:
    """Each segment's gradient of a bias: ``out[s] = Σ_{r in s} g[r]``, ``[segments, width]``.

    Example:
        >>> segment_sum(torch.tensor([[2.], [3.]]), Segments.equal(1, 2))
        tensor([[5.]])
    """
    _check_rows("segment_sum", segments, g=g)
    return backends.find("segment_sum", g.device.type, backends.choose(backend))(g, segments)  # type: ignore[no-any-return]


def bias_sqnorm(g: Tensor, segments: Segments, *, backend: str = "auto") -> Tensor:
    """Squared norm of each segment's gradient of a bias: ``out[s] = ‖segment_sum[s]‖²``, groups likewise.

    Example:
        >>> bias_sqnorm(torch.tensor([[2.], [3.]]), Segments.equal(1, 2))
        tensor([25.])
    """
    return per_sample_sqnorm(segment_sum(g, segments, backend=backend), segments, backend=backend)


def bias_wgrad(
    g: Tensor, segments: Segments, *, weight: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """A bias's gradient ``dw = Σ_s weight[s] segment_sum[s]`` and its segments' squared norms (not weighted).

    Example:
        >>> bias_wgrad(torch.tensor([[2.], [3.]]), Segments.equal(2, 1), weight=torch.tensor([1., 2.]))
        (tensor([8.]), tensor([4., 9.]))
    """
    return per_sample_wgrad(segment_sum(g, segments, backend=backend), segments, weight=weight, backend=backend)


def per_sample_sqnorm(grads: Tensor, segments: Segments, *, backend: str = "auto") -> Tensor:
    """Squared norms of gradients that are given per segment: ``out[s] = ‖grads[s]‖²``, a group's of its sum.

    Args:
        grads: ``[segments, n]``, float32 or float64.
        segments: whose gradients they are; only the number of segments and the groups matter.

    Returns:
        ``[segments + groups]``, as of :func:`outer_sqnorm`.

    Example:
        >>> from gradnorm_ext.segments import Groups
        >>> per_sample_sqnorm(torch.tensor([[2.], [3.]]), Segments.equal(2, 1, Groups.of(2, [(torch.tensor([0, 0]), 1)])))
        tensor([ 4.,  9., 25.])
    """
    _check_grads("per_sample_sqnorm", grads, segments)
    return backends.find("per_sample_sqnorm", grads.device.type, backends.choose(backend))(grads, segments)  # type: ignore[no-any-return]


def per_sample_wgrad(
    grads: Tensor, segments: Segments, *, weight: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The (weighted) total of gradients that are given per segment, ``Σ_s weight[s] grads[s]``, and their squared norms.

    Args and returns: as of :func:`per_sample_sqnorm`; ``weight [segments]`` or None for ones; the total is ``[n]``.

    Example:
        >>> per_sample_wgrad(torch.tensor([[2.], [3.]]), Segments.equal(2, 1), weight=torch.tensor([1., 2.]))
        (tensor([8.]), tensor([4., 9.]))
    """
    _check_grads("per_sample_wgrad", grads, segments)
    _outputs("per_sample_wgrad", segments, weight, by_group=False)
    run = backends.find("per_sample_wgrad", grads.device.type, backends.choose(backend))
    return run(grads, segments, weight=weight)  # type: ignore[no-any-return]


class SegmentStd(NamedTuple):
    """What :func:`segment_std` returns, one entry per segment."""

    mean: Tensor
    std: Tensor
    count: Tensor  # type: ignore[assignment]  # a tuple's method of that name is not missed
    low: Tensor
    high: Tensor


def segment_std(values: Tensor, ids: Tensor, count: int, *, ddof: int = 1, backend: str = "auto") -> SegmentStd:
    """Mean, standard deviation, count, minimum and maximum of each segment's values.

        std[s] = sqrt( Σ_{i in s} (values[i] - mean[s])² / (n[s] - ddof) )        formed in float64

    Args:
        values: ``[n]``, float32 or float64. A NaN makes its segment's mean, std, low and high NaN.
        ids: ``[n]`` int64 in ``[0, count)``, in any order: the segment of each value.
        count: how many segments there are.
        ddof: 1 for the sample's deviation, 0 for the population's; std is NaN where n <= ddof.

    Returns:
        :class:`SegmentStd`; low and high are +inf and -inf for an empty segment.

    Example:
        >>> segment_std(torch.tensor([1., 3., 5.]), torch.tensor([0, 0, 1]), 2).std
        tensor([1.4142,    nan])
    """
    if values.dim() != 1 or ids.shape != values.shape:
        raise ValueError(
            f"segment_std: values and ids must be one-dimensional and equally long, got {list(values.shape)} and "
            f"{list(ids.shape)}; pass one id per value"
        )
    if values.dtype not in (torch.float32, torch.float64) or ids.dtype != torch.int64:
        raise TypeError(
            f"segment_std: values must be float32 or float64 and ids int64, got {values.dtype} and {ids.dtype}; cast them"
        )
    if ids.device.type == "cpu" and len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < count:
        raise ValueError(
            f"segment_std: ids must lie in [0, {count}), got {int(ids.min())} to {int(ids.max())}; pass a larger count"
        )
    run = backends.find("segment_std", values.device.type, backends.choose(backend))
    return SegmentStd(*run(values, ids, count, ddof=ddof))


class LogitScores(NamedTuple):
    """What :func:`logit_scores` returns, one entry per row."""

    log_probability: Tensor
    w: Tensor


def logit_scores(logits: Tensor, labels: Tensor, *, ignore_index: int = -100, backend: str = "auto") -> LogitScores:
    """Each row's log-probability of its label, and the squared norm of that one's gradient at the logits.

        log_probability[r] = log p_r[y_r]        w[r] = ‖p_r - onehot(y_r)‖² = (1 - p_r[y_r])² + Σ_{v ≠ y_r} p_r[v]²

    with ``p_r = softmax(logits[r])`` and ``y_r = labels[r]``, in one pass over the logits: no softmax is stored.

    Args:
        logits: ``[rows, vocabulary]``; float64, float32, float16 or bfloat16.
        labels: ``[rows]`` int64, in ``[0, vocabulary)`` or ``ignore_index``.
        ignore_index: the label of rows whose two figures are 0.

    Returns:
        :class:`LogitScores`, ``[rows]``, float32 (float64 for float64 input).

    Raises:
        ValueError, TypeError: shapes, dtypes or labels other than these.

    Example:
        >>> logit_scores(torch.tensor([[0., 0.], [9., 0.]]), torch.tensor([0, -100])).w
        tensor([0.5000, 0.0000])
    """
    _check_logits("logit_scores", logits, labels, ignore_index)
    run = backends.find("logit_scores", logits.device.type, backends.choose(backend))
    return LogitScores(*run(logits, labels, ignore_index=ignore_index))


class LogitRates(NamedTuple):
    """What :func:`logit_gradient_rates` returns, one entry per class."""

    count: Tensor  # type: ignore[assignment]  # a tuple's method of that name is not missed
    up: Tensor
    down: Tensor


def logit_gradient_rates(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, backend: str = "auto"
) -> LogitRates:
    """How much the gradients of cross-entropy push each class's logit up and down, added up over the rows.

        up[v] = Σ_{r: y_r = v} (1 - p_r[v])        down[v] = Σ_{r: y_r ≠ v} p_r[v]        count[v] = #{r: y_r = v}

    with ``p_r = softmax(logits[r])`` and ``y_r = labels[r]``, in one pass over the logits (in Triton two: a class's sum
    needs every row's first). ``count - up`` and ``down`` are the sums of positive and negative probabilities of GSA (Guo
    et al., CVPR 2023), whose ratio is ``up / down``;
    ``up`` is not formed as that difference, which rounding would eat where the model is sure.

    Args:
        logits: ``[rows, vocabulary]``; float64, float32, float16 or bfloat16.
        labels: ``[rows]`` int64, in ``[0, vocabulary)`` or ``ignore_index``.
        ignore_index: the label of rows that are left out.

    Returns:
        :class:`LogitRates`, ``[vocabulary]``: count int64, the others float32 (float64 for float64 input), summed in
        float64.

    Raises:
        ValueError, TypeError: shapes, dtypes or labels other than these.

    Example:
        >>> logit_gradient_rates(torch.zeros(3, 2), torch.tensor([0, 0, 1]))
        LogitRates(count=tensor([2, 1]), up=tensor([1.0000, 0.5000]), down=tensor([0.5000, 1.0000]))
    """
    _check_logits("logit_gradient_rates", logits, labels, ignore_index)
    run = backends.find("logit_gradient_rates", logits.device.type, backends.choose(backend))
    return LogitRates(*run(logits, labels, ignore_index=ignore_index))


def _check_logits(who: str, logits: Tensor, labels: Tensor, ignore_index: int) -> None:
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"{who}: logits must be [rows, vocabulary] and labels [rows], got {list(logits.shape)} and "
            f"{list(labels.shape)}; flatten them to rows"
        )
    if logits.dtype not in FLOATS or labels.dtype != torch.int64:
        raise TypeError(
            f"{who}: logits must be floating and labels int64, got {logits.dtype} and {labels.dtype}; cast them"
        )
    if labels.device.type == "cpu" and len(labels):
        given = labels[labels != ignore_index]
        if len(given) and not 0 <= int(given.min()) <= int(given.max()) < logits.shape[1]:
            raise ValueError(
                f"{who}: labels must lie in [0, {logits.shape[1]}) or be {ignore_index}, got {int(given.min())} to "
                f"{int(given.max())}; mark rows without a label with ignore_index"
            )


def _check_rows(who: str, segments: Segments, **rows: Tensor) -> None:
    first, *others = rows.values()
    shape = first.shape
    for other in others:
        if other.dim() != 2 or other.shape[0] != shape[0] or other.dtype != first.dtype:
            shape = torch.Size()
    if len(shape) != 2 or first.dtype not in FLOATS:
        _refuse_rows(who, rows)
    _check_row_count(who, shape[0], segments)


def _refuse_rows(who: str, rows: dict[str, Tensor]) -> None:
    names, tensors = " and ".join(rows), list(rows.values())
    if any(t.dim() != 2 or len(t) != len(tensors[0]) for t in tensors):
        got = " and ".join(str(list(t.shape)) for t in tensors)
        raise ValueError(
            f"{who}: {names} must be [rows, width] with equally many rows, got {got}; flatten them to rows"
        )
    got = " and ".join(str(t.dtype) for t in tensors)
    raise TypeError(f"{who}: {names} must have one dtype of {', '.join(map(str, FLOATS))}, got {got}; cast them")


def _check_grads(who: str, grads: Tensor, segments: Segments) -> None:
    if grads.dim() != 2 or grads.shape[0] != segments.count:
        raise ValueError(f"{who}: grads must be [{segments.count}, n], one row per segment, got {list(grads.shape)}")
    if grads.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{who}: grads must be float32 or float64, got {grads.dtype}; cast them")


def _check_lookup(who: str, ids: Tensor, g: Tensor, vocabulary: int, segments: Segments) -> None:
    if ids.dim() != 1 or g.dim() != 2 or len(ids) != len(g):
        raise ValueError(
            f"{who}: ids must be [rows] and g [rows, width], got {list(ids.shape)} and {list(g.shape)}; flatten them"
        )
    if ids.dtype != torch.int64 or g.dtype not in FLOATS:
        raise TypeError(f"{who}: ids must be int64 and g floating, got {ids.dtype} and {g.dtype}; cast them")
    if ids.device.type == "cpu" and len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ValueError(f"{who}: ids must lie in [0, {vocabulary}), got {int(ids.min())} to {int(ids.max())}")
    _check_row_count(who, len(ids), segments)


def _check_row_count(who: str, rows: int, segments: Segments) -> None:
    if segments.length is not None:
        expected = segments.length * segments.count
    elif segments.offsets.device.type == "cpu":
        expected = int(segments.offsets[-1])
    else:
        return  # looking would wait for the device
    if rows != expected:
        raise ValueError(
            f"{who}: the rows must be those of the segments, got {rows} rows and segments of {expected}; "
            "make the segments from the same rows"
        )


def _outputs(who: str, segments: Segments, weight: Tensor | None, by_group: bool) -> tuple[Tensor | None, int]:
    if weight is not None and weight.shape != (segments.count,):
        raise ValueError(f"{who}: weight must be [{segments.count}], one per segment, got {list(weight.shape)}")
    if not by_group:
        return None, 1
    if weight is not None or not segments.groups.levels:
        raise ValueError(
            f"{who}: by_group needs segments with groups and no weight; weigh the groups' gradients instead"
        )
    return segments.groups.levels[-1], segments.groups.counts[-1]
