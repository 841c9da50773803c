"""What of this machine decides whether native code made on it runs here, and how fast."""

import functools
import hashlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

INFO = Path("/proc/cpuinfo")


@functools.cache
def processor() -> str:
    """The processor's name and a digest of its instruction sets, which virtual machines may hide."""
    found = {"model name": platform.processor() or platform.machine(), "flags": ""}
    try:
        for line in INFO.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in found:
                found[name.strip()] = value.strip()
            elif not line:  # one processor is enough
                break
    except OSError:
        pass
    flags = " ".join(sorted(found["flags"].split()))
    return f"{found['model name']} {hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def available_processors() -> int | None:
    """How many this process may use; hardware threads count."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def package_version(package: str) -> str:
    """A package with its version, whether it is installed or not."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"
