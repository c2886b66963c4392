"""What only a GPU can show of the Triton kernels: sizes, CUDA graphs, waiting, memory. `test_triton` runs there as well."""

import gc

import pytest
import torch
from test_ops import assert_as_good_as_plain, outer_per_segment, truth
from test_triton import call_each, nested, one_of_each

from gradnorm_ext import ops
from gradnorm_ext.segments import Groups, Segments

triton_kernels = pytest.importorskip("gradnorm_ext.triton_kernels")  # triton is optional

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def library(x, g):
    """Plain torch in the same dtype and precision, with sums in float32."""
    return torch.mm(g.t(), x) if x.dtype == torch.float32 else torch.mm(g.t(), x, out_dtype=torch.float32)


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "ieee", "tf32"])
@pytest.mark.parametrize("lengths", [[512] * 6, [700, 1, 0, 129, 64, 1000]], ids=["equal", "ragged"])
@pytest.mark.parametrize("method", ["gram", "fused", "split", "auto"])
def test_outer_at_the_size_of_a_layer(method, lengths, precision, monkeypatch):
    if precision in ("ieee", "tf32"):
        monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", precision)
    dtype = getattr(torch, precision, torch.float32)
    segments = nested(lengths, 2)
    if method == "split" and segments.length is None:
        method = "fused"
    x, g = (torch.randn(sum(lengths), width, device="cuda").to(dtype) for width in (768, 1100))
    exact = outer_per_segment(x.double(), g.double(), segments)
    size = outer_per_segment(x.double().abs(), g.double().abs(), segments)
    plain = torch.stack([library(*rows) for rows in zip(x.split(lengths), g.split(lengths), strict=True)])
    norms = [truth(tensor, segments) for tensor in (plain, exact, size)]
    for options in ({}, {"weight": torch.rand(len(lengths), device="cuda")}):
        weight = options.get("weight", torch.ones(len(lengths), device="cuda"))
        dw, sqnorm = triton_kernels.outer_wgrad(x, g, segments, method=method, **options)
        assert_as_good_as_plain(dw, *(torch.tensordot(weight.to(t), t, 1) for t in (plain, exact, size)))
        assert_as_good_as_plain(sqnorm, *norms)


@pytest.mark.parametrize("method", ["gram", "fused"])
def test_nan_in_the_rows_of_a_neighbour_stays_there(method):
    segments = Segments.from_lengths(torch.tensor([65, 127, 1, 200], device="cuda"))
    x, g = (torch.randn(393, width, device="cuda").bfloat16() for width in (256, 256))
    x[65:192] = g[65:192] = torch.nan
    assert triton_kernels.outer_sqnorm(x, g, segments, method=method).isnan().tolist() == [False, True, False, False]


def test_every_operation_can_be_captured_in_a_cuda_graph():
    arguments = one_of_each(70)
    call_each(*arguments)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call_each(*arguments)
    for rows in arguments[2:4]:
        rows.normal_()
    graph.replay()
    for one, other in zip(found, call_each(*arguments), strict=True):
        assert one.equal(other)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # that it does not see everything
def test_no_operation_waits_for_the_device():
    arguments = one_of_each(70)
    call_each(*arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call_each(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_rows_of_more_than_2_to_the_31_entries():
    rows, width = 600_000, 4096
    g = torch.zeros(rows, width, device="cuda", dtype=torch.bfloat16)
    g[-3:] = 1
    segments = Segments.from_lengths(torch.tensor([rows - 2, 2], device="cuda"))
    assert ops.segment_sum(g, segments)[:, 5].tolist() == [1, 2]
    expected = [16.0 * width, 4 * 16.0 * width]
    for method in ("gram", "fused"):
        if method == "gram":  # pairs of 600 000 rows would take long
            segments = Segments.from_lengths(torch.cat([torch.full((4687,), 128), torch.tensor([62, 2])]).cuda())
        assert triton_kernels.outer_sqnorm(g, g[:, :16], segments, method=method)[-2:].tolist() == expected


def test_a_hundred_thousand_segments():
    segments = Segments.equal(100_000, 3, Groups.of(100_000, device="cuda"), "cuda")
    x, g = (torch.randn(300_000, width, device="cuda") for width in (8, 16))
    per_segment = torch.bmm(g.view(-1, 3, 16).transpose(1, 2).double(), x.view(-1, 3, 8).double())
    expected = per_segment.square().sum((1, 2)).float()
    torch.testing.assert_close(ops.outer_sqnorm(x, g, segments), expected)
    torch.testing.assert_close(ops.segment_sum(g, segments), g.view(-1, 3, 16).sum(1))
    ids = torch.randint(0, 5, (300_000,), device="cuda")
    expected = ops.lookup_sqnorm(ids, g, 5, segments, backend="reference")
    torch.testing.assert_close(ops.lookup_sqnorm(ids, g, 5, segments), expected)


@pytest.mark.parametrize("method", ["gram", "fused"])
def test_memory_does_not_grow_with_the_examples(method):
    x, g = (torch.randn(16384, 4096, device="cuda").bfloat16() for _ in range(2))
    segments = Segments.equal(64, 256, device="cuda")
    out = torch.empty(4096, 4096, device="cuda")
    triton_kernels.outer_wgrad(x, g, segments, out=out, method=method)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    triton_kernels.outer_wgrad(x, g, segments, out=out, method=method)
    assert torch.cuda.max_memory_allocated() - before < 2**21  # partial norms: a number for each segment and tile
