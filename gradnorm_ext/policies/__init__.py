"""How to weigh the tasks or examples of a step: a policy is any function from statistics to weights.

A policy is called with a :class:`~gradnorm_ext.stats.Stats` and returns a tensor of weights, by which the gradients are
multiplied before they are added up; weights of one leave the step as it was. Its attribute ``weighs`` says what of:
"tasks", ``[K]``, or "examples", ``[B]``. A plain function without the attribute weighs tasks:

    def by_hand(stats):
        return stats.task_norm.new_tensor([1.0, 0.5])

The ones here are values (frozen dataclasses); what some remember from step to step lies in their ``state``
(:class:`~gradnorm_ext.policies.policy.Stateful`). Those that need more than statistics are fed it inside the observe
block. They wait for no device, but for :class:`IMTLG` and :class:`Gramian`. A norm that is not finite never becomes a
weight: the example or task gets 1, and skipping the step is left to the optimizer, which sees the norms too.
``docs/policies.md`` has a table of what each needs, what it costs and where its formula comes from.
"""

from gradnorm_ext.policies.chain import Chain
from gradnorm_ext.policies.classes import GSA
from gradnorm_ext.policies.gram import IMTLG, Gramian
from gradnorm_ext.policies.norms import ClipExamples, Equal, GradNorm, InverseNorm, NormalizeExamples, PiKE
from gradnorm_ext.policies.pairs import PairBalance
from gradnorm_ext.policies.policy import Policy, State, Stateful, weighs_of
from gradnorm_ext.policies.reward import MTGRPO, RewardStd

__all__ = [
    "GSA",
    "IMTLG",
    "MTGRPO",
    "Chain",
    "ClipExamples",
    "Equal",
    "GradNorm",
    "Gramian",
    "InverseNorm",
    "NormalizeExamples",
    "PairBalance",
    "PiKE",
    "Policy",
    "RewardStd",
    "State",
    "Stateful",
    "weighs_of",
]
