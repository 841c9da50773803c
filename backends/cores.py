"""How many threads a computation on the processor should have."""

import os
from pathlib import Path

TOPOLOGY = Path("/sys/devices/system/cpu")


def physical_cores() -> int:
    """Cores that this process may use; two hardware threads of one core count once, where the system tells."""
    if not hasattr(os, "sched_getaffinity"):  # macOS and Windows
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    try:
        cores = {
            tuple((TOPOLOGY / f"cpu{cpu}/topology/{name}").read_text() for name in ("physical_package_id", "core_id"))
            for cpu in allowed
        }
    except OSError:
        return len(allowed)
    return len(cores)
