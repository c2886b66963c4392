"""Worlds of a few processes (gloo, on the CPU), in each of which several checks run one after the other."""

from __future__ import annotations

import datetime
import os
import runpy
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_world(size: int, checks: Sequence[Callable[[int], None]], folder: Path, *, timeout: float = 300) -> None:
    """Run the checks, functions of the rank at the top of one file, on ``size`` ranks; raise what any of them raised.

    No collective waits longer than ``timeout`` seconds.
    """
    file, names = checks[0].__code__.co_filename, [check.__name__ for check in checks]
    context = mp.spawn(_process, (size, file, names, str(folder), timeout), nprocs=size, join=False)
    failed = None
    try:
        while not context.join():
            pass
    except mp.ProcessExitedException as error:
        failed = error
    found = [path.read_text() for path in sorted(folder.glob("failure*"))]
    if found or failed:
        raise AssertionError("\n".join(found) or str(failed))


def _process(rank: int, size: int, file: str, names: Sequence[str], folder: str, timeout: float) -> None:
    found = runpy.run_path(file)  # under what name pytest imported it, another process does not know
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    limit = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    for name in names:
        try:
            torch.manual_seed(0)
            found[name](rank)
            dist.barrier()
        except BaseException:
            text = f"{name}, rank {rank}:\n{traceback.format_exc()}"
            Path(folder, f"failure {name} {rank}").write_text(text)
            os._exit(1)  # the others are not waited for
    dist.destroy_process_group()
