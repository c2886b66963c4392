"""Models drawn at random that move the batch about inside, against autograd one example at a time: right or refused.

They sort, shuffle, group, select and alias their rows, begin with zeros, and have as many positions as examples; keys that
decide the order change from block to block, and so do the parameters. `pytest tests/test_fuzz_order.py
--hypothesis-profile=thorough` draws 2,000 of them.
"""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

from gradnorm_ext import Meter

EXACT = 1e3 * torch.finfo(torch.float64).eps


class Shared(nn.Module):
    """Two linear layers with one weight, as a module or as a tensor."""

    def __init__(self, width, alias):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.alias = alias
        if not alias:
            self.second.weight = self.first.weight

    def forward(self, h):
        h = torch.tanh(self.first(h))
        return nn.functional.linear(h, self.first.weight[:].t()) if self.alias else self.second(h)


class Free(nn.Module):
    """A parameter that meets the activations by itself."""

    def __init__(self, shape, function):
        super().__init__()
        self.free, self.function = nn.Parameter(torch.randn(shape)), function

    def forward(self, h):
        return self.function(h, self.free)


class Adapter(nn.Module):
    """Beside the identity, a product of two layers of which the last begins at zero."""

    def __init__(self, width):
        super().__init__()
        self.down, self.up = nn.Linear(width, 2, bias=False), nn.Linear(2, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, h):
        return h + self.up(self.down(h))


def zero(layer):
    return nn.init.zeros_(layer.weight) is None or layer


ROWWISE = {
    "linear": lambda d: nn.Linear(d, d),
    "no bias": lambda d: nn.Linear(d, d, bias=False),
    "layer norm": lambda d: nn.LayerNorm(d),
    "rms norm": lambda d: nn.RMSNorm(d),
    "scale": lambda d: Free((d,), lambda h, w: h * w),
    "shift": lambda d: Free((d,), lambda h, w: h + w),
    "gate": lambda d: Free((), lambda h, w: w * h),
    "product": lambda d: Free((d, d), lambda h, w: h @ w),
    "zero": lambda d: nn.Sequential(nn.Linear(d, d), nn.Tanh(), zero(nn.Linear(d, d))),
    "zero scale": lambda d: Free((d,), lambda h, w: h + h * (w - w.detach())),
    "adapter": Adapter,
    "tied": lambda d: Shared(d, False),
    "aliased": lambda d: Shared(d, True),
    "mlp": lambda d: nn.Sequential(nn.Linear(d, d), nn.Tanh(), nn.Linear(d, d)),
}


def by_sorting(inner, h, key):
    order = key.argsort(descending=True, stable=True)
    return inner(h[order])[order.argsort()]


def by_index_select(inner, h, key):
    order = key.argsort(stable=True)
    return torch.empty_like(h).index_copy(0, order, inner(h.index_select(0, order)))


def by_gather(inner, h, key):
    order = key.argsort(stable=True)[:, None, None].expand_as(h)
    return torch.zeros_like(h).scatter(0, order, inner(h.gather(0, order)))


def by_flipping(inner, h, key):
    return inner(h.flip(0)).flip(0)


def by_rolling(inner, h, key):
    return inner(h.roll(1, 0)).roll(-1, 0)


def by_halves(inner, h, key):
    half = len(h) // 2
    return torch.cat([inner(h[half:]), inner(h[:half])])[torch.arange(len(h)).roll(half)]


def by_swapped_halves(inner, h, key):
    half = len(h) // 2
    return inner(torch.cat([h[half:], h[:half]])).roll(half, 0)


def by_group(inner, h, key):
    out = torch.zeros_like(h)
    for group in key.unique():
        out[key == group] = inner(h[key == group])
    return out


def by_group_joined(inner, h, key):
    groups = [(key == group).nonzero()[:, 0] for group in key.unique()]
    return torch.cat([inner(h[rows]) for rows in groups])[torch.cat(groups).argsort()]


def by_selected_examples(inner, h, key):
    chosen = key % 2 == 0
    return h + torch.zeros_like(h).index_put((chosen.nonzero()[:, 0],), inner(h[chosen]))


def by_selected_tokens(inner, h, key):
    chosen = (key[:, None] + torch.arange(h.shape[1])) % 3 != 0
    return h.masked_scatter(chosen[..., None].expand_as(h), inner(h[chosen]))


def by_last_token(inner, h, key):
    return h + inner(h[torch.arange(len(h)), key % h.shape[1]])[:, None]


def by_last_token_gathered(inner, h, key):
    place = (key % h.shape[1])[:, None, None].expand(-1, 1, h.shape[2])
    return h + inner(h.gather(1, place))


def by_transposing(inner, h, key):
    return inner(h.transpose(0, 1)).transpose(0, 1)


def by_transposed_rows(inner, h, key):
    rows = inner(h.transpose(0, 1).reshape(-1, h.shape[2]))
    return rows.view(h.shape[1], h.shape[0], -1).transpose(0, 1)


def by_rows(inner, h, key):
    return inner(h.reshape(-1, h.shape[2])).view_as(h)


def by_shuffled_rows(inner, h, key):
    order = torch.randperm(h.shape[0] * h.shape[1], generator=torch.Generator().manual_seed(int(key[0])))
    return inner(h.reshape(-1, h.shape[2])[order])[order.argsort()].view_as(h)


def by_example(inner, h, key):
    return torch.stack([inner(one) for one in h])


def by_example_backwards(inner, h, key):
    return torch.stack([inner(one[None])[0] for one in reversed(h)][::-1])


def by_unbinding_positions(inner, h, key):
    return torch.stack([inner(one) for one in h.unbind(1)], 1)


def straight(inner, h, key):
    return inner(h)


MOVES = {function.__name__: function for function in (straight, by_sorting, by_index_select, by_gather, by_flipping,
    by_rolling, by_halves, by_swapped_halves, by_group, by_group_joined, by_selected_examples, by_selected_tokens,
    by_last_token, by_last_token_gathered, by_transposing, by_transposed_rows, by_rows, by_shuffled_rows, by_example,
    by_example_backwards, by_unbinding_positions)}  # fmt: skip


# What has no row of its own: a parameter that is spread to sizes which may happen to be those of the batch.
SPREAD = {
    "one row for every example": lambda t, d: Free((1, d), lambda h, w: h + w.expand(len(h), -1)[:, None]),
    "repeated for every example": lambda t, d: Free((1, 1, d), lambda h, w: h * w.repeat(len(h), 1, 1)),
    "one row for every position": lambda t, d: Free((d,), lambda h, w: h + w.expand(h.shape[1], -1)),
    "a row of its own for every position": lambda t, d: Free((t, d), lambda h, w: h * w),
    "positions looked up": lambda t, d: Looked(t, d),
    "positions looked up for the batch": lambda t, d: Looked(t, d, spread=True),
    "a prefix": lambda t, d: Free((1, d), lambda h, w: torch.cat([w.expand(len(h), 1, -1), h[:, 1:]], 1)),
    "a constant that meets it": lambda t, d: Free((d,), lambda h, w: h + torch.ones(len(h), 1, 1) * w),
    "across positions": lambda t, d: Across(t),
}


class Looked(nn.Module):
    def __init__(self, length, width, spread=False):
        super().__init__()
        self.table, self.spread = nn.Embedding(length, width), spread

    def forward(self, h):
        ids = torch.arange(h.shape[1])
        return h + self.table(ids.expand(len(h), -1) if self.spread else ids)


class Across(nn.Module):
    def __init__(self, length):
        super().__init__()
        self.inner = nn.Linear(length, length)

    def forward(self, h):
        return h + self.inner(h.transpose(1, 2)).transpose(1, 2)


class Drawn(nn.Module):
    """``forward(x, key, y)``: scores, scores beside something else, or the loss alone."""

    def __init__(self, steps, length, width, vocabulary, pooled, zero_head, returns):
        super().__init__()
        self.lift = nn.Embedding(vocabulary, width) if vocabulary else nn.Linear(3, width)
        made = [SPREAD[inner](length, width) if move is None else ROWWISE[inner](width) for move, inner in steps]
        self.inner, self.moves = nn.ModuleList(made), [move for move, _ in steps]
        self.head, self.pooled, self.returns = nn.Linear(width, 2), pooled, returns
        if zero_head:
            nn.init.zeros_(self.head.weight)

    def forward(self, x, key, y):
        h = self.lift(x)
        for move, inner in zip(self.moves, self.inner, strict=True):
            h = inner(h) if move is None else MOVES[move](inner, h, key)
        scores = self.head(h.mean(1) if self.pooled else h)
        if self.returns == "loss":
            return losses(scores, y).sum()
        return {"scores": scores, "hidden": h} if self.returns == "mapping" else scores


def losses(scores, y):
    return (torch.tanh(scores).flatten(1).sum(1) - y).square()


@st.composite
def drawn(draw):
    examples, width = draw(st.integers(2, 5)), draw(st.integers(2, 4))
    length = examples if draw(st.booleans()) else draw(st.integers(1, 5))
    move = st.one_of(st.sampled_from(sorted(MOVES)), st.sampled_from(sorted(MOVES)), st.none())
    steps = [
        (chosen, draw(st.sampled_from(sorted(SPREAD if chosen is None else ROWWISE))))
        for chosen in draw(st.lists(move, min_size=1, max_size=4))
    ]
    torch.manual_seed(draw(st.integers(0, 999)))
    vocabulary, pooled, zero_head = draw(st.sampled_from([0, 7])), draw(st.booleans()), draw(st.sampled_from([0, 0, 1]))
    returns = draw(st.sampled_from(["scores", "scores", "mapping", "loss"]))
    model = Drawn(steps, length, width, vocabulary, pooled, bool(zero_head), returns).double()
    return model, examples, length, draw(st.sampled_from(["error", "vmap"])), draw(st.booleans())


def batch_of(model, examples, length):
    looked_up = isinstance(model.lift, nn.Embedding)
    x = torch.randint(0, 7, (examples, length)) if looked_up else torch.randn(examples, length, 3, dtype=torch.float64)
    return x, torch.randint(0, 4, (examples,)), torch.randn(examples, dtype=torch.float64)


def truth_of(model, x, key, y):
    """Each example's gradients from a backward of its own, through one forward of the batch."""
    parameters, returns = [p for p in model.parameters() if p.requires_grad], model.returns
    model.returns = "scores"
    each = losses(model(x, key, y), y)
    model.returns = returns
    of_each = [torch.autograd.grad(one, parameters, retain_graph=True, materialize_grads=True) for one in each]
    return torch.stack([torch.cat([g.flatten() for g in of_one]) for of_one in of_each])


@settings(derandomize=True, suppress_health_check=list(HealthCheck))
@given(drawn())
def test_models_that_move_the_batch_about_are_right_or_refused(case):
    model, examples, length, on_unsupported, steps = case
    meter = Meter(model, tasks=2, on_unsupported=on_unsupported)
    for _ in range(4):  # the first verifies itself; the others meet other keys, and parameters that are no longer zero
        x, key, y = batch_of(model, examples, length)
        tasks = torch.randint(0, 2, (examples,))
        truth = truth_of(model, x, key, y)
        model.zero_grad()
        try:
            with meter.observe(tasks=tasks):
                found = model(x, key, y)
                found = found["scores"] if isinstance(found, dict) else found
                (found if model.returns == "loss" else losses(found, y).sum()).backward()
        except (RuntimeError, ValueError) as error:
            assert str(error).startswith("Meter: "), f"a foreign error: {error!r}"
        else:
            scale = float(truth.norm(dim=1).max()) + torch.finfo(torch.float64).tiny
            assert float((meter.stats.example_norm - truth.norm(dim=1)).abs().max()) <= EXACT * scale
            of_tasks = torch.stack([truth[tasks == k].sum(0) for k in range(2)])
            assert float((meter.stats.task_norm - of_tasks.norm(dim=1)).abs().max()) <= EXACT * scale * examples
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
            assert float((torch.cat([g.flatten() for g in grads]) - truth.sum(0)).norm()) <= EXACT * scale * examples
        if steps:
            with torch.no_grad():
                for p in model.parameters():
                    p += 0.1 * torch.randn_like(p)


@pytest.mark.parametrize("inner", ["linear", "layer norm", "scale"])
@pytest.mark.parametrize("move", sorted(MOVES))
def test_every_move_leaves_each_example_its_own(move, inner):
    """What is drawn is a function of each example alone: its gradients from the batch are those from itself."""
    torch.manual_seed(0)
    model = Drawn([(move, inner), (None, "a prefix")], 3, 4, 0, True, False, "scores").double()
    x, key, y = batch_of(model, 4, 3)
    whole = truth_of(model, x, key, y)
    for b in range(4):
        torch.testing.assert_close(whole[b], truth_of(model, x[b : b + 1], key[b : b + 1], y[b : b + 1])[0])
