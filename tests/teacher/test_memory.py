import subprocess
import sys

import pytest

from megatron_mlr1.teacher.memory import keep_large_blocks

BLOCK_BYTES = 40 * 2**20
COUNT_PAGE_FAULTS = f"""
import resource, sys
from megatron_mlr1.teacher.memory import keep_large_blocks
if sys.argv[1] == "keep":
    keep_large_blocks()
bytearray({BLOCK_BYTES})
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    bytearray(b"x") * {BLOCK_BYTES}
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="other C libraries have no mallopt"
)
def test_a_freed_reply_is_reused_without_new_pages():
    if not keep_large_blocks():
        pytest.skip("this machine's C library is not glibc")
    fresh, kept = (
        int(subprocess.check_output([sys.executable, "-c", COUNT_PAGE_FAULTS, how], text=True))
        for how in ("default", "keep")
    )
    # A huge page is one fault, and the kernel may use them for the fresh blocks.
    assert kept < fresh
