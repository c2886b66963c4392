"""The CUDA kernels: what Python makes for them, with plain torch in their place; their errors; and themselves on a GPU.

The kernels' numbers are tested on a CPU too, in C++ (tests/cpp/cuda).
"""

import types
from functools import partial

import pytest
import torch
from test_ops import (
    accumulated,
    assert_as_good_as_plain,
    lookup_per_segment,
    outer_per_segment,
    rows_of,
    segments_of,
    truth,
)

from gradnorm_ext import _C, backends, native_cuda, ops
from gradnorm_ext.operations import OPERATIONS
from gradnorm_ext.segments import Groups, Segments

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not _C.with_cuda, reason="built without CUDA"),
]
LENGTHS = {
    "one row": [1],
    "one row each": [1] * 9,
    "ragged, one empty, in another order than the groups'": [3, 0, 70, 2, 5],
    "equal": [66] * 3,
    "one long segment": [5000],
}


def lookup_wgrad_sorted(ids, place, row, segment, offsets, g, walk, columns, outputs, weight, padding_idx, dw, sqnorm):
    """What the kernel of that name does, by its description in csrc/kernels/lookup_wgrad.h."""
    assert (ids.diff() >= 0).all() and (offsets.diff() == torch.bincount(segment, minlength=len(walk))[walk]).all()
    assert segment.equal(torch.repeat_interleave(walk, offsets.diff()))
    g = g.to(sqnorm.dtype)
    sums = {}
    for i, at in enumerate(place.tolist()):
        of = int(segment[at])
        if (token := int(ids[i])) != padding_idx:
            rows = g[at if row is None else int(row[at])]
            if dw is not None:
                dw[0 if outputs is None else outputs[of], token] += rows * (1 if weight is None else weight[of])
            for column in (of, *columns[:, of].tolist()):
                sums.setdefault((column, token), torch.zeros_like(rows)).add_(rows)
    for (column, _), total in sums.items():
        sqnorm[column] += total.square().sum()


def outer_fused(x, g, begin, end, unit, inner, outer, output, weight, p, d, units, kernel, dw, norms):
    """What the kernel of that name does, by its description in csrc/kernels/outer_wgrad.h; it does not split the units."""
    assert outer is None or weight is None  # no registers are left for a weighted total
    ends = inner if outer is None else outer
    starts = torch.cat([torch.ones(1, dtype=torch.bool), ends[:-1] >= 0])
    before = torch.cat([begin.new_zeros(1), (end - begin).cumsum(0)])[:-1]
    assert unit.equal(before[starts][starts.cumsum(0) - 1]) and starts.sum() <= units
    for rows in (x, g):  # what TMA asks for
        assert rows.data_ptr() % 16 == rows.shape[1] % 8 == rows.stride(0) % 8 == 0 and rows.stride(0) >= rows.shape[1]
    total, sums = torch.zeros(d, p), [torch.zeros(d, p), torch.zeros(d, p)]
    for i in range(len(begin)):
        rows = slice(begin[i], end[i])
        sums[0] += g[rows, :d].float().t() @ x[rows, :p].float()
        if inner[i] < 0:
            continue
        norms[inner[i], -1] = sums[0].square().sum()
        sums[1] += sums[0]
        total += sums[0] * (1 if weight is None else weight[i])
        sums[0] = torch.zeros(d, p)
        if outer is not None and outer[i] >= 0:
            norms[outer[i], 0] += sums[1].square().sum()
            if dw is not None and output is not None:
                dw[output[i]] = sums[1]
            sums[1] = torch.zeros(d, p)
    if dw is not None and output is None:
        dw[0] = total


def segment_std_sorted(values, order, offsets, ddof, mean, std, count, low, high):
    """Likewise."""
    ids = torch.repeat_interleave(torch.arange(len(count)), offsets.diff())
    for out, figure in zip(
        (mean, std, count, low, high),
        backends.load("reference").segment_std(values[order], ids, len(count), ddof=ddof),
        strict=True,
    ):
        out.copy_(figure)


@pytest.fixture
def plain(monkeypatch):
    standing_in = types.SimpleNamespace(
        lookup_wgrad_sorted=lookup_wgrad_sorted, segment_std_sorted=segment_std_sorted, outer_fused=outer_fused
    )
    monkeypatch.setattr(native_cuda, "_kernels", standing_in)


needs_cuda_build = pytest.mark.skipif(not _C.with_cuda, reason="built without nvcc: there are no plans for tiles")


@needs_cuda_build
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [[3], [2, 0, 5, 4], [4] * 7], ids=str)
@pytest.mark.parametrize("levels", [0, 1, 2, 3])
def test_outer_products_visit_all_levels(plain, lengths, levels, dtype):
    ids = [torch.arange(len(lengths)) * 5 % 4, torch.tensor([2, 0, 0, 2]), torch.tensor([1, 0, 0])]
    of_level = [(ids[0], 4), (ids[1][ids[0]], 3), (ids[2][ids[1][ids[0]]], 2)][:levels]
    segments = Segments.from_lengths(torch.tensor(lengths), Groups.of(len(lengths), of_level))
    x, g = torch.randn(sum(lengths), 13).to(dtype)[:, :11], torch.randn(sum(lengths), 8).to(dtype)
    reference = backends.load("reference")
    outputs = {"outputs": of_level[-1][0], "n_outputs": of_level[-1][1]} if levels else {}
    for options in ({}, {"weight": torch.rand(len(lengths))}, outputs):
        found = native_cuda.outer_wgrad(x, g, segments, **options)
        for one, other in zip(found, reference.outer_wgrad(x, g, segments, **options), strict=True):
            torch.testing.assert_close(one, other)
    torch.testing.assert_close(native_cuda.outer_sqnorm(x, g, segments), reference.outer_sqnorm(x, g, segments))
    expected = reference.outer_wgrad(x, g, segments)[0]
    for out in (torch.ones(8, 11), torch.ones(8, 11, dtype=dtype)):
        written, _ = native_cuda.outer_wgrad(x, g, segments, out=out)
        assert written.data_ptr() == out.data_ptr()
        torch.testing.assert_close(out, expected.to(out.dtype))
        added, _ = native_cuda.outer_wgrad(x, g, segments, out=out.fill_(1), accumulate=True)
        torch.testing.assert_close(added, (1 + expected).to(out.dtype))


@needs_cuda_build
def test_outer_products_of_nothing_are_zero(plain):
    segments = Segments.from_lengths(torch.tensor([0, 0]))
    dw, sqnorm = native_cuda.outer_wgrad(torch.empty(0, 3).half(), torch.empty(0, 2).half(), segments)
    assert dw.tolist() == [[0] * 3] * 2 and sqnorm.tolist() == [0, 0]


@needs_cuda_build
def test_rows_that_lie_in_one_place_are_copied(plain):
    segments = Segments.equal(2, 3)
    x, g = torch.randn(6, 8).half(), torch.randn(8).half().expand(6, 8)
    found = native_cuda.outer_sqnorm(x, g, segments)
    torch.testing.assert_close(found, backends.load("reference").outer_sqnorm(x, g, segments))


def test_what_no_fused_kernel_takes_is_refused():
    rows, segments = torch.ones(4, 2), Segments.equal(2, 2)
    message = r"outer_wgrad: .* multiplies float16 or bfloat16, got torch.float32; .* GRADNORM_BACKEND=triton"
    with pytest.raises(TypeError, match=message):
        native_cuda.outer_wgrad(rows, rows, segments)
    with pytest.raises(ValueError, match=r"outer_sqnorm: method must be one of mma.*, got 'wmma'; use mma"):
        native_cuda.outer_sqnorm(rows.half(), rows.half(), segments, method="wmma")


@pytest.mark.parametrize("lengths", [[3], [2, 0, 5, 4], [4] * 3, []], ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_lookups_are_sorted_so_that_segments_and_groups_lie_together(plain, lengths, nested):
    segments = segments_of(lengths, nested)
    ids, g = torch.arange(sum(lengths)).remainder(4), torch.randn(sum(lengths), 3, dtype=torch.float64)
    outputs = {"outputs": segments.groups.levels[-1], "n_outputs": 3} if nested else {}
    reference = backends.load("reference")
    for options in ({}, {"weight": torch.rand(len(lengths))}, outputs):
        for padding_idx in (None, 2):
            found = native_cuda.lookup_wgrad(ids, g, 5, segments, padding_idx=padding_idx, **options)
            expected = reference.lookup_wgrad(ids, g, 5, segments, padding_idx=padding_idx, **options)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other)
    found = native_cuda.lookup_sqnorm(ids, g, 5, segments)
    torch.testing.assert_close(found, reference.lookup_sqnorm(ids, g, 5, segments))


def test_values_are_sorted_where_looking_at_all_would_cost_more(plain, monkeypatch):
    monkeypatch.setattr(native_cuda, "_LOOKS", 0)
    values, ids = torch.randn(50), torch.randint(0, 7, (50,))
    found = native_cuda.segment_std(values, ids, 9, ddof=1)
    expected = backends.load("reference").segment_std(values, ids, 9, ddof=1)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


@needs_cuda_build
@pytest.mark.parametrize(
    "reason",
    [
        "no kernel image is available for execution on the device",  # compiled for other cards
        "CUDA driver version is insufficient for CUDA runtime version",  # or there is no driver
        "the driver has no cuTensorMapEncodeTiled",
        "unspecified launch failure",
    ],
)
def test_a_kernel_that_cannot_run_says_what_where_and_what_to_do(reason, monkeypatch):
    class Kernels:
        def __getattr__(self, name):
            def fails(*_):
                raise error

            return fails

    monkeypatch.setattr(native_cuda, "_kernels", Kernels())
    segments, ids = Segments.equal(2, 2), torch.tensor([0, 1, 1, 0])
    rows, sums = torch.ones(4, 2, dtype=torch.float16), torch.ones(2, 2)
    arguments = {
        **dict.fromkeys(("outer_sqnorm", "outer_wgrad", "segment_scale_grad"), (rows, rows, segments)),
        **dict.fromkeys(("lookup_sqnorm", "lookup_wgrad"), (ids, rows, 2, segments)),
        **dict.fromkeys(("per_sample_sqnorm", "per_sample_wgrad"), (sums, segments)),
        "segment_sum": (rows, segments),
    }
    calls = {name: partial(getattr(native_cuda, name), *given) for name, given in arguments.items()}
    calls["segment_std"] = partial(native_cuda.segment_std, torch.ones(4), ids, 2, ddof=1)
    assert calls.keys() == {name for name in OPERATIONS if hasattr(native_cuda, name)}
    for operation, call in calls.items():
        error = RuntimeError(f"{reason}\nand more, of which a user makes nothing")
        message = (
            rf"^{operation}: the native CUDA kernel must run on cpu .*, got: {reason}; set GRADNORM_BACKEND=triton, "
        )
        with pytest.raises(RuntimeError, match=message):
            call()
        error = torch.cuda.OutOfMemoryError("as torch says it")
        with pytest.raises(torch.cuda.OutOfMemoryError, match=r"^as torch says it$"):
            call()


def test_without_a_gpu_the_build_says_why_its_kernels_cannot_run():
    assert bool(_C.cuda_problem()) == (not (_C.with_cuda and torch.cuda.is_available()))


def test_the_choice_of_a_backend_is_explained(monkeypatch):
    assert backends.explain("segment_sum", "cpu", "auto").startswith("native, the first of native, reference")
    assert backends.explain("outer_gram", "cpu", "auto").startswith("reference, not native (has no outer_gram for cpu)")
    assert backends.explain("outer_gram", "cpu", "native") == "none: native (has no outer_gram for cpu)"
    monkeypatch.setitem(backends.BACKEND_ORDER, "cuda", ("reference",))
    explained = backends.explain("segment_sum", "cuda", "auto")
    assert explained.startswith("reference, the first of reference; where asked for: ")
    assert ("native" in explained) == _C.with_cuda


def on_device(lengths, levels):
    """`segments_of` with none, the coarser, or both of its levels of groups, on the GPU."""
    segments = segments_of(lengths)
    groups = [(ids.cuda(), n) for ids, n in zip(segments.groups.levels, segments.groups.counts, strict=True)]
    groups = Groups.of(len(lengths), groups[2 - levels :], "cuda")
    if segments.length is not None:
        return Segments.equal(len(lengths), segments.length, groups, "cuda")
    return Segments.from_lengths(torch.tensor(lengths, device="cuda"), groups)


@pytest.mark.parametrize("dtype", ops.FLOATS, ids=str)
@pytest.mark.parametrize("width", [1, 33, 512])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
class TestOnGpu:
    pytestmark = on_gpu

    def test_product_and_sum(self, lengths, width, dtype):
        segments = on_device(lengths, 2)
        x, g = (rows.cuda() for rows in rows_of(segments, width, width, dtype))
        shift, scale = (torch.linspace(low, 2, len(x), device="cuda").to(accumulated(x).dtype) for low in (-1, 0.5))
        weight = torch.linspace(-1, 2, len(lengths), device="cuda", dtype=accumulated(x).dtype)

        def check(found, rows, wgrad):
            exact, plain, size = (torch.stack([one.sum(0) for one in t.split(segments.lengths)]) for t in rows)
            assert_as_good_as_plain(found, plain, exact, size)
            dw, sqnorm = wgrad()
            assert_as_good_as_plain(dw, weight @ plain, weight.double() @ exact, weight.double().abs() @ size)
            assert_as_good_as_plain(sqnorm, *(truth(t, segments) for t in (plain, exact, size)))

        def normalised(x, g):
            return g * (x - shift.to(x)[:, None]) * scale.to(x)[:, None]

        given = {"shift": shift, "scale": scale, "backend": "native"}
        size = g.double().abs() * (x.double().abs() + shift.double().abs()[:, None]) * scale.double()[:, None]
        check(
            ops.segment_scale_grad(x, g, segments, **given),
            (normalised(x.double(), g.double()), normalised(accumulated(x), accumulated(g)), size),
            lambda: ops.scale_wgrad(x, g, segments, weight=weight, **given),
        )
        check(
            ops.segment_sum(g, segments, backend="native"),
            (g.double(), accumulated(g), g.double().abs()),
            lambda: ops.bias_wgrad(g, segments, weight=weight, backend="native"),
        )

    def test_lookup(self, lengths, width, dtype):
        segments, vocabulary = on_device(lengths, 2), 5
        (g, _), ids = rows_of(segments, 1, width, dtype), torch.arange(sum(lengths)).remainder(4).cuda()
        g = g.cuda()
        exact, plain, size = (
            lookup_per_segment(ids, rows, vocabulary, 2, segments)
            for rows in (g.double(), accumulated(g), g.double().abs())
        )
        norms = [truth(t, segments) for t in (plain, exact, size)]
        weight = torch.linspace(-1, 2, len(lengths), dtype=plain.dtype, device="cuda")
        given = {"padding_idx": 2, "backend": "native"}
        assert_as_good_as_plain(ops.lookup_sqnorm(ids, g, vocabulary, segments, **given), *norms)
        dw, sqnorm = ops.lookup_wgrad(ids, g, vocabulary, segments, weight=weight, **given)
        assert_as_good_as_plain(dw, *(torch.tensordot(weight.to(t), t, 1) for t in (plain, exact)), size.sum(0))
        assert_as_good_as_plain(sqnorm, *norms)
        again = ops.lookup_wgrad(ids, g, vocabulary, segments, weight=weight, **given)
        assert dw.equal(again[0]) and sqnorm.equal(again[1])


def methods():
    """Those that this build has for this card."""
    hopper = _C.with_cutlass and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    return native_cuda.METHODS if hopper else ("mma",)


OUTER = {**LENGTHS, "ragged, longer than a tile's rows": [700, 1, 0, 129, 64, 1000], "equal and long": [512] * 6}


@pytest.mark.parametrize("method", native_cuda.METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("widths", [(5, 130), (768, 1100)], ids=str)
@pytest.mark.parametrize("lengths", OUTER.values(), ids=OUTER.keys())
class TestOuterOnGpu:
    pytestmark = on_gpu

    def test_agrees_with_float64(self, lengths, widths, dtype, method):
        if method not in methods():
            pytest.skip("wgmma needs a Hopper GPU, and a build with the headers of CUTLASS")
        for levels in (0, 1, 2):
            segments = on_device(lengths, levels)
            x, g = (rows.cuda() for rows in rows_of(segments, *widths, dtype))
            exact, plain, size = (
                outer_per_segment(*rows, segments)
                for rows in ((x.double(), g.double()), (x.float(), g.float()), (x.double().abs(), g.double().abs()))
            )
            norms = [truth(t, segments) for t in (plain, exact, size)]
            weight = torch.linspace(-1, 2, len(lengths), device="cuda")
            assert_as_good_as_plain(native_cuda.outer_sqnorm(x, g, segments, method=method), *norms)
            dw, sqnorm = native_cuda.outer_wgrad(x, g, segments, method=method)
            assert_as_good_as_plain(dw, plain.sum(0), exact.sum(0), size.sum(0))
            assert_as_good_as_plain(sqnorm, *norms)
            again = native_cuda.outer_wgrad(x, g, segments, method=method)
            assert dw.equal(again[0]) and sqnorm.equal(again[1])
            dw, sqnorm = native_cuda.outer_wgrad(x, g, segments, weight=weight, method=method)
            assert_as_good_as_plain(dw, *(torch.tensordot(weight.to(t), t, 1) for t in (plain, exact)), size.sum(0))
            assert_as_good_as_plain(sqnorm, *norms)
            if levels:
                coarse, count = segments.groups.levels[-1], segments.groups.counts[-1]
                dw, _ = native_cuda.outer_wgrad(x, g, segments, outputs=coarse, n_outputs=count, method=method)
                shape = (count, *plain.shape[1:])
                of_group = (t.new_zeros(shape).index_add_(0, coarse, t) for t in (plain, exact, size))
                assert_as_good_as_plain(dw, *of_group)

    def test_nan_stays_in_its_segment(self, lengths, widths, dtype, method):
        if method not in methods():
            pytest.skip("wgmma needs a Hopper GPU, and a build with the headers of CUTLASS")
        segments = on_device(lengths, 0)
        x, g = (rows.cuda() for rows in rows_of(segments, *widths, dtype))
        last = int(segments.offsets[-2])
        x[last:] = g[last:] = torch.nan
        found = native_cuda.outer_sqnorm(x, g, segments, method=method).isnan()
        assert found.tolist() == [False] * (len(lengths) - 1) + [True]


@pytest.mark.parametrize("looks", [0, 1 << 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
class TestSegmentStdOnGpu:
    pytestmark = on_gpu

    def test_agrees_with_the_cpu(self, dtype, looks, monkeypatch):
        monkeypatch.setattr(native_cuda, "_LOOKS", looks)
        values, ids = torch.randn(5000, dtype=dtype), torch.randint(0, 97, (5000,))
        values[17] = torch.nan
        for count in (99, 100_000):
            on_cpu = ops.segment_std(values, ids, count, backend="native")
            found = ops.segment_std(values.cuda(), ids.cuda(), count, backend="native")
            for here, there in zip(on_cpu, found, strict=True):
                torch.testing.assert_close(there.cpu(), here, equal_nan=True)
