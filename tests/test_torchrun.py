"""The example under `torchrun`: two processes report what one does."""

import csv
import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
import multitask_grpo as example
example.QUICK = example.Settings(
    warm_up_steps=2, steps=2, rate=1e-4, prompts=2, samples=4, held_out=4, held_out_samples=2
)
sys.exit(example.main())
"""


def test_two_processes_report_the_statistics_of_one(tmp_path):
    script = tmp_path / "tiny.py"
    script.write_text(TINY)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone"]
    rows = {}
    for name, launcher in (("one", []), ("two", torchrun)):
        command = [sys.executable, *launcher, str(script), "--quick", "--device", "cpu", "--out", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        for run in ("plain", "InverseNorm"):
            with (tmp_path / name / f"{run}.csv").open() as file:
                rows[name, run] = list(csv.DictReader(file))
    for run in ("plain", "InverseNorm"):
        assert len(rows["one", run]) == 8
        for one, two in zip(rows["one", run], rows["two", run], strict=True):
            assert one["task"] == two["task"]
            for figure in one.keys() - {"task"}:
                a, b = float(one[figure]), float(two[figure])
                assert a == b or abs(a - b) <= 1e-5 * max(1.0, abs(a)) or (a != a and b != b), (figure, a, b)
