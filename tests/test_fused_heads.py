"""Heads that never show their logits: our own, TRL's and Liger's, on whole, sliced and masked rows, own and tied."""

import copy
import importlib.util

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradnorm_ext
from gradnorm_ext import ClipExamples, InverseNorm, Meter, Reweighted, fused_head
from gradnorm_ext.layers import heads

HAS_TRL = importlib.util.find_spec("trl") is not None
if HAS_TRL:
    from trl.kernels import ChunkedLogProbFunction

needs_trl = pytest.mark.skipif(not HAS_TRL, reason="trl is optional")
EXACT = 1e3 * torch.finfo(torch.float64).eps
VOCABULARY, WIDTH, EXAMPLES = 13, 6, 4
TASKS = torch.tensor([0, 1, 1, 0])


@pytest.fixture(autouse=True)
def several_parts(monkeypatch):
    monkeypatch.setattr(heads, "_HELD", 100)  # a few columns of the vocabulary at a time


class Model(nn.Module):
    """An embedding, a layer and a head that is read, not called: how ``score`` gets its rows is the test's."""

    def __init__(self, tied=False, bias=True):
        super().__init__()
        self.tokens, self.mix, self.norm = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=bias and not tied)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids, labels, score, rows="whole"):
        """``[B, T - 1]`` of what ``score`` gives, 0 where the label is -100."""
        h = self.norm(torch.tanh(self.mix(self.tokens(ids))))[:, :-1]
        labels = labels[:, 1:]
        kept = labels != -100
        if rows == "masked":  # as on GPUs
            found = score(h[kept], self.head.weight, self.head.bias, labels[kept])
            return found.new_zeros(kept.shape).masked_scatter(kept, found)
        found = score(h.reshape(-1, WIDTH), self.head.weight, self.head.bias, labels.clamp(min=0).reshape(-1))
        return found.view(kept.shape).masked_fill(~kept, 0)


def plain(h, weight, bias, targets):
    """What every head here computes, with logits."""
    z = 3 * torch.tanh(F.linear(h, weight, bias) * 1.5 / 3) / 0.8
    log_p = z.log_softmax(-1)
    return log_p.gather(1, targets[:, None])[:, 0] - 0.3 * (log_p.exp() * log_p).sum(1)


def ours(h, weight, bias, targets):
    found = fused_head(h, weight, bias, targets, scale=1.5, softcap=3.0, temperature=0.8)
    return found.log_prob + 0.3 * found.entropy


def trl(h, weight, bias, targets):
    found = ChunkedLogProbFunction.apply(h, weight, bias, targets, 0.8, 5, 3.0, 1.5, ("entropy",))
    return found[0] + 0.3 * found[1]


def batch(empty=False, examples=EXAMPLES, length=6):
    generator = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(0, VOCABULARY, (2, examples, length), generator=generator)
    labels[0, :3] = labels[2, 4:] = -100
    if empty:
        labels[1] = -100  # an example without a row
    return ids, labels


def gradients_of(model, ids, labels, score=plain):
    """Each example's gradients, by autograd, with logits by default."""
    model = copy.deepcopy(model)
    rows = zip(ids.split(1), labels.split(1), strict=True)
    return oracle.gradients_of(model, [lambda one=one: model(*one, score).sum() for one in rows])


@pytest.mark.parametrize("score", (ours, pytest.param(trl, marks=needs_trl)))
@pytest.mark.parametrize("rows", ("whole", "masked"))
@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("timing", ("meter", "gram", "same_step", "two passes"))
def test_equals_autograd_one_example_at_a_time(score, rows, tied, timing):
    torch.manual_seed(0)
    model = Model(tied).double()
    if timing == "meter":
        optimizer = meter = Meter(model, tasks=2)
    elif timing == "gram":
        optimizer = meter = Meter(model, tasks=2, gram=True)
    else:
        timing = {"passes": 2} if timing == "two passes" else {}
        meter = Meter(model, tasks=2)
        policy = ClipExamples(0.5) if timing else InverseNorm()
        optimizer = Reweighted(torch.optim.SGD(model.parameters(), 0.0), meter, policy, **timing)
    for empty in (False, False, True):  # the count of masked rows changes
        ids, labels = batch(empty)
        gradients = gradients_of(model, ids, labels)
        model.zero_grad()
        with optimizer.observe(tasks=TASKS):
            loss = model(ids, labels, score, rows).sum()
            (optimizer.backward if isinstance(optimizer, Reweighted) else torch.Tensor.backward)(loss)
        stats = optimizer.stats
        norms = oracle.group_norms(gradients, torch.arange(EXAMPLES), EXAMPLES)
        assert oracle.relative(stats.example_norm, norms) < EXACT
        assert oracle.relative(stats.task_norm, oracle.group_norms(gradients, TASKS, 2)) < EXACT
        weights = torch.ones(EXAMPLES, dtype=torch.float64)
        if isinstance(optimizer, Reweighted):
            weights = optimizer.weights if optimizer.policy.weighs == "examples" else optimizer.weights[TASKS]
        elif meter.gram:
            flat = torch.stack([torch.cat([one.flatten() for one in g.values()]) for g in gradients])
            of_tasks = torch.zeros(2, flat.shape[1], dtype=flat.dtype).index_add_(0, TASKS, flat)
            torch.testing.assert_close(stats.task_gram, of_tasks @ of_tasks.T)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                parameter.grad, sum(w * g[name] for w, g in zip(weights, gradients, strict=True))
            )


@needs_trl
@pytest.mark.parametrize("tied", (False, True))
def test_two_forwards_before_one_backward(tied):
    torch.manual_seed(0)
    model = Model(tied).double()
    ids, labels = batch()
    pair = torch.cat([ids, ids.flip(1)]), torch.cat([labels, labels.roll(1, 1)])
    gradients = gradients_of(model, *pair)
    together = [
        {name: one[name] + other[name] for name in one} for one, other in zip(gradients[:4], gradients[4:], strict=True)
    ]
    meter = Meter(model)
    for _ in range(2):
        model.zero_grad()
        with meter.observe(tasks=[0] * EXAMPLES):
            (model(ids, labels, trl) + model(pair[0][4:], pair[1][4:], trl, "masked")).sum().backward()
        norms = oracle.group_norms(together, torch.arange(EXAMPLES), EXAMPLES)
        assert oracle.relative(meter.stats.example_norm, norms) < EXACT


def test_outside_of_blocks_the_head_is_plain():
    torch.manual_seed(0)
    model, (ids, labels) = Model().double(), batch()
    found = {}
    for score in (plain, ours):
        model.zero_grad()
        model(ids, labels, score).sum().backward()
        found[score] = {name: p.grad.clone() for name, p in model.named_parameters()}
    torch.testing.assert_close(found[plain], found[ours])


def test_a_frozen_head_costs_nothing():
    torch.manual_seed(0)
    model, (ids, labels) = Model().double(), batch()
    model.head.requires_grad_(False)
    alone = gradients_of(model, ids, labels)
    meter = Meter(model)
    with meter.observe():
        model(ids, labels, ours, "masked").sum().backward()
    norms = oracle.group_norms(alone, torch.arange(EXAMPLES), EXAMPLES)
    assert oracle.relative(meter.stats.example_norm, norms) < EXACT and model.head.weight.grad is None


def test_every_output_and_its_gradient_is_that_of_the_logits():
    torch.manual_seed(0)
    h, w, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((7, 6), (13, 6), (13,)))
    targets = torch.randint(0, 13, (7,))
    found = fused_head(h, w, b, targets, scale=1.5, softcap=3.0, temperature=0.8)
    z = 3 * torch.tanh(F.linear(h, w, b) * 1.5 / 3) / 0.8
    log_p = z.log_softmax(1)
    expected = gradnorm_ext.HeadScores(
        log_p.gather(1, targets[:, None])[:, 0],
        z.logsumexp(1),
        -(log_p.exp() * log_p).sum(1),
        z.mean(1),
        log_p.exp().square().sum(1).log(),
        z.argmax(1) == targets,
    )
    for name, one, other in zip(found._fields, found, expected, strict=True):
        torch.testing.assert_close(one, other)
        assert one.requires_grad == (name not in ("log_sum_sq_probs", "is_top1"))
        if one.requires_grad:
            seed = torch.randn(7, dtype=torch.float64)
            gradients = torch.autograd.grad(one, (h, w, b), seed, retain_graph=True)
            torch.testing.assert_close(gradients, torch.autograd.grad(other, (h, w, b), seed, retain_graph=True))


@needs_trl
@pytest.mark.parametrize("dtype", (torch.bfloat16, "autocast"))
def test_errs_at_most_twice_as_much_as_trl_itself(dtype):
    torch.manual_seed(0)
    wide = Model(bias=False).double()
    ids, labels = batch()
    truth = oracle.group_norms(gradients_of(wide, ids, labels), torch.arange(EXAMPLES), EXAMPLES)
    model = copy.deepcopy(wide).to(torch.float32 if dtype == "autocast" else dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        alone = gradients_of(model, ids, labels, trl)
        meter = Meter(model)
        with meter.observe():
            model(ids, labels, trl, "masked").sum().backward()
    plain_error = oracle.relative(oracle.group_norms(alone, torch.arange(EXAMPLES), EXAMPLES), truth)
    assert oracle.relative(meter.stats.example_norm, truth) <= 2 * plain_error


LIGER = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "per token": {"reduction": "none"},
    "smoothed": {"label_smoothing": 0.1, "lse_square_scale": 0.01, "return_z_loss": True},
    "scaled by the token": {"use_token_scaling": True, "return_token_accuracy": True},
}


@pytest.mark.parametrize("options", LIGER)
def test_ligers_fused_linear_cross_entropy(options):
    ops = pytest.importorskip("liger_kernel.ops.fused_linear_cross_entropy")  # optional

    torch.manual_seed(0)
    model, (ids, labels) = Model(), batch()
    names = [
        "ce_weight",
        "ignore_index",
        "lse_square_scale",
        "label_smoothing",
        "reduction",
        "softcap",
        "return_z_loss",
    ]
    defaults = [None, -100, 0.0, 0.0, "mean", None, False, None, False, False]
    names += ["accum_dtype", "use_token_scaling", "return_token_accuracy"]
    arguments = [LIGER[options].get(name, default) for name, default in zip(names, defaults, strict=True)]

    def loss():
        h = model.norm(torch.tanh(model.mix(model.tokens(ids))))
        found = ops.LigerFusedLinearCrossEntropyFunction.apply(
            h.view(-1, WIDTH), model.head.weight, labels.view(-1), model.head.bias, *arguments
        )
        return [one if one is None else one.sum() for one in found[:3]]

    model.zero_grad()
    with torch.no_grad():
        expected_values = loss()
    model.zero_grad()
    loss()[0].backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    meter = Meter(model)
    model.zero_grad()
    with meter.observe(tasks=[0] * EXAMPLES):
        found = loss()
        found[0].backward()
    torch.testing.assert_close(
        [one for one in found if one is not None], [one for one in expected_values if one is not None]
    )
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, expected)
    # One task of all examples: its gradient is .grad.
    total = torch.cat([one.flatten() for one in expected.values()]).norm()
    torch.testing.assert_close(meter.stats.task_norm[0], total)


@pytest.mark.parametrize("mode", ("llama", "gemma", "none"))
def test_ligers_norms(mode):
    liger = pytest.importorskip("liger_kernel.ops")  # optional

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lift, self.scale, self.norm = nn.Linear(3, 4), nn.Parameter(torch.randn(4)), nn.LayerNorm(4)

        def forward(self, x):
            h, offset = self.lift(x), 1.0 * (mode == "gemma")
            if x.shape[0] == 1:  # the oracle's: Triton's interpreter cannot run Liger's kernel
                return self.norm(torch.tanh(F.rms_norm(h, (4,), self.scale + offset, 1e-6))).mean(1)
            h = liger.LigerRMSNormFunction.apply(h, self.scale, 1e-6, offset, mode, False)
            return liger.LigerLayerNormFunction.apply(torch.tanh(h), self.norm.weight, self.norm.bias, 1e-5).mean(1)

    torch.manual_seed(0)
    case = oracle.Case(Normed(), torch.randn(4, 5, 3), torch.randn(4, 4), oracle.square_loss)
    meter, gradients = Meter(case.model), oracle.per_example_gradients(case)
    with meter.observe():
        case.run().backward()
    norms = oracle.group_norms(gradients, torch.arange(4), 4)
    assert oracle.relative(meter.stats.example_norm, norms) < 8 * torch.finfo(torch.float32).eps


def test_ligers_options_without_an_equivalent_are_refused():
    ops = pytest.importorskip("liger_kernel.ops.fused_linear_cross_entropy")  # optional

    model, (ids, labels) = Model(), batch()
    message = r"no rule for LigerFused.* with ce_weight of head.weight"
    with pytest.raises(RuntimeError, match=message), Meter(model).observe(tasks=[0] * EXAMPLES):
        h = model.tokens(ids).view(-1, WIDTH)
        given = labels.view(-1), model.head.bias, torch.ones(VOCABULARY)
        ops.LigerFusedLinearCrossEntropyFunction.apply(h, model.head.weight, *given)[0].backward()


class Scaled(torch.autograd.Function):
    """``x ⊙ w`` as somebody's own kernel."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g * weight, (g * x).sum(0)


class Kernel(nn.Module):
    def __init__(self):
        super().__init__()
        self.lift, self.scale = nn.Linear(3, 4), nn.Parameter(torch.rand(4))

    def forward(self, x):
        return Scaled.apply(torch.tanh(self.lift(x)), self.scale)


def test_a_function_without_an_equivalent_is_refused_and_with_one_measured(monkeypatch):
    from gradnorm_ext.layers import functions

    monkeypatch.setattr(functions, "_EQUIVALENTS", dict(functions._EQUIVALENTS))
    torch.manual_seed(0)
    case = oracle.Case(Kernel(), torch.randn(4, 3), torch.randn(4, 4), oracle.square_loss).to(torch.float64)
    meter = Meter(case.model)
    message = r"scale got a gradient from a use that was not seen.*measure_as"
    with pytest.raises(RuntimeError, match=message), meter.observe():
        case.run().backward()
    gradnorm_ext.measure_as(Scaled, lambda x, weight: x * weight)
    gradients = oracle.per_example_gradients(case)
    other = nn.Linear(2, 2)
    with meter.observe():
        with Meter(other).observe():
            other(torch.ones(3, 2)).sum().backward()
        pass_through = Scaled.apply(case.x[:, :1], torch.ones(1).double())
        case.run().backward()
    assert torch.equal(pass_through, case.x[:, :1]) and "apply" not in vars(Scaled)
    assert oracle.relative(meter.stats.example_norm, oracle.group_norms(gradients, torch.arange(4), 4)) < EXACT
    with pytest.raises(TypeError, match=r"measure_as: function must be a class"):
        gradnorm_ext.measure_as(Scaled.apply, Kernel)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"fused_head: hidden must be \[rows, width\].*got \[2, 3, 4\]"):
        fused_head(torch.ones(2, 3, 4), torch.ones(5, 4), None, torch.ones(2, 3).long())
