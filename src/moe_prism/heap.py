"""How the C library keeps memory that was freed."""

from __future__ import annotations

import ctypes

M_MMAP_THRESHOLD = -3
LARGE = 1 << 20


def return_large_buffers() -> None:
    """From now on the system gets buffers of 1 MiB and more back when they are freed. Nothing happens where the C library is not glibc.

    By itself glibc keeps them for the thread that freed them, up to 32 MiB each. A reader that dequantizes with four threads then holds
    several layers that nobody uses, a different number in every run. The price is that a buffer's pages are new each time.
    """
    _call("mallopt", M_MMAP_THRESHOLD, LARGE)


def return_freed_pages() -> None:
    """The system gets every whole page of freed memory back now, small buffers' too, whatever lies between them.

    Without it the buffers of one layer leave holes that the next one's do not fit: 100 MiB for layers of 96 MiB.
    """
    _call("malloc_trim", 0)


def _call(function: str, *numbers: int) -> None:
    try:
        getattr(ctypes.CDLL(None), function)(*numbers)
    except (OSError, AttributeError, TypeError):
        return
