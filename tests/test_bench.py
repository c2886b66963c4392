"""The benchmarks run, print every row, and refuse to time what is wrong. How fast anything is, is not looked at."""

import csv
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from gradnorm_ext import backends, ops

BENCH = Path(__file__).resolve().parent.parent / "bench"
pytestmark = pytest.mark.skipif(not BENCH.exists(), reason="runs in the source tree")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """bench/run.py as a module, and the threads as they were."""
    before, threads = set(sys.modules), torch.get_num_threads()
    monkeypatch.syspath_prepend(BENCH)
    import run

    monkeypatch.setattr(run, "peak_in_fresh_process", lambda *_: 1)  # pytest's main module is no program to start anew
    yield run
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(BENCH)):
            del sys.modules[name]
    torch.set_num_threads(threads)


def quick(command: str) -> list[str]:
    """The lines that a quick run prints, after it succeeded and left the results alone."""
    before = sorted((path, path.stat().st_size) for path in BENCH.glob("results/*"))
    done = subprocess.run([sys.executable, BENCH / "run.py", command, "--quick"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted((path, path.stat().st_size) for path in BENCH.glob("results/*")) == before
    return done.stdout.splitlines()


def main(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    return bench.main()  # type: ignore[no-any-return]


def test_ops_prints_a_row_for_every_operation_and_backend(bench: ModuleType) -> None:
    rows = [line.split("tiny") for line in quick("ops")[1:]]
    names = [name for name in ("native", "reference") if not isinstance(backends.load(name), str)]
    expected = [
        (operation.name, backend)
        for operation in bench.OPERATIONS
        for backend in ("matmul" if operation.bytes is None else "copy", *names)
    ]
    assert [(operation.strip(), figures.split()[0]) for operation, figures in rows] == expected
    assert all(float(figures.split()[1]) > 0 for _, figures in rows)


def test_step_prints_a_row_for_every_variant(bench: ModuleType) -> None:
    header, *rows = quick("step")
    assert all(model.title in header for model in bench.QUICK.values())
    assert [row.split()[0] for row in rows] == [name for name in bench.VARIANTS if name != "plain"]
    for row in rows:
        ratios = [float(cell) for cell in row.replace("[", " ").replace("]", " ").split()[1:]]
        assert len(ratios) == 3 * len(bench.QUICK) + (sys.platform == "linux")  # a median and two quartiles a model


def test_a_wrong_operation_is_refused(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = ops.bias_wgrad

    def wrong(*args: Any, backend: str, **options: Any) -> tuple[Tensor, Tensor]:
        dw, sqnorm = right(*args, backend="reference", **options)
        return dw, sqnorm * (1.00001 if backend == "native" else 1)

    monkeypatch.setattr(ops, "bias_wgrad", wrong)
    assert main(bench, monkeypatch, "ops", "--quick", "--backend", "native") == 1
    out, err = capsys.readouterr()
    assert "REFUSED, not timed: bias_wgrad, tiny, native: output 1 is off by" in err
    rows = [line.split()[2:] for line in out.splitlines() if line.startswith("bias_wgrad")]
    assert ["native", "REFUSED"] in rows
    assert sorted(row[0] for row in rows) == ["copy", "native", "reference"]


@pytest.mark.parametrize("wrong", ["norm", "gradient", "raises"])
def test_a_wrong_step_is_refused(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: str
) -> None:
    right = bench.VARIANTS["meter"]

    def start(problem: Any, policy: None) -> Any:
        optimizer, backward = right.start(problem, policy)

        def wrong_backward() -> dict[str, Tensor]:
            if wrong == "raises":
                raise RuntimeError("no kernel")
            norms: dict[str, Tensor] = backward()
            if wrong == "norm":
                norms["example_norm"][1] *= 1.0001
            else:
                next(problem.model.parameters()).grad[0, 0] += 1e-4
            return norms

        return optimizer, wrong_backward

    monkeypatch.setitem(bench.VARIANTS, "meter", bench.VARIANTS["plain"].__class__(start))
    assert main(bench, monkeypatch, "step", "--quick", "--model", "mlp", "--variant", "meter", "meter_tasks") == 1
    out, err = capsys.readouterr()
    reason = {"norm": "example_norm[1] is off by", "gradient": "the gradient is off by", "raises": "raised"}[wrong]
    assert f"REFUSED, not timed: meter, mlp: {reason}" in err
    assert err.count("REFUSED") == 1
    assert out.splitlines()[1].split()[:2] == ["meter", "REFUSED"]
    assert "REFUSED" not in out.splitlines()[2]


def test_results_are_appended_below_one_header(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "results")
    figure = bench.Figure.of("meter", "gpt", "native", "time_ratio", [1.0, 1.1, 1.3])
    path = bench.record([figure], 1, "a device")
    assert bench.record([figure, figure], 2, "a device") == path
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["threads"] for row in rows] == ["1", "2", "2"]
    found = {name: rows[0][name] for name in ("case", "size", "backend", "figure", "median", "torch")}
    assert found == {
        "case": "meter",
        "size": "gpt",
        "backend": "native",
        "figure": "time_ratio",
        "median": "1.1",
        "torch": torch.__version__,
    }


GPU_CASES = {
    "step": {
        *("outer_wgrad", "outer_sqnorm", "meter", "meter_tasks", "same_step_examples", "same_step_tasks"),
        *("next_step_tasks", "T x T products", "bmm and reduction"),
    },
    "tests": set(),
    "rest": {
        *("outer_wgrad", "outer_sqnorm", "lookup_sqnorm", "lookup_wgrad", "scale_wgrad", "bias_wgrad"),
        "segment_std",
    },
    "sanitizers": set(),
}


@pytest.mark.parametrize("part", GPU_CASES)
def test_each_command_for_a_gpu_runs_dry(part: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")  # optional
    if torch.cuda.is_available():
        pytest.skip("the dry run is for machines without a GPU")
    before = sorted((path, path.stat().st_size) for path in BENCH.glob("results/*"))
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path)}
    command = [BENCH / "gpu.sh", part, "--interpret"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted((path, path.stat().st_size) for path in BENCH.glob("results/*")) == before
    with tarfile.open(tmp_path / f"gpu-{part}.tar.gz") as archive:
        assert any(name.endswith(".log") for name in archive.getnames())
    rows = []
    if GPU_CASES[part]:
        with (tmp_path / "dry-run.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
    assert {row["case"] for row in rows} == GPU_CASES[part]
    if part == "step":
        assert {row["size"] for row in rows if row["case"] == "meter"} == {"llama, tiny", "llama, tiny, tied head"}
        found = {row["figure"] for row in rows if row["case"] == "outer_wgrad"}
        assert found >= {"e", "x plain dW", "beats gram from rows"}
        assert {row["size"] for row in rows} >= {
            "40 x 33, 4 x 5",
            "40 x 33, 4 x 5, 1 groups",
            "40 x 33, 4 x 5, 4 groups",
        }


def test_a_command_for_a_gpu_goes_on_after_a_failure_and_lists_it(tmp_path: Path) -> None:
    """With a program in place of Python that only says what it was given, and fails where it should."""
    python, fails = tmp_path / "python", ("pip", "meter")
    python.write_text(f'#!/bin/sh\necho $@; case "$@" in {"|".join(f"*{one}*" for one in fails)}) exit 3;; esac\n')
    python.chmod(0o755)
    (tmp_path / "out").mkdir()
    environment = os.environ | {"PYTHON": str(python), "OUT": str(tmp_path / "out")}
    done = subprocess.run([BENCH / "gpu.sh", "step"], capture_output=True, text=True, env=environment)
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("bench/run.py")] == [
        "bench/run.py gpu meter",
        "bench/run.py gpu outer",
        "bench/run.py gpu step",
    ]
    assert sum(" pip install " in line for line in lines) == 2  # the second without native code
    assert done.returncode == 1 and lines[-3:] == [
        "FAILED build: exit status 3",
        "FAILED build_without_native: exit status 3",
        "FAILED meter: exit status 3",
    ]
    with tarfile.open(tmp_path / "out" / "gpu-step.tar.gz") as archive:
        assert "step/meter.log" in archive.getnames()


def test_what_was_measured_before_a_crash_is_kept(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "RESULTS", tmp_path)

    def figures() -> Iterator[Any]:
        yield bench.Figure("meter", "gpt", "native", "time_ratio", 1.5)
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        bench.record(figures(), 1, "a device")
    assert (tmp_path / "a-device.csv").read_text().count("gpt,native") == 1


CRASHING = """
import os
import pytest
import torch

def test_that_passes():
    pass

def test_that_fails():
    assert False

def test_that_kills_its_process():
    os._exit(9)

def test_that_leaves_the_gpu_unusable(monkeypatch):
    def synchronize():
        raise RuntimeError("an illegal memory access was encountered")
    torch.cuda.is_available, torch.cuda.synchronize = lambda: True, synchronize
    assert False

@pytest.mark.parametrize("i", range(3))
def test_that_comes_later(i):
    assert not torch.cuda.is_available()  # as this process was made anew
"""


def test_tests_after_a_crash_are_run_in_a_new_process(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU that is gone is acted out without one")
    (tmp_path / "test_crashing.py").write_text(CRASHING)
    command = [sys.executable, BENCH / "gpu_tests.py", "--processes", "1", "--logs", tmp_path / "logs"]
    done = subprocess.run([*command, "test_crashing.py"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "FAILED test_crashing.py::test_that_fails",
        "CRASHED test_crashing.py::test_that_kills_its_process",
        "FAILED test_crashing.py::test_that_leaves_the_gpu_unusable",
        "7 tests: 4 passed, 2 failed, 1 crashed",
    ]
    (tmp_path / "test_crashing.py").write_text(
        "import time\ndef test_that_hangs():\n    time.sleep(600)\ndef test_later(): 0\n"
    )
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    done = subprocess.run([*command, "--seconds", "4", "."], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode and "no_such_module" in done.stdout
    assert done.stdout.splitlines()[-3:] == [
        "UNFINISHED test_crashing.py::test_that_hangs",
        "NOT STARTED test_crashing.py::test_later",
        "2 tests: 1 unfinished, 1 not started",
    ]
