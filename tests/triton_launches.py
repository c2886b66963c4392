"""``python triton_launches.py 90``: what the Triton backend launches, compiled for sm_90 without a GPU, as JSON.

Operations run on the CPU with their launches recorded and not carried out: it is the launcher that chooses every shape and
constant, and Triton's own rules that say which launches are one kernel. A process of its own, without TRITON_INTERPRET,
because the tests' process interprets kernels. Prints the kernels, and the names of those that only other lengths need.
"""

import collections
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import machine_code
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from gradnorm_ext import triton_kernels
from gradnorm_ext.segments import Groups, Segments
from gradnorm_ext.triton_kernels import outer_fused, outer_pairs
from gradnorm_ext.triton_kernels.chips import Chip

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTIONS = ("HGMMA", "HMMA", "UTCHMMA")
ATOMICS = ("ATOM", "ATOMG", "RED", "REDG")  # in global memory


class Recorder:
    """Takes the place of a launch: notes which kernel it needs."""

    def __init__(self, target: GPUTarget) -> None:
        self.target, self.backend = target, make_backend(target)
        self.kernels: dict[str, tuple[JITFunction, tuple]] = {}

    def __call__(self, kernel: JITFunction, *args, grid, warmup, **kwargs) -> None:
        bind = create_function_from_signature(kernel.signature, kernel.params, self.backend)
        bound, specialization, options = bind(*args, **kwargs)
        packed = kernel._pack_args(self.backend, kwargs, bound, specialization, options)
        self.kernels[f"{kernel.__name__} {specialization} {options}"] = kernel, packed

    def compiled(self) -> list[dict]:
        return [self._resources(kernel, *packed) for kernel, packed in self.kernels.values()]

    def _resources(self, kernel, options, signature, constants, attributes) -> dict:
        source = ASTSource(kernel, signature, constants, attributes)
        names = [parameter.name for parameter in kernel.params]
        given = {names[path[0]]: str(value) for path, value in constants.items() if names[path[0]].isupper()}
        types = [t for t in signature.values() if t.startswith(("*", "tensordesc"))][:2]
        of_kernel = {"name": kernel.__name__, "types": types, "given": given}
        try:
            done = triton.compile(source, target=self.target, options=options.__dict__)
        except Exception as error:
            return of_kernel | {"error": f"{type(error).__name__}: {error}"[:300]}
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(done.asm["cubin"])
            cubin.flush()
            usage = subprocess.check_output(
                [TOOLS / "cuobjdump", "-res-usage", cubin.name], text=True, stderr=subprocess.DEVNULL
            )
            code = subprocess.check_output([TOOLS / "nvdisasm", "-c", cubin.name], text=True, stderr=subprocess.DEVNULL)
        found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
        counts = collections.Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z]+)", code, re.M))
        machine = machine_code.Code.of(code)
        return {
            **of_kernel,
            **{"registers": int(found[1]), "stack": int(found[2]) + int(found[3]), "shared": done.metadata.shared},
            **{name: counts[name] for name in INSTRUCTIONS},
            "atomics": sum(counts[name] for name in ATOMICS),
            "ahead": machine_code.copies_ahead(done.asm["ttgir"]),
            "step": machine.round_trip(),
            "touched_in_flight": machine.touched_in_flight(),
        }


def groups_of(count: int, levels: int) -> Groups:
    ids = torch.arange(count)
    return Groups.of(count, [(ids // 2, (count + 1) // 2), (ids // 4, (count + 3) // 4)][2 - levels :])


def outer(dtype: torch.dtype, length: int, levels: int = 0, d: int = 384, p: int = 256, ragged: bool = False, **given):
    """A linear layer's gradient and norms, on eight segments; ``norms_alone``: without the gradient."""
    x, g = torch.zeros(8 * length, p, dtype=dtype), torch.zeros(8 * length, d, dtype=dtype)
    groups = groups_of(8, levels)
    segments = Segments.equal(8, length, groups)
    if ragged:
        segments = Segments.from_lengths(torch.full((8,), length), groups)
    if given.pop("norms_alone", False):
        triton_kernels.outer_sqnorm(x, g, segments, **given)
    else:
        triton_kernels.outer_wgrad(x, g, segments, **given)


def everything(scale: int) -> None:
    """Every operation, with segments ``scale`` times as long as they are at least."""
    length, weight = 80 * scale, torch.ones(8)
    by_group = {"outputs": groups_of(8, 1).levels[-1], "n_outputs": 2}
    for levels, ragged in itertools.product((0, 1, 2), (False, True)):
        of_levels = {"levels": levels, "ragged": ragged, "method": "fused"}
        outer(torch.bfloat16, length, **of_levels, out=torch.zeros(384, 256, dtype=torch.bfloat16))
        outer(torch.bfloat16, length, **of_levels, weight=weight)
        outer(torch.float16, length, **of_levels, out=torch.zeros(384, 256), accumulate=True)
        outer(torch.bfloat16, length, **of_levels, norms_alone=True)
    for ragged in (False, True):
        outer(torch.bfloat16, length, 1, method="fused", ragged=ragged, **by_group)
    alone = Segments.equal(4, length, Groups.of(4, [(torch.zeros(4, dtype=torch.int64), 1)]))
    x, g = (torch.zeros(4 * length, width, dtype=torch.bfloat16) for width in (256, 384))
    triton_kernels.outer_wgrad(x, g, alone, method="fused")
    for rows in (8, 40, 200):
        outer(torch.bfloat16, rows + scale, method="gram")
    outer(torch.bfloat16, length, 1, method="gram", **by_group)  # the tasks' gradients by fused, in another order
    outer(torch.bfloat16, length, 1, method="gram", weight=weight)
    outer(torch.bfloat16, 2 * length, 1, method="gram", ragged=True)
    outer(torch.bfloat16, length, 2, method="split", weight=weight)
    for method in ("gram", "fused"):
        outer(torch.bfloat16, 2 * length, d=33, p=70, method=method)  # nothing is a multiple of 16
        outer(torch.float64, length, 1, method=method)
    for precision in ("ieee", "tf32"):
        torch.backends.cuda.matmul.fp32_precision = precision
        outer(torch.float32, length, 1, method="fused", weight=weight)
        outer(torch.float32, length, method="gram")

    groups = groups_of(8, 2)
    for rows in (1, 8 + scale, length):
        segments = Segments.equal(8, rows, groups)
        g, ids = torch.zeros(8 * rows, 256, dtype=torch.bfloat16), torch.arange(8 * rows) % 7
        triton_kernels.segment_sum(g, segments)
        triton_kernels.segment_scale_grad(g, g, segments, shift=g[:, 0], scale=g[:, 0])
    triton_kernels.lookup_wgrad(ids, g, 7, segments, weight=weight)
    triton_kernels.outer_gram(g, g, segments)
    triton_kernels.outer_gram(g, g, Segments.from_lengths(torch.full((8,), rows)))
    triton_kernels.per_sample_wgrad(torch.zeros(8, 256), segments, weight=weight)
    for dtype, vocabulary in ((torch.bfloat16, 1 << 17), (torch.float32, 50257), (torch.float64, 100)):
        logits, labels = torch.zeros(70 * scale, vocabulary, dtype=dtype), torch.arange(70 * scale) % 7
        triton_kernels.logit_scores(logits, labels, ignore_index=-100)
        triton_kernels.logit_gradient_rates(logits, labels, ignore_index=-100)
    triton_kernels.segment_std(torch.zeros(8 * scale), torch.arange(8 * scale) % 5, 5, ddof=1)


def main() -> None:
    capability = int(sys.argv[1])
    chip = Chip.of(divmod(capability, 10), multiprocessors=100, clock=1.5e9, memory=2e12)
    for module in (outer_fused, outer_pairs):
        module.chip_of = lambda _: chip
    recorder = Recorder(GPUTarget("cuda", capability, 32))
    JITFunction.run = lambda kernel, *args, **kwargs: recorder(kernel, *args, **kwargs)
    everything(scale=2)
    first = set(recorder.kernels)
    for scale in (3, 4):  # 16 divides some of the sizes and not others
        everything(scale)
    others = sorted(name for name in recorder.kernels if name not in first)
    recorder.kernels = {name: recorder.kernels[name] for name in first}
    print(json.dumps({"kernels": recorder.compiled(), "of_other_lengths": others}))


if __name__ == "__main__":
    main()
