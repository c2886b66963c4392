"""Trainers over two processes (DDP, gloo), beside one process that has the same batches."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
import trainers
import transformers
import trl
from torch.nn.parallel import DistributedDataParallel
from worlds import run_world

import gradnorm_ext
from gradnorm_ext.integrations.transformers import Trainer
from gradnorm_ext.integrations.trl import DPOTrainer, GRPOTrainer, SFTTrainer

RANKS, BATCH, STEPS, NAMES = 2, 8, 3, ("code", "math")
FOLDER = "GRADNORM_TEST_FOLDER"  # of what one process found, in the environment of the others
ROUNDED = 1e2 * torch.finfo(torch.float32).eps  # the fused head and the norm layers compute in float32
OF_EXAMPLES = ["gradnorm/example_norm/mean", "gradnorm/example_norm/max"]
COUNTS = [f"gradnorm/task/{name}/examples" for name in NAMES]


def in_order(options, kind, examples):
    return trainers.arguments(
        kind,
        **{"train_sampling_strategy": "sequential", "learning_rate": 0.1, "max_steps": STEPS, **options},
        per_device_train_batch_size=examples,
    )


def sft(examples, options, **kwargs):
    arguments = in_order(options, trl.SFTConfig, examples)
    tokens = trainers.tokenizer()
    return SFTTrainer(trainers.llama(), arguments, train_dataset=trainers.texts(48), processing_class=tokens, **kwargs)


def dpo(examples, options, **kwargs):
    return DPOTrainer(
        trainers.llama(),
        args=in_order(options, trl.DPOConfig, examples),
        train_dataset=trainers.pairs(48),
        processing_class=trainers.tokenizer(),
        ref_model=trainers.llama(seed=1),
        **kwargs,
    )


def plain(examples, options, **kwargs):
    rows = [[2 + (3 * i + j) % 9 for j in range(3 + i % 4)] for i in range(48)]
    rows = [{"input_ids": ids, "labels": ids, "source": NAMES[i // 2 % 2]} for i, ids in enumerate(rows)]
    collator = transformers.DataCollatorForTokenClassification(trainers.tokenizer())
    arguments = in_order(options, transformers.TrainingArguments, examples)
    return Trainer(trainers.llama(), arguments, train_dataset=rows, data_collator=collator, **kwargs)


EXACTLY = {"meter_options": {"ranks": "exact"}}
LATER = {"policy": gradnorm_ext.InverseNorm(), "reweighted_options": {"apply": "next_step"}}
RUNS = {
    "sft": (sft, {}, EXACTLY),
    "sft by estimates": (sft, {}, {}),
    "sft, accumulated": (sft, {"gradient_accumulation_steps": 2}, EXACTLY),
    "sft, some layers": (sft, {}, {"meter_options": {"ranks": "exact", "modules": "model.layers.1.*"}}),
    "sft, reweighted": (sft, {}, {**EXACTLY, **LATER}),
    "dpo": (dpo, {}, EXACTLY),
    "transformers, reweighted": (plain, {}, {**EXACTLY, **LATER}),
}


def trained(name, processes):
    make, options, more = RUNS[name]
    trainer = make(BATCH // processes, options, task_column="source", **more)
    trainer.train()
    weights = trainer.accelerator.unwrap_model(trainer.model).parameters()
    flat = torch.cat([p.detach().flatten() for p in weights]).tolist()
    logs = [log for log in trainer.state.log_history if "gradnorm/example_norm/mean" in log]
    return trainer, {"weights": flat, "logs": logs}


def as_accelerate_launches(rank):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}  # asked for, though the group is there already


def closest(found, expected):
    return found == pytest.approx(expected, rel=ROUNDED, nan_ok=True)


def check_logs_are_those_of_one_process(rank):
    as_accelerate_launches(rank)
    for name in RUNS:
        trainer, found = trained(name, RANKS)
        assert isinstance(trainer.model_wrapped, DistributedDataParallel)
        expected = json.loads(Path(os.environ[FOLDER], name).read_text())
        assert closest(found["weights"], expected["weights"]), name
        assert len(found["logs"]) == len(expected["logs"]) == STEPS
        for mine, theirs in zip(found["logs"], expected["logs"], strict=True):
            keys = {key for key in theirs if key.startswith("gradnorm/")}
            if name == "sft by estimates":  # the others are other estimates of the same
                keys = {*OF_EXAMPLES, *COUNTS}
            assert {*OF_EXAMPLES, *COUNTS} <= keys
            for key in keys:
                assert closest(mine[key], theirs[key]), (name, key, mine[key], theirs[key])


class Still(GRPOTrainer):
    """Keeps the batches it trains on; its steps have a rate of 0, so that the model stays what they saw."""

    def __init__(self, *args, **kwargs):
        self.batches, self.measured = [], []
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            self.batches.append((dict(inputs), kwargs.get("num_items_in_batch")))
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.measured.append(self._observer.stats)
        return loss


def completions_score(completions, **_):
    return [text.count("a") + 0.25 * len(text) for text in completions]


def grpo(size, options, **kwargs):
    options = {"num_generations": 4, "max_completion_length": 5, "learning_rate": 0.0, **options}
    return Still(
        trainers.llama(),
        completions_score,
        args=trainers.arguments(trl.GRPOConfig, per_device_train_batch_size=size, **options),
        train_dataset=trainers.prompts(32),
        processing_class=trainers.tokenizer(),
        task_column="source",
        **kwargs,
    )


def check_grpo_in_units_of_the_averaged_gradient(rank):
    as_accelerate_launches(rank)
    for options in ({}, {"steps_per_generation": 1, "gradient_accumulation_steps": 2}):
        trainer = grpo(8, options)
        trainer.train()
        model = trainer.accelerator.unwrap_model(trainer.model)
        for (inputs, items), stats in zip(trainer.batches, trainer.measured, strict=True):
            units = []
            for b in range(8):
                model.zero_grad()
                of_one = torch.where(torch.arange(8) == b, inputs["advantages"], 0)
                loss = trl.GRPOTrainer.compute_loss(trainer, model, {**inputs, "advantages": of_one}, False, items)
                loss = (
                    loss / trainer.args.gradient_accumulation_steps
                    if trainer.model_accepts_loss_kwargs is False
                    else loss
                )
                loss.backward()
                units.append(torch.cat([p.grad.flatten() for p in model.parameters()]) / RANKS)
            norms = torch.stack(units).norm(dim=1)
            torch.testing.assert_close(stats.example_norm.double(), norms.double(), rtol=ROUNDED, atol=1e-9)
            prompts = torch.stack([torch.stack(units)[stats.prompts == p].sum(0) for p in range(2)]).norm(dim=1)
            torch.testing.assert_close(stats.prompt_norm.double(), prompts.double(), rtol=ROUNDED, atol=1e-9)
            assert stats.task_units.sum() == 2 * RANKS and stats.task_count.sum() == 8 * RANKS


def check_what_no_process_can_do_alone_is_refused_before_a_model_is_loaded(rank):
    as_accelerate_launches(rank)
    by_examples, fed = gradnorm_ext.ClipExamples(1.0), gradnorm_ext.MTGRPO(1.0, 1.0)
    later = {"reweighted_options": {"apply": "next_step"}}
    for make, size, options, kwargs, message in (
        (sft, 4, {}, {"policy": gradnorm_ext.InverseNorm()}, 'got apply="same_step"; pass reweighted_options='),
        (
            sft,
            4,
            {},
            {"policy": by_examples, **later},
            "over 2 processes a policy must weigh tasks, got one that weighs",
        ),
        (grpo, 8, {}, {"policy": fed, **later}, "got MTGRPO, which each process would feed for itself"),
        (grpo, 4, {"num_generations": 8}, {}, "got num_generations=8, per_device_train_batch_size=4 and steps_per_"),
        (grpo, 8, {"gradient_accumulation_steps": 2}, {}, "and steps_per_generation=2; set steps_per_generation to 1"),
    ):
        model = trainers.llama
        trainers.llama = lambda **_: "no such model"
        try:
            with pytest.raises(ValueError, match="") as error:
                make(size, options, **({"task_column": "source"} if make is not grpo else {}), **kwargs)
            assert message in str(error.value), error.value
        finally:
            trainers.llama = model


def test_two_processes_are_as_one(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, tempfile.mkdtemp())
    for name in RUNS:
        Path(os.environ[FOLDER], name).write_text(json.dumps(trained(name, 1)[1]))
    run_world(RANKS, [check_logs_are_those_of_one_process], tmp_path)


def test_grpo_and_refusals(tmp_path):
    checks = [
        check_grpo_in_units_of_the_averaged_gradient,
        check_what_no_process_can_do_alone_is_refused_before_a_model_is_loaded,
    ]
    run_world(RANKS, checks, tmp_path)
