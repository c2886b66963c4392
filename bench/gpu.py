"""The cases of ``run.py gpu``: Triton's and the native kernels against the library and a copy, and a training step.

Everything is compared before it is timed, and what is wrong or raises is refused, and the next is measured.
``interpret``: the same code on the CPU at tiny sizes, to see that it runs; its times mean nothing.
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
from gradnorm_ext.triton_kernels.chips import chip_of
from gradnorm_ext.triton_kernels.outer_wgrad import outer_costs, outer_method

METHODS = ("gram", "fused", "split", "grouped")
AHEAD = 4_000_000  # cycles, about 2 ms: longer than the host takes to queue a call


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

    def in_turns(
        self, calls: Mapping[str, Callable[[], object]], runs: int = 11, with_host: bool = False
    ) -> dict[str, list[float]]:
        """Seconds of each call in every run, in turns and alternating order, after one run that compiles.

        They are the device's; ``with_host``: the host's too, where the device waits for it.
        """
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for run in range(0 if self.interpret else -1, 1 if self.interpret else runs):
            for name in tuple(calls) if run % 2 else tuple(calls)[::-1]:
                taken = self._seconds(calls[name], with_host)
                if run >= 0:
                    seconds[name].append(taken)
        return seconds

    def _seconds(self, call: Callable[[], object], with_host: bool) -> float:
        if self.interpret:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        torch.empty(2**28, dtype=torch.uint8, device="cuda").zero_()  # what the last call left in the L2 cache is gone
        if not with_host:
            torch.cuda._sleep(AHEAD)  # the host has queued the whole call when the clock starts
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def with_peak(self, make: Callable[[], Callable[[], object]]) -> tuple[Callable[[], object], int]:
        """What is made, and by how much the memory is above that before at most during its third call.

        The first call of a step verifies itself, and makes the optimizer's state.
        """
        if self.interpret:
            return make(), 0
        gc.collect()
        before = torch.cuda.memory_allocated()
        step = make()
        step()
        step()
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
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


def measure(parts: Sequence[str], interpret: bool, refusals: list[str]) -> Iterator[Measured]:
    """The figures of parts of `PARTS`."""
    for part in parts:
        yield from PARTS[part](Machine(interpret), refusals)


def attempt(check: Callable[[], str | None]) -> str | None:
    """What is wrong: what the check says, or that it raised. It goes on raising where the GPU can do nothing more."""
    try:
        return check()
    except Exception as error:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return f"raised {type(error).__name__}: {str(error).partition(chr(10))[0]}"


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
Case = tuple[str, tuple[int, int], int, int]  # a layer, its shape, rows of a segment, segments
REST: tuple[Case, ...] = tuple(
    (layer, shape, *rows)
    for (layer, shape), rows in itertools.product(LAYERS.items(), ROWS)
    if math.prod(shape) * math.prod(rows) <= 2**43  # more takes seconds
)
FIRST: tuple[Case, ...] = (
    ("4096 x 4096", (4096, 4096), 2048, 8),
    ("4096 x 4096", (4096, 4096), 128, 64),
    ("2048 x 2048", (2048, 2048), 1024, 16),  # from here on as Llama 1B has them
    ("512 x 2048", (512, 2048), 1024, 16),
    ("8192 x 2048", (8192, 2048), 1024, 16),
    ("128256 x 2048", (128256, 2048), 1024, 16),
)
TINY_OUTER: tuple[Case, ...] = (("40 x 33", (40, 33), 5, 4), ("40 x 33", (40, 33), 70, 2))
GROUPS = (0, 1, 4)  # of the segments' one level: none, as norms of examples alone have; one task; four


def outer(machine: Machine, refusals: list[str], *, cases: Sequence[Case], groups: Sequence[int]) -> Iterator[Measured]:
    """Every method's time for dW and norms over the library's for dW alone, beside what was predicted."""
    line = "{:14} {:10} {:>6} {:>10} {:>8}   {:26} {:26} {:24} {:8} {}"
    titles = ("gram, fused, split, grouped", "predicted", "chosen", "best", "native: mma, wgmma, wide x plain")
    print(line.format("dW", "segments", "groups", "plain µs", "TFLOP/s", *titles))
    cases = TINY_OUTER[-len(groups) :] if machine.interpret else cases
    layers = {layer: shape for layer, shape, _, _ in cases}
    fused_wins: dict[str, list[int]] = {layer: [] for layer in layers}
    for (layer, (d, p), length, segments), count in itertools.product(cases, groups):
        if count > segments:
            continue
        name = f"{segments} x {length}" + (f", {count} groups" if count else "")
        generator = torch.Generator(machine.device).manual_seed(0)
        x, g = (
            torch.randn(segments * length, width, device=machine.device, generator=generator).to(machine.dtype)
            for width in (p, d)
        )
        ids = torch.arange(segments, device=machine.device) % max(1, count)
        levels = Groups.of(segments, [(ids, count)] if count else [], machine.device)
        of_rows = Segments.equal(segments, length, levels, machine.device)
        calls: dict[str, Callable[[], Any]] = {"plain": partial(torch.mm, g.t(), x)}
        truth = Truth.of(x, g, length, of_rows)
        of_layer = {
            "d": d,
            "p": p,
            "with_dw": True,
            "groups": (len(x) / count,) if count > 1 else (),
            "chip": chip_of(x),
        }
        predicted = outer_costs(length, equal=True, **of_layer)
        methods = [method for method in METHODS if method in predicted and (method != "grouped" or x.is_cuda)]
        tried = {method: partial(triton_kernels.outer_wgrad, x, g, of_rows, method=method) for method in methods} | {
            f"native {method}": partial(machine.native.outer_wgrad, x, g, of_rows, method=method)
            for method in machine.native_methods
        }
        for method, call in tried.items():
            if reason := attempt(partial(truth.refutes_call, call)):
                refusals.append(f"outer_wgrad, {layer}, {name}, {method}: {reason}")
            else:
                calls[method] = call
        if not count:
            calls["gram alone"] = partial(triton_kernels.outer_sqnorm, x, g, of_rows, method="gram")
        del truth
        seconds = machine.in_turns(calls)
        median = {call: statistics.median(samples) for call, samples in seconds.items()}
        ratios = {method: median[method] / median["plain"] for method in METHODS if method in median}
        rate = 2 * segments * length * d * p / median["plain"] / 1e12
        cells = [", ".join(f"{costs[m]:.2f}" if m in costs else "-" for m in METHODS) for costs in (ratios, predicted)]
        chosen, best = (
            outer_method(length, equal=True, **of_layer, impossible=tuple(m for m in METHODS if m not in methods)),
            min(ratios, key=lambda method: ratios[method], default="-"),
        )
        native = {call: median[call] / median["plain"] for call in median if call.startswith("native ")}
        cells += [chosen, best, ", ".join(f"{ratio:.2f}" for ratio in native.values()) or "-"]
        start = (layer, f"{segments} x {length}", count or "-")
        print(line.format(*start, f"{median['plain'] * 1e6:.1f}", f"{rate:.1f}", *cells), flush=True)

        size = f"{layer}, {name}"
        for one, samples in seconds.items():
            yield Measured("outer_wgrad", size, one, "microseconds", [taken * 1e6 for taken in samples])
        for method, ratio in ratios.items():
            yield Measured("outer_wgrad", size, method, "x plain dW", [ratio])
            yield Measured("outer_wgrad", size, method, "x plain dW, predicted", [predicted[method]])
        for method, ratio in native.items():
            yield Measured("outer_wgrad", size, method, "x plain dW", [ratio])
        if not count and ratios.get("fused", math.inf) < ratios.get("gram", math.inf):
            fused_wins[layer].append(length)
        if "fused" in ratios:
            yield Measured("outer_wgrad", size, "fused", "e", [1 / ratios["fused"]])
        if "gram alone" in median:  # half of the pairs of rows are needed, and counted
            pairs = segments * length**2 * (p + d)
            yield Measured("outer_sqnorm", size, "gram", "TFLOP/s", [pairs / median["gram alone"] / 1e12])
    chip = chip_of(torch.empty(0, device=machine.device))
    for layer, (d, p) in layers.items():
        by_length = ((rows, outer_costs(rows, d, p, True, True, chip=chip)) for rows in itertools.count(1))
        predicted_length = next(length for length, costs in by_length if costs["fused"] < costs["gram"])
        measured = min(fused_wins[layer], default=math.nan)
        print(
            f"{layer}: fused beats gram from {measured} rows of a segment on (of those tried), predicted {predicted_length}"
        )
        yield Measured("outer_wgrad", layer, "fused", "beats gram from rows", [measured])
        yield Measured("outer_wgrad", layer, "fused", "beats gram from rows, predicted", [predicted_length])


@dataclass(frozen=True)
class Truth:
    """Some rows of dW and the last norms: in float64, by the library, and of absolute values (what rounding is of)."""

    of_rows: tuple[Tensor, Tensor, Tensor]
    of_norms: dict[int, tuple[Tensor, Tensor, Tensor]]  # of the last segment, and of the last group, by their place

    @staticmethod
    def of(x: Tensor, g: Tensor, length: int, segments: Segments) -> Truth:
        def gradients(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            exact, size = g.double().t() @ x.double(), g.double().abs().t() @ x.double().abs()
            if x.is_cuda:
                return exact, torch.mm(g.t(), x, out_dtype=torch.float32), size
            return exact, g.float().t() @ x.float(), size

        def norm(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            exact, plain, size = (gradient.double().square().sum() for gradient in gradients(x, g))
            return exact, plain, size

        of_norms = {segments.count - 1: norm(x[-length:], g[-length:])}
        for ids, count in zip(segments.groups.levels, segments.groups.counts, strict=True):
            of_group = segments.per_row(ids) == count - 1
            of_norms[segments.columns - 1] = norm(x[of_group], g[of_group])
        return Truth(gradients(x, g[:, :256]), of_norms)

    def refutes_call(self, call: Callable[[], tuple[Tensor, Tensor]]) -> str | None:
        dw, sqnorm = call()
        norms = (off(f"norm {at}", sqnorm[at], *of_norm) for at, of_norm in self.of_norms.items())
        return off("dW", dw[:256], *self.of_rows) or next(filter(None, norms), None)


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
    **dict.fromkeys(("scale_wgrad", "bias_wgrad"), "vector"),
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
            seconds = machine.in_turns(calls)
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
        if reason := attempt(partial(wrong_operation, operation, arguments, backend)):
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
        for backend, samples in machine.in_turns(calls, with_host=True).items():
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


def llama(machine: Machine, tied: bool = False) -> Problem:
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
        model = Logits(LlamaForCausalLM(LlamaConfig(**size, tie_word_embeddings=tied)))
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


HEADS = {"": False, ", tied head": True}  # of the model


def step(machine: Machine, refusals: list[str], *, ways: Mapping[str, Sequence[str]]) -> Iterator[Measured]:
    """A training step of each way over the plain one next to it, in time and in memory; ``ways``: by the model's head."""
    line = "{:42} {:>12} {:>12} {:>12}"
    print("\n" + line.format("step", "ms", "x plain", "x memory"))
    for head, names in ways.items():
        model = partial(llama, machine, HEADS[head])
        size = ("llama, tiny" if machine.interpret else "llama 1B, 32 x 512, bfloat16") + head
        oracle = Oracle.of(model())
        plain_step, plain_peak = machine.with_peak(lambda model=model: Way(plain).step(model()))  # type: ignore[misc]
        for name in names:
            ratios: dict[str, list[float]] = {}
            if reason := attempt(partial(_time_way, name, machine, oracle, model, plain_step, ratios)):
                refusals.append(f"{name}, {size}: {reason}")
                continue
            memory = ratios.pop("peak")[0] / plain_peak if plain_peak else float("nan")
            cells = (f"{statistics.median(ratios['ms']):.1f}", f"{statistics.median(ratios['x plain']):.3f}")
            print(line.format(name + head, *cells, f"{memory:.3f}"), flush=True)
            yield Measured(name, size, "triton", "milliseconds", ratios["ms"])
            yield Measured(name, size, "triton", "time_ratio", ratios["x plain"])
            yield Measured(name, size, "triton", "memory_ratio", [memory])


def _time_way(
    name: str,
    machine: Machine,
    oracle: Oracle,
    model: Callable[[], Problem],
    plain_step: Callable[[], object],
    found: dict[str, list[float]],
) -> str | None:
    """What is wrong with its norms; else ``found`` has how long its steps take and the bytes it takes."""
    way = WAYS[name]
    if reason := oracle.refutes(way.start(model(), way.policy)[1]()["example_norm"][:2], way.linear_only):
        return reason
    way_step, peak = machine.with_peak(lambda: way.step(model()))
    seconds = machine.in_turns({"plain": plain_step, name: way_step}, 5, with_host=True)
    found["ms"] = [taken * 1e3 for taken in seconds[name]]
    found["x plain"] = [ours / theirs for ours, theirs in zip(seconds[name], seconds["plain"], strict=True)]
    found["peak"] = [float(peak)]
    return None


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


PARTS: dict[str, Callable[[Machine, list[str]], Iterator[Measured]]] = {
    "meter": partial(step, ways=dict.fromkeys(HEADS, ("meter",))),
    "step": partial(step, ways={"": tuple(WAYS)[1:], ", tied head": ("meter_tasks", "next_step_tasks")}),
    "outer": partial(outer, cases=FIRST, groups=GROUPS),
    "outer_rest": partial(outer, cases=REST, groups=GROUPS[:1]),
    "memory": memory_bound,
    "launch": launch_bound,
}
