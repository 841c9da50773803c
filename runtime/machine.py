"""What of this machine decides whether native code made on it runs here, how fast, and in how much memory."""

import functools
import hashlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

INFO, MEMORY, OWN = Path("/proc/cpuinfo"), Path("/proc/meminfo"), Path("/proc/self/status")


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


@functools.cache
def is_zen() -> bool:
    """Whether this is an x86 processor by AMD, or by Hygon after AMD's: Intel's MKL has no kernels for it."""
    try:
        told = INFO.read_text(encoding="utf-8")
    except OSError:
        told = platform.processor()
    return "AuthenticAMD" in told or "HygonGenuine" in told


def available_processors() -> int | None:
    """How many this process may use; hardware threads count."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def package_version(package: str) -> str:
    """A package with its version, whether it is installed or not."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def free_memory() -> int | None:
    """Bytes that new work may take without swapping; None where the system does not tell."""
    try:
        lines = MEMORY.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def own_memory() -> int | None:
    """Bytes that this process holds and no file backs; None where the system does not tell."""
    try:
        lines = OWN.read_text(encoding="utf-8", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
    except (OSError, StopIteration):
        return None
