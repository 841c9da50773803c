"""An arm's side of the protocol that `anamorph.benchmarks.peers` describes; standard library alone."""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

Request = Mapping[str, Any]


class Arm(Protocol):
    """What a peer brings: `open` once, then `run` and `stages`."""

    def open(self, request: Request) -> dict[str, Any]:
        """Load; returns `phases`, `precision` and `placement`."""

    def run(self, inputs: Path) -> dict[str, Any]:
        """The cell's work once; returns its seconds."""

    def stages(self, inputs: Path, out: Path) -> dict[str, Any]:
        """Write what each stage makes of the fixed inputs; returns their names as `stages`."""


class Clock:
    """Times calls of functions by name, in order."""

    def __init__(self, wait: Callable[[], None] = lambda: None) -> None:
        self.wait = wait
        """Returns when a device has done what was asked of it."""
        self.calls: list[tuple[str, float, float]] = []

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function; each call is noted with its start and end."""

        def call(*values: Any, **named: Any) -> Any:
            self.wait()
            started = time.perf_counter()
            result = function(*values, **named)
            self.wait()
            self.calls.append((name, started, time.perf_counter()))
            return result

        return call

    def measure(self, work: Callable[[], Any]) -> dict[str, Any]:
        """Run the work; seconds of all of it, of its calls, and of what follows the last one."""
        self.calls.clear()
        self.wait()
        started = time.perf_counter()
        work()
        self.wait()
        ended = time.perf_counter()

        def seconds(name: str) -> list[float]:
            return [end - start for called, start, end in self.calls if called == name]

        result: dict[str, Any] = {"total": ended - started}
        if self.calls:
            result |= {"text": sum(seconds("text")), "steps": seconds("denoiser"), "vae": sum(seconds("vae"))}
            if encode := seconds("encode"):
                result["encode"] = sum(encode)
            if control := seconds("control"):
                result["control"] = sum(control)
            result["post"] = ended - self.calls[-1][2] if self.calls[-1][0] == "vae" else 0.0
        return result


def serve(make: Callable[[], Arm], packages: list[str]) -> None:
    """Import (that is what `make` does), say so, and answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not get among the answers
    try:
        arm = make()
        hello: dict[str, Any] = {"ready": True, "versions": versions(packages)}
    except Exception as error:
        hello = failure(error)
    _say(answers, hello)
    for line in sys.stdin:
        try:
            _say(answers, {**answer(arm, json.loads(line)), **usage()})
        except Exception as error:  # a failure is a row of the result
            _say(answers, failure(error))


def start_pictures(inputs: Path) -> dict[str, Any]:
    """The pictures that a task starts from or follows, as arguments of a pipeline; none for text to image."""
    found = {name: place for name in ("image", "mask_image") if (place := inputs / f"{name}.png").exists()}
    if not found:
        return {}
    from PIL import Image

    return {name: Image.open(place).copy() for name, place in found.items()}


def answer(arm: Arm, request: Request) -> dict[str, Any]:
    """What one request gives."""
    match request["do"]:
        case "open":
            return arm.open(request)
        case "run":
            return {"seconds": arm.run(Path(request["inputs"]))}
        case "stages":
            return arm.stages(Path(request["inputs"]), Path(request["out"]))
    raise ValueError(f"there is no request {request['do']!r}")


def failure(error: Exception) -> dict[str, Any]:
    """An exception as one line; engines say what was wrong at its end."""
    text = " ".join(str(error).split()) or "without a word"
    return {"error": f"{type(error).__name__}: {text}"[:800]}


def usage() -> dict[str, float]:
    """Peak resident and present proportional memory (MiB) and processor seconds of this process."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    used = {"rss_mib": own.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10),
            "cpu_s": own.ru_utime + own.ru_stime}  # fmt: skip
    # On Linux a process inherits the peak of the one that started it; that of its own memory stands in /proc.
    for name, file, field in (("rss_mib", "status", "VmHWM:"), ("pss_mib", "smaps_rollup", "Pss:")):
        try:
            lines = Path(f"/proc/self/{file}").read_text(encoding="utf-8").splitlines()
            used[name] = next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
        except (OSError, StopIteration):
            continue
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        used["gpu_mib"] = torch.cuda.max_memory_reserved() / 2**20
    return used


def versions(packages: list[str]) -> dict[str, str]:
    """Those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _say(answers: Any, values: Mapping[str, Any]) -> None:
    print(json.dumps(values), file=answers, flush=True)
