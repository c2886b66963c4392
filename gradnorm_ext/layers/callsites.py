"""Where in the user's code a call was made: for errors, which alone pay for it."""

from __future__ import annotations

import linecache
import sys
from pathlib import Path
from types import FrameType

import torch

_PACKAGES = str(Path(__file__).parents[1]), str(Path(torch.__file__).parent), "<"  # the last: code without a file


def call_site() -> str:
    """``, called at model.py:12 (y = x @ w)`` of the innermost frame outside of torch and this package, or nothing."""
    return described(calling_line(sys._getframe(1)))


def calling_line(frame: FrameType | None = None) -> tuple[str, int] | None:
    """The file and line of the innermost frame outside of torch and this package; reading them waits for `described`."""
    frame = frame or sys._getframe(1)
    while frame.f_code.co_filename.startswith(_PACKAGES):
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def described(place: tuple[str, int] | None) -> str:
    if place is None:
        return ""
    source = linecache.getline(*place).strip()
    return f", called at {place[0]}:{place[1]}" + (f" ({source})" if source else "")
