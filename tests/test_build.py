"""The compiled part: how it is built, and that its operators keep to their schemas and are as exact as plain torch."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from operators import calls_of
from torch import Tensor

from gradnorm_ext import _C, native
from gradnorm_ext.segments import Groups, Segments

ROOT = Path(__file__).resolve().parent.parent
needs_sources = pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="runs in the source tree")


def ragged(lengths: list[int], *levels: list[int]) -> Segments:
    groups = Groups.of(len(lengths), [(torch.tensor(level), max(level) + 1) for level in levels])
    return Segments.from_lengths(torch.tensor(lengths), groups)


CASES = {
    "one row": ragged([1]),
    "rows of their own in four groups": ragged([1] * 64, [s % 4 for s in range(64)]),
    "ragged in nested groups": ragged([7, 0, 63, 1000, 1], [2, 1, 0, 0, 2], [1, 0, 0, 0, 1]),
    "equal and long": Segments.equal(4, 256),
}


def per_segment(x: Tensor, g: Tensor, segments: Segments) -> Tensor:
    lengths = segments.lengths
    return torch.stack([gs.t() @ xs for gs, xs in zip(g.split(lengths), x.split(lengths), strict=True)])


def plain_wgrad(x: Tensor, g: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    of_segment = per_segment(x, g, segments)
    sqnorm = [of_segment.square().sum((1, 2))]
    for ids, count in zip(segments.groups.levels, segments.groups.counts, strict=True):
        sqnorm += [of_segment[ids == group].sum(0).square().sum()[None] for group in range(count)]
    return of_segment.sum(0), torch.cat(sqnorm)


def assert_as_exact_as_torch(got: Tensor, plain: Tensor, exact: Tensor) -> None:
    # A norm near zero may be lucky in one of the two; one rounding is everybody's due.
    allowed = 2 * (plain - exact).abs().max() + torch.finfo(got.dtype).eps * exact.abs().max()
    assert (got - exact).abs().max() <= allowed


@pytest.mark.parametrize("method", ["auto", "gram", "direct"])
@pytest.mark.parametrize("case", CASES)
def test_outer_wgrad_is_as_exact_as_plain_torch(case: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if method != "auto":
        monkeypatch.setattr(native, "outer_method", lambda *_: method)
    torch.manual_seed(0)
    segments = CASES[case]
    x, g = torch.randn(sum(segments.lengths), 48), torch.randn(sum(segments.lengths), 80)
    plain = plain_wgrad(x, g, segments)
    exact = plain_wgrad(x.double(), g.double(), segments)
    for got, by_torch, wanted in zip(native.outer_wgrad(x, g, segments), plain, exact, strict=True):
        assert_as_exact_as_torch(got, by_torch, wanted)
    assert_as_exact_as_torch(native.outer_sqnorm(x, g, segments), plain[1], exact[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows_are_summed_in_float32(dtype: torch.dtype) -> None:
    x, g = torch.randn(1071, 16).to(dtype), torch.randn(1071, 24).to(dtype)
    segments = CASES["ragged in nested groups"]
    for got, wanted in zip(
        native.outer_wgrad(x, g, segments), native.outer_wgrad(x.float(), g.float(), segments), strict=True
    ):
        assert got.dtype == torch.float32
        assert torch.equal(got, wanted)


def test_rows_may_be_strided() -> None:
    x, g = torch.randn(32, 1071).t(), torch.randn(1071, 60)[:, 4:44]
    segments = CASES["ragged in nested groups"]
    for got, wanted in zip(
        native.outer_wgrad(x, g, segments), native.outer_wgrad(x.contiguous(), g.contiguous(), segments), strict=True
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("case", CASES)
def test_outer_wgrad_gives_the_same_bits_again(case: str) -> None:
    segments = CASES[case]
    x, g = torch.randn(sum(segments.lengths), 300), torch.randn(sum(segments.lengths), 700)
    first = native.outer_wgrad(x, g, segments)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, native.outer_wgrad(x, g, segments), strict=True))


def test_weights_leave_the_norms_as_they_are() -> None:
    torch.manual_seed(0)
    segments = CASES["ragged in nested groups"]
    x, g = torch.randn(1071, 48, dtype=torch.float64), torch.randn(1071, 80, dtype=torch.float64)
    weight = torch.tensor([1.0, 2.0, -0.5, 0.0, 3.0], dtype=torch.float64)
    dw, sqnorm = native.outer_wgrad(x, g, segments, weight=weight)
    torch.testing.assert_close(dw, torch.einsum("s,sdp->dp", weight, per_segment(x, g, segments)))
    torch.testing.assert_close(sqnorm, native.outer_sqnorm(x, g, segments))


def test_an_output_without_rows_is_zero() -> None:
    segments = ragged([3, 4], [0, 0])
    x, g = torch.randn(7, 5), torch.randn(7, 6)
    dw, _ = native.outer_wgrad(x, g, segments, outputs=torch.tensor([1, 1]), n_outputs=3)
    assert dw[0].count_nonzero() == dw[2].count_nonzero() == 0
    torch.testing.assert_close(dw[1], g.t() @ x)


def test_short_segments_go_by_the_gram_method_and_long_ones_do_not() -> None:
    assert native.outer_method(1, 1024, 1024, True) == "gram"
    assert native.outer_method(4096, 1024, 1024, True) == "direct"
    assert native.outer_method(200, 768, 256, True) == "direct"
    assert native.outer_method(200, 768, 256, False, amx=False) == "gram"
    assert native.outer_method(200, 768, 256, False, amx=True) == "direct"


@pytest.mark.parametrize(
    ("name", "position", "wrong"),
    [
        ("outer_sqnorm", 2, torch.tensor([0, 3, 3, 11])),
        ("outer_wgrad", 3, torch.tensor([2, 0, 3])),
        ("outer_wgrad", 4, torch.tensor([[5, 4, 3]])),
        ("outer_wgrad", 5, torch.tensor([0, 2, 0])),
        ("lookup_wgrad", 0, torch.full((10,), 7)),
        ("segment_scale_grad", 2, torch.rand(9)),
        ("segment_sum", 2, torch.empty(3, 5)),
        ("segment_std", 1, torch.full((10,), -1)),
    ],
)
def test_what_would_leave_the_memory_is_refused(name: str, position: int, wrong: Tensor) -> None:
    operator, arguments = next(call for call in calls_of(name, "native") if call[0].name() == f"gradnorm::{name}")
    with pytest.raises(RuntimeError, match="gradnorm: "):
        operator(*arguments[:position], wrong, *arguments[position + 1 :])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_reward_stats_of_arrays(dtype: type[np.floating[Any]]) -> None:
    rewards = np.array([1.0, 0.0, 5.0, 2.0, 5.0, 1.0, 9.0], dtype)
    prompts = np.array([30, 30, -7, 30, -7, 30, 8])
    stats = _C.reward_stats(rewards, prompts)
    group = rewards[prompts == 30].astype(np.float64)
    variance, fourth = group.var(ddof=1), ((group - group.mean()) ** 4).mean()
    assert stats["prompt"].tolist() == [-7, 8, 30]
    assert stats["count"].tolist() == [2, 1, 4]
    assert stats["zero_std"].tolist() == [True, False, False]  # the spread of one is unknown
    assert stats["mean"].dtype == stats["task_mean"].dtype == dtype
    rtol = 4 * np.finfo(dtype).eps
    np.testing.assert_allclose(stats["mean"], [5, 9, 1], rtol=rtol)
    np.testing.assert_allclose(stats["std"], [0, np.nan, np.sqrt(variance)], rtol=rtol)
    error = np.sqrt((fourth - variance**2 / 3) / 4) / (2 * np.sqrt(variance))
    np.testing.assert_allclose(stats["std_error"], [np.nan, np.nan, error], rtol=rtol)


def test_reward_stats_keep_a_nan_to_its_prompt() -> None:
    stats = _C.reward_stats(np.array([1.0, np.nan, 1.0, 3.0]), np.array([0, 0, 1, 1]))
    assert np.isnan(stats["mean"]).tolist() == np.isnan(stats["std"]).tolist() == [True, False]
    assert not stats["zero_std"].any()


@pytest.mark.parametrize(
    ("rewards", "prompts", "message"),
    [
        (np.ones(3), np.arange(2), r"reward_stats: prompts must be an integer array \[3\].* got int64 \[2\]"),
        (np.ones(3), np.ones(3), r"reward_stats: prompts must be an integer array \[3\].* got float64 \[3\]"),
        (
            np.ones((3, 1)),
            np.arange(3),
            r"reward_stats: rewards must be a float32 or float64 array.* got float64 \[3, 1\]",
        ),
        (np.arange(3), np.arange(3), r"reward_stats: rewards must be a float32 or float64 array.* got int64 \[3\]"),
    ],
)
def test_reward_stats_say_what_is_wrong(rewards: np.ndarray, prompts: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.reward_stats(rewards, prompts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": np.zeros(2, int)}, r"reward_stats: tasks must be an integer array \[3\].* got int64 \[2\]"),
        ({"n_tasks": 0}, "reward_stats: n_tasks must be at least 1, got 0; pass the number of tasks"),
        ({"ddof": 2}, "reward_stats: ddof must be 0 or 1, got 2; pass 1 for the sample's deviation"),
    ],
)
def test_reward_stats_stay_inside_their_arrays(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.reward_stats(np.ones(3), np.arange(3), **options)


@pytest.mark.parametrize(
    ("tasks", "n_tasks", "refused"),
    [([0, 1, 2], 2, 2), ([0, -1, 0], None, 1), ([0, 2**62, 0], 4, 1), ([0, 1, 2], None, -1), ([0, 1, 2], 9, -1)],
)
@pytest.mark.parametrize("prompts", [[0, 1, 2], [0, 1, -1]])
def test_reward_stats_name_an_example_whose_task_is_out_of_range(
    prompts: list[int], tasks: list[int], n_tasks: int | None, refused: int
) -> None:
    stats = _C.reward_stats(np.ones(3), np.array(prompts), np.array(tasks), n_tasks=n_tasks)
    assert stats["refused"] == refused
    assert ("task_mean" in stats) == (refused < 0)
    if refused < 0:
        assert len(stats["task_mean"]) == (n_tasks or 3)


def test_the_module_says_what_it_was_built_with() -> None:
    assert re.match(r"\w+ \d+\.", _C.compiler)
    assert _C.torch_version.split(".")[0] == "2"
    assert _C.with_cuda == bool(_C.cuda_architectures) == bool(_C.cuda_compiler)


@needs_sources
def test_kernels_see_no_torch_header() -> None:
    for source in (ROOT / "csrc" / "kernels").rglob("*.*"):
        assert not re.search(r'#\s*include\s*[<"](torch|ATen|c10|pybind11)/', source.read_text()), source


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    for part in ("csrc", "tests/cpp", "CMakeLists.txt", "setup.py"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        (tmp_path / part).parent.mkdir(exist_ok=True)
        copy(ROOT / part, tmp_path / part)
    (tmp_path / "gradnorm_ext").mkdir()
    (tmp_path / "triton_kernels").mkdir()
    return tmp_path


def configure(sources: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["cmake", "-S", sources, "-B", sources / "build", "-DGRADNORM_EXTENSION=OFF", *options]
    environment = {name: value for name, value in os.environ.items() if name != "CUDACXX"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@needs_sources
def test_a_kernel_that_includes_torch_does_not_configure(sources: Path) -> None:
    kernel = sources / "csrc" / "kernels" / "cpu" / "segment_sum.cpp"
    kernel.write_text("#include <torch/torch.h>\n" + kernel.read_text())
    done = configure(sources, "-DGRADNORM_CUDA=OFF")
    assert done.returncode != 0
    assert "segment_sum.cpp: a kernel must not include" in " ".join(done.stderr.split())


@needs_sources
def test_without_nvcc_the_cpu_kernels_are_configured_alone(sources: Path) -> None:
    done = configure(sources, "-DCMAKE_CUDA_COMPILER=NOTFOUND")
    assert done.returncode == 0, done.stderr
    assert "building without the CUDA kernels" in done.stdout


@needs_sources
def test_native_off_removes_a_stale_module(sources: Path) -> None:
    stale = sources / "gradnorm_ext" / "_C.cpython-310-x86_64-linux-gnu.so"
    stale.touch()
    (sources / "gradnorm_ext" / "__init__.py").touch()
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "out"],
        cwd=sources,
        check=True,
        env={**os.environ, "GRADNORM_NATIVE": "off"},
        capture_output=True,
    )
    assert not stale.exists()
    assert (sources / "out" / "gradnorm_ext" / "__init__.py").exists()


@needs_sources
def test_a_misspelt_build_variable_is_refused(sources: Path) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=sources,
        check=False,
        text=True,
        env={**os.environ, "GRADNORM_CUDA": "yes"},
        capture_output=True,
    )
    assert "GRADNORM_CUDA must be one of auto, on, off, got 'yes'" in done.stderr


@needs_sources
def test_the_source_folder_is_not_taken_for_tritons_package() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import triton_kernels"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "this is gradnorm_ext's source folder" in done.stderr
