"""After a refusal, or an exception of the user's, everything is as it was before the block, and the next block is right."""

import copy
import re
import types

import oracle
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradnorm_ext import Equal, Meter, Reweighted, meter

TASKS = [0, 1, 1, 0]


class Broken(torch.autograd.Function):
    """Raises in backward what it is given."""

    @staticmethod
    def forward(ctx, h, error):
        ctx.error = error
        return h.clone()

    @staticmethod
    def backward(ctx, g):
        if ctx.error is not None:
            raise ctx.error
        return g, None


class Unlisted(torch.autograd.Function):
    """A product that no rule knows of, with a parameter among its arguments."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum((0, 1))


class Body(nn.Module):
    """A little of everything; ``odd`` is what a test lets it do between its layers."""

    def __init__(self):
        super().__init__()
        self.tokens, self.norm, self.inner = nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 6)
        self.free, self.head = nn.Parameter(torch.randn(6)), nn.Linear(6, 3)
        self.head.register_parameter("spare", nn.Parameter(torch.zeros(2)))
        self.odd = lambda model, h: h
        self.norm.register_forward_hook(lambda module, args, output: output * 1.0)
        self.inner.weight.register_hook(lambda gradient: gradient.clone())

    def forward(self, ids):
        h = torch.tanh(self.inner(self.norm(self.tokens(ids)))) * self.free
        return self.head(self.odd(self, h))


class BadError(Exception):
    """The user's own."""


def raising(error):
    def odd(model, h):
        raise error

    return odd


def backward_raising(error):
    return lambda model, h: Broken.apply(h, error)


# What a model does, and the error that the block ends with.
ODD = {
    "no rule": (lambda model, h: torch.cdist(h, model.inner.weight), RuntimeError, "no rule for"),
    "in place": (lambda model, h: h.clone().copy_(model.free.expand_as(h)) + h, RuntimeError, "no rule for"),
    "no layout": (
        lambda model, h: h + model.inner(torch.ones(3, 6, dtype=h.dtype)).mean(),
        ValueError,
        "got rows of shape",
    ),
    "mixed examples": (lambda model, h: h - model.inner(h).mean(0), RuntimeError, "do not belong to one example each"),
    "shuffled rows": (
        lambda model, h: h + model.inner(h.roll(1, 0)),
        RuntimeError,
        "do not belong to one example each",
    ),
    "a custom function": (
        lambda model, h: Unlisted.apply(h, model.free),
        RuntimeError,
        "use that was not seen|only in part",
    ),
    "a penalty": (lambda model, h: h + PARAMETER[0].square().sum(), RuntimeError, "use that was not seen|only in part"),
    "an exception in forward": (raising(BadError()), BadError, ""),
    "an interrupt in forward": (raising(KeyboardInterrupt()), KeyboardInterrupt, ""),
    "an exception in backward": (backward_raising(BadError()), BadError, ""),
    "an interrupt in backward": (backward_raising(KeyboardInterrupt()), KeyboardInterrupt, ""),
    "a parameter is added": (lambda model, h: h + add_to(model), RuntimeError, "must keep its parameters"),
}
VERIFIED = (
    "mixed examples",
    "shuffled rows",
    "a custom function",
    "a penalty",
)  # what a block that verifies itself finds
BLOCKS = {False: "first block", True: "later block"}
PARAMETER = []


def add_to(model):
    model.head.register_parameter("late", nn.Parameter(torch.zeros(())))
    return 0


# What is done around the model, and the error.
AROUND = {
    "no forward": (lambda model, ids: None, RuntimeError, "must be called with gradients"),
    "no backward": (lambda model, ids: model(ids), RuntimeError, "must run inside the observe block"),
    "backward twice": (
        lambda model, ids: backward_twice(model, ids),
        RuntimeError,
        "must run once per use|with passes=2",
    ),
    "differentiated twice": (lambda model, ids: differentiated_twice(model, ids), RuntimeError, "differentiate twice|"),
    "an exception before": (lambda model, ids: raising(BadError())(model, ids), BadError, ""),
}


def backward_twice(model, ids):
    loss = loss_of(model(ids))
    loss.backward(retain_graph=True)
    loss.backward()


def differentiated_twice(model, ids):
    out = model(ids)
    (gradient,) = torch.autograd.grad(loss_of(out), out, create_graph=True)
    (again,) = torch.autograd.grad(loss_of(model(ids)), model.inner.weight, create_graph=True)
    (gradient.square().sum() + again.square().sum()).backward()


GIVEN = {
    "ids too few": {"tasks": [0, 1, 1]},
    "ids out of range": {"tasks": [0, 1, 2, 0]},
    "ids of another kind": {"tasks": [0.0, 1.0, 1.0, 0.0]},
    "an unknown name": {"tasks": ["0", "1", "x", "0"]},
    "no ids": {},
    "a reward of None": {"tasks": TASKS, "prompts": TASKS, "rewards": [1.0, None, 1.0, 0.0]},
    "a prompt in two tasks": {"tasks": TASKS, "prompts": [0, 0, 1, 1]},
    "a scale of 0": {"tasks": TASKS, "loss_scale": 0.0},
    "packing that does not fit": {"tasks": TASKS, "cu_seqlens": [0, 1, 3]},
}
OBSERVERS = {
    "meter": lambda model: Meter(model, tasks=2),
    "same_step": lambda model: reweighted(model),
    "two passes": lambda model: reweighted(model, passes=2),
    "by layer": lambda model: reweighted(model, scope="layer"),
    "next_step": lambda model: reweighted(model, apply="next_step"),
    "exact tasks": lambda model: reweighted(model, exact_tasks=True),
}


def reweighted(model, **options):
    return Reweighted(torch.optim.SGD(model.parameters(), 0.1), model, Equal(), tasks=2, **options)


def loss_of(out):
    return out.square().flatten(1).sum(1).sum()


def state_of(model):
    """What a block touches of a model, and of the process."""
    of_modules = [
        (name, type(module), sorted(vars(module)), {key: id(value) for key, value in module._parameters.items()})
        for name, module in model.named_modules()
    ]
    hooks = [
        list(hooks) for module in model.modules() for key, hooks in sorted(vars(module).items()) if "_hooks" in key
    ]
    of_parameters = [
        (name, type(p), p.requires_grad, list(p._backward_hooks or ()), sorted(vars(p)), p._version)
        for name, p in model.named_parameters()
    ]
    functions = {
        f"{place.__name__}.{name}": id(value)
        for place in (F, torch.utils.checkpoint, torch.autograd.Function)
        for name, value in vars(place).items()
        if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, classmethod))
    }
    stance = torch._dynamo.eval_frame._stance.stance
    open_blocks = meter._Compilation.blocks, meter._Compilation.graphs, meter._Compilation.stance
    return of_modules, hooks, of_parameters, functions, stance, open_blocks, torch.is_grad_enabled()


def built():
    torch.manual_seed(0)
    return Body().double(), torch.randint(0, 9, (4, 5))


def is_right(observer, model, ids):
    """A block that works: norms, and ``.grad`` added to what was there."""
    case = oracle.Case(copy.deepcopy(model), ids, ids, lambda out, _: loss_of(out))
    gradients = oracle.per_example_gradients(case)
    model.zero_grad()
    with observer.observe(tasks=TASKS):
        backward = observer.backward if isinstance(observer, Reweighted) else torch.Tensor.backward
        backward(loss_of(model(ids)))
    torch.testing.assert_close(observer.stats.example_norm, oracle.group_norms(gradients, torch.arange(4), 4))
    for name, p in model.named_parameters():
        expected = sum(one[name] for one in gradients)
        torch.testing.assert_close(torch.zeros_like(p) if p.grad is None else p.grad, expected)


def ends_with(observer, given, run, error, message):
    with pytest.raises(error) as caught, observer.observe(**given):
        run()
    assert re.search(message, str(caught.value)), caught.value
    return caught.value


def check_after(observer, model, ids, given, run, error, message, warm):
    """The block ends with the error; what it left is what it found, and it is forgotten."""
    memory = (observer.meter if isinstance(observer, Reweighted) else observer).memory
    if warm:
        is_right(observer, model, ids)
    model.zero_grad()
    before, learnt = state_of(model), copy.deepcopy(vars(memory))
    ends_with(observer, given, run, error, message)
    model.odd = nothing
    model.head._parameters.pop("late", None)
    after = state_of(model)
    for found, expected in zip(after, before, strict=True):
        assert found == expected
    assert {**vars(memory), "unverified": False} == {**learnt, "unverified": False}
    is_right(observer, model, ids)


def nothing(model, h):
    return h


@pytest.mark.parametrize(
    ("odd", "warm"),
    [
        pytest.param(odd, warm, id=f"{odd}, {BLOCKS[warm]}")
        for odd in ODD
        for warm in ([False] if odd in VERIFIED else BLOCKS)
    ],
)
@pytest.mark.parametrize("observer", OBSERVERS)
def test_after_what_a_model_does(observer, odd, warm):
    (model, ids), (function, error, message) = built(), ODD[odd]
    model.odd = nothing
    observer = OBSERVERS[observer](model)
    PARAMETER[:] = [model.free]

    def run():
        model.odd = function
        backward = observer.backward if isinstance(observer, Reweighted) else torch.Tensor.backward
        backward(loss_of(model(ids)))

    check_after(observer, model, ids, {"tasks": TASKS}, run, error, message, warm)


@pytest.mark.parametrize("warm", BLOCKS, ids=BLOCKS.values())
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("observer", OBSERVERS)
def test_after_what_is_done_around_it(observer, around, warm):
    (model, ids), (function, error, message) = built(), AROUND[around]
    model.odd = nothing
    observer = OBSERVERS[observer](model)
    check_after(observer, model, ids, {"tasks": TASKS}, lambda: function(model, ids), error, message, warm)


@pytest.mark.parametrize("warm", BLOCKS, ids=BLOCKS.values())
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("observer", ["meter", "same_step", "exact tasks"])
def test_after_what_observe_was_told(observer, given, warm):
    model, ids = built()
    model.odd = nothing
    observer = OBSERVERS[observer](model)

    def run():
        loss_of(model(ids)).backward()

    check_after(observer, model, ids, GIVEN[given], run, (ValueError, TypeError, RuntimeError), "", warm)
