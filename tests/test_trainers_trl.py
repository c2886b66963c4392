"""TRL's trainers: their logs and their steps against autograd on the plain logits, one example at a time."""

import contextlib
import itertools
import math
import statistics

import pytest
import torch
import trainers
from peft import LoraConfig

import gradnorm_ext

trl = pytest.importorskip("trl")  # optional

from gradnorm_ext.integrations.trl import DPOTrainer, GRPOTrainer, SFTTrainer, over_split_prompts  # noqa: E402

NAMES = ("code", "math")
EXACT = 1e3 * torch.finfo(torch.float64).eps
ROUNDED = (
    1e2 * torch.finfo(torch.float32).eps
)  # the fused head and the norm layers compute in float32, whatever the model


def recording(cls):
    """The trainer, which writes down the weights and the batch of every loss that it trains on."""

    class Recording(cls):
        def __init__(self, *args, **kwargs):
            self.batches = []
            super().__init__(*args, **kwargs)

        def compute_loss(self, model, inputs, *args, **kwargs):
            if model.training:
                state = {name: p.detach().clone() for name, p in model.named_parameters()}
                self.batches.append((state, dict(inputs), kwargs.get("num_items_in_batch")))
            return super().compute_loss(model, inputs, *args, **kwargs)

    return Recording


def lengths(completions, **_):
    return [float(len(text)) for text in completions]


def score(completions, **_):
    """Rewards of completions: the share of the letter a, and some for the length."""
    return [text.count("a") + 0.25 * len(text) for text in completions]


MAKE = {
    "sft": lambda cls, options, **kwargs: cls(
        trainers.llama(),
        trainers.arguments(trl.SFTConfig, **options),
        train_dataset=trainers.texts(),
        processing_class=trainers.tokenizer(),
        **kwargs,
    ),
    "dpo": lambda cls, options, **kwargs: cls(
        kwargs.pop("model", None) or trainers.llama(),
        args=trainers.arguments(trl.DPOConfig, **options),
        train_dataset=trainers.pairs(),
        processing_class=trainers.tokenizer(),
        **({"ref_model": trainers.llama(seed=1)} | kwargs),
    ),
    "grpo": lambda cls, options, **kwargs: cls(
        trainers.llama(),
        kwargs.pop("reward_funcs", score),
        args=trainers.arguments(
            trl.GRPOConfig,
            **{"num_generations": 4, "max_completion_length": 5, "per_device_train_batch_size": 16, **options},
        ),
        train_dataset=trainers.prompts(),
        processing_class=trainers.tokenizer(),
        **kwargs,
    ),
}
PLAIN = {"sft": trl.SFTTrainer, "dpo": trl.DPOTrainer, "grpo": trl.GRPOTrainer}
MEASURED = {"sft": SFTTrainer, "dpo": DPOTrainer, "grpo": GRPOTrainer}


def train(kind, options=None, cls=None, **kwargs):
    trainer = MAKE[kind](recording(cls or MEASURED[kind]), options or {}, **({"task_column": "source"} | kwargs))
    trainer.train()
    return trainer


def closest(found, expected, tolerance=ROUNDED):
    return abs(found - expected) <= tolerance * max(abs(expected), 1.0)


def tasks_of(ids):
    """Of the first letter of each row."""
    text = trainers.tokenizer().batch_decode(ids, skip_special_tokens=True)
    return torch.tensor([NAMES.index(trainers.source_of(one)) for one in text])


def score_gradient(model, ids, attention, mask):
    """Of the sum of log π over the masked tokens of one row, and that sum."""
    logits = model(input_ids=ids[None], attention_mask=attention[None]).logits[0, :-1].log_softmax(-1)
    total = (logits.gather(1, ids[1:, None])[:, 0] * mask[1:]).sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.parameters()))]), total.detach()


def loaded(state):
    model = trainers.llama()
    model.load_state_dict(state, strict=False)
    return model


def sft_gradients(batch):
    """``[B, parameters]`` of each example's part of the loss, and its task."""
    state, inputs, items = batch
    model = loaded(state)
    ids, attention = inputs["input_ids"], inputs["attention_mask"]
    gradients = [
        -score_gradient(model, row, present, (labels != -100) * 1)[0] / items
        for row, present, labels in zip(ids, attention, inputs["labels"], strict=True)
    ]
    return torch.stack(gradients), tasks_of(ids)


def dpo_gradients(batch, accumulate=1, beta=0.1):
    """Those of the chosen, then of the rejected, with the pair's factor that the sigmoid has; tasks; mean log π."""
    state, inputs, _ = batch
    model, reference = loaded(state), trainers.llama(seed=1)
    rows = list(zip(inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"], strict=True))
    scores = [score_gradient(model, *row) for row in rows]
    ratio = torch.stack([total for _, total in scores]) - torch.stack(
        [score_gradient(reference, *row)[1] for row in rows]
    )
    chosen, rejected = ratio.chunk(2)
    factor = -beta * torch.sigmoid(-beta * (chosen - rejected)) / len(chosen) / accumulate
    gradients = torch.cat([factor, -factor])[:, None] * torch.stack([gradient for gradient, _ in scores])
    lengths = inputs["completion_mask"].sum(1)
    return gradients, tasks_of(inputs["input_ids"]), torch.stack([total for _, total in scores]) / lengths


def grpo_gradients(batch, accumulate=1):
    """Those of the completions, their tasks, and their prompts' texts."""
    state, inputs, _ = batch
    model = loaded(state)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    mask = torch.cat([torch.zeros_like(inputs["prompt_mask"]), inputs["completion_mask"]], 1)
    factor = -inputs["advantages"] / inputs["num_items_in_batch"]
    gradients = [
        f * score_gradient(model, *row)[0]
        for f, row in zip(factor, zip(ids, attention, mask, strict=True), strict=True)
    ]
    prompts = trainers.tokenizer().batch_decode(inputs["prompt_ids"], skip_special_tokens=True)
    return torch.stack(gradients), tasks_of(inputs["prompt_ids"]), prompts


def unbiased(gradients, units):
    """``(‖Σ u‖² - Σ ‖u‖²) / (n (n - 1))`` over the sums of equal units."""
    sums = torch.stack(
        [sum(g for g, u in zip(gradients, units, strict=True) if u == unit) for unit in sorted(set(units))]
    )
    if len(sums) < 2:
        return math.nan
    return ((sums.sum(0).square().sum() - sums.square().sum()) / (len(sums) * (len(sums) - 1))).item()


def check_tasks(log, gradients, tasks, units):
    norms = gradients.norm(dim=1)
    assert closest(log["gradnorm/example_norm/mean"], norms.mean().item())
    assert closest(log["gradnorm/example_norm/max"], norms.max().item())
    for k, name in enumerate(NAMES):
        mine = [i for i, task in enumerate(tasks.tolist()) if task == k]
        assert log[f"gradnorm/task/{name}/examples"] == len(mine)
        assert closest(log[f"gradnorm/task/{name}/norm"], gradients[mine].sum(0).norm().item())
        expected = unbiased(gradients[mine], [units[i] for i in mine])
        assert closest(log[f"gradnorm/task/{name}/sqnorm_unbiased"], expected) or math.isnan(expected)


@pytest.mark.parametrize("kind", MAKE)
def test_measuring_leaves_the_training_as_it_is(kind):
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "per_device_train_batch_size": 8}
    plain = MAKE[kind](PLAIN[kind], options)
    plain.train()
    measured = MAKE[kind](MEASURED[kind], options, task_column="source")
    measured.train()
    for a, b in zip(measured.model.parameters(), plain.model.parameters(), strict=True):
        assert (a - b).abs().max() <= ROUNDED * b.abs().max()
    for log, expected in zip(measured.state.log_history[:3], plain.state.log_history[:3], strict=True):
        same = [key for key in expected if "time" not in key and key in log]
        assert len(same) == len([key for key in expected if "time" not in key])
        assert all(closest(log[key], expected[key]) for key in same)
        assert "gradnorm/task/math/variance" in log


def test_sft_logs_what_autograd_says_of_every_row():
    trainer = train("sft", {"per_device_train_batch_size": 6})
    for log, batch in zip(trainer.state.log_history, trainer.batches, strict=False):
        gradients, tasks = sft_gradients(batch)
        check_tasks(log, gradients, tasks, list(range(len(tasks))))


def test_sft_without_padding_is_measured_row_by_row():
    options = {"per_device_train_batch_size": 6, "max_length": None}
    padded = train("sft", options)
    flat = train("sft", options | {"padding_free": True})
    for log, expected in zip(flat.state.log_history[:3], padded.state.log_history[:3], strict=True):
        keys = [key for key in expected if key.startswith("gradnorm")]
        assert keys and all(closest(log[key], expected[key]) for key in keys if not math.isnan(expected[key]))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_dpo_logs_what_autograd_says_of_chosen_and_rejected(accumulate):
    options = {"per_device_train_batch_size": 6 // accumulate, "gradient_accumulation_steps": accumulate}
    trainer = train("dpo", options, meter_options={"exact_tasks": accumulate > 1})
    for step, log in enumerate(trainer.state.log_history[:3]):
        blocks = [dpo_gradients(batch, accumulate) for batch in trainer.batches[step * accumulate :][:accumulate]]
        chosen, rejected = (torch.cat([block[0].chunk(2)[side] for block in blocks]) for side in (0, 1))
        tasks = torch.cat([block[1].chunk(2)[0] for block in blocks])
        check_tasks(log, torch.cat([chosen, rejected]), tasks.repeat(2), [*range(6), *range(6)])
        assert closest(log["gradnorm/chosen_norm"], chosen.norm(dim=1).mean().item())
        assert closest(log["gradnorm/rejected_norm"], rejected.norm(dim=1).mean().item())


@pytest.mark.parametrize("space", ["parameter", "probability"])
def test_dpo_balances_its_pairs(space):
    policy = gradnorm_ext.PairBalance(space, clip=1.5)
    trainer = train("dpo", {"max_grad_norm": 0, "gradient_accumulation_steps": 2, "max_steps": 1}, policy=policy)
    step = 0.0
    for batch in trainer.batches:
        gradients, _, mean_logp = dpo_gradients(batch, accumulate=2)
        if space == "parameter":
            chosen, rejected = gradients.norm(dim=1).chunk(2)
            ratio = rejected / chosen
        else:
            chosen, rejected = mean_logp.chunk(2)
            ratio = (chosen - rejected).exp()
        ratio = ratio.clamp(1 / 1.5, 1.5)
        step = step + torch.cat([2 * ratio / (1 + ratio), 2 / (1 + ratio)]) @ gradients
    before = torch.cat([p.flatten() for p in trainer.batches[0][0].values()])
    after = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    assert ((before - after) / 0.5 - step).abs().max() <= ROUNDED * step.abs().max()
    assert (
        step - sum(dpo_gradients(b, accumulate=2)[0].sum(0) for b in trainer.batches)
    ).abs().max() > 0.01 * step.abs().max()


def test_dpo_of_an_adapter_whose_reference_is_the_model_without_it():
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    common = {"ref_model": None, "peft_config": config}
    plain = MAKE["dpo"](trl.DPOTrainer, {}, **common)
    plain.train()
    measured = MAKE["dpo"](DPOTrainer, {}, task_column="source", **common)
    measured.train()
    for a, b in zip(measured.model.parameters(), plain.model.parameters(), strict=True):
        assert (a - b).abs().max() <= ROUNDED * b.abs().max()
    log = measured.state.log_history[0]
    total = log["grad_norm"]  # of the sum over the two tasks, which the triangle bounds from both sides
    of_tasks = [log[f"gradnorm/task/{name}/norm"] for name in NAMES]
    assert abs(of_tasks[0] - of_tasks[1]) <= total <= sum(of_tasks)
    balanced = MAKE["dpo"](DPOTrainer, {}, policy=gradnorm_ext.PairBalance("probability"), **common)
    balanced.train()
    assert balanced.state.log_history[0]["gradnorm/task/all/weight"] == pytest.approx(1)


def rewards_of(batches, counts=lambda text: True):
    """The rewards of the completions of a step that count, by prompt."""
    by_prompt = {}
    for _, inputs, _ in batches:
        prompts, texts = (
            trainers.tokenizer().batch_decode(inputs[key], skip_special_tokens=True)
            for key in ("prompt_ids", "completion_ids")
        )
        for prompt, text, reward in zip(prompts, texts, score(texts), strict=True):
            if counts(text):
                by_prompt.setdefault(prompt, []).append(reward)
    return by_prompt


@pytest.mark.parametrize("accumulate", [1, 2])
def test_grpo_logs_the_rewards_of_whole_groups(accumulate):
    options = {"gradient_accumulation_steps": accumulate, "per_device_train_batch_size": 16 // accumulate}
    parts = [lambda completions, **_: [2.0 * text.count("a") for text in completions], lengths]
    trainer = train("grpo", options | {"reward_weights": [0.5, 0.25]}, reward_funcs=parts)
    for step, log in enumerate(trainer.state.log_history[:3]):
        groups = rewards_of(trainer.batches[step * accumulate : (step + 1) * accumulate])
        assert all(len(rewards) == 4 for rewards in groups.values())
        for name in NAMES:
            mine = [rewards for prompt, rewards in groups.items() if trainers.source_of(prompt) == name]
            if not mine:
                assert f"reward_std/{name}" not in log
                continue
            assert closest(log[f"reward/{name}"], statistics.fmean(itertools.chain(*mine)))
            assert closest(log[f"reward_std/{name}"], statistics.fmean(map(statistics.stdev, mine)))
            assert closest(log[f"zero_std_share/{name}"], statistics.fmean(len(set(rewards)) == 1 for rewards in mine))


def test_grpo_logs_what_autograd_says_of_prompts():
    trainer = train("grpo")
    for log, batch in zip(trainer.state.log_history, trainer.batches, strict=False):
        check_tasks(log, *grpo_gradients(batch))


def test_grpo_measures_prompts_that_are_spread_over_micro_batches():
    trainer = train("grpo", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8})
    for step, log in enumerate(trainer.state.log_history[:3]):
        blocks = [grpo_gradients(batch) for batch in trainer.batches[2 * step : 2 * step + 2]]
        spread = set(blocks[0][2]) & set(blocks[1][2])
        assert spread
        for k, name in enumerate(NAMES):
            apart, units = 0.0, set()
            for gradients, tasks, prompts in blocks:
                mine = [i for i, task in enumerate(tasks.tolist()) if task == k]
                units |= {prompts[i] for i in mine}
                apart += sum(
                    (gradients[i] @ gradients[j]).item() for i in mine for j in mine if prompts[i] != prompts[j]
                )
            if len(units) > 1:
                expected = apart * (16 * 15) / (2 * 8 * 7) / (len(units) * (len(units) - 1))
                assert closest(log[f"gradnorm/task/{name}/sqnorm_unbiased"], expected)


def test_figures_of_spread_prompts_are_unbiased():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1, bias=False).double()
    x = torch.randn(6, 3, dtype=torch.float64) + 1
    tasks, prompts = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([3, 3, 3, 8, 5, 9])
    meter = gradnorm_ext.Meter(model, tasks=2)

    def observed(rows):
        with meter.observe(tasks=tasks[rows], prompts=prompts[rows]):
            model(x[rows]).sum().backward()
        return meter.stats

    whole = observed(list(range(6)))
    splits = [
        (list(two), [i for i in range(6) if i not in two]) for two in itertools.combinations(range(6), 2)
    ]  # of unequal micro-batches
    found = [over_split_prompts([observed(a), observed(b)], [prompts[a], prompts[b]]) for a, b in splits]
    assert any(not torch.allclose(one.task_variance, whole.task_variance) for one in found)
    for figure in ("task_sqnorm_unbiased", "task_variance"):
        mean = torch.stack([getattr(one, figure) for one in found]).mean(0)
        torch.testing.assert_close(mean, getattr(whole, figure), rtol=EXACT, atol=0)
    assert all(one.task_units.tolist() == [2, 2] for one in found)


def test_grpo_weighs_by_the_spread_of_rewards():
    trainer = train("grpo", {"max_grad_norm": 0, "max_steps": 1}, policy=gradnorm_ext.RewardStd())
    gradients, _, prompts = grpo_gradients(trainer.batches[0])
    std = {prompt: statistics.stdev(rewards) for prompt, rewards in rewards_of(trainer.batches[:1]).items()}
    weights = torch.tensor([std[prompt] for prompt in prompts], dtype=torch.float64)
    step = (weights / weights.mean()) @ gradients
    before = torch.cat([p.flatten() for p in trainer.batches[0][0].values()])
    after = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    assert ((before - after) / 0.5 - step).abs().max() <= ROUNDED * step.abs().max()


@pytest.mark.parametrize("kind", MAKE)
def test_a_policy_weighs_every_micro_batch_by_its_tasks(kind):
    options = {"max_grad_norm": 0, "max_steps": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}
    trainer = train(kind, options, policy=gradnorm_ext.InverseNorm())
    of = {
        "sft": sft_gradients,
        "dpo": lambda batch: dpo_gradients(batch, accumulate=2)[:2],
        "grpo": lambda b: grpo_gradients(b)[:2],
    }
    step = 0.0
    for batch in trainer.batches:
        gradients, tasks = of[kind](batch)
        sums = torch.stack([gradients[tasks == k].sum(0) for k in range(2)])
        inverse = 1 / sums.norm(dim=1)
        step = step + (inverse / inverse.mean()) @ sums
    before = torch.cat([p.flatten() for p in trainer.batches[0][0].values()])
    after = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    assert ((before - after) / 0.5 - step).abs().max() <= ROUNDED * step.abs().max()


def test_completions_that_no_reward_function_scores_are_left_out():
    def choosy(completions, **_):
        return [None if "b" in text else score([text])[0] for text in completions]

    options = {"num_iterations": 2, "max_steps": 4}
    trainer = train("grpo", options, reward_funcs=[choosy], policy=gradnorm_ext.InverseNorm())
    logs = trainer.state.log_history[:4]
    assert logs[-1]["gradnorm/skipped_steps"] == 0
    assert [any(key.startswith("reward_std/") for key in log) for log in logs] == [True, False, True, False]
    for log, batch in zip(logs[::2], trainer.batches[::2], strict=True):
        scored, every = rewards_of([batch], lambda text: "b" not in text), rewards_of([batch])
        assert scored != every
        for name in NAMES:
            mine = [rewards for prompt, rewards in scored.items() if trainers.source_of(prompt) == name]
            if mine:
                spread = [statistics.stdev(rewards) for rewards in mine if len(rewards) > 1]
                assert closest(log[f"reward/{name}"], statistics.fmean(itertools.chain(*mine)))
                assert closest(log[f"reward_std/{name}"], statistics.fmean(spread))


@pytest.mark.parametrize(
    ("kind", "options", "kwargs", "message"),
    [
        ("sft", {"packing": True, "max_length": 16}, {}, "must stay one example, got packing=True"),
        (
            "sft",
            {"padding_free": True, "max_length": None, "pad_to_multiple_of": 8},
            {},
            "got padding_free=True with pad_to_multiple_of=8",
        ),
        (
            "grpo",
            {"gradient_accumulation_steps": 2},
            {"policy": gradnorm_ext.RewardStd()},
            "whole groups, got steps_per_generation=2",
        ),
        ("grpo", {"gradient_accumulation_steps": 2}, {"meter_options": {"exact_tasks": True}}, "leave exact_tasks out"),
        ("grpo", {}, {"policy": gradnorm_ext.PairBalance("parameter")}, "got PairBalance, which needs pairs"),
        ("dpo", {}, {"policy": gradnorm_ext.MTGRPO(1.0, 1.0)}, "got MTGRPO, which needs rewards"),
        *((kind, {}, {"task_column": "domain"}, "must have the column 'domain'") for kind in MAKE),
    ],
)
def test_bad_input_is_refused_before_the_first_step(kind, options, kwargs, message):
    with pytest.raises(ValueError, match=message):
        MAKE[kind](MEASURED[kind], options, **({"task_column": "source"} | kwargs))


def test_offloaded_activations_are_refused(monkeypatch):
    manager = "trl.trainer.dpo_trainer.get_act_offloading_ctx_manager"  # which needs a GPU
    monkeypatch.setattr(manager, lambda model: contextlib.nullcontext())
    with pytest.raises(ValueError, match="must stay in the graph"):
        MAKE["dpo"](DPOTrainer, {"activation_offloading": True})


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_a_micro_batch_of_one_unit_is_warned_of(kind):
    one = {"per_device_train_batch_size": 4 if kind == "grpo" else 1}
    with pytest.warns(UserWarning, match="sqnorm_unbiased, variance and noise_scale will be NaN: it takes two units"):
        MAKE[kind](MEASURED[kind], one)


def test_evaluation_of_prompts_without_tasks():
    trainer = MAKE["grpo"](
        GRPOTrainer,
        {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1, "per_device_eval_batch_size": 4},
        task_column="source",
        eval_dataset=trainers.prompts().remove_columns("source"),
    )
    trainer.train()
    evaluated = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(evaluated) == 1 and not any("gradnorm" in key for key in evaluated[0])
