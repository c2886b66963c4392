"""The table and the plots of a run's record."""

import builtins
import io
import re

import numpy as np
import pytest
import torch
from gradients import stats_of

from gradnorm_ext import History, report
from gradnorm_ext.report import norm_figure, reward_figure, reward_std_figure, table
from gradnorm_ext.rewards import reward_stats


def run(steps=3, rewards=True, names=("math", "code"), scale=1.0):
    history = History()
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        rows = scale * torch.randn(8, 4, generator=generator, dtype=torch.float64)
        tasks, prompts = torch.arange(8) // 4, torch.arange(8) // 2
        reward = None
        if rewards:
            values = torch.randint(0, 2, (8,), generator=generator).double()
            reward = reward_stats(values, prompts, tasks, n_tasks=2)
        history.append(stats_of(rows, tasks, prompts, reward, names), torch.tensor([0.5, 1.5]))
    return history


def lines_of(axes):
    return [line.get_ydata().tolist() for line in axes.get_lines()]


def test_the_table_has_a_row_for_every_task_and_run_with_means_over_the_steps():
    histories = {"plain": run(), "other": run(steps=2, scale=10.0)}
    header, *rows = (line.split("  ") for line in table(histories).splitlines())
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    heads = [head.strip() for head in header if head.strip()]
    assert heads == [
        *("task", "run", "steps", "norm", "weight", "sq norm", "unbiased", "noise"),
        *("reward", "reward std", "zero std", "share"),
    ]
    assert [row[:3] for row in cells] == [
        [task, name, steps] for task in ("math", "code") for name, steps in (("plain", "3"), ("other", "2"))
    ]
    norms = [row["norm"] for row in histories["other"].rows() if row["task"] == "code"]
    assert cells[3][3] == f"{sum(norms) / 2:.3g}" and cells[3][4] == "1.5"
    unbiased = [4 * row["sqnorm_unbiased"] for row in histories["plain"].rows() if row["task"] == "math"]
    assert cells[0][heads.index("unbiased")] == f"{sum(unbiased) / 3:.3g}"
    shares = [row["zero_std_share"] for row in histories["plain"].rows() if row["task"] == "math"]
    assert f"{sum(shares) / 3:.1%}" in cells[0]


def test_columns_without_figures_are_left_out_and_cells_without_are_marked():
    header = table(run(rewards=False)).splitlines()[0]
    assert "reward" not in header and "run" not in header.split() and "norm" in header
    some = table({"plain": run(), "other": run(rewards=False)}).splitlines()
    assert some[1].split()[-1] != "-" and some[2].split()[-4:] == ["-"] * 4


def test_plots_show_every_step_of_every_task_and_run():
    histories = {"plain": run(), "other": run(steps=2)}
    panel = norm_figure(histories).axes[0]
    assert panel.get_title() == "plain" and [t.get_text() for t in panel.get_legend().get_texts()] == ["math", "code"]
    for task, line in zip(("math", "code"), lines_of(panel)[::2], strict=True):
        assert line == [row["norm"] for row in histories["plain"].rows() if row["task"] == task]
    assert lines_of(norm_figure(histories).axes[3])[2] == [1.5, 1.5]
    rewards = reward_figure(histories).axes
    assert [axes.get_title() for axes in rewards] == ["math", "code"]
    assert lines_of(rewards[1])[2] == [row["reward"] for row in histories["other"].rows() if row["task"] == "code"]
    spread = reward_std_figure(histories).axes[0]
    stds = {name: each.reward_std("math") for name, each in histories.items()}
    widest = max(std for each in histories.values() for task in ("math", "code") for std in each.reward_std(task))
    for patch, (name, values) in zip(spread.patches, stds.items(), strict=True):
        count, _ = np.histogram(values, [widest * i / 24 for i in range(25)])
        drawn = patch.get_path().vertices[:, 1]
        assert {round(c / len(values), 9) for c in count if c} == {round(y, 9) for y in drawn if y}, name
    assert "plain (" in spread.get_legend().get_texts()[0].get_text()


def test_plots_are_written_where_there_is_something_to_draw(tmp_path):
    out = io.StringIO()
    written = report(run(), tmp_path / "with" / "rewards", file=out)
    assert [path.name for path in written] == ["gradient_norm.png", "reward.png", "reward_std.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    assert out.getvalue() == table(run()) + "\n"
    assert [path.name for path in report(run(rewards=False), tmp_path, file=out)] == ["gradient_norm.png"]
    assert report(run(), file=out) == []


def test_a_log_that_was_written_is_reported_on_as_the_run_was(tmp_path):
    run().write(tmp_path / "run.csv")
    again = History.read(tmp_path / "run.csv")
    assert table(again) == table(run())
    written = report(again, tmp_path, file=io.StringIO())
    assert [path.name for path in written] == ["gradient_norm.png", "reward.png"]  # the log has no prompts


def test_says_what_is_wrong_and_what_to_do(monkeypatch, tmp_path):
    nothing = "report: at least one run with a step must be given, got none; append statistics to its history"
    for histories in ({}, History(), {"plain": run(), "other": History()}):
        with pytest.raises(ValueError, match=f"^{re.escape(nothing)}$"):
            table(histories)
    other = "report: all runs must be of the same tasks, got ['math', 'code'] and ['a', 'b']; report on them one by one"
    with pytest.raises(ValueError, match=f"^{re.escape(other)}$"):
        table({"plain": run(), "other": run(names=("a", "b"))})

    plain = builtins.__import__

    def without(name, *args, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return plain(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    missing = "report: plots need matplotlib, which is not installed; pip install matplotlib, or leave `out` away"
    with pytest.raises(ImportError, match=f"^{re.escape(missing)}$"):
        report(run(), tmp_path, file=io.StringIO())
