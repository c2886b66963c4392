"""Who imports whom (the arrows of docs/design.md never turn back), and what the package says of itself."""

import ast
import graphlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import gradnorm_ext

PACKAGE = Path(gradnorm_ext.__file__).parent
MAY_IMPORT = {
    "segments": set(),
    "im2col": set(),
    "operations": {"segments", "im2col"},
    "backends": {"operations"},
    "reference": {"segments"},
    "native": {"native_cuda", "operations", "reference", "segments", "im2col", "_C"},
    "native_cuda": {"reference", "segments", "_C"},
    "ops": {"backends", "reference", "segments"},
    "rewards": {"_C", "backends", "ops"},
    "gradients": {"backends", "gradients", "reference", "segments", "im2col"},
    "layers": {"backends", "gradients", "layers", "reference", "segments"},
    "stats": {"rewards"},
    "policies": {"ops", "policies", "stats"},  # stats for types only
    "history": {"stats"},
    "logits": {"ops"},
    "report": {"history"},
    "packing": set(),
    "sampling": {"rewards"},
    "distributed": {"rewards", "stats"},
    "meter": {"distributed", "layers", "rewards", "segments", "stats"},
    "optimizer": {"distributed", "history", "layers", "meter", "policies", "stats"},
    "check": {"layers", "meter"},
    "integrations": {"history", "integrations", "meter", "optimizer", "packing", "policies", "rewards", "stats"},
    "__main__": {"backends", "native", "operations"},
    "__init__": {
        "check",
        "history",
        "layers",
        "logits",
        "meter",
        "ops",
        "optimizer",
        "packing",
        "policies",
        "report",
        "rewards",
        "sampling",
        "stats",
    },
}


def imported(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("gradnorm_ext"):
            inner = node.module.split(".")[1:]
            names |= {inner[0]} if inner else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("gradnorm_ext.")}
    return names


def sources():
    folders = (PACKAGE, PACKAGE / "gradients", PACKAGE / "layers", PACKAGE / "policies", PACKAGE / "integrations")
    return [path for folder in folders for path in folder.glob("*.py")]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    extra = imported(path) - MAY_IMPORT[module]
    assert not extra, f"{module} must not import {sorted(extra)}"


def test_no_modules_import_each_other():
    paths = {
        path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")
    }
    modules = {f"gradnorm_ext.{name}".removesuffix(".__init__"): path for name, path in paths.items()}
    needs = {}
    for module, path in modules.items():
        taken = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]
        names = {f"{node.module}.{alias.name}" for node in taken for alias in node.names} | {
            node.module for node in taken
        }
        needs[module] = names & modules.keys() - {module, "gradnorm_ext"}
    list(graphlib.TopologicalSorter(needs).static_order())  # raises an error that names a cycle


def classes_of(path):
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)}


def test_no_part_asks_which_form_a_gradient_has():
    forms = {name for path in (PACKAGE / "gradients").glob("*.py") for name in classes_of(path)}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("isinstance", "issubclass"):
                asked = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
                assert not asked & forms, f"{path.relative_to(PACKAGE)}:{node.lineno} asks for {asked & forms}"


TRITON = Path(importlib.util.find_spec("gradnorm_ext.triton_kernels").origin).parent


@pytest.mark.parametrize("path", TRITON.glob("*.py"), ids=lambda path: path.name)
def test_triton_kernels_import_torch_and_triton_only(path):
    foreign = {"gradnorm_ext." + module for module in imported(path) - {"triton_kernels"}}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            foreign |= {alias.name for alias in node.names if not alias.name.startswith(("torch", "triton"))}
        elif isinstance(node, ast.ImportFrom) and not node.module.startswith(("torch", "triton", "gradnorm_ext")):
            foreign.add(node.module)
    assert foreign <= {"__future__", "collections.abc", "dataclasses", "functools", "math", "typing"}


def test_the_core_needs_only_torch_and_numpy():
    code = (
        "import sys; import gradnorm_ext; "
        "print([m for m in ('transformers', 'trl', 'matplotlib', 'rich', 'torchjd', 'triton', 'hypothesis') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() in ("[]", "['triton']")  # torch itself may import triton


def test_bug_report_names_versions_backends_and_methods():
    found = subprocess.run([sys.executable, "-m", "gradnorm_ext"], capture_output=True, text=True, check=True)
    for part in (
        f"gradnorm_ext {gradnorm_ext.__version__}",
        "torch ",
        "native: present",
        "outer_wgrad by",
        "rows a segment",
    ):
        assert part in found.stdout


def test_the_report_of_a_reader_that_has_seen_enough_ends_quietly():
    """``python -m gradnorm_ext | head -1``: whatever of it the pipe has room for."""
    command = [sys.executable, "-m", "gradnorm_ext"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 0
