"""What follows from the table of operations: backends, reports, the README, the sources, and opcheck's cases."""

import ast
import re
from pathlib import Path

import pytest
import torch
from operators import DEVICES, calls_of, served

import gradnorm_ext
from gradnorm_ext import __main__ as report
from gradnorm_ext import backends, gradients, native, operations, ops, reference
from gradnorm_ext.operations import OPERATIONS, Operation, kernel_name

ROOT = Path(__file__).resolve().parent.parent
needs_sources = pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="runs in the source tree")


def definition(name, arguments):
    """What `reference` says; of windows, about the rows that they see."""
    if "windows" in arguments:
        images, windows = arguments["images"], arguments["windows"]
        others = {key: one for key, one in arguments.items() if key not in ("images", "windows")}
        return getattr(reference, name.replace("im2col", "outer"))(windows.rows(images), **others)
    return getattr(reference, name)(**arguments)


def double(one):
    return one.double() if isinstance(one, torch.Tensor) and one.is_floating_point() else one


@pytest.mark.parametrize(("name", "backend"), served())
def test_every_backend_gives_what_the_definition_gives(name, backend):
    for example in OPERATIONS[name].examples(DEVICES[backend]):
        arguments = {key: double(one) for key, one in example.items()}
        found = backends.find(name, DEVICES[backend], backend)(**arguments)
        torch.testing.assert_close(found, definition(name, arguments), rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize(("name", "backend"), served())
@pytest.mark.filterwarnings("ignore::UserWarning")  # opcheck's own, about modules it imports
def test_its_operators_keep_to_their_schemas(name, backend):
    for operator, arguments in calls_of(name, backend):
        torch.library.opcheck(operator, arguments)


def test_the_examples_reach_every_operator():
    reached = {operator.name() for name, backend in served() for operator, _ in calls_of(name, backend)}
    schemas = [schema for operation in OPERATIONS.values() for schema in operation.kernels]
    names = [f"gradnorm::{kernel_name(schema)}" for schema in schemas]
    assert {name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")} <= reached
    pytest.importorskip("triton")
    of_triton = {
        schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("gradnorm_triton::")
    }
    assert of_triton <= reached


def test_every_operation_has_a_meaning_or_is_for_gradients_alone():
    public = {name for name in OPERATIONS if hasattr(ops, name)}
    assert OPERATIONS.keys() - public == {"outer_sum", "im2col_sqnorm", "im2col_wgrad"}
    for name in public:
        assert getattr(ops, name).__doc__


def test_what_operations_serve_is_there():
    known = {*gradients.__all__, *gradnorm_ext.__all__, "GSA", "ops"}
    assert {name for operation in OPERATIONS.values() for name in operation.serves} <= known


def asked_for():
    """``(form, operation)`` of every ``find`` and ``serves`` in the forms of gradients."""
    for path in Path(gradients.__file__).parent.glob("*.py"):
        for form in (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)):
            strings = {node.value for node in ast.walk(form) if isinstance(node, ast.Constant)}
            for name in strings & OPERATIONS.keys():
                yield {"Im2colOuter": "ConvGrad"}.get(form.name, form.name), name


def test_the_table_has_what_each_form_of_gradient_asks_for():
    of_table = {(form, name) for name, row in OPERATIONS.items() for form in row.serves}
    assert set(asked_for()) <= of_table


@needs_sources
def test_the_docs_have_the_table():
    pytest.importorskip("triton")
    assert report.operations() in (ROOT / "docs" / "operations.md").read_text(), (
        "python -m gradnorm_ext operations prints it"
    )


@needs_sources
def test_cmake_builds_the_kernels_of_operations():
    lists = (ROOT / "CMakeLists.txt").read_text()
    listed = re.search(r"set\(OPERATIONS[^)]*\)", lists).group().split()[1:]
    stems = [name.rstrip(")") for name in listed if name.rstrip(")")]
    assert stems == sorted(stems)
    assert set(stems) <= OPERATIONS.keys() | {"reward_stats"}  # that one takes NumPy's arrays
    for schema in (schema for operation in OPERATIONS.values() for schema in operation.kernels):
        assert kernel_name(schema).removesuffix("_sorted").replace("fused", "wgrad").replace("im2col", "outer") in stems


def test_a_name_is_given_once_and_one_without_a_row_is_refused():
    with pytest.raises(ValueError, match="an operation must have a name of its own, got outer_wgrad"):
        operations.add(OPERATIONS["outer_wgrad"])
    with pytest.raises(ValueError, match="there is no operation row_max; give it a row"):
        backends.find("row_max", "cpu", "auto")


def of_row_max(x, out):
    out.copy_(x.amax(1))


class TestFromOutside:
    """An operation of somebody else's: a definition, a kernel, and a row."""

    @pytest.fixture(autouse=True)
    def row_max(self, monkeypatch):
        schema = "row_max(Tensor x, Tensor(a!) out) -> ()"

        def of_native(x):
            out = x.new_empty(len(x))
            torch.ops.gradnorm.row_max(x, out)
            return out

        row = Operation("row_max", "each row's maximum", ("ops",), lambda device: ({"x": torch.rand(3, 4)},), (schema,))
        operations.add(row)
        monkeypatch.setattr(reference, "row_max", lambda x: x.amax(1), raising=False)
        monkeypatch.setattr(native, "row_max", of_native, raising=False)
        if not hasattr(torch.ops.gradnorm, "row_max"):
            native.define(schema)
            native._library.impl("row_max", of_row_max, "CPU")
        yield
        del OPERATIONS["row_max"]

    def test_backends_find_it(self):
        x = torch.rand(3, 4)
        for backend in ("auto", "native", "reference"):
            assert torch.equal(backends.find("row_max", "cpu", backend)(x), x.amax(1))

    def test_reports_have_it(self, capsys):
        report.main()
        assert "row_max by native, the first of native, reference" in capsys.readouterr().out
        pytest.importorskip("triton")
        assert "| `row_max` | each row's maximum | `ops` | ● |  |  |" in report.operations()

    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_its_example_is_checked(self):
        assert ("row_max", "native") in served()
        test_every_backend_gives_what_the_definition_gives("row_max", "native")
        test_its_operators_keep_to_their_schemas("row_max", "native")


@pytest.mark.skipif(torch.cuda.is_available(), reason="conftest leaves memory as it is where there is a GPU")
def test_memory_that_nobody_has_written_is_nan():
    assert torch.ones(1).new_empty(3).isnan().all() and torch.empty_like(torch.ones(2).half()).isnan().all()
