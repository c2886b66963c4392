"""The examples run from the command line, leave what they say they leave, and survive Ctrl-C."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
LEFT = {
    "dpo_pairs": ["dpo_pairs.png", "parameter.csv", "plain.csv", "probability.csv", "table.txt"],
    "continual_gsa": ["continual_gsa.png", "runs.csv", "table.txt"],
    "vanishing_reward_std": ["RL.csv", "SFT, then RL.csv", "SFT.csv", "table.txt", "vanishing_reward_std.png"],
}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"}


@pytest.mark.parametrize("name", LEFT)
def test_a_quick_run_leaves_its_table_and_plot(name, tmp_path):
    command = [sys.executable, EXAMPLES / f"{name}.py", "--quick", "--out", tmp_path]
    found = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert found.returncode == 0, found.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(LEFT[name])
    table = (tmp_path / "table.txt").read_text()
    assert "nan" not in table and len(table.splitlines()) > 6
    assert all((tmp_path / left).stat().st_size > 1000 for left in LEFT[name] if left.endswith(".png"))


INTERRUPTED_RUN = """
import signal, sys
sys.path.insert(0, {folder!r})
import continual_gsa as example
whole = example.run
def run(method, seed, settings):
    if (method, seed) == ("none", 1):
        signal.raise_signal(signal.SIGINT)
    return whole(method, seed, settings)
example.run = run
sys.argv = ["continual_gsa.py", "--out", {out!r}]
sys.exit(example.main())
"""


def test_ctrl_c_finishes_the_step_and_leaves_the_results_so_far(tmp_path):
    code = INTERRUPTED_RUN.format(folder=str(EXAMPLES), out=str(tmp_path))
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert found.returncode == 130, found.stderr
    assert "Ctrl-C: finishing this step" in found.stdout and "over 2 paired runs" in found.stdout.replace("\n", " ")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(LEFT["continual_gsa"])
