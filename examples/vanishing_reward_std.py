"""Where rewards hardly vary, the policy gradient vanishes: the controlled experiment of Razin et al. on scikit-learn's digits.

A classifier is a policy that answers with one of ten labels. Pretraining teaches it five labels for every image. For
finetuning each image has one right label, reward 1, all others -1; for a tenth of the images it is not among the
five, so that nearly all answers have the same reward. The expected reward is exact, nothing is sampled in training. Three
runs start from the pretrained classifier and take the same number of steps:

    RL              gradient ascent on the expected reward
    SFT             cross-entropy with the right labels
    SFT, then RL    a few steps of SFT on the images whose ten sampled answers all got one reward, then RL

    python examples/vanishing_reward_std.py             # under a minute on two CPU cores
    python examples/vanishing_reward_std.py --quick     # seconds: shows that it runs, not what it finds

One `Meter` with the two groups of images as tasks takes both groups' gradient norms from the backward of the step itself.
It leaves a table on the screen, and it, every step as CSV and a plot in ``results/vanishing_reward_std``. Ctrl-C finishes
the step under way and reports what there is. After arXiv 2310.20703 (ICLR 2024) and its code, apple/ml-rlgrad, whose
images and sizes are others. Needs torch, scikit-learn, matplotlib and rich.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from loops import INTERRUPTED, Loops, show, write_rows
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gradnorm_ext
from gradnorm_ext.report import COLORS

GROUPS = ("large std", "small std")
LABELS, KNOWN, SAMPLES = 10, 5, 10  # labels; of them pretrained for each image; answers sampled to find what vanished


@dataclass(frozen=True)
class Settings:
    seed: int = 0
    images: int = 1000
    pretraining_steps: int = 2000
    steps: int = 600  # of each run
    repair_steps: int = 40  # of these, SFT
    batch: int = 250
    rate: float = 1e-3


QUICK = Settings(images=300, pretraining_steps=150, steps=30, repair_steps=6)


@dataclass(frozen=True)
class Data:
    images: Tensor  # [N, 64]
    known: Tensor  # [N, 10]: the labels of pretraining, each with probability 1 / 5
    right: Tensor  # [N] int64
    group: Tensor  # [N] int64: 1 where the right label is not among the known ones


def draw_data(settings: Settings) -> Data:
    digits = load_digits()
    generator = torch.Generator().manual_seed(settings.seed)
    chosen = torch.randperm(len(digits.data), generator=generator)[: settings.images]
    images = torch.tensor(digits.data, dtype=torch.float32)[chosen] / 16
    order = torch.rand(settings.images, LABELS, generator=generator).argsort(
        1
    )  # labels at random: nothing to generalise
    known = torch.zeros(settings.images, LABELS).scatter_(1, order[:, :KNOWN], 1 / KNOWN)
    group = (torch.rand(settings.images, generator=generator) < 0.1).long()
    return Data(images, known, order[torch.arange(settings.images), group * KNOWN], group)


def build_model(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 250), nn.ReLU(), nn.Linear(250, 100), nn.ReLU(), nn.Linear(100, LABELS))


def expected_rewards(logits: Tensor, right: Tensor) -> Tensor:
    """``[N]``: 1 for the right label and -1 for any other, weighted by their probabilities."""
    return 2 * logits.softmax(1).gather(1, right[:, None])[:, 0] - 1


def pretrain(model: nn.Module, data: Data, settings: Settings, loops: Loops) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in loops.steps("pretraining"):
        optimizer.zero_grad()
        F.cross_entropy(model(data.images), data.known).backward()
        optimizer.step()


@torch.no_grad()
def vanished(model: nn.Module, data: Data, seed: int) -> Tensor:
    """The images whose sampled answers all got the same reward."""
    generator = torch.Generator().manual_seed(seed)
    answers = torch.multinomial(model(data.images).softmax(1), SAMPLES, replacement=True, generator=generator)
    rewards = 2.0 * (answers == data.right[:, None]) - 1
    prompts = torch.arange(len(data.images))[:, None].expand_as(rewards)
    return gradnorm_ext.reward_stats(rewards.flatten(), prompts.flatten()).vanished


@dataclass
class Run:
    name: str
    repair: int  # steps of SFT before RL
    rows: list[dict[str, float | str]] = field(default_factory=list)  # a row for each step and group

    def column(self, name: str, group: str) -> list[float]:
        return [row[name] for row in self.rows if row["group"] == group]

    def reward(self, group: str) -> float:
        return self.column("reward", group)[-1]

    def norm(self, group: str, steps: slice) -> float:
        known = [norm for norm in self.column("norm", group)[steps] if not math.isnan(norm)]
        return fmean(known) if known else math.nan


def train(run: Run, model: nn.Module, data: Data, settings: Settings, loops: Loops) -> None:
    optimizer = torch.optim.Adam(model.parameters(), settings.rate)
    meter = gradnorm_ext.Meter(model, tasks=GROUPS)
    generator = torch.Generator().manual_seed(settings.seed)
    repaired = (
        vanished(model, data, settings.seed) if 0 < run.repair < settings.steps else torch.arange(len(data.images))
    )
    for step in loops.steps(run.name):
        supervised = step < run.repair
        of = repaired if supervised else torch.arange(len(data.images))
        rows = of[torch.randperm(len(of), generator=generator)[: settings.batch]]
        with meter.observe(tasks=data.group[rows]):
            logits = model(data.images[rows])
            rewards = expected_rewards(logits, data.right[rows])
            loss = F.cross_entropy(logits, data.right[rows]) if supervised else -rewards.mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after = group_rewards(model, data)
        for k, group in enumerate(GROUPS):
            norms = meter.stats.example_norm[data.group[rows] == k] * len(rows)  # the loss is a mean over the batch
            images, norm = len(norms), norms.mean().item()
            run.rows.append({"step": step, "group": group, "images": images, "norm": norm, "reward": after[k]})
        loops.note(run.name, f"reward {after[0]:.2f}, {after[1]:.2f}")


@torch.no_grad()
def group_rewards(model: nn.Module, data: Data) -> list[float]:
    rewards = expected_rewards(model(data.images), data.right)
    return [rewards[data.group == k].mean().item() for k in range(2)]


def table_of(before: list[float], std: list[float], runs: list[Run]) -> Table:
    table = Table(title="Expected reward, and the mean gradient norm of an image", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("images", "reward std", "run", "reward before", "after", "norm at first", "at last"):
        table.add_column(heading, justify="left" if heading in ("images", "run") else "right")
    for k, group in enumerate(GROUPS):
        for run in runs:
            first, last = run.norm(group, slice(0, 10)), run.norm(group, slice(-10, None))
            cells = (f"{before[k]:.3f}", f"{run.reward(group):.3f}", f"{first:.3f}", f"{last:.3f}")
            table.add_row(group, f"{std[k]:.3f}", run.name, *cells, end_section=run is runs[-1])
    return table


def verdicts(before: list[float], runs: dict[str, Run]) -> list[str]:
    """In words, what the numbers say and no more."""
    found = []
    if rl := runs.get("RL"):
        ratio = rl.norm(GROUPS[0], slice(0, 10)) / rl.norm(GROUPS[1], slice(0, 10))
        found.append(
            f"In the first ten steps of RL an image of large std has {ratio:.1f} times the gradient norm of one of small std."
        )
        gained = [rl.reward(group) - old for group, old in zip(GROUPS, before, strict=True)]
        found.append(
            f"RL gained {gained[0]:+.3f} of reward where the std is large and {gained[1]:+.3f} where it is small."
        )
        if repaired := runs.get("SFT, then RL"):
            gains = [repaired.reward(group) - rl.reward(group) for group in GROUPS]
            found.append(
                f"{repaired.repair} steps of SFT on what had vanished, before RL, against RL alone: {gains[1]:+.3f} where the "
                f"std is small, {gains[0]:+.3f} where it is large."
            )
    if sft := runs.get("SFT"):
        reached = [f"{sft.reward(group):.3f}" for group in GROUPS]
        found.append(
            f"SFT for all steps reached {reached[0]} where the std is large and {reached[1]} where it is small."
        )
    return [*found, "One seed, one learning rate, Adam; whether RL gets there in the end is not seen here."]


def plot(runs: list[Run], path: Path) -> None:
    figure = Figure((10, 4.2), layout="constrained")
    rewards, norms = figure.subplots(1, 2)
    for index, run in enumerate(runs):
        for group, style in zip(GROUPS, ("-", "--"), strict=True):
            line = {"color": COLORS[index], "linestyle": style, "label": f"{run.name}, {group}"}
            rewards.plot(run.column("reward", group), **line)
            norms.plot(run.column("norm", group), lw=0.8, **line)
    rewards.set(title="Expected reward", xlabel="step", ylabel="from -1 to 1")
    norms.set(title="Mean gradient norm of an image", xlabel="step", yscale="log", ylabel="loss per unit of parameter")
    for axes in (rewards, norms):
        axes.grid(alpha=0.3)
    figure.legend(*rewards.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=130)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps: shows that it runs, not what it finds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path("results/vanishing_reward_std"), help="folder (default %(default)s)"
    )
    return parser.parse_args()


def main() -> int:
    options, console = parse(), Console()
    settings = replace(QUICK if options.quick else Settings(), seed=options.seed)
    torch.set_num_threads(1)  # a model this small gains nothing from more
    data, model = draw_data(settings), build_model(settings.seed)
    planned = [Run("RL", 0), Run("SFT", settings.steps), Run("SFT, then RL", settings.repair_steps)]
    runs: list[Run] = []
    with Loops(
        {"pretraining": settings.pretraining_steps} | {run.name: settings.steps for run in planned}, console
    ) as loops:
        pretrain(model, data, settings, loops)
        before = group_rewards(model, data)
        with torch.no_grad():
            probability = model(data.images).softmax(1).gather(1, data.right[:, None])[:, 0]
        spread = 2 * (probability * (1 - probability)).sqrt()
        std = [spread[data.group == k].mean().item() for k in range(2)]
        for run in planned:
            train(run, copy.deepcopy(model), data, settings, loops)
            if run.rows:
                runs.append(run)
    if not runs:
        console.print("Stopped before the first step of a run.")
        return INTERRUPTED
    options.out.mkdir(parents=True, exist_ok=True)
    table, words = table_of(before, std, runs), verdicts(before, {run.name: run for run in runs})
    for run in runs:
        write_rows(options.out / f"{run.name}.csv", run.rows)
    plot(runs, options.out / "vanishing_reward_std.png")
    show(options.out, console, table, *words)
    return INTERRUPTED if loops.stopped else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
