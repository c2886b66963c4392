"""The outer operations with the product that runs where the processor has not the fastest one's instructions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gradnorm_ext import _C

OPERATIONS = str(Path(__file__).parent / "test_ops.py")


def run(product: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["GRADNORM_CPU_PRODUCT"] = product
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("product", _C.cpu_products[1:2])  # each of them has tests in C++
def test_operations_with(product):
    done = run(product, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "outer", OPERATIONS)
    assert done.returncode == 0, done.stdout
    assert f"{product}, of " in run(product, "-m", "gradnorm_ext").stdout


def test_a_product_that_this_processor_has_not_is_refused():
    done = run("SSE", "-c", "import gradnorm_ext; gradnorm_ext.backends.load('native')")
    those = ", ".join(_C.cpu_products) or "none"
    assert f"GRADNORM_CPU_PRODUCT must be one of this processor's ({those}), got 'SSE'" in done.stderr
