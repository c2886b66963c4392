"""Runs tests in several processes; one that leaves the GPU unusable, or kills its process, does not take the others along.

    python bench/gpu_tests.py [--processes 8] [--seconds 420] [--logs FOLDER] [arguments of pytest]

Prints what failed and how many tests there were; the exit status is 1 if any failed, or was not reached after so many
seconds. FOLDER gets each process's output.
Needs torch and pytest alone.
"""

from __future__ import annotations

import argparse
import collections
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=420)
    parser.add_argument("--logs", type=Path)
    parser.add_argument(
        "--of", type=Path, help=argparse.SUPPRESS
    )  # one process's tests, and where it notes the results
    given, options = parser.parse_known_args()
    if given.of:
        return run_here(given.of, options)
    logs = given.logs or Path(tempfile.mkdtemp())
    logs.mkdir(parents=True, exist_ok=True)
    listed = subprocess.run([*PYTEST, "--collect-only", "-q", *options], capture_output=True, text=True)
    tests = [line for line in listed.stdout.splitlines() if "::" in line]
    if listed.returncode:  # what cannot be imported does not keep the others from running
        print(listed.stdout + listed.stderr)
    if not tests:
        return listed.returncode or 1
    shares = [tests[i :: given.processes] for i in range(min(given.processes, len(tests)))]
    with ThreadPoolExecutor(len(shares)) as threads:
        end = time.monotonic() + given.seconds
        found = [
            *threads.map(run_all, shares, (logs / f"process-{i}" for i in range(len(shares))), [end] * len(shares))
        ]
    outcomes = {test: outcome for share in found for test, outcome in share.items()}
    for test, outcome in outcomes.items():
        if outcome not in ("passed", "skipped"):
            print(f"{outcome.upper()} {test}")
    counts = collections.Counter(outcomes.values())
    print(f"{len(tests)} tests: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))
    return listed.returncode or (0 if set(counts) <= {"passed", "skipped"} else 1)


PYTEST = (sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist")


def run_all(tests: list[str], place: Path, end: float) -> dict[str, str]:
    """Each test's outcome, from as many processes, one after the other, as it takes and as there is time for."""
    found: dict[str, str] = {}
    log, notes = place.with_suffix(".log"), place.with_suffix(".txt")
    log.unlink(missing_ok=True)
    while left := [test for test in tests if test not in found]:
        notes.write_text("\n".join(left))
        is_late = False
        with log.open("a") as output:
            command = [sys.executable, __file__, "--of", str(notes)]
            try:
                seconds = max(0.0, end - time.monotonic())
                subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, timeout=seconds)
            except subprocess.TimeoutExpired:
                is_late = True
        out = notes.with_suffix(".out")
        lines = [line.split(" ", 1) for line in out.read_text().splitlines()] if out.exists() else []
        out.unlink(missing_ok=True)
        found |= {test: outcome for outcome, test in lines}
        if lines and lines[-1][0] == "started":
            found[lines[-1][1]] = "unfinished" if is_late else "crashed"
        if not lines or is_late:
            found |= {test: "not started" for test in left if test not in found}
    return found


def run_here(notes: Path, options: list[str]) -> int:
    tests = notes.read_text().splitlines()
    with notes.with_suffix(".out").open("w") as out:
        return int(pytest.main(["-q", "--tb=short", *PYTEST[4:], *options, *tests], plugins=[Notes(out)]))


class Notes:
    """Writes down when a test starts and how it ends, and stops where the GPU answers no more."""

    def __init__(self, out) -> None:
        self.out = out

    def note(self, outcome: str, test: str) -> None:
        print(outcome, test, file=self.out, flush=True)

    def pytest_sessionstart(self, session) -> None:
        self.session = session

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.outcome = "passed"
        self.note("started", nodeid)

    def pytest_runtest_logreport(self, report) -> None:
        if report.outcome != "passed" and self.outcome != "failed":
            self.outcome = report.outcome

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.note(self.outcome, nodeid)
        if self.outcome == "failed" and not usable():
            self.session.shouldstop = f"the GPU answers no more after {nodeid}"


def usable() -> bool:
    import torch

    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
