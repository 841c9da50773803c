"""What a result depends on besides the code that it measures, and whether the machine stood still meanwhile."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anamorph.backends.cores import physical_cores
from anamorph.benchmarks.peers.serve import versions
from anamorph.guard import missing
from anamorph.plugins import installed

SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "asimd",
        "bf16", "sve")  # fmt: skip
"""Instruction sets that decide which kernels an engine takes."""
PACKAGES = ["anamorph", "numpy", "torch", "onnxruntime", "openvino", "diffusers", "transformers"]
FOREIGN = 0.05
"""Share of all cores that other processes may take during a burst."""
SIDE, TURNS = 768, 15
REST = 0.03
"""Seconds before the sentinel runs, in which threads that wait for more work by turning in circles fall asleep."""


def environment() -> dict[str, Any]:
    """Processor, libraries, threads, driver, versions and git state, without the machine's name."""
    processor = _processor()
    return {
        **processor,
        "cores": physical_cores(),
        "affinity": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "governor": _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "system": f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
        "python": platform.python_version(),
        "gpu": _command("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"),
        "versions": versions(PACKAGES),
        "numpy_blas": _blas(),
        "git": _git(),
        "engines": {name: missing(engine) or "available" for name, engine in installed().backends.items()},
    }


def fingerprint(values: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an environment that must be the same for a run to be continued."""
    return {key: values[key] for key in ("processor", "instruction_sets", "cores", "affinity", "versions", "gpu")}


def _processor() -> dict[str, Any]:
    text = _text("/proc/cpuinfo") or ""
    fields = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    found = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set((found.get("flags") or found.get("Features") or "").split())
    return {
        "processor": found.get("model name") or platform.processor() or platform.machine(),
        "instruction_sets": [name for name in SETS if name in flags],
    }


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _command(*words: str) -> str | None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _blas() -> str:
    config: Any = np.show_config(mode="dicts")
    blas = config["Build Dependencies"]["blas"]
    return f"{blas.get('name')} {blas.get('version')}"


def _git() -> dict[str, Any] | None:
    folder = str(Path(__file__).resolve().parent)
    commit = _command("git", "-C", folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "changed": _command("git", "-C", folder, "status", "--porcelain", "-uno") is not None}


class Sentinel:
    """A fixed product of matrices: as long as it takes the same time, timings may be compared."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self.left, self.right = random.random((2, SIDE, SIDE), np.float32)
        self.measure()

    def measure(self) -> float:
        """Seconds of one product, the median of several."""
        time.sleep(REST)
        times = []
        for _ in range(TURNS):
            started = time.perf_counter()
            _ = self.left @ self.right
            times.append(time.perf_counter() - started)
        return statistics.median(times)


def drifted(readings: Sequence[float], usual: float, allowed: float) -> bool:
    """Whether the sentinel, read before and after a sample, was further from its usual seconds than is allowed."""
    return any(abs(reading / usual - 1) > allowed for reading in readings)


def disturbed(foreign: float | None) -> str | None:
    """Why a burst does not count during which other processes took a share of the cores (None: not known)."""
    if foreign is not None and foreign > FOREIGN:
        return f"other processes took {foreign:.0%} of the cores"
    return None


def busy_s() -> float | None:
    """Seconds that the processors this process may use have worked since the system started."""
    text = _text("/proc/stat")
    if text is None or not hasattr(os, "sched_getaffinity"):
        return None
    allowed = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    ticks = 0
    for line in text.splitlines():
        name, *numbers = line.split()
        if name in allowed:
            user, nice, system, _, _, interrupts, soft, steal = map(int, numbers[:8])
            ticks += user + nice + system + interrupts + soft + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def energy_uj() -> int | None:
    """The processor packages' energy counters (microjoules), None where there are none to read."""
    counters = [_text(str(path)) for path in sorted(Path("/sys/class/powercap").glob("intel-rapl:?/energy_uj"))]
    return sum(map(int, counters)) if counters and all(counters) else None  # type: ignore[arg-type]
