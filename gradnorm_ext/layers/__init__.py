"""How a model's layers are observed: taps see a parameter's uses, rules measure them, the observation adds them up."""

from gradnorm_ext.layers import experts as _experts  # noqa: F401  importing them lists them
from gradnorm_ext.layers import rules as _rules  # noqa: F401
from gradnorm_ext.layers import tensor_parallel as _tensor_parallel  # noqa: F401
from gradnorm_ext.layers import unruled as _unruled  # noqa: F401
from gradnorm_ext.layers.checkpoints import repeatable_checkpoints
from gradnorm_ext.layers.compiled import Graphs, compiled_modules, whole_graph_backend
from gradnorm_ext.layers.functions import Interception, measure_as
from gradnorm_ext.layers.heads import HeadScores, fused_head
from gradnorm_ext.layers.layouts import Examples, Layout, Packing
from gradnorm_ext.layers.observation import Memory, Observation, Plan, accumulate
from gradnorm_ext.layers.taps import observe_modules, release_modules

__all__ = [
    "Examples",
    "Graphs",
    "HeadScores",
    "Interception",
    "Layout",
    "Memory",
    "Observation",
    "Packing",
    "Plan",
    "accumulate",
    "compiled_modules",
    "fused_head",
    "measure_as",
    "observe_modules",
    "release_modules",
    "repeatable_checkpoints",
    "whole_graph_backend",
]
