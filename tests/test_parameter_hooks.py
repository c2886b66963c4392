"""Hooks on parameters and modules: norms are of gradients as they reach ``.grad``, or the hook is refused by name."""

import pytest
import right_or_refused
import torch
import torch.nn.functional as F
from torch import nn

from gradnorm_ext import Meter

B, T, D = 4, 3, 5


class Model(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.table, self.inner, self.gain = nn.Embedding(9, D), nn.Linear(D, D), nn.Parameter(torch.rand(D) + 0.5)
        self.conv, self.tied = nn.Conv1d(D, D, 2), tied
        self.head = nn.Linear(D, 9)

    def forward(self, ids):
        h = self.inner(self.table(ids) * self.gain).sin()
        h = self.conv(h.transpose(1, 2)).transpose(1, 2).cos() * self.gain
        return F.linear(h, self.table.weight) if self.tied else self.head(h)


def scale_in_place(g):
    g.mul_(0.5)


def mask(g):
    return g * (torch.arange(g.numel()).view(g.shape) % 3 > 0)


def count(g):
    count.calls += 1


count.calls = 0
LINEAR = {
    "a mask": mask,
    "a scale": lambda g: 3 * g,
    "nothing": lambda g: torch.zeros_like(g),
    "in place": scale_in_place,
    "one that looks on": count,
    "a projection": lambda g: g - g.mean(0, keepdim=True),
    "a flip": lambda g: g.flip(0),
    "a clamp out of reach": lambda g: g.clamp(-1e6, 1e6),
}
OTHERS = {
    "a clamp": lambda g: g.clamp(-1e-2, 1e-2),
    "a sign": lambda g: g.sign(),
    "a norm": lambda g: g / g.norm(),
    "a clip": lambda g: g * (0.01 / g.norm()).clamp(max=1),
    "weight decay": lambda g: g + 0.1,
    "a root": lambda g: g.abs().sqrt(),
    "noise": lambda g: g + torch.randn_like(g),
}
OF = ["table.weight", "inner.weight", "inner.bias", "gain", "conv.weight", "conv.bias", "head.weight"]


def outcome(name, hook, mode, tied=False, **options):
    model, ids = Model(tied).double(), torch.randint(0, 9, (B, T))
    parameters = dict(model.named_parameters())
    for one in name if isinstance(name, tuple) else (name,):
        parameters[one].register_hook(hook)
    model.head.requires_grad_(not tied)
    return right_or_refused.refusal_of(model, lambda: model(ids).square().flatten(1).sum(1), mode, **options)


@pytest.mark.parametrize("hook", LINEAR.values(), ids=LINEAR)
@pytest.mark.parametrize("name", OF)
def test_linear_hooks_are_applied_to_each_examples_gradient(name, hook):
    assert outcome(name, hook, "Meter") is None


@pytest.mark.parametrize("mode", right_or_refused.REWEIGHTED)
@pytest.mark.parametrize("name", OF)
def test_also_where_the_step_is_reweighted(name, mode):
    assert outcome(name, mask, mode) is None


@pytest.mark.parametrize("mode", ["Meter", "same_step"])
@pytest.mark.parametrize("hook", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("name", ["table.weight", "inner.weight", "gain"])
def test_others_are_refused_by_name(name, hook, mode):
    message = outcome(name, hook, mode)
    assert message is not None and f"on {name}" in message and "must be linear" in message, message


@pytest.mark.parametrize("mode", ["Meter", "next_step", "same_step"])
@pytest.mark.parametrize("hook", LINEAR.values(), ids=LINEAR)
def test_of_a_parameter_that_is_used_twice(hook, mode):
    assert outcome("table.weight", hook, mode, tied=True) is None
    assert outcome(("table.weight", "inner.weight", "gain"), hook, mode, tied=True) is None


def test_several_hooks_run_in_their_order():
    model, ids = Model().double(), torch.randint(0, 9, (B, T))
    model.inner.weight.register_hook(mask)
    model.inner.weight.register_hook(lambda g: g.flip(1))
    model.inner.weight.register_hook(mask)
    assert right_or_refused.refusal_of(model, lambda: model(ids).square().flatten(1).sum(1)) is None


@pytest.mark.parametrize("hook", ["mask", "clamp"])
def test_the_tasks_gram_matrix_is_of_hooked_gradients(hook):
    model, ids = Model().double(), torch.randint(0, 9, (B, T))
    model.inner.weight.register_hook(mask)
    meter, tasks = Meter(model, tasks=2, gram=True), torch.tensor([0, 1, 0, 1])

    def losses():
        return model(ids).square().flatten(1).sum(1)

    truth = right_or_refused.contributions(model, losses)
    of_tasks = [torch.cat([(a + b).flatten() for a, b in zip(truth[k], truth[k + 2], strict=True)]) for k in (0, 1)]
    with meter.observe(tasks=tasks):
        losses().sum().backward()
    expected = torch.stack([torch.stack([one @ other for other in of_tasks]) for one in of_tasks])
    torch.testing.assert_close(meter.stats.task_gram, expected)


@pytest.mark.parametrize("when", ["before the backward", "after the backward", "by way of parameters()"])
def test_hooks_that_come_in_a_block_are_refused(when):
    model, ids = Model(), torch.randint(0, 9, (B, T))
    message = "must be the same from a block's beginning to its end, got others on inner.weight"
    with pytest.raises(RuntimeError, match=message), Meter(model).observe():
        loss = model(ids).sum()
        if when == "after the backward":
            loss.backward()
        weight = dict(model.named_parameters())["inner.weight"] if "parameters" in when else model.inner.weight
        weight.register_hook(mask)
        if when != "after the backward":
            loss.backward()


def test_hooks_that_go_in_a_block_are_refused():
    model, ids = Model(), torch.randint(0, 9, (B, T))
    handle = model.inner.weight.register_hook(mask)
    with pytest.raises(RuntimeError, match=r"got others on inner.weight"), Meter(model).observe():
        model(ids).sum().backward()
        handle.remove()
    with Meter(model).observe():
        model(ids).sum().backward()


def test_tasks_gradients_over_several_blocks_are_hooked():
    model, ids = Model(), torch.randint(0, 9, (B, T))
    model.inner.weight.register_hook(mask)
    meter = Meter(model, tasks=2, exact_tasks=True)
    for rows in (slice(0, 2), slice(2, 4)):
        with meter.observe(tasks=[0, 1]):
            model(ids[rows]).square().sum().backward()
    expected = []
    for task in range(2):
        model.zero_grad()
        model(ids[task::2]).square().sum().backward()
        expected.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm())
    torch.testing.assert_close(meter.stats.task_norm, torch.stack(expected))


MODULE_HOOKS = {
    "full": lambda m: m.register_full_backward_hook(
        lambda m, gi, go: tuple(None if g is None else g * 0.5 for g in gi)
    ),
    "full, looking on": lambda m: m.register_full_backward_hook(lambda m, gi, go: None),
    "before": lambda m: m.register_full_backward_pre_hook(lambda m, go: tuple(g * 2 for g in go)),
    "of the forward": lambda m: m.register_forward_hook(lambda m, args, out: out * 2),
    "before the forward": lambda m: m.register_forward_pre_hook(lambda m, args: tuple(a * 2 for a in args)),
    "of the output": lambda m: m.register_forward_hook(
        lambda m, args, out: out.register_hook(lambda g: g * 2) and None
    ),
    "after accumulation": lambda m: m.weight.register_post_accumulate_grad_hook(lambda p: None),
}


@pytest.mark.parametrize("mode", ["Meter", "next_step", "same_step", "passes"])
@pytest.mark.parametrize("hook", MODULE_HOOKS.values(), ids=MODULE_HOOKS)
@pytest.mark.parametrize("name", ["inner", "conv", "head"])
def test_hooks_of_modules_are_right_or_refused(name, hook, mode):
    model, ids = Model().double(), torch.randint(0, 9, (B, T))
    hook(model.get_submodule(name))
    refused = right_or_refused.refusal_of(model, lambda: model(ids).square().flatten(1).sum(1), mode)
    assert refused is None or (mode == "same_step" and "post_accumulate_grad_hook" in refused), refused


@pytest.mark.filterwarnings("ignore:.*[Nn]on-full backward hook.*")
def test_hooks_of_functions_nodes_are_refused_before_anything_runs():
    model = Model()
    model.inner.register_backward_hook(lambda m, gi, go: None)
    with (
        pytest.raises(RuntimeError, match="must be full ones, got register_backward_hook on inner"),
        Meter(model).observe(),
    ):
        raise AssertionError("this must not run")
