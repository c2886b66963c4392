"""The Python of docs/integrate.md runs, and what it measures is right."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trainers
import transformers

import gradnorm_ext

trl = pytest.importorskip("trl")  # optional

PAGE = (Path(__file__).parent.parent / "docs" / "integrate.md").read_text()
SNIPPETS = {
    title: [code for kind, code in re.findall(r"^```(\w+)\n(.*?)^```", section, re.M | re.S) if kind == "python"]
    for title, section in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
}


def run(title, place, names):
    scope = {"torch": torch, "gradnorm_ext": gradnorm_ext, "transformers": transformers, **names}
    exec(SNIPPETS[title][place], scope)
    return scope


def test_the_page_has_the_snippets_that_the_tests_run():
    counts = {"Plain PyTorch": 2, "transformers": 3, "TRL": 3, "verl": 1, "OpenRLHF": 1}
    assert {title: len(code) for title, code in SNIPPETS.items()} == counts


def plain_batches():
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        yield {
            "inputs": torch.randn(4, 3, generator=generator),
            "tasks": torch.tensor([0, 0, 1, 1]),
            "prompts": torch.tensor([5, 7, 8, 9]),
            "rewards": torch.rand(4, generator=generator),
        }


@pytest.mark.parametrize("place", [0, 1])
def test_plain_pytorch(place):
    torch.manual_seed(0)
    model, logged, batches = torch.nn.Linear(3, 1, bias=False), [], list(plain_batches())
    names = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), 0.0),
        "meter": gradnorm_ext.Meter(model, tasks=["math", "code"]),
        "loss_fn": lambda output, batch: output.sum(),
        "loader": batches,
        "micro_batches": batches,
        "log": logged.append,
    }
    run("Plain PyTorch", place, names)
    gradients = torch.stack([batch["inputs"] for batch in batches])[:, :2]  # of task 0, whatever the weights
    gradients = gradients / (1 if place == 0 else 3)
    products = (gradients[:, 0] * gradients[:, 1]).sum(-1)
    expected = products[-1] if place == 0 else products.mean()
    assert len(logged) == (3 if place == 0 else 1)
    assert logged[-1]["gradnorm/task/math/sqnorm_unbiased"] == pytest.approx(expected.item(), rel=1e-5)


def dataset():
    rows = [{"input_ids": [2 + (i + j) % 9 for j in range(5)], "source": ("math", "code")[i % 2]} for i in range(12)]
    return [row | {"labels": row["input_ids"]} for row in rows]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_transformers(place, capsys):
    args = trainers.arguments(per_device_train_batch_size=6)
    scope = run("transformers", place, {"model": trainers.llama(), "args": args, "dataset": dataset()})
    trainer = scope["trainer"]
    assert trainer.history.steps == 3 and "gradnorm/task/code/norm" in trainer.state.log_history[0]
    if place == 1:
        assert trainer.state.log_history[1]["gradnorm/task/code/weight"] != 1


KINDS = {
    0: (
        trl.GRPOConfig,
        {"num_generations": 4, "max_completion_length": 4, "per_device_train_batch_size": 8},
        trainers.prompts,
    ),
    1: (trl.DPOConfig, {}, trainers.pairs),
    2: (trl.SFTConfig, {"per_device_train_batch_size": 6}, trainers.texts),
}


@pytest.mark.parametrize("place", KINDS)
def test_trl(place):
    config, options, make = KINDS[place]
    names = {
        "model": trainers.llama(),
        "reference": trainers.llama(seed=1),
        "reward_funcs": lambda completions, **_: [float(len(text)) for text in completions],
        "args": trainers.arguments(config, **options),
        "dataset": make(),
        "tokenizer": trainers.tokenizer(),
    }
    trainer = run("TRL", place, names)["trainer"]
    expected = {0: "reward_std/", 1: "gradnorm/chosen_norm", 2: "gradnorm/task/code/"}[place]
    assert any(key.startswith(expected) for key in trainer.state.log_history[0])


def test_verl():
    batch = SimpleNamespace(
        batch={"token_level_scores": torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.5, 0.0], [0.5, 0.0]])},
        non_tensor_batch={
            "data_source": np.array(["code", "code", "math", "math"], dtype=object),
            "uid": np.array(["x", "x", "a", "a"], dtype=object),
        },
    )
    run("verl", 0, {"batch": batch})
    stats = gradnorm_ext.reward_stats(batch.batch["scores"], batch.batch["prompts"], batch.batch["tasks"])
    assert stats.task.tolist() == [1, 0] and stats.zero_std.tolist() == [False, True]


def test_openrlhf():
    info = {"reward": torch.tensor([1.0, 0.0, 1.0, 1.0])}
    names = {"info": info, "first_prompt": 6, "n_samples_per_prompt": 2, "names": ["math", "code"]}
    run("OpenRLHF", 0, names | {"sources": ["code", "code", "math", "math"]})
    assert info["prompts"].tolist() == [6, 6, 7, 7] and info["tasks"].tolist() == [1, 1, 0, 0]
