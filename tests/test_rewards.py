import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gradnorm_ext import backends
from gradnorm_ext.rewards import RewardStats, group_advantages, reward_stats

PER_PROMPT = ("prompt", "task", "count", "mean", "std", "std_error", "zero_std", "all_best", "all_worst")
PER_TASK = (
    "task_mean",
    "task_std_mean",
    "task_std_p10",
    "task_zero_std_share",
    "task_all_best_share",
    "task_all_worst_share",
    "task_share",
    "task_realised_share",
)
FLOAT32, FLOAT64 = np.finfo(np.float32).eps, np.finfo(np.float64).eps


@st.composite
def batches(draw, values=(0.0, 0.5, 0.9, 1.0, -2.0)):
    """Rewards, prompts with arbitrary ids, and the tasks of the prompts."""
    n = draw(st.integers(1, 30))
    rewards = np.array(draw(st.lists(st.sampled_from(values), min_size=n, max_size=n)))
    prompts = draw(hnp.arrays(np.int64, n, elements=st.integers(-5, 5)))
    task_of = draw(hnp.arrays(np.int64, 11, elements=st.integers(0, 3)))
    return rewards, prompts, task_of[prompts + 5]


def expected(rewards, prompts, tasks, ddof, n_tasks):
    """The figures with NumPy, one prompt and one task at a time; all float64."""
    figures = {name: [] for name in PER_PROMPT + PER_TASK}
    for prompt in sorted(set(prompts.tolist())):
        r = rewards[prompts == prompt]
        size, same = len(r), r.min() == r.max()
        zero_std = bool(same and size >= 2)
        s = 0.0 if same else np.std(r, ddof=1)
        error = np.nan
        if size >= 2 and s > 0:
            fourth = np.mean((r - r.mean()) ** 4)
            error = np.sqrt((fourth - s**4 * (size - 3) / (size - 1)) / size) / (2 * s)
            error *= np.sqrt((size - 1) / (size - ddof))
        std = np.nan if size <= ddof else 0.0 if same else np.std(r, ddof=ddof)
        spread = rewards.min() < rewards.max()
        for name, value in dict(
            prompt=prompt,
            task=tasks[prompts == prompt][0],
            count=size,
            mean=r[0] if same else r.mean(),
            std=std,
            std_error=error,
            zero_std=zero_std,
            all_best=zero_std and spread and r[0] == rewards.max(),
            all_worst=zero_std and spread and r[0] == rewards.min(),
        ).items():
            figures[name].append(value)
    of = {name: np.array(figures[name]) for name in PER_PROMPT}
    for k in range(n_tasks):
        mine = of["task"] == k
        stds = of["std"][mine & (of["count"] > ddof)]
        live, all_live = np.sum(mine & ~of["zero_std"]), np.sum(~of["zero_std"])
        for name, value in dict(
            task_mean=np.mean(rewards[tasks == k]) if mine.any() else np.nan,
            task_std_mean=stds.mean() if len(stds) else np.nan,
            task_std_p10=np.percentile(stds, 10) if len(stds) else np.nan,
            task_zero_std_share=of["zero_std"][mine].mean() if mine.any() else np.nan,
            task_all_best_share=of["all_best"][mine].mean() if mine.any() else np.nan,
            task_all_worst_share=of["all_worst"][mine].mean() if mine.any() else np.nan,
            task_share=mine.mean(),
            task_realised_share=live / all_live if all_live else np.nan,
        ).items():
            figures[name].append(value)
    return {name: np.array(values) for name, values in figures.items()}


def as_arrays(stats):
    return {name: np.asarray(getattr(stats, name)) for name in (*PER_PROMPT, *PER_TASK, "prompt_of")}


def of_reference(*batch, **options):
    with pytest.MonkeyPatch.context() as environment:
        environment.setattr(backends, "DEFAULT", "reference")
        return reward_stats(*batch, **options)


@given(batches(), st.sampled_from([0, 1]))
def test_every_figure_is_what_numpy_says_one_prompt_and_task_at_a_time(batch, ddof):
    rewards, prompts, tasks = batch
    got = as_arrays(reward_stats(rewards, prompts, tasks, ddof=ddof, n_tasks=4))
    # Relative: up to 30 terms, fourth powers, a difference that leaves 3 / 30² of its terms, deviations down to a 30th
    # of the rewards. Absolute: the sum of 30 numbers of at most 2 may cancel.
    tolerance = {"rtol": 30 * 4 * (30**2 / 3) * 30 * FLOAT64, "atol": 30 * 2 * FLOAT64}
    for name, want in expected(rewards, prompts, tasks, ddof, 4).items():
        np.testing.assert_allclose(got[name].astype(float), want.astype(float), **tolerance, err_msg=name)


@given(batches(), st.sampled_from([0, 1]), st.sampled_from([np.float32, np.float64]))
def test_arrays_and_tensors_agree_and_keep_their_kind_and_dtype(batch, ddof, dtype):
    rewards, prompts, tasks = batch[0].astype(dtype), *batch[1:]
    of_arrays = reward_stats(rewards, prompts, tasks, ddof=ddof)
    without_native = of_reference(rewards, prompts, tasks, ddof=ddof)
    of_tensors = of_reference(*map(torch.from_numpy, (rewards, prompts, tasks)), ddof=ddof)
    for name, value in as_arrays(of_arrays).items():
        assert isinstance(getattr(of_arrays, name), np.ndarray) and isinstance(getattr(of_tensors, name), torch.Tensor)
        assert np.asarray(getattr(of_tensors, name)).dtype == value.dtype
        np.testing.assert_array_equal(np.asarray(getattr(of_tensors, name)), getattr(without_native, name))
        # One in float64, however the backends order their sums, which may cancel; where it is float32, two roundings.
        rtol, atol = 2e6 * FLOAT64 + np.finfo(dtype).eps, 30 * 2 * FLOAT64
        np.testing.assert_allclose(value, getattr(without_native, name), rtol, atol, err_msg=name)
        if name not in ("prompt", "task", "count", "zero_std", "all_best", "all_worst", "prompt_of"):
            assert value.dtype == dtype


@given(batches(), st.randoms())
def test_the_order_of_the_examples_does_not_matter(batch, random):
    order = list(range(len(batch[0])))
    random.shuffle(order)
    straight = as_arrays(reward_stats(*batch))
    shuffled = as_arrays(reward_stats(*(array[order] for array in batch)))
    np.testing.assert_array_equal(shuffled.pop("prompt_of"), straight.pop("prompt_of")[order])
    for name, value in straight.items():
        np.testing.assert_allclose(shuffled[name], value, rtol=2e6 * FLOAT64, atol=30 * 2 * FLOAT64, err_msg=name)


@st.composite
def sized_groups(draw):
    """Groups of 1 to 40, whose ids ascend with gaps, then perhaps shuffled, of rewards that may all be equal."""
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    gaps = draw(st.lists(st.integers(1, 2**60), min_size=len(sizes), max_size=len(sizes)))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    of = np.repeat(np.arange(len(sizes)), sizes)
    equal = np.array(draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes))))
    rewards = np.where(equal[of], random.choice([0.1, 0.9, 1.0]), random.normal(size=len(of)))
    prompts, tasks = (np.cumsum(gaps) - 2**62)[of], random.integers(0, 3, len(sizes))[of]
    order = random.permutation(len(of)) if draw(st.booleans()) else np.arange(len(of))
    return rewards[order], prompts[order], tasks[order]


@given(sized_groups(), st.sampled_from([0, 1]), st.sampled_from(["float16", "bfloat16", "float32", "float64"]))
def test_groups_of_all_sizes_have_numpys_figures_in_every_dtype_and_however_they_lie_in_memory(batch, ddof, dtype):
    rewards, prompts, tasks = (torch.from_numpy(array) for array in batch)
    rewards = rewards.to(getattr(torch, dtype))
    stats = reward_stats(rewards, prompts, tasks, ddof=ddof, n_tasks=3)
    apart = [torch.stack([each, each], 1)[:, 0] for each in (rewards, prompts, tasks)]
    of_apart = reward_stats(*apart, ddof=ddof, n_tasks=3)
    want = expected(rewards.double().numpy(), prompts.numpy(), tasks.numpy(), ddof, 3)
    rounding = torch.finfo(stats.std.dtype).eps
    assert stats.std.dtype == stats.task_mean.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    for name, got in as_arrays(stats).items():
        np.testing.assert_array_equal(got, getattr(of_apart, name).numpy(), err_msg=name)
        if name != "prompt_of":
            # Sums of up to 240 terms; a group's error may be a difference that leaves 3 / 40² of its terms, and its
            # deviation is at least a 240th of the largest of normal numbers, which are below 8. One rounding at the end.
            rtol = rounding + (240 * 4 * 40**2 / 3 * FLOAT64 if name == "std_error" else 240 * 240 * FLOAT64)
            atol = 240 * 8 * FLOAT64 if name in ("mean", "task_mean") else 0
            np.testing.assert_allclose(got.astype(float), want[name].astype(float), rtol, atol, err_msg=name)
    np.testing.assert_array_equal(stats.prompt[stats.prompt_of], prompts)


@given(batches(values=(0.0, 0.5, -2.0, np.inf, -np.inf, np.nan)), st.sampled_from([0, 1]))
def test_what_is_not_finite_ends_in_the_same_figures_as_in_plain_torch(batch, ddof):
    plain = as_arrays(of_reference(*batch, ddof=ddof))
    for name, value in as_arrays(reward_stats(*batch, ddof=ddof)).items():
        np.testing.assert_allclose(value, plain[name], rtol=2e6 * FLOAT64, err_msg=name)


@pytest.mark.parametrize("way", [reward_stats, of_reference])
@pytest.mark.parametrize("place", range(6))
def test_an_infinite_reward_leaves_its_tasks_deviations_unknown(way, place):
    rewards = np.arange(12.0) ** 2
    rewards[2 * place] = np.inf
    stats = way(rewards, np.arange(6).repeat(2), np.zeros(12, int))
    assert np.isnan(stats.std).tolist() == [p == place for p in range(6)]
    assert np.isnan(stats.task_std_mean).all() and np.isnan(stats.task_std_p10).all()
    assert stats.task_mean == np.inf and stats.task_zero_std_share == 0


@pytest.mark.parametrize("spread", ["uniform", "equal", "half zero", "of all magnitudes", "two far apart"])
def test_the_tenth_percentile_of_many_prompts_is_numpys(spread):
    random = np.random.default_rng(0)
    stds = {
        "uniform": random.random(6000),
        "equal": np.full(6000, 0.5),
        "half zero": np.maximum(random.normal(size=6000), 0),
        "of all magnitudes": 10.0 ** random.uniform(-150, 150, 6000),
        "two far apart": np.where(np.arange(6000) < 600, 1e-9, 1e9),  # rank 599.9 lies between them
    }[spread]
    rewards = np.stack([np.zeros(6000), stds], 1).ravel()  # sqrt(2) of each is the range of its pair
    stats = reward_stats(rewards, np.arange(6000).repeat(2), np.zeros(12000, int))
    np.testing.assert_allclose(stats.std, stds / np.sqrt(2), rtol=4 * FLOAT64)
    np.testing.assert_allclose(stats.task_std_p10, [np.percentile(stats.std, 10)], rtol=4 * FLOAT64)
    np.testing.assert_allclose(stats.task_std_mean, [stats.std.mean()], rtol=6000 * FLOAT64)


def test_one_prompt_may_have_all_the_examples():
    rewards = np.random.default_rng(0).random(100_001, np.float32)
    stats = reward_stats(rewards, np.full(100_001, -3))
    exact = rewards.astype(np.float64)
    assert stats.mean[0] == np.float32(exact.mean()) and stats.std[0] == np.float32(exact.std(ddof=1))
    assert stats.count.tolist() == [100_001] and not stats.prompt_of.any()


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_what_the_figures_keep_is_a_copy(kind, dtype):
    given = [
        kind(np.array(values, dtype=of)) for values, of in (([1, 0, 2], dtype), ([4, 4, 7], int), ([0, 0, 1], int))
    ]
    stats = reward_stats(*given)
    for array in given:
        array[:] = 9
    assert stats.rewards.tolist() == [1, 0, 2]
    assert stats.prompt.tolist() == [4, 7] and stats.task.tolist() == [0, 1] and stats.prompt_of.tolist() == [0, 0, 1]


@given(
    hnp.arrays(np.int64, 6, elements=st.integers(-3, 3)),
    hnp.arrays(np.int64, 6, elements=st.integers(-1, 3)),
    st.booleans(),
    st.sampled_from([None, 1, 2, 4]),
)
def test_tasks_are_refused_for_the_same_reason_by_both_ways(prompts, tasks, ascending, n_tasks):
    prompts = np.sort(prompts) if ascending else prompts
    of = {prompt: tasks[prompts == prompt] for prompt in prompts.tolist()}
    torn = {prompt: (mine.min(), mine.max()) for prompt, mine in of.items() if mine.min() < mine.max()}
    if tasks.min() < 0:
        allowed = [f"tasks must not be negative, got {tasks.min()}; number the tasks from 0"]
    elif tasks.max() >= (n_tasks or 9):
        where = f"[0, {n_tasks}), got {tasks.min()} to {tasks.max()}"
        allowed = [f"tasks must lie in {where}; pass a larger n_tasks"]
    else:
        allowed = [
            f"a prompt must lie in one task, got prompt {prompt} in tasks {low} and {high}; "
            "give each task's prompts ids of their own"
            for prompt, (low, high) in torn.items()
        ]
    for way in (reward_stats, of_reference):
        if not allowed:
            assert len(way(np.ones(6), prompts, tasks, n_tasks=n_tasks).task_mean) == (n_tasks or tasks.max() + 1)
            continue
        with pytest.raises(ValueError, match="|".join(f"^reward_stats: {re.escape(one)}$" for one in allowed)):
            way(np.ones(6), prompts, tasks, n_tasks=n_tasks)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool])
def test_converts_integer_rewards_to_float64(dtype):
    stats = reward_stats(torch.tensor([1, 0, 1], dtype=dtype), torch.tensor([0, 0, 0]))
    assert stats.std.dtype == torch.float64
    torch.testing.assert_close(stats.std, torch.tensor([1 / 3**0.5], dtype=torch.float64))
    of_array = reward_stats(np.array([1, 0, 1], dtype=bool), np.array([0, 0, 0], dtype=np.uint32))
    np.testing.assert_allclose(of_array.std, [1 / 3**0.5])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rewards_are_summed_exactly_and_come_out_as_float32(dtype):
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.5], dtype=dtype)
    stats = reward_stats(rewards, torch.zeros(4, dtype=torch.int32))
    assert stats.std.dtype == torch.float32
    torch.testing.assert_close(stats.std[0], rewards.float().std())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_equal_rewards_have_no_spread_however_they_round(kind, dtype):
    rewards, prompts = np.full(7, 0.9, dtype), np.zeros(7, np.int64)
    stats = reward_stats(kind(rewards), kind(prompts))
    assert bool(stats.zero_std[0]) and stats.std[0] == 0 and stats.mean[0] == rewards[0]
    assert np.isnan(stats.std_error[0])
    np.testing.assert_array_equal(stats.vanished, [0])


def test_a_group_of_one_has_an_unknown_std_and_has_not_vanished():
    stats = reward_stats(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([4, 4, 9]))
    assert stats.std[1].isnan() and stats.std_error[1].isnan() and stats.mean[1] == 2
    assert stats.zero_std.tolist() == [False, False] and stats.vanished.tolist() == []
    torch.testing.assert_close(stats.task_std_mean, stats.std[:1])
    population = reward_stats(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([4, 4, 9]), ddof=0)
    assert population.std.tolist() == [0.5, 0.0] and population.zero_std.tolist() == [False, False]


def test_tells_groups_of_the_best_reward_from_groups_of_the_worst():
    #                       best    worst   between  spread
    rewards = torch.tensor([1, 1.0, 0, 0.0, 0.5, 0.5, 0, 1.0])
    stats = reward_stats(rewards, torch.arange(4).repeat_interleave(2), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))
    assert stats.zero_std.tolist() == [True, True, True, False]
    assert stats.all_best.tolist() == [True, False, False, False]
    assert stats.all_worst.tolist() == [False, True, False, False]
    assert stats.task_zero_std_share.tolist() == [1.0, 0.5]
    assert stats.task_all_best_share.tolist() == stats.task_all_worst_share.tolist() == [0.5, 0.0]
    assert stats.task_share.tolist() == [0.5, 0.5] and stats.task_realised_share.tolist() == [0.0, 1.0]


def test_a_batch_of_one_reward_is_neither_best_nor_worst_and_has_no_realised_shares():
    stats = reward_stats(torch.zeros(4), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1]))
    assert stats.zero_std.all() and not stats.all_best.any() and not stats.all_worst.any()
    assert stats.task_realised_share.isnan().all()


def test_filtering_shifts_the_share_of_a_task():
    rewards = torch.cat([torch.zeros(2 * 6), torch.tensor([0.0, 1] * 4)])
    tasks = torch.tensor([0] * 2 * 8 + [1] * 2 * 2)
    stats = reward_stats(rewards, torch.arange(10).repeat_interleave(2), tasks)
    torch.testing.assert_close(stats.task_share, torch.tensor([0.8, 0.2]))
    torch.testing.assert_close(stats.task_realised_share, torch.tensor([0.5, 0.5]))


def test_a_task_without_prompts_has_no_figures_but_shares_of_zero():
    stats = reward_stats(torch.tensor([0.0, 1]), torch.tensor([0, 0]), torch.tensor([1, 1]), n_tasks=3)
    assert stats.task_share.tolist() == stats.task_realised_share.tolist() == [0, 1, 0]
    for name in PER_TASK[:6]:
        assert getattr(stats, name).isnan().tolist() == [True, False, True], name


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_a_nan_reward_spoils_its_prompt_and_its_task_and_no_other(kind):
    rewards = np.array([0, 1, np.nan, 1, 1, 1, 0, 0])
    prompts, tasks = np.array([0, 0, 1, 1, 2, 2, 3, 3]), np.array([0, 0, 0, 0, 1, 1, 1, 1])
    stats = reward_stats(kind(rewards), kind(prompts), kind(tasks))
    for name in ("mean", "std", "std_error"):
        spoiled = np.isnan(np.asarray(getattr(stats, name)))
        assert spoiled[1] and (name == "std_error" or not spoiled[[0, 2, 3]].any()), name
    assert np.asarray(stats.zero_std).tolist() == [False, False, True, True]
    assert np.asarray(stats.all_best).tolist() == [False, False, True, False]
    for name in PER_TASK[:6]:
        assert np.isnan(np.asarray(getattr(stats, name))).tolist() == [True, False], name
    assert np.asarray(stats.task_share).tolist() == [0.5, 0.5]
    assert np.isnan(np.asarray(stats.task_realised_share)).all()


def test_a_nan_in_a_group_of_one_spoils_its_task_too():
    stats = reward_stats(torch.tensor([0.0, 1, torch.nan]), torch.tensor([0, 0, 1]))
    assert all(getattr(stats, name).isnan().all() for name in PER_TASK[:6])


def test_the_standard_error_is_that_of_many_samples():
    generator = torch.Generator().manual_seed(0)
    groups, size = 4096, 512
    rewards = torch.randn(groups, size, generator=generator, dtype=torch.float64)
    stats = reward_stats(rewards.flatten(), torch.arange(groups).repeat_interleave(size))
    # Against the spread of as many deviations, whose own standard error is 1 / sqrt(2 groups) of it: six of those.
    # The formula's own error, a few parts in `size`, is far below.
    assert abs(stats.std_error.mean() / stats.std.std() - 1) < 6 / (2 * groups) ** 0.5


def test_arrays_that_torch_cannot_wrap_are_read_all_the_same():
    rewards = np.array([0, 1, 0, 1], dtype=">f4")[::-1]
    rewards.flags.writeable = False
    prompts = np.array([5, 5, 5, 5], dtype=">i2")
    assert reward_stats(rewards, prompts).std[0] == np.float32(np.std([0, 1, 0, 1], ddof=1))


def test_no_gradient_flows_into_the_figures():
    rewards = torch.tensor([0.0, 1.0], requires_grad=True)
    prompts = torch.tensor([0, 0])
    assert not reward_stats(rewards, prompts).std.requires_grad
    assert not group_advantages(rewards, prompts).requires_grad


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_signal_is_the_deviation_times_the_root_mean_square_of_the_known_scores(kind):
    rewards, prompts = np.array([0.0, 2, 4, 1, 1, 3, 5]), np.array([8, 8, 8, 1, 1, 4, 4])
    score = np.array([3.0, np.nan, 4.0, 9.0, 9.0, np.nan, np.nan])
    signal = reward_stats(kind(rewards), kind(prompts)).signal(kind(score))
    assert type(signal) is type(kind(rewards))
    np.testing.assert_allclose(signal, [0, np.nan, 2 * np.sqrt(12.5)], rtol=4 * FLOAT64)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_merged_blocks_have_the_figures_of_one_batch(kind):
    rewards, prompts = np.array([0.0, 1, 1, 1, 0, 0, 0.5, 1]), np.array([7, 7, 3, 3, 5, 5, 9, 9])
    tasks = np.array([0, 0, 1, 1, 0, 0, 2, 2])
    given = [(kind(rewards[part]), kind(prompts[part]), kind(tasks[part])) for part in (slice(4), slice(4, 8))]
    merged = RewardStats.merged([reward_stats(*block, ddof=0, n_tasks=3) for block in given])
    whole = reward_stats(kind(rewards), kind(prompts), kind(tasks), ddof=0)
    assert merged.ddof == 0 and type(merged.std) is type(whole.std)
    for name, value in as_arrays(whole).items():
        np.testing.assert_array_equal(np.asarray(getattr(merged, name)), value, err_msg=name)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_a_group_of_which_a_part_is_elsewhere_is_found_out(kind):
    rewards, prompts = kind(np.array([0.0, 1, 1, 0, 1])), kind(np.array([7, 7, 3, 3, 3]))
    message = (
        "every prompt must have 3 examples, got 2 of prompt 7; "
        "its group was split across micro-batches: call this on whole groups"
    )
    for call in (reward_stats, group_advantages):
        with pytest.raises(ValueError, match=f"^{call.__name__}: {re.escape(message)}$"):
            call(rewards, prompts, group_size=3)
        call(rewards[2:], prompts[2:], group_size=3)


ONE, IDS = torch.ones(2), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: reward_stats([1.0, 0.0], IDS),
            TypeError,
            "reward_stats: rewards and prompts must be all torch tensors or all NumPy arrays, got list and Tensor; "
            "convert them with torch.as_tensor or numpy.asarray",
        ),
        (
            lambda: reward_stats(ONE, IDS, np.zeros(2, int)),
            TypeError,
            "reward_stats: rewards, prompts and tasks must be all torch tensors or all NumPy arrays, got Tensor, "
            "Tensor and ndarray; convert them with torch.as_tensor or numpy.asarray",
        ),
        (
            lambda: reward_stats(ONE, IDS[:1]),
            ValueError,
            "reward_stats: rewards and prompts must be one-dimensional and equally long, got [2] and [1]; "
            "pass one entry per example",
        ),
        (
            lambda: reward_stats(ONE[None], IDS[None]),
            ValueError,
            "reward_stats: rewards and prompts must be one-dimensional and equally long, got [1, 2] and [1, 2]; "
            "pass one entry per example",
        ),
        (
            lambda: reward_stats(ONE[:0], IDS[:0]),
            ValueError,
            "reward_stats: rewards must have at least one example, got [0]; skip empty batches",
        ),
        (
            lambda: reward_stats(ONE, IDS.to("meta")),
            ValueError,
            "reward_stats: rewards and prompts must be on one device, got cpu and meta; "
            "move them to the rewards' device",
        ),
        (
            lambda: reward_stats(ONE.to(torch.complex64), IDS),
            TypeError,
            "reward_stats: rewards must be floating, integer or bool, got torch.complex64; cast them",
        ),
        (
            lambda: reward_stats(np.array(["a", "b"]), np.zeros(2, int)),
            TypeError,
            "reward_stats: rewards must be floating, integer or bool, got <U1; cast them",
        ),
        (
            lambda: reward_stats(ONE, ONE),
            TypeError,
            "reward_stats: prompts must be integers that fit int64, got torch.float32; cast them",
        ),
        (
            lambda: reward_stats(np.ones(2), np.zeros(2, np.uint64)),
            TypeError,
            "reward_stats: prompts must be integers that fit int64, got uint64; cast them",
        ),
        (
            lambda: reward_stats(ONE, IDS, IDS - 1),
            ValueError,
            "reward_stats: tasks must not be negative, got -1; number the tasks from 0",
        ),
        (
            lambda: reward_stats(ONE, IDS, IDS + 2, n_tasks=2),
            ValueError,
            "reward_stats: tasks must lie in [0, 2), got 2 to 2; pass a larger n_tasks",
        ),
        (
            lambda: reward_stats(ONE, IDS, n_tasks=0),
            ValueError,
            "reward_stats: n_tasks must be an integer >= 1, got 0; pass the number of tasks",
        ),
        (
            lambda: reward_stats(ONE, IDS + 7, torch.tensor([0, 3])),
            ValueError,
            "reward_stats: a prompt must lie in one task, got prompt 7 in tasks 0 and 3; "
            "give each task's prompts ids of their own",
        ),
        (
            lambda: reward_stats(ONE, IDS, ddof=2),
            ValueError,
            "reward_stats: ddof must be 0 or 1, got 2; pass 1 for the sample's standard deviation",
        ),
        (
            lambda: reward_stats(ONE, IDS, group_size=0),
            ValueError,
            "reward_stats: group_size must be an integer >= 1, got 0; pass the samples per prompt",
        ),
        (
            lambda: reward_stats(ONE, IDS).signal(torch.ones(3)),
            ValueError,
            "RewardStats.signal: score_norm must be [2], one per example, got [3]; pass ‖∇ log π‖ of each",
        ),
        (
            lambda: group_advantages(ONE, IDS, scale="std"),
            ValueError,
            "group_advantages: scale must be one of group, batch, none, got 'std'; pass none for Dr. GRPO's",
        ),
        (
            lambda: group_advantages(ONE, IDS, eps=-1.0),
            ValueError,
            "group_advantages: eps must be a finite number >= 0, got -1.0; pass 1e-6",
        ),
        (
            lambda: group_advantages(ONE, IDS[:1]),
            ValueError,
            "group_advantages: rewards and prompts must be one-dimensional and equally long, got [2] and [1]; "
            "pass one entry per example",
        ),
    ],
)
def test_says_what_is_wrong_and_what_to_do(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()


def naive_advantages(rewards, prompts, scale, eps):
    advantages = np.zeros(len(rewards))
    for prompt in set(prompts.tolist()):
        r = rewards[prompts == prompt]
        if r.min() < r.max():
            std = {"group": np.std(r, ddof=1), "batch": np.std(rewards, ddof=1), "none": 1 - eps}[scale]
            advantages[prompts == prompt] = (r - r.mean()) / (std + eps)
    return advantages


@given(batches(), st.sampled_from(["group", "batch", "none"]), st.sampled_from([1e-6, 1e-4]))
def test_advantages_are_what_numpy_says_one_prompt_at_a_time(batch, scale, eps):
    rewards, prompts, _ = batch
    got = group_advantages(rewards, prompts, scale=scale, eps=eps)
    of_tensors = group_advantages(torch.from_numpy(rewards), torch.from_numpy(prompts), scale=scale, eps=eps)
    # a sum of 30 numbers of at most 2 has an error of 60 eps, divided by deviations from a 60th on
    np.testing.assert_allclose(got, naive_advantages(rewards, prompts, scale, eps), rtol=0, atol=60 * 60 * 60 * FLOAT64)
    np.testing.assert_array_equal(got, of_tensors.numpy())


@given(batches())
def test_advantages_of_a_prompt_add_up_to_nothing(batch):
    rewards, prompts, _ = batch
    advantages = group_advantages(rewards, prompts)
    sums = [advantages[prompts == prompt].sum() for prompt in set(prompts.tolist())]
    np.testing.assert_allclose(sums, 0, atol=30 * 60 * 60 * 60 * FLOAT64)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [0.0, 1e-9])
def test_equal_rewards_and_groups_of_one_get_exactly_zero(scale, dtype, eps):
    rewards = torch.tensor([0.9] * 7 + [0.3, 1.0, 0.0], dtype=dtype)
    prompts = torch.tensor([0] * 7 + [1, 2, 2])
    advantages = group_advantages(rewards, prompts, scale=scale, eps=eps)
    assert advantages[:8].tolist() == [0.0] * 8
    assert advantages[8] == -advantages[9] > 0


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_nan_reward_is_seen_in_its_prompts_advantages(scale):
    rewards, prompts = torch.tensor([torch.nan, 1, 0, 1, 1, 1]), torch.tensor([0, 0, 1, 1, 2, 2])
    unknown = group_advantages(rewards, prompts, scale=scale).isnan().tolist()
    assert unknown == [True, True, scale == "batch", scale == "batch", False, False]


def test_advantages_keep_the_rewards_kind_and_precision():
    prompts = torch.tensor([0, 0])
    for dtype, figures in [
        (torch.float64, torch.float64),
        (torch.int64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ]:
        assert group_advantages(torch.tensor([1, 0], dtype=dtype), prompts).dtype == figures
    of_array = group_advantages(np.float32([1, 0]), prompts.numpy())
    assert isinstance(of_array, np.ndarray) and of_array.dtype == np.float32


def test_arrays_and_tensors_take_the_native_way_where_it_is_built(monkeypatch):
    if isinstance(backends.load("native"), str):
        pytest.skip("the native extension is not built")
    from gradnorm_ext import _C

    calls = []
    run = _C.reward_stats
    monkeypatch.setattr(backends, "DEFAULT", "auto")
    monkeypatch.setattr(_C, "reward_stats", lambda *args, **options: calls.append(args) or run(*args, **options))
    reward_stats(np.ones(2), np.zeros(2, int))
    reward_stats(torch.ones(2), torch.zeros(2, dtype=torch.int64))
    assert len(calls) == 2
    monkeypatch.setattr(backends, "DEFAULT", "reference")
    reward_stats(np.ones(2), np.zeros(2, int))
    assert len(calls) == 2
