"""Worlds of a few processes (gloo, on the CPU), in each of which several checks run one after the other."""

from __future__ import annotations

import datetime
import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_world(size: int, checks: Sequence[Callable[[int], None]], folder: Path) -> None:
    """Run the checks, functions of the rank at the top of a module, on ``size`` ranks; raise what any of them raised."""
    context = mp.spawn(_process, (size, list(checks), str(folder)), nprocs=size, join=False)
    failed = None
    try:
        while not context.join():
            pass
    except mp.ProcessExitedException as error:
        failed = error
    found = [path.read_text() for path in sorted(folder.glob("failure*"))]
    if found or failed:
        raise AssertionError("\n".join(found) or str(failed))


def _process(rank: int, size: int, checks: Sequence[Callable[[int], None]], folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=datetime.timedelta(minutes=5))
    for check in checks:
        try:
            torch.manual_seed(0)
            check(rank)
            dist.barrier()
        except BaseException:
            text = f"{check.__name__}, rank {rank}:\n{traceback.format_exc()}"
            Path(folder, f"failure {check.__name__} {rank}").write_text(text)
            os._exit(1)  # the others are not waited for
    dist.destroy_process_group()
