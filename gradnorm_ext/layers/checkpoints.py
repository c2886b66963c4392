"""Activation checkpoints while a block is open: their backward may run more than once, and through `autograd.grad`.

Verifying and the norms pass of two passes do that. torch's reentrant checkpoints refuse it, and selective ones give up
what they saved at the first time. So, inside of blocks, reentrant checkpoints run as the other kind, which computes the same,
and where a backward may be repeated selective ones compute everything again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.utils.checkpoint

from gradnorm_ext.layers.observation import Observation

checkpoint: Any = torch.utils.checkpoint  # two of its names are exchanged while a block is open
_open: list[Observation] = []
_checkpoint_function, _generator = checkpoint.CheckpointFunction, checkpoint._checkpoint_without_reentrant_generator


class _NotReentrant:
    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)


def _repeatable(
    function: Any, preserve_rng_state: Any, context_fn: Callable[[], Any], *args: Any, **kwargs: Any
) -> Any:
    if context_fn is not checkpoint.noop_context_fn:
        contexts = context_fn()
        selective = isinstance(contexts[0], checkpoint._CachingTorchDispatchMode)
        if selective and any(observation.repeats_backward for observation in _open):
            context_fn = checkpoint.noop_context_fn
        else:
            context_fn = lambda: contexts  # noqa: E731
            for observation in _open:
                observation.backward_once |= selective
    return _generator(function, preserve_rng_state, context_fn, *args, **kwargs)


@contextmanager
def repeatable_checkpoints(observation: Observation) -> Iterator[None]:
    """While an observation runs; blocks may overlap."""
    _open.append(observation)
    checkpoint.CheckpointFunction, checkpoint._checkpoint_without_reentrant_generator = _NotReentrant, _repeatable
    try:
        yield
    finally:
        _open.remove(observation)
        if not _open:
            checkpoint.CheckpointFunction = _checkpoint_function
            checkpoint._checkpoint_without_reentrant_generator = _generator
