"""The gradient norm of every example, prompt and task during backward, and a step along reweighted gradients."""

import importlib.metadata

from gradnorm_ext import ops, policies
from gradnorm_ext.check import check
from gradnorm_ext.history import History
from gradnorm_ext.layers import HeadScores, fused_head, measure_as
from gradnorm_ext.logits import TokenScores, logit_gradient_rates, logit_scores
from gradnorm_ext.meter import Meter
from gradnorm_ext.optimizer import Reweighted
from gradnorm_ext.packing import cu_seqlens
from gradnorm_ext.policies import (
    GSA,
    IMTLG,
    MTGRPO,
    Chain,
    ClipExamples,
    Equal,
    GradNorm,
    Gramian,
    InverseNorm,
    NormalizeExamples,
    PairBalance,
    PiKE,
    RewardStd,
)
from gradnorm_ext.report import report
from gradnorm_ext.rewards import RewardStats, group_advantages, reward_stats
from gradnorm_ext.sampling import PromptSampler, TaskSampler, shares_by_size
from gradnorm_ext.stats import Stats

__version__ = importlib.metadata.version("gradnorm_ext")

__all__ = [
    "GSA",
    "IMTLG",
    "MTGRPO",
    "Chain",
    "ClipExamples",
    "Equal",
    "GradNorm",
    "Gramian",
    "HeadScores",
    "History",
    "InverseNorm",
    "Meter",
    "NormalizeExamples",
    "PairBalance",
    "PiKE",
    "PromptSampler",
    "RewardStats",
    "RewardStd",
    "Reweighted",
    "Stats",
    "TaskSampler",
    "TokenScores",
    "check",
    "cu_seqlens",
    "fused_head",
    "group_advantages",
    "logit_gradient_rates",
    "logit_scores",
    "measure_as",
    "ops",
    "policies",
    "report",
    "reward_stats",
    "shares_by_size",
]
