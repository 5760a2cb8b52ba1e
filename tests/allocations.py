"""What torch's allocator holds in host memory while something runs."""

import gc

from torch.profiler import ProfilerActivity, profile


def counted(run) -> tuple[int, int]:
    """Bytes that the allocator held while `run` ran, at most and at the end."""
    gc.collect()  # what others have left would be given back meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, live
