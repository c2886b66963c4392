"""How a model's layers are observed: taps see a parameter's uses, rules measure them, the observation adds them up."""

from gradnorm_ext.layers import rules as _rules  # noqa: F401  importing them lists them
from gradnorm_ext.layers import unruled as _unruled  # noqa: F401
from gradnorm_ext.layers.contributions import gram_of
from gradnorm_ext.layers.layouts import Examples, Layout, Packing
from gradnorm_ext.layers.observation import Memory, Observation, Plan, accumulate
from gradnorm_ext.layers.taps import observe_modules, release_modules

__all__ = [
    "Examples",
    "Layout",
    "Memory",
    "Observation",
    "Packing",
    "Plan",
    "accumulate",
    "gram_of",
    "observe_modules",
    "release_modules",
]
