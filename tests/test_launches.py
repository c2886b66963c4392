"""What the host does for a layer: how many kernels an operation launches, after the first layer of a block.

Counted on CPU tensors, with Triton's launches replaced by nothing.
"""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gradnorm_ext.segments import Groups, Segments

triton = pytest.importorskip("triton")  # optional
interpreter = pytest.importorskip("triton.runtime.interpreter")
triton_kernels = pytest.importorskip("gradnorm_ext.triton_kernels")
remembered = pytest.importorskip("gradnorm_ext.triton_kernels.remembered")

NO_KERNEL = {  # of torch's operations: what only makes or describes memory
    *(
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "view",
        "_unsafe_view",
        "slice",
        "select",
    ),
    *(
        "t",
        "transpose",
        "permute",
        "expand",
        "unsqueeze",
        "squeeze",
        "alias",
        "detach",
        "as_strided",
        "reshape",
        "narrow",
    ),
    *("split", "split_with_sizes", "unbind", "unfold", "diagonal"),
}


class Counted(TorchDispatchMode):
    """Torch's kernels by name; Triton's launches are counted by `launches`."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "gradnorm_triton":
            with self:
                return function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        result = function(*args, **kwargs)
        writes = [one for one in (result if isinstance(result, tuple | list) else [result]) if torch.is_tensor(one)]
        if function.overloadpacket.__name__ not in NO_KERNEL and any(one.numel() for one in writes):
            self.found.append(function.overloadpacket.__name__)
        return result


@pytest.fixture
def launches(monkeypatch):
    made = []
    monkeypatch.setattr(triton.runtime.JITFunction, "run", lambda *args, **kwargs: made.append("triton"))
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *args, **kwargs: made.append("triton"))
    return made


LEVELS = {
    "examples": [],
    "one task": [(torch.zeros(4, dtype=torch.int64), 1)],
    "tasks": [(torch.tensor([0, 1, 1, 0]), 2)],
    "prompts and tasks": [(torch.tensor([2, 0, 1, 2]), 3), (torch.tensor([0, 1, 1, 0]), 2)],
}


def segments_of(levels, length=600):
    return Segments.equal(4, length, Groups.of(4, LEVELS[levels]))


def counted(call, launches):
    """Triton's launches and torch's kernels of a later layer's call."""
    call()
    launches.clear()
    with Counted() as mode:
        call()
    return len(launches), mode.found


WEIGHTS = {"unweighted": None, "weighted": torch.linspace(-1, 2, 4)}


@pytest.mark.parametrize("weighted", WEIGHTS)
@pytest.mark.parametrize("levels", LEVELS)
def test_a_norm_layer_or_bias_takes_one_launch_and_one_sum(levels, weighted, launches):
    segments, grads, weight = segments_of(levels), torch.randn(4, 64), WEIGHTS[weighted]
    found = counted(lambda: triton_kernels.per_sample_wgrad(grads, segments, weight=weight), launches)
    assert found == (1, ["sum"])
    found = counted(lambda: triton_kernels.per_sample_sqnorm(grads, segments), launches)
    assert found == (1, ["sum"])


def test_what_is_remembered_is_made_once_for_the_same_tensors():
    made = []

    def make(first, *others):
        made.append(others)
        return torch.zeros(3)

    first, other = torch.zeros(2), torch.zeros(2)
    found = remembered.remembered(make, first, other, 5)
    assert remembered.remembered(make, first, other, 5) is found and len(made) == 1
    assert remembered.remembered(make, first, other, 6) is not found and len(made) == 2
    other.add_(1)  # in place: it is another now
    assert remembered.remembered(make, first, other, 5) is not found and len(made) == 3
    assert remembered.remembered(make, first, other, 5) is not found and len(made) == 3
    first.add_(1)
    remembered.remembered(make, first, other, 5)
    assert len(made) == 4


def test_what_is_remembered_goes_with_its_tensor_and_is_bounded():
    class Made:
        pass

    def make(first, number):
        return Made()

    first = torch.zeros(2)
    found = [weakref.ref(remembered.remembered(make, first, number)) for number in range(20)]
    gc.collect()
    assert sum(one() is not None for one in found) <= 8
    assert found[-1]() is not None
    del first
    gc.collect()
    assert all(one() is None for one in found)


def test_a_walk_goes_with_its_segments(launches):
    x, g = torch.randn(40, 8), torch.randn(40, 8)
    before = len(remembered._kept)
    segments = segments_of("tasks", 10)
    triton_kernels.outer_wgrad(x, g, segments, method="fused")
    triton_kernels.per_sample_wgrad(torch.randn(4, 8), segments)
    assert len(remembered._kept) > before
    del segments
    gc.collect()
    assert len(remembered._kept) == before


def test_segments_that_change_in_place_are_walked_anew():
    """As a buffer that the next batch's are copied into."""
    lengths = torch.tensor([[3, 4, 1], [1, 2, 5]])
    x, g = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    segments = Segments.from_lengths(lengths[0], Groups.of(3, [(torch.tensor([0, 1, 0]), 2)]))
    for some in lengths:
        segments.offsets[1:] = some.cumsum(0)
        again = Segments.from_lengths(some, segments.groups)
        for method in ("gram", "fused"):
            found = triton_kernels.outer_wgrad(x, g, segments, method=method)
            torch.testing.assert_close(found, triton_kernels.outer_wgrad(x, g, again, method=method))
            assert found[1].equal(triton_kernels.outer_wgrad(x, g, again, method=method)[1])


def rows_of(segments, d=64, p=64, dtype=torch.bfloat16):
    rows = int(segments.offsets[-1])
    return torch.randn(rows, p).to(dtype), torch.randn(rows, d).to(dtype)


@pytest.mark.parametrize("weighted", WEIGHTS)
@pytest.mark.parametrize("levels", LEVELS)
def test_a_linear_layer_by_the_fused_method_takes_one_launch_and_two_kernels_at_most(levels, weighted, launches):
    segments, weight = segments_of(levels), WEIGHTS[weighted]
    x, g = rows_of(segments)
    found = counted(lambda: triton_kernels.outer_wgrad(x, g, segments, weight=weight, method="fused"), launches)
    if not LEVELS[levels]:
        assert found == (1, ["sum"])
    elif levels == "one task" and weight is None:
        assert found == (1, ["sum", "sum"])  # of the segments, and of all rows
    else:
        assert found == (1, ["new_zeros", "sum"])
    triton_launches, kernels = counted(lambda: triton_kernels.outer_sqnorm(x, g, segments, method="fused"), launches)
    assert triton_launches == 1 and len(kernels) <= 2


@pytest.mark.parametrize("levels", LEVELS)
def test_gram_takes_one_launch_and_one_sum_of_segments_and_three_kernels_more_a_level(levels, launches):
    """Groups' rows are ragged: their blocks are added up by a launch of their own, then summed and put in their places."""
    segments = segments_of(levels, 40)
    x, g = rows_of(segments)
    n_groups = sum(count > 1 for _, count in LEVELS[levels])
    triton_launches, kernels = counted(lambda: triton_kernels.outer_sqnorm(x, g, segments, method="gram"), launches)
    one_task = levels == "one task"  # is all rows: by the fused method, which is cheap for one group
    assert triton_launches == 1 + 2 * n_groups + one_task
    assert kernels.count("sum") == 1 + n_groups + one_task and kernels.count("index_put_") == n_groups
    assert len(kernels) <= 1 + 2 * n_groups + (n_groups > 0) + 3 * one_task


@pytest.mark.parametrize("length", [None, 300])
def test_a_scale_of_a_norm_takes_two_launches_and_a_sum(length, launches):
    segments = (
        segments_of("tasks")
        if length
        else Segments.from_lengths(torch.tensor([3, 40, 2, 5]), segments_of("tasks").groups)
    )
    x, g = rows_of(segments)

    def scale():
        grads = triton_kernels.segment_scale_grad(x, g, segments)
        return triton_kernels.per_sample_wgrad(grads, segments)

    triton_launches, kernels = counted(scale, launches)
    assert triton_launches == 2 and set(kernels) <= {"sum"} and len(kernels) <= 2
