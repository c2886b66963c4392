"""The cases of ``run.py gpu``: Triton's and the native kernels against the library and a copy, and a training step.

Everything is compared before it is timed, and what is wrong is refused. ``interpret``: the same code on the CPU at tiny
sizes, to see that it runs; its times mean nothing.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from checks import EPSILON, beyond, example_loss, wrong_operation
from models import TASKS, Problem
from operations import OPERATIONS, Size
from torch import Tensor, nn
from variants import Training, Variant, adamw, metered, plain, reweighted

from gradnorm_ext import backends, triton_kernels
from gradnorm_ext.policies import ClipExamples, InverseNorm
from gradnorm_ext.segments import Groups, Segments
from gradnorm_ext.triton_kernels.outer_wgrad import outer_costs, outer_method

METHODS = ("gram", "fused", "split")


@dataclass(frozen=True)
class Measured:
    """One figure: its samples, or the one number that it is."""

    case: str
    size: str
    backend: str
    figure: str
    samples: Sequence[float]


@dataclass(frozen=True)
class Machine:
    """Where it runs: a GPU, or the interpreter on the CPU."""

    interpret: bool

    @property
    def device(self) -> str:
        return "cpu" if self.interpret else "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.interpret else torch.bfloat16  # the interpreter has bfloat16 products wrong

    @property
    def runs(self) -> int:
        return 2 if self.interpret else 11

    def in_turns(self, calls: Mapping[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
        """Seconds of each call in every run, in turns and alternating order, after one run that compiles."""
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for run in range(-1, runs):
            for name in tuple(calls) if run % 2 else tuple(calls)[::-1]:
                taken = self._seconds(calls[name])
                if run >= 0:
                    seconds[name].append(taken)
        return seconds

    def _seconds(self, call: Callable[[], object]) -> float:
        if self.interpret:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        # What the last call left in the L2 cache is gone, and the host is ahead of the device when the clock starts.
        torch.empty(2**28, dtype=torch.uint8, device="cuda").zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def with_peak(self, make: Callable[[], Callable[[], object]]) -> tuple[Callable[[], object], int]:
        """What is made, and by how much the memory grew at most while it was made and called three times."""
        if self.interpret:
            return make(), 0
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step = make()
        for _ in range(3):
            step()
        return step, torch.cuda.max_memory_allocated() - before

    @property
    def native(self) -> Any:
        """The CUDA kernels, where this build has them and a GPU is there to run them; else None."""
        module = backends.load("native")
        if self.interpret or isinstance(module, str) or "cuda" not in module.DEVICES:
            return None
        return module.DEVICE_MODULES["cuda"]

    @property
    def native_methods(self) -> tuple[str, ...]:
        """Of its outer product."""
        if self.native is None:
            return ()
        hopper = torch.cuda.get_device_capability()[0] == 9
        return tuple(m for m in self.native.METHODS if m == "mma" or (hopper and self.native.has_wgmma()))


def measure(interpret: bool, refusals: list[str]) -> Iterator[Measured]:
    """All figures: the outer form's methods, what is bound by memory, what is bound by its launch, a training step."""
    machine = Machine(interpret)
    yield from outer(machine, refusals)
    yield from memory_bound(machine, refusals)
    yield from launch_bound(machine, refusals)
    yield from step(machine, refusals)


LAYERS = {
    "4096 x 4096": (4096, 4096),
    "14336 x 4096": (14336, 4096),
    "8192 x 2048": (8192, 2048),
    "head": (128256, 4096),
}
ROWS = (
    (128, 64),
    (512, 1),
    (512, 32),
    (1024, 16),
    (2048, 1),
    (2048, 8),
    (8192, 1),
    (8192, 4),
)  # of a segment, segments


def outer(machine: Machine, refusals: list[str]) -> Iterator[Measured]:
    """Every method's time for dW and norms over the library's for dW alone, beside what was predicted."""
    line = "{:14} {:10} {:>10} {:>8}   {:24} {:24} {:8} {:8} {}"
    titles = ("gram, fused, split x plain", "predicted", "chosen", "best", "native: mma, wgmma, wide x plain")
    print(line.format("dW", "segments", "plain µs", "TFLOP/s", *titles))
    layers = {"40 x 33": (40, 33)} if machine.interpret else LAYERS
    rows = ((5, 3), (70, 2)) if machine.interpret else ROWS
    fused_wins: dict[str, list[int]] = {layer: [] for layer in layers}
    for (layer, (d, p)), (length, segments) in itertools.product(layers.items(), rows):
        if segments * length * d * p > 2**43:  # seconds
            continue
        name = f"{segments} x {length}"
        generator = torch.Generator(machine.device).manual_seed(0)
        x, g = (
            torch.randn(segments * length, width, device=machine.device, generator=generator).to(machine.dtype)
            for width in (p, d)
        )
        of_rows = Segments.equal(segments, length, device=machine.device)
        calls: dict[str, Callable[[], object]] = {"plain": partial(torch.mm, g.t(), x)}
        truth = Truth.of(x, g, length)
        for method in METHODS:
            call = partial(triton_kernels.outer_wgrad, x, g, of_rows, method=method)
            if reason := truth.refutes(*call()):
                refusals.append(f"outer_wgrad, {layer}, {name}, {method}: {reason}")
            else:
                calls[method] = call
        for method in machine.native_methods:
            call = partial(machine.native.outer_wgrad, x, g, of_rows, method=method)
            if reason := truth.refutes(*call()):
                refusals.append(f"outer_wgrad, {layer}, {name}, native {method}: {reason}")
            else:
                calls[f"native {method}"] = call
        calls["gram alone"] = partial(triton_kernels.outer_sqnorm, x, g, of_rows, method="gram")
        del truth
        seconds = machine.in_turns(calls, machine.runs)
        median = {call: statistics.median(samples) for call, samples in seconds.items()}
        ratios = {method: median[method] / median["plain"] for method in METHODS if method in median}
        predicted = outer_costs(length, d, p, with_dw=True, equal=True)
        rate = 2 * segments * length * d * p / median["plain"] / 1e12
        cells = [", ".join(f"{costs[m]:.2f}" if m in costs else "-" for m in METHODS) for costs in (ratios, predicted)]
        chosen, best = (
            outer_method(length, d, p, True, True),
            min(ratios, key=lambda method: ratios[method], default="-"),
        )
        native = {call: median[call] / median["plain"] for call in median if call.startswith("native ")}
        cells += [chosen, best, ", ".join(f"{ratio:.2f}" for ratio in native.values()) or "-"]
        print(line.format(layer, name, f"{median['plain'] * 1e6:.1f}", f"{rate:.1f}", *cells), flush=True)

        size = f"{layer}, {name}"
        for one, samples in seconds.items():
            yield Measured("outer_wgrad", size, one, "microseconds", [taken * 1e6 for taken in samples])
        for method, ratio in ratios.items():
            yield Measured("outer_wgrad", size, method, "x plain dW", [ratio])
            yield Measured("outer_wgrad", size, method, "x plain dW, predicted", [predicted[method]])
        for method, ratio in native.items():
            yield Measured("outer_wgrad", size, method, "x plain dW", [ratio])
        if ratios.get("fused", math.inf) < ratios.get("gram", math.inf):
            fused_wins[layer].append(length)
        if "fused" in ratios:
            yield Measured("outer_wgrad", size, "fused", "e", [1 / ratios["fused"]])
        # Half of the pairs of rows are needed, and counted.
        pairs = segments * length**2 * (p + d)
        yield Measured("outer_sqnorm", size, "gram", "TFLOP/s", [pairs / median["gram alone"] / 1e12])
    for layer, (d, p) in layers.items():
        by_length = ((length, outer_costs(length, d, p, with_dw=True, equal=False)) for length in itertools.count(1))
        predicted_length = next(length for length, costs in by_length if costs["fused"] < costs["gram"])
        measured = min(fused_wins[layer], default=math.nan)
        print(
            f"{layer}: fused beats gram from {measured} rows of a segment on (of those tried), predicted {predicted_length}"
        )
        yield Measured("outer_wgrad", layer, "fused", "beats gram from rows", [measured])
        yield Measured("outer_wgrad", layer, "fused", "beats gram from rows, predicted", [predicted_length])


@dataclass(frozen=True)
class Truth:
    """Some rows of dW and the last segment's norm: in float64, by the library, and of absolute values (what rounding is of)."""

    of_rows: tuple[Tensor, Tensor, Tensor]
    of_norm: tuple[Tensor, Tensor, Tensor]

    @staticmethod
    def of(x: Tensor, g: Tensor, length: int) -> Truth:
        def gradients(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            exact, size = g.double().t() @ x.double(), g.double().abs().t() @ x.double().abs()
            if x.is_cuda:
                return exact, torch.mm(g.t(), x, out_dtype=torch.float32), size
            return exact, g.float().t() @ x.float(), size

        last = gradients(x[-length:], g[-length:])
        exact, plain, size = (gradient.double().square().sum() for gradient in last)
        return Truth(gradients(x, g[:, :256]), (exact, plain, size))

    def refutes(self, dw: Tensor, sqnorm: Tensor) -> str | None:
        return off("dW", dw[:256], *self.of_rows) or off("the last norm", sqnorm[-1], *self.of_norm)


def off(what: str, found: Tensor, exact: Tensor, plain: Tensor, size: Tensor) -> str | None:
    """The rule of tests/test_ops.py: twice the error of plain torch, or twice a rounding of what is added up."""
    errors = [float((one.double() - exact).abs().max()) for one in (found, plain)]
    return beyond(what, errors[0], 2 * max(errors[1], EPSILON * float(size.max())))


SIZES = {  # of at least 64 MB
    "lookup": (Size("gpu", "llama tokens", 32, 512, 32000, 2048),),
    "vector": (Size("gpu", "llama norm", 32, 512, 2048, 2048), Size("gpu", "one long segment", 1, 32768, 1024, 1024)),
    "rewards": (Size("gpu", "a million prompts", 2**20, 8, 1, 1),),
}
TINY = {"lookup": (Size("gpu", "tiny", 2, 3, 5, 7),), "vector": (Size("gpu", "tiny", 2, 3, 7, 7),)}
TINY["rewards"] = (Size("gpu", "tiny", 2, 3, 1, 1),)
KINDS = {  # of the operations that Triton has, and that move more than they compute
    **dict.fromkeys(("lookup_sqnorm", "lookup_wgrad"), "lookup"),
    **dict.fromkeys(("product_wgrad", "sum_wgrad"), "vector"),
    "segment_std": "rewards",
}


def memory_bound(machine: Machine, refusals: list[str]) -> Iterator[Measured]:
    """The operations that read and write: their rate beside that of a copy of as many bytes."""
    line = "{:16} {:20} {:10} {:>10} {:>10} {:>10}"
    print("\n" + line.format("operation", "size", "backend", "µs", "GB/s", "x copy"))
    sizes = TINY if machine.interpret else SIZES
    for operation in OPERATIONS:
        if operation.name not in KINDS:
            continue
        assert operation.bytes is not None
        for size in sizes[KINDS[operation.name]]:
            arguments = on(machine.device, operation.arguments(size, torch.Generator().manual_seed(0)))
            target, source = torch.ones(2, operation.bytes(size) // 8, device=machine.device)
            calls: dict[str, Callable[[], object]] = {"copy": partial(target.copy_, source)}
            calls |= right_calls(machine, operation, arguments, size.name, refusals)
            seconds = machine.in_turns(calls, machine.runs)
            median = {call: statistics.median(samples) for call, samples in seconds.items()}
            for backend in list(calls)[1:]:
                rate = operation.bytes(size) / median[backend] / 1e9
                cells = (f"{median[backend] * 1e6:.1f}", f"{rate:.0f}", f"{median['copy'] / median[backend]:.2f}")
                print(line.format(operation.name, size.name, backend, *cells), flush=True)
            for call, samples in seconds.items():
                yield Measured(operation.name, size.name, call, "microseconds", [one * 1e6 for one in samples])


def right_calls(
    machine: Machine, operation: Any, arguments: dict[str, Any], size: str, refusals: list[str]
) -> dict[str, Callable[[], object]]:
    """The operation by every backend that has kernels for it and has it right."""
    calls: dict[str, Callable[[], object]] = {}
    for backend in ("triton",) if machine.native is None else ("triton", "native"):
        if reason := wrong_operation(operation, arguments, backend):
            refusals.append(f"{operation.name}, {size}, {backend}: {reason}")
        else:
            calls[backend] = partial(operation.run, arguments, backend)
    return calls


SMALL = {  # of a layer, in a batch of 8 x 128 tokens
    "lookup": Size("gpu", "gpt tokens", 8, 128, 4096, 256),
    "vector": Size("gpu", "gpt norm", 8, 128, 256, 256),
    "rewards": Size("gpu", "64 prompts", 64, 8, 1, 1),
}


def launch_bound(machine: Machine, refusals: list[str]) -> Iterator[Measured]:
    """The same operations where they are small: microseconds a call in a queue of calls, the host's work included."""
    line = "{:16} {:20} {:10} {:>10}"
    print("\n" + line.format("operation", "size", "backend", "µs a call"))
    queue = 1 if machine.interpret else 100
    for operation in OPERATIONS:
        if operation.name not in KINDS:
            continue
        kind = KINDS[operation.name]
        size = TINY[kind][0] if machine.interpret else SMALL[kind]
        arguments = on(machine.device, operation.arguments(size, torch.Generator().manual_seed(0)))
        calls = {
            backend: partial(_repeat, call, queue)
            for backend, call in right_calls(machine, operation, arguments, size.name, refusals).items()
        }
        for backend, samples in machine.in_turns(calls, machine.runs).items():
            of_call = [one * 1e6 / queue for one in samples]
            print(line.format(operation.name, size.name, backend, f"{statistics.median(of_call):.1f}"), flush=True)
            yield Measured(operation.name, size.name, backend, "microseconds a call, queued", of_call)


def _repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def on(device: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an operation on a device; segments are equally long and have no groups."""

    def moved(value: Any) -> Any:
        if isinstance(value, Segments):
            assert value.length is not None
            return Segments.equal(value.count, value.length, Groups.of(value.count, device=device), device)
        return value.to(device) if isinstance(value, Tensor) else value

    return {name: moved(value) for name, value in arguments.items()}


class Logits(nn.Module):
    """A causal language model of transformers as a function from ids to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids, use_cache=False).logits
        return logits


def llama(machine: Machine) -> Problem:
    """About a billion parameters and 16384 tokens, in bfloat16; tiny and in float32 for the interpreter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {
        **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 32000},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 512},
    }
    examples, length = 32, 512
    if machine.interpret:
        size |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 19}
        size |= {"num_attention_heads": 2, "num_key_value_heads": 1}
        examples, length = 4, 5
    with torch.device(machine.device):
        model = Logits(LlamaForCausalLM(LlamaConfig(**size, tie_word_embeddings=False)))
    model.to(torch.float32 if machine.interpret else torch.bfloat16)
    ids, targets = torch.randint(size["vocab_size"], (2, examples, length), device=machine.device)
    return Problem(model, ids, targets, torch.arange(examples, device=machine.device) % TASKS, 1.0)


class _Linear(torch.autograd.Function):
    """A linear layer that notes its examples' squared norms in plain torch, by either of two well-known ways."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, noted: list[Tensor], by_pairs: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.noted, ctx.by_pairs = noted, by_pairs
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        if ctx.by_pairs:  # ghost norms, the [T, T] products written out
            dw = g.flatten(0, 1).t() @ x.flatten(0, 1)
            products = (x @ x.mT).float() * (g @ g.mT).float()
            ctx.noted.append(products.sum((1, 2)))
        else:  # every example's gradient, all of them in memory
            of_example = g.mT @ x
            dw = of_example.sum(0)
            ctx.noted.append(of_example.float().square().sum((1, 2)))
        return g @ weight, dw, None, None


def in_plain_torch(problem: Problem, _: Any, *, by_pairs: bool) -> Training:
    """The norms of the linear layers alone, as one would write it without this package."""
    noted: list[Tensor] = []
    for module in problem.model.modules():
        if isinstance(module, nn.Linear):
            module.forward = lambda x, weight=module.weight: _Linear.apply(x, weight, noted, by_pairs)  # type: ignore[method-assign, misc, no-untyped-call]

    def backward() -> dict[str, Tensor]:
        noted.clear()
        problem.losses().mean().backward()
        return {"example_norm": torch.stack(noted).sum(0).sqrt()}

    return adamw(problem), backward


@dataclass(frozen=True)
class Way:
    """A way to train; ``linear_only``: its norms are those of the linear layers."""

    start: Callable[[Problem, Any], Training]
    policy: Any = None
    linear_only: bool = False

    def step(self, problem: Problem) -> Callable[[], None]:
        return Variant(self.start, lambda _: self.policy).step(problem)


WAYS = {
    "meter": Way(metered),
    "meter_tasks": Way(partial(metered, tasks=TASKS)),
    "same_step_examples": Way(partial(reweighted, apply="same_step"), ClipExamples(1.0)),
    "same_step_tasks": Way(partial(reweighted, apply="same_step", tasks=TASKS), InverseNorm()),
    "next_step_tasks": Way(partial(reweighted, apply="next_step", tasks=TASKS), InverseNorm()),
    "T x T products": Way(partial(in_plain_torch, by_pairs=True), linear_only=True),
    "bmm and reduction": Way(partial(in_plain_torch, by_pairs=False), linear_only=True),
}


def step(machine: Machine, refusals: list[str]) -> Iterator[Measured]:
    """A training step of each way over the plain one next to it, in time and in peak memory."""
    line = "{:20} {:>12} {:>12} {:>12}"
    print("\n" + line.format("step", "ms", "x plain", "x memory"))
    size = "llama, tiny" if machine.interpret else "llama 1B, 32 x 512, bfloat16"
    norms_of = {name: way.start(llama(machine), way.policy)[1]()["example_norm"][:2] for name, way in WAYS.items()}
    oracle = Oracle.of(llama(machine))
    right = {}
    for name, way in WAYS.items():
        if reason := oracle.refutes(norms_of[name], way.linear_only):
            refusals.append(f"{name}, {size}: {reason}")
        else:
            right[name] = way
    plain_step, plain_peak = machine.with_peak(lambda: Way(plain).step(llama(machine)))
    for name, way in right.items():
        way_step, peak = machine.with_peak(lambda way=way: way.step(llama(machine)))  # type: ignore[misc]
        seconds = machine.in_turns({"plain": plain_step, name: way_step}, 2 if machine.interpret else 5)
        del way_step
        ratios = [ours / theirs for ours, theirs in zip(seconds[name], seconds["plain"], strict=True)]
        median = statistics.median(ratios)
        memory = peak / plain_peak if plain_peak else float("nan")
        print(
            line.format(name, f"{statistics.median(seconds[name]) * 1e3:.1f}", f"{median:.3f}", f"{memory:.3f}"),
            flush=True,
        )
        yield Measured(name, size, "triton", "time_ratio", ratios)
        yield Measured(name, size, "triton", "memory_ratio", [memory])


@dataclass(frozen=True)
class Oracle:
    """Of the first two examples, by autograd one at a time in float64: norms, and by how much the model's dtype is off."""

    norm: dict[bool, Tensor]  # of the linear layers alone, and of all parameters
    slack: dict[bool, Tensor]

    @staticmethod
    def of(problem: Problem) -> Oracle:
        linear = {id(module.weight) for module in problem.model.modules() if isinstance(module, nn.Linear)}
        is_linear = [id(parameter) in linear for parameter in problem.model.parameters()]
        squares: dict[bool, list[Tensor]] = {True: [], False: []}
        exact_problem = problem.double()
        for b in (0, 1):
            exact, plain = (
                torch.autograd.grad(example_loss(one, b), list(one.model.parameters()))
                for one in (exact_problem, problem)
            )
            both = torch.stack(
                [torch.stack([e.square().sum(), (p - e).square().sum()]) for e, p in zip(exact, plain, strict=True)]
            )
            squares[True].append(both[torch.tensor(is_linear, device=both.device)].sum(0).sqrt())
            squares[False].append(both.sum(0).sqrt())
        stacked = {linear_only: torch.stack(of, 1) for linear_only, of in squares.items()}
        return Oracle(*({linear_only: both[i] for linear_only, both in stacked.items()} for i in (0, 1)))

    def refutes(self, norms: Tensor, linear_only: bool) -> str | None:
        norm, slack = self.norm[linear_only], self.slack[linear_only]
        error, allowed = (norms - norm).abs(), 2 * slack + EPSILON * norm
        worst = int((error / allowed).argmax())
        return beyond(f"example_norm[{worst}]", float(error[worst]), float(allowed[worst]))
