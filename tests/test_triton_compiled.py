"""The Triton kernels as they are launched, compiled ahead of time: what they take of the chip. Needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")  # optional

SHARED = {90: 227 * 1024, 80: 163 * 1024}  # bytes that one program may have
HALVES = ("*bf16", "*fp16")


def launched(capability):
    """What `triton_launches` prints."""
    script = Path(__file__).parent / "triton_launches.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"  # 3.9 wants to be told; other versions fuse multiply-adds anyway
    done = subprocess.run([sys.executable, script, str(capability)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def wrong_with(kernel, capability):
    """Every way in which a kernel is not what it should be."""
    if kernel["stack"] > 0:
        yield f"spills {kernel['stack']} bytes of registers"
    if kernel["shared"] > SHARED[capability]:
        yield f"takes {kernel['shared']} bytes of shared memory"
    if kernel["atomics"]:
        yield "adds atomically, hence in another order each time"
    given, narrow = kernel["given"], kernel["types"][0] in HALVES
    if not narrow and given.get("PRECISION") != "tf32":
        if kernel["HGMMA"] or kernel["HMMA"]:
            yield "rounds to TF32"
        return
    if kernel["name"] not in ("_fused_kernel", "_pairs_kernel"):
        return
    rows = int(given.get("BLOCK_D") or given["BLOCK_ROWS"])
    wanted = "HGMMA" if capability >= 90 and rows >= 64 else "HMMA"  # a warpgroup multiplies 64 rows at a time
    if not kernel[wanted]:
        yield f"has no {wanted}"
    if narrow and rows >= 64 and not kernel["LDGSTS"]:
        yield "does not load ahead"


@pytest.mark.parametrize("capability", SHARED)
def test_kernels_fit_the_chip_and_use_its_matrix_units_and_serve_every_length(capability):
    found = launched(capability)
    assert {kernel["name"] for kernel in found["kernels"]} == {
        *("_fused_kernel", "_pairs_kernel", "_split_kernel", "_inner_products_kernel", "_scaled_segment_sum_kernel"),
        *("_per_sample_wgrad_kernel", "_sum_runs_kernel", "_segment_std_kernel"),
        *("_logit_scores_kernel", "_row_sums_kernel", "_class_sums_kernel"),
    }
    wrong = [(kernel, reason) for kernel in found["kernels"] for reason in wrong_with(kernel, capability)]
    assert not wrong, "\n".join(f"{reason}: {kernel}" for kernel, reason in wrong)
    assert found["of_other_lengths"] == []
