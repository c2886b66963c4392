"""Chosen and rejected answers under DPO: how unequal their gradients are over training, and what balancing them does.

A small Llama learns to reverse words, one character a token; then DPO prefers the right answers to answers of its own
that are wrong. A pair's two log-probabilities get one factor in DPO's loss, with opposite signs, so that their gradients
are equal there. In the space of parameters they are not: a `Meter` measures both norms in every step's own backward.
Three runs from one start:

    plain           DPO as it is
    parameter       PairBalance("parameter"): both examples of a pair get one gradient norm
    probability     PairBalance("probability"): their probabilities are pulled equally hard, the idea of AdaDPO

    python examples/dpo_pairs.py             # under two minutes on two CPU cores
    python examples/dpo_pairs.py --quick     # seconds: shows that it runs, not what it finds

It leaves a table on the screen, and it, every step as CSV and a plot in ``results/dpo_pairs``. Ctrl-C finishes the step
under way and reports what there is. The same in TRL: ``gradnorm_ext.integrations.trl.DPOTrainer``. Needs torch, transformers,
matplotlib and rich.
"""

from __future__ import annotations

import argparse
import copy
import random
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
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import gradnorm_ext
from gradnorm_ext.report import COLORS

LETTERS = "abcdefgh"
PAD, END, FIRST = 0, 1, 2  # tokens: padding, end of the answer, the first character
PROMPT, ANSWER = 7, 7  # tokens: up to six letters and "=", up to six letters and the end
BETA = 0.1


@dataclass(frozen=True)
class Settings:
    seed: int = 0
    warm_up_steps: int = 110
    steps: int = 150
    pairs: int = 32  # in a step
    rate: float = 3e-4
    held_out: int = 256  # pairs


QUICK = Settings(warm_up_steps=25, steps=6, pairs=16, held_out=64)


def encode(text: str) -> list[int]:
    return [FIRST + (LETTERS + "=").index(character) for character in text]


def words(count: int, rng: random.Random) -> list[str]:
    return ["".join(rng.choices(LETTERS, k=rng.randint(3, 6))) for _ in range(count)]


def tokens(prompts: list[str], answers: list[str]) -> Tensor:
    """Prompts padded on the left, answers with their end on the right: ``[len(prompts), PROMPT + ANSWER]``."""
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        left, right = encode(prompt + "="), [*encode(answer), END]
        rows.append([PAD] * (PROMPT - len(left)) + left + right + [PAD] * (ANSWER - len(right)))
    return torch.tensor(rows)


def build_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=FIRST + len(LETTERS) + 1,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=PROMPT + ANSWER,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
    )
    return LlamaForCausalLM(config)


def answer_log_probabilities(model: LlamaForCausalLM, rows: Tensor) -> tuple[Tensor, Tensor]:
    """``[B]`` each: of every answer, with its end, and how many tokens it has."""
    logits = model(input_ids=rows, attention_mask=(rows != PAD).long(), use_cache=False).logits[:, PROMPT - 1 : -1]
    answers = rows[:, PROMPT:]
    log_probability = -F.cross_entropy(logits.transpose(1, 2), answers, reduction="none")
    there = answers != PAD
    return (log_probability * there).sum(1), there.sum(1)


def warm_up(model: LlamaForCausalLM, settings: Settings, loops: Loops) -> None:
    rng = random.Random(f"warm-up {settings.seed}")
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.0)
    for _ in loops.steps("warm-up"):
        prompts = words(64, rng)
        total, lengths = answer_log_probabilities(model, tokens(prompts, [word[::-1] for word in prompts]))
        loss = -total.sum() / lengths.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loops.note("warm-up", f"loss {loss.item():.2f}")


def corrupted(answer: str, rng: random.Random) -> str:
    """A wrong answer near the right one: a letter changed, dropped, or two swapped."""
    i = rng.randrange(len(answer) - 1)
    changed = [
        answer[:i] + rng.choice(LETTERS.replace(answer[i], "")) + answer[i + 1 :],
        answer[:i] + answer[i + 1 :],
        answer[:i] + answer[i + 1] + answer[i] + answer[i + 2 :],
    ]
    wrong = rng.choice(changed)
    return wrong if wrong != answer else answer[:-1]


def draw_pairs(count: int, rng: random.Random) -> Tensor:
    """Chosen first, then rejected: ``[2 · count, PROMPT + ANSWER]``."""
    prompts = words(count, rng)
    right = [word[::-1] for word in prompts]
    return tokens(prompts * 2, right + [corrupted(answer, rng) for answer in right])


@dataclass
class Run:
    name: str
    policy: gradnorm_ext.PairBalance | None
    rows: list[dict[str, float]] = field(default_factory=list)  # of every step
    held_out: tuple[float, float, float] = (0.0, 0.0, 0.0)  # log-probabilities of chosen and rejected, accuracy

    def column(self, name: str) -> list[float]:
        return [row[name] for row in self.rows]


def dpo(run: Run, model: LlamaForCausalLM, reference: LlamaForCausalLM, settings: Settings, loops: Loops) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), settings.rate, weight_decay=0.0)
    observer: gradnorm_ext.Meter | gradnorm_ext.Reweighted = gradnorm_ext.Meter(model)
    if run.policy is not None:
        optimizer = observer = gradnorm_ext.Reweighted(optimizer, model, run.policy)
    rng = random.Random(f"dpo {settings.seed}")
    for step in loops.steps(run.name):
        rows = draw_pairs(settings.pairs, rng)
        with torch.no_grad():
            base, _ = answer_log_probabilities(reference, rows)
        with observer.observe(prompts=torch.arange(settings.pairs).repeat(2)):  # a pair is one unit
            total, lengths = answer_log_probabilities(model, rows)
            chosen, rejected = (total - base).chunk(2)
            loss = -F.logsigmoid(BETA * (chosen - rejected)).mean()
            if run.policy is not None and run.policy.space == "probability":
                run.policy.feed(total / lengths)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        norms = observer.stats.example_norm.chunk(2)
        ratio = (norms[0] / norms[1]).median().item()
        weights = getattr(observer, "weights", None)
        of_chosen = 1.0 if weights is None else weights.chunk(2)[0].mean().item()
        figures = {"loss": loss.item(), "chosen_norm": norms[0].mean().item(), "rejected_norm": norms[1].mean().item()}
        log_probabilities = {"chosen": chosen.mean().item(), "rejected": rejected.mean().item()}
        run.rows.append({"step": step, **figures, "ratio": ratio, "chosen_weight": of_chosen, **log_probabilities})
        loops.note(run.name, f"loss {loss.item():.2f}")


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, settings: Settings) -> tuple[float, float, float]:
    """On held-out pairs: mean log-probability of the chosen and the rejected, and how often the former is higher."""
    total, _ = answer_log_probabilities(model, draw_pairs(settings.held_out, random.Random("held out")))
    chosen, rejected = total.chunk(2)
    return chosen.mean().item(), rejected.mean().item(), (chosen > rejected).float().mean().item()


def table_of(before: tuple[float, float, float], runs: list[Run]) -> Table:
    table = Table(
        title="Gradient norm of chosen over rejected (median pair), and held-out pairs",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    columns = ("run", "ratio at first", "at last", "weight of chosen", "log p chosen", "log p rejected", "accuracy")
    for heading in columns:
        table.add_column(heading, justify="left" if heading == "run" else "right")
    table.add_row("start", "", "", "", *(f"{value:.3f}" for value in before))
    for run in runs:
        ratio, weight = run.column("ratio"), run.column("chosen_weight")
        measured = (f"{fmean(ratio[:10]):.2f}", f"{fmean(ratio[-10:]):.2f}", f"{fmean(weight):.2f}")
        table.add_row(run.name, *measured, *(f"{value:.3f}" for value in run.held_out))
    return table


def verdicts(before: tuple[float, float, float], runs: list[Run]) -> list[str]:
    """In words, what the numbers say and no more."""
    found = []
    for run in runs:
        change = [after - old for after, old in zip(run.held_out, before, strict=True)]
        moved = "both fall" if max(change[:2]) < 0 else "the chosen rise" if change[0] > 0 else "the chosen fall"
        found.append(
            f"{run.name}: log p of held-out answers, {change[0]:+.2f} chosen and {change[1]:+.2f} rejected ({moved})."
        )
    if runs and runs[0].name == "plain":
        ratio = runs[0].column("ratio")
        larger = "chosen" if fmean(ratio) > 1 else "rejected"
        found.append(
            f"Under plain DPO the chosen answer's gradient norm is {fmean(ratio[:10]):.2f} of the rejected one's at first and "
            f"{fmean(ratio[-10:]):.2f} at last (median pair): over all steps the {larger} one's is larger."
        )
    return [*found, "One seed and a toy task: what balancing is worth elsewhere is not seen here."]


def plot(runs: list[Run], path: Path) -> None:
    figure = Figure((11, 4), layout="constrained")
    ratio, logs = figure.subplots(1, 2)
    for index, run in enumerate(runs):
        ratio.plot(run.column("ratio"), color=COLORS[index], lw=0.9, label=run.name)
        for name, style in (("chosen", "-"), ("rejected", "--")):
            logs.plot(run.column(name), color=COLORS[index], linestyle=style, lw=0.9, label=f"{run.name}, {name}")
    ratio.axhline(1, color="black", lw=0.5)
    ratio.set(title="‖g chosen‖ / ‖g rejected‖ before weighting, median pair", xlabel="step", yscale="log")
    logs.set(title="log p against the reference's, of a step's answers", xlabel="step")
    for axes in (ratio, logs):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps: shows that it runs, not what it finds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/dpo_pairs"), help="folder (default %(default)s)")
    return parser.parse_args()


def main() -> int:
    options, console = parse(), Console()
    settings = replace(QUICK if options.quick else Settings(), seed=options.seed)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    model = build_model(settings.seed)
    planned = [
        Run("plain", None),
        *(Run(space, gradnorm_ext.PairBalance(space)) for space in ("parameter", "probability")),
    ]
    runs: list[Run] = []
    with Loops({"warm-up": settings.warm_up_steps} | {run.name: settings.steps for run in planned}, console) as loops:
        warm_up(model, settings, loops)
        before = evaluate(model, settings)
        for run in planned:
            trained = copy.deepcopy(model)
            dpo(run, trained, model, settings, loops)
            if run.rows:
                run.held_out = evaluate(trained, settings)
                runs.append(run)
    if not runs:
        console.print("Stopped before the first step of DPO.")
        return INTERRUPTED
    options.out.mkdir(parents=True, exist_ok=True)
    table, sentences = table_of(before, runs), verdicts(before, runs)
    for run in runs:
        write_rows(options.out / f"{run.name}.csv", run.rows)
    plot(runs, options.out / "dpo_pairs.png")
    show(options.out, console, table, *sentences)
    return INTERRUPTED if loops.stopped else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
