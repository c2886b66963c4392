"""Operations in Triton, one file per operation and one function per name here; imports torch and triton only.

Installed as ``gradnorm_ext.triton_kernels``. What is not here, `gradnorm_ext.backends` takes from the next backend.
"""

if __name__ != "gradnorm_ext.triton_kernels":
    raise ImportError(
        "this is gradnorm_ext's source folder, not Triton's `triton_kernels` package; python took it because the "
        "current directory is the repository root. Use gradnorm_ext.triton_kernels, or run python -P."
    )
