"""The Trainer of transformers: its log and its weights against a loop that runs autograd one example at a time."""

import copy
import dataclasses
import math
from collections import Counter

import pytest
import torch
import trainers
import transformers
from torch.utils.data import default_collate

import gradnorm_ext
from gradnorm_ext.integrations.transformers import TASKS, TaskCollator, Trainer, TrainerMixin

accelerate = pytest.importorskip("accelerate")  # optional
Dataset = trainers.datasets.Dataset

NAMES = ("code", "math")
EXACT = 1e3 * torch.finfo(torch.float64).eps
ROUNDED = (
    1e1 * torch.finfo(torch.float32).eps
)  # transformers' losses and norm layers round to float32, whatever the model


def rows(count=16, length=6):
    """Rows of two tasks, one length; some labels are masked, as a prompt's are."""
    made = []
    for i in range(count):
        ids = [1 + (i * i + 3 * i * j + j) % 12 for j in range(length)]
        made.append({"input_ids": ids, "labels": [-100] * (i % 3) + ids[i % 3 :], "source": NAMES[i % 2]})
    return made


class Recorder(transformers.Trainer):
    """The plain trainer, which writes down what every micro-batch was and what the weights were before it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.batches.append((copy.deepcopy(model.state_dict()), inputs, num_items_in_batch))
        return super().training_step(model, inputs, num_items_in_batch)


def train(cls, options, dataset=None, model=None, **kwargs):
    trainer = cls(
        model or trainers.llama(),
        trainers.arguments(**options),
        train_dataset=dataset or Dataset.from_list(rows()),
        **kwargs,
    )
    trainer.train()
    return trainer


def recorded(options, **kwargs):
    """A plain run whose batches still have their tasks."""
    trainer = train(
        Recorder,
        options | {"remove_unused_columns": False},
        data_collator=TaskCollator(transformers.default_data_collator, "source", NAMES),
        **kwargs,
    )
    return trainer


class NoTasks(transformers.LlamaForCausalLM):
    """Takes the tasks that a recorded batch has, and leaves them."""

    def forward(self, *args, gradnorm_tasks=None, **kwargs):
        return super().forward(*args, **kwargs)


def without_tasks(tied=False):
    plain = trainers.llama(tied)
    plain.__class__ = NoTasks
    return plain


def example_gradients(model, inputs, items):
    """``[B, parameters]``: of each example's share of the loss, by autograd."""
    gradients = []
    for i in range(len(inputs["input_ids"])):
        labels = inputs["labels"][i : i + 1]
        logits = model(input_ids=inputs["input_ids"][i : i + 1]).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / items
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(gradients)


def closest(found, expected, tolerance=EXACT):
    return abs(found - expected) <= tolerance * max(abs(expected), 1.0) or (math.isnan(found) and math.isnan(expected))


def same_weights(one, other, tolerance=EXACT):
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def blocks_of_step(plain, step, accumulate):
    model = trainers.llama(plain.model.config.tie_word_embeddings)
    for state, inputs, items in plain.batches[step * accumulate : (step + 1) * accumulate]:
        model.load_state_dict(state)
        yield example_gradients(model, inputs, items), inputs[TASKS]


def test_exact_tasks_are_of_the_whole_step():
    options = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 5, "max_grad_norm": 0}
    dataset, exact = Dataset.from_list(rows(45)), {"exact_tasks": True}
    plain = recorded(options, model=without_tasks(), dataset=dataset)
    measured = train(Trainer, options, dataset, task_column="source", meter_options=exact)
    same_weights(measured.model, plain.model)
    once = options | {"max_steps": 1}
    policy = gradnorm_ext.InverseNorm()
    reweighed = train(Trainer, once, dataset, task_column="source", meter_options=exact, policy=policy)
    for step in range(3):
        gradients, tasks = (torch.cat(each) for each in zip(*blocks_of_step(plain, step, 3), strict=True))
        log = measured.state.log_history[step]
        for k, name in enumerate(NAMES):
            mine = gradients[tasks == k]
            gram = mine @ mine.T
            expected = (gram.sum() - gram.trace()).item() / (len(mine) * (len(mine) - 1))
            assert closest(log[f"gradnorm/task/{name}/norm"], mine.sum(0).norm().item(), ROUNDED)
            assert closest(log[f"gradnorm/task/{name}/sqnorm_unbiased"], expected, ROUNDED)
        if step == 0:
            of_task = torch.stack([gradients[tasks == k].sum(0) for k in range(2)])
            moved = 0.5 * inverse_norm(gradients, of_task, tasks) @ gradients
    start = torch.cat([p.detach().flatten() for p in trainers.llama().parameters()])
    end = torch.cat([p.detach().flatten() for p in reweighed.model.parameters()])
    assert (start - moved - end).abs().max() <= ROUNDED * end.abs().max()


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_the_log_is_what_autograd_says_of_every_example(accumulate, tied):
    options = {"gradient_accumulation_steps": accumulate, "per_device_train_batch_size": 5}
    dataset = Dataset.from_list(rows(45))
    plain = recorded(options, model=without_tasks(tied), dataset=dataset)
    measured = train(Trainer, options, dataset, trainers.llama(tied), task_column="source")
    assert measured.task_names == NAMES
    for step in range(3):
        log = measured.state.log_history[step]
        blocks = list(blocks_of_step(plain, step, accumulate))
        norms = torch.cat([gradients.norm(dim=1) for gradients, _ in blocks])
        assert closest(log["gradnorm/example_norm/mean"], norms.mean().item(), ROUNDED)
        assert closest(log["gradnorm/example_norm/max"], norms.max().item(), ROUNDED)
        for k, name in enumerate(NAMES):
            apart = variance = pairs = freedom = 0.0
            for gradients, tasks in blocks:
                mine = gradients[tasks == k]
                gram = mine @ mine.T
                apart += (gram.sum() - gram.trace()).item()
                pairs += len(mine) * (len(mine) - 1)
                if len(mine) > 1:
                    variance += (len(mine) - 1) * mine.var(0).sum().item()
                    freedom += len(mine) - 1
                if accumulate == 1 and len(mine):
                    assert closest(log[f"gradnorm/task/{name}/norm"], mine.sum(0).norm().item(), ROUNDED)
            prefix = f"gradnorm/task/{name}/"
            if not any((tasks == k).any() for _, tasks in blocks):
                assert not any(key.startswith(prefix) for key in log)
                continue
            assert log[prefix + "examples"] == sum((tasks == k).sum().item() for _, tasks in blocks)
            assert closest(log[prefix + "sqnorm_unbiased"], apart / pairs if pairs else math.nan, ROUNDED)
            assert closest(log[prefix + "variance"], variance / freedom if pairs else math.nan, ROUNDED)
        if accumulate > 1:
            assert "gradnorm/task/code/norm" not in log


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05, "lr_scheduler_type": "linear"},
        {"optim": "adamw_torch", "learning_rate": 1e-2, "gradient_checkpointing": True},
        {"per_device_train_batch_size": 7, "optim_args": "momentum=0.9", "num_train_epochs": 2, "max_steps": -1},
    ],
    ids=["clipped", "adam", "epochs"],
)
def test_measuring_leaves_the_training_as_it_is(options):
    plain = train(transformers.Trainer, options)
    measured = train(Trainer, options, task_column="source")
    same_weights(measured.model, plain.model)
    for log, expected in zip(measured.state.log_history[:3], plain.state.log_history[:3], strict=True):
        assert all(closest(log[key], expected[key]) for key in ("loss", "grad_norm", "learning_rate", "epoch"))
        assert "gradnorm/task/math/variance" in log


def naive_run(plain, accumulate, rate, clip, momentum, weights_of):
    """The trainer's loop over the recorded batches, one backward per example, weighted by hand."""
    model = trainers.llama()
    model.load_state_dict(plain.batches[0][0])
    parameters = list(model.parameters())
    velocity = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    steps = len(plain.batches) // accumulate
    for step in range(steps):
        total = torch.zeros_like(velocity)
        for _, inputs, items in plain.batches[step * accumulate : (step + 1) * accumulate]:
            gradients = example_gradients(model, inputs, items)
            of_task = torch.stack([gradients[inputs[TASKS] == k].sum(0) for k in range(2)])
            total += weights_of(gradients, of_task, inputs[TASKS]) @ gradients
        total *= min(1.0, clip / (total.norm().item() + 1e-6))
        velocity = momentum * velocity + total
        with torch.no_grad():
            start = 0
            for p in parameters:
                p -= rate * (1 - step / steps) * velocity[start : start + p.numel()].view_as(p)
                start += p.numel()
    return model


def inverse_norm(gradients, of_task, tasks):
    inverse = 1 / of_task.norm(dim=1)
    return (inverse / inverse.mean())[tasks]


class SmoothedInverseNorm:
    """``next_step``: of the running means of squared norms before this block."""

    def __init__(self):
        self.total, self.mass, self.next = torch.zeros(2), 0.0, torch.ones(2, dtype=torch.float64)

    def __call__(self, gradients, of_task, tasks):
        now = self.next
        self.total = 0.9 * self.total + 0.1 * of_task.square().sum(1)
        self.mass = 0.9 * self.mass + 0.1
        inverse = 1 / (self.total / self.mass).sqrt()
        self.next = inverse / inverse.mean()
        return now[tasks]


def clipped(gradients, of_task, tasks):
    return (0.02 / gradients.norm(dim=1)).clamp(max=1)


@pytest.mark.parametrize(
    ("policy", "reweighted", "weights_of"),
    [
        (gradnorm_ext.InverseNorm(), {}, inverse_norm),
        (gradnorm_ext.InverseNorm(), {"apply": "next_step"}, SmoothedInverseNorm()),
        (gradnorm_ext.ClipExamples(0.02), {}, clipped),
    ],
    ids=["same_step", "next_step", "examples"],
)
def test_a_policy_steps_along_the_mixture_through_accumulation_clipping_and_schedule(policy, reweighted, weights_of):
    options = {
        **{"gradient_accumulation_steps": 2, "max_grad_norm": 0.05, "lr_scheduler_type": "linear", "max_steps": 4},
        **{"per_device_train_batch_size": 8, "optim_args": "momentum=0.9"},
    }
    plain = recorded(options, model=without_tasks())
    reweighed = train(Trainer, options, task_column="source", policy=policy, reweighted_options=reweighted)
    expected = naive_run(plain, 2, rate=0.5, clip=0.05, momentum=0.9, weights_of=weights_of)
    same_weights(reweighed.model, expected, ROUNDED)
    assert any(not torch.allclose(a, b) for a, b in zip(plain.model.parameters(), expected.parameters(), strict=True))
    log = reweighed.state.log_history[-2]
    assert math.isfinite(log["gradnorm/task/code/weight"]) and log["gradnorm/skipped_steps"] == 0
    assert reweighed.history.steps == 4


@pytest.mark.parametrize(
    "policy", [gradnorm_ext.InverseNorm, lambda: gradnorm_ext.PiKE(1.0, 1.0)], ids=["means", "state"]
)
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(policy, tmp_path):
    def run(folder, **options):
        reweighted = {"apply": "next_step"} if policy is gradnorm_ext.InverseNorm else {}
        common = {
            "output_dir": str(folder),
            "max_steps": 4,
            "optim": "adamw_torch",
            "save_strategy": "steps",
            "save_steps": 2,
        }
        return Trainer(
            trainers.llama(),
            trainers.arguments(**(common | options)),
            train_dataset=Dataset.from_list(rows()),
            task_column="source",
            policy=policy(),
            reweighted_options=reweighted,
        )

    whole = run(tmp_path / "whole")
    whole.train()
    resumed = run(tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    same_weights(resumed.model, whole.model)
    saved = torch.load(tmp_path / "whole" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert saved["gradnorm"]["history"]["steps"] == 2
    # Without what was saved the end is another one.
    forgetful = run(tmp_path / "whole")
    del saved["gradnorm"], saved["param_groups"][0]["gradnorm"]
    torch.save(saved, tmp_path / "whole" / "checkpoint-2" / "optimizer.pt")
    forgetful.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert any(
        not torch.allclose(a, b) for a, b in zip(forgetful.model.parameters(), whole.model.parameters(), strict=True)
    )


class HalfAccelerator(accelerate.Accelerator):
    mixed_precision = "fp16"


class Scaled(Trainer):
    """With a GradScaler, which accelerate makes on GPUs alone, and a loss that overflows when asked to."""

    overflow = -1

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        self.accelerator.native_amp, self.accelerator.__class__ = True, HalfAccelerator  # so that it unscales to clip
        return prepared

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * math.inf if self.state.global_step == self.overflow else loss


class Overflowing(Scaled):
    overflow = 1


@pytest.mark.parametrize("policy", [None, gradnorm_ext.InverseNorm()], ids=["measured", "reweighted"])
def test_a_grad_scalers_scale_is_in_no_figure_and_no_weight(policy):
    options = {"max_grad_norm": 0.5}
    plain = train(Trainer, options, task_column="source", policy=policy)
    scaled = train(Scaled, options, task_column="source", policy=policy)
    same_weights(scaled.model, plain.model, ROUNDED)
    for log, expected in zip(scaled.state.log_history[:3], plain.state.log_history[:3], strict=True):
        assert all(closest(log[key], value, ROUNDED) for key, value in expected.items() if "norm" in key)


@pytest.mark.parametrize("exact", [False, True])
def test_a_step_that_the_scaler_skips_does_not_spoil_the_next(exact):
    kwargs = {"task_column": "source", "policy": gradnorm_ext.InverseNorm(), "meter_options": {"exact_tasks": exact}}
    scaled = train(Overflowing, {"max_steps": 3}, **kwargs)
    once = train(Overflowing, {"max_steps": 2}, **kwargs)
    assert scaled.state.log_history[2]["gradnorm/skipped_steps"] == 0  # the scaler's, not ours
    assert any(not torch.equal(a, b) for a, b in zip(scaled.model.parameters(), once.model.parameters(), strict=True))


class LastTokens(Trainer):
    """A head that computes the logits of the last four tokens only; defined in front of the mixin, as users do."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(input_ids=inputs["input_ids"], logits_to_keep=4).logits[:, :-1]
        labels = inputs["input_ids"][:, -3:]
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels)


def test_a_head_of_some_positions_only():
    measured = train(LastTokens, {}, task_column="source")
    plain = recorded({}, model=without_tasks())
    model = trainers.llama()
    inputs = plain.batches[0][1]
    norms = []
    for ids in inputs["input_ids"]:
        logits = model(input_ids=ids[None]).logits[:, -4:-1]
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[None, -3:], reduction="sum") / 12
        norms.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).norm().item()
        )
    assert closest(measured.state.log_history[0]["gradnorm/example_norm/max"], max(norms), ROUNDED)


def test_rows_that_a_collator_lays_end_to_end_are_measured_one_by_one():
    kept = [dict(row, labels=[-100, *row["labels"][1:]]) for row in rows()]  # as the collator has them
    for options in ({"task_column": "source"}, {}):
        padded = train(Trainer, {}, kept, **options)
        flat = train(Trainer, {}, kept, data_collator=transformers.DataCollatorWithFlattening(), **options)
        for log, expected in zip(flat.state.log_history[:3], padded.state.log_history[:3], strict=True):
            keys = [key for key in expected if key.startswith("gradnorm")]
            assert keys and all(closest(log[key], expected[key], ROUNDED) for key in keys)


LIGER = {"rope": False, "swiglu": False, "rms_norm": False, "fused_linear_cross_entropy": True}


@pytest.mark.parametrize("policy", [None, gradnorm_ext.InverseNorm()], ids=["measured", "reweighted"])
def test_ligers_fused_loss_whose_head_is_never_called(policy):
    pytest.importorskip("liger_kernel")  # optional
    options = {"gradient_accumulation_steps": 2}
    plain = train(Trainer, options, task_column="source", policy=policy)
    model, calls = trainers.llama(), []
    model.lm_head.register_forward_hook(lambda *call: calls.append(call))
    fused = train(
        Trainer,
        options | {"use_liger_kernel": True, "liger_kernel_config": LIGER},
        model=model,
        task_column="source",
        policy=policy,
    )
    assert not calls
    same_weights(fused.model, plain.model, ROUNDED)
    for log, expected in zip(fused.state.log_history[:3], plain.state.log_history[:3], strict=True):
        assert all(
            closest(log[key], value, ROUNDED) for key, value in expected.items() if key.endswith(("norm", "variance"))
        )


def test_evaluation_is_left_alone_and_a_model_may_train_on():
    options = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    dataset = Dataset.from_list(rows())
    measured = train(
        Trainer, options, dataset, eval_dataset=dataset, task_column="source", policy=gradnorm_ext.InverseNorm()
    )
    plain_eval = transformers.Trainer(measured.model, trainers.arguments(), eval_dataset=dataset).evaluate()
    evaluated = [log for log in measured.state.log_history if "eval_loss" in log]
    assert closest(evaluated[-1]["eval_loss"], plain_eval["eval_loss"])
    assert not any(key.startswith("gradnorm") for log in evaluated for key in log)
    measured.train()
    assert isinstance(measured.optimizer.optimizer, gradnorm_ext.Reweighted)
    assert isinstance(measured.optimizer.optimizer.optimizer, torch.optim.SGD)


def test_an_optimizer_and_a_schedule_of_ones_own():
    def run(**kwargs):
        model = trainers.llama()
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        options = {"dataloader_num_workers": 1, "max_grad_norm": 0}
        return train(Trainer, options, model=model, task_column="source", optimizers=(optimizer, schedule), **kwargs)

    plain, weighted = run(), run(policy=gradnorm_ext.Equal())
    same_weights(weighted.model, plain.model)
    assert weighted.state.log_history[2]["gradnorm/task/code/weight"] == 1
    assert [log["learning_rate"] for log in weighted.state.log_history[:3]] == [0.5, 0.25, 0.5 / 3]


def test_figures_of_a_log_are_those_of_its_steps():
    every = train(Trainer, {"max_steps": 4}, task_column="source").state.log_history
    pair = train(Trainer, {"max_steps": 4, "logging_steps": 2}, task_column="source").state.log_history
    for log, (one, two) in zip(pair[:2], (every[:2], every[2:4]), strict=True):
        task = "gradnorm/task/math/"
        for figure in ("sqnorm_unbiased", "variance", "norm"):
            assert closest(log[task + figure], (one[task + figure] + two[task + figure]) / 2)
        assert log["gradnorm/example_norm/max"] == max(
            one["gradnorm/example_norm/max"], two["gradnorm/example_norm/max"]
        )
        signal = log[task + "sqnorm_unbiased"]
        expected = log[task + "variance"] / signal if signal > 0 else math.nan
        assert log[task + "noise_scale"] == expected or (math.isnan(expected) and math.isnan(log[task + "noise_scale"]))


class Tagged(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(rows())


@pytest.mark.parametrize("dataset", [rows(), Tagged(), Dataset.from_list(rows())], ids=["list", "stream", "datasets"])
@pytest.mark.parametrize("unused", [True, False])
def test_tasks_come_from_any_kind_of_dataset(dataset, unused):
    order = ("math", "code")
    trainer = train(Trainer, {"remove_unused_columns": unused}, dataset, task_column="source", tasks=order)
    log = trainer.state.log_history[0]
    assert log["gradnorm/task/math/examples"] + log["gradnorm/task/code/examples"] == 4
    if isinstance(dataset, Tagged):  # not shuffled
        assert log["gradnorm/task/math/examples"] == Counter(row["source"] for row in rows()[:4])["math"]
    assert trainer.task_names == order


def test_a_label_may_be_the_task():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.LlamaConfig(vocab_size=13, num_labels=3, pad_token_id=0, **sizes)
    dataset = [{"input_ids": row["input_ids"], "labels": i % 3} for i, row in enumerate(rows())]
    model = transformers.LlamaForSequenceClassification(config)
    trainer = train(Trainer, {}, Dataset.from_list(dataset), model, task_column="labels")
    assert trainer.task_names == ("0", "1", "2")
    assert sum(trainer.state.log_history[0].get(f"gradnorm/task/{k}/examples", 0) for k in range(3)) == 4


def test_without_a_column_all_rows_are_one_task():
    log = train(Trainer, {}).state.log_history[0]
    assert log["gradnorm/task/all/examples"] == 4 and log["gradnorm/task/all/sqnorm_unbiased"] != 0


def test_the_history_can_be_reported(capsys):
    trainer = train(Trainer, {}, task_column="source", policy=gradnorm_ext.InverseNorm())
    gradnorm_ext.report(trainer.history)
    assert "math" in capsys.readouterr().out
    assert [row["weight"] for row in trainer.history.rows()[:2]] != [1, 1]


NO_TASK = [dict(row, source=None) if i == 3 else row for i, row in enumerate(rows())]


@pytest.mark.parametrize(
    ("options", "kwargs", "message"),
    [
        ({}, {"task_column": "domain"}, "must have the column 'domain', got input_ids, labels, source"),
        ({}, {"task_column": "source", "tasks": ["math"]}, "source must hold math, got code as well"),
        ({}, {"tasks": ["math"]}, "need a dataset column"),
        ({}, {"task_column": "source", "dataset": Tagged()}, "tasks of a streamed dataset must be named"),
        ({}, {"task_column": "source", "dataset": NO_TASK}, "every row must have a task, got None in source"),
        ({}, {"reweighted_options": {"apply": "next_step"}}, "need a policy"),
        ({}, {"policy": gradnorm_ext.InverseNorm(), "reweighted_options": {"passes": 2}}, "got passes=2"),
        ({"torch_compile": True}, {}, "got torch_compile=True"),
        ({}, {"policy": gradnorm_ext.RewardStd()}, "got RewardStd, which needs rewards; use GRPOTrainer"),
        (
            {},
            {"policy": gradnorm_ext.Chain(gradnorm_ext.PairBalance("parameter"))},
            "got PairBalance, which needs pairs",
        ),
        ({}, {"policy": gradnorm_ext.GSA(classes=3)}, "got GSA, which needs the logits"),
    ],
)
def test_bad_input_is_refused_before_the_first_step(options, kwargs, message):
    dataset = kwargs.pop("dataset", None) or Dataset.from_list(rows())
    with pytest.raises(ValueError, match=message):
        Trainer(trainers.llama(), trainers.arguments(**options), train_dataset=dataset, **kwargs)


def test_an_optimizer_that_is_reweighted_already_is_refused():
    model = trainers.llama()
    optimizer = gradnorm_ext.Reweighted(torch.optim.SGD(model.parameters(), 0.1), model, gradnorm_ext.Equal())
    with pytest.raises(ValueError, match="must be a plain one, got a Reweighted"):
        Trainer(model, trainers.arguments(), train_dataset=rows(), optimizers=(optimizer, None))


def test_figures_that_cannot_be_are_nan_and_say_why(caplog):
    lonely = [dict(row, source="rare") if i == 0 else row for i, row in enumerate(rows())]
    arguments = trainers.arguments(per_device_train_batch_size=8, max_steps=2)
    with pytest.warns(
        UserWarning, match=r"rare/sqnorm_unbiased will be NaN: it takes two units .* train_dataset has 1"
    ):
        trainer = Trainer(trainers.llama(), arguments, train_dataset=lonely, task_column="source")
    trainer.train()
    seen = [log for log in trainer.state.log_history if "gradnorm/task/rare/norm" in log]
    assert len(seen) == 1 and math.isnan(seen[0]["gradnorm/task/rare/sqnorm_unbiased"])
    assert caplog.text.count("rare/sqnorm_unbiased is NaN in this log: it takes two units") == 1
    with pytest.warns(UserWarning, match="micro-batches hold one"):
        Trainer(trainers.llama(), trainers.arguments(per_device_train_batch_size=1), train_dataset=rows())


def test_a_batch_without_its_tasks_is_refused_in_the_first_step():
    class Own(TrainerMixin, transformers.Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(self.train_dataset, 4, collate_fn=default_collate)

    tensors = [{**{key: torch.tensor(row[key]) for key in ("input_ids", "labels")}, "source": "math"} for row in rows()]
    trainer = Own(trainers.llama(), trainers.arguments(), train_dataset=tensors, task_column="source")
    with pytest.raises(RuntimeError, match="must carry 'gradnorm_tasks', got"):
        trainer.train()


def test_the_collator_names_what_a_row_lacks():
    collate = TaskCollator(default_collate, "source", NAMES)
    with pytest.raises(ValueError, match="every row must have the column 'source', got one with"):
        collate([{"x": 1}])
    with pytest.raises(ValueError, match="source must be one of code, math, got 'art'"):
        collate([{"x": 1, "source": "art"}])
    kept = dataclasses.replace(collate, keep=True)([{"source": "math"}, {"source": "code"}])
    assert kept["source"] == ["math", "code"] and kept[TASKS].tolist() == [1, 0]
