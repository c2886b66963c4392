"""GRPO on four tasks, twice from one warm start: with the plain optimizer while measuring, then with `InverseNorm`.

A small Llama learns to copy, reverse, add and reach a target number, one character a token. Nothing is downloaded.

    python examples/multitask_grpo.py             # two to three minutes on two CPU cores
    python examples/multitask_grpo.py --quick     # under forty seconds
    python examples/multitask_grpo.py --help
    torchrun --nproc-per-node 2 examples/multitask_grpo.py    # DDP: each process trains on its share of the prompts

It leaves tables on the screen and, in ``results/multitask_grpo``, every step as CSV (a file for each run), a summary as
JSON, and plots.
Ctrl-C finishes the step under way, reports what there is and exits with status 130; a second Ctrl-C stops at once.
Needs torch, transformers, matplotlib and rich.

Several processes draw the same rollouts and measure exactly (``ranks="exact"``), so that their statistics are those of
one process; a training run of its own would have each draw its share.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import math
import os
import platform
import random
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

# Before torch is imported: waiting threads go to sleep soon. With GNU OpenMP's default they spin, which beside another
# busy process on the same two cores made this script ten times as slow; alone, sleeping costs about a fifth.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from loops import INTERRUPTED, Loops
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import gradnorm_ext
from gradnorm_ext.report import COLORS, plots, reward_figure
from gradnorm_ext.report import table as table_of


@dataclass(frozen=True)
class Task:
    name: str
    draw: Callable[[random.Random], tuple[str, str]]  # a prompt and one right completion
    reward: Callable[[str, str], float]  # of a prompt and any completion, from 0 to 1
    warm_up: int  # examples in a batch of the supervised warm-up


def draw_word(rng: random.Random) -> str:
    return "".join(rng.choices(LETTERS, k=rng.randint(3, 6)))


def draw_copy(rng: random.Random) -> tuple[str, str]:
    word = draw_word(rng)
    return f">{word}=", word


def draw_reverse(rng: random.Random) -> tuple[str, str]:
    word = draw_word(rng)
    return f"<{word}=", word[::-1]


def draw_addition(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(10, 99), rng.randint(1, 9)
    return f"{a}+{b}=", str(a + b)


def draw_countdown(rng: random.Random) -> tuple[str, str]:
    numbers = [str(rng.randint(1, 6)) for _ in range(3)]
    expression = numbers[0] + rng.choice("+-*") + numbers[1] + rng.choice("+-*") + numbers[2]
    rng.shuffle(numbers)
    return f"{','.join(numbers)}:{value(expression)}=", expression


def value(expression: str) -> int:
    """The value of whole numbers joined by ``+ - *``; a ValueError for anything else. Nothing is ever executed."""
    if not re.fullmatch(r"\d+([+*-]\d+)*", expression):
        raise ValueError(f"value: must be whole numbers joined by + - *, got {expression!r}")
    terms = re.findall(r"([+-]?)(\d+(?:\*\d+)*)", expression)
    return sum((-1 if sign == "-" else 1) * math.prod(map(int, term.split("*"))) for sign, term in terms)


def share_right(answer: str, completion: str) -> float:
    """The share of positions that hold the right character; missing and surplus characters are wrong ones."""
    right = sum(a == b for a, b in zip(answer, completion, strict=False))
    return right / max(len(answer), len(completion))


def reward_copy(prompt: str, completion: str) -> float:
    return share_right(prompt[1:-1], completion)


def reward_reverse(prompt: str, completion: str) -> float:
    return share_right(prompt[-2:0:-1], completion)


def reward_addition(prompt: str, completion: str) -> float:
    """1 for the sum, else 0: nothing for a close number."""
    return float(completion == str(value(prompt[:-1])))


def reward_countdown(prompt: str, completion: str) -> float:
    """1 for an expression of exactly the given numbers that reaches the target, 0.2 for one that misses it, else 0."""
    numbers, target = prompt[:-1].split(":")
    try:
        reached = value(completion)
    except ValueError:
        return 0.0
    if sorted(re.findall(r"\d+", completion)) != sorted(numbers.split(",")):
        return 0.0
    return 1.0 if reached == int(target) else 0.2


TASKS = (
    Task("copy", draw_copy, reward_copy, warm_up=12),
    Task("reverse", draw_reverse, reward_reverse, warm_up=14),
    Task("addition", draw_addition, reward_addition, warm_up=80),
    Task("countdown", draw_countdown, reward_countdown, warm_up=50),
)
NAMES = [task.name for task in TASKS]

LETTERS = "abcdefghij"
CHARACTERS = "0123456789+-*=,:<>" + LETTERS
PAD, END, FIRST = 0, 1, 2  # tokens: padding, end of completion, the first character
PROMPT_LENGTH, COMPLETION_LENGTH = 10, 8  # tokens; the longest prompt is a countdown such as 6,1,6:-35=


def encode(text: str) -> list[int]:
    return [FIRST + CHARACTERS.index(character) for character in text]


def decode(tokens: list[int]) -> str:
    """The characters before the first END; padding, which a model may also sample, shows as a wrong character."""
    end = tokens.index(END) if END in tokens else len(tokens)
    return "".join("_" if token == PAD else CHARACTERS[token - FIRST] for token in tokens[:end])


@dataclass(frozen=True)
class Problem:
    task: int
    prompt: str
    answer: str


def draw_problems(counts: list[int], rng: random.Random, avoid: frozenset[str] = frozenset()) -> list[Problem]:
    """`counts[k]` problems of task k, task after task, with distinct prompts that are not in `avoid`."""
    problems: list[Problem] = []
    seen = set(avoid)
    for index, (task, count) in enumerate(zip(TASKS, counts, strict=True)):
        wanted = len(problems) + count
        while len(problems) < wanted:
            prompt, answer = task.draw(rng)
            if prompt not in seen:
                seen.add(prompt)
                problems.append(Problem(index, prompt, answer))
    return problems


def prompt_tokens(problems: list[Problem], device: torch.device) -> Tensor:
    """Prompts padded on the left, `[len(problems), PROMPT_LENGTH]`: all completions start in the same column."""
    rows = [encode(problem.prompt) for problem in problems]
    return torch.tensor([[PAD] * (PROMPT_LENGTH - len(row)) + row for row in rows], device=device)


def answer_tokens(problems: list[Problem], device: torch.device) -> Tensor:
    """Right completions with END, padded on the right, `[len(problems), COMPLETION_LENGTH]`."""
    rows = [[*encode(problem.answer), END] for problem in problems]
    return torch.tensor([row + [PAD] * (COMPLETION_LENGTH - len(row)) for row in rows], device=device)


def build_model(device: torch.device, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=FIRST + len(CHARACTERS),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=PROMPT_LENGTH + COMPLETION_LENGTH,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
        attention_dropout=0.0,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).to(device)


@dataclass(frozen=True)
class Rollouts:
    tokens: Tensor  # [B, PROMPT_LENGTH + COMPLETION_LENGTH] int64
    attention: Tensor  # the same shape, int64: 1 at the tokens of the prompt and the completion, 0 at padding
    tasks: Tensor  # [B] int64
    prompts: Tensor  # [B] int64: which of the problems
    rewards: Tensor  # [B] float32


@torch.no_grad()
def sample(model: LlamaForCausalLM, problems: list[Problem], samples: int, generator: torch.Generator) -> Rollouts:
    """`samples` scored completions of every problem, at temperature 1; those of one problem are neighbours."""
    device = generator.device
    tokens = prompt_tokens(problems, device).repeat_interleave(samples, 0)
    attention = (tokens != PAD).long()
    alive, latest, cache = attention[:, -1:], tokens, None
    for _ in range(COMPLETION_LENGTH):
        output = model(input_ids=latest, attention_mask=attention, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        latest = torch.multinomial(output.logits[:, -1].softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, latest * alive], 1)
        attention = torch.cat([attention, alive], 1)
        alive = alive * (latest != END)

    owners = [problem for problem in problems for _ in range(samples)]
    completions = [decode(row) for row in tokens[:, PROMPT_LENGTH:].tolist()]
    rewards = [TASKS[owner.task].reward(owner.prompt, text) for owner, text in zip(owners, completions, strict=True)]
    return Rollouts(
        tokens=tokens,
        attention=attention,
        tasks=torch.tensor([owner.task for owner in owners], device=device),
        prompts=torch.arange(len(problems), device=device).repeat_interleave(samples),
        rewards=torch.tensor(rewards, device=device),
    )


def completion_loss(
    model: LlamaForCausalLM | DistributedDataParallel,
    tokens: Tensor,
    attention: Tensor,
    weight: Tensor,
    count: Tensor | float | None = None,
) -> Tensor:
    """The mean over all completion tokens of -log p(token) times the `weight` `[B]` of its example.

    ``count``: what the sum is divided by, where these are a part of the completions.

    With advantages as weights this is the loss of GRPO on policy, where the importance ratio is 1, up to a constant.
    """
    logits = model(input_ids=tokens, attention_mask=attention, use_cache=False).logits[:, PROMPT_LENGTH - 1 : -1]
    surprise = F.cross_entropy(logits.transpose(1, 2), tokens[:, PROMPT_LENGTH:], reduction="none")
    mask = attention[:, PROMPT_LENGTH:]
    return (weight[:, None] * surprise * mask).sum() / (mask.sum() if count is None else count)


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate rises over the first tenth of the steps and falls to zero at the end."""
    rise = max(1, steps // 10)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise))
    )


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def in_any_rank(flag: bool) -> bool:
    if ranks() == 1:
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    flags = torch.tensor(int(flag), device=device)
    dist.all_reduce(flags)
    return bool(flags)


@dataclass(frozen=True)
class Settings:
    seed: int = 0
    warm_up_steps: int = 220
    warm_up_rate: float = 3e-3
    steps: int = 150
    rate: float = 3e-4
    prompts: int = 8  # of each task in a step
    samples: int = 8  # of each prompt
    held_out: int = 128  # prompts of each task
    held_out_samples: int = 4


QUICK = Settings(warm_up_steps=80, steps=12, rate=1e-4, prompts=4, held_out=64)


def warm_up(model: LlamaForCausalLM, settings: Settings, avoid: frozenset[str], loops: Loops) -> None:
    """Supervised steps on right completions, after which rewards are neither all 0 nor all 1."""
    rng = random.Random(f"warm-up {settings.seed}")
    optimizer = torch.optim.AdamW(model.parameters(), settings.warm_up_rate)
    rate = schedule(optimizer, settings.warm_up_steps)
    for _ in loops.steps("warm-up"):
        problems = draw_problems([task.warm_up for task in TASKS], rng, avoid)
        tokens = torch.cat([prompt_tokens(problems, model.device), answer_tokens(problems, model.device)], 1)
        loss = completion_loss(model, tokens, (tokens != PAD).long(), tokens.new_ones(len(tokens)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        loops.note("warm-up", f"loss {loss.item():.2f}")


Model = LlamaForCausalLM | DistributedDataParallel


def plain(model: Model, rate: float) -> tuple[torch.optim.Optimizer, gradnorm_ext.Meter]:
    return adamw(model, rate), gradnorm_ext.Meter(model, tasks=NAMES, ranks="exact")


def inverse_norm(model: Model, rate: float) -> tuple[torch.optim.Optimizer, gradnorm_ext.Reweighted]:
    passes = 2 if isinstance(model, DistributedDataParallel) else 1  # DDP reduces gradients while backward forms them
    optimizer = gradnorm_ext.Reweighted(
        adamw(model, rate), model, gradnorm_ext.InverseNorm(), passes=passes, tasks=NAMES, ranks="exact"
    )
    return optimizer, optimizer


def adamw(model: Model, rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0)


RUNS = {"plain": plain, "InverseNorm": inverse_norm}


@dataclass
class Run:
    name: str
    history: gradnorm_ext.History = field(default_factory=lambda: gradnorm_ext.History(task_names=NAMES))
    held_out: list[list[float]] | None = None  # after the last step, for each task: the reward of each prompt
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        return self.history.steps


def grpo(run: Run, model: LlamaForCausalLM, settings: Settings, avoid: frozenset[str], loops: Loops) -> None:
    """On-policy GRPO. Prompts and random numbers depend on the seed alone: they are the same in every run."""
    trained = DistributedDataParallel(model) if ranks() > 1 else model
    optimizer, observer = RUNS[run.name](trained, settings.rate)
    rate = schedule(optimizer, settings.steps)
    rng = random.Random(f"grpo {settings.seed}")
    for step in loops.steps(run.name):
        started = time.perf_counter()
        problems = draw_problems([settings.prompts] * len(TASKS), rng, avoid)
        rollouts = sample(model, problems, settings.samples, generator(model.device, settings.seed, 1 + step))
        advantages = gradnorm_ext.group_advantages(rollouts.rewards, rollouts.prompts)

        own = (rollouts.prompts % ranks() == rank()).nonzero()[:, 0]
        count = rollouts.attention[:, PROMPT_LENGTH:].sum() / ranks()  # DDP averages over the ranks
        tokens, attention = rollouts.tokens[own], rollouts.attention[own]
        with observer.observe(tasks=rollouts.tasks[own], prompts=rollouts.prompts[own], rewards=rollouts.rewards[own]):
            loss = completion_loss(trained, tokens, attention, advantages[own], count)
            observer.backward(loss) if isinstance(observer, gradnorm_ext.Reweighted) else loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()

        run.history.append(observer.stats, getattr(observer, "weights", None))
        run.seconds += time.perf_counter() - started
        loops.note(run.name, f"reward {rollouts.rewards.mean().item():.2f}")


def evaluate(model: LlamaForCausalLM, held_out: list[Problem], settings: Settings) -> list[list[float]]:
    """For each task, the mean reward of each held-out prompt, sampled as in training."""
    rollouts = sample(model, held_out, settings.held_out_samples, generator(model.device, settings.seed, 0))
    return rollouts.rewards.view(len(TASKS), settings.held_out, -1).mean(2).tolist()


def generator(device: torch.device, seed: int, step: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed * 1_000_003 + step)


def with_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    return fmean(values), stdev(values) / math.sqrt(len(values))


def mean_of(values: list[float]) -> float:
    """The mean of those that are not NaN."""
    known = [value for value in values if not math.isnan(value)]
    return fmean(known) if known else math.nan


def summary_of(run: Run) -> dict[str, dict[str, float]]:
    """For each task, means over the steps and the held-out reward.

    ``sqnorm_unbiased`` is of one prompt's expected gradient; times the squared number of prompts it compares with
    ``sqnorm``, which is of the sum over the task's prompts.
    """
    summary = {}
    for name in NAMES:
        rows = [row for row in run.history.rows() if row["task"] == name]
        columns = ("sqnorm", "zero_std_share", "realised_share", "weight")
        summary[name] = {column: mean_of([row[column] for row in rows]) for column in columns}
        summary[name]["sqnorm_unbiased"] = mean_of([row["units"] ** 2 * row["sqnorm_unbiased"] for row in rows])
    for name, rewards in zip(NAMES, run.held_out or [], strict=False):
        summary[name]["held_out_reward"], summary[name]["held_out_error"] = with_error(rewards)
    return summary


def report(before: list[list[float]], runs: list[Run], console: Console) -> list[str]:
    """Prints the tables and returns, in words, what the differences in held-out reward say."""
    table = Table(title="Reward on held-out prompts", box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for heading in ("task", "run", "warm start", "trained"):
        table.add_column(heading, justify="left" if heading in ("task", "run") else "right")
    for task, name in enumerate(NAMES):
        for run in runs:
            cells = (f"{fmean(before[task]):.3f}", f"{fmean(run.held_out[task]):.3f}")
            table.add_row(name, run.name, *cells, end_section=run is runs[-1])
    console.print(table)
    console.print(table_of({run.name: run.history for run in runs}), highlight=False, soft_wrap=True)
    console.print(
        "Means over the steps. sq norm: of the task's gradient, before weighting; unbiased: without what noise adds to it. "
        "zero std: prompts whose rewards are all equal; share: the task's, of the prompts left without those.\n",
        highlight=False,
    )

    labels = [f"{run.name} ({run.steps} steps)" for run in runs]
    verdicts = [
        verdict(f"{label} against the warm start", before, run.held_out)
        for label, run in zip(labels, runs, strict=True)
    ]
    if len(runs) == 2:
        plain, reweighted = runs
        verdicts.append(verdict(f"{labels[1]} against {labels[0]}", plain.held_out, reweighted.held_out))
    return [*verdicts, "One seed: the errors cover the choice of held-out prompts, not the luck of a training run."]


def verdict(comparison: str, before: list[list[float]], after: list[list[float]]) -> str:
    """What the numbers say: names the tasks whose reward differs by more than two standard errors, and no others."""
    found = {}
    for name, old, new in zip(NAMES, before, after, strict=True):
        found[name] = with_error([b - a for a, b in zip(old, new, strict=True)])
    higher = [name for name, (mean, error) in found.items() if mean > 2 * error]
    lower = [name for name, (mean, error) in found.items() if mean < -2 * error]
    sides = [f"{side} in {', '.join(names)}" for side, names in (("higher", higher), ("lower", lower)) if names]
    listed = ", ".join(f"{name} {mean:+.3f} ± {error:.3f}" for name, (mean, error) in found.items())
    return f"{comparison}: {' and '.join(sides) or 'no difference'} beyond two standard errors ({listed})."


def plot_rewards(before: list[list[float]], runs: list[Run], path: Path) -> None:
    """The report's plot of rewards, with those on held-out prompts before and after, and their standard errors."""
    figure = reward_figure({run.name: run.history for run in runs})
    figure.suptitle(
        "Mean reward (lines: of a step's samples, faint, and smoothed; points: held-out prompts ± std. error)"
    )
    for task, axes in enumerate(figure.axes):
        point = {"fmt": "o", "capsize": 3}
        axes.errorbar(0, *with_error(before[task]), color="black", label="held out, before", **point)
        for index, run in enumerate(runs):
            end = run.steps * (1 + 0.03 * index)  # beside each other
            held_out = with_error(run.held_out[task])
            axes.errorbar(end, *held_out, color=COLORS[index], label=f"{run.name}, held out", **point)
    figure.legends.clear()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=130)


def write(before: list[list[float]], runs: list[Run], summary: dict[str, Any], out: Path) -> list[str]:
    """Writes the files into `out` and returns their names."""
    files = ["summary.json"]
    (out / "summary.json").write_text(json.dumps(without_nan(summary), indent=2) + "\n")
    if runs:
        for run in runs:
            files.append(f"{run.name}.csv")
            run.history.write(out / files[-1])
        files += [plot.name for plot in plots({run.name: run.history for run in runs}, out)]
        plot_rewards(before, runs, out / "reward.png")
    return files


def without_nan(value: Any) -> Any:
    """JSON knows no NaN: None stands for it."""
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps: shows that it runs, not what it finds")
    parser.add_argument("--steps", type=int, help=f"GRPO steps of each run (default {Settings.steps})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
    parser.add_argument("--out", type=Path, default=Path("results/multitask_grpo"), help="folder (default %(default)s)")
    options = parser.parse_args()
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    return options


def experiment(settings: Settings, device: torch.device, loops: Loops) -> tuple[list[list[float]], list[Run]]:
    """The held-out rewards of the warm start, and the runs from it that made at least one step."""
    held_out = draw_problems([settings.held_out] * len(TASKS), random.Random(f"held out {settings.seed}"))
    avoid = frozenset(problem.prompt for problem in held_out)
    warm = build_model(device, settings.seed)
    warm_up(warm, settings, avoid, loops)
    before = evaluate(warm, held_out, settings)
    runs = []
    for name in RUNS:
        run, model = Run(name), copy.deepcopy(warm)
        grpo(run, model, settings, avoid, loops)
        if run.steps:
            run.held_out = evaluate(model, held_out, settings)
            runs.append(run)
    return before, runs


def main() -> int:
    """One process of ``torchrun``, or the only one; the first reports."""
    options, started = parse(), time.perf_counter()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return run_all(options, started)
    if torch.cuda.is_available() and options.device in ("auto", "cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    try:
        return run_all(options, started)
    finally:
        dist.destroy_process_group()


def run_all(options: argparse.Namespace, started: float) -> int:
    console = Console(quiet=rank() > 0)
    options.out.mkdir(parents=True, exist_ok=True)
    settings = replace(QUICK if options.quick else Settings(), seed=options.seed)
    settings = replace(settings, steps=options.steps or settings.steps)
    torch.set_num_threads(
        min(2 if ranks() == 1 else 1, torch.get_num_threads())
    )  # more only wait for each other in a model this small
    has_gpu = torch.cuda.is_available()
    device = torch.device(("cuda" if has_gpu else "cpu") if options.device == "auto" else options.device)

    with Loops(
        {"warm-up": settings.warm_up_steps} | dict.fromkeys(RUNS, settings.steps), console, in_any_rank
    ) as loops:
        before, runs = experiment(settings, device, loops)
        loops.finish()
        verdicts = report(before, runs, console) if runs else ["Stopped before the first GRPO step."]
        summary = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "arguments": sys.argv[1:],
            "settings": asdict(settings),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
            "threads": torch.get_num_threads(),
            "ranks": ranks(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "gradnorm_ext": gradnorm_ext.__version__,
            },
            "seconds": time.perf_counter() - started,
            "interrupted": loops.stopped,
            "runs": {run.name: {"steps": run.steps, "seconds": run.seconds, "tasks": summary_of(run)} for run in runs},
            "verdicts": verdicts,
        }
        files = write(before, runs, summary, options.out) if rank() == 0 else []
    console.print(*verdicts, sep="\n", highlight=False)
    console.print(f"\nResults in {options.out}: {', '.join(files)}", highlight=False)
    return INTERRUPTED if loops.stopped else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
