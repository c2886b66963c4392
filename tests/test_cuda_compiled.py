"""The CUDA kernels of this build as machine code: what they take of the chip, and which instructions they are made of.

Needs no GPU; reads the library that is installed.
"""

import collections
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gradnorm_ext import _C

pytestmark = pytest.mark.skipif(not _C.with_cuda, reason="built without nvcc: there are no CUDA kernels")

KERNELS = {
    *("lookup_runs_kernel", "nothing_kernel", "outer_wgrad_kernel", "segment_std_kernel", "scaled_segment_sum_kernel"),
    *("sum_groups_kernel", "sum_partials_kernel", "sum_places_kernel", "per_sample_norms_kernel"),
}
ARCHITECTURES = {f"sm_{one}" for one in re.findall(r"(\w+)-real", _C.cuda_architectures)}  # the others are PTX
HOPPER = "outer_wgrad_hopper_kernel"


def cuobjdump(*options):
    """What it says of the extension module. It comes with CUDA, and with Triton."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        triton = pytest.importorskip("triton", reason="cuobjdump is neither on the path nor, with Triton, installed")
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, *options, _C.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kernel_of(mangled):
    """A kernel's own name."""
    return next(
        (name for name in sorted([*KERNELS, HOPPER], key=len, reverse=True) if f"{len(name)}{name}" in mangled), mangled
    )


def test_no_kernel_spills_and_all_are_there_for_every_architecture():
    found, wrong = collections.defaultdict(set), []
    architecture = None
    for line in cuobjdump("-res-usage").splitlines():
        if line.startswith("arch = "):
            architecture = line.split()[-1]
        elif match := re.match(r" Function (\S+):", line):
            kernel = kernel_of(match[1])
            found[kernel].add(architecture)
        elif "REG:" in line:
            used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
            if used["STACK"] or used["LOCAL"] or used["REG"] > (168 if kernel == HOPPER else 255):
                wrong.append((kernel, architecture, used))
    assert not wrong
    built_for = {architecture for architectures in found.values() for architecture in architectures}
    assert built_for == ARCHITECTURES
    assert {name for name, architectures in found.items() if architectures == ARCHITECTURES} == KERNELS
    assert found.get(HOPPER) == ({"sm_90a"} if _C.with_cutlass else None)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_kernels_are_made_of_the_instructions_that_they_were_written_for(architecture):
    counts = collections.defaultdict(collections.Counter)
    for line in cuobjdump("-arch", architecture, "-sass").splitlines():
        if match := re.search(r"Function : (\S+)", line):
            kernel = kernel_of(match[1])
        elif match := re.search(r"\*/ +(?:@!?U?P\d )?([A-Za-z0-9.]+)", line):
            for name in (
                "HGMMA",
                "WARPGROUP.DEPBAR",
                "HMMA",
                "UTMALDG",
                "LDGSTS",
                "LDSM",
                "LDL",
                "STL",
                "ATOM",
                "RED.",
            ):
                counts[kernel][name] += match[1].startswith(name)
            if match[1].startswith("HGMMA"):
                counts[kernel][match[1].split(".")[1]] += 1
            counts[kernel]["LDG.128"] += match[1].startswith("LDG") and ".128" in match[1]
    for kernel, count in counts.items():
        assert not count["LDL"] and not count["STL"], f"{kernel} spills registers"
        assert not count["ATOM"] and not count["RED."], f"{kernel} adds atomically, hence in another order each time"
    mma = counts["outer_wgrad_kernel"]
    assert mma["HMMA"] and mma["LDSM"] and mma["LDGSTS"], "cp.async, ldmatrix, mma.sync"
    for kernel in ("lookup_runs_kernel", "scaled_segment_sum_kernel", "per_sample_norms_kernel"):
        assert counts[kernel]["LDG.128"], f"{kernel} has no loads of 16 bytes"
    if architecture == "sm_90a" and _C.with_cutlass:
        wgmma = counts[HOPPER]
        assert wgmma["64x192x16"] and wgmma["64x256x16"] and wgmma["UTMALDG"] and not wgmma["HMMA"], "wgmma, TMA"
        assert wgmma["WARPGROUP.DEPBAR"] < wgmma["HGMMA"], "products that wait for each other"
