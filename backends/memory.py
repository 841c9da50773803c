"""How much memory is left."""

from pathlib import Path

INFO = Path("/proc/meminfo")


def free_memory() -> int | None:
    """Bytes that new work may take without swapping; None where the system does not tell."""
    try:
        lines = INFO.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
