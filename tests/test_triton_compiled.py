"""The Triton kernels as they are launched, compiled ahead of time: what they take of the chip. Needs no GPU."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import machine_code
import pytest
import torch

pytest.importorskip("triton")  # optional

from gradnorm_ext.triton_kernels import outer_fused, outer_pairs
from gradnorm_ext.triton_kernels.chips import Chip

SHARED = {80: 163, 90: 227, 100: 227, 120: 99}  # KB that one program may have


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
    if "error" in kernel:
        yield kernel["error"]
        return
    if kernel["stack"] > 0:
        yield f"spills {kernel['stack']} bytes of registers"
    if kernel["shared"] > SHARED[capability] * 1024:
        yield f"takes {kernel['shared']} bytes of shared memory"
    if kernel["atomics"]:
        yield "adds atomically, hence in another order each time"
    given, narrow = kernel["given"], any(name in kernel["types"][0] for name in ("bf16", "fp16"))
    if not narrow and given.get("PRECISION") != "tf32":
        if kernel["HGMMA"] or kernel["HMMA"] or kernel["UTCHMMA"]:
            yield "rounds to TF32"
        return
    if kernel["name"] not in ("_fused_kernel", "_pairs_kernel"):
        return
    rows = int(given.get("BLOCK_D") or given["BLOCK_ROWS"])
    of_warpgroups = {90: "HGMMA", 100: "UTCHMMA"}  # a warpgroup multiplies 64 rows at a time, and tensor memory has 128
    wanted = of_warpgroups.get(capability, "HMMA") if rows >= 64 else "HMMA"
    if not kernel[wanted]:
        yield f"has no {wanted}"
    if given.get("UNIT", "16") == "1" or rows < 64:
        return  # rows that no wide load may begin at pass through registers
    # TF32 as well; products of float32 (above) multiply without matrix units, and wait for what they need next.
    if not kernel["ahead"] or any(not loop or min(loop) == 0 for loop in kernel["ahead"]):
        yield f"does not load ahead: {kernel['ahead']}"
    if kernel["touched_in_flight"]:
        yield f"touches an accumulator while a product is in flight: {kernel['touched_in_flight']}"
    if narrow:
        at_most = min(instructions(kernel, capability), 150 if capability == 90 else math.inf)
        if kernel["step"] is None or kernel["step"]["others"] > at_most:
            yield f"takes {kernel['step']} instructions a step, where at most {at_most} are expected"


def instructions(kernel, capability):
    """What the model of costs takes for granted of a step."""
    given, chip = kernel["given"], Chip.of(divmod(capability, 10), multiprocessors=100, clock=1.5e9, memory=2e12)
    if kernel["name"] == "_pairs_kernel":
        return outer_pairs.tile(torch.bfloat16, False, int(given["BLOCK_ROWS"]), True, chip).instructions
    return outer_fused.tile(torch.bfloat16, False, True, given["HAS_ORDER"] == "True", False, chip).instructions


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


LOOP = """
scf.for %i = %a to %b {
  scf.for %k = %a to %b {
    %w = ttg.async_wait %t {num = NUM : i32}
    %d = ttng.warp_group_dot %w, %w, %acc
  }
}
"""


def test_a_loop_that_waits_for_what_it_has_just_asked_for_is_seen():
    assert machine_code.copies_ahead(LOOP.replace("NUM", "0")) == [[0]]
    assert machine_code.copies_ahead(LOOP.replace("NUM", "4")) == [[4]]
    fetched = (
        f"{machine_code.FETCHES}\n{LOOP.replace('%w = ttg.async_wait %t {num = NUM : i32}', machine_code.FETCHES)}"
    )
    assert machine_code.copies_ahead(fetched) == [[1]]


CODE = """
.L_x_1:
 /*0000*/ HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
 /*0010*/ @!P0 BRA `(.L_x_2) ;
 /*0020*/ FADD R5, R6, R40 ;
.L_x_2:
 /*0030*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
 /*0040*/ FADD R7, R24, R25 ;
 /*0050*/ @P1 BRA `(.L_x_1) ;
 /*0060*/ EXIT ;
"""


def test_an_accumulator_that_is_read_in_flight_is_seen_and_a_step_is_the_shortest_way_round():
    code = machine_code.Code.of(CODE)
    assert code.touched_in_flight() == ["2: FADD R5, R6, R40"]
    assert machine_code.Code.of(CODE.replace("R40", "R4")).touched_in_flight() == []
    assert code.round_trip() == {"products": 1, "others": 4}
