"""The memory of a training run: what the allocator keeps."""

import mmap
import os
import platform
import subprocess
import sys

import pytest
import torch

import lorakit as lk
from lorakit.training.memory import forget_peak, free_host_memory, peak_memory_mb


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


GROUP = "proc/self/cgroup"
MEMINFO = {"proc/meminfo": "MemTotal:       100 kB\nMemAvailable:        64 kB\n"}


@pytest.mark.parametrize(
    ("files", "left"),
    [
        (MEMINFO, 64 << 10),
        # version 2: of all groups up to the root the one that has the least left
        (
            {
                **MEMINFO,
                GROUP: "0::/a/b\n",
                "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/b/memory.current": "1\n",
                "sys/fs/cgroup/a/b/memory.stat": "anon 3\ninactive_file 100\n",
                "sys/fs/cgroup/a/memory.max": "9000\n",
                "sys/fs/cgroup/a/memory.current": "8500\n",
                "sys/fs/cgroup/a/memory.stat": "anon 3\ninactive_file 100\n",
            },
            600,
        ),
        (
            {
                **MEMINFO,
                GROUP: "4:memory:/job\n3:cpu:/x\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "5000\n",
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "6000\n",
                "sys/fs/cgroup/memory/job/memory.stat": "cache 9\n",
            },
            0,
        ),
        ({**MEMINFO, GROUP: "nonsense"}, 64 << 10),
    ],
)
def test_free_memory_is_what_the_machine_and_its_control_groups_leave(files, left, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert free_host_memory(tmp_path) == left


def test_free_memory_of_this_machine(tmp_path):
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < lk.memory.free_memory("cpu") <= whole
    assert free_host_memory(tmp_path) == whole  # a system without /proc


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets the peak of a process")
def test_a_peak_that_is_forgotten_begins_from_what_is_in_use():
    """A tensor of 200 MB is in the peak after it is gone, until the peak is forgotten."""
    forget_peak()
    before = peak_memory_mb()
    tensor = torch.ones(50_000_000)
    during = peak_memory_mb()
    del tensor
    assert during > before + 190
    assert peak_memory_mb() == during
    forget_peak()
    assert peak_memory_mb() < during - 100
