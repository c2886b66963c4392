"""Where in the user's code a call was made: for errors, which alone pay for it."""

from __future__ import annotations

import linecache
import sys
from pathlib import Path

import torch

_PACKAGES = str(Path(__file__).parents[1]), str(Path(torch.__file__).parent), "<"  # the last: code without a file


def call_site() -> str:
    """``, called at model.py:12 (y = x @ w)`` of the innermost frame outside of torch and this package, or nothing."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(_PACKAGES):
        if frame.f_back is None:
            return ""
        frame = frame.f_back
    file, line = frame.f_code.co_filename, frame.f_lineno
    source = linecache.getline(file, line).strip()
    return f", called at {file}:{line}" + (f" ({source})" if source else "")
