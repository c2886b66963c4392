"""What a run's record says, as a table and as plots; matplotlib is needed for the plots alone."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, TextIO

from gradnorm_ext.history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
_WINDOW = 15  # steps that a smoothed line averages over


def report(
    history: History | Mapping[str, History], out: Path | str | None = None, *, file: TextIO | None = None
) -> list[Path]:
    """Print every task's means over the steps of one run or several, and draw them step by step.

    Of the columns, ``sq norm`` is the squared norm of the task's gradient, and ``unbiased`` what is left of it without
    noise, ``n² · task_sqnorm_unbiased``; both before weighting. ``noise`` is the number of units at which noise and
    signal are equal. ``zero std`` is the share of the task's prompts whose rewards are all equal, ``share`` the task's
    share of the prompts that are left.

    Args:
        history: of a run, of ``Reweighted`` or a file that :meth:`History.read` read; or several by their names.
        out: a folder for the plots, made where it is not there; None: no plots.
        file: where the table goes; None: standard output.

    Returns:
        The plots' paths: of norms and weights; where there were rewards, of these and of their spread.

    Raises:
        ValueError: no run, or runs of other tasks.
        ImportError: plots are asked for and matplotlib is not installed.

    Example:
        >>> import torch, gradnorm_ext
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> meter, history = gradnorm_ext.Meter(model, tasks=["math", "code"]), gradnorm_ext.History()
        >>> with meter.observe(tasks=[0, 0, 1, 1]):
        ...     model(torch.tensor([[1.], [2.], [5.], [5.]])).sum().backward()
        >>> history.append(meter.stats)
        >>> plots = report(history)
        task  steps  norm  weight  sq norm  unbiased  noise
        math      1     3       1        9         8   0.25
        code      1    10       1      100       100      0
    """
    print(table(history), file=file or sys.stdout)
    return [] if out is None else plots(history, out)


def plots(history: History | Mapping[str, History], out: Path | str) -> list[Path]:
    """Draw the plots of :func:`report` into a folder, made where it is not there, and return their paths."""
    histories, folder = _by_name(history), Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"gradient_norm.png": norm_figure(histories)}
    if any(_known(row["reward"]) for each in histories.values() for row in each.rows()):
        figures["reward.png"] = reward_figure(histories)
    if any(each.reward_std(task) for each in histories.values() for task in each.task_names):
        figures["reward_std.png"] = reward_std_figure(histories)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=130)
    return [folder / name for name in figures]


def table(history: History | Mapping[str, History]) -> str:
    """The table that :func:`report` prints; columns that no run has figures for are left out."""
    histories = _by_name(history)
    lines = [
        {"task": task, "run": name, "steps": str(len(_column(each, task, "norm"))), **_means(each, task)}
        for task in next(iter(histories.values())).task_names
        for name, each in histories.items()
    ]
    heads = [head for head in lines[0] if any(line[head] for line in lines)]
    rows = [heads, *([line[head] or "-" for head in heads] for line in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if head in ("task", "run") else cell.rjust(width)
            for head, cell, width in zip(heads, row, widths, strict=True)
        ).rstrip()
        for row in rows
    )


def norm_figure(history: History | Mapping[str, History]) -> Figure:
    """Every task's gradient norm and weight at every step, a column of panels for each run."""
    histories = _by_name(history)
    figure = _figure((5 * len(histories), 7))
    figure.suptitle("Gradient norm of each task, and its weight\n(faint: every step; bold: smoothed)")
    panels = figure.subplots(2, len(histories), squeeze=False, sharex=True, sharey="row")
    for column, (name, each) in enumerate(histories.items()):
        norms, weights = panels[:, column]
        for k, task in enumerate(each.task_names):
            _draw(norms, _column(each, task, "norm"), COLORS[k % len(COLORS)], task)
            _draw(weights, _column(each, task, "weight"), COLORS[k % len(COLORS)], task)
        norms.set(title=name, ylabel="norm before weighting\n(loss per unit of parameter)")
        weights.set(xlabel="step", ylabel="weight")
        for axes in (norms, weights):
            axes.set_yscale("log", base=2, nonpositive="mask")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.grid(alpha=0.3)
        norms.legend(ncols=2, fontsize=9)
    return figure


def reward_figure(history: History | Mapping[str, History]) -> Figure:
    """Every task's mean reward at every step, a panel for each task and a line for each run."""
    histories = _by_name(history)
    tasks = next(iter(histories.values())).task_names
    figure = _figure((4 * len(tasks), 4))
    figure.suptitle("Mean reward of a step's samples (faint: every step; bold: smoothed)")
    for task, axes in zip(tasks, figure.subplots(1, len(tasks), squeeze=False)[0], strict=True):
        for k, (name, each) in enumerate(histories.items()):
            _draw(axes, _column(each, task, "reward"), COLORS[k % len(COLORS)], name or "reward")
        axes.set(title=task, xlabel="step", ylabel="reward")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def reward_std_figure(history: History | Mapping[str, History]) -> Figure:
    """How the rewards of each prompt's samples spread: prompts in the bar at zero teach nothing."""
    histories = _by_name(history)
    tasks = next(iter(histories.values())).task_names
    figure = _figure((4 * len(tasks), 4))
    figure.suptitle("Spread of the rewards of one prompt's samples, over all steps")
    spreads = {(name, task): _finite(h.reward_std(task)) for name, h in histories.items() for task in tasks}
    widest = max((std for stds in spreads.values() for std in stds), default=0.0) or 1.0
    edges = [widest * i / 24 for i in range(25)]
    for task, axes in zip(tasks, figure.subplots(1, len(tasks), squeeze=False)[0], strict=True):
        for k, name in enumerate(histories):
            stds = spreads[name, task]
            if not stds:
                continue
            zero = _mean(_column(histories[name], task, "zero_std_share"))
            style: dict[str, Any] = {"histtype": "step", "linewidth": 2, "color": COLORS[k % len(COLORS)]}
            label = f"{name} ({zero:.0%} at zero)".strip()
            axes.hist(stds, edges, weights=[1 / len(stds)] * len(stds), label=label, **style)
        axes.set(title=task, xlabel="standard deviation of a prompt's rewards", ylabel="share of the task's prompts")
        axes.margins(y=0.3)  # room for the legend
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def _by_name(history: History | Mapping[str, History]) -> Mapping[str, History]:
    histories = {"": history} if isinstance(history, History) else history
    if not histories or not all(each.steps for each in histories.values()):
        raise ValueError(
            "report: at least one run with a step must be given, got none; append statistics to its history"
        )
    tasks = [each.task_names for each in histories.values()]
    if len(set(tasks)) > 1:
        raise ValueError(
            f"report: all runs must be of the same tasks, got {' and '.join(str(list(t)) for t in dict.fromkeys(tasks))}; "
            "report on them one by one"
        )
    return histories


def _figure(size: tuple[float, float]) -> Figure:
    try:
        from matplotlib.figure import Figure  # no pyplot: nothing global, no window
    except ImportError as missing:
        raise ImportError(
            "report: plots need matplotlib, which is not installed; pip install matplotlib, or leave `out` away"
        ) from missing
    return Figure(figsize=size, layout="constrained")


def _draw(axes: Axes, values: Sequence[float], color: str, label: str) -> None:
    half = _WINDOW // 2
    smooth = [_mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    axes.plot(values, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(smooth, color=color, linewidth=2, label=label)


def _column(history: History, task: str, figure: str) -> list[float]:
    return [row[figure] for row in history.rows() if row["task"] == task]


def _means(history: History, task: str) -> dict[str, str]:
    rows = [row for row in history.rows() if row["task"] == task]

    def mean(figure: str) -> float:
        return _mean([row[figure] for row in rows])

    signal, variance = mean("sqnorm_unbiased"), mean("variance")
    return {
        "norm": _shown(mean("norm")),
        "weight": _shown(mean("weight")),
        "sq norm": _shown(mean("sqnorm")),
        "unbiased": _shown(_mean([row["units"] ** 2 * row["sqnorm_unbiased"] for row in rows])),
        "noise": _shown(variance / signal if signal > 0 else math.nan),
        "reward": _shown(mean("reward")),
        "reward std": _shown(mean("reward_std")),
        "zero std": _shown(mean("zero_std_share"), ".1%"),
        "share": _shown(mean("realised_share"), ".1%"),
    }


def _known(value: float) -> bool:
    return not math.isnan(value)


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _mean(values: Sequence[float]) -> float:
    """Of those that are finite."""
    finite = _finite(values)
    return fmean(finite) if finite else math.nan


def _shown(value: float, form: str = ".3g") -> str:
    return format(value, form) if _known(value) else ""
