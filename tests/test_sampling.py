"""Samplers: the shares they keep, what they learn, and that they go on as if they had not stopped."""

import copy
import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from gradnorm_ext import PiKE, PromptSampler, TaskSampler, reward_stats
from gradnorm_ext.sampling import shares_by_size

NAN = float("nan")
TASKS = [0] * 50 + [1] * 30 + [2] * 20


def counts(batch, tasks=TASKS):
    return torch.bincount(torch.tensor([tasks[i] for i in batch]), minlength=max(tasks) + 1)


def zero_std(*shares):
    return SimpleNamespace(task_zero_std_share=torch.tensor(shares))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=3), st.integers(1, 9), st.integers(0, 100))
def test_exact_counts_follow_the_shares_as_closely_as_whole_numbers_can(shares, batch_size, seed):
    shares = [*shares, 1, 0][:3] if len(shares) < 3 else [*shares[:2], 1]
    sampler = TaskSampler(TASKS, batch_size, shares=shares, batches=40, seed=seed)
    drawn = torch.zeros(3, dtype=torch.float64)
    for step, batch in enumerate(sampler, 1):
        assert len(batch) == batch_size
        drawn += counts(batch)
        behind = step * batch_size * torch.tensor(shares).double() / sum(shares) - drawn
        assert (behind.abs() <= 2).all() and drawn[torch.tensor(shares) == 0].sum() == 0
    assert len(sampler) == 40


@pytest.mark.parametrize("exact", [True, False])
def test_shares_hold_over_many_batches(exact):
    shares = torch.tensor([0.2, 0.5, 0.3])
    sampler = TaskSampler(TASKS, 10, shares=shares, exact=exact, batches=2000)
    drawn = sum(counts(batch) for batch in sampler).double()
    error = (shares * (1 - shares) * 20000).sqrt()  # of multinomial draws
    assert ((drawn - 20000 * shares).abs() <= (4 * error if not exact else 2)).all()
    singles = torch.stack([counts(batch) for batch in sampler]).double().std(0)
    assert (singles < 0.6).all() if exact else (singles > 1).all()


@pytest.mark.parametrize(
    ("power", "expected"), [(1, [0.5, 0.3, 0.2]), (0, [1 / 3] * 3), (-1, [6 / 31, 10 / 31, 15 / 31])]
)
def test_shares_by_size_are_proportional_uniform_or_inverse(power, expected):
    torch.testing.assert_close(shares_by_size(TASKS, power), torch.tensor(expected).double(), rtol=1e-6, atol=0)
    assert shares_by_size([1, 1], power).tolist() == [0.0, 1.0]
    if power == 1:
        assert torch.equal(TaskSampler(TASKS, 10).shares, shares_by_size(TASKS))


def test_an_epoch_of_proportional_shares_has_every_example_once():
    sampler = TaskSampler(TASKS, 10)
    epochs = [[i for batch in sampler for i in batch] for _ in range(2)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs) and epochs[0] != epochs[1]


def test_a_small_task_comes_again_only_after_all_of_it_came():
    sampler = TaskSampler([0, 0, 0, 1], 6, shares=[1, 0], batches=2)
    first, second = sampler
    assert sorted(first) == sorted(second) == [0, 0, 1, 1, 2, 2]


def test_shares_may_be_set_between_batches():
    sampler = TaskSampler(TASKS, 10, batches=4)
    batches = iter(sampler)
    assert counts(next(batches)).tolist() == [5, 3, 2]
    sampler.shares = torch.tensor([0.0, 2.0, 2.0])
    assert counts(next(batches)).tolist() == [0, 5, 5]


def test_a_policys_weights_are_the_shares_of_what_is_drawn():
    policy, sampler = PiKE(zeta1=1.0, zeta2=0.0), TaskSampler(TASKS, 6, shares=[1, 1, 1], batches=2)
    stats = SimpleNamespace(
        task_sqnorm_unbiased=torch.tensor([1.0, 2.0, 3.0]).log(),  # whose exponentials the weights are multiplied by
        task_variance=torch.ones(3),
        task_units=torch.ones(3),
        finite=torch.tensor(True),
    )
    batches = iter(sampler)
    assert counts(next(batches)).tolist() == [2, 2, 2]
    sampler.shares = policy(stats)
    assert counts(next(batches)).tolist() == [1, 2, 3]


def test_the_shares_hold_among_the_prompts_that_are_kept():
    kept = torch.tensor([0.25, 1.0, 0.5]).double()
    sampler = TaskSampler(TASKS, 100, shares=[1, 1, 1], batches=200)
    for _ in range(5):
        sampler.update(zero_std(*(1 - kept)))
    torch.testing.assert_close(sampler.kept, kept)
    survivors = sum(counts(batch) for batch in sampler) * kept
    torch.testing.assert_close(survivors / survivors.sum(), torch.full((3,), 1 / 3).double(), rtol=1e-3, atol=0)


def test_what_is_kept_is_a_running_mean_over_the_batches_that_had_the_task():
    sampler = TaskSampler(TASKS, 10, decay=0.5, most=4.0)
    assert sampler.kept.tolist() == [1.0] * 3
    sampler.update(zero_std(0.5, NAN, 1.0))
    sampler.update(zero_std(0.0, NAN, 1.0))
    torch.testing.assert_close(sampler.kept, torch.tensor([(0.5 + 2 * 1) / 3, 1.0, 0.0]).double())
    used = sampler.shares_used / sampler.shares
    assert float(used[2] / used[1]) == pytest.approx(4)  # not infinite
    before, prompts, tasks = sampler.kept.clone(), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 2, 2])
    sampler.update(reward_stats(torch.tensor([1.0, 1.0, 0.0, 1.0]), prompts, tasks, n_tasks=3))
    assert sampler.kept[0] < before[0] and sampler.kept[1] == 1 and sampler.kept[2] > before[2]
    of_arrays = TaskSampler(TASKS, 10)
    of_arrays.update(reward_stats(np.array([1.0, 1.0]), np.array([0, 0]), np.array([2, 2])))
    assert of_arrays.kept.tolist() == [1.0, 1.0, 0.0]


def test_prompts_whose_rewards_vary_come_more_often():
    sampler = PromptSampler(4, 1, floor=0.1, batches=4000)
    rewards, prompts = torch.tensor([0, 1, 0.5, 0.5, 0, 0.25]), torch.tensor([3, 3, 0, 0, 2, 2])
    stats = reward_stats(rewards, prompts)
    sampler.update(stats)
    std = stats.std.double()  # of prompts 0, 2 and 3; the second was not seen
    weight = torch.stack([0.1 * std.mean(), std.mean(), std[1], std[2]])
    torch.testing.assert_close(sampler.probability, weight / weight.sum())
    drawn = torch.bincount(torch.tensor([i for batch in sampler for i in batch]), minlength=4).double()
    error = (sampler.probability * (1 - sampler.probability) * 4000).sqrt()
    assert ((drawn - 4000 * sampler.probability).abs() <= 4 * error).all()


def test_a_prompts_deviation_is_a_running_mean_of_what_is_known():
    sampler = PromptSampler(2, 1, decay=0.75)
    for stds in ([0.4, 0.2], [0.8, NAN]):
        sampler.update(SimpleNamespace(prompt=torch.tensor([0, 1]), std=torch.tensor(stds).double()))
    expected = torch.tensor([0.75 * 0.4 + 0.25 * 0.8, 0.2]).double()
    torch.testing.assert_close(sampler.probability, expected / expected.sum())


def test_a_batch_has_distinct_prompts_each_repeated_in_a_row():
    for batch in PromptSampler(10, 4, repeats=3, batches=20):
        assert batch == [i for i in batch[::3] for _ in range(3)] and len(set(batch)) == 4
    assert len(PromptSampler(10, 4)) == 2


@pytest.mark.parametrize("known", [[], [0.0, 0.0]])
def test_prompts_are_alike_where_nothing_is_known_or_nothing_varies(known):
    sampler = PromptSampler(4, 2)
    sampler.update(SimpleNamespace(prompt=torch.arange(len(known)), std=torch.tensor(known)))
    assert sampler.probability.tolist() == [0.25] * 4


SAMPLERS = {
    "exact": lambda seed=0: TaskSampler(TASKS, 7, shares=[0.21, 0.33, 0.46], batches=8, seed=seed),
    "multinomial": lambda seed=0: TaskSampler(TASKS, 7, exact=False, batches=8, seed=seed),
    "prompts": lambda seed=0: PromptSampler(30, 7, batches=8, seed=seed),
}


def learn(sampler):
    if isinstance(sampler, TaskSampler):
        sampler.update(zero_std(0.5, 0.0, 0.1))
    else:
        sampler.update(SimpleNamespace(prompt=torch.arange(20), std=torch.linspace(0, 1, 20)))


@pytest.mark.parametrize("name", SAMPLERS)
def test_goes_on_in_the_middle_of_an_epoch_as_if_it_had_not_stopped(name):
    sampler, stored = SAMPLERS[name](), io.BytesIO()
    learn(sampler)
    batches = iter(sampler)
    for _ in range(3):
        next(batches)
    torch.save(sampler.state_dict(), stored)
    rest = [*batches, *sampler]
    stored.seek(0)
    resumed = SAMPLERS[name](seed=5)
    resumed.load_state_dict(torch.load(stored, weights_only=True))
    assert [*resumed, *resumed] == rest and len(rest) == 5 + 8


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_seed_tells_what_is_drawn(name):
    assert list(SAMPLERS[name]()) == list(SAMPLERS[name]()) != list(SAMPLERS[name](seed=1))
    sampler = SAMPLERS[name]()
    again = copy.deepcopy(sampler)
    assert list(sampler) == list(again)


@pytest.mark.parametrize("workers", [0, 1])
def test_serves_a_data_loader(workers):
    loader = DataLoader(list(range(100)), batch_sampler=TaskSampler(TASKS, 10), num_workers=workers)
    assert sorted(int(i) for batch in loader for i in batch) == list(range(100)) and len(loader) == 10


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TaskSampler([0], 0), "TaskSampler: batch_size must be an integer >= 1, got 0; pass how many"),
        (
            lambda: PromptSampler(3, 1, batches=0),
            "PromptSampler: batches must be an integer >= 1, got 0; pass how many",
        ),
        (
            lambda: TaskSampler([0, -1], 1),
            "TaskSampler: tasks must be at least one integer >= 0 per example, got [2] of torch.int64 from -1; "
            "number the tasks from 0",
        ),
        (
            lambda: shares_by_size([]),
            "shares_by_size: tasks must be at least one integer >= 0 per example, got [0] of torch.float32; "
            "number the tasks from 0",
        ),
        (
            lambda: TaskSampler([0, 1], 1, shares=[1.0]),
            "TaskSampler: shares must be [2], one per task, got [1]; make a new sampler for more tasks",
        ),
        *[
            (
                lambda shares=shares: TaskSampler([0, 1], 1, shares=shares),
                f"TaskSampler: shares must be finite and >= 0, and not all 0, got {shares}; "
                "put 0 for a task that is to rest",
            )
            for shares in ([1.0, -1.0], [NAN, 1.0], [0.0, 0.0])
        ],
        (
            lambda: TaskSampler([0, 2], 1, shares=[1, 1, 1]),
            "TaskSampler: a task with a share must have examples, got none of task 1",
        ),
        (
            lambda: TaskSampler([0], 1, decay=1),
            "TaskSampler: decay must lie in [0, 1), got 1; 0 believes the last batch",
        ),
        (lambda: TaskSampler([0], 1, most=0.5), "TaskSampler: most must be a number >= 1, got 0.5; 1 corrects nothing"),
        (
            lambda: TaskSampler([0, 1], 1).update(zero_std(0.0)),
            "TaskSampler: the rewards must be of 2 tasks, got 1; pass n_tasks to reward_stats",
        ),
        (
            lambda: TaskSampler([0, 1], 1).load_state_dict(TaskSampler([0, 0], 1).state_dict()),
            "TaskSampler: the state must be of the same data set, got one with other numbers of examples per task; "
            "make the sampler of the same tasks",
        ),
        (
            lambda: PromptSampler(2, 3),
            "PromptSampler: a batch must have at most 2 prompts, got 3; each comes once in a batch",
        ),
        (
            lambda: PromptSampler(2, 1, floor=0),
            "PromptSampler: power must be >= 0, floor > 0, decay in [0, 1) and repeats >= 1, got 1.0, 0, 0.5 and 1",
        ),
        (
            lambda: PromptSampler(2, 1).update(SimpleNamespace(prompt=torch.tensor([0, 5]), std=torch.ones(2))),
            "PromptSampler: prompts must lie in [0, 2), got 0 to 5; take their indices in the data set for ids",
        ),
        (
            lambda: PromptSampler(2, 1).load_state_dict(PromptSampler(3, 1).state_dict()),
            "PromptSampler: the state must be of 2 prompts, got one of 3; make the sampler for the same data set",
        ),
    ],
)
def test_says_what_is_wrong_and_what_to_do(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()
