"""The benchmarks: what each operation takes, and what a training step takes more than a plain one.

    python bench/run.py ops [--backend native ...] [--size small|all] [--threads 1]
    python bench/run.py step [--model gpt gpt512 mlp] [--variant meter ...] [--runs N] [--threads 1] [--profile VARIANT]
    python bench/run.py scale                  # DDP, FSDP2, checkpoints, autocast, and growth with the sizes
    python bench/run.py gpu step|outer|rest ... [--interpret]  # bench/gpu.sh does what comes before

Nothing is timed before its result was compared with plain torch in float64 (checks.py): what is wrong is refused, and
the exit status is then 1. What is compared is timed in turns in one process: with one thread the CPU time of the
process, which does not count who else runs on the machine; with more, wall time. Rows are appended to
results/<device>.csv as they are measured. ``--quick`` goes through everything once at tiny sizes and records nothing. On a
GPU, events are the clock, and where ``$OUT`` is set the file is written there; ``--interpret`` runs the same on the CPU, in
Triton's interpreter at tiny sizes, and records in ``$OUT`` or a temporary folder.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import dataclasses
import datetime
import gc
import importlib.metadata
import math
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from allocator import keep_freed_memory
from checks import Oracle, wrong_operation, wrong_step
from models import MODELS, QUICK, make
from operations import OPERATIONS, Operation, Size
from variants import VARIANTS

import gradnorm_ext
from gradnorm_ext import backends


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of_ops = commands.add_parser("ops", help="every operation")
    of_ops.add_argument("--backend", nargs="+", choices=("native", "reference"), help="beside reference; default: all")
    of_ops.add_argument("--size", choices=("small", "all"), default="small")
    of_step = commands.add_parser("step", help="a whole training step")
    of_step.add_argument("--model", nargs="+", choices=tuple(MODELS), default=tuple(MODELS))
    of_step.add_argument("--variant", nargs="+", choices=tuple(VARIANTS)[1:], default=tuple(VARIANTS)[1:])
    of_step.add_argument("--runs", type=int, help="pairs of steps, at least 2; default: the model's")
    of_step.add_argument(
        "--profile", choices=tuple(VARIANTS)[1:], help="only show where this variant takes longer than plain"
    )
    of_gpu = commands.add_parser("gpu", help="the Triton kernels, and a step of a large model")
    of_gpu.add_argument("part", nargs="+", choices=GPU_PARTS, help="outer: at six shapes; outer_rest: at the others")
    of_gpu.add_argument("--interpret", action="store_true", help="a dry run on the CPU")
    of_scale = commands.add_parser("scale", help="larger training: several processes, checkpoints, mixed precision")
    for command in (of_ops, of_step):
        command.add_argument("--threads", type=int, default=1)
    for command in (of_ops, of_step, of_scale):
        command.add_argument("--quick", action="store_true", help="tiny sizes, nothing is recorded")
    given = parser.parse_args()
    refusals: list[str] = []
    if given.command == "gpu":
        return finish(record_gpu(given.part, given.interpret, refusals), refusals)
    if given.command == "scale":
        figures = time_scale(given.quick, refusals)
        return finish(keep(figures, 1, given.quick), refusals)
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    if given.command == "ops":
        built = [name for name in ("native", "reference") if not isinstance(backends.load(name), str)]
        group = "quick" if given.quick else given.size
        figures = time_operations(given.backend or built, group, given.threads, refusals)
    elif given.profile:
        for model in given.model:
            print_profile(given.profile, model, given.quick)
        return 0
    else:
        figures = time_steps(given.model, given.variant, given.runs, given.threads, given.quick, refusals)
    return finish(keep(figures, given.threads, given.quick), refusals)


def keep(figures: Iterable[Figure], threads: int, quick: bool) -> Path | None:
    """Measures, and records unless it is only a smoke run."""
    if not quick:
        return record(figures, threads, device_name())
    for _ in figures:
        pass
    return None


def finish(path: Path | None, refusals: Sequence[str]) -> int:
    if path is not None:
        print(f"\nappended to {os.path.relpath(path)}")
    for refusal in refusals:
        print(f"REFUSED, not timed: {refusal}", file=sys.stderr)
    return 1 if refusals else 0


@dataclass(frozen=True)
class Figure:
    """A row of the results: the median of what was measured, and its quartiles."""

    case: str
    size: str
    backend: str
    figure: str
    median: float
    lower: float = math.nan
    upper: float = math.nan

    @staticmethod
    def of(case: str, size: str, backend: str, figure: str, samples: Sequence[float]) -> Figure:
        lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
        return Figure(case, size, backend, figure, median, lower, upper)


def time_operations(backend_names: Sequence[str], group: str, threads: int, refusals: list[str]) -> Iterator[Figure]:
    """Times every operation at every size of the group, beside a copy of as many bytes or a plain matrix product."""
    groups, quick = (("small", "all") if group == "all" else (group,)), group == "quick"
    line = "{:20} {:14} {:9} {:>11} {:>15} {:>16} {:>12}"
    print(line.format("operation", "size", "backend", "µs", "rate", "of the machine's", "x reference"))
    for operation, size in ((o, s) for o in OPERATIONS for s in o.sizes if s.group in groups):
        arguments = operation.arguments(size, torch.Generator().manual_seed(0))
        limit, call, work, unit = machine_limit(operation, size, arguments)
        calls: dict[str, Callable[[], object]] = {limit: call}
        for backend in dict.fromkeys((*backend_names, "reference")):
            if reason := wrong_operation(operation, arguments, backend):
                refusals.append(f"{operation.name}, {size.name}, {backend}: {reason}")
                print(line.format(operation.name, size.name, backend, "REFUSED", "", "", "").rstrip(), flush=True)
            else:
                calls[backend] = partial(operation.run, arguments, backend)
        seconds = in_turns(calls, 3 if quick else 15, threads, at_least=0 if quick else 2e-3)
        medians = {name: statistics.median(samples) for name, samples in seconds.items()}
        for name, median in medians.items():
            rate, of_limit = f"{work / median / 1e9:.4g} {unit}", f"{medians[limit] / median:.0%} of {limit}"
            against = f"{medians['reference'] / median:.2f}" if "reference" in medians else ""
            cells = (f"{median * 1e6:.1f}", rate, of_limit, against)
            print(line.format(operation.name, size.name, name, *cells).rstrip(), flush=True)
            microseconds = [one * 1e6 for one in seconds[name]]
            yield Figure.of(operation.name, size.name, name, "microseconds", microseconds)


def machine_limit(
    operation: Operation, size: Size, arguments: dict[str, Any]
) -> tuple[str, Callable[[], object], int, str]:
    """What the machine does of the same work at best: its name, the call, the work and its unit."""
    if operation.bytes is None:
        product = partial(torch.matmul, arguments["g"].t(), arguments["x"])
        return "matmul", product, 2 * size.rows * size.inputs * size.outputs, "GFLOP/s"
    target, source = torch.ones(2, operation.bytes(size) // 8)  # float32: one half is read, the other written
    return "copy", partial(target.copy_, source), operation.bytes(size), "GB/s"


def time_steps(
    models: Sequence[str], variants: Sequence[str], runs: int | None, threads: int, quick: bool, refusals: list[str]
) -> Iterator[Figure]:
    """Times each variant's step in pairs with the plain one on every model, and compares their memory.

    A ratio of times is the median over the pairs, with the quartiles in brackets. A ratio of memory is that of two
    `peak_bytes`; the table shows the worst of the models.
    """
    backend = backends.find("outer_wgrad", "cpu", backends.choose("auto")).__module__.rpartition(".")[2]
    kinds = () if sys.platform != "linux" else ("memory",) if quick else ("memory", "resident")
    weighed = models[:1] if quick else models  # a process takes a second
    line = "{:18}" + " {:32}" * len(models) + " {:20}" * len(kinds)
    titles = [(QUICK if quick else MODELS)[model].title for model in models]
    print(line.format("x plain step", *titles, *kinds).rstrip())
    oracles = {model: Oracle.of(make(model, quick=quick)) for model in models}
    plain = {
        (model, kind): peak_in_fresh_process(model, "plain", kind, threads, quick)
        for model in weighed
        for kind in kinds
    }
    for name in variants:
        variant = VARIANTS[name]
        bounds = {} if quick else dict(zip((*MODELS, "memory"), variant.bounds, strict=False))
        cells, memory = [], []
        for model in models:
            if reason := wrong_step(variant, make(model, quick=quick), oracles[model]):
                refusals.append(f"{name}, {model}: {reason}")
                cells.append("REFUSED")
                continue
            pair = {one: VARIANTS[one].step(make(model, quick=quick)) for one in ("plain", name)}
            seconds = in_turns(pair, runs or (QUICK if quick else MODELS)[model].runs, threads)
            ratios = [ours / theirs for ours, theirs in zip(seconds[name], seconds["plain"], strict=True)]
            figure = Figure.of(name, model, backend, "time_ratio", ratios)
            yield figure
            cells.append(verdict(figure, bounds.get(model)))
            for kind in kinds if model in weighed else ():
                peak = peak_in_fresh_process(model, name, kind, threads, quick)
                memory.append(Figure(name, model, backend, f"{kind}_ratio", peak / plain[model, kind]))
        yield from memory
        for kind in kinds:
            worst = max(
                (one for one in memory if one.figure == f"{kind}_ratio"), key=lambda one: one.median, default=None
            )
            cells.append(verdict(worst, bounds.get("memory")) if worst else "REFUSED")
        print(line.format(name, *cells).rstrip(), flush=True)


def verdict(figure: Figure, bound: float | None) -> str:
    spread = "" if math.isnan(figure.lower) else f" [{figure.lower:.3f} {figure.upper:.3f}]"
    met = "" if bound is None else f" {'meets' if figure.median <= bound else 'MISSES'} {bound:.2f}"
    return f"{figure.median:.3f}{spread}{met}"


def in_turns(
    calls: Mapping[str, Callable[[], object]], runs: int, threads: int, at_least: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of each call in every run, in turns and alternating order; calls are repeated for ``at_least`` seconds.

    Two runs before the first that counts load what is loaded lazily; the first observed block also verifies itself.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    repeats = dict.fromkeys(calls, 1)
    for run in range(-2, runs):
        for name in tuple(calls) if run % 2 else tuple(calls)[::-1]:
            start = clock()
            for _ in range(repeats[name]):
                calls[name]()
            taken = (clock() - start) / repeats[name]
            if run >= 0:
                seconds[name].append(taken)
            elif run == -1:
                repeats[name] = max(1, math.ceil(at_least / max(taken, 1e-7)))
    return seconds


def peak_bytes(model: str, variant: str, kind: str, threads: int, quick: bool) -> int:
    """By how much this process's resident memory grows from before the model is built to its peak during five steps.

    Linux with glibc only. The peak is VmHWM of /proc/self/status, after writing 5 to /proc/self/clear_refs, which
    resets it (where that is not allowed, the peak of the imports stands). A tiny step before loads what loads lazily.

    "memory" is what is in use: blocks from 128 KiB on are mapped one by one, hence resident only while they are held.
    "resident" is what the allocator makes of it by default: its threshold grows to the largest block that was freed,
    smaller ones come from a heap with gaps, and the figure moves by a tenth with the order in which they were freed.
    """
    m_mmap_threshold = -3  # of <malloc.h>; setting it also keeps it from growing
    if kind == "memory":
        ctypes.CDLL(None).mallopt(m_mmap_threshold, 128 * 1024)
    torch.set_num_threads(threads)
    VARIANTS[variant].step(make(model, quick=True))()
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step = VARIANTS[variant].step(make(model, quick=quick))
    for _ in range(5):
        step()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def peak_in_fresh_process(*arguments: Any) -> int:
    """`peak_bytes` in a process of its own, forked from a server that has imported torch and done nothing else."""
    fresh = multiprocessing.get_context("forkserver")
    fresh.set_forkserver_preload(["torch._dynamo", "gradnorm_ext"])  # an optimizer's first step imports _dynamo
    with ProcessPoolExecutor(1, mp_context=fresh) as process:
        return process.submit(peak_bytes, *arguments).result()


SCALE_BOUNDS = {"ddp_meter": 1.08, "fsdp2_meter": 1.08}  # of the time of a plain step
MOST_BYTES = 1024  # per task and step, of what "unbiased" figures send
MOST_GROWTH = 1.1  # exponent of the time that measuring adds: linear in rows, layers and tasks, or less


def time_scale(quick: bool, refusals: list[str]) -> Iterator[Figure]:
    """Times what `scale.py` has: ratios of wall times to the plain step, bytes sent, and growth."""
    import scale

    for case, size, figure, samples in scale.measure(quick, refusals):
        one = (
            Figure.of(case, size, "auto", figure, samples)
            if len(samples) > 1
            else Figure(case, size, "auto", figure, samples[0])
        )
        bound = None if quick else SCALE_BOUNDS.get(case) if figure == "time_ratio" else None
        if figure == "bytes_per_task" and not case.endswith("exact"):
            bound = float(MOST_BYTES)
        if figure == "exponent" and not quick:
            bound = MOST_GROWTH
        print(f"{case:33} {size:14} {figure:16} {verdict(one, bound)}", flush=True)
        yield one


def print_profile(variant: str, model: str, quick: bool) -> None:
    """Where a step of a variant spends more time than the plain one, or less: medians of profiles in turns.

    An operation's time is its own, without those it calls; a Function's is that of its Python, and of freeing memory.
    """
    steps = {one: VARIANTS[one].step(make(model, quick=quick)) for one in ("plain", variant)}
    spent: dict[str, list[dict[str, float]]] = {one: [] for one in steps}
    for run in range(-2, 5):
        for one, step in steps.items():
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                step()
            if run >= 0:
                spent[one].append({event.key: event.self_cpu_time_total / 1e3 for event in profile.key_averages()})
    names = {name for profiles in spent.values() for profile in profiles for name in profile}
    medians = {
        name: [statistics.median(profile.get(name, 0.0) for profile in spent[one]) for one in steps] for name in names
    }
    whole = [sum(times) for times in zip(*medians.values(), strict=True)]
    line = "{:50} {:>10} {:>10} {:>11}"
    print(line.format(f"{model}, ms of a step", "plain", variant[:10], "difference"))
    for name, (plain, ours) in [
        ("all", whole),
        *sorted(medians.items(), key=lambda row: -abs(row[1][1] - row[1][0]))[:20],
    ]:
        print(line.format(name[:50], f"{plain:.2f}", f"{ours:.2f}", f"{ours - plain:+.2f}"))


GPU_PARTS = ("meter", "step", "outer", "outer_rest", "memory", "launch")


def record_gpu(parts: Sequence[str], interpret: bool, refusals: list[str]) -> Path:
    """Measures parts of what `gpu.py` has and appends them to the results of the GPU, or of nothing, in a dry run."""
    import gpu  # needs triton

    if interpret == torch.cuda.is_available():
        raise SystemExit("run.py gpu: --interpret is for machines without a GPU, and needed there")
    if interpret and backends.choose("auto") != "triton":
        raise SystemExit("run.py gpu: --interpret needs TRITON_INTERPRET=1 GRADNORM_BACKEND=triton; run bench/gpu.sh")

    def figures() -> Iterator[Figure]:
        for one in gpu.measure(parts, interpret, refusals):
            what = (one.case, one.size, one.backend, one.figure)
            yield Figure.of(*what, one.samples) if len(one.samples) > 1 else Figure(*what, one.samples[0])

    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else Path(tempfile.mkdtemp()) if interpret else None
    device = "dry run" if interpret else torch.cuda.get_device_name()
    versions = f"{torch.__version__}, triton {importlib.metadata.version('triton')}"
    return record(figures(), torch.get_num_threads(), device, versions, folder)


def record(
    figures: Iterable[Figure], threads: int, device: str, versions: str = torch.__version__, folder: Path | None = None
) -> Path:
    """Appends each figure to the results of this device as soon as it is there: what was measured outlives a crash."""
    path = (folder or RESULTS) / f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.csv"
    common = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "threads": threads,
        "torch": versions,
        "gradnorm_ext": ", ".join([gradnorm_ext.__version__, *cpu_product()]),
        "commit": git("rev-parse", "--short", "HEAD") or "none",
        "dirty": bool(git("status", "--porcelain")),
    }
    path.parent.mkdir(exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*common, *(field.name for field in dataclasses.fields(Figure))])
        if new:
            writer.writeheader()
        for figure in figures:
            writer.writerow(common | dataclasses.asdict(figure))
            file.flush()
    return path


def cpu_product() -> list[str]:
    """The instructions of the native products on the CPU (GRADNORM_CPU_PRODUCT), if they are built."""
    native = backends.load("native")
    return [] if isinstance(native, str) else [native._C.cpu_product]


def device_name() -> str:
    """The CPU's model, and how many cores there are."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{found[1] if found else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(RESULTS.parent), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


RESULTS = Path(__file__).parent / "results"

if __name__ == "__main__":
    sys.exit(main())
