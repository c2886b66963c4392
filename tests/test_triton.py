"""The Triton kernels: in the interpreter where there is no GPU, else as they are compiled. Shapes are tiny.

What is compared with what, and how closely, is `test_ops`'s.
"""

import dataclasses
import importlib
import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from test_ops import (
    accumulated,
    assert_as_good_as_plain,
    gram_of,
    lookup_per_segment,
    outer_per_segment,
    rows_of,
    segments_of,
    truth,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradnorm_ext import Meter, backends, ops
from gradnorm_ext.operations import OPERATIONS
from gradnorm_ext.segments import Groups, Segments

triton_kernels = pytest.importorskip("gradnorm_ext.triton_kernels")  # triton is optional

chips = importlib.import_module("gradnorm_ext.triton_kernels.chips")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
if DEVICE == "cpu":
    import interpreter  # noqa: F401  # mends it

LENGTHS = {
    "one row": [1],
    "one row each": [1] * 9,
    "ragged, one empty, in another order than the groups'": [3, 0, 70, 2, 5],
    "equal": [66] * 3,
}
METHODS = ("gram", "fused", "split")


def nested(lengths, levels):
    """`segments_of` with none, the coarser, or both of its levels of groups, on the device."""
    segments = segments_of(lengths)
    groups = [(ids.to(DEVICE), n) for ids, n in zip(segments.groups.levels, segments.groups.counts, strict=True)]
    groups = Groups.of(len(lengths), groups[2 - levels :], DEVICE)
    if segments.length is not None:
        return Segments.equal(len(lengths), segments.length, groups, DEVICE)
    return Segments.from_lengths(torch.tensor(lengths, device=DEVICE), groups)


def check_outer(method, segments, x, g):
    """Every way to call an outer operation, against the same in float64."""
    outer_sqnorm, outer_wgrad = triton_kernels.outer_sqnorm, triton_kernels.outer_wgrad
    exact = outer_per_segment(x.double(), g.double(), segments)
    plain = outer_per_segment(accumulated(x), accumulated(g), segments)
    size = outer_per_segment(x.double().abs(), g.double().abs(), segments)
    norms = [truth(tensor, segments) for tensor in (plain, exact, size)]
    assert_as_good_as_plain(outer_sqnorm(x, g, segments, method=method), *norms)

    dw, sqnorm = outer_wgrad(x, g, segments, method=method)
    assert dw.dtype == plain.dtype
    assert_as_good_as_plain(dw, plain.sum(0), exact.sum(0), size.sum(0))
    assert_as_good_as_plain(sqnorm, *norms)

    before = torch.randn(plain.shape[1:], dtype=plain.dtype, device=DEVICE)
    added, _ = outer_wgrad(x, g, segments, out=before.clone(), accumulate=True, method=method)
    assert_as_good_as_plain(added, plain.sum(0) + before, exact.sum(0) + before, size.sum(0) + before.abs())

    weights = [torch.linspace(-1, 2, segments.count, dtype=plain.dtype, device=DEVICE)]
    if segments.groups.levels:  # one weight in each group of a level is a way of its own
        weights += [
            torch.tensor([0.5, 3, -1, 2], dtype=plain.dtype, device=DEVICE)[ids] for ids in segments.groups.levels
        ]
    for weight in weights:
        dw, sqnorm = outer_wgrad(x, g, segments, weight=weight, method=method)
        totals = [torch.tensordot(weight.to(tensor), tensor, 1) for tensor in (plain, exact)]
        assert_as_good_as_plain(dw, *totals, torch.tensordot(weight.abs().to(size), size, 1))
        assert_as_good_as_plain(sqnorm, *norms)

    if segments.groups.levels:
        coarse, count = segments.groups.levels[-1], segments.groups.counts[-1]
        dw, sqnorm = outer_wgrad(x, g, segments, outputs=coarse, n_outputs=count, method=method)
        shape = (count, *plain.shape[1:])
        assert_as_good_as_plain(dw, *(t.new_zeros(shape).index_add_(0, coarse, t) for t in (plain, exact, size)))
        assert_as_good_as_plain(sqnorm, *norms)


@pytest.mark.parametrize("levels", [0, 1, 2])
@pytest.mark.parametrize(
    ("method", "lengths"),
    [
        pytest.param(method, lengths, id=f"{method}, {name}")
        for method in METHODS
        for name, lengths in LENGTHS.items()
        if method != "split" or len(set(lengths)) == 1
    ],
)
def test_outer(method, lengths, levels):
    segments = nested(lengths, levels)
    check_outer(method, segments, *(rows.to(DEVICE) for rows in rows_of(segments, 70, 5, torch.float32)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_outer_in_every_dtype(method, dtype):
    segments = nested([17] * 3, 1)
    check_outer(method, segments, *(rows.to(DEVICE) for rows in rows_of(segments, 5, 130, dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("levels", [0, 2])
@pytest.mark.parametrize("lengths", [[3, 0, 5], [9] * 2, [1] * 20], ids=str)
def test_outer_gram(lengths, levels, dtype):
    segments = nested(lengths, levels)
    x, g = (rows.to(DEVICE) for rows in rows_of(segments, 20, 7, dtype))
    rows = (accumulated(x), accumulated(g)), (x.double(), g.double()), (x.double().abs(), g.double().abs())
    found = ops.outer_gram(x, g, segments, backend="triton")
    assert_as_good_as_plain(found, *(gram_of(outer_per_segment(*one, segments), segments) for one in rows))


def test_outer_gram_goes_in_blocks_of_rows_of_the_weight(monkeypatch):
    segments = nested([4, 5], 0)
    x, g = (rows.to(DEVICE) for rows in rows_of(segments, 20, 7, torch.float64))
    expected = ops.outer_gram(x, g, segments, backend="reference")
    monkeypatch.setitem(triton_kernels.outer_gram.__globals__, "SCRATCH", 6 * 2 * 7 * 8)  # 6 of 20 rows at a time
    torch.testing.assert_close(ops.outer_gram(x, g, segments, backend="triton"), expected)
    equal = nested([4] * 3, 1)
    x, g = x.repeat(2, 1)[:12], g.repeat(2, 1)[:12]
    expected = ops.outer_wgrad(x, g, equal, backend="reference")
    split = importlib.import_module("gradnorm_ext.triton_kernels.outer_split")
    monkeypatch.setattr(split, "SCRATCH", 6 * 3 * 7 * 8)
    torch.testing.assert_close(triton_kernels.outer_wgrad(x, g, equal, method="split"), expected)


@pytest.mark.parametrize("levels", [0, 1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_outer_writes_and_adds_in_the_dtype_of_the_weight(method, levels):
    segments = nested([4] * 3 if method == "split" else [3, 0, 7], levels)
    # Whole numbers: float32 holds their sums exactly, and bfloat16 does not.
    x, g = ((10 * rows).round().to(DEVICE) for rows in rows_of(segments, 6, 5, torch.bfloat16))
    of_segments = outer_per_segment(x.double(), g.double(), segments)
    before = torch.randint(-200, 200, (3, 6, 5), device=DEVICE).bfloat16()
    calls = [({}, of_segments.sum(0)), ({"weight": torch.full((3,), 2.0, device=DEVICE)}, 2 * of_segments.sum(0))]
    if levels:
        by_group = {"outputs": segments.groups.levels[-1], "n_outputs": 3}
        exact = of_segments.new_zeros(3, 6, 5).index_add_(0, segments.groups.levels[-1], of_segments)
        calls.append((by_group, exact))
    for given, exact in calls:
        of_shape = before[: len(exact)] if exact.dim() == 3 else before[0]
        for accumulate in (False, True):
            out = of_shape.clone()
            dw, _ = triton_kernels.outer_wgrad(x, g, segments, out=out, accumulate=accumulate, method=method, **given)
            rounded_once = (accumulate * of_shape.double() + exact).float().bfloat16()
            assert dw.data_ptr() == out.data_ptr() and dw.equal(rounded_once), (given, accumulate)


@pytest.mark.parametrize(
    ("method", "weighted"), [*itertools.product(METHODS, (False, True)), ("grouped", False)], ids=str
)
def test_a_level_with_one_member_is_no_level(method, weighted):
    """Its norm is that of the sum, before this is rounded, weighted or added to anything."""
    ids = torch.tensor([1, 0, 1], device=DEVICE)
    alone = torch.zeros_like(ids)
    for levels in ([(alone, 1)], [(ids, 2), (alone, 1)], [(alone, 1), (alone, 1)]):
        segments = Segments.equal(3, 9, Groups.of(3, levels, DEVICE), DEVICE)
        x, g = (rows.to(DEVICE) for rows in rows_of(segments, 16, 8, torch.bfloat16))
        of_all = [
            outer_per_segment(*rows, segments) for rows in ((accumulated(x), accumulated(g)), (x.double(), g.double()))
        ]
        size = outer_per_segment(x.double().abs(), g.double().abs(), segments)
        norms = [truth(tensor, segments) for tensor in (*of_all, size)]
        weight = torch.tensor([2.0, -1.0, 0.5], device=DEVICE) if weighted else None
        for out, accumulate in ((None, False), (torch.ones(16, 8, device=DEVICE).bfloat16(), True)):
            given = {"out": out, "accumulate": accumulate, "method": method}
            found = triton_kernels.outer_wgrad(x, g, segments, weight=weight, **given)[1]
            assert_as_good_as_norms(method, found, *norms)
        if not weighted:
            assert_as_good_as_norms(method, triton_kernels.outer_sqnorm(x, g, segments, method=method), *norms)


def assert_as_good_as_norms(method, found, plain, exact, size):
    """The grouped product rounds gradients to bfloat16 before they are squared: its plain torch is that."""
    if method == "grouped":
        torch.testing.assert_close(found.double(), exact, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=0)
    else:
        assert_as_good_as_plain(found, plain, exact, size)


@pytest.mark.parametrize("levels", [0, 1, 2])
@pytest.mark.parametrize("lengths", [[9] * 3, [3, 0, 7]], ids=str)
def test_grouped_products_have_the_norms_and_the_library_the_gradient(lengths, levels):
    segments = nested(lengths, levels)
    x, g = (rows.to(DEVICE) for rows in rows_of(segments, 16, 8, torch.bfloat16))
    exact = outer_per_segment(x.double(), g.double(), segments)
    dw, sqnorm = triton_kernels.outer_wgrad(x, g, segments, method="grouped")
    norms = truth(exact, segments)
    for found in (sqnorm, triton_kernels.outer_sqnorm(x, g, segments, method="grouped")):
        assert_as_good_as_norms("grouped", found, None, norms, None)
    plain, size = accumulated(g).t() @ accumulated(x), g.double().abs().t() @ x.double().abs()
    assert_as_good_as_plain(dw, plain, exact.sum(0), size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("levels", [0, 1, 2])
def test_equal_segments_are_described_to_the_hardware(levels, dtype, monkeypatch):
    """Tensor descriptors: of widths that are no multiple of a tile, and lengths that are none of a block of rows."""
    fused = importlib.import_module("gradnorm_ext.triton_kernels.outer_fused")
    described = []
    make = fused._described
    monkeypatch.setattr(fused, "_described", lambda *given: described.append(given) or make(*given))
    segments = nested([70] * 3, levels)
    check_outer("fused", segments, *(rows.to(DEVICE) for rows in rows_of(segments, 40, 136, dtype)))
    hopper = DEVICE == "cpu" or torch.cuda.get_device_capability()[0] == 9
    assert bool(described) == hopper
    described.clear()
    check_outer("fused", segments, *(rows.to(DEVICE) for rows in rows_of(segments, 20, 12, dtype)))
    assert not described  # rows of 24 bytes


def test_tiles_in_memory_go_in_parts(monkeypatch):
    fused = importlib.import_module("gradnorm_ext.triton_kernels.outer_fused")
    monkeypatch.setattr(fused, "_SCRATCH", 0)  # as few tiles at a time as there may be
    monkeypatch.setattr(fused, "chip_of", lambda rows: dataclasses.replace(chips.chip_of(rows), multiprocessors=1))
    segments = nested([3, 0, 5], 2)
    x, g = (rows.to(DEVICE) for rows in rows_of(segments, 70, 140, torch.float32))
    check_outer("fused", segments, x, g)


@pytest.mark.parametrize("method", ["gram", "fused"])
def test_outer_of_more_rows_than_a_tile_has(method):
    """Several blocks in a segment, several partners of each, and groups whose rows are not next to each other."""
    segments = nested([300, 0, 9, 40], 1)
    x, g = (rows.to(DEVICE) for rows in rows_of(segments, 9, 7, torch.bfloat16))
    check_outer(method, segments, x, g)


def test_what_outer_method_chooses_is_right_for_every_shape_it_chooses_between():
    for lengths, d, p in (([4] * 4, 64, 64), ([40] * 2, 8, 8), ([600], 4, 4)):
        segments = nested(lengths, 1)
        x, g = (rows.to(DEVICE) for rows in rows_of(segments, d, p, torch.float32))
        check_outer("auto", segments, x, g)


def test_a_method_is_refused_where_it_cannot_form_what_is_wanted():
    segments = nested([2, 2, 3], 0)
    x, g = torch.ones(7, 2), torch.ones(7, 2)
    with pytest.raises(
        ValueError, match=r"split needs segments of one known length, .* got 'split', segments of any rows"
    ):
        triton_kernels.outer_sqnorm(x, g, segments, method="split")
    with pytest.raises(ValueError, match=r"grouped a gradient that is their plain sum, got 'grouped', .* and weights"):
        triton_kernels.outer_wgrad(x, g, segments, method="grouped", weight=torch.ones(3))


def test_outer_method_is_the_cheapest_of_its_formula():
    method = triton_kernels.outer_wgrad.__globals__["outer_method"]
    assert [method(rows, 4096, 4096, True, True) for rows in (1, 128, 2048, 32768)] == [
        *("gram", "gram", "split", "split")
    ]
    assert method(32768, 4096, 4096, True, False) == "fused"  # not known to be equally long
    assert method(512, 4096, 4096, True, True, (2048,)) == "gram of 1, then fused"
    assert method(2048, 512, 512, False, False) == "grouped"  # 16 tiles are few for 132 multiprocessors


def test_costs_are_those_of_the_chip():
    costs = triton_kernels.outer_wgrad.__globals__["outer_costs"]
    a100 = chips.Chip.of((8, 0), 108, 1.41e9, 1.555e12)
    of_layer = {"rows_per_segment": 1024, "d": 4096, "p": 4096, "with_dw": True, "equal": True}
    on = {name: costs(**of_layer, chip=chip) for name, chip in (("H200", chips.H200), ("A100", a100))}
    assert "grouped" not in on["A100"]  # torch's is a loop there
    # Of what is multiplied, an A100's L2 cache gives more, and its memory the same: fused costs it less, split as much.
    assert on["A100"]["fused"] < on["H200"]["fused"]
    fast = dataclasses.replace(chips.H200, l2_bytes=1e9, memory_bytes=1e9)
    found = costs(**of_layer, chip=fast)
    assert found["split"] == pytest.approx(1, rel=1e-3) and found["fused"] < on["H200"]["fused"]
    assert costs(**of_layer, groups=[4096], chip=fast)["fused"] > found["fused"]


@pytest.mark.parametrize("dtype", ops.FLOATS, ids=str)
@pytest.mark.parametrize("lengths", [[2, 0, 5], [4] * 3], ids=str)
def test_lookup(lengths, dtype):
    segments, vocabulary = nested(lengths, 2), 5
    (g, _), ids = rows_of(segments, 1, 5, dtype), torch.arange(sum(lengths)).remainder(4).to(DEVICE)
    g = g.to(DEVICE)
    exact, plain, size = (
        lookup_per_segment(ids, rows, vocabulary, 2, segments)
        for rows in (g.double(), accumulated(g), g.double().abs())
    )
    norms = [truth(t, segments) for t in (plain, exact, size)]
    weight = torch.linspace(-1, 2, len(lengths), dtype=plain.dtype, device=DEVICE)
    given = {"padding_idx": 2, "backend": "triton"}
    assert_as_good_as_plain(ops.lookup_sqnorm(ids, g, vocabulary, segments, **given), *norms)
    dw, sqnorm = ops.lookup_wgrad(ids, g, vocabulary, segments, weight=weight, **given)
    assert_as_good_as_plain(dw, *(torch.tensordot(weight.to(t), t, 1) for t in (plain, exact)), size.sum(0))
    assert_as_good_as_plain(sqnorm, *norms)
    dw, _ = ops.lookup_wgrad(ids, g, vocabulary, segments, by_group=True, **given)
    coarse, shape = segments.groups.levels[-1], (3, *plain.shape[1:])
    assert_as_good_as_plain(dw, *(t.new_zeros(shape).index_add_(0, coarse, t) for t in (plain, exact, size)))


@pytest.mark.parametrize("dtype", ops.FLOATS, ids=str)
@pytest.mark.parametrize("lengths", [[1] * 5, [3, 0, 12], [300], [12] * 2], ids=str)
def test_product_and_sum(lengths, dtype):
    segments = nested(lengths, 2)
    x, g = (rows.to(DEVICE) for rows in rows_of(segments, 5, 5, dtype))
    shift, scale = (torch.linspace(low, 2, len(x), device=DEVICE).to(accumulated(x).dtype) for low in (-1, 0.5))

    def check(found, rows, wgrad):
        exact, plain, size = (torch.stack([one.sum(0) for one in t.split(segments.lengths)]) for t in rows)
        weight = torch.linspace(-1, 2, len(lengths), dtype=plain.dtype, device=DEVICE)
        assert_as_good_as_plain(found, plain, exact, size)
        dw, sqnorm = wgrad(weight)
        assert_as_good_as_plain(dw, weight @ plain, weight.double() @ exact, weight.double().abs() @ size)
        assert_as_good_as_plain(sqnorm, *(truth(tensor, segments) for tensor in (plain, exact, size)))

    def normalised(x, g):
        return g * (x - shift.to(x)[:, None]) * scale.to(x)[:, None]

    given = {"shift": shift, "scale": scale, "backend": "triton"}
    size = g.double().abs() * (x.double().abs() + shift.double().abs()[:, None]) * scale.double()[:, None]
    check(
        ops.segment_scale_grad(x, g, segments, **given),
        (normalised(x.double(), g.double()), normalised(accumulated(x), accumulated(g)), size),
        lambda weight: ops.scale_wgrad(x, g, segments, weight=weight, **given),
    )
    check(
        ops.segment_sum(g, segments, backend="triton"),
        (g.double(), accumulated(g), g.double().abs()),
        lambda weight: ops.bias_wgrad(g, segments, weight=weight, backend="triton"),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_segment_std(dtype):
    values = torch.tensor([0.9, 0.9, 0.9, 1e4, 1e4 + 1, -2.0, torch.nan, 3.0, *range(40)], dtype=dtype, device=DEVICE)
    ids = torch.tensor([3, 3, 3, 0, 0, 1, 2, 2, *[35] * 40], device=DEVICE)
    for ddof in (0, 1):
        found = ops.segment_std(values, ids, 37, ddof=ddof, backend="triton")
        expected = ops.segment_std(values, ids, 37, ddof=ddof, backend="reference")
        assert (found.count.equal(expected.count) and found.low.equal(expected.low)) or expected.low.isnan().any()
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, equal_nan=True, rtol=1e-6, atol=1e-7)
    assert found.low[3] == found.high[3] == values[0] and found.low[4] == torch.inf and found.high[4] == -torch.inf


@pytest.mark.parametrize(
    ("method", "lengths", "dtype"),
    [
        ("gram", [4, 9, 2], torch.float32),
        ("fused", [4, 9, 2], torch.float32),
        ("fused", [4, 9, 2], torch.bfloat16),
        ("fused", [5] * 3, torch.bfloat16),  # by tensor descriptors
        ("grouped", [4, 9, 2], torch.bfloat16),
    ],
    ids=str,
)
def test_nan_stays_in_its_segment(method, lengths, dtype):
    segments = nested(lengths, 1)
    x, g = (rows.to(DEVICE) for rows in rows_of(segments, 16, 8, dtype))
    for rows in (x, g):
        rows[5] = torch.nan
        found = triton_kernels.outer_sqnorm(x, g, segments, method=method).isnan()
        assert found.tolist() == [
            False,
            True,
            False,
            segments.groups.levels[0][1] == 0,
            False,
            segments.groups.levels[0][1] == 2,
        ]
        rows[5] = 1
    g[5] = torch.nan
    ids = torch.zeros(len(g), dtype=torch.long, device=DEVICE)
    for found in (
        ops.bias_sqnorm(g, segments, backend="triton"),
        ops.scale_sqnorm(g, g, segments, backend="triton"),
        ops.lookup_sqnorm(ids, g, 3, segments, backend="triton"),
    ):
        assert found[:3].isnan().tolist() == [False, True, False]


def test_rows_may_be_strided():
    segments = nested([4, 9, 2], 0)
    wide = torch.randn(15, 40, dtype=torch.float64, device=DEVICE)
    for x, g in ((wide[:, :7], wide[:, 7:30]), (wide[:, ::5], wide.t().contiguous().t()[:, :6])):
        for method in ("gram", "fused"):
            found = triton_kernels.outer_wgrad(x, g, segments, method=method)
            torch.testing.assert_close(found, ops.outer_wgrad(x, g, segments, backend="reference"))
        for found, expected in (
            (ops.segment_sum(g, segments, backend=backend) for backend in ("triton", "reference")),
            (
                ops.lookup_sqnorm(torch.arange(15, device=DEVICE) % 3, g, 3, segments, backend=b)
                for b in ("triton", "reference")
            ),
        ):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", METHODS)
def test_weights_may_be_strided(method):
    segments = nested([2] * 3, 0)
    x, g = (rows.to(DEVICE) for rows in rows_of(segments, 3, 2, torch.float64))
    for weight in (torch.arange(6, device=DEVICE).double()[::2], torch.full((), 0.5, device=DEVICE).expand(3)):
        found = triton_kernels.outer_wgrad(x, g, segments, weight=weight, method=method)
        torch.testing.assert_close(found, ops.outer_wgrad(x, g, segments, weight=weight, backend="reference"))


def test_nothing_gives_zeros():
    for lengths in ([], [0], [0, 0]):
        segments = nested(lengths, 2)
        x, g = torch.empty(0, 5, device=DEVICE), torch.empty(0, 3, device=DEVICE)
        ids = torch.empty(0, dtype=torch.long, device=DEVICE)
        calls = {
            "outer_wgrad": (x, g), "lookup_wgrad": (ids, g, 4), "scale_wgrad": (g, g), "bias_wgrad": (g,)
        }  # fmt: skip
        for name, arguments in calls.items():
            dw, sqnorm = getattr(ops, name)(*arguments, segments, backend="triton")
            assert len(sqnorm) == len(lengths) + 7 and not sqnorm.any() and not dw.any(), name
    found = ops.segment_std(
        torch.empty(0, device=DEVICE), torch.empty(0, dtype=torch.long, device=DEVICE), 0, backend="triton"
    )
    assert len(found.mean) == 0


def test_the_same_rows_give_the_same_bits():
    segments = nested([70, 3, 66], 1)
    x, g = (rows.to(DEVICE) for rows in rows_of(segments, 70, 9, torch.bfloat16))
    for method in ("gram", "fused"):
        first, second = (triton_kernels.outer_wgrad(x, g, segments, method=method) for _ in range(2))
        assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_the_backend_is_the_default_on_a_gpu_for_all_that_it_has():
    for name in set(OPERATIONS) & set(triton_kernels.__all__):
        assert backends.find(name, "cuda", "auto") is getattr(triton_kernels, name)


def test_it_serves_the_cpu_in_the_interpreter_alone():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = "from gradnorm_ext import backends; backends.find('segment_sum', 'cpu', 'triton')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "segment_sum: no backend runs it on cpu, looked at triton (has no segment_sum for cpu)" in done.stderr


def test_a_meter_measures_with_it():
    torch.manual_seed(0)
    body = [nn.Embedding(9, 8), nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 9)]
    model = nn.Sequential(*body).double().to(DEVICE)
    ids = torch.tensor([[1, 2, 2], [0, 8, 3], [4, 4, 4], [5, 0, 1]], device=DEVICE)
    stats = []
    for backend in ("triton", "reference"):
        meter = Meter(model, tasks=2, backend=backend)
        with meter.observe(tasks=[0, 1, 1, 0], prompts=[0, 1, 1, 2]):
            model(ids).square().mean((1, 2)).sum().backward()
        stats.append((meter.stats.example_norm, meter.stats.prompt_norm, meter.stats.task_norm))
    torch.testing.assert_close(*stats)


class Calls(TorchDispatchMode):
    """The Triton operations that are called, and what with."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "gradnorm_triton":
            self.made.append((function, args))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_linear_layers_gradient_leaves_in_the_dtype_of_its_weight(dtype):
    """The kernel's last store rounds it: there is no float32 copy."""
    layer = nn.Linear(8, 12, bias=False).to(DEVICE, dtype)
    meter = Meter(layer, backend="triton")
    x = torch.randn(4, 5, 8, device=DEVICE).to(dtype)
    for _ in range(2):  # the first block also verifies itself
        layer.weight.grad = None
        with Calls() as calls, meter.observe():
            layer(x).square().sum().backward()
    formed = [arguments[9] for _, arguments in calls.made]
    assert [dw.dtype for dw in formed] == [dtype] and formed[0].data_ptr() == layer.weight.grad.data_ptr()


def one_of_each(length):
    """Calls of every operation, on three segments of this length in two tasks."""
    tasks = torch.tensor([0, 1, 1], device=DEVICE)
    offsets, groups = torch.arange(4, device=DEVICE) * length, Groups.of(3, [(tasks, 2)], DEVICE)
    x, g = (torch.randn(3 * length, width, device=DEVICE) for width in (5, 4))
    ids, weight = torch.arange(3 * length, device=DEVICE) % 3, torch.rand(3, device=DEVICE)
    return offsets, groups, x, g, ids, weight


def call_each(offsets, groups, x, g, ids, weight):
    segments = Segments(offsets, None, groups)
    return (
        *triton_kernels.outer_wgrad(x, g, segments, weight=weight),
        triton_kernels.outer_gram(x, g, segments),
        *triton_kernels.lookup_wgrad(ids, g, 3, segments, padding_idx=1),
        *triton_kernels.per_sample_wgrad(triton_kernels.segment_scale_grad(g, g, segments), segments),
        triton_kernels.segment_sum(g, segments),
        *triton_kernels.segment_std(g[:, 0], ids, 3, ddof=1),
        *triton_kernels.logit_scores(g, ids, ignore_index=2),
        *triton_kernels.logit_gradient_rates(g, ids, ignore_index=2),
    )


@pytest.mark.filterwarnings("ignore")  # Dynamo's, about itself
def test_a_compiled_graph_keeps_each_operation_as_one_call_for_every_length():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(call_each, fullgraph=True, backend=counter)
    for length in (4, 6, 7, 9):
        arguments = one_of_each(length)
        torch.testing.assert_close(compiled(*arguments), call_each(*arguments))
    assert counter.frame_count == 2  # one for the first length, one for any
    called = [str(node.target) for node in counter.graphs[-1].graph.nodes if "gradnorm_triton" in str(node.target)]
    names = (
        "outer_wgrad",
        "outer_gram",
        "lookup_wgrad",
        "segment_scale_grad",
        "per_sample_wgrad",
        "segment_sum",
        "segment_std",
    )
    assert called == [f"gradnorm_triton.{name}" for name in (*names, "logit_scores", "logit_gradient_rates")]
