"""Trainers of other libraries that measure, and reweigh where asked to. Each module needs the library it is named after.

:mod:`gradnorm_ext.integrations.transformers`, :mod:`gradnorm_ext.integrations.trl` (``pip install gradnorm_ext[trainers]``).
Loops without a module of their own take a few lines: docs/integrate.md.
"""
