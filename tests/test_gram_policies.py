"""IMTLG and Gramian against TorchJD, and against LibMTL's formulas derived anew from the gradients themselves."""

import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch
from gradients import stats_of
from hypothesis import given
from hypothesis import strategies as st

from gradnorm_ext.policies import IMTLG, Gramian

torchjd = pytest.importorskip("torchjd.aggregation")  # optional

EPS = torch.finfo(torch.float64).eps


@st.composite
def gradients(draw, least=1, width=6):
    """``[K, width]`` with norms from 2^-10 to 2^10, well conditioned or (fewer columns than rows) dependent."""
    tasks = draw(st.integers(least, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rows = torch.randn(tasks, width, generator=generator, dtype=torch.float64)
    exponents = draw(st.lists(st.floats(-10, 10), min_size=tasks, max_size=tasks))
    return rows * 2 ** torch.tensor(exponents, dtype=torch.float64)[:, None]


def measured(gradients, absent=0):
    """Statistics of one example per task, and of some tasks without examples."""
    tasks = list(range(len(gradients)))
    names = tuple(str(k) for k in range(len(gradients) + absent))
    return stats_of(gradients, tasks, names=names, gram=True)


WEIGHTINGS = {
    "MGDA": torchjd.MGDAWeighting,
    "PCGrad": torchjd.PCGradWeighting,
    "AlignedMTL": torchjd.AlignedMTLWeighting,
    "UPGrad": torchjd.UPGradWeighting,
    "DualProj": torchjd.DualProjWeighting,
    "FairGrad": lambda: torchjd.FairGradWeighting(1.0),
    "IMTL-G": torchjd.IMTLGWeighting,
}


def drawn(weighting, gram):
    """Its weights with the random numbers that it draws, if any, fixed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return weighting(gram)


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("size", [1.0, 1e-12])
def test_gramian_has_torchjds_weights_however_small_the_gradients(name, size):
    rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    stats, weighting = measured(rows * size), WEIGHTINGS[name]()
    gram = rows @ rows.t()
    expected = drawn(weighting, gram / gram.trace())
    found = drawn(Gramian(weighting, scale=3.0), stats)
    # A solver stops when it is close enough, from inputs that differ in their last bits.
    torch.testing.assert_close(found, 3 * expected, rtol=1e-5, atol=0)
    assert expected.abs().sum() > 0
    if name in ("UPGrad", "DualProj") and size < 1:
        assert float(drawn(weighting, stats.task_gram).std()) < 1e-6 * float(expected.std())  # what it does by itself


def test_gramian_leaves_absent_tasks_out_of_the_matrix():
    rows = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    seen = []

    def weighting(gram):
        seen.append(gram)
        return torch.arange(1.0, 1 + len(gram))

    weights = Gramian(weighting)(measured(rows, absent=2))
    assert weights.tolist() == [1.0, 2.0, 1.0, 1.0]
    gram = rows @ rows.t()
    torch.testing.assert_close(seen[0], (gram / gram.trace()).double())
    minimum_norm = Gramian(torchjd.MGDAWeighting())(measured(rows, absent=1))  # would put all weight on the absent one
    assert minimum_norm[:2].sum() == pytest.approx(1)


def test_gramian_gives_a_symmetric_matrix_whatever_rounding_did():
    rows = torch.tensor([[3.0, 0.0], [1.0, 1.0], [0.5, 2.0]], dtype=torch.float64)
    stats = measured(rows)
    lopsided = stats.task_gram * (1 + EPS * torch.arange(9, dtype=torch.float64).view(3, 3))
    seen = []
    Gramian(lambda gram: seen.append(gram) or gram.diagonal())(dataclasses.replace(stats, task_gram=lopsided))
    assert not lopsided.equal(lopsided.t()) and seen[0].equal(seen[0].t())


@pytest.mark.parametrize("gradient", [0.0, torch.nan, torch.inf])
def test_gramian_asks_nobody_where_there_is_nothing_to_weigh(gradient):
    def weighting(gram):
        raise AssertionError("called")

    assert Gramian(weighting)(measured(torch.tensor([[gradient]]))).tolist() == [1.0]


@given(gradients())
def test_imtlg_has_torchjds_weights_times_the_number_of_tasks(rows):
    stats = measured(rows)
    gram = stats.task_gram
    expected = torchjd.IMTLGWeighting()(gram / gram.trace()) * len(rows)
    # The pseudo-inverse of a matrix multiplies errors by its condition, and the sum of weights may cancel.
    slack = 100 * EPS * float(torch.linalg.cond(gram)) * float(1 + expected.abs().max()) ** 2
    torch.testing.assert_close(IMTLG()(stats), expected, rtol=0, atol=slack)


@given(gradients(least=2))
def test_imtlg_has_libmtls_weights_times_the_number_of_tasks(rows):
    """LibMTL solves for the weights of all tasks but the first, from differences of gradients and of unit gradients."""
    unit = rows / rows.norm(dim=1, keepdim=True)
    differences, of_units = rows[:1] - rows[1:], unit[:1] - unit[1:]
    system = differences @ of_units.t()
    others = torch.linalg.solve(system.t(), (rows[0] @ of_units.t()))
    expected = torch.cat([1 - others.sum()[None], others]) * len(rows)
    conditions = float(torch.linalg.cond(system)) + float(torch.linalg.cond(rows @ rows.t()))
    slack = 100 * EPS * conditions * float(1 + expected.abs().max()) ** 2
    torch.testing.assert_close(IMTLG()(measured(rows)), expected, rtol=0, atol=slack)


@given(gradients())
def test_imtlg_makes_the_projections_of_the_step_equal(rows):
    weights = IMTLG()(measured(rows))
    projections = (rows / rows.norm(dim=1, keepdim=True)) @ (weights @ rows)
    sizes = weights.abs() @ rows.norm(dim=1)
    slack = 100 * EPS * float(torch.linalg.cond(rows @ rows.t()))
    assert float(projections.max() - projections.min()) <= slack * float(sizes)
    assert float(weights.mean()) == pytest.approx(1, abs=slack * float(weights.abs().max()))


@given(gradients(), st.randoms(), st.sampled_from([2.0**-20, 0.25, 2.0**20]))
def test_imtlg_permutes_with_the_tasks_and_does_not_change_when_all_gradients_scale(rows, random, scale):
    order = list(range(len(rows)))
    random.shuffle(order)
    weights = IMTLG()(measured(rows))
    slack = 100 * EPS * float(torch.linalg.cond(rows @ rows.t())) * float(1 + weights.abs().max()) ** 2
    torch.testing.assert_close(IMTLG()(measured(rows[order])), weights[order], rtol=0, atol=slack)
    assert torch.equal(IMTLG()(measured(rows * scale)), weights)  # powers of two: exact


def test_imtlg_stays_finite_where_gradients_depend_on_each_other_cancel_or_are_missing():
    row = torch.tensor([[1.0, 2.0]])
    alike = IMTLG()(measured(torch.cat([row, row, row])))
    torch.testing.assert_close(alike, torch.ones(3, dtype=torch.float64))
    assert IMTLG()(measured(torch.cat([row, -row]))).tolist() == [1.0, 1.0]
    assert IMTLG()(measured(torch.zeros(2, 3))).tolist() == [1.0, 1.0]
    with_absent = IMTLG()(measured(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), absent=1))
    torch.testing.assert_close(with_absent, torch.tensor([0.5, 1.5, 1.0]).double())
    spoiled = IMTLG()(measured(torch.tensor([[torch.nan, 0.0], [0.0, 1.0]])))
    assert spoiled.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: IMTLG()(SimpleNamespace(task_gram=None)),
            ValueError,
            "IMTLG: stats.task_gram must have been measured, got None; pass gram=True to the meter",
        ),
        (
            lambda: Gramian(torch.diagonal)(SimpleNamespace(task_gram=None)),
            ValueError,
            "Gramian: stats.task_gram must have been measured, got None; pass gram=True to the meter",
        ),
        (
            lambda: Gramian(torchjd.UPGradWeighting),
            TypeError,
            f"Gramian: weighting must be a function of a Gram matrix, got {torchjd.UPGradWeighting!r}; "
            "pass an object, such as torchjd.aggregation.UPGradWeighting()",
        ),
        (
            lambda: Gramian(torch.square)(measured(torch.eye(2))),
            ValueError,
            f"Gramian: weighting must return [2], one weight per task that is present, got [2, 2] from {torch.square!r}; "
            "make it a function of a matrix of any size",
        ),
    ],
)
def test_says_what_is_wrong_and_what_to_do(call, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call()
