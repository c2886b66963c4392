"""Where freed memory goes while steps are timed."""

import contextlib
import ctypes


def keep_freed_memory() -> None:
    """Has glibc's allocator keep what is freed, as those do that torch recommends for CPUs.

    By default it gives large blocks back to the system now and then, for one step and not for another, and taking them
    again costs up to 15 µs a page in a virtual machine: a fifth of a step, in an operation that is not ours.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # of <malloc.h>
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        library = ctypes.CDLL(None)
        library.mallopt(m_mmap_max, 0)
        library.mallopt(m_trim_threshold, -1)
