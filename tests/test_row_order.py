"""Rows belong to examples as the caller numbers them: zeros prove nothing, models reorder, the data decide owners."""

import dataclasses

import oracle
import pytest
import right_or_refused
import torch
import torch.nn.functional as F
from torch import nn

from gradnorm_ext import InverseNorm, Meter, check

EXACT = 1e3 * torch.finfo(torch.float64).eps


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def norms_of(model, losses):
    """Autograd, one example at a time."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        found.append(torch.cat([gradient.flatten() for gradient in gradients]).norm())
    return torch.stack(found)


class Observer:
    """A Meter, or a Reweighted in one of its modes, over several blocks."""

    def __init__(self, model, way, **options):
        self.model = model
        self.observer = right_or_refused.observer_of(model, way, InverseNorm(), **options)
        self.meter = self.observer if way == "Meter" else self.observer.meter

    def block(self, losses_of, **given):
        """The norms that a block measures."""
        self.model.zero_grad()
        right_or_refused.block(self.observer, losses_of, **given)
        return self.observer.stats.example_norm

    def agrees(self, losses_of, **given):
        expected = norms_of(self.model, losses_of())
        found = self.block(losses_of, **given)
        scale = expected.max().clamp(min=1)
        return float((found - expected).abs().max() / scale) < EXACT


# A zero proves nothing


class LowRank(nn.Module):
    def __init__(self, width=4, rank=2):
        super().__init__()
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.frozen(x) + self.up(self.down(x))


class SequenceFirstInside(nn.Module):
    """Batch-first outside, sequence-first inside, as many positions as examples."""

    def __init__(self):
        super().__init__()
        self.first, self.second = LowRank(), LowRank()

    def forward(self, x):
        h = torch.tanh(self.first(x.transpose(0, 1))).cumsum(0)
        return self.second(h).transpose(0, 1)


class ZeroHead(nn.Module):
    def __init__(self, mixes):
        super().__init__()
        self.body, self.head, self.mixes = nn.Linear(4, 4), nn.Linear(4, 2), mixes
        nn.init.zeros_(self.head.weight)

    def forward(self, x):
        h = self.body(x)
        return self.head(torch.tanh(h - h.mean(0, keepdim=True) if self.mixes else h))


@pytest.mark.parametrize("way", right_or_refused.MODES)
def test_fresh_adapters_are_measured_right_from_the_first_block_on(way):
    model = SequenceFirstInside()
    observer = Observer(model, way)
    for block in range(11):
        x = torch.randn(4, 4, 4)
        assert observer.agrees(lambda x=x: model(x).square().flatten(1).sum(1)), block
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * torch.randn_like(p) * p.requires_grad


@pytest.mark.parametrize("way", right_or_refused.MODES)
def test_what_a_zero_head_hid_is_tested_in_the_next_block(way):
    for mixes in (False, True):
        model, x = ZeroHead(mixes), torch.randn(4, 4)
        observer = Observer(model, way)

        def losses(model=model, x=x):
            return (model(x) - 1).square().sum(1)

        observer.block(losses)
        assert not any(name == "body.weight" for name, *_ in observer.meter.memory.verified)
        nn.init.normal_(model.head.weight)
        if mixes:
            with pytest.raises(RuntimeError, match="do not belong to one example each"):
                observer.block(losses)
        else:
            assert observer.agrees(losses)


class FlatHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 5), nn.Linear(5, 9)

    def forward(self, ids):
        return self.head(self.embed(ids).flatten(0, 1)).view(*ids.shape, 9)


@pytest.mark.parametrize("way", right_or_refused.MODES)
@pytest.mark.parametrize("zero", [0, 1, 9])
def test_a_block_without_any_gradient_is_no_error_and_no_proof(way, zero):
    model = FlatHead()
    observer = Observer(model, way)
    for block in range(11):
        ids = torch.randint(0, 9, (4, 6))
        advantage = torch.zeros(4) if block == zero else torch.randn(4)

        def losses(ids=ids, advantage=advantage):
            return F.cross_entropy(model(ids).transpose(1, 2), ids.roll(1, 1), reduction="none").mean(1) * advantage

        assert observer.agrees(losses), block
        assert bool(observer.meter.memory.verified) == (block > 0 or zero != 0)


def test_one_example_alone_proves_nothing():
    model = FlatHead()
    meter, ids = Meter(model), torch.randint(0, 9, (4, 6))
    with meter.observe():
        model(ids)[2].square().sum().backward()
    assert not meter.memory.verified and meter.memory.unverified
    with meter.observe():
        model(ids)[1:3].square().sum().backward()
    assert meter.memory.verified and not meter.memory.unverified


# The order outside

ORDERS = {
    "sorted by length": lambda lengths: lengths.argsort(descending=True),
    "reversed": lambda lengths: torch.arange(len(lengths)).flip(0),
    "moved by one": lambda lengths: torch.arange(len(lengths)).roll(1),
    "grouped": lambda lengths: torch.argsort(lengths % 2, stable=True),
}


@dataclasses.dataclass
class Output:
    loss: torch.Tensor
    hidden: tuple[torch.Tensor, ...]
    logits: torch.Tensor


class Reordering(nn.Module):
    """Runs its layers on the batch in another order and gives the results back in the caller's."""

    def __init__(self, kind, order, back=True, returns="tensor"):
        super().__init__()
        self.kind, self.order, self.back, self.returns = kind, order, back, returns
        if kind == "tokens":
            self.enter = nn.Embedding(9, 5)
        elif kind == "images":
            self.enter = nn.Conv1d(6, 5, 1)
        else:
            self.enter = nn.Linear(6, 5)
        self.norm, self.inner, self.head = nn.LayerNorm(5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x, lengths):
        order = self.order(lengths)
        x = x[order]
        if self.kind == "tokens":
            h = self.enter(x).mean(1)
        elif self.kind == "images":
            h = self.enter(x.transpose(1, 2)).mean(2)
        else:
            h = self.enter(x).mean(1)
        h = self.head(torch.tanh(self.inner(self.norm(h))))
        h = h[order.argsort()] if self.back else h
        loss = h.square().sum()
        if self.returns == "dataclass":
            return Output(loss, (h,), h)
        return {"tensor": h, "tuple": (loss, h), "dict": {"loss": loss, "logits": h}, "scalar": loss}[self.returns]


def batch_of(kind):
    lengths = torch.tensor([2, 5, 3, 6, 1])
    return (torch.randint(0, 9, (5, 6)) if kind == "tokens" else torch.randn(5, 4, 6)), lengths


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["tokens", "images", "rows"])
@pytest.mark.parametrize("returns", ["tensor", "tuple", "dict", "dataclass"])
def test_a_batch_that_is_reordered_inside_is_refused(order, kind, returns):
    model, given = Reordering(kind, ORDERS[order], returns=returns), batch_of(kind)

    def logits():
        found = model(*given)
        return {
            "tensor": lambda: found,
            "tuple": lambda: found[1],
            "dict": lambda: found["logits"],
            "dataclass": lambda: found.logits,
        }[returns]()

    with pytest.raises(RuntimeError, match="in an order of the model's own"), Meter(model).observe():
        logits().square().sum().backward()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["tokens", "images", "rows"])
def test_rows_in_the_models_own_order_are_refused(order, kind):
    model, given = Reordering(kind, ORDERS[order], back=False), batch_of(kind)
    with pytest.raises(RuntimeError, match="in an order of the model's own"), Meter(model).observe():
        model(*given).square().sum().backward()
    model, given = Reordering(kind, ORDERS[order], returns="scalar"), batch_of(kind)
    with pytest.raises(RuntimeError, match="in an order of the model's own"), Meter(model).observe():
        model(*given).backward()


def test_a_batch_that_happens_to_be_in_order_is_refused_as_well():
    """Sorted already: every test passes, and the next batch would be wrong."""
    model, (x, _) = Reordering("tokens", ORDERS["sorted by length"]), batch_of("tokens")
    lengths = torch.tensor([6, 5, 3, 2, 1])
    with pytest.raises(RuntimeError, match="in an order of the model's own"), Meter(model).observe():
        model(x, lengths).square().sum().backward()


class SortedBetween(nn.Module):
    """Activations in another order for one layer."""

    def __init__(self):
        super().__init__()
        self.enter, self.inner, self.head = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x, lengths):
        order = lengths.argsort(descending=True)
        h = torch.tanh(self.inner(torch.tanh(self.enter(x))[order]))
        return self.head(h[order.argsort()])


@pytest.mark.parametrize("way", right_or_refused.MODES)
@pytest.mark.parametrize("shape", [(4, 3), (4, 6, 3), (4, 4, 3)])
def test_activations_in_another_order_are_followed_in_every_block(way, shape):
    model = SortedBetween()
    observer = Observer(model, way)
    for lengths in ([6, 5, 3, 2], [1, 6, 2, 4], [2, 3, 4, 5]):  # in order at first

        def losses(lengths=lengths, x=torch.randn(shape)):  # noqa: B008
            return model(x, torch.tensor(lengths)).square().flatten(1).sum(1)

        assert observer.agrees(losses), lengths


class OutOfSight(nn.Module):
    """Reorders where no function of torch is called, in some blocks."""

    def __init__(self, returns):
        super().__init__()
        self.enter, self.head, self.returns = nn.Linear(3, 5), nn.Linear(5, 2), returns

    def forward(self, x, order=None):
        if order is not None:
            x = torch.from_numpy(x.numpy()[order.numpy()])
        h = self.head(torch.tanh(self.enter(x)))
        h = h if order is None else h[order.argsort()]
        return h.square().sum() if self.returns == "loss" else h


@pytest.mark.parametrize("returns", ["loss", "outputs"])
def test_an_order_that_nothing_tells_is_refused(returns):
    model, x, order = OutOfSight(returns), torch.randn(4, 3), torch.tensor([2, 0, 3, 1])
    with (
        pytest.raises(RuntimeError, match="nothing shows that its rows are in the caller's order"),
        Meter(model).observe(),
    ):
        model(x, order).square().sum().backward()


@pytest.mark.parametrize("returns", ["loss", "outputs"])
def test_rows_from_elsewhere_than_before_are_tested_anew(returns):
    model, x, order = OutOfSight(returns), torch.randn(4, 3), torch.tensor([2, 0, 3, 1])
    meter = Meter(model)
    for _ in range(3):
        with meter.observe():
            model(x).square().sum().backward()
    with pytest.raises(RuntimeError, match=r"in the caller.s order|as the data say"), meter.observe():
        model(x, order).square().sum().backward()


def test_more_uses_than_before_are_tested():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.inner = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x, again):
            h = torch.tanh(self.inner(torch.tanh(self.enter(x))))
            return h + torch.tanh(self.inner(h - h.mean(0))) if again else h

    model, x = Twice(), torch.randn(4, 3)
    meter = Meter(model)
    with meter.observe():
        model(x, False).square().sum().backward()
    with pytest.raises(RuntimeError, match="do not belong to one example each"), meter.observe():
        model(x, True).square().sum().backward()


def test_places_of_rows_are_not_rows_themselves():
    class Ranked(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(4, 3)

        def forward(self, lengths):
            return self.embed(lengths.argsort()).square().sum()

    model = Ranked()
    with pytest.raises(RuntimeError, match="in an order of the model's own"), Meter(model).observe():
        model(torch.tensor([2, 5, 3, 6])).backward()


def test_the_models_parts_may_be_called_one_by_one():
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(3, 5), nn.Tanh()), "head": nn.Linear(5, 2)})
    observer, x = Observer(model, "Meter"), torch.randn(4, 3)
    assert observer.agrees(lambda: model["head"](model["body"](x)).square().sum(1))


class Methods(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.head = nn.Linear(3, 5), nn.Linear(5, 2)

    def encode(self, x, order):
        return self.head(torch.tanh(self.enter(x[order])))[order.argsort()]


def test_calls_from_inside_of_a_method_are_not_the_callers():
    model, x = Methods(), torch.randn(4, 3)
    with (
        pytest.raises(RuntimeError, match="nothing shows that its rows are in the caller's order"),
        Meter(model).observe(),
    ):
        model.encode(x, torch.tensor([2, 0, 3, 1])).square().sum().backward()


def test_arguments_may_be_changed_row_by_row_before_they_are_used():
    class Prepared(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.lift, self.head = nn.Embedding(9, 5), nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, ids, x):
            ids = (ids + 1).remainder(9).clamp(min=1)
            x = ((x - x.mean(1, keepdim=True)) / 2).float().double()
            return (self.head(torch.tanh(self.embed(ids).mean(1) + self.lift(x)))).square().sum()

    model, ids, x = Prepared(), torch.randint(0, 9, (4, 3)), torch.randn(4, 6)
    meter = Meter(model)
    with meter.observe():
        model(ids, x).backward()
    expected = norms_of(model, [model(ids[i : i + 1], x[i : i + 1]) for i in range(4)])
    assert oracle.relative(meter.stats.example_norm, expected) < EXACT


# Owners that the data decide


class Pictures(nn.Module):
    """Pictures' features take the places of tokens."""

    def __init__(self, put="masked_scatter"):
        super().__init__()
        self.tower, self.project = nn.Linear(6, 5), nn.Linear(5, 5)
        self.embed, self.head, self.put = nn.Embedding(9, 5), nn.Linear(5, 9), put

    def forward(self, ids, images):
        h, found, mask = self.embed(ids), self.project(torch.tanh(self.tower(images))), ids == 8
        if self.put == "masked_scatter":
            h = h.masked_scatter(mask[..., None].expand_as(h), found)
        elif self.put == "index_put":
            h = h.index_put((mask,), found)
        else:
            h = h.flatten(0, 1).index_copy(0, mask.flatten().nonzero()[:, 0], found).view_as(h)
        return self.head(h.cumsum(1))


def pictures(counts):
    ids, owners = torch.randint(0, 8, (4, 5)), []
    for example, count in enumerate(counts):
        ids[example, :count] = 8
        owners += [example] * count
    return ids, torch.randn(len(owners), 6), torch.tensor(owners)


def token_losses(model, ids, images):
    return F.cross_entropy(model(ids, images).transpose(1, 2), ids.roll(1, 1), reduction="none").sum(1)


PUTS = ("masked_scatter", "index_put", "index_copy")


@pytest.mark.parametrize("put", PUTS)
def test_as_many_pictures_as_examples_are_refused(put):
    model, (ids, images, _) = Pictures(put), pictures([1, 1, 1, 1])
    with pytest.raises(RuntimeError, match=r"the rows of tower.weight .* as the data say"), Meter(model).observe():
        token_losses(model, ids, images).sum().backward()


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("put", PUTS)
@pytest.mark.parametrize("way", right_or_refused.MODES)
def test_pictures_whose_examples_are_told_are_measured(way, put, named):
    model = Pictures(put)
    observer = Observer(model, way)
    for counts in ([1, 1, 1, 1], [2, 0, 1, 1], [2, 2, 1, 0], [0, 0, 4, 0], [3, 1, 2, 2], [1, 0, 1, 2]):
        ids, images, owners = pictures(counts)
        kinds = {"images": owners} if named else [owners]
        assert observer.agrees(lambda ids=ids, images=images: token_losses(model, ids, images), example_ids=kinds), (
            counts
        )


class Graphs(nn.Module):
    """Nodes and edges: the examples are graphs."""

    def __init__(self):
        super().__init__()
        self.node, self.edge, self.head = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 2)

    def forward(self, nodes, edges, index, graph):
        h = torch.tanh(self.node(nodes))
        sent = torch.tanh(self.edge(edges)) * h[index[0]]
        h = h.index_add(0, index[1], sent)
        return self.head(h.new_zeros(int(graph.max()) + 1, 4).index_add(0, graph, h))


def test_nodes_and_edges_are_two_kinds_of_rows():
    model = Graphs()
    observer = Observer(model, "Meter")
    for sizes in ([3, 2, 4], [2, 2, 2], [1, 5, 3]):
        graph = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
        pairs = [(i, j) for i in range(len(graph)) for j in range(len(graph)) if graph[i] == graph[j]][1:]
        index = torch.tensor(pairs).T
        nodes, edges = torch.randn(len(graph), 3), torch.randn(len(pairs), 2)
        given = {"nodes": graph, "edges": graph[index[0]]}

        def losses(nodes=nodes, edges=edges, index=index, graph=graph):
            return model(nodes, edges, index, graph).square().sum(1)

        assert observer.agrees(losses, tasks=[0, 0, 0], example_ids=given), sizes


def test_an_experts_rows_may_be_others_in_every_block():
    class Chosen(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.experts, self.head = nn.ModuleList(nn.Linear(6, 6) for _ in range(2)), nn.Linear(6, 2)

        def forward(self, x, chosen):
            h = torch.tanh(self.first(x))
            out = torch.zeros_like(h)
            for e, expert in enumerate(self.experts):
                out[chosen == e] = expert(h[chosen == e])
            return self.head(out)

    model, x = Chosen(), torch.randn(4, 7, 6)
    observer = Observer(model, "Meter")
    for _ in range(3):
        chosen = torch.randint(0, 2, (4, 7))
        assert observer.agrees(lambda chosen=chosen: model(x, chosen).square().flatten(1).sum(1))


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ([torch.tensor([0, 4])], "example ids must lie in [0, 4), got [0, 4] for 0"),
        ({"images": [0, -1]}, "example ids must lie in [0, 4), got [-1, 0] for images"),
        ([torch.tensor([0, 1]), torch.tensor([1, 2])], "kinds of rows are told apart by their numbers, got [2, 2]"),
        ({"images": torch.tensor([0.5])}, "example_ids['images'] must be integers"),
    ],
)
def test_kinds_of_rows_must_make_sense(kinds, message):
    import re

    with (
        pytest.raises((ValueError, TypeError), match=re.escape(message)),
        Meter(nn.Linear(3, 2)).observe(tasks=[0, 0, 0, 0], example_ids=kinds),
    ):
        pass


# Uses that only the loss follows


class Gaussian(nn.Module):
    """A policy with a deviation of its own, which returns its loss alone, or its losses one by one."""

    def __init__(self, returns):
        super().__init__()
        self.mean, self.log_std, self.returns = nn.Linear(5, 3), nn.Parameter(torch.rand(3)), returns

    def forward(self, x):
        mean = self.mean(x)
        std = torch.ones_like(mean) * self.log_std.exp()
        losses = ((x[:, :3] - mean) ** 2 / std + std.log()).sum(1)
        return {"losses": losses, "both": (mean, std), "sum": losses.sum()}[self.returns]


@pytest.mark.parametrize("way", right_or_refused.MODES)
def test_a_deviation_that_only_the_loss_sees_is_measured(way):
    for returns in ("losses", "both"):
        model, x = Gaussian(returns), torch.randn(4, 5)
        observer = Observer(model, way)

        def losses(model=model, x=x, returns=returns):
            found = model(x)
            return found if returns == "losses" else (found[0].square() + found[1]).sum(1)

        assert observer.agrees(losses)


def test_what_nothing_ties_to_the_caller_is_not_called_wrong_and_may_be_told():
    model, x = Gaussian("sum"), torch.randn(4, 5)
    meter = Meter(model)
    with pytest.raises(RuntimeError, match=r"of log_std .* nothing shows that its rows .*rows_of"), meter.observe():
        model(x).backward()
    with meter.observe():
        (0 * model(x)).backward()  # a zero is no one's
    assert float(meter.stats.example_norm.max()) == 0 and meter.memory.unverified
    model.zero_grad()
    for rows_of in ({"log_std": [0, 1, 2, 3]}, {"log_std": torch.arange(4)}):
        with meter.observe(rows_of=rows_of):
            model(x).backward()
        expected = norms_of(model, [model(x[i : i + 1]) for i in range(4)])
        assert oracle.relative(meter.stats.example_norm, expected) < EXACT
    with (
        pytest.raises(ValueError, match=r"one example for each row of log_std, got 3"),
        meter.observe(rows_of={"log_std": [0, 1, 2]}),
    ):
        model(x).backward()
    with (
        pytest.raises(ValueError, match="rows_of must name parameters or modules"),
        meter.observe(rows_of={"std": [0]}),
    ):
        model(x).backward()


def test_check_says_what_proved_the_rows():
    found = check(ZeroHead(False), lambda y: (y - 1).square().sum(), torch.randn(4, 4))
    assert found.unproven == ["body.weight", "body.bias"] and not found.differing
    assert "its gradient is zero" in found.evidence["body.weight"][0]
    assert "a test from what the model returned" in found.evidence["head.weight"][0]
    ids, images, owners = pictures([2, 0, 1, 0])
    found = check(Pictures(), lambda y: y.square().sum(), ids, images, tasks=[0] * 4, example_ids=[owners])
    assert not found.unproven and not found.differing
