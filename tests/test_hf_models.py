"""Models of transformers, with everything trainers turn on: exact norms and exact reweighted gradients."""

import functools

import architectures
import oracle
import pytest
import torch
from architectures import ARCHITECTURES, EXAMPLES, MIXTURES, TASKS

from gradnorm_ext import ClipExamples, InverseNorm, Meter, Reweighted, check

EXACT = 1e3 * torch.finfo(torch.float64).eps


@functools.cache
def right(name, attention="eager"):
    """The examples' gradients of an architecture by autograd, once for all tests of it."""
    return architectures.gradients_of(built(name, attention), *architectures.batch(name))


def built(name, attention, checkpointing=False):
    experts = {"experts_implementation": "eager"} if name in MIXTURES else {}  # grouped products have no float64
    return architectures.build(name, attention, checkpointing, **experts)


def reweighted_as_by_autograd(model, name, attention="eager", policy=None, blocks=2, **timing):
    """Norms and reweighted gradients against autograd, one example at a time."""
    gradients, (inputs, labels) = right(name, attention), architectures.batch(name)
    policy = policy or InverseNorm()
    optimizer = Reweighted(torch.optim.SGD(model.parameters(), 0.0), model, policy, tasks=2, **timing)
    for _ in range(blocks):
        model.zero_grad()
        with optimizer.observe(tasks=TASKS):
            optimizer.backward(architectures.loss_of(model, inputs, labels))
        oracle.same_norms(optimizer.stats, gradients, TASKS)
        weights = optimizer.weights if policy.weighs == "examples" else optimizer.weights[TASKS]
        architectures.same_gradients(model, gradients, weights)
        optimizer.step()


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize(
    ("name", "attention"),
    [
        *((name, "eager") for name in ARCHITECTURES if name != "mamba2"),  # which has no attention
        *((name, "sdpa") for name in ARCHITECTURES if name != "gpt-oss"),  # which has no other
    ],
)
def test_equals_autograd_one_example_at_a_time(name, attention, checkpointing):
    reweighted_as_by_autograd(built(name, attention, checkpointing), name, attention, blocks=1 + checkpointing)


def errors(name, dtype, autocast, checkpointing):
    """The largest error of the measured norms against float64, and that of plain torch's gradients, one by one."""
    attention, examples = "eager" if name == "gpt-oss" else "sdpa", torch.arange(EXAMPLES)
    wide = architectures.gradients_of(built(name, attention), *architectures.batch(name))
    truth = oracle.group_norms(wide, examples, EXAMPLES)
    narrow = architectures.build(name, attention, checkpointing, dtype)
    inputs, labels = architectures.batch(name, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain = architectures.gradients_of(narrow, inputs, labels)
        meter = Meter(narrow)
        with meter.observe():
            architectures.loss_of(narrow, inputs, labels).backward()
    off = [{key: one[key] - other[key] for key in other} for one, other in zip(plain, wide, strict=True)]
    distance = oracle.group_norms(off, examples, EXAMPLES)  # no norm is further off than this
    return oracle.relative(meter.stats.example_norm, truth), float(distance.max() / truth.max())


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # of plain torch, where autocast meets RMSNorm
@pytest.mark.parametrize(("kind", "checkpointing"), [("float32", False), ("bfloat16", True), ("autocast", True)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_errs_at_most_twice_as_much_as_plain_torch(name, kind, checkpointing):
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    found, plain = errors(name, dtype, kind == "autocast", checkpointing)
    assert found <= 2 * plain


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_as_many_examples_as_positions(name):
    model = architectures.build(name, "eager")
    if name in MIXTURES:
        model.set_experts_implementation("eager")
    inputs, labels = architectures.batch(name, EXAMPLES + (name == "t5"))
    if name == "t5":  # its biases are looked up by [T, T] positions, which here look like a batch
        inputs["input_ids"], inputs["attention_mask"] = inputs["input_ids"][:, 1:], inputs["attention_mask"][:, 1:]
    gradients = architectures.gradients_of(model, inputs, labels)
    meter = Meter(model, tasks=2)
    if name == "t5":
        message = r"relative_attention_bias.weight .* run the batch again"
        with pytest.raises(RuntimeError, match=message), meter.observe(tasks=TASKS):
            architectures.loss_of(model, inputs, labels).backward()
    with meter.observe(tasks=TASKS):
        architectures.loss_of(model, inputs, labels).backward()
    oracle.same_norms(meter.stats, gradients, TASKS)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(
    "timing", ({"passes": 2}, {"scope": "layer"}, {"apply": "next_step"}, {"policy": ClipExamples(0.5)})
)
@pytest.mark.parametrize("name", ("llama, tied", "qwen3 moe", "t5", "mamba2"))
def test_every_timing(name, timing):
    model, (inputs, labels) = built(name, "eager", checkpointing=True), architectures.batch(name)
    if "scope" not in timing and "apply" not in timing:
        return reweighted_as_by_autograd(model, name, **timing)
    gradients = right(name)
    optimizer = Reweighted(torch.optim.SGD(model.parameters(), 0.0), model, InverseNorm(), tasks=2, **timing)
    for _ in range(2):
        model.zero_grad()
        with optimizer.observe(tasks=TASKS):
            architectures.loss_of(model, inputs, labels).backward()
        oracle.same_norms(optimizer.stats, gradients, TASKS)
        used = optimizer.weights if "apply" in timing else None
        optimizer.step()
    if "apply" in timing:
        return architectures.same_gradients(model, gradients, used[TASKS])
    of_tasks = [
        {key: sum(g[key] for g, k in zip(gradients, TASKS, strict=True) if k == task) for key in gradients[0]}
        for task in (0, 1)
    ]
    scale = max(float(p.grad.abs().max()) for p in model.parameters())
    for key, parameter in model.named_parameters():
        inverse = torch.stack([1 / g[key].norm() for g in of_tasks])
        expected = sum(w * g[key] for w, g in zip(inverse / inverse.mean(), of_tasks, strict=True))
        if bool(inverse.isfinite().all()):
            assert float((parameter.grad - expected).abs().max()) <= EXACT * scale


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", MIXTURES)
def test_the_tasks_gram_matrix_of_mixtures(name):
    model = architectures.build(name, "eager", experts_implementation="eager")
    inputs, labels = architectures.batch(name)
    flat = torch.stack(
        [torch.cat([one.flatten() for one in g.values()]) for g in architectures.gradients_of(model, inputs, labels)]
    )
    meter = Meter(model, tasks=2, gram=True)
    with meter.observe(tasks=TASKS, prompts=[0, 1, 1, 0]):
        architectures.loss_of(model, inputs, labels).backward()
    of_tasks = torch.zeros(2, flat.shape[1], dtype=flat.dtype).index_add_(0, TASKS, flat)
    torch.testing.assert_close(meter.stats.task_gram, of_tasks @ of_tasks.T)
    torch.testing.assert_close(meter.stats.prompt_norm, of_tasks.norm(dim=1))


@pytest.mark.parametrize("implementation", ("eager", "grouped_mm", "batched_mm"))
@pytest.mark.parametrize("name", MIXTURES)
def test_every_experts_implementation_and_the_routers_loss(name, implementation):
    model = architectures.build(name, "eager", dtype=torch.float32, experts_implementation=implementation)
    inputs, _ = architectures.batch(name)
    found = {}
    for measured in (False, True):
        model.zero_grad()
        meter = Meter(model)
        with meter.observe() if measured else torch.enable_grad():
            outputs = model(**inputs, labels=inputs["input_ids"], output_router_logits=True, use_cache=False)
            outputs.loss.backward()
        found[measured] = {key: p.grad.clone() for key, p in model.named_parameters()}
    torch.testing.assert_close(found[True], found[False])
    total = torch.cat([one.flatten() for one in found[False].values()]).norm()
    torch.testing.assert_close(meter.stats.task_norm[0], total)


def test_experts_spread_over_devices_are_refused():
    model = architectures.build("mixtral", "eager", experts_implementation="eager")
    for module in model.modules():
        if hasattr(module, "_is_expert_parallel"):
            module._is_expert_parallel = True
    inputs, labels = architectures.batch("mixtral")
    message = r"the experts of .*gate_up_proj must be on one device, got expert parallelism"
    with pytest.raises(RuntimeError, match=message), Meter(model).observe():
        architectures.loss_of(model, inputs, labels).backward()


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("timing", ({}, {"passes": 2}))
@pytest.mark.parametrize("name", ("gpt2", "llama, tied", "mixtral", "t5"))
def test_reentrant_checkpoints(name, timing):
    model = built(name, "eager")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    reweighted_as_by_autograd(model, name, **timing)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_checker(name, capsys):
    model = architectures.build(name, "eager", dtype=torch.float32)
    inputs, _ = architectures.batch(name, dtype=torch.float32)

    def loss(outputs):
        return outputs.logits.square().flatten(1).mean(1).sum()

    found = check(model, loss, kwargs=inputs, tasks=TASKS)
    assert found.differing == [] and "agree with autograd" in capsys.readouterr().out


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", architectures.MORE)
def test_more_architectures(name):
    torch.manual_seed(0)
    model = architectures.sized(architectures.MORE[name]()).double().train()
    inputs, labels = architectures.batch_of(model)
    gradients = architectures.gradients_of(model, inputs, labels)
    meter = Meter(model, tasks=2)
    with meter.observe(tasks=TASKS):
        architectures.loss_of(model, inputs, labels).backward()
    oracle.same_norms(meter.stats, gradients, TASKS)


@pytest.mark.parametrize("name", architectures.REFUSED)
def test_what_cannot_be_measured_is_refused_by_name(name):
    make, message = architectures.REFUSED[name]
    model = make().double().train()
    inputs, labels = architectures.batch_of(model)
    with pytest.raises((ValueError, RuntimeError), match=message), Meter(model).observe():
        architectures.loss_of(model, inputs, labels % 2 if labels.dim() == 1 else labels).backward()
