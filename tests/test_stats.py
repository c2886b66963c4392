"""What follows from the measurements of a block, and of several: estimates without bias, merging, reweighting, logs."""

import dataclasses
import math
import re

import pytest
import torch
from gradients import NAMES, stats_of
from torch import nn

from gradnorm_ext import Meter
from gradnorm_ext.distributed import _sums, _whole
from gradnorm_ext.rewards import reward_stats
from gradnorm_ext.stats import Stats


def random(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_unbiased_figures_agree_with_the_truth_over_many_draws():
    draws, width, mean = 2000, 5, torch.tensor([0.5, -0.2, 0, 0.1, 0.3], dtype=torch.float64)
    spread = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0], dtype=torch.float64)
    found, raw = [], []
    for draw in range(draws):
        rows = mean + spread * random(9, width, seed=draw)
        whole, first, second, alone = (
            stats_of(rows[part], [0] * len(rows[part]), names=("all",))
            for part in (slice(9), slice(0, 3), slice(3, 8), slice(8, 9))
        )
        merged = Stats.merged([first, second, alone])
        found.append([float(s) for each in (whole, merged) for s in (each.task_sqnorm_unbiased, each.task_variance)])
        raw.append(float(whole.task_norm) ** 2 / 81)
    found = torch.tensor(found)
    truth = torch.stack([mean.square().sum(), spread.square().sum()] * 2)
    error = found.std(0) / draws**0.5
    assert ((found.mean(0) - truth).abs() <= 3 * error).all()
    assert (error[[0, 2]] < 0.1 * truth[1] / 9).all()  # so that the bias of the raw norm would be seen:
    assert torch.tensor(raw).mean() - truth[0] > 10 * error[0]


def test_merged_figures_are_means_over_all_pairs_of_units_that_lie_in_one_block():
    sizes, rows = (4, 2, 1, 3), 2 + random(10, 3)  # 2: so that the estimate is positive
    blocks = [stats_of(part, [0] * len(part), names=("all",)) for part in rows.split(sizes)]
    products, squares = [], []
    for part in rows.split(sizes):
        pairs = [(i, j) for i in range(len(part)) for j in range(len(part)) if i != j]
        products += [part[i] @ part[j] for i, j in pairs]
        squares.append((part - part.mean(0)).square().sum())
    merged = Stats.merged(blocks)
    torch.testing.assert_close(merged.task_sqnorm_unbiased, torch.stack(products).mean()[None])
    torch.testing.assert_close(merged.task_variance, (torch.stack(squares).sum() / (10 - 4))[None])
    torch.testing.assert_close(merged.noise_scale, merged.task_variance / merged.task_sqnorm_unbiased)


def test_a_task_that_some_blocks_lack_keeps_the_figures_of_the_others():
    both, one = stats_of(random(6, 3), [0, 0, 0, 1, 1, 1]), stats_of(random(2, 3, seed=1), [0, 0])
    merged = Stats.merged([both, one])
    torch.testing.assert_close(merged.task_sqnorm_unbiased[1], both.task_sqnorm_unbiased[1])
    torch.testing.assert_close(merged.task_variance[1], both.task_variance[1])
    assert merged.task_units.tolist() == merged.task_count.tolist() == [5, 3]
    assert Stats.merged([one, one]).task_sqnorm_unbiased.isnan().tolist() == [False, True]


@pytest.mark.parametrize("per_layer", [False, True])
def test_merging_joins_examples_prompts_rewards_and_layers(per_layer):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    meter, blocks, rewards = Meter(model, tasks=NAMES, per_layer=per_layer), [], torch.rand(10)
    for first in (0, 4):
        with meter.observe(
            tasks=[0, 0, 1, 1], prompts=[first, first, 2 + first, 2 + first], rewards=rewards[first : first + 4]
        ):
            model(torch.randn(4, 3)).square().sum().backward()
        blocks.append(meter.stats)
    merged = Stats.merged(blocks)
    assert torch.equal(merged.example_norm, torch.cat([block.example_norm for block in blocks]))
    assert torch.equal(merged.prompt_norm, torch.cat([block.prompt_norm for block in blocks]))
    assert merged.prompts.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and merged.tasks.tolist() == [0, 0, 1, 1] * 2
    assert merged.task_norm is None and merged.task_gram is None and merged.task_norm_ratio is None
    assert merged.task_units.tolist() == [2, 2] and merged.task_names == NAMES and bool(merged.finite)
    together = reward_stats(
        torch.cat([rewards[:4], rewards[4:8]]), torch.tensor([0, 0, 2, 2, 4, 4, 6, 6]), merged.tasks, n_tasks=2
    )
    for name, value in vars(together).items():
        assert name == "ddof" or torch.equal(getattr(merged.reward, name), value), name
    assert set(merged.layers) == ({""} if per_layer else set())
    for layer in merged.layers.values():
        assert torch.equal(layer.example_norm, merged.example_norm)
    assert "gradnorm/task/math/norm" not in merged.log_dict()


def test_a_block_that_is_not_finite_spoils_the_merged_one():
    bad = stats_of([[torch.nan, 1.0], [1.0, 1.0]], [0, 1])
    assert not bool(Stats.merged([stats_of(random(4, 2), [0, 0, 1, 1]), bad]).finite)


def test_reweighted_statistics_are_those_of_the_reweighted_gradients():
    tasks, prompts, rows = [0, 0, 0, 1, 1, 1], [0, 0, 1, 2, 2, 3], 2 + random(6, 4)
    stats = stats_of(rows, tasks, prompts, gram=True)
    weights = torch.tensor([0.5, -3.0], dtype=torch.float64)
    found = stats.weighted(weights, "tasks")
    expected = stats_of(rows * weights[torch.tensor(tasks)][:, None], tasks, prompts, gram=True)
    figures = ("example_norm", "prompt_norm", "task_norm", "task_sqnorm_unbiased", "task_variance", "noise_scale")
    for name in (*figures, "task_gram"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))

    weights = torch.linspace(-1, 2, 6, dtype=torch.float64)
    found = stats.weighted(weights, "examples")
    expected = stats_of(rows * weights[:, None], tasks, prompts)
    torch.testing.assert_close(found.example_norm, expected.example_norm)
    assert found.task_norm is None and found.prompt_norm is None and found.task_gram is None
    assert found.task_sqnorm_unbiased.isnan().all() and found.noise_scale.isnan().all()


def test_norm_ratio_is_of_the_tasks_that_are_present():
    three = ("a", "b", "c")
    assert stats_of([[3.0], [-12.0]], [0, 2], names=three).task_norm_ratio == 4
    assert stats_of([[0.0], [2.0]], [0, 1]).task_norm_ratio == torch.inf
    assert stats_of([[torch.nan], [2.0]], [0, 1]).task_norm_ratio.isnan()
    nothing = stats_of(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64))
    assert nothing.task_norm_ratio.isnan()


def test_cosines_are_those_of_the_tasks_gradients():
    rows = random(6, 4)
    stats = stats_of(rows, [0, 0, 1, 1, 2, 2], names=("a", "b", "c", "absent"), gram=True)
    of_task = [rows[i : i + 2].sum(0) for i in (0, 2, 4)]
    expected = [[torch.cosine_similarity(one, other, 0) for other in of_task] for one in of_task]
    torch.testing.assert_close(stats.task_cosine[:3, :3], torch.tensor(expected, dtype=torch.float64))
    assert stats.task_cosine[3].isnan().all() and stats.task_cosine[:, 3].isnan().all()
    assert stats_of(rows, [0] * 6).task_cosine is None


def test_signal_is_the_reward_deviation_times_the_root_mean_square_score():
    torch.manual_seed(0)
    head, x, action = nn.Linear(4, 3), torch.randn(7, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    rewards, prompts = torch.tensor([1.0, 0.0, 3.0, 1.0, 1.0, 2.0, 2.0]), torch.tensor([5, 5, 5, 2, 2, 9, 9])
    factor = torch.tensor([0.5, -2.0, 0.0, 1.0, -1.0, 0.0, 0.0])
    log_probability = lambda: head(x).log_softmax(1)[torch.arange(7), action]  # noqa: E731
    with Meter(head) as meter, meter.observe(prompts=prompts, rewards=rewards):
        (factor * log_probability()).sum().backward()
    score = []
    for i in range(7):
        gradients = torch.autograd.grad(log_probability()[i], list(head.parameters()))
        score.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
    known = ((score[0] ** 2 + score[1] ** 2) / 2) ** 0.5  # the third has a factor of 0
    expected = torch.tensor([0.0, float(rewards[:3].std()) * known, 0.0])  # in the order of the ids: 2, 5, 9
    torch.testing.assert_close(meter.stats.prompt_signal(factor), expected)
    unknown = meter.stats.prompt_signal(torch.zeros(7))
    assert unknown.isnan().tolist() == [False, True, False] and unknown[0] == 0


def test_one_logged_step_waits_for_the_device_once(monkeypatch):
    rewards = reward_stats(torch.rand(8), torch.arange(4).repeat_interleave(2), torch.arange(2).repeat_interleave(4))
    stats = stats_of(random(8, 3), rewards.task[rewards.prompt_of], rewards.prompt_of, reward=rewards, gram=True)
    waits = []
    for name in ("tolist", "item", "__float__", "__bool__", "__int__"):
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, plain=plain, name=name: waits.append(name) or plain(self))
    logged = stats.log_dict("x/")
    monkeypatch.undo()
    assert waits == ["tolist"]
    assert logged["x/task/math/norm"] == float(stats.task_norm[0])
    assert logged["x/task/code/variance"] == float(stats.task_variance[1])
    assert logged["x/task/code/reward"] == float(rewards.task_mean[1])
    assert logged["x/task_norm_ratio"] == float(stats.task_norm_ratio)
    assert logged["x/cosine/math/code"] == float(stats.task_cosine[0, 1])
    assert all(type(value) is float for value in logged.values())


ONE = stats_of([[1.0]], [0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: Stats.merged([]),
            "Stats.merged: at least one block must be given, got none; append stats after each block",
        ),
        (
            lambda: Stats.merged([ONE, stats_of([[1.0]], [0], names=("math", "art"))]),
            "Stats.merged: all blocks must have the same tasks, got ['math', 'code'] and ['math', 'art']; "
            "observe all blocks with one meter and the same arguments",
        ),
        (
            lambda: Stats.merged([ONE, stats_of([[1.0]], [0], [0])]),
            "Stats.merged: all blocks must have the same prompts, got none and some; "
            "observe all blocks with one meter and the same arguments",
        ),
        (
            lambda: Stats.merged(
                [
                    stats_of([[1.0], [2.0]], [0, 0], [0, 0], reward_stats(torch.rand(2), torch.tensor([p, p])))
                    for p in (3, 4, 3)
                ]
            ),
            "RewardStats.merged: a prompt's examples must lie in one block, got prompt 3 in blocks 0 and 2; "
            "keep groups together, or number prompts across blocks",
        ),
        (
            lambda: ONE.prompt_signal(torch.ones(1)),
            "Stats.prompt_signal: the statistics must hold rewards, got None; pass rewards= and prompts= to observe",
        ),
        (
            lambda: stats_of([[1.0]], [0], [0], reward_stats(torch.ones(1), torch.tensor([0]))).prompt_signal(
                torch.ones(2)
            ),
            "Stats.prompt_signal: factor must be [1], one per example, got [2]; "
            "pass what the loss multiplies each example's log-probability with",
        ),
    ],
)
def test_says_what_is_wrong_and_what_to_do(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


def over_ranks(of_ranks, exact=False):
    """The statistics of all ranks as the first has them."""
    return _whole(of_ranks[0], torch.stack([_sums(stats, exact) for stats in of_ranks]).sum(0), exact)


@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 0), (0, 0), (2, 1), (1, 1, 1), (0, 3)], ids=str)
def test_over_ranks_a_figure_is_known_where_a_rank_has_two_units_and_nan_elsewhere(sizes, prompts):
    """Whatever rounding left of the norms: a rank's examples and its task are summed in different orders."""
    generator, rank = torch.Generator().manual_seed(0), []
    for size in sizes:
        units = torch.randn(size, 5, generator=generator, dtype=torch.float64) * 1e3
        examples = units.repeat_interleave(2, 0) / 2 if prompts else units
        of_prompts = torch.arange(size).repeat_interleave(2) if prompts else None
        stats = stats_of(examples, torch.ones(len(examples)).long(), of_prompts if size else None, gram=True)
        noise = 1 + torch.finfo(torch.float64).eps * torch.tensor([0.0, 3.0], dtype=torch.float64)
        gram = stats.task_gram + torch.tensor(
            [[0.0, torch.nan if size else 0.0], [0.0, 0.0]]
        )  # no product of one present
        rank.append(dataclasses.replace(stats, task_norm=stats.task_norm * noise, task_gram=gram))
    whole, known = over_ranks(rank), max(sizes) > 1
    for figure in (whole.task_sqnorm_unbiased, whole.task_variance, whole.noise_scale):
        assert figure[0].isnan() and bool(figure[1].isnan()) >= (not known) and not figure.isinf().any()
    assert known == bool(whole.task_variance[1].isfinite()) and whole.task_units.tolist() == [0, sum(sizes)]
    assert whole.task_norm[0] == 0 and bool(whole.task_norm[1].isfinite()) == (known or sum(sizes) < 2)
    assert whole.task_gram[0].tolist() == [0, 0] and not whole.task_gram.isinf().any()
    assert not any(math.isinf(figure) for figure in whole.log_dict().values() if figure is not None)
