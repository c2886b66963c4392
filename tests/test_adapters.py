"""PEFT's adapters: what is frozen costs nothing, what is trained is measured exactly."""

import architectures
import oracle
import peft
import pytest
import torch
from architectures import EXAMPLES, TASKS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradnorm_ext import InverseNorm, Meter, Reweighted, check

pytestmark = pytest.mark.usefixtures("in_float64")
EXACT = 1e3 * torch.finfo(torch.float64).eps
LAYERS = ["q_proj", "v_proj", "down_proj"]


def lora(**options):
    return peft.LoraConfig(r=2, lora_alpha=4, target_modules=LAYERS, lora_dropout=0.0, **options)


class Quantised(nn.Module):
    """A linear layer whose frozen weight is kept in 8 bits or 4, two to a byte, and a scale a row, unpacked in every forward."""

    def __init__(self, layer, bits):
        super().__init__()
        self.in_features, self.out_features, self.bits = layer.in_features, layer.out_features, bits
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        weight = (layer.weight.detach() / scale).round().to(torch.int8)
        self.register_buffer("weight", weight if bits == 8 else weight[:, ::2] * 16 + (weight[:, 1::2] & 15))
        self.register_buffer("scale", scale)

    def forward(self, x):
        weight = self.weight
        if self.bits == 4:
            weight = torch.stack([weight >> 4, (weight << 4) >> 4], -1).flatten(1)
        return nn.functional.linear(x, weight.to(x.dtype) * self.scale.to(x.dtype))


class Adapter(nn.Module):
    """LoRA beside any layer."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + 2 * self.lora_B(self.lora_A(x))


def quantised(dtype, bits):
    model = architectures.build("llama", checkpointing=True, dtype=dtype).requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in LAYERS:
                setattr(parent, name, Adapter(Quantised(child, bits)).to(dtype))
    model.enable_input_require_grads()
    return model


def several(model):
    model = peft.get_peft_model(model, lora())
    model.add_adapter("other", lora())
    model.base_model.set_adapter(["default", "other"])
    return model


def tied(model):
    model = peft.get_peft_model(model, lora())
    first, *others = (layer.self_attn for layer in model.base_model.model.model.layers)
    for other in others:
        other.q_proj.lora_A, other.q_proj.lora_B = first.q_proj.lora_A, first.q_proj.lora_B
        other.v_proj.lora_A = first.q_proj.lora_A
    return model


KINDS = {
    "LoRA": lambda model: peft.get_peft_model(model, lora()),
    "rsLoRA on embeddings and head": lambda model: peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens", "lm_head"], use_rslora=True)
    ),
    "DoRA": lambda model: peft.get_peft_model(model, lora(use_dora=True)),
    "several adapters": several,
    "the same adapters in every layer": tied,
    "modules to save": lambda model: peft.get_peft_model(model, lora(modules_to_save=["lm_head", "norm"])),
    "IA3": lambda model: peft.get_peft_model(
        model, peft.IA3Config(target_modules=LAYERS, feedforward_modules=["down_proj"])
    ),
    "VeRA": lambda model: peft.get_peft_model(model, peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"])),
    "prompt tuning": lambda model: peft.get_peft_model(
        model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ),
}


def adapted(kind, checkpointing=False, name="llama", dtype=torch.float64):
    model = KINDS[kind](architectures.build(name, "sdpa", dtype=dtype)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def agrees_with_autograd(model, inputs, labels):
    gradients = architectures.gradients_of(model, inputs, labels)
    optimizer = Reweighted(torch.optim.SGD(model.parameters(), 0.0), model, InverseNorm(), tasks=2)
    for _ in range(2):
        model.zero_grad()
        with optimizer.observe(tasks=TASKS):
            architectures.loss_of(model, inputs, labels).backward()
        stats = optimizer.stats
        norms = oracle.group_norms(gradients, torch.arange(EXAMPLES), EXAMPLES)
        assert oracle.relative(stats.example_norm, norms) < EXACT
        assert oracle.relative(stats.task_norm, oracle.group_norms(gradients, TASKS, 2)) < EXACT
        architectures.same_gradients(model, gradients, optimizer.weights[TASKS])
        optimizer.step()


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_equals_autograd_one_example_at_a_time(kind, checkpointing):
    model, (inputs, labels) = adapted(kind, checkpointing), architectures.batch("llama")
    if kind == "prompt tuning":
        labels = torch.cat([labels.new_full((EXAMPLES, 3), -100), labels], 1)
    agrees_with_autograd(model, inputs, labels)


def test_weights_that_are_tied_and_trained_beside_adapters():
    model = architectures.build("llama, tied")
    config = lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    agrees_with_autograd(peft.get_peft_model(model, config).double(), *architectures.batch("llama"))


def test_four_bits_are_unpacked_as_they_were_packed():
    layer = nn.Linear(6, 3, bias=False)
    step = layer.weight.detach().abs().amax(1) / 7
    off = (Quantised(layer, 4)(torch.eye(6)).T - layer.weight).detach().abs().amax(1)
    assert bool((off <= step / 2 + 1e-6).all())


@pytest.mark.parametrize("bits", (8, 4))
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_frozen_layers_may_be_quantised(dtype, bits):
    model, (inputs, labels) = quantised(torch.float64, bits), architectures.batch("llama")
    if dtype == torch.float64:
        return agrees_with_autograd(model, inputs, labels)
    gradients = architectures.gradients_of(model, inputs, labels)
    truth = oracle.group_norms(gradients, torch.arange(EXAMPLES), EXAMPLES)
    for module in model.modules():  # a bfloat16 base under adapters in float32
        if not isinstance(module, (Adapter, nn.ModuleList)) and "lora" not in type(module).__name__.lower():
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
    with torch.autocast("cpu", dtype):
        plain = architectures.gradients_of(model, inputs, labels)
        meter = Meter(model)
        with meter.observe():
            architectures.loss_of(model, inputs, labels).backward()
    off = [{key: one[key].double() - other[key] for key in other} for one, other in zip(plain, gradients, strict=True)]
    distance = oracle.group_norms(off, torch.arange(EXAMPLES), EXAMPLES)
    assert oracle.relative(meter.stats.example_norm, truth) <= 2 * float(distance.max() / truth.max())


class Sizes(TorchDispatchMode):
    """How many operations ran, and the largest tensor that any of them made."""

    def __init__(self):
        super().__init__()
        self.calls, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.calls += 1
        for one in found if isinstance(found, (list, tuple)) else (found,):
            if isinstance(one, torch.Tensor):
                self.largest = max(self.largest, one.numel())
        return found


def test_the_frozen_base_costs_nothing_and_no_gradient_is_formed_per_example():
    """Wide adapters on short sequences: an example's gradient of one of them would be the largest tensor of all."""
    model = architectures.build("llama", "eager", dtype=torch.float32)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=512, target_modules=["down_proj"], init_lora_weights=False)
    ).train()
    inputs, labels = architectures.batch("llama")
    meter, sizes = Meter(model), {}
    with meter.observe():
        architectures.loss_of(model, inputs, labels).backward()  # verifies itself
    for measured in (False, True):
        model.zero_grad()
        with meter.observe() if measured else torch.enable_grad():
            loss = architectures.loss_of(model, inputs, labels)
            with Sizes() as sizes[measured]:
                loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert max(p.numel() for p in trained) * EXAMPLES > 2 * sizes[True].largest
    assert sizes[True].largest == sizes[False].largest
    assert len(meter.parameter_sqnorm) == len(trained) == 4
    assert sizes[True].calls - sizes[False].calls <= 12 * len(trained) + 12  # and none for the 20 frozen ones


@pytest.mark.parametrize("kind", ("LoRA", "DoRA"))
def test_the_checker(kind):
    model, (inputs, _) = adapted(kind, dtype=torch.float32), architectures.batch("llama")
    found = check(model, lambda outputs: outputs.logits.square().sum(), kwargs={**inputs, "use_cache": False})
    assert found.differing == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.LoHaConfig, r"q_proj.hada_w1_a.* got a gradient from a use that was not seen"),  # a Function of its own
        (peft.LoKrConfig, r"no rule for .* of .*q_proj.lokr_w1.* on_unsupported=\"vmap\""),
    ],
)
def test_adapters_that_multiply_their_matrices_first_are_refused_by_name(config, message):
    model = peft.get_peft_model(architectures.build("llama"), config(r=2, target_modules=["q_proj"])).double().train()
    inputs, labels = architectures.batch("llama")
    with pytest.raises(RuntimeError, match=message), Meter(model).observe():
        architectures.loss_of(model, inputs, labels).backward()
