"""A machine with a GPU and little else: the tests that need one are found there, whatever is not installed."""

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
OPTIONAL = ("torchao", "trl", "torchjd", "datasets", "liger_kernel", "matplotlib", "rich", "sklearn", "scipy", "pandas")
COLLECT = f"""
import sys
sys.modules |= dict.fromkeys({OPTIONAL})  # none of them can be imported
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "gpu", {str(TESTS)!r}]))
"""


def test_what_needs_a_gpu_is_collected_without_what_is_optional():
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-P", "-c", COLLECT], capture_output=True, text=True, cwd=TESTS.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {line.partition("::")[0].removeprefix("tests/") for line in done.stdout.splitlines() if "::" in line}
    assert found == {"test_compile.py", "test_native_cuda.py", "test_product.py", "test_triton_gpu.py"}
