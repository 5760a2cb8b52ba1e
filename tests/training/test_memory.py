"""The memory of a training run: what the allocator keeps."""

import mmap
import platform
import subprocess
import sys

import pytest


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
def test_tuned_the_allocator_keeps_what_was_freed():
    """A process of its own: no page of the second tensor is fresh, where by default nearly all of
    them are. A tensor of 64 MB is never taken from the heap otherwise.
    """
    code = """if True:
        import resource, sys, torch
        import lorakit as lk
        if sys.argv[1] == "tuned":
            assert lk.tune_allocator()
        faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(1 << 26, dtype=torch.uint8)
        before = faults()
        torch.zeros((1 << 26) - 4096, dtype=torch.uint8)
        print(faults() - before)
    """
    pages = (1 << 26) // mmap.PAGESIZE
    for how, few in (("tuned", True), ("plain", False)):
        done = subprocess.run(
            [sys.executable, "-c", code, how], capture_output=True, text=True, check=True
        )
        assert (int(done.stdout) < pages / 10) == few, how
