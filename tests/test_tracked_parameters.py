"""What a parameter is inside of a block: what it is outside of it."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradnorm_ext import Meter


class Own(nn.Parameter):
    """A kind of parameter that a model knows by its class."""


class Tied(nn.Module):
    """A model that asks its parameter what it is, and computes something else where the answer is no."""

    def __init__(self, asks, kind=nn.Parameter):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.first.weight = kind(torch.randn(4, 4, dtype=torch.float64))
        self.second.weight = self.first.weight
        self.first.weight.mark = "seen"
        self.asks = asks

    def forward(self, x):
        h = self.first(x)
        return self.second(h.tanh()) if self.asks(self.first.weight, self.second.weight) else h


QUESTIONS = {
    "is a parameter": lambda w, v: isinstance(w, nn.Parameter),
    "has the parameter's class": lambda w, v: w.__class__ is nn.Parameter,
    "is no buffer": lambda w, v: not isinstance(w, nn.Buffer),
    "is tied": lambda w, v: w is v and id(w) == id(v),
    "is a key": lambda w, v: {w: True}[v] and w in {v},
    "has its attributes": lambda w, v: w.mark == "seen" and getattr(w, "mark", None) == "seen",
    "has no others": lambda w, v: not hasattr(w, "unmarked"),
    "is a leaf": lambda w, v: w.is_leaf and w.requires_grad and w.grad_fn is None,
    "has a gradient": lambda w, v: w.grad is not None and w.grad.shape == w.shape,
    "has data": lambda w, v: w.data_ptr() == v.data.data_ptr() and not w.data.requires_grad,
    "is copied as one": lambda w, v: type(copy.deepcopy(w)) is nn.Parameter and copy.deepcopy(w).is_leaf,
    "is pickled as one": lambda w, v: type(pickle.loads(pickle.dumps(w))) is nn.Parameter,
    "has sizes": lambda w, v: w.dim() == 2 and w.numel() == 16 and len(w) == 4 and w.dtype == torch.float64,
    "is printed as one": lambda w, v: repr(w).startswith("Parameter containing"),
}


@pytest.mark.parametrize("asks", QUESTIONS.values(), ids=QUESTIONS)
def test_a_model_computes_in_a_block_what_it_computes_outside(asks):
    model, x = Tied(asks), torch.randn(5, 4, dtype=torch.float64)
    model.first.weight.grad = torch.zeros(4, 4, dtype=torch.float64)
    outside = model(x)
    outside.square().sum().backward()
    gradient = model.first.weight.grad.clone()
    model.first.weight.grad.zero_()
    assert asks(model.first.weight, model.second.weight)
    with Meter(model).observe():
        inside = model(x)
        inside.square().sum().backward()
    assert torch.equal(inside, outside)
    torch.testing.assert_close(model.first.weight.grad, gradient)


def test_a_class_of_parameters_is_known_by_it():
    model = Tied(lambda w, v: isinstance(w, Own) and isinstance(w, nn.Parameter), Own)
    x = torch.randn(5, 4, dtype=torch.float64)
    with Meter(model).observe():
        inside = model(x)
        inside.square().sum().backward()
    assert torch.equal(inside, model.second(model.first(x).tanh()))


def test_attributes_that_are_set_in_a_block_stay():
    def asks(w, v):
        w.count = getattr(w, "count", 0) + 1
        del w.mark
        return v.count

    model = Tied(asks)
    with Meter(model).observe():
        model(torch.randn(5, 4, dtype=torch.float64)).sum().backward()
    assert model.first.weight.count == 1 and not hasattr(model.first.weight, "mark")


def test_gradients_that_are_set_or_cleared_in_a_block_are_the_parameters():
    model = Tied(lambda w, v: True)
    model.first.weight.grad = torch.ones(4, 4, dtype=torch.float64)
    with Meter(model).observe():
        y = model(torch.randn(5, 4, dtype=torch.float64))
        model.second.weight.grad = None
        assert model.first.weight.grad is None
        y.sum().backward()
    assert model.first.weight.grad is not None


@pytest.mark.parametrize("name", ["value", "slot", "use"])
def test_attributes_that_a_block_could_not_tell_from_its_own_are_refused(name):
    model = Tied(lambda w, v: True)
    setattr(model.first.weight, name, 1)
    message = rf"attributes of a trainable parameter .* got {name} on first.weight"
    with pytest.raises(RuntimeError, match=message), Meter(model).observe():
        model(torch.randn(5, 4, dtype=torch.float64)).sum().backward()


def test_state_saved_in_a_block_is_that_of_parameters():
    model, file = Tied(lambda w, v: True), io.BytesIO()
    with Meter(model).observe():
        y = model(torch.randn(5, 4, dtype=torch.float64))
        torch.save({"one": model.first.weight, "all": model.state_dict()}, file)
        y.sum().backward()
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert type(saved["one"]) is nn.Parameter
    assert torch.equal(saved["one"], saved["all"]["first.weight"])


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g * weight, (g * x).sum(0)


@torch.jit.script
def scripted(x, weight):
    return x * weight


PAST = {
    "a custom Function": Scaled.apply,
    "a custom Function, of a view": lambda x, w: Scaled.apply(x, w.view(1, 4)[0]),
    "a custom Function, of a cast": lambda x, w: Scaled.apply(x, w.double()),
    "a scripted function": scripted,
}


@pytest.mark.parametrize("mode", ["error", "vmap"])
@pytest.mark.parametrize("consume", PAST.values(), ids=PAST)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_what_looks_past_a_parameters_class_is_refused_in_any_block(consume, mode):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.gain, self.how = nn.Linear(4, 4), nn.Parameter(torch.randn(4)), torch.mul

        def forward(self, x):
            return self.how(self.first(x), self.gain)

    model, meter = Model().double(), None
    meter = Meter(model, on_unsupported=mode)
    x = torch.randn(5, 4, dtype=torch.float64)
    for _ in range(3):
        with meter.observe():
            model(x).square().sum().backward()
    model.how = consume
    with pytest.raises(RuntimeError, match="gain got a gradient from a use that was not seen"), meter.observe():
        model(x).square().sum().backward()
    model.how = torch.mul
    with meter.observe():
        model(x).square().sum().backward()


LOGGED = {
    "norm": lambda w: w.norm().item(),
    "mean": lambda w: w.mean().item(),
    "largest": lambda w: w.abs().max().item(),
    "histogram": lambda w: torch.histc(w.detach(), 3).tolist(),
    "singular values": lambda w: torch.linalg.svdvals(w).tolist(),
    "product of two": lambda w: (w @ w.t()).diagonal().sum().item(),
    "printed": str,
    "formatted": lambda w: f"{w.std():.3f}",
    "as an array": lambda w: w.detach().numpy().tolist(),
}


@pytest.mark.parametrize("mode", ["error", "vmap"])
@pytest.mark.parametrize("log", LOGGED.values(), ids=LOGGED)
def test_figures_of_parameters_may_be_logged(log, mode):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            self.logged = log(self.inner.weight)
            return self.inner(x).tanh()

    model, x = Model(), torch.randn(5, 4)
    meter = Meter(model, on_unsupported=mode)
    with meter.observe():
        model(x).square().sum().backward()
    assert model.logged == log(model.inner.weight)


CONSUMED = {
    "added": lambda loss, w: loss + w.norm(),
    "stacked": lambda loss, w: torch.stack([loss, w.square().sum()]).sum(),
    "times": lambda loss, w: loss * w.mean(),
    "a root of its own": lambda loss, w: (w.norm().backward(), loss)[1],
    "a root in a list": lambda loss, w: (torch.autograd.backward([w.norm()]), loss)[1],
    "a root by name": lambda loss, w: (torch.autograd.grad(outputs=w.norm(), inputs=w), loss)[1],
    "subtracted by name": lambda loss, w: torch.sub(input=loss, other=w.norm()),
}


@pytest.mark.parametrize("consume", CONSUMED.values(), ids=CONSUMED)
def test_but_not_be_trained_by(consume):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return consume(self.inner(x).tanh().square().sum(), self.inner.weight)

    model = Model()
    message = r"Meter: no rule for .* of inner.weight .* called at .*test_tracked"
    with pytest.raises(RuntimeError, match=message), Meter(model).observe():
        model(torch.randn(5, 4)).backward()


def test_a_refusal_says_where_the_call_is_and_of_what_sizes():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleDict({"odd": nn.Bilinear(4, 4, 3)})

        def forward(self, x):
            return torch.cdist(x, self.inner["odd"].weight[0])  # here

    model = Model()
    message = (
        r"no rule for cdist of inner.odd.weight \[4, 4\] with \[5, 4\], which is trainable, called at .*"
        r"test_tracked_parameters.py:\d+ \(return torch.cdist\(x, self.inner\[\"odd\"\].weight\[0\]\)  # here\); make the Meter"
    )
    with pytest.raises(RuntimeError, match=message), Meter(model).observe():
        model(torch.randn(5, 4)).sum().backward()


METADATA = {
    "type_as": lambda h, w: h.type_as(w),
    "to": lambda h, w: h.to(w),
    "view_as": lambda h, w: h.view_as(w),
    "reshape_as": lambda h, w: h.reshape_as(w),
    "expand_as": lambda h, w: h.expand_as(w),
    "sizes": lambda h, w: h.view(w.shape[0], w.size(1)),
    "detached": lambda h, w: h + w.detach() - w.data,
    "zeros": lambda h, w: h + torch.zeros_like(w) + w.new_zeros(4),
}


@pytest.mark.parametrize("ask", METADATA.values(), ids=METADATA)
def test_a_tensor_may_be_made_like_a_parameter(ask):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return F.relu(ask(self.inner(x), self.inner.weight))

    model = Model()
    with Meter(model).observe():
        model(torch.randn(4, 4)).square().sum().backward()


@pytest.mark.parametrize(
    "compiled", [torch.jit.script, lambda m: torch.jit.trace(m, torch.randn(5, 4))], ids=["script", "trace"]
)
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_modules_that_torch_jit_compiled_are_refused_before_anything_runs(compiled, inside):
    scripted = compiled(nn.Linear(4, 4))
    model = nn.Sequential(nn.Linear(4, 4), scripted) if inside else scripted
    name = "1" if inside else "the model"
    message = rf"must be Python, got {name}, which torch.jit has compiled"
    with pytest.raises(RuntimeError, match=message), Meter(model).observe():
        raise AssertionError("this must not run")
    assert not inside or type(model[0]) is nn.Linear
    for parameter in scripted.parameters():
        parameter.requires_grad_(False)
    if inside:
        with Meter(model).observe():
            model(torch.randn(5, 4)).sum().backward()
