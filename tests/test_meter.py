"""The Meter against autograd, one example at a time."""

import copy
import pickle

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradnorm_ext import Meter, check

BACKENDS = ("reference", "native")


def ids(case, count):
    return torch.tensor([(3 * i + i // 2) % count for i in range(len(case.x))])


def measure(case, backend="auto", steps=1, **options):
    meter = Meter(case.model, tasks=3, per_layer=True, backend=backend, **options)
    tasks = ids(case, 3)
    for _ in range(steps):
        case.model.zero_grad()
        with meter.observe(tasks=tasks, prompts=tasks * 10 + torch.arange(len(tasks)) % 2):
            case.run().backward()
    return meter.stats, {n: p.grad for n, p in case.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", oracle.MAKERS)
def test_equals_autograd_one_example_at_a_time_in_float64(name, backend):
    case = oracle.make(name).to(torch.float64)
    gradients = oracle.per_example_gradients(case)
    examples, tasks = torch.arange(len(case.x)), ids(case, 3)
    for steps in (1, 2):  # the first block verifies itself, the second is the ordinary one
        stats, total = measure(case, backend, steps)
        rounding = 1e3 * torch.finfo(torch.float64).eps
        assert oracle.relative(stats.example_norm, oracle.group_norms(gradients, examples, len(examples))) < rounding
        assert oracle.relative(stats.task_norm, oracle.group_norms(gradients, tasks, 3)) < rounding
        prompts = torch.unique(tasks * 10 + examples % 2, return_inverse=True)[1]
        of_prompts = oracle.group_norms(gradients, prompts, int(prompts.max()) + 1)
        assert oracle.relative(stats.prompt_norm, of_prompts) < rounding
        for parameter, gradient in total.items():
            expected = sum(one[parameter] for one in gradients)
            scale = max(float(expected.norm()), float(max(g.norm() for g in total.values())))
            assert float((gradient - expected).norm()) < rounding * scale, parameter


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", oracle.MAKERS)
def test_errs_at_most_twice_as_much_as_plain_torch_in_float32(name, backend):
    case = oracle.make(name)
    examples = torch.arange(len(case.x))
    truth = oracle.group_norms(oracle.per_example_gradients(case.to(torch.float64)), examples, len(examples))
    plain = oracle.group_norms(oracle.per_example_gradients(case), examples, len(examples))
    found, _ = measure(case, backend)
    floor = torch.finfo(torch.float32).eps  # plain torch may be right to the last bit by luck
    assert oracle.relative(found.example_norm, truth) <= 2 * max(oracle.relative(plain, truth), floor)


def test_layers_add_up_to_the_model():
    stats, _ = measure(oracle.make("transformer"))
    assert {"tokens", "blocks.0.attention.qkv", "norm"} <= stats.layers.keys()
    total = sum(layer.example_norm.square() for layer in stats.layers.values())
    torch.testing.assert_close(total.sqrt(), stats.example_norm)
    total = sum(layer.task_norm.square() for layer in stats.layers.values())
    torch.testing.assert_close(total.sqrt(), stats.task_norm)


def test_unbiased_figures_are_those_of_their_definition():
    case = oracle.make("mlp").to(torch.float64)
    stats, _ = measure(case)
    tasks, examples = ids(case, 3), stats.example_norm.square()
    prompts = torch.unique(tasks * 10 + torch.arange(6) % 2, return_inverse=True)[1]
    for k in range(3):
        units = sorted(set(prompts[tasks == k].tolist()))
        n, raw = len(units), stats.task_norm[k].square()
        square = stats.prompt_norm[units].square().sum()
        expected = (raw - square) / (n * (n - 1)) if n > 1 else torch.tensor(torch.nan, dtype=torch.float64)
        torch.testing.assert_close(stats.task_sqnorm_unbiased[k], expected, equal_nan=True)
        variance = (square - raw / n) / (n - 1) if n > 1 else torch.tensor(torch.nan, dtype=torch.float64)
        noise = variance / expected if expected > 0 else torch.tensor(torch.nan, dtype=torch.float64)
        torch.testing.assert_close(stats.noise_scale[k], noise, equal_nan=True)
    assert examples.sum() > 0


def test_one_task_and_no_ids_need_nothing_said():
    case = oracle.make("transformer").to(torch.float64)
    gradients = oracle.per_example_gradients(case)
    meter = Meter(case.model)
    with meter.observe():
        case.run().backward()
    whole = oracle.group_norms(gradients, torch.zeros(4, dtype=torch.long), 1)
    torch.testing.assert_close(meter.stats.task_norm, whole)
    assert meter.stats.prompt_norm is None and meter.stats.tasks.tolist() == [0] * 4


def test_a_batch_of_one_example_is_measured():
    case = oracle.make("transformer, tied head").to(torch.float64)
    case.x, case.y = case.x[:1], case.y[:1]
    meter = Meter(case.model)
    with meter.observe():
        case.run().backward()
    expected = oracle.group_norms(oracle.per_example_gradients(case), torch.zeros(1), 1)
    torch.testing.assert_close(meter.stats.example_norm, expected)


def test_measures_only_what_is_trainable():
    case = oracle.make("transformer").to(torch.float64)
    for name, parameter in case.model.named_parameters():
        parameter.requires_grad_("qkv.bias" in name or "norm1" in name)
    gradients = oracle.per_example_gradients(case)
    stats, total = measure(case)
    expected = oracle.group_norms(gradients, torch.arange(4), 4)
    torch.testing.assert_close(stats.example_norm, expected)
    assert total.keys() == gradients[0].keys()


@pytest.mark.parametrize("name", ["transformer", "transformer, tied head"])
def test_activation_checkpointing_changes_nothing(name):
    class Checkpointed(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=False)

    case = oracle.make(name).to(torch.float64)
    expected, gradient = measure(case, steps=2)
    case.model.blocks = nn.ModuleList(Checkpointed(block) for block in case.model.blocks)
    found, recomputed = measure(case, steps=2)
    torch.testing.assert_close(found.example_norm, expected.example_norm, rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(gradient.values(), recomputed.values(), strict=True))


def test_same_batch_gives_the_same_bits():
    first, _ = measure(oracle.make("transformer, tied head"))
    second, _ = measure(oracle.make("transformer, tied head"))
    assert torch.equal(first.example_norm, second.example_norm) and torch.equal(first.task_norm, second.task_norm)


def test_several_forwards_before_one_backward_are_combined():
    case = oracle.make("transformer").to(torch.float64)
    other = case.x.flip(1)

    def both(model, x, flipped, y):
        return oracle.token_loss(model(x), y) - 0.5 * oracle.token_loss(model(flipped), y)

    expected = []
    for i in range(4):
        case.model.zero_grad()
        both(case.model, case.x[i : i + 1], other[i : i + 1], case.y[i : i + 1]).backward()
        expected.append(sum(p.grad.square().sum() for p in case.model.parameters() if p.grad is not None).sqrt())
    meter = Meter(case.model)
    for _ in range(2):
        with meter.observe():
            both(case.model, case.x, other, case.y).backward()
        torch.testing.assert_close(meter.stats.example_norm, torch.stack(expected))


def test_evaluation_is_untouched_and_unmeasured():
    case = oracle.make("transformer")
    plain = case.model(case.x)
    meter = Meter(case.model)
    with meter.observe():
        with torch.no_grad():
            assert torch.equal(case.model(case.x), plain)
            assert type(case.model.tokens.weight) is nn.Parameter
        case.run().backward()
    before = meter.stats
    with torch.no_grad():
        case.model(case.x)
    assert meter.stats is before


def test_gradients_of_inputs_are_not_measured():
    case = oracle.make("mlp").to(torch.float64)
    expected, _ = measure(case)
    meter = Meter(case.model, tasks=3)
    for _ in range(2):
        with meter.observe(tasks=ids(case, 3)):
            x = case.x.clone().requires_grad_()
            torch.autograd.grad(case.model(x).sum(), x)
            case.run().backward()
        torch.testing.assert_close(meter.stats.example_norm, expected.example_norm)


def test_outside_of_blocks_the_model_is_what_it_was():
    case = oracle.make("transformer")
    model = case.model
    classes = [type(m) for m in model.modules()]
    contents = [dict(m.__dict__) for m in model.modules()]
    keys = list(model.state_dict())
    measure(case)
    assert [type(m) for m in model.modules()] == classes
    assert all(m.__dict__ == before for m, before in zip(model.modules(), contents, strict=True))
    assert list(model.state_dict()) == keys
    pickle.loads(pickle.dumps(model))


def test_inside_a_block_the_model_is_still_itself():
    case = oracle.make("transformer")
    with Meter(case.model).observe():
        assert isinstance(case.model.norm, nn.LayerNorm) and type(case.model.norm).__name__ == "LayerNorm"
        assert repr(case.model) == repr(oracle.make("transformer").model)
        for copied in (copy.deepcopy(case.model), pickle.loads(pickle.dumps(case.model))):
            assert [type(m) for m in copied.modules()] == [type(m) for m in oracle.make("transformer").model.modules()]
        assert set(case.model.state_dict()) == set(copied.state_dict())
        assert case.model.norm.weight.shape == (8,) and case.model.norm.weight.grad is None
        case.run().backward()
    assert type(case.model.norm) is nn.LayerNorm


def test_meter_is_copied_and_pickled_with_its_model():
    case = oracle.make("mlp")
    meter = Meter(case.model, tasks=["a", "b", "c"])
    with meter.observe(tasks=ids(case, 3)):
        case.run().backward()
    for copied in (copy.deepcopy(meter), pickle.loads(pickle.dumps(meter))):
        torch.testing.assert_close(copied.stats.example_norm, meter.stats.example_norm)
        with copied.observe(tasks=ids(case, 3)):
            case.loss(copied.model(case.x), case.y).backward()
        assert torch.equal(copied.stats.example_norm, meter.stats.example_norm)
        assert copied.model is not case.model


def test_loss_scale_is_divided_out():
    case = oracle.make("mlp")
    expected, _ = measure(case)
    meter = Meter(case.model, tasks=3)
    with meter.observe(tasks=ids(case, 3), loss_scale=1024.0):
        (case.run() * 1024).backward()
    torch.testing.assert_close(meter.stats.example_norm, expected.example_norm)


def test_autocast_computes_in_its_dtype_and_sums_in_float32():
    case = oracle.make("transformer")
    expected, _ = measure(case)
    meter = Meter(case.model)
    with meter.observe(), torch.autocast("cpu", torch.bfloat16):
        case.run().backward()
    assert meter.stats.example_norm.dtype == torch.float32
    assert oracle.relative(meter.stats.example_norm, expected.example_norm) < 10 * torch.finfo(torch.bfloat16).eps


def test_bfloat16_models_are_measured():
    case = oracle.make("transformer")
    expected, _ = measure(case)
    found, _ = measure(case.to(torch.bfloat16))
    assert oracle.relative(found.example_norm, expected.example_norm) < 10 * torch.finfo(torch.bfloat16).eps


def test_log_dict_is_plain_floats():
    stats, _ = measure(oracle.make("mlp"))
    logged = stats.log_dict("train/")
    assert all(isinstance(value, float) for value in logged.values())
    assert logged["train/task/1/norm"] == float(stats.task_norm[1])


def test_checker_agrees_on_a_right_model_and_leaves_it_alone(capsys):
    case = oracle.make("transformer, tied head")
    before = {name: p.clone() for name, p in case.model.named_parameters()}
    found = check(case.model, lambda output: oracle.token_loss(output, case.y), case.x)
    assert not found.differing and "all" in capsys.readouterr().out
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in case.model.named_parameters())


def test_checker_names_what_differs(monkeypatch):
    from gradnorm_ext.gradients import several

    monkeypatch.setattr(several, "tied_sqnorm", lambda head, lookup: head.norms)
    case = oracle.make("transformer, tied head")
    found = check(case.model, lambda output: oracle.token_loss(output, case.y), case.x)
    assert found.differing == ["tokens.weight"] and "tokens.weight" in str(found)


def test_the_row_test_refuses_rows_of_another_example():
    class Rolled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(torch.tanh(self.inner(x.roll(1, 0))).roll(-1, 0))

    model = Rolled()
    with (
        pytest.raises(RuntimeError, match=r"inner.weight .* was used with rows that do not belong to one example each"),
        Meter(model).observe(),
    ):
        model(torch.randn(4, 3)).square().sum().backward()


def test_audit_refuses_a_use_that_was_not_seen():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.alias = [self.first.weight]

        def forward(self, x):
            return F.linear(self.first(x), self.alias[0])

    model = Hidden()
    with (
        pytest.raises(RuntimeError, match=r"first.weight got a gradient that its seen uses account for only in part"),
        Meter(model).observe(),
    ):
        model(torch.randn(4, 3)).square().sum().backward()


def test_audit_refuses_a_custom_function_without_a_rule():
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            return g * w, (g * x).sum(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.w = nn.Linear(3, 3), nn.Parameter(torch.ones(3))

        def forward(self, x):
            return Scale.apply(self.first(x), self.w)

    model = Model()
    with pytest.raises(RuntimeError, match=r"w got a gradient from a use that was not seen"), Meter(model).observe():
        model(torch.randn(4, 3)).square().sum().backward()


def test_a_position_table_is_not_taken_for_a_batch_once_its_kind_is_known():
    case = oracle.make("transformer").to(torch.float64)
    meter = Meter(case.model)
    with meter.observe():
        case.run().backward()
    case.x, case.y = case.x[:, :4], case.y[:, :4]  # now as many positions as examples
    with meter.observe():
        case.run().backward()
    expected = oracle.group_norms(oracle.per_example_gradients(case), torch.arange(4), 4)
    torch.testing.assert_close(meter.stats.example_norm, expected)


def test_a_position_table_taken_for_a_batch_is_refused_and_then_known_for_what_it_is():
    case = oracle.make("transformer").to(torch.float64)
    case.x, case.y = case.x[:, :4], case.y[:, :4]  # as many positions as examples, from the first block on
    meter = Meter(case.model)
    message = (
        r"positions.weight .* \(from now on it is taken for a table that all examples share: run the batch again\)"
    )
    with pytest.raises(RuntimeError, match=message), meter.observe():
        case.run().backward()
    with meter.observe():
        case.run().backward()
    expected = oracle.group_norms(oracle.per_example_gradients(case), torch.arange(4), 4)
    torch.testing.assert_close(meter.stats.example_norm, expected)
