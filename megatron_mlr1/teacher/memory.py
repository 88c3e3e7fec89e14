"""How the C library treats blocks as large as a reply."""

import ctypes
import sys
from typing import Final

LARGEST_BLOCK: Final = 2**30
_TRIM_THRESHOLD: Final = -1
_MMAP_THRESHOLD: Final = -3
_ARENA_MAX: Final = -8


def keep_large_blocks() -> bool:
    """Let the C library reuse the memory of freed blocks of up to `LARGEST_BLOCK` bytes.

    By default glibc takes a block above 32 MiB, as a reply of 4,096 rows of 8,192 bytes is, fresh
    from the kernel, page by page, and gives it back when it is freed. For a student that costs
    twice as much as receiving the bytes. After this call at most as much memory as was in use at
    once stays with the process, and threads that begin later share one arena: one of their own
    would give a block as large as a reply back all the same. False where there is no glibc; then
    nothing was done.

    Source: mallopt(3), M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_ARENA_MAX, whose numbers are in
    malloc.h.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    settings = ((_MMAP_THRESHOLD, LARGEST_BLOCK), (_TRIM_THRESHOLD, LARGEST_BLOCK), (_ARENA_MAX, 1))
    return all(library.mallopt(setting, value) == 1 for setting, value in settings)
