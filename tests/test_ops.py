"""Every operation in every backend against its formula, one segment at a time in float64."""

import re

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from gradnorm_ext import backends, native, ops
from gradnorm_ext.im2col import Im2col
from gradnorm_ext.segments import Groups, Segments

BACKENDS = ("reference", "native")
LENGTHS = {
    "no segment": [],
    "one row": [1],
    "one row each": [1] * 9,
    "an empty segment": [3, 0, 5],
    "only an empty segment": [0],
    "7, 63 and 1000 rows": [7, 63, 1000],
    "equal": [16] * 6,
    "equal and long": [300] * 2,
}
WIDTHS = ((1, 1), (5, 3), (33, 70))


def segments_of(lengths, nested=True):
    """Segments with two levels of groups, each in no particular order, and one group that stays empty."""
    count = len(lengths)
    fine = torch.tensor([(5 * s + 1) % 4 for s in range(count)], dtype=torch.int64)
    coarse = torch.tensor([2, 0, 0, 2])[fine] if count else fine
    groups = Groups.of(count, [(fine, 4), (coarse, 3)] if nested else [])
    equal = len(set(lengths)) == 1
    return (
        Segments.equal(count, lengths[0], groups)
        if equal
        else Segments.from_lengths(torch.tensor(lengths, dtype=torch.int64), groups)
    )


def members(segments):
    """Of every entry of a sqnorm vector, its segments."""
    columns = [[s] for s in range(segments.count)]
    for ids, count in zip(segments.groups.levels, segments.groups.counts, strict=True):
        columns += [(ids == group).nonzero()[:, 0].tolist() for group in range(count)]
    return columns


def truth(per_segment, segments):
    """The sqnorm vector of gradients given per segment, by its definition."""
    return torch.stack([per_segment[list(of)].sum(0).square().sum() for of in members(segments)])


def gram_of(per_segment, segments):
    """Inner products of the coarsest groups' gradients, by their definition."""
    last = segments.groups.counts[-1] if segments.groups.counts else segments.count
    sums = torch.stack([per_segment[list(of)].sum(0).flatten() for of in members(segments)[-last:]])
    return sums @ sums.t()


def rows_of(segments, d, p, dtype):
    generator = torch.Generator().manual_seed(0)
    rows = int(segments.offsets[-1])
    return (torch.randn(rows, width, generator=generator).to(dtype) for width in (p, d))


def outer_per_segment(x, g, segments):
    pairs = zip(x.split(segments.lengths), g.split(segments.lengths), strict=True)
    return torch.stack([gs.t() @ xs for xs, gs in pairs])


def lookup_per_segment(ids, g, vocabulary, padding_idx, segments):
    pairs = zip(ids.split(segments.lengths), g.split(segments.lengths), strict=True)
    tables = torch.stack([gs.new_zeros(vocabulary, gs.shape[1]).index_add_(0, i, gs) for i, gs in pairs])
    if padding_idx is not None:
        tables[:, padding_idx] = 0
    return tables


def assert_as_good_as_plain(found, plain, exact, size):
    """Our error against float64 is at most twice plain torch's in the same dtype.

    Or twice a rounding of what is added up (``size``: the same formula of absolute values), where plain torch is lucky.
    """
    error = (found.double() - exact).abs().max()
    allowed = 2 * max((plain.double() - exact).abs().max(), torch.finfo(found.dtype).eps * size.abs().max())
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def norms_by_pairs(x, g, segments):
    """The sqnorm vector by inner products of rows with each other, without a gradient."""
    owner = torch.repeat_interleave(torch.arange(segments.count), torch.tensor(segments.lengths))
    rows = [torch.isin(owner, torch.tensor(of)) for of in members(segments)]
    return torch.stack([((x[of] @ x[of].t()) * (g[of] @ g[of].t())).sum() for of in rows])


def accumulated(tensor):
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@pytest.mark.parametrize("dtype", ops.FLOATS, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("backend", BACKENDS)
def test_outer(backend, lengths, widths, dtype):
    segments = segments_of(lengths)
    x, g = rows_of(segments, *widths, dtype)
    if not lengths:
        assert ops.outer_sqnorm(x, g, segments, backend=backend).tolist() == [0] * 7
        assert ops.outer_wgrad(x, g, segments, backend=backend)[0].abs().sum() == 0
        return
    exact = outer_per_segment(x.double(), g.double(), segments)
    plain = outer_per_segment(accumulated(x), accumulated(g), segments)
    size = outer_per_segment(x.double().abs(), g.double().abs(), segments)
    weight = torch.linspace(-1, 2, len(lengths), dtype=plain.dtype)
    norms = [truth(tensor, segments) for tensor in (plain, exact, size)]
    assert_as_good_as_plain(ops.outer_sqnorm(x, g, segments, backend=backend), *norms)
    dw, sqnorm = ops.outer_wgrad(x, g, segments, backend=backend)
    assert_as_good_as_plain(dw, plain.sum(0), exact.sum(0), size.sum(0))
    assert_as_good_as_plain(sqnorm, *norms)
    dw, sqnorm = ops.outer_wgrad(x, g, segments, weight=weight, backend=backend)
    assert_as_good_as_plain(
        dw, *(torch.tensordot(weight.to(tensor), tensor, 1) for tensor in (plain, exact)), size.sum(0)
    )
    assert_as_good_as_plain(sqnorm, *norms)
    dw, sqnorm = ops.outer_wgrad(x, g, segments, by_group=True, backend=backend)
    coarse = segments.groups.levels[-1]
    expected = (tensor.new_zeros(3, *tensor.shape[1:]).index_add_(0, coarse, tensor) for tensor in (plain, exact, size))
    assert_as_good_as_plain(dw, *expected)
    assert_as_good_as_plain(sqnorm, *norms)


@pytest.mark.parametrize("dtype", ops.FLOATS, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 40, 700])
@pytest.mark.parametrize("backend", BACKENDS)
def test_outer_sum(backend, rows, dtype):
    segments = segments_of([rows, 0, 2 * rows, rows])
    x, g = rows_of(segments, 70, 33, dtype)
    x = x[:, ::2]  # every other column: entries not side by side
    for weight in (None, torch.tensor([2.0, 1.0, -3.0, -3.0])):
        found = backends.find("outer_sum", "cpu", backend)(x, g, segments, weight=weight)
        of_row = 1.0 if weight is None else segments.per_row(weight)[:, None]
        exact, size = (g.double() * of_row).t() @ x.double(), (g.double() * of_row).abs().t() @ x.double().abs()
        assert found.dtype == dtype
        assert_as_good_as_plain(found, (g * of_row).to(dtype).t() @ x, exact, size)


def test_which_backends_serve_an_operation():
    assert backends.serves("outer_sum", "cpu", "native") and backends.serves("outer_sum", "cuda", "auto")
    assert not backends.serves("outer_sum", "cpu", "triton")
    assert backends.serves("im2col_wgrad", "cpu", "auto") and not backends.serves("im2col_wgrad", "cpu", "reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("sizes", "kernel", "stride", "dilation", "channels"),
    [((9,), (3,), (2,), (1,), 5), ((7, 8), (3, 2), (1, 2), (2, 1), 3), ((6, 5, 7), (2, 1, 3), (1, 2, 1), (1, 1, 3), 2)],
    ids=str,
)
@pytest.mark.parametrize("out", [4, 300])  # by direct products, and of so many columns by pairs of windows
def test_windows(sizes, kernel, stride, dilation, channels, out, dtype):
    generator, images = torch.Generator().manual_seed(0), 6
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    positions = [(n - r) // s + 1 for n, r, s in zip(sizes, reach, stride, strict=True)]
    x = torch.randn(images, *sizes, channels if out == 4 else 100 * channels, generator=generator).to(dtype)
    seen = x
    for i, (r, s, d) in enumerate(zip(reach, stride, dilation, strict=True)):
        seen = seen.unfold(1 + i, r, s)[..., ::d]
    rows = seen.movedim(1 + len(sizes), -1).flatten(0, len(sizes)).flatten(1)  # [images, positions, kernel, channels]
    g = torch.randn(len(rows), out, generator=generator).to(dtype)
    fine, coarse = torch.arange(3) % 2, torch.tensor([1, 0])[torch.arange(3) % 2]
    segments = Segments.equal(3, len(rows) // 3, Groups.of(3, [(fine, 2), (coarse, 2)]))  # two images each
    windows = Im2col.of(x, positions, stride, kernel, dilation)

    exact = outer_per_segment(rows.double(), g.double(), segments)
    plain = outer_per_segment(rows, g, segments)
    size = outer_per_segment(rows.double().abs(), g.double().abs(), segments)
    norms = [truth(tensor, segments) for tensor in (plain, exact, size)]
    assert_as_good_as_plain(native.im2col_sqnorm(x, windows, g, segments), *norms)
    for weight in (None, torch.tensor([2.0, -1.0, 0.5], dtype=dtype)):
        of = torch.ones(3) if weight is None else weight
        dw, sqnorm = native.im2col_wgrad(x, windows, g, segments, weight=weight)
        assert_as_good_as_plain(sqnorm, *norms)
        assert_as_good_as_plain(dw, *(torch.tensordot(of.to(t), t, 1) for t in (plain, exact)), size.sum(0) * 2)
    by_group = plain.new_empty(2, *plain.shape[1:])
    dw, sqnorm = native.im2col_wgrad(x, windows, g, segments, outputs=coarse, n_outputs=2, out=by_group)
    expected = (t.new_zeros(2, *t.shape[1:]).index_add_(0, coarse, t) for t in (plain, exact, size))
    assert_as_good_as_plain(by_group, *expected)


def test_windows_beyond_their_image_are_refused():
    x, g = torch.randn(2, 5, 3), torch.randn(8, 2)
    windows = Im2col.of(x, (4,), (1,), (3,), (1,))
    with pytest.raises(RuntimeError, match="windows must lie inside of their image"):
        native.im2col_wgrad(x, windows, g, Segments.equal(2, 4))


@pytest.mark.parametrize("dtype", ops.FLOATS, ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_outer_gram(lengths, nested, dtype):
    segments = segments_of(lengths, nested)
    x, g = rows_of(segments, 7, 5, dtype)
    found = ops.outer_gram(x, g, segments)
    if not lengths:
        assert found.tolist() == ([[0] * 3] * 3 if nested else [])
        return
    gram = [
        gram_of(outer_per_segment(*rows, segments), segments)
        for rows in ((accumulated(x), accumulated(g)), (x.double(), g.double()), (x.double().abs(), g.double().abs()))
    ]
    assert_as_good_as_plain(found, *gram)
    torch.testing.assert_close(found.diagonal(), ops.outer_sqnorm(x, g, segments)[-len(found) :])


@pytest.mark.parametrize("dtype", ops.FLOATS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_outer_writes_to_and_adds_to_a_gradient(backend, dtype):
    segments = segments_of([3, 0, 5])
    x, g = rows_of(segments, 6, 5, dtype)
    for out_dtype in {dtype, accumulated(x).dtype}:
        for by_group, shape in ((False, (6, 5)), (True, (3, 6, 5))):
            given = {"by_group": by_group, "backend": backend}
            plain, norms = ops.outer_wgrad(x, g, segments, **given)
            before = torch.randn(shape).to(out_dtype)
            written, added = before.clone(), before.clone()
            for out, accumulate, expected in ((written, False, plain), (added, True, before + plain)):
                dw, sqnorm = ops.outer_wgrad(x, g, segments, out=out, accumulate=accumulate, **given)
                assert dw.data_ptr() == out.data_ptr() and sqnorm.equal(norms)
                assert out.equal(expected.to(out_dtype))


@pytest.mark.parametrize("dtype", ops.FLOATS, ids=str)
@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("lengths", [v for v in LENGTHS.values() if v], ids=[k for k, v in LENGTHS.items() if v])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lookup(backend, lengths, padding_idx, dtype):
    segments, vocabulary = segments_of(lengths), 11
    _, g = rows_of(segments, 5, 1, dtype)
    ids = torch.randint(0, vocabulary, (len(g),), generator=torch.Generator().manual_seed(1))
    exact = lookup_per_segment(ids, g.double(), vocabulary, padding_idx, segments)
    plain = lookup_per_segment(ids, accumulated(g), vocabulary, padding_idx, segments)
    size = lookup_per_segment(ids, g.double().abs(), vocabulary, padding_idx, segments)
    weight = torch.linspace(-1, 2, len(lengths), dtype=plain.dtype)
    norms, given = [truth(t, segments) for t in (plain, exact, size)], {"padding_idx": padding_idx, "backend": backend}
    assert_as_good_as_plain(ops.lookup_sqnorm(ids, g, vocabulary, segments, **given), *norms)
    dw, sqnorm = ops.lookup_wgrad(ids, g, vocabulary, segments, weight=weight, **given)
    assert_as_good_as_plain(
        dw, *(torch.tensordot(weight.to(tensor), tensor, 1) for tensor in (plain, exact)), size.sum(0)
    )
    assert_as_good_as_plain(sqnorm, *norms)
    dw, _ = ops.lookup_wgrad(ids, g, vocabulary, segments, by_group=True, **given)
    coarse = segments.groups.levels[-1]
    expected = (tensor.new_zeros(3, *tensor.shape[1:]).index_add_(0, coarse, tensor) for tensor in (plain, exact, size))
    assert_as_good_as_plain(dw, *expected)


@pytest.mark.parametrize("dtype", ops.FLOATS, ids=str)
@pytest.mark.parametrize("lengths", [v for v in LENGTHS.values() if v], ids=[k for k, v in LENGTHS.items() if v])
@pytest.mark.parametrize("backend", BACKENDS)
def test_product_and_sum(backend, lengths, dtype):
    segments = segments_of(lengths)
    x, g = rows_of(segments, 5, 5, dtype)
    shift, scale = (torch.linspace(low, 2, len(x)).to(accumulated(x).dtype) for low in (-1, 0.5))

    def per_segment(x, g, shift, scale):
        return torch.stack(
            [rows.sum(0) for rows in (g * (x - shift[:, None]) * scale[:, None]).split(segments.lengths)]
        )

    def check(found, plain, exact, size):
        weight = torch.linspace(-1, 2, len(lengths), dtype=plain.dtype)
        sums, wgrad = found
        assert_as_good_as_plain(sums, plain, exact, size)
        dw, sqnorm = wgrad(weight)
        assert_as_good_as_plain(dw, weight @ plain, weight.double() @ exact, weight.double().abs() @ size)
        assert_as_good_as_plain(sqnorm, *(truth(tensor, segments) for tensor in (plain, exact, size)))

    given = {"shift": shift, "scale": scale, "backend": backend}
    check(
        (ops.segment_scale_grad(x, g, segments, **given), lambda w: ops.scale_wgrad(x, g, segments, weight=w, **given)),
        per_segment(accumulated(x), accumulated(g), shift, scale),
        per_segment(x.double(), g.double(), shift.double(), scale.double()),
        per_segment(x.double().abs(), g.double().abs(), -shift.double().abs(), scale.double()),
    )
    check(
        (
            ops.segment_sum(g, segments, backend=backend),
            lambda w: ops.bias_wgrad(g, segments, weight=w, backend=backend),
        ),
        torch.stack([rows.sum(0) for rows in accumulated(g).split(segments.lengths)]),
        torch.stack([rows.sum(0) for rows in g.double().split(segments.lengths)]),
        torch.stack([rows.sum(0) for rows in g.double().abs().split(segments.lengths)]),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_may_be_strided(backend):
    segments = segments_of([4, 9, 2])
    wide = torch.randn(15, 40, dtype=torch.float64)
    for x, g in ((wide[:, :7], wide[:, 7:30]), (wide[:, ::5], wide.t().contiguous().t()[:, :6])):
        found = ops.outer_wgrad(x, g, segments, backend=backend)
        expected = ops.outer_wgrad(x.contiguous(), g.contiguous(), segments, backend="reference")
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(
            ops.segment_sum(g, segments, backend=backend), ops.segment_sum(g, segments, backend="reference")
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_segment(backend):
    segments = segments_of([4, 9, 2], nested=False)
    x, g = rows_of(segments, 6, 5, torch.float32)
    g[5] = torch.nan
    assert ops.outer_sqnorm(x, g, segments, backend=backend).isnan().tolist() == [False, True, False]
    assert ops.bias_sqnorm(g, segments, backend=backend).isnan().tolist() == [False, True, False]
    assert ops.lookup_sqnorm(torch.zeros(15, dtype=torch.long), g, 3, segments, backend=backend).isnan().tolist() == [
        False, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_segment_std(backend, dtype):
    values = torch.tensor([0.9, 0.9, 0.9, 1e4, 1e4 + 1, -2.0, torch.nan, 3.0], dtype=dtype)
    ids = torch.tensor([3, 3, 3, 0, 0, 1, 2, 2])
    found = ops.segment_std(values, ids, 5, backend=backend)
    assert found.count.tolist() == [2, 1, 2, 3, 0]
    expected = torch.stack(
        [
            values[ids == s].double().std() if (ids == s).sum() > 1 else torch.tensor(torch.nan).double()
            for s in range(5)
        ]
    )
    torch.testing.assert_close(found.std.double(), expected, equal_nan=True, rtol=1e-6, atol=1e-7)
    assert found.low[3] == found.high[3] == values[0] and found.low[4] == torch.inf and found.high[4] == -torch.inf
    assert found.mean[2].isnan() and found.low[2].isnan() and found.high[2].isnan()
    population = ops.segment_std(values, ids, 5, ddof=0, backend=backend).std
    assert population[1] == 0 and float(population[0]) == pytest.approx(0.5)


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    d=st.integers(1, 40),
    p=st.integers(1, 40),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_backends_agree_on_any_segments(lengths, d, p, seed):
    generator = torch.Generator().manual_seed(seed)
    count = len(lengths)
    fine = torch.randint(0, 5, (count,), generator=generator)
    coarse = torch.randint(0, 3, (5,), generator=generator)[fine]
    segments = Segments.from_lengths(torch.tensor(lengths), Groups.of(count, [(fine, 5), (coarse, 3)]))
    x, g = (torch.randn(sum(lengths), width, dtype=torch.float64, generator=generator) for width in (p, d))
    ids = torch.randint(0, 6, (sum(lengths),), generator=generator)
    weight = torch.rand(count, dtype=torch.float64, generator=generator)
    for options in ({}, {"weight": weight}, {"by_group": True}):
        for found, expected in zip(
            (*ops.outer_wgrad(x, g, segments, backend="native", **options),
             *ops.lookup_wgrad(ids, g, 6, segments, backend="native", padding_idx=1, **options)),
            (*ops.outer_wgrad(x, g, segments, backend="reference", **options),
             *ops.lookup_wgrad(ids, g, 6, segments, backend="reference", padding_idx=1, **options)),
            strict=True,
        ):  # fmt: skip
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


ONE = Segments.equal(2, 3, Groups.of(2, [(torch.tensor([0, 1]), 2)]))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.outer_sqnorm(torch.ones(6), torch.ones(6), ONE), ValueError,
         "outer_sqnorm: x and g must be [rows, width] with equally many rows, got [6] and [6]; flatten them to rows"),
        (lambda: ops.outer_wgrad(torch.ones(6, 2), torch.ones(5, 2), ONE), ValueError, "got [6, 2] and [5, 2]"),
        (lambda: ops.outer_wgrad(torch.ones(6, 2), torch.ones(6, 2).double(), ONE), TypeError,
         "outer_wgrad: x and g must have one dtype of"),
        (lambda: ops.segment_sum(torch.ones(6, 2, dtype=torch.int64), ONE), TypeError, "segment_sum: g must have one dtype of"),
        (lambda: ops.outer_wgrad(torch.ones(5, 2), torch.ones(5, 2), ONE), ValueError,
         "the rows must be those of the segments, got 5 rows and segments of 6"),
        (lambda: ops.outer_wgrad(torch.ones(6, 2), torch.ones(6, 2), ONE, weight=torch.ones(3)), ValueError,
         "outer_wgrad: weight must be [2], one per segment, got [3]"),
        (lambda: ops.outer_wgrad(torch.ones(6, 2), torch.ones(6, 2), Segments.equal(2, 3), by_group=True), ValueError,
         "outer_wgrad: by_group needs segments with groups and no weight"),
        (lambda: ops.outer_wgrad(torch.ones(6, 2), torch.ones(6, 2), ONE, out=torch.ones(2, 3)), ValueError,
         "outer_wgrad: out must be contiguous, [2, 2] of torch.float32 or x's dtype, got [2, 3] of torch.float32"),
        (lambda: ops.outer_wgrad(torch.ones(6, 2), torch.ones(6, 2), ONE, accumulate=True), ValueError,
         "outer_wgrad: accumulate needs out"),
        (lambda: ops.per_sample_wgrad(torch.ones(3, 2), ONE), ValueError,
         "per_sample_wgrad: grads must be [2, n], one row per segment, got [3, 2]"),
        (lambda: ops.per_sample_sqnorm(torch.ones(2, 2).half(), ONE), TypeError, "grads must be float32 or float64"),
        (lambda: ops.lookup_sqnorm(torch.tensor([0, 1, 2, 3, 4, 9]), torch.ones(6, 2), 9, ONE), ValueError,
         "lookup_sqnorm: ids must lie in [0, 9), got 0 to 9"),
        (lambda: ops.lookup_sqnorm(torch.zeros(6), torch.ones(6, 2), 9, ONE), TypeError, "ids must be int64"),
        (lambda: ops.segment_std(torch.ones(3), torch.tensor([0, 1, 2]), 2), ValueError, "ids must lie in [0, 2), got 0 to 2"),
        (lambda: ops.segment_std(torch.ones(3), torch.tensor([0, 1]), 2), ValueError, "one-dimensional and equally long"),
        (lambda: ops.segment_std(torch.ones(3).half(), torch.tensor([0, 1, 1]), 2), TypeError, "must be float32 or float64"),
        (lambda: backends.find("outer_wgrad", "mps", "native"), RuntimeError, "outer_wgrad: no backend runs it on mps"),
    ],
)  # fmt: skip
def test_says_what_is_wrong(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
