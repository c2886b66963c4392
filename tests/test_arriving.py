"""Figures of all ranks are sent when a block closes, and waited for when they are read: late, on one rank only, or never."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from divided import CLOSE, OF_RANK, RANKS, TASKS, Truth, ddp, fsdp, make_case
from oracle import relative
from torch.distributed.distributed_c10d import _get_default_store
from worlds import run_world

from gradnorm_ext import History, Meter, Stats
from gradnorm_ext.distributed import Arriving

FIGURES = ("task_norm", "task_sqnorm", "task_sqnorm_unbiased", "task_variance")


def blocks(rank: int, wrap, **options) -> tuple[Meter, Callable[..., Stats], list]:
    """A meter, a block of it that does something before it closes, and what is to be measured there, unread."""
    case, part = make_case(), OF_RANK[rank]
    truth = Truth(case)
    model = wrap(copy.deepcopy(case.model))
    meter = Meter(model, tasks=2, **options)

    def block(scale: float = 1.0, before_it_closes: Callable[[], None] = lambda: None) -> Stats:
        with meter.observe(tasks=TASKS[part]):
            (scale * case.loss(model(case.x[part]), case.y[part])).backward()
            before_it_closes()
        return meter.stats

    assert type(block()) is Arriving
    return meter, block, [truth.example_norm[part], *truth.estimates()]


def assert_measured(stats: Stats, expected: list, scale: float = 1.0) -> None:
    example_norm, sqnorm, unbiased, variance = expected
    assert relative(stats.example_norm, scale * example_norm) <= CLOSE
    assert relative(stats.task_sqnorm, scale**2 * sqnorm) <= CLOSE
    assert relative(stats.task_sqnorm_unbiased, scale**2 * unbiased) <= CLOSE
    assert relative(stats.task_variance, scale**2 * variance) <= CLOSE
    assert stats.task_count.tolist() == TASKS.bincount().tolist() and bool(stats.finite)


def check_a_block_closes_while_another_rank_is_in_it(rank: int, wrap) -> None:
    store = _get_default_store()
    _, block, expected = blocks(rank, wrap)
    closed = f"closed {wrap.__name__}"
    if rank == 0:
        stats = block()
        assert type(stats) is Arriving
        assert relative(stats.example_norm, expected[0]) <= CLOSE and stats.tasks.tolist() == TASKS[OF_RANK[0]].tolist()
        assert type(stats) is Arriving  # none of these is of all ranks
        store.set(closed, "")
    else:
        stats = block(before_it_closes=lambda: store.wait([closed], datetime.timedelta(seconds=60)))
    assert_measured(stats, expected)
    assert type(stats) is Stats


def check_figures_are_read_late_in_any_order_or_never(rank: int, wrap) -> None:
    _, block, expected = blocks(rank, wrap)
    scales = (1.0, 2.0, 4.0, 8.0)
    found = [block(scale) for scale in scales]
    dist.barrier()
    if rank == 0:  # the others need not read
        assert_measured(found[2], expected, scales[2])
        assert type(found[2]) is Stats and type(found[3]) is Arriving
    dist.barrier()
    for i in (3, 0, 2) if rank == 0 else (0, 2, 3):
        assert_measured(found[i], expected, scales[i])


def check_copies(rank: int, wrap) -> None:
    meter, block, expected = blocks(rank, wrap, per_layer=True)
    uses: dict[str, Callable[[Stats], Stats]] = {
        "pickle": lambda stats: pickle.loads(pickle.dumps(stats)),
        "copy": copy.copy,
        "deepcopy": copy.deepcopy,
        "of the meter": lambda stats: copy.deepcopy(meter).stats,
        "replace": lambda stats: dataclasses.replace(stats, prompts=None),
        "weighted": lambda stats: stats.weighted(torch.ones(2), "tasks"),
    }
    for how, use in uses.items():
        used = use(block())
        assert type(used) is Stats and vars(used).keys() == {field.name for field in dataclasses.fields(Stats)}, how
        assert_measured(used, expected)
    merged = Stats.merged([block(), block()])
    assert relative(merged.task_sqnorm_unbiased, expected[2]) <= CLOSE
    assert merged.task_count.tolist() == (2 * TASKS.bincount()).tolist()
    history = History(0.9, meter.task_names)
    history.append(block())
    assert block().log_dict()["gradnorm/task/1/examples"] == float(TASKS.sum())
    of_layers = block().layers
    assert relative(sum(layer.task_sqnorm for layer in of_layers.values()), expected[1]) <= CLOSE


def check_readers(rank: int, wrap) -> None:
    """Threads that read at once, and modes that must not reach the figures."""
    _, block, expected = blocks(rank, wrap)
    stats = block()
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda which: getattr(stats, FIGURES[which % 4]), range(32)))
    assert_measured(stats, expected)
    assert all(one is getattr(stats, FIGURES[i % 4]) for i, one in enumerate(found))
    # One that was looked up before another thread had formed them, and is called after.
    assert vars(Arriving)["task_norm"].__get__(stats, Arriving) is stats.task_norm
    Arriving.wait(stats)
    stats = block()
    with torch.inference_mode():
        assert not stats.task_norm.is_inference()
    assert not stats.task_norm.requires_grad


def check_a_rank_that_fails(rank: int) -> None:
    """The others' block closes; whoever reads a figure of all ranks is told, and the next block."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=2))
    case, part = make_case(), OF_RANK[rank]
    model = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(case.model), process_group=group)
    meter = Meter(model, tasks=2)

    def block(fails: bool = False) -> None:
        with meter.observe(tasks=TASKS[part]):
            case.loss(model(case.x[part]), case.y[part]).backward()
            if fails:
                raise ArithmeticError

    def opens() -> None:
        with meter.observe(tasks=TASKS[part]):
            raise AssertionError

    block()
    norm = meter.stats.task_norm
    dist.barrier()
    if rank == 1:
        with pytest.raises(ArithmeticError):
            block(fails=True)
        assert meter.stats.task_norm is norm  # of the block before
    else:
        block()
        stats, start = meter.stats, time.monotonic()
        assert bool((stats.example_norm > 0).all())
        for read in (opens, lambda: stats.task_norm, lambda: stats.finite, lambda: pickle.dumps(stats)):
            with pytest.raises(RuntimeError, match=r"[Tt]imed out|timeout"):
                read()
        with pytest.raises(AssertionError):  # the next block is told once
            opens()
        assert type(stats) is Arriving and bool((stats.example_norm > 0).all())
        assert time.monotonic() - start < 7  # one wait, not one after the other
    assert not any(key.startswith("_gradnorm") for module in model.modules() for key in vars(module))
    dist.barrier()


def check_ddp(rank: int) -> None:
    check_a_block_closes_while_another_rank_is_in_it(rank, ddp)
    check_figures_are_read_late_in_any_order_or_never(rank, ddp)
    check_copies(rank, ddp)
    check_readers(rank, ddp)
    check_a_rank_that_fails(rank)


def check_fsdp(rank: int) -> None:
    check_a_block_closes_while_another_rank_is_in_it(rank, fsdp)
    check_figures_are_read_late_in_any_order_or_never(rank, fsdp)


def test_figures_of_all_ranks_are_waited_for_when_they_are_read(tmp_path):
    run_world(RANKS, [check_ddp, check_fsdp], tmp_path)


def end_unread(rank: int, folder: str) -> None:
    """A process that has no more to do when its block has closed."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    _, block, expected = blocks(rank, fsdp)
    if rank == 0:
        assert type(block()) is Arriving
    else:
        assert_measured(block(before_it_closes=lambda: time.sleep(2)), expected)


def test_a_process_does_not_end_before_its_figures_have_arrived(tmp_path):
    """The others would miss them, and a thread that receives theirs would abort a process that is on its way out."""
    call = "import runpy, sys; runpy.run_path(sys.argv[1])['end_unread'](int(sys.argv[2]), sys.argv[3])"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    ranks = [
        subprocess.Popen([sys.executable, "-c", call, __file__, str(rank), str(tmp_path)], env=environment)
        for rank in range(RANKS)
    ]
    assert [rank.wait(120) for rank in ranks] == [0] * RANKS
