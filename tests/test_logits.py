"""Scores and rates of logits in every backend against the softmax in float64, and against autograd."""

import importlib.util
import re

import pytest
import torch
from torch.nn import functional as F

from gradnorm_ext import GSA, PairBalance, logit_gradient_rates, logit_scores, native, ops, reference

BACKENDS = ["reference", "native"]
DEVICES = dict.fromkeys(BACKENDS, "cpu")
if importlib.util.find_spec("triton"):  # optional; in the interpreter where there is no GPU
    BACKENDS.append("triton")
    DEVICES["triton"] = "cuda" if torch.cuda.is_available() else "cpu"
    if DEVICES["triton"] == "cpu":
        import interpreter  # noqa: F401  # mends it

SIZES = ((1, 1), (3, 2), (130, 37), (5, 5000), (70, 2049))
KINDS = {
    "plain": lambda logits: logits,
    "sure of itself": lambda logits: 15 * logits,
    "far from zero": lambda logits: logits + 1000,
    "columns of a larger matrix": lambda logits: torch.cat([logits, logits], 1)[:, : logits.shape[1]],
    "transposed": lambda logits: logits.t().contiguous().t(),
}


def given(rows, vocabulary, dtype, kind="plain"):
    generator = torch.Generator().manual_seed(rows * vocabulary)
    logits = KINDS[kind](2 * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[1::5] = -100
    return logits, labels


def plain(logits, labels):
    """The definitions with the softmax written out: log-probability, w, count, up, down."""
    kept, y = labels != -100, labels.clamp(min=0)
    onehot = F.one_hot(y, logits.shape[1]).to(logits)
    logits = logits - logits.amax(1, keepdim=True)
    exponentials = logits.exp()  # that of a log-probability would have the latter's rounding
    others = exponentials * (1 - onehot) / exponentials.sum(1, keepdim=True)
    w = others.sum(1).square() + others.square().sum(1)
    rivals = logits.masked_fill(onehot.bool(), -torch.inf).logsumexp(1)  # a log-softmax near 0 has no digits
    beside = rivals - logits.gather(1, y[:, None])[:, 0]
    log_probability = -torch.logaddexp(torch.zeros_like(beside), beside)
    kept_rows = kept[:, None].to(logits)
    down = (others * kept_rows).sum(0)
    up = (onehot * others.sum(1, keepdim=True) * kept_rows).sum(0)
    return log_probability * kept, w * kept, (onehot * kept_rows).sum(0).long(), up, down


def assert_as_good_as_plain(found, plain, exact, terms):
    """An error of at most twice plain torch's in the same dtype, or of a rounding per step where that one is lucky."""
    error = (found.double() - exact).abs()
    allowed = 2 * (plain.double() - exact).abs().max() + terms * torch.finfo(found.dtype).eps * exact.abs()
    assert (error <= allowed).all(), f"error {error.max():.3g}"


CASES = [
    (backend, size, kind, dtype)
    for backend in BACKENDS
    for size in (SIZES if backend != "triton" else ((3, 2), (66, 5), (3, 5000)))  # the interpreter is slow
    for kind in KINDS
    for dtype in ops.FLOATS
    if backend != "triton" or kind == "plain" or dtype == torch.float32
]


@pytest.mark.parametrize(("backend", "size", "kind", "dtype"), CASES, ids=str)
def test_scores_and_rates_are_as_good_as_a_plain_softmax(backend, size, kind, dtype):
    logits, labels = (each.to(DEVICES[backend]) for each in given(*size, dtype, kind))
    figures = reference.accumulator(dtype)
    scores = ops.logit_scores(logits, labels, backend=backend)
    rates = ops.logit_gradient_rates(logits, labels, backend=backend)
    by_torch, exact = plain(logits.to(figures), labels), plain(logits.double(), labels)
    found = (*scores, rates.count, rates.up, rates.down)
    for name, one, plainly, exactly in zip(
        ("log_probability", "w", "count", "up", "down"), found, by_torch, exact, strict=True
    ):
        if name == "count":
            assert torch.equal(one, exactly)
            continue
        assert one.dtype == figures
        assert_as_good_as_plain(one, plainly, exactly, 16)  # exponentials, their sum, quotients, a square


@pytest.mark.parametrize("backend", BACKENDS)
def test_w_is_the_squared_norm_of_the_gradient_at_the_logits(backend):
    logits, labels = given(40, 37, torch.float64)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), logits)
    w = ops.logit_scores(logits.detach(), labels, backend=backend).w
    torch.testing.assert_close(w, gradient.square().sum(1))
    rates = ops.logit_gradient_rates(logits.detach(), labels, backend=backend)
    torch.testing.assert_close(rates.up, -gradient.clamp(max=0).sum(0))
    torch.testing.assert_close(rates.down, gradient.clamp(min=0).sum(0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_that_is_sure_keeps_its_digits(backend):
    logits = torch.tensor([[30.0, 0.0, 0.0]])
    missing = 2 * torch.tensor(-30.0, dtype=torch.float64).exp()
    w = ops.logit_scores(logits, torch.tensor([0]), backend=backend).w.double()
    rates = ops.logit_gradient_rates(logits, torch.tensor([0]), backend=backend)
    torch.testing.assert_close(w, 1.5 * missing.square()[None], rtol=1e-6, atol=0)  # 1 - 2 p + Σ p² would give 0
    torch.testing.assert_close(rates.up[0].double(), missing, rtol=1e-6, atol=0)
    log_probability = ops.logit_scores(logits, torch.tensor([0]), backend=backend).log_probability[0].double()
    torch.testing.assert_close(log_probability, -missing, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's NumPy, which is right
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_classes_have_no_share_and_nan_and_infinity_are_seen(backend):
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[1.0, -inf, 2.0], [1.0, nan, 2.0], [inf, 0.0, 1.0], [0.0, 0.0, 0.0]])
    labels = torch.tensor([2, 2, 2, 1])
    scores = ops.logit_scores(logits, labels, backend=backend)
    assert scores.w.isfinite().tolist() == scores.log_probability.isfinite().tolist() == [True, False, False, True]
    first = ops.logit_gradient_rates(logits[:1], labels[:1], backend=backend)
    assert first.down[1] == 0 and first.down.isfinite().all()
    rates = ops.logit_gradient_rates(logits, labels, backend=backend)
    assert (
        rates.down[:2].isnan().all() and rates.up[2].isnan()
    )  # the third is the label of the rows that are not numbers


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_and_no_labels_give_nothing(backend):
    for labels in (torch.zeros(0, dtype=torch.int64), torch.full((2,), -100)):
        logits = torch.randn(len(labels), 4)
        assert ops.logit_scores(logits, labels, backend=backend).w.tolist() == [0.0] * len(labels)
        assert [each.tolist() for each in ops.logit_gradient_rates(logits, labels, backend=backend)] == [[0] * 4] * 3


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_number_of_threads_gives_the_same_bits(threads):
    logits, labels = given(300, 513, torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, again = (ops.logit_gradient_rates(logits, labels, backend="native") for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("module", [native, reference])
def test_blocks_of_rows_add_up(module, monkeypatch):
    logits, labels = given(130, 37, torch.bfloat16)
    whole = [*module.logit_scores(logits, labels, ignore_index=-100)]
    whole += module.logit_gradient_rates(logits, labels, ignore_index=-100)
    monkeypatch.setattr(module, "_CONVERTED" if module is native else "_LOGITS", 37 * 7)
    parts = [*module.logit_scores(logits, labels, ignore_index=-100)]
    parts += module.logit_gradient_rates(logits, labels, ignore_index=-100)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_second_copy_of_the_logits_is_made(dtype):
    logits = torch.randn(96, 1 << 17).to(dtype)
    labels = torch.randint(0, 1 << 17, (96,))
    for call in (logit_scores, logit_gradient_rates):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            call(logits, labels)
        largest = max(event.self_cpu_memory_usage for event in profile.events())
        total = logits.numel() * logits.element_size()
        assert largest < total / 1.2, (call.__name__, largest, total)


def test_tokens_of_examples_add_up():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 5, 7, dtype=torch.float64), torch.randint(0, 7, (3, 5))
    labels[0, 3:] = -100
    scores = logit_scores(logits, labels)
    logs = logits.log_softmax(2)
    for b in range(3):
        gradient = torch.autograd.functional.jacobian(
            lambda z, b=b: -F.cross_entropy(z, labels[b], reduction="sum"), logits[b]
        )
        torch.testing.assert_close(scores.example_el2n[b], gradient.norm())
        kept = [t for t in range(5) if labels[b, t] != -100]
        mean = torch.stack([logs[b, t, labels[b, t]] for t in kept]).mean()
        torch.testing.assert_close(scores.example_log_probability[b], mean)
    torch.testing.assert_close(scores.example_w_score, scores.w_score.sum(1))
    torch.testing.assert_close(scores.el2n.square(), scores.w_score)
    flat = logit_scores(logits.flatten(0, 1), labels.flatten())
    assert torch.equal(flat.example_w_score, scores.w_score.flatten())
    assert torch.equal(flat.example_log_probability, scores.log_probability.flatten())


def test_slices_are_taken_example_by_example_instead_of_copied(monkeypatch):
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 6, 7), torch.randint(0, 7, (3, 5))
    seen = []
    for name in ("logit_scores", "logit_gradient_rates"):
        run = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda rows, *a, run=run, **o: seen.append(rows) or run(rows, *a, **o))
    scores, rates = logit_scores(logits[:, :-1], labels), logit_gradient_rates(logits[:, :-1], labels)
    assert all(rows.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr() for rows in seen)
    together = logits[:, :-1].contiguous()
    torch.testing.assert_close(scores.w_score, logit_scores(together, labels).w_score)
    for one, other in zip(rates, logit_gradient_rates(together, labels), strict=True):
        torch.testing.assert_close(one, other)


def test_scores_feed_the_policies_that_need_them():
    logits, labels = torch.zeros(4, 3, 5), torch.zeros(4, 3, dtype=torch.int64)
    PairBalance("probability").feed(logit_scores(logits, labels).example_log_probability)
    policy = GSA(5)
    policy.feed(logits[:, 0], labels[:, 0])
    assert policy.state.fed[1][0, 0] == pytest.approx(4 * 0.8)


LOGITS, LABELS = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ops.logit_scores(LOGITS, LABELS[:1]),
            ValueError,
            "logit_scores: logits must be [rows, vocabulary] and labels [rows], got [2, 3] and [1]; flatten them to rows",
        ),
        (
            lambda: ops.logit_gradient_rates(LOGITS.int(), LABELS),
            TypeError,
            "logit_gradient_rates: logits must be floating and labels int64, got torch.int32 and torch.int64; cast them",
        ),
        (
            lambda: ops.logit_scores(LOGITS, LABELS + 3),
            ValueError,
            "logit_scores: labels must lie in [0, 3) or be -100, got 3 to 3; "
            "mark rows without a label with ignore_index",
        ),
        (
            lambda: logit_scores(LOGITS[None, None], LABELS[None, None]),
            ValueError,
            "logit_scores: logits must be [B, vocabulary] or [B, T, vocabulary] with B > 0 and labels the same without "
            "the last, got [1, 1, 2, 3] and [1, 1, 2]; give every position its label",
        ),
        (
            lambda: logit_gradient_rates(LOGITS[:0], LABELS[:0]),
            ValueError,
            "logit_gradient_rates: logits must be [B, vocabulary] or [B, T, vocabulary] with B > 0 and labels the same "
            "without the last, got [0, 3] and [0]; give every position its label",
        ),
    ],
)
def test_says_what_is_wrong_and_what_to_do(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()
