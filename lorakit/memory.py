"""Memory that a run has used."""

import resource
import sys

import torch


def peak_memory_mb(device: torch.device | str = "cpu") -> float:
    """The most memory so far, in MB (10^6 bytes).

    On a GPU what torch has allocated there; on the CPU the resident memory of the whole process,
    libraries and mapped files included.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB, macOS in bytes
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
