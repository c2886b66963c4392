"""Policies that remember: against their formulas step by step, what they do not change for, and bad input."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from gradnorm_ext.policies import GSA, MTGRPO, Chain, GradNorm, InverseNorm, PairBalance, PiKE, weighs_of

NAN = float("nan")
# Norms and losses of three tasks over five steps; NaN: the task is absent.
FIGURE = st.one_of(st.just(NAN), st.floats(2.0**-10, 2.0**10))
LOSS = st.one_of(st.just(0.0), st.floats(2.0**-10, 2.0))
STEPS = st.lists(st.lists(st.tuples(FIGURE, LOSS), min_size=3, max_size=3), min_size=1, max_size=5)


def tensor(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def stats_of(norms=(1.0, 1.0), *, signal=None, variance=None, units=None, rewards=None, examples=None, finite=True):
    norm = tensor(norms)
    reward = None if rewards is None else SimpleNamespace(task_mean=tensor(rewards))
    return SimpleNamespace(
        task_norm=norm.nan_to_num(),
        task_count=(~norm.isnan()).long(),
        task_sqnorm_unbiased=None if signal is None else tensor(signal),
        task_variance=None if variance is None else tensor(variance),
        task_units=None if units is None else torch.tensor(units),
        reward=reward,
        example_norm=tensor(examples if examples is not None else [1.0, 1.0]),
        finite=torch.tensor(finite),
    )


def close(got, want, relative=1e-12):
    torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(want).to(got), rtol=relative, atol=relative)


def gradnorm_step(policy, norms, losses, finite=True):
    policy.feed(tensor(losses))
    return policy(stats_of(norms, finite=finite))


def expected_gradnorm(steps, alpha, rate, decay):
    """The docstring's formula with NumPy, and L's gradient by autograd: the weights after every step.

    Ends where a weighted norm is its target up to rounding, which then decides the sign.
    """
    weights, first, level = np.ones(3), np.full(3, np.nan), np.full(3, np.nan)
    for norms, losses in steps:
        norms, losses = np.array(norms), np.array(losses)
        here = ~np.isnan(norms)
        for k in range(3):
            if here[k] and not np.isnan(losses[k]):
                level[k] = losses[k] if np.isnan(first[k]) else decay * level[k] + (1 - decay) * losses[k]
                first[k] = losses[k] if np.isnan(first[k]) else first[k]
        with np.errstate(all="ignore"):
            progress = np.maximum(level / first, 0)
            tells = np.isfinite(progress)
            relative = progress / progress[tells].mean() if tells.any() else progress
        relative[~np.isfinite(relative)] = 1
        if here.any():
            w = tensor(weights[here]).requires_grad_()
            d, r = tensor(norms[here]), tensor(relative[here])
            target = ((w * d).mean() * r**alpha).detach()
            if ((w * d - target).abs() <= 1e-9 * target).any():
                return
            (gradient,) = torch.autograd.grad((w * d - target).abs().sum(), w)
            weights[here] = np.maximum(0, weights[here] - rate * (gradient / d.mean()).numpy())
        weights = weights / weights.mean() if weights.sum() > 0 else np.ones(3)
        yield weights


@given(STEPS, st.sampled_from([0.0, 0.5, 1.5]), st.sampled_from([0.025, 0.5]), st.sampled_from([0.0, 0.9]))
def test_gradnorm_follows_the_gradient_of_its_loss(steps, alpha, rate, decay):
    policy = GradNorm(alpha=alpha, rate=rate, decay=decay)
    steps = [tuple(zip(*step, strict=True)) for step in steps]
    for (norms, losses), expected in zip(steps, expected_gradnorm(steps, alpha, rate, decay), strict=False):
        weights = gradnorm_step(policy, norms, losses)
        close(weights, tensor(expected))
        assert float(weights.mean()) == pytest.approx(1)


@pytest.mark.parametrize(("alpha", "ratio"), [(0.0, 1.0), (1.0, 3.0)])
def test_gradnorm_ends_where_weighted_norms_are_as_their_targets(alpha, ratio):
    policy, rate = GradNorm(alpha=alpha, rate=2e-3), 2e-3
    for step in range(1000):
        losses = [1.0, 1.0] if step == 0 else [0.9, 0.3]  # relative losses 1.5 and 0.5
        weights = gradnorm_step(policy, [4.0, 1.0], losses)
    products = weights * tensor([4.0, 1.0])
    # Weights move to and fro by at most `rate` times a norm over the mean norm, 1.6.
    slack = 2 * 1.6 * rate / float(weights.min())
    assert float(products[0] / products[1]) == pytest.approx(ratio, rel=2 * slack)


def test_gradnorm_does_not_change_when_gradients_or_a_tasks_losses_scale():
    one, other = GradNorm(), GradNorm()
    for norms, losses in [([2.0, 1.0], [1.0, 2.0]), ([1.5, 1.0], [0.5, 1.8]), ([1.0, 3.0], [0.4, 1.0])]:
        weights = gradnorm_step(one, norms, losses)
        scaled = gradnorm_step(other, [n * 2.0**-20 for n in norms], [losses[0] * 1024, losses[1]])
        assert torch.equal(weights, scaled)  # powers of two: exact


def test_gradnorm_takes_rewards_for_progress():
    fed, rewarded = GradNorm(rate=0.1), GradNorm(rate=0.1, best=1.0)
    for rewards in ([0.0, 0.5], [0.25, 0.75], [0.5, 1.0]):
        weights = rewarded(stats_of([1.0, 2.0], rewards=rewards))
        assert torch.equal(weights, gradnorm_step(fed, [1.0, 2.0], [1 - r for r in rewards]))
    assert weights.isfinite().all()


def test_gradnorm_keeps_weights_of_mean_one_whatever_a_solved_task_or_a_large_rate_does():
    policy = GradNorm(alpha=0.5, rate=50.0, best=1.0)
    for rewards in ([1.0, 0.0], [1.0, 0.2], [1.1, 0.4], [1.0, 0.1]):
        weights = policy(stats_of([100.0, 1e-6], rewards=rewards))
        assert weights.isfinite().all() and (weights >= 0).all() and float(weights.mean()) == pytest.approx(1)


@given(st.lists(st.tuples(*[st.floats(-1, 4)] * 2, *[st.floats(0, 4)] * 2), min_size=1, max_size=5))
def test_pike_multiplies_its_weights_by_the_exponential(steps):
    policy, weights = PiKE(zeta1=0.7, zeta2=3.0), np.ones(2)
    for a0, a1, v0, v1 in steps:
        weights = weights * np.exp(0.7 * np.array([a0, a1]) - 3.0 * np.array([v0, v1]) / (2 * 5))
        found = policy(stats_of(signal=[a0, a1], variance=[v0, v1], units=[2, 3]))
        close(found, weights / weights.mean(), 1e-10)


def test_pike_stays_finite_and_keeps_the_weight_of_a_task_without_figures():
    policy = PiKE(zeta1=1.0, zeta2=0.0)
    first = policy(stats_of(signal=[1.0, 0.0], variance=[1.0, 1.0], units=[2, 2]))
    again = policy(stats_of(signal=[NAN, 0.0], variance=[NAN, 1.0], units=[1, 2]))
    assert torch.equal(first, again)
    for _ in range(3):
        weights = policy(stats_of(signal=[1e300, 0.0], variance=[1.0, 1.0], units=[2, 2]))
    assert weights.tolist() == [2.0, 0.0]


def expected_mtgrpo(steps, rate, level):
    xi, last = np.zeros(3), np.full(3, np.nan)
    for rewards in np.array(steps):
        here = ~np.isnan(rewards)
        z = np.exp(xi - xi.max()) / np.exp(xi - xi.max()).sum()
        score = np.where(np.isnan(last), 0, rewards - last) + level * rewards
        common = (z * score)[here].sum() / z[here].sum()
        xi[here] -= rate * z[here] * (score[here] - common)
        last[here] = rewards[here]
        z = np.exp(xi - xi.max()) / np.exp(xi - xi.max()).sum()
        yield 3 * z


REWARDS = st.one_of(st.just(NAN), st.floats(0, 1))


@given(st.lists(st.lists(REWARDS, min_size=3, max_size=3).filter(lambda r: not all(map(np.isnan, r))), max_size=6))
def test_mtgrpo_follows_its_formula(steps):
    policy = MTGRPO(rate=2.0, level=0.5)
    for rewards, expected in zip(steps, expected_mtgrpo(steps, 2.0, 0.5), strict=True):
        weights = policy(stats_of([1.0] * 3, rewards=rewards))
        close(weights, expected)
        assert float(weights.mean()) == pytest.approx(1)


def test_mtgrpo_favours_low_rewards_that_do_not_rise_and_ignores_an_offset():
    policy, shifted = MTGRPO(rate=1.0, level=1.0), MTGRPO(rate=1.0, level=1.0)
    for rewards in ([0.1, 0.5, 0.5], [0.1, 0.7, 0.5], [0.1, 0.9, 0.5]):
        weights = policy(stats_of([1.0] * 3, rewards=rewards))
        close(shifted(stats_of([1.0] * 3, rewards=[r + 5 for r in rewards])), weights)
    assert weights[0] > weights[2] > weights[1]
    assert torch.equal(policy(stats_of([1.0] * 3, rewards=[NAN] * 3)), weights)


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 10**6)), min_size=1, max_size=6), max_size=4),
    st.sampled_from([1.0, 0.5]),
    st.sampled_from([1.0, 0.5]),
    st.sampled_from([0, 2]),
)
def test_gsa_weighs_by_what_pushed_each_class_up_and_down(batches, decay, offset, warm_up):
    policy, up, down = GSA(classes=4, decay=decay, offset=offset, warm_up=warm_up), np.zeros(4), np.zeros(4)
    for step, batch in enumerate(batches):
        labels = torch.tensor([label for label, _ in batch])
        logits = torch.stack(
            [torch.randn(4, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for _, s in batch]
        )
        p = logits.softmax(1).numpy()
        up, down = decay * up, decay * down
        for y, of in zip(labels.tolist(), p, strict=True):
            up[y] += 1 - of[y]
            down += np.where(np.arange(4) == y, 0, of)
        with np.errstate(divide="ignore"):
            expected = 2 / (1 + np.exp(offset - up[labels.numpy()] / down[labels.numpy()]))
        policy.feed(logits, labels)
        weights = policy(stats_of(examples=[1.0] * len(batch)))
        close(weights, expected if step >= warm_up else np.ones(len(batch)))
        assert (weights > 0).all() and (weights <= 2).all()


def test_gsa_starts_over_its_warm_up_with_a_new_task_and_leaves_examples_without_label_alone():
    policy, logits = GSA(classes=2, warm_up=1), tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    labels = torch.tensor([0, 1, -100])

    def weigh():
        policy.feed(logits, labels)
        return policy(stats_of(examples=[1.0] * 3)).tolist()

    assert weigh() == [1.0] * 3
    later = weigh()
    assert later[0] != 1 and later[1] != 1 and later[2] == 1
    policy.begin_task()
    assert weigh() == [1.0] * 3 and weigh() == later  # the sums grew alike


def test_gsa_weights_make_the_gradient_that_of_the_weighted_cross_entropy():
    from gradnorm_ext import Reweighted

    torch.manual_seed(0)
    model, x, labels = torch.nn.Linear(5, 3).double(), torch.randn(8, 5).double(), torch.arange(8) % 3
    policy = GSA(classes=3, warm_up=0)
    optimizer = Reweighted(torch.optim.SGD(model.parameters(), 0.1), model, policy)
    with optimizer.observe():
        logits = model(x)
        policy.feed(logits, labels)
        F.cross_entropy(logits, labels).backward()
    found = model.weight.grad.clone()
    model.zero_grad()
    (optimizer.weights * F.cross_entropy(model(x), labels, reduction="none")).mean().backward()
    close(found, model.weight.grad)
    assert optimizer.weights.std() > 0


def step_of(policy, step):
    """A call of any of the policies with different figures at every step."""
    figures = tensor([0.3, 0.7]) + 0.1 * step
    if isinstance(policy, GSA):
        generator = torch.Generator().manual_seed(step)
        policy.feed(torch.randn(4, 3, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 1, 2]))
    if isinstance(policy, GradNorm) and policy.best is None:
        policy.feed(figures)
    stats = stats_of(
        [2.0 + step, 1.0],
        signal=figures.tolist(),
        variance=[1.0, 2.0],
        units=[3, 4],
        rewards=(figures * tensor([1.0, 0.5])).tolist(),
        examples=[1.0] * 4,
    )
    return stats


STATEFUL = {
    "GradNorm": lambda: GradNorm(),
    "GradNorm of rewards": lambda: GradNorm(best=2.0),
    "PiKE": lambda: PiKE(1.0, 1.0),
    "MTGRPO": lambda: MTGRPO(1.0, 1.0),
    "GSA": lambda: GSA(3, warm_up=1),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_goes_on_from_a_stored_state_as_if_it_had_not_stopped(name):
    policy, resumed = STATEFUL[name](), STATEFUL[name]()
    for step in range(3):
        policy(step_of(policy, step))
    stored = {key: value.clone() for key, value in policy.state_dict().items()}
    resumed.load_state_dict(stored)
    for step in range(3, 5):
        assert torch.equal(resumed(step_of(resumed, step)), policy(step_of(policy, step)))
    assert any(not torch.equal(stored[key], value) for key, value in policy.state_dict().items())


@pytest.mark.parametrize("name", STATEFUL)
def test_a_step_that_is_not_finite_leaves_no_trace(name):
    policy = STATEFUL[name]()
    policy(step_of(policy, 0))
    before = {key: value.clone() for key, value in policy.state_dict().items()}
    spoiled = step_of(policy, 1)
    spoiled.finite = torch.tensor(False)
    policy(spoiled)
    assert all(torch.equal(before[key], value) for key, value in policy.state_dict().items())


@pytest.mark.parametrize("name", STATEFUL)
def test_is_a_value_whose_state_is_its_own(name):
    policy = STATEFUL[name]()
    policy(step_of(policy, 0))
    assert (
        policy == STATEFUL[name]() and hash(policy) == hash(STATEFUL[name]()) and repr(policy) == repr(STATEFUL[name]())
    )
    assert not replace(policy).state_dict()
    with pytest.raises(AttributeError):
        policy.rate = 3.0


@pytest.mark.parametrize("name", [name for name in STATEFUL if name != "GSA"])
def test_permutes_with_the_tasks(name):
    policy, other = STATEFUL[name](), STATEFUL[name]()
    for step in range(3):
        stats = step_of(policy, step)
        weights = policy(stats)
        swapped = step_of(other, step)
        for field in ("task_norm", "task_count", "task_sqnorm_unbiased", "task_variance", "task_units"):
            setattr(swapped, field, getattr(stats, field).flip(0))
        swapped.reward = SimpleNamespace(task_mean=stats.reward.task_mean.flip(0))
        if name == "GradNorm":
            other.feed((tensor([0.3, 0.7]) + 0.1 * step).flip(0))
        close(other(swapped), weights.flip(0))


@pytest.mark.parametrize("name", STATEFUL)
def test_never_reads_a_tensor_back(name):
    """Under FakeTensorMode any .item(), bool() or data-dependent shape raises, as it would wait for a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    policy = STATEFUL[name]()
    policy(step_of(policy, 0))
    stats = step_of(policy, 1)  # what is fed is checked on the CPU, and there only
    with FakeTensorMode(allow_non_fake_inputs=True):
        weights = policy(stats)
    assert weights.shape == ((4,) if weighs_of(policy) == "examples" else (2,))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: GradNorm(alpha=-1), ValueError, "GradNorm: alpha must be a finite number >= 0, got -1; "),
        (lambda: GradNorm(rate=0), ValueError, "GradNorm: rate must be a finite number > 0, got 0; "),
        (lambda: GradNorm(decay=1.0), ValueError, "GradNorm: decay must lie in [0, 1), got 1.0; "),
        (
            lambda: GradNorm()(stats_of()),
            RuntimeError,
            "GradNorm: feed(losses) must run in every observe block before it closes, got none since the last; "
            "call it between forward and backward",
        ),
        (
            lambda: gradnorm_step(GradNorm(), [1.0, 2.0], [1.0]),
            ValueError,
            "GradNorm: losses must be [2], one per task",
        ),
        (
            lambda: GradNorm(best=1.0)(stats_of()),
            ValueError,
            "GradNorm: with best= the statistics must hold rewards, got None; ",
        ),
        (lambda: PiKE(zeta1=NAN, zeta2=1.0), ValueError, "PiKE: zeta1 must be a finite number >= 0, got nan; "),
        (lambda: MTGRPO(rate=0, level=1.0), ValueError, "MTGRPO: rate must be a finite number > 0, got 0; "),
        (
            lambda: MTGRPO(1.0, 1.0)(stats_of()),
            ValueError,
            "MTGRPO: the statistics must hold rewards, got None; pass rewards= and prompts= to observe",
        ),
        (lambda: GSA(classes=0), ValueError, "GSA: classes must be an integer >= 1, got 0; "),
        (lambda: GSA(classes=2, decay=0.0), ValueError, "GSA: decay must lie in (0, 1], got 0.0; "),
        (
            lambda: GSA(2).feed(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)),
            ValueError,
            "GSA: logits must be [B, 2] and labels [B], got [3, 4] and [3]; ",
        ),
        (lambda: GSA(2)(stats_of()), RuntimeError, "GSA: feed(logits, labels) must run in every observe block"),
        (
            lambda: PairBalance("probability")(stats_of()),
            RuntimeError,
            "PairBalance: feed(log_probability) must run in every observe block",
        ),
    ],
)
def test_says_what_is_wrong_and_what_to_do(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        call()


def test_gsa_refuses_labels_of_another_batch():
    policy = GSA(2)
    policy.feed(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=re.escape("GSA: labels must be [2], one per example, got [3]; ")):
        policy(stats_of(examples=[1.0, 1.0]))


@pytest.mark.parametrize("name", [name for name in STATEFUL if name != "GSA"])
def test_refuses_a_number_of_tasks_that_grew(name):
    policy = STATEFUL[name]()
    policy(step_of(policy, 0))
    more = step_of(policy, 1)
    for field in ("task_norm", "task_count", "task_sqnorm_unbiased", "task_variance", "task_units"):
        setattr(more, field, torch.cat([getattr(more, field), getattr(more, field)[:1]]))
    more.reward = SimpleNamespace(task_mean=tensor([0.1, 0.2, 0.3]))
    if name == "GradNorm":
        policy.feed(tensor([0.1, 0.2, 0.3]))
    message = f"{name.split()[0]}: its state must be of 3, as what it is called with, got one of 2; make a new policy"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        policy(more)


def test_a_chain_keeps_the_states_of_its_policies_apart():
    chain, resumed = (Chain(InverseNorm(), PiKE(1.0, 0.0), PiKE(2.0, 0.0)) for _ in range(2))
    for policy, value in zip(chain.policies[1:], (1.0, 2.0), strict=True):
        policy.load_state_dict({"log_weights": tensor([value, 0.0])})
    resumed.load_state_dict(chain.state_dict())
    for one, other in zip(chain.policies[1:], resumed.policies[1:], strict=True):
        assert torch.equal(one.state_dict()["log_weights"], other.state_dict()["log_weights"])
    message = "Chain: the state must be of policies [0], got [1, 2]; make the chain of the same policies"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Chain(PiKE(1.0, 1.0)).load_state_dict(chain.state_dict())
