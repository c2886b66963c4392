"""Operations in Triton, one file per operation and one function per name here; imports torch and triton only.

Installed as ``gradnorm_ext.triton_kernels``. What is not here, `gradnorm_ext.backends` takes from the next backend.
"""

if __name__ != "gradnorm_ext.triton_kernels":
    raise ImportError(
        "this is gradnorm_ext's source folder, not Triton's `triton_kernels` package; python took it because the "
        "current directory is the repository root. Use gradnorm_ext.triton_kernels, or run python -P."
    )

from gradnorm_ext.triton_kernels.logit_gradient_rates import logit_gradient_rates
from gradnorm_ext.triton_kernels.logit_scores import logit_scores
from gradnorm_ext.triton_kernels.lookup_wgrad import lookup_sqnorm, lookup_wgrad
from gradnorm_ext.triton_kernels.outer_gram import outer_gram
from gradnorm_ext.triton_kernels.outer_wgrad import outer_sqnorm, outer_wgrad
from gradnorm_ext.triton_kernels.per_sample_wgrad import per_sample_sqnorm, per_sample_wgrad
from gradnorm_ext.triton_kernels.registration import DEVICES
from gradnorm_ext.triton_kernels.segment_scale_grad import segment_scale_grad
from gradnorm_ext.triton_kernels.segment_std import segment_std
from gradnorm_ext.triton_kernels.segment_sum import segment_sum

__all__ = [
    "DEVICES",
    "logit_gradient_rates",
    "logit_scores",
    "lookup_sqnorm",
    "lookup_wgrad",
    "outer_gram",
    "outer_sqnorm",
    "outer_wgrad",
    "per_sample_sqnorm",
    "per_sample_wgrad",
    "segment_scale_grad",
    "segment_std",
    "segment_sum",
]
