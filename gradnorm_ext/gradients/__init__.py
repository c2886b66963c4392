"""What one use of a parameter adds to its gradient, per example: the forms it comes in, and the sums of several."""

from gradnorm_ext.gradients.conv import ConvGrad, Geometry
from gradnorm_ext.gradients.grouped import ExpertRouting, GroupedOuter
from gradnorm_ext.gradients.lookup import Lookup
from gradnorm_ext.gradients.outer import ChunkedOuter, Outer
from gradnorm_ext.gradients.per_sample import PerSampleGrads
from gradnorm_ext.gradients.pullback import Pullback
from gradnorm_ext.gradients.rows import gram_of, group_members, one_hot_mask
from gradnorm_ext.gradients.several import (
    StridedView,
    ViewedTerm,
    combined_gradient,
    combined_gram,
    combined_sqnorm,
    compress_tied_head,
)
from gradnorm_ext.gradients.term import GradientTerm

__all__ = [
    "ChunkedOuter",
    "ConvGrad",
    "ExpertRouting",
    "Geometry",
    "GradientTerm",
    "GroupedOuter",
    "Lookup",
    "Outer",
    "PerSampleGrads",
    "Pullback",
    "StridedView",
    "ViewedTerm",
    "combined_gradient",
    "combined_gram",
    "combined_sqnorm",
    "compress_tied_head",
    "gram_of",
    "group_members",
    "one_hot_mask",
]
