"""The Triton kernels as they are launched, compiled ahead of time: what they take of the chip. Needs no GPU."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("triton")  # optional

SHARED = {90: 227 * 1024, 80: 163 * 1024}  # bytes that one program may have
HALVES = ("*bf16", "*fp16")


@cache
def launched(capability):
    """What `triton_launches` prints."""
    script = Path(__file__).parent / "triton_launches.py"
    done = subprocess.run([sys.executable, script, str(capability)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def wrong_with(kernel, capability):
    """Every way in which a kernel is not what it should be."""
    if kernel["stack"] > 0:
        yield f"spills {kernel['stack']} bytes of registers"
    if kernel["shared"] > SHARED[capability]:
        yield f"takes {kernel['shared']} bytes of shared memory"
    if kernel["name"] not in ("_fused_kernel", "_pairs_kernel"):
        return
    given, narrow = kernel["given"], kernel["types"][0] in HALVES
    if not narrow and given["PRECISION"] != "tf32":
        return  # float32 as it is, and float64: no matrix instructions are asked for
    rows = int(given.get("BLOCK_D") or given["BLOCK_ROWS"])
    wanted = "HGMMA" if capability >= 90 and rows >= 64 else "HMMA"  # a warpgroup multiplies 64 rows at a time
    if not kernel[wanted]:
        yield f"has no {wanted}"
    if narrow and rows >= 64 and not kernel["LDGSTS"]:
        yield "does not load ahead"


@pytest.mark.parametrize("capability", SHARED)
def test_kernels_neither_spill_nor_take_too_much_and_use_the_matrix_units(capability):
    kernels = launched(capability)["kernels"]
    assert {kernel["name"] for kernel in kernels} == {
        *("_fused_kernel", "_pairs_kernel", "_split_kernel", "_inner_products_kernel", "_segment_sums_kernel"),
        *("_sums_wgrad_kernel", "_sum_runs_kernel", "_segment_std_kernel"),
        *("_logit_scores_kernel", "_row_sums_kernel", "_class_sums_kernel"),
    }
    wrong = [(kernel, reason) for kernel in kernels for reason in wrong_with(kernel, capability)]
    assert not wrong, "\n".join(f"{reason}: {kernel}" for kernel, reason in wrong)


@pytest.mark.parametrize("capability", SHARED)
def test_another_sequence_length_needs_no_other_kernel(capability):
    assert launched(capability)["of_other_lengths"] == []
