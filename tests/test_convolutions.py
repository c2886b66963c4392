"""A convolution's gradient term against torch's own weight gradient, one example at a time, for any geometry."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from gradnorm_ext import Meter
from gradnorm_ext.gradients import ConvGrad, Geometry, PerSampleGrads, ViewedTerm, combined_sqnorm
from gradnorm_ext.segments import Groups, Segments

EXACT = 1e3 * torch.finfo(torch.float64).eps
BACKENDS = ("reference", "native")
small = st.integers(1, 3)


@st.composite
def convolutions(draw):
    """A `ConvGrad` of 1 to 3 dimensions, and the weight gradient of each of its images by torch."""
    n = draw(small)
    sizes = st.tuples(*[small] * n)
    kernel, stride, dilation, positions = (draw(sizes) for _ in range(4))
    transposed, groups = draw(st.booleans()), draw(small)
    channels, inner = draw(st.sampled_from([1, 2, 9])) * groups, draw(small)
    padding = tuple(draw(st.integers(0, d * (k - 1))) for d, k in zip(dilation, kernel, strict=True))
    more = tuple(
        draw(st.integers(0, max(s, d) - 1)) if transposed else 0 for s, d in zip(stride, dilation, strict=True)
    )
    geometry = Geometry(stride, padding, dilation, transposed, more, groups)
    lengths = draw(st.sampled_from([(1, 1, 1, 1), (2, 2, 2, 2), (3, 1, 0, 2)]))
    weight = torch.randn(channels, inner, *kernel, dtype=torch.float64, requires_grad=True)
    rows = zip(positions, stride, padding, dilation, kernel, strict=True)
    size = tuple((q - 1) * s + d * (k - 1) + 1 - 2 * p for q, s, p, d, k in rows)  # what so many positions see
    if transposed:
        assume(all(whole + one > 0 for whole, one in zip(size, more, strict=True)))
        size = positions
    else:
        assume(all(whole > 0 for whole in size))
        size = tuple(whole + draw(st.integers(0, 1)) for whole in size)  # and perhaps an entry that nothing sees
    x = torch.randn(sum(lengths), channels if transposed else inner * groups, *size, dtype=torch.float64)
    g, gradients = [], []
    for image in x.split(1):
        y = torch.convolution(image, weight, None, *geometry)
        g.append(torch.randn_like(y))
        gradients.append(torch.autograd.grad(y, weight, g[-1])[0])
    segments = Segments.from_lengths(torch.tensor(lengths), groups_of_four())
    if len(set(lengths)) == 1:
        segments = Segments.equal(4, lengths[0], groups_of_four())
    of_examples = torch.stack([sum(part, torch.zeros_like(weight)) for part in _split(gradients, lengths)])
    backend = draw(st.sampled_from(BACKENDS))
    return ConvGrad(x, torch.cat(g), weight.shape, geometry, segments, backend), of_examples.detach()


def groups_of_four():
    return Groups.of(4, [(torch.tensor([2, 0, 1, 0]), 3), (torch.tensor([0, 1, 0, 1]), 3)])


def _split(gradients, lengths):
    parts = iter(gradients)
    return [[next(parts) for _ in range(length)] for length in lengths]


def norms(of_examples, groups):
    flat = of_examples.flatten(1)
    parts = [flat.square().sum(1)]
    for ids, count in zip(groups.levels, groups.counts, strict=True):
        parts.append(torch.stack([flat[ids == k].sum(0).square().sum() for k in range(count)]))
    return torch.cat(parts)


def close(found, expected):
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= EXACT * max(1.0, float(expected.norm()))


@pytest.mark.parametrize(("held", "unfolded"), [(1 << 24, 1 << 18), (60, 60), (1, 1)])
def test_equals_the_gradients_of_single_examples(held, unfolded):
    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(convolutions())
    def check(case):
        convolved, of_examples = case
        object.__setattr__(convolved, "held", held)
        object.__setattr__(convolved, "unfolded", unfolded)
        expected, weight = (
            norms(of_examples, groups_of_four()),
            torch.tensor([2.0, -1.0, 0.5, 3.0], dtype=torch.float64),
        )
        close(convolved.sqnorm(), expected)
        for of in (None, weight):
            total = torch.tensordot(torch.ones(4, dtype=torch.float64) if of is None else of, of_examples, 1)
            found, sqnorm = convolved.wgrad(of)
            close(found, total)
            close(sqnorm, expected)
            close(convolved.grad(of), total)
        out = torch.full((3, *of_examples.shape[1:]), torch.nan, dtype=torch.float64)
        close(convolved.per_group(out)[1], expected)
        ids = groups_of_four().levels[-1]
        close(out, torch.stack([of_examples[ids == k].sum(0) for k in range(3)]))
        close(convolved.grad_of_segments(torch.tensor([1, 3])), of_examples[[1, 3]].sum(0))
        sums = PerSampleGrads(of_examples * 0.5, convolved.segments, convolved.backend)
        uses = [ViewedTerm(one, (), lambda gradient: gradient) for one in (convolved, sums, convolved)]
        close(combined_sqnorm(uses), norms(2.5 * of_examples, groups_of_four()))

    torch.manual_seed(0)
    check()


def test_small_gradients_are_formed_at_once_and_large_ones_are_not():
    def term(channels, size):
        x = torch.randn(2, 3, size)
        g = torch.randn(2, channels, size - 2)
        geometry = Geometry((1,), (0,), (1,), False, (0,), 1)
        return ConvGrad(x, g, torch.Size((channels, 3, 3)), geometry, Segments.equal(2, 1), "native").compact()

    assert isinstance(term(4, 20), PerSampleGrads)
    large = term(64, 5)
    assert isinstance(large, ConvGrad) and [tensor.shape for tensor in large.saved_tensors] == [(2, 3, 5), (2, 64, 3)]


def test_an_input_without_a_batch_dimension_is_refused():
    model = nn.Conv1d(4, 2, 3)
    with (
        pytest.raises(RuntimeError, match=r"no rule for conv1d \(of an input without a batch dimension\) of weight"),
        Meter(model).observe(),
    ):
        model(torch.randn(4, 9)).sum().backward()
    meter = Meter(model)
    with meter.observe():
        model(torch.randn(4, 4, 9)).sum().backward()
    assert meter.stats.example_norm.shape == (4,)


class Padded(nn.Conv1d):
    """Hands its options on to torch as they are."""

    def __init__(self, **options):
        super().__init__(2, 2, 3)
        self.options = options

    def forward(self, x):
        return nn.functional.conv1d(x, self.weight, self.bias, **self.options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"padding": "most"}, "Invalid padding string"), ({"padding": "same", "stride": 2}, "not supported for strided")],
)
def test_what_torch_refuses_is_refused_by_torch(options, message):
    model = Padded(**options)
    with pytest.raises(RuntimeError, match=message), Meter(model).observe():
        model(torch.randn(2, 2, 9))
