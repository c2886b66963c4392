"""Reweighted against the naive loop, and as an optimizer among others."""

import copy
import io
import pickle
from contextlib import nullcontext
from types import SimpleNamespace

import oracle
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradnorm_ext import (
    MTGRPO,
    Chain,
    ClipExamples,
    Equal,
    GradNorm,
    InverseNorm,
    Meter,
    PairBalance,
    PiKE,
    RewardStd,
    Reweighted,
)
from gradnorm_ext.gradients import Outer, PerSampleGrads

K = 3


def ids(case):
    return torch.tensor([(2 * i + 1) % K for i in range(len(case.x))])


def by_example(stats):
    return 1 + torch.arange(len(stats.tasks), dtype=stats.example_norm.dtype)


by_example.weighs = "examples"


def by_task(stats):
    return 0.5 + torch.arange(K, dtype=stats.example_norm.dtype)


def wrap(case, policy, lr=0.05, optimizer=torch.optim.AdamW, **options):
    options.setdefault("tasks", K)
    return Reweighted(optimizer(case.model.parameters(), lr=lr), case.model, policy, **options)


def block(optimizer, case, **given):
    with optimizer.observe(tasks=ids(case), **given):
        loss = case.run()
        loss.backward()
    return loss


def gradients(case):
    return {name: p.grad.clone() for name, p in case.model.named_parameters() if p.grad is not None}


def weighted(case, weights):
    """The naive loop: a backward for each example, and the weighted sum."""
    found = oracle.per_example_gradients(case)
    return {name: sum(w * g[name] for w, g in zip(weights.tolist(), found, strict=True)) for name in found[0]}


def assert_close(found, expected):
    scale = max(float(g.norm()) for g in expected.values())
    for name, gradient in found.items():
        assert float((gradient - expected[name]).norm()) <= 1e3 * torch.finfo(gradient.dtype).eps * scale, name


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize(
    "policy", [by_example, by_task, ClipExamples(0.3), InverseNorm()], ids=["by_example", "by_task", "clip", "inverse"]
)
@pytest.mark.parametrize("name", [name for name in oracle.MAKERS if name != "llama"])
def test_same_step_is_the_weighted_sum_of_separate_backwards(name, policy, backend):
    case = oracle.make(name).to(torch.float64)
    optimizer = wrap(case, policy, backend=backend)
    for _ in range(2):  # the first block verifies itself, the second is the ordinary one
        optimizer.zero_grad()
        block(optimizer, case)
        examples = getattr(policy, "weighs", "tasks") == "examples"
        weights = optimizer.weights if examples else optimizer.weights[ids(case)]
        assert_close(gradients(case), weighted(case, weights))


@pytest.mark.parametrize("policy", [by_example, by_task, InverseNorm()], ids=["by_example", "by_task", "inverse"])
@pytest.mark.parametrize("name", [name for name in oracle.MAKERS if name != "llama"])
def test_two_passes_give_what_one_gives(name, policy):
    case = oracle.make(name).to(torch.float64)
    optimizer = wrap(case, policy, passes=2)
    examples = getattr(policy, "weighs", "tasks") == "examples"
    for _ in range(2):
        optimizer.zero_grad()
        with optimizer.observe(tasks=ids(case)):
            optimizer.backward(case.run())
        truth = oracle.group_norms(oracle.per_example_gradients(case), ids(case), K)
        torch.testing.assert_close(optimizer.stats.task_norm, truth)
        weights = optimizer.weights if examples else optimizer.weights[ids(case)]
        expected = policy(optimizer.stats)
        expected = expected if examples else torch.where(optimizer.stats.task_count > 0, expected, 1)
        torch.testing.assert_close(optimizer.weights, expected)
        assert_close(gradients(case), weighted(case, weights))


def test_two_passes_keep_what_checkpointing_saves_and_form_no_weight_gradient_twice(monkeypatch):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner, self.head = nn.Linear(7, 9), nn.Linear(9, 9), nn.Linear(9, 3)

        def forward(self, x):
            h = torch.tanh(self.first(x))
            return self.head(checkpoint(lambda h: torch.tanh(self.inner(h)), h, use_reentrant=False))

    case = oracle.make("mlp")
    case = oracle.Case(Checkpointed(), case.x, case.y, case.loss).to(torch.float64)
    optimizer = wrap(case, by_task, passes=2)
    formed = []
    for form in (Outer, PerSampleGrads):
        for name in ("wgrad", "grad", "sqnorm"):
            method = getattr(form, name)

            def counted(self, *args, name=name, method=method):
                formed.append(name)
                return method(self, *args)

            monkeypatch.setattr(form, name, counted)
    for _ in range(2):
        formed.clear()
        optimizer.zero_grad()
        with optimizer.observe(tasks=ids(case)):
            optimizer.backward(case.run())
        assert formed == ["sqnorm"] * 6 + ["grad"] * 6
    assert_close(gradients(case), weighted(case, by_task(optimizer.stats)[ids(case)]))


def test_two_passes_need_the_optimizers_backward():
    case = oracle.make("mlp")
    optimizer = wrap(case, by_task, passes=2)
    with pytest.raises(RuntimeError, match=r"call optimizer.backward\(loss\) in place of loss.backward\(\)"):
        block(optimizer, case)
    with pytest.raises(RuntimeError, match="backward must be called inside an observe block"):
        optimizer.backward(case.run())
    for _ in range(2):
        optimizer.zero_grad()
        with optimizer.observe(tasks=ids(case)):
            optimizer.backward(case.run())
        optimizer.step()


@pytest.mark.parametrize("policy", [ClipExamples(0.3), InverseNorm()], ids=["clip", "inverse"])
@pytest.mark.parametrize("name", [name for name in oracle.MAKERS if name != "llama"])
def test_by_layer_every_parameter_is_weighed_by_its_own_norms(name, policy):
    case = oracle.make(name).to(torch.float64)
    optimizer = wrap(case, policy, scope="layer")
    examples = torch.arange(len(case.x))
    for _ in range(2):
        optimizer.zero_grad()
        block(optimizer, case)
        alone = oracle.per_example_gradients(case)
        expected = {}
        for parameter in alone[0]:
            one = [{parameter: gradient[parameter]} for gradient in alone]
            if policy.weighs == "examples":
                norms = oracle.group_norms(one, examples, len(examples))
                weights = policy(SimpleNamespace(example_norm=norms))
            else:
                norms = oracle.group_norms(one, ids(case), K)
                weights = policy(SimpleNamespace(task_norm=norms, task_count=torch.ones(K)))[ids(case)]
            expected[parameter] = sum(w * g[parameter] for w, g in zip(weights, one, strict=True))
        assert_close(gradients(case), expected)
        truth = oracle.group_norms(alone, ids(case), K)
        torch.testing.assert_close(optimizer.stats.task_norm, truth)


@pytest.mark.parametrize(
    "options",
    [{"passes": 2, "scope": "layer"}, {"passes": 2, "apply": "next_step"}, {"scope": "layer", "apply": "next_step"}],
)
def test_timings_that_exclude_each_other_are_refused(options):
    with pytest.raises(ValueError, match=r'passes=2 and scope="layer" are two ways of apply="same_step"'):
        wrap(oracle.make("mlp"), InverseNorm(), **options)


def test_by_layer_policies_with_a_memory_are_refused():
    with pytest.raises(ValueError, match='scope="layer" asks the policy once for every parameter, got GradNorm'):
        wrap(oracle.make("mlp"), GradNorm(), scope="layer")


def test_two_passes_are_of_one_loss():
    optimizer = wrap(oracle.make("mlp"), by_task, passes=2)
    message = "weights are known after one backward for the norms, got backwards=2"
    with pytest.raises(ValueError, match=message), optimizer.observe(tasks=[0] * 6, backwards=2):
        pass


@pytest.mark.parametrize("options", [{"passes": 3}, {"scope": "all"}])
def test_other_timings_are_refused(options):
    with pytest.raises(ValueError, match='passes must be 1 or 2, and scope "model" or "layer"'):
        wrap(oracle.make("mlp"), InverseNorm(), **options)


def test_a_derived_parameter_of_two_has_no_weight_of_each():
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(7, 3))
    optimizer = Reweighted(
        torch.optim.SGD(layer.parameters()), layer, InverseNorm(), scope="layer", on_unsupported="vmap"
    )
    with (
        pytest.raises(RuntimeError, match='with scope="layer" each parameter has a weight of its own'),
        optimizer.observe(),
    ):
        layer(torch.randn(4, 7)).square().sum().backward()


@pytest.mark.parametrize("name", ["mlp", "transformer, tied head", "free parameters"])
def test_a_small_budget_changes_only_what_is_kept(name):
    case = oracle.make(name).to(torch.float64)
    optimizer = wrap(case, by_task, gradient_budget=1000)
    for _ in range(2):
        optimizer.zero_grad()
        block(optimizer, case)
        assert_close(gradients(case), weighted(case, by_task(optimizer.stats)[ids(case)]))


@pytest.mark.parametrize("name", ["mlp", "transformer", "transformer, tied head", "free parameters", "gpt2"])
def test_next_step_weighs_with_running_means_and_measures_without(name):
    case = oracle.make(name).to(torch.float64)
    optimizer = wrap(case, InverseNorm(), lr=0.0, apply="next_step")
    expected = torch.ones(K, dtype=torch.float64)
    for _ in range(3):
        optimizer.zero_grad()
        block(optimizer, case)
        torch.testing.assert_close(optimizer.weights.double(), expected)
        assert_close(gradients(case), weighted(case, optimizer.weights[ids(case)]))
        expected = InverseNorm()(optimizer.stats)  # the same batch again: its norms are the running means
        truth = oracle.group_norms(oracle.per_example_gradients(case), ids(case), K)
        torch.testing.assert_close(optimizer.stats.task_norm, truth)
        optimizer.step()


@pytest.mark.parametrize("apply", ["same_step", "next_step"])
@pytest.mark.parametrize("name", ["mlp", "transformer, tied head", "llama"])
def test_equal_weights_follow_the_plain_optimizer(name, apply):
    plain, case = oracle.make(name).to(torch.float64), oracle.make(name).to(torch.float64)
    expected, optimizer = torch.optim.AdamW(plain.model.parameters(), lr=0.01), wrap(case, Equal(), 0.01, apply=apply)
    for _ in range(5):
        expected.zero_grad()
        plain.run().backward()
        expected.step()
        optimizer.zero_grad()
        block(optimizer, case)
        optimizer.step()
    for a, b in zip(case.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_gradient_is_complete_when_the_block_closes_and_accumulates():
    case = oracle.make("transformer").to(torch.float64)
    optimizer = wrap(case, by_example)
    block(optimizer, case)
    once = gradients(case)
    block(optimizer, case)
    assert_close(gradients(case), {name: 2 * g for name, g in once.items()})
    total = nn.utils.clip_grad_norm_(case.model.parameters(), 0.1)
    assert float(total) > 0.1
    assert float(torch.stack([p.grad.norm() for p in case.model.parameters()]).norm()) == pytest.approx(0.1, rel=1e-4)
    optimizer.step()


def test_reward_std_weighs_examples_by_their_prompt():
    case = oracle.make("mlp").to(torch.float64)
    optimizer = Reweighted(torch.optim.SGD(case.model.parameters(), lr=0.1), case.model, RewardStd())
    rewards, prompts = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 0.5]), torch.tensor([4, 4, 9, 9, 2, 2])
    with optimizer.observe(rewards=rewards, prompts=prompts):
        case.run().backward()
    expected = torch.tensor([2.0, 2.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64)  # the prompts' stds are as 2 : 0 : 1
    torch.testing.assert_close(optimizer.weights, expected)
    assert_close(gradients(case), weighted(case, expected))
    assert optimizer.stats.task_norm is None  # one task, weights per example


def test_is_an_optimizer_with_the_wrapped_ones_groups_and_state():
    case = oracle.make("mlp")
    optimizer = wrap(case, Equal())
    inner = optimizer.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is inner.param_groups and optimizer.state is inner.state
    extra = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    assert inner.param_groups[1]["lr"] == 0.5
    block(optimizer, case)
    optimizer.step()
    assert len(inner.state) == len(list(case.model.parameters()))
    assert "AdamW" not in repr(optimizer) and "lr" in repr(optimizer)


def test_learning_rate_schedulers_drive_the_wrapped_optimizer():
    case = oracle.make("mlp")
    optimizer = wrap(case, Equal(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for expected in (0.5, 0.25):
        block(optimizer, case)
        optimizer.step()
        scheduler.step()
        assert optimizer.optimizer.param_groups[0]["lr"] == expected
    pickle.loads(pickle.dumps(optimizer))


def test_hooks_run_around_the_step():
    case = oracle.make("mlp")
    optimizer, seen = wrap(case, Equal()), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("state"))
    block(optimizer, case)
    optimizer.step()
    optimizer.state_dict()
    assert seen == ["before", "after", "state"]


POLICIES = {
    "InverseNorm": InverseNorm,
    "PiKE": lambda: PiKE(zeta1=1.0, zeta2=1.0),
    "GradNorm": lambda: GradNorm(best=2.0, rate=0.2),
    "Chain": lambda: Chain(MTGRPO(rate=2.0, level=0.5), InverseNorm(0.5)),
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("apply", ["same_step", "next_step"])
def test_a_run_continues_from_its_state_as_if_it_had_not_stopped(apply, name):
    def steps(optimizer, case, first, count):
        for step in range(first, first + count):
            optimizer.zero_grad()
            rewards = torch.linspace(0, 1, len(case.x)) ** (1 + step)
            block(optimizer, case, prompts=torch.arange(len(case.x)), rewards=rewards)
            optimizer.step()

    case = oracle.make("transformer")
    optimizer = wrap(case, POLICIES[name](), apply=apply)
    steps(optimizer, case, 0, 2)
    stored = io.BytesIO()
    torch.save({"model": case.model.state_dict(), "optimizer": optimizer.state_dict()}, stored)
    steps(optimizer, case, 2, 2)

    stored.seek(0)
    loaded = torch.load(stored, weights_only=True)
    again = oracle.make("transformer")
    resumed = wrap(again, POLICIES[name](), apply=apply)
    again.model.load_state_dict(loaded["model"])
    resumed.load_state_dict(loaded["optimizer"])
    steps(resumed, again, 2, 2)
    for a, b in zip(case.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(resumed.weights, optimizer.weights, rtol=0, atol=0)
    assert float((optimizer.weights - 1).abs().max()) > 1e-3
    assert resumed.history.steps == optimizer.history.steps == 4
    assert torch.equal(resumed.history.mean("sqnorm"), optimizer.history.mean("sqnorm"))


def test_a_state_of_another_policy_is_refused():
    case = oracle.make("mlp")
    state = wrap(case, PiKE(1.0, 1.0)).state_dict()
    message = (
        "Reweighted: the state must be of this policy, GradNorm, got one of PiKE; make the optimizer with the same"
    )
    with pytest.raises(ValueError, match=f"^{message}"):
        wrap(case, GradNorm()).load_state_dict(state)
    wrap(case, PiKE(1.0, 1.0)).load_state_dict(state)


@pytest.mark.parametrize("apply", ["same_step", "next_step"])
def test_weights_that_are_not_finite_stop_the_run_before_they_do_harm(apply):
    def nonsense(stats):
        return stats.task_norm * float("nan")

    case = oracle.make("mlp")
    optimizer = wrap(case, nonsense, apply=apply)
    before = copy.deepcopy(case.model.state_dict())
    block(optimizer, case)
    message = "Reweighted: the policy must return finite weights for finite statistics, got others from "
    with pytest.raises(RuntimeError, match=f"^{message}"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), case.model.state_dict().values(), strict=True))
    assert all(p.grad.isfinite().all() for p in case.model.parameters()) and optimizer.skipped_steps == 0


def test_an_absent_task_spoils_no_weight():
    case = oracle.make("mlp").to(torch.float64)
    optimizer = wrap(case, lambda stats: 1 / stats.task_norm, tasks=K + 1)  # infinite for the task without examples
    block(optimizer, case)
    assert optimizer.weights[K] == 1 and optimizer.weights.isfinite().all()
    assert_close(gradients(case), weighted(case, optimizer.weights[ids(case)]))
    optimizer.step()


def test_weights_of_zero_leave_no_gradient_and_negative_ones_turn_it_around():
    case = oracle.make("mlp").to(torch.float64)
    block(wrap(case, lambda stats: torch.zeros(K)), case)
    assert all(p.grad.count_nonzero() == 0 for p in case.model.parameters())
    case.model.zero_grad()
    block(wrap(case, lambda stats: -torch.ones(K)), case)
    assert_close(gradients(case), weighted(case, -torch.ones(len(case.x))))


def test_balanced_pairs_contribute_gradients_of_one_norm():
    case = oracle.make("transformer").to(torch.float64)
    optimizer = wrap(case, PairBalance("parameter", clip=1e6))
    block(optimizer, case)
    found = oracle.per_example_gradients(case)
    norms = torch.stack([torch.cat([g.flatten() for g in of.values()]).norm() for of in found])
    chosen, rejected = (optimizer.weights * norms).chunk(2)
    torch.testing.assert_close(chosen, rejected)
    assert_close(gradients(case), weighted(case, optimizer.weights))


def test_keeps_the_history_of_its_blocks():
    case = oracle.make("mlp")
    optimizer = wrap(case, InverseNorm())
    for _ in range(2):
        optimizer.zero_grad()
        block(optimizer, case)
        optimizer.step()
    rows = optimizer.history.rows()
    assert [row["step"] for row in rows] == [0] * K + [1] * K
    assert [row["weight"] for row in rows[K:]] == optimizer.weights.tolist()
    assert [row["norm"] for row in rows[K:]] == optimizer.stats.task_norm.tolist()


def test_takes_over_a_plain_optimizers_state():
    case = oracle.make("mlp")
    plain = torch.optim.AdamW(case.model.parameters(), lr=0.3)
    case.run().backward()
    plain.step()
    optimizer = wrap(case, Equal())
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.3 and len(optimizer.state) == len(plain.state)
    with pytest.raises(ValueError, match="the state must be of 3 tasks, got one of 2"):
        optimizer.load_state_dict(wrap(case, Equal(), tasks=2).state_dict())


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"]
)
def test_is_copied_and_pickled_with_its_model(copier):
    case = oracle.make("transformer")
    optimizer = wrap(case, InverseNorm(), apply="next_step")
    block(optimizer, case)
    optimizer.step()
    model, copied = copier((case.model, optimizer))
    assert copied.meter.model is model and copied.param_groups[0]["params"][0] is next(model.parameters())
    other = oracle.Case(model, case.x, case.y, case.loss)
    for one, on in ((optimizer, case), (copied, other)):
        one.zero_grad()
        block(one, on)
        one.step()
    for a, b in zip(case.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_closure_runs_the_observed_forward_and_backward():
    case = oracle.make("mlp")
    optimizer = wrap(case, InverseNorm())

    def closure():
        optimizer.zero_grad()
        return block(optimizer, case)

    assert float(optimizer.step(closure).detach()) > 0


class Ascending(torch.optim.Optimizer):
    """Moves up the gradient before it calls the closure, and steps from where it was by what it finds there, as SAM does."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            before = [p.clone() for p in group["params"]]
            for p in group["params"]:
                p += group["lr"] * p.grad
                self.state[p]["steps"] = self.state[p].get("steps", 0) + 1
            loss = torch.enable_grad()(closure)()
            for p, start in zip(group["params"], before, strict=True):
                p.copy_(start - group["lr"] * p.grad)
        return loss


def by_lbfgs(parameters, lr):
    return torch.optim.LBFGS(parameters, lr, max_iter=5)


def by_line_search(parameters, lr):
    return torch.optim.LBFGS(parameters, lr, max_iter=5, line_search_fn="strong_wolfe")


@pytest.mark.parametrize("apply", [{}, {"apply": "next_step"}, {"passes": 2}], ids=str)
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adagrad, by_lbfgs, by_line_search, Ascending])
def test_the_wrapped_optimizer_gets_the_closure_and_calls_it_as_often_as_it_needs(make, apply):
    case = oracle.make("mlp").to(torch.float64)
    plain = case.to(torch.float64)
    ours, theirs = wrap(case, by_task, 0.01, make, **apply), make(plain.model.parameters(), 0.01)
    calls = {"ours": 0, "theirs": 0}

    def observed():
        calls["ours"] += 1
        ours.zero_grad()
        with ours.observe(tasks=ids(case)):
            loss = weighted_loss(case, torch.ones(len(case.x)))
            ours.backward(loss)
        return weighted_loss(case, ours.weights[ids(case)]).detach()

    def naive():
        first, calls["theirs"] = calls["theirs"] == 0, calls["theirs"] + 1
        theirs.zero_grad()
        weights = (
            torch.ones(K) if first and "apply" in apply else by_task(SimpleNamespace(tasks=[], example_norm=plain.x))
        )
        loss = weighted_loss(plain, weights[ids(plain)])
        loss.backward()
        return loss.detach()

    if make is Ascending:
        observed(), naive()
    for _ in range(2):
        assert torch.allclose(ours.step(observed), theirs.step(naive))
    assert calls["ours"] == calls["theirs"]
    for a, b in zip(case.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def weighted_loss(case, weights):
    outputs = case.model(case.x)
    return sum(w * case.loss(o[None], y[None]) for w, o, y in zip(weights, outputs, case.y, strict=True))


@pytest.mark.parametrize(
    ("make", "fails_at"),
    [
        (torch.optim.Adagrad, 0),
        (Ascending, 0),
        *((by_lbfgs, n) for n in (0, 1, 3)),
        *((by_line_search, n) for n in (0, 1)),
    ],
)
def test_a_step_whose_closure_meets_what_is_not_finite_is_undone(make, fails_at):
    case = oracle.make("mlp").to(torch.float64)
    optimizer = wrap(case, InverseNorm(), 0.01, make)
    calls = 0

    def closure(bad=float("nan"), error=None):
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        with optimizer.observe(tasks=ids(case)):
            loss = case.run() * (bad if calls > fails_at else 1)
            loss.backward()
        if error is not None and calls > fails_at:
            raise error
        return loss.detach()

    closure(1)
    optimizer.step(lambda: closure(1))
    for error in (None, KeyboardInterrupt(), ZeroDivisionError()):
        before, state = copy.deepcopy(case.model.state_dict()), copy.deepcopy(optimizer.optimizer.state_dict())
        skipped, calls = optimizer.skipped_steps, 0
        with nullcontext() if error is None else pytest.raises(type(error)):
            optimizer.step(lambda error=error: closure(float("nan") if error is None else 1, error))
        assert optimizer.skipped_steps == skipped + (error is None)
        after = optimizer.optimizer.state_dict()
        assert str(after) == str(state)
        assert all(a.equal(b) for a, b in zip(before.values(), case.model.state_dict().values(), strict=True))


def test_an_optimizer_that_never_calls_its_closure_is_refused():
    class Deaf(torch.optim.SGD):
        def step(self, closure=None):
            return super().step()

    case = oracle.make("mlp")
    optimizer = wrap(case, Equal(), optimizer=Deaf)
    block(optimizer, case)
    before = [p.clone() for p in case.model.parameters()]
    with pytest.raises(RuntimeError, match="the wrapped optimizer must call the closure, got Deaf, which did not"):
        optimizer.step(lambda: block(optimizer, case))
    assert all(a.equal(b) for a, b in zip(before, case.model.parameters(), strict=True))


def test_step_without_observe_is_an_error_unless_told_otherwise():
    case = oracle.make("mlp")
    optimizer = wrap(case, Equal())
    case.run().backward()
    with pytest.raises(RuntimeError, match="step needs an observe block since the last step, got none"):
        optimizer.step()
    block(optimizer, case)
    optimizer.step()
    with pytest.raises(RuntimeError, match="step needs an observe block"):
        optimizer.step()
    before = [p.clone() for p in case.model.parameters()]
    wrap(case, Equal(), unobserved="plain").step()
    assert any(not torch.equal(a, b) for a, b in zip(before, case.model.parameters(), strict=True))


@pytest.mark.parametrize("apply", ["same_step", "next_step"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_skipped_and_counted(bad, apply):
    case = oracle.make("mlp")
    optimizer = wrap(case, InverseNorm(), apply=apply)
    block(optimizer, case)
    optimizer.step()
    weights, state = copy.deepcopy(case.model.state_dict()), copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    with optimizer.observe(tasks=ids(case)):
        (case.run() * bad).backward()
    assert not bool(optimizer.stats.finite)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(weights.values(), case.model.state_dict().values(), strict=True))
    for parameter, before in state["state"].items():
        assert all(torch.equal(before[k], optimizer.state_dict()["state"][parameter][k]) for k in before)
    assert state["gradnorm"]["history"]["sums"].equal(optimizer.state_dict()["gradnorm"]["history"]["sums"])
    assert state["gradnorm"]["next_weights"].equal(optimizer.state_dict()["gradnorm"]["next_weights"])
    optimizer.zero_grad()
    block(optimizer, case)
    optimizer.step()
    assert optimizer.skipped_steps == 1 and bool(optimizer.stats.finite)


def test_a_reward_that_is_not_a_number_skips_the_step():
    case = oracle.make("mlp")
    optimizer = wrap(case, Equal())
    prompts = ids(case)
    block(optimizer, case, prompts=prompts, rewards=torch.tensor([1.0, 0.0, float("nan"), 1.0, 0.0, 1.0]))
    optimizer.step()
    assert optimizer.skipped_steps == 1 and not optimizer.state


def test_an_exception_in_a_block_leaves_everything_ready_for_the_next():
    case = oracle.make("transformer")
    optimizer = wrap(case, InverseNorm())
    block(optimizer, case)
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(KeyboardInterrupt), optimizer.observe(tasks=ids(case)):
        case.run().backward()
        raise KeyboardInterrupt
    assert all(p.grad is None for p in case.model.parameters())
    assert type(case.model.norm) is nn.LayerNorm
    block(optimizer, case)
    optimizer.step()


def test_same_step_refuses_what_acts_on_gradients_during_backward():
    case = oracle.make("mlp")
    optimizer = wrap(case, Equal())
    handle = case.model[0].weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(RuntimeError, match=r"got 0.weight with a hook that acts on its gradient during backward"):
        block(optimizer, case)
    handle.remove()
    block(optimizer, case)


def test_same_step_refuses_activations_that_changed_in_place():
    class Clobber(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)
            self.kept = None

        def forward(self, x):
            self.kept = torch.tanh(self.first(x))
            return self.second(self.kept)

    model, x = Clobber(), torch.randn(4, 3)
    optimizer = Reweighted(torch.optim.SGD(model.parameters(), 0.1), model, ClipExamples(1.0))
    with (
        pytest.raises(RuntimeError, match=r"what the backward of second.weight kept must not change"),
        optimizer.observe(),
    ):
        model(x).square().sum().backward()
        model.kept.detach().add_(1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"apply": "now"}, ValueError, 'apply must be "same_step" or "next_step", got \'now\''),
        ({"unobserved": "skip"}, ValueError, 'unobserved must be "error" or "plain"'),
        ({"decay": 1.0}, ValueError, r"decay must lie in \[0, 1\), got 1.0"),
        ({"apply": "next_step", "policy": ClipExamples(1.0)}, ValueError, "needs a policy that weighs tasks"),
        ({"policy": lambda stats: torch.ones(7)}, ValueError, r"one weight for each of its tasks, \[3\], got \[7\]"),
    ],
)
def test_bad_options_are_named(options, error, message):
    case = oracle.make("mlp")
    with pytest.raises(error, match=message):
        block(wrap(case, options.pop("policy", Equal()), **options), case)


def test_refuses_another_models_optimizer():
    inner = torch.optim.SGD(oracle.make("mlp").model.parameters(), 0.1)
    with pytest.raises(
        ValueError, match="the optimizer must step the model's parameters, got one that has none of them"
    ):
        Reweighted(inner, oracle.make("mlp").model, Equal())


def test_takes_a_meter_instead_of_a_model():
    case = oracle.make("mlp")
    meter = Meter(case.model, tasks=["a", "b", "c"])
    inner = torch.optim.SGD(case.model.parameters(), 0.1)
    optimizer = Reweighted(inner, meter, InverseNorm())
    block(optimizer, case)
    assert optimizer.stats is meter.stats and optimizer.stats.task_names == ("a", "b", "c")
    with pytest.raises(TypeError, match=r"meter options go to the Meter that was given, got \['tasks'\]"):
        Reweighted(inner, meter, InverseNorm(), tasks=2)
