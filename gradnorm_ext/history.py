"""What was measured over a run: running means per task, and every step's figures for tables and plots."""

from __future__ import annotations

import csv
import dataclasses
import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gradnorm_ext.stats import Stats

FIGURES = (
    *("examples", "units", "norm", "sqnorm", "sqnorm_unbiased", "variance", "weight"),
    *("reward", "reward_std", "zero_std_share", "realised_share"),
)
_PENDING = 256  # steps whose figures stay on the device before they are fetched together
KEPT = (
    10_000  # steps whose rows are kept, and prompts of a task whose standard deviations are: a run may go on for ever
)


class History:
    """The figures of every task at every step, and their running means.

        total ← decay · total + (1 - decay) · x,    mass ← decay · mass + 1 - decay,    mean = total / mass

    from 0, so that the first step's figures are the first means: no bias to correct. A figure that a step lacks (a task
    that is absent) leaves its mean as it was, and so does a step that is not finite. ``noise_scale`` is the quotient of
    two such means, as in McCandlish et al. (arXiv 1812.06162), rather than a mean of quotients. Nothing waits for the
    device but looking, and every 256th step.

    ``Reweighted`` keeps one; beside a Meter:

        history.append(meter.stats)

    Args:
        decay: how much of the running mean a step keeps, in [0, 1).
        task_names: of the tasks; (): those of the first statistics.

    Raises:
        ValueError: another decay; statistics of other tasks than before.

    Example:
        >>> import gradnorm_ext
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> meter, history = gradnorm_ext.Meter(model, tasks=["math", "code"]), History(decay=0.5)
        >>> for scale in (1., 3.):
        ...     with meter.observe(tasks=[0, 1]):
        ...         (scale * model(torch.tensor([[1.], [2.]]))).sum().backward()
        ...     history.append(meter.stats)
        >>> history.mean("norm")
        tensor([2.3333, 4.6667], dtype=torch.float64)
        >>> history.rows()[2]["task"], history.rows()[2]["norm"]
        ('math', 3.0)
    """

    def __init__(self, decay: float = 0.9, task_names: Sequence[str] = ()) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"History: decay must lie in [0, 1), got {decay}; 0 keeps the last step only")
        self.decay = decay
        self.task_names = tuple(task_names)
        self.steps = 0  # also those before a resumed run
        self._sums = torch.zeros(2, len(FIGURES), len(self.task_names), dtype=torch.float64)  # total and mass
        self._pending: list[Tensor] = []
        self._rows: deque[list[dict[str, Any]]] = deque(maxlen=KEPT)  # of each step, a row per task
        self._pending_std: list[tuple[Tensor, Tensor]] = []
        self._reward_std: list[deque[float]] = []

    def append(self, stats: Stats, weights: Tensor | None = None, of: Literal["tasks", "examples"] = "tasks") -> None:
        """Add a step.

        Args:
            stats: of a block, or of a step's blocks merged.
            weights: those the gradients got, ``[K]``, or of examples ``[B]``, of which each task's mean is kept; None:
                ones.
            of: what the weights are of.
        """
        if self.task_names not in ((), stats.task_names):
            raise ValueError(
                f"History: statistics must be of the tasks {list(self.task_names)}, got {list(stats.task_names)}; "
                "keep a history for each meter"
            )
        self.task_names = stats.task_names
        figures = self._figures(stats, weights, of)
        if self._sums.shape[2] != len(self.task_names):
            self._sums = self._sums.new_zeros(2, *figures.shape)
        sums, known = self._sums.to(figures.device), ~figures.isnan() & stats.finite
        step = torch.stack([figures.nan_to_num(), torch.ones_like(figures)])
        self._sums = torch.where(known, sums.lerp(step, 1 - self.decay), sums)
        self._pending.append(figures)
        if stats.reward is not None:
            self._pending_std.append((stats.reward.task, stats.reward.std))
        self.steps += 1
        if len(self._pending) == _PENDING:
            self._fetch()

    def mean(self, figure: str) -> Tensor:
        """A figure's running mean, ``[K]`` float64, on the device; NaN for a task that never had it.

        Args:
            figure: one of ``FIGURES``.
        """
        if figure not in FIGURES:
            raise ValueError(f"History: figure must be one of {', '.join(FIGURES)}, got {figure!r}")
        total, mass = self._sums[:, FIGURES.index(figure)].unbind()
        return total / mass

    @property
    def noise_scale(self) -> Tensor:
        """``[K]``: the mean variance over the mean unbiased squared norm; NaN where the latter is not positive."""
        signal = self.mean("sqnorm_unbiased")
        return torch.where(signal > 0, self.mean("variance") / signal, torch.nan)

    def smoothed(self, stats: Stats) -> Stats:
        """The statistics with running means for the tasks' figures; a task that was ever there counts as present."""
        if stats.task_norm is None:
            raise ValueError(
                "History: stats.task_norm must have been measured to smooth it, got None; give the meter more than one task"
            )
        norm = self.mean("sqnorm").clamp(min=0).sqrt()
        return dataclasses.replace(
            stats,
            task_norm=norm.nan_to_num().to(stats.task_norm),
            task_sqnorm_unbiased=self.mean("sqnorm_unbiased").to(stats.task_norm),
            task_variance=self.mean("variance").to(stats.task_norm),
            task_count=torch.maximum(stats.task_count, (~norm.isnan()).long()),
        )

    def rows(self) -> list[dict[str, Any]]:
        """The last 10,000 steps of this run as plain numbers: a row per step and task: ``step``, ``task``, ``FIGURES``."""
        self._fetch()
        return [row for step in self._rows for row in step]

    def reward_std(self, task: str) -> list[float]:
        """The reward's standard deviation of a task's last 10,000 prompts of this run."""
        self._fetch()
        return list(self._reward_std[self.task_names.index(task)])

    def write(self, path: Path | str) -> None:
        """The rows as a CSV file, which :meth:`read` reads."""
        with Path(path).open("w", newline="") as file:
            writer = csv.DictWriter(file, ("step", "task", *FIGURES))
            writer.writeheader()
            writer.writerows(self.rows())

    @staticmethod
    def read(path: Path | str) -> History:
        """A history of the rows of a CSV file: to report on, not to continue."""
        history = History()
        with Path(path).open(newline="") as file:
            rows: list[dict[str, Any]] = []
            for row in csv.DictReader(file):
                figures = {figure: float(row[figure]) for figure in FIGURES}
                rows.append({"step": int(row["step"]), "task": row["task"], **figures})
        history._rows.extend([list(step) for _, step in itertools.groupby(rows, lambda row: row["step"])])
        history.task_names = tuple(dict.fromkeys(row["task"] for row in rows))
        history.steps = 1 + max((row["step"] for row in rows), default=-1)
        history._reward_std = [deque(maxlen=KEPT) for _ in history.task_names]
        return history

    def state_dict(self) -> dict[str, Any]:
        """The running means and the number of steps, not the rows."""
        return {"sums": self._sums, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._sums, self.steps = state["sums"].clone(), state["steps"]

    def _figures(self, stats: Stats, weights: Tensor | None, of: str) -> Tensor:
        """``[figures, K]`` float64, NaN where a step has none."""
        count, nan = stats.task_count, torch.full_like(stats.task_sqnorm_unbiased, torch.nan)
        norm = nan if stats.task_norm is None else stats.task_norm
        weight = torch.ones_like(nan) if weights is None else weights.detach().to(nan)
        if of == "examples" and weights is not None:
            here = torch.zeros_like(nan).index_add_(0, stats.tasks, torch.ones_like(weight))  # count: of all ranks
            weight = torch.zeros_like(nan).index_add_(0, stats.tasks, weight) / here
        reward: Sequence[Tensor] = [nan] * 4
        if stats.reward is not None:
            of_reward = (stats.reward.task_mean, stats.reward.task_std_mean, stats.reward.task_zero_std_share)
            reward = [each.to(nan, non_blocking=True) for each in (*of_reward, stats.reward.task_realised_share)]
        sizes, estimates = (count, stats.task_units), (stats.task_sqnorm_unbiased, stats.task_variance)
        figures = torch.stack([*sizes, norm, norm, *estimates, weight, *reward]).double()
        figures[FIGURES.index("sqnorm")].square_()
        if stats.task_sqnorm is not None:  # an estimate, whose negative values keep its mean unbiased
            figures[FIGURES.index("sqnorm")] = stats.task_sqnorm.double()
        figures[len(sizes) :].masked_fill_(count == 0, torch.nan)
        return figures

    def _fetch(self) -> None:
        """Bring what is pending to the host: this is what waits."""
        if not self._pending:
            return
        self._reward_std = self._reward_std or [deque(maxlen=KEPT) for _ in self.task_names]
        first = self.steps - len(self._pending)
        for step, figures in enumerate(torch.stack(self._pending).tolist(), first):
            of_tasks = zip(self.task_names, zip(*figures, strict=True), strict=True)
            self._rows.append(
                [{"step": step, "task": task, **dict(zip(FIGURES, of, strict=True))} for task, of in of_tasks]
            )
        if self._pending_std:
            tasks, stds = (torch.cat(each).tolist() for each in zip(*self._pending_std, strict=True))
            for k, std in zip(tasks, stds, strict=True):
                self._reward_std[k].append(std)
        self._pending.clear()
        self._pending_std.clear()
