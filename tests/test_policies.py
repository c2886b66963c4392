import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gradients import stats_of as measured
from hypothesis import assume, given
from hypothesis import strategies as st

from gradnorm_ext.policies import (
    Chain,
    ClipExamples,
    Equal,
    InverseNorm,
    NormalizeExamples,
    PairBalance,
    RewardStd,
    weighs_of,
)
from gradnorm_ext.rewards import reward_stats

DTYPES = st.sampled_from([torch.float32, torch.float64])
POWERS = st.sampled_from([0.0, 0.5, 1.0, 2.0])
# Norms from 2^-20 to 2^20, some absent. Powers up to 2 of their ratios stay inside float32.
NORMS = st.lists(st.one_of(st.just(0.0), st.floats(2.0**-20, 2.0**20, width=32)), min_size=1, max_size=8)


def stats_of(task_norm=(1.0,), task_count=None, example_norm=(1.0,), reward=None, dtype=torch.float64):
    norm = torch.tensor(task_norm, dtype=dtype)
    count = torch.ones(len(norm), dtype=torch.int64) if task_count is None else torch.tensor(task_count)
    example_norm = torch.tensor(example_norm, dtype=dtype)
    return SimpleNamespace(task_norm=norm, task_count=count, example_norm=example_norm, reward=reward)


def rewarded(rewards, prompts, dtype=torch.float64):
    reward = reward_stats(torch.tensor(rewards, dtype=dtype), torch.tensor(prompts))
    return stats_of(example_norm=[1.0] * len(rewards), reward=reward, dtype=dtype)


def tolerance(dtype, power=1.0, terms=8):
    """A few roundings, a power that multiplies the base's relative error, and a sum."""
    return (4 + power + terms) * torch.finfo(dtype).eps


def close(got, want, relative):
    torch.testing.assert_close(got, want, rtol=relative, atol=0.0)


def test_equal_weighs_every_task_by_exactly_one():
    weights = Equal()(stats_of([3.0, 0.0, 7.0], dtype=torch.float32))
    assert weights.tolist() == [1.0, 1.0, 1.0] and weights.dtype == torch.float32


@given(NORMS, POWERS, DTYPES)
def test_inverse_norm_is_the_formula_and_has_mean_one_over_present_tasks(norms, power, dtype):
    weights = InverseNorm(power)(stats_of(norms, dtype=dtype))
    assert weights.dtype == dtype and weights.isfinite().all()
    norm = torch.tensor(norms, dtype=dtype)
    present = norm > 0
    assert (weights[~present] == 1).all()
    if present.any():
        raw = norm[present].double() ** -power
        close(weights[present].double(), raw / raw.mean(), tolerance(dtype, power))
        close(weights[present].double().mean(), torch.tensor(1.0).double(), tolerance(dtype))


@given(NORMS, POWERS, st.floats(1e-4, 1e4))
def test_inverse_norm_does_not_change_when_all_norms_scale(norms, power, scale):
    policy = InverseNorm(power)
    scaled = policy(stats_of([norm * scale for norm in norms]))
    close(scaled, policy(stats_of(norms)), 2 * tolerance(torch.float64, power))


@given(NORMS, st.randoms())
def test_inverse_norm_permutes_with_the_tasks(norms, random):
    order = list(range(len(norms)))
    random.shuffle(order)
    permuted = InverseNorm()(stats_of([norms[k] for k in order]))
    close(permuted, InverseNorm()(stats_of(norms))[order], 2 * tolerance(torch.float64))


@given(NORMS)
def test_inverse_norm_gives_every_present_task_the_same_weighted_norm(norms):
    assume(any(norms))
    stats = stats_of(norms)
    weighted = (InverseNorm()(stats) * stats.task_norm)[stats.task_norm > 0]
    close(weighted, weighted[:1].expand_as(weighted), 2 * tolerance(torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 3, 49])
def test_inverse_norm_leaves_the_step_as_it_was_bit_for_bit_where_there_is_nothing_to_even_out(dtype, count):
    assert (InverseNorm()(stats_of([0.3] * count, dtype=dtype)) == 1).all()
    norms = torch.linspace(0.1, 9, count).tolist()
    assert (InverseNorm(power=0)(stats_of(norms, dtype=dtype)) == 1).all()


def test_inverse_norm_gives_one_to_tasks_that_are_absent_or_not_finite():
    weights = InverseNorm()(stats_of([3.0, 1.0, 5.0, 0.0, torch.nan, torch.inf], [1, 1, 0, 1, 1, 1]))
    assert weights.tolist() == [0.5, 1.5, 1.0, 1.0, 1.0, 1.0]
    assert InverseNorm()(stats_of([0.0, 2.0], [4, 0])).tolist() == [1.0, 1.0]


def test_inverse_norm_neither_overflows_nor_vanishes_at_the_ends_of_float32():
    weights = InverseNorm()(stats_of([1e-38, 1e38, 1e-38], dtype=torch.float32))
    assert weights.tolist() == [1.5, 0.0, 1.5]


@given(st.lists(st.one_of(st.just(0.0), st.floats(0, 1e30)), min_size=1, max_size=8), st.floats(1e-6, 1e6), DTYPES)
def test_clipped_examples_are_at_most_max_norm_and_the_others_untouched(norms, max_norm, dtype):
    stats = stats_of(example_norm=norms, dtype=dtype)
    weights = ClipExamples(max_norm)(stats)
    assert weights.dtype == dtype and weights.isfinite().all() and (weights >= 0).all() and (weights <= 1).all()
    bound = max_norm * (1 + 2 * torch.finfo(dtype).eps)
    assert (weights * stats.example_norm <= bound).all()
    assert (weights[stats.example_norm <= max_norm] == 1).all()


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=8), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.randoms())
def test_clipping_scales_with_its_bound_and_permutes_with_the_examples(norms, max_norm, scale, random):
    weights = ClipExamples(max_norm)(stats_of(example_norm=norms))
    scaled = ClipExamples(max_norm * scale)(stats_of(example_norm=[norm * scale for norm in norms]))
    close(scaled, weights, 4 * torch.finfo(torch.float64).eps)
    order = list(range(len(norms)))
    random.shuffle(order)
    assert torch.equal(ClipExamples(max_norm)(stats_of(example_norm=[norms[i] for i in order])), weights[order])


def test_clipping_gives_one_to_norms_of_zero_and_to_those_not_finite():
    stats = stats_of(example_norm=[0.0, torch.nan, torch.inf, 4.0])
    assert ClipExamples(1.0)(stats).tolist() == [1.0, 1.0, 1.0, 0.25]
    assert ClipExamples(torch.inf)(stats).tolist() == [1.0, 1.0, 1.0, 1.0]


LIVE = st.lists(st.one_of(st.just(0.0), st.floats(2.0**-20, 2.0**20, width=32)), min_size=1, max_size=8)


@given(LIVE, st.sampled_from([0.01, 1.0]), DTYPES)
def test_normalised_examples_follow_the_formula_and_are_bounded(norms, stability, dtype):
    weights = NormalizeExamples(stability)(stats_of(example_norm=norms, dtype=dtype))
    assert weights.dtype == dtype and weights.isfinite().all()
    norm = torch.tensor(norms, dtype=torch.float64)
    assert (weights[norm == 0] == 1).all() and (weights <= (1 + 1 / stability) * (1 + tolerance(dtype))).all()
    if norm.any():
        mean = norm[norm > 0].mean()
        expected = mean * (1 + stability) / (norm[norm > 0] + stability * mean)
        close(weights[norm > 0].double(), expected, 2 * tolerance(dtype))


@given(LIVE, st.sampled_from([2.0**-30, 4.0]), st.randoms())
def test_normalising_permutes_with_the_examples_and_does_not_change_when_all_norms_scale(norms, scale, random):
    weights = NormalizeExamples()(stats_of(example_norm=norms))
    assert torch.equal(NormalizeExamples()(stats_of(example_norm=[norm * scale for norm in norms])), weights)
    order = list(range(len(norms)))
    random.shuffle(order)
    permuted = NormalizeExamples()(stats_of(example_norm=[norms[i] for i in order]))
    close(permuted, weights[order], 2 * tolerance(torch.float64))


def test_normalising_evens_out_the_contributions_and_leaves_odd_norms_alone():
    stats = stats_of(example_norm=[1.0, 100.0, 0.0, torch.nan, torch.inf])
    weights = NormalizeExamples(stability=1e-9)(stats)
    close((weights * stats.example_norm)[:2], torch.tensor([50.5, 50.5]).double(), 1e-6)
    assert weights[2:].tolist() == [1.0] * 3


PAIRS = st.lists(st.tuples(st.floats(2.0**-20, 2.0**20), st.floats(2.0**-20, 2.0**20)), min_size=1, max_size=5)


@given(PAIRS, st.sampled_from([1.0, 2.0, 2.0**41]))
def test_balanced_pairs_have_one_norm_within_the_clip_and_weights_of_mean_one(pairs, clip):
    chosen, rejected = torch.tensor(pairs, dtype=torch.float64).t()
    stats = stats_of(example_norm=[*chosen.tolist(), *rejected.tolist()])
    first, second = PairBalance("parameter", clip)(stats).chunk(2)
    close(first + second, torch.full_like(first, 2), tolerance(torch.float64))
    ratio = (rejected / chosen).clamp(1 / clip, clip)
    close(first / second, ratio, 2 * tolerance(torch.float64))
    if clip > 2.0**40:
        close(first * chosen, second * rejected, 2 * tolerance(torch.float64))


@given(st.lists(st.tuples(st.floats(-100, 0), st.floats(-100, 0)), min_size=1, max_size=5))
def test_balanced_probabilities_undo_the_ratio_of_the_plain_loss(pairs):
    chosen, rejected = torch.tensor(pairs, dtype=torch.float64).t()
    policy, stats = PairBalance("probability", clip=1e100), stats_of(example_norm=[1.0] * 2 * len(pairs))
    policy.feed(torch.cat([chosen, rejected]))
    first, second = policy(stats).chunk(2)
    # d loss / d π = weight / π: equal for both
    close(first / second, (chosen - rejected).exp(), 2 * tolerance(torch.float64))
    clipped = PairBalance("probability")
    clipped.feed(torch.cat([chosen, rejected]))
    weights = clipped(stats)
    assert (weights >= 2 / 3 * (1 - 1e-12)).all() and (weights <= 4 / 3 * (1 + 1e-12)).all()


def test_pairs_of_which_something_is_unknown_are_left_alone():
    norms = [0.0, 1.0, torch.nan, 1.0, 2.0, 1.0, 1.0, torch.inf]
    assert PairBalance("parameter")(stats_of(example_norm=norms)).tolist() == [1.0] * 8
    policy = PairBalance("probability")
    policy.feed(torch.tensor([torch.nan, -torch.inf, -1.0, -1.0]))
    assert policy(stats_of(example_norm=[1.0] * 4)).tolist() == [1.0] * 4


def test_a_chain_multiplies_and_shows_each_policy_the_gradients_as_weighted_so_far():
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tasks = torch.tensor([0, 0, 0, 1, 1, 1])
    stats = measured(rows, tasks)
    first = InverseNorm()(stats)
    weighted = measured(rows * first[tasks][:, None], tasks)
    bound = float(weighted.example_norm.median())
    chain = Chain(InverseNorm(), ClipExamples(bound))
    assert weighs_of(chain) == "examples"
    close(chain(stats), first[tasks] * ClipExamples(bound)(weighted), 1e-12)
    assert (chain(stats) * stats.example_norm).max() <= bound * (1 + 1e-12)
    assert float((chain(stats) < first[tasks]).sum()) == 3  # three are clipped

    of_tasks = Chain(InverseNorm(0.5), InverseNorm(1.0), lambda stats: stats.task_norm)
    assert weighs_of(of_tasks) == "tasks"
    evened = InverseNorm(0.5)(stats) * stats.task_norm
    second = InverseNorm()(measured(rows * InverseNorm(0.5)(stats)[tasks][:, None], tasks))
    close(of_tasks(stats), InverseNorm(0.5)(stats) * second * (second * evened), 1e-12)


@given(LIVE)
def test_a_chain_of_equal_weights_and_one_policy_is_that_policy(norms):
    rows = torch.tensor(norms, dtype=torch.float64)[:, None]
    stats = measured(rows, torch.zeros(len(rows), dtype=torch.int64))
    assert torch.equal(Chain(Equal(), ClipExamples(1.0))(stats), ClipExamples(1.0)(stats))
    assert torch.equal(Chain(Equal(), Equal())(stats), Equal()(stats))


@st.composite
def rewards_and_prompts(draw):
    n = draw(st.integers(1, 16))
    rewards = draw(st.lists(st.sampled_from([0.0, 0.5, 0.9, 1.0, -2.0]), min_size=n, max_size=n))
    return rewards, draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))


@given(rewards_and_prompts(), POWERS, st.sampled_from([0.0, 0.3]), DTYPES)
def test_reward_std_is_the_formula_and_has_mean_one_over_all_examples(batch, power, threshold, dtype):
    weights = RewardStd(power, threshold)(rewarded(*batch, dtype))
    assert weights.dtype == dtype and weights.isfinite().all()
    rewards, prompts = np.array(batch[0]), np.array(batch[1])
    raw = np.zeros(len(rewards))
    for prompt in set(batch[1]):
        r = rewards[prompts == prompt]
        if r.min() < r.max() and np.std(r, ddof=1) > threshold:
            raw[prompts == prompt] = np.std(r, ddof=1) ** power
    want = raw / raw.mean() if raw.any() else np.ones(len(raw))
    # the figures of rewards rounded to dtype: a std down to a 30th of the largest reward, then as above
    relative = 60 * 2 * tolerance(dtype, power, 16)
    close(weights.double(), torch.from_numpy(want), relative)
    close(weights.double().mean(), torch.tensor(1.0).double(), tolerance(dtype, 1, 16))


@given(rewards_and_prompts(), st.randoms())
def test_reward_std_permutes_with_the_examples(batch, random):
    order = list(range(len(batch[0])))
    random.shuffle(order)
    permuted = RewardStd()(rewarded([batch[0][i] for i in order], [batch[1][i] for i in order]))
    close(permuted, RewardStd()(rewarded(*batch))[order], 60 * 2 * tolerance(torch.float64, 1, 16))


@given(rewards_and_prompts(), st.sampled_from([0.25, 2.0, 1024.0]))
def test_reward_std_does_not_change_when_all_rewards_scale(batch, scale):
    scaled = RewardStd()(rewarded([reward * scale for reward in batch[0]], batch[1]))
    assert torch.equal(scaled, RewardStd()(rewarded(*batch)))  # powers of two: exact


def test_reward_std_of_power_zero_keeps_what_is_above_the_threshold_and_drops_the_rest():
    #            std  0.7       0          0.07      unknown  NaN
    batch = rewarded([0.0, 1.0, 0.9, 0.9, 0.5, 0.6, 1.0, torch.nan, 1.0], [0, 0, 1, 1, 2, 2, 3, 4, 4])
    assert RewardStd(power=0, threshold=0.5)(batch).tolist() == [4.5, 4.5] + [0.0] * 7
    assert RewardStd(power=0)(batch).tolist() == [2.25, 2.25, 0.0, 0.0, 2.25, 2.25, 0.0, 0.0, 0.0]


def test_reward_std_drops_a_prompt_exactly_at_the_threshold():
    batch = rewarded([0.0, 2.0, 0.0, 4.0], [0, 0, 1, 1])
    assert RewardStd(threshold=float(batch.reward.std[0]))(batch).tolist() == [0.0, 0.0, 2.0, 2.0]


def test_reward_std_leaves_the_step_as_it_was_where_no_prompt_is_above_the_threshold():
    assert RewardStd()(rewarded([0.9, 0.9, 0.3], [0, 0, 1])).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reward_std_leaves_the_step_as_it_was_bit_for_bit_where_all_prompts_vary_alike(dtype):
    assert (RewardStd()(rewarded([0.0, 1.0] * 49, [i // 2 for i in range(98)], dtype)) == 1).all()
    assert (RewardStd()(rewarded([0.0, 0.3, 0.9] * 41, [i // 3 for i in range(123)], dtype)) == 1).all()


def constant(stats):
    return torch.ones(3)


def fed(policy, *figures):
    policy.feed(*figures)
    return policy


class Sees:
    weighs = "prompts"

    def __call__(self, stats):
        return stats.prompt_norm


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: InverseNorm(-1),
            ValueError,
            "InverseNorm: power must be a finite number >= 0, got -1; 1 evens the norms out, 0 leaves them",
        ),
        (
            lambda: InverseNorm(float("nan")),
            ValueError,
            "InverseNorm: power must be a finite number >= 0, got nan; 1 evens the norms out, 0 leaves them",
        ),
        (
            lambda: InverseNorm("1"),
            ValueError,
            "InverseNorm: power must be a finite number >= 0, got '1'; 1 evens the norms out, 0 leaves them",
        ),
        (
            lambda: ClipExamples(0),
            ValueError,
            "ClipExamples: max_norm must be a number > 0, got 0; a quantile of stats.example_norm is a start",
        ),
        (
            lambda: RewardStd(power=float("inf")),
            ValueError,
            "RewardStd: power must be a finite number >= 0, got inf; 0 only filters by the threshold",
        ),
        (
            lambda: RewardStd(threshold=True),
            ValueError,
            "RewardStd: threshold must be a finite number >= 0, got True; 0 drops only prompts whose rewards are equal",
        ),
        (
            lambda: RewardStd()(stats_of()),
            ValueError,
            "RewardStd: the statistics must hold rewards, got None; pass rewards= and prompts= to observe",
        ),
        (
            lambda: InverseNorm()(SimpleNamespace(task_norm=None)),
            ValueError,
            "InverseNorm: stats.task_norm must have been measured, got None; "
            'let the policy weigh "tasks", or give the meter more than one task',
        ),
        (
            lambda: NormalizeExamples(0),
            ValueError,
            "NormalizeExamples: stability must be a finite number > 0, got 0; 0.01 bounds weights by 101",
        ),
        (
            lambda: PairBalance("log"),
            ValueError,
            "PairBalance: space must be one of probability, parameter, got 'log'",
        ),
        (
            lambda: PairBalance("parameter", clip=0.5),
            ValueError,
            "PairBalance: clip must be a number >= 1, got 0.5; 2 lets ρ be 1/2 to 2",
        ),
        (
            lambda: PairBalance("parameter")(stats_of(example_norm=[1.0] * 3)),
            ValueError,
            "PairBalance: the batch must be pairs, the chosen examples and then the rejected, got 3 examples; "
            "leave no example without its other",
        ),
        (
            lambda: fed(PairBalance("probability"), torch.zeros(3))(stats_of(example_norm=[1.0] * 2)),
            ValueError,
            "PairBalance: log_probability must be [2], one per example, got [3]; "
            "feed the mean over each example's tokens",
        ),
        (
            lambda: Chain(),
            ValueError,
            "Chain: at least one policy must be given, got none; Equal() weighs all alike",
        ),
        (
            lambda: Chain(ClipExamples(1.0), InverseNorm())(measured([[1.0], [2.0]], [0, 1])),
            ValueError,
            "InverseNorm: stats.task_norm must have been measured, got None; "
            'let the policy weigh "tasks", or give the meter more than one task',
        ),
        (
            lambda: Chain(constant)(measured([[1.0], [2.0]], [0, 1])),
            ValueError,
            "Chain: a policy must return one weight for each of its tasks, [2], got [3] from "
            f"{constant!r}; set its attribute `weighs` to what it returns",
        ),
        (
            lambda: weighs_of(InverseNorm),
            TypeError,
            "policy: must be an object that can be called, got the class InverseNorm; write InverseNorm(...)",
        ),
        (
            lambda: weighs_of("inverse_norm"),
            TypeError,
            "policy: must be a function from statistics to weights, got 'inverse_norm'; "
            "pass one of gradnorm_ext.policies",
        ),
        (
            lambda: weighs_of(Sees()),
            ValueError,
            "policy: weighs must be one of tasks, examples, got 'prompts'; set it to what it weighs",
        ),
    ],
)
def test_says_what_is_wrong_and_what_to_do(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


def test_every_policy_says_what_it_weighs():
    assert [weighs_of(policy) for policy in (Equal(), InverseNorm())] == ["tasks"] * 2
    assert [weighs_of(policy) for policy in (ClipExamples(1.0), RewardStd())] == ["examples"] * 2

    def by_example(stats):
        return torch.ones_like(stats.example_norm)

    assert weighs_of(by_example) == "tasks"
    by_example.weighs = "examples"
    assert weighs_of(by_example) == "examples"


VALUES = [Equal(), InverseNorm(), ClipExamples(1.0), NormalizeExamples(), RewardStd(), PairBalance("parameter")]


@pytest.mark.parametrize("policy", VALUES)
def test_never_reads_a_tensor_back(policy):
    """Under FakeTensorMode any .item(), bool() or data-dependent shape raises, as it would wait for a GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        reward = SimpleNamespace(std=torch.rand(2), prompt_of=torch.zeros(4, dtype=torch.int64))
        weights = policy(stats_of([1.0, 2.0], example_norm=[1.0] * 4, reward=reward))
    assert weights.shape == ((2,) if weighs_of(policy) == "tasks" else (4,))


@pytest.mark.parametrize("policy", VALUES)
def test_policies_are_values_that_cannot_be_changed(policy):
    assert policy == replace(policy) and hash(policy) == hash(replace(policy))
    with pytest.raises(AttributeError):
        policy.power = 3.0
