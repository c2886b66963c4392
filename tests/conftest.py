"""What must be set before any test module is imported."""

import os

import hypothesis
import pytest
import torch
import torch.nn.functional as F

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
hypothesis.settings.register_profile(
    "thorough", deadline=None, max_examples=2000
)  # pytest --hypothesis-profile=thorough
hypothesis.settings.load_profile("untimed")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must precede the import of any Triton kernel

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores; torch would give all of them to each
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))

if not torch.cuda.is_available():  # there it also forbids what is not deterministic
    # What `new_empty` gives is NaN, or the largest integer: an entry that nobody writes is seen.
    torch.use_deterministic_algorithms(True)


@pytest.fixture
def in_float64(monkeypatch):
    """Parts that models compute in float32 whatever they are given, in float64."""

    def softmax(input, dim=None, _stacklevel=3, dtype=None, plain=F.softmax):
        return plain(input, dim, _stacklevel, torch.float64 if dtype == torch.float32 else dtype)

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(F, "softmax", softmax)
