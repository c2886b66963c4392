"""What one use of a parameter adds to its gradient, in one of several forms that offer the same.

`sqnorm` (squared norms per segment and group), `wgrad` (the gradient, optionally weighted, and the norms from the same
pass), `total` (the weighted gradient alone), `by_new_group` (the gradients of the coarsest groups, the tasks, and the
norms), `gram` (the inner products of the tasks' gradients), and `kept` (what must not change until it is used).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from gradnorm_ext.gradients.conv import Convolved
from gradnorm_ext.gradients.grouped import Routed
from gradnorm_ext.gradients.lookup import Lookup
from gradnorm_ext.gradients.outer import Outer, Parted
from gradnorm_ext.gradients.per_sample import Sums
from gradnorm_ext.gradients.pullback import Pulled

Contribution = Outer | Parted | Routed | Lookup | Sums | Convolved | Pulled


def copied(contribution: Contribution) -> Contribution:
    """The same in memory of its own: a compiled graph writes over what it has no more use for."""
    parts = {one.name: getattr(contribution, one.name) for one in dataclasses.fields(contribution)}
    own: dict[str, Any] = {name: part.clone() for name, part in parts.items() if isinstance(part, Tensor)}
    return dataclasses.replace(contribution, **own)
