"""What launchers work out of a block's segments, kept for its other layers, which are given the same tensors."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

T = TypeVar("T")
_AT_MOST = 8  # things that are kept of one tensor: nothing comes back of blocks that are over

_kept: Any = WeakIdKeyDictionary()  # by the first tensor, for as long as that lives


def remembered(make: Callable[..., T], first: Tensor, *others: Any) -> T:
    """``make(first, *others)``, once for the same tensors as they are now.

    What is made must not refer to the first tensor, or it would never go. It is made anew for another stream, which
    would else have to wait, and inside of a CUDA graph, which must work it out of what its tensors hold at each replay.
    """
    tensors = [first, *(one for one in others if isinstance(one, Tensor))]
    if any(one.is_inference() for one in tensors):
        return make(first, *others)
    stream = 0
    if first.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return make(first, *others)
        stream = torch.cuda.current_stream(first.device).cuda_stream
    key = make, stream, *(id(one) if isinstance(one, Tensor) else one for one in others), *(t._version for t in tensors)
    of_first = _kept.get(first)
    if of_first is None:
        of_first = _kept[first] = {}
    if key not in of_first:
        if len(of_first) == _AT_MOST:
            of_first.clear()
        of_first[key] = (
            make(first, *others),
            others,
        )  # which keeps the others, whose ids would else be those of new ones
    made: T = of_first[key][0]
    return made
