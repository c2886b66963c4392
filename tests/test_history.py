"""Running means and the record of a run."""

import re

import pytest
import torch
from gradients import NAMES, stats_of
from hypothesis import given
from hypothesis import strategies as st

from gradnorm_ext import Meter
from gradnorm_ext.history import FIGURES, History
from gradnorm_ext.rewards import reward_stats

NAN = float("nan")


def random(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rewarded(seed, tasks=(0, 0, 0, 0, 1, 1, 1, 1)):
    tasks, prompts = torch.tensor(tasks), torch.arange(len(tasks)) // 2
    rewards = torch.rand(len(tasks), generator=torch.Generator().manual_seed(seed))
    return stats_of(random(len(tasks), 3, seed=seed), tasks, prompts, reward_stats(rewards, prompts, tasks, n_tasks=2))


@given(
    st.lists(st.lists(st.sampled_from([0, 1]), min_size=2, max_size=5), min_size=1, max_size=6),
    st.sampled_from([0.0, 0.9]),
)
def test_means_weigh_steps_by_the_decay_and_skip_those_a_task_is_absent_from(steps, decay):
    history, blocks = History(decay), [stats_of(random(len(t), 3, seed=i), t) for i, t in enumerate(steps)]
    for block in blocks:
        history.append(block)
    for k in range(2):
        of_task = [float(block.task_norm[k]) ** 2 for block in blocks if block.task_count[k] > 0]
        shares = [decay**age for age in reversed(range(len(of_task)))]
        mean = sum(w * x for w, x in zip(shares, of_task, strict=True)) / sum(shares) if of_task else NAN
        assert float(history.mean("sqnorm")[k]) == pytest.approx(mean, nan_ok=True)
    assert torch.equal(history.mean("weight").nan_to_num(1.0), torch.ones(2, dtype=torch.float64))


def test_a_step_that_is_not_finite_changes_no_mean_but_is_on_record():
    history = History()
    history.append(rewarded(0))
    before = history.mean("sqnorm").clone()
    history.append(stats_of([[float("inf")], [1.0]], [0, 1]))
    assert torch.equal(history.mean("sqnorm"), before)
    assert [row["norm"] for row in history.rows()[2:]] == [float("inf"), 1.0]


def test_noise_scale_is_the_quotient_of_two_means():
    history, blocks = History(0.5), [stats_of(3 + random(6, 3, seed=s), [0, 0, 0, 1, 1, 1]) for s in range(2)]
    for block in blocks:
        history.append(block)
    shares = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)[:, None]
    variance, signal = (
        (shares * torch.stack([getattr(block, name) for block in blocks])).sum(0)
        for name in ("task_variance", "task_sqnorm_unbiased")
    )
    torch.testing.assert_close(history.noise_scale, variance / signal)


def test_smoothed_statistics_have_the_running_means_and_every_task_that_was_ever_there():
    history = History(0.5)
    history.append(stats_of(random(4, 3, seed=1), [0, 0, 1, 1]))
    last = stats_of(random(2, 3, seed=2), [0, 0])
    history.append(last)
    smoothed = history.smoothed(last)
    torch.testing.assert_close(smoothed.task_norm, history.mean("sqnorm").sqrt())
    torch.testing.assert_close(smoothed.task_sqnorm_unbiased, history.mean("sqnorm_unbiased"))
    torch.testing.assert_close(smoothed.task_variance, history.mean("variance"))
    assert smoothed.task_count.tolist() == [2, 1] and smoothed.tasks is last.tasks


def test_rows_hold_every_figure_of_every_step_and_task():
    history, blocks = History(), [rewarded(0), rewarded(1, (0,) * 8)]
    history.append(blocks[0], torch.tensor([0.5, 1.5]))
    history.append(blocks[1], torch.arange(8.0), "examples")
    rows = history.rows()
    assert [(row["step"], row["task"]) for row in rows] == [(step, task) for step in range(2) for task in NAMES]
    assert all(tuple(row) == ("step", "task", *FIGURES) for row in rows)
    for step, block in enumerate(blocks):
        for k in range(2):
            row, there = rows[2 * step + k], bool(block.task_count[k] > 0)
            expected = {
                "examples": block.task_count[k],
                "units": block.task_units[k],
                "norm": block.task_norm[k],
                "sqnorm_unbiased": block.task_sqnorm_unbiased[k],
                "variance": block.task_variance[k],
                "reward": block.reward.task_mean[k],
                "reward_std": block.reward.task_std_mean[k],
                "zero_std_share": block.reward.task_zero_std_share[k],
                "realised_share": block.reward.task_realised_share[k],
            }
            for figure, value in expected.items():
                assert row[figure] == pytest.approx(
                    float(value) if there or figure in ("examples", "units") else NAN, nan_ok=True
                )
    assert [row["weight"] for row in rows] == pytest.approx([0.5, 1.5, 3.5, NAN], nan_ok=True)
    assert history.reward_std("math") == [*blocks[0].reward.std[:2].tolist(), *blocks[1].reward.std.tolist()]
    assert history.reward_std("code") == blocks[0].reward.std[2:].tolist()


def test_long_runs_are_brought_to_the_host_in_between():
    history, block = History(), rewarded(0)
    for _ in range(600):
        history.append(block)
    assert len(history._pending) == 600 % 256 and len(history.rows()) == 1200 and history.rows()[-1]["step"] == 599


def test_what_was_written_is_read_again(tmp_path):
    history = History()
    for seed in range(3):
        history.append(rewarded(seed))
    history.append(stats_of(random(2, 3), [0, 0]))
    history.write(tmp_path / "run.csv")
    again = History.read(tmp_path / "run.csv")
    assert again.task_names == NAMES and again.steps == 4
    for one, other in zip(history.rows(), again.rows(), strict=True):
        assert list(one) == list(other)
        assert list(one.values())[2:] == pytest.approx(list(other.values())[2:], rel=0, nan_ok=True)


def test_goes_on_from_its_state():
    history, resumed = History(), History(task_names=NAMES)
    for seed in range(2):
        history.append(rewarded(seed))
    resumed.load_state_dict(history.state_dict())
    for each in (history, resumed):
        each.append(rewarded(2))
    assert all(torch.equal(history.mean(f), resumed.mean(f)) for f in FIGURES)
    assert [row["step"] for row in resumed.rows()] == [2, 2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: History(1.0), "History: decay must lie in [0, 1), got 1.0; 0 keeps the last step only"),
        (
            lambda: History(task_names=("a", "b")).append(rewarded(0)),
            "History: statistics must be of the tasks ['a', 'b'], got ['math', 'code']; keep a history for each meter",
        ),
        (lambda: History().mean("loss"), f"History: figure must be one of {', '.join(FIGURES)}, got 'loss'"),
        (
            lambda: History().smoothed(rewarded(0).weighted(torch.ones(8), "examples")),
            "History: stats.task_norm must have been measured to smooth it, got None; give the meter more than one task",
        ),
    ],
)
def test_says_what_is_wrong_and_what_to_do(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


def test_only_the_last_steps_are_kept_and_the_means_are_of_all(monkeypatch):
    monkeypatch.setattr("gradnorm_ext.history.KEPT", 3)
    monkeypatch.setattr("gradnorm_ext.history._PENDING", 2)
    history = History(0.5)
    model = torch.nn.Linear(1, 1, bias=False)
    meter = Meter(model, tasks=["a", "b"])
    for step in range(7):
        with meter.observe(tasks=[0, 1]):
            (float(step) * model(torch.tensor([[1.0], [2.0]]))).sum().backward()
        history.append(meter.stats)
    assert [row["step"] for row in history.rows()] == [4, 4, 5, 5, 6, 6] and history.steps == 7
    mean = mass = 0.0
    for step in range(7):
        mean, mass = 0.5 * mean + 0.5 * step, 0.5 * mass + 0.5
    assert float(history.mean("norm")[0]) == pytest.approx(mean / mass)
