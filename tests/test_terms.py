"""Every form of a use's gradient against the gradients that torch gives one segment at a time."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

import gradnorm_ext
from gradnorm_ext.gradients import (
    ChunkedOuter,
    ConvGrad,
    ExpertRouting,
    Geometry,
    GradientTerm,
    GroupedOuter,
    Lookup,
    Outer,
    PerSampleGrads,
    Pullback,
    ViewedTerm,
    combined_gram,
    combined_sqnorm,
    compress_tied_head,
    tied,
)
from gradnorm_ext.segments import Groups, Segments

BACKENDS = ("reference", "native")
EXACT = 1e3 * torch.finfo(torch.float64).eps
LENGTHS = {"equal": (2, 2, 2, 2), "ragged, one empty": (3, 0, 1, 4)}
GROUPS = [(torch.tensor([3, 0, 1, 0]), 4), (torch.tensor([1, 0, 1, 0]), 2)]  # group 2 of the finer level is empty
IN, OUT, EXPERTS = 5, 7, 3


def segments_of(lengths):
    groups = Groups.of(len(lengths), GROUPS)
    equal = len(set(lengths)) == 1
    return Segments.equal(4, lengths[0], groups) if equal else Segments.from_lengths(torch.tensor(lengths), groups)


def rows(count, width):
    return torch.randn(count, width, dtype=torch.float64)


class Columns:
    """An output gradient that is handed out three columns at a time."""

    def __init__(self, g):
        self.g = g

    def parts(self):
        for first in range(0, self.g.shape[1], 3):
            part = slice(first, min(first + 3, self.g.shape[1]))
            yield part, self.g[:, part]

    def columns(self, ids):
        return self.g[:, ids]

    @property
    def saved_tensors(self):
        return (self.g,)


def outer(segments, backend):
    x, g = rows(sum(segments.lengths), IN), rows(sum(segments.lengths), OUT)
    return Outer(x, g, segments, backend), lambda at: g[at].t() @ x[at]


def transposed(segments, backend):
    term, gradient = outer(segments, backend)
    return term.transposed(), lambda at: gradient(at).t()


def in_columns(segments, backend):
    term, gradient = outer(segments, backend)
    return ChunkedOuter(term.x, Columns(term.g), OUT, segments, backend), gradient


def lookup(segments, backend, padding_idx=None):
    ids, g = torch.randint(0, OUT, (sum(segments.lengths),)), rows(sum(segments.lengths), IN)

    def gradient(at):
        table = torch.zeros(OUT, IN, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(F.embedding(ids[at], table, padding_idx), table, g[at])[0]

    return Lookup(ids, g, OUT, padding_idx, segments, backend), gradient


def padded_lookup(segments, backend):
    return lookup(segments, backend, padding_idx=2)


def formed(segments, backend):
    _, gradient = outer(segments, backend)
    each = torch.stack([gradient(at) for at in places(segments)])
    of_row = torch.repeat_interleave(torch.arange(4), torch.tensor(segments.lengths))
    return PerSampleGrads(each, segments, backend), lambda at: each[of_row[at].unique()].sum(0)


def convolved(segments, backend):
    geometry = Geometry((2,), (1,), (1,), False, (0,), 1)
    weight = torch.zeros(OUT, IN, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(sum(segments.lengths), IN, 9, dtype=torch.float64)
    g = torch.randn(sum(segments.lengths), OUT, 5, dtype=torch.float64)

    def gradient(at):
        return torch.autograd.grad(torch.convolution(x[at], weight, None, *geometry), weight, g[at])[0]

    return ConvGrad(x, g, weight.shape, geometry, segments, backend), gradient


def routed(segments, backend):
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor(segments.lengths))
    expert = torch.arange(len(owner)) % EXPERTS
    order = (expert * 4 + owner).argsort(stable=True)
    x, g = rows(len(owner), IN), rows(len(owner), OUT)
    route = ExpertRouting.of(expert[order], owner[order], EXPERTS, segments.groups)

    def gradient(at):
        each = torch.einsum("ro,ri->roi", g[at], x[at])
        return each.new_zeros(EXPERTS, OUT, IN).index_add_(0, expert[at], each)

    return GroupedOuter(x[order], g[order], route, segments, backend), gradient


def pulled(segments, backend):
    term, gradient = outer(segments, backend)
    each = term.g.abs().sum(1)
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor(segments.lengths))

    def sizes():
        return each.new_zeros(4).index_add_(0, owner, each)

    return Pullback(term.grad, term.sqnorm, sizes, torch.zeros(OUT, IN, dtype=torch.float64), segments), gradient


FORMS = (outer, transposed, in_columns, lookup, padded_lookup, formed, convolved, routed, pulled)


def places(segments):
    ends = segments.offsets.tolist()
    return [torch.arange(first, last) for first, last in itertools.pairwise(ends)]


def each_of(segments, gradient):
    return torch.stack([gradient(at) for at in places(segments)]).detach()


def norms_of(each):
    parts = [each, *(summed(each, ids, count) for ids, count in GROUPS)]
    return torch.cat([part.flatten(1).square().sum(1) for part in parts])


def summed(each, ids, count):
    return each.new_zeros(count, *each.shape[1:]).index_add_(0, ids, each)


def close(found, expected):
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= EXACT * max(1.0, float(expected.norm()))


@pytest.fixture(params=LENGTHS)
def segments(request):
    torch.manual_seed(0)
    return segments_of(LENGTHS[request.param])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_gives_the_gradients_of_single_segments(form, segments, backend):
    term, gradient = form(segments, backend)
    each = each_of(segments, gradient)
    norms, of_groups = norms_of(each), summed(each, *GROUPS[-1])
    assert tuple(term.shape) == each.shape[1:] and term.group_shape == of_groups.shape
    close(term.sqnorm(), norms)
    close(term.per_segment(), each)
    for weight in (None, torch.tensor([2.0, -1.0, 0.5, 0.0], dtype=torch.float64)):
        total = each.sum(0) if weight is None else torch.tensordot(weight, each, 1)
        close(term.grad(weight), total)
        gradient, found = term.wgrad(weight)
        close(gradient, total)
        close(found, norms)
    out = torch.full(term.group_shape, torch.nan, dtype=torch.float64)
    for given in (None, out):
        found, sqnorm = term.per_group(given)
        close(found, of_groups)
        close(sqnorm, norms)
    close(out, of_groups)
    close(term.gram(), of_groups.flatten(1) @ of_groups.flatten(1).t())
    for members in ([0], [1], [0, 2], [1, 2, 3]):
        close(term.grad_of_segments(torch.tensor(members)), each[members].sum(0))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_scales_by_segment_as_its_fingerprint_says(form, segments):
    factor = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    term, _ = form(segments, "reference")
    fingerprint = term.row_abs_sums()
    assert term.expand_to_rows(factor).shape == fingerprint.shape
    of_segments = [float(fingerprint[term.expand_to_rows(torch.eye(4)[s]) == 1].sum()) for s in range(4)]
    assert of_segments[1] == 0 or segments.length is not None
    assert float((fingerprint * term.expand_to_rows(factor)).sum()) == pytest.approx(
        sum(f * size for f, size in zip(factor.tolist(), of_segments, strict=True))
    )


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_a_copy_has_memory_of_its_own(form, segments):
    term, _ = form(segments, "reference")
    norms = term.clone_saved()
    expected = term.sqnorm()
    for field in dataclasses.fields(term):
        value = getattr(term, field.name)
        if isinstance(value, torch.Tensor) and form not in (pulled, in_columns):
            value.zero_()
    close(norms.sqnorm(), expected)


def itself(gradient):
    return gradient


MATRICES = (outer, transposed, in_columns, lookup, padded_lookup, formed, pulled)  # of one parameter, [OUT, IN]


@pytest.mark.parametrize("second", MATRICES, ids=lambda form: form.__name__)
@pytest.mark.parametrize("first", MATRICES, ids=lambda form: form.__name__)
def test_any_two_forms_have_the_norms_and_inner_products_of_their_sum(first, second, segments):
    placed, each = [], 0
    for form in (first, second, first):
        term, gradient = form(segments, "native")
        turned = form is transposed
        placed.append(ViewedTerm(term, ("t",) if turned else (), torch.t if turned else itself))
        gradients = each_of(segments, gradient)
        each = each + (gradients.mT if turned else gradients)
    of_tasks = summed(each, *GROUPS[-1]).flatten(1)
    close(combined_sqnorm(placed), norms_of(each))
    close(combined_gram(placed), of_tasks @ of_tasks.t())


@pytest.fixture(params=["on the CPU", "where numbers are not looked at"])
def looks(request, monkeypatch):
    """How the compressed head goes about it: on a GPU, by sizes alone, in parts of few entries."""
    if request.param != "on the CPU":
        monkeypatch.setattr(tied, "_may_look_at", lambda tensor: False)
        monkeypatch.setattr(tied, "_HELD", 7)
        monkeypatch.setattr(tied, "_SHORT", 5)


@pytest.mark.usefixtures("looks")
@pytest.mark.parametrize("head", [outer, transposed, in_columns], ids=lambda form: form.__name__)
def test_a_compressed_head_meets_lookups_as_its_rows_do(head, segments):
    term, gradient = head(segments, "native")
    turned = head is transposed
    placed = ViewedTerm(term, ("t",) if turned else (), torch.t if turned else itself)
    lookups = [lookup(segments, "native"), padded_lookup(segments, "native")]
    head = compress_tied_head(placed, [(one.ids, one.segments) for one, _ in lookups], term.sqnorm())
    each = each_of(segments, gradient)
    each = (each.mT if turned else each) + sum(each_of(segments, one) for _, one in lookups)
    close(combined_sqnorm([head, *(ViewedTerm(one, (), itself) for one, _ in lookups)]), norms_of(each))


@pytest.mark.usefixtures("looks")
@pytest.mark.parametrize("wrong", ["x", "g of the head", "g of the lookup"])
def test_a_compressed_head_keeps_what_is_not_finite_to_its_groups(wrong, segments):
    torch.manual_seed(0)
    rows, row = sum(segments.lengths), 0  # of the first segment
    x, g, of_lookup = (torch.randn(rows, width, dtype=torch.float64) for width in (3, 5, 3))
    {"x": x, "g of the head": g, "g of the lookup": of_lookup}[wrong][row, 1] = torch.nan
    ids = torch.arange(rows) % 5
    outer = Outer(x, g, segments, "native")
    head = compress_tied_head(ViewedTerm(outer, (), itself), [(ids, segments)], outer.sqnorm())
    found = combined_sqnorm([head, ViewedTerm(Lookup(ids, of_lookup, 5, None, segments, "native"), (), itself)])
    wanted = [True] + [False] * (segments.count - 1)
    for level, count in zip(segments.groups.levels, segments.groups.counts, strict=True):
        wanted += [group == int(level[0]) for group in range(count)]
    assert found.isnan().tolist() == wanted


@pytest.mark.parametrize("form", [lookup, formed, convolved, routed, pulled], ids=lambda form: form.__name__)
def test_other_forms_are_not_compressed(form, segments):
    term, _ = form(segments, "native")
    lookups = [(torch.zeros(sum(segments.lengths), dtype=torch.int64), segments)]
    assert compress_tied_head(ViewedTerm(term, (), itself), lookups, term.sqnorm()) is None and not term.compresses


def test_every_form_is_tested():
    def forms(of):
        return {form for child in of.__subclasses__() for form in (child, *forms(child))}

    torch.manual_seed(0)
    assert forms(GradientTerm) == {type(form(segments_of(LENGTHS["equal"]), "reference")[0]) for form in FORMS}


def test_a_tied_heads_product_is_formed_once(monkeypatch):
    """The one product that gives the weight gradient gives the norms as well."""

    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(7, 5)

        def forward(self, ids):
            return torch.tanh(self.embed(ids)) @ self.embed.weight.t()

    model, ids, products = Tied().double(), torch.randint(0, 7, (3, 4)), []
    meter = gradnorm_ext.Meter(model)
    for block in range(2):
        if block == 1:  # the first verifies itself
            for name in ("sqnorm", "grad", "wgrad", "wgrad_in"):
                method = getattr(Outer, name)
                monkeypatch.setattr(
                    Outer,
                    name,
                    lambda self, *given, name=name, method=method: products.append(name) or method(self, *given),
                )
        model.zero_grad()
        with meter.observe():
            model(ids).square().sum().backward()
    assert [name for name in products if name != "wgrad"] == ["wgrad_in"]
    losses = model(ids).square().sum((1, 2))
    each = [torch.autograd.grad(loss, model.embed.weight, retain_graph=True)[0].norm() for loss in losses]
    torch.testing.assert_close(meter.stats.example_norm, torch.stack(each))
