"""What a training step may be made of, on a device: against autograd one example at a time, in float64 on the CPU.

Every test runs for some cases on the CPU, and for all of them on a GPU, where there is one.
"""

import contextlib
import copy
from types import SimpleNamespace

import architectures
import oracle
import pytest
import test_checkpoints
import torch
import torch.nn.functional as F
from torch import nn

from gradnorm_ext import IMTLG, ClipExamples, InverseNorm, Meter, RewardStd, Reweighted, fused_head

EXACT = 1e4 * torch.finfo(torch.float64).eps  # a GPU's products and sums go in another order, and so do its gradients
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
K = 3


def cases(*names, here):
    """Each of the names on a GPU, and those that are in ``here`` on the CPU as well."""
    on_cpu = [pytest.param(name, "cpu", id=f"{name}-cpu") for name in names if name in here]
    return on_cpu + [pytest.param(name, "cuda", id=f"{name}-cuda", marks=GPU) for name in names]


def tasks_of(count):
    return torch.tensor([(3 * i + i // 2) % K for i in range(count)])


def on_cpu(gradients):
    return [{name: gradient.cpu() for name, gradient in one.items()} for one in gradients]


def assert_near(found, truth):
    assert oracle.relative(found.cpu(), truth.cpu()) < EXACT


def assert_gradient(model, gradients, weights):
    """``.grad`` is the sum of the examples' gradients times the weights."""
    of_examples = on_cpu(gradients)
    expected = {
        name: sum(w * one[name] for w, one in zip(weights.double().cpu(), of_examples, strict=True))
        for name in of_examples[0]
    }
    largest = max(float(one.abs().max()) for one in expected.values())
    for name, parameter in model.named_parameters():
        if name in expected:
            found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert float((found.double().cpu() - expected[name]).abs().max()) <= EXACT * largest, name


def weights_of(optimizer, tasks):
    """Of the examples, whatever the policy weighs."""
    weights = optimizer.weights.cpu()
    return weights if optimizer.policy.weighs == "examples" else weights[tasks]


METERS = {
    "examples, prompts and tasks": {},
    "per layer": {"per_layer": True},
    "gram": {"gram": True},
    "exact tasks": {"exact_tasks": True},
    "some modules": {"modules": ["tokens", "blocks.1.*", "head"]},
    "vmap": {"on_unsupported": "vmap"},
}


def check_meter(name, device, two_backwards=False, **options):
    case = oracle.make(name).to(torch.float64)
    gradients = oracle.per_example_gradients(case)
    if "modules" in options:
        gradients = [
            {n: g for n, g in one.items() if n.startswith(("tokens", "blocks.1.", "head"))} for one in gradients
        ]
    examples, tasks = torch.arange(len(case.x)), tasks_of(len(case.x))
    prompts = tasks * 10 + examples % 2
    index, case = torch.unique(prompts, return_inverse=True)[1], case.on(device)
    meter = Meter(case.model, tasks=K, **options)
    for ids in (tasks, tasks.to(device)):  # the first block verifies itself
        case.model.zero_grad()
        if meter.exact_tasks:
            meter.reset()
        with meter.observe(tasks=ids, prompts=prompts, backwards=1 + two_backwards):
            loss = case.run()
            if two_backwards:
                (0.25 * loss).backward(retain_graph=True)
                (0.75 * loss).backward()
            else:
                loss.backward()
        stats = meter.stats
        assert_near(stats.example_norm, oracle.group_norms(gradients, examples, len(examples)))
        assert_near(stats.task_norm, oracle.group_norms(gradients, tasks, K))
        assert_near(stats.prompt_norm, oracle.group_norms(gradients, index, int(index.max()) + 1))
        if "modules" not in options:
            assert_gradient(case.model, gradients, torch.ones(len(examples)))
        if meter.gram:
            flat = torch.stack([torch.cat([g.flatten() for g in one.values()]) for one in gradients])
            of_tasks = flat.new_zeros(K, flat.shape[1]).index_add_(0, tasks, flat)
            assert_near(stats.task_gram, of_tasks @ of_tasks.t())
        if meter.per_layer:
            total = sum(layer.task_norm.square() for layer in stats.layers.values())
            assert_near(total.sqrt(), stats.task_norm)
            one = [{n: g for n, g in example.items() if n.rpartition(".")[0] == "norm"} for example in gradients]
            assert_near(stats.layers["norm"].example_norm, oracle.group_norms(one, examples, len(examples)))
        assert bool(stats.finite)


@pytest.mark.parametrize(("name", "device"), cases(*oracle.MAKERS, here=("attention, sequence first",)))
def test_every_layer(name, device):
    check_meter(name, device)


@pytest.mark.parametrize(("mode", "device"), cases(*METERS, here=METERS))
def test_meter_in_every_mode(mode, device):
    check_meter("transformer", device, **METERS[mode])


@pytest.mark.parametrize(("name", "device"), cases("transformer, tied head", "mlp", here=("mlp",)))
def test_several_backward_passes(name, device):
    check_meter(name, device, two_backwards=True)


@pytest.mark.parametrize(
    ("name", "device"), cases("embedding bag", "transformer", "conv2d", "llama, tied", here=("transformer",))
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_errs_at_most_twice_as_much_as_plain_torch(name, device, dtype):
    case = oracle.make(name).to(dtype)
    examples = torch.arange(len(case.x))
    truth = oracle.group_norms(oracle.per_example_gradients(case.to(torch.float64)), examples, len(examples))
    case = case.on(device)
    plain = oracle.group_norms(on_cpu(oracle.per_example_gradients(case)), examples, len(examples))
    meter = Meter(case.model)
    for _ in range(2):
        case.model.zero_grad()
        with meter.observe():
            case.run().backward()
        allowed = 2 * max(oracle.relative(plain, truth), torch.finfo(dtype).eps)
        assert oracle.relative(meter.stats.example_norm.cpu(), truth) <= allowed


def by_median(stats):
    return (stats.example_norm.median() / stats.example_norm).clamp(max=1)


by_median.weighs = "examples"
MODES = {
    "examples": (by_median, {}),
    "clipped examples": (ClipExamples(0.2), {}),
    "tasks": (InverseNorm(), {}),
    "examples, two passes": (by_median, {"passes": 2}),
    "tasks, two passes": (InverseNorm(), {"passes": 2}),
    "tasks, exact": (InverseNorm(), {"exact_tasks": True}),
    "tasks, by inner products": (IMTLG(), {"gram": True}),
    "tasks, next step": (InverseNorm(), {"apply": "next_step"}),
    "by layer": (InverseNorm(), {"scope": "layer"}),
}
OPTIMIZERS = {"plain": {}, "fused": {"fused": True}}


@pytest.mark.parametrize("fused", OPTIMIZERS)
@pytest.mark.parametrize(("mode", "device"), cases(*MODES, here=("tasks", "examples, two passes", "by layer")))
@pytest.mark.parametrize("name", ("transformer, tied head", "free parameters"))
def test_reweighted_in_every_mode(name, mode, device, fused):
    policy, options = MODES[mode]
    case = oracle.make(name).to(torch.float64).on(device)
    examples, tasks = torch.arange(len(case.x)), tasks_of(len(case.x))
    plain = torch.optim.Adam(case.model.parameters(), 1e-3, **OPTIMIZERS[fused])
    optimizer = Reweighted(plain, case.model, policy, tasks=K, **options)
    before = [parameter.detach().clone() for parameter in case.model.parameters()]
    for _ in range(3):
        here = oracle.Case(copy.deepcopy(case.model), case.x, case.y, case.loss).on("cpu")
        gradients = oracle.per_example_gradients(here)
        optimizer.zero_grad()
        with optimizer.observe(tasks=tasks):
            optimizer.backward(case.run())
        assert_near(optimizer.stats.example_norm, oracle.group_norms(gradients, examples, len(examples)))
        norms = oracle.group_norms(gradients, tasks, K)
        assert_near(optimizer.stats.task_norm, norms)
        if mode == "by layer":
            for name in gradients[0]:
                one = [{name: gradient[name]} for gradient in gradients]
                stats = SimpleNamespace(
                    task_norm=oracle.group_norms(one, tasks, K), task_count=tasks.bincount(minlength=K)
                )
                expected = sum(w * g[name] for w, g in zip(policy(stats)[tasks], gradients, strict=True))
                assert_near(dict(case.model.named_parameters())[name].grad, expected)
        else:
            assert_gradient(case.model, gradients, weights_of(optimizer, tasks))
        optimizer.step()
    assert optimizer.skipped_steps == 0
    assert not any(map(torch.equal, before, case.model.parameters()))


@pytest.fixture(params=["looked at on the CPU", "decided on the device"])
def decides(request, monkeypatch):
    """On the CPU as well as where to look is to wait."""
    if request.param == "decided on the device":
        monkeypatch.setattr("gradnorm_ext.optimizer._would_wait", lambda tensor: True)


FUSED = {
    "Adam": lambda parameters, **how: torch.optim.Adam(parameters, 0.1, **how),
    "AdamW": lambda parameters, **how: torch.optim.AdamW(parameters, 0.1, **how),
    "SGD": lambda parameters, **how: torch.optim.SGD(parameters, 0.1, **how),
    "SGD with momentum": lambda parameters, **how: torch.optim.SGD(parameters, 0.1, momentum=0.9, **how),
}


@pytest.mark.usefixtures("decides")
@pytest.mark.parametrize("fused", (False, True), ids=("plain", "fused"))
@pytest.mark.parametrize(("kind", "device"), cases(*FUSED, here=FUSED))
def test_a_step_that_is_not_finite_is_not_taken(kind, device, fused):
    torch.manual_seed(0)
    model = nn.Linear(4, 3).to(device)
    plain = FUSED[kind](model.parameters(), fused=fused)
    optimizer = Reweighted(plain, model, InverseNorm(), tasks=2)
    x, twin = torch.randn(4, 4, device=device), copy.deepcopy(model)
    alone = FUSED[kind](twin.parameters())  # takes the finite steps, with the same gradients
    for scale in (float("inf"), 1.0, float("inf"), 1.0, float("nan")):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer.zero_grad()
        with optimizer.observe(tasks=[0, 1, 1, 0]):
            (scale * model(x).square()).sum().backward()
        if scale == 1:
            for one, other in zip(twin.parameters(), model.parameters(), strict=True):
                one.grad = other.grad.clone()
            alone.step()
        optimizer.step()
        assert all(map(torch.equal, before, model.parameters())) == (scale != 1)
        for one, other in zip(twin.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(one, other)
    assert optimizer.skipped_steps == copy.deepcopy(optimizer).skipped_steps == 3
    assert optimizer.state_dict()["gradnorm"]["skipped_steps"] == 3
    assert all(int(state.get("step", 2)) == 2 for state in plain.state.values())


@pytest.mark.usefixtures("decides")
@pytest.mark.parametrize(("when", "device"), cases("asked", "in time", here=("asked", "in time")))
def test_weights_that_are_not_finite_are_an_error_and_no_step(when, device, monkeypatch):
    if when == "in time":
        monkeypatch.setattr("gradnorm_ext.optimizer._UNDECIDED", 1)
    model = nn.Linear(2, 2).to(device)
    optimizer = Reweighted(
        torch.optim.AdamW(model.parameters(), 0.1, fused=True), model, lambda stats: stats.task_norm * torch.nan
    )
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with optimizer.observe():
        model(torch.ones(3, 2, device=device)).sum().backward()
    with pytest.raises(RuntimeError, match="the policy must return finite weights for finite statistics"):
        optimizer.step()
        assert when == "asked"
        optimizer.skipped_steps  # noqa: B018  # raises, where the device decided
    assert all(map(torch.equal, before, model.parameters()))
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize(("mode", "device"), cases("measured", "same_step", "next_step", here=("same_step",)))
def test_autocast_with_a_scaler(mode, device):
    """Half precision on a GPU, bfloat16 on the CPU; the second step's loss overflows."""
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    case = oracle.make("transformer, tied head").on(device)
    examples, tasks = torch.arange(len(case.x)), tasks_of(len(case.x))
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    optimizer = torch.optim.AdamW(case.model.parameters(), 1e-3)
    meter = Meter(case.model, tasks=K)
    if mode != "measured":
        optimizer = Reweighted(optimizer, meter, InverseNorm(), apply=mode)
    observer = meter if mode == "measured" else optimizer
    for overflow in (False, True, False):
        before = copy.deepcopy(case.model)
        wide = oracle.Case(copy.deepcopy(case.model), case.x, case.y, case.loss).on("cpu").to(torch.float64)
        truth = oracle.group_norms(oracle.per_example_gradients(wide), examples, len(examples))
        with torch.autocast(device, dtype):
            plain = oracle.group_norms(on_cpu(oracle.per_example_gradients(case)), examples, len(examples))
        optimizer.zero_grad()
        with observer.observe(tasks=tasks, loss_scale=scaler.get_scale()):
            with torch.autocast(device, dtype):
                loss = case.run()
            scaler.scale(loss * (float("inf") if overflow else 1.0)).backward()
        if not overflow:
            allowed = 2 * max(oracle.relative(plain, truth), torch.finfo(dtype).eps)
            assert oracle.relative(observer.stats.example_norm.cpu(), truth) <= allowed
        assert bool(observer.stats.finite) == (not overflow)
        scaler.step(optimizer)
        scaler.update()
        moved = not all(map(torch.equal, before.parameters(), case.model.parameters()))
        assert moved == (not overflow)


@pytest.mark.parametrize(("kind", "device"), cases(*test_checkpoints.KINDS, here=("offloaded",)))
@pytest.mark.parametrize("timing", ("measured", "same_step", "two passes"))
def test_checkpointed_blocks(kind, timing, device):
    case, (gradients, norms) = test_checkpoints.make(kind).on(device), test_checkpoints.truth()
    observer = Meter(case.model)
    if timing != "measured":
        plain = torch.optim.SGD(case.model.parameters(), 0.1)
        observer = Reweighted(plain, observer, by_median, **test_checkpoints.TIMINGS[timing])
    for _ in range(2):
        case.model.zero_grad()
        offload = torch.autograd.graph.save_on_cpu() if kind == "offloaded" else contextlib.nullcontext()
        with observer.observe(), offload:
            (observer.backward if timing == "two passes" else torch.Tensor.backward)(case.run())
        assert_near(observer.stats.example_norm, norms)
        weights = torch.ones(4) if timing == "measured" else weights_of(observer, None)
        assert_gradient(case.model, gradients, weights)


@pytest.fixture
def in_float64(monkeypatch):
    """Parts that models compute in float32 whatever they are given, in float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


FAMILIES = (
    "gpt2",
    "llama",
    "llama, tied",
    "qwen3",
    "qwen3 moe",
    "mixtral",
    "gemma",
    "gemma3",
    "bert",
    "t5",
    "vit",
    "whisper",
)


def check_model(model, inputs, labels, device):
    """Weighs tasks in the same step, and measures, as autograd of the same model on the CPU says."""
    gradients, tasks = architectures.gradients_of(model, inputs, labels), architectures.TASKS
    model = model.to(device)
    inputs, labels = {name: value.to(device) for name, value in inputs.items()}, labels.to(device)
    optimizer = Reweighted(torch.optim.SGD(model.parameters(), 0.0), model, InverseNorm(), tasks=2)
    for _ in range(2):
        model.zero_grad()
        with optimizer.observe(tasks=tasks):
            architectures.loss_of(model, inputs, labels).backward()
        assert_near(optimizer.stats.example_norm, oracle.group_norms(gradients, torch.arange(len(tasks)), len(tasks)))
        assert_near(optimizer.stats.task_norm, oracle.group_norms(gradients, tasks, 2))
        assert_gradient(model, gradients, weights_of(optimizer, tasks))
        optimizer.step()


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(("name", "device"), cases(*FAMILIES, here=("gemma3",)))
def test_models_of_transformers(name, device):
    experts = {"experts_implementation": "eager"} if name in architectures.MIXTURES else {}
    model = architectures.build(name, "eager" if name == "gemma" else "sdpa", checkpointing=name == "qwen3", **experts)
    check_model(model, *architectures.batch(name), device)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(("kind", "device"), cases("LoRA", "DoRA", "IA3", "modules to save", here=("LoRA",)))
def test_adapters_of_peft(kind, device):
    test_adapters = pytest.importorskip("test_adapters")  # peft is optional
    check_model(test_adapters.adapted(kind), *architectures.batch("llama"), device)


@pytest.mark.parametrize(("implementation", "device"), cases("eager", "grouped_mm", "batched_mm", here=("grouped_mm",)))
def test_experts_in_bfloat16(implementation, device):
    wide = architectures.build("qwen3 moe", experts_implementation="eager")
    inputs, labels = architectures.batch("qwen3 moe")
    examples = torch.arange(architectures.EXAMPLES)
    truth = oracle.group_norms(architectures.gradients_of(wide, inputs, labels), examples, len(examples))
    model = architectures.build("qwen3 moe", dtype=torch.bfloat16, experts_implementation=implementation).to(device)
    inputs, labels = {name: value.to(device) for name, value in inputs.items()}, labels.to(device)
    alone = on_cpu(architectures.gradients_of(model, inputs, labels))
    plain = oracle.relative(oracle.group_norms(alone, examples, len(examples)), truth)
    meter = Meter(model)
    for _ in range(2):
        model.zero_grad()
        with meter.observe():
            architectures.loss_of(model, inputs, labels).backward()
        allowed = 2 * max(plain, torch.finfo(torch.bfloat16).eps)
        assert oracle.relative(meter.stats.example_norm.cpu(), truth) <= allowed


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize(("name", "device"), cases("gpt2", "llama, tied", "gemma3", here=("llama, tied",)))
def test_packed_rows(name, device):
    test_padding_free = pytest.importorskip("test_padding_free")
    model, (batch, features) = test_padding_free.built(name, "sdpa"), test_padding_free.collated()
    gradients, tasks = test_padding_free.gradients_of(model, features), test_padding_free.TASKS
    model = model.to(device)
    inputs = [batch[key].to(device) for key in ("input_ids", "position_ids", "labels")]
    optimizer = Reweighted(torch.optim.SGD(model.parameters(), 0.0), model, by_median)
    for offsets in (batch["cu_seq_lens_q"], batch["cu_seq_lens_q"].to(device)):
        model.zero_grad()
        with optimizer.observe(cu_seqlens=offsets):
            test_padding_free.loss_of(model, *inputs).backward()
        assert_near(optimizer.stats.example_norm, oracle.group_norms(gradients, torch.arange(len(tasks)), len(tasks)))
        assert_gradient(model, gradients, weights_of(optimizer, tasks))
        optimizer.step()


@pytest.mark.parametrize(("head", "device"), cases("logits", "fused", here=("logits", "fused")))
def test_a_step_of_grpo(head, device):
    """Two prompts of three samples in two tasks: clipped ratios times advantages; tasks are weighed by their rewards' spread."""
    torch.manual_seed(0)
    case = oracle.make("transformer").to(torch.float64)
    ids = torch.randint(1, 13, (6, 5))
    prompts, tasks = torch.tensor([7, 7, 7, 2, 2, 2]), torch.tensor([0, 0, 0, 1, 1, 1])
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.5, 0.25, 0.0])
    groups = rewards.double().view(2, 3)
    advantages = ((groups - groups.mean(1, keepdim=True)) / groups.std(1, keepdim=True)).flatten()
    mask = torch.arange(5) >= torch.tensor([2, 1, 3, 2, 2, 1])[:, None]  # completions begin at these places

    def log_probs(model, ids):
        targets, h = ids[:, 1:], []
        if head == "logits" or not torch.is_grad_enabled():
            return F.log_softmax(model(ids)[:, :-1], -1).gather(2, targets[..., None])[..., 0]
        whole, model.head = model.head, nn.Identity()
        h = model(ids)[:, :-1]
        model.head = whole
        found = fused_head(h.flatten(0, 1), whole.weight, None, targets.flatten())
        return found.log_prob.view(targets.shape)

    with torch.no_grad():
        old = log_probs(case.model, ids) + 0.3 * torch.randn(6, 4, dtype=torch.float64)

    def losses(model, ids, old, advantages, mask):
        ratio = (log_probs(model, ids) - old).exp()
        surrogate = torch.minimum(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
        return -(surrogate * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)

    batch = (ids, old, advantages, mask)
    rows = zip(*(one.split(1) for one in batch), strict=True)
    gradients = oracle.gradients_of(case.model, [lambda one=one: losses(case.model, *one).sum() for one in rows])
    model, batch = case.model.to(device), [one.to(device) for one in batch]
    optimizer = Reweighted(torch.optim.SGD(model.parameters(), 0.0), model, RewardStd(), tasks=2)
    for _ in range(2):
        model.zero_grad()
        with optimizer.observe(tasks=tasks, prompts=prompts, rewards=rewards):
            losses(model, *batch).sum().backward()
        stats = optimizer.stats
        assert_near(stats.example_norm, oracle.group_norms(gradients, torch.arange(6), 6))
        assert_near(stats.prompt_norm, oracle.group_norms(gradients, 1 - tasks, 2))  # by number: prompt 2, then 7
        assert_near(stats.task_norm, oracle.group_norms(gradients, tasks, 2))
        assert_gradient(model, gradients, weights_of(optimizer, tasks))
        torch.testing.assert_close(stats.reward.std.cpu().double(), groups.std(1).flip(0), check_dtype=False)
        optimizer.step()


@pytest.mark.filterwarnings("ignore")  # Dynamo's, about itself
@pytest.mark.parametrize(("backend", "device"), cases("aot_eager", "inductor", here=("aot_eager",)))
@pytest.mark.parametrize("policy", (None, InverseNorm()), ids=("measured", "reweighted"))
def test_a_compiled_model(policy, backend, device):
    torch._dynamo.reset()
    case = oracle.make("transformer").to(torch.float64)
    examples, tasks = torch.arange(len(case.x)), tasks_of(len(case.x))
    gradients, case = oracle.per_example_gradients(case), case.on(device)
    model = torch.compile(case.model, backend=backend, fullgraph=True)
    observer = Meter(model, tasks=K)
    if policy is not None:
        observer = Reweighted(torch.optim.SGD(case.model.parameters(), 0.0), observer, policy)
    for _ in range(3):  # the first two run as it was written, to verify
        case.model.zero_grad()
        with observer.observe(tasks=tasks):
            case.loss(model(case.x), case.y).backward()
        assert_near(observer.stats.example_norm, oracle.group_norms(gradients, examples, len(examples)))
        assert_near(observer.stats.task_norm, oracle.group_norms(gradients, tasks, K))
        weights = torch.ones(len(examples)) if policy is None else weights_of(observer, tasks)
        assert_gradient(case.model, gradients, weights)
