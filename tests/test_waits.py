"""Nothing in an ordinary block waits for the device: whole blocks on meta tensors, which have no numbers to wait for.

Where a number is asked for (`item`, `tolist`, `bool`, `nonzero`, `unique`, ...) a meta tensor raises. What would copy from
the host and wait (a tensor made of a list, a list as an index, `to` without ``non_blocking``) is found by a mode. The
memory of a block on the CPU takes the place of a first block, which verifies itself and may wait.
"""

import copy

import oracle
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gradnorm_ext import IMTLG, ClipExamples, InverseNorm, Meter, RewardStd, Reweighted, backends

triton = pytest.importorskip("triton")  # optional
interpreter = pytest.importorskip("triton.runtime.interpreter")
triton_kernels = pytest.importorskip("gradnorm_ext.triton_kernels")

TASKS = torch.tensor([0, 1, 1, 0])
PROMPTS = torch.tensor([7, 2, 2, 7])


@pytest.fixture(autouse=True)
def on_meta(monkeypatch):
    """The kernels of a GPU for meta tensors: their launchers run, and nothing is launched."""
    monkeypatch.setitem(backends.BACKEND_ORDER, "meta", ("triton", "reference"))
    monkeypatch.setattr(triton_kernels, "DEVICES", (*triton_kernels.DEVICES, "meta"))
    monkeypatch.setattr(triton.runtime.JITFunction, "run", lambda *args, **kwargs: None)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *args, **kwargs: None)
    enabled = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind=None: kind != "meta" and enabled(kind or "cpu"))
    for function in (backends.find, backends.serves):
        function.cache_clear()
    yield
    for function in (backends.find, backends.serves):
        function.cache_clear()


def is_meta(value):
    return isinstance(value, torch.Tensor) and value.device.type == "meta"


class NoWaits(TorchDispatchMode):
    """Raises where something is copied between the host and the device and the host would wait."""

    def __init__(self):
        super().__init__()
        self.launchers = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        if function.namespace == "gradnorm_triton":  # what launches the kernels, and does the rest in torch
            self.launchers.add(name)
            with self:
                return function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        tensors = [one for one in args if isinstance(one, torch.Tensor)]
        if name == "_to_copy" and not kwargs.get("non_blocking"):
            target = kwargs.get("device") or tensors[0].device
            assert target.type == tensors[0].device.type, f"{tensors[0].device} to {target} waits"
        if name == "copy_" and len({one.device.type for one in tensors}) > 1:
            assert kwargs.get("non_blocking") or args[2:] == (True,), "a copy from another device waits"
        if name in ("index", "index_put", "index_put_") and is_meta(tensors[0]):
            for index in args[1]:
                assert index is None or (is_meta(index) and index.dtype != torch.bool), (
                    f"an index of {index.dtype} waits"
                )
        if name == "repeat_interleave" and any(map(is_meta, tensors)):
            assert kwargs.get("output_size") is not None, "repeat_interleave without output_size waits"
        return function(*args, **kwargs)


class NoLists(TorchFunctionMode):
    """Raises where a tensor on the device is made of numbers on the host, or indexed by a list."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor, torch.asarray):
            on_device = torch.device(kwargs.get("device") or "cpu").type == "meta"
            assert not on_device or is_meta(args[0]), "a tensor of numbers on the host waits"
        if function is torch.Tensor.new_tensor:
            assert not is_meta(args[0]), "a tensor of numbers on the host waits"
        if function is torch.Tensor.__getitem__ and is_meta(args[0]):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(one, list) for one in index), "a list as an index waits"
        return function(*args, **kwargs)


def moved(model):
    """A copy on the device, with what is tied still tied, which `nn.Module.to` unties there."""
    memo = {}
    for tensor in (*model.parameters(), *model.buffers()):
        there = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(there) if isinstance(tensor, nn.Parameter) else there
    return copy.deepcopy(model, memo)


def ordinary_block(make, observer_of, step=False, **given):
    """A block of a model that knows its uses; with ``step``, and a step of the optimizer."""
    case = make()
    there = oracle.Case(moved(case.model), case.x.to("meta"), case.y.to("meta"), case.loss)
    on_cpu = observer_of(case.model)
    observer = observer_of(there.model)
    for _ in range(2):
        with on_cpu.observe(**given):
            case.run().backward()
        if step:
            on_cpu.step()
    meters = [one.meter if isinstance(one, Reweighted) else one for one in (on_cpu, observer)]
    meters[1].memory = meters[0].memory
    if step:  # the state is made, the running means are on the device
        observer.optimizer.load_state_dict(on_cpu.optimizer.state_dict())
        observer.history._sums = observer.history._sums.to("meta")
        observer._next_weights = observer._next_weights.to("meta")
    with NoLists(), NoWaits() as mode:
        with observer.observe(**given):
            there.run().backward()
        if step:
            observer.step()
    assert is_meta(meters[1].stats.example_norm) and all(is_meta(p.grad) for p in there.model.parameters())
    assert mode.launchers >= {"outer_wgrad"}


METERS = {
    "examples": (lambda model: Meter(model), {}),
    "tasks": (lambda model: Meter(model, tasks=2), {"tasks": TASKS}),
    "prompts and rewards": (
        lambda model: Meter(model, tasks=2),
        {"tasks": TASKS, "prompts": PROMPTS, "rewards": torch.rand(4)},
    ),
    "per layer": (lambda model: Meter(model, tasks=2, per_layer=True), {"tasks": TASKS}),
    "gram": (lambda model: Meter(model, tasks=2, gram=True), {"tasks": TASKS}),
}
MODELS = (
    "transformer",
    "transformer, tied head",
    "transformer, functional head",
    "mixer",
    "free parameters",
    "embedding bag",
)


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, kind) for name in MODELS for kind in METERS if kind != "gram"), ("mixer", "gram")],
)
def test_an_ordinary_block_of_a_meter_waits_for_nothing(name, kind):
    observer_of, given = METERS[kind]
    ordinary_block(lambda: oracle.make(name), observer_of, **given)


class FusedOnMeta(torch.optim.Optimizer):
    """Steps as torch's fused optimizers do, which refuse meta tensors: a number on the device says whether to."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1, "fused": True})

    @torch.no_grad()
    def step(self):
        taken = 1 - getattr(self, "found_inf", torch.zeros(()))
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(group["lr"] * taken * parameter.grad)


REWEIGHTED = {
    "examples": (ClipExamples(1.0), {}),
    "tasks": (InverseNorm(), {}),
    "rewards": (RewardStd(), {}),
    "next step": (InverseNorm(), {"apply": "next_step"}),
    "by layer": (InverseNorm(), {"scope": "layer"}),
}


@pytest.mark.parametrize("kind", REWEIGHTED)
def test_an_ordinary_step_of_a_fused_optimizer_waits_for_nothing(kind, monkeypatch):
    monkeypatch.setattr("gradnorm_ext.optimizer._TAKE_FOUND_INF", (FusedOnMeta,))
    policy, options = REWEIGHTED[kind]

    def observer_of(model):
        return Reweighted(FusedOnMeta(model.parameters()), model, policy, tasks=2, **options)

    given = {"tasks": TASKS}
    if kind == "rewards":
        given |= {"prompts": PROMPTS, "rewards": torch.rand(4)}
    ordinary_block(lambda: oracle.make("transformer"), observer_of, step=True, **given)


def plain(model, policy=None, **options):
    return Reweighted(torch.optim.SGD(model.parameters(), 0.1), model, policy or InverseNorm(), tasks=2, **options)


MEANT = {  # the waits that docs/limits.md names: a model, an observer of it, and what the block is given
    "prompts on the device": ("mixer", METERS["examples"][0], {"prompts": PROMPTS.to("meta")}),
    "gram of an embedding": ("transformer", METERS["gram"][0], {"tasks": TASKS}),
    "a policy that solves a problem": ("mixer", lambda model: plain(model, IMTLG(), gram=True), {"tasks": TASKS}),
    "a step of another optimizer": ("mixer", plain, {"tasks": TASKS}),
}


@pytest.mark.parametrize("wait", MEANT)
def test_waits_that_are_meant(wait):
    """Each waits; who finds a way without takes it out of here and of docs/limits.md."""
    name, observer_of, given = MEANT[wait]
    case = oracle.make(name)
    there = oracle.Case(moved(case.model), case.x.to("meta"), case.y.to("meta"), case.loss)
    on_cpu, observer = observer_of(case.model), observer_of(there.model)
    for _ in range(2):
        with on_cpu.observe(**{key: PROMPTS if ids.is_meta else ids for key, ids in given.items()}):
            case.run().backward()
    meters = [one.meter if isinstance(one, Reweighted) else one for one in (on_cpu, observer)]
    meters[1].memory = meters[0].memory
    with pytest.raises((NotImplementedError, RuntimeError, AssertionError), match=r"(?i)meta tensors?|waits"):
        with NoLists(), NoWaits(), observer.observe(**given):
            there.run().backward()
        observer.step()
