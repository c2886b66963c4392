"""What one use of a parameter adds to its gradient, per example: the forms it comes in, and the sums of several."""

from gradnorm_ext.gradients.conv import Convolved, Geometry
from gradnorm_ext.gradients.grouped import Route, Routed
from gradnorm_ext.gradients.lookup import Lookup
from gradnorm_ext.gradients.outer import Outer, Parted
from gradnorm_ext.gradients.per_sample import Sums
from gradnorm_ext.gradients.pullback import Pulled
from gradnorm_ext.gradients.rows import chosen, gram_of, members_of_columns
from gradnorm_ext.gradients.several import Place, Placed, combined_gram, combined_sqnorm, compressed
from gradnorm_ext.gradients.term import GradientTerm

__all__ = [
    "Convolved",
    "Geometry",
    "GradientTerm",
    "Lookup",
    "Outer",
    "Parted",
    "Place",
    "Placed",
    "Pulled",
    "Route",
    "Routed",
    "Sums",
    "chosen",
    "combined_gram",
    "combined_sqnorm",
    "compressed",
    "gram_of",
    "members_of_columns",
]
